# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The guard's statistics on images with known answers, and its alarms on histories that deserve them or do not."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from tiny_sd3 import MAX_SEQUENCE_LENGTH, tiny_sd3_pipeline

from flowbp.judging.guard import (
    Alarm,
    Guard,
    Measurement,
    VelocityMeter,
    diversity,
    high_frequency_energy,
    saturated_share,
)

DEMO = Path(__file__).parents[2] / "demo"


def checkerboard(period: int, height: int = 64, width: int = 64) -> torch.Tensor:
    """(1, 3, height, width) of 0 and 1 that repeats every `period` pixels in both directions."""
    down, across = torch.arange(height)[:, None], torch.arange(width)[None]
    return ((down // (period // 2) + across // (period // 2)) % 2).float().expand(1, 3, -1, -1)


def blurred(images: torch.Tensor) -> torch.Tensor:
    """Binomial blur over 5 x 5 pixels."""
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = (kernel[:, None] * kernel).expand(3, 1, 5, 5)
    return torch.nn.functional.conv2d(torch.nn.functional.pad(images, (2,) * 4, mode="replicate"), kernel, groups=3)


# Images.


def test_saturated_share_counts_the_values_that_8_bits_show_as_saturated():
    image = torch.full((3, 4, 4), 0.5)
    assert saturated_share(image[None]).tolist() == [0]
    image[0, 0, :3] = torch.tensor([0.0, 1.0, 0.4 / 255])
    image[1, 0, :3] = torch.tensor([1 - 0.4 / 255, 0.6 / 255, 1 - 0.6 / 255])
    assert saturated_share(image[None]).tolist() == pytest.approx([4 / 48])
    assert saturated_share(checkerboard(2).half()).tolist() == [1]


def test_high_frequency_energy_of_constants_and_checkerboards():
    assert high_frequency_energy(torch.full((2, 3, 32, 48), 0.7)).tolist() == pytest.approx([0, 0], abs=1e-9)
    for period in (2, 4, 8, 16):
        # All of a checkerboard is on the grid or high, and its variance is a quarter.
        assert high_frequency_energy(checkerboard(period)).item() == pytest.approx(0.25, rel=1e-5)
    # Contrast counts squared; brightness not at all.
    assert high_frequency_energy(0.3 + 0.1 * checkerboard(16)).item() == pytest.approx(0.0025, rel=1e-5)


def test_waves_below_the_limit_count_on_the_grid_only():
    def wave(cycles: int) -> torch.Tensor:
        return (0.5 + 0.1 * torch.cos(2 * math.pi * cycles * torch.arange(96) / 96)).expand(1, 3, 96, -1)

    # 96 pixels: 6 cycles are a period of 16 pixels, 24 cycles one of 4, the limit.
    found = {cycles: high_frequency_energy(wave(cycles)).item() for cycles in (5, 6, 7, 23, 24, 25, 41)}
    counted = {cycles: cycles in (6, 24, 25, 41) for cycles in found}
    assert found == pytest.approx({cycles: 0.005 * counted[cycles] for cycles in found}, rel=1e-4, abs=1e-9)


def test_high_frequency_energy_weighs_channels_by_luminance():
    green, blue = torch.zeros(2, 1, 3, 32, 32)
    green[:, 1], blue[:, 2] = checkerboard(2, 32, 32)[:, 0], checkerboard(2, 32, 32)[:, 0]
    assert high_frequency_energy(green).item() == pytest.approx(0.25 * 0.587**2, rel=1e-4)
    assert high_frequency_energy(blue).item() == pytest.approx(0.25 * 0.114**2, rel=1e-4)


def test_high_frequency_energy_does_not_depend_on_size():
    image = torch.rand(1, 3, 32, 48)
    energy = high_frequency_energy(image).item()
    assert high_frequency_energy(image.repeat(1, 1, 2, 3)).item() == pytest.approx(energy, rel=1e-4)
    # White noise of variance 1/12 in each channel: the share of the plane beyond 1/4 cycles and of the grid below it.
    share = 1 - math.pi / 16 + math.pi / 16 / 9
    assert high_frequency_energy(torch.rand(8, 3, 48, 48)).mean().item() == pytest.approx(
        share * (0.299**2 + 0.587**2 + 0.114**2) / 12, rel=0.05
    )
    # Sizes that are no multiples of 16 are cut.
    assert high_frequency_energy(checkerboard(16, 71, 83)).item() == pytest.approx(0.25, rel=1e-5)
    assert high_frequency_energy(checkerboard(2, 8, 8)).item() == pytest.approx(0.25, rel=1e-5)


def test_blur_lowers_high_frequency_energy():
    image = torch.rand(2, 3, 64, 64)
    assert (high_frequency_energy(blurred(image)) < 0.1 * high_frequency_energy(image)).all()


def test_diversity_is_the_rms_distance_of_what_remains_coarse():
    assert diversity(torch.rand(1, 3, 32, 32)) is None
    assert diversity(torch.rand(1, 3, 32, 32).expand(3, -1, -1, -1)) == 0
    black, grey, white = (torch.full((1, 3, 32, 32), value) for value in (0.0, 0.5, 1.0))
    assert diversity(torch.cat([black, white])) == pytest.approx(1)
    assert diversity(torch.cat([black, grey, white])) == pytest.approx((0.5 + 0.5 + 1) / 3)
    half = torch.cat([black[..., :16], white[..., :16]], -1)
    assert diversity(torch.cat([black, half])) == pytest.approx(math.sqrt(0.5))
    # Fine detail and noise are no diversity.
    assert diversity(torch.cat([checkerboard(2), 1 - checkerboard(2)])) == pytest.approx(0, abs=1e-6)
    assert diversity(0.5 + 0.1 * torch.randn(4, 3, 256, 256)) < 0.015


def test_videos_count_all_their_frames():
    frames = torch.cat([checkerboard(2), torch.full((1, 3, 64, 64), 0.5)])
    video = frames[None]
    assert saturated_share(video).tolist() == [0.5]
    assert high_frequency_energy(video).tolist() == pytest.approx([0.125], rel=1e-5)
    assert diversity(torch.stack([frames, torch.zeros_like(frames)])) == pytest.approx(0.5)
    # One moving and one still video of the same mean differ.
    assert diversity(torch.stack([torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])] * 2)) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_image_that_is_not_finite_spoils_only_itself(value: float):
    images = torch.rand(3, 3, 32, 32)
    images[1, 0, 5, 5] = value
    for statistic in (saturated_share, high_frequency_energy):
        found = statistic(images)
        assert found.isnan().tolist() == [False, True, False]
        assert torch.equal(found[::2], statistic(images[::2]))
    assert diversity(images) == diversity(images[::2])
    assert diversity(images[:2]) is None


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"expected images .* got shape \(3, 8, 8\)"):
        saturated_share(torch.rand(3, 8, 8))
    with pytest.raises(ValueError, match=r"got shape \(2, 8, 8, 3\)"):
        high_frequency_energy(torch.rand(2, 8, 8, 3))


