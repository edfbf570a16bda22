# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts to the token ids of a reward's text encoder. Prompts that are too long are truncated, with a warning."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Tokens:
    """`tokens(prompts, device) -> (input_ids, attention_mask)`, both (B, max_length) and padded at the end.

    Args:
        reward: name, for the warning.
        tokenizer: of transformers.
        max_length: the text encoder's context, the special tokens included.

    Attributes:
        truncated: how many prompts were truncated so far. A warning appears whenever this has doubled, so that it does
            not flood a long run.
    """

    def __init__(self, reward: str, tokenizer: Any, max_length: int) -> None:
        self.reward, self.tokenizer, self.max_length = reward, tokenizer, max_length
        self.truncated = 0
        self._warned = 0

    def __call__(self, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        whole = self.tokenizer(list(prompts), verbose=False)["input_ids"]
        self._count(sum(len(ids) > self.max_length for ids in whole))
        encoded = self.tokenizer(
            list(prompts),
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return encoded["input_ids"].to(device), encoded["attention_mask"].to(device)

    def _count(self, truncated: int) -> None:
        self.truncated += truncated
        if self.truncated >= max(1, 2 * self._warned):
            self._warned = self.truncated
            logger.warning(
                "reward %r: %d prompts so far were longer than %d tokens and were truncated.",
                self.reward,
                self.truncated,
                self.max_length,
            )
