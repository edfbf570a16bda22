# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The method table: every way to send a reward's gradient back is one row.

A row draws a `Surrogate` (an endpoint, legs and terms; docs/methods.md, section 2) from the scheduler's sigmas and a
CPU generator. Nothing here knows about models: adding a method is adding a row to `METHODS` and its drawing function.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .drawing import STEP_SAMPLING, draw_two_steps, late_biased_steps, tail_window, uniform_integer
from .surrogate import Leg, Surrogate, Term
from .weights import LEG_WEIGHTS, leg_supports, leg_weights, step_lengths

BACKBONES = ("sd3", "flux", "flux2")
ACTIVE_SUPPORTS = ("none", "start", "midpoint", "all")
ENDPOINTS = ("sample", "posterior-mean")


@dataclass(frozen=True)
class Option:
    """What values an option of a row takes: the type, a test and the words for both."""

    convert: Callable[[Any], Any]
    test: Callable[[Any], bool]
    expected: str


def _integer(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError
    return int(value)


def _optional(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else convert(value)


def _number(value: Any) -> float:
    if isinstance(value, bool | str):
        raise ValueError
    return float(value)


def _choice(choices: tuple[str, ...]) -> Option:
    return Option(str, lambda value: value in choices, f"one of {', '.join(choices)}")


_COUNT = Option(_integer, lambda value: value >= 1, "a whole number of at least 1")
_FACTOR = Option(_number, lambda value: 0 <= value < math.inf, "a number of at least 0")
_GAP = Option(
    _optional(_number), lambda value: value is None or 0 < value < math.inf, "a number above 0, or None for none"
)
_RATIO = Option(_number, lambda value: 0 < value <= 1, "a number above 0 and at most 1")

OPTIONS: Mapping[str, Option] = {
    "last_k": _COUNT,
    "last_n": _COUNT,
    "num_noised": _COUNT,
    "num_active": _COUNT,
    "order": _COUNT,
    "early_stop_ratio": _RATIO,
    "tail_ratio": _RATIO,
    "alpha": _FACTOR,
    "late_bias": _FACTOR,
    "grad_rescale": _FACTOR,
    "support_scale": _FACTOR,
    "tau": _GAP,
    "max_gap_j": _GAP,
    "max_gap_0": _GAP,
    "anchor_lambda": Option(_number, lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "active_supports": _choice(ACTIVE_SUPPORTS),
    "weights": _choice(LEG_WEIGHTS),
    "step_sampling": _choice(STEP_SAMPLING),
    "endpoint": _choice(ENDPOINTS),
    "dirichlet": Option(
        lambda value: tuple(_number(part) for part in value),
        lambda value: len(value) == 3 and all(0 < part < math.inf for part in value),
        "three numbers above 0 (tail, middle, head)",
    ),
    "max_tail": Option(
        _optional(_integer), lambda value: value is None or value >= 1, "a whole number of at least 1, or None"
    ),
}


@dataclass(frozen=True)
class Row:
    """One line of the method table.

    Attributes:
        draw: `(sigmas, options, generator) -> Surrogate`.
        title: the method's name as papers write it.
        source: where it comes from.
        options: defaults of every option that the row has (those of the reference for SD3.5).
        backbones: what differs from them for a backbone.
        check: refuses combinations of options that do not fit, before anything is drawn.
        unconditional_gradient: backbones on which gradients flow through both guidance branches by default.
        undo_guidance: backbones on which the loss is divided by the guidance scale by default.
    """

    draw: Callable[[torch.Tensor, Mapping[str, Any], torch.Generator | None], Surrogate]
    title: str
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    backbones: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], None] = lambda options: None
    unconditional_gradient: tuple[str, ...] = ()
    undo_guidance: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A row of the table with its options settled; make one with `get_method`.

    Attributes:
        name: key of `METHODS`.
        options: every option of the row.
        unconditional_gradient: whether gradients flow through the unconditional branch of guidance by default.
        undo_guidance: whether the recipe divides the loss by the guidance scale by default.
    """

    name: str
    options: Mapping[str, Any]
    unconditional_gradient: bool
    undo_guidance: bool

    def draw(self, sigmas: torch.Tensor, generator: torch.Generator | None = None) -> Surrogate:
        """Draw a surrogate for one rollout.

        Args:
            sigmas: `(N + 1,)` floating point, falling from about 1 to exactly 0.
            generator: CPU generator; `None` uses torch's global one.

        Returns:
            The surrogate, in pure numbers.

        Raises:
            ValueError: for other sigmas, or options that the number of steps cannot hold, saying what would fit.
        """
        _check_sigmas(sigmas)
        sigmas = sigmas.detach().double().cpu()
        surrogate = METHODS[self.name].draw(sigmas, self.options, generator)
        surrogate.check(len(sigmas) - 1)
        return surrogate


def get_method(name: str, backbone: str = "sd3", **options: Any) -> Method:
    """A row of the table, with the backbone's defaults and the given options.

    Args:
        name: key of `METHODS`.
        backbone: `"sd3"`, `"flux"` or `"flux2"`; chooses the defaults of the paper's reference code.
        **options: options of the row; each is checked, and one that the row does not have is refused.

    Raises:
        ValueError: for an unknown name, backbone or option (with the choices), or a value outside its range.
    """
    if name not in METHODS:
        raise ValueError(f"Unknown method {name!r}{_nearest(name, METHODS)}; choose one of {', '.join(METHODS)}.")
    if backbone not in BACKBONES:
        raise ValueError(f"Unknown backbone {backbone!r}; choose one of {', '.join(BACKBONES)}.")
    row = METHODS[name]
    settled = {**row.options, **row.backbones.get(backbone, {})}
    for option, value in options.items():
        if option not in settled:
            choices = f"it has {', '.join(settled)}" if settled else "it has none"
            raise ValueError(f"{name} has no option {option!r}{_nearest(option, settled)}; {choices}.")
        rule = OPTIONS[option]
        try:
            settled[option] = rule.convert(value)
            fits = rule.test(settled[option])
        except (TypeError, ValueError, OverflowError):
            fits = False
        if not fits:
            raise ValueError(f"{name}: `{option}` must be {rule.expected}, got {value!r}.")
    row.check(settled)
    return Method(name, settled, backbone in row.unconditional_gradient, backbone in row.undo_guidance)


def _nearest(word: str, choices: Mapping[str, Any]) -> str:
    match = difflib.get_close_matches(word, choices, n=1)
    return f" (nearest: {match[0]!r})" if match else ""


def _check_sigmas(sigmas: torch.Tensor) -> None:
    if sigmas.ndim != 1 or len(sigmas) < 2 or not sigmas.is_floating_point():
        raise ValueError(
            f"`sigmas` must be a floating point tensor of shape (N + 1,) with N >= 1, got {tuple(sigmas.shape)} "
            f"{sigmas.dtype}."
        )
    if not (bool((sigmas[1:] < sigmas[:-1]).all()) and sigmas[-1] == 0 and sigmas[0] <= 1.001):
        raise ValueError(
            f"`sigmas` must fall from about 1 to exactly 0, got {sigmas[0].item():.4g} ... {sigmas[-1].item():.4g}; "
            "use a flow-matching Euler schedule without inverted sigmas."
        )


def _rescale(grad_rescale: float, whole: float, active: float) -> float:
    # rho of docs/methods.md, "The rows": 1 leaves the active weights, full grad_rescale makes them sum to the whole.
    return 1.0 + grad_rescale * (whole / active - 1.0)


def _full(sigmas: torch.Tensor, options: Mapping[str, Any], generator: torch.Generator | None) -> Surrogate:
    return Surrogate("sample", tuple(Term(step, length, 1.0) for step, length in enumerate(step_lengths(sigmas))))


def _draft_k(sigmas: torch.Tensor, options: Mapping[str, Any], generator: torch.Generator | None) -> Surrogate:
    lengths, last_k = step_lengths(sigmas), options["last_k"]
    if last_k > len(lengths):
        raise ValueError(f"draft-k: `last_k` is {last_k}, the rollout has {len(lengths)} steps; use at most that.")
    return Surrogate(
        "sample", tuple(Term(step, lengths[step], 1.0) for step in range(len(lengths) - last_k, len(lengths)))
    )


def _refl(sigmas: torch.Tensor, options: Mapping[str, Any], generator: torch.Generator | None) -> Surrogate:
    num_steps, last_n = len(sigmas) - 1, options["last_n"]
    if last_n > num_steps:
        raise ValueError(f"refl: `last_n` is {last_n}, the rollout has {num_steps} steps; use at most that.")
    step = uniform_integer(num_steps - last_n, num_steps, generator)
    endpoint = "sample" if options["endpoint"] == "sample" else ("posterior_mean", step)
    return Surrogate(endpoint, (Term(step, (sigmas[-1] - sigmas[step]).item()),))


def _draft_lv(sigmas: torch.Tensor, options: Mapping[str, Any], generator: torch.Generator | None) -> Surrogate:
    lengths = step_lengths(sigmas)
    if len(lengths) < 2:
        raise ValueError("draft-lv re-noises the input of the last of at least 2 steps; raise `num_inference_steps`.")
    return Surrogate("sample", (Term(len(lengths) - 1, lengths[-1]),), num_noised=options["num_noised"])


def _drtune(sigmas: torch.Tensor, options: Mapping[str, Any], generator: torch.Generator | None) -> Surrogate:
    lengths, num_active = step_lengths(sigmas), options["num_active"]
    num_steps = len(lengths)
    stop_choices = max(1, round(options["early_stop_ratio"] * num_steps))
    if num_active > num_steps - stop_choices + 1:
        raise ValueError(
            f"drtune: `num_active` is {num_active}, but the rollout may stop after {num_steps - stop_choices + 1} of "
            f"its {num_steps} steps; use at most that many, or a smaller `early_stop_ratio`."
        )
    stop = uniform_integer(num_steps - stop_choices, num_steps, generator)
    stride = (stop + 1) // num_active
    offset = uniform_integer(0, stop - (num_active - 1) * stride + 1, generator)
    steps = range(offset, offset + num_active * stride, stride)
    terms = tuple(Term(step, (sigmas[-1] - sigmas[stop]).item() if step == stop else lengths[step]) for step in steps)
    return Surrogate("sample" if options["endpoint"] == "sample" else ("posterior_mean", stop), terms)


def _leap_align(sigmas: torch.Tensor, options: Mapping[str, Any], generator: torch.Generator | None) -> Surrogate:
    num_steps = len(sigmas) - 1
    k, j = _two_steps("leapalign", num_steps, options, generator, tail_ratio=1.0)
    legs = tuple(
        Leg(start, end, (start,), leg_weights("lagrange", sigmas, start, end, (start,)))
        for start, end in ((k, j), (j, num_steps))
    )
    return Surrogate(
        "sample" if options["endpoint"] == "sample" else ("posterior_mean", j),
        (Term(k, legs[0].weights[0]), Term(j, legs[1].weights[0], options["alpha"])),
        legs,
        tau=options["tau"],
        max_gap_j=options["max_gap_j"],
        max_gap_0=options["max_gap_0"],
    )


def _flowbp_sparse(sigmas: torch.Tensor, options: Mapping[str, Any], generator: torch.Generator | None) -> Surrogate:
    num_steps, num_active = len(sigmas) - 1, options["num_active"]
    start = tail_window(num_steps, options["tail_ratio"])
    if num_active > num_steps - start:
        raise ValueError(_too_many("flowbp-sparse", num_active, num_steps, start))
    steps = late_biased_steps(start, num_steps, num_active, options["late_bias"], generator)
    return _euler_terms(sigmas, steps, start, options)


def _flowbp_bridge(sigmas: torch.Tensor, options: Mapping[str, Any], generator: torch.Generator | None) -> Surrogate:
    num_steps, num_active = len(sigmas) - 1, options["num_active"]
    start = tail_window(num_steps, options["tail_ratio"], smallest=3)
    if num_active > num_steps - start:
        raise ValueError(_too_many("flowbp-bridge", num_active, num_steps, start))
    _, j = _two_steps("flowbp-bridge", num_steps, options, generator)
    first_part, second_part = j - start, num_steps - j
    in_first = round(num_active * first_part / (first_part + second_part))
    in_first = min(max(in_first, 1, num_active - second_part), num_active - 1, first_part)
    steps = late_biased_steps(start, j, in_first, options["late_bias"], generator) + (j,)
    steps += late_biased_steps(j + 1, num_steps, num_active - in_first - 1, options["late_bias"], generator)
    return _euler_terms(sigmas, steps, start, options, coupled=j)


def _euler_terms(
    sigmas: torch.Tensor, steps: tuple[int, ...], start: int, options: Mapping[str, Any], coupled: int | None = None
) -> Surrogate:
    lengths = step_lengths(sigmas)
    endpoint: str | tuple[str, int] = "sample"
    if options["endpoint"] == "posterior-mean":
        # The posterior mean at the last active step is one leap from there to sigma 0.
        endpoint = ("posterior_mean", steps[-1])
        lengths[steps[-1]] = (sigmas[-1] - sigmas[steps[-1]]).item()
    whole = (sigmas[start] - sigmas[-1]).item()
    rho = _rescale(options["grad_rescale"], whole, sum(abs(lengths[step]) for step in steps))
    terms = (Term(step, rho * lengths[step], options["alpha"] if step == coupled else 0.0) for step in steps)
    return Surrogate(endpoint, tuple(terms))


def _flowbp_lagrange(sigmas: torch.Tensor, options: Mapping[str, Any], generator: torch.Generator | None) -> Surrogate:
    num_steps = len(sigmas) - 1
    k, j = _two_steps("flowbp-lagrange", num_steps, options, generator)
    legs, terms = [], {}
    for start, end in ((k, j), (j, num_steps)):
        supports = leg_supports(options["weights"], start, end, options["order"])
        weights = leg_weights(options["weights"], sigmas, start, end, supports)
        active = _active_supports(options["active_supports"], start, supports)
        # Only the first leg is blended with a single leap from its left end.
        share = options["anchor_lambda"] if start == k else 1.0
        blend = (1.0 - share) * (sigmas[end] - sigmas[start]).item() if share < 1 else 0.0
        legs.append(Leg(start, end, supports, tuple(share * weight for weight in weights), blend))
        by_step = dict(zip(supports, weights, strict=True))
        if active:
            whole = sum(abs(weight) for weight in weights)
            rho = _rescale(options["grad_rescale"], whole, sum(abs(by_step[step]) for step in active))
            for step in active:
                scale = rho * share * (1.0 if step == start else options["support_scale"])
                terms[step] = terms.get(step, 0.0) + scale * by_step[step]
        if blend:
            terms[start] = terms.get(start, 0.0) + blend
    return Surrogate(
        "sample",
        tuple(Term(step, weight, options["alpha"] if step == j else 0.0) for step, weight in sorted(terms.items())),
        tuple(legs),
        tau=options["tau"],
        max_gap_j=options["max_gap_j"],
        max_gap_0=options["max_gap_0"],
    )


def _active_supports(which: str, start: int, supports: tuple[int, ...]) -> tuple[int, ...]:
    if which == "none":
        return ()
    if which == "start":
        return (start,)
    return supports[:2] if which == "midpoint" else supports


def _two_steps(
    name: str,
    num_steps: int,
    options: Mapping[str, Any],
    generator: torch.Generator | None,
    tail_ratio: float | None = None,
) -> tuple[int, int]:
    ratio = options["tail_ratio"] if tail_ratio is None else tail_ratio
    try:
        start = tail_window(num_steps, ratio, smallest=3)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return draw_two_steps(
        options["step_sampling"], num_steps, start, generator, options["dirichlet"], options["max_tail"]
    )


def _too_many(name: str, num_active: int, num_steps: int, start: int) -> str:
    return (
        f"{name}: `num_active` is {num_active}, the trainable window has {num_steps - start} of the rollout's "
        f"{num_steps} steps; use at most {num_steps - start}, or a larger `tail_ratio` or `num_inference_steps`."
    )


def _check_two_steps(options: Mapping[str, Any]) -> None:
    rule, max_tail = options["step_sampling"], options["max_tail"]
    if max_tail is not None and rule not in ("uniform", "dirichlet"):
        raise ValueError(f"`max_tail` goes with step_sampling uniform or dirichlet, got {rule}; leave it out.")
    if max_tail == 1 and rule == "dirichlet":
        raise ValueError("`max_tail` must be at least 2 with step_sampling dirichlet (its shortest tail), got 1.")


def _check_bridge(options: Mapping[str, Any]) -> None:
    _check_two_steps(options)
    if options["num_active"] < 2:
        raise ValueError(f"flowbp-bridge: `num_active` must be at least 2 (both parts), got {options['num_active']}.")


def _check_lagrange(options: Mapping[str, Any]) -> None:
    _check_two_steps(options)
    active, kind = options["active_supports"], options["weights"]
    if kind == "adams-bashforth" and active != "start":
        raise ValueError(
            f"flowbp-lagrange: weights adams-bashforth extrapolate from earlier steps and need active_supports=start, "
            f"got {active}."
        )
    if active == "none" and options["anchor_lambda"] == 1:
        raise ValueError(
            "flowbp-lagrange: active_supports=none leaves no terms unless anchor_lambda is below 1; choose start, "
            "midpoint or all."
        )


_UNIFORM_STEPS = {"step_sampling": "uniform", "dirichlet": (2.5, 6.0, 2.0), "max_tail": None}
_GAPS = {"max_gap_j": None, "max_gap_0": None}

METHODS: Mapping[str, Row] = {
    "full": Row(_full, "Full backpropagation", "exact chain rule through all steps"),
    # The DRaFT paper's single-step variant is the default.
    "draft-k": Row(_draft_k, "DRaFT-K", "Clark et al., 2024", {"last_k": 1}),
    "refl": Row(_refl, "ReFL", "Xu et al., 2023", {"last_n": 11, "endpoint": "posterior-mean"}),
    "draft-lv": Row(_draft_lv, "DRaFT-LV", "Clark et al., 2024", {"num_noised": 2}),
    "drtune": Row(
        _drtune,
        "DRTune",
        "Wu et al., 2024",
        {"num_active": 3, "early_stop_ratio": 0.4, "endpoint": "posterior-mean"},
    ),
    "leapalign": Row(
        _leap_align,
        "LeapAlign",
        "Liang et al., 2026 (arXiv 2604.15311)",
        {"alpha": 0.3, "tau": 0.1, "endpoint": "sample", **_UNIFORM_STEPS, **_GAPS},
        check=_check_two_steps,
        unconditional_gradient=("sd3",),
    ),
    "flowbp-sparse": Row(
        _flowbp_sparse,
        "FlowBP-Sparse",
        "Wang et al., 2026 (arXiv 2606.11075)",
        {"num_active": 4, "late_bias": 1.0, "grad_rescale": 0.5, "tail_ratio": 1.0, "endpoint": "sample"},
        {
            "flux": {"num_active": 3, "late_bias": 2.0, "grad_rescale": 1.0},
            "flux2": {"num_active": 4, "late_bias": 2.0, "grad_rescale": 0.0},
        },
    ),
    "flowbp-bridge": Row(
        _flowbp_bridge,
        "FlowBP-Bridge",
        "Wang et al., 2026 (arXiv 2606.11075)",
        {
            "num_active": 5,
            "alpha": 0.5,
            "late_bias": 4.0,
            "grad_rescale": 0.0,
            "tail_ratio": 1.0,
            "endpoint": "sample",
            **_UNIFORM_STEPS,
        },
        {
            "flux": {"num_active": 5, "alpha": 0.1, "late_bias": 2.0, "grad_rescale": 1.0},
            "flux2": {"num_active": 3, "alpha": 1.0, "late_bias": 4.0, "grad_rescale": 0.5},
        },
        check=_check_bridge,
    ),
    "flowbp-lagrange": Row(
        _flowbp_lagrange,
        "FlowBP-Lagrange",
        "Wang et al., 2026 (arXiv 2606.11075)",
        {
            "order": 3,
            "weights": "lagrange",
            "active_supports": "midpoint",
            "support_scale": 0.25,
            "anchor_lambda": 1.0,
            "alpha": 0.1,
            "tau": 0.2,
            "grad_rescale": 0.0,
            "tail_ratio": 1.0,
            "step_sampling": "dirichlet",
            "dirichlet": (2.5, 6.0, 2.0),
            "max_tail": 10,
            **_GAPS,
        },
        {
            "flux": {"tau": 0.2, "grad_rescale": 0.5, "max_tail": None},
            "flux2": {"tau": 0.1, "grad_rescale": 0.0, "max_tail": None, "tail_ratio": 0.7},
        },
        check=_check_lagrange,
        undo_guidance=("flux2",),
    ),
}
