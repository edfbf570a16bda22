# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""LoRA files: what peft would believe without a look is refused in one line; dropout is off in an evaluation."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_sd3 import draw, save_random_lora, tiny_sd3_pipeline

from flowbp.judging.lora_files import check_lora_file
from flowbp.judging.loras import load_loras
from flowbp.judging.models import evaluated_lines

FILE = "pytorch_lora_weights.safetensors"
# In front of a name that does not match, its time doubles with each letter.
ENDLESS = "(([a-z_]+)+)+!"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA as the scripts write it."""
    return save_random_lora(tiny_sd3_pipeline(torch.float32), tmp_path_factory.mktemp("lora"), seed=1) / FILE


def settings_of(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as tensors:
        return json.loads(tensors.metadata()["lora_adapter_metadata"])


def write(folder: Path, tensors: dict[str, torch.Tensor], settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    content = settings if isinstance(settings, str) else json.dumps(settings)
    save_file(tensors, folder / FILE, {"format": "pt", "lora_adapter_metadata": content})
    return folder / FILE


def changed(lora: Path, folder: Path, **settings: Any) -> Path:
    """The LoRA with other settings in its metadata."""
    with_prefix = {f"transformer.{name}": value for name, value in settings.items()}
    return write(folder, load_file(lora), {**settings_of(lora), **with_prefix})


def load(file: Path) -> DiffusionPipeline:
    pipe = tiny_sd3_pipeline(torch.float32)
    load_loras(pipe, evaluated_lines([f"x={file}"], [1.0], [0])[1].models, "transformer")
    return pipe


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank_pattern": {"^transformer_blocks.0.attn.to_q": 2}, "alpha_pattern": {"to_k": 0.5}},
        {"lora_alpha": 0.5, "use_rslora": True, "init_lora_weights": "gaussian", "inference_mode": True},
        {"base_model_name_or_path": "a/b", "peft_version": "0.1", "lora_dropout": 0.5},
    ],
    ids=str,
)
def test_a_plain_lora_is_loaded(lora: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    load(changed(lora, tmp_path, **settings))


def test_a_lora_without_metadata_is_loaded(lora: Path, tmp_path: Path) -> None:
    save_file(load_file(lora), tmp_path / FILE)
    load(tmp_path / FILE)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {ENDLESS: 3}},
        {"alpha_pattern": {ENDLESS: 3}},
        {"target_modules": ENDLESS},
        {"target_modules": ["to_q", ENDLESS]},
        {"exclude_modules": ENDLESS},
        {"layers_pattern": ENDLESS, "layers_to_transform": [1]},
        {"target_modules": [["to_q"]]},
        {"rank_pattern": ["to_q"]},
        {"rank_pattern": {"to_q": [2]}},
        {"r": [2]},
        {"r": 10**9},  # terabytes
        {"r": -2},
        {"r": True},
        {"lora_alpha": "4"},
        {"lora_alpha": math.nan},  # images without an error
        {"use_dora": True},  # the file has no magnitudes: other images
        {"use_dora": [1]},
        {"init_lora_weights": "pissa"},  # changes the base model
        {"init_lora_weights": [True]},
        {"layer_replication": [[0, 2], [0, 2]]},
        {"modules_to_save": ["proj_out"]},
        {"bias": "all"},
        {"unknown": 1},
    ],
    ids=lambda settings: f"{settings!r:.40}",
)
def test_settings_of_no_plain_lora_are_refused(lora: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    file = changed(lora, tmp_path, **settings)
    with pytest.raises(ValueError, match="expected a plain LoRA with finite values, got 'transformer.") as caught:
        evaluated_lines([str(tmp_path)], [1.0], [0])
    assert str(caught.value).startswith(f"--lora {tmp_path}: ") and "\n" not in str(caught.value)
    assert any(name in str(caught.value) for name in settings) and len(str(caught.value)) < 400, file


@pytest.mark.parametrize("content", ["[1]", "3", "{", "[" * 100_000, '{"r": ' + "7" * 9999 + "}"], ids=range(5))
def test_metadata_that_is_no_object_is_refused(lora: Path, tmp_path: Path, content: str) -> None:
    with pytest.raises(ValueError, match="--lora x: expected a ") as caught:
        check_lora_file("x", write(tmp_path, load_file(lora), content))
    assert "\n" not in str(caught.value) and "; use another" in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_values_that_are_not_finite_are_refused(lora: Path, tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(lora).items()}
    name = sorted(tensors)[2]
    file = write(tmp_path, tensors, settings_of(lora))
    check_lora_file("x", file)
    tensors[name].view(-1)[0] = value
    with pytest.raises(ValueError, match=f"--lora x: .* got NaN or infinity in {name}; use another file"):
        check_lora_file("x", write(tmp_path, tensors, settings_of(lora)))


def test_names_of_tensors_that_are_expressions_are_refused(lora: Path, tmp_path: Path) -> None:
    """Without metadata, diffusers makes the patterns of them."""
    tensors = {name.replace("to_q", ENDLESS): tensor for name, tensor in load_file(lora).items()}
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(ValueError, match="got a tensor named 'transformer"):
        check_lora_file("x", tmp_path / FILE)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ValueError, match="--lora x: expected a LoRA in a safetensors file, got .*; use another"):
        check_lora_file("x", tmp_path / FILE)


def test_dropout_of_a_lora_is_off(lora: Path, tmp_path: Path) -> None:
    """peft adds it in training mode, whatever mode the model is in."""
    pipe = load(changed(lora, tmp_path, lora_dropout=0.9))
    assert torch.equal(draw(pipe), draw(pipe)) and torch.equal(draw(pipe), draw(load(lora)))


def test_an_error_of_peft_is_one_of_the_lora(lora: Path, tmp_path: Path) -> None:
    """Of whatever type."""
    file = changed(lora, tmp_path, lora_dropout="much")
    with pytest.raises(ValueError, match=f"--lora {file}: does not fit StableDiffusion3Pipeline: "):
        load(file)
