# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Vision-language models of Qwen2-VL's family: images and a question as the model's inputs, with a gradient.

transformers 5.23 builds that family's processor only where torchvision is installed (its video part needs it even
without a video), so the tokenizer and the PIL image processor are used separately here.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from .loading import Source, load_pretrained
from .preprocessing import normalize, resize

PROCESSOR_FILES = ("config.json", "preprocessor_config.json", "tokenizer_config.json")


class Conversation:
    """`conversation(images, question, prompt, device)`: a user's turn with images and a text as a model's inputs.

    Args:
        tokenizer: with a chat template.
        image_processor: of Qwen2-VL, or with the same interface.
        image_token_id: of the token that stands for one patch of an image.
        pixels: resize images to about that many; None: within the image processor's own bounds.
    """

    def __init__(self, tokenizer: Any, image_processor: Any, image_token_id: int, pixels: int | None = None) -> None:
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.image_token_id = image_token_id
        self.size = {} if pixels is None else {"size": {"shortest_edge": pixels, "longest_edge": pixels}}

    def __call__(
        self, images: Sequence[Image.Image | Tensor], question: str, prompt: str, device: torch.device
    ) -> dict[str, Tensor]:
        """Inputs of batch size 1; `{prompt}` in the question becomes the prompt.

        Args:
            images: in the question's order. A tensor (3, H, W) in [0, 1] keeps its gradient; a PIL image is prepared
                by the image processor, from which `patches` differs by at most 1.2 / 255 / std.
            question: with `{prompt}` where the prompt goes.
            prompt: of the image.
            device: of the inputs.

        Raises:
            ValueError: the prompt contains one of the tokenizer's special tokens.
        """
        special = [token for token in self.tokenizer.get_added_vocab() if token in prompt]
        if special:
            raise ValueError(f"prompt: expected no special token of the judge, got {special[0]}; remove it.")
        vision = [self.patches(image) if isinstance(image, Tensor) else self._of_pil(image) for image in images]
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": question.replace("{prompt}", prompt)}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        image_token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        text, *rest = text.split(image_token)
        for following, (patches, _) in zip(rest, vision, strict=True):
            text += image_token * (len(patches) // self.image_processor.merge_size**2) + following
        encoded = self.tokenizer(text, return_tensors="pt")
        input_ids = encoded["input_ids"]
        inputs = {
            "input_ids": input_ids,
            "attention_mask": encoded["attention_mask"],
            # Without them Qwen2.5-VL counts positions in another way, and says nothing.
            "mm_token_type_ids": (input_ids == self.image_token_id).int(),
            "pixel_values": torch.cat([patches for patches, _ in vision]),
            "image_grid_thw": torch.cat([grid for _, grid in vision]),
        }
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def patches(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The image processor's patches, differentiable in the image.

        Args:
            image: (3, H, W) in [0, 1].

        Returns:
            Patches (count, 3 * temporal_patch_size * patch_size^2) in float32, or float64 for a float64 image, in the
            order of the image processor; and their numbers (1, 3) in time, height and width.
        """
        processor = self.image_processor
        side, merge, times = processor.patch_size, processor.merge_size, processor.temporal_patch_size
        bounds = self.size.get("size", processor.size)
        height, width = smart_resize(*image.shape[1:], side * merge, bounds["shortest_edge"], bounds["longest_edge"])
        pixels = normalize(resize(image[None], height, width), processor.image_mean, processor.image_std)
        rows, columns = height // side, width // side
        pixels = pixels.view(1, 3, rows // merge, merge, side, columns // merge, merge, side)
        # Blocks of merge x merge patches come together; an image is a video of equal frames.
        pixels = pixels.permute(2, 5, 3, 6, 1, 0, 4, 7).expand(-1, -1, -1, -1, -1, times, -1, -1)
        return pixels.reshape(rows * columns, -1), torch.tensor([[1, rows, columns]])

    def _of_pil(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        vision = self.image_processor(images=image, return_tensors="pt", **self.size)
        return vision["pixel_values"], vision["image_grid_thw"]


def load_conversation(source: Source, folder: Path, image_token_id: int, pixels: int | None = None) -> Conversation:
    """The conversation of a model in a folder of `find_files`; `pixels` as `Conversation` takes it.

    Raises:
        ValueError: see `load_pretrained`; also a folder without a chat template.
    """
    tokenizer = load_pretrained(source, AutoTokenizer.from_pretrained, folder)
    template = folder / "chat_template.json"  # a processor's own; newer versions of transformers keep it elsewhere
    if template.is_file():
        tokenizer.chat_template = json.loads(template.read_text(encoding="utf-8"))["chat_template"]
    if tokenizer.chat_template is None:
        raise ValueError(
            f"reward {source.reward!r}: expected a chat template in {folder}; take it from {source.page}."
        )
    image_processor = load_pretrained(source, AutoImageProcessor.from_pretrained, folder, backend="pil")
    return Conversation(tokenizer, image_processor, image_token_id, pixels)
