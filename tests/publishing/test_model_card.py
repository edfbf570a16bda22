# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The model card: what it says, that hostile texts break nothing, and that no path of this machine is in it."""

import ast
import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from diffusers import BitsAndBytesConfig, DiffusionPipeline, PipelineQuantizationConfig, StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import BaseOutput
from families import FAMILIES
from families.family import Family
from huggingface_hub import ModelCard
from loopback_hub import Repository, loopback_hub
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import (
    tiny_flux_pipeline,
    tiny_klein_pipeline,
    tiny_ovis_image_pipeline,
    tiny_wan_22_pipeline,
    tiny_wan_pipeline,
)
from tiny_sd3 import tiny_sd3_pipeline

from flowbp.publishing.card_code import INSTALLED_SCRIPTS
from flowbp.publishing.card_text import code_block, hide_paths, markdown
from flowbp.publishing.model_card import write_card
from flowbp.publishing.published_files import LORA_FILE
from flowbp.publishing.run_info import write_run_json
from flowbp.training.results import bitsandbytes_arguments
from flowbp.videos import makes_videos

ROOT = Path(__file__).parents[2]
HOSTILE = (
    'a "quoted" | pipe, {{ 7 * 7 }} {% raw %} <b>&</b> `code` ``` \\ \n---\nkey: [x]\n# title ünïcödé 猫 \u2028 \x07'
)
CANARY = "hf_canaryOfTheTests0123456789"


def interval(mean: float, half: float) -> dict[str, float]:
    """A mean with its 95 % interval."""
    return {"mean": mean, "low": mean - half, "high": mean + half}


# What a training writes into run.json.
RUN = {
    "format": 3,
    "script": "train_flowbp_sd3.py",
    "command": [
        *("training/train_flowbp_sd3.py", "--config", "training/recipes/sd3_flowbp_lagrange.yaml"),
        *("--reward", "hpsv2.1", "--reward_model_path", "hpsv2.1=/home/alice/weights/hps"),
        *("--prompts=/home/alice/my prompts.txt", "--push_to_hub", "--hub_model_id", "alice/sd35-flowbp"),
        *("--output_dir", "/scratch/alice/sd35-flowbp"),
    ],
    "settings": {
        "pretrained_model_name_or_path": "stabilityai/stable-diffusion-3.5-medium",
        "reward": "hpsv2.1",
        "eval_prompts": "/home/alice/eval.txt",
        "prompts": "/home/alice/my prompts.txt",
        "rank": 16,
        "lora_alpha": 8,
        "mixed_precision": "bf16",
        "resolution": 512,
        "num_inference_steps": 25,
        "guidance_scale": 3.5,
        "max_sequence_length": 256,
        "sigmas": "linear",
        "negative_prompt": "",
        "train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "seed": 0,
        "use_ema": False,
        "ema_decay": 0.995,
        "revision": None,
    },
    "method": {"name": "flowbp-lagrange", "title": "FlowBP-Lagrange", "options": {"order": 3, "alpha": 0.1}},
    "base_model": "stabilityai/stable-diffusion-3.5-medium",
    "pipeline_class": "StableDiffusion3Pipeline",
    "versions": {"flowbp": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.1", "peft": "0.21.2"},
    "git": {"commit": "551a32a0c0ffee", "dirty": True},
    "hardware": {"device": "NVIDIA H200", "processes": 2, "cpu": "EPYC", "cpu_cores": 64, "memory_gib": 512.0},
    "timings": {"started": "", "finished": "", "seconds": 3723.4, "seconds_by_stage": {}},
    "updates": 300,
    "skipped_updates": 0,
    "selected": {"kind": "best", "update": 250},
    "rewards": [
        {
            "name": "hpsv2.1",
            "role": "trained",
            "base": interval(0.281, 0.006),
            "trained": interval(0.331, 0.006),
            "difference": interval(0.05, 0.003),
            "images": 128,
        },
        {
            "name": "pickscore",
            "role": "held out",
            "base": interval(21.3, 0.2),
            "trained": interval(21.1, 0.2),
            "difference": interval(-0.2, 0.11),
            "images": 128,
        },
    ],
    "alarms": [],
    "images": [
        {"prompt": 'the text "42"', "base": "images/0_base.png", "trained": "images/0_trained.png"},
        {"prompt": HOSTILE, "base": "images/1_base.png", "trained": "images/1_trained.png"},
    ],
    "hub_model_id": "alice/sd35-flowbp",
}


def make_run(**changes: Any) -> dict[str, Any]:
    """A copy of `RUN` with these changes."""
    return {**deepcopy(RUN), **changes}


def card_of(folder: Path, images_on_disk: bool = True, **changes: Any) -> ModelCard:
    """The card of a run with these changes, read back as the Hub does."""
    folder.mkdir(exist_ok=True)
    write_run_json(folder / "run.json", make_run(**changes))
    if images_on_disk:
        (folder / "images").mkdir(exist_ok=True)
        for name in ("before_after.png", "images/0_base.png", "images/0_trained.png", "images/1_trained.png"):
            Image.new("RGB", (2, 2)).save(folder / name)
    path = write_card(folder)
    assert path == folder / "README.md"
    return ModelCard.load(path)


def block(card: ModelCard, language: str) -> str:
    """The only code of a language in a card."""
    (found,) = re.findall(rf"^(`{{3,}}){language}\n(.*?)\n\1$", card.text, re.DOTALL | re.MULTILINE)
    return found[1]


def rows_under(card: ModelCard, title: str) -> list[list[str]]:
    """The rows of the first table after a heading; cells are split at bars that are not escaped."""
    part = card.text.partition(f"## {title}\n")[2]
    table = re.search(r"(?:^\|.*\|\n)+", part, re.MULTILINE)[0]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]


