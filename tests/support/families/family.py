# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What a family of the matrix is: a tiny pipeline, and the calls that are put to the test."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from packaging.version import Version
from tiny_sd3 import redraw


@dataclass(frozen=True)
class Part:
    """A part of a step's transformer outputs: all rows of a call, or the first or second half of them.

    Attributes:
        call: number of the transformer call within a step, from 0.
        rows: which of its rows; of a list of outputs, which of its entries.
        size: how many rows or entries the call has where it has this part, for pipelines that make smaller calls
            without the part at some steps (truncated guidance); `None` for always.
    """

    call: int
    rows: Literal["all", "first half", "second half"] = "all"
    size: int | None = None


@dataclass(frozen=True)
class Case:
    """One way to call a family's pipeline.

    Attributes:
        label: in the matrix, such as "guidance" or "no guidance".
        arguments: of the pipeline's call, prompts as embeddings; the oracle adds `generator`, `output_type="pt"` and
            `return_dict=False`.
        unconditional: where the unconditional branch is computed; `None` without guidance, or where the case has more
            than one such branch.
        refused: pattern of the refusal, for a case that the recorder must refuse.
        unconditional_refused: pattern of the refusal of `unconditional_gradient=False` alone.
    """

    label: str
    arguments: Mapping[str, Any]
    unconditional: Part | None = None
    refused: str | None = None
    unconditional_refused: str | None = None


@dataclass(frozen=True)
class Family:
    """A pipeline class of diffusers.

    Attributes:
        name: as people call the model, such as "Qwen-Image".
        pipeline: name of the class in diffusers.
        output: "image" or "video".
        build: makes the tiny pipeline with random weights, ready for the test (see `ready`).
        cases: makes the calls; gets the pipeline that `build` made.
        note: what a reader of the matrix should know, one short sentence or empty.
    """

    name: str
    pipeline: str
    output: Literal["image", "video"]
    build: Callable[[], DiffusionPipeline]
    cases: Callable[[DiffusionPipeline], list[Case]]
    note: str = ""


def image_family(
    name: str,
    pipeline: type[DiffusionPipeline],
    build: Callable[[type[DiffusionPipeline]], DiffusionPipeline],
    cases: Callable[[DiffusionPipeline], list[Case]],
    note: str = "",
) -> Family:
    """A family of images whose `build` makes a pipeline of the class that it is given; see `Family`."""
    return Family(name, pipeline.__name__, "image", partial(build, pipeline), cases, note)


def added(version: str, name: str) -> Any:
    """A class that diffusers has since `version`; a test that needs it is skipped with older ones, and says so."""
    if Version(diffusers.__version__) < Version(version):
        pytest.skip(f"{name} came with diffusers {version}, this is {diffusers.__version__}")
    return getattr(diffusers, name)


def ready(
    pipe: DiffusionPipeline, gain: float = 1.0, vae_gain: float = 0.7, dtype: torch.dtype = torch.float64
) -> DiffusionPipeline:
    """Redraw all weights at a scale where every path matters, and leave only the transformers trainable.

    Args:
        pipe: with modules built from configs.
        gain: of the transformers' matrices, N(0, gain^2 / fan_in).
        vae_gain: the same for the other modules.
        dtype: of all modules.

    Returns the same pipeline, in evaluation mode.
    """
    generator = torch.Generator().manual_seed(0)
    for name, module in pipe.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        is_transformer = "transformer" in name or name == "unet"
        redraw(module, gain if is_transformer else vae_gain, generator)
        module.eval().requires_grad_(is_transformer).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# What most transformers have in common, as far as they take it.
SMALL = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
}


def tiny_model(model: Callable[..., torch.nn.Module], **config: Any) -> torch.nn.Module:
    """A transformer with this config, and of what is not in it the sizes of `SMALL`."""
    taken = inspect.signature(model).parameters
    return model(**{name: value for name, value in SMALL.items() if name in taken} | config)


def tiny_pipeline(
    pipeline: type[DiffusionPipeline],
    shift: float | None = None,
    gain: float = 1.0,
    dtype: torch.dtype = torch.float64,
    **components: Any,
) -> DiffusionPipeline:
    """A pipeline of these components, `ready` for the test.

    Args:
        pipeline: the class. Components that it needs and that are not given, such as text encoders and tokenizers, are
            None.
        shift: of the Euler scheduler, where `components` has no scheduler; None for dynamic shifting.
        gain: see `ready`.
        dtype: see `ready`.
        components: by the names of the class.
    """
    parameters = list(inspect.signature(pipeline.__init__).parameters.values())[1:]
    absent = {parameter.name: None for parameter in parameters if parameter.default is parameter.empty}
    shifting = {"use_dynamic_shifting": True} if shift is None else {"shift": shift}
    scheduler = FlowMatchEulerDiscreteScheduler(**shifting)
    return ready(pipeline(**{**absent, "scheduler": scheduler, **components}), gain=gain, dtype=dtype)


def guidance_cases(
    arguments: Mapping[str, Any],
    guidance_scale: float,
    unconditional: Part,
    negative: Mapping[str, Any] | None = None,
    off: float = 1.0,
) -> list[Case]:
    """The two cases of most pipelines: without guidance, and with it.

    Args:
        arguments: of both.
        guidance_scale: of the second.
        unconditional: where the second computes the unconditional branch.
        negative: further arguments of the second.
        off: the guidance scale of the first.
    """
    return [
        Case("no guidance", {**arguments, "guidance_scale": off}),
        Case("guidance", {**arguments, **(negative or {}), "guidance_scale": guidance_scale}, unconditional),
    ]


def embeddings(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Standard normal numbers that stand for a text encoder's output."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pictures(seed: int, channels: int = 3, size: int = 8) -> torch.Tensor:
    """(2, channels, size, size) numbers in [0, 1] that stand for pictures."""
    return torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hole(size: int = 8) -> torch.Tensor:
    """(2, 1, size, size) masks, 1 in the left halves."""
    mask = torch.zeros(2, 1, size, size, dtype=torch.float64)
    mask[..., : size // 2] = 1
    return mask


def given(
    cases: Callable[[DiffusionPipeline], list[Case]], refused: str | None = None, **inputs: Any
) -> Callable[[DiffusionPipeline], list[Case]]:
    """The same calls with further inputs.

    Args:
        cases: makes the calls.
        refused: see `Case`; then there is only the first call.
        inputs: arguments that every call gets.
    """

    def made(pipe: DiffusionPipeline) -> list[Case]:
        calls = [replace(case, arguments={**case.arguments, **inputs}) for case in cases(pipe)]
        return calls if refused is None else [replace(calls[0], refused=refused)]

    return made
