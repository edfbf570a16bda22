# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a script keeps between updates, without a model's updates: gradients are set by hand.

Scales, clipping, skipping, the log, averages, checkpoints and resuming, signals.
"""

import argparse
import copy
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file
from tiny_sd3 import tiny_sd3_pipeline

from flowbp import get_method
from flowbp.callback import BackwardOutput
from flowbp.judging.statistics import estimate
from flowbp.rewards import load_reward
from flowbp.training.arguments import (
    Rewards,
    add_method_arguments,
    add_model_arguments,
    add_reward_arguments,
    add_training_arguments,
    parse_training_args,
)
from flowbp.training.checkpoints import CheckpointError, check_folder, read_json
from flowbp.training.distributed import full_lora
from flowbp.training.model import LORA_FILE, add_lora
from flowbp.training.reports import finite, read_log
from flowbp.training.script import run_script
from flowbp.training.setup import make_accelerator
from flowbp.training.signals import StopSignals
from flowbp.training.state import TrainingError
from flowbp.training.training_run import TrainingRun

STEPS = 6
PROMPTS = [f"prompt {number}" for number in range(5)]
# Every gradient that a test sets is this, plus the update's number.
GRADIENT = 0.25
LOGGED = ("step", "reward", "loss", "gradient_norm", "learning_rate", "skipped_updates", "drawn_steps")
Start = Callable[..., tuple[TrainingRun, Iterator[int]]]


@pytest.fixture(scope="module")
def base() -> StableDiffusion3Pipeline:
    return tiny_sd3_pipeline(torch.float32)


@pytest.fixture
def start(base: StableDiffusion3Pipeline, tmp_path: Path) -> Iterator[Start]:
    """Runs of a tiny transformer, with the iterators of their updates, which are closed after the test."""
    started = []

    def start_run(*words: str) -> tuple[TrainingRun, Iterator[int]]:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("--config")
        add_model_arguments(parser, "a pipeline", "attn.to_q")
        add_method_arguments(parser)
        add_reward_arguments(parser)
        add_training_arguments(parser, str(tmp_path / "run"))
        required = ["--pretrained_model_name_or_path", "m", "--prompts", "p.txt", "--reward", "grey"]
        reports = ["--report_to", "none", "--validation_steps", "1000"]
        args = parse_training_args(parser, [*required, *reports, *words])
        transformer = copy.deepcopy(base.transformer).requires_grad_(False)
        add_lora(transformer, args)
        reward = load_reward("toy_reward:make_reward")
        run = TrainingRun(
            args,
            make_accelerator(args),
            get_method("draft-k", last_k=2),
            base,
            transformer,
            PROMPTS,
            sample=lambda prompt, generator: torch.full((1, 3, 8, 8), 0.5),
            rewards=Rewards(reward, reward, None, ()),
            save_lora=lambda folder, lora: StableDiffusion3Pipeline.save_lora_weights(folder, dict(lora)),
        )
        updates = run.updates()
        started.append(updates)
        return run, updates

    yield start_run
    # The newest first: each gives the signals back to the one before.
    for updates in reversed(started):
        updates.close()


def do_passes(run: TrainingRun, gradient: float = GRADIENT, reward: float = 0.5, loss: float = -0.5) -> list[str]:
    """The passes of an update whose mean gradient is `gradient` everywhere; returns its prompts."""
    prompts = []
    for _ in range(run.args.gradient_accumulation_steps):
        prompts += run.next_batch()[0]
        for parameter in run.parameters:
            added = torch.full_like(parameter, gradient * run.gradient_scale)
            parameter.grad = added if parameter.grad is None else parameter.grad + added
        one = torch.ones(())
        rewards = torch.tensor([reward, 0.25])
        out = BackwardOutput(rewards, loss * one, torch.ones(2), {STEPS: 0.1 * one.view(1)}, 0 * one, {4: one})
        run.collect(out, run.method.draw(torch.linspace(1, 0, STEPS + 1), torch.Generator()), {})
    return prompts


def do_update(run: TrainingRun, updates: Iterator[int], gradient: float | None = None, **values: float) -> list[str]:
    """A whole update with the report; the gradient grows with its number unless given."""
    update = next(updates)
    prompts = do_passes(run, GRADIENT + update if gradient is None else gradient, **values)
    run.optimizer_step()
    run.report(update)
    return prompts


def state_of(run: TrainingRun) -> dict[str, Any]:
    """Copies of all that the next updates depend on."""
    states = [run.optimizer.state[parameter] for parameter in run.parameters]
    moments = [{name: value.clone() for name, value in state.items()} for state in states]
    return {
        "lora": [parameter.detach().clone() for parameter in run.parameters],
        "moments": moments,
        "average": None if run.ema is None else [value.clone() for value in run.ema.shadow_params],
        "average's updates": None if run.ema is None else run.ema.optimization_step,
        "rates": [group["lr"] for group in run.optimizer.param_groups],
        "schedule": run.lr_scheduler.state_dict(),
        "loss scale": run.scaler.state_dict(),
        "guard": copy.deepcopy(run.guard.state_dict()),
        "skipped": run.skipped,
    }


def is_same(left: Any, right: Any) -> bool:
    """Equal bit for bit, down to the tensors."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, list):
        return len(left) == len(right) and all(is_same(*pair) for pair in zip(left, right, strict=True))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(is_same(left[key], right[key]) for key in left)
    return left == right


