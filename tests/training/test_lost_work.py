# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""No finished work is lost: errors of rewards, signals, folders that are in use, gone, or of an earlier run."""

import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_reward
from accelerate import Accelerator
from resume_harness import check_same_end, sd3_arguments
from training_scripts import load_script, lora_of, put_into_cache, same

from flowbp.judging import images as judging_images
from flowbp.publishing.published_files import LORA_FILE
from flowbp.training import TrainingConfig, train
from flowbp.training.checkpoints import CheckpointError, check_folder, read_json, write_folder
from flowbp.training.output_folder import LOCK, OutputFolder
from flowbp.training.reports import Reports
from flowbp.training.setup import claim_folder
from flowbp.training.signals import TrainingStopped
from flowbp.training.state_files import LoraFiles

SD3 = load_script("train_flowbp_sd3").SD3
Reward = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]


@pytest.fixture
def config(model: Path, prompts: Path, tmp_path: Path) -> TrainingConfig:
    """Four updates, with an evaluation after the second and the last, and no checkpoint but those that are due."""
    arguments = sd3_arguments(model, prompts, tmp_path / "run")
    changes = {"checkpointing_steps": 100, "max_train_steps": 4, "eval_steps": 2, "validation_steps": 2}
    options = {"num_active": arguments.pop("num_active")}
    held_out = {
        "eval_reward": "toy_reward:make_held_out_reward",
        "num_eval_images": 2,
        "num_validation_images": 3,
    }
    return TrainingConfig(**{**arguments, **changes, **held_out}, method_options=options)


def changed(config: TrainingConfig, **changes: Any) -> TrainingConfig:
    """The config with other values."""
    return TrainingConfig(**{**vars(config), **changes})


