# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`flowbp.verify`: right engines are within the bound, broken ones are found and named, and nothing is left behind."""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from families import FAMILIES
from families.family import Case
from torch.utils._pytree import tree_map

import flowbp.callback
import flowbp.verification
from flowbp import FlowBPCallback, Surrogate, Term, get_method, verify
from flowbp.checks import RecordingError
from flowbp.verification import BOUNDS, VerificationError

SD3 = "Stable Diffusion 3 / 3.5"
MODELS = (SD3, "FLUX.1", "FLUX.2-Klein base", "Z-Image", "Wan 2.1")
METHODS = ("full", "draft-k", "refl", "draft-lv", "drtune", "leapalign", "flowbp-sparse", "flowbp-bridge")
METHODS += ("flowbp-lagrange",)


@functools.lru_cache(maxsize=1)
def built(name: str) -> tuple[DiffusionPipeline, list[Case]]:
    """A tiny pipeline of the matrix in float64, and its calls."""
    family = next(family for family in FAMILIES if family.name == name)
    pipe = family.build()
    return pipe, family.cases(pipe)


@pytest.fixture
def sd3() -> tuple[DiffusionPipeline, dict[str, Any]]:
    """Stable Diffusion 3 and the arguments of its call with guidance."""
    pipe, cases = built(SD3)
    return pipe, dict(cases[1].arguments)


# Right engines.


@pytest.mark.parametrize("model", MODELS)
def test_all_methods_are_within_the_bound(model: str) -> None:
    pipe, cases = built(model)
    for case in cases[:2]:
        found = verify(pipe, method=METHODS, **case.arguments)
        assert found.is_within_bound, str(found)
        assert found.dtype == torch.float64 and found.bound == BOUNDS[torch.float64]
        assert [each.method for each in found.differences] == list(METHODS)
        coupling = {each.method: each.coupling for each in found.differences}
        # Else the comparison would be blind to couplings.
        assert coupling["full"] > 0.05 and coupling["flowbp-lagrange"] > 1e-3, str(found)
        assert coupling["refl"] == coupling["flowbp-sparse"] == 0


@pytest.mark.parametrize("model", MODELS)
def test_one_branch_is_left_out(model: str) -> None:
    pipe, cases = built(model)
    case = next(case for case in cases if case.unconditional is not None)
    found = verify(pipe, method=["full", "leapalign"], unconditional_gradient=False, **case.arguments)
    assert found.is_within_bound, str(found)
    part = case.unconditional
    place = {"all": "", "first half": "part 1/2 of ", "second half": "part 2/2 of "}[part.rows]
    assert {each.left_out for each in found.differences} == {f"{place}transformer call {part.call + 1}"}
    assert "without " + found.differences[0].left_out in str(found)


def test_given_tokens() -> None:
    """Steps of LTX have the other sign, and none for a frame that is given, also in DRaFT-LV's copies."""
    pipe, cases = built("LTX-Video with conditions")
    found = verify(pipe, method=("full", "draft-lv", "flowbp-bridge"), **cases[3].arguments)
    assert found.is_within_bound, str(found)


def test_inpainting() -> None:
    """A source is written into the latents of DRaFT-LV's copies too, and without noise into a posterior mean."""
    pipe, cases = built("FLUX.1, inpainting")
    found = verify(pipe, method=("draft-lv", "refl", "leapalign"), strength=1.0, **cases[0].arguments)
    assert found.is_within_bound, str(found)


def test_guidance_that_stops_has_smaller_calls_at_late_steps() -> None:
    pipe, cases = built("Z-Image")
    found = verify(pipe, unconditional_gradient=False, **cases[3].arguments)
    assert found.is_within_bound, str(found)


def test_without_guidance_no_branch_is_left_out(sd3: tuple[DiffusionPipeline, dict[str, Any]]) -> None:
    pipe, call = sd3
    found = verify(pipe, unconditional_gradient=False, **{**call, "guidance_scale": 1.0})
    assert found.is_within_bound and found.differences[0].left_out is None, str(found)


