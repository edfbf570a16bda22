# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Programs one after the other or several at a time, each in a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from .output_folder import LOCK
from .signals import StopSignals


@dataclass(frozen=True)
class Job:
    """A program to run.

    Attributes:
        name: in messages.
        command: gives its words, when it is started.
        folder: that it writes into and locks; it is not started while another process has the lock.
        log: file that gets what it prints; None for the console.
    """

    name: str
    command: Callable[[], Sequence[str]]
    folder: Path
    log: Path | None = None

    @property
    def is_free(self) -> bool:
        """Whether no other process writes into the folder, such as one whose parent was killed."""
        if not (self.folder / LOCK).exists():
            return True
        try:
            with FileLock(self.folder / LOCK, timeout=0):
                return True
        except Timeout:
            return False


def visible_devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(index) for index in range(torch.cuda.device_count())] if given is None else given.split(",")


def run_jobs(
    jobs: Sequence[Job], at_once: int, tell: Callable[[str], None], devices: Sequence[str] = ()
) -> tuple[dict[str, int], int]:
    """Run all jobs, also where some fail.

    A signal that asks to stop is passed on once; then no more are started. At a second one, as at an exception, all
    are asked to end at once.

    Args:
        jobs: in the order of their start.
        at_once: how many.
        tell: is given a line for each start and end.
        devices: GPUs, of which each place among `at_once` gets one in turn; empty leaves all to every job.

    Returns:
        The exit codes by name of the jobs that ended, and the signal's number, 0 for none.
    """
    waiting, places, codes = list(jobs), list(range(at_once)), {}
    running: dict[int, tuple[Job, subprocess.Popen]] = {}
    passed_on, told = 0, set()
    with StopSignals() as signals:
        try:
            while running or (waiting and not signals.number):
                for place in places:
                    if place in running or signals.number:
                        continue
                    job = next((job for job in waiting if job.is_free), None)
                    if job is not None:
                        waiting.remove(job)
                        running[place] = job, _start(job, devices[place % len(devices)] if devices else None)
                        tell(f"{job.name}: started" + (f", see {job.log}" if job.log else ""))
                if waiting and not running and waiting[0] not in told:
                    told.add(waiting[0])
                    tell(f"{waiting[0].name}: waiting for the process that writes into {waiting[0].folder}")
                if signals.number and not passed_on:
                    passed_on = signals.number
                    # On Windows they share the console, which has told them.
                    for _, process in running.values() if sys.platform != "win32" else ():
                        process.send_signal(passed_on)
                for place, (job, process) in list(running.items()):
                    if (code := process.poll()) is not None:
                        codes[job.name] = code
                        tell(f"{job.name}: " + ("done" if code == 0 else f"ended with exit code {code}"))
                        del running[place]
                time.sleep(0.1)
        finally:
            for _, process in running.values():
                is_told = passed_on and sys.platform != "win32"
                process.send_signal(passed_on) if is_told else process.terminate()
            for _, process in running.values():
                process.wait()
    return codes, signals.number


def _start(job: Job, device: str | None) -> subprocess.Popen:
    environment = os.environ if device is None else {**os.environ, "CUDA_VISIBLE_DEVICES": device}
    # A session of its own: the terminal's Ctrl-C reaches it once, through its parent.
    if job.log is None:
        return subprocess.Popen(job.command(), env=environment, start_new_session=True)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            job.command(), env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
