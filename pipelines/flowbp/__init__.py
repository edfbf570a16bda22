# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""FlowBP for diffusers: train flow models with the gradient of a reward, at constant memory.

Names are imported when first used, so that the pure numbers (`get_method`, `METHODS`) work without diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .callback import FlowBPCallback
    from .checks import RecordingError
    from .methods import METHODS, Method, get_method
    from .objectives import Objective
    from .rewards import load_reward
    from .surrogate import Leg, Surrogate, Term
    from .verification import verify

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "FlowBPCallback",
    "Leg",
    "Method",
    "Objective",
    "RecordingError",
    "Surrogate",
    "Term",
    "get_method",
    "load_reward",
    "verify",
]

_WHERE = {
    "FlowBPCallback": "callback",
    "Leg": "surrogate",
    "METHODS": "methods",
    "Method": "methods",
    "Objective": "objectives",
    "RecordingError": "checks",
    "Surrogate": "surrogate",
    "Term": "surrogate",
    "get_method": "methods",
    "load_reward": "rewards",
    "verify": "verification",
}

if not TYPE_CHECKING:
    # To a type checker a module with __getattr__ has every name.
    def __getattr__(name: str) -> object:
        if name not in _WHERE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
