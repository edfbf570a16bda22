# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Peak GPU memory of the training scripts, computed from the models' public configurations.

    python benchmarks/memory.py --output benchmarks/results/memory_computed.json     # the committed tables
    python benchmarks/memory.py --model flux.1-dev --resolution 768 --train_batch_size 2 --rank 64 --reward hpsv3

Nothing is downloaded and no GPU is needed: the real modules are built on torch's meta device, where tensors have
shapes and dtypes but no data. Weights are counted; forward and backward passes run on meta, and every storage that
they make is counted from its birth to its last reference, so the peak includes what autograd saves, what
checkpointing computes again, and gradients on their way. `training/README.md` explains the result.
"""

import argparse
import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import diffusers
import model_sizes
import peft
import torch
import transformers
from meters import GIB
from model_sizes import build_module, meta
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3ForCausalLM,
)
from transformers.vision_utils import get_vision_position_ids

from flowbp.rewards.conversation import Conversation
from flowbp.rewards.held_gradient import score_one_by_one
from flowbp.rewards.hpsv3 import HPSV3_PIXELS, hpsv3_head
from flowbp.training.prompt_embeds import PROMPTS_PER_BATCH, PROMPTS_PER_FILE

# What CUDA reports as the memory of common GPUs of that name (RTX 4090; A100 40GB; A100 and H100 80GB), GiB.
GPUS = {"24 GB": 23.6, "40 GB": 39.4, "80 GB": 79.1}
# CUDA context, cuBLAS and cuDNN workspaces, temporary buffers inside kernels and fragmentation, GiB: not computed.
MARGIN = 1.5

# What one rollout keeps for the sweep: active steps (the most that a recipe has, FlowBP-Bridge), and latent-sized
# tensors of each (input and output of both branches, latents, velocity, and what the pipeline's code between them
# saves). During the sweep the images are kept twice: what the pipeline returned, and joined with those of copies.
ACTIVE_STEPS = 5
KEPT_PER_STEP = 8
KEPT_IMAGES = 2

MODELS = model_sizes.PUBLISHED


# laion/CLIP-ViT-H-14-laion2B-s32B-b79K, the network of PickScore and HPSv2.1: both towers are resident, the vision
# tower is differentiated. Float32, as rewards are kept.
REWARD_VISION = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "hidden_act": "gelu",
    "projection_dim": 1024,
}
REWARD_TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 1024,
}

# Qwen2-VL 7B, the network of hpsv3, and Qwen2.5-VL 7B, that of vqa.
QWEN_TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
}
QWEN2_VISION = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
QWEN2_5_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "out_hidden_size": 3584,
    "num_heads": 16,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
# Tokens of the question and the chat's marks: hpsv3's are about 540, a short prompt's and vqa's question fewer.
QUESTION_TOKENS = {"hpsv3": 544, "vqa": 128}
REWARDS = ("clip-vit-h", *QUESTION_TOKENS)
TITLES = {"clip-vit-h": "CLIP ViT-H/14 (both towers, float32)"}
TITLES |= {name: f"{name} (bf16, one image at a time)" for name in QUESTION_TOKENS}


# Counting.


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that are made inside this block and still referenced, autograd's included.

    A storage counts once, however many tensors view it. Storages of arguments that were made outside (parameters,
    inputs) do not count.

    Attributes:
        live: bytes now.
        peak: largest number of bytes since the start or the last `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def restart(self) -> None:
        """Let the peak start again from what is live now."""
        self.peak = self.live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf):
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in given and key not in self._known:
                    self._known.add(key)
                    self.live += size
                    weakref.finalize(storage, self._release, key, size)
        self.peak = max(self.peak, self.live)
        return result

    def _release(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.live -= size


class _FusedRMSNorm(torch.autograd.Function):
    # What CUDA's kernel makes and saves: input and a float32 number for each row.
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight, torch.empty_like(x[..., :1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None


def _fused_rms_norm(
    input: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    return _FusedRMSNorm.apply(input, weight)


def _fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Make attention and RMS norm on meta tensors count as CUDA's fused kernels.

    On meta, torch would write both out in elementary operations: attention would save its matrix of probabilities.
    The flash and memory-efficient kernels save query, key, value, output and a float32 number (logsumexp) for each row
    and head. So does the CPU's flash kernel, the one of the three whose shapes need no GPU; it stands for them here.
    """
    functional = torch.nn.functional
    attention, rms_norm = functional.scaled_dot_product_attention, functional.rms_norm
    functional.scaled_dot_product_attention, functional.rms_norm = _fused_attention, _fused_rms_norm
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, functional.rms_norm = attention, rms_norm


