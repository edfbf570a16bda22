# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""UnifiedReward, a vision-language model that writes down what it thinks of images, for evaluation.

Images are judged one at a time, so that a score does not depend on its batch. Not checked here, because the weights
(15 GB) were not available: that the public files load, and the public scores. Checked on a tiny random model: against
transformers' own generation.
"""

import functools
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from .conversation import PROCESSOR_FILES, Conversation, load_conversation
from .loading import MODEL_FILES, TOKENIZER_FILES, Source, find_files, load_pretrained
from .preprocessing import to_pil_images

logger = logging.getLogger(__name__)

UNIFIEDREWARD_SIDE = 512  # to which images are resized before the model's own preparation
MAX_NEW_TOKENS = 256
_SCORE = re.compile(r"Final Score:\s*([1-5](?:\.\d+)?)", re.IGNORECASE)
ALIGNMENT_QUESTION = (
    "You see a picture that was generated from a text caption. Judge one thing: how well the picture agrees with the "
    "caption, in the objects that it names, their attributes, their number, how they are placed and what they do. How "
    "good the picture looks does not matter, unless that hides what is in it. "
    "Give a score from 1 to 5 for the agreement after 'Final Score:'.\nText Caption: [{prompt}]"
)
QUALITY_QUESTION = (
    "You see a picture that was generated from a text caption. Judge one thing: the quality of the picture, in "
    "sharpness, detail, colour, composition, beauty and freedom from artifacts. Whether it agrees with the caption "
    "does not matter, unless that spoils how it looks. "
    "Give a score from 1 to 5 for the quality after 'Final Score:'.\nText Caption: [{prompt}]"
)


class UnifiedReward(nn.Module):
    """`reward(images, prompts)`: the score from 1 to 5 that UnifiedReward writes (Wang et al., arXiv 2503.05236).

    The model answers a question about the image and the caption in words, without sampling; the score is the number
    after "Final Score:". As in the evaluation code of FlowBP's authors, which has UR-Align and UR-IQ as two questions,
    the image is resized to 512 x 512 first and at most 256 tokens are written. Three things differ from it, so
    figures compare with each other, not with the paper's: the questions are worded anew, ask `question` for others;
    the model is the Qwen2.5-VL one (`CodeGoat24/UnifiedReward-qwen-7b`), as the paper's (`UnifiedReward-7b-v1.5`, in
    LLaVA-NeXT's own layout) is not one that transformers reads; and an answer without a score is NaN, counted in
    `unparsed` with a warning, where the reference puts -10.

    No gradient; the weights are frozen.

    Args:
        name: of the reward, for messages.
        model: any image-text-to-text model of transformers that takes the conversation's inputs.
        conversation: of that model.
        question: with `{prompt}` where the prompt goes.
    """

    def __init__(self, name: str, model: nn.Module, conversation: Conversation, question: str) -> None:
        super().__init__()
        if "{prompt}" not in question:
            raise ValueError(f"question: expected a text with {{prompt}} where the prompt goes, got {question!r}.")
        self.name, self.model, self.conversation, self.question = name, model, conversation, question
        self.unparsed = 0
        self._warned = 0
        self.requires_grad_(False).eval()

    def inputs(self, image: Image.Image, prompt: str) -> dict[str, Tensor]:
        """The model's inputs for the question about an image."""
        image = image.resize((UNIFIEDREWARD_SIDE, UNIFIEDREWARD_SIDE))
        return self.conversation([image], self.question, prompt, self.model.device)

    @torch.no_grad
    def answer(self, image: Image.Image, prompt: str) -> str:
        """What the model writes about an image."""
        inputs = self.inputs(image, prompt)
        written = self.model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        new = written[0, inputs["input_ids"].shape[1] :]
        return self.conversation.tokenizer.decode(new, skip_special_tokens=True)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores images (B, 3, H, W) in [0, 1] against B prompts: (B,) in float32, 1 to 5, NaN for no score.

        Raises:
            ValueError: images that require a gradient, of another shape, not finite or out of range; a number of
                prompts other than B; a prompt with a special token.
        """
        pil_images = to_pil_images(self.name, images, prompts)
        answers = [self.answer(pil_image, prompt) for pil_image, prompt in zip(pil_images, prompts, strict=True)]
        scores = [parse_score(answer) for answer in answers]
        self._count([answer for answer, score in zip(answers, scores, strict=True) if score is None])
        return torch.tensor([float("nan") if score is None else score for score in scores], device=images.device)

    def _count(self, unparsed: list[str]) -> None:
        self.unparsed += len(unparsed)
        if self.unparsed >= max(1, 2 * self._warned):
            self._warned = self.unparsed
            logger.warning(
                "reward %r: %d answers so far had no 'Final Score:' from 1 to 5 and count as NaN; the last one: %r",
                self.name,
                self.unparsed,
                unparsed[-1][-200:],
            )


def parse_score(answer: str) -> float | None:
    """The number from 1 to 5 after "Final Score:", whatever the case; None if there is none."""
    match = _SCORE.search(answer)
    return None if match is None else float(match[1])


def unifiedreward_alignment(
    model_path: Path | None = None, question: str = ALIGNMENT_QUESTION, dtype: torch.dtype = torch.bfloat16
) -> UnifiedReward:
    """`unifiedreward-alignment`: how well an image agrees with its prompt, 1 to 5, see `UnifiedReward`.

    Args:
        model_path: folder with the files of `CodeGoat24/UnifiedReward-qwen-7b`.
        question: with `{prompt}` where the prompt goes.
        dtype: of the weights.

    Raises:
        FileNotFoundError, ValueError: see `find_files`, `load_pretrained`.
    """
    return _unifiedreward("unifiedreward-alignment", model_path, question, dtype)


def unifiedreward_quality(
    model_path: Path | None = None, question: str = QUALITY_QUESTION, dtype: torch.dtype = torch.bfloat16
) -> UnifiedReward:
    """`unifiedreward-quality`: how good an image looks, 1 to 5; otherwise as `unifiedreward_alignment`."""
    return _unifiedreward("unifiedreward-quality", model_path, question, dtype)


@functools.lru_cache(maxsize=1)
def _unifiedreward_model(repo_id: str, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    # Both judges share one model, so that 7B weights are not loaded twice.
    source = Source("unifiedreward", repo_id, ())
    return load_pretrained(
        source, AutoModelForImageTextToText.from_pretrained, folder, use_safetensors=True, dtype=dtype
    )


def _unifiedreward(name: str, model_path: Path | None, question: str, dtype: torch.dtype) -> UnifiedReward:
    files = (*MODEL_FILES, *TOKENIZER_FILES, "chat_template.*")
    source = Source(name, "CodeGoat24/UnifiedReward-qwen-7b", (*PROCESSOR_FILES, "model.safetensors"), files)
    folder = find_files(source, model_path)
    model = _unifiedreward_model(source.repo_id, folder, dtype)
    return UnifiedReward(name, model, load_conversation(source, folder, model.config.image_token_id), question)
