# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Pipelines that take pictures, masks or controls, of Qwen-Image's models and those of `packed`."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    JoyImageEditPipeline,
    JoyImageEditPlusPipeline,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
    LongCatImageEditPipeline,
    QwenImageControlNetInpaintPipeline,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageEditInpaintPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImageLayeredPipeline,
    ZImageControlNetInpaintPipeline,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
)
from transformers import Qwen3VLForConditionalGeneration

from . import more_images
from .family import (
    Case,
    Family,
    Part,
    added,
    embeddings,
    given,
    guidance_cases,
    hole,
    image_family,
    tiny_model,
    tiny_pipeline,
)
from .flux_inputs import CONTROL, INPAINT, SOURCE
from .more_images import tiny_qwen3_vl
from .packed import (
    PADDED,
    QWEN_SIZES,
    TokenizerProcessor,
    bria_fibo_cases,
    build_bria_fibo,
    build_longcat_image,
    build_qwen_image,
    build_z_image,
    byte_tokenizer,
    qwen_image_cases,
    tiny_qwen25_vl,
    tiny_qwen_vae,
    z_image_cases,
)
from .paper import reference_image
from .videos import tiny_wan_vae


def make_small(pipeline: type[DiffusionPipeline]) -> None:
    """Let the pipeline's module resize pictures to 8 x 8, and not to the area of 1024 x 1024 that it has built in."""
    module = inspect.getmodule(pipeline)
    if not hasattr(module, "calculate_stock_dimensions"):
        module.calculate_stock_dimensions = module.calculate_dimensions
        module.calculate_dimensions = lambda area, ratio: (8, 8, *module.calculate_stock_dimensions(area, ratio)[2:])


def build_edit(
    pipeline: type[DiffusionPipeline], build: Callable[..., DiffusionPipeline] = build_qwen_image, **parts: Any
) -> DiffusionPipeline:
    make_small(pipeline)
    return build(pipeline, **parts)


def build_qwen_controlnet(pipeline: type[DiffusionPipeline], **config: Any) -> DiffusionPipeline:
    return build_qwen_image(pipeline, controlnet=tiny_model(QwenImageControlNetModel, **QWEN_SIZES, **config))


def one_prompt(pipe: DiffusionPipeline) -> list[Case]:
    """Qwen-Image's calls for the first prompt alone."""
    return [
        replace(
            case,
            arguments={
                name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in case.arguments.items()
            },
        )
        for case in qwen_image_cases(pipe)
    ]


def build_layered() -> DiffusionPipeline:
    make_small(QwenImageLayeredPipeline)
    # Its pictures have an alpha channel, its transformer is told whether they have.
    config = {"in_channels": 8, "out_channels": 2, "use_additional_t_cond": True, "use_layer3d_rope": True}
    vae = tiny_qwen_vae(input_channels=4, z_dim=2, latents_mean=[0.1, -0.2], latents_std=[1.2, 0.8])
    return build_qwen_image(QwenImageLayeredPipeline, config, vae=vae, text_encoder=tiny_qwen25_vl(byte_tokenizer()))


def layered_cases(pipe: DiffusionPipeline) -> list[Case]:
    return [
        replace(
            case,
            arguments={name: value for name, value in case.arguments.items() if name not in ("height", "width")}
            | {"prompt": "a cat", "image": reference_image(size=8).convert("RGBA"), "layers": 1},
        )
        for case in one_prompt(pipe)
    ]


def plain_z_image_cases(pipe: DiffusionPipeline) -> list[Case]:
    """Without guidance, and with it."""
    return z_image_cases(pipe)[:2]


def build_z_image_control(pipeline: type[DiffusionPipeline], channels: int) -> DiffusionPipeline:
    controlnet = ZImageControlNetModel(
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=channels,
        dim=32,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )
    # diffusers forgets to set it, and reads it where gradients are on.
    controlnet.gradient_checkpointing = False
    pipe = build_z_image(pipeline, controlnet=controlnet)
    # The control network has these of the transformer, and runs them outside of its calls.
    shared = set(map(id, controlnet.parameters()))
    for parameter in pipe.transformer.parameters():
        parameter.requires_grad_(id(parameter) not in shared)
    return pipe


def build_bria_edit() -> DiffusionPipeline:
    # Older ones take one prompt at a time.
    return build_bria_fibo(added("0.42", "BriaFiboEditPipeline"))


BRIA_EDIT = {
    "prompt": ['{"edit_instruction": "red"}', '{"edit_instruction": "two"}'],
    "image": reference_image(size=16),
}


class FixedPatches:
    """Stands for Qwen2.5-VL's processor, which exists only with torchvision: every picture has the same patches."""

    merge_size = 2

    def __call__(self, images: Any, return_tensors: str) -> dict[str, torch.Tensor]:
        """Of four by four patches."""
        return {"pixel_values": embeddings(16, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]])}

    @property
    def image_processor(self) -> "FixedPatches":
        return self


def longcat_edit_cases(pipe: DiffusionPipeline) -> list[Case]:
    # The pipeline makes one picture at a time.
    arguments = {"image": reference_image(size=8), "prompt": "a red"}
    return guidance_cases(arguments, 4.5, Part(1), {"negative_prompt": "blur"})


