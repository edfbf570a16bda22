# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Several processes: which one the others wait for, and an end to waiting.

A process that is stopped or dead leaves the others in an exchange of NCCL or gloo, which waits for hours and says
nothing. Here every process counts in a thread, and looks at the counts of the others.
"""

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed
from accelerate import Accelerator
from torch.distributed.distributed_c10d import _get_default_store

INTERVAL = 5.0
"""Seconds between two counts."""
DONE = "done"
"""In place of the count of a process that has nothing left to do."""
SILENCE = 60.0
"""Seconds without a count after which a process is named."""


class ProcessWatch:
    """A context manager that watches the other processes of a run; with one process it does nothing.

    Args:
        accelerator: of the run.
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
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "ProcessWatch":
        if self.count > 1 and torch.distributed.is_initialized():
            # A connection of its own: exchanges on the other one may block.
            self._store = _get_default_store().clone()
            self._store.set_timeout(timedelta(seconds=max(self.interval, self.silence / 2)))
            self._thread = threading.Thread(target=self._watch, name="flowbp-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join(self.interval)
            with suppress(RuntimeError, OSError):
                self._store.set(f"flowbp/{self.rank}", DONE)

    def _watch(self) -> None:
        started = time.monotonic()
        last = {rank: (b"", started) for rank in range(self.count) if rank != self.rank}
        told: set[int] = set()
        beat = 0
        while not self._end.wait(self.interval):
            beat += 1
            now = time.monotonic()
            for rank, found in self._exchange(beat).items():
                if found != last[rank][0] or found == DONE.encode():
                    last[rank] = (found, now)
            silent = {rank: now - since for rank, (_, since) in last.items() if now - since > self.silence}
            for rank in sorted(silent.keys() - told):
                # One process speaks for all that are left.
                if self.rank == min(set(range(self.count)) - silent.keys()):
                    self._tell(f"waiting for process {rank}, which has not answered for {silent[rank]:.0f} s")
            told = set(silent)
            if silent and max(silent.values()) > self.limit and not self._end.is_set():
                names = ", ".join(map(str, sorted(silent)))
                self._tell(
                    f"process {self.rank} ends: no answer from process {names} for {max(silent.values()) / 60:.0f} "
                    "minutes (--process_timeout_minutes); resume with --resume_from_checkpoint latest"
                )
                os._exit(1)

    def _exchange(self, beat: int) -> dict[int, bytes]:
        """Write this process' count and read those of the others; nothing where the store does not answer."""
        others = [rank for rank in range(self.count) if rank != self.rank]
        try:
            self._store.set(f"flowbp/{self.rank}", str(beat))
            known = [rank for rank in others if self._store.check([f"flowbp/{rank}"])]
            return {rank: self._store.get(f"flowbp/{rank}") for rank in known}
        except (RuntimeError, OSError):
            # torch.distributed's own errors are RuntimeErrors: the process that keeps the store is stopped or gone.
            return {}

    def _tell(self, message: str) -> None:
        print(f"flowbp: {message}", file=sys.stderr, flush=True)
