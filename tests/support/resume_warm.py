# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""A process that has imported all that a training script needs, and forks into a program whenever it is asked to.

    python tests/support/resume_warm.py train_flowbp_sd3 SOCKET

A script that is started as a program needs ten seconds for its imports; forked from here it needs none. Otherwise it
is that program: its own process, exit code, signals and output. `resume_harness.Warm` starts this process and asks,
over a Unix socket; each connection is one line of JSON and its answer:

- `{"do": "start", "argv", "environment", "file_size_limit"}`, with the files of stdout and stderr -> the number of
  the new process;
- `{"do": "poll", "process"}` -> its return code as `subprocess` has it, null if it still runs;
- `{"do": "end"}`.

Launchers start their workers themselves. For them this file is the worker too, a thin one:

    torchrun --nproc_per_node 2 tests/support/resume_warm.py PROGRAM WORDS...

It has PROGRAM started by the process behind the socket that FLOWBP_TEST_WARM names, in its own environment and with
its own output, passes on SIGTERM and SIGINT, and ends as it ends.
"""

import json
import os
import resource
import runpy
import signal
import socket
import sys
import time
from typing import Any


def ask(path: str, files: tuple[int, ...] = (), **request: Any) -> Any:
    """Send a request to the socket with this path, and numbers of open files with it; return the answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        data = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(connection, [data], files) if files else 0
        connection.sendall(data[sent:])
        with connection.makefile() as answer:
            return json.loads(answer.readline())


def stand_for(path: str, argv: list[str]) -> int:
    """Be the worker of a launcher, as the module says; returns the exit code."""
    process = ask(path, (1, 2), do="start", argv=argv, environment=dict(os.environ), file_size_limit=None)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os.kill(process, number))
    while (code := ask(path, do="poll", process=process)) is None:
        time.sleep(0.02)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def serve(listening: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Answer requests until the last; returns, in a process that it started, the request and its files."""
    while True:
        connection, _ = listening.accept()
        with connection:
            data, files, _, _ = socket.recv_fds(connection, 65536, 2)
            while not data.endswith(b"\n"):
                data += connection.recv(65536)
            request = json.loads(data)
            answer = None
            if request["do"] == "start":
                answer = os.fork()
                if answer == 0:
                    listening.close()
                    return request, files
            elif request["do"] == "poll":
                number, status = os.waitpid(request["process"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if number else None
            for file in files:
                os.close(file)
            connection.sendall(json.dumps(answer).encode() + b"\n")
            if request["do"] == "end":
                return None


def become(request: dict[str, Any], files: list[int]) -> None:
    """Turn this process into the program that was asked for, up to its first line."""
    for number, file in zip((0, 1, 2), (os.open(os.devnull, os.O_RDONLY), *files), strict=True):
        os.dup2(file, number)
        os.close(file)
    os.environ.update(request["environment"])
    if request["file_size_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size_limit"],) * 2)
    sys.argv = request["argv"]


def main() -> None:
    """Import, then serve; in a process that was started, run the program."""
    import tiny_sd3  # noqa: F401  the models' classes, which transformers otherwise imports when they are loaded
    import torch
    import torch.distributed.fsdp  # noqa: F401
    from matplotlib import pyplot  # noqa: F401
    from training_scripts import load_script

    torch.set_num_threads(1)  # more would not live on in forked processes
    load_script(sys.argv[1])
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(sys.argv[2])
    listening.listen(16)
    print("ready", flush=True)
    started = serve(listening)
    if started is not None:
        become(*started)
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    if "FLOWBP_TEST_WARM" in os.environ:
        sys.exit(stand_for(os.environ["FLOWBP_TEST_WARM"], sys.argv[1:]))
    main()
