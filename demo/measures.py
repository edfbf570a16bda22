# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The shares of the demo's table as rewards of the user's own: 1 where a picture is right, 0 where it is not.

    PYTHONPATH=demo python training/evaluate_flowbp.py --config demo/evaluate_flowbp.yaml

`measures:read_v5` there names the factory below.
"""

from collections.abc import Callable, Sequence

import torch
from text_pictures import colours_right

from flowbp.rewards.ocr import OCRReward

Measure = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]


class ExactReading(torch.nn.Module):
    """`measure(images (B, 3, H, W) in [0, 1], prompts) -> (B,)`: does a recogniser read exactly the quoted text?

    Args:
        version: of the recogniser, see `OCRReward`.
    """

    def __init__(self, version: str) -> None:
        super().__init__()
        self.recogniser = OCRReward(version)

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self.recogniser.exact(images, prompts).float()


def read_v4() -> ExactReading:
    """Exact reading by the recogniser that the demo trains with."""
    return ExactReading("v4")


def read_v5() -> ExactReading:
    """Exact reading by the held-out judge."""
    return ExactReading("v5")


def colours() -> Measure:
    """Foreground and background have the colours that the prompt names."""
    return lambda images, prompts: colours_right(images, list(prompts)).float()
