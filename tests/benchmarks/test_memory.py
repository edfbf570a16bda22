# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""benchmarks/memory.py: its counting against real runs on the CPU, its models against published sizes, its report."""

import contextlib
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from golden.make_hpsv3 import QUESTION
from tiny_rewards import save_qwen_processor
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from flowbp import FlowBPCallback, get_method
from flowbp.rewards import vqa
from flowbp.rewards.conversation import load_conversation
from flowbp.rewards.hpsv3 import HPSV3_PIXELS, REWARD_TOKEN, HPSv3, hpsv3_head
from flowbp.rewards.loading import Source
from flowbp.rewards.vqa import VQAReward

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import memory  # noqa: E402
import memory_full  # noqa: E402
import model_sizes  # noqa: E402

TINY_SD3 = {
    "sample_size": 16,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 16,
    "qk_norm": "rms_norm",
    "dual_attention_layers": (0,),
}
TINY_FLUX = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 4, 8),
    "guidance_embeds": True,
}
TINY_FLUX2 = {
    **model_sizes.KLEIN,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 4, 4),
}
TINY_VAE = {**model_sizes.VAE_16, "block_out_channels": (32, 32, 64, 64), "layers_per_block": 1}
ALL_LAYERS = (*model_sizes.ATTENTION, *model_sizes.FEED_FORWARD, "to_qkv_mlp_proj")


def _tokens(inputs, width):
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :12, :width]
    if "txt_ids" in inputs:
        inputs["txt_ids"] = inputs["txt_ids"][..., :12, :]
    return inputs


def _sd3():
    inputs = _tokens(model_sizes.sd3_inputs(2, 128), 32)
    return SD3Transformer2DModel, TINY_SD3, {**inputs, "pooled_projections": inputs["pooled_projections"][:, :64]}


def _flux():
    inputs = _tokens(model_sizes.flux_inputs(2, 128), 32)
    return FluxTransformer2DModel, TINY_FLUX, {**inputs, "pooled_projections": inputs["pooled_projections"][:, :32]}


def _flux2():
    return Flux2Transformer2DModel, TINY_FLUX2, _tokens(model_sizes.flux2_inputs(32)(2, 128), 32)


FAMILIES = {"sd3": _sd3, "flux": _flux, "flux2": _flux2}


def _on(device, family, checkpointing=False, dtype=torch.float32):
    """The same tiny transformer with a LoRA, and its inputs, on `meta` or on the CPU with real numbers."""
    cls, config, inputs = FAMILIES[family]()
    transformer = memory.build(cls, config, dtype)
    memory.add_lora(transformer, ALL_LAYERS, rank=3)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    dtypes = {name: tensor.dtype for name, tensor in inputs.items() if tensor is not None}
    if device == "cpu":
        transformer = transformer.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in [*transformer.parameters(), *transformer.buffers()]:
                tensor.normal_(std=0.1)
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    for name, tensor in inputs.items():
        if tensor is not None:
            to = dtype if dtypes[name] is torch.bfloat16 else dtypes[name]
            inputs[name] = (
                torch.rand(tensor.shape).to(to) if device == "cpu" else model_sizes.meta(*tensor.shape, dtype=to)
            )
    return transformer, inputs


def _saved_by_hooks(transformer, inputs):
    """Bytes that autograd's hooks report for a real forward pass, with the output: distinct storages, made in it."""
    latents = inputs["hidden_states"].requires_grad_()
    given = [*transformer.parameters(), *transformer.buffers()]
    given += [tensor for tensor in inputs.values() if tensor is not None]
    given = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = transformer(**{**inputs, "hidden_states": latents}, return_dict=False)[0]
    pack(output)
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in given)


# The count.


def test_saved_bytes_on_meta_equal_a_real_run():
    # Nothing is replaced in the real run: torch's own attention, on CPU the flash kernel.
    counted = memory.transformer_pass(*_on("meta", "sd3"))
    assert counted.saved == _saved_by_hooks(*_on("cpu", "sd3"))


@pytest.mark.parametrize("family", ["flux", "flux2"])
def test_saved_bytes_with_a_fused_norm_equal_a_real_run(family):
    # The CPU has no fused RMS norm, so the real run takes the stand-in for that one.
    counted = memory.transformer_pass(*_on("meta", family))
    with memory.gpu_kernels():
        assert counted.saved == _saved_by_hooks(*_on("cpu", family))


