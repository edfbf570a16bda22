# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The backbones of the paper: tiny models of Stable Diffusion 3, FLUX.1 and FLUX.2 pipelines."""

import functools
from dataclasses import replace
from typing import Any

import PIL.Image
import torch
from diffusers import (
    AutoencoderKLFlux2,
    DiffusionPipeline,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tiny_sd3 import tiny_sd3_pipeline, tiny_vae

from .family import Case, Family, Part, embeddings, guidance_cases, tiny_model, tiny_pipeline


def build_sd3() -> DiffusionPipeline:
    return tiny_sd3_pipeline()


def sd3_parts() -> dict[str, Any]:
    """The components of `build_sd3` that all of SD3's pipelines have."""
    return {
        name: part
        for name, part in build_sd3().components.items()
        if name not in ("image_encoder", "feature_extractor")
    }


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


FLUX_SIZES = {
    "patch_size": 1,
    "in_channels": 16,
    "attention_head_dim": 16,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 4, 8),
}


def build_flux(
    pipeline: type[DiffusionPipeline] = FluxPipeline, in_channels: int = 16, **components: Any
) -> DiffusionPipeline:
    """FLUX.1, or another pipeline of its models, whose transformer may take more channels than it gives."""
    config = {**FLUX_SIZES, "in_channels": in_channels, "out_channels": FLUX_SIZES["in_channels"]}
    transformer = tiny_model(FluxTransformer2DModel, **config)
    return tiny_pipeline(pipeline, vae=tiny_vae(4), transformer=transformer, **components)


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
    return [Case("distilled guidance", prompts), Case("true guidance", {**prompts, **negative}, Part(1))]


def tiny_flux2_vae() -> AutoencoderKLFlux2:
    """The autoencoder of FLUX.2 with one latent channel, pictures twice as large as its latents, and batch-norm
    statistics that matter."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.bn.running_mean.copy_(torch.tensor([0.3, -0.2, 0.1, -0.4]))
    vae.bn.running_var.copy_(torch.tensor([1.5, 0.8, 1.2, 0.6]))
    return vae


def tiny_flux2_transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    """The transformer of FLUX.2 with one block of each kind."""
    return tiny_model(
        Flux2Transformer2DModel,
        patch_size=1,
        attention_head_dim=16,
        joint_attention_dim=32,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
        out_channels=None,
    )


def build_flux2_klein(
    pipeline: type[DiffusionPipeline] = Flux2KleinPipeline, is_distilled: bool = False
) -> DiffusionPipeline:
    """FLUX.2-Klein without text encoder: prompts are embeddings `(B, tokens, 32)`.

    Args:
        pipeline: of the model.
        is_distilled: the step-distilled model, which ignores `guidance_scale`, and not the base model.
    """
    return tiny_pipeline(
        pipeline,
        vae=tiny_flux2_vae(),
        transformer=tiny_flux2_transformer(guidance_embeds=False),
        is_distilled=is_distilled,
        gain=1.5,
    )


def build_flux2_dev() -> DiffusionPipeline:
    return tiny_pipeline(
        Flux2Pipeline, vae=tiny_flux2_vae(), transformer=tiny_flux2_transformer(guidance_embeds=True), gain=1.5
    )


FLUX2_PROMPTS = {"prompt_embeds": embeddings(2, 5, 32), "height": 16, "width": 12}


def reference_image(seed: int = 4, size: int = 64) -> PIL.Image.Image:
    """A picture, by default the smallest that the FLUX.2 pipelines take as a reference."""
    pixels = torch.randint(256, (size, size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return PIL.Image.fromarray(pixels.numpy())


def flux2_klein_cases(pipe: DiffusionPipeline) -> list[Case]:
    negative = {"negative_prompt_embeds": embeddings(2, 5, 32, seed=2)}
    cases = guidance_cases(FLUX2_PROMPTS, 4.0, Part(1), negative)
    return [
        *cases,
        replace(
            cases[1], label="reference image, guidance", arguments={**cases[1].arguments, "image": reference_image()}
        ),
    ]


def flux2_distilled_cases(pipe: DiffusionPipeline) -> list[Case]:
    return [
        Case("distilled", {**FLUX2_PROMPTS, "guidance_scale": 4.0}),
        Case("reference image", {**FLUX2_PROMPTS, "image": reference_image(), "guidance_scale": 4.0}),
    ]


def flux2_klein_kv_cases(pipe: DiffusionPipeline) -> list[Case]:
    return [
        Case("distilled", FLUX2_PROMPTS),
        Case("reference image", {**FLUX2_PROMPTS, "image": reference_image()}),
    ]


def flux2_dev_cases(pipe: DiffusionPipeline) -> list[Case]:
    arguments = {**FLUX2_PROMPTS, "guidance_scale": 4.0}
    return [Case("distilled guidance", arguments), Case("reference image", {**arguments, "image": reference_image()})]


FAMILIES = [
    Family("Stable Diffusion 3 / 3.5", "StableDiffusion3Pipeline", "image", build_sd3, sd3_cases),
    Family("FLUX.1", "FluxPipeline", "image", build_flux, flux_cases),
    Family(
        "FLUX.2-Klein base",
        "Flux2KleinPipeline",
        "image",
        build_flux2_klein,
        flux2_klein_cases,
    ),
    Family(
        "FLUX.2-Klein distilled",
        "Flux2KleinPipeline",
        "image",
        functools.partial(build_flux2_klein, is_distilled=True),
        flux2_distilled_cases,
    ),
    Family(
        "FLUX.2-Klein-KV",
        "Flux2KleinKVPipeline",
        "image",
        functools.partial(build_flux2_klein, is_distilled=True, pipeline=Flux2KleinKVPipeline),
        flux2_klein_kv_cases,
    ),
    Family("FLUX.2-dev", "Flux2Pipeline", "image", build_flux2_dev, flux2_dev_cases),
]
