# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""A LoRA in the base's dtype, compiled blocks, attention backends, deterministic kernels."""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from families import FAMILIES
from families.oracle import call_arguments
from peft import LoraConfig, get_peft_model_state_dict
from tiny_pipelines import tiny_flux_pipeline
from tiny_sd3 import MAX_SEQUENCE_LENGTH, tiny_sd3_pipeline
from training_scripts import (
    CheckRefusal,
    arguments_of_run,
    command_line,
    load_script,
    lora_of,
)
from updates_by_hand import make_config

from flowbp import FlowBPCallback, get_method
from flowbp.checks import RecordingError
from flowbp.rewards import preprocessing
from flowbp.training import speed
from flowbp.training.speed import compute_lora_in_base_dtype

LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


def with_lora(pipe: DiffusionPipeline, dtype: torch.dtype, **options: Any) -> torch.nn.Module:
    """The transformer in bfloat16's numbers and in `dtype`, with a trained LoRA that is float32 at least."""
    torch.manual_seed(0)
    transformer = pipe.transformer.requires_grad_(False).to(torch.bfloat16).to(dtype)
    transformer.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=LAYERS, **options))
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * parameter.data.to(torch.promote_types(dtype, torch.float32))
    return transformer


def recorded_inputs(pipe: DiffusionPipeline, name: str) -> dict[str, Any]:
    """Arguments of a stock call's second transformer call."""
    family = next(family for family in FAMILIES if family.name == name)
    calls: list[dict[str, Any]] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, __, given: calls.append(given), with_kwargs=True)
    with torch.no_grad():
        pipe(**call_arguments(family.cases(pipe)[0]))
    handle.remove()
    return calls[1]


