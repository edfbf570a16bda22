# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What `test_distributed.py` runs in each of two processes: some updates of a sharded transformer against a whole one.

    torchrun --nproc_per_node 2 tests/support/distributed_training.py FOLDER

The base is bfloat16 and the LoRA float32, with gradient checkpointing; the optimizer, its average and a checkpoint are
a run's own.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from diffusers.training_utils import cast_training_params
from distributed_gradients import CALL, Exchanges
from tiny_sd3 import tiny_sd3_pipeline
from torch.distributed.tensor import DTensor
from updates_by_hand import save_snapshot

from flowbp import FlowBPCallback, get_method
from flowbp.callback import BackwardOutput
from flowbp.training import TrainingConfig
from flowbp.training.distributed import (
    all_ranks_max,
    check_distributed,
    exit_process,
    full_lora,
    load_lora,
    prepare_transformer,
)
from flowbp.training.prompts import Record
from flowbp.training.state import TrainingState
from flowbp.training.state_files import save_files
from flowbp.training.trained import LoraWeights

CONFIG = TrainingConfig(
    pretrained_model_name_or_path="tiny",
    prompts="prompts.txt",
    mixed_precision="bf16",
    train_batch_size=1,
    learning_rate=1e-2,
    adam_weight_decay=1e-2,
    max_grad_norm=0.05,
    use_ema=True,
    ema_decay=0.9,
)


class Trained:
    """A pipeline with what trains it.

    Args:
        accelerator: of the processes.
        is_sharded: or the transformer is whole in each of them.
    """

    def __init__(self, accelerator: Accelerator, is_sharded: bool) -> None:
        self.pipe = tiny_sd3_pipeline(torch.bfloat16, lora_rank=2)
        self.transformer = self.pipe.transformer
        cast_training_params(self.transformer, torch.float32)
        self.transformer.enable_gradient_checkpointing()
        self.wrapped = prepare_transformer(accelerator, self.transformer) if is_sharded else None
        trained = LoraWeights(self.transformer, save_snapshot)
        self.state = TrainingState(CONFIG, accelerator, trained, [Record("a")])

    def backward(self, update: int, sample: int, gradient_scale: float = 1.0) -> BackwardOutput:
        """Add the gradient of one sample."""
        callback = FlowBPCallback(get_method("flowbp-bridge"), generator=torch.Generator().manual_seed(update))
        with callback.record(self.pipe):
            noise = torch.Generator().manual_seed(10 * update + sample)
            images = self.pipe(["a"], generator=noise, **CALL).images
        rewards = images.float().square().mean((1, 2, 3))
        return callback.backward(rewards, gradient_scale=gradient_scale, transformer=self.wrapped)


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
    whole, sharded = Trained(accelerator, False), Trained(accelerator, True)
    before = full_lora(whole.transformer)
    found: dict[str, object] = {"share": bytes_of(sharded.transformer) / bytes_of(whole.transformer)}
    norms = []
    for update in range(3):
        steps = [
            whole.state.step([whole.backward(update, sample, gradient_scale=0.5) for sample in range(2)]),
            sharded.state.step([sharded.backward(update, rank)]),
        ]
        assert not any(step.was_skipped for step in steps)
        norms.append([step.gradient_norm for step in steps])
    found["norms"] = norms
    of_whole, of_sharded = full_lora(whole.transformer), full_lora(sharded.transformer)
    found["moved"] = difference(before, of_whole)
    found["lora"] = difference(of_whole, of_sharded)
    average = sharded.state.result()
    found["average"] = difference(whole.state.result(), average)
    found["averaged"] = difference(of_sharded, average)
    found["put_back"] = difference(of_sharded, full_lora(sharded.transformer))
    found["plain"] = all(type(tensor) is torch.Tensor for tensor in of_sharded.values())

    # A checkpoint: whole tensors out, and back into other shards. One update later both are the same, bit for bit.
    folder, tensors = Path(sys.argv[1]), sharded.state.files.tensors()
    if rank == 0:
        save_files(folder, tensors)
    dist.barrier()
    resumed = Trained(accelerator, True)
    with Exchanges() as exchanges:
        load_lora(resumed.transformer, of_sharded)
    found["sent"] = dict(exchanges.counts)
    resumed.state.load(folder, json.loads(json.dumps(sharded.state.state_dict())))
    for each in (sharded, resumed):
        each.state.step([each.backward(3, rank)])
    found["resumed"] = max(
        difference(full_lora(sharded.transformer), full_lora(resumed.transformer)),
        difference(sharded.state.result(), resumed.state.result()),
    )
    found["after_resuming"] = difference(of_sharded, full_lora(resumed.transformer))

    # Sampling, with the same weights.
    load_lora(sharded.transformer, of_whole)
    load_lora(whole.transformer, of_whole)
    images = [
        each.pipe(["b"], generator=torch.Generator().manual_seed(0), **CALL).images.float()
        for each in (whole, sharded)
    ]
    found["images"] = (images[0] - images[1]).abs().max().item()
    # Between calls too every parameter is a shard: an optimizer, a checkpoint or another rollout may come next.
    found["shards"] = all(isinstance(each, DTensor) for each in sharded.transformer.parameters())
    found["largest"] = all_ranks_max(accelerator, [rank, -rank, float("inf") if rank else 0.0])
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    exit_process(0)


if __name__ == "__main__":
    main()
