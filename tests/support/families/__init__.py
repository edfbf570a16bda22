# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny models of diffusers' flow-matching pipelines, one family each, and the stock pipeline as their oracle.

`family.py` says what a family is, `oracle.py` compares the engine's gradient with autograd through the pipeline's own
undecorated call, the other modules build the pipelines.
"""

from . import flux_inputs, image_inputs, image_to_video, images, more_images, packed, packed_inputs, paper, videos

# Pipelines of images that take pictures, masks or controls.
WITH_INPUTS = [*flux_inputs.FAMILIES, *packed_inputs.FAMILIES, *image_inputs.FAMILIES]

FAMILIES = [
    *paper.FAMILIES,
    *packed.FAMILIES,
    *images.FAMILIES,
    *more_images.FAMILIES,
    *WITH_INPUTS,
    *videos.FAMILIES,
    *image_to_video.FAMILIES,
]
