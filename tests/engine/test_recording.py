# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Recording: the rollout is the user's inference, hooks come off, little is kept.

`test_checks` has what is refused; here are refusals that depend on how the callback is called.
"""

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.training_utils import cast_training_params
from memory_meters import LiveBytes, SavedBytes
from tiny_sd3 import MAX_SEQUENCE_LENGTH, tiny_sd3_pipeline
from torch.utils._pytree import tree_unflatten
from toy_reward import make_reward
from violations import Surroundings

from flowbp import FlowBPCallback, Leg, Surrogate, Term, get_method
from flowbp.checks import RecordingError
from flowbp.trajectory import Trajectory

PROMPTS = ["a 42", "the 7"]
STEPS = 6
CALL = {
    "height": 8,
    "width": 8,
    "num_inference_steps": STEPS,
    "guidance_scale": 3.5,
    "max_sequence_length": MAX_SEQUENCE_LENGTH,
    "output_type": "pt",
}
REWARD = make_reward()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sparse(num_active: int = 2) -> FlowBPCallback:
    return FlowBPCallback(get_method("flowbp-sparse", num_active=num_active), generator=generator())


def sample(pipe: StableDiffusion3Pipeline, prompts: list[str] = PROMPTS, **changes: Any) -> torch.Tensor:
    return pipe(prompts, **{**CALL, "generator": generator(1), **changes}).images


def record(pipe: StableDiffusion3Pipeline, callback: FlowBPCallback, **changes: Any) -> torch.Tensor:
    with callback.record(pipe):
        return sample(pipe, **{"callback_on_step_end": callback, **changes})


def recorded(
    pipe: StableDiffusion3Pipeline, callback: FlowBPCallback | None = None, **changes: Any
) -> tuple[FlowBPCallback, torch.Tensor]:
    """A callback that has recorded a call, and its images."""
    callback = sparse() if callback is None else callback
    return callback, record(pipe, callback, **changes)


@pytest.fixture
def pipe() -> StableDiffusion3Pipeline:
    """A pipeline whose transformer notes the batch sizes of its real computations; see `computations`."""
    pipe = tiny_sd3_pipeline(torch.float32)
    pipe.transformer.batches = []

    # There from the beginning: hooks that come between record and backward are refused.
    def note(module: Any, args: Any, kwargs: Any) -> None:
        pipe.transformer.batches.append(len(kwargs["hidden_states"]))

    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    return pipe


@contextmanager
def computations(pipe: StableDiffusion3Pipeline) -> Iterator[list[int]]:
    """The batch sizes of the transformer's real computations, in the order they ran."""
    batches = pipe.transformer.batches = []
    yield batches
    pipe.transformer.batches = []


# Hooks.


@contextmanager
def nothing_left_behind(pipe: StableDiffusion3Pipeline) -> Iterator[None]:
    surroundings = Surroundings(pipe)
    yield
    assert not surroundings.changes()


def raising(error: BaseException, at: int = 2) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            raise error
        return inputs

    return callback


@pytest.mark.parametrize("samples_per_decode", [None, 1])
def test_hooks_come_off_after_a_rollout(pipe: StableDiffusion3Pipeline, samples_per_decode: int | None):
    sample(pipe)
    callback = FlowBPCallback(
        get_method("refl", last_n=4), generator=generator(), samples_per_decode=samples_per_decode
    )
    with nothing_left_behind(pipe):
        record(pipe, callback)
    assert len(callback.trajectory.steps) == 1


