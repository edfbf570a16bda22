# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What `run.json` records of a run, and `redact`, which removes secrets from everything that is written or published.

Collecting never fails a run: values that cannot be determined are None.
"""

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import psutil

from ..files import write_atomically

if TYPE_CHECKING:
    # Seconds of import that `python -m flowbp.publishing.push` does not need.
    import torch

PACKAGES = "torch diffusers transformers accelerate peft datasets huggingface_hub safetensors numpy".split()
GIT_TIMEOUT = 10.0
"""Seconds that one call of git may take."""

REDACTED = "[redacted]"
SHORTEST_SECRET = 8
"""Shorter values of variables are not taken as secrets: too many ordinary words contain them."""

# Parts of a variable's name that say that its value is secret (HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, ...).
SECRET_NAME = re.compile(
    r"(?:^|[_-])(?:TOKENS?|SECRETS?|CREDENTIALS?|API_?KEYS?|ACCESS_KEY|PRIVATE_KEY|AUTH|PATS?|WEBHOOKS?)(?:[_-]|$)"
    # Not PWD and OLDPWD themselves, which are folders.
    r"|PASSWORD|PASSWD|PASSPHRASE|(?:_KEY|_PWD|_PASS|SSHPASS)$",
    re.IGNORECASE,
)
# ... unless it says where the secret is kept (HF_TOKEN_PATH, SSH_AUTH_SOCK, ...).
PLACE_NAME = re.compile(r"_(?:PATH|FILE|DIR|URI|URL|SOCK|HOST|ENDPOINT)$", re.IGNORECASE)
# What is secret by its form. The named groups stay.
SECRET_FORMS = re.compile(
    # Tokens of the Hub (of users, of the browser's login, of organisations), GitHub, GitLab and Slack.
    r"(?:hf_(?:oauth_|jwt_)?|api_org_)[A-Za-z0-9]{20,}[\w.-]*"
    r"|\b(?:gh[a-z]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|xox[a-z]-[\w-]{10,})"
    # Keys of AWS, Google and OpenAI.
    r"|\b(?:A[KS]IA[0-9A-Z]{16}\b|AIza[\w-]{35}|sk-[\w-]{20,})"
    # The header `Authorization`.
    r"|(?P<header>\b[Aa]uthorization['\"]?: ?['\"]?(?:Bearer|Basic) )[\w.~+/=-]+"
    # In addresses: the user of https://user:password@host, values of ?token=..., and whoever has a webhook may post.
    r"|(?<=://)[^/?#\s@\"'<>]+(?=@)"
    r"|(?P<query>[?&;](?i:(?:[\w.-]*[_.-])?(?:token|api_?key|key|secret|passw(?:or)?d|pwd|auth|sig|signature|credential))=)"
    r"[^\s&;#\"'<>]+"
    r"|\b(?P<hook>hooks\.slack\.com/|discord(?:app)?\.com/api/(?:v\d+/)?webhooks/|webhook\.office\.com/)[\w/@.-]+",
)


def versions(library: str | None = None) -> dict[str, str | None]:
    """Versions of flowbp, Python and the libraries that results depend on; None for one that is not installed.

    Args:
        library: one more, for what not every run uses.
    """
    import torch

    # A checkout on PYTHONPATH has no installed metadata.
    from .. import __version__

    found: dict[str, str | None] = {"flowbp": __version__, "python": platform.python_version()}
    for name in filter(None, (*PACKAGES, library)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    # The metadata of PyPI's wheel does not say for which CUDA it was built.
    return {**found, "torch": torch.__version__}


def _git(folder: Path, *words: str) -> str | None:
    """What git prints, or None if it fails. Variables such as GIT_DIR, which name another repository, are removed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *words],
            capture_output=True,
            check=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            env=environment,
            timeout=GIT_TIMEOUT,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def git_commit(folder: Path | None = None) -> dict[str, Any] | None:
    """The commit of the package's code.

    Returns:
        `{"commit": SHA-1, "dirty": whether tracked files differ from it}`; None without git, and if the package is not
        tracked by a repository (for example installed into an environment inside another project's repository).
    """
    folder = Path(__file__).parent if folder is None else folder
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit.strip(), "dirty": bool(changes.strip())}


