# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Python processes that have no imports to wait for: they are forked from one that has imported all there is.

A program that imports torch, diffusers and transformers needs about eight seconds before its first line. With
`warm(environment)` in its environment, a Python process that a test starts, and whatever Python processes that one
starts (launchers start workers, a comparison its runs), is a stand-in: `no_network/sitecustomize.py` calls `stand_in`,
which has the warm process fork. The fork gets the stand-in's files, words, folder, environment, process group and
limit of the size of files, and runs the program. The stand-in passes signals on, ends as the program ends, and when
it is killed, the program is too. It is a process of its own, with exit code, signals and output as any other.

What differs: `os.getpid()` of the program is not the number that its parent knows, and the parent of the program is
the warm process. Variables of the Hub's, which are read at imports, cannot change: where they do, and where Python is
started with options, the process starts cold, as it would without all this.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VARIABLE = "FLOWBP_TEST_WARM"
SUPPORT = Path(__file__).parent
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def warm(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which Python processes start warm."""
    return {**environment, VARIABLE: _start(json.dumps(_read_at_imports(environment)))}


def settle(environment: Mapping[str, str]) -> None:
    """Wait until no program is left whose stand-in was killed."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(environment[VARIABLE])
        connection.sendall(b"{}\n")
        connection.recv(1)


@functools.cache
def _start(variables: str) -> str:
    """Start a warm process, which ends with this one; returns the path of its socket."""
    folder = Path(tempfile.mkdtemp(prefix="flowbp-"))  # the path of a socket is of 100 characters at most
    others = {name: value for name, value in os.environ.items() if name not in _read_at_imports(os.environ)}
    paths = [str(SUPPORT), str(SUPPORT.parents[1] / "pipelines"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with (folder / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, __file__, str(folder / "socket")],
            env={**others, **json.loads(variables), "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(process.communicate)  # the end of its stdin is its end
    assert process.stdout.readline() == "ready\n", (folder / "errors.txt").read_text()
    return str(folder / "socket")


def _read_at_imports(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: environment[name] for name in sorted(environment) if name.startswith(("HF_", "TRANSFORMERS_"))}


# The stand-in, in a process that has imported nothing else.


def stand_in() -> None:
    """Have the warm process run this process' program, and end as that does; returns where that cannot be."""
    words = [word for number, word in enumerate(sys.orig_argv[1:]) if number or word != "-u"]
    if not words or (words[0].startswith("-") and words[0] not in ("-c", "-m")):
        return
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ[VARIABLE])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    request = {"words": words, "environment": dict(os.environ), "folder": os.getcwd(), "file_size": limit}
    data = json.dumps({**request, "group": os.getpgrp()}).encode() + b"\n"
    sent = socket.send_fds(connection, [data], [0, 1, 2])
    connection.sendall(data[sent:])
    answers = connection.makefile()
    number = int(answers.readline())
    if number == 0:
        return
    for each in PASSED_ON:
        signal.signal(each, lambda each, frame: _signal(number, each))
    code = int(answers.readline() or 1)
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _signal(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


# The warm process, and its forks.


def serve(listening: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Fork for everyone who asks, until stdin ends; returns, in a fork, the request and its files."""
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(tell)
    running: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([0, told, listening, *running.values()], [], [])
        for number, connection in list(running.items()):
            if connection in ready and not connection.recv(1):
                _signal(number, signal.SIGKILL)  # as the stand-in was
                os.waitpid(number, 0)
                running.pop(number).close()
        if told in ready:
            os.read(told, 4096)
            for number in list(running):
                ended, status = os.waitpid(number, os.WNOHANG)
                if ended:
                    _answer(connection := running.pop(number), os.waitstatus_to_exitcode(status))
                    connection.close()
        if 0 in ready:
            for number in running:
                _signal(number, signal.SIGKILL)
            return None
        if listening not in ready:
            continue
        connection, _ = listening.accept()
        data, files, _, _ = socket.recv_fds(connection, 65536, 3)
        while not data.endswith(b"\n"):
            data += connection.recv(65536)
        request = json.loads(data)
        is_served = request and _read_at_imports(request["environment"]) == _read_at_imports(os.environ)
        number = os.fork() if is_served else 0
        if is_served and number == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for each in (listening, connection, *running.values()):
                each.close()
            os.close(told), os.close(tell)
            return request, files
        for file in files:
            os.close(file)
        _answer(connection, number)
        if is_served:
            running[number] = connection
        else:
            connection.close()


def _answer(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(b"%d\n" % number)


def become(request: dict[str, Any], files: list[int]) -> None:
    """Run the program that was asked for."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    with contextlib.suppress(PermissionError):  # a group of another session
        os.setpgid(0, request["group"])
    resource.setrlimit(resource.RLIMIT_FSIZE, request["file_size"])
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    paths = filter(None, request["environment"].get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = dict.fromkeys([*paths, *sys.path])
    kind, *rest = request["words"]
    if kind == "-c":
        sys.argv, module = ["-c", *rest[1:]], types.ModuleType("__main__")
        sys.path.insert(0, "")
        sys.modules["__main__"] = module
        exec(compile(rest[0], "<string>", "exec"), vars(module))
    elif kind == "-m":
        sys.argv = rest
        sys.path.insert(0, os.getcwd())
        sys.modules.pop(rest[0], None)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = request["words"]
        sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        runpy.run_path(kind, run_name="__main__")


def main() -> None:
    """Import, then serve; in a fork, run the program."""
    import torch
    from training_scripts import ROOT, load_script

    # The models' classes are in `tiny_sd3`; transformers otherwise imports them when they are loaded.
    for (
        name
    ) in "tiny_sd3 matplotlib.pyplot accelerate.commands.launch torch.distributed.fsdp torch.distributed.run".split():
        importlib.import_module(name)
    torch.set_num_threads(1)  # more would not live on in forked processes
    for path in (ROOT / "training").glob("*_flowbp*.py"):
        load_script(path.stem)
    sys.path.pop(0)  # this file's folder
    gc.collect()
    gc.freeze()  # forks do not write to the pages of what they share, at their ends above all
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(sys.argv[1])
    listening.listen(64)
    print("ready", flush=True)
    asked = serve(listening)
    if asked is not None:
        become(*asked)


if __name__ == "__main__":
    main()
