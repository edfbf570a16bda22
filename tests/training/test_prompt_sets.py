# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Named sets of prompts: what is asked of the Hub and of GitHub, and what becomes of it; the table in the README."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub, Repository, loopback_hub

from flowbp.training import prompt_sets
from flowbp.training.prompt_sets import PROMPT_SETS
from flowbp.training.prompts import load_records

README = (Path(__file__).parents[2] / "training" / "README.md").read_text(encoding="utf-8")
# In a process of its own, because the client reads HF_ENDPOINT when it is imported.
LOAD = (
    "import json, sys\nfrom flowbp.training import prompt_sets\nfrom flowbp.training.prompts import load_records\n"
    "prompt_sets.GITHUB = sys.argv[1]\n"
    "print(json.dumps([[[each.prompt, each.columns] for each in load_records(name)] for name in sys.argv[2:]]))"
)


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A Hub, which also answers for GitHub."""
    with loopback_hub() as running:
        yield running


def publish(hub: LoopbackHub, name: str, *contents: str) -> None:
    """The files of a set."""
    chosen = PROMPT_SETS[name]
    repository = chosen.repository.removeprefix("github.com/")
    files = {file: text.encode() for file, text in zip(chosen.files, contents, strict=True)}
    hub.datasets[repository] = Repository(files, [chosen.revision])


def load(hub: LoopbackHub, home: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """`load_records` of sets."""
    environment = {**hub.environment(home, token=None), "HF_HUB_OFFLINE": "0"}
    words = [sys.executable, "-c", LOAD, f"{hub.url}/raw", *names]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_sets_are_downloaded_once_at_their_revision(hub: LoopbackHub, tmp_path: Path) -> None:
    styles = [json.dumps([f"{style} 1", f"{style} 2"]) for style in ("anime", "concept", "paint", "photo")]
    publish(hub, "hpdv2", *styles)
    # As the files of these repositories: double quotes within a field, and around a part of one.
    publish(
        hub,
        "parti-prompts",
        'Prompt\tCategory\tChallenge\tNote\nthe word "ok"\tArts\tBasic\t\n"G I G" painted\tArts\tBasic\ta "b"\n',
    )
    publish(hub, "drawbench", 'Prompts,Category\n"A cube, in red.",Colors\nA dog.,DALL-E\n')
    publish(hub, "geneval", '{"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "two cows"}\n')
    publish(hub, "flowbp-train", "a fox\na dog\n")
    names = ("hpdv2", "parti-prompts", "drawbench", "geneval", "flowbp-train")
    done = load(hub, tmp_path, *names)
    assert done.returncode == 0, done.stderr
    files = zip(("anime", "concept-art", "paintings", "photo"), styles, strict=True)
    assert json.loads(done.stdout) == [
        [[prompt, {"style": style}] for style, text in files for prompt in json.loads(text)],
        [
            ['the word "ok"', {"Category": "Arts", "Challenge": "Basic", "Note": ""}],
            ['"G I G" painted', {"Category": "Arts", "Challenge": "Basic", "Note": 'a "b"'}],
        ],
        [["A cube, in red.", {"Category": "Colors"}], ["A dog.", {"Category": "DALL-E"}]],
        [["two cows", {"tag": "counting"}]],
        [["a fox", {}], ["a dog", {}]],
    ]
    assert "holds the prompts" not in done.stderr
    # Commits do not change: nothing is asked again.
    hub.server.server_close()
    assert load(hub, tmp_path, *names).stdout == done.stdout


@pytest.mark.parametrize("name", ["drawbench", "flowbp-eval"])
def test_what_cannot_be_had_is_one_line(hub: LoopbackHub, tmp_path: Path, name: str) -> None:
    done = load(hub, tmp_path, name)
    message = done.stderr.splitlines()[-1]
    chosen = PROMPT_SETS[name]
    assert done.returncode == 1
    assert f"prompts: the set '{name}' is {chosen.files[0]} of {chosen.repository} at {chosen.revision}" in message
    assert message.endswith("download the files, and name them here")


def test_a_file_of_the_same_name_is_not_confused_with_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("geneval").mkdir()
    Path("geneval/p.jsonl").write_text('{"prompt": "mine"}')
    with pytest.raises(ValueError, match=r"'geneval' is a named set, and a file or folder here: write \./geneval"):
        load_records("geneval")
    assert [record.prompt for record in load_records("./geneval")] == ["mine"]
    for options, expected in (({"split": "test"}, "has no splits"), ({"column": "x"}, "has no column 'x'")):
        monkeypatch.setattr(prompt_sets.PromptSet, "download", lambda self: [tmp_path / "geneval" / "p.jsonl"])
        with pytest.raises(ValueError, match=expected):
            load_records("drawbench" if "split" in options else "./geneval", **options)


def test_the_table_in_the_readme() -> None:
    for name, chosen in PROMPT_SETS.items():
        assert re.fullmatch(r"[0-9a-f]{40}", chosen.revision)
        repository = chosen.repository.removeprefix("github.com/")
        place = "https://" if repository != chosen.repository else "https://huggingface.co/datasets/"
        link = f"[{repository}]({place}{chosen.repository})"
        line = f"| `{name}` | {chosen.contents} | {chosen.count or 'not known'} | {link} | {chosen.licence} |"
        assert line in README.splitlines()
