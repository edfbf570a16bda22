# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The reward guard: numbers of evaluation pictures, and the alarms that they raise.

A reward that is followed too far is hacked: it goes on rising while pictures get worse (Gao et al., 2022, "Scaling
laws for reward model overoptimization"). Backpropagated rewards do it within hundreds of updates: saturated colours,
grids, one picture for every seed (Clark et al., 2024, DRaFT; Prabhudesai et al., 2023, AlignProp). The guard compares
each evaluation, of fixed prompts and seeds, with the base model's.

The literature gives no thresholds. The constants below are ours: rules of thumb, set so that LoRAs which learned what
they should on this repository's demo stay below them and pictures spoiled on purpose do not. An alarm asks for a look
at the pictures; it proves nothing.
"""

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch

from ..host import float64_on_host, read

HIGH_FREQUENCY = 1 / 4  # cycles per pixel: details of 4 pixels and less, of which photographs have little
GRID_PERIOD = 16  # pixels that a token of the usual transformer covers (patch 2 x VAE 8): its grids repeat with them
COARSE = 16  # cells across, of which diversity takes the means: they keep composition and colour, not noise

# Held-out reward: how many evaluations are compared, and standard errors that it must fall by over them. The two
# rewards must also part from each evaluation to the next, the held-out one by an equal part of these errors (1). So
# pure noise raises the alarm in 1 to 2 % of runs of 20 evaluations of 8 to 64 pictures (simulated); 2 errors alone
# would in 20 to 35 %. Fewer pictures than MIN_PICTURES have no standard error worth the name; 16 or more are better.
WINDOW, FALL_ERRORS, MIN_PICTURES = 3, 2.0, 4
# Saturated share: its rise over the base's, and the factor on its odds share / (1 - share), with which graphics that
# have a share near 1 can vary. Demo: +0.01 at most.
SATURATED_RISE, SATURATED_ODDS = 0.15, 2.0
# High-frequency energy over the base's, which counts as the floor at least: the least that can raise the alarm is a
# checkerboard of +-0.04, which one sees. Demo: 1.1 to 1.7 times; a photograph sharpened hard: 2.7 times.
HIGH_FREQUENCY_RATIO, HIGH_FREQUENCY_FLOOR = 3.0, 5e-4
# Velocity norm over the base's, or the base's over it. Demo: 1.08 at most.
VELOCITY_RATIO = 1.5
# Diversity over the base's; a base below the floor, under 3 steps of 8 bits, has none to lose. Demo: 0.56 to 0.94, and
# 0.49 where training gave 39 % of the pictures a wrong colour.
DIVERSITY_RATIO, DIVERSITY_FLOOR = 0.5, 0.01
# A gradient norm must exceed the median of the last updates and their maximum by these factors. The median alone is
# not enough: terms of very different weight are drawn for one step, and clipped rewards leave small gradients.
# Simulated with the demo's gradients, that is less than one false alarm in 700 updates; with DRTune on 25 steps, one
# in 160 (by the median alone, one in 9).
GRADIENT_RATIO, GRADIENT_PEAK = 10.0, 3.0
# Updates that are looked back on, and values without which nothing is compared.
GRADIENT_UPDATES, GRADIENT_VALUES = 50, 10
# A step's norm is compared with those of steps this near: the active ones are drawn for each update, so a step has few
# values of its own, and over a whole rollout norms differ by an order of magnitude.
NEAR_STEPS = 2


# Pictures.


def _frames(images: torch.Tensor) -> torch.Tensor:
    """Pictures `(B, 3, H, W)` or videos `(B, F, 3, H, W)` as float32 `(B, F, 3, H, W)`.

    Raises:
        ValueError: any other shape.
    """
    if images.ndim not in (4, 5) or images.shape[-3] != 3:
        raise ValueError(f"expected pictures (B, 3, H, W) or videos (B, F, 3, H, W), got shape {tuple(images.shape)}")
    return (images if images.ndim == 5 else images[:, None]).detach().float()


def saturated_share(images: torch.Tensor) -> torch.Tensor:
    """Share of channel values that are black or full: within half a step of 8 bits of 0 or 1.

    Args:
        images: `(B, 3, H, W)`, or videos `(B, F, 3, H, W)`, in [0, 1], any floating dtype.

    Returns:
        `(B,)` float32 in [0, 1]; NaN for a picture or video that is not finite.
    """
    frames = _frames(images).flatten(1)
    share = ((frames - 0.5).abs() >= 0.5 - 0.5 / 255).float().mean(1)
    return share.masked_fill(~frames.isfinite().all(1), math.nan)


def high_frequency_energy(images: torch.Tensor) -> torch.Tensor:
    """Energy per pixel of the luminance in what grids and checkerboards draw, by FFT.

    Counted are frequencies of `HIGH_FREQUENCY` cycles per pixel and more (checkerboards of the VAE, noise), and
    below it multiples of 1 / `GRID_PERIOD` in both directions, where everything lies that repeats with the
    transformer's tokens; a natural picture has a 256th of its other energy there. A pattern of standard deviation s
    within these has s². Energy is a mean over pixels (Parseval), so it depends on content and not on resolution;
    rows and columns beyond a multiple of `GRID_PERIOD` are left out, so that its frequencies fall into single bins.
    (Up to 16 x 16 pixels have no other bins, and everything counts.)

    Args:
        images: `(B, 3, H, W)`, or videos `(B, F, 3, H, W)` (the mean of their frames), in [0, 1].

    Returns:
        `(B,)` float32, at least 0; NaN for a picture or video that is not finite.
    """
    frames = _frames(images)
    # ITU-R BT.601, as Pillow's conversion to grey.
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
    """How much pictures of one prompt from several seeds differ: mean over pairs of their RMS distance.

    Args:
        images: `(B, 3, H, W)`, or videos `(B, F, 3, H, W)`, in [0, 1], each from its own seed. Each picture (frame)
            is averaged over `COARSE` x `COARSE` cells first.

    Returns:
        A number in [0, 1]; None for fewer than two finite pictures.
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
    """The tensors of a module's output, in order: of sequences, mappings (diffusers' outputs are) and dataclasses."""
    if isinstance(output, torch.Tensor):
        yield output
        return
    if is_dataclass(output) and not isinstance(output, Mapping):
        output = vars(output)
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    for part in parts:
        yield from _tensors(part)


class VelocityMeter:
    """RMS of what modules return, over all calls inside a `with` block.

    Of each call the first floating point tensor counts: the velocity, for a transformer.

        with VelocityMeter(pipe.transformer) as meter:
            pipe(prompts)
        meter.mean()
    """

    def __init__(self, *modules: torch.nn.Module) -> None:
        """Raises ValueError without modules, TypeError for anything but modules."""
        if not modules:
            raise ValueError("VelocityMeter: expected at least one module, got none; pass the pipeline's transformer")
        for module in modules:
            if not isinstance(module, torch.nn.Module):
                raise TypeError(f"VelocityMeter: expected a torch.nn.Module, got {type(module).__name__}; pass one")
        self._modules = modules
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._values: list[torch.Tensor] = []

    def _measure(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        velocity = next((tensor for tensor in _tensors(output) if tensor.is_floating_point()), None)
        if velocity is not None:
            # Stays on its device, so that sampling does not wait for it.
            self._values.append(velocity.detach().float().square().mean().sqrt())

    def __enter__(self) -> "VelocityMeter":
        self._hooks = [module.register_forward_hook(self._measure) for module in self._modules]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def mean(self) -> float:
        """Mean over calls; NaN or infinite if an output was.

        Raises:
            RuntimeError: no module returned a floating point tensor.
        """
        if not self._values:
            raise RuntimeError("VelocityMeter: expected calls of its modules inside the block, got none; sample there")
        return statistics.fmean(read(self._values))


# Alarms.


@dataclass(frozen=True)
class Measurement:
    """What one evaluation found. A value that is not finite is as good as absent.

    Attributes:
        update: updates done; 0 is the base model.
        training_rewards: mean reward of the training updates since the last evaluation; None at the first.
        reward: the training reward of each evaluation picture.
        held_out: the held-out reward of the same pictures, in the same order; None without such a reward.
        saturated: mean `saturated_share`.
        high_frequency: mean `high_frequency_energy`.
        velocity_norm: `VelocityMeter.mean`.
        diversity: mean of the prompts' `diversity`; None with one picture for each.
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
    """Name, update at which it was raised, and one line: what was found, against what, and what to do."""

    name: str
    update: int
    message: str


class Guard:
    """Turns evaluations and gradient norms into alarms; each name is raised once in a run.

    The first measurement is the base that later ones are compared with. Names: `held-out-falls`, `saturated`,
    `high-frequency`, `velocity-norm`, `diversity`, `gradient-norm`. The module's constants are the thresholds.
    """

    def __init__(self) -> None:
        # Only JSON values, and lists that are replaced, never changed: what state_dict returned stays as it was.
        self._base: dict[str, float | None] | None = None
        self._window: list[list[Any]] = []  # of the last evaluations: [training_rewards, reward, held_out]
        self._norms: list[list[Any]] = []  # of the last updates: [total, [[step, norm], ...]]
        self._raised: list[str] = []

    def evaluate(self, measurement: Measurement) -> list[Alarm]:
        """The alarms that an evaluation raises and no earlier one has.

        Raises:
            ValueError: rewards and held-out rewards of different numbers of pictures.
        """
        reward, held_out = measurement.reward, measurement.held_out
        if held_out is not None and len(held_out) != len(reward):
            raise ValueError(
                f"Measurement: expected a held-out reward for each of {len(reward)} pictures, got {len(held_out)}; "
                "score the same pictures with both rewards"
            )
        held_out = None if held_out is None else [_finite(value) for value in held_out]
        entry = [_finite(measurement.training_rewards), [_finite(value) for value in reward], held_out]
        # A picture can be compared with itself only: a resumed run with other evaluation prompts begins a new window.
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
        """The alarm that an update's gradient norms, before clipping, raise if none has.

        The total is compared with the totals of the last `GRADIENT_UPDATES` updates, a step's norm with their norms
        at steps at most `NEAR_STEPS` away. Norms that are 0 (all rewards clipped) or not finite are ignored.

        Args:
            update: its number.
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
        """All that later alarms depend on, as JSON values without NaN, which JSON returns exactly."""
        return {"base": self._base, "window": self._window, "norms": self._norms, "raised": self._raised}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ValueError: not a guard's state.
        """
        expected, got = sorted(self.state_dict()), sorted(state)
        if got != expected:
            raise ValueError(f"Guard: expected a state of {expected}, got {got}; pass what state_dict returned")
        self._base, self._window = state["base"], state["window"]
        self._norms, self._raised = state["norms"], state["raised"]


# What the alarms say; None where there is none.


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _changes(old: Sequence[float | None], new: Sequence[float | None]) -> list[float]:
    return [b - a for a, b in zip(old, new, strict=True) if a is not None and b is not None]


def _held_out_falls(window: Sequence[Sequence[Any]]) -> str | None:
    if len(window) < WINDOW or any(held_out is None for _, _, held_out in window):
        return None
    # From each evaluation to the next, and last over the window.
    pairs = [*itertools.pairwise(window), (window[0], window[-1])]
    falls = [_changes(old[2], new[2]) for old, new in pairs]
    if any(rewards is None for rewards, _, _ in window):
        rises = [_changes(old[1], new[1]) for old, new in pairs]
    else:
        rises = [_changes(old[:1], new[:1]) for old, new in pairs]
    if min(map(len, falls)) < MIN_PICTURES or not all(rises):
        return None
    errors = [statistics.stdev(part) / math.sqrt(len(part)) for part in falls]
    needed = [FALL_ERRORS / (WINDOW - 1)] * (WINDOW - 1) + [FALL_ERRORS]
    falling = all(-statistics.fmean(part) > k * error for part, k, error in zip(falls, needed, errors, strict=True))
    if not falling or min(map(statistics.fmean, rises)) <= 0:
        return None
    rise, fall, error = statistics.fmean(rises[-1]), -statistics.fmean(falls[-1]), errors[-1]
    return (
        f"over the last {WINDOW} evaluations the training reward rose by {rise:.3g} and the held-out reward of the "
        f"same pictures fell by {fall:.3g} (standard error {error:.2g}): the reward is being hacked; take best/ "
        "(--select best), or train with a lower --learning_rate, with --reward_clip, with --velocity_anchor or with "
        "several rewards"
    )


def _against_base(name: str, value: float, base: float) -> str | None:
    if name == "saturated":
        odds = value * (1 - base) > SATURATED_ODDS * base * (1 - value)
        wrong = odds and value > base + SATURATED_RISE
        text = (
            f"{value:.0%} of the pictures' values are black or full, {base:.0%} of the base model's: colours burn out"
        )
    elif name == "high-frequency":
        wrong = value > HIGH_FREQUENCY_RATIO * max(base, HIGH_FREQUENCY_FLOOR)
        text = f"the pictures' energy in fine detail and grids is {value:.2g}, the base model's {base:.2g}"
    elif name == "velocity-norm":
        wrong = not base / VELOCITY_RATIO <= value <= base * VELOCITY_RATIO
        text = f"the velocity's RMS is {value:.3g}, the base model's {base:.3g}: the model leaves what it learned"
    else:
        wrong = base >= DIVERSITY_FLOOR and value < DIVERSITY_RATIO * base
        text = f"a prompt's pictures from several seeds differ by {value:.2g}, the base model's by {base:.2g}"
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
