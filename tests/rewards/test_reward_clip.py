# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""CLIP score, PickScore, HPSv2.1 and the aesthetic predictor, tiny, against what OpenCLIP computed.

`golden/make_openclip.py` made the vectors: a tiny OpenCLIP model with random weights, scores and image gradients. The
weights go through the loaders here in the files' own layouts; nothing of OpenCLIP is installed.
"""

import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_rewards import CLIP_CONFIG, HEAD_FILE, HPS_FILE, save_clip_tokenizer
from tiny_rewards import GOLDEN as GOLDEN_FOLDER
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from flowbp.rewards import load_reward
from flowbp.rewards.clip import PICKSCORE_DIVISOR, aesthetic_head
from flowbp.rewards.openclip import VIT_H_14, convert_openclip, hpsv2_1

GOLDEN = load_file(GOLDEN_FOLDER / "openclip.safetensors")
WEIGHTS = {name.removeprefix("weights."): value for name, value in GOLDEN.items() if name.startswith("weights.")}
# Those of the golden vectors; the third is longer than the context.
PROMPTS = ["a red dog", "cats", "many words that do not fit in it"]
# The head's file has numbers 0, 2, 4, 6 and 7: between its first layers are dropouts.
HEAD_KEYS = [f"layers.{place}.{kind}" for place in (0, 2, 4, 6, 7) for kind in ("weight", "bias")]


def head_weight(number: int, shape: torch.Size) -> torch.Tensor:
    """The formula of make_openclip.py."""
    n = torch.arange(shape.numel(), dtype=torch.float64)
    return (2 * torch.sin(number + 1.7 * n + 0.013 * n**2) / shape[-1] ** 0.5).view(shape).float()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders for `--reward_model_path`, in the layouts of the public files."""
    folders = {name: tmp_path_factory.mktemp(name.replace("/", "-")) for name in ("clip", "hpsv2.1", "aesthetic")}
    model = CLIPModel(CLIP_CONFIG)
    model.load_state_dict(convert_openclip(WEIGHTS))
    model.save_pretrained(folders["clip"])
    model.save_pretrained(folders["aesthetic"])
    save_clip_tokenizer(folders["clip"])
    save_clip_tokenizer(folders["hpsv2.1"])
    torch.save({"epoch": 3, "name": "HPS", "state_dict": WEIGHTS}, folders["hpsv2.1"] / HPS_FILE)
    shapes = [parameter.shape for parameter in aesthetic_head(12).parameters()]
    head = {key: head_weight(number, shape) for number, (key, shape) in enumerate(zip(HEAD_KEYS, shapes, strict=True))}
    torch.save(head, folders["aesthetic"] / HEAD_FILE)
    return folders | {"pickscore": folders["clip"], "pickscore/26": folders["clip"]}


def load(name: str, folders: dict[str, Path]) -> torch.nn.Module:
    # load_reward's hpsv2.1 is always ViT-H-14.
    return hpsv2_1(folders[name], CLIP_CONFIG) if name == "hpsv2.1" else load_reward(name, {name: folders[name]})


NAMES = ["aesthetic", "clip", "hpsv2.1", "pickscore", "pickscore/26"]


@pytest.fixture(params=NAMES)
def reward(request, folders):
    return load(request.param, folders)


def with_gradient(reward, images: torch.Tensor, prompts=PROMPTS) -> tuple[torch.Tensor, torch.Tensor]:
    images = images.detach().requires_grad_()
    scores = reward(images, prompts)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    return scores.detach(), gradient


CASES = [
    ("hpsv2.1", "square", 1.0),
    ("hpsv2.1", "tall", 1.0),
    ("hpsv2.1", "wide", 1.0),
    ("clip", "square", 1.0),
    ("clip", "crop", 1.0),
    ("pickscore", "crop", 20.085537),  # exp(3)
    ("pickscore/26", "crop", 20.085537 / 26),
    ("aesthetic", "aesthetic", 1.0),
]


@pytest.mark.parametrize(("name", "case", "factor"), CASES)
def test_scores_and_gradients_agree_with_openclip(folders, name, case, factor):
    reward = load(name, folders)
    images = GOLDEN["crop.images" if case == "aesthetic" else f"{case}.images"]
    scores, gradient = with_gradient(reward, images)
    expected = factor * GOLDEN[f"{case}.gradient"]
    assert scores.dtype == gradient.dtype == torch.float32
    assert (scores - factor * GOLDEN[f"{case}.score"]).abs().max() < 1e-5 * max(1, factor)
    assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max()
    # In float64 what is left is the rounding of the stored numbers.
    scores, gradient = with_gradient(reward.double(), images.double())
    assert scores.dtype == gradient.dtype == torch.float64
    torch.testing.assert_close(scores, factor * GOLDEN[f"{case}.score"], atol=1e-7, rtol=1e-7)
    assert (gradient - expected).abs().max() < 1e-6 * expected.abs().max()


