# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What the optimizer is given at every update of a training script, seen from outside of the script."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook


@dataclasses.dataclass
class Update:
    """What there is when the optimizer makes a step.

    Attributes:
        optimizer: it keeps its state after the update.
        parameters: what it trains.
        gradients: copies of their gradients.
        model: the loaded model whose parameters are trained.
    """

    optimizer: Optimizer
    parameters: list[torch.Tensor]
    gradients: list[torch.Tensor]
    model: ModelMixin


@contextmanager
def watch_updates() -> Iterator[list[Update]]:
    """A list that training inside this block fills, one entry a step of the optimizer."""
    updates: list[Update] = []
    models: list[ModelMixin] = []
    from_pretrained = ModelMixin.from_pretrained.__func__

    def load(model_class: type[ModelMixin], *args: Any, **kwargs: Any) -> ModelMixin:
        models.append(from_pretrained(model_class, *args, **kwargs))
        return models[-1]

    def note(optimizer: Optimizer, *_: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        (model,) = (model for model in models if any(each is parameters[0] for each in model.parameters()))
        updates.append(Update(optimizer, parameters, [each.grad.clone() for each in parameters], model))

    hook = register_optimizer_step_pre_hook(note)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelMixin, "from_pretrained", classmethod(load))
        try:
            yield updates
        finally:
            hook.remove()


def check_float32_over_bfloat16(update: Update) -> None:
    """LoRA, its gradients and the optimizer's state are float32, everything frozen is bfloat16."""
    trained = {id(parameter) for parameter in update.parameters}
    frozen = [parameter for parameter in update.model.parameters() if id(parameter) not in trained]
    assert frozen and all(parameter.dtype == torch.bfloat16 for parameter in frozen)
    states = [update.optimizer.state[parameter].values() for parameter in update.parameters]
    moments = [value for state in states for value in state if value.ndim]
    assert len(moments) == 2 * len(update.parameters)
    assert any(gradient.abs().max() > 0 for gradient in update.gradients)
    for tensor in (*update.parameters, *update.gradients, *moments):
        assert tensor.dtype == torch.float32
    # Nothing on the way rounded them either.
    assert any(not torch.equal(parameter, parameter.bfloat16().float()) for parameter in update.parameters)