# Velocities.


def test_velocity_norm_of_a_pipeline():
    pipe = tiny_sd3_pipeline(torch.float32)
    norms = []
    watch = pipe.transformer.register_forward_hook(
        lambda module, args, output: norms.append(output[0].square().mean().sqrt().item())
    )
    call = {"num_inference_steps": 3, "height": 8, "width": 8, "max_sequence_length": MAX_SEQUENCE_LENGTH}
    with VelocityMeter(pipe.transformer) as meter:
        pipe('the text "42"', output_type="latent", **call)
    assert len(norms) == 3 and meter.mean() == pytest.approx(sum(norms) / 3, rel=1e-6)
    watch.remove()
    assert not pipe.transformer._forward_hooks
    # The output class of diffusers, as `return_dict=True` gives it.
    inputs = {
        "hidden_states": torch.randn(2, 4, 4, 4),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([500.0, 500.0]),
    }
    with torch.no_grad(), VelocityMeter(pipe.transformer) as meter:
        output = pipe.transformer(**inputs, return_dict=True)
    assert meter.mean() == pytest.approx(output.sample.square().mean().sqrt().item(), rel=1e-6)


@dataclass
class Output:
    step: int
    velocity: torch.Tensor


class Echo(torch.nn.Module):
    def forward(self, output: object) -> object:
        if isinstance(output, Exception):
            raise output
        return output


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensor: (tensor,),
        lambda tensor: [[tensor, torch.full((3,), 100.0)]],
        lambda tensor: (torch.tensor([7]), None, {"sample": tensor}),
        lambda tensor: Output(3, tensor),
    ],
)
def test_velocity_norm_takes_the_first_floating_point_tensor(wrap: Callable[[torch.Tensor], object]):
    first, second = Echo(), Echo()
    with VelocityMeter(first, second) as meter:
        first(wrap(torch.tensor([3.0, -4.0])))
        second(wrap(torch.full((2,), 300.0, dtype=torch.float16)))
        second("nothing")
    assert meter.mean() == pytest.approx((math.sqrt(12.5) + 300) / 2)


