# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the training scripts share besides the engine: seeds, checkpoints, the log of updates, the push to the Hub."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LORA_FILE = "pytorch_lora_weights.safetensors"

# What `push_to_hub` may send. Everything else in the output folder stays there.
PUSHED_FILES = ["README.md", LORA_FILE, "before_after.png", "reward_curve.png"]


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that any change of any part changes: what, run seed, update, process, ...

    Random numbers of an update depend on its number alone, so a resumed run needs no saved generator states.
    """
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_generator(*parts: int | str) -> torch.Generator:
    """CPU generator seeded with `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def missing_components(config: Mapping[str, Any]) -> dict[str, None]:
    """Components that a pipeline was saved without, as the arguments `from_pretrained` wants for them.

    Args:
        config: of `DiffusionPipeline.load_config`.
    """
    return {name: None for name, spec in config.items() if spec == [None, None]}


def save_checkpoint(
    folder: Path,
    lora: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    state: Mapping[str, Any],
) -> None:
    """Write a checkpoint that `load_checkpoint` reads: safetensors and JSON only.

    Args:
        folder: made anew; a half-written folder of that name is replaced.
        lora: adapter parameters by name.
        optimizer: whose state per parameter is written.
        lr_scheduler: learning rate schedule.
        state: plain values (update, position in the prompts, loss scaler).
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in lora.items()}, partial / "lora.safetensors"
    )
    moments = {
        f"{index}.{name}": value.detach().cpu().contiguous()
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    save_file(moments, partial / "optimizer.safetensors")
    content = {**state, "lr_scheduler": lr_scheduler.state_dict()}
    (partial / "state.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load_checkpoint(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a checkpoint into optimizer and schedule.

    Returns:
        The adapter parameters by name, and the plain values that were saved.

    Raises:
        ValueError: naming the file that is missing.
    """
    for name in ("lora.safetensors", "optimizer.safetensors", "state.json"):
        if not (folder / name).is_file():
            raise ValueError(f"Checkpoint {folder} has no {name}; choose a complete checkpoint.")
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    lr_scheduler.load_state_dict(state.pop("lr_scheduler"))
    # A schedule sets rates when it steps; until then the optimizer needs those of the checkpoint.
    for group, rate in zip(optimizer.param_groups, lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    return load_file(folder / "lora.safetensors"), state


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints `checkpoint-UPDATE` in a folder, in the order in which they were written.

    Not in the order of updates: the folder may hold later updates of an earlier run.
    """
    found = [
        path
        for path in output_dir.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name) and (path / "state.json").is_file()
    ]
    return sorted(found, key=lambda path: (path / "state.json").stat().st_mtime_ns)


def find_checkpoint(output_dir: Path, choice: str) -> Path:
    """The checkpoint that `--resume_from_checkpoint` means.

    Args:
        output_dir: the run's folder.
        choice: `latest`, a checkpoint's name in `output_dir`, or a path.

    Raises:
        ValueError: where there is none, naming those that exist.
    """
    existing = checkpoints(output_dir)
    if choice == "latest" and existing:
        return existing[-1]
    for path in (output_dir / choice, Path(choice)):
        if choice != "latest" and path.is_dir():
            return path
    names = ", ".join(path.name for path in existing) or "no checkpoints"
    raise ValueError(f"--resume_from_checkpoint {choice}: not found; {output_dir} has {names}.")


def read_log(path: Path, last: int) -> list[dict[str, Any]]:
    """The logged updates of an earlier run up to number `last`, for the reward curve of a resumed one."""
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [row for row in rows if row["step"] <= last]


def push_to_hub(output_dir: Path, repo_id: str) -> str:
    """Push the files of `PUSHED_FILES` that exist, and nothing else.

    Args:
        output_dir: the run's folder.
        repo_id: `user/name`.

    Returns:
        The commit's address.
    """
    from huggingface_hub import HfApi

    commit = HfApi().upload_folder(
        repo_id=repo_id, folder_path=output_dir, allow_patterns=PUSHED_FILES, commit_message="FlowBP LoRA"
    )
    return commit.commit_url
