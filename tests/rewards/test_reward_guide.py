# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What docs/rewards.md says: its example runs, and its table is that of the specs."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from flowbp.rewards import REWARDS, RewardSpec, load_reward

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "rewards.md").read_text(encoding="utf-8")


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


def test_the_table_is_that_of_the_specs(monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("rewards_table", DOCS / "rewards_table.py")
    rewards_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rewards_table)
    assert rewards_table.updated(GUIDE) == GUIDE, "run docs/rewards_table.py --write"
    # Rewards that differ in their names only share a line.
    cells = {"score": "0 or 1", "weights": "none", "licence": "MIT", "is_trainable": False}
    needs = frozenset({"metadata_path"})
    for name in ("new", "newer"):
        monkeypatch.setitem(REWARDS, name, RewardSpec(name, "New", REWARDS["geneval"].factory, **cells, needs=needs))
    line = (
        "| `new`, `newer` | 0 or 1 | none | MIT | no | `metadata_path`, the benchmark's `evaluation_metadata.jsonl` |"
    )
    assert line not in GUIDE and line in rewards_table.updated(GUIDE).splitlines()
