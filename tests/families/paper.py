# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The backbones of the paper: tiny models of Stable Diffusion 3, FLUX.1 and FLUX.2 pipelines."""

from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tiny_sd3 import tiny_sd3_pipeline

from .family import Case, Family, Part, embeddings, ready


def build_sd3() -> DiffusionPipeline:
    return tiny_sd3_pipeline()


def sd3_cases(pipe: DiffusionPipeline) -> list[Case]:
    prompts = {
        "prompt_embeds": embeddings(2, 5, 32),
        "pooled_prompt_embeds": embeddings(2, 32, seed=1),
        "negative_prompt_embeds": embeddings(2, 5, 32, seed=2),
        "negative_pooled_prompt_embeds": embeddings(2, 32, seed=3),
        "height": 8,
        "width": 8,
    }
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    return [
        Case("no guidance", {**prompts, "guidance_scale": 1.0}),
        Case("guidance", {**prompts, "guidance_scale": 3.5}, Part(0, "first half")),
        Case("skip-layer guidance", {**prompts, "guidance_scale": 3.5, **skip}),
    ]


def tiny_vae(channels: int, **config: object) -> AutoencoderKL:
    """An `AutoencoderKL` that makes pictures twice as large as its latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=8,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **config,
    )


def build_flux() -> DiffusionPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return ready(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=tiny_vae(4),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=transformer,
        )
    )


def flux_cases(pipe: DiffusionPipeline) -> list[Case]:
    prompts = {
        "prompt_embeds": embeddings(2, 5, 32),
        "pooled_prompt_embeds": embeddings(2, 32, seed=1),
        "height": 8,
        "width": 8,
        "guidance_scale": 3.5,
    }
    negative = {
        "negative_prompt_embeds": embeddings(2, 5, 32, seed=2),
        "negative_pooled_prompt_embeds": embeddings(2, 32, seed=3),
        "true_cfg_scale": 4.0,
    }
    return [
        Case("distilled guidance", prompts),
        Case("true guidance", {**prompts, **negative}, Part(1)),
    ]


FAMILIES = [
    Family("Stable Diffusion 3 / 3.5", "StableDiffusion3Pipeline", "image", build_sd3, sd3_cases),
    Family("FLUX.1", "FluxPipeline", "image", build_flux, flux_cases),
]
