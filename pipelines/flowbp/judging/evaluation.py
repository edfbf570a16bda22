# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What an evaluation needs besides pictures and rewards: its rows, intervals, tables, report, and how it resumes.

Nothing here runs a model. `training/evaluate_flowbp.py` draws and scores.
"""

import base64
import csv
import hashlib
import html
import io
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from PIL import Image

from ..publishing.push import LORA_FILE
from ..publishing.run_info import write_whole

BASE = "base"
# How the tables name the rewards; others keep their name, users' own are named by their factory.
TITLES = {
    "hpsv2.1": "HPSv2.1",
    "hpsv3": "HPSv3",
    "pickscore": "PickScore",
    "imagereward": "ImageReward",
    "unifiedreward-alignment": "UR-Align",
    "unifiedreward-quality": "UR-IQ",
    "clip": "CLIP",
    "aesthetic": "Aesthetic",
    "geneval": "GenEval",
}


# The rows of the table.


@dataclass(frozen=True)
class Row:
    """A model that is evaluated.

    Attributes:
        name: in the tables and the report.
        lora: folder, file or Hub id of its LoRA; None for the base model.
        scale: factor on the LoRA.
        base_for_last: the base model runs this many of the last steps.
        digest: of the LoRA's file, where it is on this machine.
    """

    name: str
    lora: str | None = None
    scale: float = 1.0
    base_for_last: int = 0
    digest: str | None = None

    @property
    def folder(self) -> str:
        """The name as a folder's."""
        return re.sub(r"[^\w.-]+", "_", self.name)


def make_rows(loras: Sequence[str], scales: Sequence[float], base_for_last: Sequence[int]) -> list[Row]:
    """The base model, then every LoRA at every scale with every number of last steps left to the base model.

    Args:
        loras: each `NAME=SOURCE` or a source alone, whose last part is then its name. A source is a folder, a
            .safetensors file or a Hub id.
        scales: at least one.
        base_for_last: at least one.

    Raises:
        ValueError: a source that is not there, or two rows of one name.
    """
    rows = [Row(BASE)]
    for given in loras:
        name, equals, source = given.partition("=")
        if not equals:
            source = given
            name = Path(source).resolve().name if Path(source).exists() else source.rpartition("/")[2]
        if not name or not source:
            raise ValueError(f"--lora {given}: expected NAME=SOURCE or SOURCE.")
        file = lora_file(source)
        digest = None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
        for scale in scales:
            for last in base_for_last:
                title = name
                if len(scales) > 1 or scale != 1:
                    title += f" × {scale:g}"
                if last:
                    title += f", base for last {last}"
                rows.append(Row(title, source, scale, last, digest))
    folders = [row.folder for row in rows]
    for row in rows:
        if folders.count(row.folder) > 1:
            raise ValueError(f"--lora: expected a name for each row, got {row.name!r} twice; write NAME=SOURCE.")
    return rows


def lora_file(source: str) -> Path | None:
    """The file of a LoRA on this machine; None for what can only be a Hub id.

    Raises:
        ValueError: neither, or a folder in which the file cannot be told.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        stock = path / LORA_FILE
        found = [stock] if stock.is_file() else sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise ValueError(f"--lora {source}: expected one .safetensors file in the folder, got {names}.")
        return found[0]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.endswith(".safetensors"):
        raise ValueError(f"--lora {source}: no such file or folder, and it cannot be a Hub id (user/name).")
    return None


def reward_names(spec: str) -> list[str]:
    """The rewards of `--rewards`: names of `load_reward` with commas between them, and no weights.

    Raises:
        ValueError: an empty name, one that is there twice, or a weight.
    """
    names = [name.strip() for name in spec.split(",")]
    for name in names:
        if not name or names.count(name) > 1:
            raise ValueError(f"--rewards {spec}: expected different names with commas between them.")
        if re.fullmatch(r".+:[-+]?[\d.]+(e[-+]?\d+)?", name):
            raise ValueError(f"--rewards {spec}: expected names without weights, got {name!r}; each is scored alone.")
    return names


def titles(names: Sequence[str]) -> dict[str, str]:
    """Column titles by reward: the paper's, the factory's name of a user's own, else the reward's name."""
    short = {name: TITLES.get(name, name.rpartition(":")[2]) for name in names}
    return {name: title if [*short.values()].count(title) == 1 else name for name, title in short.items()}


# Statistics. Scores of a row are (P, m): prompts down, images of a prompt across.


def interval(values: torch.Tensor, draws: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `(P,)` values, over prompts (percentiles of resampled means)."""
    return _percentiles(_resampled_means(values, draws, torch.Generator().manual_seed(0)))


