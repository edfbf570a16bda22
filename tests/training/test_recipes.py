# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Recipes parse with their script and say what they claim: the paper's settings, or what fits on 24 GB."""

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml

from flowbp import METHODS, get_method
from flowbp.inference import call_arguments
from flowbp.training.backbone import Backbone
from flowbp.training.config import TrainingConfig
from flowbp.training.train_command_line import parse_training_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "training" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
ONE_GPU = [path for path in RECIPES if path.stem.endswith("_24gb")]
# Of pipelines that start from images, by what they are saved as.
FROM_IMAGES = {
    "edit_kontext": "FluxKontextPipeline",
    "edit_qwen_image": "QwenImageEditPlusPipeline",
    "video_wan_i2v": "WanImageToVideoPipeline",
}
PAPER = [path for path in RECIPES if path not in ONE_GPU and path.stem not in FROM_IMAGES]

# Configs of the reference implementation, in its folder configs/final.
CONFIGS = {"sd3": "sd35/sd3_5", "flux": "flux1/flux1", "flux2": "flux2/flux2_klein_base_9b"}
MODELS = {
    "sd3": "stabilityai/stable-diffusion-3.5-medium",
    "flux": "black-forest-labs/FLUX.1-dev",
    "flux2": "black-forest-labs/FLUX.2-klein-base-9B",
}
# Its global batches: train_batch_size x gradient_accumulation_steps x the 8 GPUs of its launch scripts.
OF_64 = {
    *(f"sd3_{row}" for row in "refl drtune leapalign flowbp_sparse flowbp_bridge flowbp_lagrange".split()),
    *("flux_leapalign", "flux_flowbp_bridge", "flux_flowbp_lagrange"),
}

OFF = {
    "tail_ratio": 1.0,
    "max_tail": None,
    "max_gap_j": None,
    "max_gap_0": None,
    "anchor_lambda": 1.0,
    "dirichlet": (2.5, 6.0, 2.0),  # with step_sampling uniform
    "endpoint": "sample",
}


def backbone_of(path: Path) -> str:
    return path.stem.partition("_")[0]


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch):
    """The config of a recipe and further words of the command line, by the recipe's script."""

    def run(path: Path, *words: str) -> TrainingConfig:
        monkeypatch.setattr(sys, "path", [str(ROOT / "training"), *sys.path])
        own = "" if path.stem in FROM_IMAGES else f"_{backbone_of(path)}"
        script = importlib.import_module(f"train_flowbp{own}")
        (backbone,) = (
            value
            for value in vars(script).values()
            if isinstance(value, type) and issubclass(value, Backbone) and value.__module__ == script.__name__
        )
        return parse_training_config(backbone, "", ["--config", str(path), "--prompts", "prompts.txt", *words])

    return run


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


def test_the_recipes() -> None:
    """One for each config of the reference implementation, and one for a GPU of 24 GB."""
    rows = [name.replace("-", "_") for name in METHODS if name not in ("full", "draft-k")]
    assert len(rows) == 7
    assert sorted(names(PAPER)) == sorted(f"{backbone}_{row}" for backbone in CONFIGS for row in rows)
    assert sorted(names(ONE_GPU)) == sorted(f"{backbone}_24gb" for backbone in CONFIGS)
    assert len(RECIPES) == len(PAPER) + len(ONE_GPU) + len(FROM_IMAGES)


@pytest.mark.parametrize("path", PAPER, ids=names(PAPER))
def test_a_recipe_of_the_paper(path: Path) -> None:
    backbone, _, row = path.stem.partition("_")
    content, text = read(path), path.read_text(encoding="utf-8")
    assert f"configs/final/{CONFIGS[backbone]}_{row}.yaml" in text
    assert content["method"] == row.replace("_", "-")
    global_batch = 64 if path.stem in OF_64 else 32
    assert content["train_batch_size"] * content["gradient_accumulation_steps"] == global_batch
    assert f"# Global batch {global_batch}: 8 GPUs x " in text
    expected = {
        "pretrained_model_name_or_path": MODELS[backbone],
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        "num_inference_steps": 25,
        "guidance_scale": 3.5 if backbone == "sd3" else 4.0,
        "resolution": 512,
        "max_sequence_length": 512,
        "learning_rate": 1e-5,
        "adam_weight_decay": 1e-4,
        "max_grad_norm": 1.0,
        "max_train_steps": 300,
        "checkpointing_steps": 100,
        "use_ema": True,
        "ema_decay": 0.995,
        # FLUX pipelines have these sigmas of their own.
        **({"sigmas": "linear"} if backbone == "sd3" else {}),
    }
    assert {name: content.get(name) for name in expected} == expected


@pytest.mark.parametrize("path", PAPER, ids=names(PAPER))
def test_a_recipe_of_the_paper_spells_out_the_defaults_of_its_backbone(path: Path) -> None:
    """test_methods.py compares these defaults with the reference implementation's values."""
    content, backbone = read(path), backbone_of(path)
    method = get_method(content["method"], backbone)
    given = {name: content[name] for name in method.options if name in content}
    assert get_method(content["method"], backbone, **given) == method
    # Left out are only limits that are off and what the reference does not have for the method.
    left_out = {name: value for name, value in method.options.items() if name not in content}
    assert left_out.items() <= OFF.items()
    assert content.get("unconditional_gradient", False) == method.unconditional_gradient
    assert content.get("undo_guidance", False) == method.undo_guidance


