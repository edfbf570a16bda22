# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The reward guard: measurements of evaluation images, and alarms about them.

A reward that is optimised too far is hacked: it keeps rising while the images get worse (Gao et al., 2022, "Scaling
laws for reward model overoptimization"). Backpropagated rewards are hacked within hundreds of updates: saturated
colours, grids, the same image for every seed (Clark et al., 2024, DRaFT; Prabhudesai et al., 2023, AlignProp). The
guard compares each evaluation, of fixed prompts and seeds, with the base model's.

The literature gives no thresholds. The constants below are our rules of thumb. They are set so that LoRAs of this
repository's demo that learned what they should raise no alarm, and images spoiled on purpose do. An alarm is a reason
to look at the images, not evidence of a failed run.
"""

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch

from ..host import float64_on_host, read

HIGH_FREQUENCY = 1 / 4  # cycles per pixel: details of 4 pixels and less, which are rare in photographs
GRID_PERIOD = 16  # pixels of a transformer's token (patch 2 x VAE 8), with which its grids repeat
COARSE = 16  # cells across over which diversity averages: composition and colour remain, noise does not

# Held-out reward: number of evaluations compared, and the standard errors by which it must fall over them. From each
# evaluation to the next, the training reward must also rise and the held-out reward fall, by an equal part of these
# errors (1). Pure noise then raises the alarm in 1 to 2 % of runs of 20 evaluations of 8 to 64 images (simulated);
# without this condition it does in 20 to 35 %. Standard errors of fewer than MIN_IMAGES images are meaningless; use 16
# or more.
WINDOW, FALL_ERRORS, MIN_IMAGES = 3, 2.0, 4
# Saturated share: its increase over the base model's, and the ratio of the odds share / (1 - share), because the share
# of graphics is near 1 and varies. In the demo it increases by 0.01 at most.
SATURATED_RISE, SATURATED_ODDS = 0.15, 2.0
# High-frequency energy relative to the base model's, or to the floor if that is larger. The floor is set so that the
# weakest pattern that raises the alarm, a checkerboard of +-0.04, is visible. Demo: 1.1 to 1.7; a photograph sharpened
# hard: 2.7.
HIGH_FREQUENCY_RATIO, HIGH_FREQUENCY_FLOOR = 3.0, 5e-4
# Velocity norm relative to the base model's, or the inverse. Demo: 1.08 at most.
VELOCITY_RATIO = 1.5
# Diversity relative to the base model's. A base model below the floor, less than 3 steps of 8 bits, has no diversity
# to lose. Demo: 0.56 to 0.94, and 0.49 where training gave 39 % of the images a wrong colour.
DIVERSITY_RATIO, DIVERSITY_FLOOR = 0.5, 0.01
# Gradient norm relative to the median of the last updates and to their maximum. The median alone is not enough: the
# terms drawn for one step differ much in weight, and clipped rewards leave small gradients. With the demo's gradients
# this gives less than one false alarm in 700 updates (simulated), with DRTune on 25 steps one in 160; with the median
# alone, one in 9.
GRADIENT_RATIO, GRADIENT_PEAK = 10.0, 3.0
# Number of last updates compared, and number of values below which nothing is compared.
GRADIENT_UPDATES, GRADIENT_VALUES = 50, 10
# A step's norm is compared with those of steps at most this far away. Active steps are drawn for each update, so a
# single step has few values; over the whole rollout, norms differ by an order of magnitude.
NEAR_STEPS = 2


# Images.


def _frames(images: torch.Tensor) -> torch.Tensor:
    """Images `(B, 3, H, W)` or videos `(B, F, 3, H, W)` as float32 `(B, F, 3, H, W)`, without a gradient.

    Raises:
        ValueError: the shape is a different one.
    """
    if images.ndim not in (4, 5) or images.shape[-3] != 3:
        raise ValueError(
            f"expected images (B, 3, H, W) or videos (B, F, 3, H, W), got shape {tuple(images.shape)}; move the "
            "channels before height and width"
        )
    return (images if images.ndim == 5 else images[:, None]).detach().float()


def saturated_share(images: torch.Tensor) -> torch.Tensor:
    """Share of channel values that are saturated: within half a step of 8 bits of 0 or 1.

    Args:
        images: `(B, 3, H, W)`, or videos `(B, F, 3, H, W)`, in [0, 1], of any floating dtype.

    Returns:
        `(B,)` float32 in [0, 1]; NaN for an image or video with a value that is not finite.

    Raises:
        ValueError: the shape is a different one.
    """
    frames = _frames(images).flatten(1)
    share = ((frames - 0.5).abs() >= 0.5 - 0.5 / 255).float().mean(1)
    return share.masked_fill(~frames.isfinite().all(1), math.nan)


def high_frequency_energy(images: torch.Tensor) -> torch.Tensor:
    """Energy per pixel that grids, checkerboards and noise have in the luminance, by FFT.

    It counts frequencies of `HIGH_FREQUENCY` cycles per pixel and above (checkerboards of the VAE, noise), and below
    them the multiples of 1 / `GRID_PERIOD` in both directions, where everything lies that repeats with the
    transformer's tokens. Of a natural image's other energy, a 256th lies there. A pattern of standard deviation s
    within these frequencies has energy s². Energy is a mean over pixels (Parseval), so it depends on content and not
    on resolution. Lines and columns beyond a multiple of `GRID_PERIOD` are left out, so that its frequencies are
    single bins. Images of up to 16 x 16 pixels have no other bins, so everything counts.

    Args:
        images: `(B, 3, H, W)`, or videos `(B, F, 3, H, W)` (the mean of their frames), in [0, 1], of any floating
            dtype.

    Returns:
        `(B,)` float32, at least 0; NaN for an image or video with a value that is not finite.

    Raises:
        ValueError: the shape is a different one.
    """
    frames = _frames(images)
    # ITU-R BT.601, as in Pillow's conversion to grey.
    grey = torch.einsum("bfchw,c->bfhw", frames, frames.new_tensor([0.299, 0.587, 0.114]))
    height, width = (size - size % GRID_PERIOD if size > GRID_PERIOD else size for size in grey.shape[-2:])
    grey = grey[..., :height, :width]
    grey = grey - grey.mean((-2, -1), keepdim=True)
    # norm="ortho" keeps the sum of squares, so the mean over bins is the mean over pixels.
    energy = torch.fft.fft2(grey, norm="ortho").abs().square()
    down = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    across = torch.fft.fftfreq(width, dtype=torch.float64)[None, :]
    high = down.square() + across.square() >= HIGH_FREQUENCY**2
    on_grid = [(frequency * GRID_PERIOD).frac().abs() < 1e-9 for frequency in (down, across)]
    counted = (high | (on_grid[0] & on_grid[1])).to(grey.device)
    found = (energy * counted).mean((1, 2, 3))
    return found.masked_fill(~frames.flatten(1).isfinite().all(1), math.nan)


def diversity(images: torch.Tensor) -> float | None:
    """How much images of one prompt from several seeds differ: the mean over pairs of their RMS distance.

    Args:
        images: `(B, 3, H, W)`, or videos `(B, F, 3, H, W)`, in [0, 1], of any floating dtype, each from its own seed.
            Each image (or frame) is first averaged over `COARSE` x `COARSE` cells.

    Returns:
        A number in [0, 1]; None for fewer than two finite images.

    Raises:
        ValueError: the shape is a different one.
    """
    frames = _frames(images)
    frames = frames[frames.flatten(1).isfinite().all(1)]
    if len(frames) < 2:
        return None
    coarse = float64_on_host(torch.nn.functional.adaptive_avg_pool2d(frames.flatten(0, 1), COARSE))
    coarse = coarse.reshape(len(frames), -1)
    return (torch.pdist(coarse) / math.sqrt(coarse.shape[1])).mean().item()


# Velocities.


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """The tensors in a module's output, in order; it may be nested sequences, dataclasses and mappings."""
    if isinstance(output, torch.Tensor):
        yield output
        return
    if is_dataclass(output) and not isinstance(output, Mapping):
        output = vars(output)
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    for part in parts:
        yield from _tensors(part)


class VelocityMeter:
    """RMS of the outputs of modules, over all calls inside a `with` block.

    Of each call, the first floating point tensor counts: for a transformer, the velocity.

        with VelocityMeter(pipe.transformer) as meter:
            pipe(prompts)
        meter.mean()
    """

    def __init__(self, *modules: torch.nn.Module) -> None:
        self._modules = modules
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._values: list[torch.Tensor] = []

    def _measure(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        velocity = next((tensor for tensor in _tensors(output) if tensor.is_floating_point()), None)
        if velocity is not None:
            # Left on its device, so that sampling does not wait for it.
            self._values.append(velocity.detach().float().square().mean().sqrt())

    def __enter__(self) -> "VelocityMeter":
        self._hooks = [module.register_forward_hook(self._measure) for module in self._modules]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def mean(self) -> float:
        """Mean over calls; NaN or infinite if an output is.

        Raises:
            RuntimeError: the modules were not called, or returned no floating point tensor.
        """
        if not self._values:
            raise RuntimeError("VelocityMeter: expected calls of its modules inside the block, got none; sample there")
        return statistics.fmean(read(self._values))


# Alarms.


@dataclass(frozen=True)
class Measurement:
    """Results of one evaluation. Values that are not finite count as absent.

    Attributes:
        update: number of updates done; 0 is the base model.
        training_rewards: mean reward of the training updates since the last evaluation; None at the first.
        reward: training reward of each evaluation image.
        held_out: held-out reward of the same images, in the same order; None without such a reward.
        saturated: mean `saturated_share`.
        high_frequency: mean `high_frequency_energy`.
        velocity_norm: `VelocityMeter.mean`.
        diversity: mean `diversity` of the prompts; None with one image of each.
    """

    update: int
    training_rewards: float | None
    reward: tuple[float, ...]
    held_out: tuple[float, ...] | None
    saturated: float
    high_frequency: float
    velocity_norm: float
    diversity: float | None


@dataclass(frozen=True)
class Alarm:
    """An alarm.

    Attributes:
        name: what it is about, see `Guard`.
        update: number of updates done when it was raised.
        message: one line: what was found, what it was compared with, and what to do.
    """

    name: str
    update: int
    message: str


class Guard:
    """Raises alarms about evaluations and gradient norms, each at most once in a run.

    Later measurements are compared with the first one, which is the base model's. The alarms are `held-out-falls`,
    `saturated`, `high-frequency`, `velocity-norm`, `diversity` and `gradient-norm`. The module's constants are the
    thresholds.
    """

    def __init__(self) -> None:
        # JSON values only. Lists are replaced and never changed in place, so that state_dict need not copy them.
        self._base: dict[str, float | None] | None = None
        self._window: list[list[Any]] = []  # of the last evaluations: [training_rewards, reward, held_out]
        self._norms: list[list[Any]] = []  # of the last updates: [total, [[step, norm], ...]]
        self._raised: list[str] = []

    def evaluate(self, measurement: Measurement) -> list[Alarm]:
        """The alarms that an evaluation raises, without those that were raised before."""
        reward, held_out = measurement.reward, measurement.held_out
        held_out = None if held_out is None else [_finite(value) for value in held_out]
        entry = [_finite(measurement.training_rewards), [_finite(value) for value in reward], held_out]
        # Images are compared one by one, so a resumed run with other evaluation prompts begins a new window.
        same = [old for old in self._window if len(old[1]) == len(reward)]
        self._window = [*same, entry][-WINDOW:]
        now = {
            "saturated": _finite(measurement.saturated),
            "high-frequency": _finite(measurement.high_frequency),
            "velocity-norm": _finite(measurement.velocity_norm),
            "diversity": _finite(measurement.diversity),
        }
        if self._base is None:
            self._base = now
        found = {"held-out-falls": _held_out_falls(self._window)}
        for name, value in now.items():
            base = self._base[name]
            found[name] = None if value is None or base is None else _against_base(name, value, base)
        return self._new(measurement.update, found)

    def gradient(self, update: int, norms: Mapping[int, float], total: float) -> list[Alarm]:
        """The alarm that an update's gradient norms, before clipping, raise if it was not raised before.

        The total is compared with those of the last `GRADIENT_UPDATES` updates, a step's norm with their norms at
        steps at most `NEAR_STEPS` away. Norms that are 0 (all rewards clipped) or not finite are ignored.

        Args:
            update: number of the update.
            norms: active step -> norm of its part of the gradient.
            total: norm of the whole gradient.
        """
        totals = [past for past, _ in self._norms if past is not None]
        compared = [("", total, totals)]
        for step, norm in norms.items():
            near = [past for _, old in self._norms for other, past in old if abs(other - step) <= NEAR_STEPS]
            compared.append((f" at step {step}", norm, near))
        usable = [(where, norm, past) for where, norm, past in compared if 0 < norm < math.inf]
        messages = [_gradient_norm(where, norm, past) for where, norm, past in usable if len(past) >= GRADIENT_VALUES]
        if usable:
            kept = [[int(step), float(norm)] for step, norm in norms.items() if 0 < norm < math.inf]
            entry = [float(total) if 0 < total < math.inf else None, kept]
            self._norms = [*self._norms, entry][-GRADIENT_UPDATES:]
        return self._new(update, {"gradient-norm": next((found for found in messages if found), None)})

    def _new(self, update: int, found: Mapping[str, str | None]) -> list[Alarm]:
        alarms = [Alarm(name, update, text) for name, text in found.items() if text and name not in self._raised]
        self._raised = [*self._raised, *(alarm.name for alarm in alarms)]
        return alarms

    def state_dict(self) -> dict[str, Any]:
        """All that later alarms depend on, as JSON values without NaNs, which survive a round trip exactly."""
        return {"base": self._base, "window": self._window, "norms": self._norms, "raised": self._raised}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._base, self._window = state["base"], state["window"]
        self._norms, self._raised = state["norms"], state["raised"]


# Messages of the alarms; None without an alarm.


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _changes(old: Sequence[float | None], new: Sequence[float | None]) -> list[float]:
    return [b - a for a, b in zip(old, new, strict=True) if a is not None and b is not None]


def _held_out_falls(window: Sequence[Sequence[Any]]) -> str | None:
    if len(window) < WINDOW or any(held_out is None for _, _, held_out in window):
        return None
    # From each evaluation to the next, and finally over the whole window.
    pairs = [*itertools.pairwise(window), (window[0], window[-1])]
    falls = [_changes(old[2], new[2]) for old, new in pairs]
    if any(rewards is None for rewards, _, _ in window):
        rises = [_changes(old[1], new[1]) for old, new in pairs]
    else:
        rises = [_changes(old[:1], new[:1]) for old, new in pairs]
    if min(map(len, falls)) < MIN_IMAGES or not all(rises):
        return None
    errors = [statistics.stdev(part) / math.sqrt(len(part)) for part in falls]
    needed = [FALL_ERRORS / (WINDOW - 1)] * (WINDOW - 1) + [FALL_ERRORS]
    falling = all(-statistics.fmean(part) > k * error for part, k, error in zip(falls, needed, errors, strict=True))
    if not falling or min(map(statistics.fmean, rises)) <= 0:
        return None
    rise, fall, error = statistics.fmean(rises[-1]), -statistics.fmean(falls[-1]), errors[-1]
    return (
        f"over the last {WINDOW} evaluations the training reward rose by {rise:.3g} and the held-out reward of the "
        f"same images fell by {fall:.3g} (standard error {error:.2g}): the reward is being hacked; take best/ "
        "(--select best), or train with a lower --learning_rate, with --reward_clip, with --velocity_anchor or with "
        "several rewards"
    )


def _against_base(name: str, value: float, base: float) -> str | None:
    if name == "saturated":
        odds = value * (1 - base) > SATURATED_ODDS * base * (1 - value)
        wrong = odds and value > base + SATURATED_RISE
        text = (
            f"{value:.0%} of the images' values are saturated, {base:.0%} of the base model's: colours are burnt out"
        )
    elif name == "high-frequency":
        wrong = value > HIGH_FREQUENCY_RATIO * max(base, HIGH_FREQUENCY_FLOOR)
        text = f"the images' energy in fine detail and grids is {value:.2g}, the base model's {base:.2g}"
    elif name == "velocity-norm":
        wrong = not base / VELOCITY_RATIO <= value <= base * VELOCITY_RATIO
        text = f"the transformer's RMS is {value:.3g}, the base model's {base:.3g}: its outputs change in scale"
    else:
        wrong = base >= DIVERSITY_FLOOR and value < DIVERSITY_RATIO * base
        text = f"images of a prompt from several seeds differ by {value:.2g}, the base model's by {base:.2g}"
    remedy = (
        "look at them, take an earlier checkpoint, or train with a lower --learning_rate or with --velocity_anchor"
    )
    return f"{text}; {remedy}" if wrong else None


def _gradient_norm(where: str, norm: float, past: Sequence[float]) -> str | None:
    median = statistics.median(past)
    if norm <= GRADIENT_RATIO * median or norm <= GRADIENT_PEAK * max(past):
        return None
    return (
        f"the gradient's norm{where} is {norm:.3g}, {norm / median:.0f} times the median of the last "
        f"{GRADIENT_UPDATES} updates: if it returns, lower --learning_rate or --max_grad_norm"
    )
