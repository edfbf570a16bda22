# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The method table: names, defaults and refusals of every row, and its terms against docs/methods.md's formulas."""

import importlib
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flowbp
from flowbp import METHODS, Leg, Method, Surrogate, Term, get_method
from flowbp.methods import BACKBONES, COUNT, OPTIONS, Option, Row, find_row

N = 12
EVEN = torch.linspace(1, 0, N + 1, dtype=torch.float64)
SIGMAS = 3 * EVEN / (1 + 2 * EVEN)
H = (SIGMAS[1:] - SIGMAS[:-1]).tolist()
SEEDS = range(20)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(name: str, seed: int = 0, sigmas: torch.Tensor = SIGMAS, **options: Any) -> Surrogate:
    return get_method(name, **options).draw(sigmas, generator(seed))


def to_zero(step: int) -> float:
    return -SIGMAS[step].item()


# The table: names, and the reference's defaults for SD3.5, FLUX.1, FLUX.2-Klein.

TWO_STEPS = {"step_sampling", "dirichlet", "max_tail"}
GAPS = {"max_gap_j", "max_gap_0"}
OPTION_NAMES = {
    "full": set(),
    "draft-k": {"last_k"},
    "refl": {"last_n", "endpoint"},
    "draft-lv": {"num_noised"},
    "drtune": {"num_active", "early_stop_ratio", "endpoint"},
    "leapalign": {"alpha", "tau", "endpoint"} | TWO_STEPS | GAPS,
    "flowbp-sparse": {"num_active", "late_bias", "grad_rescale", "tail_ratio", "endpoint"},
    "flowbp-bridge": {"num_active", "late_bias", "grad_rescale", "alpha", "tail_ratio", "endpoint"} | TWO_STEPS,
    "flowbp-lagrange": {
        *("order", "active_supports", "support_scale", "weights", "anchor_lambda", "alpha", "tau", "grad_rescale"),
        "tail_ratio",
    }
    | TWO_STEPS
    | GAPS,
}


@pytest.mark.parametrize(
    "surrogate",
    [
        Surrogate("sample", (Term(2, -0.1), Term(5, -0.1)), num_noised=1),
        Surrogate("sample", (Term(2, -0.1),), num_noised=1),
        Surrogate(("posterior_mean", 5), (Term(5, -0.1),), num_noised=1),
    ],
)
def test_copies_need_a_surrogate_of_the_last_step(surrogate: Surrogate):
    with pytest.raises(ValueError, match="one term, at step 5"):
        surrogate.check(6)
    Surrogate("sample", (Term(5, -0.1),), num_noised=1).check(6)


def test_the_table_has_the_nine_rows():
    assert list(METHODS) == list(OPTION_NAMES)


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_option_names(name: str):
    for backbone in ("sd3", "flux", "flux2"):
        assert set(get_method(name, backbone=backbone).options) == OPTION_NAMES[name]


DEFAULTS = [
    ("refl", {"last_n": (11, 11, 11), "endpoint": ("posterior-mean",) * 3}),
    ("draft-lv", {"num_noised": (2, 2, 2)}),
    ("drtune", {"num_active": (3, 3, 3), "early_stop_ratio": (0.4,) * 3}),
    ("leapalign", {"alpha": (0.3,) * 3, "tau": (0.1,) * 3, "step_sampling": ("uniform",) * 3}),
    ("flowbp-sparse", {"num_active": (4, 3, 4), "late_bias": (1, 2, 2), "grad_rescale": (0.5, 1, 0)}),
    (
        "flowbp-bridge",
        {"num_active": (5, 5, 3), "alpha": (0.5, 0.1, 1), "late_bias": (4, 2, 4), "grad_rescale": (0, 1, 0.5)},
    ),
    (
        "flowbp-lagrange",
        {
            "order": (3, 3, 3),
            "weights": ("lagrange",) * 3,
            "active_supports": ("midpoint",) * 3,
            "support_scale": (0.25,) * 3,
            "anchor_lambda": (1, 1, 1),
            "alpha": (0.1,) * 3,
            "tau": (0.2, 0.2, 0.1),
            "grad_rescale": (0, 0.5, 0),
            "step_sampling": ("dirichlet",) * 3,
            "dirichlet": ((2.5, 6, 2),) * 3,
            "max_tail": (10, None, None),
            "tail_ratio": (1, 1, 0.7),
        },
    ),
]