def test_conversion_takes_every_weight_once():
    converted = convert_openclip(WEIGHTS)
    assert set(converted) == set(CLIPModel(CLIP_CONFIG).state_dict())
    assert sum(value.numel() for value in converted.values()) == sum(value.numel() for value in WEIGHTS.values())


def test_vit_h_14_has_the_published_shapes():
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**VIT_H_14))
    # The sizes that open_clip's README gives for ViT-H-14: 986.11 million parameters, 632.08 of them for pictures.
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == 986.11
    vision = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    assert round(sum(parameter.numel() for parameter in vision) / 1e6, 2) == 632.08
    assert model.config.vision_config.image_size == 224 and model.text_model.eos_token_id == 49407
    for config in (model.config.text_config, model.config.vision_config):
        # What the weights do not tell; open_clip's ViT-H-14.json has heads of 80 numbers for pictures.
        assert (config.num_attention_heads, config.hidden_act, config.layer_norm_eps) == (16, "gelu", 1e-5)


def test_finite_differences_agree_with_the_image_gradient(reward):
    reward.double()
    generator = torch.Generator().manual_seed(0)
    for height, width in ((16, 16), (12, 7), (19, 30)):
        # Smooth and away from 0 and 1, where the cut of the resize has kinks.
        images = torch.rand(1, 3, 4, 4, generator=generator, dtype=torch.float64)
        images = torch.nn.functional.interpolate(0.2 + 0.6 * images, (height, width), mode="bilinear")
        _, gradient = with_gradient(reward, images, PROMPTS[:1])
        for _ in range(3):
            direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                above, below = (reward(images + step * direction, PROMPTS[:1]) for step in (1e-6, -1e-6))
            expected = (above - below) / 2e-6
            torch.testing.assert_close((gradient * direction).sum()[None], expected, rtol=1e-6, atol=1e-8)


def test_a_batch_is_its_samples(reward):
    images = torch.rand(3, 3, 20, 33)
    scores, gradient = with_gradient(reward, images)
    alone = [with_gradient(reward, images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(scores, torch.cat([score for score, _ in alone]))
    torch.testing.assert_close(gradient, torch.cat([each for _, each in alone]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 50), (64, 16), (129, 77)])
def test_any_size(reward, height, width):
    scores, gradient = with_gradient(reward, torch.rand(3, 3, height, width))
    assert scores.shape == (3,) and scores.isfinite().all()
    assert gradient.shape == (3, 3, height, width) and gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(reward, dtype):
    images = torch.rand(3, 3, 20, 33)
    expected, expected_gradient = with_gradient(reward, images)
    with torch.autocast("cpu", torch.bfloat16):
        scores, gradient = with_gradient(reward, images.to(dtype))
    assert scores.dtype == torch.float32 and gradient.dtype == dtype
    assert not torch.equal(scores, expected)  # it did run in half precision
    torch.testing.assert_close(scores, expected, atol=0.05 * expected.abs().max().item(), rtol=0)
    same = torch.nn.functional.cosine_similarity(gradient.float().flatten(), expected_gradient.flatten(), dim=0)
    assert same > 0.98


def test_half_precision_weights(reward):
    images = torch.rand(3, 3, 20, 33)
    expected, _ = with_gradient(reward, images)
    scores, gradient = with_gradient(reward.bfloat16(), images)
    assert scores.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=0.05 * expected.abs().max().item(), rtol=0)


def test_nothing_is_trained(reward):
    images = torch.rand(3, 3, 16, 16, requires_grad=True)
    reward(images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in reward.parameters())
    assert not reward.model.training


def test_pickscore_s_two_scales(folders):
    images = torch.rand(3, 3, 16, 16)
    raw, normalized = (load(name, folders)(images, PROMPTS) for name in ("pickscore", "pickscore/26"))
    torch.testing.assert_close(raw / PICKSCORE_DIVISOR, normalized)
    assert PICKSCORE_DIVISOR == 26


def test_the_aesthetic_predictor_does_not_look_at_prompts(folders):
    reward = load("aesthetic", folders)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(reward(images, ["a", "b"]), reward(images, ["c", "d"]))


# Long prompts


