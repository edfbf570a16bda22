# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Counters of bytes: what autograd saved for backward, and what operations made and is still alive."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Saved:
    """A tensor that autograd saved."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class SavedBytes:
    """Bytes that autograd holds for backward: now, and the most so far. Parameters exist anyway and do not count."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in transformer.parameters()}
        self.live = self.most = 0

    def pack(self, tensor: torch.Tensor) -> Saved:
        # Detached: an output that its own node saves would keep the graph alive if no backward pass frees it.
        holder = Saved(tensor.detach())
        if tensor.untyped_storage().data_ptr() not in self.parameters:
            size = tensor.numel() * tensor.element_size()
            self.live += size
            self.most = max(self.most, self.live)
            weakref.finalize(holder, self.release, size)
        return holder

    def release(self, size: int) -> None:
        self.live -= size

    @staticmethod
    def unpack(holder: Saved) -> torch.Tensor:
        return holder.tensor

    def counting(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are still alive: now, and the most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.known | inputs:
                    self.known.add(storage._cdata)
                    self.live += storage.nbytes()
                    self.most = max(self.most, self.live)
                    weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())
        return result

    def release(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.live -= size
