# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Sampling with the run's pipeline, in training and for judging: the same calls, so training is inference."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from ..judging.images import Drawn, draw_images
from .backbone import Backbone
from .config import TrainingConfig
from .prompts import Record
from .seeds import make_generator

Noise = torch.Generator | list[torch.Generator]


@dataclass(eq=False)
class Sampling:
    """The run's pipeline and what it is called with; `inputs` is of `Backbone.prompt_inputs`."""

    config: TrainingConfig
    accelerator: Accelerator
    backbone: Backbone
    pipe: DiffusionPipeline
    inputs: Callable[[Sequence[Record]], dict[str, Any]]

    def size(self, update: int, micro_batch: int) -> tuple[int, int]:
        """Height and width of a micro-batch: the run's sizes in turn, the same in all processes."""
        sizes = self.config.sizes
        return sizes[(update * self.config.gradient_accumulation_steps + micro_batch) % len(sizes)]

    def images(self, inputs: Mapping[str, Any], noise: Noise, size: tuple[int, int]) -> torch.Tensor:
        """What the pipeline makes of a batch.

        Args:
            inputs: of `self.inputs(records)`.
            noise: a CPU generator, or one for each record.
            size: height and width.

        Returns:
            `(B, 3, H, W)`, or `(B, F, 3, H, W)` of videos, in [0, 1].

        Raises:
            ValueError: where the pipeline makes another size.
        """
        height, width = size
        arguments = {**inputs, **self.backbone.call(height, width), "output_type": "pt", "return_dict": False}
        images = self.pipe(generator=noise, **arguments)[0]
        if images.shape[-2:] != size:
            made = " x ".join(str(length) for length in images.shape[-2:])
            raise ValueError(f"{type(self.pipe).__name__} makes {made} of {height} x {width}; ask for that size.")
        return images

    def draw(
        self,
        purpose: str,
        records: Sequence[Record],
        count: int,
        rewards: Mapping[str, torch.nn.Module],
        advance: Callable[[int], object],
    ) -> Drawn:
        """Draw and score `count` images of each record, one at a time, from noise that no update changes. Collective.

        Args:
            purpose: of the noise: "evaluation" or "validation".
            records: whose images are drawn, in the first of the run's sizes.
            count: images of each record.
            rewards: that score them, by name.
            advance: called with the number of images that all processes have drawn since its last call.
        """

        def sample(place: int, generator: torch.Generator) -> torch.Tensor:
            # Of which some pipelines draw when they encode a source.
            torch.manual_seed(generator.initial_seed())
            return self.images(self.inputs([records[place]]), generator, self.config.sizes[0])

        return draw_images(
            self.accelerator,
            self.backbone.transformer(self.pipe),
            [record.prompt for record in records],
            lambda image: make_generator(purpose, self.config.seed, image),
            count,
            sample,
            rewards,
            advance,
            [record.columns for record in records],
        )