def test_hooks_come_off_after_errors():
    module = Echo()
    with pytest.raises(KeyError), VelocityMeter(module) as meter:
        module(KeyError("no"))
    assert not module._forward_hooks
    module(torch.ones(2))
    with pytest.raises(RuntimeError, match="expected calls"):
        meter.mean()


# Alarms.

BASE = Measurement(0, None, (0.1,) * 8, (0.5,) * 8, 0.05, 0.002, 1.3, 0.1)


def names(alarms: list[Alarm]) -> list[str]:
    return [alarm.name for alarm in alarms]


def history(
    reward: Callable[[int], float],
    held_out: Callable[[int], float],
    evaluations: int,
    seed: int = 0,
    noise: float = 0.02,
    training: Callable[[int], float] | None = None,
) -> list[Measurement]:
    """Evaluations of 8 images, whose rewards vary by `noise` around functions of the evaluation."""
    rng = random.Random(seed)

    def around(value: float) -> tuple[float, ...]:
        return tuple(value + image / 10 + rng.gauss(0, noise) for image in range(8))

    return [
        replace(
            BASE,
            update=10 * place,
            training_rewards=None if place == 0 or training is None else training(place),
            reward=around(reward(place)),
            held_out=around(held_out(place)),
        )
        for place in range(evaluations)
    ]


def evaluated(measurements: list[Measurement]) -> list[Alarm]:
    guard = Guard()
    return [alarm for measurement in measurements for alarm in guard.evaluate(measurement)]


def test_held_out_falls_while_the_training_reward_rises():
    alarms = evaluated(history(lambda place: place, lambda place: place if place < 4 else 8 - place, 9, noise=1e-3))
    # Evaluation 6 is the first whose window, 4 to 6, falls throughout.
    assert names(alarms) == ["held-out-falls"] and alarms[0].update == 60
    message = alarms[0].message
    assert (
        "\n" not in message and "rose by 2 and" in message and "fell by 2 (" in message and "--select best" in message
    )


@pytest.mark.parametrize(
    "reward, held_out",
    [
        (lambda place: place, lambda place: place),
        (lambda place: -place, lambda place: -place),
        (lambda place: 0.0, lambda place: 0.0),
        # One bad evaluation.
        (lambda place: place, lambda place: -5.0 if place == 3 else place),
    ],
)
def test_healthy_rewards_raise_nothing(reward: Callable[[int], float], held_out: Callable[[int], float]):
    assert evaluated(history(reward, held_out, 9)) == []


def test_noise_seldom_raises_an_alarm():
    assert sum(bool(evaluated(history(lambda place: 0, lambda place: 0, 20, seed))) for seed in range(100)) <= 5


def test_one_bad_evaluation_in_noise_seldom_raises_an_alarm():
    def runs(held_out: Callable[[int], float]) -> int:
        return sum(bool(evaluated(history(lambda place: place, held_out, 8, seed))) for seed in range(50))

    # It does where noise happens to fall before it: half of the time, if any fall before would do.
    assert runs(lambda place: -float(place == 4)) < 17
    # A fall that goes on is found.
    assert runs(lambda place: -0.05 * max(place - 3, 0)) == 50


def test_one_image_that_falls_far_is_no_fall():
    measurements = history(lambda place: place, lambda place: 0, 9, noise=0)
    spoiled = [
        replace(measurement, held_out=(measurement.held_out[0] - 5 * place, *measurement.held_out[1:]))
        for place, measurement in enumerate(measurements)
    ]
    assert evaluated(spoiled) == []
    # The same fall shared by all images is one.
    shared = [
        replace(measurement, held_out=tuple(value - 5 * place / 8 for value in measurement.held_out))
        for place, measurement in enumerate(measurements)
    ]
    assert names(evaluated(shared)) == ["held-out-falls"]


