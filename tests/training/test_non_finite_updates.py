# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Updates whose reward, loss or gradient is not finite, through the real script: skipped together, counted, and left.

In one process in the tests' own; in two by torchrun, see `resume_processes.py`, where one of the two goes wrong.
"""

import json
import math
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from resume_harness import (
    SD3,
    check_same_end,
    largest_difference,
    run_in_two_processes,
    sd3_arguments,
    state_of,
    tensors_of,
)
from safetensors.torch import load_file
from training_scripts import command_line, log_of, script_path

# Two calls of the reward for each update. The second update goes wrong in its first call.
FAULTY = {
    "reward": "resume_rewards:make_faulty_reward",
    "gradient_accumulation_steps": 2,
    "max_train_steps": 3,
    "use_ema": True,
    "ema_decay": 0.7,
    "lr_scheduler": "linear",
    "lr_warmup_steps": 2,
}
KINDS = ("nan", "inf", "gradient")
TOO_MANY = (
    "2 updates in a row had a reward, loss or gradient that is not finite, expected fewer than --max_skipped_updates "
    "2; lower --learning_rate or look at the reward, then resume from the last checkpoint."
)
TOO_LARGE = (
    "The optimizer's step made the LoRA not finite, so it is not saved; lower --learning_rate and resume from the "
    "last checkpoint."
)
# Rates of 0, then half of this.
LARGE = {"learning_rate": 1e38, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2}


def fault(kind: str, calls: list[int], rank: int = 0) -> dict[str, str]:
    """The environment in which `make_faulty_reward` goes wrong."""
    return {"FLOWBP_TEST_FAULT": json.dumps({"kind": kind, "calls": calls, "rank": rank})}


def check_all_finite(folder: Path, checkpoints: int) -> None:
    """No file under the folder has a number that is not finite; there are so many checkpoints."""
    assert len(list(folder.glob("checkpoint-*"))) == checkpoints
    for path in folder.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
    for path in folder.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)


def check_second_was_skipped(output: Path, kind: str, places: int) -> None:
    """The second of three updates was skipped, and changed nothing but the number of updates and places used.

    Args:
        output: the run's folder.
        kind: of the fault.
        places: of the prompts' order that an update uses.
    """
    rows = log_of(output)
    assert [row["skipped_updates"] for row in rows] == [0, 1, 1]
    assert rows[1]["gradient_norm" if kind == "gradient" else "reward"] is None
    assert kind != "gradient" or rows[1]["reward"] is not None
    assert all(math.isfinite(row["reward"]) and row["gradient_norm"] > 0 for row in (rows[0], rows[2]))
    # The schedule, two steps of warm-up from 0, continues where it was.
    assert [row["learning_rate"] for row in rows] == [0, 0.005, 0.005]
    folders = [output / f"checkpoint-{number}" for number in (1, 2, 3)]
    before, skipped, after = ({**tensors_of(folder)} for folder in folders)
    assert {name.partition("/")[0] for name in before} == {
        f"{name}.safetensors" for name in ("lora", "optimizer", "ema", "pytorch_lora_weights")
    }
    assert largest_difference(before, skipped) == 0
    assert largest_difference(skipped, after) > 1e-3
    assert state_of(folders[1])["evaluation"] == state_of(folders[0])["evaluation"]
    old, new, last = (state_of(folder)["training"] for folder in folders)
    assert (new["lr_scheduler"], new["scaler"]) == (old["lr_scheduler"], old["scaler"])
    assert (new["update"], new["skipped"], new["skipped_in_a_row"]) == (2, 1, 1)
    assert new["prompts"]["position"] == old["prompts"]["position"] + places
    assert (last["update"], last["skipped"], last["skipped_in_a_row"]) == (3, 1, 0)
    assert json.loads((output / "run.json").read_text())["skipped_updates"] == 1
    check_all_finite(output, 3)


@pytest.fixture
def arguments(model: Path, prompts: Path, tmp_path: Path) -> dict[str, Any]:
    return {**sd3_arguments(model, prompts, tmp_path / "run"), **FAULTY}


def set_fault(monkeypatch: pytest.MonkeyPatch, *what: Any) -> None:
    """Go wrong in this process; see `fault`."""
    for name, value in fault(*what).items():
        monkeypatch.setenv(name, value)


def error_at_the_end(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """The line that the script, as a program, ends with an error with."""
    monkeypatch.setattr(sys, "argv", [str(script_path(SD3)), *command_line(arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(script_path(SD3)), run_name="__main__")
    # The interpreter prints words and exits with 1.
    assert isinstance(caught.value.code, str)
    return caught.value.code


# One process.


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_that_is_not_finite_changes_nothing(
    script: ModuleType,
    arguments: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
):
    set_fault(monkeypatch, kind, [3])
    script.main(command_line(arguments))
    check_second_was_skipped(arguments["output_dir"], kind, 4)
    assert capsys.readouterr().err.count("Update 2: skipped, its reward, loss or gradient is not finite.") == 1
    if kind == "nan":
        # The next update is that of a run which never saw the fault.
        monkeypatch.delenv("FLOWBP_TEST_FAULT")
        resumed = {**arguments, "output_dir": tmp_path / "resumed"}
        script.main(command_line(resumed, resume_from_checkpoint=arguments["output_dir"] / "checkpoint-2"))
        check_same_end(arguments["output_dir"], tmp_path / "resumed", 3)


def test_too_many_in_a_row_end_the_run(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    set_fault(monkeypatch, "nan", [3, 5])
    changes = {"max_skipped_updates": 2, "max_train_steps": 5}
    assert error_at_the_end({**arguments, **changes}, monkeypatch, capsys) == f"{SD3}.py: error: {TOO_MANY}"
    output = arguments["output_dir"]
    assert [row["skipped_updates"] for row in log_of(output)] == [0, 1, 2]
    check_all_finite(output, 3)
    before, *skipped = (tensors_of(output / f"checkpoint-{update}") for update in (1, 2, 3))
    assert all(largest_difference(before, tensors) == 0 for tensors in skipped)
    assert state_of(output / "checkpoint-3")["training"]["skipped_in_a_row"] == 2


def test_those_in_a_row_are_counted_across_a_resume(
    script: ModuleType, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    set_fault(monkeypatch, "nan", [3])
    script.main(command_line(arguments, max_train_steps=2))
    set_fault(monkeypatch, "nan", [1])
    more = {"max_skipped_updates": 2, "resume_from_checkpoint": "latest"}
    with pytest.raises(RuntimeError, match="2 updates in a row"):
        script.main(command_line(arguments, **more))


def test_others_between_them_do_not_count(
    script: ModuleType, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    set_fault(monkeypatch, "nan", [1, 5])
    script.main(command_line(arguments, max_skipped_updates=2))
    assert [row["skipped_updates"] for row in log_of(arguments["output_dir"])] == [1, 1, 2]
    check_all_finite(arguments["output_dir"], 3)


def test_a_step_that_makes_the_lora_not_finite_is_not_saved(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert error_at_the_end({**arguments, **LARGE}, monkeypatch, capsys) == f"{SD3}.py: error: {TOO_LARGE}"
    output = arguments["output_dir"]
    check_all_finite(output, 1)
    assert not (output / "pytorch_lora_weights.safetensors").exists()


# Two processes.

# The fault on one of them; what it does there is right if the run of one process above is.
IN_TWO = {"nan": 1, "inf": 0, "gradient": 1}


@pytest.fixture(scope="module")
def in_two(
    model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Runs in two processes: the folder of each, and what `resume_processes.py` found."""
    root = tmp_path_factory.mktemp("two")
    runs: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
        kind: ({}, fault(kind, [3], rank)) for kind, rank in IN_TWO.items()
    }
    runs["too many"] = {"max_skipped_updates": 2}, fault("gradient", [3, 5], 1)
    runs["too large"] = LARGE, {}
    jobs = []
    for name, (changes, variables) in runs.items():
        arguments = {**sd3_arguments(model, prompts, root / name), **FAULTY, "train_batch_size": 1, **changes}
        jobs.append({"name": SD3, "words": command_line(arguments), "environment": variables})
    found = run_in_two_processes(jobs, root)
    return {name: (root / name, each) for name, each in zip(runs, found, strict=True)}


@pytest.mark.parametrize("kind", IN_TWO)
def test_a_fault_on_one_of_two_processes_is_skipped_on_both(in_two: dict[str, tuple[Path, dict[str, Any]]], kind: str):
    output, found = in_two[kind]
    assert found["processes"] == 2 and found["endings"] == ["done", "done"]
    assert found["apart"] == 0 and found["finite"]
    check_second_was_skipped(output, kind, 4)
    skipped = [each.count("Update 2: skipped") for each in found["printed"]]
    assert skipped == [1, 0]


def test_two_processes_end_together_after_too_many(in_two: dict[str, tuple[Path, dict[str, Any]]]):
    output, found = in_two["too many"]
    assert found["processes"] == 2 and found["endings"] == [TOO_MANY, TOO_MANY]
    assert found["apart"] == 0 and found["finite"]
    check_all_finite(output, 3)
    assert not any("could not be written" in each for each in found["printed"])


def test_two_processes_save_no_lora_that_is_not_finite(in_two: dict[str, tuple[Path, dict[str, Any]]]):
    output, found = in_two["too large"]
    assert found["processes"] == 2 and found["endings"] == [TOO_LARGE, TOO_LARGE]
    check_all_finite(output, 1)
