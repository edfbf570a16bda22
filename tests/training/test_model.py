# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The model of a run: its LoRA, quantisation configs, and the processes that it runs in."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sd3 import tiny_sd3_pipeline
from updates_by_hand import make_config

from flowbp.training import TrainingConfig
from flowbp.training.lora import add_lora
from flowbp.training.model import freeze, load_quantization_config, missing_components
from flowbp.training.setup import make_accelerator


def test_missing_components():
    config = {
        "_class_name": "StableDiffusion3Pipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder_3": [None, None],
        "tokenizer_3": [None, None],
    }
    assert missing_components(config) == {"text_encoder_3": None, "tokenizer_3": None}


# The LoRA.


def lora_config(**changes: Any) -> TrainingConfig:
    values = {"rank": 3, "lora_alpha": 6, "lora_layers": "attn.to_q, attn.to_out.0", "seed": 1}
    return make_config(Path("run"), **{**values, **changes})


def trained_of(transformer: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def test_the_lora_is_float32_on_a_frozen_model_of_another_dtype():
    transformer = tiny_sd3_pipeline(torch.bfloat16).transformer.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in transformer.named_parameters()}
    add_lora(transformer, lora_config())
    named, trained = dict(transformer.named_parameters()), trained_of(transformer)
    # Two blocks, two layers of each, two matrices of each.
    assert len(trained) == 8 and all(".attn.to_" in name and ".lora_" in name for name in trained)
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())
    assert all(parameter.abs().max() == 0 for name, parameter in trained.items() if "lora_B" in name)
    frozen = {name.replace(".base_layer", ""): value for name, value in named.items() if name not in trained}
    assert frozen.keys() == before.keys()
    assert all(value.dtype == torch.bfloat16 and torch.equal(value, before[name]) for name, value in frozen.items())
    assert all(layer.scaling["default"] == 2 for layer in transformer.modules() if hasattr(layer, "scaling"))


def test_the_lora_s_start_is_the_seed_s():
    def start(seed: int) -> list[torch.Tensor]:
        transformer = tiny_sd3_pipeline(torch.float32).transformer.requires_grad_(False)
        torch.rand(7)  # The global generator's state must not matter.
        add_lora(transformer, lora_config(seed=seed))
        return list(trained_of(transformer).values())

    first, again, other = start(1), start(1), start(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_layers_that_no_transformer_has_are_refused():
    transformer = tiny_sd3_pipeline(torch.float32).transformer
    with pytest.raises(ValueError, match="--lora_layers to_nowhere: .* Its linear layers are called .*to_q"):
        add_lora(transformer, lora_config(lora_layers="to_nowhere"))


def test_freezing_switches_gradients_and_dropout_off():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    assert freeze(module) is module and not module[1].training
    assert not any(parameter.requires_grad for parameter in module.parameters())


# Quantisation configs.


def test_no_file_is_no_quantisation():
    assert load_quantization_config(None, torch.bfloat16) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "JSONDecodeError"),
        ("[1, 2]", "TypeError"),
        ('{"quant_method": "int3"}', "Unknown quantization type, got int3"),
        ("{}", "Unknown quantization type, got bitsandbytes"),
        ('{"load_in_8bit": true, "load_in_8bits": true}', "unknown load_in_8bits, expected some of .*load_in_8bit"),
        ('{"load_in_8bit": "yes"}', "load_in_8bit must be a boolean"),
        ('{"quant_method": "torchao"}', "torchao|quant_type"),
    ],
)
def test_a_file_that_is_no_quantisation_config_is_refused_in_one_line(
    tmp_path: Path, content: str | None, message: str
):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"--quantization_config_path .*config.json: .*({message})"):
        load_quantization_config(path, torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="bitsandbytes quantises where there is a GPU")
def test_bitsandbytes_without_a_gpu_is_refused_before_a_model_is_loaded(tmp_path: Path):
    path = tmp_path / "int8.json"
    path.write_text('{"load_in_8bit": true}')
    with pytest.raises(ValueError, match="int8.json: RuntimeError: No GPU found"):
        load_quantization_config(path, torch.bfloat16)


# Processes.


def test_the_model_is_cast_by_hand_without_autocast(tmp_path: Path):
    accelerator = make_accelerator(make_config(tmp_path / "run", mixed_precision="fp16"))
    assert accelerator.mixed_precision == "no" and accelerator.num_processes == 1


@pytest.mark.parametrize("allow_tf32", [True, False])
def test_tf32_is_allowed_where_that_is_asked_for(tmp_path: Path, allow_tf32: bool):
    make_accelerator(make_config(tmp_path / "run", allow_tf32=allow_tf32))
    assert torch.backends.cuda.matmul.allow_tf32 == allow_tf32


def test_another_number_of_processes_than_were_started_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="expected 2 processes .*accelerate runs 1; on CPUs set ACCELERATE_USE_CPU"):
        make_accelerator(make_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
