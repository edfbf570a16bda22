# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The files of a finished evaluation: scores, tables, report and grid."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from ..files import write_atomically
from ..rewards import titles
from .figures import comparison
from .report import report_html
from .statistics import summarise
from .store import Store, write_parquet
from .tables import table_csv, table_markdown

GRID_PROMPTS = 8  # columns of grid.png: the first prompts, not chosen ones


def write_results(
    store: Store,
    rewards: Sequence[str],
    prompts: Sequence[str],
    groups: Mapping[str, Mapping[str, Sequence[int]]],
    seeds: Sequence[int],
    report_images: int,
) -> str:
    """Write scores.parquet, table.json, table.md, table.csv, report.html and grid.png.

    Args:
        store: with all batches finished.
        rewards: names.
        prompts: all of them, in order.
        groups: `{reward: {group: places of its prompts}}`, of the rewards that have tables by group.
        seeds: of each image's noise.
        report_images: images of each model in the report.

    Returns:
        The tables as Markdown, after a line for each reward that gave no scores.

    Raises:
        ValueError: no reward gave a score.
    """
    count = len(seeds) // len(prompts)
    found = {model.name: store.scores(model) for model in store.models}
    write_parquet(store.folder / "scores.parquet", _columns(store, found, rewards, prompts, groups, seeds))
    scores = {
        reward: {
            name: torch.tensor(values[reward], dtype=torch.float64).unflatten(0, (-1, count))
            for name, values in found.items()
        }
        for reward in rewards
    }
    records = summarise(scores, groups)
    without = sorted(set(rewards) - {record["reward"] for record in records})
    if not records:
        raise ValueError("Expected scores, got none from any reward; see scores.parquet.")
    scores = {reward: values for reward, values in scores.items() if reward not in without}
    tables = table_markdown(records)
    content = json.dumps({"settings": store.settings, "records": records}, indent=2) + "\n"
    write_atomically(store.folder / "table.json", content)
    write_atomically(store.folder / "table.md", tables)
    write_atomically(store.folder / "table.csv", table_csv(records))
    write_atomically(store.folder / "report.html", report_html(store, records, scores, prompts, report_images))
    _draw_grid(store, found, rewards, prompts, count)
    lines = [f"{reward} gave no image a score; it is left out of the tables." for reward in without]
    return "\n".join([*lines, f"\n{len(prompts)} prompts, {count} images of each\n\n{tables}"])


def _columns(
    store: Store,
    found: Mapping[str, Mapping[str, list[float]]],
    rewards: Sequence[str],
    prompts: Sequence[str],
    groups: Mapping[str, Mapping[str, Sequence[int]]],
    seeds: Sequence[int],
) -> dict[str, list[Any]]:
    """The columns of scores.parquet: an entry for each image of each model."""
    places, count, models = range(len(seeds)), len(seeds) // len(prompts), store.models
    columns: dict[str, list[Any]] = {
        "model": [model.name for model in models for _ in places],
        "lora": [model.lora for model in models for _ in places],
        "lora_scale": [model.scale for model in models for _ in places],
        "base_for_last": [model.base_for_last for model in models for _ in places],
        "prompt_index": [place // count for place in places] * len(models),
        "prompt": [prompts[place // count] for place in places] * len(models),
        "image_index": [place % count for place in places] * len(models),
        "seed": list(seeds) * len(models),
        "image": [str(store.image(model, place).relative_to(store.folder)) for model in models for place in places],
    }
    if groups:
        group_of = {place: group for group, places in next(iter(groups.values())).items() for place in places}
        columns["group"] = [group_of[place // count] for place in places] * len(models)
    return columns | {reward: [value for model in models for value in found[model.name][reward]] for reward in rewards}


def _draw_grid(
    store: Store,
    found: Mapping[str, Mapping[str, list[float]]],
    rewards: Sequence[str],
    prompts: Sequence[str],
    count: int,
) -> None:
    first = [place * count for place in range(min(GRID_PROMPTS, len(prompts)))]
    images: dict[str, list[Image.Image]] = {}
    for model in store.models:
        images[model.name] = []
        for place in first:
            with Image.open(store.image(model, place)) as image:
                images[model.name].append(image.convert("RGB"))
    comparison(
        images,
        [prompts[place // count] for place in first],
        store.folder / "grid.png",
        title="Base and LoRAs on the first prompts",
        subtitle=f"The same noise in each column. Under each image: {titles(rewards)[rewards[0]]}",
        scores={name: [values[rewards[0]][place] for place in first] for name, values in found.items()},
    )
