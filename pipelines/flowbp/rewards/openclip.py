# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""HPSv2.1, whose weights are those of an OpenCLIP model, on transformers' `CLIPModel`."""

import re
from collections.abc import Mapping
from pathlib import Path

from accelerate import init_empty_weights
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from .clip import CLIP_REPOSITORY, VOCABULARY, CLIPReward, clip_tokens
from .loading import (
    TOKENIZER_FILES,
    Source,
    find_files,
    load_checkpoint,
    load_weights,
)
from .preprocessing import pad, resize_long

# OpenCLIP's ViT-H-14. The weights do not tell the number of heads; the end token is that of CLIP's vocabulary.
VIT_H_14 = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    },
}

# OpenCLIP's name -> transformers' name.
_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
_LAYER_NAMES = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def convert_openclip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an OpenCLIP model with a vision transformer by the names, and in the layout, of `CLIPModel`.

    The projections are transposed, and the joint query-key-value matrices of attention are split in three. Names that
    are not OpenCLIP's are kept, and the loader rejects them.
    """
    converted: dict[str, Tensor] = {}
    for name, value in weights.items():
        layer = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", name)
        if layer is not None:
            visual, index, part, kind = layer.groups()
            prefix = f"{'vision' if visual else 'text'}_model.encoder.layers.{index}"
            if part == "attn.in_proj":
                for letter, third in zip("qkv", value.chunk(3), strict=True):
                    converted[f"{prefix}.self_attn.{letter}_proj.{kind}"] = third
            else:
                converted[f"{prefix}.{_LAYER_NAMES.get(part, part)}.{kind}"] = value
        else:
            transposed = name in ("text_projection", "visual.proj")
            converted[_NAMES.get(name, name)] = value.T if transposed else value
    return converted


def crop_long(images: Tensor, size: int) -> Tensor:
    """HPSv2's preprocessing: resize the longer side to `size`, pad the shorter one with black.

    Unlike the training code of FlowBP's authors, `resize` clamps what overshoots [0, 1], as Pillow does.
    """
    return pad(resize_long(images, size), size)


def hpsv2_1(model_path: Path | None = None, config: CLIPConfig | None = None) -> CLIPReward:
    """`hpsv2.1`: the cosine, without a logit scale, about 0.2 to 0.35 on the public weights (arXiv 2306.09341).

    Args:
        model_path: folder with `HPS_v2.1_compressed.pt` of `xswu/HPSv2`. The tokenizer, CLIP's own, is taken from
            there if it has one, else from the repository `openai/clip-vit-large-patch14`.
        config: of another OpenCLIP architecture than ViT-H-14.

    Raises:
        FileNotFoundError, ValueError: see `find_files`, `clip_tokens`, `load_checkpoint`, `load_weights`.
    """
    name = "HPS_v2.1_compressed.pt"
    source = Source("hpsv2.1", "xswu/HPSv2", (name,))
    folder = find_files(source, model_path)
    config = config if config is not None else CLIPConfig(**VIT_H_14)
    tokens = clip_tokens(Source("hpsv2.1", CLIP_REPOSITORY, VOCABULARY, TOKENIZER_FILES), folder, config)
    checkpoint = load_checkpoint(source, folder / name)
    weights = checkpoint.get("state_dict")
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(
            f"reward 'hpsv2.1': expected weights under state_dict in {folder / name}, got the keys "
            f"{', '.join(map(str, checkpoint))[:200]}; download it again from {source.page}."
        )
    with init_empty_weights():  # a billion random numbers would take longer than reading the file
        model = CLIPModel(config)
    load_weights(source, model, convert_openclip(weights))
    return CLIPReward(model, tokens, crop_long)