@pytest.mark.parametrize(("name", "expected"), DEFAULTS, ids=lambda value: value if isinstance(value, str) else "")
def test_defaults_of_each_backbone(name: str, expected: dict[str, tuple]):
    for place, backbone in enumerate(("sd3", "flux", "flux2")):
        options = get_method(name, backbone=backbone).options
        assert {key: options[key] for key in expected} == {key: values[place] for key, values in expected.items()}


def test_gradients_through_both_branches_and_undone_guidance_by_default():
    found = {
        (name, backbone): get_method(name, backbone=backbone)
        for name in METHODS
        for backbone in ("sd3", "flux", "flux2")
    }
    assert {key for key, method in found.items() if method.unconditional_gradient} == {("leapalign", "sd3")}
    assert {key for key, method in found.items() if method.undo_guidance} == {("flowbp-lagrange", "flux2")}


def test_get_method_gives_a_method_that_does_not_change_the_table():
    method = get_method("flowbp-sparse", num_active=2)
    assert isinstance(method, Method) and method.name == "flowbp-sparse"
    assert get_method("flowbp-sparse").options["num_active"] == 4


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("backbone", ["sd3", "flux", "flux2"])
def test_every_row_draws_at_the_paper_s_25_steps(name: str, backbone: str):
    sigmas = torch.linspace(1, 0, 26)
    for seed in SEEDS:
        surrogate = get_method(name, backbone=backbone).draw(sigmas, generator(seed))
        assert surrogate == get_method(name, backbone=backbone).draw(sigmas, generator(seed))
        steps = [term.step for term in surrogate.terms]
        assert steps == sorted(set(steps)) and 0 <= steps[0] and steps[-1] < 25
        assert all(term.weight < 0 for term in surrogate.terms if name != "flowbp-lagrange")


# Each row's endpoint. test_gradients.py has the terms, test_drawing.py the steps.


@pytest.mark.parametrize("name", METHODS)
def test_endpoints(name: str):
    for seed in SEEDS:
        sample = draw(name, seed, **({"endpoint": "sample"} if "endpoint" in OPTION_NAMES[name] else {}))
        assert sample.endpoint == "sample" and sample.last_step(N) == N - 1
        if "endpoint" in OPTION_NAMES[name]:
            mean = draw(name, seed, endpoint="posterior-mean")
            steps = [term.step for term in mean.terms]
            kind, step = mean.endpoint
            # DRTune's stop need not be one of its active steps.
            assert kind == "posterior_mean" and (step == steps[-1] or (name == "drtune" and step > steps[-1]))
            assert steps == [term.step for term in sample.terms]


def test_drtune_reaches_its_stop_in_some_draws_and_not_in_others():
    reached = {
        surrogate.terms[-1].step == surrogate.endpoint[1]
        for surrogate in (draw("drtune", seed, num_active=2) for seed in range(50))
    }
    assert reached == {True, False}


# Refusals.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flowbp-sparce", "Unknown method 'flowbp-sparce' (nearest: 'flowbp-sparse'); choose one of full, draft-k, "),
        ("", "choose one of full, draft-k, refl, draft-lv, drtune, leapalign, flowbp-sparse, flowbp-bridge, "),
    ],
)
def test_unknown_method(name: str, message: str):
    assert_refused(lambda: get_method(name), message)


def test_unknown_backbone():
    assert_refused(
        lambda: get_method("full", backbone="sd2"), "Unknown backbone 'sd2'; choose one of sd3, flux, flux2"
    )


ALL_OPTIONS = set().union(*OPTION_NAMES.values())


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_each_row_refuses_the_options_that_it_does_not_have(name: str):
    own = OPTION_NAMES[name]
    for option in sorted(ALL_OPTIONS - own) + ["no_such_option"]:
        with pytest.raises(ValueError, match=f"^{name} has no option '{option}'") as caught:
            get_method(name, **{option: 1})
        text = str(caught.value)
        assert "\n" not in text
        assert text.endswith("it has none.") if not own else all(choice in text for choice in own)


def test_nearest_option_is_named():
    assert_refused(lambda: get_method("draft-k", last_n=3), "(nearest: 'last_k'); it has last_k")