def gradient(transformer: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Of a random projection of the output by all LoRA weights."""
    dtype = transformer.dtype
    given = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    output = transformer(**given)[0]
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    found = torch.autograd.grad((output.float() * direction).sum(), trained)
    assert all(each.dtype == parameter.dtype for each, parameter in zip(found, trained, strict=True))
    return torch.cat([each.double().flatten() for each in found])


@pytest.mark.parametrize("name", ["Stable Diffusion 3 / 3.5", "FLUX.1"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["LoRA", "rsLoRA"])
def test_gradients_are_as_exact_as_those_of_a_float32_lora(name: str, options: dict[str, Any]) -> None:
    """The base's bfloat16 rounds more than the LoRA's: at most 1.2 times the error."""
    family = next(family for family in FAMILIES if family.name == name)
    inputs = recorded_inputs(family.build(), name)
    exact = gradient(with_lora(family.build(), torch.float64, **options), inputs)
    transformer = with_lora(family.build(), torch.bfloat16, **options)
    names = list(get_peft_model_state_dict(transformer))
    of_peft = (gradient(transformer, inputs) - exact).norm() / exact.norm()
    compute_lora_in_base_dtype(transformer)
    found = (gradient(transformer, inputs) - exact).norm() / exact.norm()
    assert 0.05 < of_peft < 1 and found != of_peft and found < 1.2 * of_peft
    assert list(get_peft_model_state_dict(transformer)) == names


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_the_products_are_the_base_s_and_dora_s_are_not(options: dict[str, Any]) -> None:
    transformer = with_lora(tiny_sd3_pipeline(torch.bfloat16), torch.bfloat16, **options)
    layer = transformer.transformer_blocks[0].attn.to_q
    x = torch.randn(2, 50, layer.in_features, dtype=torch.bfloat16)
    kept: list[torch.dtype] = []

    def run() -> tuple[torch.Tensor, ...]:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda each: (kept.append(each.dtype), each)[1], lambda e: e):
            y = layer(x)
        weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        return (y, *torch.autograd.grad(y.float().square().sum(), weights))

    before = run()
    assert torch.float32 in kept
    compute_lora_in_base_dtype(transformer)
    after = run()
    assert after[0].dtype == torch.bfloat16 and after[1].dtype == after[2].dtype == torch.float32
    if options:
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    else:
        assert torch.float32 not in kept
        for found, expected in zip(after, before, strict=True):
            assert 0 < (found - expected).norm() < 2**-8 * expected.norm()


def test_loaded_in_the_base_s_dtype_it_computes_the_same() -> None:
    transformer = with_lora(tiny_sd3_pipeline(torch.bfloat16), torch.bfloat16)
    loaded = copy.deepcopy(transformer).to(torch.bfloat16)
    compute_lora_in_base_dtype(transformer)
    layers = (transformer.transformer_blocks[0].attn.to_q, loaded.transformer_blocks[0].attn.to_q)
    x = torch.randn(2, 3, layers[0].in_features, dtype=torch.bfloat16)
    assert torch.equal(layers[0](x), layers[1](x))


def update(pipe: DiffusionPipeline, strict: bool) -> None:
    """Record a call and give its LoRA gradients."""
    callback = FlowBPCallback(get_method("full"), unconditional_gradient=True, strict=strict)
    size = {"max_sequence_length": MAX_SEQUENCE_LENGTH, "height": 8, "width": 8, "output_type": "pt"}
    with callback.record(pipe):
        images = pipe(["a", "b"], num_inference_steps=4, guidance_scale=3.0, **size).images
    callback.backward(lambda images, prompts: images.float().square().mean((1, 2, 3)), images, ["a", "b"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_engine_replays_it(checkpointing: bool) -> None:
    """On a CPU a replay that is not equal bit for bit is refused."""
    pipe = tiny_sd3_pipeline(torch.bfloat16)
    transformer = with_lora(pipe, torch.bfloat16)
    compute_lora_in_base_dtype(transformer)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    update(pipe, strict=True)
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    assert all(each.grad.dtype == torch.float32 and each.grad.abs().max() > 0 for each in trained)


@pytest.mark.usefixtures("cheap_compiler")
@pytest.mark.parametrize(("rounding", "is_refused"), [(2**-8, False), (2**-2, True)])
def test_compiled_code_may_round_differently_with_gradients(
    rounding: float, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor's does, in bfloat16, and with other sizes; but no more than replays may."""

    def rounds(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        factor = 1 + rounding * torch.is_grad_enabled()
        return lambda *given: tuple(
            each * factor if isinstance(each, torch.Tensor) and each.is_floating_point() else each
            for each in graph(*given)
        )

    monkeypatch.setattr(speed, "COMPILER", rounds)
    pipe = tiny_sd3_pipeline(torch.bfloat16)
    speed.compile_blocks(with_lora(pipe, torch.bfloat16))
    refused = pytest.raises(RecordingError, match="does not reproduce") if is_refused else contextlib.nullcontext()
    with refused:
        update(pipe, strict=False)


# Options.


def test_the_lora_s_dtype_by_default(tmp_path: Path) -> None:
    found = {dtype: make_config(tmp_path, mixed_precision=dtype).lora_dtype for dtype in ("no", "fp16", "bf16")}
    assert found == {"no": "float32", "fp16": "float32", "bf16": "base"}
    assert make_config(tmp_path, mixed_precision="bf16", lora_dtype="float32").lora_dtype == "float32"
    with pytest.raises(ValueError, match="--lora_dtype base: gradients can vanish in float16"):
        make_config(tmp_path, mixed_precision="fp16", lora_dtype="base")


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    """Of the script of SD3."""
    tiny_sd3_pipeline(torch.float32).save_pretrained(tmp_path / "model")
    size = {"resolution": 8, "max_sequence_length": MAX_SEQUENCE_LENGTH}
    return arguments_of_run(tmp_path / "model", tmp_path, **size, validation_steps=100)


@pytest.fixture
def cheap_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace and split forward and backward passes, but generate no code."""
    monkeypatch.setattr(speed, "COMPILER", "aot_eager")
    torch.compiler.reset()
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = limit
    torch.compiler.reset()


@pytest.mark.usefixtures("cheap_compiler")
@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16", "gradient_checkpointing": True, "method": "flowbp-sparse", "num_active": 2},
        {"method": "leapalign", "velocity_anchor": 0.1, "samples_per_decode": 1},
    ],
    ids=["bf16, checkpointing", "both branches, anchor"],
)
def test_compiled_blocks_train_and_compile_no_more_after_the_third_update(
    arguments: dict[str, Any], changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flowbp.training.state import TrainingState

    graphs = []
    step = TrainingState.step

    def counted(state: TrainingState, *given: Any) -> Any:
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return step(state, *given)

    monkeypatch.setattr(TrainingState, "step", counted)
    script = load_script("train_flowbp_sd3")
    words = {**arguments, **changes, "max_train_steps": 5}
    script.main(command_line(words, compile_blocks=True))
    assert graphs[0] > 0 and graphs[2:] == [graphs[2]] * 3, graphs
    script.main(command_line(words, output_dir=tmp_path / "eager"))
    compiled, eager = lora_of(arguments["output_dir"]), lora_of(tmp_path / "eager")
    assert compiled.keys() == eager.keys()
    if "mixed_precision" not in changes:
        assert max((compiled[name] - eager[name]).abs().max() for name in eager) < 1e-4


def test_compiled_shards_are_refused(arguments: dict[str, Any], check_refusal: CheckRefusal) -> None:
    changes = {"compile_blocks": True, "train": "full", "rank": None, "lora_alpha": None}
    message = "--compile_blocks is not tested with shards"
    check_refusal("train_flowbp_sd3", {**arguments, **changes}, message)


def test_a_model_whose_blocks_are_not_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--compile_blocks: expected class names of blocks of Sequential, got none"):
        speed.compile_blocks(torch.nn.Sequential(torch.nn.Linear(1, 1)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fast", "expected one of native, "),
        ("_native_cudnn", "the gradients of cuDNN's attention are wrong"),
        ("sage", "it has no backward pass"),
        ("flash_hub", "needs code from the Hub"),
    ],
)
def test_attention_backends_that_cannot_train(
    name: str, message: str, arguments: dict[str, Any], check_refusal: CheckRefusal
) -> None:
    check_refusal("train_flowbp_sd3", {**arguments, "attention_backend": name}, message)


def test_attention_backends_are_diffusers() -> None:
    assert set(speed.ATTENTION_BACKENDS) < {each.value for each in AttentionBackendName}


def test_an_attention_backend_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    active = _AttentionBackendRegistry._active_backend
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", active)
    transformer = tiny_flux_pipeline().transformer
    speed.set_attention_backend(transformer, "_native_math")
    assert {block.attn.processor._attention_backend for block in transformer.transformer_blocks} == {"_native_math"}
    with pytest.raises(ValueError, match="--attention_backend flash: Flash Attention backend 'flash' is not usable"):
        speed.set_attention_backend(transformer, "flash")
    with pytest.raises(ValueError, match="attention layers of SD3Transformer2DModel take no backend"):
        speed.set_attention_backend(tiny_sd3_pipeline().transformer, "native")


def test_deterministic_kernels(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        load_script("train_flowbp_sd3").main(command_line(arguments, deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("size", [(20, 37), (50, 20), (20, 19), (90, 11)])
def test_the_deterministic_resize_is_the_other_one(size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, 50, 37, dtype=torch.float64, requires_grad=True)
    expected = F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True)
    found = preprocessing.resized_by_products(images, size)
    assert (found - expected).abs().max() < 1e-14
    ones = torch.randn_like(expected)
    gradients = [torch.autograd.grad(each, images, ones)[0] for each in (found, expected)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-13
