# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The folder of an evaluation, from which it resumes."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from flowbp.judging.models import EvaluatedModel
from flowbp.judging.store import Store

BASE, LORA = EvaluatedModel("base"), EvaluatedModel("lora × 2", "user/name", 2.0)
SETTINGS = {"model": "m", "seed": 0}


def make_store(folder: Path, *models: EvaluatedModel) -> Store:
    return Store(folder, SETTINGS, models or (BASE, LORA), images=5, batch_size=2)


def finished(folder: Path) -> Store:
    store = make_store(folder)
    store.create()
    for model, batch in store.pending():
        places = store.places(batch)
        images = [Image.new("RGB", (8, 8), (place, 0, 0)) for place in places]
        store.add(model, batch, images, {"x": [10 * place + (model is LORA) for place in places]})
    return store


def test_scores_and_images_are_in_the_order_of_the_images(tmp_path: Path) -> None:
    store = finished(tmp_path)
    assert len(store.batches()) == 6 and store.pending() == []
    assert store.scores(BASE) == {"x": [0, 10, 20, 30, 40]} and store.scores(LORA) == {"x": [1, 11, 21, 31, 41]}
    assert [list(store.places(batch)) for batch in range(3)] == [[0, 1], [2, 3], [4]]
    for place in range(5):
        with Image.open(store.image(LORA, place)) as image:
            assert image.getpixel((0, 0)) == (place, 0, 0)


def test_an_evaluation_resumes_with_the_batches_that_are_left(tmp_path: Path) -> None:
    finished(tmp_path)
    next((tmp_path / "scores" / "lora_2").glob("*1.json")).unlink()
    assert make_store(tmp_path).pending() == [(LORA, 1)]


def test_models_can_be_added(tmp_path: Path) -> None:
    finished(tmp_path)
    new = EvaluatedModel("new", "user/new")
    store = make_store(tmp_path, BASE, new)
    assert store.pending() == [(new, 0), (new, 1), (new, 2)]
    store.create()
    # The settings still name the model that was left out this time.
    kept = json.loads((tmp_path / "settings.json").read_text())["models"]
    assert kept == {model.folder: asdict(model) for model in (BASE, LORA, new)}


def test_a_batch_of_another_size_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.create()
    with pytest.raises(ValueError):
        store.add(BASE, 2, [Image.new("RGB", (8, 8))] * 2, {"x": [0.0, 1.0]})
    assert (BASE, 2) in store.pending()


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
        Store(tmp_path, settings, [BASE, lora], images=5, batch_size=2)
    assert "\n" not in str(caught.value)


def test_a_lora_without_finished_batches_may_change(tmp_path: Path) -> None:
    make_store(tmp_path).create()
    changed = EvaluatedModel("lora × 2", "user/other", 2.0)
    assert len(make_store(tmp_path, BASE, changed).pending()) == 6
