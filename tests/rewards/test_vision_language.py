# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Rewards on vision-language models, and `similarity`: pixels against PIL, gradients, batches, questions, sources."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden.make_hpsv3 import CONFIG, PROMPTS
from PIL import Image
from tiny_rewards import CLIP_CONFIG, QWEN_2_5_VL, QWEN_VISION, save_qwen_vl
from torch import Tensor
from toy_reward import make_reward
from transformers import (
    CLIPVisionModelWithProjection,
    Qwen2VLImageProcessorPil,
)

from flowbp.rewards import load_reward
from flowbp.rewards.conversation import Conversation
from flowbp.rewards.preprocessing import to_pil_images
from flowbp.rewards.similarity import read_image
from flowbp.rewards.vqa import EDIT_QUESTION, VQAReward, vqa

VISION_3 = {**QWEN_VISION, "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
TEXT_3 = {key: value for key, value in CONFIG.items() if key not in ("architectures", "model_type", "vision_config")}
TEXT_3 |= {"model_type": "qwen3_vl_text", "head_dim": 16}
TEXT_3["rope_scaling"] = {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_vl": CONFIG,
    "qwen2_5_vl": QWEN_2_5_VL,
    "qwen3_vl": {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "text_config": TEXT_3,
        "vision_config": VISION_3,
        **{
            f"{name}_token_id": CONFIG[f"{name}_token_id"] for name in ("vision_start", "vision_end", "image", "video")
        },
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models with random weights, by family."""
    found = {}
    for family, config in CONFIGS.items():
        found[family] = folder = tmp_path_factory.mktemp(family)
        save_qwen_vl(folder, {**config, "model_type": family})
        Qwen2VLImageProcessorPil(patch_size=16 if family == "qwen3_vl" else 14).save_pretrained(folder)
    return found


@pytest.fixture(scope="module")
def reward(folders: dict[str, Path]) -> VQAReward:
    return vqa(folders["qwen2_5_vl"], dtype=torch.float64)


@pytest.fixture
def images() -> Tensor:
    return 0.1 + 0.8 * torch.rand(2, 3, 60, 92, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("height", "width"), [(60, 92), (224, 224), (33, 400)])
@pytest.mark.parametrize("pixels", [None, 40000])
def test_patches_are_the_image_processors(height: int, width: int, pixels: int | None):
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(256, (3, height, width), generator=generator) / 255
    conversation = Conversation(None, Qwen2VLImageProcessorPil(), 0, pixels)
    patches, grid = conversation.patches(image)
    (pil_image,) = to_pil_images("x", image[None], ["x"])
    expected, expected_grid = conversation._of_pil(pil_image)
    assert torch.equal(grid, expected_grid)
    assert (patches - expected).abs().max() < 1.2 / 255 / min(conversation.image_processor.image_std)


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_finite_differences(folders: dict[str, Path], images: Tensor, family: str):
    """To the float32 in which transformers computes norms and rotations, whatever the dtype of the weights."""
    reward = vqa(folders[family], dtype=torch.float64)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(leaf, PROMPTS).sum(), leaf)
    for direction in (gradient / gradient.norm(), (gradient / gradient.norm()).roll(1, 0)):
        with torch.no_grad():
            ends = [reward(images + step * direction, PROMPTS).sum() for step in (0.02, -0.02)]
        expected = (ends[0] - ends[1]) / 0.04
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=0, atol=2e-3 * gradient.norm().item())


def test_scores_are_the_models_log_odds(reward: VQAReward, images: Tensor):
    """By the whole vocabulary's logits, computed without the reward's shortcuts."""
    inputs = reward.conversation([images[0]], 'Does this image show "a cat"? Answer with yes or no.', "", "cpu")
    logits = reward.model(**inputs).logits[0, -1].float()
    ids = reward.conversation.tokenizer.convert_tokens_to_ids
    expected = logits[[ids("Y"), ids("y")]].logsumexp(0) - logits[[ids("N"), ids("n")]].logsumexp(0)
    torch.testing.assert_close(reward(images[:1], ["a cat"])[0].float(), expected)


def test_a_batch_is_its_samples_with_a_gradient_or_without(reward: VQAReward, images: Tensor):
    whole = images.clone().requires_grad_()
    scores = reward(whole, PROMPTS)
    scores.sum().backward()
    with torch.no_grad():
        assert torch.equal(reward(images, PROMPTS), scores.detach())
    for index in range(2):
        leaf = images[index : index + 1].clone().requires_grad_()
        alone = reward(leaf, PROMPTS[index : index + 1])
        alone.sum().backward()
        assert torch.equal(alone.detach(), scores[index : index + 1].detach())
        assert torch.equal(leaf.grad, whole.grad[index : index + 1])


def test_in_bfloat16_and_in_a_sum_with_offload(folders: dict[str, Path], images: Tensor, reward: VQAReward):
    paths = {"vqa": folders["qwen2_5_vl"]}
    alone, summed = load_reward("vqa", paths), load_reward("vqa:2,toy_reward:make_reward", paths, offload=True)
    assert alone.model.dtype == torch.bfloat16
    leaves = [images.float().requires_grad_() for _ in range(2)]
    scores = [each(leaf, PROMPTS) for each, leaf in zip((alone, summed), leaves, strict=True)]
    assert scores[0].dtype == torch.float32
    red = images.float().requires_grad_()
    scores.append(make_reward()(red, PROMPTS))
    for score in scores:
        score.sum().backward()
    torch.testing.assert_close(scores[1], 2 * scores[0] + scores[2])
    torch.testing.assert_close(leaves[1].grad, 2 * leaves[0].grad + red.grad)
    exact = images.clone().requires_grad_()
    precise = reward(exact, PROMPTS)
    precise.sum().backward()
    torch.testing.assert_close(scores[0].double(), precise, rtol=0, atol=0.02)
    assert torch.cosine_similarity(leaves[0].grad.double().flatten(), exact.grad.flatten(), dim=0) > 0.99


def test_questions_and_source_images_of_the_table(
    folders: dict[str, Path], reward: VQAReward, images: Tensor, tmp_path: Path
):
    """Each row has its own; the source is shown first, from a file or as an image, and gets no gradient."""
    (source,) = to_pil_images("x", images[:1].flip(-1), ["x"])
    source.save(tmp_path / "source.png")
    plain = reward(images, PROMPTS)
    mixed = reward(images, PROMPTS, question=["Is it red?", None], source_image=[None, tmp_path / "source.png"])
    assert mixed[0] == vqa(folders["qwen2_5_vl"], "Is it red?{prompt}", torch.float64)(images[:1], [""])[0]
    assert (mixed - plain).abs().min() > 1e-5
    assert mixed[1] == reward(images[1:], PROMPTS[1:], source_image=[source])[0]
    shown = [read_image(source).double(), images[1]]
    assert mixed[1].isclose(reward._log_odds(shown, EDIT_QUESTION, PROMPTS[1]), rtol=0, atol=1e-6)
    assert (mixed[1] - reward._log_odds(shown[::-1], EDIT_QUESTION, PROMPTS[1])).abs() > 1e-5
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        reward(images, PROMPTS, source_image=[None, "nowhere.png"])


def test_questions_without_their_parts_are_refused(folders: dict[str, Path], reward: VQAReward, images: Tensor):
    with pytest.raises(ValueError, match="question: expected a text with {prompt}"):
        load_reward("vqa", {"vqa": folders["qwen2_5_vl"]}, question="Is it red?")
    with pytest.raises(ValueError, match="special token"):
        reward(images[:1], ["a cat <|image_pad|>"])


def test_similarity_is_of_what_may_not_change(tmp_path: Path):
    """1 for the source itself; the part of the mask has no effect and no gradient."""
    torch.manual_seed(0)
    vision = CLIP_CONFIG.vision_config
    CLIPVisionModelWithProjection(vision).save_pretrained(tmp_path)
    reward = load_reward("similarity", {"similarity": tmp_path})
    source = torch.randint(256, (3, 24, 24)) / 255
    (picture,) = to_pil_images("x", source[None], ["x"])
    half = Image.new("L", (48, 48))
    half.paste(255, (24, 0, 48, 48))
    half.save(tmp_path / "mask.png")
    changed = torch.stack([source, source, source])
    changed[1:, :, :, 12:] = torch.rand(2, 3, 24, 12)
    changed.requires_grad_()
    scores = reward(changed, ["x"] * 3, source_image=[picture] * 3, mask=[None, None, str(tmp_path / "mask.png")])
    torch.testing.assert_close(scores.detach()[::2], torch.ones(2))
    assert scores[1] < 0.999
    (gradient,) = torch.autograd.grad(scores.sum(), changed)
    assert gradient[2, :, :, 12:].abs().max() == 0 and gradient[1, :, :, 12:].abs().max() > 1e-4
