# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Sending gradients back through the pipeline's own code of one step."""

from collections.abc import Callable, Mapping

import torch

from .graph import leaves_of
from .trajectory import ActiveStep


class Glue:
    """Cotangents of one step while it is differentiated, which travel through the pipeline's own code.

    Attributes:
        cotangents: `{output of a call: cotangent}`.
        of_latents: gradient of the step's latents, `None` while there is none.
    """

    def __init__(self, step: ActiveStep) -> None:
        self.step = step
        self.cotangents: dict[torch.Tensor, torch.Tensor] = {}
        self.of_latents: torch.Tensor | None = None

    def pull(self, gradients: Mapping[torch.Tensor, torch.Tensor]) -> None:
        """Send gradients of tensors in the glue back, adding them up at the outputs and at the latents."""
        if not gradients:
            return
        outputs = [output for call in self.step.calls for output in call.outputs]
        sources = outputs if self.step.latents is None else [*outputs, self.step.latents]
        pulled = torch.autograd.grad(
            list(gradients), sources, list(gradients.values()), allow_unused=True, retain_graph=True
        )
        for source, gradient in zip(sources, pulled, strict=True):
            if gradient is None:
                continue
            if source is self.step.latents:
                self.of_latents = gradient if self.of_latents is None else self.of_latents + gradient
            else:
                known = self.cotangents.get(source)
                self.cotangents[source] = gradient if known is None else known + gradient

    def used(self, is_computed: Callable[[int], bool]) -> list[int]:
        """The calls on which the velocity depends, by itself or through the inputs of a later one; latest first.

        Args:
            is_computed: whether a gradient may pass through the call of this number.
        """
        found: list[int] = []
        reached = set(map(id, leaves_of([self.step.velocity])))
        for number, call in reversed(list(enumerate(self.step.calls))):
            if is_computed(number) and any(id(output) in reached for output in call.outputs):
                found.append(number)
                reached.update(map(id, leaves_of(list(call.attached.values()))))
        return found
