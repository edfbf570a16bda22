# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""One of two processes that watch each other, for tests/training/test_watch.py.

    RANK=0 WORLD_SIZE=2 ... python tests/support/watched_processes.py STOPPED

STOPPED is the process that stops itself, or "none": then process 1 ends three seconds before process 0. With "prompts"
each process has read another file of prompts.
"""

import os
import signal
import sys
import time

from accelerate import Accelerator

from flowbp.training.fingerprint import check_same_prompts
from flowbp.training.prompts import Record
from flowbp.training.script import run_script
from flowbp.training.watch import ProcessWatch


def main() -> None:
    """Meet, watch, and wait for one another."""
    stopped, accelerator = sys.argv[1], Accelerator(cpu=True)
    if stopped == "prompts":
        check_same_prompts(accelerator, [Record(f"of process {accelerator.process_index}")])
    accelerator.wait_for_everyone()
    with ProcessWatch(accelerator, limit_minutes=3 / 60, interval=0.1, silence=1.0):
        time.sleep(0.5)
        if stopped == str(accelerator.process_index):
            os.kill(os.getpid(), signal.SIGSTOP)
        elif stopped == "none":
            time.sleep(3 if accelerator.is_main_process else 0)
        else:
            accelerator.wait_for_everyone()


if __name__ == "__main__":
    # As the scripts do: Python's own shutdown aborts now and then while another process leaves.
    run_script(main)
