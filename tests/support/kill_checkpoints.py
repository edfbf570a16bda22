# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Kills processes that write checkpoints, and looks for a whole checkpoint after each kill.

    python tests/support/kill_checkpoints.py random --kills 20   # SIGKILL at random moments
    python tests/support/kill_checkpoints.py calls               # SIGKILL before each call of the operating system

The exit code is 0 if `latest` found a whole checkpoint with the right content every time, and without a word: a killed
process leaves nothing that looks damaged. The last line of the output counts what was done, as JSON.
"""

import argparse
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from flowbp.training import checkpoints

# Together they are all calls through which `checkpoints` changes a disk, but for the writing of the files' content.
CALLS = ("fsync", "mkdir", "open", "replace", "rmdir", "unlink")
NUMBER = struct.Struct("q")


def write(output_dir: Path, name: str, update: int, size: int) -> None:
    """What a training run does with its checkpoint of an update: write it and rotate.

    Args:
        output_dir: the run's folder.
        name: of the checkpoint.
        update: which all values in it repeat.
        size: bytes in its largest file.
    """

    def fill(folder: Path) -> None:
        checkpoints.save_tensors(folder / "lora.safetensors", {"lora": torch.full((size // 4,), update)})
        checkpoints.write_json(folder / "state.json", {"update": update})

    checkpoints.write_folder(output_dir / name, fill)
    checkpoints.rotate(output_dir, 1)


def read(output_dir: Path) -> int:
    """The update of the latest checkpoint.

    Raises:
        CheckpointError: where none is whole.
        AssertionError: where one looks damaged, or its files do not belong together.
    """
    told: list[str] = []
    folder = checkpoints.find_checkpoint(output_dir, "latest", told.append)
    assert not told, told
    update = checkpoints.read_json(folder / "state.json")["update"]
    lora = checkpoints.load_tensors(folder / "lora.safetensors")["lora"]
    assert (lora == update).all(), (folder, update, lora)
    return update


def start(work: Callable[[], None]) -> int:
    """A process of its own that does some work; returns its number.

    Forked: a new interpreter would need seconds for torch's import, each time.
    """
    process = os.fork()
    if process == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"the writer failed: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
    return process


def at_random_moments(output_dir: Path, kills: int, size: int, seconds: float) -> dict[str, int]:
    """Kill a process that writes one checkpoint after the other; while it lives, read all the time.

    Every third write repeats the name of the one before, as a resumed run does.

    Args:
        output_dir: the run's folder.
        kills: how many processes to kill, one after the other; each goes on where the one before was.
        size: bytes in a checkpoint's largest file.
        seconds: how long a process lives at most.
    """
    write(output_dir, "checkpoint-0", 0, size)
    reads = writes = 0
    for _ in range(kills):
        first = read(output_dir)
        reader, writer = os.pipe()

        def work(first: int = first, writer: int = writer) -> None:
            checkpoints.clean(output_dir)
            update = first
            while True:
                update += 1
                write(output_dir, f"checkpoint-{update - (update % 3 == 0)}", update, size)
                os.write(writer, NUMBER.pack(update))

        process = start(work)
        os.close(writer)
        end = time.monotonic() + random.uniform(0, seconds)
        while time.monotonic() < end:
            checkpoints.find_checkpoint(output_dir, "latest", lambda line: None)
            reads += 1
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status), f"the writer ended by itself, with status {status}"
        with open(reader, "rb") as file:
            done = [number for (number,) in NUMBER.iter_unpack(file.read())]
        # The next one may be in place although its writer had no time to say so.
        found, last = read(output_dir), done[-1] if done else first
        assert found in (last, last + 1), (found, last)
        writes += len(done)
    return {"kills": kills, "writes": writes, "reads": reads}


def die_at(number: int) -> list[str]:
    """From now on, die before the call `number` (from 0) of `CALLS`; returns the list of the calls done."""
    done: list[str] = []

    def wrapped(name: str) -> Callable:
        original = getattr(os, name)

        def call(*args, **kwargs):
            if len(done) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(name)
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name))
    return done


def at_every_call(folder: Path, stride: int) -> dict[str, int]:
    """Kill a process before each of its calls in turn, and another one, that goes on after it, before each of its own.

    Both write checkpoint-2, the second time over what the first left, with the content of another update.

    Args:
        folder: empty.
        stride: the second process is killed before every so many of its calls only.
    """
    kills = 0

    def killed(output_dir: Path, update: int, number: int) -> bool:
        def work() -> None:
            die_at(number)
            checkpoints.clean(output_dir)
            write(output_dir, "checkpoint-2", update, 64)

        process = start(work)
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status) or status == 0, status
        return status != 0

    for first in range(1000):
        once = folder / f"{first}"
        write(once, "checkpoint-1", 1, 64)
        first_was_killed = killed(once, 2, first)
        kills += first_was_killed
        assert read(once) in ((1, 2) if first_was_killed else (2,))
        for second in range(first % stride, 1000, stride):
            twice = folder / f"{first}-{second}"
            shutil.copytree(once, twice)
            before = read(twice)
            second_was_killed = killed(twice, 3, second)
            kills += second_was_killed
            assert read(twice) in ((before, 3) if second_was_killed else (3,))
            if not second_was_killed:
                assert [path.name for path in twice.iterdir()] == ["checkpoint-2"]
                break
            shutil.rmtree(twice)
        if not first_was_killed:
            break
    return {"kills": kills, "calls": first}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["random", "calls"])
    parser.add_argument("--folder", type=Path, help="an empty folder; a temporary one by default")
    parser.add_argument("--stride", type=int, default=1, help="calls: see at_every_call")
    parser.add_argument("--kills", type=int, default=20, help="random: how many")
    parser.add_argument("--size", type=int, default=4_000_000, help="random: bytes in a checkpoint's largest file")
    parser.add_argument("--seconds", type=float, default=0.5, help="random: how long a process lives at most")
    parser.add_argument("--seed", type=int, help="random: of the moments")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    torch.set_num_threads(1)  # more would not live on in forked processes
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        if arguments.mode == "calls":
            counts = at_every_call(Path(scratch), arguments.stride)
        else:
            counts = at_random_moments(Path(scratch), arguments.kills, arguments.size, arguments.seconds)
    print(json.dumps(counts))
