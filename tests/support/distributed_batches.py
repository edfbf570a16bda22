# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What `test_distributed.py` runs in each of two processes: the gradient of one update, split in three ways.

Four samples, each with its prompt and its noise: 1 process x batch 4 x 1 pass, 1 x 1 x 4, and 2 x 2 x 1. All passes
share the surrogate. In float64, which shows that all three compute the same, and in float32 as in training. There the
transformer's weights are a tenth as large: at full size it answers a batch of four and of one with values that are
6e-7 apart, and the whole rollout enlarges that.
"""

import json

import torch
import torch.distributed as dist
from accelerate import Accelerator
from diffusers import StableDiffusion3Pipeline
from distributed_gradients import CALL, ROWS
from tiny_sd3 import tiny_sd3_pipeline

from flowbp import FlowBPCallback, get_method
from flowbp.training.distributed import check_distributed, exit_process, prepare_transformer

PROMPTS = ["a", "b", "c", "d"]


def noise(what: int, places: list[int]) -> list[torch.Generator]:
    """A generator for each sample, whatever batch it is in."""
    return [torch.Generator().manual_seed(100 * what + place) for place in places]


def gradient(
    pipe: StableDiffusion3Pipeline, row: int, passes: list[list[int]], transformer: torch.nn.Module | None
) -> torch.Tensor:
    """The gradient of all LoRA parameters in one vector; `passes` has the places of the samples of each pass."""
    method, options, settings = ROWS[row]
    parameters = [parameter for parameter in pipe.transformer.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    for places in passes:
        prompts = [PROMPTS[place] for place in places]
        callback = FlowBPCallback(
            get_method(method, **options),
            generator=torch.Generator().manual_seed(7),
            noise_generator=noise(2, places),
            **settings,
        )
        with callback.record(pipe):
            images = [pipe(prompts, generator=noise(1, places), **CALL).images for _ in range(1 + callback.copies)]
        callback.backward(
            lambda images, texts: images.square().mean((1, 2, 3)),
            torch.cat(images),
            prompts,
            gradient_scale=1 / len(passes),
            transformer=transformer,
        )
    return torch.cat([parameter.grad.flatten() for parameter in parameters])


def tiny_pipeline(dtype: torch.dtype, scale: float, lora: bool = True) -> StableDiffusion3Pipeline:
    """With the matrices of the transformer's base times `scale`."""
    pipe = tiny_sd3_pipeline(dtype, lora_rank=2 if lora else None)
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if "lora_" not in name and parameter.ndim > 1:
                parameter *= scale
    return pipe


def main() -> None:
    """Compare, and print one JSON object in the first process."""
    torch.set_num_threads(1)
    accelerator = Accelerator()
    check_distributed(accelerator)
    rank = accelerator.process_index
    half = [[2 * rank, 2 * rank + 1]]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for dtype, scale in ((torch.float64, 1.0), (torch.float32, 0.1)):
        pipe = tiny_pipeline(dtype, scale)
        shared = prepare_transformer(accelerator, pipe.transformer)
        of_dtype = found[str(dtype).removeprefix("torch.")] = {}
        for row, (method, _, _) in enumerate(ROWS):
            whole = gradient(pipe, row, [[0, 1, 2, 3]], None)
            split = {
                "one_by_one": gradient(pipe, row, [[0], [1], [2], [3]], None),
                "two_processes": gradient(pipe, row, half, shared),
                "half": gradient(pipe, row, half, None),
            }
            of_dtype[method] = {name: ((each - whole).norm() / whole.norm()).item() for name, each in split.items()}
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    exit_process(0)


if __name__ == "__main__":
    main()
