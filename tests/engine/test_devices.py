# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What an accelerator would notice: float64 that it may not have, waiting for its numbers, bytes that are kept.

`PretendedDevice` stands in for one. Bytes are counted by `memory_meters`.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from brute_force import Sampling, brute_force, relative_difference
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from families.family import Family
from families.images import FAMILIES as IMAGE_FAMILIES
from families.packed import FAMILIES as PACKED_FAMILIES
from families.paper import FAMILIES as PAPER_FAMILIES
from families.videos import FAMILIES as VIDEO_FAMILIES
from gradient_rows import EXACT, ROWS, drawn_steps, engine
from gradient_rows import PROMPTS as THREE_PROMPTS
from memory_meters import LiveBytes, SavedBytes
from pretended_device import DeviceError, PretendedDevice
from tiny_sd3 import MAX_SEQUENCE_LENGTH, mixing_samples, tiny_sd3_pipeline
from toy_reward import make_reward
from training_scripts import PROMPTS, SHARED_ARGUMENTS, command_line, log_of, write_prompts

from flowbp import METHODS, FlowBPCallback, Surrogate, Term, get_method, verify
from flowbp.callback import BackwardOutput
from flowbp.checks import RecordingError
from flowbp.host import float64_on_host, read
from flowbp.judging.guard import diversity, high_frequency_energy, saturated_share
from flowbp.judging.images import draw_images
from flowbp.judging.loras import scores_by_reward
from flowbp.judging.statistics import estimate
from flowbp.replayed import TOLERANCE, deviations
from flowbp.training import setup

REWARD = make_reward()
DEVICE = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(pipe: StableDiffusion3Pipeline, prompts: Sequence[str] = PROMPTS[:2], **changes: Any) -> torch.Tensor:
    call = {
        "height": 8,
        "width": 8,
        "num_inference_steps": 8,
        "guidance_scale": 3.5,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        "output_type": "pt",
        "generator": generator(1),
    }
    return pipe(list(prompts), **{**call, **changes}).images


def update(
    pipe: StableDiffusion3Pipeline,
    callback: FlowBPCallback,
    prompts: Sequence[str] = PROMPTS[:2],
    is_function: bool = True,
    transformer: torch.nn.Module | None = None,
    **changes: Any,
) -> BackwardOutput:
    """One recorded rollout and its gradients."""
    with callback.record(pipe):
        images = torch.cat([sample(pipe, prompts, **changes) for _ in range(1 + callback.copies)])
    if is_function:
        return callback.backward(REWARD, images, list(prompts), transformer=transformer)
    return callback.backward(REWARD(images, prompts), transformer=transformer)


# The pretended device.


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x.double(),
        lambda x: x * torch.ones((), dtype=torch.float64, device=DEVICE),
        lambda x: torch.zeros(2, dtype=torch.float64, device=DEVICE),
        lambda x: torch.tensor([1.0], dtype=torch.float64, device=DEVICE),
        lambda x: torch.complex(x, x).to(torch.complex128),
        lambda x: x.cpu().double().to(DEVICE) + 1,
    ],
)
def test_the_pretended_device_refuses_float64(compute: Callable[[torch.Tensor], Any]):
    x = torch.randn(3)
    with PretendedDevice(), pytest.raises(DeviceError, match="on the device, at .*test_devices.py"):
        compute(x)
    with PretendedDevice(has_float64=True):
        compute(x)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x.cpu().double().sum().item(),
        lambda x: torch.linspace(0, 1, 5, dtype=torch.float64),
        lambda x: torch.tensor([1.0], dtype=torch.float64).numpy(),
        lambda x: torch.from_numpy(torch.ones(2, dtype=torch.float64).numpy()).sum(),
        lambda x: float64_on_host(x).cumsum(0).tolist(),
    ],
)
def test_float64_on_the_host_is_allowed(compute: Callable[[torch.Tensor], Any]):
    x = torch.randn(3)
    with PretendedDevice():
        compute(x)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x.cpu() + x,
        lambda x: x.numpy(),
        lambda x: torch.cat([torch.ones(3), x]),
        lambda x: x.cpu().pin_memory(),
        lambda x: torch.empty(3, pin_memory=True),
    ],
)
def test_the_pretended_device_keeps_its_tensors_apart(compute: Callable[[torch.Tensor], Any]):
    x = torch.randn(3)
    with PretendedDevice(), pytest.raises(DeviceError, match="at .*test_devices.py"):
        compute(x)


