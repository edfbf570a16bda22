# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the text-to-video pipelines."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMagvit,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    BaseGuidance,
    ClassifierFreeGuidance,
    DiffusionPipeline,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HeliosPipeline,
    HeliosTransformer3DModel,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    LayerSkipConfig,
    LTX2ConditionPipeline,
    LTX2InContextPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXConditionPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    SkipLayerGuidance,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

from .family import Case, Family, Part, added, embeddings, guidance_cases, ready, tiny_model, tiny_pipeline


def mask(*lengths: int, length: int = 5) -> torch.Tensor:
    """(B, length) ones for each prompt's first tokens, then zeros."""
    return (torch.arange(length) < torch.tensor(lengths)[:, None]).long()


# Of the transformers that are built like Wan's.
WAN_SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
}


def tiny_wan_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(patch_size=(1, 2, 2), num_layers=1, rope_max_seq_len=32, **WAN_SIZES)


def prompts(features: int, mask_dtype: torch.dtype = torch.long) -> dict[str, torch.Tensor]:
    """Embeddings (2, 5, features) of two prompts and two negative prompts, with masks."""
    return {
        "prompt_embeds": embeddings(2, 5, features),
        "prompt_attention_mask": mask(5, 4).to(mask_dtype),
        "negative_prompt_embeds": embeddings(2, 5, features, seed=1),
        "negative_prompt_attention_mask": mask(3, 5).to(mask_dtype),
    }


def tiny_wan_vae() -> AutoencoderKLWan:
    """A video autoencoder with 4 latent channels, a fourth of the frames and an eighth of the height and width."""
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 1.2, 0.8, 1.0],
    )


def build_wan(boundary_ratio: float | None = None, expand_timesteps: bool = False) -> DiffusionPipeline:
    return tiny_pipeline(
        WanPipeline,
        vae=tiny_wan_vae(),
        shift=7.0,
        transformer=tiny_wan_transformer(),
        transformer_2=None if boundary_ratio is None else tiny_wan_transformer(),
        boundary_ratio=boundary_ratio,
        expand_timesteps=expand_timesteps,
    )


def build_wan_22() -> DiffusionPipeline:
    # With this shift the first of three steps lies above the boundary, the other two below.
    return build_wan(boundary_ratio=0.9)


def wan_prompts() -> dict[str, object]:
    return {
        "prompt_embeds": embeddings(2, 5, 32),
        "negative_prompt_embeds": embeddings(2, 5, 32, seed=1),
        "height": 16,
        "width": 32,
        "num_frames": 5,
    }


def wan_cases(pipe: DiffusionPipeline) -> list[Case]:
    arguments = wan_prompts()
    return guidance_cases(arguments, 5.0, Part(1))


def wan_22_cases(pipe: DiffusionPipeline) -> list[Case]:
    arguments = wan_prompts()
    return [
        Case("no guidance", {**arguments, "guidance_scale": 1.0}),
        Case("guidance", {**arguments, "guidance_scale": 5.0, "guidance_scale_2": 3.0}, Part(1)),
    ]


