# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Validation: the images that people look at, of the base model and of what is trained."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..judging.images import Drawn
from .reports import finite
from .scored_images import ScoredImages
from .state import TrainingState


class Validation:
    """Draws one image of each validation record."""

    def __init__(self, state: TrainingState, images: ScoredImages) -> None:
        self.state = state
        self.images = images
        self.records = images.rewards.validation
        self._base: Drawn | None = None

    def draw(self) -> Drawn:
        """The images and their scores, always from the same noise. Collective."""
        return self.images.draw("validation", self.records, 1)

    def draw_and_log(self, update: int) -> None:
        """The images of an update, with the average in place of the last values. Collective."""
        with self.state.averaged():
            drawn = self.draw()
        self.images.log("validation", update, drawn, self.records, 1)

    def of_base(self) -> Drawn:
        """What `draw` draws of the base model; drawn once. Collective."""
        if self._base is None:
            with self.state.trained.left_out():
                self._base = self.draw()
        return self._base

    # Checkpoints.

    def state_dict(self) -> dict[str, Any] | None:
        """What the base's images are of, and their scores; None as long as there are none."""
        if self._base is None:
            return None
        # JSON has no NaN, which the score of an image that is not finite is.
        scores = {name: finite(each) for name, each in self._base.scores.items()}
        return {**self.images.origin(self.records), "scores": scores}

    def save_images(self, folder: Path) -> None:
        """Write the base's images into a checkpoint's folder; a resumed run may not be able to draw them again."""
        for place, image in enumerate(self._base.images if self._base is not None else ()):
            image.save(folder / f"base_{place}.png")

    def load(self, folder: Path, kept: Mapping[str, Any] | None) -> None:
        """Take the base's images from a checkpoint, if they are of this run's records and scored by its rewards."""
        if kept is None or not self.images.origin(self.records).items() <= kept.items():
            return
        if [*kept["scores"]] != [*self.images.judges]:
            return
        found = [Image.open(folder / f"base_{place}.png") for place in range(len(kept["prompts"]))]
        for image in found:
            image.load()
        scores = {name: [math.nan if each is None else each for each in of] for name, of in kept["scores"].items()}
        self._base = Drawn(found, scores, *[math.nan] * 3, None)
