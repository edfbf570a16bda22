# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny models of still more pipelines: Kandinsky 5, Ideogram 4, Nucleus, DreamLite, and videos."""

from functools import partial

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderTiny,
    Cosmos2_5_PredictBasePipeline,
    CosmosTransformer3DModel,
    DiffusionPipeline,
    DreamLiteMobilePipeline,
    DreamLitePipeline,
    DreamLiteUNetModel,
    FlowMatchEulerDiscreteScheduler,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    Kandinsky5T2IPipeline,
    LTXI2VLongMultiPromptPipeline,
    LTXPipeline,
    NucleusMoEImagePipeline,
    NucleusMoEImageTransformer2DModel,
)
from tiny_sd3 import tiny_vae
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLModel, T5Config, T5EncoderModel

from .family import Case, Family, Part, embeddings, guidance_cases, tiny_model, tiny_pipeline
from .images import PermissiveChecker
from .packed import TokenizerProcessor
from .paper import reference_image, tiny_flux2_vae
from .videos import build_ltx, kandinsky_5_prompts, tiny_kandinsky_5, tiny_wan_vae, wan_prompts


def build_kandinsky_5() -> DiffusionPipeline:
    pipe = tiny_kandinsky_5(Kandinsky5T2IPipeline, tiny_vae(4), shift=3.0, visual_cond=False)
    # Other sizes are replaced by the nearest of these.
    pipe.resolutions = [(48, 32)]
    return pipe


def kandinsky_5_cases(pipe: DiffusionPipeline) -> list[Case]:
    return guidance_cases({**kandinsky_5_prompts(), "height": 32, "width": 48}, 3.5, Part(1))


def byte_tokenizer() -> Qwen2Tokenizer:
    """Qwen's tokenizer with a token for each byte, and a chat template that adds nothing."""
    names = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={name: index for index, name in enumerate(names)}, merges=[])
    tokenizer.model_max_length = 512
    tokenizer.chat_template = "{{ messages[0]['content'][0]['text'] }}"
    return tokenizer


def tiny_qwen3_vl(width: int, layers: int) -> Qwen3VLModel:
    """A text encoder for `byte_tokenizer`."""
    text = {
        "vocab_size": 259,
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": width}
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0]}))


def tiny_ideogram_transformer() -> Ideogram4Transformer2DModel:
    return tiny_model(
        Ideogram4Transformer2DModel,
        intermediate_size=32,
        adaln_dim=16,
        # Thirteen layers of the text encoder, eight numbers each.
        llm_features_dim=104,
        rope_theta=10_000,
        mrope_section=(2, 1, 1),
    )


def build_ideogram() -> DiffusionPipeline:
    return tiny_pipeline(
        Ideogram4Pipeline,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_flux2_vae(),
        text_encoder=tiny_qwen3_vl(width=8, layers=36),
        tokenizer=byte_tokenizer(),
        transformer=tiny_ideogram_transformer(),
        unconditional_transformer=tiny_ideogram_transformer(),
    )


def ideogram_cases(pipe: DiffusionPipeline) -> list[Case]:
    prompts = {"prompt": ["a cat", "two dogs"], "height": 8, "width": 12, "max_sequence_length": 8}
    return [
        Case("guidance", {**prompts, "guidance_scale": 4.0, "guidance_schedule": None}, Part(1)),
        Case("guidance by step", {**prompts, "guidance_schedule": [7.0, 5.0, 3.0]}, Part(1)),
    ]


def build_nucleus() -> DiffusionPipeline:
    transformer = tiny_model(
        NucleusMoEImageTransformer2DModel,
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        dense_moe_strategy="leave_first_block_dense",
        num_experts=3,
        moe_intermediate_dim=16,
        capacity_factors=2.0,
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 1.2, 0.8, 1.0],
    )
    return tiny_pipeline(NucleusMoEImagePipeline, transformer=transformer, vae=vae)


def nucleus_cases(pipe: DiffusionPipeline) -> list[Case]:
    prompts = {
        "prompt_embeds": embeddings(2, 5, 16),
        "prompt_embeds_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "negative_prompt_embeds": embeddings(2, 5, 16, seed=1),
        "negative_prompt_embeds_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
        "height": 16,
        "width": 24,
    }
    return [
        Case("no guidance", {**prompts, "guidance_scale": 1.0}),
        Case("guidance, its norm kept", {**prompts, "guidance_scale": 4.0}, Part(1)),
    ]


