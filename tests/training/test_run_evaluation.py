# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`Evaluation`: the best LoRA, alarms, the history, and what a resumed run makes up for; images are set by hand."""

import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sd3 import tiny_sd3_pipeline
from updates_by_hand import RECORDS, Plain, do_update, is_same, lora_of_state, make_config, make_state

from flowbp.rewards import load_reward
from flowbp.training.checkpointing import Checkpointer
from flowbp.training.checkpoints import CheckpointError, check_folder, load_tensors, read_json, save_tensors
from flowbp.training.console import Console
from flowbp.training.distributed import full_lora
from flowbp.training.evaluation import Evaluation
from flowbp.training.output_folder import OutputFolder
from flowbp.training.prompts import Record
from flowbp.training.reports import Reports
from flowbp.training.resuming import resume
from flowbp.training.rewards import RunRewards
from flowbp.training.sampling import Sampling
from flowbp.training.signals import DrawingStopped, StopSignals
from flowbp.training.state import TrainingState


class Colored(Sampling):
    """Makes images of one color, whatever the model."""

    color = (0.5, 0.5, 0.5)

    def images(self, inputs: object, noise: object, size: object) -> torch.Tensor:
        # Looks at what it is asked to draw with.
        self.seen = [parameter.detach().clone() for parameter in self.trained]
        self.is_base = all(layer.disable_adapters for layer in self.pipe.modules() if hasattr(layer, "lora_A"))
        config = self.pipe.config
        self.pipe(
            torch.ones(1, config.in_channels, 4, 4),
            torch.ones(1, 2, config.joint_attention_dim),
            torch.ones(1, config.pooled_projection_dim),
            torch.ones(1),
        )
        self.count += 1
        if self.count == self.stop_at:
            self.signals.number = signal.SIGTERM
        return torch.tensor(self.color).view(1, 3, 1, 1).expand(1, 3, 8, 8)


class OfTransformer(Plain):
    """A backbone without a saved model, whose pipeline is its transformer."""

    def __init__(self) -> None:
        pass

    def transformer(self, pipe: torch.nn.Module) -> torch.nn.Module:
        return pipe