def tiny_hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    """A video autoencoder with 4 latent channels, a fourth of the frames and an eighth of the height and width."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )


def build_hunyuan_video() -> DiffusionPipeline:
    transformer = tiny_model(
        HunyuanVideoTransformer3DModel,
        attention_head_dim=10,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    return tiny_pipeline(HunyuanVideoPipeline, transformer=transformer, vae=tiny_hunyuan_vae(), shift=7.0)


def hunyuan_video_cases(pipe: DiffusionPipeline) -> list[Case]:
    arguments = {
        "prompt_embeds": embeddings(2, 5, 16),
        "pooled_prompt_embeds": embeddings(2, 8, seed=1),
        "prompt_attention_mask": mask(5, 4),
        "guidance_scale": 6.0,
        "height": 16,
        "width": 16,
        "num_frames": 5,
    }
    negative = {
        "negative_prompt_embeds": embeddings(2, 5, 16, seed=2),
        "negative_pooled_prompt_embeds": embeddings(2, 8, seed=3),
        "negative_prompt_attention_mask": mask(3, 5),
        "true_cfg_scale": 4.0,
    }
    return [Case("distilled guidance", arguments), Case("true guidance", {**arguments, **negative}, Part(1))]


HUNYUAN_15_VAE = {"block_out_channels": (16, 16), "layers_per_block": 1}
HUNYUAN_15_VAE |= {"spatial_compression_ratio": 4, "temporal_compression_ratio": 2}
HUNYUAN_15_VAE |= {"downsample_match_channel": False, "upsample_match_channel": False}


def build_hunyuan_video_15(
    pipeline: type[DiffusionPipeline] = HunyuanVideo15Pipeline,
    encoder: dict[str, Any] | None = None,
    **guidance: float,
) -> DiffusionPipeline:
    transformer = tiny_model(
        HunyuanVideo15Transformer3DModel,
        in_channels=9,
        mlp_ratio=2.0,
        text_embed_dim=16,
        text_embed_2_dim=32,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v" if encoder is None else "i2v",
    )
    vae = AutoencoderKLHunyuanVideo15(latent_channels=4, **HUNYUAN_15_VAE)
    pipe = pipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
        guider=ClassifierFreeGuidance(**guidance),
        **(encoder or {}),
    )
    # Its attention takes one video at a time.
    vae.enable_slicing()
    # The tokens that stand for an image, all zero and masked for videos from text.
    pipe.vision_num_semantic_tokens = 2
    return ready(pipe)


def hunyuan_video_15_case(label: str, unconditional: Part | None = None) -> Callable[[DiffusionPipeline], list[Case]]:
    """This pipeline's guidance is a component of it, so each case has a pipeline of its own."""

    def cases(pipe: DiffusionPipeline) -> list[Case]:
        arguments = {
            "prompt_embeds": embeddings(2, 5, 16),
            "prompt_embeds_mask": mask(5, 4),
            "prompt_embeds_2": embeddings(2, 3, 32, seed=1),
            "prompt_embeds_mask_2": mask(3, 2, length=3),
            "negative_prompt_embeds": embeddings(2, 5, 16, seed=2),
            "negative_prompt_embeds_mask": mask(3, 5),
            "negative_prompt_embeds_2": embeddings(2, 3, 32, seed=3),
            "negative_prompt_embeds_mask_2": mask(1, 3, length=3),
            "height": 16,
            "width": 16,
            "num_frames": 5,
        }
        return [Case(label, arguments, unconditional)]

    return cases


def build_ltx(pipeline: type[DiffusionPipeline]) -> DiffusionPipeline:
    transformer = tiny_model(
        LTXVideoTransformer3DModel, in_channels=8, out_channels=8, cross_attention_dim=16, caption_channels=32
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    return tiny_pipeline(
        pipeline,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=pipeline is LTXPipeline),
        vae=vae,
        transformer=transformer,
    )


def ltx_cases(pipe: DiffusionPipeline) -> list[Case]:
    arguments = {**prompts(32), "height": 32, "width": 32, "num_frames": 5}
    guided = {**arguments, "guidance_scale": 3.0}
    return [
        Case("no guidance", {**arguments, "guidance_scale": 1.0}),
        Case("guidance", guided, Part(0, "first half")),
        Case("rescaled guidance", {**guided, "guidance_rescale": 0.7}, Part(0, "first half")),
    ]


