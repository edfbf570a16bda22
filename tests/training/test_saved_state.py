# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint whose manifest fits but whose content is wrong is refused; `latest` falls back to the one before."""

import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_sd3 import tiny_sd3_pipeline
from updates_by_hand import do_update, make_config, make_state

from flowbp.training.checkpoints import CheckpointError, find_checkpoint, write_folder
from flowbp.training.reports import read_log
from flowbp.training.saved_state import check_saved_state
from flowbp.training.state import TrainingState
from flowbp.training.state_files import save_files

MEAN = {"mean": 0.5, "low": None, "high": None}
# Of `Evaluation`, whose other state needs rollouts.
EVALUATION = {
    "made_with": {"rewards": ["toy"]},
    "is_pending": False,
    "training_rewards": [0.5, -1],
    "guard": {
        "base": {"saturated": 0.1, "diversity": None},
        "window": [[None, [0.5, None], None], [0.25, [1.0, 2.0], [0.5, None]]],
        "norms": [[None, [[3, 0.5]]]],
        "raised": ["saturated"],
    },
    "alarms": [{"name": "saturated", "update": 1, "message": "look"}],
    "found": {
        "base": {"update": 0, "scores": {"toy": [0.5, None]}},
        "best": {"update": 2, "scores": {"toy": [0.5, 1]}, "score": 0.75},
    },
    "base_images": None,
    "history": [{"update": 0, **MEAN}, {"update": 2, **MEAN, "low": 0.25, "high": 1.0}],
}
Change = Callable[[dict[str, Any]], object]


@functools.cache
def trained_state(**values: Any) -> TrainingState:
    """After two updates, one of them skipped."""
    transformer = tiny_sd3_pipeline(torch.float32).transformer
    state = make_state(transformer, make_config(Path("run"), mixed_precision="fp16", use_ema=True, **values))
    do_update(state, math.nan)
    do_update(state, 1.0)
    return state


