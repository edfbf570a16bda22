# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Drawing rules: which steps of a rollout are active.

Each rule takes a CPU generator and returns step numbers. All draws of a surrogate come from that generator, so that
processes with the same seed draw the same surrogate. Steps are named as in docs/methods.md, section 1: `k < j`, and
step 0 starts from noise. The trainable window is `[start, num_steps)`.
"""

import math

import torch

STEP_SAMPLING = ("uniform", "dirichlet", "midpoint", "midpoint-j")


def uniform_integer(low: int, high: int, generator: torch.Generator | None) -> int:
    """One integer, uniform over `low <= value < high`."""
    return torch.randint(low, high, (1,), generator=generator).tolist()[0]


def tail_window(num_steps: int, tail_ratio: float, smallest: int = 1) -> int:
    """First step of the trainable window, the last `ceil(tail_ratio * num_steps)` steps but at least `smallest`.

    As in the reference code, `flowbp/trainers/common/rollout_window.py`.

    Args:
        num_steps: N.
        tail_ratio: in (0, 1].
        smallest: 3 where k and j are drawn (docs/methods.md, "Drawing rules"), else 1.

    Returns:
        The window's first step.

    Raises:
        ValueError: if the rollout has fewer than `smallest` steps.
    """
    if num_steps < smallest:
        raise ValueError(
            f"The rollout has {num_steps} steps, this method needs at least {smallest}; raise `num_inference_steps`."
        )
    # Rounded first, because 0.28 * 25 is a little above 7 in floating point.
    return num_steps - max(smallest, math.ceil(round(tail_ratio * num_steps, 9)))


def late_biased_steps(
    first: int, last: int, count: int, late_bias: float, generator: torch.Generator | None, origin: int
) -> tuple[int, ...]:
    """Draw `count` distinct steps of `[first, last)`; step i has the weight `(i - origin + 1) ** late_bias`.

    As in the reference code, `_sample_late_biased_indices` in `flowbp/trainers/*/flowbp_sparse.py`: FlowBP-Sparse
    counts from the rollout's start also inside a tail window (`origin=0`), FlowBP-Bridge from the start of each part
    (`origin=first`).

    Args:
        first: first step that can be drawn, at least `origin`.
        last: one past the last.
        count: how many, from 0 to `last - first`.
        late_bias: at least 0, which is uniform; larger values prefer late steps.
        generator: CPU generator.
        origin: the step that has weight 1.

    Returns:
        Rising steps.
    """
    if count == 0:
        return ()
    places = torch.arange(1 + first - origin, 1 + last - origin, dtype=torch.float64)
    # Relative to the largest place, so that a strong bias over many steps does not overflow.
    chances = (places / places[-1]) ** late_bias
    drawn = torch.multinomial(chances, count, replacement=False, generator=generator).tolist()
    return tuple(sorted(first + place for place in drawn))


def draw_two_steps(
    rule: str,
    num_steps: int,
    start: int,
    generator: torch.Generator | None,
    dirichlet: tuple[float, float, float],
    max_tail: int | None,
) -> tuple[int, int]:
    """Draw `k < j` inside the window `[start, num_steps)` (docs/methods.md, "Drawing rules").

    As in the reference code, `flowbp/trainers/common/jk_sampling.py`, which counts steps from the end.

    - `uniform`: two distinct uniform steps; with `max_tail`, j uniform within the cap, then k uniform before it.
    - `dirichlet`: one Dirichlet draw over (tail, middle, head), times the window's length, rounded, each at least 1,
      the rounding error given to the largest: `j = num_steps - tail - 1`, `k` is `middle` steps earlier. A tail above
      `max_tail` steps gives its excess to the head, moving k and j together.
    - `midpoint`: k uniform, `j = (k + num_steps) // 2`.
    - `midpoint-j`: j uniform, `k = j // 2`, kept inside the window.

    Args:
        rule: one of `STEP_SAMPLING`.
        num_steps: N.
        start: first step of the window, which must hold at least 3 steps.
        generator: CPU generator.
        dirichlet: concentrations (tail, middle, head), each above 0.
        max_tail: cap on `num_steps - j`, or `None`.

    Returns:
        `(k, j)`.

    Raises:
        ValueError: for an unknown rule.
    """
    if rule == "uniform":
        if max_tail is None:
            first, second = torch.randperm(num_steps - start, generator=generator)[:2].tolist()
            return start + min(first, second), start + max(first, second)
        j = uniform_integer(max(start + 1, num_steps - max_tail), num_steps, generator)
        return uniform_integer(start, j, generator), j
    if rule == "dirichlet":
        return _dirichlet_steps(num_steps, start, generator, dirichlet, max_tail)
    if rule == "midpoint":
        k = uniform_integer(start, num_steps - 1, generator)
        return k, (k + num_steps) // 2
    if rule == "midpoint-j":
        j = uniform_integer(start + 1, num_steps, generator)
        return min(max(j // 2, start), j - 1), j
    raise ValueError(f"Unknown `step_sampling` {rule!r}; choose one of {', '.join(STEP_SAMPLING)}.")


def _dirichlet_steps(
    num_steps: int,
    start: int,
    generator: torch.Generator | None,
    concentrations: tuple[float, float, float],
    max_tail: int | None,
) -> tuple[int, int]:
    window = num_steps - start
    # torch's public Dirichlet takes no generator; a normalised gamma draw is one.
    gammas = torch._standard_gamma(torch.tensor(concentrations, dtype=torch.float64), generator=generator)
    shares = (gammas / gammas.sum()).tolist()
    lengths = [round(share * window) for share in shares]
    lengths[shares.index(max(shares))] += window - sum(lengths)
    lengths = [max(length, 1) for length in lengths]
    lengths[lengths.index(max(lengths))] += window - sum(lengths)
    tail, middle, head = lengths
    if max_tail is not None:
        excess = max(0, tail - max(1, max_tail - 1))
        tail, head = tail - excess, head + excess
    k = start + head - 1
    return k, k + middle
