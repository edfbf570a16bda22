# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""ImageReward against what its own modules say (`golden/make_imagereward.py`), and the promises of a reward."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden.make_imagereward import IMAGE_SIZE, PROMPTS, VOCABULARY, random_weight
from safetensors.torch import load_file
from tiny_rewards import GOLDEN, tiny_blip_config
from torch import Tensor
from transformers import BlipConfig

from flowbp.rewards import load_reward
from flowbp.rewards.blip import BLIP_LARGE, MAX_TOKENS, ImageReward, convert_imagereward, imagereward


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """The reference's names with the weights of the golden script."""
    layout = json.loads((GOLDEN / "imagereward.json").read_text())
    return {
        name: torch.arange(shape[1])[None] if name.endswith("position_ids") else random_weight(name, tuple(shape))
        for name, shape in layout.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Tensor]) -> Path:
    """A folder as a user would download it."""
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(weights, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


@pytest.fixture
def make(folder: Path, weights: dict[str, Tensor]) -> Callable[[torch.dtype], ImageReward]:
    """The reward through its loader; in float64 with the weights in full."""

    def load(dtype: torch.dtype = torch.float32) -> ImageReward:
        reward = imagereward(folder, tiny_blip_config()).to(dtype)
        if dtype == torch.float64:
            reward.load_state_dict(convert_imagereward(weights))
        return reward

    return load


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "imagereward.safetensors")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
def test_scores_and_gradients_are_the_references(
    make: Callable[[torch.dtype], ImageReward], golden: dict[str, Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    reward = make(dtype)
    images = golden["images"].to(dtype).requires_grad_()
    scores = reward(images, PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert scores.dtype == dtype and scores.shape == (3,)
    torch.testing.assert_close(scores.double(), golden["scores"], rtol=0, atol=tolerance)
    torch.testing.assert_close(gradient.double(), golden["gradient"].double(), rtol=0, atol=tolerance)
    assert golden["gradient"].abs().mean() > 1e-2  # the tolerance is small beside it
    assert golden["scores"].diff().abs().min() > 0.1


def test_tokens_are_the_references(
    make: Callable[..., ImageReward], golden: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    tokens = make().tokens
    with caplog.at_level(logging.WARNING):
        input_ids, attention_mask = tokens(PROMPTS, torch.device("cpu"))
    assert torch.equal(input_ids, golden["input_ids"]) and torch.equal(attention_mask, golden["attention_mask"])
    assert input_ids.shape == (3, MAX_TOKENS)
    assert tokens.truncated == 1 and "1 prompts" in caplog.text  # the third prompt


def test_blips_own_tokens_are_known(make: Callable[..., ImageReward]) -> None:
    input_ids, _ = make().tokens(["[ENC] cat [DEC]"], torch.device("cpu"))
    # The reference adds [DEC] first; both come after the vocabulary.
    assert input_ids[0, :5].tolist() == [2, len(VOCABULARY) + 1, VOCABULARY.index("cat"), len(VOCABULARY), 3]


def test_eight_bit_images_of_another_size(make: Callable[..., ImageReward], golden: dict[str, Tensor]) -> None:
    """Pillow rounds to 8 bits within its resize, which leaves a difference of 3e-3 here."""
    images = golden["pictures"].permute(0, 3, 1, 2) / 255
    scores = make()(images, PROMPTS)
    torch.testing.assert_close(scores.double(), golden["picture_scores"], rtol=0, atol=1e-2)
    assert (golden["picture_scores"] - golden["picture_scores"].mean()).abs().max() > 0.5


def test_gradient_agrees_with_finite_differences(make: Callable[..., ImageReward]) -> None:
    reward = make(torch.float64)
    images = 0.1 + 0.8 * torch.rand(2, 3, 24, 40, dtype=torch.float64)  # resized and cropped
    directions = torch.randn(5, *images.shape, dtype=torch.float64)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(leaf, PROMPTS[:2]).sum(), leaf)
    for direction in directions:
        step = 1e-5 * direction
        difference = (reward(images + step, PROMPTS[:2]) - reward(images - step, PROMPTS[:2])).sum() / 2e-5
        torch.testing.assert_close(difference, (gradient * direction).sum(), rtol=1e-6, atol=1e-8)


def test_a_batch_of_one_is_a_batch_of_many(make: Callable[..., ImageReward]) -> None:
    reward, images = make(), torch.rand(3, 3, 40, 36)
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(reward(images, PROMPTS), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_images_under_autocast(make: Callable[..., ImageReward], dtype: torch.dtype) -> None:
    reward = make()
    images = torch.rand(3, 3, IMAGE_SIZE, IMAGE_SIZE).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        scores = reward(images, PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert scores.dtype == torch.float32 and gradient.dtype == dtype and gradient.isfinite().all()
    torch.testing.assert_close(scores, reward(images.float(), PROMPTS), rtol=0, atol=0.1)


def test_parameters_are_frozen_and_training_mode_changes_nothing(make: Callable[..., ImageReward]) -> None:
    reward, images = make(), torch.rand(3, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert not any(parameter.requires_grad for parameter in reward.parameters()) and not reward.training
    scores = reward(images, PROMPTS)
    assert torch.equal(reward.train()(images, PROMPTS), scores)


def test_the_sizes_of_the_public_model() -> None:
    """The parameters of BLIP's published ViT-L and BERT: the sizes in `BLIP_LARGE` and no other."""
    with torch.device("meta"):
        reward = ImageReward(BlipConfig(**BLIP_LARGE), tokens=None)
    vision = 24 * (4 * 1024**2 + 8 * 1024**2 + 13 * 1024) + 197 * 1024 + 3 * 1024 + 1024 + 3 * 16**2 * 1024
    attentions = 4 * 768**2 + 4 * 768 + 2 * 768**2 + 2 * 768 * 1024 + 4 * 768 + 4 * 768  # self, cross, two norms
    text = 12 * (attentions + 2 * 768 * 3072 + 3072 + 768 + 2 * 768) + (30524 + 512 + 2) * 768
    head = 769 * 1024 + 1025 * 128 + 129 * 64 + 65 * 16 + 17
    assert sum(parameter.numel() for parameter in reward.parameters()) == vision + text + head


def test_names_that_are_not_the_references(folder: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text((folder / "vocab.txt").read_text())
    changed = {name.replace("blocks.1.norm2", "blocks.1.norm3"): value for name, value in weights.items()}
    torch.save(changed, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"no vision\.encoder\.layers\.1\.layer_norm2\.weight") as error:
        imagereward(tmp_path, tiny_blip_config())
    assert "THUDM/ImageReward" in str(error.value) and "\n" not in str(error.value)


def test_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ImageReward\.pt") as error:
        load_reward("imagereward", {"imagereward": tmp_path})
    assert "THUDM/ImageReward" in str(error.value) and "--reward_model_path imagereward=FOLDER" in str(error.value)


def test_a_checkpoint_that_runs_code_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text((folder / "vocab.txt").read_text())
    torch.save({"blip": print}, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        imagereward(tmp_path, tiny_blip_config())


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (torch.rand(2, 3, 32, 32), PROMPTS, "expected a list of 2"),
        (torch.rand(3, 3, 32, 32) * 2, PROMPTS, r"in \[0, 1\]"),
        (torch.full((3, 3, 32, 32), torch.nan), PROMPTS, r"in \[0, 1\]"),
        (torch.rand(3, 1, 32, 32), PROMPTS, r"\(B, 3, H, W\)"),
    ],
)
def test_bad_input(make: Callable[..., ImageReward], images: Tensor, prompts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(images, prompts)