def build_mochi() -> DiffusionPipeline:
    transformer = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    # The pipeline does not ask the autoencoder for its factors, so this one may keep the latents' size.
    vae = AutoencoderKLMochi(
        temporal_expansions=(1, 1, 1),
        spatial_expansions=(1, 1, 1),
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return tiny_pipeline(MochiPipeline, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=transformer)


def mochi_cases(pipe: DiffusionPipeline) -> list[Case]:
    arguments = {
        **prompts(32, torch.bool),
        "height": 16,
        "width": 32,
        "num_frames": 7,
        # The pipeline's schedule needs an even number.
        "num_inference_steps": 4,
    }
    return guidance_cases(arguments, 4.5, Part(0, "first half"))


def tiny_kandinsky_5(
    pipeline: type[DiffusionPipeline], vae: torch.nn.Module, shift: float, visual_cond: bool
) -> DiffusionPipeline:
    """Kandinsky 5 of videos or of images."""
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=32,
        in_text_dim2=16,
        time_dim=16,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(2, 2, 4),
        visual_cond=visual_cond,
    )
    pipe = tiny_pipeline(pipeline, shift=shift, transformer=transformer, vae=vae)
    # They get float32 numbers, whatever the model's dtype.
    pipe.transformer.time_embeddings.float()
    return pipe


def build_kandinsky_5() -> DiffusionPipeline:
    return tiny_kandinsky_5(Kandinsky5T2VPipeline, tiny_hunyuan_vae(), shift=7.0, visual_cond=True)


def kandinsky_5_prompts() -> dict[str, torch.Tensor]:
    return {
        "prompt_embeds_qwen": embeddings(2, 5, 32),
        "prompt_embeds_clip": embeddings(2, 16, seed=1),
        "prompt_cu_seqlens": torch.tensor([0, 5, 10]),
        "negative_prompt_embeds_qwen": embeddings(2, 4, 32, seed=2),
        "negative_prompt_embeds_clip": embeddings(2, 16, seed=3),
        "negative_prompt_cu_seqlens": torch.tensor([0, 4, 8]),
    }


def kandinsky_5_cases(pipe: DiffusionPipeline) -> list[Case]:
    return guidance_cases({**kandinsky_5_prompts(), "height": 16, "width": 32, "num_frames": 5}, 5.0, Part(1))


def build_easy_animate(pipeline: type[DiffusionPipeline] = EasyAnimatePipeline, **config: Any) -> DiffusionPipeline:
    transformer = tiny_model(
        EasyAnimateTransformer3DModel,
        **config,
        attention_head_dim=16,
        time_embed_dim=16,
        text_embed_dim=16,
        sample_width=16,
        sample_height=16,
        patch_size=2,
    )
    vae = AutoencoderKLMagvit(
        latent_channels=4,
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    return tiny_pipeline(pipeline, vae=vae, transformer=transformer)


def easy_animate_cases(pipe: DiffusionPipeline) -> list[Case]:
    arguments = {**prompts(16), "height": 16, "width": 32, "num_frames": 5}
    guided = {**arguments, "guidance_scale": 5.0}
    return [
        Case("no guidance", {**arguments, "guidance_scale": 1.0}),
        Case("guidance", guided, Part(0, "first half")),
        Case("rescaled guidance", {**guided, "guidance_rescale": 0.7}, Part(0, "first half")),
    ]


def build_sana_video(pipeline: type[DiffusionPipeline] = SanaVideoPipeline) -> DiffusionPipeline:
    transformer = tiny_model(
        SanaVideoTransformer3DModel,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=8,
        mlp_ratio=2.5,
        sample_size=8,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return tiny_pipeline(pipeline, vae=tiny_wan_vae(), transformer=transformer, shift=7.0)


def sana_video_cases(pipe: DiffusionPipeline) -> list[Case]:
    arguments = {
        "prompt_embeds": embeddings(2, 5, 8),
        "prompt_attention_mask": mask(5, 4),
        "negative_prompt": None,
        "negative_prompt_embeds": embeddings(2, 5, 8, seed=1),
        "negative_prompt_attention_mask": mask(3, 5),
        "height": 32,
        "width": 32,
        "frames": 5,
        "use_resolution_binning": False,
    }
    return guidance_cases(arguments, 6.0, Part(0, "first half"))


def build_ltx_2(pipeline: type[DiffusionPipeline], shift: float | None = None) -> DiffusionPipeline:
    transformer = tiny_model(
        LTX2VideoTransformer3DModel,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        caption_channels=16,
        rope_double_precision=False,
        rope_type="split",
    )
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=2,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
    )
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
    )
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=8,
        upsample_kernel_sizes=[4],
        upsample_factors=[2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1]],
    )
    return tiny_pipeline(
        pipeline,
        shift=shift,
        vae=vae,
        audio_vae=audio_vae,
        connectors=connectors,
        transformer=transformer,
        vocoder=vocoder,
    )


