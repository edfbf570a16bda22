# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""A text recogniser as a reward: how likely is it that the image reads what the prompt quotes?

The recognisers are PP-OCR's mobile models of versions 4 and 5 (PaddlePaddle authors, Apache-2.0), which this package
ships. Train on one version and let the other judge.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .preprocessing import check_images
from .recogniser import load_recogniser

HEIGHT = 48  # of the recognisers' input
STRIDE = 8  # columns of the input per column of the output
# The augmentation's largest values, at the recogniser's resolution: pixels; standard deviations of noise on [0, 1] and
# of a Gaussian blur in pixels.
MAX_SHIFT, MAX_NOISE, MAX_BLUR = 2.0, 0.08, 1.0
_STRAIGHT_QUOTES = str.maketrans("“”„‟", '""""')


# The recognisers, and the factor on the width at which they read images of one to three digits best.
VERSIONS = {"v4": 1.0, "v5": 1.5}


def quoted_text(prompt: str) -> str:
    """The text that a prompt has between double quotes, straight or typographic ones.

    Outside of a quoted text, a quote right after a digit is an inch sign: `a 5" nail and the word "ok"` gives `ok`.

    Raises:
        ValueError: no text in double quotes, several different ones, a quote without its partner, or white space at an
            end of the text.
    """
    found = re.findall(r'(?<!\d)"([^"]*)("?)', prompt.translate(_STRAIGHT_QUOTES))
    texts = list(dict.fromkeys(text for text, _ in found))
    if not texts or any(not closing or text != text.strip() or not text for text, closing in found):
        raise ValueError(
            f'prompt: expected a text between double quotes, as in: the text "42" in red; got {prompt!r}.'
        )
    if len(texts) > 1:
        raise ValueError(
            f"prompt {prompt!r}: expected one text between double quotes, got {' and '.join(map(repr, texts))}; quote "
            "one, or name a column with the texts, --reward_text_column."
        )
    return texts[0]