def test_the_fused_kernels_save_much_less_than_the_elementary_operations():
    fused = memory.transformer_pass(*_on("meta", "flux")).saved
    transformer, inputs = _on("meta", "flux")
    with memory.LiveBytes() as count:
        output = transformer(**{**inputs, "hidden_states": inputs["hidden_states"].requires_grad_()})
    assert count.live > 1.2 * fused
    del output


@pytest.mark.parametrize(
    ("family", "checkpointing", "dtype"),
    [
        ("sd3", False, torch.float32),
        ("sd3", True, torch.bfloat16),
        ("flux", True, torch.float32),
        ("flux", False, torch.bfloat16),
        ("flux2", True, torch.float32),
        ("flux2", False, torch.bfloat16),
    ],
)
def test_a_pass_on_meta_counts_what_the_same_pass_on_the_cpu_counts(family, checkpointing, dtype):
    on_meta = memory.transformer_pass(*_on("meta", family, checkpointing, dtype))
    on_cpu = memory.transformer_pass(*_on("cpu", family, checkpointing, dtype))
    # In bf16 the CPU keeps the statistics of layer norms in bf16, other devices in float32.
    tolerance = 0 if dtype is torch.float32 else 0.01
    assert on_meta.saved == pytest.approx(on_cpu.saved, rel=tolerance)
    assert on_meta.peak == pytest.approx(on_cpu.peak, rel=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_saves_less(family):
    plain, checkpointed = (memory.transformer_pass(*_on("meta", family, on)) for on in (False, True))
    assert checkpointed.saved < plain.saved / 2
    assert checkpointed.peak < plain.peak / 1.3


def _allocator_peak(run):
    """Largest sum of live allocations that PyTorch's CPU allocator reports during `run`, by torch's own profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    live = peak = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_that_of_the_allocator(checkpointing):
    counted = memory.transformer_pass(*_on("meta", "sd3", checkpointing)).peak
    transformer, inputs = _on("cpu", "sd3", checkpointing)
    latents = inputs["hidden_states"].requires_grad_()

    def run():
        output = transformer(**{**inputs, "hidden_states": latents}, return_dict=False)[0]
        output.backward(torch.ones_like(output))

    # The allocator also sees buffers inside kernels, which the count leaves to the margin.
    assert counted <= _allocator_peak(run) <= 1.1 * counted


def test_live_bytes_ends_at_zero_and_ignores_what_was_there_before():
    weight = torch.ones(8, 8, requires_grad=True)
    with memory.LiveBytes() as count:
        product = weight.t() @ weight.view(8, 8)
        assert count.live == product.untyped_storage().nbytes()
        view = product[:2]
        del product
        assert count.live == view.untyped_storage().nbytes()
        del view
        assert count.live == 0
    assert count.peak == 8 * 8 * 4


# Decode and reward.


def _decode(samples_per_decode, checkpointing, batch=3):
    vae = memory.build(AutoencoderKL, TINY_VAE)
    if checkpointing:
        vae.enable_gradient_checkpointing()
    latents = model_sizes.meta(batch, 16, 8, 8)
    return memory.decode_pass(vae, lambda images: images.square().mean((1, 2, 3)), latents, samples_per_decode)


def test_decoding_one_at_a_time_does_not_grow_with_the_batch():
    one, three = _decode(1, False, batch=1), _decode(1, False, batch=3)
    all_at_once = _decode(None, False, batch=3)
    assert all_at_once["decode"] == 3 * one["decode"]
    # The pictures of the other two, in two copies, and their gradients.
    assert three["peak"] < 1.2 * one["peak"] < all_at_once["peak"] / 2


def test_checkpointing_of_the_vae_saves_less():
    assert _decode(None, True)["peak"] < 0.9 * _decode(None, False)["peak"]
    assert _decode(None, True)["decode"] < 0.5 * _decode(None, False)["decode"]


TINY_QWEN = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 300,
    "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
}
TINY_VISION = {"depth": 2, "num_heads": 2, "patch_size": 14}
TINY_VISIONS = {
    "QWEN2_VISION": {**TINY_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    "QWEN2_5_VISION": {
        **TINY_VISION,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    },
}


@pytest.mark.parametrize("name", memory.QUESTION_TOKENS)
def test_language_models_are_counted_as_the_rewards_run(tiny, name, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "QWEN_TEXT", TINY_QWEN)
    for vision, config in TINY_VISIONS.items():
        monkeypatch.setattr(memory, vision, config)
    memory._language_model.cache_clear()
    model = memory._language_model(name)
    memory._language_model.cache_clear()
    assert memory.reward_weights(name) == memory.weight_bytes(model)

    # The reward itself on the CPU.
    on_cpu = type(model)(model.config).to(torch.bfloat16)
    on_cpu.config.image_token_id = 261
    save_qwen_processor(tmp_path, {"model_type": "qwen2_vl"})
    pixels = HPSV3_PIXELS if name == "hpsv3" else None
    conversation = load_conversation(Source(name, "tiny", ()), tmp_path, 261, pixels)
    if name == "hpsv3":
        conversation.tokenizer.add_tokens(REWARD_TOKEN, special_tokens=True)
        reward, question = HPSv3(on_cpu, hpsv3_head(64), conversation, QUESTION), QUESTION
    else:
        reward, question = VQAReward(on_cpu, conversation), vqa.QUESTION
    images = torch.rand(2, 3, 140, 168, requires_grad=True)
    inputs = conversation([images[0].detach()], question, "cat", torch.device("cpu"))["input_ids"]
    tokens = int((inputs != 261).sum())

    def peak(score, images):
        with memory.gpu_kernels(), memory.LiveBytes() as count:
            torch.autograd.grad(score(images).sum(), images)
        return count.peak

    on_meta = images.detach().to("meta").requires_grad_()
    counted = peak(lambda images: memory.language_score(model, images, tokens, pixels), on_meta)
    assert counted == pytest.approx(peak(lambda images: reward(images, ["cat", "cat"]), images), rel=0.05)
    # One sample at a time.
    assert counted < 1.4 * peak(lambda images: memory.language_score(model, images, tokens, pixels), on_meta[:1])
    assert memory.compute("sd3.5-medium", memory.Switches(64, 1, 4, reward=name))["resident"][
        "reward"
    ] == memory.reward_weights(name)


# All weights, in shards.


def test_memory_of_full_fine_tuning_is_shared_by_the_gpus():
    one, two = (memory_full.compute("sd3.5-medium", gpus, 256, 1, keeps_average=True) for gpus in (1, 2))
    count = one["parameters"]
    assert 2.2e9 < count < 2.5e9
    # Float32 weights, gradients, two moments and an average.
    assert one["resident"]["weights_gradients_adamw"] + one["resident"]["average"] == 20 * count
    assert one["peak"] - two["peak"] == pytest.approx(10 * count, rel=1e-3)
    without = memory_full.compute("sd3.5-medium", 1, 256, 1, keeps_average=False)
    assert one["peak"] - without["peak"] == 4 * count and one["fits"]["80 GB"] and not one["fits"]["40 GB"]


# Weights.


def test_weights_are_counted_as_bitsandbytes_stores_them():
    layer = torch.nn.Linear(1536, 640, dtype=torch.bfloat16)
    assert memory.weight_bytes(layer) == 2 * (1536 * 640 + 640)
    # Measured with bitsandbytes 0.50.2: 491520 packed bytes and 15360 float32 scales; 983040 bytes and 640 scales.
    assert memory.weight_bytes(layer, "nf4") == 491520 + 4 * 15360 + 2 * 640
    assert memory.weight_bytes(layer, "int8") == 983040 + 4 * 640 + 2 * 640
    with pytest.raises(ValueError, match="nf4, int8, got fp8"):
        memory.weight_bytes(layer, "fp8")


def test_int8_layers_keep_their_inputs():
    transformer, inputs = _on("meta", "sd3")
    plain = memory.transformer_pass(transformer, inputs)
    with memory._as_int8(transformer):
        kept = memory.transformer_pass(transformer, inputs)
    assert kept.saved > plain.saved
    assert memory.transformer_pass(transformer, inputs) == plain


def test_flux_agrees_with_a_published_measurement():
    # huggingface.co/blog/flux-qlora, RTX 4090, 512 x 768, batch 1, checkpointing, embeddings of 77 tokens computed
    # before: it prints both counts of parameters and reports about 9 GB with an nf4 base and 26 GB with a 16-bit one.
    transformer = memory.build(*memory.MODELS["flux.1-dev"].transformer)
    weights = {name: memory.weight_bytes(transformer, name) for name in (None, "nf4")}
    parameters = memory.add_lora(transformer, ("to_k", "to_q", "to_v", "to_out.0"), rank=4)
    assert sum(parameter.numel() for parameter in parameters) == 4_669_440
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 11_906_077_760
    transformer.enable_gradient_checkpointing()
    inputs = model_sizes.flux_inputs(1, 512)
    tokens = (512 // 16) * (768 // 16)
    inputs |= {"hidden_states": model_sizes.meta(1, tokens, 64), "img_ids": model_sizes.meta(tokens, 3)}
    inputs |= {"encoder_hidden_states": model_sizes.meta(1, 77, 4096), "txt_ids": model_sizes.meta(77, 3)}
    step = memory.transformer_pass(transformer, inputs).peak
    for name, reported in ((None, 26e9), ("nf4", 9e9)):
        computed = weights[name] + step + memory.MARGIN * memory.GIB
        assert computed == pytest.approx(reported, rel=0.07)


@pytest.mark.parametrize(
    ("name", "billions"), [("sd3.5-medium", 2.5), ("flux.2-klein-4b", 4.0), ("flux.2-klein-9b", 9.0)]
)
def test_transformers_have_the_size_in_their_name(name, billions):
    transformer = memory.build(*memory.MODELS[name].transformer)
    # Files hold buffers too: SD3.5-M's table of positions is a tenth of the model.
    count = sum(tensor.numel() for tensor in [*transformer.parameters(), *transformer.buffers()])
    assert count == pytest.approx(billions * 1e9, rel=0.04)


@pytest.mark.parametrize("name", memory.MODELS)
def test_every_lora_layer_is_trained_in_float32(name):
    transformer = memory.build(*memory.MODELS[name].transformer)
    parameters = memory.add_lora(transformer, memory.MODELS[name].lora_layers, rank=1)
    assert {tensor.dtype for parameter in parameters for tensor in (parameter, parameter.grad)} == {torch.float32}
    trained = [path for path, module in transformer.named_modules() if hasattr(module, "lora_A")]
    for layer in memory.MODELS[name].lora_layers:
        assert any(path == layer or path.endswith(f".{layer}") for path in trained), layer


# The report.

TINY_TEXT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "projection_dim": 32,
}


@pytest.fixture
def tiny(monkeypatch):
    """The command's models replaced by one tiny one."""
    model = model_sizes.Model(
        "Tiny",
        (SD3Transformer2DModel, TINY_SD3),
        (AutoencoderKL, TINY_VAE),
        ((CLIPTextModelWithProjection, CLIPTextConfig, TINY_TEXT, 12),),
        tuple(f"attn.{layer}" for layer in model_sizes.ATTENTION),
        lambda samples, pixels: {
            "hidden_states": model_sizes.meta(samples, 16, pixels // 8, pixels // 8),
            "timestep": model_sizes.meta(samples),
            "encoder_hidden_states": model_sizes.meta(samples, 12, 32),
            "pooled_projections": model_sizes.meta(samples, 64),
        },
        branches_per_call=2,
    )
    monkeypatch.setattr(memory, "MODELS", {"sd3.5-medium": model})
    vision = {**TINY_TEXT, "patch_size": 56, "image_size": 224}
    del vision["vocab_size"], vision["max_position_embeddings"]
    monkeypatch.setattr(memory, "REWARD_VISION", vision)
    monkeypatch.setattr(memory, "REWARD_TEXT", TINY_TEXT)
    caches = (memory._transformer, memory._reward, memory._language_model, memory._text, memory._static)
    caches += (memory._sweep, memory._rollout, memory._decode)
    with contextlib.ExitStack() as stack:
        for cache in caches:
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        yield


@pytest.mark.parametrize(("checkpointing", "samples_per_decode"), [(False, None), (True, 1)])
def test_the_stages_are_those_of_a_real_update(tiny, checkpointing, samples_per_decode):
    # The same model on the CPU, in the stock pipeline under the callback, with the most active steps of a recipe.
    switches = memory.Switches(128, 3, 4, checkpointing, samples_per_decode, "precompute")
    computed = memory.compute("sd3.5-medium", switches)

    model = memory.MODELS["sd3.5-medium"]
    vision = memory._reward()
    transformer, vae = memory.build(*model.transformer), memory.build(*model.vae)
    memory.add_lora(transformer, model.lora_layers, rank=4)
    modules = [transformer, vae, vision]
    for number, module in enumerate(modules):
        modules[number] = module = module.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(std=0.1)
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            for buffer in module.buffers():
                buffer.zero_()
    transformer, vae, vision = modules
    vision.vision_model.embeddings.position_ids = torch.arange(17)[None]
    vae.register_to_config(scaling_factor=1.5, shift_factor=0.0)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
        vae.enable_gradient_checkpointing()
    without = dict.fromkeys(f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=scheduler, **without)
    pipe.set_progress_bar_config(disable=True)
    embeds = {
        f"{sign}{name}": torch.randn(3, *shape).bfloat16()
        for name, shape in (("prompt_embeds", (12, 32)), ("pooled_prompt_embeds", (64,)))
        for sign in ("", "negative_")
    }
    peaks = {}
    with memory.gpu_kernels(), memory.LiveBytes() as count:
        stages = ["start"]

        def mark(stage):
            peaks[stages[-1]] = max(peaks.get(stages[-1], 0), count.peak)
            count.restart()
            stages.append({"decode": "decode+reward", "reward": "decode+reward"}.get(stage, stage))

        callback = FlowBPCallback(
            get_method("flowbp-bridge", num_active=memory.ACTIVE_STEPS),
            generator=torch.Generator().manual_seed(0),
            samples_per_decode=samples_per_decode,
            on_stage=mark,
        )
        with callback.record(pipe):
            images = pipe(
                **embeds,
                height=128,
                width=128,
                num_inference_steps=8,
                guidance_scale=3.5,
                output_type="pt",
                callback_on_step_end=callback,
            ).images
        callback.backward(lambda images, prompts: memory.clip_score(vision, images.float()), images, ["a"] * 3)
        mark("end")
    loaded = sum(size for part, size in computed["resident"].items() if part != "trajectory")
    for stage in ("rollout", "decode+reward", "sweep"):
        expected = computed["stages"][stage] - loaded
        assert 0.85 * expected < peaks[stage] < 1.02 * expected, stage


def test_the_command_writes_what_it_prints(tiny, tmp_path, capsys):
    path = tmp_path / "memory.json"
    options = ["--model", "sd3.5-medium", "--resolution", "64", "--train_batch_size", "2", "--rank", "4"]
    returned = memory.main([*options, "--output", str(path)])
    written = json.loads(path.read_text(encoding="utf-8"))
    assert json.loads(json.dumps(returned)) == written
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    assert "computed" in text and "nothing here was measured" in text
    rows = written["rows"]
    plain, small, grouped, offloaded, precomputed, quantized = rows
    for row in rows:
        assert row["peak"] == max(row["stages"].values())
        base = sum(row["resident"].values())
        assert all(size >= base for stage, size in row["stages"].items() if stage != "encode")
        assert row["fits"] == {"24 GB": True, "40 GB": True, "80 GB": True}
    assert small["stages"]["sweep"] < plain["stages"]["sweep"]
    assert small["stages"]["decode+reward"] < plain["stages"]["decode+reward"]
    encoders = small["resident"]["text_encoders"]
    assert encoders > 0
    for row in (grouped, offloaded, precomputed):
        assert row["stages"]["sweep"] == small["stages"]["sweep"] - encoders
    assert grouped["stages"]["encode"] < offloaded["stages"]["encode"] == small["stages"]["encode"]
    assert quantized["resident"]["transformer"] < precomputed["resident"]["transformer"]


def test_what_does_not_fit_is_said(tiny, monkeypatch):
    switches = memory.choices(64, 1, 4, "nf4")
    least = min(memory.compute("sd3.5-medium", each)["peak"] for each in switches) / memory.GIB
    monkeypatch.setattr(memory, "GPUS", {"under": memory.MARGIN + least - 1e-9, "just": memory.MARGIN + least})
    rows = [memory.compute("sd3.5-medium", each) for each in switches]
    assert not any(row["fits"]["under"] for row in rows)
    assert [row["fits"]["just"] for row in rows].count(True) >= 1
    table = memory.summary({"rows": rows})
    assert table[0] == "| model | pixels | batch | under | just |"
    assert table[2].startswith("| Tiny | 64 | 1 | does not fit | C P Q: ")
    assert "| no |" in memory.markdown({"command": "c", "rank": 4, "reward": "clip-vit-h", "rows": rows})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resolution", "512"], "give both or none"),
        (["--resolution", "500", "--train_batch_size", "1"], "multiple of 16, got 500; use 496"),
        (["--resolution", "512", "--train_batch_size", "0"], "--train_batch_size must be at least 1, got 0"),
        (["--rank", "0"], "--rank must be at least 1, got 0"),
        (["--output", "table.md"], "--output must end in .json, got table.md"),
        (["--model", "sdxl"], "invalid choice: 'sdxl'"),
    ],
)
def test_wrong_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        memory.parse_args(options)
    assert message in capsys.readouterr().err


def test_the_committed_tables_belong_together():
    # Recompute them with the command that they name; README's table is the summary.
    path = ROOT / "benchmarks" / "results" / "memory_computed.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    assert memory.markdown(report) == path.with_suffix(".md").read_text(encoding="utf-8")
    assert {row["model"] for row in report["rows"]} == set(memory.MODELS)
    assert "\n".join(memory.summary(report)) in (ROOT / "training" / "README.md").read_text(encoding="utf-8")
