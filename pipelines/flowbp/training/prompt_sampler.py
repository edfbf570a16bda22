# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Batches of prompts for training, in an order that the number of processes does not change."""

import random
from collections.abc import Iterator, Sequence

from .prompts import Record


class PromptSampler:
    """Endless batches of prompts, in an order that only the seed decides.

    All processes walk one sequence: the prompts, shuffled anew in every epoch by `(seed, epoch)`. Each process takes
    its own part of every `num_processes * batch_size` places of it, so a prompt repeats among the processes' batches
    only where an epoch ends there, or where there are fewer prompts than places. Batches run on over the end of an
    epoch.

    Args:
        prompts: at least one.
        batch_size: prompts per process and batch.
        seed: decides the order.
        process_index: this process, from 0 to `num_processes - 1`.
        num_processes: how many processes draw from the sequence.
    """

    def __init__(
        self, prompts: Sequence[Record], batch_size: int, seed: int, process_index: int = 0, num_processes: int = 1
    ) -> None:
        self.prompts = list(prompts)
        self.batch_size = batch_size
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes
        self.position = 0
        self._epoch = -1
        self._order: list[int] = []

    def __iter__(self) -> Iterator[list[Record]]:
        return self

    def __next__(self) -> list[Record]:
        start = self.position + self.process_index * self.batch_size
        self.position += self.num_processes * self.batch_size
        return [self._at(place) for place in range(start, start + self.batch_size)]

    def _at(self, place: int) -> Record:
        epoch, index = divmod(place, len(self.prompts))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = list(range(len(self.prompts)))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
        return self.prompts[self._order[index]]

    def state_dict(self) -> dict[str, int]:
        """`position`: how many places of the common sequence all processes together have used."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a saved position; prompts and seed must be those of the run that saved it."""
        self.position = state["position"]
