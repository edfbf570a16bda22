# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Pipelines of FLUX.1's and FLUX.2's models that take pictures, masks or controls."""

from dataclasses import replace
from functools import partial

import torch
from diffusers import (
    ChromaImg2ImgPipeline,
    ChromaInpaintPipeline,
    DiffusionPipeline,
    Flux2KleinInpaintPipeline,
    FluxControlImg2ImgPipeline,
    FluxControlInpaintPipeline,
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    VisualClozeGenerationPipeline,
    VisualClozePipeline,
)
from tiny_sd3 import tiny_text_encoder, tiny_tokenizer
from transformers import CLIPTextModel

from .family import Case, Family, added, embeddings, given, hole, image_family, pictures, tiny_model
from .more_images import byte_tokenizer, tiny_t5
from .packed import build_chroma, chroma_cases
from .paper import FLUX2_PROMPTS, FLUX_SIZES, build_flux, build_flux2_klein, flux_cases, reference_image

CONTROL = {"control_image": pictures(seed=6)}
# Four steps, without the first.
SOURCE = {"image": pictures(seed=5), "strength": 0.7, "num_inference_steps": 4}
INPAINT = {"image": pictures(seed=5), "mask_image": hole()}


def build_flux_controlnet(pipeline: type[DiffusionPipeline]) -> DiffusionPipeline:
    return build_flux(pipeline, controlnet=tiny_model(FluxControlNetModel, **FLUX_SIZES))


def distilled(pipe: DiffusionPipeline) -> list[Case]:
    """The calls of pipelines without true guidance."""
    return flux_cases(pipe)[:1]


def kontext_cases(pipe: DiffusionPipeline) -> list[Case]:
    # Other areas than this are resized to it.
    cases = given(flux_cases, max_area=64)(pipe)
    image = {"image": embeddings(2, 4, 4, 4, seed=4)}
    referring = [
        replace(case, label=f"reference latents, {case.label}", arguments={**case.arguments, **image})
        for case in cases
    ]
    return [cases[0], *referring]


def inpaint_cases(pipe: DiffusionPipeline) -> list[Case]:
    # The second sample's mask is another one.
    masks = torch.cat([hole()[:1], hole()[1:].flip(-1)])
    late = replace(given(flux_cases, **{**INPAINT, **SOURCE, "mask_image": masks})(pipe)[0], label="strength below 1")
    return [*given(flux_cases, **INPAINT)(pipe), late]


def klein_inpaint_cases(pipe: DiffusionPipeline) -> list[Case]:
    arguments = {**FLUX2_PROMPTS, "image": pictures(5), "mask_image": hole(), "guidance_scale": 1.0}
    return [Case("no guidance", arguments)]


def build_visual_cloze(pipeline: type[DiffusionPipeline]) -> DiffusionPipeline:
    added("0.42", "BriaFibo2Pipeline")  # with older ones this pipeline returns arrays
    clip = {"text_encoder": CLIPTextModel(tiny_text_encoder(32).config), "tokenizer": tiny_tokenizer()}
    t5 = {"text_encoder_2": tiny_t5(), "tokenizer_2": byte_tokenizer()}
    return build_flux(pipeline, 48, resolution=8, **clip, **t5)


def build_chroma_inpaint() -> DiffusionPipeline:
    pipe = build_chroma(ChromaInpaintPipeline)
    # The pipeline asks for it, which the transformer's config does not have.
    pipe.transformer.register_to_config(guidance_embeds=False)
    return pipe


def visual_cloze_cases(pipe: DiffusionPipeline) -> list[Case]:
    arguments = {
        "task_prompt": ["a", "b"],
        "content_prompt": ["c", "d"],
        # An example above the question, whose picture on the right is to be made.
        "image": [
            [[reference_image(seed, 8), reference_image(seed + 1, 8)], [reference_image(seed + 2, 8), None]]
            for seed in (1, 4)
        ],
        "max_sequence_length": 4,
    }
    return [Case("distilled guidance", arguments)]


FAMILIES = [
    image_family("FLUX.1 Kontext", FluxKontextPipeline, build_flux, kontext_cases),
    image_family("FLUX.2-Klein, inpainting", Flux2KleinInpaintPipeline, build_flux2_klein, klein_inpaint_cases),
    image_family("Chroma, image to image", ChromaImg2ImgPipeline, build_chroma, given(chroma_cases, **SOURCE)),
    Family(
        "Chroma, inpainting",
        "ChromaInpaintPipeline",
        "image",
        build_chroma_inpaint,
        given(chroma_cases, **INPAINT),
    ),
    image_family("VisualCloze", VisualClozeGenerationPipeline, build_visual_cloze, visual_cloze_cases),
    image_family(
        "VisualCloze with upsampling",
        VisualClozePipeline,
        build_visual_cloze,
        given(visual_cloze_cases, refused="complete rollout, got none", upsampling_height=8, upsampling_width=8),
    ),
    image_family("FLUX.1, image to image", FluxImg2ImgPipeline, build_flux, given(flux_cases, **SOURCE)),
    image_family("FLUX.1, inpainting", FluxInpaintPipeline, build_flux, inpaint_cases),
    image_family("FLUX.1 Fill", FluxFillPipeline, partial(build_flux, in_channels=48), given(distilled, **INPAINT)),
    image_family(
        "FLUX.1 Control", FluxControlPipeline, partial(build_flux, in_channels=32), given(distilled, **CONTROL)
    ),
    image_family(
        "FLUX.1 Control, image to image",
        FluxControlImg2ImgPipeline,
        partial(build_flux, in_channels=32),
        given(distilled, **CONTROL, **SOURCE),
    ),
    image_family(
        "FLUX.1 Control, inpainting",
        FluxControlInpaintPipeline,
        partial(build_flux, in_channels=32),
        given(distilled, **CONTROL, **INPAINT),
    ),
    image_family("FLUX.1 ControlNet", FluxControlNetPipeline, build_flux_controlnet, given(flux_cases, **CONTROL)),
    image_family(
        "FLUX.1 ControlNet, image to image",
        FluxControlNetImg2ImgPipeline,
        build_flux_controlnet,
        given(distilled, **CONTROL, **SOURCE),
    ),
    image_family(
        "FLUX.1 ControlNet, inpainting",
        FluxControlNetInpaintPipeline,
        build_flux_controlnet,
        given(distilled, **CONTROL, **INPAINT),
    ),
    image_family(
        "FLUX.1 Kontext, inpainting",
        FluxKontextInpaintPipeline,
        build_flux,
        given(flux_cases, **INPAINT, max_area=64, _auto_resize=False),
    ),
]