@pytest.mark.parametrize("error", [RuntimeError("user's"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("at", [0, STEPS - 1])
def test_hooks_come_off_when_the_user_s_callback_raises(pipe: StableDiffusion3Pipeline, error: BaseException, at: int):
    sample(pipe)
    expected = sample(pipe)
    callback = sparse()
    with nothing_left_behind(pipe), pytest.raises(type(error)):
        record(pipe, callback, callback_on_step_end=raising(error, at))
    assert torch.equal(sample(pipe), expected)
    with pytest.raises(RecordingError, match="Expected a complete rollout, got none"):
        _ = callback.trajectory


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_hooks_come_off_when_the_pipeline_raises(pipe: StableDiffusion3Pipeline, component: str):
    sample(pipe)
    module = getattr(pipe, component)
    inner = {"transformer": "proj_out", "vae": "decoder", "text_encoder": None}[component]
    target = module if inner is None else getattr(module, inner)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    handle = target.register_forward_hook(fail)
    with nothing_left_behind(pipe), pytest.raises(torch.OutOfMemoryError):
        record(pipe, sparse())
    handle.remove()


def test_hooks_come_off_when_the_block_raises_between_calls(pipe: StableDiffusion3Pipeline):
    sample(pipe)
    callback = sparse()
    with nothing_left_behind(pipe), pytest.raises(ZeroDivisionError), callback.record(pipe):
        sample(pipe, callback_on_step_end=callback)
        _ = 1 / 0


def test_grad_mode_is_restored_inside_no_grad(pipe: StableDiffusion3Pipeline):
    sample(pipe)
    with torch.no_grad(), nothing_left_behind(pipe):
        images = record(pipe, sparse())
        assert not torch.is_grad_enabled()
    assert images.requires_grad


def test_grad_mode_is_restored_after_a_pipeline_without_a_decorator_of_its_own(pipe: StableDiffusion3Pipeline):
    undecorated = type(pipe).__call__.__wrapped__
    callback = sparse()
    with torch.no_grad():
        with callback.record(pipe):
            undecorated(pipe, PROMPTS, **CALL)
        assert not torch.is_grad_enabled()


def test_hooks_of_a_scheduler_class_that_inherits_its_step(pipe: StableDiffusion3Pipeline):
    class Inherits(FlowMatchEulerDiscreteScheduler):
        pass

    pipe.scheduler = Inherits.from_config(pipe.scheduler.config)
    sample(pipe)
    with nothing_left_behind(pipe):
        record(pipe, sparse())
    assert "step" not in vars(Inherits) and "set_timesteps" not in vars(Inherits)


def test_another_pipeline_of_the_same_classes_is_not_disturbed(pipe: StableDiffusion3Pipeline):
    other = tiny_sd3_pipeline(torch.float32, seed=1)
    expected = sample(other)
    callback = sparse()
    with callback.record(pipe):
        images = sample(pipe, callback_on_step_end=callback)
        found = sample(other)
    assert torch.equal(found, expected) and not found.requires_grad
    callback.backward(REWARD, images, PROMPTS)


def test_the_interrupt_flag_is_reset(pipe: StableDiffusion3Pipeline):
    expected = sample(pipe)
    callback = FlowBPCallback(Surrogate(("posterior_mean", 1), (Term(1, -1.0),)))
    record(pipe, callback)
    assert not pipe.interrupt
    with computations(pipe) as batches:
        assert torch.equal(sample(pipe), expected)
    assert len(batches) == STEPS


# The rollout is the user's inference.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance_scale": 1.0},
        {"negative_prompt": ["blue", "red"]},
        {"latents": torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(8))},
        {"sigmas": [1.0, 0.8, 0.6, 0.4, 0.3, 0.1]},
        {"num_images_per_prompt": 2},
        {"num_images_per_prompt": 2, "guidance_scale": 1.0, "generator": None},
        {"output_type": "latent"},
    ],
    ids=lambda changes: ",".join(changes) or "plain",
)
@pytest.mark.parametrize("name", ["full", "flowbp-sparse"])
def test_images_are_bit_equal_to_an_unrecorded_call(changes: dict[str, Any], dtype: torch.dtype, name: str):
    pipe = tiny_sd3_pipeline(dtype)
    if "latents" in changes:
        changes = {**changes, "latents": changes["latents"].to(dtype)}
    torch.manual_seed(4)
    expected = sample(pipe, **changes)
    torch.manual_seed(4)
    images = record(pipe, FlowBPCallback(get_method(name), generator=generator()), **changes)
    assert images.requires_grad and not expected.requires_grad
    assert images.dtype == expected.dtype and torch.equal(images, expected)


@pytest.mark.parametrize("samples_per_decode", [1, 2, 3])
def test_images_of_a_chunked_decode_are_the_unrecorded_ones(pipe: StableDiffusion3Pipeline, samples_per_decode: int):
    prompts = ["a 42", "the 7", "k9"]
    expected = sample(pipe, prompts)
    callback = FlowBPCallback(get_method("draft-k"), generator=generator(), samples_per_decode=samples_per_decode)
    # Other batch sizes may use other kernels, so this is not bit for bit.
    torch.testing.assert_close(record(pipe, callback, prompts=prompts), expected, rtol=1e-5, atol=1e-6)


