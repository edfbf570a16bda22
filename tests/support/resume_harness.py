# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What the tests of resuming, of killing and of skipped updates share: how runs are started, and what is compared."""

import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_sd3 import MAX_SEQUENCE_LENGTH
from training_scripts import (
    LORA_FILE,
    SHARED_ARGUMENTS,
    environment,
    log_of,
    on_cpus,
    run_program,
    script_path,
    torchrun,
)
from warm_python import settle, warm

from flowbp.training import checkpoints

HERE = Path(__file__).parent
SD3 = "train_flowbp_sd3"
# A warning of transformers' at its import, and progress bars, are no lines of the scripts.
NOISE = ("[transformers]", "updates:", "evaluation:", "validation:", "Loading ", "There are modules in")
# What each run tells of itself when it begins: a title, then names with values below it.
BANNER = re.compile(
    r"^(?=\S+ on \S+Pipeline \()|^  (device|reward|trained|optimizer|batch|prompts|updates|written to) "
)


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


class Process(subprocess.Popen):
    """A script in a process of its own, which starts warm.

    Args:
        name: of the script.
        words: its command line.
        folder: for the files `printed` and `told` of what it writes.
        variables: what to add to its environment.
        file_size_limit: in bytes; a write beyond it fails as on a full disk.
    """

    def __init__(
        self,
        name: str,
        words: Sequence[str],
        folder: Path,
        variables: dict[str, str] | None = None,
        file_size_limit: int | None = None,
    ) -> None:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit,) * 2)

        self.variables = warm({**environment(), **(variables or {})})
        self.printed, self.told = (folder / f"{time.monotonic_ns()}.{name}" for name in ("out", "err"))
        with self.printed.open("w") as output, self.told.open("w") as errors:
            super().__init__(
                [sys.executable, str(script_path(name)), *words],
                env=self.variables,
                stdout=output,
                stderr=errors,
                preexec_fn=None if file_size_limit is None else limit,
            )

    def ended(self, seconds: float = 200) -> int:
        """Its return code. A process that does not end in time is killed."""
        try:
            return self.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {seconds} s: {self.told.read_text()[-3000:]}") from None

    def kill(self) -> None:
        """Kill it, and wait until it is gone."""
        super().kill()
        self.wait()
        settle(self.variables)

    def lines(self) -> list[str]:
        """What it wrote to stderr by itself."""
        return lines_of(self.told.read_text())


def run_in_two_processes(jobs: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Run scripts one after the other in the same two processes, see `resume_processes.py`.

    Args:
        jobs: each with the script's `name`, its `words`, and what to add to the `environment`.
        folder: for the files that the processes leave.

    Returns:
        What `resume_processes.py` found for each job.
    """
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_program(torchrun(HERE / "resume_processes.py", folder / "jobs.json", folder / "found.json"), on_cpus())
    return json.loads((folder / "found.json").read_text())


def wait_for(path: Path, seconds: float = 200) -> None:
    """Wait until a file is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)
