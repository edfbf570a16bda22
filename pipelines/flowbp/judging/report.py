# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The report of an evaluation: one HTML file with the images, the tables and the settings."""

import base64
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from ..rewards import titles
from ..table_images import Sources
from .evaluation_folder import EvaluationFolder
from .models import EvaluatedModel
from .tables import Table, about_intervals, tables

TEMPLATE = "report.html.jinja"
EMBEDDED_SIDE = 384
"""Longest side in pixels of an image in the report; larger images are reduced."""


def report_html(
    folder: EvaluationFolder,
    records: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, torch.Tensor]],
    prompts: Sequence[str],
    limit: int,
    remarks: Sequence[str] = (),
    pairs: Sequence[Mapping[str, Any]] = (),
    reference: Sequence[str] = (),
    sources: Sources | None = None,
) -> str:
    """The report as a page that needs no other file.

    Its images are sorted by the change of the first reward, for the model that gained most. With JavaScript, readers
    choose the reward and the model.

    Args:
        folder: all of its batches are finished; it has a base model and at least one other.
        records: from `summarise`.
        scores: as given to `summarise`.
        prompts: P prompts.
        limit: number of images of each model in the report: those whose score changed most.
        remarks: a line each, below the tables.
        pairs: from `pairwise`.
        reference: the models of the line that the others are compared with, of seeds their mean; default: the base.
        sources: what the images were made of, shown before them: column -> an image of each prompt.
    """
    settings = folder.settings_file.settings
    cards = _Cards(folder, scores, prompts, reference or [folder.models[0].name], sources or {})
    shown = largest_changes(cards.changes(cards.rewards[0], cards.leader), limit)
    environment = Environment(
        # The template lies beside this module, in a checkout and in an installed package.
        loader=PackageLoader(__package__, ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(TEMPLATE).render(
        base_model=settings["model"],
        num_prompts=len(prompts),
        images_per_prompt=cards.per_prompt,
        num_images=folder.images,
        titles=cards.titles,
        rewards=cards.rewards,
        models=[model.name for model in cards.others],
        leader=cards.leader.name,
        cards=[cards.card(place) for place in shown],
        tables=tables(records, pairs),
        about_intervals=about_intervals(records),
        against=next(record["against"] for record in records if "against" in record),
        num_loras=len(folder.models) - 1,
        remarks=remarks,
        described=_described(folder.models),
        settings={name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()},
    )


def largest_changes(changes: Sequence[float], limit: int) -> list[int]:
    """Indices of the `limit` largest gains and losses, half of each, in falling order of change."""
    order = sorted(range(len(changes)), key=lambda place: (-changes[place], place))
    if len(order) <= limit:
        return order
    return order[: limit - limit // 2] + order[len(order) - limit // 2 :]


class _Cards:
    """What the report shows of one image of every model: a card with its prompt, the images and their scores."""

    def __init__(
        self,
        folder: EvaluationFolder,
        scores: Mapping[str, Mapping[str, torch.Tensor]],
        prompts: Sequence[str],
        reference: Sequence[str],
        sources: Sources,
    ) -> None:
        self._folder, self._prompts, self._sources = folder, prompts, sources
        self.others = [model for model in folder.models if model.name not in reference]
        self.rewards = list(scores)
        self.titles = titles(self.rewards)
        self.per_prompt = folder.images // len(prompts)
        self._scores = {
            (reward, model.name): scores[reward][model.name].flatten().tolist()
            for reward in scores
            for model in folder.models
        }
        bases = {reward: sum(scores[reward][name] for name in reference) / len(reference) for reward in scores}
        self._changes = {
            (reward, model.name): (scores[reward][model.name] - bases[reward]).flatten().tolist()
            for reward in scores
            for model in self.others
        }
        self.leader = max(self.others, key=self._gain)

    def _gain(self, model: EvaluatedModel) -> float:
        """The mean change of the first reward; minus infinity for a model without scores, which cannot lead."""
        changes = [change for change in self._changes[self.rewards[0], model.name] if not math.isnan(change)]
        return statistics.fmean(changes) if changes else -math.inf

    def changes(self, reward: str, model: EvaluatedModel) -> list[float]:
        """By how much each image scores above the reference's; 0 for images without a score."""
        return [0.0 if math.isnan(change) else change for change in self._changes[reward, model.name]]

    def card(self, place: int) -> dict[str, Any]:
        """What the template shows of the image with this index."""
        changes = {
            f"{name}/{reward}": 0.0 if math.isnan(of_images[place]) else of_images[place]
            for (reward, name), of_images in self._changes.items()
        }
        return {
            "prompt": self._prompts[place // self.per_prompt],
            "number": place % self.per_prompt + 1,
            "changes": json.dumps(changes),
            "images": [
                *(self._source(name, place // self.per_prompt) for name in self._sources),
                *(self._image(model, place) for model in self._folder.models),
            ],
        }

    def _source(self, name: str, prompt: int) -> dict[str, Any]:
        source, width = _embedded(self._sources[name][prompt].shown((EMBEDDED_SIDE, EMBEDDED_SIDE)))
        alt = f"{name} of the prompt “{self._prompts[prompt]}”"
        return {"model": name, "is_plain": True, "scores": [], "source": source, "width": width, "alt": alt}

    def _image(self, model: EvaluatedModel, place: int) -> dict[str, Any]:
        scores = []
        for reward in self.rewards:
            value = self._scores[reward, model.name][place]
            change = self._changes[reward, model.name][place] if model in self.others else math.nan
            scores.append(
                {
                    "reward": self.titles[reward],
                    "value": "no score" if math.isnan(value) else _short(value),
                    "change": "" if math.isnan(change) else f"({_short(change, '+')})",
                    "direction": "up" if change > 0 else "down" if change < 0 else "same",
                }
            )
        with Image.open(self._folder.image(model, place)) as opened:
            source, width = _embedded(opened)
        words = ", ".join(f"{score['reward']} {score['value']}" for score in scores)
        prompt = self._prompts[place // self.per_prompt]
        return {
            "model": model.name,
            "is_plain": model is self._folder.models[0],
            "scores": scores,
            "source": source,
            "width": width,
            "alt": f"Image of {model.name} for the prompt “{prompt}”; {words}",
        }


def _embedded(image: Image.Image) -> tuple[str, int | None]:
    """An image as a `data:` address: a small one as PNG, with the width to show it with; others as JPEG, and None."""
    image = image.convert("RGB")
    # Small images are shown enlarged by a whole factor, which keeps their pixels even.
    factor = EMBEDDED_SIDE // 2 // max(image.size)
    image.thumbnail((EMBEDDED_SIDE, EMBEDDED_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if factor:
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=90)
    kind = "png" if factor else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    return source, factor * image.width or None


def _short(value: float, sign: str = "") -> str:
    """A number with at most three decimals."""
    return f"{round(value, 3) + 0.0:{sign}.3f}".rstrip("0").rstrip(".")


def _described(models: Sequence[EvaluatedModel]) -> Table:
    columns = [
        [model.name for model in models],
        [model.lora or model.transformer or "" for model in models],
        ["" if model.lora is None else f"{model.scale:g}" for model in models],
        [str(model.base_for_last or "") for model in models],
        [(model.digest or "")[:12] for model in models],
    ]
    return Table("Models", ["", "LoRA or transformer", "scale", "base for last", "SHA-256"], columns)
