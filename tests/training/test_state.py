# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`TrainingState`: what an optimizer step does with given gradients, the average, and the way through a checkpoint."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_sd3 import tiny_sd3_pipeline
from updates_by_hand import RECORDS, StateFactory, do_update, is_same, lora_of_state, make_config, make_state

from flowbp.training.checkpoints import CheckpointError, read_json, write_json
from flowbp.training.distributed import full_lora
from flowbp.training.state import TrainingError, TrainingState
from flowbp.training.state_files import save_files


@pytest.fixture(scope="module")
def transformer() -> torch.nn.Module:
    return tiny_sd3_pipeline(torch.float32).transformer


@pytest.fixture
def start(transformer: torch.nn.Module, tmp_path: Path) -> StateFactory:
    return lambda **values: make_state(transformer, make_config(tmp_path / "run", **values))


def all_of(state: TrainingState) -> dict[str, Any]:
    """Copies of all that the next updates depend on."""
    return copy.deepcopy({**state.files.tensors(), **state.state_dict(), "rates": state.lr_scheduler.get_last_lr()})


def save(state: TrainingState, folder: Path) -> Path:
    folder.mkdir()
    save_files(folder, state.files.tensors())
    write_json(folder / "state.json", state.state_dict())
    return folder


def load(state: TrainingState, folder: Path) -> TrainingState:
    state.load(folder, read_json(folder / "state.json"))
    return state


# Gradients.


@pytest.mark.parametrize(("precision", "scale"), [("no", 0.25), ("bf16", 0.25), ("fp16", 2.0**14)])
def test_gradients_are_scaled_by_the_micro_batches_and_the_loss_scale(
    start: StateFactory, precision: str, scale: float
):
    state = start(gradient_accumulation_steps=4, mixed_precision=precision)
    assert state.gradient_scale == scale
    # The optimizer gets the mean over the micro-batches.
    count = sum(parameter.numel() for parameter in state.parameters)
    assert do_update(state, 3.0).gradient_norm == pytest.approx(3 * count**0.5)


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e9, math.inf])
def test_gradients_are_clipped_and_then_cleared(start: StateFactory, max_grad_norm: float):
    state = start(max_grad_norm=max_grad_norm)
    norm = do_update(state, 0.25).gradient_norm
    assert norm > 1 and all(parameter.grad is None for parameter in state.parameters)
    moments = torch.cat([state.optimizer.state[parameter]["exp_avg"].flatten() for parameter in state.parameters])
    assert 10 * moments.norm().item() == pytest.approx(min(norm, max_grad_norm), rel=1e-5)