def test_long_prompts_are_truncated_with_a_warning(folders, caplog):
    reward = load("clip", folders)
    images = torch.rand(3, 3, 16, 16)
    with caplog.at_level(logging.WARNING, "flowbp"):
        first = reward(images, PROMPTS)
        same = reward(images, [PROMPTS[0], PROMPTS[1], PROMPTS[2] + " at all"])
    assert torch.equal(first, same)  # nothing of what follows the context counts
    assert reward.tokens.truncated == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"reward 'clip': {count} prompts so far were longer than 16 tokens and were truncated." for count in (1, 2)
    ]
    with caplog.at_level(logging.WARNING, "flowbp"):
        reward(images, PROMPTS)  # 3: has not doubled
        reward(images, PROMPTS)
    assert reward.tokens.truncated == 4 and len(caplog.records) == 3


def test_prompts_within_the_context_are_not_warned_of(folders, caplog):
    reward = load("clip", folders)
    fits = "abcd efgh ijkl mn"  # 14 letters, start and end
    reward(torch.rand(2, 3, 16, 16), [fits, ""])
    assert reward.tokens.truncated == 0 and not caplog.records
    reward(torch.rand(2, 3, 16, 16), [fits + "o", ""])
    assert reward.tokens.truncated == 1


# Bad input


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (torch.rand(2, 3, 16, 16) * 3, ["a", "b"], "expected finite values in [0, 1]"),
        (torch.full((2, 3, 16, 16), float("nan")), ["a", "b"], "got nan to nan"),
        (torch.rand(2, 3, 16, 16), ["a"], "expected a list of 2, one per image, got 1"),
        (torch.rand(2, 3, 16, 16), "ab", "got one string"),
        (torch.rand(3, 16, 16), ["a"], "expected a float tensor (B, 3, H, W)"),
    ],
)
def test_bad_images_and_prompts_are_refused(reward, images, prompts, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        reward(images, prompts)
    assert "\n" not in str(error.value)


def changed(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    weights = dict(WEIGHTS)
    for name, value in changes.items():
        weights.pop(name) if value is None else weights.update({name: value})
    return weights


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": changed(**{"visual.proj": None})}, "xswu/HPSv2: no visual_projection.weight; expected HPS"),
        ({"state_dict": changed(**{"visual.extra": torch.ones(2)})}, "unknown visual.extra"),
        (
            {"state_dict": changed(text_projection=torch.ones(16, 9))},
            "text_projection.weight of shape (9, 16) instead of (12, 16)",
        ),
        ({"state_dict": {}}, "no logit_scale, no text_model"),
        ({"model": WEIGHTS}, "expected weights under state_dict in"),
        (WEIGHTS["logit_scale"], "to hold a mapping, got Tensor"),
    ],
)
def test_other_weights_are_refused(tmp_path, content, message):
    save_clip_tokenizer(tmp_path)
    torch.save(content, tmp_path / HPS_FILE)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        hpsv2_1(tmp_path, CLIP_CONFIG)
    assert "\n" not in str(error.value) and "https://huggingface.co/xswu/HPSv2" in str(error.value)


def test_a_tokenizer_with_another_end_token_is_refused(folders, tmp_path):
    for name in ("clip", "hpsv2.1"):
        for file in folders[name].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    vocabulary = {"!": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(tmp_path)
    for load_one in (lambda: load_reward("clip", {"clip": tmp_path}), lambda: hpsv2_1(tmp_path, CLIP_CONFIG)):
        with pytest.raises(ValueError, match="expected a tokenizer whose end token has id 54, got 2 in") as error:
            load_one()
        assert "\n" not in str(error.value)


def test_cut_files_are_refused(folders, tmp_path):
    whole = (folders["hpsv2.1"] / HPS_FILE).read_bytes()
    save_clip_tokenizer(tmp_path)
    for size in (0, 100, len(whole) // 2):
        (tmp_path / HPS_FILE).write_bytes(whole[:size])
        with pytest.raises(ValueError, match="download HPS_v2.1_compressed.pt again from") as error:
            hpsv2_1(tmp_path, CLIP_CONFIG)
        assert "\n" not in str(error.value)


def test_a_head_of_another_width_is_refused(folders, tmp_path):
    for file in folders["aesthetic"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({key: torch.ones(3) for key in HEAD_KEYS}, tmp_path / HEAD_FILE)
    with pytest.raises(ValueError, match=re.escape("of shape (3,) instead of")) as error:
        load_reward("aesthetic", {"aesthetic": tmp_path})
    assert "\n" not in str(error.value)
