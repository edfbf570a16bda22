# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Files: written atomically, renamed, hashed, their permissions, and any character."""

import hashlib
import io
import os
import stat
import sys
import time
from pathlib import Path

from .file_errors import writing

PATIENCE = 5.0
"""Seconds that Windows gets to let go of a file."""


def move(source: Path, target: Path) -> None:
    """Rename a file or a folder; a file at `target` is replaced, a folder must not be there.

    Windows refuses that while any program has something of either open, as virus scanners have new files for a moment.

    Raises:
        OSError: it cannot be renamed.
    """
    end = time.monotonic() + (PATIENCE if sys.platform == "win32" else 0)
    while True:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.1)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file as UTF-8 so that `path` holds either its old content or all of `text`.

    Args:
        path: file to write, in an existing folder; a symbolic link there is replaced, not followed.
        text: the whole content; surrogates (bytes of the command line that are not UTF-8) are written as escapes,
            which JSON can read.

    Raises:
        OSError: the file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with writing(path), partial.open("x", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    move(partial, path)


def allow_any_character() -> None:
    """Let stdout write escapes for characters that its encoding lacks, as stderr does; on Windows a pipe's lacks many.

    A stream that is no file, such as a notebook's, has all characters.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def apply_umask(folder: Path) -> None:
    """Give a folder's files the permissions that new files get there; safetensors makes its files private (0600).

    Args:
        folder: its files are changed, links and folders in it are not.

    Raises:
        OSError: a file's permissions cannot be changed.
    """
    # A process can read its umask only by setting it, which its other threads would notice. A new file tells it, and
    # also what the folder's access control list says.
    probe = folder / ".permissions"
    probe.unlink(missing_ok=True)
    probe.touch()
    usual = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != usual:
            path.chmod(usual)
