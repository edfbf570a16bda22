# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Publishing with the real client against a Hub on this machine: what arrives, what never does, and every fault."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest
from loopback_hub import GOOD_TOKEN, PUSH_ENDPOINTS, USER, LoopbackHub, Repository, loopback_hub
from PIL import Image
from safetensors.numpy import save_file

from flowbp.publishing.published_files import LORA_FILE, allowed_files
from flowbp.publishing.push import PushError, main, push_folder

CANARY = "hf_canaryOfTheTests0123456789"
REPO = f"{USER}/repo"
# Endpoints that the client itself tries six times, which takes it 23 seconds.
RETRIED_BY_CLIENT = ("preupload", "lfs-batch", "lfs-put", "lfs-verify")


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A Hub without repositories."""
    with loopback_hub() as running:
        yield running


def make_output(folder: Path) -> Path:
    """What a run leaves: everything that may be pushed."""
    (folder / "images").mkdir(parents=True)
    save_file({"a": np.arange(300, dtype=np.float32)}, folder / LORA_FILE, metadata={"format": "pt"})
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Card\n")
    (folder / "run.json").write_text(json.dumps({"hub_model_id": REPO}))
    for name in ("before_after.png", "reward_curve.png", "images/0_base.png", "images/0_trained.png"):
        Image.new("RGB", (3, 2)).save(folder / name)
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """The folder of a run, its name with a space."""
    return make_output(tmp_path / "my run")


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def python(hub: LoopbackHub, home: Path, words: list[str], token: str | None = GOOD_TOKEN) -> tuple[int, str, str]:
    """Exit code, output and errors of a Python process whose client knows this Hub alone."""
    done = subprocess.run(
        [sys.executable, *words],
        env=hub.environment(home, token),
        cwd=home.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def push(hub: LoopbackHub, output: Path, *words: str, token: str | None = GOOD_TOKEN) -> tuple[int, str, str]:
    """`python -m flowbp.publishing.push` with short waits."""
    home = output.parent / "home"
    home.mkdir(exist_ok=True)
    return python(hub, home, ["-m", "flowbp.publishing.push", str(output), "--first_wait", "0.01", *words], token)


def message_of(errors: str) -> str:
    """The only error message; the client's warnings and progress bars are around it."""
    (message,) = (line for line in errors.splitlines() if line.startswith("python -m flowbp.publishing.push: error: "))
    return message


def check_failure(result: tuple[int, str, str], output: Path, before: dict[str, bytes], *texts: str) -> None:
    """Exit code 1, one line that says what failed and what to do later, and all files kept."""
    code, printed, errors = result
    assert code == 1 and printed == ""
    message = message_of(errors)
    for text in ("Not pushed to ", f"All files are kept in {output}", *texts):
        assert text in message
    command = shlex.split(message.partition("push them later with: ")[2])
    assert command[:3] == ["python", "-m", "flowbp.publishing.push"] and command[3] == str(output)
    assert content_of(output) == before


def test_push_and_push_again(hub: LoopbackHub, output: Path) -> None:
    """One commit with every file, byte for byte; none when nothing changed; one when something did."""
    code, printed, _ = push(hub, output)
    assert (code, printed) == (0, f"{hub.url}/{REPO}\n")
    repository = hub.repositories[REPO]
    assert repository.files == content_of(output) and len(repository.files) == 7
    assert len(repository.commits) == 1
    assert hub.put_tokens == [] and hub.counts["unknown"] == 0

    assert push(hub, output)[0] == 0
    assert len(repository.commits) == 1 and hub.counts["lfs-put"] == 1

    (output / "README.md").write_text("---\nlicense: mit\n---\n\n# Another card\n")
    assert push(hub, output)[0] == 0
    assert len(repository.commits) == 2 and repository.files == content_of(output)


