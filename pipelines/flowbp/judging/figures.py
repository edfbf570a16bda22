# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Pictures of a run: base above aligned, the reward's curve, and grids of validation images.

Figures are matplotlib `Figure` objects on the Agg canvas: no display, and nothing of pyplot's global state.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from PIL import Image

_DPI = 150
_INK, _GREY, _LIGHT, _ACCENT = "#1b1f24", "#6b7280", "#e5e7eb", "#0f766e"
_SANS = {"family": "DejaVu Sans", "parse_math": False}
_TITLE = {"fontsize": 15, "fontweight": "bold"}


class _Canvas:
    """A figure on which things are placed in pixels from the top left, so that nothing depends on a layout engine."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
        self.renderer = FigureCanvasAgg(self.figure).get_renderer()

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        self.figure.text(x / self.width, 1 - y / self.height, text, **_SANS, **style)

    def picture(self, left: int, top: int, image: Image.Image) -> None:
        width, height = image.size
        axes = self.figure.add_axes(
            (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        )
        axes.imshow(image, interpolation="none", aspect="auto")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(color=_LIGHT, linewidth=0.75)

    def text_width(self, text: str, fontsize: float, fontweight: str = "normal") -> float:
        font = FontProperties(family=_SANS["family"], size=fontsize, weight=fontweight)
        return self.renderer.get_text_width_height_descent(text, font, ismath=False)[0]


def _wrap(canvas: _Canvas, text: str, width: float, most: int, **style: Any) -> list[str]:
    """Lines of `text` no wider than `width` pixels, broken at spaces where possible, at most `most` of them."""

    def fits(line: str) -> bool:
        return canvas.text_width(line, **style) <= width

    lines = [""]
    for word in text.split():
        while word and len(lines) <= most:
            joined = f"{lines[-1]} {word}" if lines[-1] else word
            if fits(joined):
                lines[-1], word = joined, ""
            elif lines[-1]:
                lines.append("")
            else:
                part = next(word[:n] for n in range(len(word), 0, -1) if n == 1 or fits(word[:n]))
                lines[-1], word = part, word[len(part) :]
                if word:
                    lines.append("")
    if len(lines) > most:
        last = lines[most - 1]
        while last and not fits(last + "…"):
            last = last[:-1]
        lines = [*lines[: most - 1], last.rstrip() + "…"]
    return lines


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """To `size`: a small picture keeps its pixels as sharp squares, a large one is filtered down."""
    image = image.convert("RGB")
    factor = math.ceil(max(size[0] / image.width, size[1] / image.height))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image.resize(size, Image.Resampling.LANCZOS) if image.size != size else image


def _check_pictures(name: str, images: Sequence[Image.Image]) -> tuple[int, int]:
    if not images:
        raise ValueError(f"{name}: at least one picture expected, got none")
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
        raise ValueError(f"{name}: pictures of one size expected, got {listed}")
    return sizes.pop()


def before_after(
    base: Sequence[Image.Image],
    aligned: Sequence[Image.Image],
    prompts: Sequence[str],
    path: str | Path,
    title: str,
    subtitle: str | None = None,
    scores: tuple[Sequence[float], Sequence[float]] | None = None,
) -> None:
    """Writes a PNG with the base model's pictures above the aligned model's and each prompt below its two pictures.

    Up to 8 pictures stand in one pair of rows; more are spread evenly over several pairs.

    Args:
        base: pictures of the base model, all of one size.
        aligned: pictures of the aligned model, the same size, made from the same noise (the figure says so).
        prompts: one for each pair.
        path: the PNG to write.
        title: the figure's title.
        subtitle: a line below the title.
        scores: a number for each picture of `base` and of `aligned`, shown below it with two decimals.

    Raises:
        ValueError: no pictures, pictures of several sizes, or lists of different lengths.
    """
    lengths = {"base": len(base), "aligned": len(aligned), "prompts": len(prompts)}
    if scores is not None:
        lengths |= {"base scores": len(scores[0]), "aligned scores": len(scores[1])}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{number} {name}" for name, number in lengths.items())
        raise ValueError(f"before_after: one of each for every pair of pictures expected, got {got}")
    _check_pictures("before_after", [*base, *aligned])
    rows = {"base": base, "aligned": aligned}
    by_name = None if scores is None else dict(zip(rows, scores, strict=True))
    note = "Each column: one prompt, the same noise for both pictures."
    _draw_rows(rows, prompts, path, title, f"{subtitle}  ·  {note}" if subtitle else note, by_name)


def comparison(
    rows: Mapping[str, Sequence[Image.Image]],
    prompts: Sequence[str],
    path: str | Path,
    title: str,
    subtitle: str,
    scores: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Writes a PNG like `before_after`'s for any number of models, one below the other.

    Args:
        rows: pictures by the model's name, the base model's first; all of one size, as many of each as prompts.
        prompts: one for each column.
        path: the PNG to write.
        title: the figure's title.
        subtitle: a line below the title.
        scores: a number for each picture of each row, shown below it: with three decimals if all are below 1 in size,
            else with two.

    Raises:
        ValueError: no pictures, pictures of several sizes, or lists of different lengths.
    """
    lengths = {"prompts": len(prompts)} | {name: len(images) for name, images in rows.items()}
    if scores is not None:
        lengths |= {f"{name} scores": len(scores[name]) for name in rows}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{number} {name}" for name, number in lengths.items())
        raise ValueError(f"comparison: one of each for every prompt expected, got {got}")
    _check_pictures("comparison", [image for images in rows.values() for image in images])
    is_small = scores is not None and all(abs(score) < 1 for name in rows for score in scores[name])
    _draw_rows(rows, prompts, path, title, subtitle, scores, digits=3 if is_small else 2)


