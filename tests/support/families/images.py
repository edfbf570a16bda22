# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny models of further text-to-image pipelines: Lumina, AuraFlow, CogView4, Sana, and others."""

from typing import Any
from unittest.mock import patch

import numpy as np
import tokenizers
import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLHunyuanImage,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    Cosmos2TextToImagePipeline,
    CosmosTransformer3DModel,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    OmniGenPipeline,
    OmniGenTransformer2DModel,
    PRXPipeline,
    PRXPixelPipeline,
    PRXTransformer2DModel,
    SanaPAGPipeline,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusion3PAGPipeline,
)
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from diffusers.models.transformers.transformer_hunyuanimage import HunyuanImageByT5TextProjection
from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen
from tiny_sd3 import tiny_vae
from transformers import PreTrainedTokenizerFast

from .family import Case, Family, Part, embeddings, guidance_cases, pictures, tiny_model, tiny_pipeline
from .paper import reference_image, sd3_cases, sd3_parts, tiny_flux2_vae
from .videos import tiny_wan_vae


def prompts(features: int, masks: bool = False) -> dict[str, Any]:
    """Embeddings (2, 5, features) of two prompts; with masks, the second has three tokens."""
    arguments: dict[str, Any] = {"prompt_embeds": embeddings(2, 5, features)}
    if masks:
        arguments["prompt_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return arguments


def negatives(features: int, masks: bool = False) -> dict[str, Any]:
    """The negative prompts that go with `prompts`; with masks, the first has four tokens."""
    arguments: dict[str, Any] = {"negative_prompt_embeds": embeddings(2, 5, features, seed=2)}
    if masks:
        arguments["negative_prompt_attention_mask"] = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    return arguments


def build_lumina2() -> DiffusionPipeline:
    transformer = tiny_model(
        Lumina2Transformer2DModel,
        sample_size=4,
        patch_size=2,
        hidden_size=16,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(16, 16, 16),
        cap_feat_dim=16,
        out_channels=None,
    )
    return tiny_pipeline(Lumina2Pipeline, transformer=transformer, shift=6.0, vae=tiny_vae(4))


def lumina2_cases(pipe: DiffusionPipeline) -> list[Case]:
    plain = {**prompts(16, masks=True), "height": 32, "width": 32}
    guided = {**plain, **negatives(16, masks=True), "guidance_scale": 4.0}
    return [
        Case("no guidance", {**plain, "guidance_scale": 1.0}),
        Case("guidance", {**guided, "cfg_normalization": False}, Part(1)),
        Case("norm rescaling", guided, Part(1)),
        Case("truncated guidance", {**guided, "cfg_trunc_ratio": 0.4}, Part(1)),
    ]


def build_lumina() -> DiffusionPipeline:
    transformer = tiny_model(
        LuminaNextDiT2DModel,
        sample_size=4,
        patch_size=2,
        hidden_size=16,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=16,
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    return tiny_pipeline(LuminaPipeline, transformer=transformer, scheduler=scheduler, vae=tiny_vae(4))


def lumina_cases(pipe: DiffusionPipeline) -> list[Case]:
    plain = {**prompts(16, masks=True), "height": 32, "width": 48}
    guided = {**plain, **negatives(16, masks=True), "guidance_scale": 4.0}
    return [
        Case("no guidance", {**plain, "guidance_scale": 1.0}),
        # Guidance of this pipeline acts on three of the four latent channels.
        Case("guidance", guided, Part(0, "second half")),
        Case("time-dependent positions", {**guided, "scaling_watershed": 0.5}, Part(0, "second half")),
    ]


def build_aura_flow() -> DiffusionPipeline:
    transformer = tiny_model(
        AuraFlowTransformer2DModel,
        sample_size=4,
        patch_size=2,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    return tiny_pipeline(AuraFlowPipeline, transformer=transformer, shift=1.73, vae=tiny_vae(4))


def aura_flow_cases(pipe: DiffusionPipeline) -> list[Case]:
    plain = {**prompts(16, masks=True), "height": 8, "width": 8}
    guided = {**plain, **negatives(16, masks=True), "guidance_scale": 3.5}
    return [Case("no guidance", {**plain, "guidance_scale": 1.0}), Case("guidance", guided, Part(0, "first half"))]


def build_cogview4(pipeline: type[DiffusionPipeline] = CogView4Pipeline, in_channels: int = 4) -> DiffusionPipeline:
    config = {"in_channels": in_channels, "patch_size": 2, "text_embed_dim": 16, "time_embed_dim": 8}
    transformer = tiny_model(CogView4Transformer2DModel, **config, condition_dim=4)
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
    )
    return tiny_pipeline(pipeline, transformer=transformer, scheduler=scheduler, vae=tiny_vae(4))


def cogview4_cases(pipe: DiffusionPipeline) -> list[Case]:
    plain = {**prompts(16), "height": 16, "width": 16}
    return guidance_cases(plain, 5.0, Part(1), negatives(16))


SANA_SIZES = {
    "patch_size": 1,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 16,
    "sample_size": 32,
}


def sana_parts() -> dict[str, Any]:
    """Components that Sana's pipelines share."""
    transformer = tiny_model(SanaTransformer2DModel, **SANA_SIZES)
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 4,
        decoder_block_types=("ResBlock",) * 4,
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    return {
        "transformer": transformer,
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder": None,
        "tokenizer": None,
    }


def build_sana() -> DiffusionPipeline:
    return tiny_pipeline(SanaPipeline, **sana_parts())


def build_sana_dpm_solver() -> DiffusionPipeline:
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return tiny_pipeline(SanaPipeline, **{**sana_parts(), "scheduler": scheduler})


def sana_prompts() -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of Sana's pipelines without and with guidance."""
    plain = {**prompts(16, masks=True), "height": 32, "width": 32, "use_resolution_binning": False}
    return {**plain, "guidance_scale": 1.0}, {
        **plain,
        **negatives(16, masks=True),
        "negative_prompt": None,
        "guidance_scale": 4.5,
    }


def sana_cases(pipe: DiffusionPipeline) -> list[Case]:
    plain, guided = sana_prompts()
    return [Case("no guidance", plain), Case("guidance", guided, Part(0, "first half"))]


def sana_dpm_solver_cases(pipe: DiffusionPipeline) -> list[Case]:
    plain, _ = sana_prompts()
    return [Case("multistep solver", plain, refused="DPMSolverMultistepScheduler is not latents")]


def pag_cases(plain: dict[str, Any], guided: dict[str, Any]) -> list[Case]:
    """Of a pipeline with perturbed attention, given its arguments without guidance and with it."""
    two = "exactly one unconditional branch"
    return [
        Case("guidance", {**guided, "pag_scale": 0.0}, Part(0, "first half")),
        Case("perturbed attention", {**plain, "pag_scale": 3.0}, Part(0, "second half")),
        Case("perturbed attention and guidance", {**guided, "pag_scale": 3.0}, Part(0), unconditional_refused=two),
    ]


def build_sana_pag() -> DiffusionPipeline:
    return tiny_pipeline(SanaPAGPipeline, **sana_parts(), pag_applied_layers="transformer_blocks.0")


def sana_pag_cases(pipe: DiffusionPipeline) -> list[Case]:
    plain, guided = sana_prompts()
    return pag_cases(plain, guided)


def build_sd3_pag(pipeline: type[DiffusionPipeline] = StableDiffusion3PAGPipeline) -> DiffusionPipeline:
    return tiny_pipeline(pipeline, **sd3_parts(), pag_applied_layers="blocks.1")


def sd3_pag_cases(pipe: DiffusionPipeline) -> list[Case]:
    plain, guided, _ = (dict(case.arguments) for case in sd3_cases(pipe))
    return pag_cases(plain, guided)


def build_hidream(trains_experts: bool = True) -> DiffusionPipeline:
    transformer = tiny_model(
        HiDreamImageTransformer2DModel,
        patch_size=2,
        caption_channels=[16, 8],
        text_emb_dim=16,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(4, 4),
        llama_layers=(0, 1),
    )
    pipe = tiny_pipeline(HiDreamImagePipeline, shift=3.0, vae=tiny_vae(4), transformer=transformer)
    # The pipeline scales every size to this one.
    pipe.default_sample_size = 4
    # In evaluation mode diffusers runs the routed experts without gradients.
    for module in transformer.modules():
        if isinstance(module, MOEFeedForwardSwiGLU):
            module.train(trains_experts)
    return pipe


def hidream_cases(pipe: DiffusionPipeline) -> list[Case]:
    plain = {
        "prompt_embeds_t5": embeddings(2, 5, 16),
        "prompt_embeds_llama3": embeddings(2, 2, 5, 8, seed=1),
        "pooled_prompt_embeds": embeddings(2, 16, seed=2),
        "height": 8,
        "width": 8,
    }
    negative = {
        "negative_prompt_embeds_t5": embeddings(2, 5, 16, seed=3),
        "negative_prompt_embeds_llama3": embeddings(2, 2, 5, 8, seed=4),
        "negative_pooled_prompt_embeds": embeddings(2, 16, seed=5),
    }
    return guidance_cases(plain, 5.0, Part(0, "first half"), negative)


def build_hidream_evaluating() -> DiffusionPipeline:
    return build_hidream(trains_experts=False)


def hidream_evaluating_cases(pipe: DiffusionPipeline) -> list[Case]:
    guided = dict(hidream_cases(pipe)[1].arguments)
    return [Case("routed experts in evaluation mode", guided, refused="runs without gradients inside the transformer")]


def tiny_prx(**config: Any) -> PRXTransformer2DModel:
    sizes = {"patch_size": 2, "context_in_dim": 16, "hidden_size": 16, "num_heads": 2, "depth": 2, "axes_dim": [4, 4]}
    return PRXTransformer2DModel(**sizes, mlp_ratio=2.0, **config)


def build_prx() -> DiffusionPipeline:
    return tiny_pipeline(PRXPipeline, transformer=tiny_prx(in_channels=4), shift=3.0, vae=tiny_vae(4))


def prx_cases(pipe: DiffusionPipeline) -> list[Case]:
    plain = {**prompts(16, masks=True), "height": 8, "width": 8, "use_resolution_binning": False}
    guided = {**plain, **negatives(16, masks=True), "negative_prompt": None, "guidance_scale": 4.0}
    # With guidance the pipeline passes two timesteps whatever the batch, so it works for one prompt only.
    one = {name: value[1:] if isinstance(value, torch.Tensor) else value for name, value in guided.items()}
    return [Case("no guidance", {**plain, "guidance_scale": 1.0}), Case("guidance", one, Part(0, "first half"))]


def build_prx_pixel() -> DiffusionPipeline:
    transformer = tiny_prx(in_channels=3, bottleneck_size=8, resolution_embeds=True)
    return tiny_pipeline(PRXPixelPipeline, transformer=transformer, shift=3.0)


def build_ernie_image() -> DiffusionPipeline:
    transformer = tiny_model(
        ErnieImageTransformer2DModel,
        hidden_size=16,
        num_layers=2,
        ffn_hidden_size=32,
        text_in_dim=16,
        rope_axes_dim=(4, 2, 2),
    )
    return tiny_pipeline(ErnieImagePipeline, transformer=transformer, shift=3.0, vae=tiny_flux2_vae())


def ernie_image_cases(pipe: DiffusionPipeline) -> list[Case]:
    plain = {
        "prompt_embeds": [embeddings(5, 16), embeddings(3, 16, seed=1)],
        "height": 4 * pipe.vae_scale_factor,
        "width": 4 * pipe.vae_scale_factor,
    }
    negative = {"negative_prompt_embeds": [embeddings(4, 16, seed=2), embeddings(6, 16, seed=3)]}
    return guidance_cases(plain, 4.0, Part(0, "first half"), negative)


def build_glm_image() -> DiffusionPipeline:
    transformer = tiny_model(
        GlmImageTransformer2DModel,
        patch_size=2,
        num_layers=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=32,
    )
    vae = tiny_vae(4, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.8, 1.1, 0.9, 1.2])
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
    )
    return tiny_pipeline(GlmImagePipeline, transformer=transformer, scheduler=scheduler, vae=vae)


