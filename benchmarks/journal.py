# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""A file of results that grows with every measurement, and limits of time for each of them."""

import gc
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

HAS_ALARM = hasattr(signal, "setitimer")


class Late(BaseException):
    """The time of a measurement, a part or the whole run is up."""


class Journal:
    """Runs measurements and writes what they find to a JSON file, atomically and after each of them.

    A measurement that fails, lacks memory or takes too long leaves a note in its place; the next one begins. Windows
    has no alarms: there a measurement runs to its end, and the next one of a part that is late is left out.

    Args:
        path: the file.
        seconds: limit of everything.
        slower: factor on the limits of parts and measurements.
        began: when the run began, by `time.monotonic`; default: now.

    Attributes:
        report: what is written.
    """

    def __init__(self, path: Path, seconds: float, slower: float = 1.0, began: float | None = None) -> None:
        self.path = path
        self.slower = slower
        self.report: dict[str, Any] = {"started": time.strftime("%Y-%m-%d %H:%M:%S"), "parts": {}}
        self._results: dict[str, Any] = {}
        self._began = time.monotonic() if began is None else began
        self._deadline = self._began + seconds
        self._depth = 0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    def __enter__(self) -> "Journal":
        if HAS_ALARM:
            self._handler = signal.signal(signal.SIGALRM, self._ring)
        return self

    def __exit__(self, *exception: object) -> None:
        if HAS_ALARM:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._handler)
        self.save()

    def save(self) -> None:
        """Write the report."""
        self.report["seconds"] = round(self.seconds, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(self.report, indent=1, default=str) + "\n", encoding="utf-8")
        unfinished.replace(self.path)

    def say(self, *words: object) -> None:
        """Print a line with the time."""
        print(f"[{self.seconds:6.1f}]", *words, flush=True)

    @contextmanager
    def part(self, name: str, seconds: float) -> Iterator[None]:
        """Measurements in this block belong to the part; they end after `seconds`."""
        self._results = self.report["parts"].setdefault(name, {})
        self.say(f"part {name}")
        try:
            with self._limit(seconds * self.slower):
                yield
        except Late:
            self._results["late"] = {"limit": seconds, "at": round(self.seconds, 1)}
            self.say(f"{name}: its time is up")
        except Exception as error:
            self._results["failed"] = _described(error)
            self.say(f"{name}: {type(error).__name__}: {error}")
        _clean()
        self.save()

    def attempt(self, name: str, measure: Callable[[], dict[str, Any]], seconds: float = 60) -> bool:
        """Write down what `measure` finds, or what went wrong; whether it found something.

        Raises:
            Late: when the time of the part is up.
        """
        began = time.monotonic()
        seconds *= self.slower
        is_good = False
        try:
            if time.monotonic() >= self._deadline:
                raise Late
            with self._limit(seconds):
                found = measure()
            is_good = True
        except torch.OutOfMemoryError as error:
            found = {"out_of_memory": str(error)[:200]}
        except Late:
            if time.monotonic() >= self._deadline:
                self._results[name] = {"late": seconds}
                raise
            found = {"late": seconds}
        except Exception as error:
            found = _described(error)
        found["took"] = time.monotonic() - began
        found = self._results[name] = _rounded(found)
        self.say(name, json.dumps(found, default=str)[:400])
        _clean()
        self.save()
        return is_good

    @contextmanager
    def _limit(self, seconds: float) -> Iterator[None]:
        outer = self._deadline
        self._deadline = min(outer, time.monotonic() + seconds)
        self._depth += 1
        self._set_alarm()
        try:
            yield
        finally:
            self._deadline = outer
            self._depth -= 1
            # Time to write down what was found.
            self._set_alarm(at_least=1.0)

    def _set_alarm(self, at_least: float = 0.01) -> None:
        if not HAS_ALARM:
            return
        if self._depth:
            # It rings again: an exception that is raised in a finalizer is lost.
            signal.setitimer(signal.ITIMER_REAL, max(at_least, self._deadline - time.monotonic()), 5.0)
        else:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _ring(self, *_: object) -> None:
        raise Late


def _described(error: Exception) -> dict[str, Any]:
    where = "".join(traceback.format_exception(error))
    return {"error": f"{type(error).__name__}: {error}"[:600], "where": where[-1500:]}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
