# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`--optimizer`: each does what its library does, resumes exactly, and is refused where it could not."""

import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import bitsandbytes
import prodigyopt
import pytest
import torch
from resume_harness import check_same_end, sd3_arguments, state_of, tensors_of
from tiny_sd3 import tiny_sd3_pipeline
from training_scripts import command_line, log_of
from updates_by_hand import backward_output, is_same, lora_of_state, make_config, make_state

from flowbp.training import setup
from flowbp.training.checkpoints import CheckpointError, read_json, write_json
from flowbp.training.distributed import uses_fsdp2
from flowbp.training.optimizers import OPTIMIZERS, check_optimizer
from flowbp.training.state import Step, TrainingState
from flowbp.training.state_files import save_files

# By hand, with the arguments that diffusers' LoRA scripts pass.
LIBRARIES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adamw-8bit": bitsandbytes.optim.AdamW8bit,
    "prodigy": functools.partial(
        prodigyopt.Prodigy, beta3=None, decouple=True, use_bias_correction=True, safeguard_warmup=True, d_coef=100.0
    ),
}
# One matrix has more than the 4096 values from which bitsandbytes keeps 8 bit, and no whole number of its blocks.
LAYERS = {"lora_layers": "attn.to_q,ff.net.2", "rank": 101}
# Prodigy begins with steps of 1e-6 and is to take larger ones after a few updates.
OPTIONS: dict[str, dict[str, Any]] = {"adamw": {}, "adamw-8bit": {}, "prodigy": {"prodigy_d_coef": 100.0}}
# The first update of a warm-up has the rate 0.
SCHEDULE = {"lr_scheduler": "cosine", "lr_warmup_steps": 1, "max_train_steps": 8, "max_grad_norm": math.inf}


@functools.cache
def transformer() -> torch.nn.Module:
    return tiny_sd3_pipeline(torch.float32).transformer


def start(folder: Path, name: str, **values: Any) -> TrainingState:
    values = {**LAYERS, **OPTIONS[name], **SCHEDULE, "optimizer": name, **values}
    return make_state(transformer(), make_config(folder / "run", **values))


