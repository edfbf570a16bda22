# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Rows, intervals, tables, the folder and the report of an evaluation, without a model."""

import base64
import csv
import html
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowbp.judging.evaluation import (
    Row,
    Store,
    interval,
    largest_changes,
    lora_file,
    make_rows,
    report_html,
    reward_names,
    summarise,
    table_csv,
    table_markdown,
    titles,
    wins,
)
from flowbp.judging.figures import comparison


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Statistics.


def test_interval_is_that_of_a_normal_mean() -> None:
    values = normal(400) + 3
    low, high = interval(values)
    half = 1.96 * values.std().item() / 20
    assert low == pytest.approx(values.mean().item() - half, abs=0.02)
    assert high == pytest.approx(values.mean().item() + half, abs=0.02)
    assert interval(torch.ones(5, dtype=torch.float64)) == (1.0, 1.0)


@pytest.mark.parametrize("kind", ["skewed", "share"])
def test_interval_covers_the_true_mean_as_often_as_it_says(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    covered = []
    for _ in range(300):
        if kind == "skewed":
            values, truth = torch.empty(60, dtype=torch.float64).exponential_(generator=generator), 1.0
        else:
            values, truth = (torch.rand(60, generator=generator) < 0.3).double(), 0.3
        low, high = interval(values, draws=1000)
        covered.append(low <= truth <= high)
    # 95 % less what percentiles lose on 60 values; three standard deviations of 300 tries are 4 points.
    assert 0.89 <= np.mean(covered) <= 0.99


def test_interval_in_parts_is_the_interval_at_once() -> None:
    values = normal(37)
    chosen = torch.randint(37, (2500, 37), generator=torch.Generator().manual_seed(0))
    at_once = torch.quantile(values[chosen].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert list(interval(values, draws=2500)) == at_once


def test_wins_count_ties_half_and_average_over_a_prompt_s_images() -> None:
    scores = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]])
    base = torch.tensor([[0.0, 1.0], [0.0, 0.5], [1.0, 1.0]])
    assert wins(scores, base).tolist() == [0.5, 0.75, 0.0]


def test_records_are_means_over_prompts_and_paired_changes() -> None:
    base, better = normal(50, 3), normal(50, 3) + normal(50, 3, seed=1).abs()
    share = (normal(50, 3, seed=2) > 0).double()
    scores = {"a": {"base": base, "lora": better}, "b": {"base": share, "lora": 1 - share}}
    records = {(record["reward"], record["row"]): record for record in summarise(scores, {})}
    assert not records["a", "base"]["share"] and records["b", "lora"]["share"]
    assert "change" not in records["a", "base"] and "groups" not in records["a", "base"]
    record = records["a", "lora"]
    assert record["score"]["mean"] == pytest.approx(better.mean().item())
    assert record["change"]["mean"] == pytest.approx((better - base).mean().item())
    assert record["win_rate"] == {"mean": 1.0, "interval": [1.0, 1.0]}
    # Pairing by noise: the interval of the change is much narrower than those of the scores.
    width = np.diff(record["change"]["interval"])[0]
    assert tuple(record["change"]["interval"]) == interval((better - base).mean(1))
    assert width < 0.8 * np.diff(record["score"]["interval"])[0]


def test_groups_have_columns_and_overall_is_the_mean_of_their_means() -> None:
    values = torch.tensor([[1.0], [1.0], [1.0], [0.0], [0.0]], dtype=torch.float64)
    groups = {"geneval": {"single_object": [0, 1, 2], "position": [3, 4]}}
    record, other = summarise({"geneval": {"base": values}, "clip": {"base": values}}, groups)
    assert list(record["groups"]) == ["single_object", "position"] and "groups" not in other
    assert [estimate["mean"] for estimate in record["groups"].values()] == [1.0, 0.0]
    assert record["overall"] == {"mean": 0.5, "interval": [0.5, 0.5]} and record["score"]["mean"] == 0.6
    places = {"x": {"a": list(range(100)), "b": list(range(100, 300))}}
    noisy = summarise({"x": {"base": normal(300, 1)}}, places)[0]["overall"]
    # Groups of 100 and 200 prompts of standard deviation 1.
    assert np.diff(noisy["interval"])[0] == pytest.approx(2 * 1.96 * np.sqrt(1 / 100 + 1 / 200) / 2, rel=0.15)


