# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What `run.json` records of a run, and `redact`, through which everything goes that is written or published.

Collecting never fails a run: what cannot be found out is None.
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

from ..files import write_atomically

if TYPE_CHECKING:
    # Seconds of import that `python -m flowbp.publishing.push` does not need.
    import torch

PACKAGES = "torch diffusers transformers accelerate peft datasets huggingface_hub safetensors numpy".split()
GIT_TIMEOUT = 10.0
"""Seconds that one call of git may take."""

REDACTED = "[redacted]"
SHORTEST_SECRET = 8
"""Shorter values of variables are no secrets, and too many words hold them."""

# Parts of a variable's name that say that its value is secret (HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, ...).
SECRET_NAME = re.compile(
    r"(?:^|[_-])(?:TOKENS?|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|API_?KEYS?|ACCESS_KEY|PRIVATE_KEY|AUTH)"
    r"(?:[_-]|$)|_KEY$",
    re.IGNORECASE,
)
# ... unless it says where something is (HF_TOKEN_PATH, SSH_AUTH_SOCK, ...).
PLACE_NAME = re.compile(r"_(?:PATH|FILE|DIR|URI|URL|SOCK|HOST|ENDPOINT)$", re.IGNORECASE)
# Tokens of the Hub: of users, of the browser's login, of organisations.
TOKEN = re.compile(r"(?:hf_(?:oauth_|jwt_)?|api_org_)[A-Za-z0-9]{20,}[\w.-]*")
# What is before the @ in https://user:password@host.
URL_USER = re.compile(r"(?<=://)[^/?#\s@\"'<>]+(?=@)")


def versions() -> dict[str, str | None]:
    """Versions of flowbp, Python and the libraries that numbers depend on; None for one that is not installed."""
    # A checkout on PYTHONPATH has no installed metadata.
    from .. import __version__

    found: dict[str, str | None] = {"flowbp": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _git(folder: Path, *words: str) -> str | None:
    """What git prints, or None where it fails. Variables such as GIT_DIR would point it to another repository."""
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
    """The commit that the package's code is of.

    Args:
        folder: of the package; this one's by default.

    Returns:
        `{"commit": SHA-1, "dirty": whether tracked files differ from it}`; None without git, and where the package
        is no part of a repository (installed into an environment that lies inside another project's, for example).
    """
    folder = Path(__file__).parent if folder is None else folder
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit.strip(), "dirty": bool(changes.strip())}


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def hardware(device: "torch.device", processes: int) -> dict[str, Any]:
    """What the run was done on.

    Args:
        device: of this process.
        processes: how many there are.

    Returns:
        `device` (the GPU's name and memory, or the device's type), `processes`, `cpu`, `cpu_cores` (of the machine)
        and `memory_gib` (of the machine, None where it does not say).
    """
    name = device.type
    if device.type == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    try:
        memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        memory = None
    return {
        "device": name,
        "processes": processes,
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "memory_gib": memory,
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
        known: of `secrets`, which are looked up by default. What looks like a Hub token, and the user in an address,
            are found without them.
    """
    for secret in secrets() if known is None else known:
        # Also as JSON and YAML write it (quotes, line breaks).
        for form in (secret, json.dumps(secret)[1:-1]):
            text = text.replace(form, REDACTED)
    return URL_USER.sub(REDACTED, TOKEN.sub(REDACTED, text))


def one_line(message: object) -> str:
    """A message or an error's, without line breaks and secrets."""
    return redact_text(" ".join(str(message).split()))


def redact(value: Any) -> Any:
    """`value` with `[redacted]` in place of every secret in its strings, keys included.

    Args:
        value: what JSON holds, tuples and paths too (they become lists and strings).
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
    """A value of argparse as JSON has it; other objects as their text."""
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
        args: `vars` of what argparse returned. Paths become strings, numbers that are not finite too.
    """
    return redact(_plain(args))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_run_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON without secrets; the file is whole or the old one stays.

    Args:
        path: of the file.
        content: what JSON holds; numbers that are not finite become null, which every reader of JSON knows, and the
            home folder, which often has the user's name, `~`.
    """
    text = json.dumps(_finite(redact(content)), indent=2, ensure_ascii=False, allow_nan=False)
    home = json.dumps(str(Path.home()), ensure_ascii=False)[1:-1]
    text = re.sub(rf"(?<![\w/.~-]){re.escape(home)}(?=[/\\\s\"',:;])", "~", text)
    write_atomically(path, text + "\n")