def _draw_rows(
    rows: Mapping[str, Sequence[Image.Image]],
    prompts: Sequence[str],
    path: str | Path,
    title: str,
    note: str,
    scores: Mapping[str, Sequence[float]] | None,
    digits: int = 2,
) -> None:
    """Up to 8 columns stand in one block of rows; more are spread evenly over several blocks."""
    first = next(iter(rows.values()))
    width, height = first[0].size
    blocks = math.ceil(len(first) / 8)
    columns = math.ceil(len(first) / blocks)
    # Fewer pictures are shown larger: the whole is about 13 inches wide, a cell from 1.6 to 3.2 inches.
    cell = round(_DPI * min(max(12.8 / columns, 1.6), 3.2))
    # Whole multiples keep small pictures' pixels even.
    if width < cell:
        cell = max(cell // width, 1) * width
    cell_height = round(cell * height / width)
    measure = _Canvas(100, 100)
    names = {name: _wrap(measure, name, max(cell_height, 120), 2, fontsize=11, fontweight="bold") for name in rows}
    margin, gap, between_blocks = 40, 14, 34
    label = 46 + 25 * (max(map(len, names.values())) - 1)
    prompt_size = 8 if columns > 4 else 9
    line = round(prompt_size * _DPI / 72 * 1.3)
    score_height = 26 if scores is not None else 0

    total_width = max(2 * margin + label + columns * (cell + gap) - gap, 5 * _DPI)
    text_width = total_width - 2 * margin - label
    title_lines = _wrap(measure, title, text_width, 3, **_TITLE)
    note_lines = _wrap(measure, note, text_width, 4, fontsize=9)
    wrapped = [_wrap(measure, prompt, cell, 6, fontsize=prompt_size) for prompt in prompts]
    head = margin + 40 * len(title_lines) + 25 * len(note_lines) + 18
    starts = range(0, len(first), columns)
    prompt_heights = [line * max(map(len, wrapped[start : start + columns])) for start in starts]
    block_height = len(rows) * (cell_height + score_height + gap) - gap + 10
    blocks_height = len(starts) * block_height + (len(starts) - 1) * between_blocks
    total_height = head + sum(prompt_heights) + blocks_height + margin

    canvas = _Canvas(total_width, total_height)
    left = margin + label
    y = margin
    for title_line in title_lines:
        canvas.text(left, y, title_line, color=_INK, va="top", **_TITLE)
        y += 40
    for note_line in note_lines:
        canvas.text(left, y, note_line, fontsize=9, color=_GREY, va="top")
        y += 25

    top = head
    for start, prompt_height in zip(starts, prompt_heights, strict=True):
        for row, (name, images) in enumerate(rows.items()):
            color = _GREY if row == 0 else _ACCENT
            row_top = top + row * (cell_height + score_height + gap)
            canvas.text(
                margin + label - 16,
                row_top + cell_height / 2,
                "\n".join(names[name]),
                fontsize=11,
                fontweight="bold",
                color=color,
                rotation=90,
                ha="right",
                va="center",
            )
            for column, index in enumerate(range(start, min(start + columns, len(first)))):
                x = left + column * (cell + gap)
                canvas.picture(x, row_top, _resize(images[index], (cell, cell_height)))
                if scores is not None:
                    canvas.text(
                        x + cell / 2,
                        row_top + cell_height + 6,
                        f"{scores[name][index]:.{digits}f}",
                        fontsize=8,
                        fontweight="bold",
                        color=color,
                        ha="center",
                        va="top",
                    )
        below = top + block_height
        for column, index in enumerate(range(start, min(start + columns, len(first)))):
            for number, text in enumerate(wrapped[index]):
                canvas.text(
                    left + column * (cell + gap) + cell / 2,
                    below + number * line,
                    text,
                    fontsize=prompt_size,
                    color=_INK,
                    ha="center",
                    va="top",
                )
        top += block_height + prompt_height + between_blocks
    canvas.figure.savefig(path, format="png")


def reward_curve(rows: Sequence[dict[str, Any]], path: str | Path, title: str) -> None:
    """Writes a PNG of the reward against the update: every update faint, their running mean bold.

    Args:
        rows: one for each update, with `step` (its number), `reward` (the batch's mean) and `reward_std` (the batch's
            standard deviation, shown as a band). Updates whose reward is None or not finite are left out.
        path: the PNG to write.
        title: the figure's title, up to about 60 characters.

    Raises:
        ValueError: a row lacks a key, or no row has a finite reward.
    """
    for row in rows:
        missing = [key for key in ("step", "reward", "reward_std") if key not in row]
        if missing:
            raise ValueError(f"reward_curve: rows with step, reward and reward_std expected, one lacks {missing[0]}")
    rows = [row for row in rows if row["reward"] is not None and math.isfinite(row["reward"])]
    if not rows:
        raise ValueError("reward_curve: at least one update with a finite reward expected, got none")
    steps = [row["step"] for row in rows]
    rewards = [float(row["reward"]) for row in rows]
    spreads = [float(row["reward_std"]) if math.isfinite(row["reward_std"]) else 0.0 for row in rows]
    window = max(1, round(len(rows) / 12)) | 1  # odd, so that the mean is centred
    mean, spread = _running_mean(rewards, window), _running_mean(spreads, window)
    low = [m - s for m, s in zip(mean, spread, strict=True)]
    high = [m + s for m, s in zip(mean, spread, strict=True)]

    figure = Figure(figsize=(9, 4.8), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.09, 0.13, 0.79, 0.70))
    axes.fill_between(steps, low, high, color=_ACCENT, alpha=0.10, linewidth=0)
    axes.plot(steps, rewards, "o", color=_ACCENT, markersize=3, alpha=0.30, markeredgewidth=0)
    axes.plot(steps, mean, color=_ACCENT, linewidth=2.4, solid_capstyle="round")
    axes.plot(steps[-1:], mean[-1:], "o", color=_ACCENT, markersize=5)
    axes.grid(color=_LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GREY)
    axes.tick_params(colors=_GREY, length=0, labelsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.02, y=0.08)
    axes.set_xlabel("update", color=_GREY, fontsize=10)
    axes.set_ylabel("reward", color=_GREY, fontsize=10)
    axes.annotate(
        f"{mean[-1]:.3g}".replace("-", "−"),
        (steps[-1], mean[-1]),
        xytext=(12, 0),
        textcoords="offset points",
        color=_ACCENT,
        fontsize=12,
        fontweight="bold",
        va="center",
        annotation_clip=False,
    )
    figure.text(0.09, 0.945, title, color=_INK, va="center", **_TITLE, **_SANS)
    over = f"running mean of {window} updates" if window > 1 else "every update"
    figure.text(
        0.09,
        0.885,
        f"line: {over}   ·   points: mean of each update's batch   ·   band: ± one standard deviation in the batch",
        fontsize=9,
        color=_GREY,
        va="center",
        **_SANS,
    )
    figure.savefig(path, format="png")


def _running_mean(values: list[float], window: int) -> list[float]:
    """Centred, over the part of the window that lies within the run."""
    half = window // 2
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def image_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size side by side, row by row, `columns` in a row, with thin white gaps.

    Returns:
        An RGB picture; places of the last row without a picture are white.

    Raises:
        ValueError: no pictures, pictures of several sizes, or less than one column.
    """
    width, height = _check_pictures("image_grid", images)
    if columns < 1:
        raise ValueError(f"image_grid: at least one column expected, got {columns}")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    gap = max(2, width // 64)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        grid.paste(image.convert("RGB"), (index % columns * (width + gap), index // columns * (height + gap)))
    return grid