# Tables.


def paper_records() -> list[dict]:
    names = ["hpsv2.1", "pickscore", "imagereward", "unifiedreward-alignment", "unifiedreward-quality"]
    scores = {}
    for place, name in enumerate(names):
        base = normal(40, 1, seed=place)
        scores[name] = {"base": base, "Sparse": base + 0.1, "Bridge": base - 0.2}
    scores["geneval"] = {row: (normal(40, 1, seed=9) > 0).double() for row in ("base", "Sparse", "Bridge")}
    tasks = {"single_object": range(0, 40, 2), "two_object": range(1, 40, 2)}
    return summarise(scores, {"geneval": {task: list(places) for task, places in tasks.items()}})


def test_the_table_has_the_paper_s_shape() -> None:
    parts = re.split(r"\n\n", table_markdown(paper_records()))
    assert parts[0] == "Score: mean [95 % interval]"
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in parts[1].splitlines()]
    assert lines[0] == ["", "HPSv2.1", "PickScore", "ImageReward", "UR-Align", "UR-IQ", "GenEval, %"]
    assert [line[0] for line in lines[2:]] == ["base", "Sparse", "Bridge"]
    assert len({len(line) for line in parts[1].splitlines()}) == 1
    assert re.fullmatch(r"-?\d\.\d\d \[-?\d\.\d\d, -?\d\.\d\d\]", lines[2][1])
    captions = parts[::2]
    assert "Change against the base, same noise" in captions and "GenEval by group, %" in captions
    by_group = parts[2 * captions.index("GenEval by group, %") + 1].splitlines()
    heads = [cell.strip() for cell in by_group[0].strip("|").split("|")]
    assert heads == ["", "single_object", "two_object", "overall"]
    assert len(captions) == 4
    change = parts[2 * captions.index("Change against the base, same noise") + 1]
    assert "+0.100 [+0.100, +0.100]" in change and "-0.200 [-0.200, -0.200]" in change


def test_numbers_are_rounded_to_their_interval() -> None:
    values = {"base": 20 + 1e-3 * normal(100, 1), "lora": 20 + 1e-3 * normal(100, 1, seed=1)}
    table = table_markdown(summarise({"pickscore": values}, {}))
    assert re.search(r"\| base +\| +(19\.99|20\.00)\d{3} \[", table), table


def test_csv_holds_every_number_of_the_records() -> None:
    records = paper_records()
    lines = list(csv.DictReader(io.StringIO(table_csv(records))))
    assert {line["measure"] for line in lines} == {
        "score", "change", "win_rate", "overall", "group single_object", "group two_object"
    }  # fmt: skip
    for record in records:
        line = next(x for x in lines if (x["reward"], x["row"]) == (record["reward"], record["row"]))
        assert float(line["mean"]) == record["score"]["mean"]
        assert [float(line["low"]), float(line["high"])] == record["score"]["interval"]


def test_titles_are_short_where_that_is_clear() -> None:
    assert titles(["clip", "measures:read_v4"]) == {"clip": "CLIP", "measures:read_v4": "read_v4"}
    assert titles(["one:make", "two:make"]) == {"one:make": "one:make", "two:make": "two:make"}


# Rows and rewards of the command line.


def write_lora(folder: Path, name: str = "pytorch_lora_weights.safetensors", content: bytes = b"1") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


def test_rows_are_the_base_and_every_lora_at_every_setting(tmp_path: Path) -> None:
    one, two = write_lora(tmp_path / "one"), write_lora(tmp_path / "two", "other.safetensors", b"2")
    rows = make_rows([str(one), f"second={two}", "user/third"], [0.5, 1.0], [0, 2])
    assert [row.name for row in rows[:5]] == [
        "base", "one × 0.5", "one × 0.5, base for last 2", "one × 1", "one × 1, base for last 2"
    ]  # fmt: skip
    assert len(rows) == 13 and rows[5].name == "second × 0.5" and rows[-1].name == "third × 1, base for last 2"
    assert rows[1].digest == rows[4].digest != rows[5].digest and rows[-1].digest is None
    assert len({row.folder for row in rows}) == 13
    assert make_rows([f"x={one}"], [1.0], [0])[1] == Row("x", str(one), 1.0, 0, rows[1].digest)


