# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The files of a finished evaluation: scores, tables, report and grid."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from ..files import write_atomically
from ..rewards import titles
from ..table_images import Sources
from .evaluation_folder import EvaluationFolder, write_parquet
from .models import Line
from .report import report_html
from .statistics import pairwise, summarise
from .tables import MOST_PAIRED_LINES, table_csv, table_markdown

GRID_PROMPTS = 8  # columns of grid.png: the first prompts, not chosen ones


def write_results(
    folder: EvaluationFolder,
    lines: Sequence[Line],
    against: str,
    prompts: Sequence[str],
    groups: Mapping[str, Mapping[str, Sequence[int]]],
    seeds: Sequence[int],
    report_images: int,
    sources: Sources | None = None,
) -> tuple[str, list[str]]:
    """Write scores.parquet, table.json, table.md, table.csv, report.html and grid.png.

    Args:
        folder: with all batches finished.
        lines: of the tables; their models are those of the folder.
        against: the line that the others are compared with.
        prompts: all of them, in order.
        groups: `{reward: {group: places of its prompts}}`, of the rewards that have tables by group.
        seeds: of each image's noise.
        report_images: images of each model in the report.
        sources: what the images were made of: column -> an image of each prompt.

    Returns:
        The tables as Markdown, and the remarks below them: a line for each model or reward of which something is
        missing.

    Raises:
        ValueError: no reward gave a score.
        FileNotFoundError: the folder was removed or renamed.
    """
    kept = folder.settings_file
    kept.require()
    count = len(seeds) // len(prompts)
    found, not_finite = {}, {}
    for model in folder.models:
        found[model.name], not_finite[model.name] = folder.scores(model)
    line_of = {model.name: line.name for line in lines for model in line.models}
    write_parquet(folder.path / "scores.parquet", _columns(folder, line_of, found, prompts, groups, seeds))
    scores = {
        reward: {
            name: torch.tensor(values[reward], dtype=torch.float64).unflatten(0, (-1, count))
            for name, values in found.items()
        }
        for reward in folder.rewards
    }
    names = {line.name: [model.name for model in line.models] for line in lines}
    records = summarise(scores, groups, names, against)
    pairs = pairwise(scores, names) if 2 < len(names) <= MOST_PAIRED_LINES else []
    scored = {record["reward"]: scores[record["reward"]] for record in records}
    remarks = _remarks(folder, scored, not_finite)
    if not records:
        raise ValueError(f"Expected scores, got none of any reward; see scores.parquet. {' '.join(remarks)}")
    tables = table_markdown(records, remarks, pairs)
    content = {"settings": kept.settings, "lines": names, "records": records, "pairs": pairs, "remarks": remarks}
    write_atomically(folder.path / "table.json", json.dumps(content, indent=2) + "\n")
    write_atomically(folder.path / "table.md", tables)
    write_atomically(folder.path / "table.csv", table_csv(records, pairs))
    sources = sources or {}
    report = report_html(folder, records, scored, prompts, report_images, remarks, pairs, names[against], sources)
    write_atomically(folder.path / "report.html", report)
    _draw_grid(folder, found, list(scored), prompts, count, sources)
    return f"\n{len(prompts)} prompts, {count} images of each\n\n{tables}", remarks


def _remarks(
    folder: EvaluationFolder, scored: Mapping[str, Mapping[str, torch.Tensor]], not_finite: Mapping[str, int]
) -> list[str]:
    """What a reader of the tables must know: layers that do not fit, and what is missing and why."""
    told = []
    for model in folder.models:
        name, count = model.name, not_finite[model.name]
        if model.folder in folder.settings_file.remarks:
            told.append(f"{name}: {folder.settings_file.remarks[model.folder]}.")
        if count == folder.images:
            remedy = "another --mixed_precision" + (" or a smaller --lora_scale" if model.lora else "")
            told.append(f"{name}: no finite images, so it has no scores; try {remedy}.")
        elif count:
            told.append(f"{name}: {count} of {folder.images} images are not finite and have no scores.")
        silent = [reward for reward, by_model in scored.items() if by_model[name].isnan().all()]
        told += [f"{name}: no image has a score of {reward}." for reward in silent if count < folder.images]
    told += [
        f"{reward}: no image has a score in all models; it is left out of the tables."
        for reward in folder.rewards
        if reward not in scored
    ]
    left_out = folder.settings_file.left_out
    return told + [f"{name}: not in these tables, because this run's options do not name it." for name in left_out]


def _columns(
    folder: EvaluationFolder,
    line_of: Mapping[str, str],
    found: Mapping[str, Mapping[str, list[float]]],
    prompts: Sequence[str],
    groups: Mapping[str, Mapping[str, Sequence[int]]],
    seeds: Sequence[int],
) -> dict[str, list[Any]]:
    """The columns of scores.parquet: an entry for each image of each model."""
    places, count, models = range(len(seeds)), len(seeds) // len(prompts), folder.models
    columns: dict[str, list[Any]] = {
        "model": [model.name for model in models for _ in places],
        "line": [line_of[model.name] for model in models for _ in places],
        "lora": [model.lora for model in models for _ in places],
        "transformer": [model.transformer for model in models for _ in places],
        "lora_scale": [model.scale for model in models for _ in places],
        "base_for_last": [model.base_for_last for model in models for _ in places],
        "prompt_index": [place // count for place in places] * len(models),
        "prompt": [prompts[place // count] for place in places] * len(models),
        "image_index": [place % count for place in places] * len(models),
        "seed": list(seeds) * len(models),
        "image": [
            folder.image(model, place).relative_to(folder.path).as_posix() for model in models for place in places
        ],
    }
    if groups:
        group_of = {place: group for group, places in next(iter(groups.values())).items() for place in places}
        columns["group"] = [group_of[place // count] for place in places] * len(models)
    for reward in folder.rewards:
        columns[reward] = [value for model in models for value in found[model.name][reward]]
    return columns


def _draw_grid(
    folder: EvaluationFolder,
    found: Mapping[str, Mapping[str, list[float]]],
    rewards: Sequence[str],
    prompts: Sequence[str],
    count: int,
    sources: Sources,
) -> None:
    from .figures import comparison

    first = [place * count for place in range(min(GRID_PROMPTS, len(prompts)))]
    images: dict[str, list[Image.Image]] = {}
    for model in folder.models:
        images[model.name] = []
        for place in first:
            with Image.open(folder.image(model, place)) as image:
                images[model.name].append(image.convert("RGB"))
    comparison(
        images,
        [prompts[place // count] for place in first],
        folder.path / "grid.png",
        title="Base and trained models on the first prompts",
        subtitle=f"The same noise in each column. Under each image: {titles(rewards)[rewards[0]]}",
        scores={name: [values[rewards[0]][place] for place in first] for name, values in found.items()},
        sources={name: images[: len(first)] for name, images in sources.items()},
    )
