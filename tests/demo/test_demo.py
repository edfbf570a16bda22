# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The demo's parts on the bundled pipeline: the training script with every method, and the evaluation."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flowbp import METHODS

ROOT = Path(__file__).parents[2]
FOLDERS = ("training", "demo")


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    """The scripts as modules; they find each other as when they are run from their folders."""
    before = list(sys.path)
    sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]
    try:
        return {name: importlib.import_module(name) for name in ("train_flowbp_sd3", "evaluate")}
    finally:
        sys.path[:] = before


def train(script: ModuleType, output: Path, *more: str) -> dict[str, torch.Tensor]:
    """Two small updates on the demo's own recipe; returns the saved LoRA."""
    recipe = ROOT / "demo" / "recipe.yaml"
    small = "--max_train_steps 2 --train_batch_size 2 --num_inference_steps 5 --lr_warmup_steps 0 --report_to none"
    # Rewards are below 0, so that no sample is beyond this clip.
    more = (*more, "--reward_clip", "5")
    paths = ["--pretrained_model_name_or_path", str(ROOT / "demo" / "pipeline")]
    paths += ["--prompts", str(ROOT / "demo" / "prompts_train.txt"), "--output_dir", str(output)]
    prompt = ["--validation_prompt", 'the text "42" in red on a yellow background']
    script.main(["--config", str(recipe), *paths, *prompt, *small.split(), *more])
    return load_file(output / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_the_bundled_pipeline(method: str, modules: dict[str, ModuleType], tmp_path: Path) -> None:
    options = {"refl": ["--last_n", "3"], "drtune": ["--num_active", "2"]}.get(method, [])
    lora = train(modules["train_flowbp_sd3"], tmp_path, "--method", method, *options)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["gradient_norm"] > 0 for row in rows)
    # The B matrices start at zero, so they show that the optimizer got a gradient.
    assert all(bool((tensor != 0).any()) for name, tensor in lora.items() if "lora_B" in name and ".ff." in name)


def test_the_evaluation_compares_base_and_lora_on_the_same_noise(
    modules: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(modules["train_flowbp_sd3"], tmp_path)
    settings = yaml.safe_load((ROOT / "demo" / "evaluation.yaml").read_text())
    settings |= {
        "pretrained_model_name_or_path": str(ROOT / "demo" / "pipeline"),
        "eval_prompts": str(ROOT / "demo" / "prompts_eval.txt"),
        "num_eval_prompts": 6,
    }
    config = tmp_path / "evaluation.yaml"
    config.write_text(yaml.safe_dump(settings))
    capsys.readouterr()
    modules["evaluate"].main(["--config", str(config), "--output_dir", str(tmp_path), "--eval_batch_size", "4"])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["prompts"] == 6
    assert [row["measure"] for row in report["rows"]] == list(modules["evaluate"].MEASURES)
    reward = report["rows"][0]
    assert reward["base"]["mean"] != reward["aligned"]["mean"]
    assert reward["change"]["mean"] == pytest.approx(reward["aligned"]["mean"] - reward["base"]["mean"])
    assert "held-out judge" in printed and "6 held-out prompts" in printed


def test_interval_covers_the_mean_of_a_known_distribution(modules: dict[str, ModuleType]) -> None:
    interval = modules["evaluate"].interval
    values = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
    low, high = interval(values)
    half = 1.96 * values.std().item() / 20
    assert low == pytest.approx(values.mean().item() - half, abs=0.02)
    assert high == pytest.approx(values.mean().item() + half, abs=0.02)
    assert interval(torch.ones(5, dtype=torch.float64)) == (1.0, 1.0)


def test_recipe_and_evaluation_use_the_same_rollout() -> None:
    recipe = yaml.safe_load((ROOT / "demo" / "recipe.yaml").read_text())
    evaluation = yaml.safe_load((ROOT / "demo" / "evaluation.yaml").read_text())
    shared = "pretrained_model_name_or_path resolution num_inference_steps guidance_scale max_sequence_length".split()
    assert {name: recipe[name] for name in shared} == {name: evaluation[name] for name in shared}


def test_prompts_of_training_and_evaluation_are_disjoint() -> None:
    training = set((ROOT / "demo" / "prompts_train.txt").read_text().splitlines())
    held_out = (ROOT / "demo" / "prompts_eval.txt").read_text().splitlines()
    assert len(set(held_out)) == len(held_out) >= 256
    assert not training & set(held_out)
    # Not only the prompts: the texts themselves are new.
    assert not {line.split('"')[1] for line in training} & {line.split('"')[1] for line in held_out}


def test_the_bundled_weights_are_small_and_safe() -> None:
    files = [path for path in (ROOT / "demo" / "pipeline").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors"}
