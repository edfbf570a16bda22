# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Means, intervals and win rates."""

import math

import numpy as np
import pytest
import torch

from flowbp.judging.statistics import estimate, interval, summarise, wins
from flowbp.judging.tables import table_markdown


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_interval_is_that_of_a_normal_mean() -> None:
    values = normal(400) + 3
    low, high = interval(values)
    half = 1.96 * values.std().item() / 20
    assert low == pytest.approx(values.mean().item() - half, abs=0.02)
    assert high == pytest.approx(values.mean().item() + half, abs=0.02)
    assert interval(torch.ones(5, dtype=torch.float64)) == (1.0, 1.0)


@pytest.mark.parametrize("kind", ["skewed", "share"])
def test_interval_covers_the_true_mean_as_often_as_it_says(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    covered = []
    for _ in range(300):
        if kind == "skewed":
            values, truth = torch.empty(60, dtype=torch.float64).exponential_(generator=generator), 1.0
        else:
            values, truth = (torch.rand(60, generator=generator) < 0.3).double(), 0.3
        low, high = interval(values, draws=1000)
        covered.append(low <= truth <= high)
    # 95 % less what percentiles lose on 60 values; three standard deviations of 300 tries are 4 points.
    assert 0.89 <= np.mean(covered) <= 0.99


def test_interval_in_parts_is_the_interval_at_once() -> None:
    values = normal(37)
    chosen = torch.randint(37, (2500, 37), generator=torch.Generator().manual_seed(0))
    at_once = torch.quantile(values[chosen].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert list(interval(values, draws=2500)) == at_once


def test_wins_count_ties_half_and_average_over_a_prompt_s_images() -> None:
    scores = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]])
    base = torch.tensor([[0.0, 1.0], [0.0, 0.5], [1.0, 1.0]])
    assert wins(scores, base).tolist() == [0.5, 0.75, 0.0]


def test_records_are_means_over_prompts_and_paired_changes() -> None:
    base, better = normal(50, 3), normal(50, 3) + normal(50, 3, seed=1).abs()
    share = (normal(50, 3, seed=2) > 0).double()
    scores = {"a": {"base": base, "lora": better}, "b": {"base": share, "lora": 1 - share}}
    records = {(record["reward"], record["model"]): record for record in summarise(scores, {})}
    assert not records["a", "base"]["share"] and records["b", "lora"]["share"]
    assert "change" not in records["a", "base"] and "groups" not in records["a", "base"]
    record = records["a", "lora"]
    assert record["score"]["mean"] == pytest.approx(better.mean().item())
    assert record["change"]["mean"] == pytest.approx((better - base).mean().item())
    assert record["win_rate"] == {"mean": 1.0, "interval": [1.0, 1.0]}
    # Pairing by noise: the interval of the change is much narrower than those of the scores.
    width = np.diff(record["change"]["interval"])[0]
    assert tuple(record["change"]["interval"]) == interval((better - base).mean(1))
    assert width < 0.8 * np.diff(record["score"]["interval"])[0]


def test_groups_have_columns_and_overall_is_the_mean_of_their_means() -> None:
    values = torch.tensor([[1.0], [1.0], [1.0], [0.0], [0.0]], dtype=torch.float64)
    groups = {"geneval": {"single_object": [0, 1, 2], "position": [3, 4]}}
    record, other = summarise({"geneval": {"base": values}, "clip": {"base": values}}, groups)
    assert list(record["groups"]) == ["single_object", "position"] and "groups" not in other
    assert [estimate["mean"] for estimate in record["groups"].values()] == [1.0, 0.0]
    assert record["overall"] == {"mean": 0.5, "interval": [0.5, 0.5]} and record["score"]["mean"] == 0.6
    places = {"x": {"a": list(range(100)), "b": list(range(100, 300))}}
    noisy = summarise({"x": {"base": normal(300, 1)}}, places)[0]["overall"]
    # Groups of 100 and 200 prompts of standard deviation 1.
    assert np.diff(noisy["interval"])[0] == pytest.approx(2 * 1.96 * np.sqrt(1 / 100 + 1 / 200) / 2, rel=0.15)


def test_images_without_a_score_are_left_out_everywhere() -> None:
    nan = math.nan
    scores = {
        "judge": {
            "base": torch.tensor([[1.0, 2.0], [nan, 4.0], [5.0, 6.0], [nan, 1.0]], dtype=torch.float64),
            "lora": torch.tensor([[2.0, nan], [7.0, 3.0], [6.0, 8.0], [1.0, nan]], dtype=torch.float64),
        }
    }
    base, lora = summarise(scores, {"judge": {"one": [0, 3], "two": [1, 2]}})
    assert base["left_out"] == lora["left_out"] == 4
    assert base["score"]["mean"] == pytest.approx((1 + 4 + 5.5) / 3)
    assert lora["score"]["mean"] == pytest.approx((2 + 3 + 7) / 3)
    assert lora["change"]["mean"] == pytest.approx((1 - 1 + 1.5) / 3)
    assert lora["win_rate"]["mean"] == pytest.approx((1 + 0 + 1) / 3)
    assert lora["groups"]["one"]["mean"] == 2.0 and lora["groups"]["two"]["mean"] == pytest.approx(5.0)
    assert "(4 without a score)" in table_markdown([base, lora])
    silent = {"base": torch.tensor([[nan], [1.0]], dtype=torch.float64)}
    assert list(summarise({"judge": silent}, {"judge": {"one": [0], "two": [1]}})[0]["groups"]) == ["two"]
    assert summarise({"judge": {"base": torch.full((2, 1), nan, dtype=torch.float64)}}, {}) == []


def test_a_model_without_scores_takes_none_from_the_others() -> None:
    share = (normal(20, 2) > 0).double()
    groups = {"x": {"one": list(range(10)), "two": list(range(10, 20))}}
    whole = summarise({"x": {"base": share, "good": 1 - share}}, groups)
    found = summarise({"x": {"base": share, "broken": torch.full_like(share, math.nan), "good": 1 - share}}, groups)
    assert [found[0], found[2]] == whole and whole[0]["share"]
    broken = {"score": None, "change": None, "win_rate": None, "groups": {}, "overall": None}
    assert found[1] == {"reward": "x", "model": "broken", "share": True, "left_out": 0, **broken}
    # Without the base model's scores there is nothing to compare with.
    base, good = summarise({"x": {"base": torch.full_like(share, math.nan), "good": share}}, {})
    assert base["score"] is None and good["score"] == whole[0]["score"]
    assert good["change"] is None and good["win_rate"] is None


def test_an_estimate_is_over_prompts_and_leaves_out_images_without_a_score() -> None:
    found = estimate([1.0, 2.0, 3.0, 5.0], 2)
    assert found["mean"] == 2.75 and 1.5 <= found["low"] < 2.75 < found["high"] <= 4.0
    # Images of a prompt are averaged first, so a prompt with one score counts as much as the others.
    assert estimate([1.0, None, 3.0, 5.0, math.nan, None], 2)["mean"] == 2.5
    assert estimate([None, None], 1) == {"mean": None, "low": None, "high": None}
    assert estimate([1.0, 3.0], 2) == {"mean": 2.0, "low": None, "high": None}
    values = normal(400)
    found = estimate(values.tolist(), 1)
    assert (found["low"], found["high"]) == interval(values) and found["mean"] == values.mean().item()