def test_metadata(tmp_path: Path) -> None:
    """What the Hub's pages and the gallery are made from."""
    data = card_of(tmp_path).data.to_dict()
    assert data["base_model"] == "stabilityai/stable-diffusion-3.5-medium"
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "text-to-image"
    # No network, so the base's licence is not known.
    assert data["license"] == "other"
    assert {"diffusers", "lora", "flowbp", "flow-matching", "hpsv2.1", "pickscore"} <= set(data["tags"])
    assert data["widget"][0] == {"text": 'the text "42"', "output": {"url": "images/0_trained.png"}}
    (result,) = data["model-index"][0]["results"]
    assert data["model-index"][0]["name"] == "sd35-flowbp" and result["dataset"]["name"] == "eval.txt"
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [
        ("hpsv2.1", 0.331),
        ("pickscore", 21.1),
    ]


def test_hostile_prompts(tmp_path: Path) -> None:
    """A prompt with the marks of YAML, Markdown and Jinja comes back unchanged from the metadata, and does nothing."""
    card = card_of(tmp_path, alarms=[{"name": "x|y", "update": 3, "message": HOSTILE}])
    assert card.data.to_dict()["widget"][1]["text"] == HOSTILE
    assert "49" not in card.text and "{{ 7" not in card.text
    assert "\\{\\{ 7 \\* 7 \\}\\}" in card.text
    # The line of the alarm is one line, and no heading of the prompt's is one of the card's.
    (line,) = [line for line in card.text.splitlines() if line.startswith("- update 3, x\\|y: a ")]
    assert "key: \\[x\\]" in line and "&lt;b&gt;" in line
    headings = re.findall(r"^#+ (.*)$", card.text, re.MULTILINE)
    titles = "Rewards", "Usage", "Method and settings", "Reproduce", "Limitations and safety", "Citation"
    assert headings == ["sd35-flowbp", *titles]


def test_a_hostile_prompt_in_the_commands(tmp_path: Path) -> None:
    """It stays one literal of the Python code and one word of the shell command."""
    images = [{"prompt": HOSTILE, "base": "images/0_base.png", "trained": "images/0_trained.png"}]
    card = card_of(tmp_path, images=images, command=["--validation_prompt", HOSTILE])
    code = ast.parse(block(card, "python"))
    (prompt,) = [node.value.value for node in code.body if ast.unparse(node).startswith("prompt = ")]
    assert prompt == HOSTILE
    words = shlex.split(block(card, "bash"))
    assert words[-2:] == ["--validation_prompt", HOSTILE]


