# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What a run tells while it goes on and leaves behind, through the script; and that none of it holds a secret."""

import contextlib
import io
import itertools
import json
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_sd3 import MAX_SEQUENCE_LENGTH
from toy_reward import make_reward
from training_scripts import (
    PROMPTS,
    ROOT,
    SHARED_ARGUMENTS,
    ErrorOf,
    command_line,
    log_of,
    lora_of,
    parse_config,
    script_path,
    write_prompts,
)
from updates_by_hand import save_snapshot

from flowbp.publishing.run_info import versions
from flowbp.training.config import TrainingConfig
from flowbp.training.model import WEIGHT_DTYPES
from flowbp.training.overview import _bytes_written
from flowbp.training.trained import FullWeights, LoraWeights

NAME = "train_flowbp_sd3"
REDNESS, BRIGHTNESS = "toy_reward:make_reward", "toy_reward:make_held_out_reward"
FLAKY = "test_observability:make_flaky_reward"
STAGES = ("encode", "rollout", "decode", "reward", "sweep", "optimizer")
Scores = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]


def make_flaky_reward() -> Scores:
    """The training reward, but NaN when it is called for the second time."""
    calls = []

    def reward(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        calls.append(len(images))
        return make_reward()(images, prompts) * (math.nan if len(calls) == 2 else 1.0)

    return reward


def make_telling_reward() -> Scores:
    """A reward that fails, with a secret in its message."""

    def reward(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        raise ValueError(f"cannot log in with {os.environ['HF_TOKEN']}\nto {os.environ['HF_TOKEN']}")

    return reward


@pytest.fixture(scope="module")
def shared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The options of all runs; `output_dir` is to be added."""
    return {
        **SHARED_ARGUMENTS,
        "pretrained_model_name_or_path": model,
        "prompts": write_prompts(tmp_path_factory.mktemp("prompts")),
        "resolution": 8,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        "max_train_steps": 3,
        "report_to": "tensorboard",
    }


def train(script: ModuleType, words: list[str]) -> str:
    """A run as if the words had been its command line; returns what it printed to stdout and stderr."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script_path(NAME)), *words])
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            script.main()
    return printed.getvalue()


@pytest.fixture(scope="module")
def observed(
    script: ModuleType, shared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str], str]:
    """A run with all that there is to log: its folder, command line and output."""
    folder = tmp_path_factory.mktemp("observed") / "run"
    words = command_line(
        shared,
        output_dir=folder,
        reward=f"{REDNESS}:2,{BRIGHTNESS}:0.5",
        method="flowbp-lagrange",
        gradient_accumulation_steps=2,
        velocity_anchor=0.5,
        lr_scheduler="linear",
        validation_steps=1,
        num_validation_images=2,
    )
    return folder, words, train(script, words)


@pytest.fixture(scope="module")
def flaky(script: ModuleType, shared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run whose second update is skipped, with one active step, and what it printed."""
    folder = tmp_path_factory.mktemp("flaky") / "run"
    changes = {"reward": f"{FLAKY}:2,{BRIGHTNESS}:1", "method": "draft-k", "last_k": 1}
    return folder, train(script, command_line(shared, output_dir=folder, **changes))


def events_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(
        str(next(folder.rglob("*tfevents*")).parent), {"scalars": 0, "images": 0, "histograms": 0}
    )
    return events.Reload()


def scalars_of(folder: Path) -> dict[str, dict[int, float]]:
    """Step -> value of every scalar in a run's TensorBoard files."""
    events = events_of(folder)
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


# While it runs.


def test_the_progress_bar_has_reward_seconds_and_the_time_left(observed: tuple[Path, list[str], str]):
    folder, _, printed = observed
    rewards = [f"{row['reward']:.3f}" for row in log_of(folder)]
    for done, reward in enumerate(rewards, 1):
        bar = rf"updates: [^\r]* {done}/3 \[\d\d:\d\d<(\d\d:\d\d|\?), [^\r]*reward={reward}, s_per_update=\d+\.\d\d\]"
        assert re.search(bar, printed), bar


def test_a_run_says_what_it_will_do(observed: tuple[Path, list[str], str], model: Path):
    folder, _, printed = observed
    lines = printed.splitlines()
    start = lines.index(f"FlowBP-Lagrange on StableDiffusion3Pipeline ({model})")
    table = {line[2:].split("  ")[0].strip(): line for line in lines[start + 1 : start + 9]}
    assert list(table) == ["device", "reward", "trained", "optimizer", "batch", "prompts", "updates", "written to"]
    assert table["device"].endswith("  cpu, mixed precision no")
    trained = sum(tensor.numel() for tensor in lora_of(folder).values())
    assert f"{trained:,} parameters in float32" in table["trained"] and "rank 3" in table["trained"]
    assert table["optimizer"].endswith("adamw, learning rate 0.01 (linear)")
    assert "4 samples per update = 2 x 2 x 1" in table["batch"] and "8 x 8 pixels" in table["batch"]
    assert "3 for training, 2 for validation every 1 updates" in table["prompts"]
    assert str(folder) in table["written to"]


def test_the_log_has_what_an_update_found(observed: tuple[Path, list[str], str], script: ModuleType):
    folder, words, _ = observed
    rows = log_of(folder)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        parts = 2 * row[f"reward/{REDNESS}"] + 0.5 * row[f"reward/{BRIGHTNESS}"]
        assert row["reward"] == pytest.approx(parts, abs=1e-6) and row["reward_std"] > 0
        assert row["loss"] != 0 and row["gradient_norm"] > 0 and row["skipped_updates"] == 0
        # The norm of a sum (over steps, and the mean over passes) is at most the sum of the norms.
        steps = row["drawn_steps"]
        norms = [row[f"gradient_norm/step_{step}"] for step in steps]
        assert len(steps) == 4 and steps == sorted(steps) and all(norm > 0 for norm in norms)
        assert max(norms) / 4 < row["gradient_norm"] <= sum(norms) * (1 + 1e-5)
        # The gaps at j, where the second leg begins, and at the end.
        gaps = {int(name.removeprefix("gap/")): row[name] for name in row if name.startswith("gap/")}
        assert len(gaps) == 2 and max(gaps) == 6 and set(gaps) - {6} <= set(steps)
        assert all(gap > 0 for gap in gaps.values())
        assert set(row) >= {f"seconds/{stage}" for stage in STAGES}
        assert all(row[f"seconds/{stage}"] > 0 for stage in STAGES)
        assert row["seconds"] == pytest.approx(sum(row[name] for name in row if name.startswith("seconds/")))
        assert 0.05 < row["memory_gib"] < 64
    # The LoRA begins at the base.
    assert rows[0]["anchor"] == 0 and rows[1]["anchor"] > 0
    assert len({tuple(row["drawn_steps"]) for row in rows}) > 1
    rates = [row["learning_rate"] for row in rows]
    assert rates == pytest.approx([0.01 * left / 3 for left in (3, 2, 1)])


def test_one_active_step_has_the_whole_gradient(flaky: tuple[Path, str]):
    for row in (row for row in log_of(flaky[0]) if row["gradient_norm"] is not None):
        assert row["drawn_steps"] == [5]
        assert row["gradient_norm"] == pytest.approx(row["gradient_norm/step_5"], rel=1e-5)
        # A method without legs has no gaps; without an anchor there is none.
        assert not any(name.startswith("gap/") for name in row) and "anchor" not in row


def test_validation_strips_are_files_and_in_the_tracker(observed: tuple[Path, list[str], str]):
    folder = observed[0]
    events, scalars = events_of(folder), scalars_of(folder)
    # The last validation is the run's result.
    assert sorted(path.name for path in (folder / "validation").iterdir()) == ["000001.png", "000002.png"]
    assert [event.step for event in events.Images("validation")] == [1, 2]
    for event in events.Images("validation"):
        with Image.open(folder / "validation" / f"{event.step:06d}.png") as file:
            saved = np.asarray(file.convert("RGB"))
        logged = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))
        assert np.array_equal(saved, logged)
    for name in (f"{REDNESS}:2,{BRIGHTNESS}:0.5", REDNESS, BRIGHTNESS, "saturated", "velocity_norm"):
        assert list(scalars[f"validation/{name}"]) == [1, 2]
    sums = 2 * scalars[f"validation/{REDNESS}"][2] + 0.5 * scalars[f"validation/{BRIGHTNESS}"][2]
    assert scalars[f"validation/{REDNESS}:2,{BRIGHTNESS}:0.5"][2] == pytest.approx(sums, abs=1e-6)


