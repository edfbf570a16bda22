# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Reading numbers off a device: as float64 on the CPU, and many verdicts in one transfer.

A read makes the host wait for the device, so the engine collects what it wants to know and reads it together. Apple's
MPS has no float64, so tensors move to the CPU first and widen there.
"""

from collections.abc import Sequence

import torch


def float64_on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor detached, on the CPU, in float64."""
    return tensor.detach().cpu().double()


def read(scalars: Sequence[torch.Tensor]) -> list[float]:
    """The values of scalar tensors of any dtype, read in one transfer for each device.

    Args:
        scalars: tensors with one element each; flags read as 0.0 or 1.0.
    """
    by_device: dict[torch.device, list[int]] = {}
    for index, scalar in enumerate(scalars):
        by_device.setdefault(scalar.device, []).append(index)
    values = [0.0] * len(scalars)
    for indices in by_device.values():
        # float32 holds flags, cosines and relative differences well enough, and every device has it.
        stacked = torch.stack([scalars[index].detach().float().reshape(()) for index in indices])
        for index, value in zip(indices, stacked.cpu().tolist(), strict=True):
            values[index] = value
    return values


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor detached and in float32, or float64 if it is that already, so that sums of it keep their digits."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