def test_settings_and_names_are_escaped(tmp_path: Path) -> None:
    """Bars, markup and line breaks of settings stay within their cell."""
    run = make_run()
    card = card_of(tmp_path, settings={**run["settings"], "negative_prompt": HOSTILE, "reward": "a|b<i>"})
    long_table = card.text.partition("<summary>All settings</summary>")[2]
    rows = [re.split(r"(?<!\\)\|", line) for line in long_table.splitlines() if line.startswith("|")]
    assert rows and all(len(row) == 4 for row in rows)
    prose = re.sub(r"^(`{3,}).*?^\1$", "", card.text, flags=re.DOTALL | re.MULTILINE)
    assert "All settings" in prose and "<b>" not in prose and "<i>" not in prose
    assert yaml.safe_load(card.content.split("---\n")[1])["library_name"] == "diffusers"


def test_rewards_table(tmp_path: Path) -> None:
    """Base, LoRA and difference with intervals; a reward that fell is shown falling."""
    rows = rows_under(card_of(tmp_path), "Rewards")
    assert rows[0] == ["reward", "role", "images", "base", "LoRA", "difference"]
    assert rows[2] == [
        "hpsv2.1",
        "trained",
        "128",
        "0.2810 [0.2750, 0.2870]",
        "0.3310 [0.3250, 0.3370]",
        "+0.0500 [+0.0470, +0.0530]",
    ]
    assert rows[3][2:] == ["128", "21.30 [21.10, 21.50]", "21.10 [20.90, 21.30]", "-0.20 [-0.31, -0.09]"]


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    """No held-out reward, no images, no rewards at all, numbers that were not finite, no commit."""
    trained = make_run()["rewards"][:1]
    warning = "cannot distinguish an improvement from reward hacking"
    assert warning in card_of(tmp_path / "a", rewards=trained).text
    assert warning not in card_of(tmp_path / "b").text
    settings = {**make_run()["settings"], "eval_prompts": None}
    card = card_of(tmp_path / "e", settings=settings)
    assert (
        "the images of validation prompts (the first of the training's own), with 95 % confidence intervals"
        in card.text
    )
    card = card_of(tmp_path / "f", settings={**settings, "validation_prompt": ["a cat"]})
    assert "the images of validation prompts, with 95 % confidence intervals over prompts.\nBase" in card.text
    assert "the images of eval.txt, with 95 % confidence intervals over prompts.\nBase" in card_of(tmp_path / "g").text
    broken = {"mean": None, "low": None, "high": None}
    card = card_of(tmp_path / "c", rewards=[{**trained[0], "trained": broken, "difference": broken}], git=None)
    assert rows_under(card, "Rewards")[2][4:] == ["– [–, –]", "– [–, –]"] and "model-index" not in card.data.to_dict()
    assert "commit unknown" in card.text
    card = card_of(tmp_path / "d", images_on_disk=False, rewards=[], hub_model_id=None, skipped_updates=2)
    assert "No reward was measured" in card.text and "<Gallery />" not in card.text and "before_after" not in card.text
    assert "widget" not in card.data.to_dict() and "load_lora_weights('d')" in card.text
    assert "not finite: 2." in card.text


def test_selection_and_alarms(tmp_path: Path) -> None:
    """Which LoRA it is, that its number is of the images that it was chosen by, and every alarm."""
    chosen = "chosen by the held-out reward of these same images, so that number is somewhat optimistic."
    card = card_of(tmp_path / "a")
    assert "LoRA of update 250 of 300, the best by the held-out reward." in card.text and chosen in card.text
    assert "raised no alarm" in card.text
    alarms = [{"name": "patterns", "update": 270, "message": "grids"}, {"name": "drop", "update": 9, "message": "low"}]
    card = card_of(tmp_path / "b", selected={"kind": "last", "update": 300}, alarms=alarms)
    assert "LoRA of update 300 of 300, the last one." in card.text and "optimistic" not in card.text
    assert "- update 270, patterns: grids\n- update 9, drop: low\n" in card.text and "no alarm" not in card.text


def test_the_code_to_use(tmp_path: Path) -> None:
    """Dtype and call are those of the training."""
    code = block(card_of(tmp_path), "python")
    assert "from_pretrained('stabilityai/stable-diffusion-3.5-medium', dtype=torch.bfloat16)" in code
    assert "pipe.load_lora_weights('alice/sd35-flowbp')" in code
    (call,) = [
        node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and ast.unparse(node.func) == "pipe"
    ]
    assert not call.args
    assert {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords} == {
        "prompt": "prompt",
        "num_inference_steps": "25",
        "guidance_scale": "3.5",
        "max_sequence_length": "256",
        "height": "512",
        "width": "512",
        "sigmas": "torch.linspace(1, 1 / 25, 25).tolist()",
    }