def test_recorded_numbers_are_the_rollout_s(pipe: StableDiffusion3Pipeline):
    seen: list[torch.Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        seen.append(inputs["latents"].clone())
        return {}

    latents = torch.randn(2, 4, 4, 4, generator=generator(3))
    sample(pipe, latents=latents.clone(), callback_on_step_end=keep)
    callback = FlowBPCallback(get_method("full"))
    record(pipe, callback, latents=latents.clone())
    trajectory = callback.trajectory
    expected = dict(enumerate([latents, *seen]))
    assert trajectory.latents.keys() == expected.keys()
    for step, value in expected.items():
        assert torch.equal(trajectory.latents[step], value) and not trajectory.latents[step].requires_grad
    assert torch.equal(trajectory.sigmas, pipe.scheduler.sigmas) and trajectory.num_steps == STEPS
    for step in range(STEPS):
        length = trajectory.sigmas[step + 1] - trajectory.sigmas[step]
        torch.testing.assert_close(expected[step + 1], expected[step] + length * trajectory.velocities[step])
    assert torch.equal(callback.endpoint.detach(), expected[STEPS]) and callback.endpoint.is_leaf


def test_the_posterior_mean_is_what_is_decoded(pipe: StableDiffusion3Pipeline):
    callback = FlowBPCallback(Surrogate(("posterior_mean", 3), (Term(3, -1.0),)))
    images = record(pipe, callback, output_type="latent")
    trajectory = callback.trajectory
    mean = trajectory.latents[3] - trajectory.sigmas[3] * trajectory.velocities[3]
    torch.testing.assert_close(callback.endpoint.detach(), mean, rtol=1e-6, atol=1e-6)
    assert torch.equal(images.detach(), callback.endpoint.detach())


# Rollouts stop at the last step needed, and keep what is needed.


@pytest.mark.parametrize(
    ("surrogate", "expected"),
    [
        (Surrogate(("posterior_mean", 2), (Term(1, -1.0),)), 3),
        (Surrogate(("posterior_mean", 0), (Term(0, -1.0),)), 1),
        (Surrogate(("posterior_mean", 1), (Term(1, -1.0),), (Leg(0, 4, (0, 1), (-0.2, -0.3)),)), 4),
        (Surrogate(("posterior_mean", STEPS - 1), (Term(1, -1.0),)), STEPS),
        (Surrogate("sample", (Term(1, -1.0),)), STEPS),
    ],
)
def test_a_rollout_stops_at_the_last_step_needed(pipe: StableDiffusion3Pipeline, surrogate: Surrogate, expected: int):
    with computations(pipe) as batches:
        images = record(pipe, FlowBPCallback(surrogate))
    assert batches == [4] * expected and images.shape == (2, 3, 8, 8)


def test_a_pipeline_that_cannot_be_interrupted_stops_computing_too(
    pipe: StableDiffusion3Pipeline, monkeypatch: pytest.MonkeyPatch
):
    class Uninterrupted(StableDiffusion3Pipeline):
        interrupt = False

    plain = record(pipe, FlowBPCallback(Surrogate(("posterior_mean", 2), (Term(1, -1.0),))))
    pipe.__class__ = Uninterrupted
    monkeypatch.delattr(StableDiffusion3Pipeline, "interrupt")
    monkeypatch.setattr(Uninterrupted, "interrupt", False)
    callback = FlowBPCallback(Surrogate(("posterior_mean", 2), (Term(1, -1.0),)))
    with computations(pipe) as batches:
        images = record(pipe, callback)
    assert batches == [4] * 3 and torch.equal(images, plain)


def tensors_of(trajectory: Trajectory) -> dict[str, set[int]]:
    return {name: set(getattr(trajectory, name)) for name in ("latents", "velocities", "steps")}


def test_only_what_the_surrogate_needs_is_kept(pipe: StableDiffusion3Pipeline):
    callback = FlowBPCallback(Surrogate("sample", (Term(1, -1.0), Term(4, -1.0))))
    record(pipe, callback)
    assert tensors_of(callback.trajectory) == {"latents": {1, 4, 6}, "velocities": {1, 4}, "steps": {1, 4}}

    legs = (Leg(0, 3, (0, 2), (-0.1, -0.2)), Leg(3, 6, (3, 4), (-0.1, -0.2)))
    callback = FlowBPCallback(Surrogate("sample", (Term(2, -1.0),), legs))
    record(pipe, callback)
    assert tensors_of(callback.trajectory) == {"latents": {0, 2, 3, 6}, "velocities": {0, 2, 3, 4}, "steps": {2}}


def test_glue_towards_the_latents_is_kept_for_coupled_steps_only(pipe: StableDiffusion3Pipeline):
    # The first term has nobody before it, so its coupling needs no gradient either.
    callback = FlowBPCallback(Surrogate("sample", (Term(0, -1.0, 1.0), Term(2, -1.0), Term(4, -1.0, 0.5))))
    record(pipe, callback)
    steps = callback.trajectory.steps
    assert {step for step, active in steps.items() if active.latents is not None} == {4}
    assert {step for step, active in steps.items() if active.calls[0].attached} == {4}


def test_text_embeddings_are_kept_once(pipe: StableDiffusion3Pipeline):
    callback = FlowBPCallback(get_method("full"))
    record(pipe, callback)
    calls = [active.calls[0] for active in callback.trajectory.steps.values()]
    leaves = list(zip(*(call.leaves for call in calls), strict=True))
    shared = [column for column in leaves if len({tensor_place(leaf) for leaf in column}) == 1]
    changing = [column for column in leaves if len({tensor_place(leaf) for leaf in column}) == STEPS]
    assert len(shared) + len(changing) == len(leaves)
    # Latents and timestep change; the prompt's embedding and its pooled one do not.
    assert sorted(column[0].ndim for column in changing) == [1, 4]
    assert sorted(column[0].ndim for column in shared if isinstance(column[0], torch.Tensor)) == [2, 3]


def tensor_place(leaf: Any) -> Any:
    return leaf.data_ptr() if isinstance(leaf, torch.Tensor) else leaf


def test_kept_inputs_are_copies(pipe: StableDiffusion3Pipeline):
    """A pipeline that overwrites what it gave the transformer does not change the recording."""
    overwritten = []

    def overwrite(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            # In the sweep, where a transformer that did so could not be differentiated at all.
            return
        overwritten.append(kwargs["hidden_states"].data_ptr())
        kwargs["hidden_states"].zero_()

    surrogate = Surrogate("sample", (Term(0, -1.0),))
    plain = FlowBPCallback(surrogate)
    plain.backward(REWARD, record(pipe, plain), PROMPTS)
    expected = [parameter.grad.clone() for parameter in pipe.transformer.parameters() if parameter.grad is not None]
    pipe.transformer.zero_grad()
    callback = FlowBPCallback(surrogate)
    handle = pipe.transformer.register_forward_hook(overwrite, with_kwargs=True)
    images = record(pipe, callback)
    assert overwritten
    callback.backward(REWARD, images, PROMPTS)
    handle.remove()
    found = [parameter.grad for parameter in pipe.transformer.parameters() if parameter.grad is not None]
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


# Refusals.


@contextmanager
def refused(message: str) -> Iterator[pytest.ExceptionInfo[RecordingError]]:
    """Refused in one line that has this in it."""
    with pytest.raises(RecordingError, match=re.escape(message)) as caught:
        yield caught
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def altering(**changes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    def callback(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: change(inputs[name]) for name, change in changes.items()}

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": list(changes)}


ALTERED = "the latents given to step 1 are not those that step 0 returned; a callback"
DRIFTED = "of shape (4, 22, 32) changed from step 0 to step 1"


@pytest.mark.parametrize("name", ["full", "flowbp-sparse"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (altering(latents=lambda latents: 1.01 * latents), ALTERED),
        (altering(latents=lambda latents: latents.mul_(1.01)), ALTERED),
        (altering(prompt_embeds=lambda embeds: 1.01 * embeds), DRIFTED),
        (altering(prompt_embeds=lambda embeds: embeds.mul_(1.01)), DRIFTED),
    ],
)
def test_arguments_of_the_call_that_are_refused(
    pipe: StableDiffusion3Pipeline, changes: dict[str, Any], message: str, name: str
):
    with refused(message):
        record(pipe, FlowBPCallback(get_method(name), generator=generator()), **changes)


def test_backward_without_a_rollout_is_refused(pipe: StableDiffusion3Pipeline):
    callback, images = sparse(), torch.zeros(2, 3, 8, 8, requires_grad=True)
    with refused("Expected a complete rollout, got none; call the pipeline inside `with callback.record(pipe):`"):
        callback.backward(REWARD, images, PROMPTS)
    with callback.record(pipe):
        pass
    with refused("Expected a complete rollout, got none"):
        callback.backward(REWARD, images, PROMPTS)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), ()])
