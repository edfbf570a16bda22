# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What the tests of resuming, of killing and of skipped updates share: how runs are started, and what is compared."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from resume_warm import ask
from safetensors.torch import load_file
from tiny_sd3 import MAX_SEQUENCE_LENGTH
from training_scripts import LORA_FILE, SHARED_ARGUMENTS, environment, log_of, script_path

from flowbp.training import checkpoints

HERE = Path(__file__).parent
SD3 = "train_flowbp_sd3"
# A warning of transformers' at its import, and progress bars, are no lines of the scripts.
NOISE = ("[transformers]", "updates:", "evaluation:", "validation:", "Loading ", "There are modules in")
# What each run tells of itself when it begins: a title, then names with values below it.
BANNER = re.compile(r"^(?=\S+ on \S+Pipeline \()|^  (reward|trained|optimizer|batch|prompts|updates|written to) ")


def sd3_arguments(model: Path, prompts: Path, output_dir: Path) -> dict[str, Any]:
    """Arguments of a short run of the SD3 script, to be changed."""
    return {
        **SHARED_ARGUMENTS,
        "pretrained_model_name_or_path": model,
        "prompts": prompts,
        "output_dir": output_dir,
        "resolution": 8,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        "method": "flowbp-sparse",
        "num_inference_steps": 4,
        "num_active": 2,
        "checkpointing_steps": 1,
    }


