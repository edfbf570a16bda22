# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What differs between the training scripts of the three backbones, as far as their tests are concerned."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import tiny_flux_pipeline, tiny_klein_pipeline
from tiny_sd3 import MAX_SEQUENCE_LENGTH, tiny_sd3_pipeline


@dataclasses.dataclass(frozen=True)
class TrainedBackbone:
    """A training script, a tiny pipeline for it, and how users get the images of its validation.

    Attributes:
        name: the backbone's name in the method table and of its recipes.
        script: the script's name.
        build: makes the pipeline.
        call: what users give the pipeline to get the images of the script's validation.
        defaults: those that are not the same for all backbones.
        options: the script's options that this row is about.
    """

    name: str
    script: str
    build: Callable[[], DiffusionPipeline]
    call: dict[str, Any]
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


SD3 = TrainedBackbone(
    "sd3",
    "train_flowbp_sd3",
    partial(tiny_sd3_pipeline, torch.float32),
    {
        "height": 8,
        "width": 8,
        "guidance_scale": 3.5,
        "negative_prompt": "",
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
    },
    defaults={"guidance_scale": 3.5, "sigmas": "stock"},
)
FLUX = TrainedBackbone(
    "flux",
    "train_flowbp_flux",
    tiny_flux_pipeline,
    {"height": 8, "width": 8, "guidance_scale": 4.0, "max_sequence_length": 16},
    defaults={"guidance_scale": 4.0, "true_cfg_scale": 1.0},
)
FLUX2 = TrainedBackbone(
    "flux2", "train_flowbp_flux2", tiny_klein_pipeline, FLUX.call, defaults={"guidance_scale": 4.0}
)
TRUE_GUIDANCE = {"true_cfg_scale": 3.0, "negative_prompt": "grey"}

BACKBONES = {backbone.name: backbone for backbone in (SD3, FLUX, FLUX2)}
# Other models of these backbones, and other ways of calling them.
VARIANTS = {
    "flux with true guidance": dataclasses.replace(FLUX, call={**FLUX.call, **TRUE_GUIDANCE}, options=TRUE_GUIDANCE),
    "flux2 distilled": dataclasses.replace(FLUX2, build=partial(tiny_klein_pipeline, is_distilled=True)),
}
