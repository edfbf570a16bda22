# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The toy reward, which ends its process without a word at the call that FLOWBP_TEST_LAST_CALL names."""

import os
import signal
from collections.abc import Callable, Sequence

import torch
import toy_reward


def make_reward() -> Callable[[torch.Tensor, Sequence[str]], torch.Tensor]:
    """The toy reward; its process is killed as by the system, so that nothing can be tidied up."""
    reward, calls = toy_reward.make_reward(), []

    def score(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        calls.append(len(prompts))
        if len(calls) == int(os.environ.get("FLOWBP_TEST_LAST_CALL", "0")):
            os.kill(os.getpid(), signal.SIGKILL)
        return reward(images, prompts)

    return score
