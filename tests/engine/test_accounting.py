# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""No gradient is silently wrong: every violation of the accounting is refused by name, or its gradient is right.

`violations` has the violations and the oracle. Below are errors that must name the cause and the remedy, and record
blocks that overlap.
"""

import re
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import StableDiffusion3AutoBlocks
from tiny_sd3 import MAX_SEQUENCE_LENGTH, Float64Scheduler
from violations import (
    ANCHORED,
    METHODS,
    PROMPTS,
    STOCK,
    UNSEEN,
    VIOLATIONS,
    Anchored,
    KeepsLatents,
    PlainLoop,
    Surroundings,
    Violation,
    adapter,
    along_a_direction,
    calls_transformer,
    changed,
    disables,
    expected,
    fresh,
    fuses_lora,
    gradients,
    inactive,
    looking,
    loop,
    loop_call,
    lora,
    new_callback,
    problem,
    relative_difference,
    run,
    run_anchored,
    sd3,
    sd3_call,
    stepping,
    transformer_parameters,
    with_references,
)

from flowbp import FlowBPCallback, get_method
from flowbp.checks import RecordingError

RUNS = [(violation, method) for violation in VIOLATIONS for method in violation.methods]


@pytest.mark.parametrize(
    ("violation", "method"), RUNS, ids=[f"{each.rule}-{each.name}-{method}" for each, method in RUNS]
)
def test_it_is_refused_or_right(violation: Violation, method: str):
    outcome = run(violation, method)
    found = problem(violation, method, outcome)
    assert found is None, found


@pytest.mark.parametrize("anchored", ANCHORED, ids=lambda anchored: anchored.name)
def test_the_velocity_anchor_is_refused_or_right(anchored: Anchored):
    violation = Violation(anchored.name, 7, anchored.build, anchored.must, anchored.cause)
    found = problem(violation, "full", run_anchored(anchored))
    assert found is None, found


@pytest.mark.parametrize("violation", UNSEEN, ids=lambda violation: violation.name)
def test_verify_finds_what_nothing_else_can(violation: Violation):
    """The engine may refuse these; what it accepts with a wrong gradient is out of the bound of `verify`."""
    from flowbp import verify

    outcome = run(violation, "full")
    assert not outcome.left
    pipe = violation.build()
    try:
        found = verify(pipe, **sd3_call(pipe, num_inference_steps=3))
    except RecordingError:
        assert outcome.refused is not None
    else:
        assert outcome.refused is None and outcome.difference > 0.01
        assert not found.is_within_bound and found.difference > 0.01


def test_verify_finds_no_fault_where_there_is_none():
    from flowbp import verify

    right = [each for each in VIOLATIONS if each.must == "right" and each.name.startswith("user's")]
    assert len(right) > 3
    for violation in right:
        pipe = violation.build()
        assert verify(pipe, **sd3_call(pipe, num_inference_steps=3)).is_within_bound


# The tests' own instruments.


def test_there_are_violations_of_every_rule():
    counts = Counter(each.rule for each in VIOLATIONS if each.must != "right" and not each.is_table)
    counts[7] += sum(each.must != "right" for each in ANCHORED)
    counts[8] += len(UNSEEN)
    assert all(counts[rule] >= 3 for rule in range(1, 9)), counts
    names = [each.name for each in [*VIOLATIONS, *UNSEEN]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("method", METHODS)
def test_the_plain_loop_is_right_and_the_oracle_sees_a_wrong_one(method: str):
    plain = Violation("plain", 0, loop(PlainLoop), "right", call=loop_call)
    assert problem(plain, method, run(plain, method)) is None
    if method == "draft-lv":
        return
    kept = Violation("kept", 0, loop(KeepsLatents), "right", call=loop_call)
    pipe = kept.build()
    callback = new_callback(method)
    with callback.record(pipe):
        images = pipe(**loop_call(pipe))
    surrogate = callback.trajectory.surrogate
    callback.backward(along_a_direction(pipe, images), objective=lambda rewards, weights: -rewards.mean())
    found = gradients(transformer_parameters(pipe))
    wanted = expected(kept, surrogate)
    if method == "full":
        # The surrogate's steps give the chain rule of the undecorated call.
        assert relative_difference(wanted, expected(kept, None)) < 1e-12
    assert relative_difference(found, wanted) < 1e-12
    last = next(reversed(found))
    assert relative_difference({**found, last: 2 * found[last]}, wanted) > 1e-6


def test_what_is_left_behind_is_seen():
    pipe = sd3()()
    before = Surroundings(pipe)
    assert not before.changes()
    hooked = FlowBPCallback(get_method("full"))
    block = hooked.record(pipe)
    block.__enter__()
    assert any("step" in change for change in before.changes())
    block.__exit__(None, None, None)
    assert not before.changes()


# Errors that name the cause and the remedy.


def refusal(pipe: Any, cause: str, remedy: str) -> Any:
    """A context that expects an error: one line that begins with the pipeline and names cause and remedy."""

    @contextmanager
    def expecting() -> Any:
        surroundings = Surroundings(pipe)
        with pytest.raises((RecordingError, ValueError)) as caught:
            yield
        text = str(caught.value)
        assert text.startswith(type(pipe).__name__) and text.endswith(".") and "\n" not in text, text
        for pattern in (cause, remedy):
            assert re.search(pattern, text, re.IGNORECASE), f"expected {pattern!r} in: {text}"
        assert not surroundings.changes()

    return expecting()


def update(pipe: Any, callback: FlowBPCallback | None = None, **changes: Any) -> FlowBPCallback:
    """Record, score and sweep."""
    callback = new_callback("full") if callback is None else callback
    with callback.record(pipe):
        images = pipe(**sd3_call(pipe, **changes)).images
    callback.backward(along_a_direction(pipe, images))
    return callback


@pytest.mark.parametrize("name", ["prompt_embeds", "latents"])
def test_tensors_made_under_inference_mode(name: str):
    pipe = sd3()()
    with torch.inference_mode():
        words, no_words, pooled, no_pooled = pipe.encode_prompt(
            PROMPTS, None, None, max_sequence_length=MAX_SEQUENCE_LENGTH
        )
        latents = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    arguments = {
        "prompt": None,
        "prompt_embeds": words,
        "negative_prompt_embeds": no_words,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": no_pooled,
        "latents": latents,
    }
    arguments |= {key: value.clone() for key, value in arguments.items() if key not in (name, "prompt")}
    with refusal(pipe, "inference.mode", "clone|no_grad|without|outside"):
        update(pipe, **arguments)


def test_weights_made_under_inference_mode():
    with torch.inference_mode():
        pipe = changed(STOCK, adapter(lora()))()
    with refusal(pipe, "inference.mode", "load|clone|no_grad|without|outside"):
        update(pipe)


def test_a_scheduler_without_sigmas():
    pipe = loop(PlainLoop)()
    pipe.scheduler = DDIMScheduler()
    with refusal(pipe, "DDIMScheduler.*sigmas|sigmas.*DDIMScheduler", "FlowMatchEulerDiscreteScheduler|flow-matching"):
        with new_callback("full").record(pipe):
            pipe(**loop_call(pipe))


@pytest.mark.parametrize(
    ("change", "cause", "remedy"),
    [
        (fuses_lora, "fused|merged", "unfuse"),
        (disables, "disabled|switched off", "enable"),
        (inactive, "not active|inactive", "set_adapter|activate"),
    ],
    ids=["fused", "disabled", "inactive"],
)
@pytest.mark.parametrize("is_fresh", [True, False])
def test_an_adapter_that_does_not_act(change: Callable[[Any], None], cause: str, remedy: str, is_fresh: bool):
    pipe = fresh() if is_fresh else sd3(lora_rank=2)()
    change(pipe)
    with refusal(pipe, cause, remedy):
        update(pipe)
    assert all(parameter.grad is None for parameter in pipe.transformer.parameters())


@pytest.mark.parametrize("is_function", [True, False])
def test_backward_twice(is_function: bool):
    pipe = sd3()()
    callback = new_callback("full")
    with callback.record(pipe):
        images = pipe(**sd3_call(pipe)).images

    def backward() -> None:
        if is_function:
            callback.backward(lambda images, prompts: along_a_direction(pipe, images), images, PROMPTS)
        else:
            callback.backward(along_a_direction(pipe, images))

    backward()
    before = gradients(transformer_parameters(pipe))
    with refusal(pipe, "twice|second|already|again", "record"):
        backward()
    assert relative_difference(gradients(transformer_parameters(pipe)), before) == 0


def test_a_reward_under_no_grad():
    pipe = sd3()()
    callback = new_callback("full")
    with callback.record(pipe):
        images = pipe(**sd3_call(pipe)).images
    with torch.no_grad():
        rewards = along_a_direction(pipe, images)
    with refusal(pipe, "reward.*no.*gradient|no_grad", "with gradients|gradients on|enable_grad|outside|without"):
        callback.backward(rewards)


def test_a_reward_that_has_no_gradient():
    pipe = sd3()()
    callback = new_callback("full")
    with callback.record(pipe):
        images = pipe(**sd3_call(pipe)).images

    @torch.no_grad()
    def aesthetic_judge(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.mean((1, 2, 3))

    with refusal(pipe, "aesthetic_judge.*gradient", "--eval_reward"):
        callback.backward(aesthetic_judge, images, PROMPTS)


class EndsEarly(Float64Scheduler):
    """Stops before it comes to an end."""

    def set_timesteps(self, num_inference_steps: int, **kwargs: Any) -> None:
        super().set_timesteps(num_inference_steps, **kwargs)
        self.sigmas = torch.linspace(1, 0.125, num_inference_steps + 1, dtype=torch.float64)


@pytest.mark.parametrize("method", ["full", "flowbp-lagrange"])
def test_sigmas_that_repeat(method: str):
    pipe = sd3()()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    with refusal(pipe, r"sigmas.*(repeat|equal|twice|same).*", r"0\.5|step"):
        update(pipe, new_callback(method), num_inference_steps=5, sigmas=[1.0, 0.75, 0.5, 0.5, 0.25])


@pytest.mark.parametrize("method", ["full", "flowbp-lagrange"])
def test_sigmas_that_do_not_end_at_zero(method: str):
    pipe = sd3()()
    pipe.scheduler = EndsEarly(shift=1.0)
    with refusal(pipe, r"sigmas.*end", r"0\.125"):
        update(pipe, new_callback(method))


def test_modular_pipelines():
    pipe = StableDiffusion3AutoBlocks().init_pipeline()
    components = sd3()().components
    pipe.update_components(**{name: part for name, part in components.items() if name in pipe.components and part})
    with refusal(pipe, "modular", "DiffusionPipeline|pipeline class|StableDiffusion3Pipeline"):
        with new_callback("full").record(pipe):
            pipe(**sd3_call(pipe), output="images")


def found_by(name: str) -> Violation:
    (violation,) = [each for each in VIOLATIONS if each.name == name]
    return violation


@pytest.mark.parametrize(
    ("name", "cause", "remedy"),
    [
        ("autocast around record only", "autocast", "both|same|around|outside|inside"),
        ("diffusers' callback that cuts guidance off", "guidance", "callback|switch|without"),
        ("step callback shows a preview as it is written for inference", "preview|callback", "detach|no_grad"),
    ],
)
def test_what_is_right_or_refused_by_name(name: str, cause: str, remedy: str):
    outcome = run(found_by(name), "full")
    if outcome.refused is not None:
        assert "transformer input" not in outcome.refused
        assert re.search(cause, outcome.refused, re.IGNORECASE) and re.search(remedy, outcome.refused), outcome.refused


# Record blocks that overlap.

OVERLAP = "overlap|another record|recorded already|already"


@pytest.mark.parametrize("other", [sd3(), loop(PlainLoop)], ids=["same class", "another class, same parts"])
def test_nested_record_blocks_are_refused(other: Callable[[], Any]):
    pipe, second = sd3()(), other()
    surroundings = [Surroundings(pipe), Surroundings(second)]
    with pytest.raises(RecordingError) as caught, new_callback("full").record(pipe):
        with new_callback("full").record(second):
            pass
    text = str(caught.value)
    assert text.startswith(type(second).__name__) and re.search(OVERLAP, text, re.IGNORECASE), text
    assert re.search("close|leave|end|one after", text), text
    assert not [change for each in surroundings for change in each.changes()]
    update(pipe)


def test_interleaved_record_blocks_are_refused():
    """The first block goes on, and whichever is closed first, no hook stays on a class."""
    pipe, second = sd3()(), sd3()()
    surroundings = Surroundings(pipe)
    callback = new_callback("full")
    with ExitStack() as first:
        first.enter_context(callback.record(pipe))
        with pytest.raises(RecordingError, match=OVERLAP), ExitStack() as other:
            other.enter_context(new_callback("full").record(second))
            first.close()
        images = pipe(**sd3_call(pipe)).images
    assert not surroundings.changes()
    callback.backward(along_a_direction(pipe, images), objective=lambda rewards, weights: -rewards.mean())
    wanted = expected(Violation("plain", 0, sd3()), None)
    assert relative_difference(gradients(transformer_parameters(pipe)), wanted) < 1e-6


def test_two_pipelines_that_share_a_transformer_are_recorded_one_after_the_other():
    pipe = sd3()()
    with_references(pipe)
    surroundings = Surroundings(pipe)
    wanted = expected(Violation("plain", 0, sd3()), None)
    for each in (pipe, pipe.other):
        callback = new_callback("full")
        with callback.record(each):
            images = each(**sd3_call(each)).images
        callback.backward(along_a_direction(each, images), objective=lambda rewards, weights: -rewards.mean())
        assert relative_difference(gradients(transformer_parameters(pipe)), wanted) < 1e-6
        pipe.transformer.zero_grad()
    calls_transformer(pipe)
    assert not surroundings.changes()


def test_an_error_of_the_users_own_in_a_step_callback_takes_the_hooks_off():
    pipe = sd3()()
    surroundings = Surroundings(pipe)

    def fails(pipe: Any, latents: torch.Tensor) -> None:
        raise KeyError("the user's own")

    with pytest.raises(KeyError), new_callback("full").record(pipe):
        pipe(**stepping(looking(fails))(pipe))
    assert not surroundings.changes()
    update(pipe)
