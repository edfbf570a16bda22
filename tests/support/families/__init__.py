# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny models of diffusers' flow-matching pipelines, one family each, and the stock pipeline as their oracle.

`family.py` says what a family is, `oracle.py` compares the engine's gradient with autograd through the pipeline's own
undecorated call, the other modules build the pipelines.
"""

from . import images, more_images, packed, paper, videos

FAMILIES = [*paper.FAMILIES, *packed.FAMILIES, *images.FAMILIES, *more_images.FAMILIES, *videos.FAMILIES]