def test_a_quantised_base(tmp_path: Path) -> None:
    """The code loads it as the training did, or the card says that it loads another one."""
    told = "had a quantised base"
    assert told not in card_of(tmp_path / "a").text
    settings = settings_of(quantization_config_path="nf4.json")
    assert told in card_of(tmp_path / "b", settings=settings).text
    pipe = tiny_sd3_pipeline()
    assert bitsandbytes_arguments(pipe) is None
    # As from_pretrained sets it.
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    pipe.quantization_config = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    card = card_of(tmp_path / "c", settings=settings, bitsandbytes=bitsandbytes_arguments(pipe))
    found: dict[str, Any] = {}
    loading = block(card, "python").partition("pipe = ")[0]
    exec(loading, found)
    assert found["quantized"].to_dict() == config.to_dict() and told not in card.text
    assert "quantization_config=PipelineQuantizationConfig(quant_mapping={'transformer': quantized})" in card.text


@pytest.mark.parametrize(
    ("asked", "first", "names"),
    [
        ({"resolution": [512, 768]}, {"height": "512", "width": "512"}, ["512 x 512", "768 x 768"]),
        ({"height": [480, 512], "width": [832]}, {"height": "480", "width": "832"}, ["480 x 832", "512 x 832"]),
        ({"height": [480], "width": [832]}, {"height": "480", "width": "832"}, ["480 x 832"]),
        ({"height": 480, "width": 832}, {"height": "480", "width": "832"}, ["480 x 832"]),
        ({"height": [480, 512]}, {"height": "480"}, ["height 480", "height 512"]),
        ({}, {}, []),
    ],
)
def test_the_sizes_of_a_run(tmp_path: Path, asked: dict[str, Any], first: dict[str, str], names: list[str]) -> None:
    """The code has the first, the tables name all of them; the option that was not used is null."""
    card = card_of(tmp_path, settings=settings_of(**{"resolution": None, "height": None, "width": None, **asked}))
    code = ast.parse(block(card, "python"))
    keywords = [node for node in ast.walk(code) if isinstance(node, ast.keyword)]
    assert {word.arg: ast.unparse(word.value) for word in keywords if word.arg in ("height", "width")} == first
    summary = dict(rows_under(card, "Method and settings")[2:])
    assert summary.get("image size (height x width)") == (", ".join(names) or None)
    sentence = f"several image sizes (height x width: {', '.join(names)}); the code has the first."
    assert ("several image sizes" in card.text) == (sentence in card.text) == (len(names) > 1)
    for name, value in asked.items():
        assert f"\n| {name} | {', '.join(map(str, value)) if isinstance(value, list) else value} |\n" in card.text


def test_the_code_to_use_a_video_model(tmp_path: Path) -> None:
    """Frames, the scheduler that --flow_shift put in, and the call's further arguments."""
    settings = {
        "height": 480,
        "width": 832,
        "num_frames": 17,
        "num_inference_steps": 20,
        "guidance_scale": None,
        "flow_shift": 5.0,
        "mixed_precision": "no",
        "pipeline_arguments": {"true_cfg_scale": 4.0},
        "reward": "clip",
    }
    card = card_of(tmp_path, settings=settings, pipeline_class="WanPipeline")
    assert card.data.to_dict()["pipeline_tag"] == "text-to-video"
    code = block(card, "python")
    ast.parse(code)
    assert "dtype=torch.float32" in code and "FlowMatchEulerDiscreteScheduler(shift=5.0)" in code
    assert "num_frames=17" in code and "true_cfg_scale=4.0" in code and ").frames[0]" in code
    assert "guidance_scale=" not in code


def test_the_code_to_use_a_model_that_starts_from_images(tmp_path: Path) -> None:
    columns = ["image=source", "mask_image=mask", "video=clip", "reference_images=a,b"]
    card = card_of(tmp_path, settings=settings_of(pipeline_columns=columns), pipeline_class="FluxFillPipeline")
    assert card.data.to_dict()["pipeline_tag"] == "image-to-image"
    assert "First what the images start from, then the base model" in card.text
    code = block(card, "python")
    ast.parse(code)
    assert "from diffusers.utils import load_image, load_video" in code
    for word in (
        "image=load_image('source.png')",
        "mask_image=load_image('mask.png')",
        "video=load_video('clip.mp4')",
        "reference_images=[load_image('a.png'), load_image('b.png')]",
    ):
        assert f"    {word},\n" in code


