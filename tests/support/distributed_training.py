# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What `test_distributed.py` runs in each of two processes: some updates of a sharded transformer against a whole one.

The base is bfloat16 and the LoRA float32, with gradient checkpointing; AdamW, clipping, an average of the LoRA, saving
and loading as the training scripts do them.
"""

import json

import torch
import torch.distributed as dist
from accelerate import Accelerator
from diffusers.training_utils import EMAModel, cast_training_params
from distributed_gradients import CALL, Exchanges
from tiny_sd3 import tiny_sd3_pipeline
from torch.distributed.tensor import DTensor

from flowbp import FlowBPCallback, get_method
from flowbp.training.distributed import (
    all_ranks_max,
    check_distributed,
    clip_gradients,
    full_lora,
    full_tensor,
    leave,
    like,
    load_lora,
    prepare_transformer,
)

MAX_NORM = 0.05


class Trained:
    """A pipeline with what trains it."""

    def __init__(self, accelerator: Accelerator | None) -> None:
        self.pipe = tiny_sd3_pipeline(torch.bfloat16, lora_rank=2)
        self.transformer = self.pipe.transformer
        cast_training_params(self.transformer, torch.float32)
        self.transformer.enable_gradient_checkpointing()
        self.shared = None if accelerator is None else prepare_transformer(accelerator, self.transformer)
        self.parameters = [parameter for parameter in self.transformer.parameters() if parameter.requires_grad]
        self.optimizer = self.new_optimizer()
        self.average = EMAModel(self.parameters, decay=0.9)

    def new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters, lr=1e-2, weight_decay=1e-2)

    def backward(self, update: int, sample: int) -> None:
        """Add the gradient of one sample."""
        callback = FlowBPCallback(get_method("flowbp-bridge"), generator=torch.Generator().manual_seed(update))
        with callback.record(self.pipe):
            noise = torch.Generator().manual_seed(10 * update + sample)
            images = self.pipe(["a"], generator=noise, **CALL).images
        callback.backward(images.float().square().mean((1, 2, 3)), transformer=self.shared)

    def step(self) -> float:
        norm = clip_gradients(self.parameters, MAX_NORM)
        self.optimizer.step()
        self.average.step(self.parameters)
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def bytes_of(transformer: torch.nn.Module) -> int:
    """Bytes of parameters that this process holds."""
    own = [each.to_local() if isinstance(each, DTensor) else each for each in transformer.parameters()]
    return sum(each.numel() * each.element_size() for each in own)


def difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest difference of any value."""
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def main() -> None:
    """Train both, compare, and print one JSON object in the first process."""
    torch.set_num_threads(1)
    accelerator = Accelerator()
    check_distributed(accelerator)
    rank = accelerator.process_index
    whole, sharded = Trained(None), Trained(accelerator)
    before = full_lora(whole.transformer)
    found: dict[str, object] = {"share": bytes_of(sharded.transformer) / bytes_of(whole.transformer)}
    norms = []
    for update in range(3):
        for sample in range(2):
            whole.backward(update, sample)
        for parameter in whole.parameters:
            parameter.grad /= 2
        sharded.backward(update, rank)
        norms.append([whole.step(), sharded.step()])
    found["norms"] = norms
    of_whole, of_sharded = full_lora(whole.transformer), full_lora(sharded.transformer)
    found["moved"] = difference(before, of_whole)
    found["lora"] = difference(of_whole, of_sharded)
    found["average"] = max(
        (left - full_tensor(right)).abs().max().item()
        for left, right in zip(whole.average.shadow_params, sharded.average.shadow_params, strict=True)
    )
    found["plain"] = all(type(tensor) is torch.Tensor for tensor in of_sharded.values())

    # A checkpoint: whole tensors out, and back into other shards. One update later both are the same, bit for bit.
    moments = {
        number: {name: full_tensor(value).clone() for name, value in values.items()}
        for number, values in sharded.optimizer.state_dict()["state"].items()
    }
    resumed = Trained(accelerator)
    with Exchanges() as exchanges:
        load_lora(resumed.transformer, of_sharded)
    found["sent"] = dict(exchanges.counts)
    state = {
        number: {
            name: value if name == "step" else like(value, resumed.parameters[number])
            for name, value in values.items()
        }
        for number, values in moments.items()
    }
    resumed.optimizer.load_state_dict({"state": state, "param_groups": resumed.optimizer.state_dict()["param_groups"]})
    for run in (sharded, resumed):
        run.backward(3, rank)
        run.step()
    found["resumed"] = difference(full_lora(sharded.transformer), full_lora(resumed.transformer))
    found["after_resuming"] = difference(of_sharded, full_lora(resumed.transformer))

    # Sampling, with the same weights.
    load_lora(sharded.transformer, of_whole)
    pictures = [
        run.pipe(["b"], generator=torch.Generator().manual_seed(0), **CALL).images.float() for run in (whole, sharded)
    ]
    found["pictures"] = (pictures[0] - pictures[1]).abs().max().item()
    # Between calls too every parameter is a shard: an optimizer, a checkpoint or another rollout may come next.
    found["shards"] = all(isinstance(each, DTensor) for each in sharded.transformer.parameters())
    found["largest"] = all_ranks_max(accelerator, [rank, -rank, float("inf") if rank else 0.0])
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    leave(0)


if __name__ == "__main__":
    main()
