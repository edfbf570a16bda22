# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Every random number of a run depends on its seed and its place alone."""

import random

import numpy as np
import torch

from flowbp.training.seeds import derive_seed, make_generator, sample_generators, seed_globally


def test_seeds_are_distinct():
    seeds = {
        derive_seed(purpose, seed, update, part, rank)
        for purpose in ("noise", "surrogate", "copies", "reward")
        for seed in range(4)
        for update in range(40)
        for part in range(4)
        for rank in range(4)
    }
    assert len(seeds) == 4 * 4 * 40 * 4 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed("noise", 1, 11) != derive_seed("noise", 11, 1)


def test_seeds_never_change():
    # A resumed run draws what the first one would have drawn, so these are part of the checkpoint format.
    assert derive_seed("noise", 0, 0) == 828296919176696148
    assert derive_seed("lora", 7) == 9111166230886480329


def test_generators_are_the_seed_s():
    first, again = make_generator("noise", 3), make_generator("noise", 3)
    assert torch.equal(torch.randn(4, generator=first), torch.randn(4, generator=again))
    assert first.initial_seed() == derive_seed("noise", 3) and first.device.type == "cpu"


def test_a_sample_s_noise_depends_on_its_place_in_the_update():
    whole = [generator.initial_seed() for generator in sample_generators("noise", 1, 2, range(4))]
    parts = [sample_generators("noise", 1, 2, places) for places in (range(2), range(2, 4))]
    assert [generator.initial_seed() for part in parts for generator in part] == whole
    assert len({*whole}) == 4
    for other in (("copies", 1, 2), ("noise", 2, 2), ("noise", 1, 3)):
        assert not {*whole} & {generator.initial_seed() for generator in sample_generators(*other, range(4))}


def test_rewards_draw_from_seeded_global_generators():
    def draw(*seeds: int) -> tuple[float, ...]:
        seed_globally(*seeds[:2], range(seeds[2], seeds[2] + 2))
        return torch.rand(()).item(), float(np.random.rand()), random.random()  # noqa: NPY002 - what rewards use

    first = draw(0, 1, 0)
    assert first == draw(0, 1, 0)
    for other in ((1, 1, 0), (0, 2, 0), (0, 1, 2)):
        assert all(a != b for a, b in zip(first, draw(*other), strict=True))
