# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Images of fixed records while training: drawn from fixed noise, scored and logged."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from ..judging.images import Drawn
from .config import TrainingConfig
from .console import Console
from .distributed import all_ranks_max
from .pipeline_columns import sources_of
from .prompts import Record
from .reports import Reports
from .rewards import RunRewards
from .sampling import Sampling
from .signals import DrawingStopped, StopSignals

# What images and their scores depend on beside prompt, noise, rewards and what is trained.
OF_IMAGES = (
    "pretrained_model_name_or_path revision variant quantization_config_path mixed_precision seed resolution height "
    "width num_frames num_inference_steps guidance_scale true_cfg_scale negative_prompt sigmas flow_shift "
    "max_sequence_length pipeline_arguments pipeline_columns reward_frames"
).split()


@dataclass(frozen=True, eq=False)
class ScoredImages:
    """Draws, scores and logs images with the parts of a run; `signals` stop it between images."""

    config: TrainingConfig
    accelerator: Accelerator
    rewards: RunRewards
    sampling: Sampling
    console: Console
    reports: Reports
    signals: StopSignals

    @property
    def judges(self) -> dict[str, torch.nn.Module]:
        """The rewards that score, by name: the training's without augmentation, and the held-out one."""
        held_out = self.rewards.held_out
        judges = {self.rewards.name: self.rewards.plain}
        return judges if held_out is None else {**judges, self.config.eval_reward: held_out}

    def draw(self, purpose: str, records: Sequence[Record], count: int) -> Drawn:
        """`count` images of each record, always from the same noise. Collective.

        Raises:
            DrawingStopped: a signal came.
        """
        with self.console.drawing(purpose, len(records) * count) as show:

            def advance(images: int) -> None:
                show(images)
                if all_ranks_max(self.accelerator, [self.signals.number])[0]:
                    raise DrawingStopped

            return self.sampling.draw(purpose, records, count, self.judges, advance)

    def log(self, purpose: str, update: int, drawn: Drawn, records: Sequence[Record], count: int) -> None:
        """Log means of scores and measurements, and a strip of the images.

        Args:
            purpose, records, count: as `draw` took them, "evaluation" or "validation" for the first.
            update: its number, 0 for the base model.
        """
        scores = {name: [score for score in values if math.isfinite(score)] for name, values in drawn.scores.items()}
        means = {f"{purpose}/{name}": sum(values) / len(values) for name, values in scores.items() if values}
        for name in ("saturated", "high_frequency", "velocity_norm", "diversity"):
            if (value := vars(drawn)[name]) is not None and math.isfinite(value):
                means[f"{purpose}/{name}"] = value
        self.reports.scalars(means, update)
        if self.accelerator.is_main_process:
            shown = [record for record in records for _ in range(count)]
            columns = min(len(shown), count * max(1, 8 // count))
            title = f"{purpose.capitalize()} " + (f"after update {update}" if update else "of the base model")
            from ..judging.figures import validation_strip

            sources = sources_of(shown, self.config.call_columns)
            prompts = [record.prompt for record in shown]
            strip = validation_strip(drawn.images, prompts, drawn.scores, columns, title, sources)
            self.reports.images(purpose, strip, update)

    def origin(self, records: Sequence[Record]) -> dict[str, Any]:
        """What images of the records are of and made with, as JSON has it; a resumed run compares it."""
        given = self.config.settings()
        return {
            "prompts": [record.prompt for record in records],
            "sources": [[*map(str, of)] for of in sources_of(records, self.config.call_columns).values()],
            "made_with": {name: given[name] for name in OF_IMAGES},
        }
