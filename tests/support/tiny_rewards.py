# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the rewards, in the layouts of the public files.

`golden` has what the references' own code says of the models with these configurations, and the scripts that ask it.
"""

import json
from pathlib import Path

import torch
from golden.make_hpsv3 import CHAT_TEMPLATE, CONFIG, SPECIAL, byte_vocabulary
from golden.make_imagereward import IMAGE_SIZE, TEXT, VISION, VOCABULARY
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BlipConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    SwinConfig,
)

from flowbp.rewards.blip import BLIP_LARGE
from flowbp.rewards.geneval import CLASSES

GOLDEN = Path(__file__).parent / "golden"

CLIP_CONFIG = CLIPConfig(
    projection_dim=12,
    text_config={
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "vocab_size": 55,
        "bos_token_id": 53,
        "eos_token_id": 54,
        "pad_token_id": 54,
        "hidden_act": "gelu",
        "projection_dim": 12,
    },
    vision_config={
        "hidden_size": 24,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 16,
        "patch_size": 4,
        "hidden_act": "gelu",
        "projection_dim": 12,
    },
)
HPS_FILE = "HPS_v2.1_compressed.pt"
HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"

# One entry per task, of the benchmark's form.
GENEVAL_METADATA = [
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
    {
        "tag": "two_object",
        "include": [{"class": "dog", "count": 1}, {"class": "tv remote", "count": 1}],
        "prompt": "a photo of a dog and a tv remote",
    },
    {
        "tag": "counting",
        "include": [{"class": "cat", "count": 3}],
        "exclude": [{"class": "cat", "count": 4}],
        "prompt": "a photo of three cats",
    },
    {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "pink"}], "prompt": "a photo of a pink car"},
    {
        "tag": "position",
        "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a dog left of a cat",
    },
    {
        "tag": "color_attr",
        "include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "bowl", "count": 1, "color": "green"}],
        "prompt": "a photo of a red cup and a green bowl",
    },
]


def save_clip_tokenizer(folder: Path) -> None:
    """The tokenizer for `CLIP_CONFIG`, which knows lower-case letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["!", *letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={text: place for place, text in enumerate(vocabulary)}, merges=[]).save_pretrained(folder)


def save_qwen_processor(folder: Path, config: dict[str, object]) -> None:
    """A configuration, a tokenizer and an image processor as repositories of Qwen2-VL's family have them."""
    tokenizer = Qwen2Tokenizer(vocab=byte_vocabulary(), merges=[])
    tokenizer.add_special_tokens({"extra_special_tokens": list(SPECIAL[1:])})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))


QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_heads": 2}
QWEN_VISION |= {"in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN_2_5_VL = {
    **CONFIG,
    "model_type": "qwen2_5_vl",
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "vision_config": {**QWEN_VISION, "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1]},
}


def save_qwen_vl(folder: Path, config: dict[str, object]) -> None:
    """A tiny model of Qwen2-VL's family with random weights."""
    save_qwen_processor(folder, config)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)


def tiny_blip_config() -> BlipConfig:
    """The sizes of the golden script over `BLIP_LARGE`, so that everything else in that is tested too."""
    vision = {
        "hidden_size": VISION["embed_dim"],
        "intermediate_size": 4 * VISION["embed_dim"],
        "num_hidden_layers": VISION["depth"],
        "num_attention_heads": VISION["num_heads"],
        "image_size": IMAGE_SIZE,
        "patch_size": VISION["patch_size"],
    }
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    text = {**{name: TEXT[name] for name in names}, "vocab_size": len(VOCABULARY) + 2}
    return BlipConfig(
        vision_config={**BLIP_LARGE["vision_config"], **vision}, text_config={**BLIP_LARGE["text_config"], **text}
    )


def tiny_detector() -> Mask2FormerForUniversalSegmentation:
    """GenEval's object detector."""
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "dim_feedforward": 16}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "encoder_feedforward_dim": 16}
    config = Mask2FormerConfig(
        backbone_config=backbone, num_queries=8, num_labels=len(CLASSES), init_xavier_std=3.0, **sizes, **layers
    )
    return Mask2FormerForUniversalSegmentation(config)


def tiny_clip() -> tuple[CLIPModel, CLIPTokenizer]:
    """GenEval's model of colors and its tokenizer, which knows printable ASCII characters."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    text = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 77, "vocab_size": len(words)}
    text |= {"hidden_size": 32, "intermediate_size": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    vision |= {"hidden_size": 32, "intermediate_size": 32}
    model = CLIPModel(CLIPConfig(projection_dim=8, text_config=text, vision_config=vision))
    return model, CLIPTokenizer(vocab={word: place for place, word in enumerate(words)}, merges=[])
