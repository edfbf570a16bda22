# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Signals that a run remembers, and the codes that scripts exit with."""

import os
import signal
import sys
from typing import Any

import pytest

from flowbp.publishing.push import PushError
from flowbp.training.script import run_script
from flowbp.training.signals import NAMES, StopSignals, TrainingStopped
from flowbp.training.state import TrainingError


def handlers() -> list[Any]:
    return [signal.getsignal(getattr(signal, name)) for name in NAMES if hasattr(signal, name)]


def test_the_first_signal_is_remembered_and_handlers_come_back(capfd: pytest.CaptureFixture[str]):
    before = handlers()
    with StopSignals() as signals:
        assert signals.number == 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), number)
            assert signals.number == signal.SIGTERM
    assert handlers() == before
    assert capfd.readouterr().err.count("stopping after this update or image") == 1


def fail(error: BaseException) -> None:
    raise error


SECRET = "hf_" + "z" * 30


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TrainingError(f"two\nlines {SECRET}"), "train.py: error: two lines [redacted]"),
        (ValueError("wrong"), "train.py: error: wrong"),
        (FileNotFoundError(2, "No such file", "p.txt"), "train.py: error: [Errno 2] No such file: 'p.txt'"),
        (PushError("no network"), "train.py: error: no network"),
        (TrainingStopped(signal.SIGTERM, 3), 143),
        (TrainingStopped(signal.SIGINT, 3), 130),
        (SystemExit(2), 2),
    ],
)
def test_a_script_ends_with_its_exit_code(error: BaseException, code: int | str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["some/train.py"])
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: fail(error))
    assert caught.value.code == code


def test_what_no_user_can_put_right_comes_with_its_traceback():
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: fail(RuntimeError(SECRET)))
    assert caught.value.code.startswith("Traceback") and "RuntimeError: [redacted]" in caught.value.code
    with pytest.raises(KeyboardInterrupt):
        run_script(lambda: fail(KeyboardInterrupt()))
    run_script(lambda: None)