def build_joy_image(
    pipeline: type[DiffusionPipeline], transformer: type[torch.nn.Module], **parts: Any
) -> DiffusionPipeline:
    config = {"hidden_size": 16, "text_dim": 16, "mlp_width_ratio": 2.0, "rope_dim_list": [2, 2, 4]}
    parts |= {"vae": tiny_wan_vae(), "transformer": tiny_model(transformer, **config)}
    pipe = tiny_pipeline(pipeline, shift=4.0, text_token_max_length=8, **parts)
    # Other sizes are replaced by the nearest of its list, which begins at 512.
    processor = getattr(pipe, "vae_image_processor", pipe.image_processor)
    processor.get_default_height_width = lambda image, height=None, width=None: (16, 16)
    return pipe


def build_joy_image_plus() -> DiffusionPipeline:
    """With a text encoder: the pipeline needs texts to count its pictures."""
    encoder = Qwen3VLForConditionalGeneration(tiny_qwen3_vl(width=16, layers=1).config)
    parts = {"text_encoder": encoder, "processor": TokenizerProcessor(more_images.byte_tokenizer())}
    return build_joy_image(JoyImageEditPlusPipeline, JoyImageEditPlusTransformer3DModel, **parts)


def joy_image_cases(pipe: DiffusionPipeline) -> list[Case]:
    arguments = {
        "image": [reference_image(size=16), reference_image(seed=5, size=16)],
        "prompt_embeds": embeddings(2, 5, 16),
        "prompt_embeds_mask": PADDED.long(),
    }
    negative = {"negative_prompt_embeds": embeddings(2, 5, 16, seed=2), "negative_prompt_embeds_mask": PADDED.long()}
    return guidance_cases(arguments, 4.0, Part(1), negative)


def joy_image_plus_cases(pipe: DiffusionPipeline) -> list[Case]:
    images = [[reference_image(size=16)], [reference_image(seed=5, size=16)]]
    arguments = {"prompt": ["a red", "two cats"], "images": images}
    return guidance_cases(arguments, 4.0, Part(0, "first half"), {"negative_prompt": ["blur", "grey"]})


EDIT = {"image": [reference_image(size=8), reference_image(seed=5, size=8)]}

FAMILIES = [
    image_family(
        "Qwen-Image, image to image", QwenImageImg2ImgPipeline, build_qwen_image, given(qwen_image_cases, **SOURCE)
    ),
    image_family(
        "Qwen-Image, inpainting",
        QwenImageInpaintPipeline,
        build_qwen_image,
        given(qwen_image_cases, **INPAINT),
    ),
    image_family("Qwen-Image-Edit", QwenImageEditPipeline, build_edit, given(qwen_image_cases, **EDIT)),
    image_family(
        "Qwen-Image-Edit, inpainting",
        QwenImageEditInpaintPipeline,
        build_edit,
        given(qwen_image_cases, **EDIT, mask_image=hole()),
    ),
    image_family(
        "Qwen-Image-Edit-Plus",
        QwenImageEditPlusPipeline,
        build_edit,
        given(one_prompt, **EDIT),
        "one prompt at a time",
    ),
    Family(
        "Qwen-Image-Layered", "QwenImageLayeredPipeline", "image", build_layered, layered_cases, "one prompt at a time"
    ),
    image_family(
        "Qwen-Image ControlNet", QwenImageControlNetPipeline, build_qwen_controlnet, given(qwen_image_cases, **CONTROL)
    ),
    image_family(
        "Qwen-Image ControlNet, inpainting",
        QwenImageControlNetInpaintPipeline,
        partial(build_qwen_controlnet, extra_condition_channels=4),
        given(qwen_image_cases, **CONTROL, control_mask=hole()),
    ),
    image_family(
        "Z-Image, image to image", ZImageImg2ImgPipeline, build_z_image, given(plain_z_image_cases, **SOURCE)
    ),
    image_family(
        "Z-Image, inpainting",
        ZImageInpaintPipeline,
        build_z_image,
        given(plain_z_image_cases, **INPAINT),
    ),
    image_family(
        "Z-Image ControlNet",
        ZImageControlNetPipeline,
        partial(build_z_image_control, channels=4),
        given(plain_z_image_cases, **CONTROL),
        "without the layers that its control network shares",
    ),
    image_family(
        "Z-Image ControlNet, inpainting",
        ZImageControlNetInpaintPipeline,
        partial(build_z_image_control, channels=9),
        given(plain_z_image_cases, **CONTROL, **INPAINT),
        "as Z-Image ControlNet",
    ),
    Family("Bria FIBO Edit", "BriaFiboEditPipeline", "image", build_bria_edit, given(bria_fibo_cases, **BRIA_EDIT)),
    image_family(
        "LongCat-Image-Edit",
        LongCatImageEditPipeline,
        partial(build_edit, build=build_longcat_image, text_processor=FixedPatches()),
        longcat_edit_cases,
        "one prompt at a time",
    ),
    image_family(
        "JoyImage-Edit",
        JoyImageEditPipeline,
        partial(build_joy_image, transformer=JoyImageEditTransformer3DModel),
        joy_image_cases,
    ),
    Family(
        "JoyImage-Edit-Plus",
        "JoyImageEditPlusPipeline",
        "image",
        build_joy_image_plus,
        joy_image_plus_cases,
    ),
]