def ltx_2_cases(pipe: DiffusionPipeline) -> list[Case]:
    arguments = {**prompts(32), "height": 32, "width": 32, "num_frames": 3, "spatio_temporal_guidance_blocks": [0]}
    off = {"guidance_scale": 1.0, "audio_guidance_scale": 1.0, "stg_scale": 0.0, "audio_stg_scale": 0.0}
    off |= {"modality_scale": 1.0, "audio_modality_scale": 1.0, "guidance_rescale": 0.0, "audio_guidance_rescale": 0.0}
    return [
        Case("no guidance", {**arguments, **off}, refused="other than through the latents"),
        Case("all guidance", arguments, refused="other than through the latents"),
    ]


def build_motif(guider: BaseGuidance, pipeline: type[DiffusionPipeline] = MotifVideoPipeline) -> DiffusionPipeline:
    transformer = tiny_model(
        MotifVideoTransformer3DModel,
        in_channels=9,
        attention_head_dim=12,
        patch_size=1,
        text_embed_dim=32,
        rope_axes_dim=(4, 4, 4),
    )
    for module in transformer.modules():
        # They get float32 numbers, whatever the model's dtype.
        if isinstance(module, TimestepEmbedding):
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.linear_1.weight.dtype),))
    return tiny_pipeline(pipeline, shift=7.0, vae=tiny_wan_vae(), transformer=transformer, guider=guider)


def motif_case(
    label: str, unconditional: Part | None = None, refused: str | None = None
) -> Callable[[DiffusionPipeline], list[Case]]:
    """As with HunyuanVideo 1.5, the guidance is a component."""

    def cases(pipe: DiffusionPipeline) -> list[Case]:
        arguments = {**prompts(32, torch.bool), "height": 16, "width": 32, "num_frames": 5}
        return [Case(label, arguments, unconditional, refused)]

    return cases


def build_helios(pipeline: type[DiffusionPipeline] = HeliosPipeline, **components: Any) -> DiffusionPipeline:
    transformer = HeliosTransformer3DModel(
        **WAN_SIZES,
        num_layers=1,
        rope_dim=(4, 4, 4),
        has_multi_term_memory_patch=True,
        guidance_cross_attn=True,
        zero_history_timestep=True,
        is_amplify_history=False,
    )
    return tiny_pipeline(pipeline, vae=tiny_wan_vae(), transformer=transformer, **components)


def helios_cases(pipe: DiffusionPipeline) -> list[Case]:
    arguments = {
        "prompt_embeds": embeddings(2, 5, 32),
        "negative_prompt_embeds": embeddings(2, 5, 32, seed=1),
        "height": 16,
        "width": 16,
        "num_frames": 5,
        "num_latent_frames_per_chunk": 2,
        "history_sizes": [4, 2, 1],
    }
    return [
        Case("no guidance", {**arguments, "guidance_scale": 1.0}),
        Case("guidance", {**arguments, "guidance_scale": 5.0}, Part(1)),
        Case("two chunks", {**arguments, "guidance_scale": 5.0, "num_frames": 10}, refused="second sampling loop"),
    ]


