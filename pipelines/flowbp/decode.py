# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Decoding in chunks: the VAE decodes a few samples at a time, and again in the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from .hooks import Patches


@contextmanager
def decoding_in_chunks(vae: torch.nn.Module | None, size: int | None, recomputes_all: bool) -> Iterator[None]:
    """While open, `vae.decode` takes `size` samples at a time and keeps no activations of them.

    Args:
        vae: `None` for pipelines without one.
        size: samples at a time; `None` leaves the VAE as it is.
        recomputes_all: also recompute batches that fit, where images of several calls are alive side by side.
    """

    def decode(original: Callable[..., Any], latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not latents.requires_grad or (len(latents) <= size and not recomputes_all):
            return original(latents, *args, **kwargs)
        parts = [
            tree_flatten(checkpoint(original, part, *args, use_reentrant=False, **kwargs))
            for part in latents.split(size)
        ]
        joined = [torch.cat(tensors) for tensors in zip(*(leaves for leaves, _ in parts), strict=True)]
        return tree_unflatten(joined, parts[0][1])

    patches = Patches()
    if vae is not None and size is not None:
        patches.replace(vae, "decode", decode)
    try:
        yield
    finally:
        patches.undo()