def glm_image_cases(pipe: DiffusionPipeline) -> list[Case]:
    tokens = torch.randint(0, 32, (2, 4), generator=torch.Generator().manual_seed(3))
    plain = {**prompts(16), "prior_token_ids": tokens, "height": 8, "width": 8}
    # A source image of two by two tokens for each sample.
    source = {
        "image": [[reference_image(seed, 8)] for seed in (4, 5)],
        "prior_token_image_ids": list(tokens),
        "source_image_grid_thw": [torch.tensor([[1, 2, 2]])] * 2,
    }
    return [
        *guidance_cases(plain, 3.0, Part(1), negatives(16)),
        Case("source image", {**plain, **source, "guidance_scale": 1.0}, refused="GlmImageKVCache"),
    ]


def hunyuan_image_guider(**options: Any) -> AdaptiveProjectedMixGuidance:
    """Plain guidance at every step, without momentum, unless the options say otherwise."""
    plain = {"guidance_scale": 3.5, "adaptive_projected_guidance_momentum": None}
    return AdaptiveProjectedMixGuidance(**{**plain, "adaptive_projected_guidance_start_step": 10, **options})


def hunyuan_image_projected_guider(momentum: float | None) -> AdaptiveProjectedMixGuidance:
    """Projected guidance with a norm threshold that binds, from the second step on."""
    return hunyuan_image_guider(
        adaptive_projected_guidance_scale=5.0,
        adaptive_projected_guidance_rescale=2.0,
        adaptive_projected_guidance_start_step=0,
        adaptive_projected_guidance_momentum=momentum,
    )


