# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Vision-language models that judge images, for evaluation: HPSv3 and UnifiedReward. They give no gradient.

Both are of the Qwen2-VL family. transformers 5.23 builds that family's processor only where torchvision is installed
(its video part needs it even without a video), so the tokenizer and the PIL image processor are used separately
here. Images are judged one at a time, so that a score does not depend on its batch.

Not checked here, because the weights (15 GB each) were not available: that the public files load, and the public
scores. Checked on tiny random models: HPSv3's loader, token ids, pixels and scores against the reference's own code on
the transformers that it pins (`tests/support/golden/make_hpsv3.py`); UnifiedReward's against transformers' own
generation.
"""

import ast
import functools
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    Qwen2VLForConditionalGeneration,
)

from .loading import MODEL_FILES, TOKENIZER_FILES, Source, find_files, load_pretrained, load_weights
from .preprocessing import check_images

logger = logging.getLogger(__name__)

REWARD_TOKEN = "<|Reward|>"  # at which HPSv3 reads the score
HPSV3_PIXELS = 256 * 28 * 28  # of an image, approximately: both sides are multiples of 28
HPSV3_VERSION = "1.0.0"
HPSV3_QUESTION_SHA256 = "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"

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
_PROCESSOR_FILES = ("config.json", "preprocessor_config.json", "tokenizer_config.json")


def to_pil_images(reward: str, images: Tensor, prompts: Sequence[str]) -> list[Image.Image]:
    """Images (B, 3, H, W) in [0, 1] as 8-bit PIL images, for rewards that are not differentiable.

    Raises:
        ValueError: images that require a gradient; see also `check_images`.
    """
    check_images(images, prompts)
    if images.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"reward {reward!r}: expected images without requires_grad, got images that require a gradient, but this "
            "reward has none; call it under torch.no_grad() to evaluate, and train with another reward."
        )
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to("cpu", torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]


class Conversation:
    """`conversation(image, question, prompt, device)`: a user's turn with an image and a text as a model's inputs.

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

    def __call__(self, image: Image.Image, question: str, prompt: str, device: torch.device) -> dict[str, Tensor]:
        """Inputs of batch size 1; `{prompt}` in the question becomes the prompt.

        Raises:
            ValueError: the prompt contains one of the tokenizer's special tokens.
        """
        special = [token for token in self.tokenizer.get_added_vocab() if token in prompt]
        if special:
            raise ValueError(f"prompt: expected no special token of the judge, got {special[0]}; remove it.")
        vision = self.image_processor(images=image, return_tensors="pt", **self.size)
        content = [{"type": "image"}, {"type": "text", "text": question.replace("{prompt}", prompt)}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        image_token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        patches = int(vision["image_grid_thw"].prod()) // self.image_processor.merge_size**2
        encoded = self.tokenizer(text.replace(image_token, image_token * patches), return_tensors="pt")
        input_ids = encoded["input_ids"]
        inputs = {
            "input_ids": input_ids,
            "attention_mask": encoded["attention_mask"],
            "mm_token_type_ids": (input_ids == self.image_token_id).int(),
            "pixel_values": vision["pixel_values"],
            "image_grid_thw": vision["image_grid_thw"],
        }
        return {name: tensor.to(device) for name, tensor in inputs.items()}


class HPSv3(nn.Module):
    """`reward(images, prompts)`: HPSv3's human preference score (Ma et al., arXiv 2508.03789); higher is better.

    The network is Qwen2-VL without its language head. At the token `<|Reward|>` of the question three linear layers
    with ReLU between read a mean and a log-deviation off the last hidden state; the score is the mean, as in the
    reference's `hpsv3/inference.py`. Two details of it are easily missed: every image is resized to
    about `HPSV3_PIXELS`, and position ids count up along the whole sequence, patches of the image included, where
    Qwen2-VL itself counts rows and columns.

    No gradient; the weights are frozen.

    Args:
        model: Qwen2-VL.
        head: see `hpsv3_head`.
        conversation: with `<|Reward|>` in its tokenizer.
        question: with `{prompt}` where the prompt goes, and `<|Reward|>` once.
    """

    def __init__(
        self, model: Qwen2VLForConditionalGeneration, head: nn.Sequential, conversation: Conversation, question: str
    ) -> None:
        super().__init__()
        self.model, self.head = model.model, head  # without the language head
        self.conversation, self.question = conversation, question
        self.reward_token_id = conversation.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        self.requires_grad_(False).eval()

    @torch.no_grad
    def _score(self, image: Image.Image, prompt: str) -> Tensor:
        inputs = self.conversation(image, self.question, prompt, self.head[0].weight.device)
        places = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)
        hidden = self.model(**inputs, position_ids=places.expand(3, 1, -1), use_cache=False).last_hidden_state
        hidden = hidden[inputs["input_ids"] == self.reward_token_id].float()
        with torch.autocast(hidden.device.type, enabled=False):
            for index, layer in enumerate(self.head):
                hidden = F.linear(F.relu(hidden) if index else hidden, layer.weight.float(), layer.bias.float())
        return hidden[0, 0]

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores images (B, 3, H, W) in [0, 1] against B prompts: (B,) in float32 on the images' device.

        Raises:
            ValueError: images that require a gradient, of another shape, not finite or out of range; a number of
                prompts other than B; a prompt with a special token.
        """
        pil_images = to_pil_images("hpsv3", images, prompts)
        scores = [self._score(pil_image, prompt) for pil_image, prompt in zip(pil_images, prompts, strict=True)]
        return torch.stack(scores).to(images.device)


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
        return self.conversation(image, self.question, prompt, self.model.device)

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


def hpsv3_head(width: int) -> nn.Sequential:
    """HPSv3's linear layers on hidden states of `width` numbers; ReLU comes between them."""
    return nn.Sequential(nn.Linear(width, 1024), nn.Linear(1024, 16), nn.Linear(16, 2))


