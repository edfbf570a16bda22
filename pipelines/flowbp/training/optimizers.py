# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The optimizers of `--optimizer`."""

from collections.abc import Sequence

import torch

from .config import TrainingConfig


def make_optimizer(
    config: TrainingConfig, parameters: Sequence[torch.nn.Parameter], foreach: bool | None = None
) -> torch.optim.Optimizer:
    """The optimizer of a run.

    Args:
        config: settled.
        parameters: that are trained.
        foreach: see `torch.optim.AdamW`.
    """
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        foreach=foreach,
    )