def gradients(state: TrainingState, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # With a common direction, so that Prodigy's estimate grows.
    return [1 + torch.randn(parameter.shape, generator=generator) for parameter in state.parameters]


def update(state: TrainingState, seed: int, factor: float = 1.0) -> Step:
    next(state.sampler)
    for parameter, gradient in zip(state.parameters, gradients(state, seed), strict=True):
        parameter.grad = gradient * factor * state.gradient_scale
    return state.step([backward_output()])


def save(state: TrainingState, folder: Path) -> Path:
    """A checkpoint's files that the state writes."""
    folder.mkdir()
    save_files(folder, state.files.tensors())
    write_json(folder / "state.json", state.state_dict())
    return folder


@pytest.mark.parametrize("precision", ["no", "fp16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_the_library(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, precision: str
):
    options = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_weight_decay": 0.1, "adam_epsilon": 1e-6}
    state = start(tmp_path, name, mixed_precision=precision, **options)
    assert capsys.readouterr().out == ""
    parameters = [torch.nn.Parameter(value) for value in lora_of_state(state)]
    by_hand = LIBRARIES[name](parameters, lr=1.0, betas=(0.8, 0.95), weight_decay=0.1, eps=1e-6)
    rates = []
    for seed in range(5):
        d = by_hand.param_groups[0].get("d")
        step = update(state, seed, math.nan if seed == 2 else 1.0)
        assert step.was_skipped == (seed == 2) and step.prodigy_d == d
        if not step.was_skipped:
            by_hand.param_groups[0]["lr"] = step.learning_rate
            for parameter, gradient in zip(parameters, gradients(state, seed), strict=True):
                parameter.grad = gradient
            by_hand.step()
        assert is_same(lora_of_state(state), [parameter.detach() for parameter in parameters])
        rates.append(step.learning_rate)
    assert rates[0] == 0 and rates[1] == OPTIMIZERS[name].learning_rate and rates[2] == rates[3] > rates[4]
    assert name != "prodigy" or by_hand.param_groups[0]["d"] > 1e-6
    if name == "adamw-8bit":
        assert {by_hand.state[each]["state1"].dtype for each in parameters} == {torch.uint8, torch.float32}


@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loaded_state_continues_bit_for_bit(tmp_path: Path, name: str, beta1: float):
    state = start(tmp_path, name, adam_beta1=beta1)
    for seed in range(3):
        update(state, seed)
    folder = save(state, tmp_path / "saved")
    # Other tensors than those that are loaded.
    resumed = start(tmp_path, name, adam_beta1=beta1, seed=7)
    resumed.load(folder, read_json(folder / "state.json"))
    for seed in range(3, 6):
        for old, new in zip(state.parameters, resumed.parameters, strict=True):
            before, after = state.optimizer.state[old], resumed.optimizer.state[new]
            assert is_same(dict(before), dict(after))
            for moment, value in before.items():
                assert type(value) is type(after[moment])
                assert not isinstance(value, torch.Tensor) or value.dtype == after[moment].dtype
        assert is_same([update(state, seed)], [update(resumed, seed)])
        assert is_same([state.files.tensors(), state.state_dict()], [resumed.files.tensors(), resumed.state_dict()])
    bytes_of = sum(value.nbytes for value in state.files.tensors()["optimizer"].values())
    trained = sum(parameter.nbytes for parameter in state.parameters)
    if beta1 and name != "adamw-8bit":  # whose smaller half is kept in 32 bit here
        assert bytes_of == pytest.approx(OPTIMIZERS[name].copies * trained, rel=0.15)


@pytest.mark.parametrize("precision", ["no", "fp16"])
@pytest.mark.parametrize("name", ["adamw-8bit", "prodigy"])
def test_a_resumed_run_is_exact(
    script: ModuleType, model: Path, prompts: Path, tmp_path: Path, name: str, precision: str
):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    arguments = sd3_arguments(model, prompts, whole) | {**LAYERS, **OPTIONS[name], "optimizer": name}
    arguments |= {"mixed_precision": precision, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 1}
    arguments |= {"learning_rate": 0.01 if name == "adamw-8bit" else None, "max_train_steps": 6, "strict_resume": True}
    script.main(command_line(arguments))
    script.main(command_line(arguments, output_dir=resumed, resume_from_checkpoint=whole / "checkpoint-3"))
    check_same_end(whole, resumed, 6)
    first, last = (tensors_of(whole / f"checkpoint-{number}") for number in (3, 6))
    assert any(not torch.equal(first[each], last[each]) for each in first if each.startswith("lora"))
    log = log_of(whole)
    run = json.loads((whole / "run.json").read_text())
    assert run["settings"]["optimizer"] == name and f"| `optimizer` | {name} |" in (whole / "README.md").read_text()
    library = OPTIMIZERS[name].library
    assert run["versions"][library] and f"version of {library}" in state_of(whole / "checkpoint-6")["ingredients"]
    assert ("prodigy_d" in log[0]) == (name == "prodigy")
    if name == "prodigy":
        assert log[0]["learning_rate"] == 0 and log[1]["learning_rate"] == 1
        states = [state_of(whole / f"checkpoint-{number}")["training"] for number in (3, 4, 5)]
        found = [state["optimizer_numbers"]["d"] for state in states]
        assert [row["prodigy_d"] for row in log[3:]] == found and found[-1] > log[0]["prodigy_d"] == 1e-6


# Refusals.


def run_without_a_model(script: ModuleType, model: Path, prompts: Path, tmp_path: Path, **values: Any) -> str:
    """The message of a run that is refused before it loads its model."""
    arguments = sd3_arguments(model, prompts, tmp_path / "run") | {"learning_rate": None, **values}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError) as caught:
        patch.setattr(setup, "load_model", lambda *arguments: pytest.fail("a model is loaded"))
        script.main(command_line(arguments))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    return str(caught.value)


@pytest.mark.parametrize("name", ["adamw-8bit", "prodigy"])
def test_without_its_library_a_run_is_refused_before_a_model_is_loaded(
    script: ModuleType, model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    library = OPTIMIZERS[name].library
    monkeypatch.setitem(sys.modules, library, None)
    message = run_without_a_model(script, model, prompts, tmp_path, optimizer=name)
    assert message.startswith(f"--optimizer {name}: it needs {library} (")
    assert 'pip install -e ".[optimizers]"' in message


def test_what_the_library_does_not_take_is_refused_before_a_model_is_loaded(
    script: ModuleType, model: Path, prompts: Path, tmp_path: Path
):
    message = run_without_a_model(script, model, prompts, tmp_path, optimizer="prodigy", adam_epsilon=0)
    assert message == "--optimizer prodigy: Invalid epsilon value: 0.0"


@pytest.mark.parametrize("name", ["adamw-8bit", "prodigy"])
def test_shards_are_refused_before_a_model_is_loaded(
    script: ModuleType, model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    # What one process would be told of several.
    monkeypatch.setattr(setup, "uses_fsdp2", lambda accelerator: not uses_fsdp2(accelerator))
    message = run_without_a_model(script, model, prompts, tmp_path, optimizer=name)
    assert message.startswith(f"--optimizer {name} does not train sharded parameters (FSDP2), expected adamw; choose")
    check_optimizer(make_config(tmp_path / "run"), is_sharded=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_of_another_optimizer_is_refused_by_name(tmp_path: Path, name: str):
    state = start(tmp_path, name)
    update(state, 0)
    folder = save(state, tmp_path / "saved")
    for other in OPTIMIZERS.keys() - {name}:
        resumed = start(tmp_path, other)
        before = lora_of_state(resumed)
        with pytest.raises(CheckpointError) as caught:
            resumed.load(folder, read_json(folder / "state.json"))
        assert str(caught.value) == f"--resume_from_checkpoint {folder}: use the --optimizer of that run, {name}."
        assert is_same(lora_of_state(resumed), before) and not resumed.optimizer.state
