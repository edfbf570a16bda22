# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""A question that a vision-language model answers with yes or no, as a reward."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from .conversation import PROCESSOR_FILES, Conversation, load_conversation
from .held_gradient import score_one_by_one
from .loading import MODEL_FILES, TOKENIZER_FILES, Source, find_files, load_pretrained
from .preprocessing import check_images
from .similarity import ColumnImage, read_image

QUESTION = 'Does this image show "{prompt}"? Answer with yes or no.'
EDIT_QUESTION = (
    'The first image was to be edited by the instruction "{prompt}". Is the second image the first one, edited in '
    "just this way? Answer with yes or no."
)
ANSWERS = (("Yes", "yes", "YES"), ("No", "no", "NO"))


class VQAReward(nn.Module):
    """`reward(images, prompts)`: the log-odds that a vision-language model answers "yes" to a question.

    `logsumexp` of the logits of the first tokens of "Yes", "yes" and "YES", minus that of "No", "no" and "NO", in
    float32: above 0 where yes is likelier than no. It is the logit of VQAScore's probability (Lin et al., arXiv
    2404.01291), restricted to both answers: unlike the probability it has a gradient where the model is sure.
    Images are scored one at a time, so memory is that of one image, and a score does not depend on its batch. The
    weights are frozen.

    Args:
        model: an image-text-to-text model of transformers that takes the conversation's inputs.
        conversation: of that model.
        question: with `{prompt}` where the prompt goes. None: `QUESTION`, or `EDIT_QUESTION` for an image with a
            source image.

    Raises:
        ValueError: a question without `{prompt}`; a tokenizer with which both answers begin with the same token.
    """

    def __init__(self, model: nn.Module, conversation: Conversation, question: str | None = None) -> None:
        super().__init__()
        if question is not None and "{prompt}" not in question:
            raise ValueError(f"question: expected a text with {{prompt}} where the prompt goes, got {question!r}.")
        self.model, self.conversation, self.question = model, conversation, question
        tokenizer = conversation.tokenizer
        first = [[tokenizer(form, add_special_tokens=False)["input_ids"][0] for form in forms] for forms in ANSWERS]
        self.yes, self.no = (sorted(set(tokens)) for tokens in first)
        if common := sorted({*self.yes} & {*self.no}):
            raise ValueError(f"tokenizer: expected other first tokens of yes than of no, got {common[0]} for both.")
        self.requires_grad_(False).eval()

    def _log_odds(self, images: Sequence[Tensor], question: str, prompt: str) -> Tensor:
        inputs = self.conversation(images, question, prompt, self.model.device)
        logits = self.model(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits[self.yes].logsumexp(0) - logits[self.no].logsumexp(0)

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str],
        question: Sequence[str | None] | None = None,
        source_image: Sequence[ColumnImage | None] | None = None,
    ) -> Tensor:
        """Scores images (B, 3, H, W) in [0, 1] against B prompts: (B,) in float32, log-odds in nats.

        Args:
            images: to score; the gradient is in them.
            prompts: B texts.
            question: B questions of the prompts' table in place of the reward's own; they need no `{prompt}`.
            source_image: B images, or their paths, that the images are edits of; shown before them.

        Raises:
            ValueError: images of another shape, not finite or out of range; a number of prompts other than B; a
                prompt with a special token.
            OSError: a source image that cannot be read.
        """
        check_images(images, prompts)
        questions, sources = question or [None] * len(prompts), source_image or [None] * len(prompts)

        def score(image: Tensor, index: int) -> Tensor:
            source = sources[index]
            shown = [image] if source is None else [read_image(source).to(image), image]
            asked = questions[index] or self.question or (QUESTION if source is None else EDIT_QUESTION)
            return self._log_odds(shown, asked, prompts[index])

        return score_one_by_one(score, images)


def vqa(model_path: Path | None = None, question: str | None = None, dtype: torch.dtype = torch.bfloat16) -> VQAReward:
    """`vqa`: see `VQAReward`, on Qwen2.5-VL 7B.

    Args:
        model_path: folder with the files of `Qwen/Qwen2.5-VL-7B-Instruct`, or of another model of the families
            Qwen2-VL, Qwen2.5-VL and Qwen3-VL.
        question: see `VQAReward`.
        dtype: of the weights.

    Raises:
        FileNotFoundError, ValueError: see `find_files`, `load_pretrained`, `VQAReward`.
    """
    files = (*MODEL_FILES, *TOKENIZER_FILES, "chat_template.*")
    source = Source("vqa", "Qwen/Qwen2.5-VL-7B-Instruct", (*PROCESSOR_FILES, "model.safetensors"), files)
    folder = find_files(source, model_path)
    model = load_pretrained(
        source, AutoModelForImageTextToText.from_pretrained, folder, use_safetensors=True, dtype=dtype
    )
    return VQAReward(model, load_conversation(source, folder, model.config.image_token_id), question)