def acting_reward(act: Callable[[], None], training_call: int = 0, judging_call: int = 0) -> Reward:
    """The toy reward, which does something at a call of the training or of an evaluation, counted from 1."""
    reward = toy_reward.make_reward()
    counts = {True: 0, False: 0}

    def score(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        counts[images.requires_grad] += 1
        if counts[images.requires_grad] == (training_call if images.requires_grad else judging_call):
            act()
        return reward(images, prompts)

    score.__name__ = "toy_reward:make_reward"
    return score


def fail() -> None:
    raise RuntimeError("the reward fails")


def checkpoints_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def content_of(folder: Path) -> dict[str, str]:
    """A hash of every file but the lock."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOCK
    }


# Errors.


@pytest.mark.parametrize(
    ("act", "expected", "message"),
    [
        (fail, RuntimeError, "the reward fails"),
        (lambda: sys.exit(0), RuntimeError, r"sys.exit\(0\)"),
    ],
    ids=["raises", "exits with code 0"],
)
def test_a_reward_that_fails_costs_one_update(
    config: TrainingConfig, tmp_path: Path, act: Callable[[], None], expected: type[Exception], message: str
):
    whole = changed(config, output_dir=tmp_path / "whole")
    train(whole, SD3)
    with pytest.raises(expected, match=message):
        train(config, SD3, reward=acting_reward(act, training_call=4))
    # Three updates were done. The checkpoint before the evaluation after the second one has made room.
    assert checkpoints_of(config.output_dir) == ["checkpoint-3"]
    train(changed(config, resume_from_checkpoint="latest"), SD3)
    check_same_end(whole.output_dir, config.output_dir, 4)


def test_a_judge_that_fails_costs_no_update(config: TrainingConfig, tmp_path: Path):
    whole = changed(config, output_dir=tmp_path / "whole")
    train(whole, SD3)
    # The first images are those of the base model.
    with pytest.raises(RuntimeError, match="the reward fails"):
        train(config, SD3, reward=acting_reward(fail, judging_call=8))
    assert checkpoints_of(config.output_dir) == ["checkpoint-2"]
    train(changed(config, resume_from_checkpoint="latest"), SD3)
    check_same_end(whole.output_dir, config.output_dir, 4)


def test_an_error_of_the_last_checkpoint_does_not_hide_the_run_s(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def write(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(LoraFiles, "write", write)
    with pytest.raises(RuntimeError, match="the reward fails"):
        train(changed(config, eval_reward=None), SD3, reward=acting_reward(fail, training_call=2))
    assert "The state after update 1 could not be written: device-side assert" in capsys.readouterr().err


def test_a_tracker_that_fails_costs_no_evaluation(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch):
    log = Reports._log_histograms
    monkeypatch.setattr(Reports, "_log_histograms", lambda *args: fail() if args[2] == 2 else log(*args))
    with pytest.raises(RuntimeError, match="the reward fails"):
        train(config, SD3)
    kept = read_json(config.output_dir / "checkpoint-2" / "state.json")["evaluation"]
    assert kept["is_pending"] and len(kept["training_rewards"]) == 2


def test_the_lora_is_saved_before_closing_images_are_drawn(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch):
    config = changed(config, eval_reward=None, validation_steps=100)
    monkeypatch.setattr(judging_images, "to_pil", lambda images: fail())
    with pytest.raises(RuntimeError, match="the reward fails"):
        train(config, SD3)
    assert same(lora_of(config.output_dir), lora_of(config.output_dir / "checkpoint-4"))
    assert not (config.output_dir / "run.json").exists()


# Signals.


@pytest.fixture(autouse=True)
def no_signal_is_ignored() -> Iterator[None]:
    """As in a terminal: under nohup, and in the background of a shell, some are."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_signals_end_a_run_with_a_checkpoint(config: TrainingConfig, name: str, capfd: pytest.CaptureFixture[str]):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with pytest.raises(TrainingStopped, match=f"Stopped by {name} after update 3") as stopped:
        train(config, SD3, reward=acting_reward(send(number), training_call=3))
    assert stopped.value.signal_number == number and signal.getsignal(number) is before
    assert checkpoints_of(config.output_dir) == ["checkpoint-3"]
    printed = capfd.readouterr().err
    assert printed.index(f"{name}: stopping") < printed.index("Stopped by")


def test_a_signal_in_an_evaluation_is_seen_between_images(config: TrainingConfig, tmp_path: Path):
    whole = changed(config, output_dir=tmp_path / "whole")
    train(whole, SD3)
    reward, calls = acting_reward(send(signal.SIGTERM), judging_call=8), []

    def counting(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        calls.append(images.requires_grad)
        return reward(images, prompts)

    counting.__name__ = reward.__name__
    with pytest.raises(TrainingStopped, match="after update 2"):
        train(config, SD3, reward=counting)
    # Six images of the base model, and of the second evaluation those of one prompt and no more.
    assert calls.count(False) == 8
    assert checkpoints_of(config.output_dir) == ["checkpoint-2"]
    train(changed(config, resume_from_checkpoint="latest"), SD3)
    check_same_end(whole.output_dir, config.output_dir, 4)


def test_a_signal_before_the_first_update_leaves_a_folder_to_start_in_again(config: TrainingConfig):
    with pytest.raises(TrainingStopped, match="start again"):
        train(config, SD3, reward=acting_reward(send(signal.SIGTERM), judging_call=1))
    assert checkpoints_of(config.output_dir) == []
    train(changed(config, max_train_steps=1, eval_reward=None), SD3)


def test_a_second_signal_stops_at_once(config: TrainingConfig):
    def twice() -> None:
        send(signal.SIGTERM)()
        send(signal.SIGTERM)()

    with pytest.raises(KeyboardInterrupt):
        train(config, SD3, reward=acting_reward(twice, training_call=1))


def test_an_ignored_signal_stays_ignored(config: TrainingConfig):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train(
            changed(config, max_train_steps=1, eval_reward=None),
            SD3,
            reward=acting_reward(send(signal.SIGHUP), training_call=1),
        )
    finally:
        signal.signal(signal.SIGHUP, before)


# The folder.


def test_a_second_start_is_refused_and_changes_nothing(config: TrainingConfig):
    config = changed(config, max_train_steps=1, eval_reward=None)
    train(config, SD3)
    before = content_of(config.output_dir)
    with pytest.raises(ValueError, match="holds an earlier run .*--resume_from_checkpoint latest.*--overwrite_output"):
        train(config, SD3)
    assert content_of(config.output_dir) == before


def test_what_a_run_left_that_was_killed_before_its_first_checkpoint_is_no_obstacle(config: TrainingConfig):
    config = changed(config, max_train_steps=2)
    train(config, SD3)
    for path in config.output_dir.iterdir():
        if path.name not in ("log.jsonl", "evaluation", "validation", LOCK):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert len(list((config.output_dir / "evaluation").iterdir())) == 2
    train(changed(config, max_train_steps=1, eval_reward=None), SD3)
    assert checkpoints_of(config.output_dir) == ["checkpoint-1"]
    assert not list((config.output_dir / "evaluation").iterdir())


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(config: TrainingConfig):
    config = changed(config, max_train_steps=2)
    train(config, SD3)
    mine = {"notes.txt": "mine", "images/photo.png": "mine", "checkpoints/weights.bin": "mine"}
    for name, text in mine.items():
        (config.output_dir / name).parent.mkdir(exist_ok=True)
        (config.output_dir / name).write_text(text)
    train(changed(config, max_train_steps=1, eval_reward=None, overwrite_output_dir=True), SD3)
    assert {name: (config.output_dir / name).read_text() for name in mine} == mine
    assert checkpoints_of(config.output_dir) == ["checkpoint-1"]
    assert not (config.output_dir / "best").exists() and not list((config.output_dir / "evaluation").iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("best", "best/model.safetensors"),
        ("checkpoint-7", "checkpoint-7/model.safetensors"),
        *[
            (name, name)
            for name in ("log.jsonl", "README.md", LORA_FILE, "validation/000001.png", "images/0_base.png")
        ],
    ],
)
def test_a_file_of_the_user_is_never_taken_for_a_run_s(tmp_path: Path, name: str, file: str, overwrite: bool):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=f"{name} in this folder was not written by a run; move it"):
        OutputFolder(tmp_path).claim(False, overwrite)
    assert (tmp_path / file).read_text() == '{"mine": 1}'


