# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Walks over autograd graphs: which leaves a tensor depends on, and whether any gradient passes along the way."""

from collections.abc import Sequence

import torch


def leaves_of(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The leaves that the autograd graph of `tensors` ends in, each once. Nothing is computed.

    Args:
        tensors: of any shape; those that require no gradient have no leaves.
    """
    found: dict[int, torch.Tensor] = {}
    pending, seen = [], set()
    for tensor in tensors:
        if tensor.grad_fn is not None:
            pending.append(tensor.grad_fn)
        elif tensor.requires_grad:
            found[id(tensor)] = tensor
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        pending += [following for following, _ in node.next_functions]
    return list(found.values())


def passes_gradient(tensors: Sequence[torch.Tensor], leaf: torch.Tensor) -> torch.Tensor:
    """Whether a gradient other than 0 reaches `leaf` from `tensors`: a scalar flag on the leaf's device.

    A path may exist along which every gradient is exactly 0, for example where latents are overwritten in place.
    Gradients that are not finite decide nothing and do not count.

    Raises:
        RuntimeError: for graphs that autograd cannot follow, because a tensor that it needs was written into.
    """
    tensors = [tensor for tensor in tensors if tensor.requires_grad]
    # Random cotangents, so that nothing cancels; their own generator, so that the user's noise stays the same.
    cotangents = [
        torch.randn(tensor.shape, generator=torch.Generator(tensor.device).manual_seed(0), device=tensor.device).to(
            tensor.dtype
        )
        for tensor in tensors
    ]
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(tensors, [leaf], cotangents, allow_unused=True, retain_graph=True)
    except (RuntimeError, TypeError) as error:
        if "inplace operation" in str(error):
            raise
        # A graph that is not whole any more leads outside of what was recorded.
        return torch.ones((), dtype=torch.bool, device=leaf.device)
    if gradient is None:
        return torch.zeros((), dtype=torch.bool, device=leaf.device)
    return (gradient.isfinite() & (gradient != 0)).any()


def passed_places(tensor: torch.Tensor, leaf: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a gradient of `tensor` reaches `leaf`, which has its shape.

    Returns:
        A mask in their shape; and a scalar flag, whether the gradient reaches these places as it is.
    """
    gradient = None
    if tensor.requires_grad:
        generator = torch.Generator(tensor.device).manual_seed(seed)
        # Whole numbers that no cast rounds, without 0, and so many that sums of two are seldom 0 or one of them.
        cotangents = torch.randint(1, 128, tensor.shape, generator=generator, device=tensor.device)
        signs = torch.randint(0, 2, tensor.shape, generator=generator, device=tensor.device) * 2 - 1
        cotangents = (cotangents * signs).to(tensor.dtype)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(tensor, [leaf], cotangents, allow_unused=True, retain_graph=True)
    if gradient is None:
        return torch.zeros_like(leaf, dtype=torch.bool), torch.ones((), dtype=torch.bool, device=leaf.device)
    return gradient != 0, ((gradient == 0) | (gradient == cotangents.to(gradient.dtype))).all()
