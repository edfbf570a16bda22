# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Modular pipelines, whose blocks switch gradients off one by one, where other pipelines do so once for all."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import ModularPipeline
from diffusers.modular_pipelines import PipelineState


def block_classes(pipe: ModularPipeline) -> set[type]:
    """Classes whose `__call__` a pipeline's blocks have, their base classes included."""
    return {owner for block in _blocks(pipe._blocks) for owner in type(block).__mro__ if "__call__" in vars(owner)}


def _blocks(block: Any) -> Iterator[Any]:
    yield block
    for inner in block.sub_blocks.values():
        yield from _blocks(inner)


def call_block(
    pipe: ModularPipeline, original: Callable[..., Any], block: Any, components: Any, *args: Any, **kwargs: Any
) -> Any:
    """A block's call, without its own `torch.no_grad` where it works for this pipeline.

    Args:
        pipe: that is recorded; it switches gradients off for its whole call, until the first transformer call.
        original: the block's class's `__call__`.
        block, components, args, kwargs: what it was called with; `components` is the pipeline.
    """
    is_without_gradients = isinstance(_context_of(original), torch.no_grad)
    return (original.__wrapped__ if components is pipe and is_without_gradients else original)(
        block, components, *args, **kwargs
    )


def _context_of(function: Callable[..., Any]) -> Any:
    """The context manager of torch that a function was decorated with; `None` for another function."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_name != "decorate_context" or "ctx_factory" not in code.co_freevars:
        return None
    return function.__closure__[code.co_freevars.index("ctx_factory")].cell_contents()


def returned_values(returned: Any) -> Any:
    """What a pipeline returned, as a tree: a modular pipeline's state holds its values in a dict."""
    return returned.values if isinstance(returned, PipelineState) else returned