def cpu_name() -> str:
    """The processor's name, or its family where the system does not tell it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def hardware(device: "torch.device", processes: int) -> dict[str, Any]:
    """The machine that the run used.

    Returns:
        `device` (the GPU's name and memory, or the device's type), `processes`, and of the machine `cpu`, `cpu_cores`
        and `memory_gib`.
    """
    name = device.type
    if device.type == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return {
        "device": name,
        "processes": processes,
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def secrets() -> list[str]:
    """Values that must not be written: of variables with a secret name, and the Hub client's token; longest first."""
    from huggingface_hub import get_token

    found = {
        value.strip() for name, value in os.environ.items() if SECRET_NAME.search(name) and not PLACE_NAME.search(name)
    }
    try:
        found.add((get_token() or "").strip())
    except Exception:  # noqa: S110 - a login that cannot be read (it may ask a server) must not stop the writing
        pass
    return sorted((value for value in found if len(value) >= SHORTEST_SECRET), key=len, reverse=True)


def redact_text(text: str, known: Sequence[str] | None = None) -> str:
    """`text` with `[redacted]` in place of every secret.

    Args:
        text: any.
        known: the result of `secrets`, which is called by default. What `SECRET_FORMS` describes is found by its form.
    """
    for secret in secrets() if known is None else known:
        # Also in the form that JSON and YAML write (quotes, line breaks), and in that of addresses.
        for form in (secret, json.dumps(secret)[1:-1], quote(secret, safe="")):
            text = text.replace(form, REDACTED)
    return SECRET_FORMS.sub(lambda found: f"{found[found.lastgroup] if found.lastgroup else ''}{REDACTED}", text)


def one_line(message: object) -> str:
    """A message, or that of an error, without line breaks and secrets."""
    # Redacted first: a secret may have line breaks itself.
    return " ".join(redact_text(str(message)).split())


def redact(value: Any) -> Any:
    """`value` with `[redacted]` in place of every secret in its strings, keys included.

    Args:
        value: anything that JSON holds, and tuples and paths (they become lists and strings).
    """
    return _redact(value, secrets())


def _redact(value: Any, known: Sequence[str]) -> Any:
    if isinstance(value, str | Path):
        return redact_text(str(value), known)
    if isinstance(value, Mapping):
        return {
            _redact(key, known): REDACTED
            if isinstance(key, str) and SECRET_NAME.search(key) and isinstance(item, str) and item
            else _redact(item, known)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_redact(item, known) for item in value]
    return value


def _plain(value: Any) -> Any:
    """A value as JSON has it; other objects as their text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)


def settings(args: Mapping[str, Any]) -> dict[str, Any]:
    """The values of all options for `run.json` and trackers, without secrets.

    Args:
        args: by the options' names. Paths and numbers that are not finite become strings.
    """
    return redact(_plain(args))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_run_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON without secrets, atomically.

    Args:
        path: of the file.
        content: anything that JSON holds. Numbers that are not finite become null, because not every reader of JSON
            knows them; the home folder, which often contains the user's name, becomes `~`.

    Raises:
        OSError: the file cannot be written; an old one is unchanged.
    """
    text = json.dumps(_finite(redact(content)), indent=2, ensure_ascii=False, allow_nan=False)
    # On Windows with slashes of either kind.
    for home in {str(Path.home()), Path.home().as_posix()}:
        quoted = re.escape(json.dumps(home, ensure_ascii=False)[1:-1])
        text = re.sub(rf"(?<![\w/.~-]){quoted}(?=[/\\\s\"',:;])", "~", text)
    write_atomically(path, text + "\n")