@pytest.mark.parametrize(
    ("expected", "compute"),
    [
        (1, lambda x: x.tolist()),
        (1, lambda x: x.sum().item()),
        (1, lambda x: float(x[0])),
        (1, lambda x: bool(x.isfinite().all())),
        (1, lambda x: 1 if x[0] > 0 else 2),
        (1, lambda x: x.cpu()),
        (1, lambda x: x.to("cpu")),
        (1, lambda x: x.cpu().tolist()),
        (1, lambda x: torch.equal(x, x)),
        (1, lambda x: torch.allclose(x, x)),
        (1, lambda x: x.nonzero()),
        (1, lambda x: x[x > 0]),
        (1, lambda x: x.masked_select(x > 0)),
        (1, lambda x: x.unique()),
        (2, lambda x: [number for number in x[:2].unbind() if number.item() < 9]),
        (1, lambda x: read([x[0], x[1], (x > 0).any()])),
        (0, lambda x: (x * x[0]).where(x > 0, 0).sum().to(DEVICE)),
        (0, lambda x: torch.linspace(0, 1, 5).tolist()),
        (0, lambda x: torch.randint(3, (2,), generator=generator()).tolist()),
        (0, lambda x: torch.get_rng_state().numpy()),
    ],
)
def test_the_pretended_device_sees_what_waits(expected: int, compute: Callable[[torch.Tensor], Any]):
    x = torch.randn(3)
    with PretendedDevice() as device:
        compute(x)
    assert len(device.reads) == expected, device.reads


def test_read_returns_the_values_in_their_order():
    scalars = [torch.tensor(True), torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor([[2.5]]), torch.tensor(3)]
    assert read(scalars) == [1.0, 0.5, 2.5, 3.0]
    assert read([]) == []


# No float64.