@pytest.mark.parametrize("path", PAPER, ids=names(PAPER))
def test_a_recipe_of_the_paper_parses(path: Path, parse: Any) -> None:
    config = parse(path, "--reward", "hpsv2.1", "--reward_clip", "0.55")
    content, method = read(path), get_method(read(path)["method"], backbone_of(path))
    assert config.make_method(backbone_of(path)) == method
    assert config.sizes == ((512, 512),)
    for name in content.keys() - method.options.keys() - {"resolution"}:
        assert getattr(config, name) == content[name], name


@pytest.mark.parametrize("name", FROM_IMAGES)
def test_a_recipe_of_a_pipeline_that_starts_from_images(name: str, parse: Any) -> None:
    """It parses on its own, its call has its arguments, and it says that it was not run."""
    path = FOLDER / f"{name}.yaml"
    config, content, text = parse(path), read(path), path.read_text(encoding="utf-8")
    assert f"--config training/recipes/{name}.yaml" in text and "# Not run on the real weights" in text
    assert config.call_columns == {"image": ("source_image",)} and config.samples_per_call == 1
    config.make_method("sd3").draw(torch.linspace(1, 0, config.num_inference_steps + 1))
    pipeline = getattr(diffusers, FROM_IMAGES[name])
    arguments = {"num_frames": config.num_frames, "guidance_scale": config.guidance_scale, **config.pipeline_arguments}
    assert call_arguments(pipeline, {"height": 1, "width": 1, **arguments, **config.call_columns})
    given = (
        content.keys() - {"resolution", "height", "width", "pipeline_columns"} - (config.method_options or {}).keys()
    )
    assert all(getattr(config, option) == content[option] for option in given)


# Recipes for one GPU.

LETTERS = {
    "C": {"gradient_checkpointing": True, "samples_per_decode": 1},
    "P": {"precompute_prompt_embeds": True},
    "Q": {"quantization_config_path": "nf4.json"},
}
# Names in training/README.md's table and in benchmarks/results/memory_computed.json.
COMPUTED = {
    "sd3": ("SD3.5-M", "sd3.5-medium"),
    "flux": ("FLUX.1-dev", "flux.1-dev"),
    "flux2": ("FLUX.2-Klein 4B base", "flux.2-klein-4b"),
}
GIB = 2**30


@pytest.mark.parametrize("path", ONE_GPU, ids=names(ONE_GPU))
def test_a_recipe_for_24_gb_has_the_switches_that_fit(path: Path) -> None:
    content, (in_table, _) = read(path), COMPUTED[backbone_of(path)]
    table = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
    row = f"| {in_table} | {content['resolution']} | {content['train_batch_size']} | "
    (fewest,) = re.findall(rf"^{re.escape(row)}([CPQ ]+):", table, re.MULTILINE)
    for letter in fewest.split():
        assert LETTERS[letter].items() <= content.items(), letter
    # Quantisation only where nothing else fits.
    assert ("quantization_config_path" in content) == ("Q" in fewest)
    assert (content["mixed_precision"], content["rank"], content["lora_alpha"]) == ("bf16", 16, 16)


@pytest.mark.parametrize("pixels", [512, 1024])
@pytest.mark.parametrize("path", ONE_GPU, ids=names(ONE_GPU))
def test_a_recipe_for_24_gb_has_room_for_its_second_reward(path: Path, pixels: int) -> None:
    """The recipe's comment has the same numbers, for 512 pixels and for 1024."""
    content, (_, model) = read(path), COMPUTED[backbone_of(path)]
    computed = json.loads((ROOT / "benchmarks" / "results" / "memory_computed.json").read_text(encoding="utf-8"))
    switches = {
        "resolution": pixels,
        "train_batch_size": content["train_batch_size"] if pixels == 512 else 1,
        "rank": content["rank"],
        "gradient_checkpointing": content["gradient_checkpointing"],
        "samples_per_decode": content["samples_per_decode"],
        "text_encoders": "precompute",
        "quantization": "nf4" if "quantization_config_path" in content else None,
        "reward": "clip-vit-h",
    }
    (row,) = (row for row in computed["rows"] if row["model"] == model and row["switches"] == switches)
    # Prompts are encoded before the rewards are on the GPU. Both rewards are CLIP ViT-H/14.
    training = max(size for stage, size in row["stages"].items() if stage != "encode") + row["resident"]["reward"]
    peak = max(training, row["stages"]["encode"]) / GIB
    assert peak + computed["margin_gib"] <= computed["gpus_gib"]["24 GB"]
    assert f" {peak:.1f} GiB" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", ONE_GPU, ids=names(ONE_GPU))
def test_a_recipe_for_24_gb_parses_on_its_own(path: Path, parse: Any) -> None:
    config, content = parse(path, "--eval_prompts", "held_out.txt"), read(path)
    method = config.make_method(backbone_of(path))
    assert method == get_method(content["method"], backbone_of(path))
    assert config.sizes == ((512, 512),) and config.select == "best"
    assert {config.reward, config.eval_reward} == {"pickscore", "hpsv2.1"}
    # A clip on one reward's scale would leave another without a gradient.
    assert config.reward_clip is None
    assert config.use_ema and config.learning_rate == 3e-4 and config.checkpointing_minutes == 15
    for name in content.keys() - {"resolution", "quantization_config_path"}:
        assert getattr(config, name) == content[name], name
    if "quantization_config_path" in content:
        # The file beside the recipe, wherever the script was started.
        assert config.quantization_config_path == FOLDER / "nf4.json"


def test_nf4() -> None:
    """The arguments of the README's command, so that the memory computed for its switch Q holds."""
    content = json.loads((FOLDER / "nf4.json").read_text(encoding="utf-8"))
    assert content == {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
