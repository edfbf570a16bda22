# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""In place of transformer outputs that nobody needs: zeros of their shapes, so that the pipeline's code runs on."""

import functools
from typing import Any

import torch
from torch.utils._pytree import tree_map_only


class StandIns:
    """Shapes of a transformer's outputs, learned from its calls in a record block."""

    def __init__(self) -> None:
        self._shapes: dict[tuple[torch.Size, ...], Any] = {}

    def learn(self, leaves: list[Any], result: Any) -> None:
        """Remember the shapes of a call's outputs.

        Args:
            leaves: the call's flattened arguments, whose shapes tell it from calls of other branches and batches.
            result: what it returned.
        """

        def shaped(value: torch.Tensor) -> Any:
            return functools.partial(torch.zeros, value.shape, dtype=value.dtype, device=value.device)

        self._shapes[_layout(leaves)] = tree_map_only(torch.Tensor, shaped, result)

    def answer(self, leaves: list[Any]) -> Any:
        """Zeros shaped as the outputs of an earlier call with these arguments; if there was none, of the last call."""
        shaped = self._shapes.get(_layout(leaves), next(reversed(self._shapes.values())))
        return tree_map_only(functools.partial, lambda zeros: zeros(), shaped)


def _layout(leaves: list[Any]) -> tuple[torch.Size, ...]:
    return tuple(leaf.shape for leaf in leaves if isinstance(leaf, torch.Tensor))
