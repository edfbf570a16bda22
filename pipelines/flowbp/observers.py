# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What looks on while a sweep differentiates: the velocity anchor, and the norms of each step's gradient."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.utils.hooks import RemovableHandle

from . import checks
from .host import widened
from .replayed import Replayed
from .samples import take
from .state import is_sharded, observable_parts, parts_of, trained_adapters, trained_parameters


class VelocityAnchor:
    """A penalty that keeps the active steps' outputs near those of the model without what is trained.

    Args:
        name: the pipeline's class, for messages.
        beta: factor of the penalty, above 0 (see `FlowBPCallback`).
        gradient_scale: factor on its gradients, not on its value.
        transformers: trained ones.

    Attributes:
        value: the penalty with its factor, so far.

    Raises:
        ValueError: where switching adapters off does not take away everything that is trained.
    """

    def __init__(self, name: str, beta: float, gradient_scale: float, transformers: Sequence[torch.nn.Module]) -> None:
        self.beta = beta
        self.gradient_scale = gradient_scale
        self.value: torch.Tensor | float = 0.0
        for module in transformers:
            if trained_parameters(module):
                checks.check_anchor(name, module, removable_parameters(module))

    def add_to(self, cotangents: dict[int, torch.Tensor], replayed: Replayed) -> None:
        """Add the penalty's cotangents to those of a replay's outputs, and its value to `value`."""
        trained = replayed.call.module
        if not cotangents or not trained_parameters(trained):
            return
        with torch.no_grad(), adapters_off(trained):
            base = replayed.forward()
        gaps = {index: replayed.mask(widened(replayed.outputs[index]) - widened(base[index])) for index in cotangents}
        kept = None if replayed.call.is_list else replayed.kept
        size = sum(take(gap, kept).numel() for gap in gaps.values())
        self.value = self.value + self.beta * sum(gap.square().sum() for gap in gaps.values()) / size
        for index, gap in gaps.items():
            gradient = self.gradient_scale * self.beta * 2 / size * gap
            cotangents[index] = cotangents[index] + gradient.to(cotangents[index].dtype)


def removable_parameters(module: torch.nn.Module) -> set[int]:
    """Ids of the parameters that `adapters_off` takes out of a model's computation."""
    removable: set[int] = set()
    for part in parts_of(module):
        if isinstance(part, BaseTunerLayer):
            of_base = set(map(id, part.get_base_layer().parameters()))
            removable |= set(map(id, part.parameters())) - of_base
        elif isinstance(part, AuxiliaryTrainingWrapper):
            removable |= set(map(id, part.parameters())) - set(map(id, part.original_module.parameters()))
    return removable


@contextmanager
def adapters_off(module: torch.nn.Module) -> Iterator[None]:
    """Leave the trained adapters of a model out, whichever are active; frozen ones stay as they are."""
    adapters = [part for part in parts_of(module) if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [(adapter._disable_adapters, adapter._active_adapter) for adapter in adapters]
    try:
        for adapter in adapters:
            # Not set_adapter() or enable_adapters(), which set requires_grad too, on which DDP and FSDP2 rely.
            kept = [each for each in adapter.active_adapters if each not in trained_adapters(adapter)]
            adapter._active_adapter = kept
            adapter._disable_adapters = adapter._disable_adapters or not kept
        yield
    finally:
        for adapter, (was_disabled, was_active) in zip(adapters, before, strict=True):
            adapter._disable_adapters, adapter._active_adapter = was_disabled, was_active


class GradientNorms:
    """Norms of what each step sends to the parameters, found by hooks on them: `.grad` holds the sum over all steps.

    Args:
        modules: transformers.
        gradient_scale: factor that the gradients have and the norms shall not have.

    Attributes:
        found: `{step: norm}`, scalars on the device.
    """

    def __init__(self, modules: Sequence[torch.nn.Module], gradient_scale: float) -> None:
        self.modules = modules
        self.gradient_scale = gradient_scale
        self.found: dict[int, torch.Tensor] = {}
        self._step: int | None = None
        self._sums: dict[int, torch.Tensor] = {}

    @contextmanager
    def of(self, step: int) -> Iterator[None]:
        """Measure the replays of this block. Blocks of one step in a row (DRaFT-LV's copies) add up."""
        if step != self._step:
            self._step, self._sums = step, {}
        hooks: dict[int, RemovableHandle] = {}

        def place(part: torch.nn.Module, *_: object) -> None:
            for parameter in part.parameters(recurse=False):
                if parameter.requires_grad and torch.is_grad_enabled() and id(parameter) not in hooks:
                    hooks[id(parameter)] = parameter.register_hook(functools.partial(self._add, id(parameter)))

        handles = []
        for module in self.modules:
            if is_sharded(module):
                # The whole parameters of FSDP2 are there only while a part is called.
                handles += [part.register_forward_pre_hook(place) for _, part in observable_parts(module)]
            else:
                for part in parts_of(module):
                    place(part)
        try:
            yield
        finally:
            for handle in (*handles, *hooks.values()):
                handle.remove()
        if self._sums:
            norms = [torch.linalg.vector_norm(widened(each)) for each in self._sums.values()]
            norm = torch.linalg.vector_norm(torch.stack([each.to(norms[0].device) for each in norms]))
            self.found[step] = norm / self.gradient_scale

    def _add(self, number: int, gradient: torch.Tensor) -> None:
        known = self._sums.get(number)
        self._sums[number] = gradient.detach() if known is None else known + gradient