def test_the_command_has_the_precision_of_accelerate(tmp_path: Path) -> None:
    """`accelerate launch --mixed_precision bf16` is in no word of the script's command."""
    for command, count in ((["train.py", "--config", "x.yaml"], 1), (["train.py", "--mixed_precision=bf16"], 1)):
        card = card_of(tmp_path, command=command, settings=settings_of(mixed_precision="bf16"))
        assert len(re.findall("--mixed_precision.bf16", block(card, "bash"))) == count


def settings_of(**changes: Any) -> dict[str, Any]:
    """The settings of a run of train_flowbp.py."""
    return {"reward": "clip", "num_inference_steps": 2, "mixed_precision": "no", **changes}


def unique(families: list[Family]) -> dict[str, Family]:
    """One family of each pipeline."""
    return {family.pipeline: family for family in families}


@pytest.mark.parametrize("name", unique(FAMILIES))
def test_the_code_fits_every_pipeline(tmp_path: Path, name: str) -> None:
    """Loader, output and task are those of the pipeline's class, where the settings leave frames to the pipeline."""
    pipeline, family = getattr(diffusers, name), unique(FAMILIES)[name]
    card = card_of(tmp_path, images_on_disk=False, images=[], pipeline_class=name, settings=settings_of())
    assert card.data.to_dict()["pipeline_tag"] == card.data.to_dict()["tags"][0] == f"text-to-{family.output}"
    code = block(card, "python")
    has_loader = hasattr(pipeline, "load_lora_weights")
    adapter = f"pipe.transformer.load_lora_adapter('alice/sd35-flowbp', weight_name=\"{LORA_FILE}\")"
    assert ("pipe.load_lora_weights('alice/sd35-flowbp')" in code) == has_loader
    assert (adapter in code) != has_loader
    assert ("`pipe.fuse_lora()`" in card.text) == ("pipe.set_adapters" in card.text) == has_loader
    *_, variable, attribute = re.findall(r"^(?=(\w+) = pipe\()|^\)\.(\w+)(?:\[0\])?$", code, re.MULTILINE)
    assert variable[0] == family.output and makes_videos(pipeline) == (family.output == "video")
    classes = [value for value in vars(inspect.getmodule(pipeline)).values() if inspect.isclass(value)]
    outputs = [value for value in classes if issubclass(value, BaseOutput) and value is not BaseOutput]
    names = [{field.name for field in fields(value)} for value in outputs]
    assert any(attribute[1] in found for found in names)


@pytest.mark.parametrize(
    ("name", "asked", "task", "output"),
    [
        ("WanPipeline", {}, "text-to-video", "frames[0]"),
        ("WanPipeline", {"num_frames": 1}, "text-to-image", "frames[0][0]"),
        ("SanaVideoPipeline", {"pipeline_arguments": {"frames": 9}}, "text-to-video", "frames[0]"),
        ("SanaVideoPipeline", {"pipeline_arguments": {"frames": 1}}, "text-to-image", "frames[0][0]"),
        # Not in diffusers: what was asked for decides.
        ("TheirPipeline", {}, "text-to-image", "images[0]"),
        ("TheirPipeline", {"num_frames": 9}, "text-to-video", "frames[0]"),
        ("utils", {}, "text-to-image", "images[0]"),
    ],
)
def test_images_or_videos(tmp_path: Path, name: str, asked: dict[str, Any], task: str, output: str) -> None:
    """A video model that was asked for one frame makes images, in its own output."""
    card = card_of(tmp_path, pipeline_class=name, settings=settings_of(**asked))
    assert card.data.to_dict()["pipeline_tag"] == task
    code = block(card, "python")
    assert code.endswith(f").{output}") and f"{task.removeprefix('text-to-')} = pipe(" in code
    assert "pipe.load_lora_weights('alice/sd35-flowbp')" in code


def run_code(
    folder: Path, pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], **changes: Any
) -> dict[str, Any]:
    """What the code of a run's card defines, run as a user has it, but for the device. The base is in `base`."""
    changes |= {"base_model": str(folder / "base"), "pipeline_class": type(pipe).__name__, "hub_model_id": None}
    card = card_of(folder / "run", images_on_disk=False, settings=settings, **changes)
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {}
    exec(block(card, "python").replace('"cuda"', '"cpu"'), found)
    return found


