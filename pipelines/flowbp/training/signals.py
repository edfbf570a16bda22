# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Signals that ask a run to stop: the update is finished and a checkpoint written first."""

import signal
import threading


class TrainingStopped(Exception):
    """A run that was stopped by a signal, after a checkpoint.

    Attributes:
        signal_number: of the signal; scripts exit with 128 + it.
    """

    def __init__(self, signal_number: int, update: int) -> None:
        name = signal.Signals(signal_number).name
        super().__init__(f"Stopped by {name} after update {update}; resume with --resume_from_checkpoint latest.")
        self.signal_number = signal_number


class StopSignals:
    """Remembers SIGTERM or SIGINT instead of dying of it; a context manager.

    torchrun sends its workers the signal that it gets itself, and SIGKILL 30 seconds later; they are in sessions of
    their own, which the terminal's Ctrl-C does not reach. A second SIGINT stops at once. Outside of the main thread,
    where Python delivers no signals, this does nothing.

    Attributes:
        number: of the signal that came, 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._is_interrupted = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)
            }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self._is_interrupted:
            raise KeyboardInterrupt
        self._is_interrupted = self._is_interrupted or number == signal.SIGINT
        self.number = self.number or number
