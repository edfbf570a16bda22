# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The models of the benchmarks, and pipelines of these sizes with random weights.

Sources of the published sizes: the `config.json` files of the repositories named, as far as they are public; of gated
ones the diffusers conversion scripts (scripts/convert_{sd3,flux,flux2}_to_diffusers.py) and, for FLUX.2, the parameter
classes in black-forest-labs/flux2. Values left out are the class defaults of diffusers and transformers.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from flowbp.training.speed import compute_lora_in_base_dtype

# Standard deviation of a LoRA's B matrices: about where some tens of AdamW steps of 1e-4 bring them. With the usual
# zeros, half of the LoRA would get no gradient, and a LoRA that is lost would change nothing.
LORA_B_STD = 0.002


@dataclass(frozen=True)
class Model:
    """What is needed to build a pipeline's modules and to call them as it does.

    Attributes:
        title: for tables.
        transformer: class and config.
        vae: class and config.
        text_encoders: classes, configs and prompt lengths in tokens.
        lora_layers: what diffusers' LoRA script of this model trains.
        inputs: `f(samples, pixels)` gives the transformer's arguments on meta.
        branches_per_call: 2 where a transformer call of the rollout holds both branches of guidance.
        pipeline: its class.
        scheduler: arguments of `FlowMatchEulerDiscreteScheduler`.
        latents: `f(channels, side)`, the shape of one sample's noise as the pipeline takes it, for a transformer of so
            many channels and a VAE's latents of side x side.
        text_tokens: length of the prompt embeddings.
        has_negative_prompt: whether guidance needs one.
        guidance_scale: default of a call.
        resolution: default width and height in pixels.
        num_inference_steps: default N.
    """

    title: str
    transformer: tuple[type, Mapping[str, Any]]
    vae: tuple[type, Mapping[str, Any]]
    text_encoders: tuple[tuple[type, type, Mapping[str, Any], int], ...]
    lora_layers: tuple[str, ...]
    inputs: Callable[[int, int], dict[str, torch.Tensor | None]]
    branches_per_call: int = 1
    pipeline: type[DiffusionPipeline] = StableDiffusion3Pipeline
    scheduler: Mapping[str, Any] = field(default_factory=lambda: {"shift": 3.0})
    latents: Callable[[int, int], tuple[int, ...]] = lambda channels, side: (channels, side, side)
    text_tokens: int = 333
    has_negative_prompt: bool = True
    guidance_scale: float = 3.5
    resolution: int = 512
    num_inference_steps: int = 25


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor of this shape without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


# The transformers' arguments.


