# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders, written atomically: safetensors and JSON under a manifest of hashes.

A folder is filled under another name, flushed to the disk and renamed. Names, for `checkpoint-N`, `best` and
`transformer`:

- `NAME`: written completely;
- `NAME.partial`: being written; no reader looks at it;
- `NAME.replaced`: the folder before, while a new `NAME` is renamed into its place. It counts where `NAME` is missing;
- `NAME.removed`: being deleted; no reader looks at it.

One process writes into a folder; others may read there at any time. The hashes find damage, not forgery.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from ..file_errors import writing
from ..files import apply_umask, move, sha256
from ..publishing.published_files import TRANSFORMER_FOLDER
from .distributed import all_ranks_max

MANIFEST = "manifest.json"
LARGEST_JSON = 64 * 2**20
"""Bytes. A run's state has a few MB at most; parsed, JSON takes up to 20 times its size in memory."""
_CHECKPOINT = re.compile(r"checkpoint-[0-9]+")
# What macOS and Windows put into folders that somebody looks into.
_OF_SYSTEMS = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini")
_LEFTOVER = re.compile(rf"(?:checkpoint-[0-9]+|best|{TRANSFORMER_FOLDER})\.(partial|removed|replaced)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message is one line: the file, what was expected, found, and a remedy."""


def damaged(path: Path, expected: str, found: str, remedy: str = "restore it") -> CheckpointError:
    """The error about a file of a checkpoint."""
    return CheckpointError(f"{path}: expected {expected}, found {found}; {remedy} or choose another checkpoint.")


def write_json(path: Path, content: Any) -> None:
    """Write plain values as JSON. Keys of objects are to be strings.

    Raises:
        ValueError: for NaN and infinite numbers, which JSON does not have.
    """
    path.write_bytes(_encode(content))


def read_json(path: Path) -> Any:
    """Read the plain values of `write_json`.

    Raises:
        CheckpointError: for a file that is missing, larger than `LARGEST_JSON`, or no JSON, which has neither NaN nor
            infinite numbers.
    """
    return _parse(path, _read(path, LARGEST_JSON))[0]


def _encode(content: Any) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def _parse(path: Path, data: bytes) -> tuple[Any, bytes]:
    """The content of a JSON text, and the text that `write_json` makes of it."""
    try:
        content = json.loads(data.decode())
        return content, _encode(content)  # refuses NaN and infinity, which json reads
    except (ValueError, RecursionError) as error:
        raise damaged(path, "JSON", f"{len(data)} bytes that are none ({error})") from error


def _read(path: Path, limit: float = math.inf) -> bytes:
    try:
        if (size := path.stat().st_size) > limit:
            raise damaged(path, f"{limit} bytes at most", f"{size}")
        return path.read_bytes()
    except OSError as error:
        raise damaged(path, "a file", error.strerror or str(error)) from error


def check_finite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse to save tensors that are not finite; for what writes them by other means than `save_tensors`.

    Raises:
        CheckpointError: naming the tensor with NaN or infinite values.
    """
    if (name := _not_finite(tensors)) is not None:
        raise CheckpointError(
            f"{path}: expected finite values, found NaN or infinity in {name}; lower the learning rate and resume "
            "from the last checkpoint."
        )


def _not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    return next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors of any device, shape and dtype to a safetensors file, so that no non-finite value is ever saved.

    Args:
        path: replaced if it exists.
        tensors: by name; they may share memory, and are copied to the CPU.

    Raises:
        CheckpointError: naming the tensor with NaN or infinite values. Nothing is written then.
        SafetensorError: where the disk does not take the file.
    """
    check_finite(path, tensors)
    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    save_file(copies, path)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name, on the CPU. Other formats are refused; nothing of them is executed.

    The file may be deleted afterwards: its content is read, not mapped.

    Raises:
        CheckpointError: for a file that is missing, no safetensors file, or has NaN or infinite values.
    """
    data = _read(path)
    try:
        tensors = load(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise damaged(path, "a safetensors file", f"{len(data)} bytes that are none ({error})") from error
    if (name := _not_finite(tensors)) is not None:
        raise damaged(path, "finite values", f"NaN or infinity in {name}")
    return tensors


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Write a checkpoint folder; a reader finds the old content or the new one, and a whole one at every moment.

    Args:
        folder: `checkpoint-N` or `best` in the output folder; replaced if it exists.
        fill: `fill(path)` writes the files into the empty folder `path`; files only, none called `manifest.json`.

    Raises:
        OSError: where the disk does not take it. Errors of `fill` propagate. The older folders are untouched then.
        CheckpointError: where `fill` left something else than files.
    """
    with _replacing(folder) as partial:
        with writing(folder):
            fill(partial)
        _seal(partial, _next_time(folder.parent))


def write_folder_together(
    accelerator: Accelerator, folder: Path, fill: Callable[[Path], None], fill_together: Callable[[Path], None]
) -> None:
    """Write a checkpoint folder with files of all processes, as `write_folder` does. Collective.

    Args:
        folder: see `write_folder`; on a disk that all processes share.
        fill: writes the files of the main process.
        fill_together: collective; writes a file of each process, and raises in all of them if it fails in one.

    Raises:
        OSError, CheckpointError: in every process, where one of them could not write.
    """
    is_main = accelerator.is_main_process
    with ExitStack() as stack:
        with _agreed(accelerator, folder):
            partial = stack.enter_context(_replacing(folder)) if is_main else _beside(folder, "partial")
            if is_main:
                fill(partial)
        fill_together(partial)
        with _agreed(accelerator, folder):
            # Read again from the machine's memory, by the process that wrote it.
            own = partial.glob(f"shard-{accelerator.process_index + 1:05d}-*")
            hashes = [(path.name, sha256(path)) for path in own]
        found = dict(gather_object(hashes))
        with _agreed(accelerator, folder):
            if is_main:
                _seal(partial, _next_time(folder.parent), found)
            stack.close()


@contextmanager
def _agreed(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """Raise in all processes where the block raises in one of them. Collective."""
    failure: Exception | None = None
    try:
        with writing(folder):
            yield
    except Exception as error:
        failure = error
    has_failed = all_ranks_max(accelerator, [float(failure is not None)])[0]
    if failure is not None:
        raise failure
    if has_failed:
        raise CheckpointError(f"{folder}: not written: another process could not write its part; see its message.")


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to fill and seal, which then takes the place of `folder`; removed after an error."""
    partial, replaced = _beside(folder, "partial"), _beside(folder, "replaced")
    _delete(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        if os.path.lexists(folder) and os.path.lexists(replaced):  # a run was killed before it removed the old one
            remove(replaced if _is_whole(folder) else folder)
        if os.path.lexists(folder):
            move(folder, replaced)
            _flush_folder(folder.parent)
        move(partial, folder)
        _flush_folder(folder.parent)
    except BaseException as error:
        _delete(partial)
        if isinstance(error, SafetensorError):  # how safetensors says that the disk is full
            raise OSError(f"{folder}: not written: {error}") from error
        raise
    if os.path.lexists(replaced):
        remove(replaced)


def current(folder: Path) -> Path:
    """The folder, or the one that a killed run was about to replace with it."""
    replaced = _beside(folder, "replaced")
    return replaced if not os.path.lexists(folder) and os.path.lexists(replaced) else folder


def check_folder(folder: Path) -> dict[str, Any]:
    """Compare a checkpoint folder with its manifest: names, sizes and SHA-256 of all files.

    Returns:
        The manifest: `format`, `written` (ISO, UTC), `files` (`sha256` and `size` in bytes by name), its own `sha256`.

    Raises:
        CheckpointError: naming the file that is missing, additional, altered, cut, or no file (a link, say).
    """
    if not folder.is_dir():
        raise damaged(folder, "a checkpoint folder", _kind(folder))
    try:
        kinds = {path.name: _kind(path) for path in folder.iterdir() if not _OF_SYSTEMS.fullmatch(path.name)}
    except OSError as error:
        raise damaged(folder, "a checkpoint folder", error.strerror or str(error)) from error
    manifest = _read_manifest(folder)
    for name in sorted({MANIFEST, *manifest["files"], *kinds}):
        if name != MANIFEST and name not in manifest["files"]:
            raise damaged(folder / name, f"nothing (it is not in {MANIFEST})", kinds[name], "delete it")
        if kinds.get(name) != "a file":
            raise damaged(folder / name, "a file", kinds.get(name, "nothing"))
    for name, expected in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
            if size != expected["size"]:
                raise damaged(folder / name, f"{expected['size']} bytes", f"{size}")
            digest = sha256(folder / name)
        except OSError as error:
            raise damaged(folder / name, "a file", error.strerror or str(error)) from error
        if digest != expected["sha256"]:
            raise damaged(folder / name, f"SHA-256 {expected['sha256']}", digest)
    return manifest


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders that look like checkpoints, damaged ones too, in the order in which they were written.

    Not in the order of updates: the folder may hold later updates of an earlier run. Links are left out.
    """
    if not output_dir.is_dir():
        return []
    present = {path.name for path in output_dir.iterdir() if path.is_dir() and not path.is_symlink()}
    names = [name for name in present if _CHECKPOINT.fullmatch(name)]
    names += [
        name
        for name in present
        if _CHECKPOINT.fullmatch(name.removesuffix(".replaced")) and name.removesuffix(".replaced") not in present
    ]
    return sorted((output_dir / name for name in names), key=lambda path: (_time_written(path), path.name))


def find_checkpoint(
    output_dir: Path, choice: str, tell: Callable[[str], None], check: Callable[[Path], object] = check_folder
) -> Path:
    """The whole checkpoint that `--resume_from_checkpoint` means.

    Args:
        output_dir: the run's folder.
        choice: `latest` (the newest whole one), a checkpoint's name in `output_dir`, or a path.
        tell: is given a line for each damaged checkpoint that `latest` skips.
        check: raises CheckpointError for a damaged one.

    Raises:
        CheckpointError: where there is none, naming those that exist; where the chosen one is damaged, naming the
            file.
    """
    if choice == "latest":
        return _find_latest(output_dir, tell, check)
    for path in (current(output_dir / choice), current(Path(choice))):
        if os.path.isdir(path):
            check(path)
            return path
    names = ", ".join(path.name for path in checkpoints(output_dir)) or "no checkpoints"
    raise CheckpointError(f"--resume_from_checkpoint {choice}: not found; {output_dir} has {names}.")


def _find_latest(output_dir: Path, tell: Callable[[str], None], check: Callable[[Path], object]) -> Path:
    while True:
        existing = _identities(output_dir)
        whole, damages = None, []
        for path in reversed(existing):
            try:
                check(path)
            except CheckpointError as error:
                damages.append(str(error))
            else:
                whole = path
                break
        # A training run may replace and remove folders while this one reads them: that is no damage, so look again.
        if (whole and not damages) or _identities(output_dir) == existing:
            break
    if not existing:
        raise CheckpointError(f"--resume_from_checkpoint latest: not found; {output_dir} has no checkpoints.")
    if whole is None:
        raise CheckpointError(
            f"--resume_from_checkpoint latest: {output_dir} has no whole checkpoint: {' '.join(damages)}"
        )
    for damage in damages:
        tell(f"Skipped a damaged checkpoint: {damage} Using {whole.name} instead.")
    return whole


def rotate(output_dir: Path, limit: int) -> None:
    """Keep the newest `limit` whole checkpoints and remove what is older; call it once the new one is complete.

    Damaged ones do not count; they stay until they are older than those kept. What has no manifest stays: another
    program may have written it.
    """
    kept = 0
    for folder in reversed(checkpoints(output_dir)):
        if kept == limit:
            if (folder / MANIFEST).exists():
                remove(folder)
        elif _is_whole(folder):
            kept += 1


def clean(output_dir: Path) -> None:
    """Remove what killed runs left behind of `checkpoint-N`, `best` and `transformer`; nothing else, and no links.

    `NAME.partial` and `NAME.removed` go, and `NAME.replaced` where `NAME` is whole.
    """
    if not output_dir.is_dir():
        return
    for path in list(output_dir.iterdir()):
        leftover = _LEFTOVER.fullmatch(path.name)
        if leftover is None or path.is_symlink() or not path.is_dir():
            continue
        if leftover[1] != "replaced":
            _delete(path)
        elif _is_whole(path.with_suffix("")):
            remove(path)


def _beside(folder: Path, suffix: str) -> Path:
    return folder.parent / f"{folder.name}.{suffix}"


def _seal(folder: Path, written: datetime, hashes: Mapping[str, str] | None = None) -> None:
    """Flush a folder's files to the disk and describe them in its manifest; some hashes may be known."""
    known = hashes or {}
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name == MANIFEST or _kind(path) != "a file":
            raise CheckpointError(
                f"{path}: expected only files in a checkpoint, and {MANIFEST} not among them, found {_kind(path)}; "
                "write it elsewhere."
            )
        _flush(path)
        files[path.name] = {"sha256": known.get(path.name) or sha256(path), "size": path.stat().st_size}
    apply_umask(folder)
    content = {"format": 1, "written": written.isoformat(timespec="microseconds"), "files": files}
    write_json(folder / MANIFEST, {**content, "sha256": _sha256_of(content)})
    _flush(folder / MANIFEST)
    _flush_folder(folder)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with not one bit changed: it is its content's only spelling, and holds the rest's hash."""
    path = folder / MANIFEST
    if (kind := _kind(path)) != "a file":
        raise damaged(path, "a file", kind)
    data = _read(path, LARGEST_JSON)
    content, text = _parse(path, data)
    if not isinstance(content, dict) or data != text:
        raise damaged(path, "the text as it was written", f"{len(data)} other bytes")
    rest = {key: value for key, value in content.items() if key != "sha256"}
    if content.get("sha256") != _sha256_of(rest):
        raise damaged(path, f"its own SHA-256 {content.get('sha256')}", _sha256_of(rest))
    if content.get("format") != 1:
        raise damaged(path, "format 1", f"format {content.get('format')}, of another version of flowbp")
    if _time(content.get("written")) is None:
        raise damaged(path, "a time with its zone, before the year 3000", f"written {content.get('written')!r}")
    files = content.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(each, dict) and type(each.get("size")) is int and isinstance(each.get("sha256"), str)
        for each in files.values()
    ):
        raise damaged(path, "files with size and sha256", "others")
    return content


def _is_whole(folder: Path) -> bool:
    try:
        check_folder(folder)
    except CheckpointError:
        return False
    return True


def _time_written(folder: Path) -> datetime:
    try:
        return datetime.fromisoformat(_read_manifest(folder)["written"])
    except (CheckpointError, OSError):
        pass
    try:
        time = _time(datetime.fromtimestamp(folder.stat().st_mtime, UTC).isoformat())
    except (OSError, ValueError, OverflowError):  # removed by the training run a moment ago, or no year of a calendar
        time = None
    return time or datetime.fromtimestamp(0, UTC)


def _time(text: Any) -> datetime | None:
    """The time that a text says; None for other texts and for years after which no later time could be written."""
    try:
        time = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return time if time.tzinfo is not None and time.year < 3000 else None


def _next_time(output_dir: Path) -> datetime:
    """Now, but later than all checkpoints: a run may resume on a machine whose clock is behind."""
    existing = checkpoints(output_dir)
    now = datetime.now(UTC)
    return max(now, _time_written(existing[-1]) + timedelta(microseconds=1)) if existing else now


def _identities(output_dir: Path) -> dict[Path, int]:
    """Checkpoints as `checkpoints` orders them, with what tells a folder from another one of the same name."""
    found = {}
    for path in checkpoints(output_dir):
        try:
            found[path] = path.stat().st_ino
        except FileNotFoundError:
            found[path] = -1
    return found


def _kind(path: Path) -> str:
    if path.is_symlink():
        return "a link"
    if path.is_file():
        return "a file"
    if path.is_dir():
        return "a folder"
    return "something else" if path.exists() else "nothing"


def _sha256_of(content: Any) -> str:
    return hashlib.sha256(_encode(content)).hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on the disk."""
    # Windows flushes only what is open for writing, which a folder cannot be.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(path: Path) -> None:
    try:
        _flush(path)
    except OSError as error:
        # Some network file systems cannot flush folders, and Windows cannot open them (EACCES).
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


def remove(folder: Path) -> None:
    """Delete a checkpoint so that no reader ever takes what is left of it for a damaged one.

    One that a program has open on Windows stays whole; the next `rotate` tries again.
    """
    removed = _beside(folder.with_suffix("") if folder.suffix == ".replaced" else folder, "removed")
    _delete(removed)
    try:
        move(folder, removed)
    except PermissionError:
        if sys.platform != "win32":
            raise
        return
    _flush_folder(folder.parent)
    _delete(removed)


def _delete(path: Path) -> None:
    """Delete a folder with all that is in it, as well as possible; of a link the link itself."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        # What stays (a file that NFS keeps while it is open) has a name that no reader looks at.
        shutil.rmtree(path, ignore_errors=True)
