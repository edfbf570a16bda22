# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`measure_gradients`: each active step's gradient norm is that of a surrogate with this step alone."""

import pytest
import torch
from brute_force import Drawn, Sampling, brute_force, flat, relative_difference
from diffusers import StableDiffusion3Pipeline
from gradient_rows import EXACT, PROMPTS, ROWS, engine
from tiny_sd3 import tiny_sd3_pipeline
from violations import PlainLoop

from flowbp import FlowBPCallback, Surrogate, Term, get_method
from flowbp.checks import RecordingError

TERMS = ((1, -0.3, 0.0), (2, -0.2, 0.0), (4, -0.9, 0.0), (6, -0.1, 0.0))
SURROGATE = Surrogate("sample", tuple(Term(*term) for term in TERMS))


def lora_pipeline() -> StableDiffusion3Pipeline:
    return tiny_sd3_pipeline(seed=9, lora_rank=2, float64_scheduler=True)


def of_terms(pipe: StableDiffusion3Pipeline, sampling: Sampling, *terms: tuple[int, float, float]) -> torch.Tensor:
    """The gradient, as one vector, of a table with these terms, from the brute force."""
    return flat(brute_force(pipe, "table", {}, Drawn(), sampling, terms=terms).gradients)


def measured(
    pipe: StableDiffusion3Pipeline, method: object, sampling: Sampling, measure: bool = True, **options: object
) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
    """Gradients by name and norms by step."""
    backward = options.pop("backward", {})
    gradients, out, _ = engine(
        pipe,
        method,
        sampling,
        unconditional_gradient=sampling.unconditional_gradient,
        memory={"measure_gradients": measure, **options},
        backward=backward,
    )
    return gradients, out.gradient_norms


@pytest.mark.parametrize("unconditional_gradient", [False, True])
@pytest.mark.parametrize("scale", [1.0, 640.0])
def test_norms_are_those_of_single_steps(scale: float, unconditional_gradient: bool):
    """Where nothing is coupled a step's gradient is what its term alone gives; `gradient_scale` is not in it."""
    pipe = lora_pipeline()
    sampling = Sampling(PROMPTS, 7, 3.5, unconditional_gradient=unconditional_gradient)
    _, norms = measured(pipe, SURROGATE, sampling, backward={"gradient_scale": scale})
    assert set(norms) == {step for step, _, _ in TERMS}
    for term in TERMS:
        expected = of_terms(pipe, sampling, term).norm()
        torch.testing.assert_close(norms[term[0]], expected, rtol=EXACT, atol=0)
        assert not norms[term[0]].requires_grad and norms[term[0]].shape == ()


@pytest.mark.parametrize("name", ["refl", "draft-lv"])
def test_one_step_has_the_whole_gradient(name: str):
    """DRaFT-LV's three passes of one step add up before the norm is taken."""
    gradients, norms = measured(lora_pipeline(), get_method(name, **ROWS[name]), Sampling(PROMPTS, 7, 3.5))
    (norm,) = norms.values()
    torch.testing.assert_close(norm, flat(gradients).norm(), rtol=EXACT, atol=0)


def test_calls_of_a_step_add_up():
    """A pipeline that calls the transformer once for each branch of guidance: both calls are one step's."""
    parts = lora_pipeline()
    pipe = PlainLoop(**parts.components)
    callback = FlowBPCallback(
        Surrogate("sample", (Term(2, -0.5),)), unconditional_gradient=True, measure_gradients=True
    )
    with callback.record(pipe):
        images = pipe(list(PROMPTS))
    assert len(callback.trajectory.steps[2].calls) == 2
    out = callback.backward(images.mean((1, 2, 3)))
    gradients = [parameter.grad for parameter in pipe.transformer.parameters() if parameter.grad is not None]
    torch.testing.assert_close(out.gradient_norms[2], torch.nn.utils.get_total_norm(gradients), rtol=EXACT, atol=0)


@pytest.mark.parametrize("name", ["flowbp-lagrange", "draft-lv", "full"])
def test_measuring_does_not_change_the_gradient(name: str):
    """To the bit; without it nothing is reported."""
    pipe = lora_pipeline()
    sampling = Sampling(PROMPTS, 7, 3.5)
    method = get_method(name, **ROWS[name])
    without, nothing = measured(pipe, method, sampling, measure=False)
    gradients, norms = measured(pipe, method, sampling)
    assert nothing == {} and norms
    assert all(torch.equal(gradients[key], without[key]) for key in without)


def test_gradients_that_are_there_already_do_not_count():
    """Norms are of what a pass adds, and it does add."""
    pipe = lora_pipeline()
    sampling = Sampling(PROMPTS, 7, 3.5)
    once, norms = measured(pipe, SURROGATE, sampling)
    gradients, out, _ = engine(pipe, SURROGATE, sampling, memory={"measure_gradients": True}, zero_grad=False)
    assert relative_difference({key: value / 2 for key, value in gradients.items()}, once) < EXACT
    for step, norm in norms.items():
        torch.testing.assert_close(out.gradient_norms[step], norm, rtol=EXACT, atol=0)


def test_no_hook_is_left_behind():
    """After a sweep, and after one that fails midway."""
    pipe = lora_pipeline()
    sampling = Sampling(PROMPTS, 7, 3.5)
    parameters = [parameter for parameter in pipe.transformer.parameters() if parameter.requires_grad]
    measured(pipe, SURROGATE, sampling)
    assert not any(parameter._backward_hooks for parameter in parameters)

    callback = FlowBPCallback(SURROGATE, measure_gradients=True)
    seen, is_sweeping = [], False

    def fail_at_the_second_pass(module: torch.nn.Module, inputs: object) -> None:
        if not is_sweeping:
            return
        seen.append([bool(parameter._backward_hooks) for parameter in parameters])
        if len(seen) == 2:
            raise RecordingError("second pass")

    # The last part, so that the LoRA's parts were called before.
    pipe.transformer.proj_out.register_forward_pre_hook(fail_at_the_second_pass)
    with callback.record(pipe):
        images = pipe(**sampling.call_arguments()).images
    is_sweeping = True
    with pytest.raises(RecordingError, match="second pass"):
        callback.backward(images.mean((1, 2, 3)))
    assert all(seen[0]) and all(seen[1])
    assert not any(parameter._backward_hooks for parameter in parameters)