def sd3_inputs(samples: int, pixels: int) -> dict[str, torch.Tensor | None]:
    """SD3.5's, with prompts of 77 tokens of CLIP and 256 of T5."""
    return {
        "hidden_states": meta(samples, 16, pixels // 8, pixels // 8),
        "timestep": meta(samples, dtype=torch.float32),
        "encoder_hidden_states": meta(samples, 333, 4096),
        "pooled_projections": meta(samples, 2048),
    }


def flux_inputs(samples: int, pixels: int) -> dict[str, torch.Tensor | None]:
    """FLUX.1's."""
    tokens = (pixels // 16) ** 2
    return {
        "hidden_states": meta(samples, tokens, 64),
        "timestep": meta(samples),
        "guidance": meta(samples, dtype=torch.float32),
        "encoder_hidden_states": meta(samples, 512, 4096),
        "pooled_projections": meta(samples, 768),
        "img_ids": meta(tokens, 3),
        "txt_ids": meta(512, 3),
    }


def flux2_inputs(width: int) -> Callable[[int, int], dict[str, torch.Tensor | None]]:
    """FLUX.2's, for prompt embeddings of this width."""

    def inputs(samples: int, pixels: int) -> dict[str, torch.Tensor | None]:
        tokens = (pixels // 16) ** 2
        return {
            "hidden_states": meta(samples, tokens, 128),
            "timestep": meta(samples),
            "guidance": None,
            "encoder_hidden_states": meta(samples, 512, width),
            "img_ids": meta(samples, tokens, 4),
            "txt_ids": meta(samples, 512, 4),
        }

    return inputs


# Autoencoders.


def _blocks(levels: int) -> dict[str, tuple[str, ...]]:
    return {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }


_VAE = {**_blocks(4), "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
_16_CHANNELS = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
_SD3_SCALE = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
_FLUX_SCALE = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
# stabilityai/stable-diffusion-3.5-medium and black-forest-labs/FLUX.1-dev, vae.
VAE_16 = {**_VAE, **_16_CHANNELS}
_TINY_VAE = {**_VAE, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}

# Text encoders.

# openai/clip-vit-large-patch14, text.
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
# laion/CLIP-ViT-bigG-14-laion2B-39B-b160k, text.
_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
# google/t5-v1_1-xxl.
_T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
# Qwen/Qwen3-4B and Qwen/Qwen3-8B.
_QWEN3 = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
_QWEN3_4B = {**_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}
_QWEN3_8B = {**_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}

# Transformers.

ATTENTION = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
_SD3_LAYERS = tuple(f"attn.{layer}" for layer in ATTENTION)
_FLUX_LAYERS = (*_SD3_LAYERS, *FEED_FORWARD)
_FLUX_DEV = {
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
KLEIN = {
    "in_channels": 128,
    "attention_head_dim": 128,
    "mlp_ratio": 3.0,
    "axes_dims_rope": (32, 32, 32, 32),
    "rope_theta": 2000,
    "guidance_embeds": False,
}


def _klein_layers(single_blocks: int) -> tuple[str, ...]:
    outputs = (f"single_transformer_blocks.{block}.attn.to_out" for block in range(single_blocks))
    return ("to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj", *outputs)


# What the pipelines of a family have in common.
_FLUX_PIPELINE = {
    "pipeline": FluxPipeline,
    "scheduler": {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0},
    "latents": lambda channels, side: ((side // 2) ** 2, channels),
    "has_negative_prompt": False,
}
_KLEIN_PIPELINE = {
    "pipeline": Flux2KleinPipeline,
    "scheduler": {"use_dynamic_shifting": True},
    "latents": lambda channels, side: (channels, side // 2, side // 2),
    "guidance_scale": 4.0,
}
# For the tests, and to see a table in seconds.
_TINY = {"text_tokens": 4, "num_inference_steps": 10}

_TINY_SD3 = Model(
    "tiny",
    (
        SD3Transformer2DModel,
        {
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "sample_size": 8,
            "pos_embed_max_size": 16,
        },
    ),
    (
        AutoencoderKL,
        {
            **_blocks(2),
            **_16_CHANNELS,
            **_SD3_SCALE,
            "block_out_channels": (4, 4),
            "layers_per_block": 1,
            "norm_num_groups": 2,
        },
    ),
    (),
    _SD3_LAYERS,
    sd3_inputs,
    branches_per_call=2,
    resolution=16,
    **_TINY,
)
_TINY_FLUX = Model(
    "tiny FLUX.1",
    (
        FluxTransformer2DModel,
        {
            **_FLUX_DEV,
            "num_layers": 1,
            "num_single_layers": 2,
            "num_attention_heads": 1,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
        },
    ),
    (AutoencoderKL, {**_TINY_VAE, **_16_CHANNELS, **_FLUX_SCALE}),
    (),
    _FLUX_LAYERS,
    flux_inputs,
    resolution=32,
    **_FLUX_PIPELINE,
    **_TINY,
)
_TINY_KLEIN = Model(
    "tiny FLUX.2-Klein",
    (
        Flux2Transformer2DModel,
        {**KLEIN, "num_layers": 1, "num_single_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 32},
    ),
    (AutoencoderKLFlux2, _TINY_VAE),
    (),
    _klein_layers(2),
    flux2_inputs(32),
    resolution=32,
    **_KLEIN_PIPELINE,
    **_TINY,
)
# About 100M parameters. The VAE is narrow, so that the transformer's graph is the larger one.
_100M = Model(
    "100M",
    (
        SD3Transformer2DModel,
        {
            "num_layers": 11,
            "attention_head_dim": 64,
            "num_attention_heads": 8,
            "caption_projection_dim": 512,
            "joint_attention_dim": 768,
            "pooled_projection_dim": 768,
            "sample_size": 32,
            "pos_embed_max_size": 32,
            "qk_norm": "rms_norm",
        },
    ),
    (
        AutoencoderKL,
        {
            **_blocks(4),
            **_16_CHANNELS,
            **_SD3_SCALE,
            "block_out_channels": (16, 32, 32, 32),
            "layers_per_block": 2,
            "norm_num_groups": 8,
        },
    ),
    (),
    _SD3_LAYERS,
    sd3_inputs,
    branches_per_call=2,
    text_tokens=77,
    resolution=128,
    num_inference_steps=10,
)
_SD35_MEDIUM = Model(
    "SD3.5-M",
    (
        SD3Transformer2DModel,
        {
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "sample_size": 128,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
    ),
    (AutoencoderKL, {**VAE_16, **_SD3_SCALE}),
    (
        (CLIPTextModelWithProjection, CLIPTextConfig, _CLIP_L, 77),
        (CLIPTextModelWithProjection, CLIPTextConfig, _CLIP_G, 77),
        (T5EncoderModel, T5Config, _T5_XXL, 256),
    ),
    _SD3_LAYERS,
    sd3_inputs,
    branches_per_call=2,
)
_FLUX1_DEV = Model(
    "FLUX.1-dev",
    (FluxTransformer2DModel, _FLUX_DEV),
    (AutoencoderKL, {**VAE_16, **_FLUX_SCALE}),
    (
        (CLIPTextModelWithProjection, CLIPTextConfig, _CLIP_L, 77),
        (T5EncoderModel, T5Config, _T5_XXL, 512),
    ),
    _FLUX_LAYERS,
    flux_inputs,
    text_tokens=512,
    **_FLUX_PIPELINE,
)


def _klein(billions: int, layers: int, single_layers: int, heads: int, encoder: Mapping[str, Any]) -> Model:
    width = 3 * encoder["hidden_size"]
    sizes = {
        "num_layers": layers,
        "num_single_layers": single_layers,
        "num_attention_heads": heads,
        "joint_attention_dim": width,
    }
    return Model(
        f"FLUX.2-Klein {billions}B base",
        (Flux2Transformer2DModel, {**KLEIN, **sizes}),
        (AutoencoderKLFlux2, _VAE),
        ((Qwen3ForCausalLM, Qwen3Config, encoder, 512),),
        _klein_layers(single_layers),
        flux2_inputs(width),
        text_tokens=512,
        **_KLEIN_PIPELINE,
    )


PUBLISHED: Mapping[str, Model] = {
    "sd3.5-medium": _SD35_MEDIUM,
    "flux.1-dev": _FLUX1_DEV,
    "flux.2-klein-4b": _klein(4, 5, 20, 24, _QWEN3_4B),
    "flux.2-klein-9b": _klein(9, 8, 24, 32, _QWEN3_8B),
}
MODELS: Mapping[str, Model] = {
    "tiny": _TINY_SD3,
    "tiny-flux": _TINY_FLUX,
    "tiny-klein": _TINY_KLEIN,
    "100m": _100M,
    **PUBLISHED,
}


# Building with random weights.


def build_module(
    cls: type, config: Mapping[str, Any], device: str | torch.device, dtype: torch.dtype
) -> torch.nn.Module:
    """A frozen diffusers module, made on the device in this dtype."""
    with _default_dtype(dtype), torch.device(device):
        module = cls(**config)
    # Buffers too. Not diffusers' own `to`, which warns that from_pretrained should be used.
    return torch.nn.Module.to(module, dtype).requires_grad_(False).eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def add_lora(transformer: torch.nn.Module, layers: Sequence[str], rank: int) -> list[torch.nn.Parameter]:
    """Add a float32 LoRA that was trained a little and computes in the base's dtype; its parameters."""
    with torch.device(next(transformer.parameters()).device):
        transformer.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(layers))
        )
    cast_training_params(transformer, dtype=torch.float32)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=LORA_B_STD)
    compute_lora_in_base_dtype(transformer)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def build_pipeline(model: Model, device: str | torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    """The stock pipeline without text encoders."""
    signature = inspect.signature(model.pipeline.__init__).parameters.values()
    components = {part.name: None for part in signature if part.name != "self" and part.default is part.empty}
    components |= {
        "transformer": build_module(*model.transformer, device, dtype),
        "vae": build_module(*model.vae, device, dtype),
        "scheduler": FlowMatchEulerDiscreteScheduler(**model.scheduler),
    }
    pipe = model.pipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_arguments(
    model: Model, pipe: DiffusionPipeline, batch: int, resolution: int, num_inference_steps: int
) -> dict[str, Any]:
    """Arguments of the pipeline's call: random prompt embeddings and noise, a size, guidance."""
    config, place = pipe.transformer.config, pipe.transformer

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape).to(place.device, place.dtype)

    embeddings = {"prompt_embeds": (model.text_tokens, config.joint_attention_dim)}
    if "pooled_projection_dim" in config:
        embeddings["pooled_prompt_embeds"] = (config.pooled_projection_dim,)
    signs = ("", "negative_") if model.has_negative_prompt else ("",)
    side = resolution // pipe.vae_scale_factor
    return {
        **{sign + name: normal(*shape) for sign in signs for name, shape in embeddings.items()},
        "latents": normal(*model.latents(config.in_channels, side)),
        "height": resolution,
        "width": resolution,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": model.guidance_scale,
        "output_type": "pt",
    }