def test_the_wrong_number_of_rewards_is_refused(pipe: StableDiffusion3Pipeline, shape: tuple[int, ...]):
    callback, images = recorded(pipe)
    rewards = images.sum() * torch.ones(shape)
    with pytest.raises(ValueError, match=re.escape(f"each of 2 images, a tensor of shape (2,), got {shape}")):
        callback.backward(rewards)
    with pytest.raises(ValueError, match=re.escape(f"a tensor of shape (2,), got {shape}")):
        callback.backward(lambda images, prompts: images.sum() * torch.ones(shape), images, PROMPTS)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", "b", "c"], "Expected a prompt for each of 2 images, got 3 prompts"),
        ([], "Expected a prompt for each of 2 images, got 0 prompts"),
        ("a 42", "`prompts` must be a list with a prompt for each image, got one string"),
    ],
)
def test_the_wrong_number_of_prompts_is_refused(pipe: StableDiffusion3Pipeline, prompts: Any, message: str):
    callback, images = recorded(pipe)
    with pytest.raises(ValueError, match=message):
        callback.backward(REWARD, images, prompts)


def test_each_image_is_scored_with_its_own_prompt(pipe: StableDiffusion3Pipeline):
    seen: list[str] = []

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        seen.extend(prompts)
        return REWARD(images, prompts)

    callback = FlowBPCallback(get_method("draft-k"), samples_per_decode=3)
    images = record(pipe, callback, num_images_per_prompt=2)
    callback.backward(reward, images, PROMPTS)
    assert seen == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]


