# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The evaluation script on tiny saved pipelines: what it draws, how it resumes, processes, the demo's table."""

import importlib
import json
import math
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow.parquet
import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, StableDiffusion3Pipeline, TorchAoConfig
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.training_utils import _collate_lora_metadata
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_ovis_image_pipeline, tiny_wan_22_pipeline, tiny_wan_pipeline
from tiny_rewards import GENEVAL_METADATA, tiny_clip, tiny_detector
from tiny_sd3 import MAX_SEQUENCE_LENGTH, add_random_lora, save_random_lora, tiny_sd3_pipeline
from toy_reward import Motion, make_reward
from training_scripts import (
    ROOT,
    CheckRefusal,
    command_line,
    environment,
    load_pipeline,
    on_cpus,
    put_into_cache,
    run_program,
    script_path,
    torchrun,
)
from warm_python import warm

from flowbp.judging.images import are_finite, to_pil
from flowbp.judging.loras import scores_by_reward
from flowbp.judging.transformers import Transformers
from flowbp.training.output_folder import OutputFolder

NAME = "evaluate_flowbp"
STEPS = 4
PROMPTS = ('the text "42"', 'a "7" in red', 'blue "k9"')
RESULTS = ("scores.parquet", "table.md", "table.json", "table.csv", "report.html", "grid.png")


pytestmark = pytest.mark.usefixtures("no_dataset_bars")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base pipeline and two LoRAs, which are for different layers."""
    folder = tmp_path_factory.mktemp("models")
    tiny_sd3_pipeline(torch.float32).save_pretrained(folder / "base")
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": text, "tag": f"tag{place % 2}"}) + "\n" for place, text in enumerate(PROMPTS))
    )
    return {
        "base": folder / "base",
        "one": save_random_lora(tiny_sd3_pipeline(torch.float32), folder / "one", seed=1),
        "two": save_random_lora(tiny_sd3_pipeline(torch.float32), folder / "two", seed=2, layers=["to_q", "to_k"]),
        "prompts": folder / "prompts.jsonl",
    }


@pytest.fixture
def arguments(models: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": models["base"],
        "lora": [models["one"]],
        "prompts": models["prompts"],
        "rewards": "toy_reward:make_reward",
        "height": 8,
        "width": 8,
        "num_inference_steps": STEPS,
        "guidance_scale": 3.5,
        "pipeline_arguments": {"max_sequence_length": MAX_SEQUENCE_LENGTH, "negative_prompt": "grey"},
        "num_images_per_prompt": 2,
        "batch_size": 4,
        "output_dir": tmp_path / "run",
    }


def scores_of(folder: Path, model: str, column: str = "toy_reward:make_reward") -> list[Any]:
    table = pyarrow.parquet.read_table(folder / "scores.parquet").to_pylist()
    return [line[column] for line in table if line["model"] == model]


def content_of(folder: Path) -> dict[str, bytes]:
    """All files of an evaluation."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def images_of(pipe: DiffusionPipeline, prompts: list[str], seeds: list[int], **call: Any) -> list[Image.Image]:
    """What users get from the noise that the parquet file names."""
    images = pipe(
        prompts,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=STEPS,
        height=8,
        width=8,
        guidance_scale=3.5,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        negative_prompt=["grey"] * len(prompts),
        output_type="pt",
        **call,
    ).images
    return to_pil(images)


