# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The script for FLUX.2-Klein, on tiny pipelines of the base model and of the distilled one."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_pipelines import tiny_klein_pipeline
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
    log_of,
    lora_of,
    metadata_of,
    recipes_of,
    same,
    watch_pictures,
    watch_runs,
    write_prompts,
)

from flowbp import METHODS

NAME = "train_flowbp_flux2"
# What users give the pipeline to get the pictures of the script's validation.
CALL = {"height": 8, "width": 8, "guidance_scale": 4.0, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(NAME)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-klein")
    tiny_klein_pipeline().save_pretrained(folder)
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


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-distilled-klein")
    tiny_klein_pipeline(is_distilled=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["full", "draft-lv", "flowbp-bridge", "flowbp-lagrange"])
def test_two_updates_of_the_distilled_model(
    script: ModuleType, arguments: dict[str, Any], distilled: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    drawn, output = watch_pictures(monkeypatch), arguments["output_dir"]
    script.main(command_line(arguments, pretrained_model_name_or_path=distilled, method=name, **METHOD_OPTIONS[name]))
    check_run(output)
    check_round_trip(distilled, lambda pipe: pipe.load_lora_weights(output), drawn, **CALL)


def test_undoing_guidance_divides_by_what_guidance_multiplies_with(
    script: ModuleType, arguments: dict[str, Any], model: Path, distilled: Path, tmp_path: Path
):
    """The base model's loss by 4, the distilled model's, which ignores the guidance scale, by 1."""
    losses = {}
    for folder in (model, distilled):
        for switch in ("undo_guidance", "no-undo_guidance"):
            output = tmp_path / f"{folder.name}-{switch}"
            changes = {"pretrained_model_name_or_path": folder, "output_dir": output, "max_train_steps": 1}
            script.main(command_line(arguments, **changes, method="draft-k", **{switch: True}))
            losses[folder, switch] = log_of(output)[0]["loss"]
    assert losses[model, "undo_guidance"] == pytest.approx(losses[model, "no-undo_guidance"] / 4)
    assert losses[distilled, "undo_guidance"] == losses[distilled, "no-undo_guidance"] != 0


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


@pytest.mark.parametrize("method", METHODS)
def test_accelerate_launch(arguments: dict[str, Any], model: Path, method: str):
    output = arguments["output_dir"]
    printed = accelerate_launch(NAME, command_line(arguments, method=method, **METHOD_OPTIONS[method]))
    assert f"LoRA, model card, run.json, before_after.png and reward_curve.png are in {output}" in printed
    check_run(output)
    load_pipeline(model).load_lora_weights(output)


def test_defaults_are_those_of_the_paper(script: ModuleType):
    args = script.parse_args(["--pretrained_model_name_or_path", "m", "--prompts", "p.txt", "--reward", "ocr"])
    found = (args.resolution, args.num_inference_steps, args.guidance_scale, args.method)
    assert found == (512, 25, 4.0, "flowbp-lagrange")


@pytest.mark.parametrize("recipe", recipes_of("flux2"), ids=lambda path: path.stem)
def test_every_recipe_parses_and_draws(script: ModuleType, recipe: Path):
    check_recipe(script, "flux2", recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 10}, "--resolution must be a multiple of 4 for this model, got 10; use 8"),
        ({"negative_prompt": "grey"}, "unknown argument --negative_prompt"),
        ({"method": "draft-k", "last_n": 3}, "draft-k has no option 'last_n'"),
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
