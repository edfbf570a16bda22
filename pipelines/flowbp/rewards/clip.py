# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Rewards on transformers' `CLIPModel`: CLIP score, PickScore and LAION's aesthetic predictor."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from .loading import (
    MODEL_FILES,
    TOKENIZER_FILES,
    Source,
    find_files,
    find_tokenizer,
    load_checkpoint,
    load_pretrained,
    load_weights,
)
from .preprocessing import center_crop, check_images, normalize, resize_short
from .tokens import Tokens

CLIP_REPOSITORY = "openai/clip-vit-large-patch14"
MODEL = ("config.json", "model.safetensors")
VOCABULARY = ("vocab.json", "merges.txt")
# PickScore's scores are often divided by this to bring them near 1 (its logit scale is 100, good cosines are 0.26).
PICKSCORE_DIVISOR = 26.0


class CLIPReward(nn.Module):
    """`reward(images, prompts)`: cosine of CLIP's embeddings of image and prompt, times a constant.

    It is differentiable in the images, of any size. The weights are frozen, and a sample's score does not depend on
    its batch. Resizing and everything after the embeddings is at least float32.

    Args:
        model: CLIP; it is frozen.
        tokens: of its text encoder.
        crop: `(images, size) -> (B, 3, size, size)`. Default: `crop_short`.
        factor: multiplies the cosine.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokens: Tokens,
        crop: Callable[[Tensor, int], Tensor] | None = None,
        factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.tokens = tokens
        self.crop = crop if crop is not None else crop_short
        self.factor = factor

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores images (B, 3, H, W) in [0, 1] against B prompts.

        Returns:
            (B,) in float32, or in float64 if the module was moved to float64.

        Raises:
            ValueError: images of another shape, not finite or out of range; a number of prompts other than B.
        """
        check_images(images, prompts)
        weight = self.model.logit_scale
        with torch.no_grad():
            input_ids, attention_mask = self.tokens(prompts, weight.device)
            output = self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        pixels = clip_pixels(images, weight, self.model.config.vision_config.image_size, self.crop)
        image_embeds = self.model.get_image_features(pixel_values=pixels).pooler_output
        return (unit(image_embeds) * unit(output.pooler_output)).sum(-1) * self.factor


class AestheticReward(nn.Module):
    """`reward(images, prompts)`: LAION's prediction of how much people like an image, about 1 to 10, from CLIP-L.

    A stack of linear layers without activations on the normalised image embedding, which the public weights call
    linearMSE. Prompts are ignored. Otherwise as `CLIPReward`.

    Args:
        model: CLIP's image encoder with its projection; it is frozen.
        head: of the embedding's width, see `aesthetic_head`; it is frozen.
    """

    def __init__(self, model: CLIPVisionModelWithProjection, head: nn.Sequential) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.head = head.requires_grad_(False).eval()

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores images (B, 3, H, W) in [0, 1]: (B,), see `CLIPReward.forward`."""
        check_images(images, prompts)
        return head_score(self.head, embed_images(self.model, images))


def clip(model_path: Path | None = None) -> CLIPReward:
    """`clip`: the cosine itself; some definitions of CLIP score multiply it by 100 or 2.5 and clamp it at 0.

    Args:
        model_path: folder with the files of `openai/clip-vit-large-patch14`.

    Raises:
        FileNotFoundError, ValueError: see `find_files`, `load_pretrained`.
    """
    return CLIPReward(*load_clip("clip", CLIP_REPOSITORY, CLIP_REPOSITORY, model_path))


def pickscore(model_path: Path | None = None, normalized: bool = False) -> CLIPReward:
    """`pickscore`: logit scale x cosine, about 18 to 24 on the public weights (Kirstain et al., arXiv 2305.01569).
    `pickscore/26`: the same over 26, near 1.

    Args:
        model_path: folder with the files of `yuvalkirstain/PickScore_v1`. Its tokenizer is taken from there if it has
            one, else from the repository `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`, as PickScore's authors do.
        normalized: divide the score by `PICKSCORE_DIVISOR`.

    Raises:
        FileNotFoundError, ValueError: see `find_files`, `load_pretrained`.
    """
    name, tokenizer = "pickscore/26" if normalized else "pickscore", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    model, tokens = load_clip(name, "yuvalkirstain/PickScore_v1", tokenizer, model_path)
    return CLIPReward(model, tokens, factor=model.logit_scale.exp().item() / (PICKSCORE_DIVISOR if normalized else 1))


def aesthetic(model_path: Path | None = None) -> AestheticReward:
    """`aesthetic`: LAION's `sac+logos+ava1-l14-linearMSE` on `openai/clip-vit-large-patch14`.

    Args:
        model_path: folder with the head's file, and, if it has a `config.json`, with CLIP's files too; else CLIP comes
            from its repository.

    Raises:
        FileNotFoundError, ValueError: see `find_files`, `load_pretrained`, `load_checkpoint`, `load_weights`.
    """
    name = "sac+logos+ava1-l14-linearMSE.pth"
    # A copy of the authors' file on GitHub (christophschuhmann/improved-aesthetic-predictor).
    source = Source("aesthetic", "camenduru/improved-aesthetic-predictor", (name,))
    folder = find_files(source, model_path)
    vision = Source("aesthetic", CLIP_REPOSITORY, MODEL, MODEL_FILES)
    has_clip = model_path is not None and (folder / "config.json").is_file()
    vision_folder = find_files(vision, folder if has_clip else None)
    model = load_pretrained(vision, CLIPVisionModelWithProjection.from_pretrained, vision_folder, use_safetensors=True)
    weights = load_checkpoint(source, folder / name)
    head = aesthetic_head(model.config.projection_dim)
    # The reference's head is a Sequential named `layers` with dropout between its layers.
    names = {
        f"layers.{place}.{kind}": f"{index}.{kind}"
        for index, place in enumerate((0, 2, 4, 6, 7))
        for kind in ("weight", "bias")
    }
    load_weights(source, head, {names.get(key, key): value for key, value in weights.items()})
    return AestheticReward(model, head)


def aesthetic_head(width: int) -> nn.Sequential:
    """The linear layers of LAION's predictor for embeddings of `width` numbers."""
    widths = (width, 1024, 128, 64, 16, 1)
    return nn.Sequential(*[nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)])