def test_without_the_unconditional_gradient_its_branch_is_not_computed(pipe: StableDiffusion3Pipeline):
    for unconditional_gradient, batch in ((False, 2), (True, 4)):
        callback = FlowBPCallback(
            get_method("flowbp-sparse", num_active=3),
            generator=generator(),
            unconditional_gradient=unconditional_gradient,
        )
        images = record(pipe, callback)
        with computations(pipe) as batches:
            callback.backward(REWARD, images, PROMPTS)
        assert batches == [batch] * 3


def test_recording_works_without_being_the_step_callback(pipe: StableDiffusion3Pipeline):
    callback = sparse()
    callback.backward(REWARD, record(pipe, callback, callback_on_step_end=None), PROMPTS)


def test_a_surrogate_for_more_steps_than_the_rollout_has_is_refused(pipe: StableDiffusion3Pipeline):
    with pytest.raises(ValueError, match="needs steps up to 9, the rollout has steps 0 to 5"):
        record(pipe, FlowBPCallback(Surrogate("sample", (Term(9, -1.0),))))


# Memory.


def sweep_memory(num_active: int, **changes: Any) -> tuple[int, list[int]]:
    """Most bytes saved for backward in `callback.backward`, and those held when each forward pass starts."""
    pipe = tiny_sd3_pipeline(torch.float32)
    callback = sparse(num_active)
    saved = SavedBytes(pipe.transformer)
    at_start: list[int] = []
    pipe.transformer.pos_embed.register_forward_pre_hook(lambda *_: at_start.append(saved.live))
    images = record(pipe, callback, num_inference_steps=10, **changes)
    at_start.clear()
    with saved.counting():
        callback.backward(REWARD, images, PROMPTS)
    assert saved.live == 0
    return saved.most, at_start


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
def test_memory_does_not_grow_with_the_number_of_active_steps(guidance_scale: float):
    one, _ = sweep_memory(1, guidance_scale=guidance_scale)
    eight, at_start = sweep_memory(8, guidance_scale=guidance_scale)
    assert one > 10_000 and abs(eight / one - 1) < 0.02
    # Decoding and reward are over before the first step, each step's graph before the next.
    assert at_start == [0] * 8


