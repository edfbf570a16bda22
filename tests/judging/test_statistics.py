# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Means, intervals and win rates."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from flowbp.judging.statistics import estimate, interval, over_seeds, pairwise, summarise, wins
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
    assert record["win_rate"] == {"mean": 1.0, "interval": [1.0, 1.0], "over": "prompts"}
    assert record["against"] == "base" and "against" not in records["a", "base"]
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
    assert (
        record["overall"] == {"mean": 0.5, "interval": [0.5, 0.5], "over": "prompts"}
        and record["score"]["mean"] == 0.6
    )
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
    broken |= {"share": True, "left_out": 0, "seeds": 0, "against": "base"}
    assert found[1] == {"reward": "x", "model": "broken", **broken}
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


# Several seeds of a method.


def welch(one: list[float], other: list[float]) -> list[float]:
    found = scipy.stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    return pytest.approx([found.low, found.high], rel=1e-6)


def student(values: list[float]) -> list[float]:
    return pytest.approx(list(scipy.stats.t.interval(0.95, len(values) - 1, np.mean(values), scipy.stats.sem(values))))


def seeds_of(*lifts: float) -> list[torch.Tensor]:
    return [normal(30, 2, seed=place + 1) + lift for place, lift in enumerate(lifts)]


def test_an_interval_over_seeds_is_student_s_and_between_two_methods_welch_s() -> None:
    base = normal(30, 2)
    scores = {"base": base, **dict(zip("abcde", seeds_of(0.1, 0.3, 0.9, 0.5, 0.6), strict=True))}
    lines = {"base": ["base"], "three": [*"abc"], "two": [*"de"]}
    means = {name: values.mean().item() for name, values in scores.items()}
    three, two = [means[name] for name in "abc"], [means[name] for name in "de"]
    groups = {"x": {"one": [0, 1], "rest": list(range(2, 30))}}
    records = {record["model"]: record for record in summarise({"x": scores}, groups, lines)}
    assert [record["seeds"] for record in records.values()] == [1, 3, 2]
    # The base model was not trained: its interval is over prompts, and a difference to it varies with the seeds alone.
    assert records["base"]["score"] == {
        "mean": pytest.approx(means["base"]), "interval": list(interval(base.mean(1))), "over": "prompts"
    }  # fmt: skip
    for name, of_seeds in (("three", three), ("two", two)):
        assert records[name]["score"]["mean"] == pytest.approx(np.mean(of_seeds))
        assert records[name]["score"]["over"] == "seeds" and records[name]["score"]["interval"] == student(of_seeds)
        differences = [value - means["base"] for value in of_seeds]
        assert records[name]["change"]["interval"] == student(differences)
        assert records[name]["win_rate"]["over"] == "seeds"
        group = [scores[seed][:2].mean().item() for seed in lines[name]]
        assert records[name]["groups"]["one"]["interval"] == student(group)
        assert records[name]["overall"]["interval"] == student(
            [(scores[seed][:2].mean().item() + scores[seed][2:].mean().item()) / 2 for seed in lines[name]]
        )
    against = {record["model"]: record for record in summarise({"x": scores}, {}, lines, "three")}
    assert against["two"]["against"] == "three" and "change" not in against["three"]
    assert against["two"]["change"]["mean"] == pytest.approx(np.mean(two) - np.mean(three))
    assert against["two"]["change"]["interval"] == welch(two, three)
    assert against["base"]["change"]["interval"] == student([means["base"] - value for value in three])
    rates = [wins(scores[one], scores[other]).mean().item() for one in "de" for other in "abc"]
    assert against["two"]["win_rate"]["mean"] == pytest.approx(np.mean(rates))


@pytest.mark.parametrize("shape", [(2, 1), (3, 2), (40, 25)])
def test_intervals_over_seeds_cover_the_true_difference_as_often_as_they_say(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    covered = []
    for _ in range(400):
        one = 2 * torch.randn(shape[0], 1, generator=generator, dtype=torch.float64)
        other = torch.randn(1, shape[1], generator=generator, dtype=torch.float64)
        low, high = over_seeds(one - (other if shape[1] > 1 else 0))
        covered.append(low <= 0 <= high)
    assert 0.91 <= np.mean(covered) <= 0.985


def test_intervals_over_seeds_at_their_edges() -> None:
    assert over_seeds(torch.ones(3, 2, dtype=torch.float64)) == (1.0, 1.0)
    # Shares stay shares, however few the seeds.
    share = [(normal(30, 1, seed=seed) > edge).double() for seed, edge in ((1, -2.0), (2, 0.0))]
    scores = {"base": share[1], "a": share[0], "b": share[1]}
    record = summarise({"x": scores}, {}, {"base": ["base"], "line": ["a", "b"]})[1]
    assert record["score"]["interval"] == [0.0, 1.0] and record["win_rate"]["interval"] == [0.0, 1.0]
    assert record["change"]["interval"][1] > 1
    # A seed without scores does not count; of a single one that is left the interval is over prompts.
    broken = torch.full_like(share[0], math.nan)
    record = summarise({"x": {**scores, "b": broken}}, {}, {"base": ["base"], "line": ["a", "b"]})[1]
    alone = summarise({"x": {"base": share[1], "line": share[0]}}, {})[1]
    assert record == alone and record["seeds"] == 1


def test_every_two_lines_have_a_paired_difference() -> None:
    base, one, two, other = normal(30, 2), *seeds_of(0.2, 0.4, 0.1)
    one = base + 0.01 * one
    one[3, 1] = math.nan
    scores = {"x": {"base": base, "one": one, "a": two, "b": other}, "none": {"base": one * math.nan}}
    lines = {"base": ["base"], "one": ["one"], "seeds": ["a", "b"]}
    found = {(pair["model"], pair["against"]): pair for pair in pairwise(scores, lines)}
    assert len(found) == 6 and {pair["reward"] for pair in found.values()} == {"x"}
    records = {record["model"]: record for record in summarise({"x": scores["x"]}, {}, lines)}
    for name in ("one", "seeds"):
        assert found[name, "base"]["difference"]["mean"] == pytest.approx(records[name]["change"]["mean"])
        assert found[name, "base"]["difference"]["interval"] == pytest.approx(records[name]["change"]["interval"])
    for (name, against), pair in found.items():
        there, back = pair["difference"], found[against, name]["difference"]
        assert there["mean"] == -back["mean"] and there["interval"] == [-back["interval"][1], -back["interval"][0]]
        assert there["over"] == ("seeds" if "seeds" in (name, against) else "prompts")
