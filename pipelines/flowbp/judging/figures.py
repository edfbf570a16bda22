# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Figures of a run and of an evaluation: images of models, images of one update, and curves of rewards."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from ..table_images import Sources
from .canvas import (
    ACCENT,
    DPI,
    GREY,
    INK,
    LIGHT,
    SECOND,
    Canvas,
    font_families,
    line_height,
    quiet_fonts,
    resize,
    text_width,
    wrap,
)

# Pixels.
_MARGIN, _GAP, _BETWEEN_BLOCKS, _SPACE = 40, 14, 34, 8
# Points.
_TITLE, _SUBTITLE, _LABEL, _SCORE = 15, 9, 11, 8


# Sheets of images.


@dataclass(frozen=True)
class _Series:
    """Images of one model, one for each prompt.

    Attributes:
        images: of one size.
        scores: reward -> a score for each image; rewards named "" show their scores without a name.
        color: of label and scores.
        label: text beside the images; may be empty.
    """

    images: Sequence[Image.Image]
    scores: Mapping[str, Sequence[float | None]]
    color: str
    label: str = ""


def before_after(
    base: Sequence[Image.Image],
    aligned: Sequence[Image.Image],
    prompts: Sequence[str],
    path: str | Path,
    title: str,
    subtitle: str | None = None,
    scores: tuple[Sequence[float | None], Sequence[float | None]] | None = None,
    sources: Sources | None = None,
) -> None:
    """Write a PNG with the base model's images above the aligned model's, and each prompt below its two images.

    Up to 8 pairs stand side by side; more are spread evenly over several blocks.

    Args:
        base: images of the base model, of one size.
        aligned: images of the aligned model, of the same size and made from the same noise (the figure says so).
        prompts: one for each pair.
        path: PNG to write.
        title: title of the figure.
        subtitle: line below the title.
        scores: scores of the images of `base` and of `aligned`, shown below them; None or NaN for no score.
        sources: what the images were made of, shown above them: column -> an image of each prompt.
    """
    note = "Each column: one prompt, the same noise for both images."
    by_model = None if scores is None else dict(zip(("base", "aligned"), scores, strict=True))
    subtitle = f"{subtitle}  ·  {note}" if subtitle else note
    comparison({"base": base, "aligned": aligned}, prompts, path, title, subtitle, by_model, sources)


def comparison(
    images: Mapping[str, Sequence[Image.Image]],
    prompts: Sequence[str],
    path: str | Path,
    title: str,
    subtitle: str,
    scores: Mapping[str, Sequence[float | None]] | None = None,
    sources: Sources | None = None,
) -> None:
    """Write a PNG like `before_after`'s for any number of models, one below the other.

    Args:
        images: model -> images, the base model first; all of one size, one for each prompt.
        prompts: one for each column.
        path: PNG to write.
        title: title of the figure.
        subtitle: line below the title.
        scores: model -> score of each image, shown below it; None or NaN for no score.
        sources: as in `before_after`.
    """
    digits = 0 if scores is None else _digits([score for name in images for score in scores[name]])
    series = [
        _Series(of_model, {} if scores is None else {"": scores[name]}, ACCENT if place else GREY, name)
        for place, (name, of_model) in enumerate(images.items())
    ]
    columns = math.ceil(len(prompts) / math.ceil(len(prompts) / 8))
    series = [*_sources(sources, series[0].images[0]), *series]
    _Sheet(series, prompts, columns, {"": digits}).render(title, subtitle).save(path, "PNG")


def validation_strip(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    scores: Mapping[str, Sequence[float | None]],
    columns: int = 8,
    title: str | None = None,
    sources: Sources | None = None,
) -> Image.Image:
    """The images of one validation or evaluation, with the scores and the prompt of each below it.

    Images narrower than about 240 pixels (480 with few columns) are enlarged by whole factors, wider ones reduced.

    Args:
        images: of one size, in any mode that PIL converts to RGB.
        prompts: one for each image.
        scores: reward, as it shall be named -> a score for each image; None or NaN for no score. May be empty.
        columns: largest number of images side by side.
        title: title of the figure, such as the update.
        sources: as in `before_after`.

    Returns:
        An RGB image.
    """
    digits = {name: _digits(values) for name, values in scores.items()}
    series = [*_sources(sources, images[0]), _Series(images, scores, ACCENT)]
    return _Sheet(series, prompts, min(columns, len(images)), digits).render(title, None)