BAD_VALUES = [
    (("last_k", "last_n", "num_noised", "num_active", "order"), (0, -1, 1.5, True, "3", None, math.inf), "at least 1"),
    (("early_stop_ratio", "tail_ratio"), (0, -0.1, 1.01, math.nan, "half", None), "above 0 and at most 1"),
    (
        ("alpha", "late_bias", "grad_rescale", "support_scale"),
        (-0.1, math.inf, math.nan, "1", None, True),
        "a number of at least 0",
    ),
    (("tau", "max_gap_j", "max_gap_0"), (0, -1.0, math.inf, math.nan, "1"), "a number above 0, or none"),
    (("anchor_lambda",), (-0.1, 1.1, math.nan, None), "a number from 0 to 1"),
    (("active_supports",), ("some", None, 1), "one of none, start, midpoint, all"),
    (("weights",), ("simpson", None), "one of lagrange, uniform, adams-bashforth"),
    (("step_sampling",), ("evenly", None), "one of uniform, dirichlet, midpoint, midpoint-j"),
    (("endpoint",), ("samples", None), "one of sample, posterior-mean"),
    (("dirichlet",), ((1, 2), (1, 2, 0), (1, 2, math.inf), "abc", 3, None), "three numbers above 0"),
    (("max_tail",), (0, -3, 2.5, "2"), "a whole number of at least 1, or none"),
]


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [(option, value, words) for options, values, words in BAD_VALUES for option in options for value in values],
)
def test_bad_values(option: str, value: Any, expected: str):
    for name, own in OPTION_NAMES.items():
        if option in own:
            with pytest.raises(ValueError, match=re.escape(f"{name}: `{option}` must be ")) as caught:
                get_method(name, **{option: value})
            text = str(caught.value)
            assert expected in text and text.endswith(f"got {value!r}.") and "\n" not in text


@pytest.mark.parametrize("grad_rescale", [0.0, 0.5])
def test_a_support_without_weight_is_not_rescaled(grad_rescale: float):
    """Over two equal steps the weights of order 2 and 3 are 0 and twice the step."""
    found = 0
    for seed in SEEDS:
        surrogate = draw("flowbp-lagrange", seed, EVEN, active_supports="start", grad_rescale=grad_rescale)
        weights = {term.step: term.weight for term in surrogate.terms}
        for leg in surrogate.legs:
            if leg.end - leg.start == 2:
                assert leg.weights == pytest.approx((0, -2 / N)) and weights[leg.start] == pytest.approx(0)
                found += 1
    assert found


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flowbp-bridge", {"num_active": 1}, "`num_active` must be at least 2 (both parts), got 1"),
        ("leapalign", {"step_sampling": "midpoint", "max_tail": 3}, "`max_tail` needs step_sampling uniform or"),
        ("flowbp-lagrange", {"step_sampling": "midpoint-j"}, "got 10 with midpoint-j; set it to none"),
        ("flowbp-lagrange", {"max_tail": 1}, "must be at least 2 with step_sampling dirichlet"),
        ("flowbp-lagrange", {"weights": "adams-bashforth"}, "need active_supports=start, got midpoint"),
        ("flowbp-lagrange", {"active_supports": "none"}, "leaves no terms unless anchor_lambda is below 1"),
    ],
)
def test_options_that_do_not_go_together(name: str, options: dict[str, Any], message: str):
    assert_refused(lambda: get_method(name, **options), message)


@pytest.mark.parametrize(
    ("name", "options", "steps", "message"),
    [
        ("draft-k", {"last_k": 6}, 5, "`last_k` is 6, the rollout has 5 steps; use at most that"),
        ("refl", {"last_n": 6}, 5, "`last_n` is 6, the rollout has 5 steps; use at most that"),
        ("draft-lv", {}, 1, "at least 2 steps; raise `num_inference_steps`"),
        ("drtune", {"num_active": 5}, 5, "may stop after 4 of its 5 steps; use at most that many"),
        ("leapalign", {}, 2, "leapalign: The rollout has 2 steps, this method needs at least 3"),
        ("flowbp-lagrange", {}, 2, "flowbp-lagrange: The rollout has 2 steps, this method needs at least 3"),
        ("flowbp-bridge", {"num_active": 2}, 2, "2 steps, this method needs at least 3"),
        ("flowbp-sparse", {"num_active": 6}, 5, "has 5 of the rollout's 5 steps; use at most 5"),
        ("flowbp-sparse", {"num_active": 4, "tail_ratio": 0.3}, 10, "has 3 of the rollout's 10 steps; use at most 3"),
        ("flowbp-bridge", {"num_active": 4, "tail_ratio": 0.1}, 10, "has 3 of the rollout's 10 steps; use at most 3"),
    ],
)
def test_what_the_rollout_cannot_hold(name: str, options: dict[str, Any], steps: int, message: str):
    sigmas = torch.linspace(1, 0, steps + 1)
    assert_refused(lambda: get_method(name, **options).draw(sigmas, generator()), message)


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [
        ("draft-k", {"last_k": 5}, 5),
        ("refl", {"last_n": 5}, 5),
        ("draft-lv", {}, 2),
        ("drtune", {"num_active": 4}, 5),
        ("leapalign", {}, 3),
        ("flowbp-lagrange", {}, 3),
        ("flowbp-bridge", {"num_active": 3, "tail_ratio": 0.1}, 10),
        ("flowbp-sparse", {"num_active": 3, "tail_ratio": 0.3}, 10),
        ("flowbp-sparse", {"num_active": 1}, 1),
        ("full", {}, 1),
    ],
)
def test_what_the_refusals_say_would_fit_does_fit(name: str, options: dict[str, Any], steps: int):
    for seed in SEEDS:
        get_method(name, **options).draw(torch.linspace(1, 0, steps + 1), generator(seed))


