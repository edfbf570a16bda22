# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Packages that only some uses need: each belongs to an extra of this distribution (setup.cfg)."""

from importlib.util import find_spec

EXTRAS = {
    "datasets": "training",
    "matplotlib": "training",
    "pyarrow": "training",
    "tensorboard": "training",
    "scipy": "geneval",
}


def remedy(extra: str) -> str:
    """How to install an extra."""
    return f'pip install "flowbp[{extra}]" (in a clone: pip install -e ".[{extra}]")'


def require(package: str, purpose: str) -> None:
    """Check that a package of `EXTRAS` is installed, without importing it.

    Args:
        package: its name at import.
        purpose: what needs it, for the message.

    Raises:
        ModuleNotFoundError: it is not, in one line with the extra that it belongs to.
    """
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"{purpose} needs {package}, which is not installed: {remedy(EXTRAS[package])}.")