def _resampled_means(values: torch.Tensor, draws: int, generator: torch.Generator) -> torch.Tensor:
    # In parts, since indices and values of all draws would take gigabytes for thousands of prompts.
    parts = []
    for start in range(0, draws, 1000):
        count = min(1000, draws - start)
        parts.append(values[torch.randint(len(values), (count, len(values)), generator=generator)].mean(1))
    return torch.cat(parts)


def _percentiles(means: torch.Tensor) -> tuple[float, float]:
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high


def wins(scores: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Win rate of each prompt: the share of its images that score above the base model's image of the same noise.

    Args:
        scores, base: `(P, m)`; equal scores count half, images without a score (NaN) in either do not count.

    Returns:
        `(P,)` in float64, NaN where no image counts.
    """
    won = (scores > base).double() + 0.5 * (scores == base).double()
    return won.masked_fill((scores + base).isnan(), math.nan).nanmean(1)


def _estimate(values: torch.Tensor) -> dict[str, Any]:
    values = values[~values.isnan()]
    return {"mean": values.mean().item(), "interval": list(interval(values))}


def summarise(
    scores: Mapping[str, Mapping[str, torch.Tensor]], groups: Mapping[str, Mapping[str, Sequence[int]]]
) -> list[dict[str, Any]]:
    """A record for each reward and row.

    Args:
        scores: reward -> row -> `(P, m)` float64 scores; the first row is the base model. An image that a judge gave
            no score in some row (NaN) is left out in all rows, so that they stay comparable.
        groups: reward -> group -> its prompts' places, for the rewards that have a table by group (GenEval's tasks).

    Returns:
        Records with `reward`, `row`, `share` (all of the reward's scores are 0 or 1), `left_out` (images without a
        score), and `score`, each a `mean` and a
        95 % `interval`; of rows but the base's also `change` and `win_rate`, against the base model's images of the
        same noise. With groups also `groups`, by name, and `overall`, the mean of the groups' means, as in GenEval.

        A reward that scored no image in all rows has no records.
    """
    records = []
    for reward, by_row in scores.items():
        missing = torch.stack([values.isnan() for values in by_row.values()]).any(0)
        if bool(missing.all()):
            continue
        by_row = {name: values.masked_fill(missing, math.nan) for name, values in by_row.items()}
        base = next(iter(by_row.values()))
        is_share = all(bool(((values == 0) | (values == 1) | missing).all()) for values in by_row.values())
        for name, values in by_row.items():
            left_out = int(missing.sum())
            record: dict[str, Any] = {"reward": reward, "row": name, "share": is_share, "left_out": left_out}
            record["score"] = _estimate(values.nanmean(1))
            if values is not base:
                record["change"] = _estimate((values - base).nanmean(1))
                record["win_rate"] = _estimate(wins(values, base))
            if reward in groups:
                record |= _by_group(values.nanmean(1), groups[reward])
            records.append(record)
    return records


def _by_group(values: torch.Tensor, groups: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    parts = {name: values[torch.tensor(places)] for name, places in groups.items()}
    # A group whose images a judge gave no score has no place in the table; it is the same for all rows.
    parts = {name: part[~part.isnan()] for name, part in parts.items()}
    parts = {name: part for name, part in parts.items() if len(part)}
    # Prompts are resampled within their groups, by one generator, so that groups vary independently.
    generator = torch.Generator().manual_seed(0)
    means = torch.stack([_resampled_means(part, 10_000, generator) for part in parts.values()]).mean(0)
    overall = statistics.fmean(part.mean().item() for part in parts.values())
    return {
        "groups": {name: _estimate(part) for name, part in parts.items()},
        "overall": {"mean": overall, "interval": list(_percentiles(means))},
    }


# Tables.


def _cells(estimates: Sequence[Mapping[str, Any] | None], is_share: bool, sign: str = "") -> list[str]:
    """A column of `mean [low, high]`: shares in per cent, others to two digits of the widest interval's half width."""
    factor, digits = (100, 1) if is_share else (1, 3)
    halves = [(estimate["interval"][1] - estimate["interval"][0]) / 2 for estimate in estimates if estimate]
    # Intervals of rounding errors say nothing about the digits.
    halves = [half for half in halves if half > 1e-6]
    if not is_share and halves:
        digits = min(max(1 - math.floor(math.log10(max(halves))), 0), 6)
    cells = []
    for estimate in estimates:
        if estimate is None:
            cells.append("")
            continue
        # Adding 0 turns -0.0 into 0.0.
        mean, low, high = (
            f"{round(factor * value, digits) + 0.0:{sign}.{digits}f}"
            for value in (estimate["mean"], *estimate["interval"])
        )
        cells.append(f"{mean} [{low}, {high}]")
    return cells


