# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What `test_distributed.py` runs in each of two processes: how far the shared gradient of each row is from the mean.

Every process records its own rollouts, in two passes that add up. With the wrapped (DDP) or sharded (FSDP2)
transformer the gradient must be the mean of what the processes find alone, whatever the row. DDP may exchange
gradients once in each `backward`, FSDP2 at every replay.

    torchrun --nproc_per_node 2 tests/support/distributed_gradients.py [full]

`full`: of all weights, sharded, and without a LoRA.
"""

import gc
import json
import sys
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from diffusers import StableDiffusion3Pipeline
from tiny_sd3 import MAX_SEQUENCE_LENGTH, tiny_sd3_pipeline
from torch.utils._python_dispatch import TorchDispatchMode

from flowbp import FlowBPCallback, get_method
from flowbp.training.distributed import (
    check_distributed,
    exit_process,
    full_tensor,
    local,
    prepare_transformer,
    shard_all_weights,
)

IS_FULL = "full" in sys.argv
CALL = {
    "num_inference_steps": 6,
    "guidance_scale": 3.0,
    "max_sequence_length": MAX_SEQUENCE_LENGTH,
    "height": 8,
    "width": 8,
    "output_type": "pt",
}
ROWS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("full", {}, {"strict": True}),
    ("draft-lv", {}, {"samples_per_decode": 1}),
    ("drtune", {"num_active": 2}, {}),
    ("leapalign", {}, {}),
    ("flowbp-sparse", {"num_active": 3}, {}),
    ("flowbp-bridge", {"num_active": 3}, {"velocity_anchor": 0.2}),
    ("flowbp-lagrange", {}, {"unconditional_gradient": True}),
]


class Exchanges(TorchDispatchMode):
    """Counts the process group's operations by name. The test's own (`full_tensor`) are inside DTensors, not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.namespace == "c10d":
            self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def gradient(
    pipe: StableDiffusion3Pipeline,
    seed: int,
    transformer: torch.nn.Module | None,
    method: str,
    options: dict[str, Any],
    settings: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The gradient of all trained parameters in one vector, of two passes; the norms of each step; number of terms."""
    parameters = [parameter for parameter in pipe.transformer.parameters() if parameter.requires_grad]
    norms, terms = [], 0
    for parameter in parameters:
        parameter.grad = None
    for part in range(2):
        callback = FlowBPCallback(
            get_method(method, **options),
            generator=torch.Generator().manual_seed(part),
            noise_generator=torch.Generator().manual_seed(seed),
            measure_gradients=not IS_FULL,
            **settings,
        )
        with callback.record(pipe):
            images = [
                pipe(["a", "b"], generator=torch.Generator().manual_seed(seed + 10 * part), **CALL).images
                for _ in range(1 + callback.copies)
            ]
        out = callback.backward(
            lambda images, prompts: images.square().mean((1, 2, 3)),
            torch.cat(images),
            ["a", "b"],
            gradient_scale=0.5,
            transformer=transformer,
        )
        norms += [out.gradient_norms[step] for step in sorted(out.gradient_norms or ())]
        terms += len(callback.surrogate.terms) * (1 + callback.copies)
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    return (
        torch.cat([full_tensor(each).flatten() for each in gradients]),
        torch.stack(norms or [torch.ones(())]),
        terms,
    )


class Held:
    """Bytes of whole parameters and gradients that are alive when a sharded transformer is called.

    Args:
        transformer: sharded.
        others: whose own do not count.
    """

    def __init__(self, transformer: torch.nn.Module, others: torch.nn.Module) -> None:
        self.others = list(others.parameters())
        own = {local(each).shape for each in transformer.parameters()}
        self.shapes = {each.shape for each in transformer.parameters() if each.ndim > 1} - own
        self.bytes: list[int] = []
        transformer.register_forward_pre_hook(self.measure, prepend=True)

    def measure(self, *_: object) -> None:
        """See the class."""
        known = {id(each) for parameter in self.others for each in (parameter, parameter.grad)}
        alive = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
        whole = [each for each in alive if each.shape in self.shapes and id(each) not in known]
        self.bytes.append(sum(each.untyped_storage().size() for each in whole))


def main() -> None:
    """Compare, and print one JSON object in the first process."""
    torch.set_num_threads(1)
    accelerator = Accelerator()
    check_distributed(accelerator)
    rank = accelerator.process_index
    rank_of_lora = None if IS_FULL else 2
    alone, together = tiny_sd3_pipeline(lora_rank=rank_of_lora), tiny_sd3_pipeline(lora_rank=rank_of_lora)
    if IS_FULL:
        alone.transformer.requires_grad_(True)
        shard_all_weights(accelerator, together.transformer, torch.float64)
        shared, held = together.transformer, Held(together.transformer, alone.transformer)
    else:
        shared = prepare_transformer(accelerator, together.transformer)
    found = {}
    for method, options, settings in ROWS:
        if IS_FULL:
            settings = {name: value for name, value in settings.items() if name != "velocity_anchor"}
            held.bytes.clear()
        each = [gradient(alone, 100 + number, None, method, options, settings) for number in range(2)]
        mean = (each[0][0] + each[1][0]) / 2
        with Exchanges() as exchanges:
            result, norms, terms = gradient(together, 100 + rank, shared, method, options, settings)
        found[method] = {
            "difference": ((result - mean).norm() / mean.norm()).item(),
            "of_norms": ((norms - each[rank][1]).norm() / norms.norm()).item(),
            "apart": ((each[0][0] - each[1][0]).norm() / mean.norm()).item(),
            "exchanges": dict(exchanges.counts),
            "terms": terms,
            # Other models have parameters of these shapes, too.
            "held": max(held.bytes) - held.bytes[0] if IS_FULL else None,
        }
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    exit_process(0)


if __name__ == "__main__":
    main()
