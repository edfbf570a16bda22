# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The method table: each row is a way to backpropagate a reward through a rollout.

A row draws a `Surrogate` (an endpoint, legs and terms; docs/methods.md, section 2) from the scheduler's sigmas and a
CPU generator; it knows nothing about models. To add a method, add a row with its drawing function to `METHODS`, and
declare an option that no row has yet in `OPTIONS`. The command line, its help, the checks of recipes and the table in
docs/methods.md follow from these two. Users name a row in a module of their own `package.module:row`; it declares its
further options itself (docs/methods.md, section 4).
"""

import difflib
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from .drawing import STEP_SAMPLING, draw_two_steps, late_biased_steps, tail_window, uniform_integer
from .surrogate import Leg, Surrogate, Term
from .weights import LEG_WEIGHTS, leg_supports, leg_weights, step_lengths

BACKBONES = ("sd3", "flux", "flux2")
ACTIVE_SUPPORTS = ("none", "start", "midpoint", "all")
ENDPOINTS = ("sample", "posterior-mean")


@dataclass(frozen=True)
class Kind:
    """The values that an option can take: `COUNT`, `FACTOR`, ..., or `choice(...)`.

    Attributes:
        expected: type and range in words, for error messages and docs/methods.md.
        convert: from a Python value; raises TypeError, ValueError or OverflowError for a value of another type.
        fits: whether a converted value is in range.
        parse: turns a word of the command line (argparse's `type`) into what `convert` takes.
        choices: the values, where they can be listed.
        nargs: how many words the command line takes; `None` for one.
        metavar: names of these words in `--help`.
    """

    expected: str
    convert: Callable[[Any], Any]
    fits: Callable[[Any], bool]
    parse: Callable[[str], Any]
    choices: tuple[str, ...] | None = None
    nargs: int | None = None
    metavar: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Option:
    """The declaration of an option. Its defaults are in the rows that have it.

    Attributes:
        name: keyword of `get_method`, key of recipes and, after `--`, option of the command line.
        kind: the values that it can take.
        help: its meaning, one sentence.
    """

    name: str
    kind: Kind
    help: str

    def read(self, value: Any) -> Any:
        """Convert a value and check its range.

        Raises:
            ValueError: for a value of another type or outside of the range.
        """
        try:
            converted = self.kind.convert(value)
            if self.kind.fits(converted):
                return converted
        except (TypeError, ValueError, OverflowError):
            pass
        raise ValueError(f"`{self.name}` must be {self.kind.expected}, got {value!r}.")


def _integer(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool | str):
        raise ValueError
    return float(value)


def _optional(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None or value == "none" else convert(value)


def integer_or_none(word: str) -> int | str:
    """A word of the command line: an integer, or "none"."""
    return word if word == "none" else int(word)


def number_or_none(word: str) -> float | str:
    """A word of the command line: a number, or "none"."""
    return word if word == "none" else float(word)


def choice(choices: tuple[str, ...]) -> Kind:
    """The kind of an option whose value is one of `choices`."""
    return Kind(f"one of {', '.join(choices)}", str, lambda value: value in choices, str, choices)


COUNT = Kind("a whole number of at least 1", _integer, lambda value: value >= 1, int)
COUNT_OR_NONE = Kind(
    "a whole number of at least 1, or none",
    _optional(_integer),
    lambda value: value is None or value >= 1,
    integer_or_none,
)
FACTOR = Kind("a number of at least 0", _number, lambda value: 0 <= value < math.inf, float)
SHARE = Kind("a number from 0 to 1", _number, lambda value: 0 <= value <= 1, float)
RATIO = Kind("a number above 0 and at most 1", _number, lambda value: 0 < value <= 1, float)
GAP = Kind(
    "a number above 0, or none",
    _optional(_number),
    lambda value: value is None or 0 < value < math.inf,
    number_or_none,
)
CONCENTRATIONS = Kind(
    "three numbers above 0 (tail, middle, head)",
    lambda value: tuple(_number(part) for part in value),
    lambda value: len(value) == 3 and all(0 < part < math.inf for part in value),
    float,
    nargs=3,
    metavar=("TAIL", "MIDDLE", "HEAD"),
)

# Every option of the rows below, declared once. docs/methods.md has the formulas.
OPTIONS: dict[str, Option] = {
    option.name: option
    for option in (
        Option("last_k", COUNT, "How many of the last steps are active."),
        Option("last_n", COUNT, "How many of the last steps the endpoint is drawn from."),
        Option("num_noised", COUNT, "How many re-noised copies of the sample are scored too."),
        Option("num_active", COUNT, "How many steps are active."),
        Option("early_stop_ratio", RATIO, "Share of the steps, the last ones, that the endpoint is drawn from."),
        Option("alpha", FACTOR, "Coupling at step j: factor on the gradient that its input passes to earlier terms."),
        Option("tau", GAP, "Floor of the connector gaps in the sample weights; none gives every sample weight 1."),
        Option(
            "late_bias",
            FACTOR,
            "Preference for late steps: step m has the weight (m + 1)^late_bias, where m counts from the start of the "
            "rollout (flowbp-sparse) or of the part (flowbp-bridge).",
        ),
        Option(
            "grad_rescale",
            FACTOR,
            "Scale of the active weights: 0 leaves them, 1 makes them sum to the window or leg.",
        ),
        Option("order", COUNT, "How many support steps a leg has."),
        Option("active_supports", choice(ACTIVE_SUPPORTS), "Which supports of a leg are active."),
        Option("support_scale", FACTOR, "Factor on the weights of active supports other than the leg's left end."),
        Option("weights", choice(LEG_WEIGHTS), "Quadrature rule of a leg."),
        Option(
            "anchor_lambda", SHARE, "Share of the first leg's own weights; the rest is one leap from its left end."
        ),
        Option("step_sampling", choice(STEP_SAMPLING), "How the steps k < j are drawn."),
        Option("dirichlet", CONCENTRATIONS, "Concentrations of step_sampling dirichlet."),
        Option("max_tail", COUNT_OR_NONE, "Largest number of steps from j to the end, N - j; none for no limit."),
        Option("tail_ratio", RATIO, "Share of the steps, the last ones, that can be active."),
        Option("endpoint", choice(ENDPOINTS), "What the reward sees."),
        Option("max_gap_j", GAP, "Samples whose connector gap at step j is larger are dropped; none keeps all."),
        Option("max_gap_0", GAP, "Samples whose connector gap at the end is larger are dropped; none keeps all."),
    )
}


@dataclass(frozen=True)
class Row:
    """One line of the method table. A row checks itself, so that a mistake fails at import.

    Attributes:
        draw: `(sigmas, options, generator) -> Surrogate`, with the sigmas as N + 1 Python floats. It raises ValueError
            for options that the rollout cannot hold; the method's name is put before the message.
        title: the method's name as papers and model cards write it.
        source: where it comes from.
        options: the options that the row has, with their defaults: one value, or a mapping from each of `BACKBONES`
            to a value.
        check: raises ValueError for options that are incompatible with each other, before anything is drawn.
        unconditional_gradient: backbones on which gradients flow through both guidance branches by default.
        undo_guidance: backbones on which the loss is divided by the guidance scale by default.
        own_options: declarations of those of `options` that are not in `OPTIONS`, for rows outside of this module.

    Raises:
        ValueError: for an option that is not declared, or declared twice; a default that is out of range or refused
            by `check`; an unknown or missing backbone.
    """

    draw: Callable[[Sequence[float], Mapping[str, Any], torch.Generator | None], Surrogate]
    title: str
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], None] = lambda options: None
    unconditional_gradient: tuple[str, ...] = ()
    undo_guidance: tuple[str, ...] = ()
    own_options: tuple[Option, ...] = ()

    def __post_init__(self) -> None:
        for backbone in (*self.unconditional_gradient, *self.undo_guidance):
            if backbone not in BACKBONES:
                raise ValueError(f"{self.title}: unknown backbone {backbone!r}; choose from {', '.join(BACKBONES)}.")
        self._check_declarations()
        for name, default in self.options.items():
            if isinstance(default, Mapping) and set(default) != set(BACKBONES):
                raise ValueError(
                    f"{self.title}: the defaults of `{name}` must be one value or a value for each of "
                    f"{', '.join(BACKBONES)}, got values for {', '.join(default)}."
                )
        for backbone in BACKBONES:
            defaults = self.defaults(backbone)
            try:
                for name, declared in self.declarations.items():
                    declared.read(defaults[name])
                self.check(defaults)
            except ValueError as error:
                raise ValueError(f"{self.title}, default for {backbone}: {error}") from None

    def _check_declarations(self) -> None:
        own = [option.name for option in self.own_options]
        for name in own:
            if name in OPTIONS or own.count(name) > 1:
                raise ValueError(f"{self.title}: option {name!r} is declared twice; give it another name.")
            if not name.isidentifier() or name in ("name", "backbone"):
                raise ValueError(f"{self.title}: option {name!r} cannot be a keyword of get_method; rename it.")
            if name not in self.options:
                raise ValueError(f"{self.title}: option {name!r} has no default; add it to `options`.")
        for name in self.options:
            if name not in OPTIONS and name not in own:
                raise ValueError(
                    f"{self.title}: option {name!r} is not declared; add it to `OPTIONS`, or to `own_options` for a "
                    "row of your own."
                )

    @property
    def declarations(self) -> dict[str, Option]:
        """The declaration of each option, in the order of `options`."""
        own = {option.name: option for option in self.own_options}
        return {name: own[name] if name in own else OPTIONS[name] for name in self.options}

    def defaults(self, backbone: str) -> dict[str, Any]:
        """Each option's default for one of `BACKBONES`."""
        return {
            name: default[backbone] if isinstance(default, Mapping) else default
            for name, default in self.options.items()
        }


@dataclass(frozen=True)
class Method:
    """A row with a value for each of its options; `get_method` makes one.

    Attributes:
        name: key of `METHODS`, or `package.module:row`.
        options: the value of every option of the row.
        unconditional_gradient: whether gradients flow through the unconditional branch of guidance by default.
        undo_guidance: whether the loss is divided by the guidance scale by default.
    """

    name: str
    options: Mapping[str, Any]
    unconditional_gradient: bool
    undo_guidance: bool

    @property
    def num_noised(self) -> int:
        """How many re-noised copies of the sample its surrogates have."""
        return self.options.get("num_noised", 0)

    def draw(self, sigmas: torch.Tensor, generator: torch.Generator | None = None) -> Surrogate:
        """Draw a surrogate for one rollout.

        Args:
            sigmas: `(N + 1,)` floating point, falling from about 1 to exactly 0.
            generator: CPU generator; `None` uses torch's global one.

        Returns:
            The surrogate, in pure numbers.

        Raises:
            ValueError: for other sigmas, or options that the number of steps cannot hold; the message says what fits.
        """
        values = _read_sigmas(sigmas)
        try:
            surrogate = find_row(self.name).draw(values, self.options, generator)
            surrogate.check(len(values) - 1)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        return surrogate


def get_method(name: str, backbone: str = "sd3", **options: Any) -> Method:
    """A method with the backbone's defaults and the given options.

    Args:
        name: key of `METHODS`, or `package.module:row` for a `Row` of your own (docs/methods.md, section 4).
        backbone: `"sd3"`, `"flux"` or `"flux2"`: whose defaults of the paper's reference code to take.
        **options: options of the row, in place of their defaults.

    Raises:
        ValueError: for an unknown name, backbone or option (the message has the choices), a value out of range, or
            options that are incompatible with each other.
    """
    row = find_row(name)
    if backbone not in BACKBONES:
        raise ValueError(f"Unknown backbone {backbone!r}; choose one of {', '.join(BACKBONES)}.")
    values, declarations = row.defaults(backbone), row.declarations
    for option in options:
        if option not in declarations:
            choices = f"it has {', '.join(declarations)}" if declarations else "it has none"
            raise ValueError(f"{name} has no option {option!r}{_nearest(option, declarations)}; {choices}.")
    try:
        values |= {option: declarations[option].read(value) for option, value in options.items()}
        row.check(values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return Method(name, values, backbone in row.unconditional_gradient, backbone in row.undo_guidance)


def find_row(name: str) -> Row:
    """The row of a method's name.

    Args:
        name: key of `METHODS`, or `package.module:row`, which is imported.

    Raises:
        ValueError: for an unknown name, a module that cannot be imported, or an attribute that is missing or no `Row`.
    """
    if name in METHODS:
        return METHODS[name]
    module_name, _, attribute = name.partition(":")
    if not all(word.isidentifier() for word in [*module_name.split("."), attribute]):
        raise ValueError(
            f"Unknown method {name!r}{_nearest(name, METHODS)}; choose one of {', '.join(METHODS)}, or "
            "package.module:row for one of your own."
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        message = " ".join(str(error).split())
        raise ValueError(
            f"method {name!r}: expected an importable package.module:row, got {type(error).__name__}: {message}; "
            "its folder must be on PYTHONPATH."
        ) from error
    row = getattr(module, attribute, None)
    if not isinstance(row, Row):
        found = type(row).__name__ if hasattr(module, attribute) else "no such attribute"
        rows = {known: value for known, value in vars(module).items() if isinstance(value, Row)}
        remedy = f"it has {', '.join(rows)}" if rows else "define one with `flowbp.methods.Row`"
        raise ValueError(
            f"method {name!r}: expected a Row in {module_name}, got {found}{_nearest(attribute, rows)}; {remedy}."
        )
    return row


def _nearest(word: str, choices: Mapping[str, Any]) -> str:
    match = difflib.get_close_matches(word, choices, n=1)
    return f" (nearest: {match[0]!r})" if match else ""


def _read_sigmas(sigmas: torch.Tensor) -> list[float]:
    # One transfer from the device; arithmetic on sigmas uses Python's floats, which are float64.
    if sigmas.ndim != 1 or len(sigmas) < 2 or not sigmas.is_floating_point():
        raise ValueError(
            f"`sigmas` must be a floating point tensor of shape (N + 1,) with N >= 1, got {tuple(sigmas.shape)} of "
            f"{sigmas.dtype}; pass the `sigmas` of a flow-matching scheduler after `set_timesteps`."
        )
    values = sigmas.detach().cpu().tolist()
    if fault := _fault_of_sigmas(values):
        raise ValueError(f"`sigmas` must fall from about 1 to exactly 0, got {fault}.")
    return values


def _fault_of_sigmas(sigmas: Sequence[float]) -> str | None:
    # What was found, and the remedy.
    remedy = "use a flow-matching Euler schedule"
    ends = f"{sigmas[0]:.4g} ... {sigmas[-1]:.4g}"
    if not all(map(math.isfinite, sigmas)):
        return f"{ends}, which are not all finite; {remedy}"
    if sigmas[0] > 1.001:
        return f"{ends}, which start above 1 as those of diffusion and EDM schedules do; {remedy}"
    for step, (left, right) in enumerate(pairwise(sigmas)):
        if left < right:
            return f"{left:.4g} before and {right:.4g} after step {step}, a rise; {remedy} without inverted sigmas"
        if left == right == 0:
            return f"0 before and after step {step}; leave the last 0 out of custom sigmas, the scheduler appends it"
        if left == right:
            return f"{left:.4g} before and after step {step}, a repeat; {remedy} (Heun's repeats its sigmas)"
    if sigmas[-1] != 0:
        return f"{ends}, which do not end at 0; {remedy}, which appends the 0"
    return None


def _rescale(grad_rescale: float, whole: float, active: float) -> float:
    # rho of docs/methods.md, "The rows": grad_rescale 0 keeps the active weights, 1 makes them sum to the whole.
    # As in the reference, a Lagrange weight of 0, which a leg of two equal steps has, cannot be rescaled.
    return 1.0 if active <= 1e-8 else 1.0 + grad_rescale * (whole / active - 1.0)


def _full(sigmas: Sequence[float], options: Mapping[str, Any], generator: torch.Generator | None) -> Surrogate:
    return Surrogate("sample", tuple(Term(step, length, 1.0) for step, length in enumerate(step_lengths(sigmas))))


def _draft_k(sigmas: Sequence[float], options: Mapping[str, Any], generator: torch.Generator | None) -> Surrogate:
    lengths, last_k = step_lengths(sigmas), options["last_k"]
    if last_k > len(lengths):
        raise ValueError(f"`last_k` is {last_k}, the rollout has {len(lengths)} steps; use at most that.")
    return Surrogate(
        "sample", tuple(Term(step, lengths[step], 1.0) for step in range(len(lengths) - last_k, len(lengths)))
    )


def _refl(sigmas: Sequence[float], options: Mapping[str, Any], generator: torch.Generator | None) -> Surrogate:
    num_steps, last_n = len(sigmas) - 1, options["last_n"]
    if last_n > num_steps:
        raise ValueError(f"`last_n` is {last_n}, the rollout has {num_steps} steps; use at most that.")
    step = uniform_integer(num_steps - last_n, num_steps, generator)
    endpoint = "sample" if options["endpoint"] == "sample" else ("posterior_mean", step)
    return Surrogate(endpoint, (Term(step, sigmas[-1] - sigmas[step]),))


def _draft_lv(sigmas: Sequence[float], options: Mapping[str, Any], generator: torch.Generator | None) -> Surrogate:
    lengths = step_lengths(sigmas)
    if len(lengths) < 2:
        raise ValueError("The rollout has 1 step, re-noising needs at least 2 steps; raise `num_inference_steps`.")
    return Surrogate("sample", (Term(len(lengths) - 1, lengths[-1]),), num_noised=options["num_noised"])


def _drtune(sigmas: Sequence[float], options: Mapping[str, Any], generator: torch.Generator | None) -> Surrogate:
    lengths, num_active = step_lengths(sigmas), options["num_active"]
    num_steps = len(lengths)
    stop_choices = max(1, round(options["early_stop_ratio"] * num_steps))
    if num_active > num_steps - stop_choices + 1:
        raise ValueError(
            f"`num_active` is {num_active}, but the rollout may stop after {num_steps - stop_choices + 1} of "
            f"its {num_steps} steps; use at most that many, or a smaller `early_stop_ratio`."
        )
    stop = uniform_integer(num_steps - stop_choices, num_steps, generator)
    stride = (stop + 1) // num_active
    offset = uniform_integer(0, stop - (num_active - 1) * stride + 1, generator)
    steps = range(offset, offset + num_active * stride, stride)
    terms = tuple(Term(step, sigmas[-1] - sigmas[stop] if step == stop else lengths[step]) for step in steps)
    return Surrogate("sample" if options["endpoint"] == "sample" else ("posterior_mean", stop), terms)


def _leap_align(sigmas: Sequence[float], options: Mapping[str, Any], generator: torch.Generator | None) -> Surrogate:
    num_steps = len(sigmas) - 1
    k, j = _two_steps(num_steps, options, generator)
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


def _flowbp_sparse(
    sigmas: Sequence[float], options: Mapping[str, Any], generator: torch.Generator | None
) -> Surrogate:
    num_steps, num_active = len(sigmas) - 1, options["num_active"]
    start = tail_window(num_steps, options["tail_ratio"])
    if num_active > num_steps - start:
        raise ValueError(_too_many(num_active, num_steps, start))
    steps = late_biased_steps(start, num_steps, num_active, options["late_bias"], generator, origin=0)
    return _euler_terms(sigmas, steps, start, options)


def _flowbp_bridge(
    sigmas: Sequence[float], options: Mapping[str, Any], generator: torch.Generator | None
) -> Surrogate:
    num_steps, num_active = len(sigmas) - 1, options["num_active"]
    start = tail_window(num_steps, options["tail_ratio"], smallest=3)
    if num_active > num_steps - start:
        raise ValueError(_too_many(num_active, num_steps, start))
    _, j = _two_steps(num_steps, options, generator)
    first_part, second_part = j - start, num_steps - j
    in_first = round(num_active * first_part / (first_part + second_part))
    in_first = min(max(in_first, 1, num_active - second_part), num_active - 1, first_part)
    late_bias, in_second = options["late_bias"], num_active - in_first - 1
    steps = late_biased_steps(start, j, in_first, late_bias, generator, origin=start) + (j,)
    steps += late_biased_steps(j + 1, num_steps, in_second, late_bias, generator, origin=j + 1)
    return _euler_terms(sigmas, steps, start, options, coupled=j)


def _euler_terms(
    sigmas: Sequence[float], steps: tuple[int, ...], start: int, options: Mapping[str, Any], coupled: int | None = None
) -> Surrogate:
    lengths = step_lengths(sigmas)
    endpoint: str | tuple[str, int] = "sample"
    if options["endpoint"] == "posterior-mean":
        # The posterior mean at the last active step is one leap from there to sigma 0.
        endpoint = ("posterior_mean", steps[-1])
        lengths[steps[-1]] = sigmas[-1] - sigmas[steps[-1]]
    whole = sigmas[start] - sigmas[-1]
    rho = _rescale(options["grad_rescale"], whole, sum(abs(lengths[step]) for step in steps))
    terms = (Term(step, rho * lengths[step], options["alpha"] if step == coupled else 0.0) for step in steps)
    return Surrogate(endpoint, tuple(terms))


def _flowbp_lagrange(
    sigmas: Sequence[float], options: Mapping[str, Any], generator: torch.Generator | None
) -> Surrogate:
    num_steps = len(sigmas) - 1
    k, j = _two_steps(num_steps, options, generator)
    legs, terms = [], {}
    for start, end in ((k, j), (j, num_steps)):
        supports = leg_supports(options["weights"], start, end, options["order"])
        weights = leg_weights(options["weights"], sigmas, start, end, supports)
        active = _active_supports(options["active_supports"], start, supports)
        # Only the first leg is blended with a single leap from its left end.
        share = options["anchor_lambda"] if start == k else 1.0
        blend = (1.0 - share) * (sigmas[end] - sigmas[start]) if share < 1 else 0.0
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


def _two_steps(num_steps: int, options: Mapping[str, Any], generator: torch.Generator | None) -> tuple[int, int]:
    start = tail_window(num_steps, options.get("tail_ratio", 1.0), smallest=3)
    return draw_two_steps(
        options["step_sampling"], num_steps, start, generator, options["dirichlet"], options["max_tail"]
    )


def _too_many(num_active: int, num_steps: int, start: int) -> str:
    return (
        f"`num_active` is {num_active}, the trainable window has {num_steps - start} of the rollout's "
        f"{num_steps} steps; use at most {num_steps - start}, or a larger `tail_ratio` or `num_inference_steps`."
    )


def _check_two_steps(options: Mapping[str, Any]) -> None:
    rule, max_tail = options["step_sampling"], options["max_tail"]
    if max_tail is not None and rule not in ("uniform", "dirichlet"):
        raise ValueError(
            f"`max_tail` needs step_sampling uniform or dirichlet, got {max_tail} with {rule}; set it to none."
        )
    if max_tail == 1 and rule == "dirichlet":
        raise ValueError("`max_tail` must be at least 2 with step_sampling dirichlet (its shortest tail), got 1.")


def _check_bridge(options: Mapping[str, Any]) -> None:
    _check_two_steps(options)
    if options["num_active"] < 2:
        raise ValueError(f"`num_active` must be at least 2 (both parts), got {options['num_active']}.")


def _check_lagrange(options: Mapping[str, Any]) -> None:
    _check_two_steps(options)
    active, kind = options["active_supports"], options["weights"]
    if kind == "adams-bashforth" and active != "start":
        raise ValueError(
            f"weights adams-bashforth need active_supports=start, got {active}: they extrapolate from earlier steps."
        )
    if active == "none" and options["anchor_lambda"] == 1:
        raise ValueError(
            "active_supports=none leaves no terms unless anchor_lambda is below 1; choose start, midpoint or all."
        )


_UNIFORM_STEPS = {"step_sampling": "uniform", "dirichlet": (2.5, 6.0, 2.0), "max_tail": None}
_GAPS = {"max_gap_j": None, "max_gap_0": None}

# The defaults are those of the reference implementation (github.com/RuoyuWang-2077/FlowBP): configs/final/*/*.yaml,
# and its parsers' defaults for what these leave out. `full`, `draft-k` and options that it does not have are ours.
METHODS: dict[str, Row] = {
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
        {
            "num_active": {"sd3": 4, "flux": 3, "flux2": 4},
            "late_bias": {"sd3": 1.0, "flux": 2.0, "flux2": 2.0},
            "grad_rescale": {"sd3": 0.5, "flux": 1.0, "flux2": 0.0},
            "tail_ratio": 1.0,
            "endpoint": "sample",
        },
    ),
    "flowbp-bridge": Row(
        _flowbp_bridge,
        "FlowBP-Bridge",
        "Wang et al., 2026 (arXiv 2606.11075)",
        {
            "num_active": {"sd3": 5, "flux": 5, "flux2": 3},
            "alpha": {"sd3": 0.5, "flux": 0.1, "flux2": 1.0},
            "late_bias": {"sd3": 4.0, "flux": 2.0, "flux2": 4.0},
            "grad_rescale": {"sd3": 0.0, "flux": 1.0, "flux2": 0.5},
            "tail_ratio": 1.0,
            "endpoint": "sample",
            **_UNIFORM_STEPS,
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
            "tau": {"sd3": 0.2, "flux": 0.2, "flux2": 0.1},
            "grad_rescale": {"sd3": 0.0, "flux": 0.5, "flux2": 0.0},
            "tail_ratio": {"sd3": 1.0, "flux": 1.0, "flux2": 0.7},
            "step_sampling": "dirichlet",
            "dirichlet": (2.5, 6.0, 2.0),
            "max_tail": {"sd3": 10, "flux": None, "flux2": None},
            **_GAPS,
        },
        check=_check_lagrange,
        undo_guidance=("flux2",),
    ),
}