def build_wan_vace() -> DiffusionPipeline:
    transformer = WanVACETransformer3DModel(
        **WAN_SIZES,
        num_layers=2,
        rope_max_seq_len=32,
        vace_layers=[0],
        # Two sets of latents and an eighth by an eighth of the mask.
        vace_in_channels=72,
    )
    return tiny_pipeline(WanVACEPipeline, vae=tiny_wan_vae(), shift=7.0, transformer=transformer)


def wan_vace_cases(pipe: DiffusionPipeline) -> list[Case]:
    arguments = {
        # The pipeline makes one video at a time.
        "prompt_embeds": embeddings(1, 5, 32),
        "negative_prompt_embeds": embeddings(1, 5, 32, seed=1),
        "height": 16,
        "width": 32,
        "num_frames": 5,
    }
    return guidance_cases(arguments, 5.0, Part(1))


def build_skyreels() -> DiffusionPipeline:
    transformer = SkyReelsV2Transformer3DModel(num_layers=1, rope_max_seq_len=32, **WAN_SIZES)
    return tiny_pipeline(SkyReelsV2Pipeline, transformer=transformer, vae=tiny_wan_vae(), shift=8.0)


def ltx_condition_cases(pipe: DiffusionPipeline) -> list[Case]:
    cases = ltx_cases(pipe)

    def given(label: str, strength: float = 1.0, noise: float = 0.0, refused: str | None = None) -> Case:
        frame = embeddings(1, 3, 32, 32).sigmoid()
        arguments = {
            **cases[1].arguments,
            "conditions": [LTXVideoCondition(image=frame, frame_index=0, strength=strength)],
            "image_cond_noise_scale": noise,
        }
        return Case(label, arguments, cases[1].unconditional, refused)

    return [
        *cases,
        given("first frame given"),
        given("first frame given in part", strength=0.5, refused="moves tokens by other lengths"),
        given("first frame given with noise", noise=0.15, refused="without noise on what is given"),
    ]


def build_kandinsky_6(**config: int) -> DiffusionPipeline:
    transformer = added("0.42", "Kandinsky6Transformer3DModel")(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=32,
        in_text_dim2=16,
        time_dim=16,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(2, 2, 4),
        in_audio_dim=4,
        out_audio_dim=4,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
        **config,
    )
    return tiny_pipeline(
        added("0.42", "Kandinsky6TI2VAPipeline"),
        shift=7.0,
        transformer=transformer,
        vae=tiny_hunyuan_vae(),
        audio_vae=added("0.42", "MMAudioVAE")(
            mel_bins=8, latent_channels=4, hidden_channels=8, n_fft=64, hop_length=2048
        ),
        vocoder=added("0.42", "MMAudioVocoder")(num_mels=8, upsample_initial_channel=64),
    )


def kandinsky_6_cases(pipe: DiffusionPipeline) -> list[Case]:
    arguments = {
        "prompt_embeds": embeddings(2, 5, 32),
        "pooled_prompt_embeds": embeddings(2, 16, seed=1),
        "negative_prompt_embeds": embeddings(2, 5, 32, seed=2),
        "negative_pooled_prompt_embeds": embeddings(2, 16, seed=3),
        "height": 16,
        "width": 32,
        "num_frames": 5,
    }
    silent = {**arguments, "sample_audio": False}
    return [
        Case("no guidance, no sound", {**silent, "guidance_scale": 1.0}),
        Case("guidance, no sound", {**silent, "guidance_scale": 5.0}, Part(1)),
        Case("sound", {**arguments, "guidance_scale": 5.0}, refused="other than through the latents"),
    ]