# Gradients.


@pytest.mark.parametrize(
    ("words", "scale"), [((), 0.25), (("--mixed_precision", "bf16"), 0.25), (("--mixed_precision", "fp16"), 2.0**14)]
)
def test_gradients_are_scaled_by_the_passes_and_the_loss_scale(start: Start, words: tuple[str, ...], scale: float):
    run, updates = start("--gradient_accumulation_steps", "4", *words)
    next(updates)
    assert run.gradient_scale == scale
    do_passes(run, gradient=3.0)
    run.optimizer_step()
    # The optimizer gets the mean of the passes.
    count = sum(parameter.numel() for parameter in run.parameters)
    assert run.gradient_norm == pytest.approx(3 * count**0.5)


def test_gradients_are_clipped_and_then_cleared(start: Start):
    run, updates = start("--max_grad_norm", "0.5")
    next(updates)
    do_passes(run)
    run.optimizer_step()
    assert run.gradient_norm > 1
    assert torch.cat([parameter.grad.flatten() for parameter in run.parameters]).norm().item() == pytest.approx(0.5)
    next(updates)
    assert all(parameter.grad is None for parameter in run.parameters)


def test_the_optimizer_is_adamw_with_the_options_given(start: Start):
    words = "--learning_rate 0.01 --adam_beta1 0.8 --adam_beta2 0.9 --adam_weight_decay 0.1 --adam_epsilon 1e-3"
    run, updates = start(*words.split(), "--max_grad_norm", "1e9")
    expected = [parameter.detach().double() for parameter in run.parameters]
    first = second = 0.0
    for update in range(3):
        do_update(run, updates)
        gradient = GRADIENT + update
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
        step = first / (1 - 0.8 ** (update + 1)) / (math.sqrt(second / (1 - 0.9 ** (update + 1))) + 1e-3)
        expected = [0.999 * value - 0.01 * step for value in expected]
    for parameter, value in zip(run.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-6)


# Skipping.