# What is compared.


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint or of `best`, by file and name."""
    return {
        f"{path.name}/{name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Of two sets of finite tensors with the same names."""
    assert left.keys() == right.keys()
    return max((left[name].double() - right[name].double()).abs().max().item() for name in left)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The log without what no two runs have in common: seconds and memory."""
    return [
        {name: value for name, value in row.items() if not name.startswith(("seconds", "memory"))}
        for row in log_of(folder)
    ]


def state_of(checkpoint: Path) -> dict[str, Any]:
    """The plain values of a checkpoint."""
    return json.loads((checkpoint / "state.json").read_text())


def check_same_end(whole: Path, resumed: Path, last: int, tolerance: float = 0) -> None:
    """A resumed run ended as one that was not interrupted: all tensors, plain values, the result and the log.

    Args:
        whole: folder of the run that was not interrupted.
        resumed: folder of the other.
        last: number of updates.
        tolerance: for tensors; plain values of floating point and the log are compared only where it is 0.
    """
    old, new = whole / f"checkpoint-{last}", resumed / f"checkpoint-{last}"
    checkpoints.check_folder(new)
    assert sorted(path.name for path in old.iterdir()) == sorted(path.name for path in new.iterdir())
    assert largest_difference(tensors_of(old), tensors_of(new)) <= tolerance
    assert largest_difference(load_file(whole / LORA_FILE), load_file(resumed / LORA_FILE)) <= tolerance
    assert (whole / "best").exists() == (resumed / "best").exists()
    assert state_of(new)["training"] == state_of(old)["training"]
    assert [row["step"] for row in rows_of(resumed)] == list(range(1, last + 1))
    if tolerance == 0:
        assert state_of(new) == state_of(old)
        assert rows_of(resumed) == rows_of(whole)
        if (whole / "best").exists() and (resumed / "best").exists():
            assert largest_difference(tensors_of(whole / "best"), tensors_of(resumed / "best")) == 0
            results = [json.loads((folder / "run.json").read_text()) for folder in (whole, resumed)]
            assert results[0]["selected"] == results[1]["selected"]
            assert results[0]["alarms"] == results[1]["alarms"]


def lines_of(text: str) -> list[str]:
    """What a script wrote to stderr, without what every run says."""
    # Progress bars return to the line's start.
    lines = [line.rpartition("\r")[2] for line in text.splitlines()]
    return [line for line in lines if line.strip() and not line.startswith(NOISE) and not BANNER.search(line)]


# Processes of their own.


@dataclass
class Process:
    """A script that was started by `Warm`.

    Attributes:
        number: of the process.
        warm: that started it.
        output: file of its stdout.
        errors: file of its stderr.
    """

    number: int
    warm: "Warm"
    output: Path
    errors: Path

    def wait(self, seconds: float = 200) -> int:
        """Its return code, as `subprocess` has it. A process that does not end in time is killed."""
        code = self.poll(seconds)
        if code is None:
            os.kill(self.number, signal.SIGKILL)
            self.poll(10)
            raise AssertionError(f"still running after {seconds} s: {self.errors.read_text()[-3000:]}")
        return code

    def poll(self, seconds: float = 0) -> int | None:
        """Its return code, None if it still runs after so long. Once there was one, it is not to be asked again."""
        end = time.monotonic() + seconds
        while (code := ask(self.warm.path, do="poll", process=self.number)) is None and time.monotonic() < end:
            time.sleep(0.01)
        return code

    def lines(self) -> list[str]:
        """What it wrote to stderr by itself."""
        return lines_of(self.errors.read_text())


class Warm:
    """Starts a script in processes of its own without paying for its imports each time; see `resume_warm.py`.

    Args:
        name: of the script.
        folder: for the output of the processes.

    Attributes:
        path: of the socket.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self._started = 0

    def __enter__(self) -> "Warm":
        # The path of a socket may not be longer than about 100 characters, which pytest's folders may be.
        self._short = tempfile.TemporaryDirectory(prefix="flowbp-")
        self.path = str(Path(self._short.name) / "socket")
        with (self.folder / "warm.txt").open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "resume_warm.py"), self.name, self.path],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment(),
            )
        assert self._process.stdout.readline() == "ready\n", (self.folder / "warm.txt").read_text()
        return self

    def __exit__(self, *exception: object) -> None:
        ask(self.path, do="end")
        self._process.wait(60)
        self._process.stdout.close()
        self._short.cleanup()

    def start(
        self, words: Sequence[str], environment: dict[str, str] | None = None, file_size_limit: int | None = None
    ) -> Process:
        """Start the script.

        Args:
            words: its command line.
            environment: what to add to this process'.
            file_size_limit: in bytes; a write beyond it fails as on a full disk.
        """
        self._started += 1
        output, errors = (self.folder / f"{self._started}.{name}" for name in ("out", "err"))
        with output.open("a") as out, errors.open("a") as err:
            number = ask(
                self.path,
                (out.fileno(), err.fileno()),
                do="start",
                argv=[str(script_path(self.name)), *words],
                environment=environment or {},
                file_size_limit=file_size_limit,
            )
        return Process(number, self, output, errors)

    def two_processes(self, program: Path, words: Sequence[str]) -> list[str]:
        """The command by which torchrun starts a program in two processes, with `two_processes_environment`."""
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
        return [*launch, str(HERE / "resume_warm.py"), str(program), *words]

    def two_processes_environment(self, **more: str) -> dict[str, str]:
        """Of `two_processes`: on CPUs accelerate has to be told, or each of the two trains alone."""
        return {**os.environ, "FLOWBP_TEST_WARM": self.path, "ACCELERATE_USE_CPU": "true", **more}

    def run_in_two_processes(self, jobs: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
        """Run scripts one after the other in the same two processes, see `resume_processes.py`.

        Args:
            jobs: each with the script's `name`, its `words`, and what to add to the `environment`.
            folder: for the files that the processes leave.

        Returns:
            What `resume_processes.py` found for each job.
        """
        (folder / "jobs.json").write_text(json.dumps(jobs))
        words = [str(folder / "jobs.json"), str(folder / "found.json")]
        done = subprocess.run(
            self.two_processes(HERE / "resume_processes.py", words),
            env=self.two_processes_environment(),
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((folder / "found.json").read_text())


def wait_for(path: Path, seconds: float = 200) -> None:
    """Wait until a file is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)
