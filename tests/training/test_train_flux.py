# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The script for FLUX.1, on a tiny pipeline with both text encoders: distilled guidance, and true guidance."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import TorchAoConfig
from tiny_pipelines import tiny_flux_pipeline
from training_scripts import (
    METHOD_OPTIONS,
    SHARED_ARGUMENTS,
    accelerate_launch,
    check_bfloat16_round_trip,
    check_dry_run,
    check_float32_over_bfloat16,
    check_recipe,
    check_refusal,
    check_round_trip,
    check_run,
    command_line,
    load_pipeline,
    load_script,
    lora_of,
    metadata_of,
    recipes_of,
    same,
    watch_pictures,
    watch_runs,
    write_prompts,
)

from flowbp import METHODS

NAME = "train_flowbp_flux"
# What users give the pipeline to get the pictures of the script's validation.
CALL = {"height": 8, "width": 8, "guidance_scale": 4.0, "max_sequence_length": 16}
TRUE_GUIDANCE = {"true_cfg_scale": 3.0, "negative_prompt": "grey"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(NAME)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-flux")
    tiny_flux_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(model: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        **SHARED_ARGUMENTS,
        "pretrained_model_name_or_path": model,
        "prompts": write_prompts(tmp_path),
        "output_dir": tmp_path / "run",
        "resolution": 8,
        "max_sequence_length": 16,
    }


@pytest.mark.parametrize("name", METHODS)
def test_two_updates_with_every_method(
    script: ModuleType, arguments: dict[str, Any], model: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    drawn = watch_pictures(monkeypatch)
    script.main(command_line(arguments, method=name, **METHOD_OPTIONS[name]))
    output = arguments["output_dir"]
    check_run(output)
    assert set(metadata_of(output)["transformer.target_modules"]) == set(script.LORA_LAYERS.split(","))
    check_round_trip(model, lambda pipe: pipe.load_lora_weights(output), drawn, **CALL)


@pytest.mark.parametrize("name", ["full", "draft-lv", "flowbp-bridge", "flowbp-lagrange"])
def test_two_updates_with_true_guidance(
    script: ModuleType, arguments: dict[str, Any], model: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    drawn = watch_pictures(monkeypatch)
    script.main(command_line(arguments, method=name, **METHOD_OPTIONS[name], **TRUE_GUIDANCE))
    output = arguments["output_dir"]
    check_run(output)
    check_round_trip(model, lambda pipe: pipe.load_lora_weights(output), drawn, **CALL, **TRUE_GUIDANCE)


def test_the_negative_prompt_counts_with_true_guidance_only(
    script: ModuleType, arguments: dict[str, Any], tmp_path: Path
):
    loras = {}
    for run, changes in {
        "distilled": {},
        "true": {"true_cfg_scale": 3.0},
        "true, negative": TRUE_GUIDANCE,
    }.items():
        changes = {"method": "draft-k", "output_dir": tmp_path / run, **changes}
        script.main(command_line(arguments, **changes))
        loras[run] = lora_of(tmp_path / run)
    with pytest.raises(SystemExit):  # it would have no effect
        script.main(command_line(arguments, negative_prompt="grey"))
    assert not same(loras["true"], loras["true, negative"]) and not same(loras["true"], loras["distilled"])


def test_lora_and_optimizer_stay_float32_over_a_bfloat16_base(
    script: ModuleType, arguments: dict[str, Any], model: Path, monkeypatch: pytest.MonkeyPatch
):
    runs, drawn = watch_runs(monkeypatch), watch_pictures(monkeypatch)
    script.main(command_line(arguments, mixed_precision="bf16", validation_steps=1, checkpointing_steps=1))
    check_float32_over_bfloat16(runs[0])
    output = arguments["output_dir"]
    check_bfloat16_round_trip(model, output, drawn, **CALL)


def test_dry_run_writes_nothing(
    script: ModuleType, arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    check_dry_run(script, arguments, tmp_path, capsys)


def test_strict_checks_and_changes_nothing(script: ModuleType, arguments: dict[str, Any], tmp_path: Path):
    script.main(command_line(arguments))
    script.main(command_line(arguments, strict=True, output_dir=tmp_path / "strict"))
    assert same(lora_of(arguments["output_dir"]), lora_of(tmp_path / "strict"))


def test_a_quantised_base(
    script: ModuleType, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    quantization = pytest.importorskip(
        "torchao.quantization",
        reason="torchao prints errors at import where its compiled parts do not fit torch, so it is not installed "
        "with the tests (pip install torchao==0.18.0 runs this one); bitsandbytes needs a GPU to quantise",
    )
    config = tmp_path / "int8.json"
    config.write_text(json.dumps(TorchAoConfig(quantization.Int8WeightOnlyConfig()).to_dict()))
    runs = watch_runs(monkeypatch)
    changes = {"quantization_config_path": config, "mixed_precision": "bf16", "gradient_checkpointing": True}
    script.main(command_line(arguments, **changes))
    check_run(arguments["output_dir"])
    quantised = runs[0].transformer.transformer_blocks[0].attn.to_q.base_layer.weight
    assert type(quantised).__name__ == "Int8Tensor"
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in runs[0].parameters)


@pytest.mark.parametrize("method", METHODS)
def test_accelerate_launch(arguments: dict[str, Any], model: Path, method: str):
    output = arguments["output_dir"]
    printed = accelerate_launch(NAME, command_line(arguments, method=method, **METHOD_OPTIONS[method]))
    assert f"LoRA, model card, run.json, before_after.png and reward_curve.png are in {output}" in printed
    check_run(output)
    load_pipeline(model).load_lora_weights(output)


def test_defaults_are_those_of_the_paper(script: ModuleType):
    args = script.parse_args(["--pretrained_model_name_or_path", "m", "--prompts", "p.txt", "--reward", "ocr"])
    found = (args.resolution, args.num_inference_steps, args.guidance_scale, args.true_cfg_scale, args.method)
    assert found == (512, 25, 4.0, 1.0, "flowbp-lagrange")


@pytest.mark.parametrize("recipe", recipes_of("flux"), ids=lambda path: path.stem)
def test_every_recipe_parses_and_draws(script: ModuleType, recipe: Path):
    check_recipe(script, "flux", recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 10}, "--resolution must be a multiple of 4 for this model, got 10; use 8"),
        ({"sigmas": "linear"}, "unknown argument --sigmas"),
        ({"method": "draft-k", "last_n": 3}, "draft-k has no option 'last_n'"),
        ({"quantization_config_path": "absent.json"}, "--quantization_config_path absent.json: FileNotFoundError"),
        ({"offload": True, "group_offload": True}, "--offload and --group_offload exclude each other"),
    ],
)
def test_a_bad_command_line_is_one_line_before_any_model(
    arguments: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
):
    check_refusal(NAME, {**arguments, **changes}, message, monkeypatch, capsys)
