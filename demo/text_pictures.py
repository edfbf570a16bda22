# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of text: a drawn world of prompts and pictures whose captions are exact.

A prompt reads `the text "42" in red on a yellow background`: one to three digits, eight colours, the foreground never
equal to the background. Size and position of the text vary and are not part of the prompt. The font is the one inside
Pillow (`ImageFont.load_default`), Aileron Regular 1.102 by Sora Sagano: its own name table says "No Rights Reserved",
and its publisher (https://dotcolon.net/fonts/aileron) gives it as CC0.

Single digits are drawn larger: the PP-OCR recognisers misread them more often at the sizes of the longer texts.
"""

import random
import re
from functools import cache

import torch
from PIL import Image, ImageDraw, ImageFont

# Chosen so that both recognisers read drawn pictures of all 56 ordered pairs; demo/pretrain.py prints how often.
COLOURS = {
    "black": (20, 20, 20),
    "white": (245, 245, 245),
    "red": (215, 35, 35),
    "green": (30, 150, 60),
    "blue": (40, 70, 220),
    "yellow": (245, 215, 40),
    "purple": (140, 50, 170),
    "orange": (250, 135, 20),
}
COLOUR_PAIRS = tuple((fg, bg) for fg in COLOURS for bg in COLOURS if fg != bg)
TEXTS = tuple(str(n).zfill(length) for length in (1, 2, 3) for n in range(10**length))

# Font sizes in pixels at 48 x 48, by length of the text; the largest three-digit text still fits.
_SIZES = {1: (34, 36, 38), 2: (23, 25, 27), 3: (22, 23, 24)}
_MAX_SHIFT = 4  # pixels at 48 x 48 from the centre, each way
_PROMPT = re.compile(r'the text "([0-9]{1,3})" in ([a-z]+) on a ([a-z]+) background')
_HELD_OUT_TEXTS = 0.2  # share of the texts of each length
_SHARES = {1: 1 / 32, 2: 8 / 32, 3: 23 / 32}  # of each list, by length: there are few prompts with a single digit
_LIST_LENGTHS = {"pretraining": 12288, "reward": 2048, "held_out": 512}


def make_prompt(text: str, foreground: str, background: str) -> str:
    """Return the prompt of a picture. Raises ValueError where text or colours are not of this world."""
    prompt = f'the text "{text}" in {foreground} on a {background} background'
    parse_prompt(prompt)
    return prompt


def parse_prompt(prompt: str) -> tuple[str, str, str]:
    """Return (text, foreground, background) of a prompt. Raises ValueError where the prompt is not of this world."""
    match = _PROMPT.fullmatch(prompt.strip())
    if match is None:
        raise ValueError(
            "expected a prompt like 'the text \"42\" in red on a yellow background' with one to three digits,"
            f" got {prompt!r}"
        )
    text, foreground, background = match.groups()
    for colour in (foreground, background):
        if colour not in COLOURS:
            raise ValueError(f"unknown colour {colour!r} in {prompt!r}, choose from {', '.join(COLOURS)}")
    if foreground == background:
        raise ValueError(f"foreground and background are both {foreground!r} in {prompt!r}, choose two colours")
    return text, foreground, background


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def draw_picture(text: str, foreground: str, background: str, resolution: int, rng: random.Random) -> Image.Image:
    """Draw `text` at a random size and place.

    Args:
        text: one to three digits.
        foreground, background: names in `COLOURS`.
        resolution: width and height of the picture in pixels, at least 32 (sizes and shifts scale with it).
        rng: gives size and place.

    Returns an RGB picture. Raises ValueError where text or colours are not of this world or the resolution is too low.
    """
    parse_prompt(make_prompt(text, foreground, background))
    if resolution < 32:
        raise ValueError(f"expected a resolution of at least 32 pixels, got {resolution}")
    scale = resolution / 48
    font = _font(round(rng.choice(_SIZES[len(text)]) * scale))
    picture = Image.new("RGB", (resolution, resolution), COLOURS[background])
    canvas = ImageDraw.Draw(picture)
    left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
    place = []
    for length in (right - left, bottom - top):
        free = resolution - length
        shift = min(_MAX_SHIFT * scale, max(free / 2 - 1, 0))
        place.append(round(free / 2 + rng.uniform(-shift, shift)))
    canvas.text((place[0] - left, place[1] - top), text, fill=COLOURS[foreground], font=font)
    return picture


def split_prompts(seed: int) -> tuple[list[str], list[str], list[str]]:
    """Return three disjoint lists of prompts: pretraining (12288), reward training (2048), held-out evaluation (512).

    Of each list 1/32 have one digit, 8/32 two, the rest three. No text of the held-out prompts occurs in the others.
    Pretraining and reward training share texts, never prompts. The same seed gives the same lists.
    """
    rng = random.Random(seed)
    lists = {name: [] for name in _LIST_LENGTHS}
    for length, share in _SHARES.items():
        texts = [text for text in TEXTS if len(text) == length]
        rng.shuffle(texts)
        cut = round(_HELD_OUT_TEXTS * len(texts))
        held_out, seen = texts[:cut], texts[cut:]
        for names, pool in ((("held_out",), held_out), (("pretraining", "reward"), seen)):
            prompts = [make_prompt(text, *pair) for text in pool for pair in COLOUR_PAIRS]
            rng.shuffle(prompts)
            for name in names:
                count = round(share * _LIST_LENGTHS[name])
                lists[name] += prompts[:count]
                prompts = prompts[count:]
    for prompts in lists.values():
        rng.shuffle(prompts)
    return lists["pretraining"], lists["reward"], lists["held_out"]


def colours_right(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Tell by rule whether foreground and background have the colours that the prompts ask for.

    The background is the most frequent name (nearest of `COLOURS`) in the border, a twelfth of the width. The strokes'
    cores are the 3 % of the pixels that are farthest, in RGB, from the background's median colour there: pixels at the
    edges of strokes are blends, hence nearer. The foreground is the name nearest to the cores' median colour.

    Args:
        images: (B, 3, H, W), float, in [0, 1].
        prompts: B prompts.

    Returns a bool tensor (B,). Raises ValueError where shapes or prompts do not fit.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[0] != len(prompts):
        raise ValueError(f"expected images of shape ({len(prompts)}, 3, H, W), got {tuple(images.shape)}")
    names = list(COLOURS)
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255
    pixels = images.detach().float().cpu().permute(0, 2, 3, 1)
    _, height, width, _ = pixels.shape
    edge = max(1, width // 12)
    border = torch.ones(height, width, dtype=torch.bool)
    border[edge:-edge, edge:-edge] = False
    cores = max(1, round(0.03 * height * width))
    right = []
    for picture, prompt in zip(pixels, prompts, strict=True):
        _, foreground, background = parse_prompt(prompt)
        around = picture[border]
        nearest = torch.cdist(around, palette).argmin(-1)
        found_background = torch.bincount(nearest, minlength=len(names)).argmax()
        base = around[nearest == found_background].median(0).values
        flat = picture.flatten(0, 1)
        core = flat[(flat - base).norm(dim=-1).topk(cores).indices].median(0).values
        found_foreground = (palette - core).norm(dim=-1).argmin()
        right.append(names[found_background] == background and names[found_foreground] == foreground)
    return torch.tensor(right, dtype=torch.bool)
