# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""A transformer call that was made again: its outputs with their graph, beside the recorded ones."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .host import widened
from .samples import Samples, chosen_arguments, floating_outputs, has_samples, masked, put_back, recorded_outputs, take
from .trajectory import Call

# Largest relative difference (2-norm of a sample's output) between a recorded call and a replay that may run other
# kernels: for fewer samples, or to keep what backward needs. On a CPU a whole replay must be equal bit for bit.
# Measured with 2 to 57 blocks: benchmarks/README.md, "How far replays differ".
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1.5e-2}


def deviations(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """How far each sample of `new` is from `old`, relative to the 2-norm of `old`; what is not finite does not count.

    Args:
        new: `(B, ...)`, or one sample without such a dimension.
        old: of the same shape.

    Returns:
        `(B,)` in float32, or float64 for float64; on the tensors' device.
    """
    is_finite = new.isfinite() & old.isfinite()
    difference = (widened(new) - widened(old)).where(is_finite, 0)
    size = widened(old).where(is_finite, 0)
    if new.ndim < 2:
        difference, size = difference.reshape(1, -1), size.reshape(1, -1)
    gap = torch.linalg.vector_norm(difference.flatten(1), dim=1)
    scale = torch.linalg.vector_norm(size.flatten(1), dim=1)
    # Where nothing was expected, anything is too much.
    return torch.where(gap == 0, gap, gap / scale)


@dataclass(eq=False)
class Replayed:
    """A call that was made again, with its graph.

    Attributes:
        call: the recorded one.
        module: that was called.
        computed: samples that were computed.
        kept: of these, the samples that get a gradient; `None` for all that were computed.
        inputs: `{index in call.leaves: leaf}` through which gradients go on.
        outputs: floating point outputs of the computed samples.
    """

    call: Call
    module: torch.nn.Module
    computed: Samples
    kept: Samples
    inputs: dict[int, torch.Tensor]
    outputs: list[torch.Tensor]

    @property
    def recorded(self) -> list[tuple[torch.Tensor, Samples]]:
        """The recorded output of each of `outputs`, and what to take of it."""
        return recorded_outputs(self.call, self.computed)

    def cotangents(self, of_recorded: Mapping[torch.Tensor, torch.Tensor]) -> dict[int, torch.Tensor]:
        """`{index in outputs: its cotangent}` from those of the recorded outputs; 0 for samples that are not kept."""
        kept = {output for output, _ in recorded_outputs(self.call, self.kept)}
        found = {}
        for index, (output, cut) in enumerate(self.recorded):
            if output in of_recorded and output in kept:
                found[index] = self.mask(take(of_recorded[output], cut))
        return found

    def mask(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor like an output with 0 for the samples that are not kept."""
        return masked(tensor, self.kept) if has_samples(tensor, self.call) and not self.call.is_list else tensor

    def backward(self, cotangents: Mapping[int, torch.Tensor]) -> None:
        """Differentiate the outputs, with these cotangents by index."""
        torch.autograd.backward([self.outputs[index] for index in cotangents], list(cotangents.values()))

    def input_gradients(self) -> dict[torch.Tensor, torch.Tensor]:
        """`{input in the glue: gradient}` after the backward pass."""
        return {
            self.call.attached[index]: put_back(leaf.grad, self.call.leaves[index], self.computed)
            for index, leaf in self.inputs.items()
            if leaf.grad is not None
        }

    def forward(self) -> list[torch.Tensor]:
        """The outputs of one more call with the same arguments; where gradients are off, without a graph."""
        args, kwargs, _ = chosen_arguments(self.call, self.computed)
        with self.call.state.under_autocast():
            return floating_outputs(self.module(*args, **kwargs))
