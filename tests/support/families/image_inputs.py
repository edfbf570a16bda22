# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Further pipelines that take pictures, masks or controls: SD3, CogView4, Sana, Kandinsky 5, HunyuanImage."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanImageRefiner,
    CogView4ControlPipeline,
    DiffusionPipeline,
    HunyuanImageRefinerPipeline,
    HunyuanImageTransformer2DModel,
    Kandinsky5I2IPipeline,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3PAGImg2ImgPipeline,
)
from tiny_sd3 import tiny_sd3_pipeline, tiny_vae

from .family import (
    Case,
    Family,
    Part,
    embeddings,
    given,
    guidance_cases,
    hole,
    image_family,
    pictures,
    tiny_model,
    tiny_pipeline,
)
from .flux_inputs import CONTROL, INPAINT, SOURCE
from .images import (
    SANA_SIZES,
    build_cogview4,
    build_sd3_pag,
    cogview4_cases,
    pag_cases,
    prompts,
    sana_cases,
    sana_parts,
)
from .paper import sd3_cases, sd3_parts
from .videos import HUNYUAN_15_VAE, kandinsky_5_prompts, tiny_kandinsky_5


def build_sd3(pipeline: type[DiffusionPipeline], **parts: Any) -> DiffusionPipeline:
    return tiny_pipeline(pipeline, **sd3_parts(), **parts)


def build_sd3_controlnet(pipeline: type[DiffusionPipeline], **config: Any) -> DiffusionPipeline:
    sizes = {"sample_size": 4, "joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 32}
    return build_sd3(pipeline, controlnet=tiny_model(SD3ControlNetModel, **sizes, pos_embed_max_size=4, **config))


def build_sd3_inpaint(in_channels: int) -> DiffusionPipeline:
    """The pipeline takes models of 16 channels, or of 33 that are given the picture and the mask."""
    config = {**tiny_sd3_pipeline().transformer.config, "in_channels": in_channels, "out_channels": 16}
    parts = {**sd3_parts(), "transformer": SD3Transformer2DModel.from_config(config), "vae": tiny_vae(16)}
    return tiny_pipeline(StableDiffusion3InpaintPipeline, **parts)


def plain_sd3_cases(pipe: DiffusionPipeline) -> list[Case]:
    """The calls of pipelines without skip-layer guidance."""
    return sd3_cases(pipe)[:2]


def sd3_pag_cases(pipe: DiffusionPipeline) -> list[Case]:
    plain, guided = (dict(case.arguments) for case in given(plain_sd3_cases, **SOURCE)(pipe))
    return pag_cases(plain, guided)


def build_sana_sprint(pipeline: type[DiffusionPipeline]) -> DiffusionPipeline:
    transformer = tiny_model(SanaTransformer2DModel, **SANA_SIZES, guidance_embeds=True)
    return tiny_pipeline(pipeline, **sana_parts() | {"transformer": transformer, "scheduler": SCMScheduler()})


def sprint_cases(pipe: DiffusionPipeline) -> list[Case]:
    arguments = {**prompts(16, masks=True), "height": 32, "width": 32, "use_resolution_binning": False}
    arguments |= {"num_inference_steps": 2}
    return [Case("distilled guidance", arguments, refused="has no sigmas")]


def build_sana_controlnet() -> DiffusionPipeline:
    controlnet = tiny_model(SanaControlNetModel, **SANA_SIZES | {"num_layers": 1})
    return tiny_pipeline(SanaControlNetPipeline, **sana_parts(), controlnet=controlnet)


def build_refiner() -> DiffusionPipeline:
    transformer = tiny_model(
        HunyuanImageTransformer2DModel,
        in_channels=8,
        patch_size=(1, 1, 1),
        guidance_embeds=True,
        text_embed_dim=16,
        rope_axes_dim=(2, 2, 4),
    )
    vae = AutoencoderKLHunyuanImageRefiner(latent_channels=2, **HUNYUAN_15_VAE)
    return tiny_pipeline(HunyuanImageRefinerPipeline, transformer=transformer, shift=4.0, vae=vae)


def refiner_cases(pipe: DiffusionPipeline) -> list[Case]:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    arguments = {"prompt_embeds": embeddings(2, 5, 16), "prompt_embeds_mask": mask, "height": 16, "width": 16}
    return [Case("distilled guidance", {**arguments, "image": pictures(seed=5, size=16)})]


def build_kandinsky_5() -> DiffusionPipeline:
    pipe = tiny_kandinsky_5(Kandinsky5I2IPipeline, tiny_vae(4), shift=3.0, visual_cond=True)
    # Other sizes are replaced by the nearest of these.
    pipe.resolutions, pipe.vae_scale_factor_spatial = [(8, 8)], 2
    return pipe


def kandinsky_5_cases(pipe: DiffusionPipeline) -> list[Case]:
    arguments = {**kandinsky_5_prompts(), "height": 8, "width": 8, "image": pictures(seed=5)}
    return guidance_cases(arguments, 3.5, Part(1))


FAMILIES = [
    image_family(
        "Stable Diffusion 3, image to image",
        StableDiffusion3Img2ImgPipeline,
        build_sd3,
        given(plain_sd3_cases, **SOURCE),
    ),
    Family(
        "Stable Diffusion 3, inpainting",
        "StableDiffusion3InpaintPipeline",
        "image",
        partial(build_sd3_inpaint, 16),
        given(plain_sd3_cases, num_inference_steps=5, **INPAINT),
    ),
    Family(
        "Stable Diffusion 3, inpainting with a model of 33 channels",
        "StableDiffusion3InpaintPipeline",
        "image",
        partial(build_sd3_inpaint, 33),
        given(plain_sd3_cases, **SOURCE, mask_image=hole()),
    ),
    image_family(
        "Stable Diffusion 3 ControlNet",
        StableDiffusion3ControlNetPipeline,
        build_sd3_controlnet,
        given(plain_sd3_cases, **CONTROL),
    ),
    image_family(
        "Stable Diffusion 3 ControlNet, inpainting",
        StableDiffusion3ControlNetInpaintingPipeline,
        partial(build_sd3_controlnet, extra_conditioning_channels=1),
        given(plain_sd3_cases, **CONTROL, control_mask=hole()),
    ),
    image_family(
        "Stable Diffusion 3 PAG, image to image",
        StableDiffusion3PAGImg2ImgPipeline,
        build_sd3_pag,
        sd3_pag_cases,
    ),
    image_family(
        "CogView4 Control",
        CogView4ControlPipeline,
        partial(build_cogview4, in_channels=8),
        given(cogview4_cases, control_image=pictures(seed=6, size=16)),
    ),
    Family(
        "Sana ControlNet",
        "SanaControlNetPipeline",
        "image",
        build_sana_controlnet,
        given(sana_cases, control_image=pictures(seed=6, size=32)),
        "with the Euler scheduler",
    ),
    image_family(
        "Sana-Sprint",
        SanaSprintPipeline,
        build_sana_sprint,
        sprint_cases,
        "it jumps between noise levels, and gives its scheduler arguments that no other has",
    ),
    image_family(
        "Sana-Sprint, image to image",
        SanaSprintImg2ImgPipeline,
        build_sana_sprint,
        given(sprint_cases, image=pictures(seed=5, size=32)),
        "as Sana-Sprint",
    ),
    Family("HunyuanImage-2.1 refiner", "HunyuanImageRefinerPipeline", "image", build_refiner, refiner_cases),
    Family("Kandinsky 5, image to image", "Kandinsky5I2IPipeline", "image", build_kandinsky_5, kandinsky_5_cases),
]
