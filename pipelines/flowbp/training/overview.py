# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What a run tells of itself: the plan at its start, each update, and the estimate of a dry run."""

import math
from collections.abc import Mapping
from typing import Any

from ..publishing.run_info import hardware
from .console import duration, size, table
from .optimizers import OPTIMIZERS
from .setup import Run
from .stages import StageMeter
from .state import Step


def tell_plan(run: Run) -> None:
    """What is trained, on what, and what is written when."""
    config = run.config
    if config.dry_run:
        return
    count = sum(parameter.numel() for parameter in run.state.parameters)
    whole = sum(parameter.numel() for parameter in run.state.transformer.parameters())
    batch = (config.train_batch_size, config.gradient_accumulation_steps, run.accelerator.num_processes)
    sizes = ", ".join(f"{height} x {width}" for height, width in config.sizes)
    judged = f"{len(run.rewards.validation)} for validation every {config.validation_steps} updates"
    if run.rewards.evaluation:
        judged += f", {len(run.rewards.evaluation)} for evaluation every {config.eval_steps}"
        judged += f" by {run.evaluation.judge}"
    resumed = f", of which {run.first_update} are done" if run.first_update else ""
    lines = [
        ("device", _device(run)),
        ("reward", run.rewards.name),
        ("trained", f"{count:,} parameters in float32 ({count / whole:.1%}), {run.state.trained.describe(config)}"),
        ("optimizer", f"{config.optimizer}, learning rate {config.learning_rate:g} ({config.lr_scheduler})"),
        (
            "batch",
            f"{math.prod(batch)} samples per update = {' x '.join(map(str, batch))} (batch, micro-batches, processes) "
            f"of {sizes} pixels",
        ),
        ("prompts", f"{len(run.state.sampler.prompts)} for training, {judged}"),
        *([("columns", f"{', '.join(run.rewards.columns)}, for the rewards")] if run.rewards.columns else []),
        *(
            [("starts from", f"{', '.join(config.pipeline_columns)}, one sample a call")]
            if config.pipeline_columns
            else []
        ),
        ("updates", f"{config.max_train_steps}{resumed}"),
        ("written to", f"{config.output_dir}: checkpoints {_checkpoint_times(run)}"),
    ]
    model = f"{type(run.sampling.pipe).__name__} ({config.pretrained_model_name_or_path})"
    run.console.tell(table(f"{run.title} on {model}", lines))


def tell_update(run: Run, step: Step, entry: Mapping[str, Any]) -> None:
    """An update's reward, and what was wrong with it."""
    reward = "skipped" if step.was_skipped else f"{entry['reward']:.3f}"
    run.console.show(reward=reward, s_per_update=f"{entry['seconds']:.2f}")
    if entry["gradient_norm"] == 0:
        run.console.tell(
            f"Update {entry['step']}: the gradient is exactly 0. Are all rewards above --reward_clip, or all samples "
            "dropped by --max_gap_j or --max_gap_0?"
        )
    if step.was_skipped:
        run.console.tell(f"Update {entry['step']}: skipped, its reward, loss or gradient is not finite.")


def print_estimate(run: Run, meter: StageMeter) -> None:
    """Seconds and memory of a dry run's update, and what the whole run will take; on stdout, by the main process."""
    if run.accelerator.is_main_process:
        print(meter.table())
        print("\n" + estimate(run, meter))
    run.accelerator.end_training()


def estimate(run: Run, meter: StageMeter) -> str:
    """Hours, disk, and what is written when, computed from one update's seconds."""
    config, processes = run.config, run.accelerator.num_processes
    left = config.max_train_steps - run.first_update
    of_update = config.gradient_accumulation_steps * meter.total
    evaluated = len(run.rewards.evaluation) * config.num_eval_images
    evaluations = math.ceil(config.max_train_steps / config.eval_steps) - run.first_update // config.eval_steps
    # The base model's too, which a resumed run has behind it.
    evaluations = evaluations + (not run.first_update) if evaluated else 0
    validations = (config.max_train_steps - 1) // config.validation_steps - run.first_update // config.validation_steps
    shown = len(run.rewards.validation)
    images = evaluations * evaluated + (validations + 2) * shown
    # A rollout samples a batch at once, evaluations one image after the other.
    of_image = meter.seconds["rollout"] / config.train_batch_size
    of_images = images * of_image / processes
    seconds = left * of_update + of_images
    result, checkpoint = _bytes_written(run)
    # One more is kept for a while: see `_checkpoint_times`.
    count = math.ceil(left / config.checkpointing_steps) + 1
    kept = count if config.checkpoints_total_limit is None else min(count, config.checkpoints_total_limit)
    lines = [
        "The whole run, estimated from this update (which is the first: it also checks every active step):",
        f"  device       {_device(run)}",
        f"  updates      {left} x {of_update:.2f} s = {duration(left * of_update)}",
        f"  images       {images} x {of_image:.2f} s = {duration(of_images)}: {evaluations} evaluations of "
        f"{evaluated}, {validations} validations of {shown}, {2 * shown} at the end",
        f"  in all       {duration(seconds)}, without loading and rewards of images",
        f"  checkpoints  at most {kept} of {size(checkpoint)} at a time: {size(kept * checkpoint)}, "
        f"{_checkpoint_times(run)} (--checkpoints_total_limit)",
        f"  at the end   the {run.state.trained.title}, {size(result)}, its card, run.json and images "
        f"in {config.output_dir}",
    ]
    return "\n".join(lines)


def _device(run: Run) -> str:
    return f"{hardware(run.accelerator.device, 1)['device']}, mixed precision {run.config.mixed_precision}"


def _bytes_written(run: Run) -> tuple[int, int]:
    """Of the result, and of a checkpoint: weights, moments and an average in float32, and snapshots that it keeps."""
    config = run.config
    count = sum(parameter.numel() for parameter in run.state.parameters)
    result = count * run.state.trained.dtype.itemsize
    kept_results = run.state.files.has_result + (config.eval_reward is not None)
    copies = 1 + OPTIMIZERS[config.optimizer].copies + config.use_ema
    return result, round(copies * 4 * count) + kept_results * result


def _checkpoint_times(run: Run) -> str:
    config = run.config
    steps, minutes = config.checkpointing_steps, config.checkpointing_minutes
    return (
        f"every {steps} updates and at the end; between them, after {minutes:g} minutes and before evaluations, one "
        "that the next one replaces"
    )