def test_paths_are_not_published(hub: LoopbackHub, output: Path) -> None:
    """What the card hides, the published record hides too; the own one keeps it."""
    settings = {"prompts": "/data/secret/p.txt", "revision": "refs/pr/1", "num": 1.5, "lora": ["a=/mnt/secret/b c"]}
    run = {"hub_model_id": REPO, "command": ["/opt/secret/t.py", "--x=/y/secret/z"], "settings": settings}
    run |= {"images": [{"prompt": "the sign /secret/é says", "base": "images/0_base.png"}]}
    (output / "run.json").write_text(json.dumps(run, indent=2))
    before = content_of(output)
    assert push(hub, output)[0] == 0 and content_of(output) == before
    settings |= {"prompts": "p.txt", "lora": ["a=b c"]}
    published = json.loads(hub.repositories[REPO].files["run.json"])
    assert published == {**run, "command": ["t.py", "--x=z"], "settings": settings}


def test_the_repository(hub: LoopbackHub, output: Path) -> None:
    """The option wins over run.json, which wins over the folder's name."""
    assert push(hub, output, "--hub_model_id", "team/other")[1] == f"{hub.url}/team/other\n"
    (output / "run.json").write_text(json.dumps({"hub_model_id": None}))
    folder = output.rename(output.with_name("folder"))
    assert push(hub, folder)[1] == f"{hub.url}/{USER}/folder\n"
    (folder / "run.json").unlink()
    assert push(hub, folder)[1] == f"{hub.url}/{USER}/folder\n"
    assert set(hub.repositories) == {"team/other", f"{USER}/folder"}


@pytest.mark.parametrize("endpoint", PUSH_ENDPOINTS)
def test_a_fault_of_each_endpoint(hub: LoopbackHub, output: Path, endpoint: str) -> None:
    """503 once is got over, with one commit in the end."""
    hub.fail(endpoint)
    assert push(hub, output)[0] == 0
    assert hub.counts[endpoint] >= 2
    assert hub.repositories[REPO].files == content_of(output) and len(hub.repositories[REPO].commits) == 1


def check_stays_down(hub: LoopbackHub, output: Path, endpoint: str) -> None:
    """503 for ever is an error; the printed command pushes when the Hub is back."""
    hub.fail(endpoint, times=float("inf"))
    before = content_of(output)
    tries, requests = (1, 6) if endpoint in RETRIED_BY_CLIENT else (4, 4)
    result = push(hub, output, "--tries", str(tries))
    check_failure(result, output, before)
    assert hub.counts[endpoint] == requests
    assert REPO not in hub.repositories or hub.repositories[REPO].commits == []

    hub.faults.clear()
    command = shlex.split(message_of(result[2]).partition("push them later with: ")[2])
    code, printed, _ = python(hub, output.parent / "home", command[1:])
    assert (code, printed) == (0, f"{hub.url}/{REPO}\n")
    assert hub.repositories[REPO].files == before


@pytest.mark.parametrize("endpoint", [name for name in PUSH_ENDPOINTS if name not in RETRIED_BY_CLIENT])
def test_an_endpoint_that_stays_down(hub: LoopbackHub, output: Path, endpoint: str) -> None:
    """Where only we try again."""
    check_stays_down(hub, output, endpoint)


def test_an_endpoint_that_stays_down_for_the_client(tmp_path: Path) -> None:
    """Where the client tries again too; all at once, because it sleeps most of the time."""

    def check(endpoint: str) -> None:
        with loopback_hub() as hub:
            check_stays_down(hub, make_output(tmp_path / endpoint / "run"), endpoint)

    with ThreadPoolExecutor(len(RETRIED_BY_CLIENT)) as pool:
        list(pool.map(check, RETRIED_BY_CLIENT))


@pytest.mark.parametrize(("cut", "requests"), [("before", 2), ("after", 1)])
def test_the_connection_is_cut_at_the_commit(hub: LoopbackHub, output: Path, cut: str, requests: int) -> None:
    """A commit that did not land is repeated; one that landed is found, and not made twice."""
    hub.fail("commit", cut=cut)
    assert push(hub, output)[:2] == (0, f"{hub.url}/{REPO}\n")
    assert len(hub.repositories[REPO].commits) == 1 and hub.repositories[REPO].files == content_of(output)
    assert hub.counts["commit"] == requests and hub.counts["preupload"] == 2


