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
from .models import BASE

MOST_PAIRED_LINES = 8
"""Up to so many lines, the tables have the differences between every two of them."""


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


def tables(records: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]] = ()) -> list[Table]:
    """The tables of an evaluation: scores, scores by group, changes, win rates, and differences between every two.

    Args:
        records: from `summarise`; at least one. Each model or group of seeds has a line.
        pairs: from `pairwise`.
    """
    rewards = list(dict.fromkeys(record["reward"] for record in records))
    models = list(dict.fromkeys(record["model"] for record in records))
    found = {(record["reward"], record["model"]): record for record in records}
    # Rewards of which some seeds have no scores say so in the remarks.
    seeds = {model: max(found[reward, model]["seeds"] for reward in rewards) for model in models}
    named = {model: f"{model} ({count} seeds)" if count > 1 else model for model, count in seeds.items()}
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
    result = [Table("Score: mean [95 % interval]", heads, [[*named.values()], *scores])]
    for reward in rewards:
        # A model without scores has no groups.
        by_model = [found[reward, model].get("groups", {}) for model in models]
        groups = list(dict.fromkeys(group for of_model in by_model for group in of_model))
        columns = [_cells([of_model.get(group) for of_model in by_model], is_share[reward]) for group in groups]
        if columns:
            columns = [[*named.values()], *columns, column(reward, "overall", models)]
            result.append(Table(f"{title[reward]} by group{unit[reward]}", ["", *groups, "overall"], columns))
    against = next((record["against"] for record in records if "against" in record), None)
    if others := [model for model in models if model != against] if against else []:
        first = [named[model] for model in others]
        end = f"against {'the base' if against == BASE else named[against]}, same noise"
        changes = [column(reward, "change", others, "+") for reward in rewards]
        result.append(Table(f"Change {end}", heads, [first, *changes]))
        rates = [_cells([found[reward, model]["win_rate"] for model in others], True) for reward in rewards]
        heads = ["", *(title[reward] for reward in rewards)]
        result.append(Table(f"Win rate {end}, %", heads, [first, *rates]))
    differences = {(pair["reward"], pair["model"], pair["against"]): pair["difference"] for pair in pairs}
    for reward in rewards if pairs else ():
        cells = [
            _cells(
                [differences.get((reward, model, other)) for model in models],
                is_share[reward],
                "+",
                models.index(other),
            )
            for other in models
        ]
        caption = f"{title[reward]}{unit[reward]}: line minus column, same noise"
        result.append(Table(caption, ["", *named.values()], [[*named.values()], *cells]))
    return result


def about_intervals(records: Sequence[Mapping[str, Any]]) -> str:
    """What the intervals of the tables are."""
    if all(record["seeds"] <= 1 for record in records):
        return "Intervals are 95 % bootstrap intervals over prompts."
    return (
        "Intervals (95 %) of lines with several seeds, and of differences from or to such lines, are over seeds "
        "(Student's t; Welch's where both have several); all others are bootstrap intervals over prompts."
    )


def _cells(
    estimates: Sequence[Mapping[str, Any] | None], is_share: bool, sign: str = "", empty: int | None = None
) -> list[str]:
    """A column of `mean [low, high]`: shares in per cent, others to two digits of an interval's half width: of the
    widest over prompts, or else of the narrowest over seeds.

    Where there is no estimate, it says `no scores`; at the place `empty`, nothing.
    """
    factor, digits = (100, 1) if is_share else (1, 3)
    found = [estimate for estimate in estimates if estimate]
    halves = [((each["interval"][1] - each["interval"][0]) / 2, each["over"]) for each in found]
    # The interval of equal values is wide by a rounding error only, which says nothing about digits. Intervals over
    # few seeds are wide, too, and say nothing about the other lines.
    halves = [(half, over) for half, over in halves if half > 1e-6]
    of_seeds = [half for half, over in halves if over == "seeds"]
    halves = [half for half, over in halves if over == "prompts"] or ([min(of_seeds)] if of_seeds else [])
    if not is_share and halves:
        digits = min(max(1 - math.floor(math.log10(max(halves))), 0), 6)
    cells = []
    for place, estimate in enumerate(estimates):
        if estimate is None:
            cells.append("" if place == empty else "no scores")
            continue
        # Adding 0 turns -0.0 into 0.0.
        mean, low, high = (
            f"{round(factor * value, digits) + 0.0:{sign}.{digits}f}"
            for value in (estimate["mean"], *estimate["interval"])
        )
        cells.append(f"{mean} [{low}, {high}]")
    return cells


def table_markdown(
    records: Sequence[Mapping[str, Any]], remarks: Sequence[str] = (), pairs: Sequence[Mapping[str, Any]] = ()
) -> str:
    """All tables as Markdown."""
    parts = [f"{table.caption}\n\n{_markdown(table)}" for table in tables(records, pairs)]
    parts.append(about_intervals(records))
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


def table_csv(records: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]] = ()) -> str:
    """All numbers as CSV with the columns reward, model, measure, against, mean, low, high, over and seeds.

    Args:
        records: from `summarise`; a line for each of their measures: `score`, `change`, `win_rate`, `overall` and
            `group NAME`. Numbers of models without scores are empty.
        pairs: from `pairwise`: lines with the measure `difference`.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["reward", "model", "measure", "against", "mean", "low", "high", "over", "seeds"])
    seeds = {(record["reward"], record["model"]): record["seeds"] for record in records}
    for record in [*records, *pairs]:
        estimates = {
            name: record[name] for name in ("score", "change", "win_rate", "overall", "difference") if name in record
        }
        estimates |= {f"group {name}": estimate for name, estimate in record.get("groups", {}).items()}
        for name, estimate in estimates.items():
            numbers = ["", "", "", ""]
            if estimate is not None:
                numbers = [estimate["mean"], *estimate["interval"], estimate["over"]]
            against = record["against"] if name in ("change", "win_rate", "difference") else ""
            key = (record["reward"], record["model"])
            writer.writerow([*key, name, against, *numbers, seeds[key]])
    return file.getvalue()
