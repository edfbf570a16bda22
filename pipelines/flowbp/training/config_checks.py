# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Which options of a training run exclude or need each other."""

from typing import TYPE_CHECKING

from accelerate.tracking import get_available_trackers

from ..extras import remedy
from ..rewards import part_names
from .options import declarations
from .pipeline_columns import parse_columns
from .speed import check_attention_backend

if TYPE_CHECKING:
    from .config import TrainingConfig

OF_LORA = ("init_lora", "rank", "lora_alpha", "lora_dtype", "use_dora", "use_rslora")
"""Options that full fine-tuning does not have."""


def check_combinations(config: "TrainingConfig") -> None:
    """Check options against each other, whose own types and ranges are right.

    Raises:
        ValueError: in one line.
    """
    if config.train == "full":
        _check_full(config)
    elif config.offload_ema:
        raise ValueError("--offload_ema needs --train full: the average of a LoRA is small; leave it out")
    if config.use_dora and config.quantization_config_path is not None:
        raise ValueError("--use_dora: a DoRA needs its base's own weights; leave --quantization_config_path out")
    if config.lr_warmup_steps and config.lr_scheduler == "constant":
        raise ValueError("--lr_warmup_steps has no effect with --lr_scheduler constant; choose constant_with_warmup")
    if config.lr_warmup_steps > config.max_train_steps:
        raise ValueError(
            f"--lr_warmup_steps must be at most --max_train_steps {config.max_train_steps}, got "
            f"{config.lr_warmup_steps}"
        )
    _check_prodigy(config)
    parse_columns(config.pipeline_columns)
    if config.validation_prompt is not None and not all(prompt.strip() for prompt in config.validation_prompt):
        raise ValueError("--validation_prompt must not be blank")
    trackers = [str(tracker) for tracker in get_available_trackers()]
    if config.report_to not in (*trackers, "all", "none"):
        # accelerate leaves out what is not installed without a word.
        raise ValueError(
            f"--report_to {config.report_to}: expected all, none or an installed tracker ({', '.join(trackers)}); "
            f"choose another, or install its package, for tensorboard: {remedy('training')}"
        )
    if config.lora_layers is not None and not all(name.strip() for name in config.lora_layers.split(",")):
        raise ValueError("--lora_layers has an empty name; write names with commas between them")
    if config.group_offload and config.offload:
        raise ValueError("--offload and --group_offload exclude each other; choose one")
    for name in ("eval_prompt_column", "eval_prompt_split"):
        if config.eval_prompts is None and vars(config)[name] is not None:
            raise ValueError(f"--{name} needs --eval_prompts; leave it out")
    if config.select == "best" and config.eval_reward is None:
        raise ValueError("--select best needs --eval_reward, the held-out reward to choose by")
    if config.eval_reward is not None and config.reward is not None:
        both = sorted({*part_names(config.reward)} & {*part_names(config.eval_reward)})
        if both:
            raise ValueError(
                f"--eval_reward {config.eval_reward}: --reward trains {both[0]}; choose one that is held out"
            )
    if config.attention_backend is not None:
        check_attention_backend(config.attention_backend)
    _check_sizes(config)


def _check_full(config: "TrainingConfig") -> None:
    declared = declarations(type(config))
    refused = {
        **dict.fromkeys(OF_LORA, "is an option of a LoRA"),
        "optimizer": "other than adamw does not train shards",
        "quantization_config_path": "leaves weights that cannot be trained",
        "velocity_anchor": "compares with the base model, which is gone after the first update",
        "verify": "needs whole parameters",
    }
    for name, reason in refused.items():
        if getattr(config, name) != declared[name][0].default:
            raise ValueError(f"--{name} {reason}; leave it out, or train a LoRA (--train lora)")
    if config.mixed_precision == "fp16":
        raise ValueError("--mixed_precision fp16: --train full computes in bf16 or float32; choose bf16 or no")
    if config.offload_ema and not config.use_ema:
        raise ValueError("--offload_ema has no effect without --use_ema; add --use_ema or leave it out")


def _check_prodigy(config: "TrainingConfig") -> None:
    if config.optimizer != "prodigy":
        if config.prodigy_d_coef != 1:
            raise ValueError(f"--prodigy_d_coef has no effect with --optimizer {config.optimizer}; leave it out")
    elif config.learning_rate is not None and config.learning_rate < 0.1:
        # diffusers' scripts warn.
        raise ValueError(
            f"--learning_rate {config.learning_rate:g}: a factor on the rate that --optimizer prodigy finds, "
            "expected about 1; set it to 1, and --prodigy_d_coef below 1 for smaller steps"
        )


def _check_sizes(config: "TrainingConfig") -> None:
    heights, widths = config.height, config.width
    if config.resolution is not None and (heights or widths):
        raise ValueError("--resolution sets height and width; leave it out where --height and --width are given")
    if heights and widths and len(heights) != len(widths) and 1 not in (len(heights), len(widths)):
        raise ValueError(
            f"--height and --width must have as many values, or one of them a single one, got {len(heights)} and "
            f"{len(widths)}"
        )
