# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The options that the scripts share: their names, their ranges, and what becomes of them."""

import argparse
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from toy_reward import make_held_out_reward, make_reward
from training_scripts import ROOT, load_script

from flowbp.methods import METHODS, OPTIONS, Option, Row, get_method
from flowbp.training.arguments import (
    COUNTS,
    POSITIVE,
    Rewards,
    add_method_arguments,
    add_model_arguments,
    add_prompt_embeds_arguments,
    add_reward_arguments,
    add_training_arguments,
    choose_method,
    choose_objective,
    choose_rewards,
    parse_training_args,
)

REQUIRED = ["--pretrained_model_name_or_path", "m", "--prompts", "p.txt", "--reward", "ocr"]
# A tracker of accelerate's whose package is not here.
NOT_INSTALLED = next(str(name) for name in LoggerType if name not in (LoggerType.ALL, *get_available_trackers()))
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
        (("--learning_rate", "0"), "--learning_rate must be above 0 and finite, got 0.0"),
        (("--loss_scale", "nan"), "--loss_scale must be above 0 and finite, got nan"),
        (("--mixed_precision", "fp8"), "invalid choice: 'fp8'"),
        (("--offload", "--group_offload"), "--offload and --group_offload exclude each other; choose one"),
        (("--adam_beta1", "1"), "--adam_beta1 must be at least 0 and below 1, got 1.0"),
        (("--ema_decay", "1"), "--ema_decay must be at least 0 and below 1, got 1.0"),
        (("--ema_decay", "-0.1"), "--ema_decay must be at least 0 and below 1, got -0.1"),
        (("--velocity_anchor", "-1"), "--velocity_anchor must be at least 0 and finite, got -1.0"),
        (("--velocity_anchor", "nan"), "--velocity_anchor must be at least 0 and finite, got nan"),
        (("--velocity_anchor", "inf"), "--velocity_anchor must be at least 0 and finite, got inf"),
        (("--max_skipped_updates", "0"), "--max_skipped_updates must be at least 1, got 0"),
        (("--eval_steps", "0"), "--eval_steps must be at least 1, got 0"),
        (("--num_eval_images", "0"), "--num_eval_images must be at least 1, got 0"),
        (("--select", "first"), "invalid choice: 'first'"),
        (("--select", "best"), "--select best needs --eval_reward, the held-out reward to choose by"),
        (("--eval_reward", "ocr"), "--eval_reward ocr: --reward trains ocr; choose one that is held out"),
        (("--eval_reward", "clip:0.5,ocr:1"), "--eval_reward clip:0.5,ocr:1: --reward trains ocr; choose"),
        (("--eval_reward", "clip:much"), "expected a number as the weight of 'clip', got 'much'"),
        (("--report_to", "tensorbord"), "--report_to tensorbord: expected all, none or an installed tracker ("),
        # accelerate knows it, and would only leave it out without a word.
        (("--report_to", NOT_INSTALLED), f"--report_to {NOT_INSTALLED}: expected all, none or an installed "),
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


@pytest.mark.parametrize("tracker", ["all", "none", "tensorboard"])
def test_trackers_that_are_installed(tracker: str):
    assert parse("--report_to", tracker).report_to == tracker


# The guard.


def test_the_result_is_the_best_lora_where_there_is_a_held_out_reward():
    assert parse().select == "last"
    assert parse("--eval_prompts", "e.txt").select == "last"
    assert parse("--eval_reward", "clip").select == "best"
    assert parse("--eval_reward", "clip", "--select", "last").select == "last"


def test_what_holds_a_run_back_is_off_by_default_and_the_average_is_the_paper_s():
    args = parse()
    assert not args.use_ema and args.velocity_anchor == 0 and args.reward_clip is None and not args.stop_on_alarm
    assert (args.ema_decay, args.max_skipped_updates, args.eval_steps, args.num_eval_images) == (0.995, 10, 50, 2)


def rewards_of(*words: str) -> Rewards:
    return choose_rewards(parse("--reward", "toy_reward:make_reward", *words), ["a", "b", "c"])


def test_rewards_without_an_evaluation():
    rewards = rewards_of()
    assert rewards.training is rewards.plain and rewards.held_out is None and rewards.evaluation_prompts == ()
    assert list(rewards) == [rewards.training, rewards.plain]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--reward", "toy_reward:make_reward:0.5,hpsv3"),
            "--reward .*: expected rewards with a gradient, got hpsv3,",
        ),
        (("--reward_augment",), "--reward_augment: toy_reward:make_reward does not have it, expected an ocr reward"),
    ],
)
def test_what_a_reward_cannot_do_is_known_before_it_is_made(words: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        rewards_of(*words)


def test_the_held_out_reward_is_one_of_the_modules():
    rewards = rewards_of("--eval_reward", "toy_reward:make_held_out_reward")
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rewards.plain(images, ["a", "b"]), make_reward()(images, ["a", "b"]))
    assert torch.equal(rewards.held_out(images, ["a", "b"]), make_held_out_reward()(images, ["a", "b"]))
    assert list(rewards) == [rewards.training, rewards.plain, rewards.held_out]


