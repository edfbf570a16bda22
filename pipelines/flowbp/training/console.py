# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What a run tells the person who watches it: lines, progress bars, and the estimate of a dry run."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from accelerate import Accelerator
from tqdm.auto import tqdm

from ..files import allow_any_character
from ..publishing.run_info import redact


class Console:
    """Lines and progress bars of the main process, without secrets; other processes are silent.

    Progress is printed to stderr, results to stdout.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        allow_any_character()
        self.accelerator = accelerator
        self._bar: tqdm | None = None

    def tell(self, message: str) -> None:
        """Print a line without breaking a bar."""
        if self.accelerator.is_main_process:
            tqdm.write(redact(message), file=sys.stderr)

    def print(self, message: str) -> None:
        """Print a result to stdout."""
        if self.accelerator.is_main_process:
            tqdm.write(redact(message), file=sys.stdout)

    def updates(self, first: int, last: int) -> Iterator[int]:
        """Numbers of the updates to do, from 0, with a progress bar."""
        with tqdm(
            range(first, last),
            initial=first,
            total=last,
            desc="updates",
            disable=not self.accelerator.is_main_process,
        ) as self._bar:
            yield from self._bar
        self._bar = None

    def show(self, **values: str) -> None:
        """Values behind the bar of the updates."""
        if self._bar is not None:
            self._bar.set_postfix(**values)

    @contextmanager
    def drawing(self, what: str, images: int) -> Iterator[Callable[[int], object]]:
        """A bar of its own for images that are drawn and scored.

        Yields:
            `advance(count)`, to be told of images that are done.
        """
        is_silent = not self.accelerator.is_main_process
        with tqdm(total=images, desc=what, unit="image", leave=False, disable=is_silent) as bar:
            yield bar.update

    @contextmanager
    def pause(self) -> Iterator[None]:
        """The updates' seconds and time left leave this block out."""
        started = time.time()
        yield
        if self._bar is not None and not self._bar.disable:
            pause = time.time() - started
            self._bar.start_t += pause
            self._bar.last_print_t += pause


def table(title: str, lines: Sequence[tuple[str, str]]) -> str:
    """A title, and names with values below it."""
    width = max(len(name) for name, _ in lines)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in lines)])


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds of a short time."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