def test_retry_after(hub: LoopbackHub, output: Path) -> None:
    """Too many requests: the next try waits as long as the Hub asks for, in seconds or as a date."""
    hub.fail("create", status=429, headers={"Retry-After": "2"})
    start = time.monotonic()
    code, _, errors = push(hub, output)
    assert code == 0 and time.monotonic() - start > 2 and "next try in 2 s" in errors
    hub.fail("create", status=429, headers={"Retry-After": formatdate(time.time() + 4, usegmt=True)})
    start = time.monotonic()
    code, _, errors = push(hub, output)
    assert code == 0 and time.monotonic() - start > 2


def test_a_wait_that_is_too_long(hub: LoopbackHub, output: Path) -> None:
    """Where the Hub asks for an hour, the push gives up at once and says how to go on."""
    hub.fail("create", status=429, times=float("inf"), headers={"Retry-After": "3600"})
    check_failure(push(hub, output), output, content_of(output), "429")
    assert hub.counts["create"] == 1


@pytest.mark.parametrize("status", [400, 403, 404])
def test_permanent_errors_are_not_repeated(hub: LoopbackHub, output: Path, status: int) -> None:
    """One request, one line."""
    hub.fail("commit", status=status, times=float("inf"))
    check_failure(push(hub, output), output, content_of(output))
    assert hub.counts["commit"] == 1


def test_no_server(hub: LoopbackHub, output: Path) -> None:
    """Nothing listens there: tried, then an error."""
    hub.server.server_close()
    result = push(hub, output, "--tries", "2")
    check_failure(result, output, content_of(output))
    assert result[2].count("next try") == 1


def test_bad_and_missing_tokens(hub: LoopbackHub, output: Path) -> None:
    """What to do is said, and the token is not."""
    bad = "hf_badTokenOfTheTests0123456789"
    result = push(hub, output, token=bad)
    check_failure(result, output, content_of(output), "(401)", "hf auth login", "HF_TOKEN")
    assert bad not in "".join(map(str, result)) and hub.counts["create"] == 1
    check_failure(push(hub, output, token=None), output, content_of(output), "no token", "hf auth login")
    assert hub.counts["create"] == 1 and hub.repositories == {}


def test_pushing_starts_quickly() -> None:
    """Without the seconds that torch and diffusers take; and the card does not depend on the push."""
    for module, absent in (("push", ["torch", "diffusers"]), ("model_card", ["flowbp.publishing.push"])):
        code = f"import sys, flowbp.publishing.{module}; print(*(set({absent}) & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
        assert done.stdout == "\n", module