def _markdown(heads: Sequence[str], columns: Sequence[Sequence[str]]) -> str:
    lines = [heads, *zip(*columns, strict=True)]
    widths = [max(len(line[place].replace("|", r"\|")) for line in lines) for place in range(len(heads))]
    padded = [
        "| "
        + " | ".join(
            cell.replace("|", r"\|").ljust(width) if place == 0 else cell.replace("|", r"\|").rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    ]
    rule = "|" + "|".join(
        "-" * (width + 2) if place == 0 else "-" * (width + 1) + ":" for place, width in enumerate(widths)
    )
    return "\n".join([padded[0], rule + "|", *padded[1:]])


def tables(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """The tables of an evaluation, by caption: heads, and columns of cells; rows down and rewards across.

    Args:
        records: of `summarise`.
    """
    rewards = list(dict.fromkeys(record["reward"] for record in records))
    rows = list(dict.fromkeys(record["row"] for record in records))
    of = {(record["reward"], record["row"]): record for record in records}
    title = titles(rewards)
    for reward in rewards:
        if of[reward, rows[0]]["left_out"]:
            title[reward] += f" ({of[reward, rows[0]]['left_out']} without a score)"
    share = {reward: of[reward, rows[0]]["share"] for reward in rewards}
    heads = ["", *(title[reward] + (", %" if share[reward] else "") for reward in rewards)]
    found = {
        "Score: mean [95 % interval]": (
            heads,
            [rows, *(_cells([of[reward, row]["score"] for row in rows], share[reward]) for reward in rewards)],
        )
    }
    for reward in rewards:
        if "groups" not in of[reward, rows[0]]:
            continue
        groups = list(of[reward, rows[0]]["groups"])
        columns = [_cells([of[reward, row]["groups"][group] for row in rows], share[reward]) for group in groups]
        overall = _cells([of[reward, row]["overall"] for row in rows], share[reward])
        unit = ", %" if share[reward] else ""
        found[f"{title[reward]} by group{unit}"] = (["", *groups, "overall"], [rows, *columns, overall])
    if len(rows) > 1:
        others = rows[1:]
        found["Change against the base, same noise"] = (
            heads,
            [
                others,
                *(_cells([of[reward, row]["change"] for row in others], share[reward], "+") for reward in rewards),
            ],
        )
        found["Win rate against the base, same noise, %"] = (
            ["", *(title[reward] for reward in rewards)],
            [others, *(_cells([of[reward, row]["win_rate"] for row in others], True) for reward in rewards)],
        )
    return found


def table_markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """All tables as Markdown."""
    return "\n\n".join(f"{caption}\n\n{_markdown(*content)}" for caption, content in tables(records).items()) + "\n"


def table_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as CSV, a line for each reward, row and measure (score, change, win_rate, overall, each group)."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["reward", "row", "measure", "mean", "low", "high"])
    for record in records:
        estimates = {name: record[name] for name in ("score", "change", "win_rate", "overall") if name in record}
        estimates |= {f"group {name}": estimate for name, estimate in record.get("groups", {}).items()}
        for name, estimate in estimates.items():
            writer.writerow([record["reward"], record["row"], name, estimate["mean"], *estimate["interval"]])
    return file.getvalue()


# The folder, and how an evaluation resumes.


class Store:
    """The folder of an evaluation: finished batches of each row, and the settings that they were made with.

    A batch is the unit of work and always holds the same images, whatever the number of processes and however often
    the evaluation was stopped; so every run of it computes the same numbers.

    Args:
        folder: `--output_dir`.
        settings: what decides the pictures and scores of every row, as JSON holds it.
        rows: to evaluate.
        images: how many of each row.
        batch_size: images of a batch.

    Raises:
        ValueError: the folder holds an evaluation with other settings, or other LoRAs of the same names.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], rows: Sequence[Row], images: int, batch_size: int
    ) -> None:
        self.folder, self.rows, self.images, self.batch_size = folder, list(rows), images, batch_size
        self.settings = json.loads(json.dumps(dict(settings)))
        self._path = folder / "settings.json"
        found = {row.folder: asdict(row) for row in rows}
        if self._path.is_file():
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            for name in dict.fromkeys([*self.settings, *kept["settings"]]):
                old, new = kept["settings"].get(name), self.settings.get(name)
                if old != new:
                    raise ValueError(
                        f"--output_dir {folder} holds an evaluation with {name} {old!r}, got {new!r}; choose another "
                        "folder, or remove this one."
                    )
            for name, row in found.items():
                # A row of which nothing was drawn, because its LoRA did not load, may change.
                if kept["rows"].get(name, row) != row and any((folder / "scores" / name).glob("*.json")):
                    raise ValueError(
                        f"--output_dir {folder} holds another LoRA of the name {row['name']!r} (its source or file "
                        "changed); choose another name or folder."
                    )
            found = {**kept["rows"], **found}
        self._content = json.dumps({"settings": self.settings, "rows": found}, indent=2)

    def create(self) -> None:
        """Make the folder and write its settings; by one process, before the others look for finished batches."""
        for row in self.rows:
            (self.folder / "scores" / row.folder).mkdir(parents=True, exist_ok=True)
            (self.folder / "images" / row.folder).mkdir(parents=True, exist_ok=True)
        write_whole(self._path, self._content + "\n")

    def batches(self) -> list[tuple[Row, int]]:
        """All batches, row by row."""
        return [(row, batch) for row in self.rows for batch in range(math.ceil(self.images / self.batch_size))]

    def pending(self) -> list[tuple[Row, int]]:
        """Those that are not finished."""
        return [(row, batch) for row, batch in self.batches() if not self._batch(row, batch).is_file()]

    def places(self, batch: int) -> range:
        """The places of a batch's images among all of a row's."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, self.images))

    def image(self, row: Row, place: int) -> Path:
        """The file of an image."""
        return self.folder / "images" / row.folder / f"{place:06d}.png"

    def add(self, row: Row, batch: int, images: Sequence[Image.Image], scores: Mapping[str, Sequence[float]]) -> None:
        """Keep a batch; it is finished when its scores are there, which are written last."""
        for place, image in zip(self.places(batch), images, strict=True):
            image.save(self.image(row, place))
        write_whole(self._batch(row, batch), json.dumps({name: list(values) for name, values in scores.items()}))

    def scores(self, row: Row) -> dict[str, list[float]]:
        """All scores of a row by reward, when its batches are finished."""
        found: dict[str, list[float]] = {}
        for other, batch in self.batches():
            if other == row:
                content = json.loads(self._batch(row, batch).read_text(encoding="utf-8"))
                for name, values in content.items():
                    found.setdefault(name, []).extend(values)
        return found

    def _batch(self, row: Row, batch: int) -> Path:
        return self.folder / "scores" / row.folder / f"{batch:06d}.json"


def write_parquet(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write a table of equally long columns."""
    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), path)


# The report.

_STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --grey: #6b7280; --line: #e5e7eb; --accent: #0f766e; --drop: #b42318; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; margin: 2rem auto; max-width: 1280px;
  padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
p, label { color: var(--grey); margin: .25rem 0 .75rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--grey); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
.settings td { text-align: left; } .settings td + td { white-space: normal; overflow-wrap: anywhere; }
.card { border-top: 1px solid var(--line); padding: 1rem 0; break-inside: avoid; }
.card p { color: var(--ink); margin: 0 0 .5rem; }
.images { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; min-width: 13rem; max-width: 384px; }
figure img { display: block; min-width: 144px; max-width: 100%; }
figure img.small { image-rendering: pixelated; }
figcaption { font-size: .82rem; color: var(--grey); } figcaption b { color: var(--ink); }
.up { color: var(--accent); } .down { color: var(--drop); }
select { font: inherit; margin-right: 1rem; }
"""

_SCRIPT = """
const cards = [...document.querySelectorAll(".card")], list = document.getElementById("cards");
const chosen = ["row", "reward"].map(name => document.getElementById(name));
function sort() {
  const key = chosen.map(select => select.value).join("/");
  const change = card => JSON.parse(card.dataset.change)[key];
  cards.sort((one, other) => change(other) - change(one)).forEach(card => list.append(card));
}
chosen.forEach(select => select.addEventListener("change", sort));
"""

EMBEDDED_SIDE = 384  # pixels; larger images are made smaller for the report


def _embedded(path: Path) -> str:
    """An `img` with the picture in it: small ones exact, larger ones as JPEG."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    is_small = max(image.size) <= EMBEDDED_SIDE // 2
    image.thumbnail((EMBEDDED_SIDE, EMBEDDED_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if is_small:
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=90)
    kind, style = ("png", ' class="small"') if is_small else ("jpeg", "")
    return f'<img{style} alt="" src="data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}">'


def _html_table(heads: Sequence[str], columns: Sequence[Sequence[str]], style: str = "") -> str:
    def line(tag: str, cells: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = [line("th", heads)] if any(heads) else []
    lines += [line("td", cells) for cells in zip(*columns, strict=True)]
    return f'<div class="scroll"><table{style}>\n' + "\n".join(lines) + "\n</table></div>"


def largest_changes(changes: Sequence[float], limit: int) -> list[int]:
    """Places of the `limit` largest gains and losses, half of each, in falling order of change."""
    order = sorted(range(len(changes)), key=lambda place: (-changes[place], place))
    if len(order) <= limit:
        return order
    return order[: limit - limit // 2] + order[len(order) - limit // 2 :]


def _short(value: float, sign: str = "") -> str:
    """At most three decimals."""
    return f"{round(value, 3) + 0.0:{sign}.3f}".rstrip("0").rstrip(".")


def report_html(
    store: Store,
    records: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, torch.Tensor]],
    prompts: Sequence[str],
    limit: int,
) -> str:
    """The report as one page that needs no other file: tables, settings, and pictures sorted by change in score.

    The page sorts by the first reward and the row that gained most of it; with scripts allowed, by any of them.

    Args:
        store: with all batches finished.
        records: of `summarise`.
        scores: as `summarise`'s.
        prompts: all P of them.
        limit: how many images of each row are shown: those whose score changed most.
    """
    rewards, rows = list(scores), store.rows
    base, others = rows[0], rows[1:]
    title = titles(rewards)
    flat = {(reward, row.name): scores[reward][row.name].flatten().tolist() for reward in rewards for row in rows}

    def change(reward: str, row: Row, place: int) -> float:
        found = flat[reward, row.name][place] - flat[reward, base.name][place]
        return 0.0 if math.isnan(found) else found

    by_row = {row.name: [change(rewards[0], row, place) for place in range(store.images)] for row in others}
    leader = max(by_row, key=lambda name: statistics.fmean(by_row[name]))
    shown = largest_changes(by_row[leader], limit)
    per_prompt = store.images // len(prompts)
    cards = []
    for place in shown:
        figures = []
        for row in rows:
            lines = []
            for reward in rewards:
                text = f"{html.escape(title[reward])} {_short(flat[reward, row.name][place])}"
                if row is not base:
                    by = change(reward, row, place)
                    kind = "up" if by > 0 else "down" if by < 0 else ""
                    text += f' <span class="{kind}">({_short(by, "+")})</span>'
                lines.append(text)
            caption = f"<b>{html.escape(row.name)}</b><br>" + "<br>".join(lines)
            figures.append(f"<figure>{_embedded(store.image(row, place))}<figcaption>{caption}</figcaption></figure>")
        changes = {f"{row.name}/{reward}": change(reward, row, place) for row in others for reward in rewards}
        number = f" · image {place % per_prompt + 1} of {per_prompt}" if per_prompt > 1 else ""
        cards.append(
            f'<div class="card" data-change="{html.escape(json.dumps(changes))}">'
            f"<p>{html.escape(prompts[place // per_prompt])}{number}</p>"
            f'<div class="images">{"".join(figures)}</div></div>'
        )

    def choice(name: str, options: Mapping[str, str], default: str) -> str:
        items = "".join(
            f'<option value="{html.escape(key)}"{" selected" if key == default else ""}>{html.escape(text)}</option>'
            for key, text in options.items()
        )
        return f'<select id="{name}">{items}</select>'

    which = f"All {store.images} images of each model"
    if len(shown) < store.images:
        which = (
            f"{len(shown)} of {store.images} images of each model: the largest gains and losses of "
            f"{html.escape(leader)} in {html.escape(title[rewards[0]])}"
        )
    parts = [
        f"<h1>{html.escape(str(store.settings['model']))}: base against {len(others)} "
        f"{'model' if len(others) == 1 else 'models'} with a LoRA</h1>",
        f"<p>{len(prompts)} prompts, {per_prompt} {'image' if per_prompt == 1 else 'images'} of each, the same noise "
        "for all models. Intervals are 95 % bootstrap intervals over prompts.</p>",
    ]
    parts += [
        f"<h2>{html.escape(caption)}</h2>\n{_html_table(*content)}" for caption, content in tables(records).items()
    ]
    described = [
        [row.name for row in rows],
        [row.lora or "" for row in rows],
        ["" if row.lora is None else f"{row.scale:g}" for row in rows],
        [str(row.base_for_last or "") for row in rows],
        [(row.digest or "")[:12] for row in rows],
    ]
    parts += [
        f"<h2>Images, sorted by change in score</h2>\n<p>{which}.</p>",
        f"<label>Sort by {choice('reward', title, rewards[0])}</label>",
        f"<label>of {choice('row', {row.name: row.name for row in others}, leader)}</label>",
        '<div id="cards">\n' + "\n".join(cards) + "\n</div>",
        "<h2>Models</h2>\n" + _html_table(["", "LoRA", "scale", "base for last", "SHA-256"], described),
        "<h2>Settings</h2>\n"
        + _html_table(
            ["", ""],
            [
                list(store.settings),
                [value if isinstance(value, str) else json.dumps(value) for value in store.settings.values()],
            ],
            ' class="settings"',
        ),
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>FlowBP evaluation</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n<script>{_SCRIPT}</script>\n</body></html>\n"
    )