@pytest.mark.parametrize("overwrite", [False, True])
def test_only_a_checkpoint_of_the_folder_itself_makes_a_run_its_continuation(
    config: TrainingConfig, overwrite: bool, tmp_path: Path
):
    """However it is named: two runs would be mixed, or the own checkpoint removed."""
    own, other = config.output_dir / "checkpoint-1", tmp_path / "other" / "checkpoint-2"
    for folder in (own, other):
        write_folder(folder, lambda path: (path / "lora").write_text(""))

    def claim(checkpoint: str) -> None:
        resumed = changed(config, resume_from_checkpoint=checkpoint, overwrite_output_dir=overwrite)
        with ExitStack() as closing:
            claim_folder(resumed, Accelerator(cpu=True), closing)

    # As a process leaves it that is killed while it replaces the checkpoint.
    own = own.rename(own.with_name("checkpoint-1.replaced"))
    for name in ("checkpoint-1", str(config.output_dir / "checkpoint-1")):
        claim(name)
        check_folder(own)
    for name in (str(other), "../other/checkpoint-2"):
        with nullcontext() if overwrite else pytest.raises(ValueError, match="holds an earlier run"):
            claim(name)
        assert own.exists() != overwrite


@pytest.mark.parametrize("name", ["", LORA_FILE, "checkpoint-1", f"best/{LORA_FILE}"])
def test_overwriting_does_not_remove_what_the_run_starts_from(config: TrainingConfig, name: str):
    for folder in (config.output_dir / "checkpoint-1", config.output_dir / "best"):
        write_folder(folder, lambda path: (path / LORA_FILE).write_text(""))
    for file in (LORA_FILE, "log.jsonl"):
        (config.output_dir / file).write_text("")
    before, folder = content_of(config.output_dir), OutputFolder(config.output_dir)
    with pytest.raises(ValueError, match="--overwrite_output_dir would remove --init_lora"):
        folder.claim(False, True, str(config.output_dir / name))
    assert content_of(config.output_dir) == before
    folder.claim(False, True, str(config.output_dir.parent / LORA_FILE))
    assert not content_of(config.output_dir)
    folder.release()


def test_two_runs_in_one_folder(config: TrainingConfig):
    other = OutputFolder(config.output_dir)
    other.claim(is_resumed=False, overwrite=False)
    with pytest.raises(ValueError, match="another run writes into this folder"):
        train(config, SD3)
    other.release()
    # After an error the folder is free again, although the traceback still holds the run.
    with pytest.raises(RuntimeError) as caught:
        train(config, SD3, reward=acting_reward(fail, training_call=1))
    assert caught.tb
    train(changed(config, max_train_steps=1, eval_reward=None, overwrite_output_dir=True), SD3)


