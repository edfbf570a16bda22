# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What docs/rewards.md says: its example runs, and its table has every reward."""

import re
import sys
from pathlib import Path

import torch

from flowbp.rewards import REWARDS, load_reward

GUIDE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def test_the_example_is_a_reward(tmp_path, monkeypatch):
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if "def make_reward" in block)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    (tmp_path / "my_reward.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        images = torch.rand(2, 3, 40, 50, requires_grad=True)
        single, double = (load_reward("my_reward:make_reward", strength=strength) for strength in (1.0, 2.0))
        scores = single(images, ["a", "b"])
        assert scores.shape == (2,) and (scores < 0).all()
        torch.testing.assert_close(double(images, ["a", "b"]), 2 * scores)
        load_reward("my_reward:make_reward:0.5,toy_reward:make_reward")(images, ["a", "b"]).sum().backward()
        assert images.grad.abs().sum() > 0
    finally:
        sys.modules.pop("my_reward", None)


def test_the_table_has_every_reward():
    rows = [line.split("|")[1] for line in GUIDE.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(named) == sorted([*REWARDS, "package.module:factory"])