def red(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return images[:, 0].mean((1, 2))


def green(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return images[:, 1].mean((1, 2))


class Judged:
    """The parts of a run that an evaluation needs."""

    def __init__(self, transformer: torch.nn.Module, output_dir: Path, **values: Any) -> None:
        has_held_out = values.pop("has_held_out", True)
        evaluated = values.pop("evaluated", RECORDS[:2])
        options = {"eval_reward": "toy_reward:make_held_out_reward"} if has_held_out else {}
        output_dir.mkdir(exist_ok=True)
        self.config = config = make_config(output_dir, **{"eval_steps": 2, **options, **values})
        self.state: TrainingState = make_state(transformer, config)
        accelerator = self.state.accelerator
        rewards = RunRewards(
            "red",
            load_reward(red),
            load_reward(red),
            load_reward(green) if has_held_out else None,
            tuple(RECORDS[:1]),
            tuple(evaluated),
        )
        sampling = Colored(config, accelerator, OfTransformer(), self.state.transformer, lambda records: {})
        sampling.trained, sampling.count, sampling.stop_at = self.state.parameters, 0, 0
        sampling.signals = self.signals = StopSignals()
        self.sampling = sampling
        self.console = Console(accelerator)
        reports = Reports(config, accelerator, [])
        self.evaluation = Evaluation(
            config, accelerator, self.state, rewards, sampling, self.console, reports, self.signals
        )

    def update(self, color: Sequence[float] = (0.5, 0.5, 0.5), norm: float = 1.0, reward: float | None = None) -> None:
        """An update whose images will have a color, judged if that is due; a reward of its own makes it skipped."""
        step = do_update(self.state, 1.0 if reward is None else math.nan)
        entry = {
            "step": self.state.update,
            "reward": color[0] if reward is None else reward,
            "gradient_norm": norm,
            "gradient_norm/step_3": norm,
        }
        self.evaluation.add_update(entry, step.was_skipped)
        self.sampling.color = color
        self.evaluation.judge_update()

    def resumed(self, start: Callable[..., "Judged"], folder: Path, **values: Any) -> "Judged":
        """Another run, with this one's state."""
        folder.mkdir()
        if self.evaluation.best_weights is not None:
            save_tensors(folder / "best.safetensors", self.evaluation.best_weights)
        other = start(**values)
        other.state.update = self.state.update
        other.evaluation.load(folder, self.evaluation.state_dict())
        return other


@pytest.fixture(scope="module")
def transformer() -> torch.nn.Module:
    return tiny_sd3_pipeline(torch.float32).transformer


@pytest.fixture
def start(transformer: torch.nn.Module, tmp_path: Path) -> Callable[..., Judged]:
    return lambda **values: Judged(transformer, tmp_path / "run", **values)


# What is drawn when.


def test_evaluations_are_of_the_base_model_every_so_often_and_at_the_end(start: Callable[..., Judged]):
    run = start(max_train_steps=5, num_eval_images=3)
    run.sampling.color = (0.0, 0.25, 0.0)
    run.evaluation.before_training()
    # Two prompts, three images of each, by the base model.
    assert run.sampling.count == 6 and run.sampling.is_base
    for update in range(1, 6):
        run.update((0.0, update / 10, 0.0))
    assert run.sampling.count == 4 * 6 and not run.sampling.is_base
    assert [(entry["update"], round(entry["mean"], 6)) for entry in run.evaluation.history] == [
        (0, 0.25),
        (2, 0.2),
        (4, 0.4),
        (5, 0.5),
    ]
    assert run.evaluation.found["base"]["update"] == 0 and run.evaluation.found["last"]["update"] == 5
    assert run.evaluation.found["last"]["scores"] == {
        "red": [0.0] * 6,
        run.config.eval_reward: pytest.approx([0.5] * 6),
    }
    # None is made twice.
    run.evaluation.judge_update()
    assert run.sampling.count == 4 * 6


def test_without_records_nothing_is_evaluated(start: Callable[..., Judged]):
    run = start(has_held_out=False, evaluated=(), max_train_steps=2)
    run.evaluation.before_training()
    for _ in range(2):
        run.update()
    assert run.sampling.count == 0 and run.evaluation.history == []


def test_validations_have_times_of_their_own(start: Callable[..., Judged], tmp_path: Path):
    run = start(has_held_out=False, evaluated=(), validation_steps=2, max_train_steps=6)
    for _ in range(6):
        run.update()
    # The last one is at the end, with the closing images.
    assert sorted(path.name for path in (tmp_path / "run" / "validation").iterdir()) == ["000002.png", "000004.png"]
    assert run.sampling.count == 2


def test_what_is_judged_is_the_average(start: Callable[..., Judged]):
    run = start(use_ema=True, ema_decay=0.5, learning_rate=0.1)
    run.evaluation.before_training()
    for _ in range(2):
        run.update()
    assert is_same(run.sampling.seen, run.state.average)
    assert not is_same(lora_of_state(run.state), run.sampling.seen)
    assert is_same(run.evaluation.best_weights, run.state.result())


# The best LoRA.


def test_the_best_lora_is_that_of_the_highest_held_out_reward(start: Callable[..., Judged], tmp_path: Path):
    run = start(eval_steps=1, max_train_steps=9, learning_rate=0.1)
    # The base model's own score, which is the highest of all, is not a LoRA's.
    run.sampling.color = (0.1, 0.9, 0.1)
    run.evaluation.before_training()
    assert run.evaluation.best_weights is None and not (tmp_path / "run" / "best").exists()
    loras = []
    for held_out in (0.2, 0.5, 0.5, 0.4):
        run.update((0.9, held_out, 0.0))
        loras.append(full_lora(run.state.transformer))
    # Of two equal ones the first.
    assert is_same(run.evaluation.best_weights, loras[1]) and run.evaluation.found["best"]["update"] == 2
    check_folder(tmp_path / "run" / "best")
    assert is_same(load_tensors(tmp_path / "run" / "best" / "saved.safetensors"), loras[1])
    assert read_json(tmp_path / "run" / "best" / "evaluation.json") == run.evaluation.found["best"]
    assert run.evaluation.found["best"]["score"] == pytest.approx(0.5)


def test_images_that_are_not_finite_have_no_score_and_are_not_the_best(
    start: Callable[..., Judged], capsys: pytest.CaptureFixture[str]
):
    run = start(eval_steps=1)
    run.evaluation.before_training()
    run.update((math.nan, 0.9, 0.9))
    assert run.evaluation.best_weights is None and run.evaluation.history[-1]["mean"] is None
    assert run.evaluation.found["last"]["scores"]["red"] == [None] * 4
    printed = capsys.readouterr().err
    assert "Evaluation after update 1: red without a score; base 0.5 | toy_reward:make_held_out_reward" in printed
    run.update((0.1, 0.2, 0.1))
    assert run.evaluation.found["best"]["update"] == 2


def test_without_a_held_out_reward_there_is_no_best_lora(start: Callable[..., Judged]):
    run = start(has_held_out=False, eval_prompts="e.txt", eval_steps=1)
    run.evaluation.before_training()
    run.update((0.9, 0.9, 0.9))
    assert run.evaluation.judge == "red" and run.evaluation.history[-1]["mean"] == pytest.approx(0.9)
    assert run.evaluation.best_weights is None and "best" not in run.evaluation.found


# Alarms.


@pytest.mark.parametrize("stop_on_alarm", [False, True])
def test_an_alarm_is_told_and_listed_once(
    start: Callable[..., Judged], stop_on_alarm: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = start(stop_on_alarm=stop_on_alarm, eval_steps=100)
    for norm in (*[1.0] * 11, 100.0, 1000.0):
        assert not run.evaluation.must_stop or norm == 1000
        run.update(norm=norm)
    (alarm,) = run.evaluation.alarms
    assert (alarm["name"], alarm["update"]) == ("gradient-norm", 12) and run.evaluation.must_stop == stop_on_alarm
    # Nor is it told again by a resumed run, which does not continue either.
    resumed = run.resumed(start, tmp_path / "saved", stop_on_alarm=stop_on_alarm, eval_steps=100)
    assert resumed.evaluation.must_stop == stop_on_alarm
    resumed.update(norm=10000.0)
    assert resumed.evaluation.alarms == [alarm]
    assert capsys.readouterr().err.count(f"Alarm gradient-norm at update 12: {alarm['message']}") == 1


def test_alarms_compare_with_the_rewards_of_the_updates_that_were_not_skipped(start: Callable[..., Judged]):
    """Those since the last evaluation rise, and the held-out reward falls."""
    run = start(eval_steps=2, max_train_steps=99, num_eval_images=4)
    run.evaluation.before_training()
    for index, reward in enumerate((0.9, 0.1, 0.2, 0.3)):
        assert run.evaluation.alarms == []
        color = (reward, 0.8 - index / 10, 0.5)
        run.update(color)
        run.update(color, reward=-9.0 if index == 3 else None)
    assert [alarm["name"] for alarm in run.evaluation.alarms] == ["held-out-falls"]


# Resuming.


def test_a_resumed_run_keeps_what_was_found(start: Callable[..., Judged], tmp_path: Path):
    run = start(eval_steps=1)
    run.evaluation.before_training()
    for held_out in (0.5, 0.4):
        run.update((0.1, held_out, 0.0))
    # The number of updates, and what is only reported, may be another.
    resumed = run.resumed(start, tmp_path / "saved", eval_steps=1, max_train_steps=7, run_name="x")
    assert is_same(resumed.evaluation.best_weights, run.evaluation.best_weights)
    assert resumed.evaluation.state_dict() == run.evaluation.state_dict()
    resumed.evaluation.before_training()
    assert resumed.sampling.count == 0
    resumed.update((0.1, 0.3, 0.0))
    assert resumed.evaluation.found["best"]["update"] == 1 and len(resumed.evaluation.history) == 4


@pytest.mark.parametrize("had_evaluated", [False, True])
def test_a_resumed_run_makes_up_for_what_was_due(start: Callable[..., Judged], tmp_path: Path, had_evaluated: bool):
    options = {"eval_steps": 1, "validation_steps": 1}
    run = start(**options)
    run.evaluation.before_training()
    # The signal comes with an image of the evaluation or with the one of the validation.
    run.sampling.stop_at = run.sampling.count + (5 if had_evaluated else 2)
    with pytest.raises(DrawingStopped):
        run.update()
    assert run.evaluation.is_pending
    resumed = run.resumed(start, tmp_path / "saved", **options)
    resumed.evaluation.before_training()
    # One validation image, and four of the evaluation if they are not there.
    assert resumed.sampling.count == (1 if had_evaluated else 5) and not resumed.evaluation.is_pending
    assert [entry["update"] for entry in resumed.evaluation.history] == [0, 1]
    assert (tmp_path / "run" / "validation" / "000001.png").is_file()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_eval_images": 3},
        {"num_inference_steps": 9},
        {"guidance_scale": 1.5},
        {"seed": 1},
        {"evaluated": (Record("another"), RECORDS[1])},
        {"has_held_out": False},
    ],
)
def test_scores_of_other_images_are_not_kept(start: Callable[..., Judged], tmp_path: Path, changes: dict[str, Any]):
    run = start(eval_steps=1)
    run.evaluation.before_training()
    run.update()
    resumed = run.resumed(start, tmp_path / "saved", eval_steps=1, **changes)
    assert resumed.evaluation.found == {} and resumed.evaluation.best_weights is None
    resumed.evaluation.before_training()
    assert resumed.sampling.is_base and resumed.evaluation.history[0]["update"] == 0


# Checkpoints of the whole run.


FINGERPRINT = {"prompts": "5 prompts"}


def checkpointer(run: Judged, **changes: Any) -> Checkpointer:
    config = replace(run.config, **changes)
    parts = (run.state, run.evaluation, run.console, run.signals, OutputFolder(config.output_dir))
    return Checkpointer(config, run.state.accelerator, *parts, FINGERPRINT)


def resume_run(run: Judged, **changes: Any) -> Path | None:
    return resume(replace(run.config, **changes), run.state, run.evaluation, run.console, FINGERPRINT)


def test_a_checkpoint_brings_state_and_evaluation_back(
    start: Callable[..., Judged], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = start(eval_steps=1, learning_rate=0.1)
    run.evaluation.before_training()
    run.update()
    checkpointer(run).write()
    folder = tmp_path / "run" / "checkpoint-1"
    assert is_same(load_tensors(folder / "saved.safetensors"), run.state.result())
    resumed = start(eval_steps=1, learning_rate=0.2)
    assert resume_run(resumed) is None
    assert resume_run(resumed, resume_from_checkpoint="latest", run_name="x") == folder
    assert is_same(lora_of_state(resumed.state), lora_of_state(run.state)) and resumed.state.update == 1
    assert resumed.evaluation.state_dict() == run.evaluation.state_dict()
    told = f"{folder}: other settings than that run's: --learning_rate was 0.1, is 0.2."
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("other", [{"lora_alpha": 8}, {"use_rslora": True}])
def test_a_checkpoint_of_another_scale_is_refused(start: Callable[..., Judged], other: dict[str, Any]):
    run = start()
    run.update()
    checkpointer(run).write()
    message = r"checkpoint-1: its LoRA has other scales, .*attn.to_q was 1.0, is 2.0; use the --lora_alpha, --use_rs"
    with pytest.raises(CheckpointError, match=message):
        resume_run(start(**other), resume_from_checkpoint="latest", **other)