def test_the_optimizer_is_adamw_with_the_options_given(start: StateFactory):
    options = {"learning_rate": 0.01, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_weight_decay": 0.1}
    state = start(**options, adam_epsilon=1e-3, max_grad_norm=1e9)
    expected = [value.double() for value in lora_of_state(state)]
    first = second = 0.0
    for update, gradient in enumerate((0.25, 1.25, 2.25)):
        assert do_update(state, gradient).learning_rate == 0.01
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
        step = first / (1 - 0.8 ** (update + 1)) / (math.sqrt(second / (1 - 0.9 ** (update + 1))) + 1e-3)
        expected = [0.999 * value - 0.01 * step for value in expected]
    for parameter, value in zip(state.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-6)


def test_the_schedule_is_that_of_the_options_and_steps_with_the_updates(start: StateFactory):
    options = {"lr_scheduler": "polynomial", "lr_warmup_steps": 2, "max_train_steps": 6, "lr_power": 2.0}
    state = start(**options, learning_rate=0.1)
    # diffusers' polynomial schedule ends at 1e-7. The skipped update does not move it.
    rates = [do_update(state, gradient).learning_rate for gradient in (1.0, 1.0, math.nan, 1.0, 1.0, 1.0)]
    down = [(0.1 - 1e-7) * (1 - done / 4) ** 2 + 1e-7 for done in range(3)]
    assert rates == pytest.approx([0, 0.05, down[0], down[0], down[1], down[2]])


# Skipping.


@pytest.mark.parametrize(
    "wrong", [{"gradient": math.nan}, {"gradient": math.inf}, {"reward": math.nan}, {"loss": math.inf}]
)
def test_an_update_that_is_not_finite_changes_nothing_but_counts(start: StateFactory, wrong: dict[str, float]):
    state = start(use_ema=True, lr_scheduler="cosine", max_train_steps=9)
    do_update(state, 1.0)
    before = all_of(state)
    assert do_update(state, **{"gradient": 1.0, **wrong}).was_skipped
    counted = {"update": 2, "skipped": 1, "skipped_in_a_row": 1, "prompts": {"position": 8}}
    assert is_same(all_of(state), {**before, **counted})
    assert not do_update(state, 1.0).was_skipped
    after = all_of(state)
    assert (after["update"], after["skipped"], after["skipped_in_a_row"]) == (3, 1, 0)
    for name in ("lora", "optimizer", "ema", "lr_scheduler", "rates"):
        assert not is_same(after[name], before[name]), name


def test_skipped_updates_are_counted_in_all_and_in_a_row(start: StateFactory):
    state = start()
    gradients = (math.nan, math.nan, 1.0, math.nan, 1.0, math.nan, math.nan, math.nan)
    counts = [(do_update(state, gradient), state.skipped, state.skipped_in_a_row)[1:] for gradient in gradients]
    assert counts == [(1, 1), (2, 2), (2, 0), (3, 1), (3, 0), (4, 1), (5, 2), (6, 3)]


def test_a_gradient_that_overflows_halves_the_loss_scale(start: StateFactory):
    state = start(mixed_precision="fp16", gradient_accumulation_steps=2)
    do_update(state, 1.0)
    assert state.gradient_scale == 2.0**15
    before = lora_of_state(state)
    assert do_update(state, math.inf).was_skipped and is_same(lora_of_state(state), before)
    do_update(state, 1.0)
    assert state.gradient_scale == 2.0**14 and not is_same(lora_of_state(state), before)


def test_a_step_that_makes_the_lora_not_finite_ends_the_run(start: StateFactory):
    with pytest.raises(TrainingError, match="made the LoRA not finite, so it is not saved; lower --learning_rate"):
        do_update(start(learning_rate=1e37), 1.0)


# The average.


@pytest.mark.parametrize("decay", [0.995, 0.25, 0.0])
def test_the_average_has_a_constant_decay_from_the_first_update(start: StateFactory, decay: float):
    state = start(use_ema=True, ema_decay=decay, learning_rate=0.1)
    average = [value.double() for value in lora_of_state(state)]
    for number in range(1, 6):
        do_update(state, (-2.0) ** number)
        average = [
            decay * old + (1 - decay) * new.double() for old, new in zip(average, lora_of_state(state), strict=True)
        ]
        for found, expected in zip(state.average, average, strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_average_is_the_result_and_is_put_in_place_for_a_while(start: StateFactory):
    state = start(use_ema=True, learning_rate=0.1)
    for _ in range(3):
        do_update(state, 1.0)
    before = all_of(state)
    average = [value.clone() for value in state.average]
    assert not is_same(lora_of_state(state), average)
    with pytest.raises(KeyError), state.averaged():
        assert is_same(lora_of_state(state), average)
        averaged = full_lora(state.transformer)
        raise KeyError
    assert is_same(state.result(), averaged) and is_same(all_of(state), before)


def test_without_an_average_the_last_values_are_the_result(start: StateFactory):
    state = start()
    do_update(state, 1.0)
    before = lora_of_state(state)
    with state.averaged():
        assert is_same(lora_of_state(state), before)
    assert is_same(state.result(), full_lora(state.transformer)) and "ema" not in state.files.tensors()


# Checkpoints.


@pytest.mark.parametrize("use_ema", [False, True])
def test_the_files_of_a_checkpoint(start: StateFactory, tmp_path: Path, use_ema: bool):
    state = start(use_ema=use_ema, learning_rate=0.1)
    do_update(state, 1.0)
    folder = save(state, tmp_path / "saved")
    assert is_same(load_file(folder / "lora.safetensors"), full_lora(state.transformer))
    of_adam = [state.optimizer.state[parameter] for parameter in state.parameters]
    expected = {f"{index}.{name}": value for index, each in enumerate(of_adam) for name, value in each.items()}
    assert {name.partition(".")[2] for name in expected} == {"step", "exp_avg", "exp_avg_sq"}
    assert is_same(load_file(folder / "optimizer.safetensors"), expected)
    assert (folder / "ema.safetensors").exists() == use_ema
    if use_ema:
        average = load_file(folder / "ema.safetensors")
        assert is_same([average[str(index)] for index in range(len(average))], state.average)


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_loaded_state_continues_as_the_other_one_would(start: StateFactory, tmp_path: Path, precision: str):
    options = {"mixed_precision": precision, "use_ema": True, "lr_scheduler": "cosine", "lr_warmup_steps": 2}
    options |= {"learning_rate": 0.1, "max_train_steps": 9, "gradient_accumulation_steps": 2, "train_batch_size": 2}
    state = start(**options)
    for gradient in (1.0, math.inf, 2.0):
        do_update(state, gradient)
    resumed = load(start(**options), save(state, tmp_path / "saved"))
    assert is_same(all_of(resumed), all_of(state))
    assert is_same([do_update(resumed, 3.0) for _ in range(2)], [do_update(state, 3.0) for _ in range(2)])
    assert is_same(all_of(resumed), all_of(state))
    assert next(resumed.sampler) == next(state.sampler) and RECORDS[0] in resumed.sampler.prompts


@pytest.mark.parametrize("lr_scheduler", ["constant", "cosine"])
def test_a_loaded_state_takes_the_learning_rate_that_it_is_given(
    start: StateFactory, tmp_path: Path, lr_scheduler: str
):
    options = {"lr_scheduler": lr_scheduler, "max_train_steps": 8}
    state = start(**options, learning_rate=0.1)
    rates = [do_update(state, 1.0).learning_rate for _ in range(2)]
    resumed = load(start(**options, learning_rate=1e-3), save(state, tmp_path / "saved"))
    rates += [do_update(state, 1.0).learning_rate for _ in range(2)]
    # Where the schedule is stays; what it multiplies is the new one, also for the optimizer itself.
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(rates[2] / 100)
    found = [do_update(resumed, 1.0).learning_rate for _ in range(2)]
    assert found == pytest.approx([rate / 100 for rate in rates[2:]]) and rates[0] == 0.1


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        ({}, {"rank": 5}, "its LoRA has other layers or another rank; use the --lora_layers, --rank, --use_dora and"),
        ({}, {"lora_layers": "attn.to_k"}, "its LoRA has other layers or another rank"),
        ({}, {"mixed_precision": "fp16"}, "use the --mixed_precision of that run"),
        ({"mixed_precision": "fp16"}, {}, "use the --mixed_precision of that run"),
        ({}, {"use_ema": True}, "that run was without --use_ema; this one must be too"),
        ({"use_ema": True}, {}, "that run was with --use_ema; this one must be too"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(
    start: StateFactory, tmp_path: Path, saved: dict[str, Any], loaded: dict[str, Any], message: str
):
    state = start(**saved)
    do_update(state, 1.0)
    folder, other = save(state, tmp_path / "saved"), start(**loaded)
    before = all_of(other)
    with pytest.raises(CheckpointError) as caught:
        load(other, folder)
    assert str(caught.value).startswith(f"--resume_from_checkpoint {folder}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value) and is_same(all_of(other), before)
