# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The folder of an evaluation, from which it resumes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from flowbp.judging.evaluation_folder import EvaluationFolder
from flowbp.judging.models import EvaluatedModel
from flowbp.judging.results import write_results

BASE, LORA = EvaluatedModel("base"), EvaluatedModel("lora × 2", "user/name", 2.0)
SETTINGS = {"model": "m", "seed": 0}


def make_folder(folder: Path, *models: EvaluatedModel) -> EvaluationFolder:
    return EvaluationFolder(folder, SETTINGS, models or (BASE, LORA), images=5, batch_size=2, rewards=["x"])


def finished(folder: Path) -> EvaluationFolder:
    kept = make_folder(folder)
    kept.create()
    for model, batch in kept.pending():
        places = kept.places(batch)
        images = [Image.new("RGB", (8, 8), (place, 0, 0)) for place in places]
        kept.add(model, batch, images, {"x": [10 * place + (model is LORA) for place in places]})
    return kept


def test_scores_and_images_are_in_the_order_of_the_images(tmp_path: Path) -> None:
    kept = finished(tmp_path)
    assert len(kept.batches()) == 6 and kept.pending() == []
    assert kept.scores(BASE) == ({"x": [0, 10, 20, 30, 40]}, 0)
    assert kept.scores(LORA) == ({"x": [1, 11, 21, 31, 41]}, 0)
    assert [list(kept.places(batch)) for batch in range(3)] == [[0, 1], [2, 3], [4]]
    for place in range(5):
        with Image.open(kept.image(LORA, place)) as image:
            assert image.getpixel((0, 0)) == (place, 0, 0)


def test_an_evaluation_resumes_with_the_batches_that_are_left(tmp_path: Path) -> None:
    finished(tmp_path)
    next((tmp_path / "scores" / "lora_2").glob("*1.json")).unlink()
    assert make_folder(tmp_path).pending() == [(LORA, 1)]


def test_models_can_be_added(tmp_path: Path) -> None:
    finished(tmp_path)
    new = EvaluatedModel("new", "user/new")
    kept = make_folder(tmp_path, BASE, new)
    assert kept.pending() == [(new, 0), (new, 1), (new, 2)]
    kept.create()
    # The settings still name the model that was left out this time.
    kept = json.loads((tmp_path / "settings.json").read_text())["models"]
    assert kept == {model.folder: asdict(model) for model in (BASE, LORA, new)}


def test_a_batch_of_another_size_is_refused(tmp_path: Path) -> None:
    kept = make_folder(tmp_path)
    kept.create()
    with pytest.raises(ValueError):
        kept.add(BASE, 2, [Image.new("RGB", (8, 8))] * 2, {"x": [0.0, 1.0]})
    assert (BASE, 2) in kept.pending()