def build_hunyuan_image(**guiders: AdaptiveProjectedMixGuidance) -> DiffusionPipeline:
    """`guider` acts on prompts that ask for no letters in the picture, `ocr_guider` on the others.

    Without guiders this is the distilled model.
    """
    is_distilled = not guiders
    transformer = tiny_model(
        HunyuanImageTransformer2DModel,
        patch_size=(1, 1),
        guidance_embeds=is_distilled,
        use_meanflow=is_distilled,
        text_embed_dim=16,
        text_embed_2_dim=8,
        rope_axes_dim=(4, 4),
    )
    # The transformer's own has a fixed width of 2048, too large for a fast test.
    transformer.context_embedder_2 = HunyuanImageByT5TextProjection(8, 16, 16)
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        scaling_factor=0.75,
        spatial_compression_ratio=2,
        sample_size=8,
    )
    return tiny_pipeline(HunyuanImagePipeline, transformer=transformer, shift=3.0, vae=vae, **guiders)


def hunyuan_image_prompts() -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments for prompts that ask for no letters in the picture, and for prompts that do."""
    mask, mask_2 = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    plain = {
        "prompt_embeds": embeddings(2, 5, 16),
        "prompt_embeds_mask": mask,
        "prompt_embeds_2": torch.zeros(2, 3, 8, dtype=torch.float64),
        "prompt_embeds_mask_2": torch.zeros_like(mask_2),
        "negative_prompt_embeds": embeddings(2, 5, 16, seed=2),
        "negative_prompt_embeds_mask": mask.flip(0),
        "negative_prompt_embeds_2": torch.zeros(2, 3, 8, dtype=torch.float64),
        "negative_prompt_embeds_mask_2": torch.zeros_like(mask_2),
        "height": 8,
        "width": 8,
    }
    return plain, {**plain, "prompt_embeds_2": embeddings(2, 3, 8, seed=1), "prompt_embeds_mask_2": mask_2}


def build_hunyuan_image_guided() -> DiffusionPipeline:
    return build_hunyuan_image(
        guider=hunyuan_image_guider(), ocr_guider=hunyuan_image_guider(guidance_rescale=0.7, guidance_scale=2.0)
    )


def hunyuan_image_guided_cases(pipe: DiffusionPipeline) -> list[Case]:
    plain, letters = hunyuan_image_prompts()
    return [Case("guidance", plain, Part(1)), Case("rescaled guidance", letters, Part(1))]


def build_hunyuan_image_projected() -> DiffusionPipeline:
    return build_hunyuan_image(
        guider=hunyuan_image_projected_guider(momentum=None), ocr_guider=hunyuan_image_projected_guider(momentum=-0.5)
    )


def hunyuan_image_projected_cases(pipe: DiffusionPipeline) -> list[Case]:
    plain, letters = hunyuan_image_prompts()
    return [
        Case("projected guidance", plain, Part(1)),
        Case("projected guidance with momentum", letters, refused="guidance with memory"),
    ]


def hunyuan_image_distilled_cases(pipe: DiffusionPipeline) -> list[Case]:
    _, letters = hunyuan_image_prompts()
    return [Case("distilled guidance", {**letters, "distilled_guidance_scale": 3.25})]


class PermissiveChecker:
    """Stands for NVIDIA's guardrail models, a package of its own that diffusers only calls."""

    def to(self, device: Any) -> None:
        """Nothing to move."""

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray:
        return frames