def test_training_rewards_of_updates_come_before_those_of_images():
    def fall(place: int) -> float:
        return -place

    # Windows with the base have no mean of updates and go by the images.
    rises = history(lambda place: 0, fall, 6, noise=0, training=lambda place: place)
    assert [alarm.update for alarm in evaluated(rises)] == [30]
    sinks = history(lambda place: min(place, 1), fall, 6, noise=0, training=lambda place: -place)
    assert evaluated(sinks) == []


def test_what_is_not_comparable_raises_nothing():
    falls = history(lambda place: place, lambda place: -place, 6)
    assert names(evaluated(falls)) == ["held-out-falls"]
    assert evaluated([replace(measurement, held_out=None) for measurement in falls]) == []
    few = [replace(entry, reward=entry.reward[:3], held_out=entry.held_out[:3]) for entry in falls]
    assert evaluated(few) == []
    # Two evaluations of 8 images, then of 7: only these are compared.
    fewer = [replace(entry, reward=entry.reward[1:], held_out=entry.held_out[1:]) for entry in falls]
    assert evaluated([*falls[:2], *fewer[2:4]]) == []
    assert [alarm.update for alarm in evaluated([*falls[:2], *fewer[2:]])] == [40]


WRONG = {
    "saturated": {"saturated": 0.21},
    "high-frequency": {"high_frequency": 0.0061},
    "velocity-norm": {"velocity_norm": 1.96},
    "diversity": {"diversity": 0.049},
}
FINE = {
    "saturated": {"saturated": 0.19},
    "high-frequency": {"high_frequency": 0.0059},
    "velocity-norm": {"velocity_norm": 1.94},
    "diversity": {"diversity": 0.051},
}


@pytest.mark.parametrize("name", WRONG)
def test_each_statistic_is_held_against_the_base(name: str):
    guard = Guard()
    assert guard.evaluate(BASE) == []
    assert guard.evaluate(replace(BASE, update=10, **FINE[name])) == []
    (alarm,) = guard.evaluate(replace(BASE, update=20, **WRONG[name]))
    assert (alarm.name, alarm.update) == (name, 20) and "\n" not in alarm.message and "earlier" in alarm.message
    # Once, even if it ends and comes again.
    assert guard.evaluate(replace(BASE, update=30, **WRONG[name])) == []
    assert guard.evaluate(replace(BASE, update=40)) == []
    assert guard.evaluate(replace(BASE, update=50, **WRONG[name])) == []


@pytest.mark.parametrize(
    "base, later",
    [
        ({"saturated": 0.0}, {"saturated": 0.14}),
        ({"saturated": 0.72}, {"saturated": 0.83}),
        ({"saturated": 0.5}, {"saturated": 0.66}),
        ({"saturated": 1.0}, {"saturated": 1.0}),
        ({"saturated": 0.5}, {"saturated": 0.1}),
        ({"high_frequency": 0.0}, {"high_frequency": 0.0014}),
        ({"high_frequency": 0.002}, {"high_frequency": 0.0001}),
        ({"diversity": 0.008}, {"diversity": 0.0}),
        ({"diversity": None}, {"diversity": 0.1}),
        ({"diversity": 0.1}, {"diversity": None}),
        ({"diversity": 0.1}, {"diversity": 0.5}),
    ],
)
def test_bases_near_the_ends_leave_room(base: dict[str, float | None], later: dict[str, float | None]):
    guard = Guard()
    assert guard.evaluate(replace(BASE, **base)) == []
    assert guard.evaluate(replace(BASE, update=10, **{**base, **later})) == []


