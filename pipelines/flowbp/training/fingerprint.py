# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Hashes of a run's prompts and of its rewards' code, and library versions; compared when a run resumes."""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from ..files import sha256
from ..publishing.run_info import versions
from ..rewards import REWARDS, part_names, reward_spec
from .config import TrainingConfig
from .optimizers import OPTIMIZERS
from .prompts import Record


def fingerprint(
    config: TrainingConfig,
    records: Sequence[Record],
    evaluation: Sequence[Record],
    reward: Any,
    lora: str | None,
    commit: str | None,
) -> dict:
    """Counts, hashes and versions, as JSON has them.

    Args:
        records: of the training.
        evaluation: records of the evaluation.
        reward: a callable in place of `config.reward`, or None.
        lora: digest of the LoRA that the run starts from.
        commit: of the model on the Hub; None for a folder.
    """
    names = [] if config.reward is None else part_names(config.reward)
    names += [] if config.eval_reward is None else part_names(config.eval_reward)
    code = digests_of_code(names)
    if callable(reward):
        code["reward"] = _digest_of_code(reward)
    library = OPTIMIZERS[config.optimizer].library
    return {
        "prompts": f"{len(records)} prompts ({_digest(records)})",
        "evaluation prompts": f"{len(evaluation)} prompts ({_digest(evaluation)})",
        **({} if lora is None else {"content of --init_lora": lora[:16]}),
        **({} if commit is None else {"commit of the model": commit}),
        **{f"code of {name}": digest for name, digest in code.items()},
        **{f"version of {name}": version for name, version in versions(library).items()},
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, each as `NAME was X, is Y`."""
    names = dict.fromkeys([*now, *before])
    return [
        f"{name} was {before.get(name)}, is {now.get(name)}" for name in names if before.get(name) != now.get(name)
    ]


def check_same_prompts(accelerator: Accelerator, records: Sequence[Record]) -> None:
    """Refuse processes that read different prompts. Collective.

    Raises:
        ValueError: naming the first process that differs.
    """
    if accelerator.num_processes == 1:
        return
    digests = gather_object([_digest(records)])
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise ValueError(
                f"--prompts: process {rank} read other prompts than process 0; give all processes the same file."
            )


def _digest(records: Sequence[Record]) -> str:
    content = json.dumps([[record.prompt, dict(record.columns)] for record in records], default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def digests_of_code(rewards: Sequence[str]) -> dict[str, str | None]:
    """Hashes of the files that define the user's own rewards among these names."""
    return {name: _digest_of_code(reward_spec(name).factory) for name in rewards if name not in REWARDS}


def _digest_of_code(function: Callable[..., Any]) -> str | None:
    """A hash of the file that defines a reward; None where there is no file."""
    # An instance, such as a module, has its code in its class; a notebook's cell has no file.
    is_code = inspect.isfunction(function) or isinstance(function, type)
    try:
        path = inspect.getsourcefile(inspect.unwrap(function) if is_code else type(function))
        return None if path is None else sha256(Path(path))[:16]
    except (TypeError, OSError):
        return None
