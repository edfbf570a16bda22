# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Weights of a leg: the quadrature rules that integrate the velocity over an interval of sigmas.

A leg goes from step `start` to step `end`, and the flow over it is the integral of the velocity over sigma, from
`sigmas[start]` down to `sigmas[end]`. Each rule replaces this integral by a weighted sum of the velocities at a few
support steps. The weights of every rule sum to `sigmas[end] - sigmas[start]`, so a constant velocity is integrated
exactly. All functions take and return Python numbers, computed in float64.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np

LEG_WEIGHTS = ("lagrange", "uniform", "adams-bashforth")


def step_lengths(sigmas: Sequence[float]) -> list[float]:
    """Euler weights `h_i = sigmas[i + 1] - sigmas[i]` (docs/methods.md, section 1).

    Args:
        sigmas: N + 1 numbers, falling.

    Returns:
        N floats, all negative.
    """
    return [right - left for left, right in pairwise(sigmas)]


def leg_supports(kind: str, start: int, end: int, order: int) -> tuple[int, ...]:
    """The support steps of the leg `[start, end)`.

    `lagrange` and `uniform` take `order` steps spread evenly over the leg, including its left end: positions
    `linspace(0, end - start - 1, order)` rounded half to even, as in the reference code
    (`flowbp/trainers/common/flowbp_lagrange_utils.py`). A leg of fewer than `order` steps is supported by all of them.
    `adams-bashforth` (in the same file; no config of the reference uses it) takes the `order` steps that end at
    `start`, or fewer at the start of the rollout.

    Args:
        kind: one of `LEG_WEIGHTS`.
        start: first step of the leg, `0 <= start < end`.
        end: step at which the leg arrives, at most N.
        order: number of supports, at least 1.

    Returns:
        Rising steps.

    Raises:
        ValueError: for an empty leg, an order below 1 or an unknown kind.
    """
    if not 0 <= start < end:
        raise ValueError(f"A leg needs 0 <= start < end, got start={start}, end={end}.")
    if order < 1:
        raise ValueError(f"`order` must be at least 1, got {order}.")
    if kind == "adams-bashforth":
        return tuple(range(max(0, start - order + 1), start + 1))
    if kind not in LEG_WEIGHTS:
        raise ValueError(f"Unknown leg weights {kind!r}; choose one of {', '.join(LEG_WEIGHTS)}.")
    length = end - start
    if length <= order:
        return tuple(range(start, end))
    # Fractions, because floating point misses some exact halves; round() takes them to even.
    return (
        tuple(start + round(Fraction(place * (length - 1), order - 1)) for place in range(order))
        if order > 1
        else (start,)
    )


def leg_weights(
    kind: str, sigmas: Sequence[float], start: int, end: int, supports: Sequence[int]
) -> tuple[float, ...]:
    """Weights of `supports` in the integral over the leg `[start, end)`.

    `lagrange` and `adams-bashforth` integrate the polynomial in sigma through the supports' velocities and are exact
    for polynomials of a degree below the number of supports; `adams-bashforth` extrapolates, because its supports end
    at the leg's left end. `uniform` gives all supports the same weight. With one support a leg is the single leap of
    LeapAlign (arXiv 2604.15311), and a leg of one step is an Euler step.

    Args:
        kind: one of `LEG_WEIGHTS`.
        sigmas: N + 1 numbers, falling.
        start: first step of the leg.
        end: step at which it arrives.
        supports: distinct steps below N, see `leg_supports`.

    Returns:
        One float for each support, summing to `sigmas[end] - sigmas[start]`.

    Raises:
        ValueError: for an unknown kind, or weights that do not sum to the leg (supports at nearly equal sigmas).
    """
    left, right = sigmas[start], sigmas[end]
    length = right - left
    if kind == "uniform":
        weights = [length / len(supports)] * len(supports)
    elif kind in ("lagrange", "adams-bashforth"):
        weights = _lagrange_integrals([sigmas[step] for step in supports], left, right)
    else:
        raise ValueError(f"Unknown leg weights {kind!r}; choose one of {', '.join(LEG_WEIGHTS)}.")
    if not abs(sum(weights) - length) <= 1e-6 * abs(length):
        raise ValueError(
            f"The {kind} weights of leg [{start}, {end}) sum to {sum(weights)}, expected {length}: its supports "
            f"{tuple(supports)} lie too close together in sigma; use a lower `order`."
        )
    return tuple(weights)


def _lagrange_integrals(nodes: Sequence[float], left: float, right: float) -> list[float]:
    # The leg is mapped to [0, 1], because powers of small numbers cancel.
    length = right - left
    places = (np.asarray(nodes, dtype=np.float64) - left) / length
    weights = []
    for index, place in enumerate(places):
        others = np.delete(places, index)
        basis = np.polynomial.Polynomial.fromroots(others) / np.prod(place - others) if len(others) else None
        weights.append(length * float(basis.integ()(1.0)) if basis is not None else length)
    return weights
