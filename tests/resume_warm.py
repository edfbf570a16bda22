# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A process that has imported all that a training script needs, and forks into one whenever it is asked to.

    python tests/resume_warm.py train_flowbp_sd3

A script that is started as a program needs ten seconds for its imports; forked from here it needs none. Otherwise it
is that program: its own process, exit code, signals and output. `resume_harness.Warm` talks to this process, one line
of JSON for each request and answer:

- `{"do": "start", "argv", "environment", "file_size_limit", "stdout", "stderr"}` -> the number of the new process;
- `{"do": "wait", "process", "seconds"}` -> its return code as `subprocess` has it, null if it still runs.
"""

import json
import os
import resource
import runpy
import sys
import time
from typing import Any

import tiny_sd3  # noqa: F401  the models' classes, which transformers otherwise imports when they are loaded
import torch
from matplotlib import pyplot  # noqa: F401
from training_scripts import load_script


def wait(process: int, seconds: float) -> int | None:
    """The return code of a child, None if it has none after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        number, status = os.waitpid(process, os.WNOHANG)
        if number:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.01)


def serve() -> dict[str, Any] | None:
    """Answer requests until there are no more; returns a request in the process that it started, else None."""
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "wait":
            print(json.dumps(wait(request["process"], request["seconds"])), flush=True)
            continue
        process = os.fork()
        if process == 0:
            return request
        print(process, flush=True)
    return None


def become(request: dict[str, Any]) -> None:
    """Turn this process into the program that was asked for, up to its first line."""
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.update(request["environment"])
    if request["file_size_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size_limit"],) * 2)
    sys.argv = request["argv"]


if __name__ == "__main__":
    torch.set_num_threads(1)  # more would not live on in forked processes
    load_script(sys.argv[1])
    print("ready", flush=True)
    request = serve()
    if request is not None:
        become(request)
        runpy.run_path(sys.argv[0], run_name="__main__")