FAMILIES = [
    Family("Wan 2.1", "WanPipeline", "video", build_wan, wan_cases),
    Family("Wan 2.2", "WanPipeline", "video", build_wan_22, wan_22_cases),
    Family("Wan 2.2 5B", "WanPipeline", "video", partial(build_wan, expand_timesteps=True), wan_cases),
    Family("HunyuanVideo", "HunyuanVideoPipeline", "video", build_hunyuan_video, hunyuan_video_cases),
    *(
        Family(name, "HunyuanVideo15Pipeline", "video", partial(build_hunyuan_video_15, **guidance), case)
        for name, guidance, case in (
            ("HunyuanVideo 1.5 without guidance", {"guidance_scale": 1.0}, hunyuan_video_15_case("no guidance")),
            ("HunyuanVideo 1.5", {"guidance_scale": 6.0}, hunyuan_video_15_case("guidance", Part(1))),
            (
                "HunyuanVideo 1.5, rescaled",
                {"guidance_scale": 6.0, "guidance_rescale": 0.7, "stop": 0.7},
                hunyuan_video_15_case("rescaled guidance, off for the last steps", Part(1)),
            ),
        )
    ),
    Family("LTX-Video", "LTXPipeline", "video", partial(build_ltx, LTXPipeline), ltx_cases),
    Family("Mochi", "MochiPipeline", "video", build_mochi, mochi_cases),
    Family("Kandinsky 5 video", "Kandinsky5T2VPipeline", "video", build_kandinsky_5, kandinsky_5_cases),
    Family("EasyAnimate", "EasyAnimatePipeline", "video", build_easy_animate, easy_animate_cases),
    Family("Sana-Video", "SanaVideoPipeline", "video", build_sana_video, sana_video_cases),
    Family(
        "LTX-2",
        "LTX2Pipeline",
        "video",
        partial(build_ltx_2, LTX2Pipeline),
        ltx_2_cases,
        note="sound is sampled along with the video, each depends on the other",
    ),
    Family(
        "LTX-2 with conditions",
        "LTX2ConditionPipeline",
        "video",
        partial(build_ltx_2, LTX2ConditionPipeline),
        ltx_2_cases,
        note="as LTX-2",
    ),
    Family(
        "LTX-2 in context",
        "LTX2InContextPipeline",
        "video",
        partial(build_ltx_2, LTX2InContextPipeline),
        ltx_2_cases,
        note="as LTX-2",
    ),
    Family(
        "Motif-Video without guidance",
        "MotifVideoPipeline",
        "video",
        lambda: build_motif(ClassifierFreeGuidance(guidance_scale=1.0)),
        motif_case("no guidance"),
    ),
    Family(
        "Motif-Video",
        "MotifVideoPipeline",
        "video",
        # The difference of the branches is longer than 0.4, so it is cut to that.
        lambda: build_motif(AdaptiveProjectedGuidance(guidance_scale=6.0, adaptive_projected_guidance_rescale=0.4)),
        motif_case("projected guidance", Part(1)),
    ),
    Family(
        "Motif-Video with momentum",
        "MotifVideoPipeline",
        "video",
        lambda: build_motif(AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.5)),
        motif_case("projected guidance with momentum", refused="guidance with memory"),
    ),
    Family(
        "Motif-Video with skipped layers",
        "MotifVideoPipeline",
        "video",
        lambda: build_motif(
            SkipLayerGuidance(
                skip_layer_config=LayerSkipConfig(indices=[0], fqn="transformer_blocks"),
                skip_layer_guidance_start=0.0,
                skip_layer_guidance_stop=1.0,
            )
        ),
        motif_case("skip-layer guidance"),
    ),
    Family("Helios", "HeliosPipeline", "video", build_helios, helios_cases),
    Family("Wan VACE", "WanVACEPipeline", "video", build_wan_vace, wan_vace_cases),
    Family("SkyReels-V2", "SkyReelsV2Pipeline", "video", build_skyreels, wan_cases),
    Family(
        "LTX-Video with conditions",
        "LTXConditionPipeline",
        "video",
        partial(build_ltx, LTXConditionPipeline),
        ltx_condition_cases,
    ),
    Family(
        "Kandinsky 6",
        "Kandinsky6TI2VAPipeline",
        "video",
        build_kandinsky_6,
        kandinsky_6_cases,
        note="with sound as LTX-2",
    ),
]