def hpsv3_question() -> str:
    """The question that HPSv3 was trained with, read from a file of its authors' package, which is not imported.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: it is of another version, with another text.
    """
    remedy = f"remedy: pip install --no-deps hpsv3=={HPSV3_VERSION} (without its dependencies, its code is not run)"
    spec = find_spec("hpsv3")
    if spec is None:
        raise ModuleNotFoundError(
            "expected the package hpsv3 for the wording of the question that the model was trained with, but it is "
            f"not installed; {remedy}."
        )
    file = Path((spec.submodule_search_locations or ["."])[0]) / "dataset" / "data_collator_qwen.py"
    texts = {}
    if file.is_file():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                texts[node.targets[0].id] = node.value.value
    question = texts.get("INSTRUCTION", "") + texts.get("prompt_with_special_token", "")
    if hashlib.sha256(question.encode()).hexdigest() != HPSV3_QUESTION_SHA256:
        raise ValueError(f"expected the question of hpsv3 {HPSV3_VERSION} in {file}, got another text; {remedy}.")
    return question.replace("{text_prompt}", "{prompt}")


def hpsv3(model_path: Path | None = None, question: str | None = None, dtype: torch.dtype = torch.bfloat16) -> HPSv3:
    """`hpsv3`: HPSv3 on Qwen2-VL 7B.

    Args:
        model_path: folder with `HPSv3.safetensors` of `MizzenAI/HPSv3`. The configuration and the tokenizer are taken
            from there if it has a `config.json`, else from the repository `Qwen/Qwen2-VL-7B-Instruct`.
        question: None: `hpsv3_question`.
        dtype: of the weights; the head stays in float32. The reference uses bfloat16.

    Raises:
        FileNotFoundError, ValueError: see `find_files`, `load_pretrained`, `load_weights`.
        ModuleNotFoundError: see `hpsv3_question`.
    """
    question = question if question is not None else hpsv3_question()
    if "{prompt}" not in question or question.count(REWARD_TOKEN) != 1:
        raise ValueError(f"question: expected a text with {{prompt}} and one {REWARD_TOKEN}, got {question!r}.")
    source = Source("hpsv3", "MizzenAI/HPSv3", ("HPSv3.safetensors",))
    folder = find_files(source, model_path)
    base = Source("hpsv3", "Qwen/Qwen2-VL-7B-Instruct", _PROCESSOR_FILES, (*TOKENIZER_FILES, "chat_template.*"))
    has_base = model_path is not None and (folder / "config.json").is_file()
    base_folder = find_files(base, folder if has_base else None)
    config = load_pretrained(base, AutoConfig.from_pretrained, base_folder)
    try:
        weights = load_file(folder / "HPSv3.safetensors")
    except SafetensorError as error:
        raise ValueError(
            f"reward 'hpsv3': {folder / 'HPSv3.safetensors'} is not a safetensors file ({error}); download it again "
            f"from {source.page}."
        ) from error
    embeddings = [tensor for name, tensor in weights.items() if name.endswith("embed_tokens.weight")]
    if len(embeddings) != 1:
        raise ValueError(
            f"reward 'hpsv3': expected one embed_tokens.weight, got {len(embeddings)}; see {source.page}."
        )
    config.text_config.vocab_size = len(embeddings[0])  # one more than the tokenizer of Qwen2-VL has
    conversation = _conversation(base, base_folder, config.image_token_id, HPSV3_PIXELS)
    conversation.tokenizer.add_tokens(AddedToken(REWARD_TOKEN, special=True))
    if conversation.tokenizer.convert_tokens_to_ids(REWARD_TOKEN) >= len(embeddings[0]):
        raise ValueError(
            f"reward 'hpsv3': expected a tokenizer of at most {len(embeddings[0])} tokens, one per row of the "
            f"weights, got {len(conversation.tokenizer)}; take it from {base.page}."
        )
    head = hpsv3_head(config.text_config.hidden_size)
    # ReLU and dropout take the places between in the reference's head.
    names = {
        f"rm_head.{old}.{kind}": f"{new}.{kind}" for new, old in enumerate((0, 3, 5)) for kind in ("weight", "bias")
    }
    load_weights(source, head, {names[name]: weights.pop(name) for name in list(weights) if name in names})
    # transformers knows the names that Qwen2-VL's weights had in the version of the reference.
    model, report = Qwen2VLForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    wrong = [f"{kind} {name}" for kind in ("missing", "unexpected") for name in sorted(report[f"{kind}_keys"])]
    if wrong:
        raise ValueError(
            f"reward 'hpsv3': the weights are not those of {source.repo_id}: {', '.join(wrong[:3])}; download them "
            f"again from {source.page}."
        )
    return HPSv3(model, head, conversation, question)


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
    source = Source(name, "CodeGoat24/UnifiedReward-qwen-7b", (*_PROCESSOR_FILES, "model.safetensors"), files)
    folder = find_files(source, model_path)
    model = _unifiedreward_model(source.repo_id, folder, dtype)
    return UnifiedReward(name, model, _conversation(source, folder, model.config.image_token_id), question)


def _conversation(source: Source, folder: Path, image_token_id: int, pixels: int | None = None) -> Conversation:
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
