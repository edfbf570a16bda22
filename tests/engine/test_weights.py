# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Weights of a leg against exact rational arithmetic, on uneven sigmas."""

from fractions import Fraction

import pytest
import torch

from flowbp.weights import leg_supports, leg_weights

# Uneven, as SD3's shifted schedule is: steps grow towards the end.
EVEN = torch.linspace(1, 0, 13, dtype=torch.float64).tolist()
SIGMAS = [3 * sigma / (1 + 2 * sigma) for sigma in EVEN]
NUM_STEPS = len(SIGMAS) - 1


def exact_integral(coefficients: list[Fraction], left: float, right: float) -> Fraction:
    """Integral of `sum(c_p sigma^p)` from left to right in rational numbers."""
    left, right = Fraction(left), Fraction(right)
    return sum(
        (c * (right ** (power + 1) - left ** (power + 1)) / (power + 1) for power, c in enumerate(coefficients)),
        start=Fraction(0),
    )


def exact_value(coefficients: list[Fraction], sigma: float) -> Fraction:
    return sum((c * Fraction(sigma) ** power for power, c in enumerate(coefficients)), start=Fraction(0))


LEGS = [(0, 12), (0, 5), (4, 12), (3, 4), (10, 12), (7, 11)]


@pytest.mark.parametrize("order", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(("start", "end"), LEGS)
@pytest.mark.parametrize("kind", ["lagrange", "adams-bashforth"])
def test_polynomials_below_the_order_are_integrated_exactly(kind: str, start: int, end: int, order: int):
    supports = leg_supports(kind, start, end, order)
    weights = leg_weights(kind, SIGMAS, start, end, supports)
    left, right = SIGMAS[start], SIGMAS[end]
    for degree in range(len(supports)):
        polynomial = [Fraction(2 - 3 * power, power + 1) for power in range(degree + 1)]
        found = sum(
            Fraction(weight) * exact_value(polynomial, SIGMAS[step])
            for step, weight in zip(supports, weights, strict=True)
        )
        size = sum(abs(weight) for weight in weights) * max(1.0, *(abs(float(c)) for c in polynomial))
        assert abs(float(found - exact_integral(polynomial, left, right))) <= 1e-12 * max(size, 1e-3)


def test_polynomial_of_the_order_itself_is_not_integrated_exactly():
    supports = leg_supports("lagrange", 0, 12, 2)
    weights = leg_weights("lagrange", SIGMAS, 0, 12, supports)
    square = [Fraction(0), Fraction(0), Fraction(1)]
    found = sum(weight * SIGMAS[step] ** 2 for step, weight in zip(supports, weights, strict=True))
    assert abs(found - float(exact_integral(square, SIGMAS[0], 0.0))) > 1e-2


@pytest.mark.parametrize("kind", ["lagrange", "uniform", "adams-bashforth"])
def test_weights_sum_to_the_leg(kind: str):
    for start in range(NUM_STEPS):
        for end in range(start + 1, NUM_STEPS + 1):
            for order in (1, 2, 3, 4):
                weights = leg_weights(kind, SIGMAS, start, end, leg_supports(kind, start, end, order))
                length = SIGMAS[end] - SIGMAS[start]
                assert sum(weights) == pytest.approx(length, abs=1e-12 * max(1, sum(map(abs, weights))))


def test_uniform_weights_are_equal_shares():
    supports = leg_supports("uniform", 2, 9, 3)
    assert supports == leg_supports("lagrange", 2, 9, 3)
    share = (SIGMAS[9] - SIGMAS[2]) / 3
    assert leg_weights("uniform", SIGMAS, 2, 9, supports) == pytest.approx([share] * 3, rel=1e-15)


def test_adams_bashforth_of_order_two_is_the_textbook_formula():
    # Even steps of length h: h (3/2 f_i - 1/2 f_(i-1)).
    supports = leg_supports("adams-bashforth", 5, 6, 2)
    assert supports == (4, 5)
    step = EVEN[6] - EVEN[5]
    assert leg_weights("adams-bashforth", EVEN, 5, 6, supports) == pytest.approx([-step / 2, 3 * step / 2], rel=1e-12)


@pytest.mark.parametrize(
    ("start", "end", "order", "expected"),
    [
        (0, 10, 3, (0, 4, 9)),  # 4.5 rounds to the even 4
        (0, 12, 3, (0, 6, 11)),  # 5.5 rounds to the even 6
        (3, 13, 3, (3, 7, 12)),
        (0, 6, 3, (0, 2, 5)),  # 2.5 rounds to 2
        (0, 4, 3, (0, 2, 3)),  # 1.5 rounds to 2
        (0, 9, 3, (0, 4, 8)),
        (2, 8, 2, (2, 7)),
        (0, 8, 3, (0, 4, 7)),  # 3.5 rounds to 4
        (0, 11, 4, (0, 3, 7, 10)),
        (5, 8, 3, (5, 6, 7)),
        (5, 7, 3, (5, 6)),  # a short leg is supported by all of its steps
        (5, 6, 4, (5,)),
        (5, 12, 1, (5,)),
    ],
)
def test_supports_are_spread_evenly_and_round_half_to_even(
    start: int, end: int, order: int, expected: tuple[int, ...]
):
    assert leg_supports("lagrange", start, end, order) == expected


@pytest.mark.parametrize(
    ("start", "order", "expected"), [(5, 3, (3, 4, 5)), (1, 3, (0, 1)), (0, 3, (0,)), (4, 1, (4,))]
)
def test_adams_bashforth_supports_end_at_the_left_step(start: int, order: int, expected: tuple[int, ...]):
    assert leg_supports("adams-bashforth", start, 9, order) == expected


def test_supports_stay_in_their_leg_and_never_repeat():
    for start in range(0, 30, 7):
        for end in range(start + 1, 40):
            for order in range(1, 9):
                supports = leg_supports("lagrange", start, end, order)
                assert supports[0] == start and supports[-1] < end
                assert len(set(supports)) == len(supports) == min(order, end - start)
                assert list(supports) == sorted(supports)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: leg_supports("lagrange", 4, 4, 2), "0 <= start < end, got start=4, end=4"),
        (lambda: leg_supports("lagrange", -1, 4, 2), "got start=-1"),
        (lambda: leg_supports("lagrange", 1, 4, 0), "`order` must be at least 1, got 0"),
        (lambda: leg_supports("simpson", 1, 4, 2), "'simpson'; choose one of lagrange, uniform, adams-bashforth"),
        (
            lambda: leg_weights("simpson", SIGMAS, 1, 4, (1, 2)),
            "'simpson'; choose one of lagrange, uniform, adams-bashforth",
        ),
    ],
)
def test_refusals(call: object, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_sum_to_the_leg_are_refused():
    crowded = [*torch.linspace(1, 1 - 1e-9, 9, dtype=torch.float64).tolist(), 0.0]
    with pytest.raises(ValueError, match="lie too close together in sigma; use a lower `order`"):
        leg_weights("lagrange", crowded, 0, 9, range(9))
