# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Kills a training script at random moments, resumes it, and compares its end with that of an uninterrupted run.

    python tests/support/kill_training.py --kills 20
    python tests/support/kill_training.py --kills 20 --rotations 1      # with --checkpoints_total_limit 1

The script writes a checkpoint at every update. Two of three kills wait until one is being written. After each kill
there is a whole checkpoint, if ever one was written, and `--resume_from_checkpoint latest` resumes from it; before
that, `latest` is refused and the run starts anew. When a run is done before enough kills were made, another one
starts. The exit code is 0 if every run ended with all tensors and all plain values equal; the last line counts, as
JSON.
"""

import argparse
import json
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import torch
from resume_harness import SD3, Process, check_same_end, sd3_arguments
from tiny_sd3 import tiny_sd3_pipeline
from training_scripts import command_line, write_prompts

from flowbp.training import checkpoints

UPDATES = 4


def wait_for_a_moment(process: Process, output: Path) -> int | None:
    """Wait for the moment of a kill: up to two checkpoints are written before it.

    Args:
        process: that writes them.
        output: its folder.

    Returns:
        The process' return code if it ended before, else None.
    """
    before, is_writing = random.randint(0, 2), random.random() < 2 / 3
    turn, now = 0, False
    while before + is_writing > 0:
        was, now = now, any(output.glob("checkpoint-*.partial"))
        if now and not was:
            # One more is being written.
            if before == 0:
                break
            before -= 1
        turn += 1
        if turn % 50 == 0 and (code := process.poll()) is not None:
            return code
        time.sleep(0.0005)
    # To fill, flush, rename and rotate takes some hundredths of a second together; an update takes some tenths.
    time.sleep(random.uniform(0, 0.05 if is_writing else 0.5))
    return process.poll()


def kill_and_resume(words: list[str], output: Path, kills: int) -> dict[str, int]:
    """One run, killed up to so many times and resumed until it is done.

    Args:
        words: its command line.
        output: its output folder.
        kills: how often to kill it.

    Returns:
        Counts: `kills`; `while_writing`, those that left a checkpoint half written; `resumes`.
    """
    counts = {"kills": 0, "while_writing": 0, "resumes": 0}
    was_written = False
    while True:
        was_written = was_written or bool(checkpoints.checkpoints(output))
        told: list[str] = []
        if was_written:
            # Raises where none is whole.
            checkpoints.find_checkpoint(output, "latest", told.append)
            assert not told, told
        counts["resumes"] += was_written
        resume = ["--resume_from_checkpoint", "latest"] if was_written else []
        process = Process(SD3, [*words, *resume], output.parent)
        if counts["kills"] == kills:
            code = process.ended()
        else:
            code = wait_for_a_moment(process, output)
        if code is not None:
            assert code == 0, process.told.read_text()[-3000:]
            return counts
        process.kill()
        if (code := process.ended()) == 0:  # it was done a moment before
            return counts
        assert code == -signal.SIGKILL, code
        counts["kills"] += 1
        left = [path.name for path in output.glob("checkpoint-*") if path.suffix]
        counts["while_writing"] += bool(left)
        print(f"kill {counts['kills']}: {sorted(path.name for path in output.glob('checkpoint-*'))}", flush=True)


def kill_runs(kills: int, rotations: int | None, folder: Path) -> dict[str, int]:
    """Train once without and then with kills, until there were enough; raises AssertionError for any difference.

    Args:
        kills: how many.
        rotations: `--checkpoints_total_limit`; None keeps all.
        folder: empty.

    Returns:
        The counts of `kill_and_resume`, and `runs` that were killed.
    """
    tiny_sd3_pipeline(torch.float32).save_pretrained(folder / "model")
    whole = folder / "whole"
    arguments = sd3_arguments(folder / "model", write_prompts(folder), whole)
    arguments |= {
        "reward": "resume_rewards:make_random_reward",
        "max_train_steps": UPDATES,
        "use_ema": True,
        "lr_scheduler": "cosine",
        "checkpoints_total_limit": rotations,
    }
    process = Process(SD3, command_line(arguments), folder)
    assert process.ended() == 0, process.told.read_text()[-3000:]
    total = {"kills": 0, "while_writing": 0, "resumes": 0, "runs": 0}
    while total["kills"] < kills:
        output = folder / "killed"
        words = command_line(arguments, output_dir=output)
        counts = kill_and_resume(words, output, kills - total["kills"])
        # Also that nothing is left of what was half written.
        assert not [path for path in output.iterdir() if path.suffix in (".partial", ".removed", ".replaced")]
        assert len(checkpoints.checkpoints(output)) == (rotations or UPDATES)
        check_same_end(whole, output, UPDATES)
        total = {name: total[name] + counts.get(name, 1) for name in total}
        shutil.rmtree(output)
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how many")
    parser.add_argument("--rotations", type=int, help="--checkpoints_total_limit of the runs; default: keep all")
    parser.add_argument("--seed", type=int, help="of the moments")
    parser.add_argument("--folder", type=Path, help="an empty folder; a temporary one by default")
    options = parser.parse_args()
    random.seed(options.seed)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        print(json.dumps(kill_runs(options.kills, options.rotations, Path(scratch))))
