# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""HPSv3, a human preference score by a vision-language model.

Not checked here, because the weights (15 GB) were not available: that the public files load, and the public scores.
Checked on a tiny random model: the loader, token ids, pixels and scores against the reference's own code on the
transformers that it pins (`tests/support/golden/make_hpsv3.py`).
"""

import ast
import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AddedToken, AutoConfig, Qwen2VLForConditionalGeneration

from .conversation import PROCESSOR_FILES, Conversation, load_conversation
from .held_gradient import score_one_by_one
from .loading import TOKENIZER_FILES, Source, find_files, load_pretrained, load_weights
from .preprocessing import check_images, to_pil_images

REWARD_TOKEN = "<|Reward|>"  # at which HPSv3 reads the score
HPSV3_PIXELS = 256 * 28 * 28  # of an image, approximately: both sides are multiples of 28
HPSV3_VERSION = "1.0.0"
HPSV3_QUESTION_SHA256 = "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"


class HPSv3(nn.Module):
    """`reward(images, prompts)`: HPSv3's human preference score (Ma et al., arXiv 2508.03789); higher is better.

    The network is Qwen2-VL without its language head. At the token `<|Reward|>` of the question three linear layers
    with ReLU between read a mean and a log-deviation off the last hidden state; the score is the mean, as in the
    reference's `hpsv3/inference.py`. Two details of it are easily missed: every image is resized to
    about `HPSV3_PIXELS`, and position ids count up along the whole sequence, patches of the image included, where
    Qwen2-VL itself counts rows and columns.

    Images that require a gradient are prepared by `Conversation.patches`, others by the image processor that the
    reference has; scores differ by 5e-4 at most (`tests/rewards/test_judges.py`). They are scored one at a time, so
    memory is that of one image, and a score does not depend on its batch. The weights are frozen.

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

    def _score(self, image: Image.Image | Tensor, prompt: str) -> Tensor:
        inputs = self.conversation([image], self.question, prompt, self.head[0].weight.device)
        places = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)
        hidden = self.model(**inputs, position_ids=places.expand(3, 1, -1), use_cache=False).last_hidden_state
        hidden = hidden[inputs["input_ids"] == self.reward_token_id]
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        with torch.autocast(hidden.device.type, enabled=False):
            for index, layer in enumerate(self.head):
                hidden = F.linear(F.relu(hidden) if index else hidden, layer.weight.to(hidden), layer.bias.to(hidden))
        return hidden[0, 0]

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores images (B, 3, H, W) in [0, 1] against B prompts: (B,) in float32 on the images' device.

        Raises:
            ValueError: images of another shape, not finite or out of range; a number of prompts other than B; a
                prompt with a special token.
        """
        check_images(images, prompts)
        if images.requires_grad and torch.is_grad_enabled():
            return score_one_by_one(lambda image, index: self._score(image, prompts[index]), images)
        pil_images = to_pil_images("hpsv3", images, prompts)
        with torch.no_grad():
            scores = [self._score(pil_image, prompt) for pil_image, prompt in zip(pil_images, prompts, strict=True)]
        return torch.stack(scores).to(images.device)


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
    base = Source("hpsv3", "Qwen/Qwen2-VL-7B-Instruct", PROCESSOR_FILES, (*TOKENIZER_FILES, "chat_template.*"))
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
    conversation = load_conversation(base, base_folder, config.image_token_id, HPSV3_PIXELS)
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
