# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Writing files that are complete or absent, whatever interrupts the process, and their permissions."""

import os
import stat
from pathlib import Path

from .file_errors import writing


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
    with writing(path), partial.open("x", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


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
