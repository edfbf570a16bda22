# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Rewards for the tests of resuming and of skipped updates: the toy reward, at random, waiting, or not finite.

What goes wrong is said by environment variables, which reach processes that tests start. Calls are counted from 1, and
only those that train: images of evaluations and validations require no gradients.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import toy_reward

Reward = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]


def make_random_reward() -> Reward:
    """The toy reward times a factor that is drawn from the global generators of torch, NumPy and Python."""
    reward = toy_reward.make_reward()

    def score(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        drawn = torch.rand(len(prompts)) + np.random.random() + random.random()
        return reward(images, prompts) * (1 + 0.1 * drawn).to(images)

    return score


def make_opposite_reward() -> Reward:
    """What falls as the toy reward rises: training raises the guard's alarm about it."""
    reward = toy_reward.make_reward()
    return lambda images, prompts: -reward(images, prompts)


def make_signalling_reward() -> Reward:
    """A held-out reward that sends SIGTERM to its process when it judges the image FLOWBP_TEST_SIGNAL_CALL."""
    calls = []

    def score(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        calls.append(1)
        if len(calls) == int(os.environ["FLOWBP_TEST_SIGNAL_CALL"]):
            os.kill(os.getpid(), signal.SIGTERM)
        return images.flatten(1).mean(1)

    return score


def make_waiting_reward() -> Reward:
    """The toy reward, which waits at training call FLOWBP_TEST_WAIT_CALL.

    It writes its process' number to the file `reached-RANK` of the folder FLOWBP_TEST_WAIT, and waits for `go` there.
    FLOWBP_TEST_WAIT_AFTER: it does so only where this file is there.
    """
    reward, calls = toy_reward.make_reward(), []

    def score(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        calls.append(images.requires_grad)
        is_time = Path(os.environ.get("FLOWBP_TEST_WAIT_AFTER", "/")).exists()
        if images.requires_grad and sum(calls) == int(os.environ.get("FLOWBP_TEST_WAIT_CALL", "0")) and is_time:
            folder = Path(os.environ["FLOWBP_TEST_WAIT"])
            partial = folder / f"partial-{os.getpid()}"
            partial.write_text(str(os.getpid()))
            partial.rename(folder / f"reached-{os.environ.get('RANK', '0')}")
            while not (folder / "go").exists():
                time.sleep(0.01)
        return reward(images, prompts)

    return score


def make_faulty_reward() -> Reward:
    """The toy reward, not finite as FLOWBP_TEST_FAULT says, for the first sample only.

    It is a JSON object: `kind` is "nan" or "inf" (the reward), or "gradient" (NaN, of a reward that is finite);
    `calls` are the training calls that it happens at; `rank` is the process.
    """
    reward, calls = toy_reward.make_reward(), []
    fault = json.loads(os.environ.get("FLOWBP_TEST_FAULT", '{"calls": []}'))

    def score(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        calls.append(images.requires_grad)
        scores = reward(images, prompts)
        if not images.requires_grad or sum(calls) not in fault["calls"]:
            return scores
        if int(os.environ.get("RANK", "0")) != fault["rank"]:
            return scores
        first = torch.arange(len(scores)) == 0
        if fault["kind"] == "gradient":
            # sqrt has an infinite slope at 0, and 0 times that is NaN.
            return scores + first * (0 * images.flatten(1).sum(1)).sqrt()
        return torch.where(first, scores.new_tensor(float(fault["kind"])), scores)

    return score