FALL, EULER = "`sigmas` must fall from about 1 to exactly 0", "use a flow-matching Euler schedule"


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        (torch.linspace(1, 0.1, 5), f"{FALL}, got 1 ... 0.1, which do not end at 0; {EULER}, which appends the 0."),
        (torch.linspace(0, 1, 5), f"{FALL}, got 0 before and 0.25 after step 0, a rise; {EULER} without inverted sig"),
        (torch.tensor([1.0, 0.5, 0.7, 0.0]), f"{FALL}, got 0.5 before and 0.7 after step 1, a rise; {EULER}"),
        (torch.tensor([1.0, 0.5, 0.5, 0.0]), f"{FALL}, got 0.5 before and after step 1, a repeat; {EULER}"),
        (torch.tensor([1.0, 0.5, 0.0, 0.0]), f"{FALL}, got 0 before and after step 2; leave the last 0 out of custom"),
        (torch.tensor([80.0, 0.5, 0.002]), f"{FALL}, got 80 ... 0.002, which start above 1 as"),
        (torch.tensor([1.0, math.nan, 0.0]), f"{FALL}, got 1 ... 0, which are not all finite; {EULER}"),
        (torch.tensor([math.inf, 1.0, 0.0]), f"{FALL}, got inf ... 0, which are not all finite; {EULER}"),
        (torch.tensor([1, 0]), "floating point tensor of shape (N + 1,) with N >= 1, got (2,) of torch.int64; pass"),
        (torch.tensor([0.0]), "with N >= 1, got (1,)"),
        (torch.ones(2, 2), "got (2, 2)"),
    ],
)
def test_sigmas_that_are_none(sigmas: torch.Tensor, message: str):
    assert_refused(lambda: get_method("full").draw(sigmas, generator()), message)


