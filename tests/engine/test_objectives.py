# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Objectives, connector gaps and sample weights against hand-computed numbers."""

import math

import pytest
import torch

from flowbp import Leg, Objective, Surrogate, Term
from flowbp.objectives import connector_gaps, sample_weights

REWARDS = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
ONES = torch.ones(3, dtype=torch.float64)
WEIGHTS = torch.tensor([2.0, 0.0, 0.5], dtype=torch.float64)


def loss_and_gradient(objective: Objective, weights: torch.Tensor) -> tuple[float, list[float]]:
    rewards = REWARDS.clone().requires_grad_()
    loss = objective(rewards, weights)
    assert loss.shape == ()
    return loss.item(), torch.autograd.grad(loss, rewards)[0].tolist()


def test_the_default_is_the_mean_negative_reward():
    loss, gradient = loss_and_gradient(Objective(), ONES)
    assert loss == pytest.approx(-0.5)
    assert gradient == pytest.approx([-1 / 3] * 3)


def test_hinge():
    loss, gradient = loss_and_gradient(Objective(clip=0.55), ONES)
    assert loss == pytest.approx((0.45 + 0.05 + 0.0) / 3)
    assert gradient == pytest.approx([-1 / 3, -1 / 3, 0.0])


def test_a_sample_beyond_the_clip_is_still_in_the_mean():
    assert loss_and_gradient(Objective(clip=0.2), ONES)[0] == pytest.approx(0.1 / 3)


def test_scale_and_undone_guidance():
    plain, gradient = loss_and_gradient(Objective(), ONES)
    scaled, scaled_gradient = loss_and_gradient(Objective(scale=10.0, undo_guidance=4.0), ONES)
    assert scaled == pytest.approx(2.5 * plain)
    assert scaled_gradient == pytest.approx([2.5 * value for value in gradient])


def test_the_mean_is_taken_over_the_kept():
    loss, gradient = loss_and_gradient(Objective(), WEIGHTS)
    assert loss == pytest.approx(-(2.0 * 0.1 + 0.5 * 0.9) / 2)
    assert gradient == pytest.approx([-1.0, 0.0, -0.25])
    loss, _ = loss_and_gradient(Objective(clip=0.55, scale=3.0), WEIGHTS)
    assert loss == pytest.approx(3.0 * 2.0 * 0.45 / 2)


def test_no_sample_kept_is_a_zero_loss_with_a_zero_gradient():
    loss, gradient = loss_and_gradient(Objective(), torch.zeros(3, dtype=torch.float64))
    assert loss == 0 and gradient == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": math.nan}, "`clip` must be a finite number or None, got nan"),
        ({"clip": math.inf}, "`clip` must be a finite number or None, got inf"),
        ({"scale": 0.0}, "`scale` must be a number above 0, got 0.0"),
        ({"scale": -1.0}, "`scale` must be a number above 0, got -1.0"),
        ({"scale": math.nan}, "`scale` must be a number above 0, got nan"),
        ({"undo_guidance": 0.0}, "`undo_guidance` must be a number above 0, got 0.0"),
        ({"undo_guidance": math.inf}, "`undo_guidance` must be a number above 0, got inf"),
    ],
)
def test_refusals(options: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        Objective(**options)
    assert "\n" not in str(caught.value)


# Gaps: two samples with latents of two numbers each.

LATENTS = {
    1: torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64),
    3: torch.tensor([[0.0, 0.0], [1.0, -1.0]], dtype=torch.float64),
    5: torch.tensor([[1.0, 1.0], [0.0, 4.0]], dtype=torch.float64),
}
VELOCITIES = {
    1: torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=torch.float64),
    2: torch.tensor([[3.0, 0.0], [1.0, 1.0]], dtype=torch.float64),
    3: torch.tensor([[1.0, -1.0], [0.5, 0.5]], dtype=torch.float64),
}
LEGS = (Leg(1, 3, (1, 2), (-0.25, -0.5), blend=-0.25), Leg(3, 5, (3,), (-2.0,)))


def surrogate(**settings: float) -> Surrogate:
    return Surrogate("sample", (Term(1, -1.0),), LEGS, **settings)


def test_connector_gaps():
    gaps = connector_gaps(surrogate(), LATENTS, VELOCITIES)
    assert set(gaps) == {3, 5}
    # [1, 2] - 0.25 [1, 1] - 0.5 [3, 0] - 0.25 [1, 1] = [-1, 1.5], gap to [0, 0]: 1.25; second sample likewise.
    assert gaps[3].tolist() == pytest.approx([1.25, (2.5 + 0.5) / 2])
    assert gaps[5].tolist() == pytest.approx([(3.0 + 1.0) / 2, (0.0 + 6.0) / 2])
    assert not gaps[3].requires_grad


def test_gaps_are_those_of_what_is_sampled():
    sampled = torch.tensor([[True, False], [False, False]])
    gaps = connector_gaps(surrogate(), LATENTS, VELOCITIES, sampled)
    assert gaps[3].tolist() == pytest.approx([0.5, 0])


def test_gaps_of_low_precision_latents_are_summed_in_float32():
    latents = {step: value.bfloat16() for step, value in LATENTS.items()}
    velocities = {step: value.bfloat16().requires_grad_() for step, value in VELOCITIES.items()}
    gaps = connector_gaps(surrogate(), latents, velocities)
    assert gaps[3].dtype == torch.float32 and not gaps[3].requires_grad
    assert gaps[3].tolist() == pytest.approx([1.25, 1.5])


def test_without_legs_there_are_no_gaps_and_all_weights_are_one():
    bare = Surrogate("sample", (Term(1, -1.0),))
    assert connector_gaps(bare, {}, {}) == {}
    assert sample_weights(bare, {}) is None
    assert sample_weights(surrogate(), connector_gaps(surrogate(), LATENTS, VELOCITIES)) is None


GAPS = {3: torch.tensor([0.05, 0.5, 2.0]), 5: torch.tensor([0.3, 0.02, 1.0])}


def test_trajectory_similarity_weights():
    weights = sample_weights(surrogate(tau=0.1), GAPS)
    assert weights.tolist() == pytest.approx([1 / (0.1 + 0.3), 1 / (0.5 + 0.1), 1 / 3.0])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"max_gap_j": 1.0}, [1, 1, 0]),
        ({"max_gap_j": 0.5}, [1, 1, 0]),
        ({"max_gap_j": 0.1}, [1, 0, 0]),
        ({"max_gap_0": 0.1}, [0, 1, 0]),
        ({"max_gap_j": 0.1, "max_gap_0": 0.1}, [0, 0, 0]),
        ({"max_gap_j": 9.0, "max_gap_0": 9.0}, [1, 1, 1]),
    ],
)
def test_samples_beyond_a_gap_are_dropped(settings: dict[str, float], kept: list[int]):
    assert sample_weights(surrogate(**settings), GAPS).tolist() == kept
    similar = sample_weights(surrogate(tau=0.1), GAPS)
    assert sample_weights(surrogate(tau=0.1, **settings), GAPS).tolist() == (similar * torch.tensor(kept)).tolist()