def build_cosmos2(pipeline: type[DiffusionPipeline] = Cosmos2TextToImagePipeline, **config: int) -> DiffusionPipeline:
    transformer = tiny_model(
        CosmosTransformer3DModel,
        **config,
        attention_head_dim=16,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        concat_padding_mask=False,
        extra_pos_embed_type="learnable",
    )
    parts = {"text_encoder": None, "tokenizer": None, "vae": tiny_wan_vae(), "safety_checker": PermissiveChecker()}
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    # Its position embedding is normalised in float32.
    return tiny_pipeline(pipeline, transformer=transformer, scheduler=scheduler, **parts, dtype=torch.float32)


def cosmos2_cases(pipe: DiffusionPipeline) -> list[Case]:
    plain = {"prompt_embeds": embeddings(2, 5, 16, dtype=torch.float32), "height": 16, "width": 16}
    return [Case("no guidance", {**plain, "guidance_scale": 1.0}, refused="`sigmas` must")]


def omnigen_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows a few words; all others are one token."""
    words = ("<unk>", "<s>", "<pad>", "instructions", "red", "blue", "circle", "square", "<", ">", "|")
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


def build_omnigen() -> DiffusionPipeline:
    transformer = tiny_model(
        OmniGenTransformer2DModel,
        hidden_size=16,
        num_key_value_heads=2,
        intermediate_size=32,
        num_layers=2,
        time_step_dim=16,
        pad_token_id=2,
        vocab_size=16,
        pos_embed_max_size=8,
        rope_scaling={"long_factor": [1.0, 2.0, 3.0, 4.0], "short_factor": [1.0, 1.5, 2.0, 2.5]},
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=32,
        scaling_factor=0.75,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1)
    parts = {"transformer": transformer, "scheduler": scheduler, "vae": vae, "tokenizer": omnigen_tokenizer()}
    processor = processor_omnigen.OmniGenMultiModalProcessor
    # The pipeline prepares torchvision's transforms of input pictures even where there are none to transform.
    with (
        patch.object(processor_omnigen, "transforms", create=True),
        patch.object(pipeline_omnigen, "OmniGenMultiModalProcessor", processor, create=True),
    ):
        pipe = tiny_pipeline(OmniGenPipeline, **parts)
    collator = pipe.multimodal_processor.collator

    def collate(features: list[Any]) -> dict[str, Any]:
        # The transformer multiplies its mask by the lowest float64, which overflows in the stock float32.
        collated = collator(features)
        return {**collated, "attention_mask": collated["attention_mask"].double()}

    pipe.multimodal_processor.collator = collate
    # In place of torchvision's transforms.
    pipe.multimodal_processor.process_image = lambda image: pictures(seed=5, size=32)[0] * 2 - 1
    return pipe


def omnigen_cases(pipe: DiffusionPipeline) -> list[Case]:
    plain = {"prompt": ["red circle", "blue square red"], "height": 32, "width": 32}
    source = {
        "prompt": ["red <img><|image_1|></img>"],
        "input_images": [[reference_image(size=32)]],
        "height": 32,
        "width": 32,
    }
    return [
        Case("guidance", {**plain, "guidance_scale": 2.5}, Part(0, "second half")),
        # Its scales are 2.5 for the text and 1.6 for the picture.
        Case("source image", source, Part(0), unconditional_refused="needs exactly one unconditional branch"),
    ]


FAMILIES = [
    Family("Lumina-Image 2.0", "Lumina2Pipeline", "image", build_lumina2, lumina2_cases),
    Family("Lumina-Next", "LuminaPipeline", "image", build_lumina, lumina_cases),
    Family("AuraFlow", "AuraFlowPipeline", "image", build_aura_flow, aura_flow_cases),
    Family("CogView4", "CogView4Pipeline", "image", build_cogview4, cogview4_cases),
    Family("Sana", "SanaPipeline", "image", build_sana, sana_cases, "with the Euler scheduler"),
    Family(
        "Sana, DPM-Solver",
        "SanaPipeline",
        "image",
        build_sana_dpm_solver,
        sana_dpm_solver_cases,
        "its default scheduler takes steps of second order",
    ),
    Family("Sana PAG", "SanaPAGPipeline", "image", build_sana_pag, sana_pag_cases),
    Family("Stable Diffusion 3 PAG", "StableDiffusion3PAGPipeline", "image", build_sd3_pag, sd3_pag_cases),
    Family(
        "HiDream-I1",
        "HiDreamImagePipeline",
        "image",
        build_hidream,
        hidream_cases,
        "with its MoE modules in training mode",
    ),
    Family(
        "HiDream-I1, evaluation mode",
        "HiDreamImagePipeline",
        "image",
        build_hidream_evaluating,
        hidream_evaluating_cases,
        "its code runs the routed experts without gradients",
    ),
    Family("PRX", "PRXPipeline", "image", build_prx, prx_cases, "guidance takes one prompt at a time"),
    Family(
        "PRX Pixel", "PRXPixelPipeline", "image", build_prx_pixel, prx_cases, "no VAE; its pictures run from -1 to 1"
    ),
    Family("ERNIE-Image", "ErnieImagePipeline", "image", build_ernie_image, ernie_image_cases),
    Family("GLM-Image", "GlmImagePipeline", "image", build_glm_image, glm_image_cases),
    Family(
        "HunyuanImage-2.1", "HunyuanImagePipeline", "image", build_hunyuan_image_guided, hunyuan_image_guided_cases
    ),
    Family(
        "HunyuanImage-2.1, projected guidance",
        "HunyuanImagePipeline",
        "image",
        build_hunyuan_image_projected,
        hunyuan_image_projected_cases,
        "the default guider has momentum",
    ),
    Family(
        "HunyuanImage-2.1 distilled",
        "HunyuanImagePipeline",
        "image",
        build_hunyuan_image,
        hunyuan_image_distilled_cases,
    ),
    Family(
        "Cosmos-Predict2",
        "Cosmos2TextToImagePipeline",
        "image",
        build_cosmos2,
        cosmos2_cases,
        "sigmas from 80 to 0.002, and a safety check through numpy",
    ),
    Family("OmniGen", "OmniGenPipeline", "image", build_omnigen, omnigen_cases, "its sigmas rise"),
]