@pytest.mark.parametrize("is_renamed", [False, True], ids=["removed", "renamed"])
def test_a_folder_that_goes_away_is_told_and_not_made_again(config: TrainingConfig, is_renamed: bool, tmp_path: Path):
    def move() -> None:
        config.output_dir.rename(tmp_path / "moved")
        if not is_renamed:
            (tmp_path / "moved").rename(tmp_path / "gone")

    with pytest.raises(FileNotFoundError, match="run"):
        train(config, SD3, reward=acting_reward(move, training_call=3))
    assert not config.output_dir.exists()
    if is_renamed:
        check_folder(tmp_path / "moved" / "checkpoint-2")


# What a resumed run is told.


def resumed(config: TrainingConfig, **changes: Any) -> TrainingConfig:
    return changed(config, resume_from_checkpoint="latest", eval_reward=None, **changes)


@pytest.fixture
def stopped(config: TrainingConfig) -> TrainingConfig:
    """A run that ended after two updates."""
    config = changed(config, eval_reward=None, max_train_steps=2, lr_scheduler="cosine")
    train(config, SD3)
    return config


def test_nothing_is_said_of_the_same_run(stopped: TrainingConfig, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    train(resumed(stopped, strict_resume=True), SD3)
    printed = capsys.readouterr().err
    assert "other settings" not in printed and "nothing is left to train, 2 updates are done" in printed


def test_other_prompts_are_told_or_refused(
    stopped: TrainingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = tmp_path / "other.txt"
    other.write_text(Path(stopped.prompts).read_text() + "\none more")
    # The same name with another content.
    Path(stopped.prompts).write_text(other.read_text())
    with pytest.raises(ValueError, match="prompts was 3 prompts .* is 4 prompts .*--strict_resume"):
        train(resumed(stopped, strict_resume=True), SD3)
    train(resumed(stopped), SD3)
    assert "prompts was 3 prompts" in capsys.readouterr().err


def test_what_cannot_be_resumed_is_refused_before_a_model_is_loaded(
    stopped: TrainingConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(SD3, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    for changes, message in (
        ({"use_ema": True}, "without --use_ema"),
        ({"optimizer": "adamw-8bit"}, "use the --optimizer of that run, adamw"),
        ({"mixed_precision": "fp16"}, "use the --mixed_precision of that run"),
        ({"rank": 9}, f"use the --rank of that run, {stopped.rank}"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(resumed(stopped, **changes), SD3)
    (stopped.output_dir / "checkpoint-2").rename(stopped.output_dir / "copy")
    write_folder(stopped.output_dir / "checkpoint-2", lambda path: (path / "state.json").write_text('{"format": 2}'))
    with pytest.raises(CheckpointError, match="written by another version of flowbp"):
        train(resumed(stopped), SD3)


def test_the_end_of_a_schedule_is_told(stopped: TrainingConfig, capsys: pytest.CaptureFixture[str]):
    train(resumed(stopped, max_train_steps=3), SD3)
    # The result of the run before is kept.
    assert checkpoints_of(stopped.output_dir) == ["checkpoint-2", "checkpoint-3"]
    assert "--max_train_steps of the schedule was 2, is 3" in capsys.readouterr().err


def test_other_code_of_a_reward_and_other_versions_are_told(
    stopped: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    module = tmp_path / "changing_reward.py"
    module.write_text("from toy_reward import make_reward\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    put_into_cache(tmp_path / "hub", "model", Path(stopped.pretrained_model_name_or_path), "0" * 40)
    names = {"reward": "changing_reward:make_own", "pretrained_model_name_or_path": "user/model"}
    config = changed(stopped, output_dir=tmp_path / "changing", **names)
    module.write_text("import toy_reward\ndef make_own():\n    return toy_reward.make_reward()\n")
    train(config, SD3)
    module.write_text(module.read_text() + "# changed\n")
    put_into_cache(tmp_path / "hub", "model", Path(stopped.pretrained_model_name_or_path), "1" * 40)
    monkeypatch.setattr("flowbp.training.fingerprint.versions", lambda library: {"torch": "0"})
    train(resumed(config), SD3)
    printed = capsys.readouterr().err
    assert "code of changing_reward:make_own was" in printed and "version of torch was" in printed
    assert f"commit of the model was {'0' * 40}, is {'1' * 40}" in printed
