# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""How a run resumes from a checkpoint, and which settings must be the same."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .checkpoints import CheckpointError, find_checkpoint, read_json
from .config import TrainingConfig
from .console import Console
from .evaluation import Evaluation
from .fingerprint import changes
from .lora import scales
from .saved_state import check_saved_state
from .state import TrainingState, check_fits

# Options that a resumed run may have of its own without taking another course.
MAY_CHANGE = (
    "output_dir resume_from_checkpoint max_train_steps checkpointing_steps checkpointing_minutes "
    "checkpoints_total_limit report_to logging_dir run_name tracker_project tracker_group tracker_tags push_to_hub "
    "hub_model_id hub_private_repo prompt_embeds_dir dry_run strict select verify overwrite_output_dir strict_resume "
    "process_timeout_minutes"
).split()


def course(config: TrainingConfig) -> dict[str, Any]:
    """The settings that the course of a run depends on."""
    settings = config.settings()
    if not config.lr_scheduler.startswith("constant"):
        # The schedule ends with the run.
        settings["max_train_steps of the schedule"] = settings["max_train_steps"]
    return {name: value for name, value in settings.items() if name not in MAY_CHANGE}


def find_resumed(config: TrainingConfig, tell: Callable[[str], None] = lambda line: None) -> tuple[Path, dict]:
    """The checkpoint of `--resume_from_checkpoint`, and its `state.json`, as far as both need no model.

    Args:
        config: settled, with a checkpoint to resume from.
        tell: is given a line for each damaged checkpoint that `latest` skips.

    Raises:
        CheckpointError: for a checkpoint that is missing, damaged, or does not fit.
    """
    folder = find_checkpoint(config.output_dir, config.resume_from_checkpoint, tell, check_saved_state)
    where = f"--resume_from_checkpoint {folder}"
    saved = read_json(folder / "state.json")
    if saved.get("format") != 3:
        raise CheckpointError(f"{where}: written by another version of flowbp; resume with that version.")
    before = saved["settings"]
    if before["train"] != config.train:
        raise CheckpointError(f"{where}: use the --train of that run, {before['train']}.")
    # The rank of another start is known when its file is read.
    if config.init_lora is None and before.get("init_lora") is None and before.get("rank") != config.rank:
        raise CheckpointError(f"{where}: use the --rank of that run, {before['rank']}.")
    check_fits(config, folder, saved["training"])
    return folder, saved


def resume(
    config: TrainingConfig,
    state: TrainingState,
    evaluation: Evaluation,
    console: Console,
    fingerprint: Mapping[str, Any],
) -> Path | None:
    """Continue as `--resume_from_checkpoint` says. Collective.

    Args:
        state, evaluation: that get what the checkpoint holds.

    Returns:
        The checkpoint's folder; None for a new run.

    Raises:
        CheckpointError: for a checkpoint that is missing, damaged, or does not fit; with `--strict_resume` also for
            one of other settings, prompts, rewards or versions.
    """
    if config.resume_from_checkpoint is None:
        return None
    folder, saved = find_resumed(config, console.tell)
    where = f"--resume_from_checkpoint {folder}"
    before, now = saved["settings"], course(config)
    other = [f"--{change}" for change in changes(before, now)] + changes(saved["ingredients"], fingerprint)
    if other and config.strict_resume:
        raise CheckpointError(f"{where}: {'; '.join(other)}; --strict_resume asks for the same as in that run.")
    state.load(folder, saved["training"])
    if scaled := changes(saved["scales"], scales(state.transformer)):
        raise CheckpointError(
            f"{where}: its LoRA has other scales, {scaled[0]}; use the --lora_alpha, --use_rslora and --init_lora of "
            "that run."
        )
    evaluation.load(folder, saved["evaluation"])
    if other:
        console.tell(f"{where}: other settings than that run's: {'; '.join(other)}.")
    if state.update >= config.max_train_steps:
        console.tell(
            f"{where}: nothing is left to train, {state.update} updates are done and --max_train_steps is "
            f"{config.max_train_steps}."
        )
    return folder