def write(output_dir: Path, number: int, change: Callable[[Path], None] = lambda folder: None, **values: Any) -> Path:
    """A checkpoint, with a change made before its manifest is written."""
    state = trained_state(**values)
    content = {
        "format": 3,
        "settings": {"train": "lora"},
        "ingredients": {},
        "scales": {"attn.to_q": 1.0},
        "training": state.state_dict(),
    }

    def fill(folder: Path) -> None:
        tensors = state.files.tensors()
        save_files(folder, {**tensors, "best": tensors["lora"]})
        (folder / "state.json").write_text(json.dumps({**content, "evaluation": EVALUATION}))
        change(folder)

    write_folder(output_dir / f"checkpoint-{number}", fill)
    return output_dir / f"checkpoint-{number}"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint, which the others come after."""
    return write(tmp_path_factory.mktemp("run"), 1)


def assert_refused(written: Path, expected: str, change: Callable[[Path], None], **values: Any) -> None:
    folder = write(written.parent, 2, change, **values)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(written.parent, "checkpoint-2", pytest.fail, check_saved_state)
    told: list[str] = []
    assert find_checkpoint(written.parent, "latest", told.append, check_saved_state) == written
    (line,) = told
    for text in (str(caught.value), line):
        assert f"{folder}/{expected}" in text and "\n" not in text
    assert line.endswith("Using checkpoint-1 instead.")


def test_what_a_run_writes_is_accepted(written: Path) -> None:
    check_saved_state(written)


def test_a_state_before_the_first_step_has_no_moments(tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        content = json.loads((folder / "state.json").read_text())
        content["training"] |= {"skipped": 2}
        (folder / "state.json").write_text(json.dumps(content))
        save_file({}, folder / "optimizer.safetensors")

    check_saved_state(write(tmp_path, 1, change))


def test_a_parameter_without_a_gradient_has_no_moments(tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        moments = load_file(folder / "optimizer.safetensors")
        some = {name: value for name, value in moments.items() if not name.startswith("1.")}
        assert len(some) == len(moments) - 3
        save_file(some, folder / "optimizer.safetensors")

    check_saved_state(write(tmp_path, 1, change))


def test_another_format_is_for_resuming_to_refuse(tmp_path: Path) -> None:
    check_saved_state(write(tmp_path, 1, lambda folder: (folder / "state.json").write_text('{"format": 2}') and None))


def remove(content: dict[str, Any], *names: str) -> None:
    *outer, last = names
    for name in outer:
        content = content[name]
    del content[last]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: remove(state, "format"), "expected a whole number of 0 or more at state.format, found nothing"),
        (lambda state: remove(state, "training"), "expected an object at state.training, found nothing"),
        (
            lambda state: remove(state, "training", "scaler"),
            "expected an object at state.training.scaler, found nothing",
        ),
        (
            lambda state: remove(state, "evaluation", "guard", "norms"),
            "a list at state.evaluation.guard.norms, found n",
        ),
        (
            lambda state: remove(state, "evaluation", "found", "best", "score"),
            "a number at state.evaluation.found.best.s",
        ),
        (
            lambda state: state["training"].update(update=-3),
            "a whole number of 0 or more at state.training.update, found -3",
        ),
        (lambda state: state["training"].update(update=True), "at state.training.update, found True"),
        (lambda state: state["training"].update(update=2.0), "at state.training.update, found 2.0"),
        (lambda state: state["training"].update(update=0), "found skipped_in_a_row 0, skipped 1, update 0"),
        (lambda state: state["training"].update(skipped_in_a_row=2), "found skipped_in_a_row 2, skipped 1, update 2"),
        (lambda state: state["training"].update(prompts=[4]), "an object at state.training.prompts, found [4]"),
        (
            lambda state: state["training"]["prompts"].update(position=-4),
            "at state.training.prompts.position, found -4",
        ),
        (lambda state: state["training"]["scaler"].update(scale=-2.0), "a positive training.scaler.scale, found -2.0"),
        (
            lambda state: remove(state, "training", "scaler", "_growth_tracker"),
            "state.training.scaler._growth_tracker",
        ),
        (lambda state: state["training"]["lr_scheduler"].update(last_epoch="x"), "training.lr_scheduler.last_epoch"),
        (
            lambda state: state["scales"].update({"attn.to_q": None}),
            "expected a number at state.scales.attn.to_q, found N",
        ),
        (lambda state: state["evaluation"].update(found=[]), "an object at state.evaluation.found, found []"),
        (lambda state: state["evaluation"]["found"]["base"].update(scores={"toy": ["x"]}), "scores.toy[0], found 'x'"),
        (
            lambda state: state["evaluation"]["guard"].update(window=["x" * 999]),
            "a list at state.evaluation.guard.window[0]",
        ),
        (
            lambda state: state["evaluation"]["alarms"][0].update(name=3),
            "text at state.evaluation.alarms[0].name, found 3",
        ),
        (
            lambda state: state["evaluation"]["history"].append(None),
            "an object at state.evaluation.history[2], found None",
        ),
    ],
)
def test_a_state_with_wrong_values(written: Path, change: Change, expected: str) -> None:
    def apply(folder: Path) -> None:
        content = json.loads((folder / "state.json").read_text())
        change(content)
        (folder / "state.json").write_text(json.dumps(content))

    folder = write(written.parent, 2, apply)
    with pytest.raises(CheckpointError) as caught:
        check_saved_state(folder)
    assert expected in str(caught.value) and len(str(caught.value)) < 400
    assert_refused(written, "state.json: expected ", apply)


@pytest.mark.parametrize(
    "content", ["[]", "null", "[" * 100_000, '{"format": 3, "settings": ' + "[" * 900 + "]" * 900]
)
def test_a_state_that_is_none(written: Path, content: str) -> None:
    assert_refused(
        written, "state.json: expected ", lambda folder: (folder / "state.json").write_text(content) and None
    )


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        *(
            (name, lambda tensors: first(tensors).fill_(math.nan), "expected finite values, found NaN or infinity in ")
            for name in ("lora", "optimizer", "ema", "best")
        ),
        ("optimizer", lambda tensors: tensors.pop("1.exp_avg"), "found exp_avg_sq, step of 1"),
        ("optimizer", lambda tensors: tensors.clear(), "expected moments of the updates before, found 0 tensors"),
        (
            "optimizer",
            lambda tensors: tensors.update({"9.step": torch.ones(())}),
            "of parameters 0 to 3, found step of 9",
        ),
        ("optimizer", lambda tensors: tensors.update({"0.exp_avg": torch.ones(7)}), "at 0.exp_avg, found (7,)"),
        (
            "optimizer",
            lambda tensors: tensors["0.exp_avg_sq"].neg_(),
            "values of 0 or more at 0.exp_avg_sq, found -",
        ),
        ("optimizer", lambda tensors: tensors["2.step"].zero_(), "values of 1 or more at 2.step, found 0.0"),
        ("ema", lambda tensors: tensors.pop("3"), "expected tensors 0 to 3, found ['0', '1', '2']"),
        (
            "ema",
            lambda tensors: tensors.update({"3": torch.ones(7)}),
            "expected the shapes of lora.safetensors, found oth",
        ),
        ("best", lambda tensors: tensors.popitem(), "expected the names and shapes of lora.safetensors, found others"),
    ],
)
def test_tensors_that_are_wrong(written: Path, name: str, change: Change, expected: str) -> None:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / f"{name}.safetensors")
        change(tensors)
        save_file(tensors, folder / f"{name}.safetensors")

    folder = write(written.parent, 2, apply)
    with pytest.raises(CheckpointError) as caught:
        check_saved_state(folder)
    assert expected in str(caught.value)
    assert_refused(written, f"{name}.safetensors: expected ", apply)


def first(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(iter(tensors.values()))


# More than 4096 values, from which bitsandbytes keeps 8 bit.
EIGHT_BIT = {"optimizer": "adamw-8bit", "rank": 257}
PRODIGY = {"optimizer": "prodigy"}


@pytest.mark.parametrize("values", [EIGHT_BIT, PRODIGY, {**PRODIGY, "adam_beta1": 0.0}])
def test_other_optimizers_are_accepted(tmp_path: Path, values: dict[str, Any]) -> None:
    check_saved_state(write(tmp_path, 1, **values))


@pytest.mark.parametrize(
    ("values", "change", "expected"),
    [
        (
            EIGHT_BIT,
            lambda found: found.pop("2.qmap1"),
            "qmap1, absmax1, state2, qmap2, absmax2 of parameters",
        ),
        (
            EIGHT_BIT,
            lambda found: found.update({"2.state1": torch.ones(7)}),
            "lora.safetensors at 2.state1, found (7,)",
        ),
        (
            EIGHT_BIT,
            lambda found: found.update({"2.state1": found["2.state1"].float()}),
            "torch.uint8 at 2.state1",
        ),
        (EIGHT_BIT, lambda found: found.update({"2.absmax2": found["2.absmax2"][1:]}), "at 2.absmax2, found (16,)"),
        (EIGHT_BIT, lambda found: found["2.absmax2"].neg_(), "values of 0 or more at 2.absmax2, found -"),
        (
            EIGHT_BIT,
            lambda found: found.update({"0.step": torch.ones(())}),
            "torch.int64 at 0.step, found torch.",
        ),
        (PRODIGY, lambda found: found.pop("0.s"), "found exp_avg, exp_avg_sq, p0, step of 0"),
        (PRODIGY, lambda found: found.update({"0.p0": torch.zeros(7)}), "at 0.p0, found (7,)"),
        (PRODIGY, lambda found: found["1.step"].neg_(), "values of 0 or more at 1.step, found -1"),
    ],
)
def test_tensors_of_other_optimizers_that_are_wrong(
    tmp_path: Path, values: dict[str, Any], change: Change, expected: str
) -> None:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "optimizer.safetensors")
        change(tensors)
        save_file(tensors, folder / "optimizer.safetensors")

    with pytest.raises(CheckpointError, match=f"optimizer.safetensors: expected .*{re.escape(expected)}"):
        check_saved_state(write(tmp_path, 1, apply, **values))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"optimizer_name": "sgd"}, "one of adamw, adamw-8bit, prodigy at state.training.optimizer_name, found 'sgd'"),
        ({"optimizer_numbers": {}}, "a number at state.training.optimizer_numbers.d, found nothing"),
        ({"d": -1.0}, "a positive training.optimizer_numbers.d, found -1.0"),
        ({"k": 0.5}, "a whole number of 0 or more at state.training.optimizer_numbers.k, found 0.5"),
    ],
)
def test_numbers_of_an_optimizer_that_are_wrong(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    def apply(folder: Path) -> None:
        content = json.loads((folder / "state.json").read_text())
        training = content["training"]
        (training if change.keys() <= training.keys() else training["optimizer_numbers"]).update(change)
        (folder / "state.json").write_text(json.dumps(content))

    with pytest.raises(CheckpointError, match=f"state.json: expected {re.escape(expected)}"):
        check_saved_state(write(tmp_path, 1, apply, **PRODIGY))


@pytest.mark.parametrize("name", ["lora", "optimizer", "ema", "best"])
def test_a_file_that_was_never_written(written: Path, name: str) -> None:
    expected = f"{name}.safetensors: expected a file, found "
    assert_refused(written, expected, lambda folder: (folder / f"{name}.safetensors").unlink())


def test_a_damaged_log_is_no_obstacle(tmp_path: Path) -> None:
    entries = [{"step": step, "reward": reward, "seconds": 0.5} for step, reward in ((1, 0.5), (2, None), (3, 1.0))]
    lines = [json.dumps(entry).encode() for entry in entries]
    wrong = [b"null", b"[1]", b'"step"', b"{}", b'{"step": "1"}', b'{"step": 1, "reward": 2}', b"[" * 100_000]
    # What a machine without power leaves.
    wrong += [b"\0" * 99, b"\xff\xfe", lines[0][:20]]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([lines[0], *wrong, lines[1], b"", lines[2]]))
    assert read_log(tmp_path / "log.jsonl", 2) == entries[:2]
    assert read_log(tmp_path / "absent.jsonl", 2) == []
