# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Copies of the inputs of recorded calls, one for all steps where the pipeline passes the same tensor again."""

from collections.abc import Sequence
from typing import Any

import torch

from .caches import Caches, is_cache
from .graph import leaves_of


class KeptInputs:
    """The inputs of a rollout's calls that may be made again."""

    def __init__(self, caches: Caches) -> None:
        self._caches = caches
        # By id: the pipeline's tensor, its version, and the copy.
        self._kept: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}

    def keep(
        self, leaves: Sequence[Any], sources: Sequence[torch.Tensor]
    ) -> tuple[dict[int, torch.Tensor], list[Any]]:
        """Keep the inputs of a call.

        Args:
            leaves: its flattened arguments.
            sources: leaves of the glue to which a gradient goes on.

        Returns:
            `{index: tensor in the glue}` of the inputs through which a gradient must return, and all inputs, tensors
            among them detached, and text caches as `KeptCache`.
        """
        wanted = set(map(id, sources))
        attached, kept = {}, list(leaves)
        for index, leaf in enumerate(leaves):
            if is_cache(leaf):
                kept[index] = self._caches.kept(leaf)
            if not isinstance(leaf, torch.Tensor):
                continue
            if any(id(root) in wanted for root in leaves_of([leaf])):
                # A copy in the glue: a pipeline that later writes into this tensor changes its place in the graph.
                attached[index] = leaf.clone()
                kept[index] = attached[index].detach()
            else:
                kept[index] = self._copy(leaf)
        return attached, kept

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        known = self._kept.get(id(tensor))
        if known is not None and known[0] is tensor and known[1] == tensor._version:
            return known[2]
        copy = tensor.detach().clone()
        if not tensor.requires_grad:
            self._kept[id(tensor)] = (tensor, tensor._version, copy)
        return copy
