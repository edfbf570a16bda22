# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What tests run in each of two processes: training scripts, one after the other, and a comparison after each.

    torchrun --nproc_per_node 2 tests/support/resume_processes.py JOBS FOUND

JOBS is a JSON list of `{"name", "words", "environment"}`. FOUND gets a list with, for each of them: `processes`, how
many trained together; `endings`, of each process: "done" or the error's line; `printed`, of each process: what it
wrote to stderr; `apart`, the largest difference between the LoRAs that the two processes have in memory; `finite`,
whether these are.
"""

import contextlib
import io
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from training_scripts import load_script
from watched_updates import watch_updates

from flowbp.publishing.run_info import one_line
from flowbp.training.script import USER_ERRORS


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Run a script, and compare what the processes have then. Collective."""
    os.environ.update(job["environment"])
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), watch_updates() as updates:
        try:
            load_script(job["name"]).main(job["words"])
            ending = "done"
        except USER_ERRORS as error:
            ending = one_line(error)
    for name in job["environment"]:
        del os.environ[name]
    lora = torch.cat([parameter.detach().flatten() for parameter in updates[-1].parameters])
    loras = [torch.empty_like(lora) for _ in range(dist.get_world_size())]
    dist.all_gather(loras, lora)
    endings: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(endings, (ending, printed.getvalue()))
    return {
        "processes": PartialState().num_processes,
        "endings": [each for each, _ in endings],
        "printed": [each for _, each in endings],
        "apart": (loras[0] - loras[1]).abs().max().item(),
        "finite": bool(torch.stack(loras).isfinite().all()),
    }


def main() -> None:
    """Do the jobs."""
    jobs, found = (Path(word) for word in sys.argv[1:])
    torch.set_num_threads(1)
    # A script leaves the group of processes at its end; the next one needs it.
    patch = pytest.MonkeyPatch()
    patch.setattr(PartialState, "destroy_process_group", lambda state, group=None: None)
    results = [train(job) for job in json.loads(jobs.read_text())]
    if dist.get_rank() == 0:
        found.write_text(json.dumps(results))
    dist.barrier()
    time.sleep(1)  # the other process may still be leaving the barrier


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # without waiting for the other process, which torchrun ends
    # Not destroy_process_group: on a loaded machine a process was seen to hang there, all its work done.
    os._exit(0)