def test_bases_near_the_ends_still_raise_alarms():
    guard = Guard()
    guard.evaluate(replace(BASE, saturated=0.0, high_frequency=0.0))
    later = replace(BASE, update=10, saturated=0.16, high_frequency=0.0016, velocity_norm=0.86)
    assert names(guard.evaluate(later)) == ["saturated", "high-frequency", "velocity-norm"]
    guard = Guard()
    guard.evaluate(replace(BASE, saturated=0.72))
    assert names(guard.evaluate(replace(BASE, update=10, saturated=0.9))) == ["saturated"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_absent(value: float):
    blind = {"saturated": value, "high_frequency": value, "velocity_norm": value, "diversity": value}
    for measurements in ([replace(BASE, **blind), BASE], [BASE, replace(BASE, **blind)]):
        assert evaluated(measurements) == []
    # One image without rewards hides nothing of the others.
    falls = history(lambda place: place, lambda place: -place, 3)
    falls[1] = replace(falls[1], reward=(value, *falls[1].reward[1:]), held_out=(*falls[1].held_out[1:], value))
    falls[2] = replace(falls[2], training_rewards=value)
    assert names(evaluated(falls)) == ["held-out-falls"]
    guard = Guard()
    for update in range(20):
        assert guard.gradient(update, {3: value if update % 2 else 1.0}, value) == []
    json.dumps(guard.state_dict(), allow_nan=False)
    assert names(guard.gradient(20, {3: 11.0}, value)) == ["gradient-norm"]


# Gradient norms.


def usual(update: int, rng: random.Random) -> tuple[dict[int, float], float]:
    """Norms of four drawn steps of 25, ten times larger at the last step than at the first, and their total."""
    norms = {step: (1 + 9 * step / 24) * rng.lognormvariate(0, 0.5) for step in rng.sample(range(25), 4)}
    return norms, math.hypot(*norms.values())


def test_usual_gradients_raise_nothing():
    for seed in range(5):
        guard, rng = Guard(), random.Random(seed)
        for update in range(300):
            norms, total = usual(update, rng)
            # Now and then most rewards are clipped, or all.
            factor = (1.0, 1.0, 1.0, 0.1, 0.0)[update % 5]
            assert guard.gradient(update, {step: factor * norm for step, norm in norms.items()}, factor * total) == []


def test_a_gradient_that_explodes_raises_an_alarm_once():
    guard, rng = Guard(), random.Random(0)
    for update in range(60):
        assert guard.gradient(update, *usual(update, rng)) == []
    norms, total = usual(60, rng)
    (alarm,) = guard.gradient(60, {step: 40 * norm for step, norm in norms.items()}, 40 * total)
    assert (alarm.name, alarm.update) == ("gradient-norm", 60)
    assert "\n" not in alarm.message and "--learning_rate" in alarm.message
    assert guard.gradient(61, {3: 1e6}, 1e6) == []


def test_a_step_is_compared_with_its_neighbours():
    guard = Guard()
    for update in range(30):
        assert guard.gradient(update, {2: 1.0, 20: 50.0}, 50.0) == []
    # 31 is usual at step 20, and hides in the total.
    assert guard.gradient(30, {18: 31.0, 2: 1.0}, 50.0) == []
    # Nothing is known of step 10.
    assert guard.gradient(31, {10: 31.0, 2: 1.0}, 50.0) == []
    (alarm,) = guard.gradient(32, {4: 31.0, 20: 50.0}, 59.0)
    assert "at step 4 is 31, 31 times the median" in alarm.message


def test_the_total_is_compared_with_median_and_maximum():
    def alarms_after(totals: list[float], total: float) -> list[str]:
        guard = Guard()
        assert all(guard.gradient(update, {}, past) == [] for update, past in enumerate(totals))
        return names(guard.gradient(len(totals), {}, total))

    assert alarms_after([1.0] * 9, 100.0) == []  # too few
    assert alarms_after([1.0] * 10, 9.9) == []
    assert alarms_after([1.0] * 10, 10.1) == ["gradient-norm"]
    # One of 9 was among them, so 3 times that is the measure while it is among the last 50.
    assert alarms_after([9.0] + [1.0] * 49, 26.0) == []
    assert alarms_after([9.0] + [1.0] * 49, 28.0) == ["gradient-norm"]
    assert alarms_after([9.0] + [1.0] * 50, 26.0) == ["gradient-norm"]


# Resuming.


def events() -> list[Callable[[Guard], list[Alarm]]]:
    """A run in which everything goes wrong at some time."""
    measurements = history(lambda place: place, lambda place: 3 - abs(3 - place), 9, training=lambda place: place)
    for place, name in ((2, "diversity"), (4, "velocity-norm"), (6, "saturated"), (7, "high-frequency")):
        measurements[place] = replace(measurements[place], **WRONG[name])
    measurements[1] = replace(measurements[1], saturated=math.nan, reward=(math.nan, *measurements[1].reward[1:]))
    rng, run = random.Random(1), []
    for place, measurement in enumerate(measurements):
        run.append(lambda guard, measurement=measurement: guard.evaluate(measurement))
        for update in range(10 * place + 1, 10 * place + 11):
            norms, total = usual(update, rng)
            factor = 30 if update == 83 else math.nan if update % 10 == 7 else 1
            norms = {step: factor * norm for step, norm in norms.items()}
            run.append(lambda guard, now=(update, norms, factor * total): guard.gradient(*now))
    return run


def test_a_resumed_run_raises_what_an_uninterrupted_one_does():
    guard, alarms, states = Guard(), [], []
    for event in events():
        states.append((len(alarms), json.dumps(guard.state_dict(), allow_nan=False)))
        alarms += event(guard)
    assert sorted(names(alarms)) == sorted([*WRONG, "held-out-falls", "gradient-norm"])
    assert len(states) == 99
    for cut, (count, state) in enumerate(states):
        resumed = Guard()
        resumed.load_state_dict(json.loads(state))
        assert json.dumps(resumed.state_dict(), allow_nan=False) == state
        assert [alarm for event in events()[cut:] for alarm in event(resumed)] == alarms[count:]
        assert resumed.state_dict() == guard.state_dict()


def test_a_state_stays_as_it_was():
    guard = Guard()
    run = events()
    for event in run[:50]:
        event(guard)
    state = guard.state_dict()
    before = json.dumps(state)
    for event in run[50:]:
        event(guard)
    assert json.dumps(state) == before


# Real images.


@pytest.fixture(scope="module")
def drawn() -> list[torch.Tensor]:
    """Four prompts' images of the demo's base model, four seeds each, as the demo samples them; twice over."""
    pipe = StableDiffusion3Pipeline.from_pretrained(
        DEMO / "pipeline", text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    prompts = (DEMO / "prompts_eval.txt").read_text(encoding="utf-8").splitlines()[:4]
    call = {"num_inference_steps": 10, "guidance_scale": 2.0, "max_sequence_length": 1, "height": 48, "width": 48}
    noise = [torch.Generator().manual_seed(seed) for seed in range(32)]
    images = pipe([prompt for prompt in prompts for _ in range(8)], generator=noise, output_type="pt", **call).images
    return list(images.unflatten(0, (4, 8)))


def measured(update: int, by_prompt: list[torch.Tensor]) -> Measurement:
    """As a run measures: one tensor of images for each prompt."""
    joined = torch.cat(by_prompt)
    return replace(
        BASE,
        update=update,
        saturated=saturated_share(joined).mean().item(),
        high_frequency=high_frequency_energy(joined).mean().item(),
        diversity=sum(diversity(images) for images in by_prompt) / len(by_prompt),
    )


@pytest.mark.parametrize(
    "name, spoil",
    [
        (None, lambda images: images),
        (None, blurred),
        (None, lambda images: images + 0.02 * torch.randn(images.shape)),
        (None, lambda images: 0.3 + 0.6 * images),
        ("saturated", lambda images: images.mean(1, keepdim=True).lerp(images, 3.0)),
        ("high-frequency", lambda images: 0.1 + 0.8 * images + 0.08 * (2 * checkerboard(2, 48, 48) - 1)),
        ("high-frequency", lambda images: 0.1 + 0.8 * images + 0.08 * (2 * checkerboard(16, 48, 48) - 1)),
        ("diversity", lambda images: images[:1].lerp(images, 0.3)),
    ],
)
def test_spoiled_images_of_the_demo(
    drawn: list[torch.Tensor], name: str | None, spoil: Callable[[torch.Tensor], torch.Tensor]
):
    guard = Guard()
    guard.evaluate(measured(0, [images[:4] for images in drawn]))
    # Other seeds of the same model, which are spoiled.
    later = measured(10, [spoil(images[4:]).clamp(0, 1) for images in drawn])
    assert names(guard.evaluate(later)) == ([] if name is None else [name])
