# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Full fine-tuning on one device: a bench whose transformer is sharded as `--train full` does it."""

from typing import Any

import torch
from accelerate import Accelerator
from updates import Bench

from flowbp.training.distributed import shard_all_weights


def shard(bench: Bench) -> dict[str, Any]:
    """Shard the bench's transformer in place and make an optimizer of all its weights."""
    accelerator = Accelerator(cpu=bench.device.type == "cpu")
    transformer = bench.pipe.transformer
    shard_all_weights(accelerator, transformer, transformer.dtype)
    bench.sharded = transformer
    bench.optimizer = torch.optim.AdamW(transformer.parameters(), lr=0.0, weight_decay=1e-4, foreach=False)
    return {"dtype": str(next(transformer.parameters()).dtype)}
