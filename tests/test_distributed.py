# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Two processes: the gradient is the mean of theirs, exchanged once for each call of `backward`."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_gradients_of_two_processes_are_averaged() -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    paths = os.pathsep.join([str(HERE), str(HERE.parent / "pipelines")])
    done = subprocess.run(
        [*launch, str(HERE / "distributed_gradients.py")],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(found) == 7
    for method, of_method in found.items():
        assert of_method["apart"] > 0.1, method  # the processes have noise of their own
        assert of_method["difference"] < 1e-12, (method, of_method)
        assert of_method["exchanges"] == 2, (method, of_method)