def test_coupled_steps_do_not_keep_their_graphs_either():
    pipe = tiny_sd3_pipeline(torch.float32)
    most = {}
    for last_k in (2, 8):
        callback = FlowBPCallback(get_method("draft-k", last_k=last_k))
        images = record(pipe, callback, num_inference_steps=10)
        saved = SavedBytes(pipe.transformer)
        with saved.counting():
            callback.backward(REWARD, images, PROMPTS)
        most[last_k] = saved.most
    assert abs(most[8] / most[2] - 1) < 0.02


def test_the_usual_way_grows_with_the_number_of_active_steps():
    """What the tests above would find if all graphs were alive."""
    pipe = tiny_sd3_pipeline(torch.float32)
    most = {}
    for num_active in (1, 8):
        callback = sparse(num_active)
        record(pipe, callback, num_inference_steps=10)
        saved, outputs = SavedBytes(pipe.transformer), []
        with saved.counting():
            for step in callback.trajectory.steps.values():
                for call in step.calls:
                    args, kwargs = tree_unflatten(call.leaves, call.spec)
                    outputs.append(call.module(*args, **kwargs))
        most[num_active] = saved.most
    assert most[8] / most[1] == pytest.approx(8, rel=0.01)


@pytest.mark.parametrize("samples", [6])
def test_decoding_a_few_samples_at_a_time_needs_less_memory(samples: int):
    prompts = [f"a {number}" for number in range(samples)]
    most = {}
    for samples_per_decode in (None, 1):
        pipe = tiny_sd3_pipeline(torch.float32)
        pipe.vae.requires_grad_(False)
        callback = FlowBPCallback(get_method("draft-k"), samples_per_decode=samples_per_decode)
        with LiveBytes() as memory, callback.record(pipe):
            latents = sample(pipe, prompts, output_type="latent")
            before = memory.live
            memory.most = before
            images = pipe.vae.decode(latents).sample
            gradient = torch.autograd.grad(REWARD(images, prompts).sum(), callback.endpoint)[0]
        most[samples_per_decode] = memory.most - before
        assert gradient.shape == latents.shape
    assert most[1] < 0.4 * most[None]


# DRaFT-LV's copies.


def record_copies(pipe: StableDiffusion3Pipeline, seed: int, prompts: list[str] = PROMPTS) -> tuple[Any, torch.Tensor]:
    callback = FlowBPCallback(get_method("draft-lv", num_noised=2), noise_generator=generator(seed))
    assert callback.copies == 2
    with callback.record(pipe):
        images = [sample(pipe, prompts, callback_on_step_end=callback) for _ in range(1 + callback.copies)]
    return callback, torch.cat(images)


def test_copies_compute_only_the_last_step(pipe: StableDiffusion3Pipeline):
    expected = sample(pipe)
    with computations(pipe) as batches:
        callback, images = record_copies(pipe, 5)
    assert batches == [4] * (STEPS + 1 + 1)
    assert torch.equal(images[:2], expected)
    with computations(pipe) as batches:
        out = callback.backward(REWARD, images, PROMPTS)
    assert batches == [2] * 3
    assert out.rewards.shape == out.weights.shape == (6,)


def test_copies_start_from_the_re_noised_sample(pipe: StableDiffusion3Pipeline):
    callback, _ = record_copies(pipe, 5)
    first, *copies = callback.trajectories
    noise = generator(5)
    for copy in copies:
        drawn = torch.randn(first.latents[STEPS].shape, generator=noise)
        sigma = first.sigmas[STEPS - 1]
        expected = (1 - sigma) * first.latents[STEPS] + sigma * drawn
        torch.testing.assert_close(copy.latents[STEPS - 1], expected, rtol=1e-6, atol=1e-6)
        assert set(copy.steps) == {STEPS - 1} and copy.surrogate == first.surrogate


def test_copies_are_reproducible_by_their_noise_generator(pipe: StableDiffusion3Pipeline):
    first, images = record_copies(pipe, 5)
    _, again = record_copies(pipe, 5)
    _, other = record_copies(pipe, 6)
    assert torch.equal(images, again)
    assert torch.equal(images[:2], other[:2]) and not torch.equal(images[2:], other[2:])
    assert not torch.equal(images[2:4], images[4:])
    assert len(first.trajectories) == 3


