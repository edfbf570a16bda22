# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Text and images on a canvas."""

import warnings

import numpy as np
import pytest
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties
from PIL import Image

from flowbp.judging import canvas
from flowbp.judging.canvas import Canvas, resize, text_width, wrap
from flowbp.judging.figures import validation_strip

TEXT = "The quick brown fox jumps over the lazy dog near the old stone bridge"


@pytest.mark.parametrize("text", [TEXT, "a" * 200, "一只猫在灯塔上" * 20, f"{TEXT} {'x' * 90} {TEXT}"])
def test_wrapped_lines_fit_and_lose_nothing(text: str) -> None:
    lines = wrap(text, 200, 50, fontsize=9)
    assert len(lines) > 1 and all(text_width(line, 9) <= 200 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    # No word moves to the next line while there is room for it.
    words = [line.partition(" ")[0] for line in lines[1:]]
    if text == TEXT:
        assert all(text_width(f"{line} {word}", 9) > 200 for line, word in zip(lines, words, strict=False))
        assert " ".join(lines) == text


@pytest.mark.parametrize("text", [TEXT, "a" * 200])
def test_text_beyond_the_last_line_is_replaced_by_an_ellipsis(text: str) -> None:
    lines = wrap(text, 150, 2, fontsize=9)
    assert len(lines) == 2 and lines[1].endswith("…") and all(text_width(line, 9) <= 150 for line in lines)
    assert text.startswith(lines[0])


@pytest.mark.parametrize("text", ["abcdef" * 100, "一只猫在灯塔上的夜晚" * 15, f"{TEXT} " * 20])
def test_every_character_is_measured_once_however_long_the_text_is(text: str) -> None:
    canvas._character_width.cache_clear()
    wrap(text, 200, 6, fontsize=9)
    validation_strip([Image.new("RGB", (8, 8))] * 3, [text] * 3, {"x": [0.5] * 3}, title=text)
    measured = canvas._character_width.cache_info().misses
    # One for each font size of the strip: prompts, the name and value of a score, the title.
    assert 0 < measured <= 3 * len({*text, "…", *"x0.500"})


def test_the_sum_of_the_characters_is_the_width_of_the_line() -> None:
    for text in (TEXT, "a" * 100, "一只猫在灯塔上", "−0.123"):
        font = FontProperties(family=canvas.font_families(), size=9)
        with canvas.quiet_fonts():
            whole = RendererAgg(1, 1, canvas.DPI).get_text_width_height_descent(text, font, ismath=False)[0]
        assert text_width(text, 9) == pytest.approx(whole, rel=0.03)


def test_a_character_that_no_font_has_is_drawn_as_a_box_without_a_warning() -> None:
    # Private use: no font has it.
    sheet = Canvas(60)
    sheet.text(10, 10, wrap("\ue123\udcff", 60, 1, fontsize=9)[0], fontsize=9, color="black", va="top")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = np.asarray(sheet.render(40))
    assert (drawn < 128).any(-1).sum() > 20


def test_white_space_and_empty_texts() -> None:
    assert wrap("", 100, 3, fontsize=9) == [""]
    assert wrap(" one\n two\t ", 1000, 3, fontsize=9) == ["one two"]
    # Narrower than a letter: one letter in a line.
    assert wrap("abc", 1, 5, fontsize=9) == ["a", "b", "c"]


def test_widths_are_those_of_the_drawn_text() -> None:
    sheet = Canvas(800)
    sheet.text(40, 40, TEXT, fontsize=9, color="black", va="top")
    drawn = np.flatnonzero((np.asarray(sheet.render(100)) < 128).any((0, 2)))
    assert drawn.min() == pytest.approx(40, abs=4)
    assert drawn.max() - drawn.min() == pytest.approx(text_width(TEXT, 9), abs=6)


def test_images_are_placed_pixel_by_pixel() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    placed = Canvas(50)
    placed.image(20, 10, Image.fromarray(noise))
    sheet = np.asarray(placed.render(30)).copy()
    assert sheet.shape == (30, 50, 3) and np.array_equal(sheet[10:17, 20:29], noise)
    sheet[9:18, 19:30] = 255
    assert (sheet == 255).all()


def test_images_are_enlarged_without_filter_and_reduced_with_one() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))
    large = np.asarray(resize(noise, (18, 12)))
    assert np.array_equal(large, np.asarray(noise).repeat(3, 0).repeat(3, 1))
    board = Image.fromarray(((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8))
    small = resize(board, (16, 16))
    assert small.mode == "RGB" and np.abs(np.asarray(small).astype(int)[2:-2, 2:-2] - 127).max() < 20
    assert resize(noise, noise.size).tobytes() == noise.tobytes()
