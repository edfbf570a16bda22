# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""ImageReward, whose weights are those of a BLIP of its authors' own code, on transformers' BLIP modules."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipConfig, BlipTextModel, BlipVisionModel

from .clip import aesthetic_head, clip_pixels, crop_short, head_score
from .loading import (
    TOKENIZER_FILES,
    Source,
    find_files,
    find_tokenizer,
    load_checkpoint,
    load_pretrained,
    load_weights,
)
from .preprocessing import check_images
from .tokens import Tokens

# Raw scores are standardised by their mean and standard deviation on the authors' prompts, constants of
# `ImageReward/ImageReward.py` in the package image-reward 1.5.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35  # of a prompt, the first and last token included

# BLIP with ViT-L/16 at 224 pixels, and the BERT of the reference's `med_config.json`. The two encoders' layer norms
# have different epsilons, and neither is transformers' default.
BLIP_LARGE = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "vocab_size": 30524,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.0,  # 0.1 in the file; a reward is deterministic
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": 0,
        "is_decoder": True,  # transformers' word for layers with cross attention; no mask is causal
    },
}

# The reference's name -> ours, in the order in which they are tried; {} is the number of a layer.
_NAMES = (
    ("blip.visual_encoder.cls_token", "vision.embeddings.class_embedding"),
    ("blip.visual_encoder.pos_embed", "vision.embeddings.position_embedding"),
    ("blip.visual_encoder.patch_embed.proj", "vision.embeddings.patch_embedding"),
    ("blip.visual_encoder.blocks.{}.norm", "vision.encoder.layers.{}.layer_norm"),
    ("blip.visual_encoder.blocks.{}.attn.qkv", "vision.encoder.layers.{}.self_attn.qkv"),
    ("blip.visual_encoder.blocks.{}.attn.proj", "vision.encoder.layers.{}.self_attn.projection"),
    ("blip.visual_encoder.blocks.{}.mlp", "vision.encoder.layers.{}.mlp"),
    ("blip.visual_encoder.norm", "vision.post_layernorm"),
    ("blip.text_encoder", "text"),
)
# Dropout takes the places between in the reference's head.
_HEAD_PLACES = {0: 0, 2: 1, 4: 2, 6: 3, 7: 4}
# Tensors of the reference's file that its score does not use, and that have no place here.
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


def convert_imagereward(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the reference's `ImageReward` module by the names of `ImageReward` here; no tensor changes.

    Tensors that the score does not use are left out: two projections and BERT's list of positions. Names that are not
    the reference's are kept, and the loader rejects them.
    """
    return {_new_name(name): value for name, value in weights.items() if not name.startswith(_UNUSED)}


def _new_name(name: str) -> str:
    for old, new in _NAMES:
        match = re.match(re.escape(old).replace(r"\{\}", r"(\d+)"), name)
        if match is not None:
            return new.format(*match.groups()) + name[match.end() :]
    head = re.fullmatch(r"mlp\.layers\.(\d+)\.(weight|bias)", name)
    if head is not None and int(head[1]) in _HEAD_PLACES:
        return f"head.{_HEAD_PLACES[int(head[1])]}.{head[2]}"
    return name


class ImageReward(nn.Module):
    """`reward(images, prompts)`: ImageReward's preference score (Xu et al., arXiv 2304.05977), mostly within -2 to 2.

    The image goes through BLIP's vision transformer, the prompt through BERT, whose layers attend to the image; a
    stack of linear layers without activations reads the score off the first token. It is differentiable in the
    images, of any size. The weights are frozen, and a sample's score does not depend on its batch. Resizing and the
    head are at least float32. Prompts longer than `MAX_TOKENS` are truncated, with a warning.

    Args:
        config: of both encoders.
        tokens: BERT's, to a length of `MAX_TOKENS`.
    """

    def __init__(self, config: BlipConfig, tokens: Tokens) -> None:
        super().__init__()
        self.vision = BlipVisionModel(config.vision_config)
        self.text = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.head = aesthetic_head(config.text_config.hidden_size)
        self.tokens = tokens
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores images (B, 3, H, W) in [0, 1] against B prompts.

        Returns:
            (B,) in float32, or in float64 if the module was moved to float64.

        Raises:
            ValueError: images of another shape, not finite or out of range; a number of prompts other than B.
        """
        check_images(images, prompts)
        weight = self.vision.post_layernorm.weight
        input_ids, attention_mask = self.tokens(prompts, weight.device)
        pixels = clip_pixels(images, weight, self.vision.config.image_size, crop_short)
        patches = self.vision(pixel_values=pixels).last_hidden_state
        # No mask for the patches: a prompt attends to all of them.
        words = self.text(input_ids, attention_mask=attention_mask, encoder_hidden_states=patches).last_hidden_state
        score = head_score(self.head, words[:, 0].to(torch.promote_types(weight.dtype, torch.float32)))
        return (score - MEAN) / STD


def imagereward(model_path: Path | None = None, config: BlipConfig | None = None) -> ImageReward:
    """`imagereward`: ImageReward v1.0.

    The loader was tested on random weights in the layout of the reference's own modules (`tests/support/golden`), not
    on the public file, which this project's machines cannot download.

    Args:
        model_path: folder with `ImageReward.pt` of `THUDM/ImageReward`. The tokenizer is taken from there if it has
            one, else from the repository `google-bert/bert-base-uncased`, as the reference does.
        config: of a BLIP of another size than `BLIP_LARGE`.

    Raises:
        FileNotFoundError, ValueError: see `find_files`, `load_checkpoint`, `load_weights`, `load_pretrained`.
    """
    source = Source("imagereward", "THUDM/ImageReward", ("ImageReward.pt",))
    folder = find_files(source, model_path)
    vocabulary = Source("imagereward", "google-bert/bert-base-uncased", ("vocab.txt",), TOKENIZER_FILES)
    tokenizer = load_pretrained(vocabulary, BertTokenizer.from_pretrained, find_tokenizer(vocabulary, folder))
    # BLIP's two additional tokens.
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "extra_special_tokens": ["[ENC]"]})
    reward = ImageReward(
        config if config is not None else BlipConfig(**BLIP_LARGE), Tokens("imagereward", tokenizer, MAX_TOKENS)
    )
    weights = load_checkpoint(source, folder / "ImageReward.pt")
    load_weights(source, reward, convert_imagereward(weights))
    return reward
