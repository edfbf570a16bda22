# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""How close an edited image stays to its source; reads the images in columns of the prompts' table."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from ..table_images import rgb
from .clip import CLIP_REPOSITORY, MODEL, embed_images
from .loading import MODEL_FILES, Source, find_files, load_pretrained
from .preprocessing import check_images, resize

ColumnImage = Image.Image | str | Path
"""An image in a column of the prompts' table: itself, or the path of its file."""


def read_image(image: ColumnImage) -> Tensor:
    """An image as a tensor (3, H, W) in [0, 1] in float32.

    Raises:
        OSError: a file that is missing or not an image.
        ValueError: a video.
    """
    if isinstance(image, list):
        raise ValueError(f"expected an image, got a video of {len(image)} frames; name a column of images.")
    if not isinstance(image, Image.Image):
        with Image.open(image) as file:
            image = rgb(file)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255


class SimilarityReward(nn.Module):
    """`reward(images, prompts, source_image, mask)`: cosine of CLIP's embeddings of an image and of its source.

    It keeps an edit faithful: add it to a reward that asks for the edit. Where a mask is given, its white part, which
    is meant to change, is grey in both images. It is differentiable in the images; the weights are frozen.

    Args:
        model: CLIP's image encoder with its projection; it is frozen.
    """

    def __init__(self, model: CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str],
        source_image: Sequence[ColumnImage],
        mask: Sequence[ColumnImage | None] | None = None,
    ) -> Tensor:
        """Scores images (B, 3, H, W) in [0, 1]: (B,) in float32, at most 1.

        Args:
            images: the edited ones; the gradient is in them.
            prompts: ignored.
            source_image: B images, or their paths; resized to the images' size.
            mask: B images, or their paths, black where nothing may change; None: nothing may change.

        Raises:
            ValueError: images of another shape, not finite or out of range.
            OSError: a source image or a mask that cannot be read.
        """
        check_images(images, prompts)
        kept = torch.stack([self._kept(each, images) for each in mask or [None] * len(images)])
        sources = torch.cat([_resized(each, images) for each in source_image])
        with torch.no_grad():
            expected = embed_images(self.model, 0.5 + kept * (sources - 0.5))
        return (embed_images(self.model, 0.5 + kept * (images - 0.5)) * expected).sum(-1)

    def _kept(self, mask: ColumnImage | None, images: Tensor) -> Tensor:
        if mask is None:
            return torch.ones_like(images[0])
        white = _resized(mask, images)[0].mean(0) > 0.5
        return 1 - white.to(images).expand_as(images[0])


def _resized(image: ColumnImage, images: Tensor) -> Tensor:
    return resize(read_image(image)[None].to(images.device), *images.shape[2:])


def similarity(model_path: Path | None = None) -> SimilarityReward:
    """`similarity`: see `SimilarityReward`.

    Args:
        model_path: folder with the files of `openai/clip-vit-large-patch14`.

    Raises:
        FileNotFoundError, ValueError: see `find_files`, `load_pretrained`.
    """
    source = Source("similarity", CLIP_REPOSITORY, MODEL, MODEL_FILES)
    folder = find_files(source, model_path)
    model = load_pretrained(source, CLIPVisionModelWithProjection.from_pretrained, folder, use_safetensors=True)
    return SimilarityReward(model)