def test_the_steps_of_a_surrogate_give_the_chain_rule_too(sd3: tuple[DiffusionPipeline, dict[str, Any]]) -> None:
    """The reference for surrogates, asked for the row `full`, is autograd through the call as it is."""
    pipe, call = sd3
    with torch.no_grad():
        pipe(**call, num_inference_steps=3, output_type="latent")
    lengths = pipe.scheduler.sigmas.double().diff().tolist()
    exact = Surrogate("sample", tuple(Term(step, length, 1.0) for step, length in enumerate(lengths)))
    # Not those of the chain rule, so that they cannot be mistaken for it.
    own = Surrogate("sample", (Term(0, -0.3), Term(1, 0.2, 0.5), Term(2, -0.7, 2.0)))
    found = verify(pipe, method=["full", exact, own], **call)
    assert found.is_within_bound, str(found)
    row, same, other = found.differences
    assert (row.method, same.method, other.method) == ("full", "surrogate", "surrogate")
    assert same.coupling == pytest.approx(row.coupling, rel=1e-6) and other.coupling > 0.1


@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_two_steps_and_latents_of_the_users(sd3: tuple[DiffusionPipeline, dict[str, Any]], output_type: str) -> None:
    pipe, call = sd3
    latents = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    found = verify(pipe, num_inference_steps=2, output_type=output_type, latents=latents, **call)
    assert found.is_within_bound and found.num_inference_steps == 2, str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bound_follows_the_dtype(dtype: torch.dtype) -> None:
    family = next(family for family in FAMILIES if family.name == SD3)
    pipe = family.build().to(dtype)
    call = tree_map(
        lambda value: value.to(dtype) if isinstance(value, torch.Tensor) else value,
        dict(family.cases(pipe)[1].arguments),
    )
    found = verify(pipe, method=["full", "flowbp-lagrange"], **call)
    assert found.is_within_bound and (found.dtype, found.bound) == (dtype, BOUNDS[dtype]), str(found)


def test_a_bound_of_the_users(sd3: tuple[DiffusionPipeline, dict[str, Any]]) -> None:
    pipe, call = sd3
    found = verify(pipe, bound=1e-12, **call)
    # The scheduler computes in float32.
    assert found.bound == 1e-12 < found.difference and not found.is_within_bound


class Wrapped(StableDiffusion3Pipeline):
    """A user's own pipeline, whose stock call has its own `no_grad`."""

    def __call__(self, *args: Any, strength: float = 1.0, **kwargs: Any) -> Any:
        returned = super().__call__(*args, **kwargs)
        return (strength * returned[0], *returned[1:])


def test_no_grad_comes_off_all_base_classes(sd3: tuple[DiffusionPipeline, dict[str, Any]]) -> None:
    pipe = Wrapped(**sd3[0].components)
    before = StableDiffusion3Pipeline.__call__
    found = verify(pipe, strength=0.5, **sd3[1])
    assert found.is_within_bound and found.pipeline == "Wrapped", str(found)
    assert StableDiffusion3Pipeline.__call__ is before and before.__wrapped__ is not None


# Broken engines.

Break = Callable[[Sequence[Term]], Sequence[Term]]


def without_coupling(terms: Sequence[Term]) -> Sequence[Term]:
    last = max(index for index, term in enumerate(terms) if index and term.coupling)
    return [replace(term, coupling=0.0) if index == last else term for index, term in enumerate(terms)]


def heavier(terms: Sequence[Term]) -> Sequence[Term]:
    return [replace(term, weight=1.01 * term.weight) if index == 0 else term for index, term in enumerate(terms)]


def skipped(terms: Sequence[Term]) -> Sequence[Term]:
    return terms[1:]