def test_copies_noise_of_each_sample_from_its_generator(pipe: StableDiffusion3Pipeline):
    """Copy after copy, a sample's noise is the next of its own generator."""
    callback = FlowBPCallback(
        get_method("draft-lv", num_noised=2), noise_generator=[generator(seed) for seed in (5, 8)]
    )
    with callback.record(pipe):
        for _ in range(1 + callback.copies):
            sample(pipe)
    first, *copies = callback.trajectories
    noises = [generator(seed) for seed in (5, 8)]
    sigma = first.sigmas[STEPS - 1]
    for copy in copies:
        drawn = torch.stack([torch.randn(first.latents[STEPS].shape[1:], generator=noise) for noise in noises])
        expected = (1 - sigma) * first.latents[STEPS] + sigma * drawn
        torch.testing.assert_close(copy.latents[STEPS - 1], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [1, 3])
def test_the_wrong_number_of_noise_generators_is_refused(pipe: StableDiffusion3Pipeline, count: int):
    callback = FlowBPCallback(get_method("draft-lv"), noise_generator=[generator() for _ in range(count)])
    message = f"expected one noise generator or a list with one for each of 2 samples, got {count}"
    with pytest.raises(ValueError, match=message), callback.record(pipe):
        for _ in range(1 + callback.copies):
            sample(pipe)


# Precision.


def test_a_float32_lora_over_a_bfloat16_base_gets_float32_gradients():
    pipe = tiny_sd3_pipeline(torch.bfloat16, lora_rank=2)
    cast_training_params(pipe.transformer, dtype=torch.float32)
    callback, images = recorded(pipe)
    out = callback.backward(lambda images, prompts: REWARD(images.float(), prompts), images, PROMPTS)
    assert out.rewards.dtype == torch.float32 and callback.endpoint.dtype == torch.bfloat16
    trained = [parameter for parameter in pipe.transformer.parameters() if parameter.requires_grad]
    assert trained and all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in trained)
    assert all(torch.isfinite(parameter.grad).all() for parameter in trained)
    assert sum(parameter.grad.abs().sum() > 0 for parameter in trained) > len(trained) / 2
    base = [parameter for parameter in pipe.transformer.parameters() if not parameter.requires_grad]
    assert all(parameter.grad is None for parameter in base)


def test_gradients_reach_the_transformer_only(pipe: StableDiffusion3Pipeline):
    for module in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        module.requires_grad_(True)
    callback = sparse()
    callback.backward(REWARD, record(pipe, callback), PROMPTS)
    assert isinstance(pipe.transformer, SD3Transformer2DModel)
    for module in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        assert all(parameter.grad is None for parameter in module.parameters())


def test_loss_scale_reaches_the_gradient_before_float16_does() -> None:
    """Gradients of single pixels are below float16's range; they must be scaled before they go through the VAE."""

    def gradient(dtype: torch.dtype, scale: float) -> torch.Tensor:
        pipe = tiny_sd3_pipeline(dtype, lora_rank=2)
        parameters = [p for p in pipe.transformer.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.data = parameter.data.float()
        callback = FlowBPCallback(get_method("draft-k", last_k=2))
        # Drawn in float32: torch 2.8 draws other numbers in float16.
        noise = torch.randn(1, 4, 4, 4, generator=generator()).to(dtype)
        with callback.record(pipe):
            images = sample(pipe, ["a"], num_inference_steps=4, guidance_scale=1.0, latents=noise)
        tiny = 0.3 / (3 * 512 * 512)
        callback.backward(lambda x, prompts: x.float().flatten(1).sum(1) * tiny, images, ["a"], gradient_scale=scale)
        return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]) / scale

    exact, half = gradient(torch.float32, 1.0), gradient(torch.float16, 2.0**16)
    assert exact.norm() > 0
    assert (half - exact).norm() < 0.1 * exact.norm()


def test_copies_follow_skip_layer_guidance() -> None:
    """The skip-layer call of an early step has another batch than the last step's call that stands in for it."""
    pipe = tiny_sd3_pipeline()
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.01, "skip_layer_guidance_stop": 0.5}
    callback = FlowBPCallback(get_method("draft-lv", num_noised=1), unconditional_gradient=True)
    with callback.record(pipe):
        images = [sample(pipe, **skipping) for _ in range(1 + callback.copies)]
    out = callback.backward(lambda x, prompts: x.flatten(1).mean(1), torch.cat(images), PROMPTS)
    assert out.rewards.shape == (4,)