@pytest.mark.parametrize(
    ("build", "component", "call"),
    [
        (tiny_ovis_image_pipeline, None, {"height": 8, "width": 8, "max_sequence_length": 136}),
        (tiny_wan_pipeline, "transformer", {"height": 16, "width": 16, "max_sequence_length": 16}),
        (tiny_wan_22_pipeline, "transformer_2", {"height": 16, "width": 16, "num_frames": 1}),
        # The first argument of its call is an image.
        (tiny_klein_pipeline, "transformer", {"height": 8, "width": 8, "max_sequence_length": 16}),
    ],
)
def test_the_code_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    build: Callable[[], DiffusionPipeline],
    component: str | None,
    call: dict[str, Any],
) -> None:
    """As a user has it, but for the device: the LoRA is in its component, and an image or video comes out."""
    pipe, trained = build(), component or "transformer"
    pipe.save_pretrained(tmp_path / "base")
    transformer = getattr(pipe, trained)
    transformer.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_k"]))
    # As the script writes it for every component.
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path / "run",
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        **_collate_lora_metadata({"transformer": transformer}),
    )
    settings = settings_of(lora_component=component, pipeline_arguments=call)
    found = run_code(tmp_path, pipe, monkeypatch, settings)
    loaded = getattr(found["pipe"], trained)
    (config,) = loaded.peft_config.values()
    assert (config.r, config.lora_alpha) == (3, 6)
    tensors = get_peft_model_state_dict(loaded, adapter_name="default_0")
    file = load_file(tmp_path / "run" / LORA_FILE)
    assert {f"transformer.{name}" for name in tensors} == set(file)
    assert all(torch.equal(tensor, file[f"transformer.{name}"]) for name, tensor in tensors.items())
    size = (call["height"], call["width"], 3)
    if type(pipe).__name__ == "WanPipeline":
        expected = size if "num_frames" in call else (81, *size)
        assert found["image" if "num_frames" in call else "video"].shape == expected
    else:
        assert np.asarray(found["image"]).shape == size


FULL = {"train": "full", "rank": None, "lora_alpha": None}


def test_the_card_of_a_full_fine_tuning(tmp_path: Path) -> None:
    """It is a model of its own, and nothing in its card speaks of a LoRA."""
    settings = {**make_run()["settings"], **FULL}
    card = card_of(tmp_path, settings=settings, transformer_class="SD3Transformer2DModel")
    data = card.data.to_dict()
    assert data["base_model_relation"] == "finetune" and "full-finetune" in data["tags"]
    assert "lora" not in card.content.lower()
    assert "All weights of the transformer of [stab" in card.text
    assert "folder `transformer` holds the fine-tuned transformer of update 250 of 300" in card.text
    assert rows_under(card, "Rewards")[0][4] == "fine-tuned transformer"
    assert ["`train`", "full"] in rows_under(card, "Method and settings")
    code = block(card, "python")
    assert "from_pretrained('alice/sd35-flowbp', subfolder=\"transformer\", dtype=torch.bfloat16)" in code


@pytest.mark.parametrize(
    ("build", "component", "call"),
    [
        (lambda: tiny_sd3_pipeline(torch.float32), None, {"height": 8, "width": 8, "max_sequence_length": 16}),
        (tiny_flux_pipeline, None, {"height": 8, "width": 8, "max_sequence_length": 16}),
        (tiny_klein_pipeline, None, {"height": 8, "width": 8, "max_sequence_length": 16}),
        # diffusers ignores the argument transformer_2 of its from_pretrained, which has a default.
        (tiny_wan_22_pipeline, "transformer_2", {"height": 16, "width": 16, "num_frames": 1}),
    ],
)
def test_the_code_of_a_full_fine_tuning_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Callable[[], DiffusionPipeline], component: str, call: Any
) -> None:
    """The trained component has the run's weights, the others the base's."""
    pipe, trained = build(), component or "transformer"
    pipe.save_pretrained(tmp_path / "base")
    transformer = getattr(pipe, trained)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.01)
    transformer.save_pretrained(tmp_path / "run" / "transformer")
    settings = settings_of(**FULL, lora_component=component, pipeline_arguments=call)
    found = run_code(tmp_path, pipe, monkeypatch, settings, transformer_class=type(transformer).__name__)
    for name in {trained, "transformer"}:
        own, loaded = getattr(pipe, name).state_dict(), getattr(found["pipe"], name).state_dict()
        assert own.keys() == loaded.keys() and all(torch.equal(own[key].float(), loaded[key]) for key in own)
    assert found["image"] is not None


