# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""A surrogate: where the reward looks and how its gradient returns, as data that checks itself.

Terms, legs and endpoint are those of docs/methods.md, section 2. Nothing here knows which method drew a surrogate:
users may write their own.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise


@dataclass(frozen=True)
class Term:
    """A step whose velocity is evaluated again with gradients.

    Attributes:
        step: the active step, `0 <= step < N`.
        weight: coefficient of this velocity in the surrogate endpoint, all scalings multiplied in.
        coupling: factor on the gradient that crosses this velocity's input to the terms before it, at least 0. 0 cuts
            it, 1 is the true chain rule.
    """

    step: int
    weight: float
    coupling: float = 0.0

    def __post_init__(self) -> None:
        if self.step < 0 or not math.isfinite(self.weight) or not 0 <= self.coupling < math.inf:
            raise ValueError(f"A term needs step >= 0, a finite weight and a finite coupling >= 0, got {self}.")


@dataclass(frozen=True)
class Leg:
    """An interval of the rollout that one set of weights integrates.

    Its value at `end` is `latents[start] + sum(weights * velocities[supports]) + blend * velocities[start]`.

    Attributes:
        start: step at which the leg starts.
        end: step at which it arrives, at most N.
        supports: steps whose cached velocities it reads.
        weights: one for each support.
        blend: weight of the single leap from `start` that is blended in, 0 for none (`anchor_lambda`).
    """

    start: int
    end: int
    supports: tuple[int, ...]
    weights: tuple[float, ...]
    blend: float = 0.0

    def __post_init__(self) -> None:
        if len(self.supports) != len(self.weights) or not 0 <= self.start < self.end:
            raise ValueError(f"A leg needs 0 <= start < end and one weight for each support, got {self}.")
        if min(self.supports, default=0) < 0 or not all(map(math.isfinite, (*self.weights, self.blend))):
            raise ValueError(f"A leg needs supports >= 0 and finite weights, got {self}.")


@dataclass(frozen=True)
class Surrogate:
    """Where the reward looks and how its gradient returns (docs/methods.md, section 2).

    Attributes:
        endpoint: `"sample"`, or `("posterior_mean", step)`.
        terms: active steps, rising.
        legs: the intervals whose values give the connector gaps, empty where a row has none.
        tau: floor of the gaps in the trajectory-similarity weights `1 / (max(d_j, tau) + max(d_0, tau))`
            (LeapAlign, arXiv 2604.15311); `None` for weights of 1. Needs two legs.
        max_gap_j: samples whose gap at the first leg's end is larger get weight 0; `None` keeps all.
        max_gap_0: the same at the second leg's end.
        num_noised: re-noised copies of the sample to score too (DRaFT-LV).

    Raises:
        ValueError: for no terms, steps that do not rise, terms after the endpoint, legs that do not fit, or numbers
            out of range.
    """

    endpoint: str | tuple[str, int]
    terms: tuple[Term, ...]
    legs: tuple[Leg, ...] = ()
    tau: float | None = None
    max_gap_j: float | None = None
    max_gap_0: float | None = None
    num_noised: int = 0

    def __post_init__(self) -> None:
        steps = [term.step for term in self.terms]
        if not steps:
            raise ValueError("A surrogate needs at least one term, got none: no parameter would get a gradient.")
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise ValueError(f"A surrogate's terms must have rising steps, got {steps}.")
        if self.endpoint != "sample":
            if not (isinstance(self.endpoint, tuple) and len(self.endpoint) == 2):
                raise ValueError(f'`endpoint` must be "sample" or ("posterior_mean", step), got {self.endpoint!r}.')
            kind, step = self.endpoint
            if kind != "posterior_mean" or not isinstance(step, int) or step < 0:
                raise ValueError(f'`endpoint` must be "sample" or ("posterior_mean", step), got {self.endpoint!r}.')
            if steps[-1] > step:
                raise ValueError(f"The term at step {steps[-1]} lies after the endpoint, a posterior mean at {step}.")
        if len({leg.end for leg in self.legs}) < len(self.legs):
            raise ValueError(f"A surrogate's legs must end at different steps, got {[leg.end for leg in self.legs]}.")
        gaps = {"tau": self.tau, "max_gap_j": self.max_gap_j, "max_gap_0": self.max_gap_0}
        for name, value in gaps.items():
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be above 0 or None, got {value}.")
        if any(value is not None for value in gaps.values()) and len(self.legs) != 2:
            raise ValueError(f"`tau`, `max_gap_j` and `max_gap_0` need two legs, this surrogate has {len(self.legs)}.")
        if self.num_noised < 0:
            raise ValueError(f"`num_noised` must be at least 0, got {self.num_noised}.")

    def last_step(self, num_steps: int) -> int:
        """The last step that a rollout of `num_steps` steps must run: that of the endpoint or of the last leg."""
        endpoint = num_steps - 1 if self.endpoint == "sample" else self.endpoint[1]
        return max([endpoint, *(leg.end - 1 for leg in self.legs)])

    def negated(self) -> "Surrogate":
        """The same surrogate for velocities of the other sign: those that point from noise to image."""
        terms = tuple(replace(term, weight=-term.weight) for term in self.terms)
        legs = tuple(
            replace(leg, weights=tuple(-weight for weight in leg.weights), blend=-leg.blend) for leg in self.legs
        )
        return replace(self, terms=terms, legs=legs)

    def check(self, num_steps: int) -> None:
        """Raise ValueError unless the surrogate fits a rollout of `num_steps` steps."""
        needed = [self.last_step(num_steps), *(term.step for term in self.terms)]
        needed += [step for leg in self.legs for step in leg.supports]
        if max(needed) >= num_steps:
            raise ValueError(
                f"The surrogate needs steps up to {max(needed)}, the rollout has steps 0 to {num_steps - 1}; draw it "
                "for the same number of steps."
            )
        steps = [term.step for term in self.terms]
        if self.num_noised and (self.endpoint != "sample" or steps != [num_steps - 1]):
            raise ValueError(
                "Re-noised copies repeat the last step alone, so a surrogate with them has the sample as endpoint and "
                f"one term, at step {num_steps - 1}; got {self.endpoint!r} and steps {steps}."
            )
