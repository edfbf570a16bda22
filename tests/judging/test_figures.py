# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The figures decode, show the pictures that they were given, keep their text inside, and refuse what does not fit."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from flowbp.judging import figures
from flowbp.judging.figures import before_after, image_grid, reward_curve

PROMPT = 'the text "42" in red on a yellow background'
COLORS = [(200, 30, 40 + 20 * i) for i in range(8)], [(20, 180, 40 + 20 * i) for i in range(8)]


def pictures(colors: list[tuple[int, int, int]], size: tuple[int, int] = (48, 48)) -> list[Image.Image]:
    return [Image.new("RGB", size, color) for color in colors]


def opened(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def area(array: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns of the pixels that have exactly this colour."""
    return np.argwhere((array == color).all(axis=-1))


def assert_margins_are_white(array: np.ndarray) -> None:
    edges = (array[:8], array[-8:], array[:, :8], array[:, -8:])
    assert all((edge == 255).all() for edge in edges), "something is cut off at the figure's edge"


def test_base_stands_above_aligned_in_the_given_order(tmp_path) -> None:
    base, aligned = (pictures(colors) for colors in COLORS)
    before_after(base, aligned, [PROMPT] * 8, tmp_path / "a.png", "Title", "subtitle", ([0.1] * 8, [0.9] * 8))
    array = opened(tmp_path / "a.png")
    assert_margins_are_white(array)
    tops, lefts = [], []
    for above, below in zip(*COLORS, strict=True):
        first, second = area(array, above), area(array, below)
        assert len(first) > 200**2 and len(second) > 200**2
        assert first[:, 0].max() < second[:, 0].min(), "base is not above aligned"
        assert first[:, 1].min() == second[:, 1].min(), "the pair is not in one column"
        tops.append(first[:, 0].min())
        lefts.append(first[:, 1].min())
    assert len(set(tops)) == 1 and lefts == sorted(set(lefts))


def test_more_than_eight_pictures_take_several_pairs_of_rows(tmp_path) -> None:
    colors = [(200, 30, 10 * i) for i in range(9)]
    aligned = pictures([(20, 180, 10 * i) for i in range(9)])
    before_after(pictures(colors), aligned, [PROMPT] * 9, tmp_path / "a.png", "Title")
    array = opened(tmp_path / "a.png")
    assert_margins_are_white(array)
    assert [area(array, color)[:, 0].min() for color in colors].count(area(array, colors[0])[:, 0].min()) == 5
    assert area(array, colors[5])[:, 0].min() > area(array, (20, 180, 0))[:, 0].max()


def test_small_pictures_keep_sharp_even_pixels(tmp_path) -> None:
    board = Image.fromarray(((np.indices((48, 48)).sum(0) % 2)[..., None] * [0, 255, 0] + [0, 0, 90]).astype(np.uint8))
    before_after([board] * 8, [board] * 8, [PROMPT] * 8, tmp_path / "a.png", "Title")
    array = opened(tmp_path / "a.png")
    dark, light = area(array, (0, 0, 90)), area(array, (0, 255, 90))
    # 16 pictures of 48 x 48 pixels, each drawn as 5 x 5; the frames cover the outermost line.
    assert len(dark) + len(light) >= 16 * 238**2


@pytest.mark.parametrize("size", [(512, 512), (512, 320), (30, 90)])
@pytest.mark.parametrize("number", [1, 4])
def test_long_texts_and_any_shape_stay_inside(number: int, size: tuple[int, int], tmp_path) -> None:
    prompts = ["$x$ and $ " * 60, "a" * 300, "", "short"][:number]
    images = pictures([(10, 20, 30)] * number, size)
    before_after(images, images, prompts, tmp_path / "a.png", "A long title " * 12, "a long subtitle " * 12)
    array = opened(tmp_path / "a.png")
    assert_margins_are_white(array)
    picture = area(array, (10, 20, 30))
    assert len(picture) > number * 2 * 100**2


def test_pyplot_s_state_is_not_touched(tmp_path) -> None:
    script = (
        "import sys; from flowbp.judging.figures import reward_curve; "
        f"reward_curve([dict(step=1, reward=0.0, reward_std=0.0)], {str(tmp_path / 'b.png')!r}, 'Reward'); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    assert (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    ("base", "aligned", "prompts", "scores", "expected"),
    [
        (2, 1, 2, None, "2 base, 1 aligned, 2 prompts"),
        (2, 2, 1, None, "2 base, 2 aligned, 1 prompts"),
        (1, 1, 1, ([1.0], []), "1 base scores, 0 aligned scores"),
        (0, 0, 0, None, "at least one picture expected"),
    ],
)
def test_before_after_refuses_lists_that_do_not_match(base, aligned, prompts, scores, expected, tmp_path) -> None:
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match=expected) as caught:
        before_after([picture] * base, [picture] * aligned, ["p"] * prompts, tmp_path / "a.png", "t", None, scores)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.png").exists()


def test_pictures_of_several_sizes_are_refused(tmp_path) -> None:
    small, large = Image.new("RGB", (8, 8)), Image.new("RGB", (16, 8))
    with pytest.raises(ValueError, match="one size expected, got 8x8, 16x8"):
        before_after([small], [large], ["p"], tmp_path / "a.png", "t")
    with pytest.raises(ValueError, match="one size expected, got 8x8, 16x8"):
        image_grid([small, large], 2)


def row(step: int, reward: float, std: float = 0.1) -> dict[str, float]:
    return {"step": step, "reward": reward, "reward_std": std}


def curve_height(path) -> tuple[float, float]:
    """Mean height above the bottom of the bold line's pixels in the left and the right third."""
    array = opened(path)
    assert_margins_are_white(array)
    places = area(array, (0x0F, 0x76, 0x6E))
    width = array.shape[1]
    third = places[places[:, 1] < width / 3], places[(places[:, 1] > width / 2) & (places[:, 1] < 0.85 * width)]
    return tuple(array.shape[0] - part[:, 0].mean() for part in third)


def test_reward_curve_rises_with_the_reward(tmp_path) -> None:
    reward_curve([row(i, i / 60) for i in range(1, 61)], tmp_path / "up.png", "Reward")
    reward_curve([row(i, -i / 60) for i in range(1, 61)], tmp_path / "down.png", "Reward")
    left, right = curve_height(tmp_path / "up.png")
    assert right > left + 100
    left, right = curve_height(tmp_path / "down.png")
    assert right < left - 100


@pytest.mark.parametrize("number", [1, 2, 3])
def test_reward_curve_of_a_short_run(number: int, tmp_path) -> None:
    reward_curve([row(i, 0.5, 0.0) for i in range(1, number + 1)], tmp_path / "a.png", "Reward")
    assert_margins_are_white(opened(tmp_path / "a.png"))


def test_updates_without_a_finite_reward_are_left_out(tmp_path) -> None:
    rows = [row(1, 0.1), row(2, 0.2, float("nan")), row(3, 0.3)]
    reward_curve([*rows, row(4, float("nan")), row(5, float("inf"))], tmp_path / "a.png", "Reward")
    reward_curve(rows, tmp_path / "b.png", "Reward")
    assert (opened(tmp_path / "a.png") == opened(tmp_path / "b.png")).all()


def test_running_mean_is_centred_and_shorter_at_the_ends() -> None:
    assert figures._running_mean([0.0, 3.0, 6.0, 0.0], 3) == [1.5, 3.0, 3.0, 3.0]
    assert figures._running_mean([1.0, 2.0], 1) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "at least one update with a finite reward"),
        ([row(1, float("nan"))], "at least one update with a finite reward"),
        ([{"step": 1, "reward": 0.0}], "one lacks reward_std"),
    ],
)
def test_reward_curve_refuses_rows_without_rewards(rows: list[dict], expected: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=expected):
        reward_curve(rows, tmp_path / "a.png", "Reward")


def test_image_grid_places_pictures_row_by_row() -> None:
    colors = [(10 * i, 0, 0) for i in range(1, 6)]
    grid = image_grid(pictures(colors, (10, 6)), 3)
    assert grid.mode == "RGB" and grid.size == (3 * 12 - 2, 2 * 8 - 2)
    assert [grid.getpixel((12 * (i % 3) + 5, 8 * (i // 3) + 3)) for i in range(5)] == colors
    assert grid.getpixel((29, 11)) == (255, 255, 255)
    assert image_grid(pictures(colors[:2]), 9).size == (2 * 50 - 2, 48)


def test_image_grid_refuses_what_it_cannot_place() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        image_grid([], 2)
    with pytest.raises(ValueError, match="at least one column expected, got 0"):
        image_grid([Image.new("RGB", (8, 8))], 0)