def test_the_command_to_reproduce(tmp_path: Path) -> None:
    """The run's own, without what publishes and with paths shortened."""
    command = block(card_of(tmp_path), "bash").replace(" \\\n", " ")
    assert shlex.split(command) == [
        *["accelerate", "launch", "--num_processes", "2", "--mixed_precision", "bf16"],
        *["-m", "flowbp.scripts.train_flowbp_sd3"],
        *["--config", "training/recipes/sd3_flowbp_lagrange.yaml", "--reward", "hpsv2.1"],
        *["--reward_model_path", "hpsv2.1=hps", "--prompts=my prompts.txt", "--output_dir", "sd35-flowbp"],
    ]


def test_the_command_of_every_script(tmp_path: Path) -> None:
    """Ours are modules that pip installs; a script of the user's own is a file."""
    scripts = {path.stem for path in (ROOT / "training").glob("train_*.py")}
    assert scripts == set(INSTALLED_SCRIPTS)
    hardware = {**make_run()["hardware"], "processes": 1}
    started_as = {name: ["-m", f"flowbp.scripts.{name}"] for name in scripts}
    for name, words in {**started_as, "mine": ["mine.py"]}.items():
        script = f"/home/alice/{name}.py"
        card = card_of(tmp_path, script=script, command=[script], hardware=hardware, settings=settings_of())
        assert shlex.split(block(card, "bash")) == ["accelerate", "launch", *words]


@pytest.mark.parametrize("words", [["--resume_from_checkpoint", "latest"], ["--resume_from_checkpoint=latest"]])
def test_a_run_that_was_resumed(tmp_path: Path, words: list[str]) -> None:
    """A fresh folder has no checkpoints, so the command begins at the beginning, and the card says why it may."""
    run = make_run()
    changes = {
        "command": [*run["command"], *words, "--seed", "0"],
        "settings": {**run["settings"], "resume_from_checkpoint": "latest"},
    }
    card, plain = card_of(tmp_path / "a", **changes), card_of(tmp_path / "b")
    command, plain_command = (shlex.split(block(one, "bash").replace(" \\\n", "")) for one in (card, plain))
    assert command == [*plain_command, "--seed", "0"]
    assert "The run was resumed (`resume_from_checkpoint`: latest)." in card.text
    assert "Leave this option out (the command does" in card.text and "was resumed" not in plain.text


def test_a_run_from_python(tmp_path: Path) -> None:
    """It has no command line."""
    settings = settings_of(resume_from_checkpoint="latest")
    card = card_of(tmp_path, script=None, command=None, settings=settings)
    assert "```bash" not in card.text and "Leave this option out: with" in card.text
    assert "\n\nThe run was started from Python, with `flowbp.training.train` and the settings above.\n" in card.text


def test_no_path_of_this_machine(tmp_path: Path) -> None:
    """Neither in metadata nor in text; a local base model is named by its folder alone."""
    base = tmp_path / "secret-place" / "my-base"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (base / "model_index.json").write_text(json.dumps({"text_encoder_3": [None, None], "vae": ["d", "V"]}))
    run = make_run()
    card = card_of(
        tmp_path / "out",
        base_model=str(base),
        settings={**run["settings"], "pretrained_model_name_or_path": str(base)},
        command=["--pretrained_model_name_or_path", str(base)],
        alarms=[{"name": "a", "update": 1, "message": f"see {tmp_path}/out/images, file:///home/alice/x.txt"}],
    )
    for trace in ("secret-place", "/home", "alice/my", "/scratch", str(tmp_path)):
        assert trace not in card.content, trace
    data = card.data.to_dict()
    assert "base_model" not in data and "base_model_relation" not in data and data["license"] == "apache-2.0"
    assert "A LoRA for my-base," in card.text and "from_pretrained('my-base', " in card.text
    assert "text_encoder_3=None" in card.text and "applies: apache-2.0." in card.text


