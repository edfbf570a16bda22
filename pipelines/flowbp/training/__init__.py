# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Training runs: `train(config, backbone)` does what the scripts do.

Names are imported when first used, so that reading prompts or checkpoints needs no diffusers pipeline.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .backbone import Backbone
    from .config import TrainingConfig
    from .loop import train
    from .results import TrainingResult

__all__ = ["Backbone", "TrainingConfig", "TrainingResult", "train"]

_WHERE = {"Backbone": "backbone", "TrainingConfig": "config", "TrainingResult": "results", "train": "loop"}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _WHERE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_WHERE[name]}", __name__), name)
