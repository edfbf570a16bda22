# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders: written atomically; damaged ones are refused by name, or fallen back from."""

import errno
import json
import os
import random
import re
import shutil
import sys
import tracemalloc
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from training_scripts import environment, run_program
from warm_python import warm

from flowbp.training import checkpoints
from flowbp.training.checkpoints import CheckpointError

ROOT = Path(__file__).parents[2]
TENSORS = ["lora", "optimizer", "ema", "best", "pytorch_lora_weights"]
FILES = [*(f"{name}.safetensors" for name in TENSORS), "state.json", "manifest.json"]


def fill(folder: Path) -> None:
    """The files of a training run's checkpoint."""
    for number, name in enumerate(TENSORS):
        tensors = {"a.weight": torch.full((4, 8), float(number)), "b.weight": torch.randn(8, 4)}
        checkpoints.save_tensors(folder / f"{name}.safetensors", tensors)
    checkpoints.write_json(folder / "state.json", {"update": 20, "prompts": {"epoch": 1, "place": 3}})


def fill_small(folder: Path) -> None:
    (folder / "lora.safetensors").write_bytes(b"weights")


def never(line: str) -> None:
    raise AssertionError(line)


def names(output_dir: Path) -> set[str]:
    return {path.name for path in output_dir.iterdir()}


def write(output_dir: Path, *updates: int) -> list[Path]:
    """Small checkpoints of some updates, written in this order."""
    folders = [output_dir / f"checkpoint-{update}" for update in updates]
    for folder in folders:
        checkpoints.write_folder(folder, fill_small)
    return folders


def damage(folder: Path) -> None:
    (folder / "lora.safetensors").write_bytes(b"Weights")


def set_manifest(folder: Path, **values: Any) -> None:
    """Change what a checkpoint's manifest says; its own hash still fits."""
    path = folder / "manifest.json"
    content = {**json.loads(path.read_text()), **values}
    del content["sha256"]
    content = {name: value for name, value in content.items() if value is not None}
    checkpoints.write_json(path, {**content, "sha256": checkpoints._sha256_of(content)})


def set_time(folder: Path, time: datetime) -> None:
    set_manifest(folder, written=time.isoformat(timespec="microseconds"))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """An output folder with two checkpoints."""
    output_dir = tmp_path_factory.mktemp("written")
    checkpoints.write_folder(output_dir / "checkpoint-10", fill)
    checkpoints.write_folder(output_dir / "checkpoint-20", fill)
    return output_dir


@pytest.fixture
def output_dir(written: Path, tmp_path: Path) -> Path:
    """A copy of `written` for a test to spoil."""
    return shutil.copytree(written, tmp_path / "run")


def assert_refused(output_dir: Path, name: str) -> None:
    """checkpoint-20 is refused by path and by name, with the name of the file; `latest` falls back and says so."""
    for choice in ("checkpoint-20", str(output_dir / "checkpoint-20")):
        with pytest.raises(CheckpointError, match=re.escape(f"checkpoint-20/{name}: expected ")) as refused:
            checkpoints.find_checkpoint(output_dir, choice, never)
        assert "\n" not in str(refused.value)
    told: list[str] = []
    assert checkpoints.find_checkpoint(output_dir, "latest", told.append) == output_dir / "checkpoint-10"
    assert len(told) == 1
    assert f"checkpoint-20/{name}: " in told[0]
    assert "Using checkpoint-10 instead" in told[0]
    assert "\n" not in told[0]


