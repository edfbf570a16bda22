# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The options that the training scripts share, and the checks of their values.

A script adds the groups that it wants; what differs between backbones (the rollout's options) is in the scripts.
"""

import argparse
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import get_available_trackers

from ..methods import METHODS, OPTIONS, Method, get_method
from ..objectives import Objective
from ..rewards import JUDGES, check_prompts, load_reward, option_names, part_names
from ..rewards.loading import parse_model_paths
from .command_line import parse_args_with_config
from .prompts import load_prompts, load_texts
from .training_utils import make_generator

# Those of diffusers' schedules that need no further options.
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


def json_object(text: str) -> dict[str, Any]:
    """An option's value that is a JSON object."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a JSON object expected, got {text}")
    return value


def add_model_arguments(parser: argparse.ArgumentParser, model: str, lora_layers: str) -> None:
    """Add the model, its LoRA, and what makes both fit the memory.

    Args:
        parser: of the script.
        model: what `--pretrained_model_name_or_path` must be, in words.
        lora_layers: default of `--lora_layers`.
    """
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--pretrained_model_name_or_path", required=True, help=f"Folder or Hub id of {model}.")
    add("--revision", help="Branch, tag or commit of the model on the Hub.")
    add("--variant", help="Variant of the model files, such as fp16.")
    add("--rank", type=int, default=4, help="Rank of the LoRA.")
    add("--lora_alpha", type=int, default=4, help="Scale of the LoRA: its update counts lora_alpha / rank.")
    add("--lora_layers", default=lora_layers, help="Names of the layers that get a LoRA, with commas between them.")
    add(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        help="Dtype of the frozen model; the LoRA stays float32. Default: what accelerate launch was told.",
    )
    add(
        "--bnb_quantization_config_path",
        "--quantization_config_path",
        dest="quantization_config_path",
        type=Path,
        help="JSON file of a diffusers quantisation config for the frozen transformer; bitsandbytes' unless its "
        "quant_method says torchao or quanto.",
    )
    add("--gradient_checkpointing", action="store_true", help="Recompute blocks of transformer and VAE: less memory.")
    add("--group_offload", action="store_true", help="Text encoders stay on the CPU, their layers visit the GPU.")
    add("--allow_tf32", action="store_true", help="Allow TF32 matrix products on Ampere and later GPUs.")


def add_prompt_embeds_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what scripts can do that call their pipeline's `encode_prompt` themselves."""
    group = parser.add_argument_group("prompt embeddings")
    add = group.add_argument
    add(
        "--offload",
        action=argparse.BooleanOptionalAction,
        help="Text encoders wait on the CPU between uses. Default: they do, except with --group_offload.",
    )
    add(
        "--precompute_prompt_embeds",
        action="store_true",
        help="Encode all prompts before the transformer is loaded, keep them on disk and free the text encoders.",
    )
    add(
        "--prompt_embeds_dir",
        type=Path,
        default=Path("~/.cache/flowbp/prompt_embeds"),
        help="Folder of the kept embeddings, by model and a hash of prompts and settings.",
    )


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the method and the options of all methods, as `METHODS` and `OPTIONS` declare them."""
    group = parser.add_argument_group("method: a row of the table; options left out keep the row's default")
    add = group.add_argument
    add("--method", choices=tuple(METHODS), default="flowbp-lagrange", help="How the gradient returns.")
    for option in OPTIONS.values():
        rows = [name for name, row in METHODS.items() if option.name in row.options]
        if rows:
            kind = option.kind
            add(
                f"--{option.name}",
                type=kind.parse,
                choices=kind.choices,
                nargs=kind.nargs,
                metavar=kind.metavar,
                # argparse formats help texts with %.
                help=f"{option.help} Methods: {', '.join(rows)}.".replace("%", "%%"),
            )
    add(
        "--unconditional_gradient",
        action=argparse.BooleanOptionalAction,
        help="Send gradients through the unconditional branch of guidance too. Default: the method's.",
    )
    add("--samples_per_decode", type=int, help="Decode and score this many pictures at a time: less memory.")
    add(
        "--strict",
        action="store_true",
        help="Repeat every active transformer call whole and compare, at every update; else at the first one only.",
    )


def add_reward_arguments(parser: argparse.ArgumentParser) -> None:
    """Add reward, objective and prompts."""
    group = parser.add_argument_group("reward and prompts")
    add = group.add_argument
    add("--reward", required=True, help="Name, weighted sum (a:0.7,b:0.3) or package.module:factory.")
    add(
        "--reward_model_path",
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        help="Folders with the weights of rewards, by the reward's name, in place of the Hub.",
    )
    add("--reward_offload", action="store_true", help="Rewards wait on the CPU and visit the GPU in turn.")
    add(
        "--reward_augment",
        action="store_true",
        help="Shift, blur and noise pictures a little before an ocr reward.",
    )
    add("--reward_text_column", help="Column of --prompts with the text that ocr looks for. Default: what is quoted.")
    add("--reward_clip", type=float, help="Reward at which a sample stops to count (hinge; HPSv2.1: 0.55).")
    add("--loss_scale", type=float, default=1.0, help="Factor on the loss.")
    add(
        "--undo_guidance",
        action=argparse.BooleanOptionalAction,
        help="Divide the loss by the guidance scale. Default: the method's.",
    )
    add("--prompts", required=True, help=".txt, .jsonl, .csv or .parquet file, or a datasets folder or Hub id.")
    add("--prompt_column", help="Column of the prompts. Default: prompt, caption or text.")
    add("--prompt_split", default="train", help="Split of a dataset.")


def add_training_arguments(parser: argparse.ArgumentParser, output_dir: str) -> None:
    """Add the optimizer, checkpoints and reports, named as in diffusers' LoRA scripts.

    Args:
        parser: of the script.
        output_dir: default of `--output_dir`.
    """
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--output_dir", type=Path, default=Path(output_dir), help="Folder of everything that is written.")
    add("--seed", type=int, default=0, help="Seed of noise, surrogates, prompt order and the LoRA's start.")
    add("--train_batch_size", type=int, default=4, help="Prompts per process and pass.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Passes per update.")
    add("--max_train_steps", type=int, default=300, help="Updates (the paper: 300).")
    add("--learning_rate", type=float, default=1e-4, help="Learning rate after warm-up.")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="Schedule of the learning rate.")
    add("--lr_warmup_steps", type=int, default=0, help="Updates of warm-up.")
    add("--lr_num_cycles", type=int, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=float, default=1.0, help="Power of polynomial.")
    add("--adam_beta1", type=float, default=0.9, help="AdamW.")
    add("--adam_beta2", type=float, default=0.999, help="AdamW.")
    add("--adam_weight_decay", type=float, default=1e-4, help="AdamW.")
    add("--adam_epsilon", type=float, default=1e-8, help="AdamW.")
    add("--max_grad_norm", type=float, default=1.0, help="Gradients are clipped to this norm.")
    add("--use_ema", action="store_true", help="Validate, evaluate and save an average of the LoRA over the updates.")
    add("--ema_decay", type=float, default=0.995, help="Its decay (the paper: 0.995).")
    add(
        "--velocity_anchor",
        type=float,
        default=0.0,
        help="Weight of the mean squared distance between the outputs of trained and base model at active steps.",
    )
    add(
        "--max_skipped_updates",
        type=int,
        default=10,
        help="Stop with an error after this many updates in a row whose reward, loss or gradient is not finite.",
    )
    add("--checkpointing_steps", type=int, default=500, help="Updates between checkpoints.")
    add("--checkpoints_total_limit", type=int, help="How many checkpoints to keep.")
    add("--resume_from_checkpoint", help="latest (the newest whole one), or a checkpoint's name or path.")
    add(
        "--verify",
        action="store_true",
        help="First compare the gradient of a rollout of 3 steps with autograd through the stock pipeline, and stop "
        "with an error where they differ. Takes the memory of all three steps' graphs at once.",
    )
    add(
        "--dry_run",
        action="store_true",
        help="One update, then print peak memory and seconds by stage and exit; nothing but the embeddings of "
        "--precompute_prompt_embeds is written.",
    )

    group = parser.add_argument_group("guard: evaluation on held-out prompts and rewards while training")
    add = group.add_argument
    add("--eval_reward", help="Held-out reward, as --reward: judges and never trains.")
    add("--eval_prompts", help="Held-out prompts, as --prompts. Default with --eval_reward: the validation prompts.")
    add("--eval_steps", type=int, default=50, help="Updates between evaluations.")
    add(
        "--num_eval_images",
        type=int,
        default=2,
        help="Pictures of each evaluation prompt, always from the same noise.",
    )
    add(
        "--select",
        choices=("best", "last"),
        help="Which LoRA is the result: the one with the best held-out reward, or the last. Default: best with "
        "--eval_reward.",
    )
    add("--stop_on_alarm", action="store_true", help="Stop at the guard's first alarm and finish as at the end.")

    group = parser.add_argument_group("reports")
    add = group.add_argument
    add("--validation_prompt", nargs="+", help="Prompts of the validation pictures. Default: the first prompts.")
    add("--num_validation_images", type=int, default=4, help="Pictures of each, or how many of the first prompts.")
    add("--validation_steps", type=int, default=50, help="Updates between validations.")
    add("--report_to", default="tensorboard", help="An accelerate tracker, all, or none.")
    add("--logging_dir", default="logs", help="Folder of the tracker in --output_dir.")
    add("--push_to_hub", action="store_true", help="Push LoRA, card, run.json and pictures to the Hub at the end.")
    add("--hub_model_id", help="Repository on the Hub. Default: the output folder's name.")


# Options that must be at least 1.
COUNTS = (
    "rank lora_alpha resolution height width num_frames num_inference_steps max_sequence_length train_batch_size "
    "max_train_steps gradient_accumulation_steps checkpointing_steps checkpoints_total_limit validation_steps "
    "num_validation_images samples_per_decode eval_steps num_eval_images max_skipped_updates "
    "lr_num_cycles"
).split()
# Options that must be at least 0.
NOT_NEGATIVE = ("lr_warmup_steps", "lr_power", "adam_weight_decay", "adam_epsilon", "velocity_anchor")
# Options that must be above 0.
POSITIVE = ("learning_rate", "loss_scale", "flow_shift")


def parse_training_args(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line and the recipe that `--config` names, and check ranges.

    Args:
        parser: of the script, with the groups above.
        argv: the arguments; those of the process by default.

    Raises:
        SystemExit: with code 2 and one line, for what the user can put right.
    """
    args = parse_args_with_config(parser, argv)
    for name, value in vars(args).items():
        if name in COUNTS and value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
        if name in POSITIVE and value is not None and not 0 < value < math.inf:
            parser.error(f"--{name} must be above 0 and finite, got {value}")
        if name in ("adam_beta1", "adam_beta2", "ema_decay") and not 0 <= value < 1:
            parser.error(f"--{name} must be at least 0 and below 1, got {value}")
        if name == "max_grad_norm" and not value > 0:
            parser.error(f"--{name} must be above 0 (inf does not clip), got {value}")
        if name in NOT_NEGATIVE and not 0 <= value < math.inf:
            parser.error(f"--{name} must be at least 0 and finite, got {value}")
        if name in ("guidance_scale", "true_cfg_scale") and value is not None and not math.isfinite(value):
            parser.error(f"--{name} must be finite, got {value}")
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        parser.error("--lr_warmup_steps has no effect with --lr_scheduler constant; choose constant_with_warmup")
    if args.lr_warmup_steps > args.max_train_steps:
        parser.error(
            f"--lr_warmup_steps must be at most --max_train_steps {args.max_train_steps}, got {args.lr_warmup_steps}"
        )
    if args.validation_prompt is not None and not all(prompt.strip() for prompt in args.validation_prompt):
        parser.error("--validation_prompt must not be blank")
    trackers = [str(tracker) for tracker in get_available_trackers()]
    if args.report_to not in (*trackers, "all", "none"):
        # accelerate leaves out what is not installed without a word.
        parser.error(
            f"--report_to {args.report_to}: expected all, none or an installed tracker ({', '.join(trackers)}); "
            "install its package or choose another"
        )
    if not all(name.strip() for name in args.lora_layers.split(",")):
        parser.error("--lora_layers has an empty name; write names with commas between them")
    if args.select == "best" and args.eval_reward is None:
        parser.error("--select best needs --eval_reward, the held-out reward to choose by")
    if args.select is None:
        args.select = "last" if args.eval_reward is None else "best"
    if args.eval_reward is not None:
        try:
            both = sorted({*part_names(args.reward)} & {*part_names(args.eval_reward)})
        except ValueError as error:
            parser.error(str(error))
        if both:
            parser.error(f"--eval_reward {args.eval_reward}: --reward trains {both[0]}; choose one that is held out")
    if args.dry_run:
        # One update on one batch, as its help says.
        args.gradient_accumulation_steps = 1
    if args.mixed_precision is None:
        args.mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if args.mixed_precision not in ("no", "fp16", "bf16"):
            parser.error(f"--mixed_precision must be no, fp16 or bf16, accelerate says {args.mixed_precision}")
    if args.group_offload and vars(args).get("offload"):
        parser.error("--offload and --group_offload exclude each other; choose one")
    if "offload" in vars(args) and args.offload is None:
        args.offload = not args.group_offload
    return args


def choose_method(args: argparse.Namespace, backbone: str) -> Method:
    """The row with its options, tried once on the run's number of steps, so that what does not fit fails now.

    Args:
        args: of `parse_training_args`.
        backbone: whose defaults the options that were left out take, see `get_method`.

    Raises:
        ValueError: for options that the row does not have, or that do not fit `--num_inference_steps`.
    """
    given = {name: value for name, value in vars(args).items() if name in OPTIONS and value is not None}
    method = get_method(args.method, backbone=backbone, **given)
    method.draw(torch.linspace(1, 0, args.num_inference_steps + 1), make_generator("trial"))
    return method


@dataclass(frozen=True)
class Rewards:
    """The rewards of a run.

    Attributes:
        training: of the updates.
        plain: the same without augmentation, for validation; often the same module.
        held_out: of `--eval_reward`, None without it.
        evaluation_prompts: of `--eval_prompts`; with `--eval_reward` alone the validation prompts; empty without both.
    """

    training: torch.nn.Module
    plain: torch.nn.Module
    held_out: torch.nn.Module | None
    evaluation_prompts: tuple[str, ...]

    def __iter__(self) -> Iterator[torch.nn.Module]:
        """The modules."""
        return iter(module for module in (self.training, self.plain, self.held_out) if module is not None)


def choose_rewards(args: argparse.Namespace, prompts: list[str]) -> Rewards:
    """The rewards of a run and the prompts of its evaluation.

    Args:
        args: of `parse_training_args`.
        prompts: of the training.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: see `load_reward`, `parse_model_paths`, `load_texts`.
    """
    if judges := [name for name in part_names(args.reward) if name in JUDGES]:
        raise ValueError(
            f"--reward {args.reward}: expected rewards with a gradient, got {judges[0]}, which can only judge; use it "
            "as --eval_reward or in evaluate_flowbp.py."
        )
    if args.reward_augment and "augment" not in option_names(args.reward):
        raise ValueError(
            f"--reward_augment: {args.reward} does not have it, expected an ocr reward or a factory with an argument "
            "augment; leave it out."
        )
    model_paths = parse_model_paths(args.reward_model_path)
    of_training, of_held_out = model_paths, {}
    if args.eval_reward is not None:
        # A folder goes to whichever reward names it; `load_reward` refuses those that neither does.
        of_held_out = {name: path for name, path in model_paths.items() if name in part_names(args.eval_reward)}
        of_training = {
            name: path
            for name, path in model_paths.items()
            if name not in of_held_out or name in part_names(args.reward)
        }
    options, of_judge = {}, {}
    if args.reward_text_column is not None:
        options["texts"] = load_texts(
            args.prompts, args.reward_text_column, prompt_column=args.prompt_column, split=args.prompt_split
        )
        if args.eval_prompts is not None:
            options["texts"] |= load_texts(args.eval_prompts, args.reward_text_column)
        if args.eval_reward is not None and any(name.startswith("ocr") for name in part_names(args.eval_reward)):
            of_judge = options
    evaluation_prompts: list[str] = []
    if args.eval_prompts is not None:
        evaluation_prompts = load_prompts(args.eval_prompts)
    elif args.eval_reward is not None:
        evaluation_prompts = args.validation_prompt or prompts[: args.num_validation_images]
    plain = load_reward(args.reward, of_training, args.reward_offload, **options)
    training = plain
    if args.reward_augment:
        training = load_reward(args.reward, of_training, args.reward_offload, augment=True, **options)
    check_prompts(plain, [*prompts, *(args.validation_prompt or []), *evaluation_prompts])
    held_out = None
    if args.eval_reward is not None:
        held_out = load_reward(args.eval_reward, of_held_out, args.reward_offload, **of_judge)
        check_prompts(
            held_out, [*(args.validation_prompt or prompts[: args.num_validation_images]), *evaluation_prompts]
        )
    return Rewards(training, plain, held_out, tuple(evaluation_prompts))


def choose_objective(args: argparse.Namespace, method: Method, guidance_scale: float) -> Objective:
    """The objective of a run.

    Args:
        args: of `parse_training_args`.
        method: which says whether to undo the gain of guidance where `--undo_guidance` does not.
        guidance_scale: by which guidance multiplies the conditional branch; 1 without it.
    """
    undo_guidance = method.undo_guidance if args.undo_guidance is None else args.undo_guidance
    return Objective(args.reward_clip, args.loss_scale, guidance_scale if undo_guidance else 1.0)