def test_the_file_of_a_lora(tmp_path: Path) -> None:
    folder = write_lora(write_lora(tmp_path / "one"), "second.safetensors")
    assert lora_file(str(folder)) == folder / "pytorch_lora_weights.safetensors"
    assert lora_file(str(folder / "second.safetensors")) == folder / "second.safetensors"
    assert lora_file("user/name") is None


@pytest.mark.parametrize(
    ("loras", "expected"),
    [
        (["{here}/missing"], "no such file or folder"),
        (["{here}/empty"], "expected one .safetensors file in the folder, got none"),
        (["{here}/two"], "got a.safetensors, b.safetensors"),
        (["={here}/one"], "expected NAME=SOURCE"),
        (["{here}/one", "{here}/one"], "'one' twice"),
        (["base={here}/one"], "'base' twice"),
    ],
)
def test_rows_that_make_no_sense_are_refused(loras: list[str], expected: str, tmp_path: Path) -> None:
    write_lora(tmp_path / "one")
    (tmp_path / "empty").mkdir()
    write_lora(write_lora(tmp_path / "two", "a.safetensors"), "b.safetensors")
    with pytest.raises(ValueError, match=expected) as caught:
        make_rows([lora.format(here=tmp_path) for lora in loras], [1.0], [0])
    assert "\n" not in str(caught.value)


def test_rewards_are_names_without_weights() -> None:
    assert reward_names("hpsv2.1, pickscore/26,module:make") == ["hpsv2.1", "pickscore/26", "module:make"]
    for spec, expected in (("ocr,,clip", "different names"), ("clip,clip", "different"), ("ocr:0.7,clip", "weights")):
        with pytest.raises(ValueError, match=expected):
            reward_names(spec)


# The folder.

ROWS = [Row("base"), Row("lora × 2", "user/name", 2.0)]


def pictures(number: int, red: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (red, 10 * place, 0)) for place in range(number)]


def filled(folder: Path, images: int = 5) -> Store:
    store = Store(folder, {"model": "m", "seed": 0}, ROWS, images=images, batch_size=2)
    store.create()
    for row, batch in store.pending():
        places = store.places(batch)
        gain = 0 if row.lora is None else (-1) ** places[0] * 2
        store.add(row, batch, pictures(len(places), 50 * batch), {"x": [place + gain for place in places]})
    return store


def test_a_store_goes_on_with_what_is_left(tmp_path: Path) -> None:
    store = filled(tmp_path)
    assert store.pending() == [] and len(store.batches()) == 6
    assert store.scores(ROWS[0]) == {"x": [0, 1, 2, 3, 4]}
    next((tmp_path / "scores" / "lora_2").glob("*1.json")).unlink()
    again = Store(tmp_path, {"model": "m", "seed": 0}, ROWS, images=5, batch_size=2)
    assert again.pending() == [(ROWS[1], 1)]
    # Another LoRA joins; the rows that are there stay.
    more = Store(tmp_path, {"model": "m", "seed": 0}, [*ROWS, Row("new", "user/new")], images=5, batch_size=2)
    assert [row.name for row, _ in more.pending()] == ["lora × 2", "new", "new", "new"]
    more.create()
    assert Store(tmp_path, {"model": "m", "seed": 0}, ROWS, images=5, batch_size=2).pending() == [(ROWS[1], 1)]


@pytest.mark.parametrize(
    ("settings", "rows", "expected"),
    [
        ({"model": "m", "seed": 1}, ROWS, "seed 0, got 1"),
        ({"model": "m"}, ROWS, "seed 0, got None"),
        ({"model": "m", "seed": 0}, [ROWS[0], Row("lora × 2", "user/name", 2.0, digest="f00")], "another LoRA"),
    ],
)
def test_a_folder_of_another_evaluation_is_refused(settings: dict, rows: list[Row], expected: str, tmp_path: Path):
    filled(tmp_path)
    with pytest.raises(ValueError, match=expected):
        Store(tmp_path, settings, rows, images=5, batch_size=2)


# Pictures.


def test_largest_changes_are_gains_then_losses() -> None:
    assert largest_changes([0.0, 3.0, -5.0, 1.0, 2.0], 10) == [1, 4, 3, 0, 2]
    assert largest_changes([0.0, 3.0, -5.0, 1.0, 2.0], 3) == [1, 4, 2]
    assert largest_changes([0.0, 3.0, -5.0, 1.0], 1) == [1]


