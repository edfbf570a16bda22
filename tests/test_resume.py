# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Checkpoints and resuming, through the real scripts: exact, whatever ended the run before, and never from damage.

How checkpoint folders are written and read is in `test_checkpoints.py`; here it is what a run makes of them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from resume_harness import (
    SD3,
    Warm,
    check_same_end,
    largest_difference,
    lines_of,
    rows_of,
    run_in_two_processes,
    sd3_arguments,
    state_of,
    tensors_of,
    two_processes,
    two_processes_environment,
    wait_for,
)
from tiny_pipelines import tiny_flux_pipeline, tiny_klein_pipeline, tiny_wan_pipeline
from tiny_sd3 import tiny_sd3_pipeline
from training_scripts import (
    PROMPTS,
    command_line,
    environment,
    error_of,
    load_script,
    log_of,
    script_path,
    watch_runs,
    write_prompts,
)

from flowbp import checkpoints
from flowbp.training_run import TrainingRun

HERE = Path(__file__).parent
UPDATES = 6
# Four places of the prompts' order for each update, and three prompts: an epoch ends with every third update.
CUTS = {"after the first update": 1, "at the end of an epoch": 3, "in the middle of an epoch": 5}
# Everything that a run carries from one update to the next. The rewards are random, and the learning rate raises
# alarms before the first cut and after the last.
EVERYTHING = {
    "method": "flowbp-bridge",
    "num_active": 3,
    "num_inference_steps": 6,
    "step_sampling": "dirichlet",
    "reward": "resume_rewards:make_random_reward",
    "gradient_accumulation_steps": 2,
    "max_train_steps": UPDATES,
    "learning_rate": 0.2,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "use_ema": True,
    "ema_decay": 0.7,
    "eval_reward": "toy_reward:make_held_out_reward",
    "eval_steps": 1,
    "num_eval_images": 2,
    "validation_steps": 4,
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(SD3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-sd3")
    tiny_sd3_pipeline(torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture
def arguments(model: Path, prompts: Path, tmp_path: Path) -> dict[str, Any]:
    return sd3_arguments(model, prompts, tmp_path / "run")


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    with Warm(SD3, tmp_path_factory.mktemp("warm")) as started:
        yield started


# Exact, in one process.


@pytest.fixture(scope="module")
def whole(script: ModuleType, model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with everything that was not interrupted."""
    output = tmp_path_factory.mktemp("whole")
    script.main(command_line(sd3_arguments(model, prompts, output), **EVERYTHING))
    return output


def test_what_is_cut_is_worth_a_cut(whole: Path):
    """The run below has what its comparisons are about; else they would prove nothing."""
    positions = [state_of(whole / f"checkpoint-{cut}")["prompts"]["position"] % len(PROMPTS) for cut in CUTS.values()]
    assert positions == [1, 0, 2]
    states = [state_of(whole / f"checkpoint-{update}") for update in range(1, UPDATES + 1)]
    alarms = [alarm["update"] for alarm in states[-1]["alarms"]]
    assert min(alarms) <= min(CUTS.values()) and max(alarms) > min(CUTS.values())
    assert len({json.dumps(state["guard"]) for state in states}) == UPDATES
    best = [state["evaluations"]["best"]["update"] for state in states]
    assert len(set(best)) > 2, best
    files = {path.name for path in (whole / "checkpoint-1").iterdir()}
    assert {f"{name}.safetensors" for name in ("lora", "optimizer", "ema", "best")} <= files
    rates = [row["learning_rate"] for row in log_of(whole)]
    assert len(set(rates)) == UPDATES and max(rates) == 0.2
    # Different tensors everywhere, update by update.
    for update in range(1, UPDATES):
        now, after = (tensors_of(whole / f"checkpoint-{number}") for number in (update, update + 1))
        for file in ("lora", "optimizer", "ema", "pytorch_lora_weights"):
            own = [name for name in now if name.startswith(f"{file}.")]
            assert largest_difference({n: now[n] for n in own}, {n: after[n] for n in own}) > 1e-4, file


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_resumed_run_is_exact(
    script: ModuleType, whole: Path, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, cut: int
):
    runs = watch_runs(monkeypatch)
    script.main(
        command_line(arguments, **EVERYTHING, seed=0, resume_from_checkpoint=whole / f"checkpoint-{cut}")
    )
    assert runs[0].first_update == cut
    check_same_end(whole, arguments["output_dir"], UPDATES, cut)