def build_dream_lite(pipeline: type[DiffusionPipeline]) -> DiffusionPipeline:
    unet = DreamLiteUNetModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        block_out_channels=(8, 16),
        cross_attention_dim=8,
        attention_head_dim=8,
        layers_per_block=1,
        norm_num_groups=4,
        transformer_layers_per_block=1,
    )
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )
    return tiny_pipeline(
        pipeline,
        text_encoder=tiny_qwen3_vl(width=8, layers=2),
        tokenizer=byte_tokenizer(),
        processor=TokenizerProcessor(byte_tokenizer()),
        vae=vae,
        unet=unet,
    )


# Long enough for the prompt behind the template, at a token for each byte.
DREAM_LITE_PROMPT = {"prompt": "a cat", "height": 16, "width": 16, "max_sequence_length": 300}


def dream_lite_cases(pipe: DiffusionPipeline) -> list[Case]:
    # The pipeline makes one picture at a time.
    prompts = {**DREAM_LITE_PROMPT, "negative_prompt": "a dog"}
    # Above a guidance scale of 1.5 the branch with the picture alone counts against that with the text too.
    several = "needs exactly one unconditional branch"
    return [
        Case("guidance", {**prompts, "guidance_scale": 3.5}, Part(0, "first half")),
        Case("source image", {**prompts, "image": reference_image(size=16)}, Part(0), unconditional_refused=several),
    ]


def dream_lite_mobile_cases(pipe: DiffusionPipeline) -> list[Case]:
    return [
        Case("distilled", DREAM_LITE_PROMPT),
        Case("source image", {**DREAM_LITE_PROMPT, "image": reference_image(size=16)}),
    ]


def build_cosmos_25() -> DiffusionPipeline:
    transformer = tiny_model(
        CosmosTransformer3DModel,
        in_channels=5,
        attention_head_dim=16,
        mlp_ratio=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        # With masks the model needs torchvision, which nothing else here does.
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    )
    return tiny_pipeline(
        Cosmos2_5_PredictBasePipeline,
        transformer=transformer,
        vae=tiny_wan_vae(),
        shift=5.0,
        safety_checker=PermissiveChecker(),
    )


def cosmos_25_cases(pipe: DiffusionPipeline) -> list[Case]:
    prompts = wan_prompts()
    return guidance_cases(prompts, 4.0, Part(1), off=0.0)


def tiny_t5() -> T5EncoderModel:
    """A text encoder of width 32 for `byte_tokenizer`."""
    return T5EncoderModel(T5Config(vocab_size=259, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def build_ltx_long() -> DiffusionPipeline:
    components = build_ltx(LTXPipeline).components
    components |= {"text_encoder": tiny_t5(), "tokenizer": byte_tokenizer()}
    components["scheduler"] = FlowMatchEulerDiscreteScheduler()
    return tiny_pipeline(LTXI2VLongMultiPromptPipeline, **components)


def ltx_long_cases(pipe: DiffusionPipeline) -> list[Case]:
    # Six latent frames in windows of four.
    windows = {"num_frames": 21, "temporal_tile_size": 16, "temporal_overlap": 4}
    arguments = {"prompt": "a cat", "height": 32, "width": 32, "max_sequence_length": 8, **windows}
    return [Case("two windows", arguments, refused="second sampling loop")]


FAMILIES = [
    Family("Kandinsky 5 image", "Kandinsky5T2IPipeline", "image", build_kandinsky_5, kandinsky_5_cases),
    Family("Ideogram 4", "Ideogram4Pipeline", "image", build_ideogram, ideogram_cases),
    Family("Nucleus-Image", "NucleusMoEImagePipeline", "image", build_nucleus, nucleus_cases),
    Family(
        "DreamLite",
        "DreamLitePipeline",
        "image",
        partial(build_dream_lite, DreamLitePipeline),
        dream_lite_cases,
        note="its model is a UNet",
    ),
    Family(
        "DreamLite Mobile",
        "DreamLiteMobilePipeline",
        "image",
        partial(build_dream_lite, DreamLiteMobilePipeline),
        dream_lite_mobile_cases,
        note="its model is a UNet",
    ),
    Family(
        "Cosmos-Predict2.5",
        "Cosmos2_5_PredictBasePipeline",
        "video",
        build_cosmos_25,
        cosmos_25_cases,
        note="without its safety checker, which goes through numpy",
    ),
    Family(
        "LTX-Video, long",
        "LTXI2VLongMultiPromptPipeline",
        "video",
        build_ltx_long,
        ltx_long_cases,
        note="it samples window by window",
    ),
]
