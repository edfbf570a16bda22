# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What the accounting must not refuse: compiled blocks, gradient checkpointing, layerwise casting, experts, autocast.

Each is a way in which stock pipelines are used, and each changes how a transformer's parts are called. The gradient is
compared with autograd through the stock call, as in the matrix.
"""

from collections.abc import Callable

import pytest
import torch
from brute_force import Sampling, flat, toy_reward
from diffusers import DiffusionPipeline
from families import FAMILIES
from families.oracle import engine_gradient, gradients, stock_gradient, transformers, try_case
from peft import LoraConfig
from tiny_sd3 import tiny_sd3_pipeline

from flowbp import FlowBPCallback, get_method
from flowbp.checks import RecordingError

BOUND = 1e-6


def compile_blocks(pipe: DiffusionPipeline) -> None:
    for transformer in transformers(pipe).values():
        for module in transformer.modules():
            if isinstance(module, torch.nn.ModuleList):
                for block in module:
                    block.compile(backend="aot_eager")


def compile_whole(pipe: DiffusionPipeline) -> None:
    for transformer in transformers(pipe).values():
        transformer.compile(backend="aot_eager")


def wrap_compiled(pipe: DiffusionPipeline) -> None:
    for name, transformer in transformers(pipe).items():
        # What matters here is the wrapper; the ways above have graphs of their own.
        setattr(pipe, name, torch.compile(transformer, backend="eager"))


def checkpoint_gradients(pipe: DiffusionPipeline) -> None:
    for transformer in transformers(pipe).values():
        transformer.enable_gradient_checkpointing()


def cast_layers(pipe: DiffusionPipeline) -> None:
    for transformer in transformers(pipe).values():
        transformer.requires_grad_(False)
        transformer.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.float64)


def add_lora(pipe: DiffusionPipeline) -> None:
    for transformer in transformers(pipe).values():
        transformer.requires_grad_(False)
        names = {name.rpartition(".")[2] for name, _ in transformer.named_modules()}
        layers = [name for name in ("to_q", "to_k", "to_v", "qkv", "attention") if name in names]
        transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=layers))
        transformer.to(torch.float64)


WAYS: dict[str, Callable[[DiffusionPipeline], None]] = {
    "compiled blocks": compile_blocks,
    "compiled transformer": compile_whole,
    "wrapped by torch.compile": wrap_compiled,
    "gradient checkpointing": checkpoint_gradients,
    "LoRA": add_lora,
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *(("Stable Diffusion 3 / 3.5", way) for way in WAYS),
        *(("FLUX.1", way) for way in ("compiled blocks", "gradient checkpointing", "LoRA")),
        *((name, way) for name in ("FLUX.2-Klein base", "Wan 2.1") for way in ("gradient checkpointing", "LoRA")),
        ("Z-Image", "gradient checkpointing"),
    ],
)
def test_ways_of_calling_a_transformer(name: str, way: str) -> None:
    torch.compiler.reset()
    family = next(family for family in FAMILIES if family.name == name)
    pipe = family.build()
    cases = family.cases(pipe)
    WAYS[way](pipe)
    # Compiling takes long: there only the call with the most branches.
    for case in cases[1:2] if "compile" in way else cases[:2]:
        outcome = try_case(pipe, case)
        assert outcome.refused is None, outcome
        assert outcome.difference < BOUND, outcome
        assert case.unconditional is None or outcome.conditional_difference < BOUND, outcome


@pytest.mark.parametrize("name", ["HiDream-I1", "Nucleus-Image"])
def test_experts_with_gradient_checkpointing(name: str) -> None:
    """Whatever experts a step's tokens choose."""
    family = next(family for family in FAMILIES if family.name == name)
    pipe = family.build()
    cases = family.cases(pipe)
    checkpoint_gradients(pipe)
    for case in cases:
        outcome = try_case(pipe, case)
        assert outcome.difference is not None and outcome.difference < BOUND, outcome


def test_compiled_blocks_do_not_compile_again_at_every_rollout() -> None:
    torch.compiler.reset()
    family = next(family for family in FAMILIES if family.name == "Stable Diffusion 3 / 3.5")
    pipe = family.build()
    case = family.cases(pipe)[1]
    compile_blocks(pipe)
    engine_gradient(pipe, case)
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    first = gradients(pipe)
    for _ in range(2):
        engine_gradient(pipe, case)
    assert counters["unique_graphs"] == before
    assert first is not None


def test_autocast_around_record_only() -> None:
    """Calls are replayed under the autocast that they were recorded under."""
    pipe = tiny_sd3_pipeline(torch.float32)
    sampling = Sampling(("a 42", "the 7"), 4, 3.5)

    def found(around_record: bool, around_backward: bool) -> torch.Tensor:
        pipe.transformer.zero_grad(set_to_none=True)
        callback = FlowBPCallback(get_method("full"), unconditional_gradient=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=around_record), callback.record(pipe):
            images = pipe(**sampling.call_arguments()).images
        rewards = toy_reward(images.float(), sampling.image_prompts())
        with torch.autocast("cpu", torch.bfloat16, enabled=around_backward):
            callback.backward(rewards)
        return flat({name: p.grad for name, p in pipe.transformer.named_parameters() if p.grad is not None})

    expected, plain = found(True, True), found(False, False)
    assert torch.equal(found(True, False), expected)
    assert (plain - expected).norm() > 1e-2 * expected.norm()
    assert torch.equal(found(False, True), plain)


def test_layerwise_casting_of_a_frozen_base() -> None:
    """A frozen base whose weights wait in another dtype between their calls, and a LoRA over it."""
    family = next(family for family in FAMILIES if family.name == "Stable Diffusion 3 / 3.5")
    pipe = family.build()
    case = family.cases(pipe)[1]
    add_lora(pipe)
    trained = [parameter for parameter in pipe.transformer.parameters() if parameter.requires_grad]
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float32, compute_dtype=torch.float64, skip_modules_pattern=["lora"]
    )
    for parameter in trained:
        parameter.data = parameter.data.double()
    try:
        found = engine_gradient(pipe, case)
    except RecordingError as error:
        pytest.fail(str(error))
    expected = stock_gradient(pipe, case)
    assert ((found - expected).norm() / expected.norm()) < BOUND