class Reads(TorchDispatchMode):
    """Counts the numbers that are read off tensors one at a time."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("step_sampling", [None, "uniform", "dirichlet", "midpoint", "midpoint-j"])
@pytest.mark.parametrize("name", METHODS)
def test_a_draw_reads_no_number_off_a_tensor_alone(name: str, step_sampling: str | None):
    options = {"step_sampling": step_sampling, "max_tail": None} if step_sampling else {}
    if step_sampling and "step_sampling" not in OPTION_NAMES[name]:
        return
    method, source = get_method(name, **options), generator()
    with Reads() as reads:
        method.draw(torch.linspace(1, 0, 26), source)
    assert reads.count == 0


# A new row and a new option. test_config.py has their command line.


def draw_nothing(sigmas: Any, options: Any, generator: Any) -> Surrogate:
    return Surrogate("sample", (Term(0, sigmas[1] - sigmas[0]),))


def refuse_two(options: Any) -> None:
    if options.get("last_k") == 2:
        raise ValueError("two is one too many")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"options": {"sharpness": 1.0}},
            "New: option 'sharpness' is not declared; add it to `OPTIONS`, or to `own_options` for a row of your own.",
        ),
        (
            {"options": {"last_k": 1}, "own_options": (Option("last_k", COUNT, "Again."),)},
            "New: option 'last_k' is declared twice; give it another name.",
        ),
        (
            {"options": {"twice": 1}, "own_options": (Option("twice", COUNT, "A."), Option("twice", COUNT, "B."))},
            "New: option 'twice' is declared twice; give it another name.",
        ),
        (
            {"options": {"backbone": 1}, "own_options": (Option("backbone", COUNT, "Which."),)},
            "New: option 'backbone' cannot be a keyword of get_method; rename it.",
        ),
        (
            {"options": {"last-k": 1}, "own_options": (Option("last-k", COUNT, "How many."),)},
            "New: option 'last-k' cannot be a keyword of get_method; rename it.",
        ),
        (
            {"own_options": (Option("sharpness", COUNT, "How sharp."),)},
            "New: option 'sharpness' has no default; add it to `options`.",
        ),
        (
            {"options": {"sharpness": 0}, "own_options": (Option("sharpness", COUNT, "How sharp."),)},
            "New, default for sd3: `sharpness` must be a whole number of at least 1, got 0.",
        ),
        ({"options": {"last_k": 0}}, "New, default for sd3: `last_k` must be a whole number of at least 1, got 0."),
        (
            {"options": {"last_k": {"sd3": 1, "flux": 1, "flux2": 0}}},
            "New, default for flux2: `last_k` must be a whole number of at least 1, got 0.",
        ),
        (
            {"options": {"last_k": {"sd3": 1, "flux": 1, "flux3": 1}}},
            "New: the defaults of `last_k` must be one value or a value for each of sd3, flux, flux2, got values for "
            "sd3, flux, flux3.",
        ),
        ({"options": {"last_k": {"sd3": 1}}}, "got values for sd3."),
        (
            {"options": {"last_k": {"sd3": 1, "flux": 2, "flux2": 1}}, "check": refuse_two},
            "New, default for flux: two is one too many",
        ),
        ({"undo_guidance": ("flux3",)}, "New: unknown backbone 'flux3'; choose from sd3, flux, flux2."),
        ({"unconditional_gradient": ("wan",)}, "New: unknown backbone 'wan'; choose from sd3, flux, flux2."),
    ],
)
def test_a_row_checks_itself(row: dict[str, Any], message: str):
    assert_refused(lambda: Row(draw_nothing, "New", "here", **row), message)


def test_a_new_row(monkeypatch: pytest.MonkeyPatch):
    row = Row(draw_nothing, "New", "here", {"last_k": {"sd3": 1, "flux": 2, "flux2": 3}}, undo_guidance=("flux",))
    monkeypatch.setitem(METHODS, "new", row)
    for backbone, default in zip(BACKBONES, (1, 2, 3), strict=True):
        method = get_method("new", backbone)
        assert method.options == {"last_k": default} and method.undo_guidance == (backbone == "flux")
    assert get_method("new", last_k=7).options == {"last_k": 7}
    assert get_method("new").draw(SIGMAS).terms == (Term(0, H[0]),)


def test_what_a_row_refuses_has_the_method_s_name(monkeypatch: pytest.MonkeyPatch):
    def refuse(sigmas: Any, options: Any, generator: Any) -> Surrogate:
        raise ValueError("not today")

    monkeypatch.setitem(METHODS, "new", Row(refuse, "New", "here", {"last_k": 1}, check=refuse_two))
    assert_refused(lambda: get_method("new").draw(SIGMAS), "new: not today")
    assert_refused(lambda: get_method("new", last_k=2), "new: two is one too many")


# A row in a module of the user's own.

METHODS_PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes an importable module."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, code: str) -> None:
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        importlib.invalidate_caches()

    return write


def test_the_row_of_the_page(user_module: Callable[[str, str], None]):
    (code,) = re.findall(r"```python\n(.*?)```", METHODS_PAGE.read_text(encoding="utf-8"), re.DOTALL)
    user_module("my_methods", code)
    name = "my_methods:one_step"
    row = find_row(name)
    assert row.title == "One step"
    assert find_row(name).declarations == {"among_last": Option("among_last", COUNT, row.own_options[0].help)}
    assert get_method(name, "flux").options == {"among_last": 10}
    method = get_method(name, among_last=3)
    assert method.name == name and method == get_method(name, among_last=3)
    drawn = {method.draw(SIGMAS, generator(seed)).terms for seed in SEEDS}
    assert drawn == {(Term(step, H[step]),) for step in range(N - 3, N)}
    assert_refused(
        lambda: get_method(name, among_last=0), f"{name}: `among_last` must be a whole number of at least 1, got 0."
    )
    assert_refused(lambda: get_method(name, amon_last=3), f"{name} has no option 'amon_last' (nearest: 'among_last')")
    # The table itself has no such option.
    assert "among_last" not in OPTIONS
    assert_refused(lambda: get_method("refl", among_last=3), "refl has no option 'among_last'")


def test_a_row_with_an_option_of_the_table(user_module: Callable[[str, str], None]):
    user_module(
        "mixed_methods",
        "from flowbp.methods import COUNT, METHODS, Option, Row\n"
        "wider = Option('wider', COUNT, 'How much.')\n"
        "row = Row(METHODS['draft-k'].draw, 'Mixed', 'ours', {'wider': 2, 'last_k': 3}, own_options=(wider,))\n",
    )
    options = find_row("mixed_methods:row").declarations
    assert list(options) == ["wider", "last_k"] and options["last_k"] is OPTIONS["last_k"]
    assert get_method("mixed_methods:row", wider=5).options == {"wider": 5, "last_k": 3}
    assert_refused(
        lambda: get_method("mixed_methods:row", last_k=N + 1).draw(SIGMAS), "mixed_methods:row: `last_k` is 13, the"
    )


@pytest.mark.parametrize("name", METHODS)
def test_the_options_of_a_row_of_the_table(name: str):
    assert find_row(name) is METHODS[name]
    assert list(find_row(name).declarations) == list(METHODS[name].options)
    assert all(option is OPTIONS[key] for key, option in find_row(name).declarations.items())


BROKEN_ROW = "from flowbp.methods import Row\nrow = Row(None, 'Mine', 'ours', {'last_k': 0})\n"
NO_ROW = "from flowbp.methods import METHODS\nnot_a_row, mine = print, METHODS['full']\n"


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        (NO_ROW, "my_broken:", "Unknown method 'my_broken:'"),
        (NO_ROW, "my broken:row", "or package.module:row for one of your own."),
        (NO_ROW, "my_absent:row", "expected an importable package.module:row, got ModuleNotFoundError: No"),
        (NO_ROW, "my_broken:min", "expected a Row in my_broken, got no such attribute (nearest: 'mine'); it has"),
        (NO_ROW, "my_broken:not_a_row", "got builtin_function_or_method; it has mine."),
        ("x = 1\n", "my_broken:x", "expected a Row in my_broken, got int; define one with `flowbp.methods.Row`."),
        ("raise KeyError('a\\nb')\n", "my_broken:row", "got KeyError: 'a\\nb'; its folder must be on PYTHONPATH."),
        ("raise OSError('a\\nb')\n", "my_broken:row", "got OSError: a b; its folder must be on PYTHONPATH."),
        (BROKEN_ROW, "my_broken:row", "got ValueError: Mine, default for sd3: `last_k` must be a whole number"),
    ],
)
def test_a_row_that_cannot_be_had(user_module: Callable[[str, str], None], code: str, name: str, message: str):
    user_module("my_broken", code)
    for find in (find_row, get_method):
        assert_refused(lambda find=find: find(name), message)


@pytest.mark.parametrize("option", ["tau", "max_tail", "max_gap_j", "max_gap_0"])
def test_none_in_words_is_none(option: str):
    assert get_method("flowbp-lagrange", **{option: "none"}).options[option] is None


def test_every_declared_option_is_one_of_some_row():
    assert set(OPTIONS) == ALL_OPTIONS and all(name == option.name for name, option in OPTIONS.items())
    assert all(option.help.endswith(".") and "\n" not in option.help for option in OPTIONS.values())


# A user's own surrogate.

LEGS = (Leg(0, 3, (0,), (-0.5,)), Leg(3, 6, (3,), (-0.5,)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Term(-1, 1.0), "step >= 0"),
        (lambda: Term(0, math.nan), "a finite weight"),
        (lambda: Term(0, 1.0, -0.5), "a finite coupling >= 0"),
        (lambda: Term(0, 1.0, math.inf), "a finite coupling >= 0"),
        (lambda: Leg(2, 2, (), ()), "0 <= start < end"),
        (lambda: Leg(0, 2, (0, 1), (0.5,)), "one weight for each support"),
        (lambda: Leg(0, 2, (-1,), (0.5,)), "supports >= 0 and finite weights"),
        (lambda: Leg(0, 2, (0,), (math.nan,)), "supports >= 0 and finite weights"),
        (lambda: Leg(0, 2, (0,), (0.5,), math.inf), "supports >= 0 and finite weights"),
        (lambda: Surrogate("sample", (Term(0, -1.0),), num_noised=-1), "`num_noised` must be at least 0, got -1"),
        (lambda: Surrogate("sample", (Term(0, -1.0),), LEGS, tau=0.0), "`tau` must be above 0 or None, got 0.0"),
        (lambda: Surrogate("sample", (Term(0, -1.0),), LEGS, max_gap_j=math.nan), "`max_gap_j` must be above 0"),
        (lambda: Surrogate("sample", (Term(0, -1.0),), LEGS[:1] * 2), "legs must end at different steps, got [3, 3]"),
        (lambda: Surrogate("sample", ()), "at least one term"),
        (lambda: Surrogate("sample", (Term(2, -1.0), Term(1, -1.0))), "rising steps, got [2, 1]"),
        (lambda: Surrogate("sample", (Term(1, -1.0), Term(1, -1.0))), "rising steps, got [1, 1]"),
        (lambda: Surrogate("image", (Term(0, -1.0),)), "`endpoint` must be"),
        (lambda: Surrogate(("posterior_mean",), (Term(0, -1.0),)), "`endpoint` must be"),
        (lambda: Surrogate(("posterior_mean", 1.5), (Term(0, -1.0),)), "`endpoint` must be"),
        (lambda: Surrogate(("tweedie", 1), (Term(0, -1.0),)), "`endpoint` must be"),
        (lambda: Surrogate(("posterior_mean", 1), (Term(2, -1.0),)), "step 2 lies after the endpoint"),
        (lambda: Surrogate("sample", (Term(0, -1.0),), tau=0.1), "need two legs, this surrogate has 0"),
        (lambda: Surrogate("sample", (Term(0, -1.0),), max_gap_0=0.1), "need two legs"),
    ],
)
def test_a_user_s_surrogate_is_checked(make: Callable[[], object], message: str):
    assert_refused(make, message)


def test_a_surrogate_must_fit_the_rollout():
    surrogate = Surrogate("sample", (Term(3, -1.0),), (Leg(0, 6, (0,), (-1.0,)),))
    surrogate.check(6)
    assert surrogate.last_step(6) == 5
    assert_refused(lambda: surrogate.check(5), "needs steps up to 5, the rollout has steps 0 to 4")
    late = Surrogate(("posterior_mean", 4), (Term(3, -1.0),))
    assert late.last_step(25) == 4
    assert_refused(lambda: late.check(4), "needs steps up to 4, the rollout has steps 0 to 3")
    legs = Surrogate("sample", (Term(3, -1.0),), (Leg(0, 2, (0, 9), (-1.0, 0.0)),))
    assert_refused(lambda: legs.check(6), "needs steps up to 9")


# The package.

PURE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in "diffusers transformers peft accelerate huggingface_hub datasets".split():
            raise ModuleNotFoundError(f"{name} is absent", name=name)

sys.meta_path.insert(0, Absent())
import torch
import flowbp
from flowbp import METHODS, Objective, get_method
import flowbp.drawing, flowbp.methods, flowbp.objectives, flowbp.surrogate, flowbp.weights

try:
    import diffusers
except ModuleNotFoundError:
    pass
else:
    sys.exit("the blocker does not block")
for name in METHODS:
    get_method(name).draw(torch.linspace(1, 0, 26), torch.Generator().manual_seed(0))
print("drawn", len(METHODS))
"""


def test_the_numbers_work_without_diffusers_and_transformers():
    done = subprocess.run([sys.executable, "-c", PURE], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == f"drawn {len(METHODS)}\n", done.stderr


def test_the_numbers_import_no_model_code():
    for name in ("weights", "drawing", "surrogate", "methods", "objectives"):
        with open(f"{flowbp.__path__[0]}/{name}.py", encoding="utf-8") as file:
            imports = [line for line in file if re.match(r"\s*(from|import)\s", line)]
        assert imports
        assert not [line for line in imports if re.search(r"torch\.nn|diffusers|transformers|peft|accelerate", line)]


def test_dir_lists_the_public_names():
    public = "FlowBPCallback Leg METHODS Method Objective RecordingError Surrogate Term get_method load_reward".split()
    public += ["verify"]
    assert set(public) == set(flowbp.__all__) and set(public) <= set(dir(flowbp))
    for name in public:
        assert getattr(flowbp, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'get_methods'"):
        _ = flowbp.get_methods


def assert_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)
