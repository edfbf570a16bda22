# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the pipelines that make a video of an image, of another video or of a control signal."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    ClassifierFreeGuidance,
    Cosmos2VideoToWorldPipeline,
    Cosmos3OmniPipeline,
    Cosmos3OmniTransformer,
    DiffusionPipeline,
    EasyAnimateInpaintPipeline,
    FlowMapEulerDiscreteScheduler,
    HeliosPyramidPipeline,
    HeliosScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    Kandinsky5I2VPipeline,
    LTX2HDRPipeline,
    LTX2ImageToVideoPipeline,
    LTXImageToVideoPipeline,
    MotifVideoImage2VideoPipeline,
    SanaImageToVideoPipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2ReferenceCondition
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from . import images, more_images, videos
from .family import Case, Family, Part, added, embeddings, guidance_cases, tiny_model, tiny_pipeline
from .packed import byte_tokenizer
from .videos import WAN_SIZES, tiny_hunyuan_vae, tiny_wan_vae, wan_prompts


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    """Uniform numbers in [0, 1] that stand for images, (B, 3, H, W), or videos, (B, 3, F, H, W)."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def picture(height: int = 16, width: int = 32, seed: int = 0) -> Image.Image:
    """An image as users have it."""
    values = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def clip_vision() -> dict[str, Any]:
    """An image encoder with five tokens of width 16, and what prepares images for it."""
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    size = {"height": 8, "width": 8}
    return {
        "image_encoder": CLIPVisionModel(config),
        "image_processor": CLIPImageProcessor(size=size, crop_size=size),
    }


def siglip_vision() -> dict[str, Any]:
    """An image encoder with four tokens of width 12, and what prepares images for it."""
    config = SiglipVisionConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    size = {"height": 8, "width": 8}
    return {"image_encoder": SiglipVisionModel(config), "feature_extractor": SiglipImageProcessor(size=size)}


# The latents, and those of the given frames with a mask of four frames.
WAN_I2V = {**WAN_SIZES, "in_channels": 4 + 4 + 4, "num_layers": 1, "rope_max_seq_len": 32}
SKY_REELS = {**WAN_I2V, "in_channels": 4}
SKY_REELS_LONG = {"overlap_history": 1, "num_frames": 9, "base_num_frames": 9}
WAN_CLIP = {**WAN_I2V, "image_dim": 16, "added_kv_proj_dim": 24}


def build_wan_i2v(
    pipeline: str = "WanImageToVideoPipeline",
    transformer: type[torch.nn.Module] = WanTransformer3DModel,
    config: dict[str, Any] = WAN_CLIP,
    vae_dtype: torch.dtype = torch.float64,
    **components: Any,
) -> DiffusionPipeline:
    """Of the pipelines that are built like Wan's, with an image encoder where the transformer has an `image_dim`.

    Args:
        pipeline: name of the class.
        transformer: class of the transformer, with this `config`.
        vae_dtype: float32 for pipelines that give it float32 frames.
        components: others, and options of the class.
    """
    encoder = clip_vision() if "image_dim" in config else {}
    pipe = tiny_pipeline(
        getattr(diffusers, pipeline),
        shift=7.0,
        vae=tiny_wan_vae(),
        transformer=transformer(**config),
        **encoder,
        **{name: transformer(**config) if name == "transformer_2" else part for name, part in components.items()},
    )
    pipe.vae.to(vae_dtype)
    return pipe


def with_inputs(cases: list[Case], **more: Any) -> list[Case]:
    """The calls with further arguments."""
    return [dataclasses.replace(case, arguments={**case.arguments, **more}) for case in cases]


def with_label(label: str, cases: list[Case], refused: str | None = None, **more: Any) -> list[Case]:
    """The calls with further arguments, under another name."""
    return [dataclasses.replace(case, label=label, refused=refused) for case in with_inputs(cases, **more)]


def wan_i2v_cases(pipe: DiffusionPipeline, last_image: bool = False) -> list[Case]:
    """One image for all prompts, which is how these pipelines take it."""
    images = {"last_image": picture(seed=1)} if last_image else {}
    cases = videos.wan_22_cases if pipe.config.get("boundary_ratio") else videos.wan_cases
    return with_inputs(cases(pipe), image=picture(), **images)


def wan_v2v_cases(pipe: DiffusionPipeline) -> list[Case]:
    arguments = {**wan_prompts(), "video": pixels(2, 5, 3, 16, 32), "strength": 1.0}
    del arguments["num_frames"]
    off, on = guidance_cases(arguments, 5.0, Part(1))
    return [off, on, *with_label("strength below 1", [on], strength=0.7)]


# Two stages of the pyramid.
TWO_STAGES = HeliosScheduler(stages=2, stage_range=[0, 0.5, 1], gamma=0.3)


def lucy_cases(pipe: DiffusionPipeline) -> list[Case]:
    return with_inputs(videos.wan_cases(pipe), video=pixels(2, 5, 3, 16, 32))


def build_hunyuan_i2v(pipeline: str, in_channels: int, **config: Any) -> DiffusionPipeline:
    transformer = tiny_model(
        HunyuanVideoTransformer3DModel,
        in_channels=in_channels,
        attention_head_dim=10,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        **config,
    )
    return tiny_pipeline(getattr(diffusers, pipeline), transformer=transformer, vae=tiny_hunyuan_vae(), shift=7.0)


def hunyuan_i2v_cases(pipe: DiffusionPipeline) -> list[Case]:
    # Guidance by an embedding excludes that by a negative prompt.
    return with_inputs(videos.hunyuan_video_cases(pipe), image=pixels(2, 3, 16, 16), guidance_scale=1.0)


def ltx_i2v_cases(pipe: DiffusionPipeline) -> list[Case]:
    return with_inputs(videos.ltx_cases(pipe)[:2], image=pixels(2, 3, 32, 32))


def build_kandinsky_5_i2v(normalizes: bool = False) -> DiffusionPipeline:
    pipe = videos.tiny_kandinsky_5(Kandinsky5I2VPipeline, tiny_hunyuan_vae(), shift=7.0, visual_cond=True)
    if not normalizes:
        pipe.normalize_first_frame = lambda latents: latents
    return pipe


def kandinsky_5_i2v_cases(pipe: DiffusionPipeline, num_frames: int = 5, refused: str | None = None) -> list[Case]:
    cases = videos.kandinsky_5_cases(pipe)
    cases = with_inputs(cases, image=pixels(2, 3, 16, 32), num_frames=num_frames)
    return [dataclasses.replace(case, refused=refused) for case in cases[:1]] if refused else cases


def sana_i2v_cases(pipe: DiffusionPipeline) -> list[Case]:
    return with_inputs(videos.sana_video_cases(pipe), image=pixels(1, 3, 32, 32))


def easy_animate_inpaint_cases(pipe: DiffusionPipeline) -> list[Case]:
    mask = torch.zeros(2, 1, 5, 16, 32, dtype=torch.float64)
    mask[..., 16:] = 1
    cases = with_inputs(videos.easy_animate_cases(pipe)[:2], video=pixels(2, 3, 5, 16, 32), mask_video=mask)
    return [*cases, *with_label("strength below 1", cases[1:], strength=0.8, num_inference_steps=5)]


def build_hunyuan_15_i2v(**guidance: float) -> DiffusionPipeline:
    return videos.build_hunyuan_video_15(HunyuanVideo15ImageToVideoPipeline, siglip_vision(), **guidance)


def hunyuan_15_i2v_case(label: str, unconditional: Part | None = None) -> Callable[[DiffusionPipeline], list[Case]]:
    def cases(pipe: DiffusionPipeline) -> list[Case]:
        (case,) = videos.hunyuan_video_15_case(label, unconditional)(pipe)
        arguments = {name: value for name, value in case.arguments.items() if name not in ("height", "width")}
        return [dataclasses.replace(case, arguments={**arguments, "image": picture(16, 16)})]

    return cases


def motif_i2v_case(label: str, unconditional: Part | None = None) -> Callable[[DiffusionPipeline], list[Case]]:
    def cases(pipe: DiffusionPipeline) -> list[Case]:
        case = videos.motif_case(label, unconditional)(pipe)
        one = {name: value[:1] for name, value in case[0].arguments.items() if isinstance(value, torch.Tensor)}
        return with_inputs(case, **one, prompt=None, image=pixels(1, 3, 16, 32))

    return cases


def build_wan_animate() -> DiffusionPipeline:
    config = {
        **WAN_CLIP,
        "num_layers": 2,
        "latent_channels": 4,
        "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
        "motion_encoder_size": 16,
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 8,
        "face_encoder_hidden_dim": 8,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 2,
    }
    return build_wan_i2v("WanAnimatePipeline", WanAnimateTransformer3DModel, config)


def wan_animate_cases(pipe: DiffusionPipeline) -> list[Case]:
    def clip(size: tuple[int, int], seed: int, length: int = 5) -> list[Image.Image]:
        return [picture(*size, seed + number) for number in range(length)]

    motion = {"pose_video": clip((16, 32), 10), "face_video": clip((16, 16), 20), "image": picture()}
    cases = with_inputs(videos.wan_cases(pipe), **motion, segment_frame_length=5, num_inference_steps=2)
    for case in cases:
        del case.arguments["num_frames"]
    scene = {"background_video": clip((16, 32), 30), "mask_video": clip((16, 32), 40)}
    longer = {"pose_video": clip((16, 32), 10, 9), "face_video": clip((16, 16), 20, 9)}
    return [
        cases[1],
        *with_label("replacement", cases[:1], mode="replace", **scene),
        *with_label("two segments", cases[:1], "second sampling loop", **longer),
    ]


def vace_cases(pipe: DiffusionPipeline) -> list[Case]:
    return with_label(
        "masks and references",
        videos.wan_vace_cases(pipe)[1:],
        video=pixels(1, 5, 3, 16, 32),
        mask=pixels(1, 5, 3, 16, 32, seed=1).round(),
        reference_images=[picture()],
    )


def helios_cases(pipe: DiffusionPipeline) -> list[Case]:
    guided = videos.helios_cases(pipe)[1:2]
    return [
        *with_label("image", guided, image=pixels(2, 3, 16, 16)),
        *with_label("video", guided, video=pixels(2, 5, 3, 16, 16)),
    ]


def helios_pyramid_cases(pipe: DiffusionPipeline) -> list[Case]:
    guided = videos.helios_cases(pipe)[1:2]
    stages = {"image": pixels(2, 3, 32, 32), "height": 32, "width": 32, "pyramid_num_inference_steps_list": [2, 2]}
    cases = with_label("stages", guided, refused="second sampling loop", **stages)
    cases[0].arguments["num_inference_steps"] = None
    return cases


def kandinsky_6_cases(pipe: DiffusionPipeline) -> list[Case]:
    cases = with_inputs(videos.kandinsky_6_cases(pipe)[:2], image=pixels(2, 3, 16, 32))
    return [dataclasses.replace(case, label=f"image, {case.label}") for case in cases]


def sky_reels_forcing_cases(pipe: DiffusionPipeline, **inputs: Any) -> list[Case]:
    return [
        dataclasses.replace(case, refused="a complete rollout")
        for case in with_inputs(videos.wan_cases(pipe)[:1], **inputs, prompt=None)
    ]


def cosmos_25_cases(pipe: DiffusionPipeline) -> list[Case]:
    guided = more_images.cosmos_25_cases(pipe)[1:]
    one = {name: value[:1] for name, value in guided[0].arguments.items() if isinstance(value, torch.Tensor)}
    return with_label("video", guided, **one, video=pixels(1, 5, 3, 16, 32), num_frames=9)


def build_cosmos_3() -> DiffusionPipeline:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|vision_start|>"]})
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    transformer = Cosmos3OmniTransformer(
        head_dim=8,
        hidden_size=16,
        intermediate_size=16,
        latent_channel=4,
        patch_latent_dim=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_key_value_heads=1,
        rope_axes_dim=(2, 1, 1),
        vocab_size=len(tokenizer),
    )
    return tiny_pipeline(
        Cosmos3OmniPipeline,
        shift=5.0,
        transformer=transformer,
        vae=tiny_wan_vae(),
        text_tokenizer=tokenizer,
        enable_safety_checker=False,
        default_use_system_prompt=False,
    )


def cosmos_3_cases(pipe: DiffusionPipeline) -> list[Case]:
    texts = {"prompt": "a cat", "negative_prompt": "a dog"}
    plain = {"add_resolution_template": False, "add_duration_template": False, "enable_safety_check": False}
    sizes = {"height": 16, "width": 32, "num_frames": 5, "image": picture()}
    return guidance_cases({**texts, **plain, **sizes}, 6.0, Part(1))


def build_framepack() -> DiffusionPipeline:
    transformer = tiny_model(
        HunyuanVideoFramepackTransformer3DModel,
        attention_head_dim=10,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        has_image_proj=True,
        image_proj_dim=12,
        has_clean_x_embedder=True,
    )
    return tiny_pipeline(
        HunyuanVideoFramepackPipeline, transformer=transformer, vae=tiny_hunyuan_vae(), shift=7.0, **siglip_vision()
    )


def framepack_cases(pipe: DiffusionPipeline) -> list[Case]:
    sizes = {"image": pixels(2, 3, 16, 16), "latent_window_size": 2}
    off, on = with_inputs(videos.hunyuan_video_cases(pipe), **sizes)
    return [
        off,
        on,
        *with_label("first and last image", [off], last_image=pixels(2, 3, 16, 16, seed=1)),
        *with_label("two sections", [off], "second sampling loop", num_frames=9),
    ]


def ltx_2_i2v_cases(pipe: DiffusionPipeline) -> list[Case]:
    return with_inputs(videos.ltx_2_cases(pipe), image=pixels(2, 3, 32, 32), image_crf=0)


def ltx_2_hdr_cases(pipe: DiffusionPipeline) -> list[Case]:
    sizes = {"height": 32, "width": 32, "num_frames": 3, "num_inference_steps": 2}
    reference = LTX2ReferenceCondition(frames=[picture(32, 32, seed) for seed in range(3)])
    plain = {**videos.prompts(32), **sizes}
    guided = {**plain, "guidance_scale": 3.0, "guidance_rescale": 0.7}
    return [
        Case("reference video", {**plain, "reference_conditions": [reference]}),
        Case("guidance", guided, Part(0, "first half")),
    ]


def ltx_2_dfr_cases(pipe: DiffusionPipeline) -> list[Case]:
    texts = {name: value for name, value in videos.prompts(32).items() if "negative" not in name}
    sizes = {"height": 32, "width": 32, "num_frames": 3, "num_inference_steps": None, "sigmas": [1.0, 0.7, 0.4]}
    sound = Case("sound", {**texts, **sizes, "generate_slots": False}, refused="other than through the latents")
    return [sound, *with_label("given sound", [sound], freeze_audio=True)]


def build_sana_wm() -> DiffusionPipeline:
    vae = videos.build_ltx_2(LTX2ImageToVideoPipeline).vae
    transformer = added("0.42", "SanaWMTransformer3DModel")(
        in_channels=4,
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        linear_head_dim=16,
        softmax_every_n=2,
        # Six numbers for each of two frames.
        chunk_plucker_channels=12,
        caption_channels=16,
    )
    return tiny_pipeline(added("0.42", "SanaWMPipeline"), shift=3.0, transformer=transformer, vae=vae)


def sana_wm_cases(pipe: DiffusionPipeline) -> list[Case]:
    arguments = {
        "prompt": "",
        "prompt_embeds": embeddings(1, 1, 5, 16),
        "prompt_attention_mask": torch.ones(1, 5),
        "negative_prompt_embeds": embeddings(1, 1, 5, 16, seed=1),
        "negative_prompt_attention_mask": torch.ones(1, 5),
        "image": picture(),
        # A camera that stands still.
        "c2w": np.eye(4)[None].repeat(3, 0),
        "intrinsics": [16.0, 16.0, 16.0, 8.0],
        "height": 8,
        "width": 8,
        "num_frames": 3,
    }
    return guidance_cases(arguments, 5.0, Part(0, "first half"))


def build_any_flow() -> DiffusionPipeline:
    transformer = AnyFlowTransformer3DModel(**WAN_SIZES, num_layers=1, rope_max_seq_len=32)
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    return tiny_pipeline(AnyFlowPipeline, scheduler=scheduler, transformer=transformer, vae=tiny_wan_vae())


def any_flow_cases(pipe: DiffusionPipeline) -> list[Case]:
    def one(case: Case) -> dict[str, Any]:
        texts = {name: value[:1] for name, value in case.arguments.items() if name.endswith("embeds")}
        return {**case.arguments, **texts, "video": pixels(1, 1, 3, 16, 32)}

    off, on = guidance_cases(wan_prompts(), 4.0, Part(0, "first half"))
    # It takes any negative prompt for guidance.
    del off.arguments["negative_prompt_embeds"]
    return [
        off,
        on,
        *with_label("video, guidance", [on], **one(on)),
        *with_label("video, no guidance", [off], **one(off)),
    ]


def cosmos_2_cases(pipe: DiffusionPipeline) -> list[Case]:
    image = {"image": pixels(2, 3, 16, 16).float(), "num_frames": 5}
    return with_inputs(images.cosmos2_cases(pipe), **image)


FAMILIES = [
    Family("Wan 2.1 I2V", "WanImageToVideoPipeline", "video", build_wan_i2v, wan_i2v_cases),
    Family(
        "Wan 2.1 FLF2V",
        "WanImageToVideoPipeline",
        "video",
        partial(build_wan_i2v, config={**WAN_CLIP, "pos_embed_seq_len": 10}),
        partial(wan_i2v_cases, last_image=True),
    ),
    Family(
        "Wan 2.2 I2V",
        "WanImageToVideoPipeline",
        "video",
        partial(build_wan_i2v, config=WAN_I2V, boundary_ratio=0.9, transformer_2=True),
        wan_i2v_cases,
    ),
    Family(
        "Wan 2.2 5B I2V",
        "WanImageToVideoPipeline",
        "video",
        partial(build_wan_i2v, config={**WAN_I2V, "in_channels": 4}, expand_timesteps=True),
        wan_i2v_cases,
    ),
    Family(
        "Wan video-to-video",
        "WanVideoToVideoPipeline",
        "video",
        partial(build_wan_i2v, "WanVideoToVideoPipeline", config={**WAN_I2V, "in_channels": 4}),
        wan_v2v_cases,
    ),
    Family(
        "Lucy Edit",
        "LucyEditPipeline",
        "video",
        partial(
            build_wan_i2v,
            "LucyEditPipeline",
            config={**WAN_I2V, "in_channels": 8},
            vae_dtype=torch.float32,
            expand_timesteps=True,
        ),
        lucy_cases,
    ),
    Family(
        "ChronoEdit",
        "ChronoEditPipeline",
        "video",
        partial(build_wan_i2v, "ChronoEditPipeline", diffusers.ChronoEditTransformer3DModel),
        wan_i2v_cases,
    ),
    Family(
        "SkyReels-V2 I2V",
        "SkyReelsV2ImageToVideoPipeline",
        "video",
        partial(build_wan_i2v, "SkyReelsV2ImageToVideoPipeline", SkyReelsV2Transformer3DModel),
        wan_i2v_cases,
    ),
    Family(
        "SkyReels-V1 I2V",
        "HunyuanSkyreelsImageToVideoPipeline",
        "video",
        partial(build_hunyuan_i2v, "HunyuanSkyreelsImageToVideoPipeline", 8, guidance_embeds=True),
        hunyuan_i2v_cases,
    ),
    Family(
        "HunyuanVideo I2V",
        "HunyuanVideoImageToVideoPipeline",
        "video",
        partial(
            build_hunyuan_i2v,
            "HunyuanVideoImageToVideoPipeline",
            9,
            guidance_embeds=False,
            image_condition_type="latent_concat",
        ),
        hunyuan_i2v_cases,
    ),
    Family(
        "HunyuanVideo I2V, replaced tokens",
        "HunyuanVideoImageToVideoPipeline",
        "video",
        partial(
            build_hunyuan_i2v,
            "HunyuanVideoImageToVideoPipeline",
            4,
            guidance_embeds=True,
            image_condition_type="token_replace",
        ),
        hunyuan_i2v_cases,
    ),
    Family(
        "LTX I2V",
        "LTXImageToVideoPipeline",
        "video",
        partial(videos.build_ltx, LTXImageToVideoPipeline),
        ltx_i2v_cases,
    ),
    Family(
        "Kandinsky 5 I2V",
        "Kandinsky5I2VPipeline",
        "video",
        build_kandinsky_5_i2v,
        kandinsky_5_i2v_cases,
        note="without `normalize_first_frame`, whose writes in place autograd refuses",
    ),
    Family(
        "Kandinsky 5 I2V with normalized frames",
        "Kandinsky5I2VPipeline",
        "video",
        partial(build_kandinsky_5_i2v, normalizes=True),
        # The statistics of the first four frames' latents are replaced by those of the frames after them.
        partial(kandinsky_5_i2v_cases, num_frames=21, refused="written into in place"),
    ),
    Family(
        "Sana I2V",
        "SanaImageToVideoPipeline",
        "video",
        partial(videos.build_sana_video, SanaImageToVideoPipeline),
        sana_i2v_cases,
    ),
    Family(
        "EasyAnimate inpaint",
        "EasyAnimateInpaintPipeline",
        "video",
        partial(
            videos.build_easy_animate, EasyAnimateInpaintPipeline, in_channels=12, resize_inpaint_mask_directly=False
        ),
        easy_animate_inpaint_cases,
        note="with `resize_inpaint_mask_directly=False`; else it reads an option that its VAE does not have",
    ),
    Family(
        "HunyuanVideo 1.5 I2V without guidance",
        "HunyuanVideo15ImageToVideoPipeline",
        "video",
        partial(build_hunyuan_15_i2v, guidance_scale=1.0),
        hunyuan_15_i2v_case("no guidance"),
    ),
    Family(
        "HunyuanVideo 1.5 I2V",
        "HunyuanVideo15ImageToVideoPipeline",
        "video",
        partial(build_hunyuan_15_i2v, guidance_scale=6.0),
        hunyuan_15_i2v_case("guidance", Part(1)),
    ),
    Family(
        "Motif-Video I2V",
        "MotifVideoImage2VideoPipeline",
        "video",
        lambda: videos.build_motif(ClassifierFreeGuidance(guidance_scale=4.0), MotifVideoImage2VideoPipeline),
        motif_i2v_case("guidance", Part(1)),
        note="its image as latents alone, without a vision tower",
    ),
    Family("Wan Animate", "WanAnimatePipeline", "video", build_wan_animate, wan_animate_cases),
    Family("Wan VACE with masks and references", "WanVACEPipeline", "video", videos.build_wan_vace, vace_cases),
    Family("Helios of images and videos", "HeliosPipeline", "video", videos.build_helios, helios_cases),
    Family(
        "Helios pyramid",
        "HeliosPyramidPipeline",
        "video",
        partial(
            videos.build_helios,
            HeliosPyramidPipeline,
            scheduler=TWO_STAGES,
        ),
        helios_pyramid_cases,
    ),
    Family(
        "Kandinsky 6 of an image",
        "Kandinsky6TI2VAPipeline",
        "video",
        partial(videos.build_kandinsky_6, visual_token_type_num_embeddings=2),
        kandinsky_6_cases,
    ),
    *(
        Family(
            f"SkyReels-V2 {name}",
            f"SkyReelsV2{pipeline}Pipeline",
            "video",
            partial(
                build_wan_i2v,
                f"SkyReelsV2{pipeline}Pipeline",
                SkyReelsV2Transformer3DModel,
                SKY_REELS,
                torch.float32,
                scheduler=UniPCMultistepScheduler(
                    prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
                ),
            ),
            partial(sky_reels_forcing_cases, **inputs),
            note="each frame has a scheduler and a step of its own",
        )
        for name, pipeline, inputs in (
            ("DF", "DiffusionForcing", {}),
            ("DF I2V", "DiffusionForcingImageToVideo", {"image": pixels(1, 3, 16, 32)}),
            ("DF V2V", "DiffusionForcingVideoToVideo", {"video": pixels(2, 5, 3, 16, 32), **SKY_REELS_LONG}),
        )
    ),
    Family(
        "Cosmos-Predict2.5 of a video",
        "Cosmos2_5_PredictBasePipeline",
        "video",
        more_images.build_cosmos_25,
        cosmos_25_cases,
    ),
    Family(
        "Cosmos-Predict2 video",
        "Cosmos2VideoToWorldPipeline",
        "video",
        partial(images.build_cosmos2, Cosmos2VideoToWorldPipeline, in_channels=5),
        cosmos_2_cases,
        note="sigmas from 80 to 0.002, and a safety check through numpy",
    ),
    Family(
        "Cosmos 3",
        "Cosmos3OmniPipeline",
        "video",
        build_cosmos_3,
        cosmos_3_cases,
        note="without sound and actions, and without its safety checker",
    ),
    Family(
        "AnyFlow",
        "AnyFlowPipeline",
        "video",
        build_any_flow,
        any_flow_cases,
        note="with its own scheduler, whose steps are Euler's",
    ),
    Family(
        "Sana-WM",
        "SanaWMPipeline",
        "video",
        build_sana_wm,
        sana_wm_cases,
    ),
    Family("HunyuanVideo FramePack", "HunyuanVideoFramepackPipeline", "video", build_framepack, framepack_cases),
    Family(
        "LTX-2 I2V",
        "LTX2ImageToVideoPipeline",
        "video",
        partial(videos.build_ltx_2, LTX2ImageToVideoPipeline),
        ltx_2_i2v_cases,
        note="as LTX-2",
    ),
    Family(
        "LTX-2 HDR",
        "LTX2HDRPipeline",
        "video",
        partial(videos.build_ltx_2, LTX2HDRPipeline),
        ltx_2_hdr_cases,
        note="its sound stays noise",
    ),
    Family(
        "LTX-2 DFR",
        "LTX2DFRPipeline",
        "video",
        lambda: videos.build_ltx_2(added("0.41", "LTX2DFRPipeline"), shift=1.0),
        ltx_2_dfr_cases,
    ),
]
