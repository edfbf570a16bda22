# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""A process in which flowbp gets from Linux what Windows would give it.

    PYTHONIOENCODING=cp1252 python tests/support/windows.py JSON

calls the `main` of scripts in `training/`, one after the other: JSON is a list of their names, each with its command
line. In this process

- flowbp's modules cannot import `resource`, `fcntl`, `pwd`, `grp` and `termios`; their `os` has no `fork`, `uname`,
  `sysconf`, `getuid`, `getloadavg` and `killpg`, their `signal` no alarm, SIGHUP, SIGUSR1 and SIGKILL, and their
  `sys.platform` is win32;
- a folder cannot be opened, and a file that was opened for reading cannot be flushed;
- a file cannot be replaced or removed, nor a folder with it renamed, while this process has it open or mapped.

Paths stay those of Linux, and libraries take it for Linux.
"""

import builtins
import errno
import fcntl
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

HIDDEN = ("resource", "fcntl", "pwd", "grp", "termios")
MISSING = {
    os: ("fork", "uname", "sysconf", "getuid", "getloadavg", "killpg"),
    signal: ("SIGHUP", "SIGUSR1", "SIGKILL", "SIGALRM", "alarm", "setitimer"),
    sys: (),
}


def refuse(path: Any) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))


class Reduced:
    """A module without some of its names."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        if self.module is sys and name == "platform":
            return "win32"
        if name in MISSING[self.module]:
            raise AttributeError(name)
        return getattr(self.module, name)


def hide(owners: tuple[str, ...]) -> None:
    """Give the modules whose names begin so what Windows has."""
    import_ = builtins.__import__
    reduced = {module.__name__: Reduced(module) for module in MISSING}

    def import_reduced(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if not level and str((globals or {}).get("__name__")).startswith(owners):
            if name in HIDDEN:
                raise ModuleNotFoundError(f"No module named {name!r}")
            if name in reduced:
                return reduced[name]
        return import_(name, globals, locals, fromlist, level)

    builtins.__import__ = import_reduced


def change_files() -> None:
    """Let open files be in the way, as on Windows."""
    open_, flush = os.open, os.fsync

    def open_file(path: Any, *args: Any, **kwargs: Any) -> int:
        if os.path.isdir(path):
            refuse(path)
        return open_(path, *args, **kwargs)

    def flush_file(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flush(descriptor)

    def guard(name: str) -> None:
        original = getattr(os, name)

        def change(*paths: Any, **kwargs: Any) -> None:
            for path in map(os.path.abspath, paths):
                # What `filelock` tries a file system with is its matter.
                if "filelock-probe" not in path and any(
                    each == path or each.startswith(path + os.sep) for each in in_use()
                ):
                    refuse(path)
            if len(paths) > 1 and os.path.isdir(paths[1]):
                refuse(paths[1])
            original(*paths, **kwargs)

        setattr(os, name, change)

    os.open, os.fsync = open_file, flush_file
    for name in ("rename", "replace", "unlink", "remove", "rmdir"):
        guard(name)
    # As where folders cannot be opened.
    shutil._use_fd_functions = False


def in_use() -> set[str]:
    """Files that this process has open or mapped."""
    descriptors = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    opened = {os.readlink(each) for each in descriptors if each.is_symlink()}
    maps = Path("/proc/self/maps").read_text().splitlines()
    return opened | {line[line.index("/") :] for line in maps if "/" in line}


def main() -> None:
    runs = json.loads(sys.argv[1])
    change_files()
    hide(("flowbp", *(name for name, _ in runs)))
    from training_scripts import load_script, script_path

    for name, words in runs:
        sys.argv = [str(script_path(name))]
        script = load_script(name)
        try:
            script.run_script(lambda main=script.main, words=words: main(words))
        except SystemExit as stop:
            if stop.code:
                raise


if __name__ == "__main__":
    main()
