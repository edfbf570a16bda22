# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What may be published of a run: the names on a list, and the files of an output folder that are on it."""

import re
import stat
from collections.abc import Callable
from pathlib import Path

LORA_FILE = "pytorch_lora_weights.safetensors"
TRANSFORMER_FOLDER = "transformer"
TEXT_FILES = ("README.md", "run.json")
PUBLISHED_FILES = (*TEXT_FILES, LORA_FILE, "before_after.png", "reward_curve.png")
PUBLISHED_IMAGES = re.compile(r"[0-9]+_(?:base|lora)\.png")
"""Names in the folder `images`."""


def _is_own(path: Path, kind: Callable[[int], bool]) -> bool:
    """Whether `path` itself, not what a link there points to, is of this kind."""
    try:
        return kind(path.lstat().st_mode)
    except OSError:
        return False


def allowed_files(output_dir: Path) -> list[Path]:
    """The files that may be published: those on the list that are regular files of the folder itself.

    Args:
        output_dir: the run's folder. Links in it, `images` included, are left out, wherever they point.
    """
    found = [output_dir / name for name in PUBLISHED_FILES]
    images = output_dir / "images"
    if _is_own(images, stat.S_ISDIR):
        found += sorted(path for path in images.iterdir() if PUBLISHED_IMAGES.fullmatch(path.name))
    return [path for path in found if _is_own(path, stat.S_ISREG)]