# Each with what else the callback is told; options that fit a rollout of 8 steps.
UPDATES = {
    "full": ({}, {"samples_per_decode": 1}),
    "flowbp-sparse": ({}, {"strict": True}),
    "flowbp-lagrange": ({}, {}),
    "leapalign": ({}, {"velocity_anchor": 0.1, "measure_gradients": True}),
    "draft-lv": ({"num_noised": 1}, {}),
    "drtune": ({"num_active": 2}, {"measure_gradients": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", UPDATES)
def test_an_update_computes_nothing_in_float64(name: str, dtype: torch.dtype):
    pipe = tiny_sd3_pipeline(dtype, lora_rank=2)
    options, callback_options = UPDATES[name]
    # Together the two dtypes have all pairs.
    for guidance_scale, is_function in ((1.0, dtype == torch.float32), (3.5, dtype != torch.float32)):
        callback = FlowBPCallback(get_method(name, **options), generator=generator(), **callback_options)
        with PretendedDevice() as device:
            out = update(pipe, callback, is_function=is_function, guidance_scale=guidance_scale)
        assert not any(map(device.is_on_host, (out.rewards, out.loss, out.anchor, *out.gaps.values())))
        assert out.rewards.dtype == dtype


@pytest.mark.parametrize("name", METHODS)
def test_draws_move_to_the_host_first(name: str):
    sigmas = torch.linspace(1, 0, 26)
    method = get_method(name)
    expected = method.draw(sigmas, generator())
    with PretendedDevice() as device:
        assert method.draw(sigmas, generator()) == expected
    assert len(device.reads) == 1


def test_numbers_of_pictures_and_videos_are_computed_without_float64_on_the_device():
    pictures = torch.rand(3, 3, 32, 48)
    for images in (pictures, pictures.unflatten(0, (3, 1)), torch.rand(2, 4, 3, 32, 32)):
        expected = diversity(images)
        with PretendedDevice():
            assert saturated_share(images).shape == high_frequency_energy(images).shape == images.shape[:1]
            assert diversity(images) == expected
    coarse = torch.nn.functional.adaptive_avg_pool2d(pictures, 16).flatten(1).double()
    assert diversity(pictures) == (torch.pdist(coarse) / coarse.shape[1] ** 0.5).mean().item()


def test_evaluations_are_computed_without_float64_on_the_device():
    pipe = tiny_sd3_pipeline(torch.float32, lora_rank=2)
    accelerator = Accelerator(cpu=True)
    with PretendedDevice():
        drawn = draw_images(
            accelerator,
            pipe.transformer,
            PROMPTS,
            generator,
            2,
            lambda place, noise: sample(pipe, [PROMPTS[place]], generator=noise, num_inference_steps=3),
            {"red": REWARD},
        )
        summary = estimate(drawn.scores["red"], 2)
    assert drawn.diversity > 0 and drawn.velocity_norm > 0 and summary["low"] < summary["mean"] < summary["high"]


def test_verification_computes_nothing_in_float64_on_the_device():
    pipe = tiny_sd3_pipeline(torch.float32, lora_rank=2)
    call = {"height": 8, "width": 8, "num_inference_steps": 3, "max_sequence_length": MAX_SEQUENCE_LENGTH}
    with PretendedDevice() as device:
        verify(pipe, prompt=list(PROMPTS[:2]), generator=generator(1), **call)
    assert any("/verification.py:" in place for place in device.reads)


def test_a_training_run_computes_nothing_in_float64(
    script: ModuleType, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From what a checkpoint holds to the results of a resumed run; loading of models before is left out."""
    device, resume = PretendedDevice(), setup.resume
    opened = ExitStack()

    def resume_on_the_device(*run: Any) -> Path | None:
        opened.enter_context(device)
        return resume(*run)

    monkeypatch.setattr(setup, "resume", resume_on_the_device)
    arguments = {
        **SHARED_ARGUMENTS,
        "pretrained_model_name_or_path": model,
        "prompts": write_prompts(tmp_path),
        "resolution": 8,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        "num_inference_steps": 4,
        "method": "flowbp-sparse",
        "num_active": 2,
        "velocity_anchor": 0.1,
        "reward_clip": 0.9,
        "use_ema": True,
        "eval_reward": "toy_reward:make_held_out_reward",
        "eval_prompts": write_prompts(tmp_path),
        "eval_steps": 1,
        "num_eval_images": 2,
    }
    for more in ({}, {"max_train_steps": 3, "resume_from_checkpoint": "latest"}):
        with opened:
            script.main(command_line(arguments, output_dir=tmp_path / "run", **more))
    assert len(log_of(tmp_path / "run")) == 3
    # It was used for all of that: replays, the optimizer's norm, the guard's numbers.
    places = {place.rpartition("/")[2].partition(":")[0] for place in device.reads}
    assert {"replay.py", "guidance.py", "distributed.py", "guard.py", "images.py", "trained.py"} <= places


def test_an_evaluation_computes_nothing_in_float64_on_the_device():
    images = torch.rand(2, 3, 8, 8)
    with PretendedDevice():
        scores = scores_by_reward(REWARD, ["red"], images, PROMPTS[:2], {})["red"]
    assert len(scores) == 2 and all(map(math.isfinite, scores))


# Waiting for the device.


@pytest.mark.parametrize("num_inference_steps", [8, 25])
@pytest.mark.parametrize(
    ("name", "options", "callback_options", "expected"),
    [
        # Sigmas, the recording's verdicts, whether images are finite, whether parameters are as they were, the
        # branches of guidance; then each replay.
        ("flowbp-sparse", {"num_active": 4}, {}, 5 + 4),
        ("flowbp-sparse", {"num_active": 4}, {"unconditional_gradient": True}, 4 + 4),
        ("flowbp-lagrange", {}, {}, 5 + 4),
        ("leapalign", {}, {"velocity_anchor": 0.1, "unconditional_gradient": False}, 5 + 2),
    ],
)
def test_an_update_waits_for_the_device_at_few_points(
    name: str, options: dict[str, Any], callback_options: dict[str, Any], expected: int, num_inference_steps: int
):
    """At most 12 times more than the pipeline alone, however many steps it makes."""
    pipe = tiny_sd3_pipeline(torch.float32, lora_rank=2)
    callback = FlowBPCallback(
        get_method(name, **options), generator=generator(), measure_gradients=True, **callback_options
    )
    with PretendedDevice() as own:
        sample(pipe, num_inference_steps=num_inference_steps)
    with PretendedDevice() as device:
        update(pipe, callback, num_inference_steps=num_inference_steps)
    assert len(callback.surrogate.terms) == (2 if name == "leapalign" else 4)
    more = len(device.reads) - len(own.reads)
    assert more <= 12, Counter(device.reads)
    assert more == expected, Counter(device.reads)


def families(*names: str) -> list[Any]:
    """The first family of each pipeline class."""
    every = [*PAPER_FAMILIES, *PACKED_FAMILIES, *IMAGE_FAMILIES, *VIDEO_FAMILIES]
    return [pytest.param(next(family for family in every if family.pipeline == name), id=name) for name in names]


def guided_call(family: Family, pipe: DiffusionPipeline, **changes: Any) -> dict[str, Any]:
    """Arguments of a call of a family's pipeline with guidance."""
    case = next(case for case in family.cases(pipe) if case.label.startswith(("guidance", "true")))
    return {**case.arguments, "output_type": "pt", "return_dict": False, **changes}


@pytest.mark.parametrize("family", families("FluxPipeline", "QwenImagePipeline", "AuraFlowPipeline", "WanPipeline"))
def test_other_pipelines_wait_for_sigmas_verdicts_parameters_and_replays_only(family: Family):
    pipe = family.build()
    call = guided_call(family, pipe)
    surrogate = Surrogate("sample", (Term(1, -0.1, 1.0), Term(2, -0.1, 1.0)))
    callback = FlowBPCallback(surrogate, unconditional_gradient=True)
    with PretendedDevice(has_float64=True) as own:
        pipe(generator=generator(1), **call)
    with PretendedDevice(has_float64=True) as device:
        with callback.record(pipe):
            images = pipe(generator=generator(1), **call)[0]
        callback.backward(images.flatten(1).mean(1))
    # Models that wait inside their forward passes do so in replays too.
    of_engine = [place for place in device.reads if "/replay.py:" not in place or place.startswith("cpu at ")]
    calls = sum(len(step.calls) for step in callback.trajectory.steps.values())
    assert len(of_engine) - len(own.reads) == 3 + calls, Counter(device.reads)


# Bytes that a recorded rollout holds.

# What grows with the number of steps: its sigmas and timesteps, and while it runs a flag and a number for each step.
BYTES_OF_A_STEP = 32


def rollout_bytes(
    pipe: DiffusionPipeline, callback: FlowBPCallback, call: dict[str, Any], steps: int
) -> tuple[int, int]:
    """Bytes that are alive after a recorded rollout, and the most during it."""
    with LiveBytes() as memory, callback.record(pipe):
        # The result is kept like the callback.
        images = pipe(generator=generator(1), num_inference_steps=steps, **call)
    assert len(callback.trajectory.sigmas) == steps + 1 and images
    return memory.live, memory.most


SURROGATES = {
    "sample": Surrogate("sample", (Term(1, -0.1), Term(4, -0.2, 0.5))),
    "posterior mean": Surrogate(("posterior_mean", 5), (Term(1, -0.1), Term(4, -0.2, 0.5))),
}


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("family", families("StableDiffusion3Pipeline", "WanPipeline", "PRXPipeline"))
def test_a_longer_rollout_holds_no_more(family: Family, surrogate: str):
    """Neither afterwards nor at its peak: outputs, latents and verdicts of steps that are not active are gone."""
    pipe = family.build()
    assert hasattr(type(pipe), "interrupt") == (family.pipeline != "PRXPipeline")
    call = guided_call(family, pipe, output_type="latent")
    call.pop("num_inference_steps", None)
    # The first call of a pipeline keeps caches of its own.
    pipe(generator=generator(1), num_inference_steps=8, **call)
    found = {}
    for steps in (8, 32):
        callback = FlowBPCallback(SURROGATES[surrogate], unconditional_gradient=True)
        found[steps] = rollout_bytes(pipe, callback, call, steps)
        assert list(callback.trajectory.steps) == [1, 4]
    smallest = callback.trajectory.velocities[1].nbytes
    for shorter, longer in zip(found[8], found[32], strict=True):
        assert 0 <= longer - shorter <= 24 * BYTES_OF_A_STEP < 24 * smallest / 8, found


def test_inputs_that_are_made_anew_at_every_step_are_not_held():
    pipe = tiny_sd3_pipeline(lora_rank=2)
    call = {"prompt": list(PROMPTS[:2]), "height": 8, "width": 8, "max_sequence_length": MAX_SEQUENCE_LENGTH}
    made = []

    def anew(pipe: DiffusionPipeline, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        embeds = inputs["prompt_embeds"].clone()
        made.append(embeds.nbytes)
        return {"prompt_embeds": embeds}

    call |= {"callback_on_step_end": anew, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    found = {}
    for steps in (8, 8, 32):
        callback = FlowBPCallback(SURROGATES["sample"])
        found[steps] = rollout_bytes(pipe, callback, {**call, "output_type": "latent"}, steps)
    for shorter, longer in zip(found[8], found[32], strict=True):
        assert longer - shorter <= 24 * BYTES_OF_A_STEP < min(made), found


# The fallback to whole calls.


@contextmanager
def noted_batches(module: torch.nn.Module) -> Iterator[list[int]]:
    """Batch sizes of a transformer's real computations, of a hook that is there from the beginning."""
    batches: list[int] = []
    module.batches = batches
    yield batches
    module.batches = []


def mixing_pipeline(breaks_off: bool = False) -> StableDiffusion3Pipeline:
    """A pipeline whose samples do not stand alone; it can see whether they do, or fails half-way where they would."""
    pipe = tiny_sd3_pipeline(float64_scheduler=True, lora_rank=2)
    transformer = pipe.transformer
    transformer.batches = []

    def note(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        transformer.batches.append(len(output))
        if breaks_off and len(output) < 2 * len(THREE_PROMPTS):
            raise RuntimeError("the batch is too small")
        return mixing_samples(module, inputs, output)

    transformer.proj_out.register_forward_hook(note)
    return pipe


@pytest.mark.parametrize("breaks_off", [False, True])
def test_the_fallback_to_whole_calls_needs_no_more_memory_and_is_told_once(
    breaks_off: bool, caplog: pytest.LogCaptureFixture
):
    pipe = mixing_pipeline(breaks_off)
    sampling = Sampling(THREE_PROMPTS, 6, 3.5)
    most, batches = [], []
    for _ in range(3):
        callback = FlowBPCallback(get_method("flowbp-sparse", num_active=3), generator=generator())
        with callback.record(pipe):
            images = pipe(**sampling.call_arguments()).images
        saved = SavedBytes(pipe.transformer)
        with noted_batches(pipe.transformer) as computed, saved.counting():
            callback.backward(REWARD, images, THREE_PROMPTS)
        assert saved.live == 0
        most.append(saved.most)
        batches.append(computed)
    # The first sweep tries the conditional samples once; later callbacks know better.
    assert batches == [[3, 6, 6, 6], [6, 6, 6], [6, 6, 6]]
    assert most[1] == most[2] > 0
    assert most[0] <= 1.02 * most[1]
    (message,) = [record.getMessage() for record in caplog.records if record.name == "flowbp.replay"]
    assert message.startswith("StableDiffusion3Pipeline: samples of SD3Transformer2DModel cannot be computed alone")
    assert ("the batch is too small" in message) == breaks_off


def test_each_transformer_falls_back_for_itself(caplog: pytest.LogCaptureFixture):
    for _ in range(2):
        update(mixing_pipeline(), FlowBPCallback(get_method("flowbp-sparse", num_active=2), generator=generator()))
    pipe = tiny_sd3_pipeline(lora_rank=2)
    update(pipe, FlowBPCallback(get_method("flowbp-sparse", num_active=2), generator=generator()))
    assert len([record for record in caplog.records if record.name == "flowbp.replay"]) == 2


@pytest.mark.parametrize("breaks_off", [False, True])
@pytest.mark.parametrize("name", ["flowbp-sparse", "flowbp-bridge", "leapalign"])
def test_gradients_of_whole_calls(name: str, breaks_off: bool):
    """Before the fallback is known and after, the gradient is the brute force's."""
    pipe = mixing_pipeline(breaks_off)
    sampling = Sampling(THREE_PROMPTS, 7, 3.5)
    for seed in (3, 4):
        gradients, _, callback = engine(pipe, get_method(name, **ROWS[name]), sampling, seed=seed)
        drawn = drawn_steps(name, callback.surrogate)
        expected = brute_force(pipe, name, ROWS[name], drawn, sampling).gradients
        assert relative_difference(gradients, expected) < EXACT


# Replays are judged sample by sample.

EIGHT_PROMPTS = [f"the {number}" for number in range(8)]
WRONG = 3


class Wrapped(torch.nn.Module):
    """A transformer behind a wrapper, as DDP is one; it scales one sample of eight, or none."""

    def __init__(self, module: torch.nn.Module, factor: float) -> None:
        super().__init__()
        self.module = module
        self.factor = factor
        self.differences: list[float] = []

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        (output,) = self.module(*args, **kwargs)
        factors = torch.ones(len(output), 1, 1, 1, dtype=output.dtype)
        factors[WRONG] = self.factor
        changed = output * factors
        self.differences.append(((changed - output).norm() / output.norm()).item())
        return (changed,)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
def test_one_wrong_sample_of_eight_is_refused(guidance_scale: float):
    """3 % of one sample are less than the tolerance of all samples together, whether of a part of a call or a call."""
    pipe = tiny_sd3_pipeline(torch.bfloat16, lora_rank=2)
    surrogate = Surrogate("sample", (Term(2, -0.1),))
    for factor in (1.0, 1.03):
        wrapped = Wrapped(pipe.transformer, factor)
        run = functools.partial(
            update, pipe, FlowBPCallback(surrogate), EIGHT_PROMPTS, transformer=wrapped, guidance_scale=guidance_scale
        )
        if factor == 1:
            run()
            continue
        with pytest.raises(RecordingError, match=r"relative difference [234]\.\d\de-02 in one sample"):
            run()
        assert 0 < max(wrapped.differences) < TOLERANCE[torch.bfloat16]


def test_deviations_are_those_of_each_sample():
    old = torch.randn(8, 4, 5, generator=generator())
    new = old.clone()
    new[WRONG] *= 1.03
    new[5] += 1e-3
    expected = [((one - other).norm() / other.norm()).item() for one, other in zip(new, old, strict=True)]
    assert deviations(new, old).tolist() == pytest.approx(expected, rel=1e-5)
    assert deviations(new[WRONG, 0], old[WRONG, 0]).tolist() == pytest.approx([0.03], rel=1e-3)
    assert (new - old).norm() / old.norm() < TOLERANCE[torch.bfloat16]


def test_deviations_of_what_is_not_finite_or_nothing():
    old = torch.tensor([[1.0, float("nan")], [0.0, 0.0], [0.0, 0.0], [float("inf"), 2.0]])
    new = torch.tensor([[1.0, 5.0], [0.0, 0.0], [0.0, 1e-9], [3.0, 1.0]])
    assert deviations(new, old).tolist() == [0.0, 0.0, float("inf"), 0.5]
