# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Image pipelines whose transformers take sequences of packed latents: Qwen-Image and those built like it or FLUX."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    BriaPipeline,
    BriaTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImageOmniPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_sd3 import tiny_vae
from tokenizers import pre_tokenizers
from transformers import (
    BatchFeature,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from .family import Case, Family, Part, added, embeddings, guidance_cases, tiny_model, tiny_pipeline
from .paper import tiny_flux2_vae

PADDED = torch.tensor([[True, True, True, True, True], [True, True, True, False, False]])
"""Attention mask of two prompts of 5 and 3 tokens."""


# Of the autoencoders that are built like Qwen-Image's.
VAE_SIZES = {
    "z_dim": 4,
    "dim_mult": [1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False],
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.2, 0.8, 1.0, 0.9],
}


def tiny_qwen_vae(**config: Any) -> AutoencoderKLQwenImage:
    """The autoencoder of Qwen-Image with four latent channels and pictures twice as large as its latents."""
    return AutoencoderKLQwenImage(base_dim=8, **VAE_SIZES | config)


QWEN_SIZES = {"in_channels": 16, "attention_head_dim": 16, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6)}


def build_qwen_image(
    pipeline: type[DiffusionPipeline] = QwenImagePipeline, config: Mapping[str, Any] | None = None, **parts: Any
) -> DiffusionPipeline:
    """Qwen-Image, or another pipeline of its models.

    Args:
        pipeline: the class.
        config: what its transformer has otherwise.
        parts: other components.
    """
    transformer = tiny_model(QwenImageTransformer2DModel, **QWEN_SIZES | (config or {}))
    return tiny_pipeline(pipeline, **{"vae": tiny_qwen_vae(), "transformer": transformer, **parts})


def qwen_image_cases(pipe: DiffusionPipeline) -> list[Case]:
    prompts = {"prompt_embeds": embeddings(2, 5, 32), "prompt_embeds_mask": PADDED, "height": 8, "width": 8}
    negative = {
        "negative_prompt_embeds": embeddings(2, 5, 32, seed=2),
        "negative_prompt_embeds_mask": PADDED,
        "true_cfg_scale": 4.0,
    }
    return [
        Case("no guidance", {**prompts, "true_cfg_scale": 1.0}),
        Case("guidance rescaled to the conditional norm", {**prompts, **negative}, Part(1)),
    ]


class TokenizerProcessor(ProcessorMixin):
    """A processor of text, which leaves pictures out. Qwen3-VL's own exists only with torchvision."""

    def __init__(self, tokenizer: Qwen2Tokenizer | None = None, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(self, text: str | list[str], images: Any = None, **options: Any) -> BatchFeature:
        """Tokenize texts, always as a batch, as Qwen3-VL's processor does."""
        return super().__call__(text=[text] if isinstance(text, str) else text, **options)


def byte_tokenizer(*marks: str) -> Qwen2Tokenizer:
    """A Qwen tokenizer whose tokens are the bytes, the marks of its chat template, and these."""
    words = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|image_pad|>", *marks]}
    )
    return tokenizer


