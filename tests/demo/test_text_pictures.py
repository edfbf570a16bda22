# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The drawn world of the demo, its colour check, and the bundled pipeline that was trained on it."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

DEMO = Path(__file__).parents[2] / "demo"
sys.path.insert(0, str(DEMO))

from pretrain import check_encoding, load_pipeline, make_tokenizer, tokenize  # noqa: E402
from text_pictures import (  # noqa: E402
    COLOUR_PAIRS,
    TEXTS,
    colours_right,
    draw_picture,
    make_prompt,
    parse_prompt,
    split_prompts,
)


def draw_all_pairs(per_pair: int) -> tuple[torch.Tensor, list[tuple[str, str, str]]]:
    rng = random.Random(0)
    asked = [(rng.choice(TEXTS), *pair) for pair in COLOUR_PAIRS for _ in range(per_pair)]
    pictures = np.stack([np.asarray(draw_picture(*picture, 48, rng)) for picture in asked])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255, asked


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    return load_pipeline(DEMO / "pipeline")


def test_prompts_round_trip():
    assert parse_prompt(make_prompt("042", "red", "yellow")) == ("042", "red", "yellow")


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("a cat", "expected a prompt like"),
        ('the text "4200" in red on a blue background', "one to three digits"),
        ('the text "42" in mauve on a blue background', "unknown colour 'mauve'"),
        ('the text "42" in red on a red background', "both 'red'"),
    ],
)
def test_prompts_of_another_world_are_refused(prompt, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_prompt(prompt)
    assert "\n" not in str(error.value)


def test_make_prompt_refuses_what_parse_prompt_refuses():
    with pytest.raises(ValueError, match="unknown colour"):
        make_prompt("42", "red", "beige")
    with pytest.raises(ValueError, match="one to three digits"):
        make_prompt("4200", "red", "blue")


def test_resolution_too_low_is_refused():
    with pytest.raises(ValueError, match="at least 32 pixels, got 16"):
        draw_picture("42", "red", "blue", 16, random.Random(0))


@pytest.mark.parametrize("resolution", [32, 48, 64])
def test_text_lies_inside_the_picture(resolution):
    rng = random.Random(1)
    for text in ("00", "444", "888", *rng.sample(TEXTS, 60)):
        pixels = np.asarray(draw_picture(text, "black", "white", resolution, rng))
        assert pixels.shape == (resolution, resolution, 3)
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border == 245).all(), text
        assert (pixels == 20).any()


def test_pictures_vary_and_the_seed_decides():
    first, again, other = (
        np.asarray(draw_picture("57", "red", "white", 48, random.Random(seed))) for seed in (3, 3, 4)
    )
    assert (first == again).all() and (first != other).any()


def test_colours_right_on_drawn_pictures_of_all_pairs():
    images, asked = draw_all_pairs(8)
    assert colours_right(images, [make_prompt(*picture) for picture in asked]).all()


def test_colours_wrong_when_swapped_or_other():
    images, asked = draw_all_pairs(2)
    swapped = [make_prompt(text, background, foreground) for text, foreground, background in asked]
    assert not colours_right(images, swapped).any()
    rng = random.Random(2)
    pairs = [rng.choice([pair for pair in COLOUR_PAIRS if pair != picture[1:]]) for picture in asked]
    other = [make_prompt(picture[0], *pair) for picture, pair in zip(asked, pairs, strict=True)]
    assert not colours_right(images, other).any()


def test_colours_wrong_on_an_empty_picture():
    blue = torch.tensor([40, 70, 220]).view(1, 3, 1, 1).expand(1, 3, 48, 48) / 255
    assert not colours_right(blue, ['the text "42" in red on a blue background']).any()


def test_colours_right_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"expected images of shape \(1, 3, H, W\), got \(2, 3, 8, 8\)"):
        colours_right(torch.rand(2, 3, 8, 8), [make_prompt("42", "red", "blue")])


def test_lists_of_prompts_are_disjoint():
    pretraining, reward, held_out = split_prompts(0)
    everything = pretraining + reward + held_out
    assert len(set(everything)) == len(everything) == 12288 + 2048 + 512
    texts = [{parse_prompt(prompt)[0] for prompt in prompts} for prompts in (pretraining, reward, held_out)]
    assert texts[2].isdisjoint(texts[0] | texts[1])
    assert split_prompts(0) == (pretraining, reward, held_out) != split_prompts(1)


def test_committed_lists_are_those_of_the_split():
    _, reward, held_out = split_prompts(0)
    assert (DEMO / "prompts_train.txt").read_text().splitlines() == reward
    assert (DEMO / "prompts_eval.txt").read_text().splitlines() == held_out[:384]


def test_one_token_for_each_word_and_digit():
    tokenizer = make_tokenizer()
    for prompt in (make_prompt("407", *pair) for pair in COLOUR_PAIRS):
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)
        words = prompt.replace('"407"', '" 4 0 7 "').split()
        assert tokens == ["<|startoftext|>", *(word + "</w>" for word in words), "<|endoftext|>"]


def test_bundled_pipeline_is_plain_stable_diffusion_3(pipe):
    classes = {
        "transformer": SD3Transformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": CLIPTokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler,
    }
    for name, expected in classes.items():
        assert type(getattr(pipe, name)) is expected
    weights = list((DEMO / "pipeline").rglob("*.safetensors"))
    assert len(weights) == 4 and sum(path.stat().st_size for path in weights) <= 12e6
    assert not [path for path in (DEMO / "pipeline").rglob("*") if path.suffix in {".bin", ".pt", ".pkl", ".ckpt"}]


def test_saved_tokenizer_is_the_scripts_own_and_encoding_is_the_pipelines(pipe):
    prompts = [make_prompt("407", "orange", "yellow"), make_prompt("18", "black", "white"), ""]
    tokenizer = make_tokenizer()
    for saved in (pipe.tokenizer, pipe.tokenizer_2):
        assert saved.model_max_length == 16
        assert saved(prompts, padding="max_length").input_ids == tokenizer(prompts, padding="max_length").input_ids
    assert tokenize(pipe, prompts).shape == (3, 16)
    check_encoding(pipe, prompts)


def test_bundled_pipeline_draws_what_is_asked(pipe):
    prompts = (DEMO / "prompts_eval.txt").read_text().splitlines()[:24]
    images = pipe(
        prompts,
        num_inference_steps=10,
        guidance_scale=2.0,
        max_sequence_length=1,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert images.shape == (24, 3, 48, 48)
    assert colours_right(images, prompts).float().mean() >= 0.6
