# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What changes how a transformer computes: its LoRA's dtype, compiled blocks, attention, deterministic kernels."""

import os
from collections.abc import Sequence

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from peft.tuners.lora import LoraLayer

# Those of diffusers' attention backends that autograd can differentiate and that need no code from the Hub. Of the
# others the sage kernels and flash attention 3 have no backward pass, and cuDNN's gives wrong gradients
# (`flowbp.state.without_cudnn_attention`).
ATTENTION_BACKENDS = (
    *("native", "_native_flash", "_native_efficient", "_native_math"),
    *("flash", "flash_varlen", "flex", "xformers"),
)
# Blocks of one class share their compiled code: a version for each kind of block, with and without gradients, and for
# the batches of rollout, replay and evaluation. Beyond its default limit (8) torch would run uncompiled.
RECOMPILE_LIMIT = 64
COMPILER = "inductor"


class InputDtypeLinear(torch.nn.Linear):
    """A linear layer that computes in its input's dtype, whatever its weight's is."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`. The weight's gradient comes back in the weight's dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return torch.nn.functional.linear(input, self.weight.to(input.dtype), bias)


def compute_lora_in_base_dtype(transformer: torch.nn.Module) -> None:
    """Let the LoRA of linear layers compute in the dtype of these layers' inputs, in place of float32.

    peft casts the input to the LoRA's dtype; here the LoRA's weights are cast to the input's, which is what a LoRA
    computes that is loaded in the base's dtype. Weights, their gradients and the optimizer stay float32. LoRAs of
    other layers, and DoRA, whose norms of weights need float32, stay as peft has them.
    """
    for layer in transformer.modules():
        if not isinstance(layer, LoraLayer):
            continue
        parts = [*layer.lora_A.values(), *layer.lora_B.values()]
        if not parts or layer.lora_variant or any(type(part) is not torch.nn.Linear for part in parts):
            continue
        # peft's own switch (`peft.helpers.disable_input_dtype_casting`).
        layer.cast_input_dtype_enabled = False
        for part in parts:
            part.__class__ = InputDtypeLinear


def block_classes(transformer: torch.nn.Module, wanted: Sequence[str] = ()) -> set[str]:
    """Class names of the blocks that a transformer repeats.

    Args:
        transformer: of diffusers, which names for every model the blocks that must stay on one device.
        wanted: in place of diffusers' names.

    Raises:
        ValueError: where none is named, or one that the transformer does not have.
    """
    found = {type(part).__name__ for part in transformer.modules()}
    own = getattr(transformer, "_no_split_modules", None) or getattr(transformer, "_repeated_blocks", None) or []
    own = found.intersection(own)
    names = set(wanted or own)
    if not names or not names <= found:
        raise ValueError(
            f"expected class names of blocks of {type(transformer).__name__}, got {', '.join(sorted(names)) or 'none'}"
            + (f"; its own: {', '.join(sorted(own))}." if own else ".")
        )
    return names


def compile_blocks(transformer: torch.nn.Module) -> None:
    """Compile a transformer's repeated blocks in place, so that its parameters keep their names.

    Raises:
        ValueError: where diffusers does not say which blocks are repeated.
    """
    try:
        names = block_classes(transformer)
    except ValueError as error:
        raise ValueError(f"--compile_blocks: {error} Leave it out for this model.") from error
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    for part in transformer.modules():
        if type(part).__name__ in names:
            part.compile(backend=COMPILER)


def check_attention_backend(name: str) -> None:
    """Refuse an attention backend that cannot train, or that is not installed.

    Raises:
        ValueError: with the choices.
    """
    expected = f"expected one of {', '.join(ATTENTION_BACKENDS)}"
    known = [each.value for each in AttentionBackendName]
    if "cudnn" in name and name in known:
        raise ValueError(f"--attention_backend {name}: the gradients of cuDNN's attention are wrong; {expected}")
    if name in known and name not in ATTENTION_BACKENDS:
        raise ValueError(
            f"--attention_backend {name}: it has no backward pass, needs code from the Hub or another device; "
            f"{expected}"
        )
    if name not in known:
        raise ValueError(f"--attention_backend {name}: {expected}")


def set_attention_backend(transformer: torch.nn.Module, name: str) -> None:
    """Let a transformer's attention layers use a backend of diffusers.

    Args:
        transformer: of diffusers.
        name: that `check_attention_backend` has passed.

    Raises:
        ValueError: where it is not installed, or where the transformer's attention layers take no backend.
    """
    processors = [processor for part in transformer.modules() if (processor := getattr(part, "processor", None))]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise ValueError(
            f"--attention_backend {name}: the attention layers of {type(transformer).__name__} take no backend of "
            "diffusers; leave it out (PyTorch's own attention is used)"
        )
    try:
        transformer.set_attention_backend(name)
    except RuntimeError as error:
        raise ValueError(f"--attention_backend {name}: {error}") from error


def make_deterministic() -> None:
    """Let the same update compute the same bits on a GPU; operations that cannot do so raise RuntimeError."""
    # cuBLAS reads this when its first product is computed.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