def test_a_local_base_model_with_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks like a Hub id, and is not taken for one."""
    (tmp_path / "private" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = card_of(tmp_path / "out", base_model="private/base", command=["--pretrained=private/base"])
    assert "base_model" not in card.data.to_dict() and "private" not in card.text


def test_the_licence_of_the_base(tmp_path: Path) -> None:
    """Its name comes along; a link into a folder of this machine does not."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: stability\nlicense_link: LICENSE.md\n---\n")
    data = card_of(tmp_path / "a", base_model=str(base)).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "stability") and "license_link" not in data
    (base / "README.md").write_text("---\nlicense: [broken\n---\n")
    card = card_of(tmp_path / "b", base_model=str(base))
    assert card.data.to_dict()["license"] == "other" and "could not be looked up" in card.text


def test_the_licence_of_a_base_on_the_hub(tmp_path: Path) -> None:
    """Its card is asked for, and a relative link is one into its repository."""
    write_run_json(tmp_path / "run.json", make_run(base_model="org/base", images=[]))
    card = "---\nlicense: other\nlicense_name: open\nlicense_link: LICENSE.md\n---\n"
    with loopback_hub() as hub:
        hub.repositories["org/base"] = Repository({"README.md": card.encode()}, ["0" * 40])
        code = "import pathlib, sys\nfrom flowbp.publishing.model_card import write_card\n"
        code += "write_card(pathlib.Path(sys.argv[1]))"
        environment = hub.environment(tmp_path / "home", token=None)
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True, timeout=300)
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "open")
    assert data["license_link"] == "https://huggingface.co/org/base/blob/main/LICENSE.md"
    assert data["base_model"] == "org/base"


def test_a_secret_does_not_reach_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where run.json was edited by hand."""
    monkeypatch.setenv("WANDB_API_KEY", "wandb-canary-1")
    card_of(tmp_path)
    run = make_run(command=["--x", CANARY], images=[])
    run["settings"]["reward"] = "wandb-canary-1"
    (tmp_path / "run.json").write_text(json.dumps(run))
    content = write_card(tmp_path).read_text()
    assert CANARY not in content and "wandb-canary-1" not in content and "redacted" in content


def test_links_are_not_shown_and_not_followed(tmp_path: Path) -> None:
    """An image that is a link is not in the gallery; README.md that is one is replaced."""
    outside = tmp_path / "outside.png"
    Image.new("RGB", (2, 2)).save(outside)
    out = tmp_path / "out"
    card_of(out)
    (out / "images" / "0_trained.png").unlink()
    (out / "images" / "0_trained.png").symlink_to(outside)
    (out / "README.md").unlink()
    target = tmp_path / "target"
    target.write_text("kept")
    (out / "README.md").symlink_to(target)
    card = ModelCard.load(write_card(out))
    assert [item["output"]["url"] for item in card.data.to_dict()["widget"]] == ["images/1_trained.png"]
    assert target.read_text() == "kept" and not (out / "README.md").is_symlink()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/a b/c.txt", "c.txt"),
        ("~/x/y", "y"),
        ("../../x/y.txt", "y.txt"),
        ("C:\\Users\\me\\z.txt", "z.txt"),
        ("--prompts=/home/me/p q.txt", "--prompts=p q.txt"),
        ("name=/data/x/y", "name=y"),
        ("cannot read /home/me/x.txt, sorry", "cannot read x.txt, sorry"),
        ('{"a": "/home/me/x"}', '{"a": "x"}'),
        ("https://huggingface.co/user/name/blob/main/x", None),
        ("stabilityai/stable-diffusion-3.5-medium", None),
        ("training/recipes/x.yaml", None),
        ("a cat and/or a dog w/ a hat, 1/2 and 3/4", None),
        ("my_package.my_module:make_reward", None),
    ],
)
def test_hide_paths(text: str, expected: str | None) -> None:
    """Absolute paths are shortened, also inside texts; ids, addresses and words with slashes stay."""
    assert hide_paths([{"x": text}]) == [{"x": text if expected is None else expected}]


def test_markdown_and_code() -> None:
    """One line without markup, and a fence that the text cannot close."""
    assert markdown("a\n b|*c*") == "a b\\|\\*c\\*"
    assert markdown(["a", 1]) == "a, 1" and markdown({"a": 1}) == '\\{"a": 1\\}'
    assert code_block("python", "x = '````'") == "`````python\nx = '````'\n`````"


def test_no_run_json(tmp_path: Path) -> None:
    """Without the record there is no card."""
    with pytest.raises(FileNotFoundError):
        write_card(tmp_path)
