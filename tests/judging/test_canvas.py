# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Text and images on a canvas."""

import numpy as np
import pytest
from PIL import Image

from flowbp.judging.canvas import Canvas, resize, text_width, wrap

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


def test_white_space_and_empty_texts() -> None:
    assert wrap("", 100, 3, fontsize=9) == [""]
    assert wrap(" one\n two\t ", 1000, 3, fontsize=9) == ["one two"]
    # Narrower than a letter: one letter in a line.
    assert wrap("abc", 1, 5, fontsize=9) == ["a", "b", "c"]


def test_widths_are_those_of_the_drawn_text() -> None:
    canvas = Canvas(800)
    canvas.text(40, 40, TEXT, fontsize=9, color="black", va="top")
    drawn = np.flatnonzero((np.asarray(canvas.render(100)) < 128).any((0, 2)))
    assert drawn.min() == pytest.approx(40, abs=4)
    assert drawn.max() - drawn.min() == pytest.approx(text_width(TEXT, 9), abs=6)


def test_images_are_placed_pixel_by_pixel() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    canvas = Canvas(50)
    canvas.image(20, 10, Image.fromarray(noise))
    sheet = np.asarray(canvas.render(30)).copy()
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
