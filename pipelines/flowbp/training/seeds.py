# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Seeds: every random number of a run is derived from its seed and the place where it is used."""

import hashlib
from collections.abc import Sequence

import torch
from accelerate.utils import set_seed


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that any change of any part changes: purpose, run seed, update, sample, ...

    The random numbers of an update depend on its number alone, so a resumed run needs no saved generator states.
    """
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded with `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def sample_generators(purpose: str, seed: int, update: int, places: Sequence[int]) -> list[torch.Generator]:
    """A CPU generator for each sample of a micro-batch.

    They depend on the sample's place in the update and not on the micro-batch or process that draws it, so one process
    with a batch of 4, four micro-batches of 1, and two processes with two micro-batches of 1 draw the same noise.

    Args:
        purpose: "noise", or "copies" for DRaFT-LV's.
        update: its number.
        places: of the samples in the update, from 0.
    """
    return [make_generator(purpose, seed, update, place) for place in places]


def seed_globally(seed: int, update: int, places: Sequence[int]) -> None:
    """Seed the global generators (torch, NumPy, Python), which rewards that augment at random draw from.

    Pipelines do too that encode a source without the call's generator, such as Stable Diffusion 3's ControlNet.
    """
    set_seed(derive_seed("reward", seed, update, places[0]) % 2**32)
