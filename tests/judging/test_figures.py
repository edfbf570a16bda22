# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Figures show the images and curves that they were given, keep their text inside, and refuse what does not fit."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowbp.judging import figures
from flowbp.judging.figures import before_after, comparison, reward_curve, validation_strip

PROMPT = 'the text "42" in red on a yellow background'
COLORS = [(200, 30, 40 + 20 * i) for i in range(8)], [(20, 180, 40 + 20 * i) for i in range(8)]
INK, GREY, ACCENT, SECOND = (0x1B, 0x1F, 0x24), (0x6B, 0x72, 0x80), (0x0F, 0x76, 0x6E), (0xB4, 0x53, 0x09)


def plain(colors: list[tuple[int, int, int]], size: tuple[int, int] = (48, 48)) -> list[Image.Image]:
    return [Image.new("RGB", size, color) for color in colors]


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def area(array: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Lines and columns of the pixels that have exactly this color."""
    return np.argwhere((array == color).all(axis=-1))


def assert_margins_are_white(array: np.ndarray) -> None:
    edges = (array[:8], array[-8:], array[:, :8], array[:, -8:])
    assert all((edge == 255).all() for edge in edges), "something is cut off at the figure's edge"


def checkerboard() -> Image.Image:
    """48 x 48 pixels of two colors."""
    board = (np.indices((48, 48)).sum(0) % 2)[..., None] * [0, 255, 0] + [0, 0, 90]
    return Image.fromarray(board.astype(np.uint8))


def assert_pixels_are_even(array: np.ndarray, count: int, factor: int) -> None:
    """The sheet has `count` checkerboards whose pixels are squares of `factor` pixels, and no color between theirs."""
    found = len(area(array, (0, 0, 90))), len(area(array, (0, 255, 90)))
    assert found == (count * (48 * factor) ** 2 / 2,) * 2


# Base and aligned.


def test_base_stands_above_aligned_in_the_given_order(tmp_path: Path) -> None:
    base, aligned = (plain(colors) for colors in COLORS)
    before_after(base, aligned, [PROMPT] * 8, tmp_path / "a.png", "Title", "subtitle", ([0.1] * 8, [0.9] * 8))
    array = opened(tmp_path / "a.png")
    assert_margins_are_white(array)
    tops, lefts = [], []
    for above, below in zip(*COLORS, strict=True):
        first, second = area(array, above), area(array, below)
        assert len(first) == len(second) == 240**2
        assert first[:, 0].max() < second[:, 0].min(), "base is not above aligned"
        assert first[:, 1].min() == second[:, 1].min(), "the pair is not in one column"
        tops.append(first[:, 0].min())
        lefts.append(first[:, 1].min())
    assert len(set(tops)) == 1 and lefts == sorted(set(lefts))


def test_more_than_eight_pairs_take_several_blocks(tmp_path: Path) -> None:
    colors = [(200, 30, 10 * i) for i in range(9)]
    aligned = plain([(20, 180, 10 * i) for i in range(9)])
    before_after(plain(colors), aligned, [PROMPT] * 9, tmp_path / "a.png", "Title")
    array = opened(tmp_path / "a.png")
    assert_margins_are_white(array)
    assert [area(array, color)[:, 0].min() for color in colors].count(area(array, colors[0])[:, 0].min()) == 5
    assert area(array, colors[5])[:, 0].min() > area(array, (20, 180, 0))[:, 0].max()


def test_small_images_keep_sharp_even_pixels(tmp_path: Path) -> None:
    before_after([checkerboard()] * 8, [checkerboard()] * 8, [PROMPT] * 8, tmp_path / "a.png", "Title")
    assert_pixels_are_even(opened(tmp_path / "a.png"), count=16, factor=5)


@pytest.mark.parametrize("size", [(512, 512), (512, 320), (30, 90)])
@pytest.mark.parametrize("number", [1, 4])
def test_long_texts_and_any_shape_stay_inside(number: int, size: tuple[int, int], tmp_path: Path) -> None:
    prompts = ["$x$ and $ " * 60, "a" * 300, "", "short"][:number]
    images = plain([(10, 20, 30)] * number, size)
    before_after(images, images, prompts, tmp_path / "a.png", "A long title " * 12, "a long subtitle " * 12)
    array = opened(tmp_path / "a.png")
    assert_margins_are_white(array)
    assert len(area(array, (10, 20, 30))) > number * 2 * 100**2


def test_comparison_stands_every_model_below_the_other(tmp_path: Path) -> None:
    colors = {"base": (200, 0, 0), "a name of a LoRA that is much too long for it": (0, 200, 0), "c": (0, 0, 200)}
    images = {name: plain([color] * 3) for name, color in colors.items()}
    comparison(images, ["p"] * 3, tmp_path / "a.png", "Title", "note", {name: [0.5] * 3 for name in images})
    array = opened(tmp_path / "a.png")
    assert_margins_are_white(array)
    places = [area(array, color) for color in colors.values()]
    for above, below in zip(places, places[1:], strict=False):
        assert above[:, 0].max() < below[:, 0].min()
    assert len({len(place) for place in places}) == 1 and len(places[0]) > 3 * 150**2


def test_numbers_of_scores() -> None:
    assert figures._digits([0.5, -0.999, None, float("nan")]) == 3 and figures._digits([0.5, -1.0]) == 2
    assert figures._fixed(-0.0004, 3) == "0.000" and figures._fixed(-21.456, 2) == "−21.46"


# Images of a validation.


def test_a_strip_has_images_line_by_line_with_scores_and_prompt_below() -> None:
    colors = [(200, 30, 20 * i) for i in range(10)]
    scores = {"one": [0.1] * 10, "two": [20.0] * 10}
    array = np.asarray(validation_strip(plain(colors), [PROMPT] * 10, scores, columns=8, title="Update 5"))
    assert_margins_are_white(array)
    places = [area(array, color) for color in colors]
    assert {len(place) for place in places} == {240**2}
    corners = [tuple(place.min(0)) for place in places]
    tops, lefts = zip(*corners, strict=True)
    assert len(set(tops[:8])) == 1 and len(set(tops[8:])) == 1 and tops[8] > tops[0] + 240
    assert list(lefts[:8]) == sorted(set(lefts[:8])) and lefts[8:] == lefts[:2]
    for top, left in corners:
        below = array[top + 240 : top + 400, left : left + 240]
        accent, ink = area(below, ACCENT), area(below, INK)
        # Two lines of scores, then the prompt.
        assert len(accent) > 50 and len(ink) > 50 and accent[:, 0].max() < ink[:, 0].min()
        assert np.ptp(accent[:, 0]) > 25


def test_a_strip_enlarges_small_images_by_whole_factors() -> None:
    array = np.asarray(validation_strip([checkerboard()] * 8, [PROMPT] * 8, {}))
    assert_pixels_are_even(array, count=8, factor=5)
    assert_pixels_are_even(np.asarray(validation_strip([checkerboard()], [PROMPT], {})), count=1, factor=10)


@pytest.mark.parametrize(("number", "width"), [(1, 480), (32, 240)])
def test_a_strip_reduces_large_images(number: int, width: int) -> None:
    images = plain([(200, 30, i) for i in range(number)], (1024, 512))
    array = np.asarray(validation_strip(images, [PROMPT] * number, {"x": [1.0] * number}))
    assert all(len(area(array, (200, 30, i))) == width * width // 2 for i in range(number))
    assert array.shape[1] < 2200


def test_a_strip_of_any_prompt_warns_of_nothing_and_stays_inside() -> None:
    prompts = [
        "word " * 300,
        "a" * 500,
        "",
        "the text \"42\", “quoted” and 'so'",
        "$x^2$ \\alpha",
        "一只猫\n在灯塔上" * 30,
        "حروف",
        "\0 and a byte that is not UTF-8: \udcff",
    ]
    images = plain([(10, 20, 30)] * 8)
    name = "a_package.with_a_long_name:make_reward_of_something"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = validation_strip(images, prompts, {name: [0.5] * 8, "灯": [1.0] * 8}, title="\udcff " + "5" * 200)
    assert_margins_are_white(np.asarray(image))
    # Prompts have six lines at most.
    assert image.height < 800


def test_an_image_without_a_score_says_so() -> None:
    images = plain([(10, 20, 30)] * 3)
    array = np.asarray(validation_strip(images, [""] * 3, {"": [None, float("nan"), 0.5]}))
    lefts = (40, 40 + 494, 40 + 2 * 494)
    counts = [[len(area(array[:, left : left + 480], color)) for color in (ACCENT, GREY)] for left in lefts]
    assert counts[0] == counts[1] and counts[0][0] == 0 < counts[0][1]
    assert counts[2][0] > 0 == counts[2][1]


# Curves.


def entry(step: int, reward: float, std: float = 0.1) -> dict[str, float]:
    return {"step": step, "reward": reward, "reward_std": std}


def evaluation(update: int, mean: float | None, half: float | None = 0.1) -> dict[str, Any]:
    bounds = {"low": None, "high": None} if half is None or mean is None else {"low": mean - half, "high": mean + half}
    return {"update": update, "mean": mean, **bounds}


LOG = [entry(i, i / 60) for i in range(1, 61)]


def curve_height(path: Path, color: tuple[int, int, int] = ACCENT) -> tuple[float, float]:
    """Mean height above the bottom of the line's pixels in the left and the right third."""
    array = opened(path)
    assert_margins_are_white(array)
    places = area(array, color)
    width = array.shape[1]
    third = places[places[:, 1] < width / 3], places[(places[:, 1] > width / 2) & (places[:, 1] < 0.85 * width)]
    return tuple(array.shape[0] - part[:, 0].mean() for part in third)


def test_reward_curve_rises_with_the_reward(tmp_path: Path) -> None:
    reward_curve(LOG, tmp_path / "up.png", "Reward")
    reward_curve([entry(i, -i / 60) for i in range(1, 61)], tmp_path / "down.png", "Reward")
    left, right = curve_height(tmp_path / "up.png")
    assert right > left + 100
    left, right = curve_height(tmp_path / "down.png")
    assert right < left - 100


@pytest.mark.parametrize("number", [1, 2, 3])
def test_reward_curve_of_a_short_run(number: int, tmp_path: Path) -> None:
    log = [entry(i, 0.5, 0.0) for i in range(1, number + 1)]
    reward_curve(log, tmp_path / "a.png", "Reward", [evaluation(0, 0.5, None)], chosen=0)
    assert_margins_are_white(opened(tmp_path / "a.png"))


def test_a_long_title_stays_inside(tmp_path: Path) -> None:
    reward_curve(LOG, tmp_path / "a.png", "Reward " * 50, [evaluation(0, 0.5)], held_out_title="held out " * 50)
    assert_margins_are_white(opened(tmp_path / "a.png"))


def test_updates_without_a_finite_reward_are_left_out(tmp_path: Path) -> None:
    log = [entry(1, 0.1), entry(2, 0.2, float("nan")), {**entry(3, 0.3), "reward_std": None}]
    more = [entry(4, float("nan")), entry(5, float("inf")), {**entry(6, 0), "reward": None}]
    reward_curve([*log, *more], tmp_path / "a.png", "Reward")
    reward_curve(log, tmp_path / "b.png", "Reward")
    assert np.array_equal(opened(tmp_path / "a.png"), opened(tmp_path / "b.png"))


def test_held_out_rewards_have_a_panel_below_with_their_own_axis(tmp_path: Path) -> None:
    held_out = [evaluation(20 * i, 100 - i, half=0.5) for i in range(4)]
    reward_curve(LOG, tmp_path / "a.png", "Reward", held_out)
    array = opened(tmp_path / "a.png")
    training, below = area(array, ACCENT), area(array, SECOND)
    assert training[:, 0].max() < below[:, 0].min()
    # The scale of the held-out reward does not flatten the training reward, and both have their own direction.
    assert np.ptp(training[:, 0]) > 200 and np.ptp(below[:, 0]) > 100
    left, right = curve_height(tmp_path / "a.png")
    assert right > left + 100
    left, right = curve_height(tmp_path / "a.png", SECOND)
    assert right < left - 50
    reward_curve(LOG, tmp_path / "b.png", "Reward")
    alone = opened(tmp_path / "b.png")
    assert len(area(alone, SECOND)) == 0 and len(alone) < len(array) - 300


def test_intervals_are_drawn_where_there_are_any(tmp_path: Path) -> None:
    curves = {}
    for half in (None, 0.1, 0.4):
        held_out = [evaluation(20 * i, float(i), half) for i in range(4)]
        reward_curve(LOG, tmp_path / "a.png", "Reward", held_out)
        curves[half] = opened(tmp_path / "a.png")
    # Bars are between the color of the line and white: as red as both, less blue than white.
    bars = {half: int(((x[..., 0] > 215) & (x[..., 2] < 190)).sum()) for half, x in curves.items()}
    assert bars[None] < bars[0.1] < bars[0.4]
    held_out = [
        evaluation(0, 0.0, None),
        evaluation(10, None),
        *(evaluation(20 * i, float(i), None) for i in (1, 2, 3)),
    ]
    reward_curve(LOG, tmp_path / "a.png", "Reward", held_out)
    assert np.array_equal(opened(tmp_path / "a.png"), curves[None]), "an evaluation without a mean was drawn"


def test_the_chosen_update_is_marked_in_both_panels(tmp_path: Path) -> None:
    held_out = [evaluation(20 * i, float(i)) for i in range(4)]
    columns = []
    for chosen in (None, 20, 40):
        reward_curve(LOG, tmp_path / "a.png", "Reward", held_out, chosen)
        array = opened(tmp_path / "a.png")
        dark = (np.abs(array.astype(int) - INK).sum(-1) < 120)[200:]
        tallest = dark.sum(0).max()
        if chosen is None:
            assert tallest < 60
            continue
        places = np.flatnonzero(dark[:, dark.sum(0).argmax()])
        # Dashes over the heights of two panels, with a gap between them.
        assert tallest > 350 and np.diff(places).max() > 40 and np.ptp(places) > 700
        columns.append(dark.sum(0).argmax())
    # From 0 to 60 the axis has 96 % of the panel's 7.1 inches of 150 pixels.
    assert columns[1] - columns[0] == pytest.approx(7.1 * 150 * 0.96 / 1.0 * 20 / 60, abs=8)


def test_running_mean_is_centred_and_shorter_at_the_ends() -> None:
    assert figures._running_mean([0.0, 3.0, 6.0, 0.0], 3).tolist() == [1.5, 3.0, 3.0, 3.0]
    assert figures._running_mean([1.0, 2.0], 1).tolist() == [1.0, 2.0]


def test_the_running_mean_of_a_long_run_reads_each_update_once() -> None:
    reads = []

    class Log(list):
        def __getitem__(self, place: Any) -> Any:
            found = super().__getitem__(place)
            reads.append(len(found) if isinstance(place, slice) else 1)
            return found

    # Windows grow with a run, so means that read their windows would take time that grows with its square.
    assert len(figures._running_mean(Log([1.0] * 5000), 417)) == 5000
    assert sum(reads) <= 5000


@pytest.mark.parametrize(
    ("log", "held_out", "expected"),
    [
        ([], [], "an update with a finite reward, got none"),
        ([entry(1, float("nan"))], [], "an update with a finite reward, got none"),
        ([{"step": 1, "reward": 0.0}], [], "entries of log .* without reward_std"),
        ([entry(1, 0.0)], [{"update": 1, "mean": 0.0}], "entries of held_out .* without low"),
    ],
)
def test_reward_curve_refuses_entries_without_rewards(
    log: list[dict], held_out: list[dict], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=expected):
        reward_curve(log, tmp_path / "a.png", "Reward", held_out)


def test_pyplot_s_state_is_not_touched(tmp_path: Path) -> None:
    script = (
        "import sys; from flowbp.judging.figures import reward_curve; "
        f"reward_curve([dict(step=1, reward=0.0, reward_std=0.0)], {str(tmp_path / 'b.png')!r}, 'Reward'); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    assert (tmp_path / "b.png").exists()