@pytest.mark.parametrize(
    "wrong", [{"gradient": math.nan}, {"gradient": math.inf}, {"reward": math.nan}, {"loss": math.inf}]
)
def test_an_update_that_is_not_finite_changes_nothing_but_counts(
    start: Start, wrong: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, updates = start("--use_ema", "--lr_scheduler", "cosine", "--max_train_steps", "9")
    do_update(run, updates)
    before = state_of(run)
    do_update(run, updates, **wrong)
    assert is_same(state_of(run), {**before, "skipped": 1})
    assert "Update 2: skipped, its reward, loss or gradient is not finite." in capsys.readouterr().err
    do_update(run, updates)
    after = state_of(run)
    assert after["skipped"] == 1
    for name in ("lora", "moments", "average", "schedule", "rates"):
        assert not is_same(after[name], before[name]), name

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert rows == run.log and [row["skipped_updates"] for row in rows] == [0, 1, 1]
    name = {"reward": "reward", "loss": "loss"}.get(next(iter(wrong)), "gradient_norm")
    assert rows[1][name] is None and rows[0][name] is not None


def test_a_gradient_that_overflows_halves_the_loss_scale(start: Start):
    run, updates = start("--mixed_precision", "fp16", "--gradient_accumulation_steps", "2")
    do_update(run, updates)
    assert run.gradient_scale == 2.0**15
    before = state_of(run)["lora"]
    do_update(run, updates, gradient=math.inf)
    assert run.skipped == 1 and is_same(state_of(run)["lora"], before)
    do_update(run, updates)
    assert run.gradient_scale == 2.0**14 and not is_same(state_of(run)["lora"], before)


def test_training_stops_after_too_many_skipped_updates_in_a_row(start: Start):
    run, updates = start("--max_skipped_updates", "3")
    for gradient in (math.nan, math.nan, 1.0, math.nan, math.nan):
        do_update(run, updates, gradient=gradient)
    assert run.skipped == 4
    before = state_of(run)["lora"]
    with pytest.raises(TrainingError) as caught:
        do_update(run, updates, gradient=math.nan)
    message = str(caught.value)
    assert message.startswith("3 updates in a row had a reward, loss or gradient that is not finite, expected fewer ")
    assert "\n" not in message and is_same(state_of(run)["lora"], before)


def test_a_step_that_makes_the_lora_not_finite_ends_the_run(start: Start, tmp_path: Path):
    run, updates = start("--learning_rate", "1e37", "--checkpointing_steps", "1")
    with pytest.raises(TrainingError, match="made the LoRA not finite, so it is not saved; lower --learning_rate"):
        do_update(run, updates)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.jsonl"]


def test_a_gradient_far_above_the_others_raises_an_alarm_that_can_end_the_run(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, updates = start("--stop_on_alarm")
    for _ in range(11):
        do_update(run, updates, gradient=1.0)
    assert run.alarms == []
    do_update(run, updates, gradient=100.0)
    assert [(alarm["name"], alarm["update"]) for alarm in run.alarms] == [("gradient-norm", 12)]
    assert list(updates) == [] and run.done == 12
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-12"]
    # Nor does a resumed run go on.
    run, updates = start("--stop_on_alarm", "--resume_from_checkpoint", "latest")
    assert list(updates) == [] and run.done == 12
    assert next(start("--resume_from_checkpoint", "latest")[1]) == 12
    printed = capsys.readouterr().err
    assert printed.count(f"Alarm gradient-norm at update 12: {run.alarms[0]['message']}") == 1
    assert "Stopped by an alarm after update 12, as --stop_on_alarm says." in printed


def test_alarms_alone_end_nothing(start: Start):
    run, updates = start()
    for gradient in [1.0] * 11 + [100.0, 1.0]:
        do_update(run, updates, gradient=gradient)
    assert len(run.alarms) == 1 and run.done == 13


# Prompts.


def test_passes_and_processes_share_out_an_update_s_samples(start: Start, monkeypatch: pytest.MonkeyPatch):
    """Which prompt has which place does not depend on how the samples are shared out."""

    def samples(processes: int, size: int, passes: int) -> list[dict[int, str]]:
        found: list[dict[int, str]] = [{} for _ in range(4)]
        for rank in range(processes):
            monkeypatch.setitem(PartialState._shared_state, "num_processes", processes)
            monkeypatch.setitem(PartialState._shared_state, "process_index", rank)
            run, _ = start("--train_batch_size", str(size), "--gradient_accumulation_steps", str(passes))
            for update in range(4):
                run._passes = []
                for _ in range(passes):
                    prompts, places = run.next_batch()
                    assert not found[update].keys() & set(places)
                    found[update] |= dict(zip(places, prompts, strict=True))
                    run._passes.append(None)
        return found

    one = samples(1, 4, 1)
    assert all(sorted(places) == [0, 1, 2, 3] for places in one)
    # 16 samples of 5 prompts: every prompt thrice or four times.
    drawn = [prompt for places in one for prompt in places.values()]
    assert sorted({drawn.count(prompt) for prompt in PROMPTS}) == [3, 4]
    assert samples(1, 1, 4) == samples(1, 2, 2) == one
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert samples(2, 2, 1) == samples(2, 1, 2) == one


def test_validation_pictures_are_of_the_first_prompts_or_of_those_given(start: Start):
    assert start("--num_validation_images", "2")[0].validation_prompts == PROMPTS[:2]
    given, _ = start("--num_validation_images", "2", "--validation_prompt", "x", "y")
    assert given.validation_prompts == ["x", "x", "y", "y"]


# The log and numbers.


def test_a_log_is_read_up_to_an_update_without_a_line_that_was_cut(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    assert read_log(path, 5) == []
    rows = [{"step": step, "reward": step / 10} for step in (1, 2, 3)]
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(whole)
    assert read_log(path, 2) == rows[:2] and read_log(path, 3) == rows
    for cut in range(len(json.dumps(rows[2])), 0, -1):
        path.write_text(whole[: len(whole) - 1 - cut])
        assert read_log(path, 3) == rows[:2]


def test_numbers_that_json_does_not_have_become_none():
    assert finite([1.5, math.nan, math.inf, -math.inf, 0.0]) == [1.5, None, None, None, 0.0]


def test_an_estimate_is_over_prompts_and_leaves_out_what_has_no_score():
    found = estimate([1.0, 2.0, 3.0, 5.0], 2)
    assert found["mean"] == 2.75 and 1.5 <= found["low"] < 2.75 < found["high"] <= 4.0
    # Pictures of a prompt are averaged first, so a prompt with one score counts as much as the others.
    assert estimate([1.0, None, 3.0, 5.0, None, None], 2)["mean"] == 2.5
    assert estimate([None, None], 1) == {"mean": None, "low": None, "high": None}
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(400, generator=generator, dtype=torch.float64)
    found = estimate(scores.tolist(), 1)
    error = 1.96 * scores.std().item() / 20
    assert found["high"] - found["low"] == pytest.approx(2 * error, rel=0.15)
    assert found["low"] < found["mean"] < found["high"]


# The average.


@pytest.mark.parametrize("decay", [0.995, 0.25])
def test_the_average_is_the_one_computed_by_hand(start: Start, decay: float):
    run, updates = start("--use_ema", "--ema_decay", str(decay), "--learning_rate", "0.1")
    average = [parameter.detach().double() for parameter in run.parameters]
    for number in range(1, 6):
        do_update(run, updates, gradient=(-2.0) ** number)
        # diffusers' ramp: the first updates count more than the decay says.
        rate = min(decay, number / (number + 9)) if number > 1 else 0.0
        average = [
            rate * old + (1 - rate) * parameter.detach().double()
            for old, parameter in zip(average, run.parameters, strict=True)
        ]
    for found, expected in zip(run.ema.shadow_params, average, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_averages_are_put_in_place_for_a_while(start: Start):
    run, updates = start("--use_ema", "--learning_rate", "0.1")
    for _ in range(3):
        do_update(run, updates)
    before = state_of(run)
    assert not is_same(before["lora"], before["average"])
    with pytest.raises(KeyError), run._averaged():
        assert is_same([parameter.detach() for parameter in run.parameters], before["average"])
        raise KeyError
    assert is_same(state_of(run), before)


def test_without_an_average_the_last_values_stay(start: Start):
    run, updates = start()
    do_update(run, updates)
    before = state_of(run)
    with run._averaged():
        assert is_same(state_of(run), before)


# Checkpoints.


@pytest.mark.parametrize("use_ema", [False, True])
def test_what_a_checkpoint_holds(start: Start, tmp_path: Path, use_ema: bool):
    words = ["--use_ema"] if use_ema else []
    run, updates = start("--checkpointing_steps", "2", "--learning_rate", "0.1", *words)
    do_update(run, updates)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    do_update(run, updates)
    folder = tmp_path / "run" / "checkpoint-2"
    check_folder(folder)
    names = {"lora.safetensors", "optimizer.safetensors", "state.json", "manifest.json", LORA_FILE}
    assert {path.name for path in folder.iterdir()} == names | ({"ema.safetensors"} if use_ema else set())

    lora = load_file(folder / "lora.safetensors")
    assert is_same(lora, full_lora(run.transformer))
    moments = load_file(folder / "optimizer.safetensors")
    assert {name.partition(".")[2] for name in moments} == {"step", "exp_avg", "exp_avg_sq"}
    expected = [dict(run.optimizer.state[parameter]) for parameter in run.parameters]
    assert is_same(moments, {f"{index}.{name}": each[name] for index, each in enumerate(expected) for name in each})

    with run._averaged():
        of_users = {f"transformer.{name}": tensor.clone() for name, tensor in full_lora(run.transformer).items()}
    assert is_same(load_file(folder / LORA_FILE), of_users)
    assert is_same({f"transformer.{name}": tensor for name, tensor in lora.items()}, of_users) != use_ema
    if use_ema:
        average = load_file(folder / "ema.safetensors")
        assert is_same([average[str(index)] for index in range(len(average))], run.ema.shadow_params)
    state = read_json(folder / "state.json")
    assert state["update"] == 2 and state["skipped"] == 0 and state["ema_step"] == (2 if use_ema else None)


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_resumed_run_goes_on_as_the_other_one_would(start: Start, tmp_path: Path, precision: str):
    words = f"--mixed_precision {precision} --use_ema --lr_scheduler cosine --lr_warmup_steps 2 --max_train_steps 9"
    words += " --learning_rate 0.1 --checkpointing_steps 3 --gradient_accumulation_steps 2 --train_batch_size 2"
    run, updates = start(*words.split())
    do_update(run, updates)
    do_update(run, updates, gradient=math.inf)
    do_update(run, updates)
    at_checkpoint = state_of(run)
    # A row that the resumed run must forget.
    log_path = tmp_path / "run" / "log.jsonl"
    whole = log_path.read_text()
    prompts = [do_update(run, updates) for _ in range(2)]
    log_path.write_text(log_path.read_text() + '{"step": 6, "rew')

    resumed, its_updates = start(*words.split(), "--resume_from_checkpoint", "latest")
    assert resumed.first_update == 3 and resumed.skipped == 1
    assert log_path.read_text() == whole and [row["step"] for row in resumed.log] == [1, 2, 3]
    found = state_of(resumed)
    assert [name for name in found if not is_same(found[name], at_checkpoint[name])] == []
    assert [do_update(resumed, its_updates) for _ in range(2)] == prompts
    assert is_same(state_of(resumed), state_of(run))
    # All of the log but the times and the memory.
    assert [{name: row[name] for name in LOGGED} for row in resumed.log] == [
        {name: row[name] for name in LOGGED} for row in run.log
    ]


@pytest.mark.parametrize("lr_scheduler", ["constant", "cosine"])
def test_a_resumed_run_takes_the_learning_rate_that_it_is_given(
    start: Start, capsys: pytest.CaptureFixture[str], lr_scheduler: str
):
    words = f"--lr_scheduler {lr_scheduler} --max_train_steps 8 --checkpointing_steps 2".split()
    run, updates = start(*words, "--learning_rate", "0.1")
    for _ in range(4):
        do_update(run, updates)
    capsys.readouterr()
    resumed, its_updates = start(*words, "--learning_rate", "1e-3", "--resume_from_checkpoint", "checkpoint-2")
    assert (
        "checkpoint-2: other settings than that run's: --learning_rate was 0.1, is 0.001." in capsys.readouterr().err
    )
    for _ in range(2):
        do_update(resumed, its_updates)
    of_first = [row["learning_rate"] for row in run.log]
    of_second = [row["learning_rate"] for row in resumed.log]
    # Where the schedule is stays; what it multiplies is the new one.
    assert of_second == pytest.approx([*of_first[:2], *(rate / 100 for rate in of_first[2:])])
    assert of_first[0] == 0.1 and resumed.optimizer.param_groups[0]["initial_lr"] == 1e-3


def test_what_a_new_run_finds_is_told(start: Start, capsys: pytest.CaptureFixture[str]):
    run, updates = start("--checkpointing_steps", "1")
    assert "earlier run" not in capsys.readouterr().err
    do_update(run, updates)
    start()
    told = "run has checkpoints of an earlier run; --resume_from_checkpoint latest would go on from them until"
    assert told in capsys.readouterr().err
    start("--resume_from_checkpoint", "latest")
    assert told not in capsys.readouterr().err


def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(start: Start, tmp_path: Path):
    run, updates = start("--checkpointing_steps", "1")
    do_update(run, updates)
    folder = str(tmp_path / "run" / "checkpoint-1")
    for words, message in (
        (["--rank", "5"], "its LoRA has other layers or another rank; use the --lora_layers and --rank of that run"),
        (["--lora_layers", "attn.to_k"], "its LoRA has other layers or another rank"),
        (["--mixed_precision", "fp16"], "use the --mixed_precision of that run"),
        (["--use_ema"], "that run was without --use_ema; this one must be too"),
        (["--lora_alpha", "8"], "use the --lora_alpha of that run, 4"),
    ):
        with pytest.raises(CheckpointError) as caught:
            start(*words, "--resume_from_checkpoint", folder)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"--resume_from_checkpoint {folder}: ")
    averaged, updates = start("--checkpointing_steps", "1", "--use_ema")
    do_update(averaged, updates)
    with pytest.raises(CheckpointError, match="that run was with --use_ema; this one must be too"):
        start("--resume_from_checkpoint", folder)


# Signals.


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_the_first_signal_is_remembered_and_handlers_come_back():
    before = handlers()
    with StopSignals() as signals:
        assert signals.number == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.number == signal.SIGTERM
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
            assert signals.number == signal.SIGTERM
    assert handlers() == before


@pytest.mark.parametrize("first", [(), (signal.SIGTERM,)])
def test_a_second_interrupt_stops_at_once(first: tuple[int, ...]):
    before = handlers()
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        for number in (*first, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert signals.number == (*first, signal.SIGINT)[0]
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second SIGINT was swallowed")
    assert handlers() == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_its_update_and_a_checkpoint(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, code: int
):
    before = handlers()
    run, updates = start()
    do_update(run, updates)
    update = next(updates)
    os.kill(os.getpid(), number)
    do_passes(run)
    run.optimizer_step()
    with pytest.raises(SystemExit) as caught:
        run.report(update)
    assert caught.value.code == code
    folder = tmp_path / "run" / "checkpoint-2"
    check_folder(folder)
    assert is_same(load_file(folder / "lora.safetensors"), full_lora(run.transformer))
    name = signal.Signals(number).name
    assert f"Stopped by {name} after update 2; go on with --resume_from_checkpoint latest." in capsys.readouterr().err
    updates.close()
    assert handlers() == before
    assert start("--resume_from_checkpoint", "latest")[0].first_update == 2


# The end.


def fail(error: BaseException) -> None:
    raise error


def test_a_script_ends_with_its_exit_code(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["some/train.py"])
    secret = "hf_" + "z" * 30
    run_script(lambda: None)
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: fail(TrainingError(f"two\nlines {secret}")))
    assert caught.value.code == "train.py: error: two lines [redacted]"
    for code in (2, 130, 143):
        with pytest.raises(SystemExit) as caught:
            run_script(lambda code=code: fail(SystemExit(code)))
        assert caught.value.code == code
    # What no user can put right comes with its traceback.
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: fail(RuntimeError(secret)))
    assert caught.value.code.startswith("Traceback") and "RuntimeError: [redacted]" in caught.value.code
    with pytest.raises(KeyboardInterrupt):
        run_script(lambda: fail(KeyboardInterrupt()))