def test_bad_command_lines(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2."""
    broken = output.parent / "broken"
    broken.mkdir()
    (broken / "run.json").write_text("{")
    for words in ([str(output.parent / "none")], [str(output), "--tries", "0"], [str(broken)], [], ["a", "--token"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        printed = capsys.readouterr()
        assert caught.value.code == 2 and printed.out == "" and len(printed.err.splitlines()) == 1
        assert printed.err.startswith("python -m flowbp.publishing.push: error: ")


def test_decoys(hub: LoopbackHub, output: Path) -> None:
    """Of all that lies in the folder besides the list nothing arrives, whatever its form."""
    expected = content_of(output)
    outside = output.parent / "outside"
    outside.mkdir()
    Image.new("RGB", (4, 4)).save(outside / "private.png")
    (outside / "passwords.txt").write_text("private")
    for name in (".env", "optimizer.bin", "log.jsonl", "images/.env", "images/7_lora.png.bak", "images/x_lora.png"):
        (output / name).write_bytes(b"private")
    for name in ("checkpoint-5/lora.safetensors", "best/" + LORA_FILE, "images/sub/3_lora.png", "images/5_lora.png/x"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(b"private")
    (output / "images" / "8_trained.png").symlink_to(outside / "private.png")
    (output / "images" / "9_base.png").symlink_to(output / "before_after.png")
    (output / "images" / "١_trained.png").write_bytes(b"a digit, but not one of the list's")
    os.mkfifo(output / "images" / "6_trained.png")
    (output / "README.md").unlink()
    (output / "README.md").symlink_to(outside / "passwords.txt")
    del expected["README.md"]
    assert push(hub, output)[0] == 0
    assert hub.repositories[REPO].files == expected


def make_transformer(output: Path, shards: int = 1) -> Path:
    """Replace the LoRA of `make_output` by a transformer as a run writes it; returns its folder."""
    (output / LORA_FILE).unlink()
    suffixes = [""] if shards == 1 else [f"-{place:05d}-of-{shards:05d}" for place in range(1, shards + 1)]
    names = [f"diffusion_pytorch_model{suffix}.safetensors" for suffix in suffixes]
    folder = output / "transformer"
    folder.mkdir()
    for name in names:
        save_file({name: np.arange(300, dtype=np.float32)}, folder / name, metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {}, "weight_map": {name: name for name in names}}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"_class_name": "SD3Transformer2DModel"}')
    return folder


@pytest.mark.parametrize("shards", [1, 2])
def test_a_transformer(hub: LoopbackHub, output: Path, shards: int) -> None:
    """Config, weights and their index arrive; the manifest, links and everything else there do not."""
    folder = make_transformer(output, shards)
    expected = content_of(output)
    (folder / "config.json").rename(output.parent / "config.json")
    (folder / "config.json").symlink_to(output.parent / "config.json")
    code, _, error = push(hub, output)
    assert code == 1 and "the folder transformer lacks config.json" in error
    (folder / "config.json").unlink()
    (output.parent / "config.json").rename(folder / "config.json")
    for name in ("manifest.json", "README.md", "x.safetensors", "optimizer.bin", "sub/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("private")
    assert push(hub, output)[0] == 0
    assert hub.repositories[REPO].files == expected


def test_a_transformer_beside_a_lora_or_behind_a_link(output: Path) -> None:
    """A run writes one of the two, so of a run with a LoRA such a folder is somebody else's."""
    lora = (output / LORA_FILE).read_bytes()
    folder = make_transformer(output)
    assert {path.name for path in allowed_files(output) if path.parent == folder} == {
        path.name for path in folder.iterdir()
    }
    folder.rename(output.parent / "elsewhere")
    folder.symlink_to(output.parent / "elsewhere")
    check_refusal(output, "no transformer's weights in this folder")
    folder.unlink()
    (output.parent / "elsewhere").rename(folder)
    (output / LORA_FILE).write_bytes(lora)
    assert len(allowed_files(output)) == 7


@pytest.mark.parametrize(
    ("break_it", "text"),
    [
        (
            lambda folder: next(folder.glob("*2-of*")).unlink(),
            "lacks diffusion_pytorch_model-00002-of",
        ),
        (
            lambda folder: next(folder.glob("*.index.json")).unlink(),
            "has a file of another transformer, diffusion_pytorch_model-00001",
        ),
        (
            lambda folder: (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"an earlier one"),
            "has a file of another transformer, diffusion_pytorch_model.safetensors",
        ),
        (lambda folder: next(folder.glob("*2-of*")).write_bytes(b"\x80\x04K\x01."), "is not a safetensors file"),
        (lambda folder: (folder / "config.json").write_text(f'"{CANARY}"'), "transformer/config.json holds a secret"),
    ],
)
def test_a_transformer_that_is_not_whole(output: Path, break_it: Callable[[Path], None], text: str) -> None:
    """Refused by the name of the file."""
    break_it(make_transformer(output, shards=2))
    check_refusal(output, text)


def test_the_folder_of_images_is_a_link(hub: LoopbackHub, output: Path) -> None:
    """It is not entered, wherever it points."""
    moved = (output / "images").rename(output.parent / "elsewhere")
    (output / "images").symlink_to(moved)
    assert push(hub, output)[0] == 0
    assert sorted(hub.repositories[REPO].files) == sorted(
        ["README.md", "run.json", LORA_FILE, "before_after.png", "reward_curve.png"]
    )


def test_the_output_folder_may_be_a_link(output: Path) -> None:
    """That one the user has named."""
    link = output.parent / "link"
    link.symlink_to(output)
    names = [path.relative_to(link).as_posix() for path in allowed_files(link)]
    assert names == [path.relative_to(output).as_posix() for path in allowed_files(output)] and len(names) == 7


def check_refusal(output: Path, text: str, repo_id: str = REPO) -> None:
    """Refused in one line before any request (the client of this process is offline), and all files kept."""
    before = content_of(output)
    with pytest.raises(PushError) as caught:
        push_folder(output, repo_id)
    message = str(caught.value)
    assert text in message and "python -m flowbp.publishing.push" in message and len(message.splitlines()) == 1
    assert CANARY not in message and content_of(output) == before


def test_files_that_are_not_what_they_are_called(output: Path) -> None:
    """A pickle named like weights, a text named like an image, weights that are a link: refused by name."""
    weights = (output / LORA_FILE).read_bytes()
    for data in (b"\x80\x04K\x01.", b"", weights[:40], weights[:-1]):
        (output / LORA_FILE).write_bytes(data)
        check_refusal(output, f"{LORA_FILE} is not a safetensors file")
    (output / LORA_FILE).unlink()
    (output.parent / "weights").write_bytes(weights)
    (output / LORA_FILE).symlink_to(output.parent / "weights")
    check_refusal(output, f"no file {LORA_FILE}")
    (output / LORA_FILE).unlink()
    (output / LORA_FILE).write_bytes(weights)
    (output / "images" / "0_trained.png").write_bytes(b"PASSWORD=1")
    check_refusal(output, "images/0_trained.png is not a PNG file")


@pytest.mark.parametrize("name", ["README.md", "run.json", LORA_FILE])
def test_a_secret_in_a_file(output: Path, name: str) -> None:
    """The file is named and nothing is sent."""
    if name == LORA_FILE:
        save_file({"a": np.zeros(1)}, output / name, metadata={"note": CANARY})
    else:
        with (output / name).open("a") as file:
            file.write(f'\n"{CANARY}"\n')
    check_refusal(output, f"{name} holds a secret")


def test_a_bad_name(output: Path) -> None:
    """Of a repository."""
    check_refusal(output, "Expected user/name", "not a/good/name")


def test_token_canary(hub: LoopbackHub, output: Path) -> None:
    """The token in use is in nothing that is printed, written or sent as content, also where pushing fails."""
    (output / "README.md").write_text(f"---\nlicense: mit\n---\n{GOOD_TOKEN[:10]}")
    results = [push(hub, output)]
    hub.fail("commit", times=float("inf"))
    (output / "README.md").write_text("---\nlicense: mit\n---\nchanged")
    results.append(push(hub, output, "--tries", "2"))
    (output / "README.md").write_text(GOOD_TOKEN)
    results.append(push(hub, output))
    (output / "README.md").unlink()
    results.append(push(hub, output, "--hub_model_id", GOOD_TOKEN + "!"))
    assert [code for code, _, _ in results] == [0, 1, 1, 1]
    assert all(GOOD_TOKEN not in printed + errors for _, printed, errors in results)
    assert all(GOOD_TOKEN.encode() not in data for data in content_of(output.parent).values())
    assert all(GOOD_TOKEN.encode() not in data for data in hub.repositories[REPO].files.values())


CHECK = (
    "import sys\nfrom flowbp.publishing.push import check_access\n"
    "try:\n    print(check_access(sys.argv[1], len(sys.argv) > 2, tries=3, first_wait=0.01))\n"
    "except ValueError as error:\n    sys.exit(str(error))"
)


def check_access(
    hub: LoopbackHub, home: Path, repo: str, token: str | None = GOOD_TOKEN, private: bool = False
) -> tuple[int, str, str]:
    """`check_access` in a process of its own."""
    home.mkdir(exist_ok=True)
    return python(hub, home, ["-c", CHECK, repo, *["private"] * private], token)


def test_check_access(hub: LoopbackHub, tmp_path: Path) -> None:
    """Nothing is created; the user's name is added; temporary faults are got over."""
    home = tmp_path / "home"
    for endpoint in ("whoami", "info"):
        hub.fail(endpoint, times=2)
        assert check_access(hub, home, "fresh")[:2] == (0, f"{USER}/fresh\n")
    assert check_access(hub, home, "team/fresh", private=True)[:2] == (0, "team/fresh\n")
    assert hub.repositories == {} and not hub.counts["create"] and not hub.counts["auth-check"]
    hub.repositories = {REPO: Repository(), "other/repo": Repository(private=True)}
    # Whether the token may write to a repository of others is for the Hub to say.
    assert check_access(hub, home, "other/repo", private=True)[:2] == (0, "other/repo\n")
    # A fault of the server is no answer to whether the token may write.
    for read_only in (True, False):
        hub.read_only = read_only
        hub.fail("auth-check", times=1)
        assert check_access(hub, home, "repo")[0] == read_only
    # A server that does not know the check of permissions.
    hub.fail("auth-check", status=404)
    assert check_access(hub, home, "repo")[:2] == (0, f"{REPO}\n")
    assert hub.repositories[REPO].commits == [] and not hub.counts["create"]


def test_check_access_refuses(hub: LoopbackHub, tmp_path: Path) -> None:
    """One line that says what to do, for each thing that can be wrong."""
    home, bad = tmp_path / "home", "hf_badTokenOfTheTests0123456789"
    hub.repositories = {REPO: Repository()}
    refused = [
        (check_access(hub, home, "repo", token=bad), "hf auth login"),
        (check_access(hub, home, "repo", token=None), "HF_TOKEN"),
        (check_access(hub, home, "a b/c"), "Expected user/name"),
        (check_access(hub, home, "other/fresh"), "user may not create it; choose a --hub_model_id in user, team."),
        (check_access(hub, home, "readers/fresh"), "user may not create it; choose a --hub_model_id in user, team."),
        (check_access(hub, home, "repo", private=True), f"{REPO} exists and is public, and --hub_private_repo does"),
    ]
    hub.role = "read"
    refused.append((check_access(hub, home, "fresh"), "the token may only read; log in"))
    hub.role, hub.read_only = "fineGrained", True
    refused.append((check_access(hub, home, REPO), "(403: the token may only read)"))
    hub.read_only = False
    for endpoint in ("whoami", "info", "auth-check"):
        hub.fail(endpoint, times=float("inf"))
        refused.append((check_access(hub, home, "repo"), "503"))
        hub.fail(endpoint, times=0)
    hub.server.server_close()
    refused.append((check_access(hub, home, "repo"), "--push_to_hub"))
    for (code, printed, errors), text in refused:
        assert code == 1 and printed == "" and bad not in errors
        message = errors.splitlines()[-1]
        assert text in message and message.startswith("--push_to_hub: ")


def test_a_private_repository(hub: LoopbackHub, output: Path) -> None:
    """As the run was told, or the command; nothing goes to a public one, and the command for later says it too."""
    (output / "run.json").write_text(json.dumps({"hub_model_id": REPO, "settings": {"hub_private_repo": True}}))
    before = content_of(output)
    hub.repositories = {REPO: Repository(), "team/public": Repository()}
    check_failure(push(hub, output), output, before, f"{REPO} exists and is public", "--hub_private_repo")
    assert not hub.counts["preupload"] and not hub.repositories[REPO].private
    del hub.repositories[REPO]
    assert push(hub, output)[0] == 0
    assert hub.repositories[REPO].private and hub.repositories[REPO].commits
    # One that is private already, and another name.
    assert push(hub, output)[0] == 0
    code, _, errors = push(hub, output, "--hub_model_id", "team/public")
    assert code == 1 and "team/public exists and is public" in message_of(errors)
    (output / "run.json").write_text(json.dumps({"hub_model_id": "team/own"}))
    assert push(hub, output, "--hub_private_repo")[0] == 0 and hub.repositories["team/own"].private
    hub.fail("preupload", status=403)
    result = push(hub, output, "--hub_private_repo")
    assert message_of(result[2]).endswith("--hub_model_id team/own --hub_private_repo")