def _sources(sources: Sources | None, result: Image.Image) -> list[_Series]:
    """A series for each column, of images with white borders to the size of a result."""
    return [
        _Series([ImageOps.pad(each.shown(result.size), result.size, color="white") for each in images], {}, GREY, name)
        for name, images in (sources or {}).items()
    ]


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _digits(scores: Sequence[float | None]) -> int:
    """Three decimals for scores between -1 and 1, two for others."""
    return 3 if all(abs(score) < 1 for score in scores if _is_finite(score)) else 2


def _fixed(value: float, digits: int) -> str:
    """A number with this many decimals and a typographic minus sign; -0.0 is 0.0."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


class _Sheet:
    """Images in columns, one series below the other, in blocks of as many columns as fit; prompts below each block.

    Args:
        series: one for each model, all with as many images as prompts.
        prompts: one for each column.
        columns: number of columns of a block.
        digits: reward -> decimals of its scores.
    """

    def __init__(
        self, series: Sequence[_Series], prompts: Sequence[str], columns: int, digits: Mapping[str, int]
    ) -> None:
        self.series, self.prompts, self.columns, self.digits = series, prompts, columns, digits
        width, height = series[0].images[0].size
        # The sheet is about 13 inches wide, so fewer images are larger: from 1.6 to 3.2 inches.
        cell = round(DPI * min(max(12.8 / columns, 1.6), 3.2))
        # Whole factors keep the pixels of small images even.
        self.width = max(cell // width, 1) * width if width < cell else cell
        self.height = round(self.width * height / width)
        self.prompt_size = 8 if columns > 4 else 9
        label_width = max(self.height, 120)
        self.labels = [wrap(each.label, label_width, 2, _LABEL, "bold") for each in series]
        has_labels = any(each.label for each in series)
        self.left = _MARGIN + (20 + max(map(len, self.labels)) * line_height(_LABEL) if has_labels else 0)

    def render(self, title: str | None, subtitle: str | None) -> Image.Image:
        """The sheet with a heading, as an RGB image."""
        width = self.left + self.columns * (self.width + _GAP) - _GAP + _MARGIN
        if title:
            # A heading needs some width, even above one narrow image.
            heading = max(text_width(title, _TITLE, "bold"), text_width(subtitle or "", _SUBTITLE))
            width = max(width, min(self.left + math.ceil(heading) + _MARGIN, 5 * DPI))
        canvas = Canvas(width)
        y = _MARGIN
        if title:
            room = width - self.left - _MARGIN
            for line in wrap(title, room, 3, _TITLE, "bold"):
                canvas.text(self.left, y, line, fontsize=_TITLE, fontweight="bold", color=INK, va="top")
                y += line_height(_TITLE)
            for line in wrap(subtitle, room, 4, _SUBTITLE) if subtitle else ():
                canvas.text(self.left, y, line, fontsize=_SUBTITLE, color=GREY, va="top")
                y += line_height(_SUBTITLE)
            y += 18
        for start in range(0, len(self.prompts), self.columns):
            y = self._draw_block(canvas, range(start, min(start + self.columns, len(self.prompts))), y)
            y += _BETWEEN_BLOCKS
        return canvas.render(y - _BETWEEN_BLOCKS + _MARGIN)

    def _draw_block(self, canvas: Canvas, indices: range, y: int) -> int:
        """Draw these images of every series and their prompts below `y`; returns where the block ends."""
        for series, label in zip(self.series, self.labels, strict=True):
            canvas.text(
                self.left - 16,
                y + self.height / 2,
                "\n".join(label),
                fontsize=_LABEL,
                fontweight="bold",
                color=series.color,
                rotation=90,
                ha="right",
                va="center",
            )
            for column, index in enumerate(indices):
                left = self.left + column * (self.width + _GAP)
                canvas.image(left, y, resize(series.images[index], (self.width, self.height)))
                self._draw_scores(canvas, series, index, left + self.width / 2, y + self.height + _SPACE)
            y += self.height + _SPACE + len(series.scores) * line_height(_SCORE) + _GAP
        y -= _SPACE
        wrapped = [wrap(self.prompts[index], self.width, 6, self.prompt_size) for index in indices]
        height = line_height(self.prompt_size)
        for column, lines in enumerate(wrapped):
            centre = self.left + column * (self.width + _GAP) + self.width / 2
            style = {"fontsize": self.prompt_size, "color": INK, "ha": "center", "va": "top"}
            for place, line in enumerate(lines):
                canvas.text(centre, y + place * height, line, **style)
        return y + height * max(map(len, wrapped))

    def _draw_scores(self, canvas: Canvas, series: _Series, index: int, centre: float, y: float) -> None:
        """A centred line for each reward: its name, and its score in bold."""
        for name, scores in series.scores.items():
            score = scores[index]
            value, weight, color = "no score", "normal", GREY
            if _is_finite(score):
                value, weight, color = _fixed(score, self.digits[name]), "bold", series.color
            value_width = text_width(value, _SCORE, weight)
            name_width = 0.0
            if name:
                (name,) = wrap(name, max(self.width - value_width - _SPACE, 1), 1, _SCORE)
                name_width = text_width(name, _SCORE) + _SPACE
            left = centre - (name_width + value_width) / 2
            canvas.text(left, y, name, fontsize=_SCORE, color=GREY, va="top")
            canvas.text(left + name_width, y, value, fontsize=_SCORE, fontweight=weight, color=color, va="top")
            y += line_height(_SCORE)


# Curves.


def reward_curve(
    log: Sequence[Mapping[str, Any]],
    path: str | Path,
    title: str,
    held_out: Sequence[Mapping[str, Any]] = (),
    chosen: int | None = None,
    held_out_title: str = "held-out reward",
) -> None:
    """Write a PNG of the training reward by update, and of the held-out reward in a panel below.

    The rewards have panels of their own because their scales differ.

    Args:
        log: one entry for each update, with `step` (number of the update), `reward` (mean of its batch) and
            `reward_std` (standard deviation in the batch, shown as a band; 0 where it is None or not finite). Updates
            whose reward is None or not finite are left out.
        path: PNG to write.
        title: title of the figure.
        held_out: one entry for each evaluation, with `update`, `mean`, and the 95 % interval `low` to `high`, as
            `statistics.estimate` returns them. An evaluation whose mean is None is left out, bounds that are None
            are not drawn. Without evaluations there is one panel.
        chosen: update whose LoRA is the result of the run, marked in each panel.
        held_out_title: name of the held-out reward at its axis.

    Raises:
        ValueError: an entry lacks a key, or no update has a finite reward.
    """
    _check_keys("log", log, ("step", "reward", "reward_std"))
    _check_keys("held_out", held_out, ("update", "mean", "low", "high"))
    log = [entry for entry in log if _is_finite(entry["reward"])]
    held_out = [entry for entry in held_out if entry["mean"] is not None]
    if not log:
        raise ValueError("reward_curve: expected an update with a finite reward, got none; draw no curve")
    window = max(1, round(len(log) / 12)) | 1  # odd, so that the mean is centred
    figure = Figure(dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    lines = [f"line: running mean of {window} updates" if window > 1 else "line: every update"]
    lines[0] += "   ·   points: mean of each update's batch   ·   band: ± one standard deviation in the batch"
    if held_out:
        lines.append("below: mean of each evaluation's held-out prompts, with its 95 % interval")
    panels = _panels(figure, title, lines, 2 if held_out else 1)
    _draw_training(panels[0], log, window)
    if held_out:
        _draw_held_out(panels[1], held_out, held_out_title)
    for axes in panels if chosen is not None else ():
        _mark(axes, chosen)
    with quiet_fonts():
        figure.savefig(path, format="png")


def _check_keys(name: str, entries: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    for entry in entries:
        missing = [key for key in keys if key not in entry]
        if missing:
            raise ValueError(
                f"reward_curve: expected entries of {name} with {', '.join(keys)}, got one without {missing[0]}; "
                "add it"
            )


def _panels(figure: Figure, title: str, notes: Sequence[str], count: int) -> list[Axes]:
    """Axes one below the other with a common horizontal axis, below a heading."""
    width, left, right = 9.0, 0.8, 1.1  # inches
    heights = [3.35, 2.1][:count]
    gap, bottom = 0.42, 0.62
    titles = wrap(title, (width - left - 0.3) * DPI, 2, _TITLE, "bold")
    heading = (_MARGIN + len(titles) * line_height(_TITLE) + len(notes) * line_height(_SUBTITLE)) / DPI + 0.3
    height = heading + sum(heights) + gap * (count - 1) + bottom
    figure.set_size_inches(width, height)
    y = height - _MARGIN / DPI
    texts = [(line, {"fontsize": _TITLE, "fontweight": "bold", "color": INK}) for line in titles]
    texts += [(line, {"fontsize": _SUBTITLE, "color": GREY}) for line in notes]
    for line, style in texts:
        figure.text(left / width, y / height, line, va="top", family=font_families(), parse_math=False, **style)
        y -= line_height(style["fontsize"]) / DPI
    panels: list[Axes] = []
    top = height - heading
    for panel_height in heights:
        box = (left / width, (top - panel_height) / height, (width - left - right) / width, panel_height / height)
        panels.append(figure.add_axes(box, sharex=panels[0] if panels else None))
        top -= panel_height + gap
    for axes in panels:
        axes.grid(color=LIGHT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GREY)
        axes.tick_params(colors=GREY, length=0, labelsize=9, labelbottom=axes is panels[-1])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.margins(x=0.02, y=0.08)
    panels[-1].set_xlabel("update", color=GREY, fontsize=10)
    return panels


def _draw_training(axes: Axes, log: Sequence[Mapping[str, Any]], window: int) -> None:
    steps = [entry["step"] for entry in log]
    rewards = [float(entry["reward"]) for entry in log]
    spreads = [entry["reward_std"] if _is_finite(entry["reward_std"]) else 0.0 for entry in log]
    means, spreads = _running_mean(rewards, window), _running_mean(spreads, window)
    axes.fill_between(steps, means - spreads, means + spreads, color=ACCENT, alpha=0.10, linewidth=0)
    axes.plot(steps, rewards, "o", color=ACCENT, markersize=3, alpha=0.30, markeredgewidth=0)
    axes.plot(steps, means, color=ACCENT, linewidth=2.4, solid_capstyle="round")
    axes.plot(steps[-1:], means[-1:], "o", color=ACCENT, markersize=5)
    axes.set_ylabel("reward", color=GREY, fontsize=10)
    _label_end(axes, steps[-1], means[-1], ACCENT)


def _draw_held_out(axes: Axes, held_out: Sequence[Mapping[str, Any]], name: str) -> None:
    updates = [entry["update"] for entry in held_out]
    means = [entry["mean"] for entry in held_out]
    axes.plot(updates, means, "o-", color=SECOND, linewidth=1.6, markersize=5)
    bounded = [entry for entry in held_out if entry["low"] is not None and entry["high"] is not None]
    places, low, high = ([entry[key] for entry in bounded] for key in ("update", "low", "high"))
    axes.vlines(places, low, high, color=SECOND, alpha=0.35, linewidth=4)
    (name,) = wrap(name, 2.1 * DPI, 1, 10)
    axes.set_ylabel(name, color=GREY, fontsize=10, family=font_families(), parse_math=False)
    _label_end(axes, updates[-1], means[-1], SECOND)


def _label_end(axes: Axes, x: float, y: float, color: str) -> None:
    """Write the last value of a curve beside it."""
    axes.annotate(
        f"{y:.3g}".replace("-", "−"),
        (x, y),
        xytext=(12, 0),
        textcoords="offset points",
        color=color,
        fontsize=12,
        fontweight="bold",
        va="center",
        annotation_clip=False,
    )


def _mark(axes: Axes, update: int) -> None:
    """Mark an update by a vertical line with a label above."""
    axes.axvline(update, color=INK, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"chosen: update {update}",
        (update, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=9,
        color=INK,
        annotation_clip=False,
    )


def _running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Centred means over `window` values, fewer at both ends; differences of sums, because windows grow with runs."""
    sums, places = np.cumsum([0.0, *values]), np.arange(len(values))
    starts, ends = np.maximum(places - window // 2, 0), np.minimum(places + window // 2 + 1, len(values))
    return (sums[ends] - sums[starts]) / (ends - starts)
