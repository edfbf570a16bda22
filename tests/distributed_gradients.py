# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What `test_distributed.py` runs in each of two processes: how far DDP's gradient of each row is from the mean.

Every process records its own rollouts, in two passes that add up. With the wrapped transformer the gradient must be
the mean of what the processes find alone, whatever the row, and each `backward` may exchange gradients once.
"""

import json
import os
import time

import torch
import torch.distributed as dist
from tiny_sd3 import MAX_SEQUENCE_LENGTH, tiny_sd3_pipeline
from torch.nn.parallel import DistributedDataParallel

from flowbp import FlowBPCallback, get_method

ROWS = [
    ("full", {}, {"strict": True}),
    ("draft-lv", {}, {"samples_per_decode": 1}),
    ("drtune", {"num_active": 2}, {}),
    ("leapalign", {}, {}),
    ("flowbp-sparse", {"num_active": 3}, {"steps_per_forward": 2}),
    ("flowbp-bridge", {"num_active": 3}, {}),
    ("flowbp-lagrange", {}, {}),
]


def main() -> None:
    """Compare, and print one JSON object in the first process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pipe = tiny_sd3_pipeline(lora_rank=2)
    parameters = [parameter for parameter in pipe.transformer.parameters() if parameter.requires_grad]
    wrapped = DistributedDataParallel(pipe.transformer)
    exchanges = {"number": 0}

    def count(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        exchanges["number"] += bucket.is_last()
        reduced = dist.all_reduce(bucket.buffer() / dist.get_world_size(), async_op=True).get_future()
        return reduced.then(lambda future: future.value()[0])

    wrapped.register_comm_hook(None, count)

    def gradient(seed: int, transformer: torch.nn.Module | None, method: str, options: dict, settings: dict):
        for parameter in parameters:
            parameter.grad = None
        for part in range(2):
            callback = FlowBPCallback(
                get_method(method, **options),
                generator=torch.Generator().manual_seed(part),
                noise_generator=torch.Generator().manual_seed(seed),
                **settings,
            )
            with callback.record(pipe):
                images = [
                    pipe(
                        ["a", "b"],
                        num_inference_steps=6,
                        guidance_scale=3.0,
                        max_sequence_length=MAX_SEQUENCE_LENGTH,
                        height=8,
                        width=8,
                        output_type="pt",
                        generator=torch.Generator().manual_seed(seed + 10 * part),
                    ).images
                    for _ in range(1 + callback.copies)
                ]
            callback.backward(
                lambda pictures, prompts: pictures.square().mean((1, 2, 3)),
                torch.cat(images),
                ["a", "b"],
                gradient_scale=0.5,
                transformer=transformer,
            )
        return torch.cat([parameter.grad.flatten() for parameter in parameters])

    found = {}
    for method, options, settings in ROWS:
        alone = [gradient(100 + each, None, method, options, settings) for each in range(dist.get_world_size())]
        mean = torch.stack(alone).mean(0)
        exchanges["number"] = 0
        together = gradient(100 + rank, wrapped, method, options, settings)
        found[method] = {
            "difference": ((together - mean).norm() / mean.norm()).item(),
            "apart": ((alone[0] - alone[1]).norm() / mean.norm()).item(),
            "exchanges": exchanges["number"],
        }
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    time.sleep(1)  # the other process may still be leaving the barrier
    # Not destroy_process_group: on a loaded machine a process was seen to hang there, all its work done.
    os._exit(0)


if __name__ == "__main__":
    main()