def test_a_skipped_update_is_seen_everywhere(flaky: tuple[Path, str]):
    folder, printed = flaky
    rows, scalars = log_of(folder), scalars_of(folder)
    assert [row["skipped_updates"] for row in rows] == [0, 1, 1]
    for name in ("reward", "loss", f"reward/{FLAKY}"):
        assert [row[name] is None for row in rows] == [False, True, False], name
    assert list(scalars["reward"]) == [1, 3] and scalars["skipped_updates"] == {1: 0, 2: 1, 3: 1}
    assert printed.count("Update 2: skipped, its reward, loss or gradient is not finite.") == 1
    assert "reward=skipped" in printed
    run = json.loads((folder / "run.json").read_text())
    assert run["updates"] == 3 and run["skipped_updates"] == 1
    assert all(tensor.isfinite().all() for tensor in lora_of(folder).values())


# At the end.


def test_run_json_tells_what_was_run(observed: tuple[Path, list[str], str], script: ModuleType, model: Path):
    folder, words, _ = observed
    run, config, rows = json.loads((folder / "run.json").read_text()), parse_config(script, words), log_of(folder)
    assert run["script"] == f"{NAME}.py" and run["command"] == [str(script_path(NAME)), *words]
    assert run["settings"] == config.settings()
    method = config.make_method("sd3")
    assert run["method"] == {
        "name": "flowbp-lagrange",
        "title": "FlowBP-Lagrange",
        "options": json.loads(json.dumps(dict(method.options))),
    }
    assert run["base_model"] == str(model) and run["pipeline_class"] == "StableDiffusion3Pipeline"
    assert run["versions"] == versions() and run["versions"]["torch"] == torch.__version__
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if git.returncode:
        assert run["git"] is None
    else:
        assert run["git"]["commit"] == git.stdout.strip() and isinstance(run["git"]["dirty"], bool)
    hardware = run["hardware"]
    assert hardware["device"] == "cpu" and hardware["processes"] == 1 and hardware["cpu_cores"] == os.cpu_count()
    timings = run["timings"]
    assert timings["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert timings["seconds"] == pytest.approx(sum(timings["seconds_by_stage"].values()))
    assert sorted(timings["seconds_by_stage"]) == sorted(STAGES)
    started, finished = (datetime.fromisoformat(timings[name]) for name in ("started", "finished"))
    # Both are rounded down to seconds.
    assert started.tzinfo is not None and (finished - started).total_seconds() > timings["seconds"] - 1
    assert run["updates"] == 3 and run["selected"] == {"kind": "last", "update": 3}
    assert [image["prompt"] for image in run["images"]] == list(PROMPTS[:2])
    for image in run["images"]:
        assert all((folder / image[name]).is_file() for name in ("base", "trained"))
    # Without an evaluation the images are the validation's.
    names = [row["name"] for row in run["rewards"]]
    assert names == [f"{REDNESS}:2,{BRIGHTNESS}:0.5", REDNESS, BRIGHTNESS]
    for row in run["rewards"]:
        assert row["role"] == "trained" and row["images"] == 2
    assert run["alarms"] == [] and run["hub_model_id"] is None


def test_the_end_is_printed(observed: tuple[Path, list[str], str]):
    folder, _, printed = observed
    run = json.loads((folder / "run.json").read_text())
    lines = printed.splitlines()
    table = {line.split()[0]: line for line in lines[lines.index("Done") + 1 :] if line.startswith("  ")}
    assert "of update 3 of 3, the last one" in table["LoRA"]
    found = run["rewards"][0]
    means = [found[part]["mean"] for part in ("base", "trained", "difference")]
    assert f"{found['name']} {means[0]:.3g} -> {means[1]:.3g}, {means[2]:+.3g}" in table["gain"]
    assert str(folder) in table["files"] and f'pipe.load_lora_weights("{folder}")' in table["load"]


def test_a_dry_run_estimates_the_whole_run(
    script: ModuleType, shared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By a clock that advances by ten minutes whenever a stage begins."""
    words = command_line(
        shared,
        output_dir=tmp_path / "run",
        dry_run=True,
        method="draft-k",
        max_train_steps=100,
        gradient_accumulation_steps=3,
        eval_reward=BRIGHTNESS,
        eval_steps=30,
        num_eval_images=4,
        num_validation_images=2,
        validation_steps=40,
        checkpointing_steps=40,
        checkpoints_total_limit=2,
    )
    ticks = itertools.count(step=600)
    monkeypatch.setattr("flowbp.training.stages.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    printed = train(script, words)
    seconds = {
        line.split()[0]: float(line.split()[1]) for line in re.findall(r"^\w+ +\d+\.\d\d", printed, re.MULTILINE)
    }
    assert seconds.pop("update") == sum(seconds.values()) and set(seconds.values()) <= {600.0, 1200.0}, seconds
    lines = {line.split()[0]: line for line in printed[printed.index("The whole run") :].splitlines()[1:]}
    assert lines["device"].endswith("  cpu, mixed precision no")
    of_update = 3 * sum(seconds.values())
    assert f"100 x {of_update:.2f} s = {100 * of_update // 3600:.0f} h" in lines["updates"]
    # Evaluations of the base model, after updates 30, 60 and 90, and at the end: 4 images of both validation prompts.
    images, of_image = 5 * 8 + 2 * 2 + 2 * 2, seconds["rollout"] / 2
    assert f"{images} x {of_image:.2f} s" in lines["images"]
    assert "5 evaluations of 8, 2 validations of 2, 4 at the end" in lines["images"]
    assert f"{(100 * of_update + images * of_image) // 3600:.0f} h" in lines["in"]
    assert "at most 2 of" in lines["checkpoints"] and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "result", "checkpoint"),
    [
        # A LoRA, its two moments, and the result; an average and the best one.
        ({}, 4, 16),
        ({"use_ema": True, "eval_reward": "clip", "mixed_precision": "bf16"}, 4, 24),
        # All weights: results are in the dtype of the computation, and only the best one is in a checkpoint.
        ({"train": "full"}, 4, 12),
        ({"train": "full", "use_ema": True, "eval_reward": "clip", "mixed_precision": "bf16"}, 2, 18),
    ],
)
def test_bytes_of_a_parameter_that_a_run_writes(options: dict[str, Any], result: int, checkpoint: int):
    config = TrainingConfig(pretrained_model_name_or_path="m", prompts="p", **options)
    parameters = [torch.empty(3, 5, device="meta"), torch.empty(7, device="meta")]
    module, dtype = torch.nn.Linear(1, 1), WEIGHT_DTYPES[config.mixed_precision or "no"]
    full = FullWeights(module, SD3Transformer2DModel, "transformer", dtype)
    trained = full if config.train == "full" else LoraWeights(module, save_snapshot)
    state = SimpleNamespace(parameters=parameters, trained=trained, files=trained.state_files)
    run = SimpleNamespace(config=config, state=state)
    assert _bytes_written(run) == (22 * result, 22 * checkpoint)


# Secrets.

TOKEN = "hf_" + "CanaryOfTheEnvironment"
PATH_TOKEN = "hf_" + "CanaryOfAnOptionValue"
CANARIES = ("CanaryOfTheEnvironment", "canaryofthetracker", "CanaryOfAnOptionValue", "CanaryOfAnAddress")


@pytest.fixture
def secrets_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789canaryofthetracker")


def leaks(folder: Path, *printed: str) -> list[str]:
    """Where canaries are: in the names and contents of files below a folder, or in what was printed."""
    found = []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for canary in CANARIES:
            if canary in path.name or any(canary.encode(code) in content for code in ("utf-8", "utf-16-le")):
                found.append(f"{path.name}: {canary}")
    return found + [canary for canary in CANARIES for text in printed if canary in text]


def test_no_secret_is_written_or_printed(
    script: ModuleType,
    shared: dict[str, Any],
    model: Path,
    tmp_path: Path,
    secrets_set: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    hidden = tmp_path / "inputs" / PATH_TOKEN
    hidden.mkdir(parents=True)
    (hidden / "model").symlink_to(model)
    folder = hidden / "run"
    words = command_line(
        shared,
        output_dir=folder,
        pretrained_model_name_or_path=hidden / "model",
        prompts=write_prompts(hidden),
        hub_model_id="https://me:CanaryOfAnAddress@hub.example/me/lora",
        method="draft-k",
        max_train_steps=2,
        eval_reward=BRIGHTNESS,
        eval_steps=1,
        validation_steps=1,
        checkpointing_steps=1,
        use_ema=True,
    )
    monkeypatch.setattr(sys, "argv", [str(script_path(NAME)), *words])
    script.main()
    printed = capfd.readouterr()
    assert leaks(folder, printed.out, printed.err) == []
    # They would have been there.
    run = json.loads((folder / "run.json").read_text())
    assert "[redacted]" in run["base_model"] and "[redacted]" in run["settings"]["hub_model_id"]
    assert sum("[redacted]" in word for word in run["command"]) == 4
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert {".json", ".jsonl", ".md", ".png", ".safetensors", ".yml"} <= kinds


def test_no_secret_is_told_when_a_run_fails(
    shared: dict[str, Any],
    tmp_path: Path,
    secrets_set: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    folder = tmp_path / "run"
    words = command_line(
        shared, output_dir=folder, reward="test_observability:make_telling_reward", checkpointing_steps=1
    )
    monkeypatch.setattr(sys, "argv", [str(script_path(NAME)), *words])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(script_path(NAME)), run_name="__main__")
    told = "It was raised by the reward 'test_observability:make_telling_reward'."
    assert caught.value.code == f"{NAME}.py: error: cannot log in with [redacted] to [redacted] {told}"
    printed = capfd.readouterr()
    assert leaks(folder, printed.out, printed.err) == []
    assert any(path.is_file() for path in folder.rglob("*"))


@pytest.mark.parametrize(
    "option",
    ["rank", "method", "config", "prompts", "reward", "resume_from_checkpoint", "pretrained_model_name_or_path"],
)
def test_no_secret_is_told_when_a_value_is_refused(
    shared: dict[str, Any], tmp_path: Path, secrets_set: None, option: str, error_of: ErrorOf
):
    value = f"{tmp_path}/{PATH_TOKEN}/model" if option.startswith("pretrained") else PATH_TOKEN
    words = command_line(shared, **{"output_dir": tmp_path / "run", option: value})
    printed = error_of(NAME, words)
    assert leaks(tmp_path, printed) == []
    # It is the value that is refused.
    assert "[redacted]" in printed and len(printed.splitlines()) == 1
