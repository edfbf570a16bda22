# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Several processes: which one the others wait for, and an end to waiting.

A process that is stopped or dead leaves the others in an exchange of NCCL or gloo, which waits for hours and says
nothing. Here every process counts in a thread, and looks at the counts of the others.
"""

import os
import sys
import threading
import time
from contextlib import suppress

import torch.distributed
from accelerate import Accelerator
from torch.distributed.distributed_c10d import _get_default_store

INTERVAL = 5.0
"""Seconds between two counts."""
DONE = b"done"
"""In place of the count of a process that has nothing left to do."""
SILENCE = 60.0
"""Seconds without a count after which a process is named."""


class ProcessWatch:
    """A context manager that watches the other processes of a run; with one process it does nothing.

    Args:
        limit_minutes: of silence, after which this process ends with exit code 1.
        interval, silence: seconds, see the constants.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        limit_minutes: float,
        interval: float = INTERVAL,
        silence: float = SILENCE,
    ) -> None:
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.limit, self.interval, self.silence = 60 * limit_minutes, interval, silence
        self._end = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "ProcessWatch":
        if self.count > 1 and torch.distributed.is_initialized():
            # A connection of its own: exchanges on the other one may block.
            self._store = _get_default_store().clone()
            now = time.monotonic()
            self._heard = {rank: (b"", now) for rank in range(self.count) if rank != self.rank}
            self._answered = now
            self._threads = [
                threading.Thread(target=target, name="flowbp-watch", daemon=True)
                for target in (self._exchange, self._watch)
            ]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        for thread in self._threads:
            # The exchange with a store that does not answer ends with the process.
            thread.join(2 * self.interval)

    def _exchange(self) -> None:
        """Count, and note when the counts of the others changed. The store may block for ever."""
        beat = 0
        # Not answering is what this is to find: torch.distributed's own errors are RuntimeErrors.
        with suppress(RuntimeError, OSError):
            while not self._end.wait(self.interval):
                beat += 1
                self._store.set(f"flowbp/{self.rank}", str(beat))
                for rank, (before, _) in self._heard.items():
                    if self._store.check([f"flowbp/{rank}"]):
                        found = self._store.get(f"flowbp/{rank}")
                        if found != before or found == DONE:
                            self._heard[rank] = (found, time.monotonic())
                self._answered = time.monotonic()
            self._store.set(f"flowbp/{self.rank}", DONE.decode())

    def _watch(self) -> None:
        told: set[int] = set()
        while not self._end.wait(self.interval):
            silent = self._silent()
            for rank in sorted(silent.keys() - told):
                # One process speaks for all that are left.
                if self.rank == min(set(range(self.count)) - silent.keys()):
                    self._tell(f"waiting for process {rank}, which has not answered for {silent[rank]:.0f} s")
            told = set(silent)
            if silent and max(silent.values()) > self.limit:
                names = ", ".join(map(str, sorted(silent)))
                self._tell(
                    f"process {self.rank} ends: no answer from process {names} for {max(silent.values()) / 60:.0f} "
                    "minutes (--process_timeout_minutes); resume with --resume_from_checkpoint latest"
                )
                os._exit(1)

    def _silent(self) -> dict[int, float]:
        """Seconds since the processes that do not answer did."""
        now = time.monotonic()
        if now - self._answered > self.silence:
            # The store, which process 0 keeps, does not answer, so nothing is known of the others.
            return {0: now - self._answered} if self.rank else {}
        silent = {rank: now - since for rank, (_, since) in self._heard.items()}
        return {rank: seconds for rank, seconds in silent.items() if seconds > self.silence}

    def _tell(self, message: str) -> None:
        print(f"flowbp: {message}", file=sys.stderr, flush=True)
