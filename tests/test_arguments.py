# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The options that the scripts share: their names, their ranges, and what becomes of them."""

import argparse
from types import ModuleType
from typing import Any

import pytest
import torch
from training_scripts import ROOT, load_script

from flowbp.arguments import (
    COUNTS,
    POSITIVE,
    add_method_arguments,
    add_model_arguments,
    add_prompt_embeds_arguments,
    add_reward_arguments,
    add_training_arguments,
    choose_method,
    choose_objective,
    parse_training_args,
)
from flowbp.methods import METHODS, OPTIONS, get_method

REQUIRED = ["--pretrained_model_name_or_path", "m", "--prompts", "p.txt", "--reward", "ocr"]
BACKBONES = ("sd3", "flux", "flux2")


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    names = [path.stem for path in sorted((ROOT / "training").glob("train_flowbp*.py"))]
    assert len(names) == 4
    return {name: load_script(name) for name in names}


def parse(*words: str, prompt_embeds: bool = True) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="script", allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    add_model_arguments(parser, "a pipeline", "to_q")
    if prompt_embeds:
        add_prompt_embeds_arguments(parser)
    add_method_arguments(parser)
    add_reward_arguments(parser)
    add_training_arguments(parser, "out")
    return parse_training_args(parser, [*REQUIRED, *words])


def error_of(capsys: pytest.CaptureFixture[str], *words: str, **options: bool) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(*words, **options)
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("script: error: ") and printed.count("\n") == 1
    return printed


def test_all_scripts_have_the_shared_options_with_the_same_defaults(scripts: dict[str, ModuleType]):
    shared = vars(parse(prompt_embeds=False))
    # What is a backbone's own.
    own = {"lora_layers", "output_dir"}
    for name, script in scripts.items():
        found = vars(script.parse_args(REQUIRED))
        assert {option: found[option] for option in shared if option not in own} == {
            option: value for option, value in shared.items() if option not in own
        }, name
        assert found["lora_layers"] and str(found["output_dir"]).endswith("flowbp-lora")


def test_every_option_whose_range_is_checked_is_one(scripts: dict[str, ModuleType]):
    options = {option for script in scripts.values() for option in vars(script.parse_args(REQUIRED))}
    assert {*COUNTS, *POSITIVE} <= options
    assert {option for row in METHODS.values() for option in row.options} == set(OPTIONS) <= options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rank", "0"), "--rank must be at least 1, got 0"),
        (("--samples_per_decode", "0"), "--samples_per_decode must be at least 1, got 0"),
        (("--learning_rate", "0"), "--learning_rate must be above 0, got 0.0"),
        (("--loss_scale", "nan"), "--loss_scale must be above 0, got nan"),
        (("--mixed_precision", "fp8"), "invalid choice: 'fp8'"),
        (("--offload", "--group_offload"), "--offload and --group_offload exclude each other; choose one"),
    ],
)
def test_values_out_of_range_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
):
    assert message in error_of(capsys, *words)


def test_group_offload_does_not_need_the_other_options():
    args = parse("--group_offload", prompt_embeds=False)
    assert args.group_offload and "offload" not in vars(args)


@pytest.mark.parametrize("option", ["--bnb_quantization_config_path", "--quantization_config_path"])
def test_the_quantisation_config_has_two_names(option: str):
    assert str(parse(option, "nf4.json").quantization_config_path) == "nf4.json"


def test_the_dtype_is_what_accelerate_launch_was_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert parse().mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert parse().mixed_precision == "bf16"
    assert parse("--mixed_precision", "fp16").mixed_precision == "fp16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert "--mixed_precision must be no, fp16 or bf16, accelerate says fp8" in error_of(capsys)


# What becomes of the method's options.


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", METHODS)
def test_options_left_out_are_the_row_s_for_the_backbone(name: str, backbone: str):
    assert choose_method(parse("--method", name), backbone) == get_method(name, backbone=backbone)


def test_options_given_win():
    words = ("--method", "flowbp-bridge", "--num_active", "4", "--grad_rescale", "0.25", "--alpha", "0")
    method = choose_method(parse(*words), "flux")
    assert method == get_method("flowbp-bridge", backbone="flux", num_active=4, grad_rescale=0.25, alpha=0.0)
    assert method != get_method("flowbp-bridge", backbone="flux")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "refl", "--alpha", "0.5"), "refl has no option 'alpha'"),
        (("--method", "draft-k", "--last_k", "26"), "25"),
        (("--method", "flowbp-sparse", "--num_active", "5", "--num_inference_steps", "4"), "use at most 4"),
    ],
)
def test_a_method_that_does_not_fit_the_run_is_refused(words: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        choose_method(parse(*words), "sd3")


def test_a_trial_draw_does_not_move_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    choose_method(parse(), "sd3")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("words", "backbone", "undo"),
    [
        ((), "sd3", False),
        ((), "flux2", True),
        (("--undo_guidance",), "sd3", True),
        (("--no-undo_guidance",), "flux2", False),
    ],
)
def test_undoing_guidance_is_the_method_s_choice_unless_given(words: tuple[str, ...], backbone: str, undo: bool):
    args = parse("--method", "flowbp-lagrange", *words)
    objective = choose_objective(args, choose_method(args, backbone), 4.0)
    rewards, weights = torch.tensor([0.5, -0.25]), torch.tensor([1.0, 2.0])
    plain: Any = (-weights * rewards).mean()
    assert objective(rewards, weights).item() == pytest.approx(plain.item() / (4 if undo else 1))


def test_clip_and_loss_scale_reach_the_objective():
    args = parse("--method", "draft-k", "--reward_clip", "0.5", "--loss_scale", "3")
    objective = choose_objective(args, choose_method(args, "sd3"), 4.0)
    rewards = torch.tensor([0.75, 0.25])
    assert objective(rewards, torch.ones(2)).item() == pytest.approx(3 * 0.25 / 2)
