# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Seeds, the LoRA, quantisation configs, stages and processes."""

import argparse
from pathlib import Path

import pytest
import torch
from tiny_sd3 import tiny_sd3_pipeline

from flowbp.training.model import add_lora, load_quantization_config, missing_components
from flowbp.training.seeds import derive_seed, make_generator
from flowbp.training.setup import make_accelerator
from flowbp.training.stages import StageMeter


def test_seeds_are_distinct():
    seeds = {
        derive_seed(purpose, seed, update, part, rank)
        for purpose in ("noise", "surrogate", "copies", "reward")
        for seed in range(4)
        for update in range(40)
        for part in range(4)
        for rank in range(4)
    }
    assert len(seeds) == 4 * 4 * 40 * 4 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed("noise", 1, 11) != derive_seed("noise", 11, 1)


def test_seeds_never_change():
    # A resumed run draws what the first one would have drawn, so these are part of the checkpoint format.
    assert derive_seed("noise", 0, 0) == 828296919176696148
    assert derive_seed("lora", 7) == 9111166230886480329


def test_generators_are_the_seed_s():
    first, again = make_generator("noise", 3), make_generator("noise", 3)
    assert torch.equal(torch.randn(4, generator=first), torch.randn(4, generator=again))
    assert first.initial_seed() == derive_seed("noise", 3) and first.device.type == "cpu"


def test_missing_components():
    config = {
        "_class_name": "StableDiffusion3Pipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder_3": [None, None],
        "tokenizer_3": [None, None],
    }
    assert missing_components(config) == {"text_encoder_3": None, "tokenizer_3": None}


# The LoRA.


def lora_arguments(**changes: object) -> argparse.Namespace:
    values = {"rank": 3, "lora_alpha": 6, "lora_layers": "attn.to_q, attn.to_out.0", "seed": 1}
    return argparse.Namespace(**{**values, **changes})


def test_the_lora_is_float32_on_a_frozen_model_of_another_dtype():
    transformer = tiny_sd3_pipeline(torch.bfloat16).transformer.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in transformer.named_parameters()}
    parameters = add_lora(transformer, lora_arguments())
    named = dict(transformer.named_parameters())
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    assert [id(parameter) for parameter in parameters] == [id(parameter) for parameter in trained.values()]
    # Two blocks, two layers of each, two matrices of each.
    assert len(trained) == 8 and all(".attn.to_" in name and ".lora_" in name for name in trained)
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    assert all(parameter.abs().max() == 0 for name, parameter in trained.items() if "lora_B" in name)
    frozen = {name.replace(".base_layer", ""): value for name, value in named.items() if name not in trained}
    assert frozen.keys() == before.keys()
    assert all(value.dtype == torch.bfloat16 and torch.equal(value, before[name]) for name, value in frozen.items())
    assert all(layer.scaling["default"] == 2 for layer in transformer.modules() if hasattr(layer, "scaling"))


def test_the_lora_s_start_is_the_seed_s():
    def start(seed: int) -> list[torch.Tensor]:
        transformer = tiny_sd3_pipeline(torch.float32).transformer.requires_grad_(False)
        torch.rand(7)  # The global generator's state must not matter.
        return add_lora(transformer, lora_arguments(seed=seed))

    first, again, other = start(1), start(1), start(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_layers_that_no_transformer_has_are_refused():
    transformer = tiny_sd3_pipeline(torch.float32).transformer
    with pytest.raises(ValueError, match="to_nowhere"):
        add_lora(transformer, lora_arguments(lora_layers="to_nowhere"))


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


# Pictures and stages.


def test_stages_add_up(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    meter = StageMeter(torch.device("cpu"))
    for stage, seconds in (("rollout", 2), ("rollout", 1), ("sweep", 4), ("rollout", 8), (None, 16), ("sweep", 32)):
        meter.mark(stage)
        now[0] += seconds
    # The last stage has not ended.
    assert meter.seconds == {"rollout": 11, "sweep": 4} and meter.peaks == {}
    lines = meter.table().splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["stage", "seconds", "peak", "GiB"],
        ["rollout", "11.00", "-"],
        ["sweep", "4.00", "-"],
        ["update", "15.00"],
    ]
    assert lines[4].startswith("peak of the whole process, loading included: ")


# Processes.


def run_arguments(folder: Path, **changes: object) -> argparse.Namespace:
    values = {
        "output_dir": folder / "run",
        "logging_dir": "logs",
        "report_to": "none",
        "dry_run": False,
        "allow_tf32": False,
        "hub_model_id": None,
        "push_to_hub": False,
    }
    return argparse.Namespace(**{**values, **changes})


@pytest.mark.parametrize("dry_run", [False, True])
def test_the_output_folder_is_made_unless_nothing_is_to_be_written(tmp_path: Path, dry_run: bool):
    args = run_arguments(tmp_path, dry_run=dry_run)
    accelerator = make_accelerator(args)
    assert args.output_dir.exists() == (not dry_run) and accelerator.num_processes == 1
    assert accelerator.mixed_precision == "no" and args.hub_model_id == "run"


def test_another_number_of_processes_than_were_started_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="expected 2 processes .*accelerate runs 1; on CPUs set ACCELERATE_USE_CPU"):
        make_accelerator(run_arguments(tmp_path))
    assert not (tmp_path / "run").exists()
