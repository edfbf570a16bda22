# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The guard of a training run, through the script: evaluation, the best LoRA, alarms, and what holds a run back.

Training makes images redder (`toy_reward`). The held-out rewards here are opposed to that from the start, or from
some redness on.
"""

import contextlib
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_sd3 import MAX_SEQUENCE_LENGTH
from toy_reward import make_held_out_reward, make_reward
from training_scripts import (
    PROMPTS,
    SHARED_ARGUMENTS,
    command_line,
    distance,
    load_pipeline,
    log_of,
    lora_of,
    same,
    write_prompts,
)

from flowbp.judging.figures import validation_strip
from flowbp.judging.images import to_pil
from flowbp.publishing.published_files import LORA_FILE
from flowbp.training.checkpoints import check_folder, read_json
from flowbp.training.seeds import make_generator

NAME = "train_flowbp_sd3"
REDNESS = "toy_reward:make_reward"
OPPOSED = "test_training_guard:make_opposed_reward"
PEAKED = "test_training_guard:make_peaked_reward"
CONTRAST = "test_training_guard:make_contrast_reward"
BRIGHT = "test_training_guard:make_bright_reward"
PEAK = -0.025
"""Redness at which `PEAKED` is best; most evaluation images of the base model have less, trained ones more."""
EVALUATION_PROMPTS = ['the text "43"', 'a "6" in red']
IMAGES = 2
Scores = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]


def make_opposed_reward() -> Scores:
    """The training reward with the other sign."""
    return lambda images, prompts: -make_reward()(images, prompts)


def make_peaked_reward() -> Scores:
    """Best at a redness of `PEAK`."""
    return lambda images, prompts: -100 * (make_reward()(images, prompts) - PEAK).square()


def make_bright_reward() -> Scores:
    """Brightness of which a clip of 0.55 is reached after a few updates, but not at once."""
    return lambda images, prompts: 0.04 + make_held_out_reward()(images, prompts)


def make_contrast_reward() -> Scores:
    """Drives velocities away from the base model's."""
    return lambda images, prompts: (images - 0.5).square().flatten(1).mean(1)


@pytest.fixture(scope="module")
def shared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The options of all runs; `output_dir` is to be added."""
    folder = tmp_path_factory.mktemp("prompts")
    evaluation = folder / "evaluation.txt"
    evaluation.write_text("\n".join(EVALUATION_PROMPTS))
    return {
        **SHARED_ARGUMENTS,
        "pretrained_model_name_or_path": model,
        "prompts": write_prompts(folder),
        "resolution": 8,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        "num_inference_steps": 3,
        "method": "draft-k",
        "last_k": 1,
        "eval_prompts": evaluation,
        "num_eval_images": IMAGES,
    }


def train(script: ModuleType, arguments: dict[str, Any], folder: Path, **changes: Any) -> str:
    """A run into `folder`; returns what it printed to stdout and stderr."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        script.main(command_line(arguments, output_dir=folder, **changes))
    return printed.getvalue()


