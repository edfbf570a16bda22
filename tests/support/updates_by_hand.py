# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Updates without rollouts: gradients, and what a backward reports, are set by hand."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from flowbp.outputs import BackwardOutput
from flowbp.training import Backbone, TrainingConfig
from flowbp.training.checkpoints import save_tensors
from flowbp.training.lora import add_lora
from flowbp.training.prompts import Record
from flowbp.training.setup import make_accelerator
from flowbp.training.state import Step, TrainingState
from flowbp.training.trained import LoraWeights

STEPS = 6
RECORDS = [Record(f"prompt {number}") for number in range(5)]


class Plain(Backbone):
    """What a config needs to be settled."""

    name = "sd3"
    defaults = {"lora_layers": "attn.to_q", "output_dir": Path("run"), "guidance_scale": 3.5}


def make_config(output_dir: Path, **values: Any) -> TrainingConfig:
    """A settled config of a run that only its folder sees."""
    required = {"pretrained_model_name_or_path": "m", "prompts": "p.txt", "reward": "toy_reward:make_reward"}
    values = {"report_to": "none", "validation_steps": 1000, **values}
    return TrainingConfig(**required, output_dir=output_dir, **values).settle(Plain)


def make_state(transformer: torch.nn.Module, config: TrainingConfig) -> TrainingState:
    """The state of a run that has not begun, of a copy of a transformer."""
    transformer = copy.deepcopy(transformer).requires_grad_(False)
    add_lora(transformer, config)
    return TrainingState(config, make_accelerator(config), LoraWeights(transformer, save_snapshot), RECORDS)


def save_snapshot(folder: Path, snapshot: Mapping[str, torch.Tensor]) -> None:
    """A LoRA's file in a checkpoint."""
    save_tensors(folder / "saved.safetensors", snapshot)


def backward_output(reward: float = 0.5, loss: float = -0.5) -> BackwardOutput:
    """What a backward of two samples reports."""
    one = torch.ones(())
    rewards = torch.tensor([reward, 0.25])
    return BackwardOutput(rewards, loss * one, torch.ones(2), {STEPS: 0.1 * one.view(1)}, 0 * one, {4: one})


def do_update(state: TrainingState, gradient: float, **values: float) -> Step:
    """Step with `gradient` as the mean gradient of every parameter over the micro-batches."""
    outs = []
    for _ in range(state.config.gradient_accumulation_steps):
        next(state.sampler)
        for parameter in state.parameters:
            added = torch.full_like(parameter, gradient * state.gradient_scale)
            parameter.grad = added if parameter.grad is None else parameter.grad + added
        outs.append(backward_output(**values))
    return state.step(outs)


def lora_of_state(state: TrainingState) -> list[torch.Tensor]:
    """Copies of the trained parameters."""
    return [parameter.detach().clone() for parameter in state.parameters]


def is_same(left: Any, right: Any) -> bool:
    """Equal bit for bit, down to the tensors."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, list):
        return len(left) == len(right) and all(is_same(*pair) for pair in zip(left, right, strict=True))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(is_same(left[key], right[key]) for key in left)
    return left == right


StateFactory = Callable[..., TrainingState]