def report(tmp_path: Path, limit: int) -> str:
    store = filled(tmp_path)
    scores = {
        "x": {
            row.name: torch.tensor(store.scores(row)["x"], dtype=torch.float64).unflatten(0, (-1, 1)) for row in ROWS
        }
    }
    records = summarise(scores, {})
    return report_html(store, records, scores, ["<b>one</b>", "two & 2", "three", "four", "five"], limit)


def test_the_report_needs_no_other_file_and_is_sorted_by_change(tmp_path: Path) -> None:
    page = report(tmp_path, limit=64)
    assert not re.search(r"https?://|src=\"(?!data:)|<link|@import|url\(", page)
    assert "&lt;b&gt;one&lt;/b&gt;" in page and "<b>one</b>" not in page
    changes = [json.loads(html.unescape(x))["lora × 2/x"] for x in re.findall(r'data-change="([^"]*)"', page)]
    assert len(changes) == 5 and changes == sorted(changes, reverse=True)
    found = re.findall(r"data:image/png;base64,([^\"]*)", page)
    assert len(found) == 10
    with Image.open(io.BytesIO(base64.b64decode(found[0]))) as image:
        assert image.size == (8, 8) and image.getpixel((0, 0)) == (0, 0, 0)
    assert "All 5 images" in page and "user/name" in page and "2 [1, 3]" not in page


def test_the_report_shows_the_largest_changes_only(tmp_path: Path) -> None:
    assert report(tmp_path, limit=2).count('class="card"') == 2


def test_comparison_stands_every_row_below_the_other(tmp_path: Path) -> None:
    colors = {"base": (200, 0, 0), "a name of a LoRA that is much too long for it": (0, 200, 0), "c": (0, 0, 200)}
    rows = {name: [Image.new("RGB", (48, 48), color)] * 3 for name, color in colors.items()}
    comparison(rows, ["p"] * 3, tmp_path / "a.png", "Title", "note", {name: [0.5] * 3 for name in rows})
    with Image.open(tmp_path / "a.png") as image:
        array = np.asarray(image.convert("RGB"))
    places = [np.argwhere((array == color).all(-1)) for color in colors.values()]
    for above, below in zip(places, places[1:], strict=False):
        assert above[:, 0].max() < below[:, 0].min()
    assert len({len(place) for place in places}) == 1 and len(places[0]) > 3 * 150**2
    assert all((edge == 255).all() for edge in (array[:8], array[-8:], array[:, :8], array[:, -8:]))
    with pytest.raises(ValueError, match="3 base, 3 a name.*2 c"):
        comparison({**rows, "c": rows["c"][:2]}, ["p"] * 3, tmp_path / "b.png", "Title", "note")


def test_images_without_a_score_are_left_out_everywhere() -> None:
    nan = math.nan
    scores = {
        "judge": {
            "base": torch.tensor([[1.0, 2.0], [nan, 4.0], [5.0, 6.0], [nan, 1.0]], dtype=torch.float64),
            "lora": torch.tensor([[2.0, nan], [7.0, 3.0], [6.0, 8.0], [1.0, nan]], dtype=torch.float64),
        }
    }
    base, lora = summarise(scores, {"judge": {"one": [0, 3], "two": [1, 2]}})
    assert base["left_out"] == lora["left_out"] == 4
    assert base["score"]["mean"] == pytest.approx((1 + 4 + 5.5) / 3)
    assert lora["score"]["mean"] == pytest.approx((2 + 3 + 7) / 3)
    assert lora["change"]["mean"] == pytest.approx((1 - 1 + 1.5) / 3)
    assert lora["win_rate"]["mean"] == pytest.approx((1 + 0 + 1) / 3)
    assert lora["groups"]["one"]["mean"] == 2.0 and lora["groups"]["two"]["mean"] == pytest.approx(5.0)
    assert "(4 without a score)" in table_markdown([base, lora])
    silent = {"base": torch.tensor([[nan], [1.0]], dtype=torch.float64)}
    assert list(summarise({"judge": silent}, {"judge": {"one": [0], "two": [1]}})[0]["groups"]) == ["two"]
    assert summarise({"judge": {"base": torch.full((2, 1), nan, dtype=torch.float64)}}, {}) == []
