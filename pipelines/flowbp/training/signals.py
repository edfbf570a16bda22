# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Signals that ask a run to stop: the update is finished and a checkpoint written first."""

import os
import signal
import sys
import threading
from contextlib import suppress

# What terminals, launchers and schedulers send. Windows has the first two and the last one, its Ctrl-Break.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGBREAK")


class TrainingStopped(Exception):
    """A run that was stopped by a signal, after a checkpoint.

    Attributes:
        signal_number: of the signal; scripts exit with 128 + it.
    """

    def __init__(self, signal_number: int, update: int) -> None:
        name = signal.Signals(signal_number).name
        remedy = "resume with --resume_from_checkpoint latest" if update else "start again"
        super().__init__(f"Stopped by {name} after update {update}; {remedy}.")
        self.signal_number = signal_number


class DrawingStopped(Exception):
    """Images that are not drawn to the end, because a signal came."""


class StopSignals:
    """Remembers one of `NAMES` instead of dying of it; a context manager.

    A line says at once that the run is stopping. A second signal of the same kind stops it without waiting. torchrun
    sends its workers the signal that it gets itself, and SIGKILL 30 seconds later; they are in sessions of their own,
    which the terminal's Ctrl-C does not reach. A signal that is ignored (SIGHUP under nohup) stays ignored. Outside of
    the main thread, where Python delivers no signals, this does nothing.

    Attributes:
        number: of the signal that came, 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
            # A shell ignores SIGINT for commands in the background, where it still asks a run to stop.
            is_kept = {number for number in numbers if signal.getsignal(number) is signal.SIG_IGN} - {signal.SIGINT}
            wanted = [number for number in numbers if number not in is_kept]
            self._before = {number: signal.signal(number, self._remember) for number in wanted}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if number == self.number:
            raise KeyboardInterrupt(f"a second {name}")
        if not self.number and int(os.environ.get("RANK", "0")) == 0:
            # Not print(): the signal may have come while stderr's buffer was being written.
            text = f"\n{name}: stopping after this update or image, with a checkpoint. Again to stop at once.\n"
            # Programs without a console have none on Windows.
            with suppress(OSError):
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
        self.number = self.number or number