@pytest.fixture(scope="module")
def peaked(script: ModuleType, shared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose held-out reward first rises and then falls."""
    folder = tmp_path_factory.mktemp("peaked") / "run"
    train(
        script,
        shared,
        folder,
        max_train_steps=7,
        eval_steps=2,
        eval_reward=PEAKED,
        report_to="tensorboard",
        checkpointing_steps=7,
    )
    return folder


@pytest.fixture(scope="module")
def opposed(script: ModuleType, shared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run whose held-out reward falls, in passes of one sample, and what it printed; its result is the last LoRA."""
    folder = tmp_path_factory.mktemp("opposed") / "run"
    printed = train(
        script,
        shared,
        folder,
        max_train_steps=4,
        eval_steps=1,
        eval_reward=OPPOSED,
        select="last",
        train_batch_size=1,
        gradient_accumulation_steps=2,
        report_to="tensorboard",
        seed=0,
    )
    return folder, printed


@torch.no_grad()
def sample(pipe: DiffusionPipeline, prompt: str, noise: torch.Generator) -> torch.Tensor:
    """What a user of the pipeline draws, `(1, 3, 8, 8)`."""
    call = {"height": 8, "width": 8, "guidance_scale": 3.5, "max_sequence_length": MAX_SEQUENCE_LENGTH}
    return pipe(prompt, generator=noise, num_inference_steps=3, output_type="pt", **call).images


def draw(pipe: DiffusionPipeline) -> torch.Tensor:
    """The evaluation images, `(4, 3, 8, 8)`."""
    prompts = [prompt for prompt in EVALUATION_PROMPTS for _ in range(IMAGES)]
    return torch.cat(
        [sample(pipe, prompt, make_generator("evaluation", 0, number)) for number, prompt in enumerate(prompts)]
    )


def draw_with(model: Path, lora: Path) -> torch.Tensor:
    """The same with the LoRA of a folder in a fresh pipeline."""
    pipe = load_pipeline(model)
    pipe.load_lora_weights(lora)
    return draw(pipe)


def scalars_of(folder: Path) -> dict[str, dict[int, float]]:
    """Step -> value of every scalar in a run's TensorBoard files."""
    events = EventAccumulator(str(next(folder.rglob("*tfevents*")).parent), {"scalars": 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def run_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def check_evaluation(images: torch.Tensor, scores: dict[str, list[float]], held_out: Scores, name: str) -> None:
    """The scores are those of the images."""
    for reward, of_reward in ((REDNESS, make_reward()), (name, held_out)):
        expected = [of_reward(image[None], [""]).item() for image in images]
        assert scores[reward] == pytest.approx(expected, abs=1e-6)


def check_strip(path: Path, images: torch.Tensor, prompts: Sequence[str], scores: dict[str, list[float]]) -> None:
    """A file shows the images with their prompts and scores."""
    what, update = path.parent.name.capitalize(), int(path.stem)
    title = f"{what} after update {update}" if update else f"{what} of the base model"
    expected = validation_strip(to_pil(images), prompts, scores, title=title)
    with Image.open(path) as file:
        assert np.array_equal(np.asarray(file), np.asarray(expected))


# When, and of what.


def test_images_do_not_depend_on_the_batch(peaked: Path, opposed: tuple[Path, str]):
    """Both runs begin with the same model; one has passes of 2 samples, the other of 1."""
    names = [f"evaluation/{name}" for name in (REDNESS, "high_frequency", "velocity_norm", "diversity")]
    first, other = scalars_of(peaked), scalars_of(opposed[0])
    for name in names:
        assert first[name][0] == other[name][0] != first[name][2], name
    # So does training: the second update of both begins with the same LoRA.
    rewards = [[row["reward"] for row in log_of(folder)[:3]] for folder in (peaked, opposed[0])]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-5)


def test_numbers_and_images_are_those_of_the_saved_lora(peaked: Path, model: Path):
    """Of base, best and last model, drawn and scored again with what a user loads."""
    state = read_json(peaked / "checkpoint-7" / "state.json")["evaluation"]
    scalars, run = scalars_of(peaked), run_of(peaked)
    best = state["found"]["best"]["update"]
    drawn = {
        "base": (0, draw(load_pipeline(model))),
        "best": (best, draw_with(model, peaked / "best")),
        "last": (7, draw_with(model, peaked / "checkpoint-7")),
    }
    prompts = [prompt for prompt in EVALUATION_PROMPTS for _ in range(IMAGES)]
    found = state["found"]
    for name, (update, images) in drawn.items():
        scores_of = found[name]["scores"]
        check_evaluation(images, scores_of, make_peaked_reward(), PEAKED)
        assert found[name]["update"] == update
        for reward, scores in scores_of.items():
            assert scalars[f"evaluation/{reward}"][update] == pytest.approx(sum(scores) / 4, abs=1e-6)
        check_strip(peaked / "evaluation" / f"{update:06d}.png", images, prompts, scores_of)
    # The guard compares evaluations with the training since the one before.
    window = state["guard"]["window"]
    rewards = [row["reward"] for row in log_of(peaked)]
    means = [sum(rewards[2:4]) / 2, sum(rewards[4:6]) / 2, rewards[6]]
    assert [entry[0] for entry in window] == pytest.approx(means)
    assert window[-1][1:] == [found["last"]["scores"][name] for name in (REDNESS, PEAKED)]
    assert [row["name"] for row in run["rewards"]] == [REDNESS, PEAKED]
    assert [row["role"] for row in run["rewards"]] == ["trained", "held out"]
    for row in run["rewards"]:
        means = {name: sum(found[name]["scores"][row["name"]]) / 4 for name in ("base", "best")}
        assert row["images"] == 4
        assert row["base"]["mean"] == pytest.approx(means["base"], abs=1e-7)
        assert row["trained"]["mean"] == pytest.approx(means["best"], abs=1e-7)
        assert row["difference"]["mean"] == pytest.approx(means["best"] - means["base"], abs=1e-7)
        for part in ("base", "trained", "difference"):
            assert row[part]["low"] <= row[part]["mean"] <= row[part]["high"]


def test_scores_are_told_after_each_evaluation(opposed: tuple[Path, str]):
    folder, printed = opposed
    scalars = scalars_of(folder)
    for update in range(5):
        of = f"after update {update}" if update else "of the base model"
        (line,) = re.findall(rf"Evaluation {of}: (.+)", printed)
        for text, name in zip(line.split(" | "), (REDNESS, OPPOSED), strict=True):
            mean, base = (scalars[f"evaluation/{name}"][number] for number in (update, 0))
            assert text.startswith(f"{name} {mean:.3g} [") and ("held out" in text) is (name == OPPOSED), text
            assert text.endswith(f"; base {base:.3g}") is (update > 0), text


def test_the_chosen_update_is_printed_at_the_end(
    script: ModuleType, shared: dict[str, Any], peaked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """On stdout, where progress is not."""
    words = command_line(
        shared,
        output_dir=tmp_path / "run",
        max_train_steps=8,
        eval_steps=8,
        eval_reward=PEAKED,
        resume_from_checkpoint=peaked / "checkpoint-7",
    )
    script.main(words)
    printed = capsys.readouterr().out
    assert f"of update 4 of 8, the best by the held-out reward {PEAKED}" in printed
    # The best LoRA is that of the run before, and the base model is not evaluated again.
    run, before = run_of(tmp_path / "run"), run_of(peaked)
    assert run["selected"] == before["selected"] == {"kind": "best", "update": 4}
    assert run["rewards"] == before["rewards"] and same(lora_of(tmp_path / "run"), lora_of(peaked))
    assert [path.name for path in (tmp_path / "run" / "evaluation").iterdir()] == ["000008.png"]
    (found,) = (row for row in run["rewards"] if row["name"] == PEAKED)
    gain, low, high = (found["difference"][name] for name in ("mean", "low", "high"))
    expected = f"{found['base']['mean']:.3g} -> {found['trained']['mean']:.3g}, {gain:+.3g} [{low:+.3g}, {high:+.3g}]"
    assert f"{PEAKED} {expected} on 4 images (held out)" in printed and "Evaluation" not in printed


# Which LoRA.


def test_the_best_lora_by_held_out_reward_is_kept_and_chosen(peaked: Path, model: Path):
    held_out = scalars_of(peaked)[f"evaluation/{PEAKED}"]
    best = max((update for update in held_out if update), key=held_out.__getitem__)
    # It rose and fell, so neither the first nor the last one is the best.
    assert best == 4 and held_out[2] < held_out[4] > held_out[6] > held_out[7]
    check_folder(peaked / "best")
    evaluation = read_json(peaked / "best" / "evaluation.json")
    assert evaluation["update"] == best and evaluation["score"] == pytest.approx(held_out[best], abs=1e-6)
    assert run_of(peaked)["selected"] == {"kind": "best", "update": best}
    assert run_of(peaked)["settings"]["select"] == "best"
    chosen = lora_of(peaked)
    assert same(chosen, load_file(peaked / "best" / LORA_FILE))
    assert not same(chosen, load_file(peaked / "checkpoint-7" / LORA_FILE))
    pipe = load_pipeline(model)
    pipe.load_lora_weights(peaked / "best")
    assert pipe.get_list_adapters() == {"transformer": ["default_0"]}
    assert (
        f"update {best}" in (peaked / "README.md").read_text()
        or f"{best} updates" in (peaked / "README.md").read_text()
    )


def test_the_last_lora_is_the_result_where_that_is_asked_for(opposed: tuple[Path, str], model: Path):
    folder, _ = opposed
    assert run_of(folder)["selected"] == {"kind": "last", "update": 4}
    assert read_json(folder / "best" / "evaluation.json")["update"] == 1
    assert not same(lora_of(folder), load_file(folder / "best" / LORA_FILE))
    # Redder than the best one, whose held-out reward punishes that.
    last, best = draw_with(model, folder), draw_with(model, folder / "best")
    redness = [make_reward()(images, [""] * 4).mean().item() for images in (last, best)]
    assert redness[0] > redness[1]
    rows = {row["name"]: row for row in run_of(folder)["rewards"]}
    assert rows[REDNESS]["trained"]["mean"] == pytest.approx(redness[0], abs=1e-6)
    assert rows[OPPOSED]["difference"]["high"] < 0 < rows[REDNESS]["difference"]["low"]


def test_with_an_average_that_is_what_is_evaluated_and_saved(
    script: ModuleType, shared: dict[str, Any], model: Path, tmp_path: Path
):
    folder = tmp_path / "run"
    changes = {
        "max_train_steps": 3,
        "eval_steps": 3,
        "checkpointing_steps": 1,
        "use_ema": True,
        "ema_decay": 0.6,
        "validation_steps": 2,
        "select": "last",
    }
    train(script, shared, folder, eval_reward=PEAKED, **changes)
    saved = lora_of(folder)
    last = load_file(folder / "checkpoint-3" / "lora.safetensors")
    assert same(saved, load_file(folder / "best" / LORA_FILE))
    assert same(saved, load_file(folder / "checkpoint-3" / LORA_FILE))
    assert distance({name.removeprefix("transformer."): tensor for name, tensor in saved.items()}, last) > 1e-3
    scores = read_json(folder / "best" / "evaluation.json")["scores"]
    check_evaluation(draw_with(model, folder), scores, make_peaked_reward(), PEAKED)
    # The validation after update 2, and that of the end.
    pipe = load_pipeline(model)
    pipe.load_lora_weights(folder / "checkpoint-2")
    middle = sample(pipe, PROMPTS[0], make_generator("validation", 0, 0))
    rewards = {REDNESS: make_reward(), PEAKED: make_peaked_reward()}
    scores = {name: reward(middle, PROMPTS[:1]).tolist() for name, reward in rewards.items()}
    check_strip(folder / "validation" / "000002.png", middle, PROMPTS[:1], scores)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(folder)
    end = to_pil(sample(pipe, PROMPTS[0], make_generator("validation", 0, 0)))
    with Image.open(folder / "images" / "0_trained.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(end[0]))
        assert not np.array_equal(np.asarray(image), np.asarray(to_pil(middle)[0]))


# Alarms.


def test_few_images_are_told(script: ModuleType, shared: dict[str, Any], tmp_path: Path):
    changes = {"max_train_steps": 1, "eval_steps": 1, "eval_reward": OPPOSED, "num_eval_images": 1}
    printed = train(script, shared, tmp_path / "run", **changes)
    assert "The evaluation has 2 images; the alarm held-out-falls needs 4, better 16" in printed


def test_an_alarm_is_printed_logged_and_listed_once(opposed: tuple[Path, str]):
    folder, printed = opposed
    alarms = run_of(folder)["alarms"]
    assert [(alarm["name"], alarm["update"]) for alarm in alarms] == [("held-out-falls", 2)]
    message = alarms[0]["message"]
    assert "held-out reward" in message and "--select best" in message
    assert printed.count("Alarm held-out-falls at update 2: ") == printed.count(message) == 1
    assert scalars_of(folder)["alarm/held-out-falls"] == {2: 1.0}
    assert "held-out-falls" in (folder / "README.md").read_text()
    assert [row["step"] for row in log_of(folder)] == [1, 2, 3, 4]


def test_an_alarm_stops_the_run_where_that_is_asked_for(
    script: ModuleType, shared: dict[str, Any], model: Path, tmp_path: Path
):
    folder = tmp_path / "run"
    changes = {"max_train_steps": 6, "eval_steps": 1, "stop_on_alarm": True, "eval_reward": OPPOSED}
    printed = train(script, shared, folder, **changes)
    assert "Stopped by an alarm after update 2, as --stop_on_alarm says." in printed
    assert [row["step"] for row in log_of(folder)] == [1, 2]
    run = run_of(folder)
    assert run["updates"] == 2 and run["selected"] == {"kind": "best", "update": 1}
    assert [alarm["name"] for alarm in run["alarms"]] == ["held-out-falls"]
    for name in ("before_after.png", "reward_curve.png", "README.md", LORA_FILE):
        assert (folder / name).is_file(), name
    load_pipeline(model).load_lora_weights(folder)


def test_alarms_without_a_held_out_reward(script: ModuleType, shared: dict[str, Any], tmp_path: Path):
    """Evaluation prompts alone: the images are watched, the last LoRA is the result."""
    folder = tmp_path / "run"
    changes = {"max_train_steps": 4, "eval_steps": 50, "learning_rate": 0.2, "reward": CONTRAST}
    printed = train(script, shared, folder, **changes)
    run = run_of(folder)
    assert ("velocity-norm", 4) in [(alarm["name"], alarm["update"]) for alarm in run["alarms"]]
    assert printed.count("Alarm velocity-norm at update 4: the transformer's RMS is ") == 1
    assert run["selected"] == {"kind": "last", "update": 4} and not (folder / "best").exists()
    assert [row["name"] for row in run["rewards"]] == [CONTRAST]
    assert [path.name for path in sorted((folder / "evaluation").iterdir())] == ["000000.png", "000004.png"]
    assert not (folder / "logs").exists()


# What holds a run back.


def test_a_clipped_reward_drives_the_gradient_to_exactly_0(script: ModuleType, shared: dict[str, Any], tmp_path: Path):
    folder = tmp_path / "run"
    changes = {"max_train_steps": 10, "learning_rate": 0.05, "reward_clip": 0.55, "reward": BRIGHT}
    printed = train(script, {**shared, "eval_prompts": None}, folder, **changes)
    rows = log_of(folder)
    assert rows[0]["gradient_norm"] > 0 and rows[0]["loss"] == pytest.approx(0.55 - rows[0]["reward"], abs=1e-5)
    clipped = [row for row in rows if row["gradient_norm"] == 0]
    assert clipped and all(row["loss"] == 0 and row["reward"] > 0.55 for row in clipped)
    for row in rows:
        message = f"Update {row['step']}: the gradient is exactly 0. Are all rewards above --reward_clip, "
        assert printed.count(message) == (row["gradient_norm"] == 0)


def test_an_anchor_keeps_the_lora_near_the_base(
    script: ModuleType, shared: dict[str, Any], model: Path, tmp_path: Path
):
    base, found = draw(load_pipeline(model)), {}
    for beta in (0.0, 100.0):
        folder = tmp_path / str(beta)
        changes = {"max_train_steps": 6, "velocity_anchor": beta, "lr_scheduler": "linear", "eval_prompts": None}
        train(script, {**shared, **changes}, folder)
        moved = (draw_with(model, folder) - base).square().mean().sqrt().item()
        found[beta] = moved
        anchors = [row.get("anchor") for row in log_of(folder)]
        if beta:
            # The LoRA starts at the base.
            assert anchors[0] == 0 and all(0 < anchor < math.inf for anchor in anchors[1:])
        else:
            assert anchors == [None] * 6
    assert 0 < found[100.0] < found[0.0] / 2
