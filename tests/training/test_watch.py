# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Processes that wait for another one say so, and end; processes that have different prompts are refused."""

import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from accelerate import Accelerator
from training_scripts import environment
from warm_python import warm

from flowbp.training.watch import ProcessWatch

SCRIPT = Path(__file__).parents[1] / "support" / "watched_processes.py"


def run(stopped: str, waited_for: Sequence[int] = (0, 1)) -> tuple[list[int], list[str]]:
    """Two processes, without a launcher that would wait for a stopped one: the codes and stderr of those waited for.

    Another process may take the port before they do; then they start again.
    """
    for _ in range(5):
        processes = start(stopped)
        try:
            printed = [processes[number].communicate(timeout=300)[1] for number in waited_for]
        finally:
            for process in processes:
                process.kill()
                process.wait()
                process.stderr.close()
        if not any("EADDRINUSE" in text for text in printed):
            break
    return [processes[number].returncode for number in waited_for], printed


def start(stopped: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), stopped],
            env=warm({**environment(), **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_named_and_ends_the_others(stopped: int):
    codes, (printed,) = run(str(stopped), [1 - stopped])
    assert codes == [1]
    lines = [line for line in printed.splitlines() if line.startswith("flowbp: ")]
    assert lines[0].startswith(f"flowbp: waiting for process {stopped}, which has not answered for ")
    assert lines[1].startswith(f"flowbp: process {1 - stopped} ends: no answer from process {stopped} for ")
    assert len(lines) == 2


def test_a_process_that_is_done_is_not_waited_for():
    codes, printed = run("none")
    assert codes == [0, 0], printed
    assert not any("flowbp: " in text for text in printed)


def test_processes_with_different_prompts_are_refused():
    codes, printed = run("prompts")
    assert codes == [1, 1], printed
    assert all("process 1 read other prompts than process 0" in text for text in printed)


def test_one_process_watches_nothing():
    with ProcessWatch(Accelerator(cpu=True), 1) as watch:
        assert not watch._threads
