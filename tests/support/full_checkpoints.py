# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What `test_full_fine_tuning.py` runs in several processes: checkpoints of all weights, written and read.

    torchrun --nproc_per_node N tests/support/full_checkpoints.py COMMAND FOLDER

COMMAND: `write` makes two updates, writes a checkpoint into FOLDER, and beside it whole copies of all that it holds;
`read` loads the checkpoint and prints the largest difference from these copies in the first process; `kill` is `write`
with the last process killed while the files are written.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from tiny_sd3 import tiny_sd3_pipeline
from updates_by_hand import RECORDS, do_update, make_config

from flowbp.training import shards
from flowbp.training.checkpoints import (
    check_folder,
    load_tensors,
    read_json,
    save_tensors,
    write_json,
)
from flowbp.training.distributed import exit_process, full_tensors, shard_all_weights
from flowbp.training.setup import make_accelerator
from flowbp.training.state import TrainingState
from flowbp.training.trained import FullWeights


def start(folder: Path) -> tuple[Accelerator, TrainingState]:
    """The state of a run of all weights."""
    config = make_config(folder.parent, train="full", use_ema=True, ema_decay=0.5, learning_rate=0.01)
    accelerator = make_accelerator(config)
    transformer = tiny_sd3_pipeline(torch.float32).transformer
    model_class = type(transformer)
    shard_all_weights(accelerator, transformer, torch.float32)
    trained = FullWeights(transformer, model_class, "transformer", torch.float32)
    return accelerator, TrainingState(config, accelerator, trained, RECORDS)


def kill_last_process(accelerator: Accelerator) -> None:
    """Kill a process when it is about to write its file."""

    class Killed(shards.HuggingFaceStorageWriter):
        def write_data(self, *arguments: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    if accelerator.process_index == accelerator.num_processes - 1:
        shards.HuggingFaceStorageWriter = Killed


def main() -> None:
    """See the module."""
    torch.set_num_threads(1)
    command, folder = sys.argv[1], Path(sys.argv[2])
    accelerator, state = start(folder)
    if command == "read":
        check_folder(folder)
        state.load(folder, read_json(folder / "state.json"))
        found, steps = full_tensors(state.files.tensors()), state.files.steps()
        whole = load_tensors(folder.parent / "whole.safetensors")
        assert found.keys() | {f"step.{name}" for name in steps} == whole.keys()
        difference = max((tensor - whole[name]).abs().max().item() for name, tensor in found.items())
        assert all(step == whole[f"step.{name}"] for name, step in steps.items())
        if accelerator.is_main_process:
            print(json.dumps({"difference": difference, "update": state.update, "tensors": len(found)}))
        exit_process(0)
        return
    for number in range(2):
        torch.manual_seed(number)
        do_update(state, 1.0 + number)
    whole = full_tensors(state.files.tensors()) | {f"step.{name}": step for name, step in state.files.steps().items()}
    content = state.state_dict()

    if accelerator.is_main_process:
        save_tensors(folder.parent / "whole.safetensors", whole)
    if command == "kill":
        kill_last_process(accelerator)
    state.files.write(folder, None, lambda: None, lambda partial: write_json(partial / "state.json", content))
    exit_process(0)


if __name__ == "__main__":
    main()