# Strict mode, parts that switch gradients off, stages, rising sigmas.


def backward(callback: FlowBPCallback, pipe: StableDiffusion3Pipeline, **changes: Any) -> None:
    images = record(pipe, callback, **changes)
    callback.backward(lambda x, prompts: x.flatten(1).mean(1), images, PROMPTS)


def test_strict_repeats_every_active_call_whole(pipe: StableDiffusion3Pipeline) -> None:
    surrogate = Surrogate("sample", (Term(1, -0.1), Term(3, -0.2)))
    for strict, expected in ((False, [2, 2]), (True, [4, 4, 2, 2])):
        callback = FlowBPCallback(surrogate, strict=strict)
        images = record(pipe, callback)
        with computations(pipe) as batches:
            callback.backward(lambda x, prompts: x.flatten(1).mean(1), images, PROMPTS)
        assert batches == expected


def test_strict_finds_what_the_sweep_does_not_compute(pipe: StableDiffusion3Pipeline) -> None:
    """The unconditional rows change at every call; only a whole repetition can see it."""
    calls = {"number": 0}

    def drift(module: torch.nn.Module, args: Any, output: Any) -> Any:
        calls["number"] += 1
        if len(output[0]) < 4:
            return output
        changed = output[0].clone()
        changed[:2] += 1e-3 * calls["number"]
        return (changed,)

    handle = pipe.transformer.register_forward_hook(drift)
    surrogate = Surrogate("sample", (Term(2, -0.1),))
    backward(FlowBPCallback(surrogate), pipe)
    with pytest.raises(RecordingError, match=r"StableDiffusion3Pipeline: step 2: .* does not reproduce its recorded"):
        backward(FlowBPCallback(surrogate, strict=True), pipe)
    handle.remove()
    backward(FlowBPCallback(surrogate, strict=True), pipe)


def test_stages_are_told_in_their_order(pipe: StableDiffusion3Pipeline) -> None:
    stages: list[str] = []
    callback = FlowBPCallback(Surrogate("sample", (Term(2, -0.1),)), samples_per_decode=1, on_stage=stages.append)
    backward(callback, pipe)
    assert stages == ["rollout", "decode", "reward", "reward", "decode", "sweep"]


def test_negated_surrogates_are_for_velocities_of_the_other_sign() -> None:
    method = get_method("flowbp-lagrange", anchor_lambda=0.5)
    surrogate = method.draw(torch.linspace(1, 0, 11), generator())
    negated = surrogate.negated()
    assert [term.weight for term in negated.terms] == [-term.weight for term in surrogate.terms]
    assert [term.coupling for term in negated.terms] == [term.coupling for term in surrogate.terms]
    for leg, other in zip(surrogate.legs, negated.legs, strict=True):
        assert [*other.weights, other.blend] == [-weight for weight in (*leg.weights, leg.blend)]
    assert negated.negated() == surrogate
    assert (negated.tau, negated.endpoint) == (surrogate.tau, surrogate.endpoint)


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_group_offloading_is_refused_where_gradients_flow(pipe: StableDiffusion3Pipeline, component: str) -> None:
    getattr(pipe, component).enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(RecordingError, match=f"group offloading of {component} takes weights away") as caught:
        with sparse().record(pipe):
            pass
    assert "\n" not in str(caught.value) and "quantise" in str(caught.value)


def test_a_hook_at_the_address_of_the_recorded_one_is_another_hook(pipe: StableDiffusion3Pipeline):
    """Python gives the address of what is gone, which is its id, to what comes next."""

    def hook(factor: float) -> Callable[..., torch.Tensor]:
        return lambda module, inputs, output: factor * output

    part = pipe.transformer.transformer_blocks[0].attn.to_q
    before = hook(1.0)
    address, handle = id(before), part.register_forward_hook(before)
    callback = sparse()
    images = record(pipe, callback)
    handle.remove()
    del before
    gc.collect()
    others = [hook(1.0) for _ in range(10_000)]
    (same,) = [other for other in others if id(other) == address]
    part.register_forward_hook(same)
    with pytest.raises(RecordingError, match="other hooks"):
        callback.backward(images.mean((1, 2, 3)))
