# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The folder of an evaluation, from which it resumes."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from ..files import write_atomically
from .models import EvaluatedModel

RESULTS = ("scores.parquet", "table.json", "table.md", "table.csv", "report.html", "grid.png")
"""Files that `write_results` writes."""


class SettingsFile:
    """`settings.json` of an evaluation: what images and scores depend on, the models, and remarks on them.

    Args:
        folder: `--output_dir`.
        settings: all that images and scores of every model depend on, as JSON can hold it.
        models: models to evaluate, the base model first.

    Attributes:
        left_out: names of models in the folder that are not among `models`.
        remarks: what a reader of the tables must know of a model, by its folder.

    Raises:
        ValueError: the folder holds an evaluation with other settings, or with other LoRAs of the same names, or its
            settings cannot be read; or a file that would be replaced and that no evaluation wrote.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], models: Sequence[EvaluatedModel]) -> None:
        self.folder, self.models = folder, list(models)
        self.settings = json.loads(json.dumps(dict(settings)))
        self._path = folder / "settings.json"
        kept = self._read()
        self._check_settings(kept["settings"])
        self._check_models(kept["models"])
        described = {model.folder: asdict(model) for model in models}
        self._described = {**kept["models"], **described}
        self.left_out = [model["name"] for folder, model in kept["models"].items() if folder not in described]
        self.remarks: dict[str, str] = kept.get("remarks", {})

    def _read(self) -> dict[str, Any]:
        """What the file says; the new settings for a folder without an evaluation."""
        content = ""
        if self._path.is_file():
            content = self._path.read_text(encoding="utf-8", errors="replace")
        elif not any(self.folder.glob("scores/*/*.json")):
            if found := [name for name in RESULTS if (self.folder / name).exists()]:
                raise ValueError(
                    f"--output_dir {self.folder}: {found[0]} in this folder was not written by an evaluation; move "
                    "it, or choose another folder."
                )
            return {"settings": self.settings, "models": {}}
        try:
            kept = json.loads(content)
            return {**kept, "settings": dict(kept["settings"]), "models": dict(kept["models"])}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--output_dir {self.folder} holds an evaluation, but settings.json is missing, empty or cut; restore "
                "that file, remove the folder, or choose another one."
            ) from error

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
            before = kept.get(model.folder)
            if before is not None:
                # Evaluations before there were transformers.
                before = {"transformer": None, **before}
            if model.digest is not None and before is not None and before["digest"] == model.digest:
                # What is local is known by its content, wherever it is.
                before = {**before, "lora": model.lora, "transformer": model.transformer}
            if has_batches and before not in (None, asdict(model)):
                kind = "LoRA" if model.lora else "model"
                raise ValueError(
                    f"--output_dir {self.folder} holds another {kind} named {model.name!r} (its source or file "
                    "changed); choose another name or folder."
                )

    def write(self) -> None:
        """Write the file."""
        content = {"settings": self.settings, "models": self._described}
        if self.remarks:
            content["remarks"] = self.remarks
        write_atomically(self._path, json.dumps(content, indent=2) + "\n")

    def require(self) -> None:
        """Check that the folder is still there; nothing creates it again.

        Raises:
            FileNotFoundError: it was removed or renamed after `write`.
        """
        if not self._path.is_file():
            raise FileNotFoundError(
                f"--output_dir {self.folder}: expected the evaluation's folder, got none; it was removed or renamed "
                "while the evaluation ran. Move it back and start again."
            )

    def add_remarks(self, by_source: Mapping[str, str]) -> None:
        """Keep what loading the LoRAs told, for tables that a later run writes without loading them.

        Args:
            by_source: remarks on LoRAs; they replace all earlier ones on `models`.
        """
        remarks = {model.folder: by_source.get(model.lora, "") for model in self.models}
        remarks = {name: text for name, text in {**self.remarks, **remarks}.items() if text}
        if remarks != self.remarks:
            self.require()
            self.remarks = remarks
            self.write()


class EvaluationFolder:
    """Finished batches of each model, and the settings that they were made with.

    A batch is the unit of work. It always holds the same images, whatever the number of processes and however often
    the evaluation was interrupted, so every run computes the same numbers.

    Args:
        path, settings, models: see `SettingsFile`.
        images: number of images of each model.
        batch_size: number of images of a batch; the last batch may be smaller.
        rewards: names of the rewards, of which each batch has scores.

    Raises:
        ValueError: see `SettingsFile`.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        models: Sequence[EvaluatedModel],
        images: int,
        batch_size: int,
        rewards: Sequence[str],
    ) -> None:
        self.path, self.models, self.images, self.batch_size = path, list(models), images, batch_size
        self.rewards = list(rewards)
        self.settings_file = SettingsFile(path, settings, models)

    def create(self) -> None:
        """Make the folder and write its settings.

        One process calls this, after all of them have asked for `pending` batches.
        """
        for model in self.models:
            (self.path / "scores" / model.folder).mkdir(parents=True, exist_ok=True)
            (self.path / "images" / model.folder).mkdir(parents=True, exist_ok=True)
        self.settings_file.write()

    def discard_damaged(self) -> list[str]:
        """Make batches pending again that have a file that is missing, empty or cut, as after a crash or a full disk.

        One process calls this, before any asks for `pending` batches.

        Returns:
            A line for each of these batches.
        """
        sizes: dict[tuple[EvaluatedModel, int], set[tuple[int, int]]] = {}
        faults: dict[tuple[EvaluatedModel, int], str] = {}
        for model, batch in self.batches():
            if self._batch(model, batch).is_file():
                try:
                    self._read(model, batch)
                    sizes[model, batch] = {_checked_size(self.image(model, place)) for place in self.places(batch)}
                except ValueError as error:
                    faults[model, batch] = str(error)
        usual = statistics.mode([size for found in sizes.values() for size in found] or [None])
        faults |= {key: "an image has another size" for key, found in sizes.items() if found != {usual}}
        for model, batch in faults:
            self._batch(model, batch).unlink()
        return [f"Batch {batch} of {model.name} is drawn again: {fault}." for (model, batch), fault in faults.items()]

    def batches(self) -> list[tuple[EvaluatedModel, int]]:
        """All batches, model by model."""
        return [(model, batch) for model in self.models for batch in range(self._num_batches)]

    @property
    def _num_batches(self) -> int:
        return math.ceil(self.images / self.batch_size)

    def pending(self) -> list[tuple[EvaluatedModel, int]]:
        """Batches that are not finished."""
        return [(model, batch) for model, batch in self.batches() if not self._batch(model, batch).is_file()]

    def places(self, batch: int) -> range:
        """Indices of a batch's images among all images of a model."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, self.images))

    def image(self, model: EvaluatedModel, place: int) -> Path:
        """File of an image."""
        return self.path / "images" / model.folder / f"{place:06d}.png"

    def add(
        self,
        model: EvaluatedModel,
        batch: int,
        images: Sequence[Image.Image],
        scores: Mapping[str, Sequence[float]],
        not_finite: int = 0,
    ) -> None:
        """Write a batch's images, then its scores, which mark it as finished.

        Args:
            model: model of the batch.
            batch: index of the batch.
            images: one for each of `places(batch)`.
            scores: reward -> one score for each image; NaN for no score.
            not_finite: how many of the images had NaNs or infinities.

        Raises:
            ValueError: the number of images differs from the batch's.
            FileNotFoundError: the folder was removed or renamed.
        """
        self.settings_file.require()
        for place, image in zip(self.places(batch), images, strict=True):
            image.save(self.image(model, place))
        content = {**{name: list(values) for name, values in scores.items()}, "not_finite": not_finite}
        write_atomically(self._batch(model, batch), json.dumps(content))

    def scores(self, model: EvaluatedModel) -> tuple[dict[str, list[float]], int]:
        """All scores of a model by reward, in the order of its images, and how many images are not finite.

        Raises:
            ValueError: a batch of the model is not finished.
        """
        found = [self._read(model, batch) for batch in range(self._num_batches)]
        scores = {name: [score for content in found for score in content[name]] for name in self.rewards}
        return scores, sum(content.get("not_finite", 0) for content in found)

    def _read(self, model: EvaluatedModel, batch: int) -> dict[str, Any]:
        """The scores of a batch.

        Raises:
            ValueError: its file is missing or damaged, or has other rewards.
        """
        path = self._batch(model, batch)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            expected = len(self.places(batch))
            if all(len(content[name]) == expected == len([*map(float, content[name])]) for name in self.rewards):
                return content
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise ValueError(
            f"{path.relative_to(self.path)} does not have {len(self.places(batch))} scores of each reward"
        )

    def _batch(self, model: EvaluatedModel, batch: int) -> Path:
        return self.path / "scores" / model.folder / f"{batch:06d}.json"


def _checked_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG whose checksums are right.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
            return image.size
    # SyntaxError is how PIL calls a wrong checksum.
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{'/'.join(path.parts[-3:])} is missing, empty or cut") from error


def write_parquet(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns of equal length, by name, as a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), path)