def build_qwen_image_21() -> DiffusionPipeline:
    transformer = tiny_model(
        added("0.41", "QwenImage21Transformer2DModel"),
        num_layers=2,
        attention_head_dim=16,
        context_in_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    vae = added("0.41", "AutoencoderKLQwenImage21")(base_dim=8, decoder_base_dim=8, **VAE_SIZES)
    template = "{% for message in messages %}{{ message['content'][0]['text'] }}{% endfor %}"
    return tiny_pipeline(
        added("0.41", "QwenImage21Pipeline"),
        vae=vae,
        processor=TokenizerProcessor(byte_tokenizer(), chat_template=template),
        transformer=transformer,
    )


def qwen_image_21_cases(pipe: DiffusionPipeline) -> list[Case]:
    prompts = {
        "prompt_embeds": embeddings(2, 5, 32),
        "prompt_embeds_mask": PADDED,
        "height": 64,
        "width": 64,
        "true_cfg_scale": 1.0,
        "use_kv_cache": False,
    }
    negative = {
        "negative_prompt_embeds": embeddings(2, 5, 32, seed=2),
        "negative_prompt_embeds_mask": PADDED,
        "true_cfg_scale": 4.0,
    }
    return [
        Case("no guidance", prompts),
        Case("guidance", {**prompts, **negative}, Part(1)),
        Case("cached text", {**prompts, "use_kv_cache": True}),
        Case("cached text, guidance", {**prompts, **negative, "use_kv_cache": True}, Part(1)),
    ]


def build_chroma(pipeline: type[DiffusionPipeline] = ChromaPipeline) -> DiffusionPipeline:
    transformer = tiny_model(
        ChromaTransformer2DModel,
        in_channels=16,
        attention_head_dim=16,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
        out_channels=None,
    )
    return tiny_pipeline(pipeline, vae=tiny_vae(4), transformer=transformer)


def chroma_cases(pipe: DiffusionPipeline) -> list[Case]:
    prompts = {"prompt_embeds": embeddings(2, 5, 32), "prompt_attention_mask": PADDED, "height": 8, "width": 8}
    negative = {"negative_prompt_embeds": embeddings(2, 5, 32, seed=2), "negative_prompt_attention_mask": PADDED}
    return guidance_cases(prompts, 4.0, Part(1), negative)


def build_ovis_image() -> DiffusionPipeline:
    transformer = tiny_model(
        OvisImageTransformer2DModel,
        in_channels=16,
        out_channels=16,
        attention_head_dim=16,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return tiny_pipeline(OvisImagePipeline, vae=tiny_vae(4), transformer=transformer)


def ovis_image_cases(pipe: DiffusionPipeline) -> list[Case]:
    prompts = {"prompt_embeds": embeddings(2, 5, 32), "height": 8, "width": 8}
    # The default negative prompt is a text, which may not come together with embeddings.
    negative = {"negative_prompt": None, "negative_prompt_embeds": embeddings(2, 5, 32, seed=2)}
    return guidance_cases(prompts, 4.0, Part(1), negative)


def build_krea2() -> DiffusionPipeline:
    transformer = tiny_model(
        Krea2Transformer2DModel,
        in_channels=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    return tiny_pipeline(
        Krea2Pipeline, vae=tiny_qwen_vae(), transformer=transformer, text_encoder_select_layers=(0, 1, 2)
    )


def krea2_cases(pipe: DiffusionPipeline) -> list[Case]:
    prompts = {"prompt_embeds": embeddings(2, 5, 3, 16), "prompt_embeds_mask": PADDED, "height": 8, "width": 8}
    negative = {"negative_prompt_embeds": embeddings(2, 5, 3, 16, seed=2), "negative_prompt_embeds_mask": PADDED}
    return guidance_cases(prompts, 3.0, Part(1), negative, off=0.0)


def tiny_qwen25_vl(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A text encoder of width 16."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=image)
    return Qwen2_5_VLForConditionalGeneration(config)


def build_longcat_image(pipeline: type[DiffusionPipeline] = LongCatImagePipeline, **parts: Any) -> DiffusionPipeline:
    transformer = tiny_model(
        LongCatImageTransformer2DModel,
        in_channels=64,
        attention_head_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 4, 8],
    )
    tokenizer = byte_tokenizer("<|vision_start|>")
    pipe = tiny_pipeline(
        pipeline,
        vae=tiny_vae(16),
        text_encoder=tiny_qwen25_vl(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
        **parts,
    )
    # Prompts are padded to this many tokens; there is no argument for it.
    pipe.tokenizer_max_length = 8
    return pipe


def longcat_image_cases(pipe: DiffusionPipeline) -> list[Case]:
    prompts = {
        "prompt": ["a red", "two cats"],
        "negative_prompt": ["blur", "grey"],
        "height": 8,
        "width": 8,
        "guidance_scale": 4.5,
        "enable_prompt_rewrite": False,
    }
    return [
        Case("no guidance", {**prompts, "guidance_scale": 1.0}),
        Case("guidance", {**prompts, "enable_cfg_renorm": False}, Part(1)),
        Case("guidance rescaled to the conditional norm", prompts, Part(1)),
        Case("guidance rescaled within a range", {**prompts, "cfg_renorm_min": 0.85}, Part(1)),
    ]


def build_bria() -> DiffusionPipeline:
    transformer = tiny_model(
        BriaTransformer2DModel, in_channels=16, attention_head_dim=16, joint_attention_dim=32, axes_dims_rope=[4, 4, 8]
    )
    return tiny_pipeline(BriaPipeline, transformer=transformer, vae=tiny_vae(4))


def bria_cases(pipe: DiffusionPipeline) -> list[Case]:
    prompts = {"prompt_embeds": embeddings(2, 5, 32), "height": 8, "width": 8}
    guidance = {"negative_prompt_embeds": embeddings(2, 5, 32, seed=2), "guidance_scale": 5.0}
    return [
        Case("no guidance", {**prompts, "guidance_scale": 1.0}),
        Case("guidance", {**prompts, **guidance}, Part(0, "first half")),
        Case("normalized guidance", {**prompts, **guidance, "normalize": True}, Part(0, "first half")),
        Case("clipped guidance", {**prompts, **guidance, "clip_value": 2.0}, Part(0, "first half")),
    ]


def build_bria_fibo(pipeline: type[DiffusionPipeline] = BriaFiboPipeline) -> DiffusionPipeline:
    tokenizer = byte_tokenizer()
    text = SmolLM3Config(
        # The pipeline takes token 128000 for empty prompts, which the cases leave out.
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformer = tiny_model(
        BriaFiboTransformer2DModel,
        attention_head_dim=16,
        joint_attention_dim=32,
        text_encoder_dim=16,
        axes_dims_rope=[4, 4, 8],
    )
    vae = AutoencoderKLWan(base_dim=8, **VAE_SIZES)
    return tiny_pipeline(
        pipeline, transformer=transformer, vae=vae, text_encoder=SmolLM3ForCausalLM(text), tokenizer=tokenizer
    )


def bria_fibo_cases(pipe: DiffusionPipeline) -> list[Case]:
    prompts = {
        "prompt": ["a red", "two cats"],
        "negative_prompt": ["blur", "grey"],
        "height": 64,
        "width": 64,
        "guidance_scale": 5.0,
    }
    return [Case("no guidance", {**prompts, "guidance_scale": 1.0}), Case("guidance", prompts, Part(0, "first half"))]


def build_bria_fibo2() -> DiffusionPipeline:
    transformer = added("0.42", "BriaFibo2Transformer2DModel")(
        in_channels=1,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=32,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=2,
        max_num_gist_tokens=4,
        gist_step=1,
        gist_min_text_len=2,
        gist_max_text_len=6,
        axes_dims=(4, 6, 6),
        axes_lens=(16, 16, 16),
    )
    return tiny_pipeline(added("0.42", "BriaFibo2Pipeline"), transformer=transformer, vae=tiny_flux2_vae())


def bria_fibo2_cases(pipe: DiffusionPipeline) -> list[Case]:
    prompts = {"prompt_embeds": embeddings(2, 2, 5, 32), "prompt_embeds_mask": PADDED, "height": 16, "width": 16}
    negative = {"negative_prompt_embeds": embeddings(2, 2, 5, 32, seed=2), "negative_prompt_embeds_mask": PADDED}
    return guidance_cases(prompts, 5.0, Part(1), negative)


def tiny_z_image_parts() -> dict[str, Any]:
    """Z-Image's components, the tokens of whose pictures and prompts are padded to 32 each."""
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[128, 8, 8],
    )
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": tiny_vae(4),
        "text_encoder": None,
        "tokenizer": None,
        "transformer": transformer,
    }


def build_z_image(pipeline: type[DiffusionPipeline] = ZImagePipeline, **parts: Any) -> DiffusionPipeline:
    return tiny_pipeline(pipeline, **tiny_z_image_parts(), **parts)


def z_image_cases(pipe: DiffusionPipeline) -> list[Case]:
    prompts = [embeddings(5, 32), embeddings(3, 32, seed=1)]
    negative = [embeddings(4, 32, seed=2), embeddings(5, 32, seed=3)]
    if isinstance(pipe, ZImageOmniPipeline):
        # Texts stand before, between and after pictures; with no picture there is one.
        prompts, negative = [[text] for text in prompts], [[text] for text in negative]
    size = {"height": 8, "width": 8}
    guidance = {**size, "prompt_embeds": prompts, "negative_prompt_embeds": negative, "guidance_scale": 4.0}
    unconditional = Part(0, "second half")
    return [
        Case("no guidance", {**size, "prompt_embeds": prompts, "guidance_scale": 0.0}),
        Case("guidance", guidance, unconditional),
        Case("guidance with a bounded norm", {**guidance, "cfg_normalization": True}, unconditional),
        Case(
            "guidance switched off for late steps", {**guidance, "cfg_truncation": 0.3}, Part(0, "second half", size=4)
        ),
    ]


FAMILIES = [
    Family("Qwen-Image", "QwenImagePipeline", "image", build_qwen_image, qwen_image_cases),
    Family(
        "Qwen-Image 2.1",
        "QwenImage21Pipeline",
        "image",
        build_qwen_image_21,
        qwen_image_21_cases,
    ),
    Family("Chroma", "ChromaPipeline", "image", build_chroma, chroma_cases),
    Family("Ovis-Image", "OvisImagePipeline", "image", build_ovis_image, ovis_image_cases),
    Family("Krea 2", "Krea2Pipeline", "image", build_krea2, krea2_cases),
    Family("LongCat-Image", "LongCatImagePipeline", "image", build_longcat_image, longcat_image_cases),
    Family("Bria", "BriaPipeline", "image", build_bria, bria_cases),
    Family("Bria FIBO", "BriaFiboPipeline", "image", build_bria_fibo, bria_fibo_cases),
    Family("Bria FIBO 2", "BriaFibo2Pipeline", "image", build_bria_fibo2, bria_fibo2_cases),
    Family("Z-Image", "ZImagePipeline", "image", build_z_image, z_image_cases),
    Family(
        "Z-Image-Omni",
        "ZImageOmniPipeline",
        "image",
        partial(build_z_image, ZImageOmniPipeline),
        z_image_cases,
        "as text to image",
    ),
]
