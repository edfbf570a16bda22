# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The folder that a run writes into: of one run at a time, and nothing in it is removed that no run wrote."""

import re
import shutil
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..publishing.published_files import LORA_FILE, PUBLISHED_IMAGES, TRANSFORMER_FOLDER
from .checkpoints import MANIFEST

LOCK = ".flowbp.lock"
RESCUE = ".flowbp.rescue"
"""Marks that a failing process writes the last checkpoint."""
FILES = ("log.jsonl", "run.json", "README.md", LORA_FILE, "before_after.png", "reward_curve.png")
# Folders, and the names of the files that a run writes there.
FOLDERS = {
    "images": PUBLISHED_IMAGES,
    "validation": re.compile(r"[0-9]{6}\.png"),
    "evaluation": re.compile(r"[0-9]{6}\.png"),
}
CHECKPOINTS = re.compile(rf"(?:checkpoint-[0-9]+|best|{TRANSFORMER_FOLDER})(?:\.replaced)?")


class OutputFolder:
    """A run's folder, from its claim to its release; by the main process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Released by the operating system if the process is killed.
        self._lock = FileLock(path / LOCK, timeout=0)
        self._is_new = False

    def claim(self, is_resumed: bool, overwrite: bool, init_lora: str | None = None) -> None:
        """Create the folder and lock it, and see that nothing there would be lost.

        Args:
            is_resumed: the run continues one of this folder.
            overwrite: what an earlier run left is removed.
            init_lora: that the run starts from, which must not be among that.

        Raises:
            ValueError: another run has the folder, or it holds what this run would replace.
        """
        self._is_new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"--output_dir {self.path}: another run writes into this folder; choose another one, or wait for its "
                "end."
            ) from None
        (self.path / RESCUE).unlink(missing_ok=True)
        if is_resumed:
            return
        try:
            self._check_contents(overwrite, init_lora)
        except ValueError:
            self.release()
            raise
        if overwrite:
            self._remove()

    def check(self) -> None:
        """See that the folder is still the one that was claimed; to be called before writing.

        Raises:
            FileNotFoundError: it was removed or renamed.
        """
        if self._lock.is_locked and not (self.path / LOCK).exists():
            raise FileNotFoundError(
                f"--output_dir {self.path}: the folder was removed or renamed while the run was writing into it; "
                "nothing more is written. Move it back and resume from its last checkpoint."
            )

    def release(self) -> None:
        """Let other runs have the folder. A new one into which nothing was written is removed.

        Else the lock's file stays: removing it would let two runs in at once.
        """
        is_unused = self._is_new and self._lock.is_locked and [path.name for path in self.path.glob("*")] == [LOCK]
        self._lock.release()
        if is_unused:
            # A run that has just claimed it finds out in `check`; on Windows it holds the file open.
            with suppress(OSError):
                (self.path / LOCK).unlink()
                self.path.rmdir()

    def _found(self) -> list[Path]:
        """What a run would replace or mix with its own."""
        found = [self.path / name for name in FILES if (self.path / name).exists()]
        found += [path for path in sorted(self.path.iterdir()) if _is_checkpoint(path)]
        for folder, names in FOLDERS.items():
            # Links are not followed.
            if (self.path / folder).is_dir() and not (self.path / folder).is_symlink():
                found += [path for path in (self.path / folder).iterdir() if names.fullmatch(path.name)]
        return found

    def _check_contents(self, overwrite: bool, init_lora: str | None) -> None:
        found = self._found()
        # Every run begins with its log.
        has_log = any(map(_is_log, found))
        for path in found:
            is_own = not path.is_symlink() and (path / MANIFEST).is_file() if _is_checkpoint(path) else has_log
            if not is_own:
                raise ValueError(
                    f"--output_dir {self.path}: {path.relative_to(self.path)} in this folder was not written by a "
                    "run; move it, or choose another folder."
                )
        start = None if init_lora is None else Path(init_lora).resolve()
        if overwrite and start and {start, start / LORA_FILE, *start.parents} & {path.resolve() for path in found}:
            raise ValueError(
                f"--overwrite_output_dir would remove --init_lora {init_lora}; move it, or choose another folder."
            )
        # What a run leaves that was killed before its first checkpoint; there is nothing to resume.
        is_left_over = all(_is_log(path) or path.parent.name in ("evaluation", "validation") for path in found)
        if is_left_over:
            self._remove()
        elif not overwrite:
            names = ", ".join(str(path.relative_to(self.path)) for path in found[:3])
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ValueError(
                f"--output_dir {self.path} holds an earlier run ({names}{more}); continue it with "
                "--resume_from_checkpoint latest, choose another folder, or remove it with --overwrite_output_dir."
            )

    def _remove(self) -> None:
        """Remove what an earlier run left, and nothing else."""
        for path in self._found():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _is_checkpoint(path: Path) -> bool:
    """Whether a path has the name of a folder that comes with a manifest."""
    return CHECKPOINTS.fullmatch(path.name) is not None


def _is_log(path: Path) -> bool:
    """Whether a file is a run's log, maybe with a line that was cut; not one of the same name that no run wrote."""
    if path.name != "log.jsonl":
        return False
    with path.open("rb") as file:
        start = file.read(8)
    return b'{"step":'.startswith(start)