def test_every_row_is_what_users_get(
    script: ModuleType, models: dict[str, Path], arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    # One of the LoRAs is a second adapter for fewer layers, and switches between the two must leave no trace.
    loras = [f"first={models['one']}", str(models["two"])]
    changes = {"lora": loras, "lora_scale": [0, 0.5, 1], "base_for_last": [0, STEPS], "batch_size": 3}
    script.main(command_line(arguments, **changes, group_column="tag"))
    folder = arguments["output_dir"]
    lines = pyarrow.parquet.read_table(folder / "scores.parquet").to_pylist()
    assert len(lines) == (1 + 2 * 3 * 2) * len(PROMPTS) * 2
    by_row: dict[str, list[dict]] = {}
    for line in lines:
        by_row.setdefault(line["model"], []).append(line)
    seeds = [line["seed"] for line in by_row["base"]]
    assert len(set(seeds)) == 6 and all([x["seed"] for x in row] == seeds for row in by_row.values())

    def drawn(row: str) -> list[bytes]:
        return [Image.open(folder / line["image"]).tobytes() for line in by_row[row]]

    texts = [text for text in PROMPTS for _ in range(2)]
    for row, lora, scale in (("base", None, 1), ("first × 1", "one", 1), ("two × 0.5", "two", 0.5)):
        pipe = load_pipeline(models["base"])
        if lora is not None:
            pipe.load_lora_weights(models[lora], adapter_name="x")
            pipe.set_adapters("x", scale)
        # In the script's batches, because sums of other batches may round differently.
        parts = [images_of(pipe, texts[start : start + 3], seeds[start : start + 3]) for start in (0, 3)]
        assert [image.tobytes() for part in parts for image in part] == drawn(row)
    names = ["first", "two"]
    key = "toy_reward:make_reward"
    for name in names:
        for same in (f"{name} × 0", f"{name} × 1, base for last {STEPS}", f"{name} × 0, base for last {STEPS}"):
            assert drawn(same) == drawn("base")
            assert [x[key] for x in by_row[same]] == [x[key] for x in by_row["base"]]
        assert len({tuple(drawn(row)) for row in ("base", f"{name} × 0.5", f"{name} × 1")}) == 3

    printed = capsys.readouterr().out
    table = (folder / "table.md").read_text()
    assert table in printed and "by group" in table and "tag0" in table
    assert [line["group"] for line in by_row["base"]] == ["tag0", "tag0", "tag1", "tag1", "tag0", "tag0"]
    with Image.open(folder / "grid.png") as image:
        assert min(image.size) > 300


def test_the_last_steps_of_the_base_model(
    script: ModuleType, models: dict[str, Path], arguments: dict[str, Any]
) -> None:
    script.main(command_line(arguments, base_for_last=[0, 2], sigmas="linear", num_images_per_prompt=1, num_prompts=2))
    folder = arguments["output_dir"]
    rows = {row: scores_of(folder, row) for row in ("base", "one", "one, base for last 2")}
    assert len({tuple(values) for values in rows.values()}) == 3 and all(len(values) == 2 for values in rows.values())
    # By hand: the LoRA is switched off by the user's own callback after the second of four steps.
    pipe = load_pipeline(models["base"])
    pipe.load_lora_weights(models["one"])

    def off(pipe: DiffusionPipeline, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe.disable_lora()
        return given

    seeds = scores_of(folder, "base", "seed")
    sigmas = torch.linspace(1, 1 / STEPS, STEPS).tolist()
    images = images_of(pipe, list(PROMPTS[:2]), seeds, callback_on_step_end=off, sigmas=sigmas)
    paths = scores_of(folder, "one, base for last 2", "image")
    assert [image.tobytes() for image in images] == [Image.open(folder / path).tobytes() for path in paths]


def test_seeds_are_one_line_and_any_line_is_compared_with(
    script: ModuleType, models: dict[str, Path], arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    loras = [f"one={models['one']}", f"seeds={models['one']},{models['two']}"]
    with pytest.raises(ValueError, match="--against two: expected a line of the tables; choose from base, one, seeds"):
        script.main(command_line(arguments, lora=loras, against="two"))
    script.main(command_line(arguments, lora=loras, against="one", num_images_per_prompt=1))
    folder = arguments["output_dir"]
    content = json.loads((folder / "table.json").read_text())
    assert content["lines"] == {"base": ["base"], "one": ["one"], "seeds": ["seeds one", "seeds two"]}
    records = {record["model"]: record for record in content["records"]}
    assert [*records] == ["base", "one", "seeds"] and records["seeds"]["seeds"] == 2
    each = [scores_of(folder, name) for name in ("seeds one", "seeds two")]
    assert each[0] == scores_of(folder, "one")
    mean = sum(map(sum, each)) / 6 - sum(scores_of(folder, "one")) / 3
    assert records["seeds"]["change"]["mean"] == pytest.approx(mean) and "change" not in records["one"]
    assert len(content["pairs"]) == 6
    table = pyarrow.parquet.read_table(folder / "scores.parquet").to_pylist()
    assert {line["line"] for line in table if line["model"].startswith("seeds")} == {"seeds"}
    printed, report = capsys.readouterr().out, (folder / "report.html").read_text()
    for text in ("Change against one, same noise", "seeds (2 seeds)", "make_reward: line minus column, same noise"):
        assert text in printed and text in report
    assert "Changes against one are in brackets" in report and '<option value="base">' in report
    # Another reference needs no new images.
    before = {path: path.stat().st_mtime_ns for path in folder.glob("images/*/*.png")}
    script.main(command_line(arguments, lora=loras, against="seeds", num_images_per_prompt=1))
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("images/*/*.png")}
    assert "Change against seeds (2 seeds), same noise" in (folder / "table.md").read_text()


# Stopping and starting again, processes.


def test_killed_in_the_middle_and_started_again_it_writes_the_same(
    script: ModuleType, models: dict[str, Path], arguments: dict[str, Any], tmp_path: Path
) -> None:
    words = command_line(arguments, rewards="fatal_reward:make_reward", batch_size=2)
    # Batches are two images: the base has three, and the process dies when it scores the second of the LoRA's.
    variables = warm({**environment(), "FLOWBP_TEST_LAST_CALL": "5"})
    killed = run_program([sys.executable, script_path(NAME), *words], variables, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    folder = arguments["output_dir"]
    assert len(list(folder.glob("scores/*/*.json"))) == 4 and not (folder / "table.md").exists()
    # It may die while it writes, too.
    (folder / "images" / "one" / "000002.png").write_bytes(b"half an image")
    (folder / "scores" / "one" / "000001.json.partial").write_text("[0.")
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("scores/*/*.json")}
    script.main(words)
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())

    whole = tmp_path / "whole"
    script.main(command_line(arguments, rewards="fatal_reward:make_reward", batch_size=2, output_dir=whole))
    assert content_of(folder) == content_of(whole)
    assert set(RESULTS) <= set(content_of(whole))

    # A finished evaluation needs no model; another LoRA is added, and the rows that are there stay.
    before = content_of(folder)
    script.main(words)
    assert content_of(folder) == before
    more = [str(models["one"]), str(models["two"])]
    script.main(command_line(arguments, rewards="fatal_reward:make_reward", batch_size=2, lora=more))
    after = content_of(folder)
    assert all(after[name] == before[name] for name in before if name.startswith(("scores/", "images/")))
    assert len(scores_of(folder, "two", "seed")) == 6


def test_two_processes_write_the_same_as_one(script: ModuleType, arguments: dict[str, Any], tmp_path: Path) -> None:
    words = command_line(arguments, batch_size=2, num_images_per_prompt=3)
    done = run_program(torchrun(script_path(NAME), *words), on_cpus())
    assert done.stdout.count("3 prompts, 3 images of each") == 1
    alone = tmp_path / "alone"
    script.main(command_line(arguments, batch_size=2, num_images_per_prompt=3, output_dir=alone))
    assert content_of(arguments["output_dir"]) == content_of(alone)


# Broken models and files.


def test_a_lora_without_finite_images_is_told_and_the_others_are_evaluated(
    script: ModuleType, arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # At this scale the LoRA's products overflow.
    words = command_line(arguments, lora_scale=[1, 1e30], batch_size=3)
    script.main(words)
    folder, told = arguments["output_dir"], "one × 1e+30: no finite images, so it has no scores"
    assert all(math.isnan(score) for score in scores_of(folder, "one × 1e+30"))
    captured = capsys.readouterr()
    assert told in captured.err and told in captured.out
    # Once while it draws, too.
    assert captured.err.count("one × 1e+30: 3 of 3 images are not finite.") == 1
    assert told in (folder / "table.md").read_text() and told in (folder / "report.html").read_text()
    records = {record["model"]: record for record in json.loads((folder / "table.json").read_text())["records"]}
    assert records["one × 1e+30"]["score"] is None and records["base"]["left_out"] == 0
    # The same numbers as without it.
    script.main(command_line(arguments, lora_scale=[1, 0.5], batch_size=3, output_dir=tmp_path / "other"))
    other = json.loads((tmp_path / "other" / "table.json").read_text())["records"]
    assert [records["base"], records["one × 1"]] == other[:2]

    # Its batches are finished. What was damaged since then is told and drawn again, and nothing else.
    before = content_of(folder)
    images = sorted((folder / "images" / "one_1").glob("*.png"))
    images[0].write_bytes(images[0].read_bytes()[:-20])
    times = {path: path.stat().st_mtime_ns for path in folder.glob("scores/*/*.json")}
    capsys.readouterr()
    script.main(words)
    captured = capsys.readouterr()
    line = "Batch 0 of one × 1 is drawn again: images/one_1/000000.png is missing, empty or cut.\n"
    assert line in captured.err and "Resuming: 5 of 6 batches" in captured.out
    assert content_of(folder) == before
    changed = [path.parent.name for path, time in times.items() if path.stat().st_mtime_ns != time]
    assert changed == ["one_1"]
    # A run that names fewer models says so in its tables.
    script.main(command_line(arguments, lora_scale=[1e30], batch_size=3))
    assert "- one × 1: not in these tables" in (folder / "table.md").read_text()


def test_a_lora_that_fits_in_part_is_told_whenever_the_tables_are_written(
    script: ModuleType,
    models: dict[str, Path],
    arguments: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors = load_file(models["two"] / LORA_WEIGHT_NAME_SAFE)
    # As if it had been trained on a model with more blocks.
    more = {
        name.replace("blocks.0.", "blocks.7."): tensor.clone()
        for name, tensor in tensors.items()
        if "blocks.0." in name
    }
    (tmp_path / "partial").mkdir()
    save_file({**tensors, **more}, tmp_path / "partial" / LORA_WEIGHT_NAME_SAFE)
    few = {"num_prompts": 1, "num_images_per_prompt": 1, "lora": [tmp_path / "partial"]}
    folder, layers = arguments["output_dir"], len(tensors) // 2
    told = f"partial: only {layers} of its {layers + len(more) // 2} layers fit StableDiffusion3Pipeline."
    # The second run loads no LoRA.
    for _ in range(2):
        script.main(command_line(arguments, **few))
        captured = capsys.readouterr()
        assert told in captured.err and f"- {told}" in captured.out
        assert f"- {told}" in (folder / "table.md").read_text() and told in (folder / "report.html").read_text()


def test_an_evaluation_without_any_score_is_an_error(
    script: ModuleType, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "silent_reward.py").write_text(
        "def make_reward():\n    return lambda images, prompts: images.flatten(1).mean(1) * float('nan')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    few = {"num_prompts": 1, "num_images_per_prompt": 1}
    message = "got none of any reward; see scores.parquet. silent_reward:make_reward: no image has a score in all"
    with pytest.raises(ValueError, match=message):
        script.main(command_line(arguments, **few, rewards="silent_reward:make_reward"))
    assert scores_of(arguments["output_dir"], "one", "seed")
    # With another reward, this one is left out.
    other = {"rewards": "toy_reward:make_reward,silent_reward:make_reward", "output_dir": tmp_path / "other"}
    script.main(command_line(arguments, **few, **other))
    text = (tmp_path / "other" / "table.md").read_text()
    assert "- silent_reward:make_reward: no image has a score in all models; it is left out of the tables." in text


def test_a_folder_that_goes_away_ends_the_evaluation_and_is_not_made_again(
    script: ModuleType, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, moved = arguments["output_dir"], tmp_path / "moved"
    (tmp_path / "moving_reward.py").write_text(
        "import pathlib\n\n\ndef make_reward():\n    def score(images, prompts):\n"
        f"        pathlib.Path({str(folder)!r}).rename({str(moved)!r})\n"
        "        return images.flatten(1).mean(1)\n\n    return score\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="removed or renamed while the evaluation ran. Move it back"):
        script.main(command_line(arguments, rewards="moving_reward:make_reward"))
    assert moved.is_dir() and not folder.exists() and not list(moved.rglob("*.png"))


# Other pipelines.


@pytest.mark.parametrize(
    ("build", "component", "size"),
    [
        (tiny_ovis_image_pipeline, "transformer", {"pipeline_arguments": {"max_sequence_length": 136}}),
        (
            tiny_wan_22_pipeline,
            "transformer_2",
            {"height": 16, "width": 16, "num_frames": 5, "pipeline_arguments": {"max_sequence_length": 16}},
        ),
    ],
)
def test_loras_that_no_pipeline_loads(
    script: ModuleType,
    arguments: dict[str, Any],
    tmp_path: Path,
    build: Callable[[], DiffusionPipeline],
    component: str,
    size: dict[str, Any],
) -> None:
    pipe = build()
    pipe.save_pretrained(tmp_path / "base")
    transformer = getattr(pipe, component)
    add_random_lora(SimpleNamespace(transformer=transformer), 2, torch.Generator().manual_seed(0))
    if component == "transformer":
        transformer.save_lora_adapter(tmp_path / "lora", weight_name=LORA_WEIGHT_NAME_SAFE)
    else:
        # As train_flowbp.py saves them.
        StableDiffusion3Pipeline.save_lora_weights(
            tmp_path / "lora",
            transformer_lora_layers=get_peft_model_state_dict(transformer),
            **_collate_lora_metadata({"transformer": transformer}),
        )
    changes = {"pretrained_model_name_or_path": tmp_path / "base", "lora": [tmp_path / "lora"], "lora_scale": [0, 1]}
    few = {"num_images_per_prompt": 1, "num_prompts": 1}
    script.main(command_line(arguments, **changes, **few, **size, lora_component=component))
    folder = arguments["output_dir"]
    assert scores_of(folder, "lora × 0") == scores_of(folder, "base") != scores_of(folder, "lora × 1")


def test_videos_are_scored_whole_and_by_chosen_frames(
    script: ModuleType, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_wan_pipeline()
    pipe.save_pretrained(tmp_path / "wan")
    save_random_lora(pipe, tmp_path / "lora", seed=0)
    changes = {"pretrained_model_name_or_path": tmp_path / "wan", "lora": [tmp_path / "lora"]}
    size = {"height": 16, "width": 16, "num_frames": 5, "num_images_per_prompt": 1, "num_prompts": 1}
    rewards, drawn = ["toy_reward:make_reward", "toy_reward:Motion"], []
    monkeypatch.setattr(script, "to_pil", lambda images: drawn.append(images) or to_pil(images))
    arguments |= {**changes, **size, "rewards": ",".join(rewards), "pipeline_arguments": {"max_sequence_length": 16}}
    script.main(command_line(arguments, reward_frames=2))
    folder, (base, _) = arguments["output_dir"], drawn
    assert scores_of(folder, "base") != scores_of(folder, "lora")
    expected = [make_reward()(base[0, [0, 4]], ["", ""]).mean(), Motion()(base, [""])]
    assert [scores_of(folder, "base", name) for name in rewards] == [[pytest.approx(float(one))] for one in expected]
    with pytest.raises(ValueError, match="with reward_frames 2, got 3; choose another folder"):
        script.main(command_line(arguments, reward_frames=3))
    with Image.open(folder / scores_of(folder, "base", "image")[0]) as image:
        assert image.size == (16, 16)


def test_scores_of_frames_are_averaged_and_checked() -> None:
    videos = torch.rand(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def reward(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return images.mean((1, 2, 3)) + torch.tensor([float(prompt) for prompt in prompts])

    found = scores_by_reward(reward, ["x"], videos, ["10", "20"], {})["x"]
    assert found == pytest.approx((videos.mean((1, 2, 3, 4)) + torch.tensor([10.0, 20.0])).tolist())
    for none in (math.nan, math.inf, -math.inf):
        answer = torch.tensor([1.0, none])
        unanswered = scores_by_reward(lambda images, prompts, answer=answer: answer, ["x"], videos[:, 0], ["", ""], {})
        assert unanswered["x"][0] == 1.0 and math.isnan(unanswered["x"][1])
    with pytest.raises(ValueError, match=r"in \[0, 1\].*from 0.00 to 2.00"):
        scores_by_reward(reward, ["x"], torch.tensor([0.0, 2.0]).expand(1, 3, 2, 2), ["0"], {})


def test_images_that_are_not_finite_have_no_scores_and_rewards_do_not_see_them() -> None:
    seen = []

    def reward(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        assert images.isfinite().all() and len(images) == len(prompts)
        seen.extend(prompts)
        return images.mean((1, 2, 3))

    images = torch.full((3, 3, 2, 2), 0.5)
    images[0, 0, 0, 0], images[2, 1] = math.nan, math.inf
    found = scores_by_reward(reward, ["x"], images, ["a", "b", "c"], {})["x"]
    assert found[1] == 0.5 and math.isnan(found[0]) and math.isnan(found[2]) and seen == ["b"]
    found = scores_by_reward(reward, ["x", "y"], images[:1], ["a"], {})
    assert math.isnan(found["x"][0]) and math.isnan(found["y"][0]) and seen == ["b"]
    assert are_finite(images).tolist() == [False, True, False]


def test_geneval_has_a_table_of_its_tasks(script: ModuleType, arguments: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="GenEval's detector needs scipy, which the extra geneval installs")
    clip, tokenizer = tiny_clip()
    tiny_detector().save_pretrained(tmp_path / "geneval" / "detector")
    clip.save_pretrained(tmp_path / "geneval" / "clip")
    tokenizer.save_pretrained(tmp_path / "geneval" / "clip")
    metadata = tmp_path / "evaluation_metadata.jsonl"
    # Not in the order of the benchmark's table.
    chosen = [entry for tag in ("colors", "single_object") for entry in GENEVAL_METADATA if entry["tag"] == tag]
    metadata.write_text("".join(json.dumps(entry) + "\n" for entry in chosen))
    changes = {"prompts": metadata, "rewards": "toy_reward:make_reward,geneval", "num_images_per_prompt": 1}
    script.main(command_line(arguments, **changes, reward_model_path=[f"geneval={tmp_path / 'geneval'}"]))
    table = (arguments["output_dir"] / "table.md").read_text()
    (by_task,) = re.findall(r"GenEval by group, %\n\n(.*?)\n", table)
    heads = [cell.strip() for cell in by_task.strip("|").split("|")]
    assert heads == ["", "single_object", "colors", "overall"] and table.count("by group") == 1
    assert set(scores_of(arguments["output_dir"], "base", "geneval")) <= {0.0, 1.0}
    assert scores_of(arguments["output_dir"], "one", "group") == [entry["tag"] for entry in chosen]


COLUMNS = """
def make():
    def reward(images, prompts, tag, when=None):
        assert [text[0] for text in tag] == [prompt[0] for prompt in prompts]
        return images.flatten(1).mean(1) + len(tag)
    return reward
"""


def test_rewards_get_the_columns_of_the_table(
    script: ModuleType, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reward_of_columns.py").write_text(COLUMNS)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "table.json").write_text('[{"Prompt": "a fox", "tag": "a"}, {"Prompt": "b fox", "tag": "b"}]')
    rewards = "toy_reward:make_held_out_reward,reward_of_columns:make"
    with pytest.warns(UserWarning, match="the column 'Prompt' of"):
        script.main(command_line(arguments, rewards=rewards, prompts=tmp_path / "table.json"))
    plain, of_columns = (scores_of(arguments["output_dir"], "one", name) for name in rewards.split(","))
    assert of_columns == pytest.approx([score + 4 for score in plain])
    (tmp_path / "table.json").write_text('["a fox", "b fox"]')
    arguments = {**arguments, "output_dir": tmp_path / "other"}
    with pytest.raises(ValueError, match="'reward_of_columns:make': its parameter 'tag' needs a column"):
        script.main(command_line(arguments, rewards="reward_of_columns:make", prompts=tmp_path / "table.json"))


# Refusals.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": "osr"}, "the nearest is 'ocr'"),
        ({"rewards": "ocr:0.5,ocr-v5"}, "names without weights"),
        ({"reward_text_column": "tag"}, "expected options among none"),
        ({"rewards": "geneval"}, "line 1: expected an entry of GenEval's metadata"),
        ({"reward_model_path": ["clip"]}, "expected NAME=FOLDER"),
        ({"reward_model_path": ["clip=here"]}, "expected model paths of none of its parts"),
        ({"lora": ["nowhere/at/all"]}, "no such file or folder"),
        ({"transformer": ["user/nothing"]}, "the Hub cannot be reached (offline?); check the name"),
        ({"prompts": "none.txt"}, "no file 'none.txt'"),
        ({"prompt_column": "caption"}, "no column 'caption'"),
        ({"group_column": "colour"}, "no column 'colour'"),
        ({"base_for_last": [-1]}, "--base_for_last must be at least 0"),
        ({"lora_scale": ["inf"]}, "--lora_scale must be finite"),
        ({"num_images_per_prompt": 0}, "--num_images_per_prompt must be at least 1"),
        ({"pipeline_arguments": {"true_cfg": 1}}, "takes no argument true_cfg here"),
        (
            {"pipeline_columns": ["image=source"]},
            "StableDiffusion3Pipeline takes no argument image",
        ),
        ({"pipeline_columns": ["ip_adapter_image=source"]}, "no image in column 'source'"),
        ({"pipeline_arguments": "[1]"}, "a JSON object expected"),
        ({"num_frames": 5}, "takes no argument num_frames here"),
        ({"reward_frames": 5}, "--reward_frames 5: StableDiffusion3Pipeline makes images, not videos"),
        ({"lora_component": "unet"}, "StableDiffusion3Pipeline has transformer."),
        ({"lora_component": "vae"}, "StableDiffusion3Pipeline has transformer."),
        ({"steps": 4}, "unknown argument --steps"),
        ({"quantization_config_path": "none.json"}, "--quantization_config_path none.json: FileNotFoundError"),
        (
            {"transformer": ["x"], "quantization_config_path": "none.json"},
            "--transformer: trained weights are not quantised",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_is_loaded(
    arguments: dict[str, Any], changes: dict[str, Any], message: str, check_refusal: CheckRefusal
) -> None:
    check_refusal(NAME, {**arguments, **changes}, message)


def test_a_folder_in_use_or_of_other_settings_and_a_lora_of_another_model_are_refused(
    script: ModuleType, models: dict[str, Path], arguments: dict[str, Any], tmp_path: Path
) -> None:
    few = {"num_prompts": 1, "num_images_per_prompt": 1}
    other = OutputFolder(arguments["output_dir"])
    other.claim(is_resumed=True, overwrite=False)
    with pytest.raises(ValueError, match="another run writes into this folder"):
        script.main(command_line(arguments, **few))
    other.release()
    assert not arguments["output_dir"].exists()
    script.main(command_line(arguments, **few))
    with pytest.raises(ValueError, match="with seed 0, got 1; choose another folder"):
        script.main(command_line(arguments, **few, seed=1))
    pipe = tiny_wan_pipeline()
    save_random_lora(pipe, tmp_path / "other", seed=0)
    with pytest.raises(ValueError, match="--lora .*other: does not fit StableDiffusion3Pipeline"):
        script.main(command_line(arguments, **few, lora=[tmp_path / "other"]))
    encoder = {f"text_encoder.x.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(encoder, tmp_path / "other" / LORA_WEIGHT_NAME_SAFE)
    with pytest.raises(ValueError, match="--lora .*other: (does not fit|has no layer)"):
        script.main(command_line(arguments, **few, lora=[tmp_path / "other"]))


def test_what_changes_behind_a_name_is_another_evaluation(
    script: ModuleType,
    models: dict[str, Path],
    arguments: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A repository of the Hub, or the file of a reward; scores of both kinds would be in one table."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.syspath_prepend(tmp_path)
    reward = tmp_path / "own_reward.py"
    reward.write_text("from toy_reward import make_reward\ndef make_own():\n    return make_reward()\n")
    names = {"pretrained_model_name_or_path": "user/base", "lora": "user/lora", "rewards": "own_reward:make_own"}

    def seen() -> dict[str, Any]:
        plan = script.make_plan(script.parse_config(command_line(arguments, **names)))
        return {**plan.settings(torch.device("cpu")), "models": [asdict(model) for model in plan.models]}

    put_into_cache(tmp_path / "hub", "base", models["base"], "0" * 40)
    put_into_cache(tmp_path / "hub", "lora", models["one"], "0" * 40)
    before = seen()
    assert seen() == before
    for change, differing in (
        (lambda: put_into_cache(tmp_path / "hub", "base", models["base"], "1" * 40), "commit"),
        (lambda: put_into_cache(tmp_path / "hub", "lora", models["two"], "1" * 40), "models"),
        (lambda: reward.write_text(reward.read_text() + "# changed\n"), "reward_code"),
    ):
        change()
        now = seen()
        assert {name for name in now if now[name] != before[name]} == {differing}
        before = now


def test_a_quantised_base(
    script: ModuleType, models: dict[str, Path], arguments: dict[str, Any], tmp_path: Path
) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="see test_a_quantised_base of the training")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    path = tmp_path / "int8.json"
    path.write_text(json.dumps(config.to_dict()))
    changes = {"quantization_config_path": path, "mixed_precision": "bf16", "batch_size": 6}
    script.main(command_line(arguments, **changes))
    folder = arguments["output_dir"]
    lines = [
        line for line in pyarrow.parquet.read_table(folder / "scores.parquet").to_pylist() if line["model"] == "one"
    ]
    pipe = StableDiffusion3Pipeline.from_pretrained(
        models["base"],
        text_encoder_3=None,
        tokenizer_3=None,
        dtype=torch.bfloat16,
        quantization_config=PipelineQuantizationConfig(quant_mapping={"transformer": config}),
    )
    pipe.load_lora_weights(models["one"])
    expected = images_of(pipe, [line["prompt"] for line in lines], [line["seed"] for line in lines])
    drawn = [Image.open(folder / line["image"]) for line in lines]
    assert [image.tobytes() for image in drawn] == [image.tobytes() for image in expected]
    del changes["quantization_config_path"]
    with pytest.raises(ValueError, match="choose another folder"):
        script.main(command_line(arguments, **changes))


# The demo.


def test_the_demo_s_table_by_this_script(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    pipeline = ROOT / "demo" / "pipeline"
    save_random_lora(load_pipeline(pipeline), tmp_path, seed=0)
    paths = ["--pretrained_model_name_or_path", str(pipeline), "--output_dir"]
    six = [*paths, str(tmp_path), "--eval_prompts", str(ROOT / "demo" / "prompts_eval.txt"), "--num_eval_prompts", "6"]
    evaluation = str(ROOT / "demo" / "evaluation.yaml")
    importlib.import_module("evaluate").main(["--config", evaluation, *six, "--eval_batch_size", "4"])
    expected = json.loads((tmp_path / "evaluation.json").read_text())["rows"]

    config = str(ROOT / "demo" / "evaluate_flowbp.yaml")
    same = [*paths, str(tmp_path / "run"), "--prompts", str(ROOT / "demo" / "prompts_eval.txt"), "--num_prompts", "6"]
    script.main(["--config", config, *same, "--batch_size", "4", "--lora", f"aligned={tmp_path}"])
    records = json.loads((tmp_path / "run" / "table.json").read_text())["records"]
    assert len(records) == 2 * len(expected) == 8
    for row, base, aligned in zip(expected, records[::2], records[1::2], strict=True):
        found = {"base": base["score"], "aligned": aligned["score"], "change": aligned["change"]}
        assert {name: {**row[name], "over": "prompts"} for name in found} == found
    # The random LoRA changed what is compared.
    assert records[1]["change"]["mean"] != 0


# Transformers of which all weights were trained.


def save_transformer(folder: Path, seed: int = 0) -> Path:
    """A tiny Stable Diffusion 3's transformer with other weights, in shards, as a run with --train full leaves it."""
    transformer = tiny_sd3_pipeline(torch.float32).transformer
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    transformer.save_pretrained(folder / "transformer", max_shard_size="60KB")
    return folder


def test_transformers_beside_loras_are_what_users_get(
    script: ModuleType, models: dict[str, Path], arguments: dict[str, Any], tmp_path: Path
) -> None:
    """Each is loaded in place of another, and the base comes back: a LoRA's weights lie around the base's."""
    full = [save_transformer(tmp_path / name, seed) for seed, name in enumerate(("a", "b"))]
    given = [f"a={full[0]}", str(full[1] / "transformer")]
    script.main(command_line(arguments, transformer=given, num_prompts=2, num_images_per_prompt=1, batch_size=1))
    lines = pyarrow.parquet.read_table(arguments["output_dir"] / "scores.parquet").to_pylist()
    names = [line["model"] for line in lines[::2]]
    assert names == ["base", "one", "a", "transformer"]
    for name, source in zip(names, (None, models["one"], *full), strict=True):
        pipe = load_pipeline(models["base"])
        if name == "one":
            pipe.load_lora_weights(source)
        elif source is not None:
            pipe.transformer = type(pipe.transformer).from_pretrained(source, subfolder="transformer")
        for line in [line for line in lines if line["model"] == name]:
            (image,) = images_of(pipe, [line["prompt"]], [line["seed"]])
            drawn = Image.open(arguments["output_dir"] / line["image"])
            assert image.tobytes() == drawn.tobytes(), line["model"]
    # The same name with other weights is another model, and with the same ones elsewhere it is not.
    again = command_line(arguments, num_prompts=2, num_images_per_prompt=1, batch_size=1, transformer=[f"a={full[1]}"])
    with pytest.raises(ValueError, match="holds another model named 'a'"):
        script.main(again)
    moved = full[0].rename(tmp_path / "moved")
    kept = command_line(arguments, num_prompts=2, num_images_per_prompt=1, batch_size=1, transformer=[f"a={moved}"])
    script.main(kept)


def test_switching_transformers_puts_the_base_back(tmp_path: Path) -> None:
    pipe = tiny_sd3_pipeline(torch.bfloat16)
    add_random_lora(pipe, 3, torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    trained, source = Transformers(pipe, "transformer"), str(save_transformer(tmp_path / "a"))
    trained.use(source)
    expected = type(pipe.transformer).from_pretrained(source, subfolder="transformer", dtype=torch.bfloat16)
    now = {name.replace(".base_layer.", "."): tensor for name, tensor in pipe.transformer.state_dict().items()}
    assert all(torch.equal(tensor, now[name]) for name, tensor in expected.state_dict().items())
    assert any(not torch.equal(before[name], tensor) for name, tensor in pipe.transformer.state_dict().items())
    trained.use(None)
    assert all(torch.equal(before[name], tensor) for name, tensor in pipe.transformer.state_dict().items())


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: change_config(folder, _class_name="FluxTransformer2DModel"),
            "expected a SD3Transformer2DModel",
        ),
        (lambda folder: change_config(folder, num_layers=3), "expected num_layers 2"),
        (lambda folder: next(folder.glob("*/*00001-of*")).unlink(), "not whole"),
        (lambda folder: next(folder.glob("*/*00001-of*")).write_bytes(b"\x80\x04K\x01."), "not whole"),
        (lambda folder: save_file({}, next(folder.glob("*/*00001-of*"))), "expected the tensors of the base's"),
        (lambda folder: (folder / "transformer" / "config.json").unlink(), "got no config.json"),
    ],
)
def test_transformers_that_are_refused(
    arguments: dict[str, Any],
    tmp_path: Path,
    damage: Callable[[Path], object],
    message: str,
    check_refusal: CheckRefusal,
) -> None:
    damage(save_transformer(tmp_path / "a"))
    check_refusal(NAME, {**arguments, "transformer": [tmp_path / "a"]}, message)
