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
PUBLISHED_IMAGES = re.compile(r"[0-9]+_(?:base|trained|lora)\.png")
"""Names in the folder `images`; runs before format 3 of `run.json` wrote `lora`."""
PUBLISHED_WEIGHTS = re.compile(
    r"config\.json|diffusion_pytorch_model(?:-[0-9]{5}-of-[0-9]{5})?\.safetensors"
    r"|diffusion_pytorch_model\.safetensors\.index\.json"
)
"""Names in the folder `transformer`, where there is no LoRA."""


def _is_own(path: Path, kind: Callable[[int], bool]) -> bool:
    """Whether `path` itself, not what a link there points to, is of this kind."""
    try:
        return kind(path.lstat().st_mode)
    except OSError:
        return False


def allowed_files(output_dir: Path) -> list[Path]:
    """The files that may be published: those on the list that are regular files of the folder itself.

    Args:
        output_dir: the run's folder. Links in it, folders included, are left out, wherever they point.
    """
    found = [output_dir / name for name in PUBLISHED_FILES]
    folders = {"images": PUBLISHED_IMAGES}
    if not (output_dir / LORA_FILE).exists():
        folders[TRANSFORMER_FOLDER] = PUBLISHED_WEIGHTS
    for name, names in folders.items():
        if _is_own(output_dir / name, stat.S_ISDIR):
            found += sorted(path for path in (output_dir / name).iterdir() if names.fullmatch(path.name))
    return [path for path in found if _is_own(path, stat.S_ISREG)]
