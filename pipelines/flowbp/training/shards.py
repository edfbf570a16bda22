# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Sharded tensors in a checkpoint: a safetensors file per process, read by any number of processes.

torch's distributed checkpoint with its Hugging Face storage, the only one of its storages without pickles.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from .checkpoints import CheckpointError, damaged
from .distributed import all_ranks_max, local

# Its name in torch 2.8 is the second one.
SAVE_DISTRIBUTED = next(
    name
    for name in ("save_distributed", "save_sharded")
    if name in inspect.signature(HuggingFaceStorageWriter).parameters
)


def write_shards(accelerator: Accelerator, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write each process' shards into a file of its own. Collective.

    Args:
        folder: that exists, on a disk that all processes share.
        tensors: sharded, by name; the same names in every process.

    Raises:
        CheckpointError: in every process, for values that are not finite, or where a process could not write.
    """
    if (name := _not_finite(accelerator, tensors)) is not None:
        raise CheckpointError(
            f"{folder}: expected finite values, found NaN or infinity in {name}; lower the learning rate and resume "
            "from the last checkpoint."
        )
    try:
        dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), **{SAVE_DISTRIBUTED: True}))
    except dcp.CheckpointException as error:
        raise CheckpointError(f"{folder}: not written: {_reason(error)}") from error


def read_shards(accelerator: Accelerator, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Read tensors of `write_shards` in place, each process its own shards. Collective.

    Args:
        folder: with the files.
        tensors: sharded, by name; these are read and no others.

    Raises:
        CheckpointError: in every process, for a tensor that is missing, of another shape, or not finite.
    """
    try:
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)))
    except dcp.CheckpointException as error:
        raise damaged(folder, "the tensors of this transformer", _reason(error)) from error
    if (name := _not_finite(accelerator, tensors)) is not None:
        raise damaged(folder, "finite values", f"NaN or infinity in {name}")


def _not_finite(accelerator: Accelerator, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """A tensor of which some process' shard is not finite."""
    flags = all_ranks_max(accelerator, [float(not local(each).isfinite().all()) for each in tensors.values()])
    return next((name for name, flag in zip(tensors, flags, strict=True) if flag), None)


def _reason(error: dcp.CheckpointException) -> str:
    return next(str(failure[0]).partition("\n")[0] for failure in error.failures.values())