class OCRReward(nn.Module):
    """`reward(images, prompts)`: log-probability per character that the recogniser reads what a prompt quotes.

    The probability is CTC's: the sum over all ways to spell the text along the columns of the image. A score is at
    most 0 (certain) and about -10 where the image shows another text. It is differentiable in the images,
    of any size. The weights are frozen, and a sample's score does not depend on its batch.

    Args:
        version: `"v4"` (2.7M parameters, the faster one) or `"v5"` (4.1M).
        augment: shift the image by up to `MAX_SHIFT` pixels, blur it and add noise, at random, before the
            recogniser, so that training does not find texture that only this recogniser reads. `read` and `exact`
            never augment.
        colour_invariant: score shapes only: the image is projected onto the axis along which its colours vary most and
            standardised, with the rarer side (the text) dark. Scores then have no gradient towards other colours or
            more contrast, which would otherwise be an easy way to be read better. `read` and `exact` always see the
            image as it is.
        generator: a CPU generator for the augmentation; `None` uses torch's global one. Numbers are drawn sample by
            sample, so scoring a batch in parts draws the same.
        stretch: the image is resized to height 48 and to `stretch` times the width that would keep its aspect ratio,
            rounded to a multiple of 8. None: 1 for v4 and 1.5 for v5, the best values between 1 and 2 on drawn images
            of one to three digits.
        texts: prompt -> text to look for, for prompts that do not quote it. None: what each prompt quotes.

    Raises:
        ValueError: an unknown version, a stretch that is not above 0, or another recogniser in the package's file.
        FileNotFoundError: the package lacks that file.
    """

    def __init__(
        self,
        version: str = "v4",
        augment: bool = False,
        generator: torch.Generator | None = None,
        stretch: float | None = None,
        colour_invariant: bool = False,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        if stretch is not None and not stretch > 0:
            raise ValueError(f"stretch: expected a number above 0, or None for the version's own, got {stretch}.")
        self.network, characters = load_recogniser(version)
        self.version, self.augment, self.generator, self.texts = version, augment, generator, texts
        self.colour_invariant = colour_invariant
        self.stretch = VERSIONS[version] if stretch is None else stretch
        # Chinese fonts have ASCII's characters a second time at full width (U+FF01 to U+FF5E). A lone "0" in an image
        # may be either, so their probabilities are added up and the full-width classes dropped.
        place_of = {character: place for place, character in enumerate(characters)}
        ascii_characters = [
            chr(code) for code in range(0x21, 0x7F) if {chr(code), chr(code + 0xFEE0)} <= set(place_of)
        ]
        narrow = [place_of[character] for character in ascii_characters]
        wide = [place_of[chr(ord(character) + 0xFEE0)] for character in ascii_characters]
        kept = [place for place in range(len(characters)) if place not in set(wide)]
        self.register_buffer("narrow", torch.tensor(narrow), persistent=False)
        self.register_buffer("wide", torch.tensor(wide), persistent=False)
        self.register_buffer("kept", torch.tensor(kept), persistent=False)
        self.characters = [characters[place] for place in kept]
        self.class_of = {character: place for place, character in enumerate(self.characters) if character}

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores images (B, 3, H, W) in [0, 1] against B prompts.

        Returns:
            (B,) in float32, or in float64 if the module was moved to float64. With bfloat16 weights, scores of wrong
            texts are wrong by half; keep the weights in float32, whatever the pipeline's dtype.

        Raises:
            ValueError: images of another shape, not finite or out of range; a number of prompts other than B; a prompt
                without a text, or with a text that has characters unknown to the recogniser or is too long.
        """
        check_images(images, prompts)
        height, width = images.shape[2:]
        columns = self._columns(height, width)
        targets = [self._classes(prompt, [(height, width)]) for prompt in prompts]
        log_probabilities = self._log_probabilities(images, self.augment, self.colour_invariant)
        lengths = torch.tensor([len(target) for target in targets])
        loss = F.ctc_loss(
            log_probabilities.transpose(0, 1),
            torch.tensor([place for target in targets for place in target], device=log_probabilities.device),
            torch.full_like(lengths, columns),
            lengths,
            blank=0,
            reduction="none",
        )
        return -loss / lengths.to(loss)

    @torch.no_grad()
    def read(self, images: Tensor) -> list[str]:
        """The text in each image (B, 3, H, W): the most likely class of each column, repeats merged."""
        check_images(images)
        places = self._log_probabilities(images, augment=False).argmax(-1).cpu()
        return ["".join(self.characters[place] for place in row.unique_consecutive().tolist()) for row in places]

    def exact(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) bool on the CPU: whether the recogniser reads exactly the prompt's text."""
        check_images(images, prompts)
        return torch.tensor([text == self.text_of(p) for text, p in zip(self.read(images), prompts, strict=True)])

    def text_of(self, prompt: str) -> str:
        """The text that an image of the prompt must show.

        Raises:
            ValueError: a prompt that is not in `texts`, or has a blank one there; without `texts`, see `quoted_text`.
        """
        if self.texts is None:
            return quoted_text(prompt)
        if not self.texts.get(prompt, "").strip():
            raise ValueError(f"prompt: expected one of the {len(self.texts)} that have texts, got {prompt!r}.")
        return self.texts[prompt]

    def check_prompt(self, prompt: str, sizes: Sequence[tuple[int, int]] = ()) -> None:
        """Checks that images of these sizes, height and width in pixels, can show the prompt's text.

        Raises:
            ValueError: as `forward` does for the prompt.
        """
        self._classes(prompt, sizes)

    def _width(self, images: Tensor) -> int:
        return STRIDE * self._columns(*images.shape[2:])

    def _columns(self, height: int, width: int) -> int:
        return max(1, round(HEIGHT * self.stretch * width / height / STRIDE))

    def _classes(self, prompt: str, sizes: Sequence[tuple[int, int]]) -> list[int]:
        target = self.text_of(prompt)
        unknown = sorted(set(target) - set(self.class_of))
        if unknown:
            raise ValueError(
                f"prompt {prompt!r}: expected a quoted text of characters that PP-OCR{self.version} knows, got "
                f"{target!r} with {', '.join(map(repr, unknown))}; quote another text."
            )
        # CTC puts a blank between equal neighbours.
        needed = len(target) + sum(a == b for a, b in pairwise(target))
        for height, width in sizes:
            columns = self._columns(height, width)
            if needed > columns:
                raise ValueError(
                    f"prompt {prompt!r}: expected a quoted text that fits images of height {height} and width "
                    f"{width}, in which the recogniser sees {columns} columns, got {target!r}, which needs {needed}; "
                    "use images that are wider for their height, or a shorter text."
                )
        return [self.class_of[character] for character in target]

    def _log_probabilities(self, images: Tensor, augment: bool, colour_invariant: bool = False) -> Tensor:
        """(B, columns, classes) in float32 or float64."""
        weight = self.network.head.weight
        # Resizing and everything after the logits is at least float32.
        precise = torch.promote_types(weight.dtype, torch.float32)
        x = images.to(weight.device, precise)
        x = F.interpolate(x, (HEIGHT, self._width(images)), mode="bilinear", align_corners=False, antialias=True)
        if colour_invariant:
            x = _shapes(x)
        if augment:
            x = self._augment(x)
        logits = self.network((x.flip(1) * 2 - 1).to(weight)).to(precise)  # BGR in [-1, 1]
        both = torch.logaddexp(logits[..., self.narrow], logits[..., self.wide])
        return logits.index_copy(-1, self.narrow, both)[..., self.kept].log_softmax(-1)

    def _augment(self, x: Tensor) -> Tensor:
        draws = [
            (torch.rand(4, generator=self.generator), torch.randn(x.shape[1:], generator=self.generator)) for _ in x
        ]
        uniform, normal = (torch.stack(numbers).to(x) for numbers in zip(*draws, strict=True))
        # Shift; affine_grid's unit is half a side.
        sides = torch.tensor([x.shape[3], x.shape[2]]).to(x)
        motion = torch.eye(2, 3).to(x).repeat(len(x), 1, 1)
        motion[:, :, 2] = (2 * uniform[:, :2] - 1) * MAX_SHIFT / (sides / 2)
        grid = F.affine_grid(motion, list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
        # Blur: a Gaussian of 5 taps per sample, along rows and columns, as convolutions grouped by sample and channel.
        sigma = (uniform[:, 2:3] * MAX_BLUR).clamp(min=1e-2)
        taps = torch.softmax(-0.5 * (torch.arange(-2, 3).to(x) / sigma) ** 2, -1).repeat_interleave(3, 0)
        flat = F.pad(x, (2, 2, 2, 2), mode="replicate").flatten(0, 1)[None]
        flat = F.conv2d(flat, taps[:, None, None, :], groups=len(taps))
        flat = F.conv2d(flat, taps[:, None, :, None], groups=len(taps))
        return flat[0].unflatten(0, (-1, 3)) + MAX_NOISE * uniform[:, 3].reshape(-1, 1, 1, 1) * normal


def _shapes(x: Tensor) -> Tensor:
    """Images (B, 3, H, W) without their colours: (B, 3, H, W) grey, standardised, the rarer side dark.

    The gradient treats the axis and its direction as constants, but not the mean and the spread, so that it vanishes
    along shifts and scalings of the colours.
    """
    centred = x - x.mean((2, 3), keepdim=True)
    pixels = centred.detach().flatten(2)
    axis = torch.linalg.eigh(pixels @ pixels.transpose(1, 2)).eigenvectors[:, :, -1]
    y = (centred * axis[:, :, None, None]).sum(1, keepdim=True)
    skew = y.detach().pow(3).mean((1, 2, 3), keepdim=True)
    y = torch.where(skew > 0, -y, y)
    y = y / (y.pow(2).mean((1, 2, 3), keepdim=True) + 1e-4).sqrt()
    # Text on a sixth of the image then lies near 0.1 and its background near 0.9.
    return (0.8 + 0.3 * y).expand_as(x)