def broken_sweep(monkeypatch: pytest.MonkeyPatch, breaks: Break) -> None:
    """The engine sweeps other terms than those that it drew."""
    sweep = flowbp.callback.sweep

    def broken(trajectories: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        changed = [
            replace(each, surrogate=replace(each.surrogate, terms=tuple(breaks(each.surrogate.terms))))
            for each in trajectories
        ]
        return sweep(changed, *args, **kwargs)

    monkeypatch.setattr(flowbp.callback, "sweep", broken)


@pytest.mark.parametrize(
    ("breaks", "methods"),
    [
        (without_coupling, ["full", "flowbp-lagrange"]),
        (heavier, ["full", "refl", "leapalign", "flowbp-sparse"]),
        (skipped, ["full", "drtune", "flowbp-sparse", "flowbp-lagrange"]),
    ],
)
def test_a_broken_sweep_is_found_and_named(
    sd3: tuple[DiffusionPipeline, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, breaks: Break, methods: list[str]
) -> None:
    broken_sweep(monkeypatch, breaks)
    pipe, call = sd3
    found = verify(pipe, method=methods, **call)
    assert not found.is_within_bound and list(found.failed) == list(found.differences), str(found)
    assert f"OUT OF THE BOUND ({', '.join(methods)})" in str(found)


def test_a_missing_part_of_the_graph_is_named(
    sd3: tuple[DiffusionPipeline, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bias without a gradient hardly shows in the whole, and its name does."""
    pipe, call = sd3
    name = "transformer.transformer_blocks.0.attn.to_out.0.bias"
    lost = pipe.transformer.get_parameter(name.removeprefix("transformer."))
    sweep = FlowBPCallback.sweep

    def broken(callback: FlowBPCallback, *args: Any, **kwargs: Any) -> Any:
        result = sweep(callback, *args, **kwargs)
        lost.grad = None
        return result

    monkeypatch.setattr(FlowBPCallback, "sweep", broken)
    found = verify(pipe, bound=0.2, **call)
    (difference,) = found.failed
    assert difference.parameter == name and difference.largest > 0.8 and difference.whole < 0.2, str(found)
    assert name in str(found)


def test_other_images_are_out_of_the_bound(sd3: tuple[DiffusionPipeline, dict[str, Any]]) -> None:
    """A pipeline that counts its calls makes other images each time; its gradient may be the same."""
    pipe = Wrapped(**sd3[0].components)
    calls = iter(range(100))
    wrapped = Wrapped.__call__

    class Counting(Wrapped):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            returned = wrapped(self, *args, **kwargs)
            return (returned[0] + 0.01 * next(calls), *returned[1:])

    pipe.__class__ = Counting
    found = verify(pipe, **sd3[1])
    assert found.differences[0].whole < found.bound < found.differences[0].output
    assert not found.is_within_bound and "output" in str(found)


def test_not_finite_is_out_of_the_bound(
    sd3: tuple[DiffusionPipeline, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = FlowBPCallback.sweep

    def broken(callback: FlowBPCallback, adjoint: Any, **kwargs: Any) -> Any:
        return sweep(callback, [each * float("nan") for each in adjoint], **kwargs)

    monkeypatch.setattr(FlowBPCallback, "sweep", broken)
    assert not verify(sd3[0], **sd3[1]).is_within_bound


# Nothing is left behind.


def states(pipe: DiffusionPipeline, generators: Sequence[torch.Generator]) -> list[Any]:
    """All that a call could leave behind."""
    return [
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        [generator.get_state().tolist() for generator in generators],
        dict(vars(pipe)),
        dict(vars(pipe.scheduler)),
        [(vars(module).keys(), module.training) for module in pipe.transformer.modules()],
        [parameter.requires_grad for parameter in [*pipe.transformer.parameters(), *pipe.vae.parameters()]],
        [type(pipe).__call__, type(pipe.scheduler).step, type(pipe.transformer).__call__],
    ]


@pytest.mark.parametrize("outcome", ["returns", "refused", "interrupted"])
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_everything_is_left_as_it_was(
    sd3: tuple[DiffusionPipeline, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, outcome: str, grad_enabled: bool
) -> None:
    pipe, call = sd3
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    parameters = list(pipe.transformer.parameters())
    gradients = [torch.full_like(parameter, 0.5) if index % 2 else None for index, parameter in enumerate(parameters)]
    if outcome == "interrupted":

        def interrupted(comparison: Any) -> None:
            comparison._call()
            torch.rand(3), random.random(), np.random.rand()
            raise KeyboardInterrupt

        monkeypatch.setattr(flowbp.verification._Comparison, "_differentiate", interrupted)
    if outcome == "refused":
        call["callback_on_step_end"] = lambda pipe, step, time, values: {"latents": 2 * values["latents"]}
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    try:
        with torch.set_grad_enabled(grad_enabled):
            before = states(pipe, generators)
            if outcome == "returns":
                assert verify(pipe, method=["full", "refl"], generator=generators, **call).is_within_bound
            else:
                with pytest.raises(KeyboardInterrupt if outcome == "interrupted" else RecordingError):
                    verify(pipe, generator=generators, **call)
            after = states(pipe, generators)
        assert before == after
        assert all(parameter.grad is gradient for parameter, gradient in zip(parameters, gradients, strict=True))
        assert all(gradient is None or bool((gradient == 0.5).all()) for gradient in gradients)
    finally:
        for parameter in parameters:
            parameter.grad = None


def test_arguments_are_copied(sd3: tuple[DiffusionPipeline, dict[str, Any]]) -> None:
    pipe, call = sd3
    call["joint_attention_kwargs"] = {"kept": torch.ones(3)}
    seen = []

    def watch(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # As code of a pipeline could.
        seen.append(kwargs["joint_attention_kwargs"].pop("kept").add_(1).tolist())
        kwargs["joint_attention_kwargs"]["kept"] = torch.ones(3)

    handle = pipe.transformer.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        assert verify(pipe, **call).is_within_bound
    finally:
        handle.remove()
    assert seen and all(values == [2.0] * 3 for values in seen)
    assert call["joint_attention_kwargs"]["kept"].tolist() == [1.0] * 3


def test_the_readmes_callback_may_be_among_the_arguments(sd3: tuple[DiffusionPipeline, dict[str, Any]]) -> None:
    pipe, call = sd3
    assert verify(pipe, callback_on_step_end=FlowBPCallback(get_method("full")), **call).is_within_bound


# Errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 1}, "`num_inference_steps` must be at least 2, got 1"),
        ({"bound": 0.0}, "`bound` must be above 0"),
        ({"method": []}, "at least one method"),
        ({"method": [3]}, "a name, a Method or a Surrogate, got int"),
        ({"method": "sparse"}, "flowbp-sparse"),
        ({"method": "leapalign", "num_inference_steps": 2}, "needs at least 3"),
        ({"method": Surrogate("sample", (Term(7, 1.0),))}, "needs steps up to 7"),
        ({"output_type": "pil"}, "`output_type` must be"),
        ({"sigmas": [1.0, 0.5]}, "`sigmas` must have 3 entries, one for each step, got 2"),
    ],
)
def test_what_does_not_fit_is_refused(
    sd3: tuple[DiffusionPipeline, dict[str, Any]], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        verify(sd3[0], **sd3[1], **arguments)
    assert "\n" not in str(caught.value)


def test_pipelines_that_cannot_be_compared_are_refused(sd3: tuple[DiffusionPipeline, dict[str, Any]]) -> None:
    pipe, call = sd3
    with pytest.raises(ValueError, match="a diffusers pipeline, got Linear"):
        verify(torch.nn.Linear(2, 2))
    handle = next(pipe.transformer.parameters()).register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(ValueError, match="before such hooks"):
        verify(pipe, **call)
    handle.remove()
    pipe.transformer.requires_grad_(False)
    try:
        with pytest.raises(ValueError, match="expected trainable parameters"):
            verify(pipe, **call)
    finally:
        pipe.transformer.requires_grad_(True)


def test_a_gradient_of_zero_says_nothing(sd3: tuple[DiffusionPipeline, dict[str, Any]]) -> None:
    pipe = Wrapped(**sd3[0].components)
    with pytest.raises(VerificationError, match="has norm 0.0, expected a finite one above 0"):
        verify(pipe, strength=0.0, **sd3[1])
