# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Text and images at pixel positions, for figures whose height follows from their content.

Text is set by matplotlib, on the Agg canvas: it needs no display and does not touch pyplot's global state.
"""

import warnings
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from PIL import Image, ImageDraw

DPI = 150
INK, GREY, LIGHT, ACCENT, SECOND = "#1b1f24", "#6b7280", "#e5e7eb", "#0f766e", "#b45309"

# Fonts for scripts that DejaVu Sans, which comes with matplotlib, lacks. Those that are installed are used.
_MORE_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Source Han Sans",
    "WenQuanYi Micro Hei",
    "Hiragino Sans",
    "PingFang SC",
    "Apple SD Gothic Neo",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Nirmala UI",
    "Arial Unicode MS",
)


@cache
def font_families() -> list[str]:
    """DejaVu Sans, then the installed fonts for other scripts, in which matplotlib looks up missing characters."""
    installed = set(fontManager.get_font_names())
    return ["DejaVu Sans", *(name for name in _MORE_FONTS if name in installed)]


@contextmanager
def quiet_fonts() -> Iterator[None]:
    """Without warnings about characters that no font has; these are drawn as boxes.

    Prompts may be in any language, and a warning for each character of each prompt hides the other messages of a run.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


@cache
def _character_width(character: str, fontsize: float, fontweight: str) -> float:
    font = FontProperties(family=font_families(), size=fontsize, weight=fontweight)
    with quiet_fonts():
        return RendererAgg(1, 1, DPI).get_text_width_height_descent(_drawable(character), font, ismath=False)[0]


def _drawable(text: str) -> str:
    """Text without surrogates (bytes of the command line that are not UTF-8), which matplotlib refuses."""
    return text.encode(errors="replace").decode()


def text_width(text: str, fontsize: float, fontweight: str = "normal") -> float:
    """Width of one line of text in pixels: the sum over its characters, to about a pixel.

    Each character is measured once. Measuring whole lines takes time that grows with the square of their length,
    because `wrap` tries many of them.

    Args:
        text: without line breaks.
        fontsize: in points.
        fontweight: `normal` or `bold`.
    """
    return sum(_character_width(character, fontsize, fontweight) for character in text)


def line_height(fontsize: float) -> int:
    """Distance of lines in pixels, for a font size in points."""
    return round(1.3 * fontsize * DPI / 72)


def wrap(text: str, width: float, max_lines: int, fontsize: float, fontweight: str = "normal") -> list[str]:
    """Break text into lines, at spaces where possible.

    Args:
        text: any; white space of any kind separates words.
        width: of the longest line, in pixels.
        max_lines: at least 1. Longer text ends with an ellipsis.
        fontsize: in points.
        fontweight: `normal` or `bold`.

    Returns:
        At least one line, which is empty for an empty text.
    """
    text = " ".join(_drawable(text).split())
    ends = list(accumulate((_character_width(each, fontsize, fontweight) for each in text), initial=0.0))
    lines, start = [], 0

    def fitting(width: float) -> int:
        """Where a line of at least one character from `start` ends."""
        return max(bisect_right(ends, ends[start] + width) - 1, start + 1)

    while (end := fitting(width)) < len(text):
        if len(lines) == max_lines - 1:
            end = fitting(width - text_width("…", fontsize, fontweight))
            return [*lines, text[start:end].rstrip() + "…"]
        # A word that is wider than a line, or a script without spaces, is broken anywhere.
        space = text.rfind(" ", start, end + 1)
        end = end if space < 0 else space
        lines.append(text[start:end])
        start = end if space < 0 else space + 1
    return [*lines, text[start:]]


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An RGB image of `size` (width, height): small images keep their pixels as sharp squares, others are filtered."""
    image = image.convert("RGB")
    factor = max(size[0] // image.width, size[1] // image.height)
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image.resize(size, Image.Resampling.LANCZOS) if image.size != size else image


class Canvas:
    """A white sheet on which text and images are placed in pixels from the top left.

    Args:
        width: in pixels.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._texts: list[tuple[float, float, str, dict[str, Any]]] = []
        self._images: list[tuple[int, int, Image.Image]] = []

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Place text; `style` are arguments of matplotlib's `Text`, such as `ha`, `va`, `fontsize` and `color`."""
        self._texts.append((x, y, text, style))

    def image(self, left: int, top: int, image: Image.Image) -> None:
        """Place an RGB image, pixel by pixel, with a thin frame around it."""
        self._images.append((left, top, image))

    def render(self, height: int) -> Image.Image:
        """The sheet as an RGB image of this height in pixels."""
        figure = Figure(figsize=(self.width / DPI, height / DPI), dpi=DPI, facecolor="white")
        canvas = FigureCanvasAgg(figure)
        for x, y, text, style in self._texts:
            figure.text(x / self.width, 1 - y / height, text, family=font_families(), parse_math=False, **style)
        with quiet_fonts():
            canvas.draw()
        sheet = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
        draw = ImageDraw.Draw(sheet)
        for left, top, image in self._images:
            draw.rectangle((left - 1, top - 1, left + image.width, top + image.height), outline=LIGHT)
            sheet.paste(image, (left, top))
        return sheet