def test_prompts_of_the_evaluation(tmp_path: Path):
    path = tmp_path / "evaluation.txt"
    path.write_text("x\ny\n")
    held_out = ("--eval_reward", "toy_reward:make_held_out_reward")
    assert rewards_of("--eval_prompts", str(path)).evaluation_prompts == ("x", "y")
    assert rewards_of("--eval_prompts", str(path)).held_out is None
    assert rewards_of("--eval_prompts", str(path), *held_out).evaluation_prompts == ("x", "y")
    # Those of the validation, given or the first ones.
    assert rewards_of(*held_out, "--validation_prompt", "u", "v").evaluation_prompts == ("u", "v")
    assert rewards_of(*held_out, "--num_validation_images", "2").evaluation_prompts == ("a", "b")


def test_a_folder_of_weights_that_no_reward_names_is_refused(tmp_path: Path):
    for words in ((), ("--eval_reward", "toy_reward:make_held_out_reward")):
        with pytest.raises(ValueError, match="pickscore"):
            rewards_of("--reward_model_path", f"pickscore={tmp_path}", *words)


# What becomes of the method's options.


def help_of(option: str, capsys: pytest.CaptureFixture[str]) -> str:
    """An option's lines of `--help` as one."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        # Lines so long that argparse breaks no word at a hyphen.
        patch.setenv("COLUMNS", "1000")
        parse("--help")
    words = " ".join(capsys.readouterr().out.split())
    return words.partition(f" --{option} ")[2].partition(" --")[0]


@pytest.mark.parametrize("option", OPTIONS)
def test_the_help_of_an_option_has_its_meaning_and_its_methods(option: str, capsys: pytest.CaptureFixture[str]):
    methods = [name for name, row in METHODS.items() if option in row.options]
    assert help_of(option, capsys).endswith(f"{OPTIONS[option].help} Methods: {', '.join(methods)}.")


def test_a_new_row_with_a_new_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """It is on the command line, in its help, in recipes and in `get_method`, with no other change."""
    monkeypatch.setitem(OPTIONS, "sharpness", Option("sharpness", OPTIONS["alpha"].kind, "100% sharp at 1."))
    defaults = {"sharpness": {"sd3": 1.0, "flux": 2.0, "flux2": 3.0}, "last_k": 2}
    monkeypatch.setitem(METHODS, "new", Row(METHODS["full"].draw, "New", "here", defaults))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: new\nsharpness: 0.5\n")

    assert get_method("new", "flux2", sharpness=4).options == {"sharpness": 4.0, "last_k": 2}
    assert choose_method(parse("--method", "new"), "flux") == get_method("new", "flux", sharpness=2)
    assert choose_method(parse("--method", "new", "--sharpness", "4"), "flux") == get_method("new", sharpness=4)
    assert choose_method(parse("--config", str(recipe)), "sd3") == get_method("new", sharpness=0.5)
    assert help_of("sharpness", capsys).endswith("100% sharp at 1. Methods: new.")
    assert help_of("last_k", capsys).endswith("Methods: draft-k, new.")
    assert "--sharpness: invalid float value: 'very'" in error_of(capsys, "--sharpness", "very")
    with pytest.raises(ValueError, match="new: `sharpness` must be a number of at least 0, got -1.0"):
        choose_method(parse("--method", "new", "--sharpness", "-1"), "sd3")
    with pytest.raises(ValueError, match="full has no option 'sharpness'; it has none"):
        choose_method(parse("--method", "full", "--sharpness", "1"), "sd3")
    recipe.write_text("method: new\nsharpness: very\n")
    assert "sharpness: float expected, got 'very'" in error_of(capsys, "--config", str(recipe))


def test_a_default_can_be_taken_back_with_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ("--method", "flowbp-lagrange", "--step_sampling", "midpoint", "--max_tail", "none")
    expected = get_method("flowbp-lagrange", step_sampling="midpoint", max_tail=None)
    assert choose_method(parse(*words), "sd3") == expected
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("step_sampling: midpoint\nmax_tail: none\n")
    assert choose_method(parse("--config", str(recipe)), "sd3") == expected
    assert "--max_tail: invalid integer_or_none value: 'few'" in error_of(capsys, "--max_tail", "few")
    assert "--tau: invalid number_or_none value: 'low'" in error_of(capsys, "--tau", "low")


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
