# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What docs/rewards.md says: its example runs, and its table is that of the specs."""

import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace

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


def test_the_example_with_columns_is_a_reward():
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if "def colourfulness" in block)
    calls: list[str] = []
    # What the last two lines need, to see what they pass.
    callback = SimpleNamespace(backward=lambda reward, images, prompts, columns: calls.append(str(columns)))
    names = {"torch": torch, "config": None, "SD3": None, "images": None, "prompts": None, "callback": callback}
    names["train"] = lambda config, backbone, reward: calls.append(reward.__name__)
    exec(code, names)
    assert calls == ["colourfulness", "{'colour': ['red'], 'strength': [0.5]}"]
    reward, images = load_reward(names["colourfulness"]), torch.rand(2, 3, 4, 4, requires_grad=True)
    both = reward(images, ["a", "b"], colour=["red", "blue"], strength=[0.5, 2.0], tag=["x", "y"])
    means = images.mean((2, 3))
    expected = torch.stack([means[0, 0], means[1, 2]]) - means.mean(1)
    torch.testing.assert_close(both, expected * torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(reward(images, ["a", "b"], colour=["red", "blue"]), expected)
    both.sum().backward()
    assert images.grad.abs().sum() > 0