@pytest.mark.parametrize(
    ("settings", "lora", "message"),
    [
        ({"model": "m", "seed": 1}, LORA, "seed 0, got 1"),
        ({"model": "m"}, LORA, "seed 0, got None"),
        (SETTINGS, EvaluatedModel("lora × 2", "user/name", 2.0, digest="f00"), "another LoRA named 'lora × 2'"),
    ],
)
def test_another_evaluation_s_folder_is_refused(
    settings: dict, lora: EvaluatedModel, message: str, tmp_path: Path
) -> None:
    finished(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        EvaluationFolder(tmp_path, settings, [BASE, lora], images=5, batch_size=2, rewards=["x"])
    assert "\n" not in str(caught.value)


def test_a_file_of_the_user_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("mine")
    with pytest.raises(ValueError, match="table.csv in this folder was not written by an evaluation; move it, or"):
        make_folder(tmp_path)


def test_a_lora_without_finished_batches_may_change(tmp_path: Path) -> None:
    make_folder(tmp_path).create()
    changed = EvaluatedModel("lora × 2", "user/other", 2.0)
    assert len(make_folder(tmp_path, BASE, changed).pending()) == 6


# Damage.


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def enlarge(path: Path) -> None:
    Image.new("RGB", (16, 8)).save(path)


def write(content: object) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(content)) and None


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("images/lora_2/000003.png", damage) for damage in (cut, empty, flip_a_bit, Path.unlink, enlarge)),
        *(("scores/lora_2/000001.json", damage) for damage in (cut, empty)),
        *(
            ("scores/lora_2/000001.json", write(content))
            for content in ([], {"x": [1.0]}, {"x": [1.0, None]}, {"x": 1.0}, {"y": [1.0, 2.0]}, {"x": ["a", "b"]})
        ),
    ],
)
def test_a_batch_with_a_damaged_file_is_found_and_drawn_again(
    name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    finished(tmp_path)
    assert make_folder(tmp_path).discard_damaged() == []
    damage(tmp_path / name)
    kept = make_folder(tmp_path)
    (line,) = kept.discard_damaged()
    assert line.startswith("Batch 1 of lora × 2 is drawn again: ") and (name in line or damage is enlarge)
    assert kept.pending() == [(LORA, 1)]
    assert make_folder(tmp_path).discard_damaged() == []


def test_an_evaluation_s_scores_from_before_images_were_checked_are_kept(tmp_path: Path) -> None:
    kept = finished(tmp_path)
    for path in tmp_path.glob("scores/*/*.json"):
        path.write_text(json.dumps({"x": json.loads(path.read_text())["x"]}))
    assert kept.discard_damaged() == [] and kept.scores(BASE) == ({"x": [0, 10, 20, 30, 40]}, 0)


def test_images_that_are_not_finite_are_counted_and_not_drawn_again(tmp_path: Path) -> None:
    kept = finished(tmp_path)
    kept.add(LORA, 1, [Image.new("RGB", (8, 8))] * 2, {"x": [float("nan"), 2.0]}, not_finite=1)
    assert make_folder(tmp_path).discard_damaged() == [] and kept.pending() == []
    scores, not_finite = make_folder(tmp_path).scores(LORA)
    assert not_finite == 1 and [score == score for score in scores["x"]] == [True, True, False, True, True]


@pytest.mark.parametrize("damage", [cut, empty, Path.unlink, write([]), write({"settings": SETTINGS}), write({})])
def test_damaged_settings_are_named_with_the_remedy(damage: Callable[[Path], None], tmp_path: Path) -> None:
    finished(tmp_path)
    damage(tmp_path / "settings.json")
    with pytest.raises(ValueError, match="settings.json is missing, empty or cut; restore that file") as caught:
        make_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("move", [shutil.rmtree, lambda folder: folder.rename(folder.with_name("other"))])
def test_a_folder_that_is_gone_is_told_and_not_made_again(move: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    kept = finished(folder)
    move(folder)
    there = sorted(tmp_path.iterdir())
    for write_more in (
        lambda: kept.add(BASE, 0, [Image.new("RGB", (8, 8))] * 2, {"x": [0.0, 1.0]}),
        lambda: kept.settings_file.add_remarks({LORA.lora: "only 1 of its 2 layers fit"}),
        lambda: write_results(kept, [], "base", ["p"] * 5, {}, range(5), 5),
    ):
        with pytest.raises(FileNotFoundError, match="run: .* was removed or renamed while the evaluation ran"):
            write_more()
    assert sorted(tmp_path.iterdir()) == there


def test_remarks_are_kept_until_the_lora_is_loaded_again(tmp_path: Path) -> None:
    kept = finished(tmp_path)
    kept.settings_file.add_remarks({LORA.lora: "only 1 of its 2 layers fit"})
    assert make_folder(tmp_path).settings_file.remarks == {LORA.folder: "only 1 of its 2 layers fit"}
    # A run without this LoRA keeps them, and tells that it is left out.
    other = make_folder(tmp_path, BASE)
    other.create()
    other.settings_file.add_remarks({})
    assert other.settings_file.left_out == [LORA.name] and make_folder(tmp_path).settings_file.left_out == []
    kept = make_folder(tmp_path)
    assert kept.settings_file.remarks
    kept.settings_file.add_remarks({})
    assert make_folder(tmp_path).settings_file.remarks == {}
