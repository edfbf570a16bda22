# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What run.json records, and that no secret gets into it."""

import json
import os
import subprocess
import sys
from pathlib import Path, PureWindowsPath
from urllib.parse import quote

import pytest
import torch

import flowbp
from flowbp.publishing import run_info
from flowbp.publishing.run_info import (
    REDACTED,
    git_commit,
    hardware,
    one_line,
    redact,
    redact_text,
    settings,
    versions,
    write_run_json,
)

CANARY = "hf_canaryOfTheTests0123456789"


@pytest.fixture(autouse=True)
def _no_login(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if run_info.SECRET_NAME.search(name):
            monkeypatch.delenv(name)


def make_repository(folder: Path, content: str = "") -> str:
    """A repository with one commit of a package of two files; returns the commit."""
    folder.mkdir()
    (folder / "__init__.py").write_text(content)
    (folder / "run_info.py").write_text("")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    commands = [
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-q", "-m", "one"],
    ]
    for words in commands:
        subprocess.run(["git", "-C", str(folder), *words], check=True, env=environment)
    done = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], check=True, env=environment, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_versions() -> None:
    """Of the libraries that are running."""
    found = versions()
    assert found["flowbp"] == flowbp.__version__
    assert found["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(found) == {"flowbp", "python", *run_info.PACKAGES} and None not in found.values()


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has no version, and fails nothing."""
    monkeypatch.setattr(run_info, "PACKAGES", ["torch", "flowbp-that-does-not-exist"])
    assert versions()["flowbp-that-does-not-exist"] is None


def test_git_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit, whether tracked files differ, and not another repository that the environment names."""
    package = tmp_path / "package"
    commit = make_repository(package)
    other = tmp_path / "other"
    assert make_repository(other, "other") != commit
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert git_commit(package) == {"commit": commit, "dirty": False}
    (package / "notes.txt").write_text("untracked")
    assert git_commit(package) == {"commit": commit, "dirty": False}
    (package / "run_info.py").write_text("changed")
    assert git_commit(package) == {"commit": commit, "dirty": True}


def test_git_commit_without_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None: outside a repository, inside one that does not have the package, and without git."""
    assert git_commit(tmp_path) is None
    make_repository(tmp_path / "project")
    installed = tmp_path / "project" / "site-packages" / "flowbp"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert git_commit(installed) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(tmp_path / "project") is None


def test_hardware() -> None:
    """The schema of run.json, with values of this machine."""
    found = hardware(torch.device("cpu"), 2)
    assert list(found) == ["device", "processes", "cpu", "cpu_cores", "memory_gib"]
    assert found["device"] == "cpu" and found["processes"] == 2 and found["cpu"]
    assert found["cpu_cores"] == os.cpu_count() and found["memory_gib"] > 0.1
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    "name",
    "HF_TOKEN WANDB_API_KEY AWS_SECRET_ACCESS_KEY DB_PASSWORD MY_SECRET OPENAI_KEY apikey GITHUB_PAT PGPASSWORD "
    "MYSQL_PWD DB_PASS SLACK_WEBHOOK".split(),
)
def test_values_of_secret_variables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are replaced wherever they are: inside texts, keys, lists."""
    monkeypatch.setenv(name, "p4ss/w\"ord' 1")
    value = {"a p4ss/w\"ord' 1": ["x", ("--key=p4ss/w\"ord' 1", 1, None, True, 2.5)]}
    assert redact(value) == {f"a {REDACTED}": ["x", [f"--key={REDACTED}", 1, None, True, 2.5]]}
    # Also in text that is JSON already.
    assert "ord' 1" not in redact_text(json.dumps(value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "short"),
        ("HF_TOKEN_PATH", "/home/me/token"),
        ("TOKENIZERS_PARALLELISM", "something long"),
        ("SSH_AUTH_SOCK", "/run/ssh-agent"),
        ("HOME", "/home/somebody"),
        ("PWD", "/home/somebody/run"),
        ("OLDPWD", "/home/somebody"),
        ("COMPATIBLE", "something long"),
    ],
)
def test_values_of_other_variables_stay(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too short for a secret, or a name that says nothing of one."""
    monkeypatch.setenv(name, value)
    assert redact(f"a {value} b") == f"a {value} b"


def test_a_secret_in_an_address_or_over_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIVATE_KEY", "-----BEGIN\nabc  def/1=\n-----END")
    value = os.environ["PRIVATE_KEY"]
    assert one_line(f"wrong:\n{value} was given") == f"wrong: {REDACTED} was given"
    assert redact_text(f"https://host/{quote(value, safe='')}/x") == f"https://host/{REDACTED}/x"


def test_the_longest_secret_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """One secret that begins with another leaves no rest."""
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "abcdefghijkl")
    assert redact("abcdefghijkl") == REDACTED


def test_the_stored_login(tmp_path: Path) -> None:
    """The token that `hf auth login` stored is a secret too."""
    (tmp_path / "token").write_text("stored-token-of-some-form\n")
    environment = {name: value for name, value in os.environ.items() if not run_info.SECRET_NAME.search(name)}
    code = "from flowbp.publishing.run_info import redact; print(redact('x stored-token-of-some-form y'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(flowbp.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"x {REDACTED} y\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"token {CANARY}, and more", f"token {REDACTED}, and more"),
        ("api_org_" + "a1" * 12, REDACTED),
        ("hf_oauth_" + "a1" * 12, REDACTED),
        ("hf_jwt_" + "a1" * 12 + ".b-c_d", REDACTED),
        ("https://me:pass@host/path?x=a@b", f"https://{REDACTED}@host/path?x=a@b"),
        ("https://onlytoken@host", f"https://{REDACTED}@host"),
        ("a ghp_" + "a1B2" * 9 + ", b", f"a {REDACTED}, b"),
        ("github_pat_" + "a1_B2" * 9, REDACTED),
        ("glpat-" + "a1-B" * 5, REDACTED),
        ("xoxb-123456789012-abc", REDACTED),
        ("key AKIAIOSFODNN7EXAMPLE.", f"key {REDACTED}."),
        ("AIza" + "a1B2-" * 7, REDACTED),
        ("sk-proj-" + "a1B2" * 9, REDACTED),
        ("{'Authorization': 'Bearer abc.def-1'}", f"{{'Authorization': 'Bearer {REDACTED}'}}"),
        ("https://host/a?token=abc&seed=1", f"https://host/a?token={REDACTED}&seed=1"),
        ("https://host/a?seed=1&API_KEY=abc'", f"https://host/a?seed=1&API_KEY={REDACTED}'"),
        ("https://s3/a?X-Amz-Signature=0af&v=2", f"https://s3/a?X-Amz-Signature={REDACTED}&v=2"),
        ("https://hooks.slack.com/services/T0/B0/x1y2 failed", f"https://hooks.slack.com/{REDACTED} failed"),
        ("https://discord.com/api/webhooks/12/a-b_c", f"https://discord.com/api/webhooks/{REDACTED}"),
        ("https://discordapp.com/api/v10/webhooks/12/a", f"https://discordapp.com/api/v10/webhooks/{REDACTED}"),
        ("a flag bearer at https://host/a?tokenizer=clip&monkey=1, task-of-many-different-words, AKIA", None),
        ("hf_hub_download of a@b.c at https://huggingface.co/user/name", None),
        ("a commit 551a32a0c0ffee0000000000000000000000000f", None),
    ],
)
def test_what_looks_like_a_secret(text: str, expected: str | None) -> None:
    """Tokens of the Hub and users in addresses are replaced, and nothing else."""
    assert redact(text) == (text if expected is None else expected)


def test_settings() -> None:
    """Values of argparse become what JSON holds, without secrets; options named after one lose their value."""
    args = {
        "output_dir": Path("a/b"),
        "rate": 1e-4,
        "clip": float("inf"),
        "gap": float("nan"),
        "flag": True,
        "none": None,
        "list": [Path("c"), 1],
        "json": {"x": (1, 2.0)},
        "dtype": torch.bfloat16,
        "api_key": "1234",
        "url": "https://me:pass@host",
    }
    assert settings(args) == {
        "output_dir": "a/b",
        "rate": 1e-4,
        "clip": "inf",
        "gap": "nan",
        "flag": True,
        "none": None,
        "list": ["c", 1],
        "json": {"x": [1, 2.0]},
        "dtype": "torch.bfloat16",
        "api_key": REDACTED,
        "url": f"https://{REDACTED}@host",
    }


def test_run_json(tmp_path: Path) -> None:
    """Strict JSON without secrets, in Unicode; numbers that are not finite are null."""
    path = tmp_path / "run.json"
    write_run_json(path, {"a": [float("nan"), -float("inf"), 1.5], CANARY: (f"é{CANARY}", "\udc80")})
    text = path.read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, None, 1.5],
        REDACTED: [f"é{REDACTED}", "\udc80"],
    }
    assert "é" in text and CANARY not in text
    assert [item.name for item in tmp_path.iterdir()] == ["run.json"]


def test_run_json_is_whole_or_old(tmp_path: Path) -> None:
    """What cannot be written leaves the old file, and a link at its place is replaced, not followed."""
    path, outside = tmp_path / "run.json", tmp_path / "outside"
    outside.write_text("outside")
    path.symlink_to(outside)
    (tmp_path / "run.json.partial").symlink_to(outside)
    write_run_json(path, {"a": 1})
    assert outside.read_text() == "outside" and not path.is_symlink()
    with pytest.raises(TypeError):
        write_run_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_run_json_has_no_home_folder_of_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_info.Path, "home", lambda: PureWindowsPath("C:\\Users\\me"))
    write_run_json(tmp_path / "run.json", {"paths": ["C:\\Users\\me\\run", "C:/Users/me/run", "C:\\Users\\meg"]})
    assert json.loads((tmp_path / "run.json").read_text())["paths"] == ["~\\run", "~/run", "C:\\Users\\meg"]


def test_run_json_has_no_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = "/home/jane o'neil"
    monkeypatch.setenv("HOME", home)
    command = [
        "train.py",
        f"--output_dir={home}/run",
        f"{home}",
        f"{home}s",
        f"/mnt{home}",
        f"see {home}/a and {home}.",
    ]
    write_run_json(tmp_path / "run.json", {f"{home}/x": command})
    found = json.loads((tmp_path / "run.json").read_text())
    kept = ["train.py", "--output_dir=~/run", "~", f"{home}s", f"/mnt{home}", f"see ~/a and {home}."]
    assert found == {"~/x": kept}