def test_a_whole_checkpoint(written: Path) -> None:
    for choice in ("latest", "checkpoint-20", str(written / "checkpoint-20")):
        assert checkpoints.find_checkpoint(written, choice, never) == written / "checkpoint-20"
    manifest = checkpoints.check_folder(written / "checkpoint-20")
    assert names(written / "checkpoint-20") == set(FILES)
    assert set(manifest["files"]) == set(FILES) - {"manifest.json"}
    size = (written / "checkpoint-20" / "lora.safetensors").stat().st_size
    assert manifest["files"]["lora.safetensors"]["size"] == size
    assert abs(datetime.fromisoformat(manifest["written"]) - datetime.now(UTC)) < timedelta(hours=1)
    assert names(written) == {"checkpoint-10", "checkpoint-20"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("instead", ["nothing", "link", "pipe"])
def test_something_else_in_place_of_a_file(output_dir: Path, tmp_path: Path, name: str, instead: str) -> None:
    path = output_dir / "checkpoint-20" / name
    path.rename(tmp_path / "elsewhere")
    if instead == "link":
        path.symlink_to(tmp_path / "elsewhere")
        assert path.is_file()
    elif instead == "pipe":
        os.mkfifo(path)  # reading it would wait for ever
    assert_refused(output_dir, name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [0, 0.5], ids=["empty", "half"])
def test_cut(output_dir: Path, name: str, part: float) -> None:
    path = output_dir / "checkpoint-20" / name
    size = path.stat().st_size
    os.truncate(path, int(size * part))
    assert_refused(output_dir, name)
    if name != "manifest.json":
        with pytest.raises(CheckpointError, match=f"expected {size} bytes, found {int(size * part)};"):
            checkpoints.check_folder(path.parent)


@pytest.mark.parametrize("name", FILES)
def test_one_bit_flipped(output_dir: Path, name: str) -> None:
    path = output_dir / "checkpoint-20" / name
    original = path.read_bytes()
    chosen = random.Random(name)
    bits = [0, 7, len(original) * 8 - 8, len(original) * 8 - 1, *chosen.sample(range(len(original) * 8), 8)]
    for bit in bits:
        changed = bytearray(original)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert_refused(output_dir, name)
    path.write_bytes(original)
    assert checkpoints.find_checkpoint(output_dir, "latest", never) == output_dir / "checkpoint-20"


def test_no_bit_of_the_manifest_may_differ(tmp_path: Path) -> None:
    (folder,) = write(tmp_path, 1)
    with (folder / "manifest.json").open("r+b", buffering=0) as file:
        original = file.read()
        for bit in range(len(original) * 8):
            place = bit // 8
            os.pwrite(file.fileno(), bytes([original[place] ^ 1 << bit % 8]), place)
            with pytest.raises(CheckpointError, match=r"manifest\.json: expected "):
                checkpoints.check_folder(folder)
            os.pwrite(file.fileno(), original[place : place + 1], place)
    checkpoints.check_folder(folder)


@pytest.mark.parametrize(
    "content", [b"[]\n", b"{}\n", b'{"format": 1e999}\n', b"[" * 100_000, b"\xff\xfe", b"7" * 9999]
)
def test_something_else_as_manifest(output_dir: Path, content: bytes) -> None:
    (output_dir / "checkpoint-20" / "manifest.json").write_bytes(content)
    assert_refused(output_dir, "manifest.json")


@pytest.mark.parametrize(("old", "new"), [(b"}\n", b"}\n "), (b",\n", b",\t"), (b"{", b'{"format": 1,')])
def test_another_spelling_of_the_manifest(output_dir: Path, old: bytes, new: bytes) -> None:
    path = output_dir / "checkpoint-20" / "manifest.json"
    original = path.read_bytes()
    changed = original.replace(old, new, 1)
    assert changed != original and json.loads(changed) == json.loads(original)
    path.write_bytes(changed)
    assert_refused(output_dir, "manifest.json")


def test_a_manifest_of_another_format(output_dir: Path) -> None:
    set_manifest(output_dir / "checkpoint-20", format=2)
    with pytest.raises(CheckpointError, match="expected format 1, found format 2"):
        checkpoints.check_folder(output_dir / "checkpoint-20")


@pytest.mark.parametrize(
    "values",
    [
        {"written": "9999-12-31T23:59:59.999999+00:00"},
        {"written": "2026-01-01T00:00:00"},  # of which zone?
        {"written": "yesterday"},
        {"written": 5},
        {"written": None},
        {"files": None},
        {"files": ["state.json"]},
        {"files": {"state.json": {"size": 1}}},
        {"files": {"state.json": {"size": "1", "sha256": "0"}}},
    ],
    ids=str,
)
def test_a_manifest_that_says_nothing_sensible(output_dir: Path, values: dict[str, Any]) -> None:
    set_manifest(output_dir / "checkpoint-20", **values)
    assert_refused(output_dir, "manifest.json")
    # The next one is ordered after it, and is whole.
    (new,) = write(output_dir, 5)
    assert checkpoints.checkpoints(output_dir)[-1] == new
    assert checkpoints.find_checkpoint(output_dir, "latest", never) == new


@pytest.mark.parametrize("year", [2400, 9000, 10**6])
def test_a_damaged_manifest_in_a_folder_of_an_absurd_time(tmp_path: Path, year: int) -> None:
    old, damaged = write(tmp_path, 1, 2)
    (damaged / "manifest.json").write_bytes(b"")
    try:
        os.utime(damaged, ((year - 1970) * 365.2425 * 86400,) * 2)
    except OSError:
        pytest.skip("this file system has no such times")
    told: list[str] = []
    assert checkpoints.find_checkpoint(tmp_path, "latest", told.append) == old and len(told) <= 1
    (new,) = write(tmp_path, 3)
    assert checkpoints.checkpoints(tmp_path)[-1] == new


def test_an_additional_file_or_folder(output_dir: Path) -> None:
    extra = output_dir / "checkpoint-20" / "random_states_0.pkl"
    extra.write_bytes(b"x")
    assert_refused(output_dir, extra.name)
    extra.unlink()
    extra.mkdir()
    assert_refused(output_dir, extra.name)


def test_two_damaged_checkpoints_are_told_in_turn(output_dir: Path) -> None:
    checkpoints.write_folder(output_dir / "checkpoint-30", fill)
    (output_dir / "checkpoint-30" / "ema.safetensors").unlink()
    (output_dir / "checkpoint-20" / "best.safetensors").unlink()
    told: list[str] = []
    assert checkpoints.find_checkpoint(output_dir, "latest", told.append) == output_dir / "checkpoint-10"
    assert [line.count("ema.safetensors") for line in told] == [1, 0]
    assert [line.count("best.safetensors") for line in told] == [0, 1]


def test_no_whole_checkpoint(output_dir: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-20"):
        (output_dir / name / "state.json").unlink()
    with pytest.raises(
        CheckpointError, match="has no whole checkpoint: .*checkpoint-20/state.json.*checkpoint-10/state"
    ):
        checkpoints.find_checkpoint(output_dir, "latest", never)


def test_no_checkpoint(tmp_path: Path) -> None:
    for output_dir in (tmp_path, tmp_path / "absent"):
        for choice in ("latest", "checkpoint-3"):
            with pytest.raises(CheckpointError, match=f"{choice}: not found; .* has no checkpoints"):
                checkpoints.find_checkpoint(output_dir, choice, never)
        checkpoints.clean(output_dir)
        checkpoints.rotate(output_dir, 1)


@pytest.mark.parametrize(
    "choice", ["checkpoint-7", "absent/checkpoint-1", "x" * 5000, "checkpoint-2/lora.safetensors"]
)
def test_a_choice_that_does_not_exist(tmp_path: Path, choice: str) -> None:
    write(tmp_path, 2, 1)
    with pytest.raises(CheckpointError, match=r"not found; .* has checkpoint-2, checkpoint-1\."):
        checkpoints.find_checkpoint(tmp_path, choice, never)


@pytest.mark.parametrize("choice", ["", ".", ".."])
def test_a_choice_that_is_no_checkpoint(tmp_path: Path, choice: str) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json: expected a file, found nothing"):
        checkpoints.find_checkpoint(tmp_path, choice, never)


def test_order_is_that_of_writing(tmp_path: Path) -> None:
    first, second, third = write(tmp_path, 20, 30, 5)
    assert checkpoints.checkpoints(tmp_path) == [first, second, third]
    assert checkpoints.find_checkpoint(tmp_path, "latest", never) == third
    write(tmp_path, 20)
    assert checkpoints.checkpoints(tmp_path) == [second, third, first]


def test_a_damaged_manifest_is_ordered_by_the_folder(tmp_path: Path) -> None:
    first, second, third = write(tmp_path, 1, 2, 3)
    (second / "manifest.json").write_bytes(b"")
    os.utime(second, (0, 0))
    assert checkpoints.checkpoints(tmp_path) == [second, first, third]
    os.utime(second, (2**32, 2**32))
    assert checkpoints.checkpoints(tmp_path) == [first, third, second]


def test_a_new_checkpoint_is_the_newest_where_the_clock_is_behind(tmp_path: Path) -> None:
    (ahead,) = write(tmp_path, 1)
    set_time(ahead, datetime.now(UTC) + timedelta(days=2))
    (new,) = write(tmp_path, 2)
    assert checkpoints.find_checkpoint(tmp_path, "latest", never) == new
    checkpoints.rotate(tmp_path, 1)
    assert names(tmp_path) == {"checkpoint-2"}


def test_what_does_not_look_like_a_checkpoint(tmp_path: Path) -> None:
    (folder,) = write(tmp_path, 1)
    for name in ("checkpoint-2.partial", "checkpoint-3.removed", "checkpoint-final", "checkpoint-4.bak", "best"):
        shutil.copytree(folder, tmp_path / name)
    (tmp_path / "checkpoint-5").write_text("a file")
    (tmp_path / "checkpoint-6").symlink_to(folder)
    assert checkpoints.checkpoints(tmp_path) == [folder]
    # By name or path the user may choose it.
    assert checkpoints.find_checkpoint(tmp_path, "checkpoint-4.bak", never) == tmp_path / "checkpoint-4.bak"
    assert checkpoints.find_checkpoint(tmp_path, str(tmp_path / "checkpoint-6"), never) == tmp_path / "checkpoint-6"


def test_rotation_keeps_the_newest_whole_ones(tmp_path: Path) -> None:
    other = tmp_path / "checkpoint-5"
    other.mkdir()
    folders = write(tmp_path, 50, 10, 20, 30, 40)
    damage(folders[3])
    checkpoints.rotate(tmp_path, 5)
    assert names(tmp_path) == {path.name for path in [other, *folders]}
    checkpoints.rotate(tmp_path, 2)
    assert names(tmp_path) == {"checkpoint-5", "checkpoint-20", "checkpoint-30", "checkpoint-40"}
    checkpoints.rotate(tmp_path, 1)
    # Another program's, by its name.
    assert names(tmp_path) == {"checkpoint-5", "checkpoint-40"}


def test_rotation_never_removes_the_newest_whole_one(tmp_path: Path) -> None:
    folders = write(tmp_path, 1, 2, 3)
    damage(folders[1])
    damage(folders[2])
    checkpoints.rotate(tmp_path, 1)
    assert checkpoints.checkpoints(tmp_path) == folders
    damage(folders[0])
    checkpoints.rotate(tmp_path, 1)
    assert checkpoints.checkpoints(tmp_path) == folders


def test_links_are_not_followed_when_deleting(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    output_dir = tmp_path / "run"
    old, new = write(output_dir, 1, 2)
    (old / "link").symlink_to(outside)
    for name in ("checkpoint-3.partial", "checkpoint-4.removed", "checkpoint-5", "best.partial"):
        (output_dir / name).symlink_to(outside)
    shutil.copytree(new, output_dir / "checkpoint-6.removed")
    (output_dir / "checkpoint-6.removed" / "link").symlink_to(outside)
    checkpoints.clean(output_dir)
    checkpoints.rotate(output_dir, 1)
    links = {"checkpoint-3.partial", "checkpoint-4.removed", "checkpoint-5", "best.partial"}
    assert names(output_dir) == {"checkpoint-2", *links}
    write(output_dir, 3, 5)  # in place of links
    assert not (output_dir / "checkpoint-5").is_symlink()
    assert names(outside) == {"precious"}


def test_clean_removes_leftovers_and_nothing_else(tmp_path: Path) -> None:
    one, two = write(tmp_path, 1, 2)
    checkpoints.write_folder(tmp_path / "best", fill_small)
    gone = ["checkpoint-1.partial", "checkpoint-1.replaced", "checkpoint-9.removed", "best.partial", "best.replaced"]
    kept = [
        "checkpoint-2.replaced",
        "checkpoint-7.replaced",
        "mine.partial",
        "checkpoint-a.removed",
        "my best.partial",
    ]
    for name in [*gone, *kept]:
        shutil.copytree(one, tmp_path / name)
    (tmp_path / "checkpoint-8.partial").write_text("a file is not ours")
    damage(two)
    checkpoints.clean(tmp_path)
    assert names(tmp_path) == {*kept, "checkpoint-1", "checkpoint-2", "best", "checkpoint-8.partial"}


def test_a_replaced_checkpoint_counts_while_the_new_one_is_missing(tmp_path: Path) -> None:
    old, new = write(tmp_path, 1, 2)
    replaced = new.rename(tmp_path / "checkpoint-2.replaced")
    assert checkpoints.checkpoints(tmp_path) == [old, replaced]
    for choice in ("latest", "checkpoint-2", str(new)):
        assert checkpoints.find_checkpoint(tmp_path, choice, never) == replaced
    assert checkpoints.current(new) == replaced
    assert checkpoints.current(old) == old
    assert checkpoints.current(tmp_path / "checkpoint-3") == tmp_path / "checkpoint-3"
    checkpoints.rotate(tmp_path, 1)
    assert names(tmp_path) == {"checkpoint-2.replaced"}
    write(tmp_path, 2)
    assert names(tmp_path) == {"checkpoint-2"}


@pytest.mark.parametrize("plain_is_damaged", [False, True])
def test_writing_over_what_a_killed_run_left(tmp_path: Path, plain_is_damaged: bool) -> None:
    """Of a folder and the one that it replaced, the whole one stays until the next is complete."""
    (folder,) = write(tmp_path, 1)
    replaced = shutil.copytree(folder, tmp_path / "checkpoint-1.replaced")
    damage(folder if plain_is_damaged else replaced)
    kept = []
    original = os.replace

    def watch(source, target):
        kept.append(any(checkpoints._is_whole(path) for path in (folder, replaced)))
        original(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", watch)
        write(tmp_path, 1)
    assert kept and all(kept)
    assert names(tmp_path) == {"checkpoint-1"}
    assert checkpoints.find_checkpoint(tmp_path, "latest", never) == folder


@pytest.mark.parametrize("error", [RuntimeError("no"), OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_folder(tmp_path: Path, error: BaseException) -> None:
    (folder,) = write(tmp_path, 1)
    before = (folder / "manifest.json").read_bytes()

    def fail(partial: Path) -> None:
        fill_small(partial)
        raise error

    with pytest.raises(type(error)) as raised:
        checkpoints.write_folder(folder, fail)
    assert raised.value is error
    assert names(tmp_path) == {"checkpoint-1"}
    assert (folder / "manifest.json").read_bytes() == before
    checkpoints.check_folder(folder)


def test_what_a_killed_run_wrote_is_no_part_of_the_next_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1.partial").mkdir()
    (tmp_path / "checkpoint-1.partial" / "old").write_text("half")
    (folder,) = write(tmp_path, 1)
    assert names(folder) == {"lora.safetensors", "manifest.json"}


@pytest.mark.parametrize("kind", ["folder", "link", "manifest.json"])
def test_only_files_may_be_written(tmp_path: Path, kind: str) -> None:
    def wrong(partial: Path) -> None:
        fill_small(partial)
        if kind == "folder":
            (partial / kind).mkdir()
        elif kind == "link":
            (partial / kind).symlink_to(partial / "lora.safetensors")
        else:
            (partial / kind).write_text("{}")

    with pytest.raises(CheckpointError, match=f"{kind}: expected only files in a checkpoint"):
        checkpoints.write_folder(tmp_path / "checkpoint-1", wrong)
    assert names(tmp_path) == set()


def test_all_is_flushed_before_it_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (old,) = write(tmp_path, 1)
    calls: list[object] = []
    flush, rename = os.fsync, os.replace

    def watched_flush(descriptor: int) -> None:
        calls.append(os.fstat(descriptor).st_ino)
        flush(descriptor)

    def watched_rename(source, target) -> None:
        calls.append((Path(source).name, Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watched_flush)
    monkeypatch.setattr(os, "replace", watched_rename)
    write(tmp_path, 1)
    parent, lora, manifest, new = (
        path.stat().st_ino for path in (tmp_path, old / "lora.safetensors", old / "manifest.json", old)
    )
    assert calls == [
        *(lora, manifest, new),
        *(("checkpoint-1", "checkpoint-1.replaced"), parent),
        *(("checkpoint-1.partial", "checkpoint-1"), parent),
        *(("checkpoint-1.replaced", "checkpoint-1.removed"), parent),
    ]


def test_a_file_system_that_cannot_flush_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = os.fsync
    number = errno.EINVAL

    def refuse_folders(descriptor: int) -> None:
        if os.fstat(descriptor).st_nlink > 1:  # a folder: no file here has two names
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    (folder,) = write(tmp_path, 1)
    checkpoints.check_folder(folder)
    number = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write(tmp_path, 2)
    assert names(tmp_path) == {"checkpoint-1"}


WRITE_TOO_MUCH = """
import resource, sys
from pathlib import Path
import torch
from flowbp.training import checkpoints

folder, limit, through_safetensors = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

def fill(partial):
    if through_safetensors:
        checkpoints.save_tensors(partial / "lora.safetensors", {"lora": torch.zeros(1_000_000)})
    else:
        (partial / "lora.safetensors").write_bytes(b"weights")

checkpoints.write_folder(folder, fill)
"""


# 100 bytes are enough for the weights of the second case, but not for its manifest.
@pytest.mark.parametrize(("limit", "through_safetensors"), [(1_000_000, True), (100, False)])
def test_a_process_without_the_space_ends_with_an_error(tmp_path: Path, limit: int, through_safetensors: bool) -> None:
    (folder,) = write(tmp_path, 1)
    before = (folder / "manifest.json").read_bytes()
    words = [sys.executable, "-c", WRITE_TOO_MUCH, folder, limit, through_safetensors]
    done = run_program(words, warm(environment()), check=False)
    assert done.returncode == 1
    assert re.match(r"OSError: .*File too large", done.stderr.splitlines()[-1]), done.stderr
    assert names(tmp_path) == {"checkpoint-1"} and (folder / "manifest.json").read_bytes() == before
    assert checkpoints.find_checkpoint(tmp_path, "latest", never) == folder


def run_script(tmp_path: Path, *words: str) -> dict[str, int]:
    # In memory where there is a file system for it: a killed process loses nothing of what it wrote, flushed or not,
    # and more checkpoints are written in the same time.
    memory = Path("/dev/shm")
    folder = memory if os.access(memory, os.W_OK) else tmp_path
    program = ROOT / "tests" / "support" / "kill_checkpoints.py"
    done = run_program([sys.executable, program, *words, "--folder", folder], warm(environment()))
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_before_every_call(tmp_path: Path) -> None:
    counts = run_script(tmp_path, "calls", "--stride", "7")
    assert counts["calls"] >= 15
    assert counts["kills"] > 50


def test_killed_at_random_moments(tmp_path: Path) -> None:
    counts = run_script(tmp_path, "random", "--kills", "5", "--size", "1000000")
    assert counts["kills"] == 5


def test_tensors_come_back(tmp_path: Path) -> None:
    shared = torch.randn(6, 4)
    tensors = {
        "parameter": torch.nn.Parameter(shared),
        "turned": shared.T,
        "part": shared[1:3, ::2],
        "half": torch.randn(3).bfloat16(),
        "number": torch.tensor(7),
        "none": torch.zeros(0, 3),
    }
    path = tmp_path / "lora.safetensors"
    checkpoints.save_tensors(path, tensors)
    loaded = checkpoints.load_tensors(path)
    path.unlink()
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert not loaded[name].requires_grad
        torch.testing.assert_close(loaded[name], tensor.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_no_value_that_is_not_finite_is_saved(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    tensors = {"good": torch.zeros(3), "bad.weight": torch.tensor([1.0, value]).to(dtype)}
    with pytest.raises(CheckpointError, match=r"lora\.safetensors: .* found NaN or infinity in bad\.weight"):
        checkpoints.save_tensors(tmp_path / "lora.safetensors", tensors)
    assert names(tmp_path) == set()


def test_no_value_that_is_not_finite_is_loaded(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        save_file({"good": torch.zeros(3), "bad.weight": torch.tensor([1.0, value])}, tmp_path / "ema.safetensors")
        with pytest.raises(CheckpointError, match=r"ema\.safetensors: .* found NaN or infinity in bad\.weight"):
            checkpoints.load_tensors(tmp_path / "ema.safetensors")


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_json_of_200_mb_is_refused_before_it_is_read(output_dir: Path, name: str) -> None:
    path = output_dir / "checkpoint-20" / name
    os.truncate(path, 200 * 10**6)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=f"{name}: expected 67108864 bytes at most, found 200000000;"):
        checkpoints.read_json(path) if name == "state.json" else checkpoints.check_folder(path.parent)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()
    assert_refused(output_dir, name)


def test_what_is_no_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    with pytest.raises(CheckpointError, match=r"lora\.safetensors: expected a file"):
        checkpoints.load_tensors(path)
    checkpoints.save_tensors(path, {"weight": torch.zeros(8)})
    whole = path.read_bytes()
    # A dtype that the format knows and torch does not.
    other_type = whole.replace(b'"F32","shape":[8]', b'"F4", "shape":[64]')
    for content in (b"", b"PK\x03\x04", whole[:20], whole[:-1], other_type):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"lora\.safetensors: expected a safetensors file"):
            checkpoints.load_tensors(path)


def test_a_full_disk_through_safetensors_is_an_operating_system_error(tmp_path: Path) -> None:
    def fail(partial: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="checkpoint-1: not written: .* No space left"):
        checkpoints.write_folder(tmp_path / "checkpoint-1", fail)
    assert names(tmp_path) == set()


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    content = {"z": 1, "a": [0.1, 1e-300, -0.0, None, True, "é\n"], "b": {}}
    checkpoints.write_json(path, content)
    assert checkpoints.read_json(path) == content
    assert list(checkpoints.read_json(path)) == ["z", "a", "b"]
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            checkpoints.write_json(path, {"loss": number})
    assert checkpoints.read_json(path) == content
    for broken in (b"", b"{", b"[NaN]", b"[-Infinity]", b"[1e999]", b"\xff", b"[" * 100_000, b"\x80\x04K\x01."):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"state\.json: expected JSON") as refused:
            checkpoints.read_json(path)
        assert "\n" not in str(refused.value)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"state\.json: expected a file"):
        checkpoints.read_json(path)
