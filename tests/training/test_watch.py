# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Processes that wait for another one say so, and end; processes that have different prompts are refused."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator
from training_scripts import environment

from flowbp.training.watch import ProcessWatch

SCRIPT = Path(__file__).parents[1] / "support" / "watched_processes.py"


def start(stopped: str) -> list[subprocess.Popen[str]]:
    """Two processes, without a launcher that would wait for a stopped one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), stopped],
            env={**environment(), **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_named_and_ends_the_others(stopped: int):
    processes = start(str(stopped))
    try:
        _, printed = processes[1 - stopped].communicate(timeout=120)
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stderr.close()
    assert processes[1 - stopped].returncode == 1
    lines = [line for line in printed.splitlines() if line.startswith("flowbp: ")]
    assert lines[0].startswith(f"flowbp: waiting for process {stopped}, which has not answered for ")
    assert lines[1].startswith(f"flowbp: process {1 - stopped} ends: no answer from process {stopped} for ")
    assert len(lines) == 2


def test_a_process_that_is_done_is_not_waited_for():
    processes = start("none")
    printed = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert not any("flowbp: " in text for text in printed)


def test_processes_with_different_prompts_are_refused():
    processes = start("prompts")
    printed = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert all("process 1 read other prompts than process 0" in text for text in printed)


def test_one_process_watches_nothing():
    with ProcessWatch(Accelerator(cpu=True), 1) as watch:
        assert not watch._threads
