# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Rewards by name: `load_reward("ocr")`, weighted sums, and the user's own.

A reward is `reward(images (B, 3, H, W) in [0, 1], prompts, **columns) -> (B,)`; it gets those columns of the
prompts' table that its signature has a place for. With an attribute `takes_videos = True` it gets videos
`(B, F, 3, H, W)`; of others, the mean over frames counts. It is differentiable in the images unless it is a judge.
`REWARDS` has one `RewardSpec` per reward.
"""

from .build import check_columns, check_prompts, check_videos, load_reward, option_names, part_names, reward_needs
from .specs import REWARDS, RewardSpec, reward_spec, titles
from .weighted import WeightedReward, part_means

__all__ = [
    "REWARDS",
    "RewardSpec",
    "WeightedReward",
    "check_columns",
    "check_prompts",
    "check_videos",
    "load_reward",
    "option_names",
    "part_means",
    "part_names",
    "reward_needs",
    "reward_spec",
    "titles",
]