# Weights.

QUANTIZATIONS = ("nf4", "int8")


def weight_bytes(module: torch.nn.Module, quantization: str | None = None) -> int:
    """Bytes of a module's parameters and buffers.

    Args:
        module: on any device, in the dtype that it is kept in.
        quantization: `nf4` or `int8` counts the weights of all linear layers as bitsandbytes stores them, `None` as
            they are. nf4: half a byte a value and a float32 scale for each 64 (`bnb_4bit_use_double_quant=False`);
            int8: one byte a value and a float32 scale for each row.
    """
    total = sum(tensor.numel() * tensor.element_size() for tensor in [*module.parameters(), *module.buffers()])
    if quantization is None:
        return total
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            weight = layer.weight
            if quantization == "nf4":
                stored = -(-weight.numel() // 2) + 4 * -(-weight.numel() // 64)
            elif quantization == "int8":
                stored = weight.numel() + 4 * layer.out_features
            else:
                raise ValueError(
                    f"quantization must be None or one of {', '.join(QUANTIZATIONS)}, got {quantization}."
                )
            total += stored - weight.numel() * weight.element_size()
    return total


class _Int8Product(torch.autograd.Function):
    # bitsandbytes' int8 layers keep their input for the backward pass, though a frozen layer would not need it.
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None, None


class _Int8Linear(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _Int8Product.apply(input, self.weight, self.bias)


# Modules on meta.


def build(cls: type, config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """A frozen diffusers module on meta."""
    return build_module(cls, config, "meta", dtype)


def build_transformers(
    cls: type, config_cls: type, config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16
) -> torch.nn.Module:
    """A frozen transformers module on meta."""
    with torch.device("meta"):
        return cls(config_cls(**config)).to(dtype).requires_grad_(False).eval()


def add_lora(transformer: torch.nn.Module, layers: Sequence[str], rank: int) -> list[torch.nn.Parameter]:
    """Add a float32 LoRA as the training scripts do and give its parameters their gradients."""
    parameters = model_sizes.add_lora(transformer, layers, rank)
    for parameter in parameters:
        # Gradients are there from one micro-batch of an update to the next, so they are resident.
        parameter.grad = torch.empty_like(parameter)
    return parameters


@lru_cache(maxsize=1)
def _transformer(name: str, rank: int) -> torch.nn.Module:
    model = MODELS[name]
    transformer = build(*model.transformer)
    add_lora(transformer, model.lora_layers, rank)
    return transformer


@lru_cache(maxsize=1)
def _reward() -> torch.nn.Module:
    return build_transformers(CLIPVisionModelWithProjection, CLIPVisionConfig, REWARD_VISION, torch.float32)


@lru_cache(maxsize=1)
def _language_model(name: str) -> torch.nn.Module:
    if name == "vqa":
        config = {"text_config": QWEN_TEXT, "vision_config": QWEN2_5_VISION}
        return build_transformers(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, config)
    config = {"text_config": QWEN_TEXT, "vision_config": QWEN2_VISION}
    model = build_transformers(Qwen2VLForConditionalGeneration, Qwen2VLConfig, config)
    # In place of the language head.
    model.lm_head = hpsv3_head(QWEN_TEXT["hidden_size"]).to("meta")
    return model


def reward_weights(name: str) -> int:
    """Bytes of a reward's weights."""
    if name != "clip-vit-h":
        return weight_bytes(_language_model(name))
    text = build_transformers(CLIPTextModelWithProjection, CLIPTextConfig, REWARD_TEXT, torch.float32)
    return weight_bytes(_reward()) + weight_bytes(text)


def reward_score(name: str, images: torch.Tensor) -> torch.Tensor:
    """`(B, 3, H, W)` float32 images scored as the reward does, `(B,)`."""
    if name == "clip-vit-h":
        return clip_score(_reward(), images)
    return language_score(
        _language_model(name), images, QUESTION_TOKENS[name], HPSV3_PIXELS if name == "hpsv3" else None
    )


def language_score(model: torch.nn.Module, images: torch.Tensor, tokens: int, pixels: int | None) -> torch.Tensor:
    """`(B, 3, H, W)` images scored one at a time by a vision-language model, each with a question.

    Args:
        tokens: of the question.
        pixels: that images are resized to; None for the model's own bounds.
    """
    # 12,845,056: in the public files of both models.
    conversation = Conversation(None, Qwen2VLImageProcessorPil(max_pixels=12845056), 0, pixels)
    parts = model.model

    def score(image: torch.Tensor, index: int) -> torch.Tensor:
        patches, grid = conversation.patches(image)
        places = get_vision_position_ids(grid, parts.visual.spatial_merge_size).to(image.device)
        seen = parts.visual(patches.to(parts.visual.dtype), grid_thw=grid, position_ids=places).pooler_output
        inputs = torch.cat([seen, seen.new_empty(tokens, seen.shape[-1])])[None]
        # The kinds of places that the model counts make no difference here.
        places = torch.zeros(3, 1, inputs.shape[1], dtype=torch.long, device=inputs.device)
        hidden = parts.language_model(inputs_embeds=inputs, position_ids=places, use_cache=False).last_hidden_state
        return hidden[0, -1].float().sum()

    return score_one_by_one(score, images)


# Stages: what each needs on top of what is resident.


@dataclass(frozen=True)
class Pass:
    """Bytes of one forward and backward pass: kept between the two, and the peak of both."""

    saved: int
    peak: int


def transformer_pass(transformer: torch.nn.Module, inputs: Mapping[str, torch.Tensor | None]) -> Pass:
    """One step of the sweep: a forward pass with gradients, also to the latents, and its backward pass."""
    latents = inputs["hidden_states"].detach().requires_grad_()
    with gpu_kernels(), LiveBytes() as count:
        output = transformer(**{**inputs, "hidden_states": latents}, return_dict=False)[0]
        saved = count.live
        output.backward(torch.empty_like(output))
        del output
        latents.grad = None
    return Pass(saved, count.peak)


def no_grad_peak(call: Callable[[], Any]) -> int:
    """Peak of a call without gradients, its result included."""
    with torch.no_grad(), gpu_kernels(), LiveBytes() as count:
        result = call()
        del result
    return count.peak


def decode_pass(
    vae: torch.nn.Module,
    reward: Callable[[torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    samples_per_decode: int | None,
) -> dict[str, int]:
    """Decoding, reward and the way back to the latents, in the order of `FlowBPCallback`.

    Args:
        vae: an autoencoder.
        reward: `f(images (b, 3, H, W)) -> (b,)`.
        latents: `(B, C, h, w)`.
        samples_per_decode: decode (recomputed for the gradient) and score this many at a time; `None` for all.

    Returns:
        Bytes: `decode` kept after decoding, `reward` kept after the first reward, `peak` of all.
    """
    latents = latents.detach().requires_grad_()
    size = samples_per_decode or len(latents)

    def decode(part: torch.Tensor) -> torch.Tensor:
        return vae.decode(part, return_dict=False)[0]

    with gpu_kernels(), LiveBytes() as count:
        if size >= len(latents):
            images = decode(latents)
        else:
            images = torch.cat([checkpoint(decode, part, use_reentrant=False) for part in latents.split(size)])
        images = (images * 0.5 + 0.5).clamp(0, 1)
        decoded = count.live
        scored, gradients = 0, []
        for part in images.split(size):
            part = part.detach().requires_grad_()
            rewards = reward(part.float())
            scored = scored or count.live - decoded
            gradients.append(torch.autograd.grad(rewards.sum(), part)[0])
        del part, rewards
        images.backward(torch.cat(gradients))
        del images, gradients
        latents.grad = None
    return {"decode": decoded, "reward": scored, "peak": count.peak}


def clip_score(vision: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """`(B, 3, H, W)` float32 images resized to 224 and scored, `(B,)`."""
    resized = torch.nn.functional.interpolate(images, size=224, mode="bicubic", antialias=True)
    features = vision(pixel_values=resized).image_embeds
    return (features / features.norm(dim=-1, keepdim=True)).sum(-1)


def encode_peak(encoder: torch.nn.Module, prompts: int, tokens: int) -> int:
    """Peak of encoding prompts."""
    ids = meta(prompts, tokens, dtype=torch.long)
    if isinstance(encoder, Qwen3ForCausalLM):
        mask = meta(prompts, 1, tokens, tokens)
        return no_grad_peak(
            lambda: encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        )
    return no_grad_peak(lambda: encoder(input_ids=ids, output_hidden_states=True))


def optimizer_bytes(parameters: Sequence[torch.nn.Parameter]) -> tuple[int, int]:
    """AdamW's state, and what its step needs on top (torch's `foreach`, the default on CUDA)."""
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    optimizer.step()
    state = sum(value.numel() * value.element_size() for each in optimizer.state.values() for value in each.values())
    with LiveBytes() as count:
        optimizer.step()
    return state, count.peak


# One row of the table.


@dataclass(frozen=True)
class Switches:
    """Options of the training scripts that change memory. `--mixed_precision bf16` is always on."""

    resolution: int
    train_batch_size: int
    rank: int = 16
    gradient_checkpointing: bool = False
    samples_per_decode: int | None = None
    text_encoders: str = "resident"
    quantization: str | None = None
    reward: str = "clip-vit-h"

    def __str__(self) -> str:
        words = []
        if self.gradient_checkpointing:
            words.append("--gradient_checkpointing")
        if self.samples_per_decode is not None:
            words.append(f"--samples_per_decode {self.samples_per_decode}")
        words += {
            "resident": [],
            "offload": ["--offload"],
            "group_offload": ["--group_offload"],
            "precompute": ["--precompute_prompt_embeds"],
        }[self.text_encoders]
        if self.quantization is not None:
            words.append(f"--quantization_config_path {self.quantization}.json")
        return " ".join(words) or "(none)"


@cache
def _text(name: str, prompts: int) -> dict[str, int]:
    """Text encoders: weights, the largest leaf module's weights, and the peak of encoding."""
    weights = leaf = peak = 0
    for cls, config_cls, config, tokens in MODELS[name].text_encoders:
        encoder = build_transformers(cls, config_cls, config)
        weights += weight_bytes(encoder)
        leaf = max(leaf, *(weight_bytes(module) for module in encoder.modules() if not list(module.children())))
        peak = max(peak, encode_peak(encoder, prompts, tokens))
    return {"weights": weights, "leaf": leaf, "peak": peak}


@cache
def _static(name: str, rank: int, quantization: str | None, reward: str) -> dict[str, int]:
    """What is resident from the first update on."""
    transformer = build(*MODELS[name].transformer)
    largest = max(layer.weight.numel() for layer in transformer.modules() if isinstance(layer, torch.nn.Linear))
    weights = weight_bytes(transformer, quantization)
    parameters = add_lora(transformer, MODELS[name].lora_layers, rank)
    lora = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    state, step = optimizer_bytes(parameters)
    return {
        "transformer": weights,
        "lora_gradients_adamw": 2 * lora + state,
        "vae": weight_bytes(build(*MODELS[name].vae)),
        "reward": reward_weights(reward),
        "optimizer_step": step,
        # bitsandbytes unpacks one weight at a time to bf16.
        "unpacked": 2 * largest if quantization else 0,
        "lora_parameters": sum(parameter.numel() for parameter in parameters),
    }


@cache
def _sweep(name: str, switches: tuple[int, int, int, bool, bool]) -> Pass:
    pixels, batch, rank, checkpointing, int8 = switches
    transformer = _transformer(name, rank)
    transformer.gradient_checkpointing = False
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    with _as_int8(transformer if int8 else None):
        return transformer_pass(transformer, MODELS[name].inputs(batch, pixels))


@contextmanager
def _as_int8(transformer: torch.nn.Module | None) -> Iterator[None]:
    layers = [] if transformer is None else [m for m in transformer.modules() if type(m) is torch.nn.Linear]
    layers = [layer for layer in layers if not layer.weight.requires_grad]
    for layer in layers:
        layer.__class__ = _Int8Linear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = torch.nn.Linear


@cache
def _rollout(name: str, pixels: int, batch: int, rank: int) -> int:
    model = MODELS[name]
    transformer = _transformer(name, rank)
    inputs = model.inputs(batch * model.branches_per_call, pixels)
    return no_grad_peak(lambda: transformer(**inputs, return_dict=False)[0])


@cache
def _decode(
    name: str, pixels: int, batch: int, checkpointing: bool, samples_per_decode: int | None, reward: str
) -> dict[str, int]:
    cls, config = MODELS[name].vae
    vae = build(cls, config)
    if checkpointing:
        vae.enable_gradient_checkpointing()
    latents = meta(batch, vae.config.latent_channels, pixels // 8, pixels // 8)
    return decode_pass(vae, lambda images: reward_score(reward, images), latents, samples_per_decode)


def compute(name: str, switches: Switches) -> dict[str, Any]:
    """Peak bytes of each stage for one model and one choice of switches."""
    model, batch, pixels = MODELS[name], switches.train_batch_size, switches.resolution
    static = _static(name, switches.rank, switches.quantization, switches.reward)
    # Before training, prompts are encoded many at a time.
    text = _text(name, PROMPTS_PER_BATCH if switches.text_encoders == "precompute" else batch)
    resident = {part: static[part] for part in ("transformer", "lora_gradients_adamw", "vae", "reward")}
    resident["text_encoders"] = text["weights"] if switches.text_encoders == "resident" else 0
    inputs = model.inputs(batch * 2, pixels)
    conditions = sum(tensor.nbytes for key, tensor in inputs.items() if tensor is not None and key != "hidden_states")
    latents = inputs["hidden_states"].nbytes // 2
    resident["trajectory"] = conditions + ACTIVE_STEPS * KEPT_PER_STEP * latents
    base = sum(resident.values())

    sweep = _sweep(
        name,
        (pixels, batch, switches.rank, switches.gradient_checkpointing, switches.quantization == "int8"),
    )
    decode = _decode(
        name, pixels, batch, switches.gradient_checkpointing, switches.samples_per_decode, switches.reward
    )
    stages = {}
    if switches.text_encoders == "precompute":
        # Alone on the GPU, before the rest is loaded; what goes into one file waits there.
        waiting = conditions * PROMPTS_PER_FILE // (2 * batch)
        stages["encode"] = text["weights"] + text["peak"] + waiting
    else:
        moved = {"resident": 0, "offload": text["weights"], "group_offload": 2 * text["leaf"]}
        stages["encode"] = base + moved[switches.text_encoders] + text["peak"]
    stages["rollout"] = base + _rollout(name, pixels, batch, switches.rank) + static["unpacked"]
    stages["decode+reward"] = base + decode["peak"]
    images = KEPT_IMAGES * meta(batch, 3, pixels, pixels).nbytes
    stages["sweep"] = base + images + sweep.peak + static["unpacked"]
    stages["optimizer"] = base + static["optimizer_step"]
    peak = max(stages.values())
    return {
        "model": name,
        "switches": asdict(switches),
        "options": str(switches),
        "resident": resident,
        "saved": {"sweep": sweep.saved, "decode": decode["decode"], "reward": decode["reward"]},
        "lora_parameters": static["lora_parameters"],
        "stages": stages,
        "peak": peak,
        "fits": {gpu: peak / GIB + MARGIN <= memory for gpu, memory in GPUS.items()},
    }


def choices(resolution: int, batch: int, rank: int, quantization: str, reward: str = "clip-vit-h") -> list[Switches]:
    """The rows of a table, from no switch to all."""
    small = {"gradient_checkpointing": True, "samples_per_decode": 1, "reward": reward}
    return [
        Switches(resolution, batch, rank, reward=reward),
        Switches(resolution, batch, rank, **small),
        Switches(resolution, batch, rank, **small, text_encoders="group_offload"),
        Switches(resolution, batch, rank, **small, text_encoders="offload"),
        Switches(resolution, batch, rank, **small, text_encoders="precompute"),
        Switches(resolution, batch, rank, **small, text_encoders="precompute", quantization=quantization),
    ]


# The report.


def summary(report: Mapping[str, Any]) -> list[str]:
    """Lines of a table: for each model, size and GPU the fewest switches that fit, with the largest stage in GiB."""
    lines = [f"| model | pixels | batch | {' | '.join(GPUS)} |", "|" + "---|" * (3 + len(GPUS))]
    groups: dict[tuple[str, int, int], list[Mapping[str, Any]]] = {}
    for row in report["rows"]:
        switches = row["switches"]
        if switches["text_encoders"] in ("resident", "precompute"):
            key = (MODELS[row["model"]].title, switches["resolution"], switches["train_batch_size"])
            groups.setdefault(key, []).append(row)
    for key, rows in groups.items():
        cells = []
        for gpu in GPUS:
            row = next((row for row in rows if row["fits"][gpu]), None)
            cells.append("does not fit" if row is None else f"{_letters(row['switches'])}: {row['peak'] / GIB:.1f}")
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(cells)} |")
    return lines


def _letters(switches: Mapping[str, Any]) -> str:
    letters = [
        "C" if switches["gradient_checkpointing"] else "",
        "P" if switches["text_encoders"] == "precompute" else "",
        "Q" if switches["quantization"] else "",
    ]
    return " ".join(filter(None, letters)) or "none"


def markdown(report: Mapping[str, Any]) -> str:
    """The report as tables: the summary, and one for each model."""
    quantization = next(q for row in report["rows"] if (q := row["switches"]["quantization"]) is not None)
    lines = [
        "# Peak GPU memory of the training scripts, computed",
        "",
        f"By `{report['command']}`; nothing here was measured on a GPU. bf16 base; float32 LoRA of rank "
        f"{report['rank']} on the layers of diffusers' LoRA scripts, with gradients and AdamW state; reward "
        f"{TITLES[report['reward']]}. GiB by stage; *fits*: the largest stage and {MARGIN} GiB (CUDA context, "
        "workspaces, fragmentation) are at most what CUDA reports "
        f"({', '.join(f'{gpu}: {memory}' for gpu, memory in GPUS.items())} GiB).",
        "",
        "With `--precompute_prompt_embeds`, *encode* happens before the rest is loaded.",
        "",
        "## Fewest switches that fit",
        "",
        "The number is the largest stage, GiB. C: `--gradient_checkpointing --samples_per_decode 1`; P: "
        "`--precompute_prompt_embeds`; Q: `--quantization_config_path`, " + quantization + ".",
        "",
        *summary(report),
    ]
    for name in dict.fromkeys(row["model"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["model"] == name]
        stages = list(rows[0]["stages"])
        lines += [
            "",
            f"## {MODELS[name].title}",
            "",
            f"| pixels | batch | switches | {' | '.join(stages)} | {' | '.join(GPUS)} |",
            "|" + "---|" * (3 + len(stages) + len(GPUS)),
        ]
        for row in rows:
            cells = [f"{row['stages'][stage] / GIB:.1f}" for stage in stages]
            fits = ["yes" if row["fits"][gpu] else "no" for gpu in GPUS]
            switches = row["switches"]
            options = row["options"] if row["options"] == "(none)" else f"`{row['options']}`"
            lines.append(
                f"| {switches['resolution']} | {switches['train_batch_size']} | {options} | "
                f"{' | '.join(cells)} | {' | '.join(fits)} |"
            )
        parts = rows[0]["resident"]
        lines += [
            "",
            "Resident in bf16: "
            + ", ".join(f"{part.replace('_', ' ')} {size / GIB:.2f}" for part, size in parts.items())
            + f" GiB; the LoRA has {rows[0]['lora_parameters'] / 1e6:.1f}M parameters.",
        ]
    return "\n".join(lines) + "\n"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", nargs="+", choices=list(MODELS), default=list(MODELS), help="Default: all.")
    add("--resolution", type=int, nargs="+", help="Default: 512 and 1024.")
    add("--train_batch_size", type=int, nargs="+", help="Default: 4 and 1 at 512, 1 at 1024.")
    add("--rank", type=int, default=16, help="Rank of the LoRA (default: 16).")
    add("--quantization", choices=QUANTIZATIONS, default="nf4", help="Of the quantised rows (default: nf4).")
    add("--reward", choices=REWARDS, default="clip-vit-h", help="Its network (default: clip-vit-h, float32).")
    add("--output", type=Path, help="JSON file to write; the tables go beside it as .md (default: print only).")
    args = parser.parse_args(argv)
    if (args.resolution is None) != (args.train_batch_size is None):
        parser.error("--resolution and --train_batch_size go together; give both or none.")
    for pixels in args.resolution or []:
        if pixels < 16 or pixels % 16:
            parser.error(f"--resolution must be a multiple of 16, got {pixels}; use {max(16, pixels // 16 * 16)}.")
    for name, values in (("train_batch_size", args.train_batch_size or []), ("rank", [args.rank])):
        if min(values, default=1) < 1:
            parser.error(f"--{name} must be at least 1, got {min(values)}.")
    if args.output is not None and args.output.suffix != ".json":
        parser.error(f"--output must end in .json, got {args.output}.")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Compute, print and write the tables."""
    args = parse_args(argv)
    sizes = [(512, 4), (512, 1), (1024, 1)]
    if args.resolution is not None:
        sizes = [(pixels, batch) for pixels in args.resolution for batch in args.train_batch_size]
    report = {
        "command": "python benchmarks/memory.py --output benchmarks/results/memory_computed.json",
        "computed": True,
        "rank": args.rank,
        "reward": args.reward,
        "margin_gib": MARGIN,
        "gpus_gib": GPUS,
        "active_steps": ACTIVE_STEPS,
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers, peft)},
        "rows": [
            compute(name, switches)
            for name in args.model
            for pixels, batch in sizes
            for switches in choices(pixels, batch, args.rank, args.quantization, args.reward)
        ],
    }
    text = markdown(report)
    print(text, end="")
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        args.output.with_suffix(".md").write_text(text, encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
