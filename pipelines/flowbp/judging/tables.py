# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The tables of an evaluation, as Markdown and as CSV."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..rewards import titles


@dataclass(frozen=True)
class Table:
    """Cells of a table.

    Attributes:
        caption: text above the table.
        heads: titles of the columns; the first is empty.
        columns: cells by column, all of the same length; the first column has the names of the models.
    """

    caption: str
    heads: Sequence[str]
    columns: Sequence[Sequence[str]]

    @property
    def lines(self) -> list[tuple[str, ...]]:
        """Cells by line."""
        return list(zip(*self.columns, strict=True))


def tables(records: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The tables of an evaluation: scores, scores by group, changes and win rates; a line for each model.

    Args:
        records: from `summarise`; at least one.
    """
    rewards = list(dict.fromkeys(record["reward"] for record in records))
    models = list(dict.fromkeys(record["model"] for record in records))
    found = {(record["reward"], record["model"]): record for record in records}
    title = titles(rewards)
    for reward in rewards:
        if left_out := found[reward, models[0]]["left_out"]:
            title[reward] += f" ({left_out} without a score)"
    is_share = {reward: found[reward, models[0]]["share"] for reward in rewards}
    unit = {reward: ", %" if is_share[reward] else "" for reward in rewards}

    def column(reward: str, measure: str, models: Sequence[str], sign: str = "") -> list[str]:
        return _cells([found[reward, model][measure] for model in models], is_share[reward], sign)

    heads = ["", *(title[reward] + unit[reward] for reward in rewards)]
    scores = [column(reward, "score", models) for reward in rewards]
    result = [Table("Score: mean [95 % interval]", heads, [models, *scores])]
    for reward in rewards:
        # A model without scores has no groups.
        by_model = [found[reward, model].get("groups", {}) for model in models]
        groups = list(dict.fromkeys(group for of_model in by_model for group in of_model))
        columns = [_cells([of_model.get(group) for of_model in by_model], is_share[reward]) for group in groups]
        if columns:
            columns = [models, *columns, column(reward, "overall", models)]
            result.append(Table(f"{title[reward]} by group{unit[reward]}", ["", *groups, "overall"], columns))
    if others := models[1:]:
        changes = [column(reward, "change", others, "+") for reward in rewards]
        result.append(Table("Change against the base, same noise", heads, [others, *changes]))
        rates = [_cells([found[reward, model]["win_rate"] for model in others], True) for reward in rewards]
        heads = ["", *(title[reward] for reward in rewards)]
        result.append(Table("Win rate against the base, same noise, %", heads, [others, *rates]))
    return result


def _cells(estimates: Sequence[Mapping[str, Any] | None], is_share: bool, sign: str = "") -> list[str]:
    """A column of `mean [low, high]`: shares in per cent, others to two digits of the widest interval's half width.

    Where there is no estimate, it says `no scores`.
    """
    factor, digits = (100, 1) if is_share else (1, 3)
    halves = [(estimate["interval"][1] - estimate["interval"][0]) / 2 for estimate in estimates if estimate]
    # The interval of equal values is wide by a rounding error only, which says nothing about digits.
    halves = [half for half in halves if half > 1e-6]
    if not is_share and halves:
        digits = min(max(1 - math.floor(math.log10(max(halves))), 0), 6)
    cells = []
    for estimate in estimates:
        if estimate is None:
            cells.append("no scores")
            continue
        # Adding 0 turns -0.0 into 0.0.
        mean, low, high = (
            f"{round(factor * value, digits) + 0.0:{sign}.{digits}f}"
            for value in (estimate["mean"], *estimate["interval"])
        )
        cells.append(f"{mean} [{low}, {high}]")
    return cells


def table_markdown(records: Sequence[Mapping[str, Any]], remarks: Sequence[str] = ()) -> str:
    """All tables as Markdown.

    Args:
        records: from `summarise`.
        remarks: a line each, below the tables.
    """
    parts = [f"{table.caption}\n\n{_markdown(table)}" for table in tables(records)]
    if remarks:
        parts.append("\n".join(f"- {' '.join(remark.split())}" for remark in remarks))
    return "\n\n".join(parts) + "\n"


def _markdown(table: Table) -> str:
    """Columns are padded to equal widths, the first to the left and the others to the right."""
    # Names of models and groups are the user's.
    lines = [[" ".join(cell.split()).replace("|", r"\|") for cell in line] for line in (table.heads, *table.lines)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = []
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        padded.append(f"| {' | '.join(cells)} |")
    rules = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    return "\n".join([padded[0], f"|{'|'.join(rules)}|", *padded[1:]])


def table_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """All numbers as CSV with the columns reward, model, measure, mean, low and high.

    Args:
        records: from `summarise`; a line for each of their measures: `score`, `change`, `win_rate`, `overall` and
            `group NAME`. Numbers of models without scores are empty.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["reward", "model", "measure", "mean", "low", "high"])
    for record in records:
        estimates = {name: record[name] for name in ("score", "change", "win_rate", "overall") if name in record}
        estimates |= {f"group {name}": estimate for name, estimate in record.get("groups", {}).items()}
        for name, estimate in estimates.items():
            numbers = ["", "", ""] if estimate is None else [estimate["mean"], *estimate["interval"]]
            writer.writerow([record["reward"], record["model"], name, *numbers])
    return file.getvalue()
