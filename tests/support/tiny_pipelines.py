# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny pipelines that are complete: with real text encoders and tokenizers, to be saved, loaded and trained.

Transformers and autoencoders are those of the matrix (`families`); every tokenizer knows characters only.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    OvisImagePipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
    ZImagePipeline,
)
from families.family import ready
from families.packed import build_ovis_image, build_qwen_image, byte_tokenizer, tiny_z_image_parts
from families.paper import build_flux, tiny_flux2_transformer, tiny_flux2_vae
from families.videos import build_wan, build_wan_22
from tiny_sd3 import CHARACTERS, tiny_sd3_pipeline, tiny_text_encoder, tiny_tokenizer
from transformers import (
    CLIPTextModel,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

# Every message between its marks, nothing around them: prompts stay short.
CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def tiny_t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer of single characters."""
    words = ["<pad>", "</s>", "<unk>", "\u2581", *CHARACTERS]
    return T5Tokenizer(vocab=[(word, 0.0 if word.startswith("<") else -2.0) for word in words], extra_ids=0)


def tiny_t5(encoder: type[T5EncoderModel], config: type[T5Config], width: int) -> PreTrainedModel:
    """A T5 or UMT5 encoder of two layers."""
    return encoder(
        config(vocab_size=len(tiny_t5_tokenizer()), d_model=width, d_kv=8, d_ff=width, num_layers=2, num_heads=2)
    )


def tiny_qwen_tokenizer() -> Qwen2Tokenizer:
    """A Qwen tokenizer of bytes, with a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_qwen3(width: int, num_layers: int) -> Qwen3ForCausalLM:
    """A Qwen3 of few numbers."""
    tokens = len(tiny_qwen_tokenizer())
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=tokens,
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def complete(pipe: DiffusionPipeline, **text: Any) -> DiffusionPipeline:
    """The pipeline in float32, with text encoders and tokenizers."""
    # Made anew, because pipelines read lengths from their tokenizers when they are made.
    return ready(type(pipe).from_pipe(pipe, dtype=torch.float32, **text), dtype=torch.float32)


def tiny_sd3_t5_pipeline() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 with all three text encoders."""
    t5 = {"text_encoder_3": tiny_t5(T5EncoderModel, T5Config, 32), "tokenizer_3": tiny_t5_tokenizer()}
    return complete(tiny_sd3_pipeline(torch.float32), **t5)


def tiny_flux_pipeline(*of_build: Any) -> DiffusionPipeline:
    """FLUX.1-dev, or another that `build_flux` builds: pictures of 8 x 8 are 4 x 4 latents in 4 tokens."""
    return complete(
        build_flux(*of_build),
        text_encoder=CLIPTextModel(tiny_text_encoder(32).config),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=tiny_t5(T5EncoderModel, T5Config, 32),
        tokenizer_2=tiny_t5_tokenizer(),
    )


def tiny_klein_pipeline(is_distilled: bool = False) -> Flux2KleinPipeline:
    """FLUX.2-Klein, whose prompts are three of the hidden layers of a Qwen3 (9, 18 and 27)."""
    config = {**tiny_flux2_transformer(guidance_embeds=False).config, "joint_attention_dim": 3 * 16}
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_flux2_vae(),
        text_encoder=tiny_qwen3(16, 28),
        tokenizer=tiny_qwen_tokenizer(),
        transformer=Flux2Transformer2DModel.from_config(config),
        is_distilled=is_distilled,
    )
    return ready(pipe, gain=1.5, dtype=torch.float32)


def tiny_z_image_pipeline() -> ZImagePipeline:
    """Z-Image: its transformer takes and gives lists."""
    return complete(
        ZImagePipeline(**tiny_z_image_parts()), text_encoder=tiny_qwen3(32, 2), tokenizer=tiny_qwen_tokenizer()
    )


def tiny_qwen_image_pipeline() -> QwenImagePipeline:
    """Qwen-Image: prompts are padded to the longest of their batch, with a mask where lengths differ."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tiny_qwen_tokenizer()), "num_hidden_layers": 1, "num_key_value_heads": 2}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    return complete(build_qwen_image(), text_encoder=encoder, tokenizer=tiny_qwen_tokenizer())


def tiny_ovis_image_pipeline() -> OvisImagePipeline:
    """Ovis-Image: diffusers has no LoRA loader for this pipeline."""
    return complete(build_ovis_image(), text_encoder=tiny_qwen3(32, 2).model, tokenizer=tiny_qwen_tokenizer())


def tiny_wan_pipeline(build: Callable[[], DiffusionPipeline] = build_wan) -> WanPipeline:
    """Wan 2.1, or with `build_wan_22` Wan 2.2, which has two transformers: videos."""
    return complete(build(), text_encoder=tiny_t5(UMT5EncoderModel, UMT5Config, 32), tokenizer=tiny_t5_tokenizer())


def tiny_wan_22_pipeline() -> WanPipeline:
    """Wan 2.2, which has two transformers."""
    return tiny_wan_pipeline(build_wan_22)
