# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The folder of an evaluation, from which it resumes."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image

from ..files import write_atomically
from .models import EvaluatedModel


class Store:
    """Finished batches of each model, and the settings that they were made with.

    A batch is the unit of work. It always holds the same images, whatever the number of processes and however often
    the evaluation was interrupted, so every run computes the same numbers.

    Args:
        folder: `--output_dir`.
        settings: all that images and scores of every model depend on, as JSON can hold it.
        models: models to evaluate, the base model first.
        images: number of images of each model.
        batch_size: number of images of a batch; the last batch may be smaller.

    Raises:
        ValueError: the folder holds an evaluation with other settings, or with other LoRAs of the same names.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        models: Sequence[EvaluatedModel],
        images: int,
        batch_size: int,
    ) -> None:
        self.folder, self.models, self.images, self.batch_size = folder, list(models), images, batch_size
        self.settings = json.loads(json.dumps(dict(settings)))
        self._path = folder / "settings.json"
        described = {model.folder: asdict(model) for model in models}
        if self._path.is_file():
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            self._check_settings(kept["settings"])
            self._check_models(kept["models"])
            described = {**kept["models"], **described}
        self._content = json.dumps({"settings": self.settings, "models": described}, indent=2)

    def _check_settings(self, kept: Mapping[str, Any]) -> None:
        for name in dict.fromkeys([*self.settings, *kept]):
            old, new = kept.get(name), self.settings.get(name)
            if old != new:
                raise ValueError(
                    f"--output_dir {self.folder} holds an evaluation with {name} {old!r}, got {new!r}; choose another "
                    "folder, or remove this one."
                )

    def _check_models(self, kept: Mapping[str, Any]) -> None:
        for model in self.models:
            # A model without images, because its LoRA could not be loaded, may change.
            has_batches = any((self.folder / "scores" / model.folder).glob("*.json"))
            if has_batches and kept.get(model.folder, asdict(model)) != asdict(model):
                raise ValueError(
                    f"--output_dir {self.folder} holds another LoRA named {model.name!r} (its source or file "
                    "changed); choose another name or folder."
                )

    def create(self) -> None:
        """Make the folder and write its settings.

        One process calls this, after all of them have asked for `pending` batches.
        """
        for model in self.models:
            (self.folder / "scores" / model.folder).mkdir(parents=True, exist_ok=True)
            (self.folder / "images" / model.folder).mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, self._content + "\n")

    def batches(self) -> list[tuple[EvaluatedModel, int]]:
        """All batches, model by model."""
        return [(model, batch) for model in self.models for batch in range(math.ceil(self.images / self.batch_size))]

    def pending(self) -> list[tuple[EvaluatedModel, int]]:
        """Batches that are not finished."""
        return [(model, batch) for model, batch in self.batches() if not self._batch(model, batch).is_file()]

    def places(self, batch: int) -> range:
        """Indices of a batch's images among all images of a model."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, self.images))

    def image(self, model: EvaluatedModel, place: int) -> Path:
        """File of an image."""
        return self.folder / "images" / model.folder / f"{place:06d}.png"

    def add(
        self,
        model: EvaluatedModel,
        batch: int,
        images: Sequence[Image.Image],
        scores: Mapping[str, Sequence[float]],
    ) -> None:
        """Write a batch's images, then its scores, which mark it as finished.

        Args:
            model: model of the batch.
            batch: index of the batch.
            images: one for each of `places(batch)`.
            scores: reward -> one score for each image.

        Raises:
            ValueError: the number of images differs from the batch's.
        """
        for place, image in zip(self.places(batch), images, strict=True):
            image.save(self.image(model, place))
        write_atomically(self._batch(model, batch), json.dumps({name: list(x) for name, x in scores.items()}))

    def scores(self, model: EvaluatedModel) -> dict[str, list[float]]:
        """All scores of a model by reward, in the order of its images.

        Raises:
            FileNotFoundError: a batch of the model is not finished.
        """
        found: dict[str, list[float]] = {}
        for other, batch in self.batches():
            if other == model:
                content = json.loads(self._batch(model, batch).read_text(encoding="utf-8"))
                for name, values in content.items():
                    found.setdefault(name, []).extend(values)
        return found

    def _batch(self, model: EvaluatedModel, batch: int) -> Path:
        return self.folder / "scores" / model.folder / f"{batch:06d}.json"


def write_parquet(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns of equal length, by name, as a Parquet file."""
    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), path)
