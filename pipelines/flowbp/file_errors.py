# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Errors of files that name the file and the remedy, also where Python and the libraries do not."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = "free space on that disk, or choose a folder on another one"
_FORBIDDEN = "choose another path, or ask for permission"
if sys.platform == "win32":
    _FORBIDDEN = f"close the programs that have it open, {_FORBIDDEN}"
_IN_THE_WAY = "move the file that is in the way, or choose another folder"
REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: _FORBIDDEN,
    errno.EEXIST: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name a file in the errors of what writes it: those of an open file, of safetensors and of torch have no path.

    Args:
        path: file or folder that the block writes.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except Exception as error:
        # SafetensorError, and torch.save's RuntimeError.
        error.add_note(f"It was raised while {path} was written.")
        raise


def message_of(error: BaseException) -> str:
    """An error's message for a user, with its file, a remedy for the usual errors of files, and its notes."""
    message = str(error)
    if isinstance(error, OSError) and error.errno in REMEDIES:
        where = "" if error.filename is None else f"{error.filename}: "
        message = f"{where}{error.strerror}; {REMEDIES[error.errno]}."
    return " ".join([message, *getattr(error, "__notes__", ())])