def crop_short(images: Tensor, size: int) -> Tensor:
    """CLIP's own preprocessing: resize the shorter side to `size`, crop the longer one to the centre."""
    return center_crop(resize_short(images, size), size)


def clip_pixels(images: Tensor, weight: Tensor, size: int, crop: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] preprocessed for a CLIP whose weights are like `weight`: (B, 3, size, size)."""
    # A float64 model gets float64 images; the cast to half precision comes last.
    precise = torch.promote_types(weight.dtype, torch.float32)
    return normalize(crop(images.to(weight.device, precise), size)).to(weight.dtype)


def clip_tokens(source: Source, folder: Path, config: CLIPConfig) -> Tokens:
    """The tokens of a CLIP's text encoder, by the tokenizer in `folder` if there is one, else by that of `source`.

    Raises:
        FileNotFoundError, ValueError: see `find_files`, `load_pretrained`; also where the encoder, which reads a
            prompt at its end token, expects another id for it than the tokenizer has.
    """
    folder = find_tokenizer(source, folder)
    tokenizer = load_pretrained(source, CLIPTokenizer.from_pretrained, folder)
    expected = config.text_config.eos_token_id
    # Older configurations say 2, for which transformers reads the prompt at its highest id.
    if expected not in (2, tokenizer.eos_token_id):
        raise ValueError(
            f"reward {source.reward!r}: expected a tokenizer whose end token has id {expected}, got "
            f"{tokenizer.eos_token_id} in {folder}; use that of {source.page}."
        )
    return Tokens(source.reward, tokenizer, config.text_config.max_position_embeddings)


def unit(embedding: Tensor) -> Tensor:
    """The embedding `(..., D)` divided by its 2-norm, at least in float32."""
    return F.normalize(embedding.to(torch.promote_types(embedding.dtype, torch.float32)), dim=-1)


def embed_images(model: CLIPVisionModelWithProjection, images: Tensor) -> Tensor:
    """Embeddings (B, D) of images (B, 3, H, W) in [0, 1], of 2-norm 1, differentiable in the images."""
    pixels = clip_pixels(images, model.visual_projection.weight, model.config.image_size, crop_short)
    return unit(model(pixel_values=pixels).image_embeds)


def head_score(head: nn.Sequential, embedding: Tensor) -> Tensor:
    """What the linear layers of `aesthetic_head` make of embeddings (B, D), in their dtype: (B,)."""
    # The layers' products reach 10: in half precision a score would be off by 0.05.
    with torch.autocast(embedding.device.type, enabled=False):
        for layer in head:
            embedding = F.linear(embedding, layer.weight.to(embedding), layer.bias.to(embedding))
    return embedding.squeeze(-1)


def load_clip(
    reward: str, repository: str, tokenizer_repository: str, model_path: Path | None
) -> tuple[CLIPModel, Tokens]:
    """CLIP from a repository or `model_path`, and its tokens, if need be by the tokenizer of another repository."""
    source = Source(reward, repository, MODEL, (*MODEL_FILES, *TOKENIZER_FILES))
    folder = find_files(source, model_path)
    model = load_pretrained(source, CLIPModel.from_pretrained, folder, use_safetensors=True)
    return model, clip_tokens(Source(reward, tokenizer_repository, VOCABULARY, TOKENIZER_FILES), folder, model.config)
