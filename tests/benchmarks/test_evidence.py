# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""benchmarks/results.py, gradients.py and documents.py: their queue, a tiny run, statistics, and the documents."""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import documents  # noqa: E402
import gradients  # noqa: E402
import results  # noqa: E402

SMALL = replace(results.TINY, updates=1, lines=(results.REFERENCE,), seeds=1, rates=(3e-4,), prompts=1)


# The queue.


def in_order(plan: results.Plan, reads: Mapping[str, float], ratios: Mapping[str, float]) -> list[str]:
    """Keys of the jobs in the order in which a single worker does them, with these results by line and rate."""
    found: dict[str, Any] = {}
    while (key := next((job.key for job in plan.jobs(found) if job and job.key not in found), None)) is not None:
        rate, _, rest = key.partition(" rate ")[2].partition(" seed ")
        read = reads.get(f"{rate} seed {rest[:3]}", reads.get(rate, 0.0))
        found[key] = {"ratio": ratios.get(key.removeprefix("cost "), 1.0), "read_v5": read}
    assert None not in plan.jobs(found)
    return list(found)


@pytest.mark.parametrize(
    ("reads", "tried", "again", "chosen"),
    [
        ({"0.0001": 0.5, "0.0003": 0.4, "0.001": 0.3}, ["0.0003", "0.001", "0.0001"], [], "0.0001"),
        ({"0.0001": 0.1, "0.0003": 0.4, "0.001": 0.3}, ["0.0003", "0.001", "0.0001"], [], "0.0003"),
        # One run each does not tell: a second one, of another seed, decides.
        (
            {"0.0003": 0.2, "0.001": 0.3, "0.003": 0.32, "0.003 seed 101": 0.27},
            ["0.0003", "0.001", "0.003"],
            ["0.003", "0.001"],
            "0.001",
        ),
        ({"0.0003": 0.3, "0.001": 0.3}, ["0.0003", "0.001", "0.0001"], ["0.0003", "0.001"], "0.0003"),
    ],
)
def test_the_queue(reads: dict[str, float], tried: list[str], again: list[str], chosen: str) -> None:
    plan = results.Plan(results.Size(lines=(results.REFERENCE, "full"), ablations=(), seeds=2, few=1))
    keys = in_order(plan, reads, {"full": 1.6})
    of_full = [key.removeprefix("full rate ") for key in keys if key.startswith("full rate")]
    # The rate is chosen with a seed of its own. One run is judged at equal seconds and at equal updates.
    expected = [f"{rate} seed 100 updates 75" for rate in tried]
    expected += [f"{rate} seed 101 updates 75" for rate in again]
    expected += [f"{chosen} seed {seed} updates 120" for seed in (0, 1)]
    assert of_full == expected
    assert plan.judged_after("full", {"cost full": {"ratio": 1.6}}) == [75, 120]
    assert plan.judged_after("refl", {"cost refl": {"ratio": 0.75}}) == [120, 160]
    assert plan.judged_after("refl endpoint sample", {"cost refl endpoint sample": {"ratio": 0.75}}) == [160]


def test_every_line_is_one_of_the_table_of_methods_and_can_be_given_on_the_command_line() -> None:
    plan = results.Plan(results.Size())
    for name, line in results.ALL_LINES.items():
        method = results.get_method(line.method, **line.options)
        options = {**plan.options(line), **results.TINY.options, "num_inference_steps": 10}
        with results.demo_runs.demo_config(options) as config:
            assert config.make_method("sd3") == method, name
            assert all(getattr(config, option) == value for option, value in line.run.items()), name
    assert len({json.dumps([line.method, line.options, line.run]) for line in results.ALL_LINES.values()}) == len(
        results.ALL_LINES
    )


def test_a_tiny_run_is_kept_collected_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, output = tmp_path / "state", tmp_path / "results" / "demo.json"
    state.mkdir()
    results.work(state, SMALL)
    kept = {path: path.read_bytes() for path in state.glob("*.json")}
    assert len(kept) == 4
    # What a killed worker leaves: no record. Only this job is done again, and ends as it did.
    (last,) = state.glob("*seed_0*.json")
    last.unlink()
    results.work(state, SMALL)
    again = {path: path.read_bytes() for path in state.glob("*.json")}
    assert again.keys() == kept.keys() and [path for path in kept if again[path] != kept[path]] in ([], [last])
    old, new = (json.loads(each[last]) for each in (kept, again))
    measured = {"reward", "read_v4", "read_v5", "colours", "training", "gradient_norm", "options"}
    assert {name: old[name] for name in measured} == {name: new[name] for name in measured}
    assert old["updates"] == 1 and old["cpu_seconds"] > 0 and old["reward"] < 0
    results.collect(state, output, SMALL)
    report = json.loads(output.read_text(encoding="utf-8"))
    assert len(report["records"]) == 4 and len(report["environments"]) == 1
    # A run that is judged on the way ends as one that is not, and its prefix as a shorter run.
    train = partial(results.Plan(SMALL)._train, results.REFERENCE, 3e-4, 0, base=report["records"][0], check=int)
    both, one = train([1, 2]), train([2])
    (earlier,) = both.pop("earlier")
    assert {name: both[name] for name in measured} == {name: one[name] for name in measured}
    assert {name: earlier[name] for name in measured & earlier.keys()} == {
        name: old[name] for name in measured & earlier.keys()
    }
    (state / "stop").touch()
    with pytest.raises(SystemExit, match="Stopped"):
        results.work(state, SMALL)


# Gradients.


def test_the_statistics_of_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, others, draws = (torch.randn(*shape, 4000, generator=generator) for shape in ((1, 1), (40, 1), (40, 6)))
    found = mean + 2 * others + 3 * draws
    shares = gradients.compare(found, (mean + 2 * others)[:, 0])
    assert [shares[name] for name in ("of_mean", "of_batches", "of_draws")] == pytest.approx(
        [1 / 14, 4 / 14, 9 / 14], abs=0.01
    )
    assert shares["cosine"] == pytest.approx((5 / 14) ** 0.5, abs=0.01)
    assert shares["norm_ratio"] == pytest.approx((14 / 5) ** 0.5, abs=0.02)
    assert shares["cosine_of_means"] == pytest.approx(1, abs=0.02)
    # Of two gradients, one that is twice the other.
    double = gradients.compare(2 * others, others[:, 0])
    assert double["cosine"] == pytest.approx(1) and double["norm_ratio"] == pytest.approx(2)


def test_gradients_of_the_demo_against_exact_backpropagation(tmp_path: Path) -> None:
    output = tmp_path / "gradients.json"
    gradients.main(["--tiny", "--output", str(output)])
    (found,) = json.loads(output.read_text(encoding="utf-8"))["states"].values()
    # Of the lines before it, the LoRA is moved along the gradient for a while.
    assert all(line["gains"]["1"] != 0 for line in found["lines"].values())
    assert found["lines"]["full"]["cosine"] == pytest.approx(1, abs=1e-4)
    assert found["lines"]["full"]["norm_ratio"] == pytest.approx(1, abs=1e-4)
    assert 0 < found["lines"]["leapalign"]["cosine"] < 1
    # The coupling that is cut makes early steps' norms smaller; the last step has no other after it.
    exact, cut = found["norms"]["1"], found["norms"]["0"]
    assert exact["0"] > cut["0"] and exact["3"] == pytest.approx(cut["3"], rel=1e-3)
    gaps = {(gap["weights"], gap["order"], gap["length"]): gap["gap"] for gap in found["gaps"]}
    assert gaps["lagrange", 1, 1] < 1e-6 < gaps["lagrange", 3, 4] < gaps["lagrange", 1, 4]


# Documents.


def test_documents_agree_with_the_results() -> None:
    assert documents.differing(write=False) == [], "run benchmarks/documents.py --write"


def test_a_table_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(documents.TABLES, "new", lambda: "| 2 |\n")
    text = f"Before.\n\n{documents.BEGIN.format('new')}| 1 |\n{documents.END}\nAfter.\n"
    assert documents.updated(text) == text.replace("1", "2")
    with pytest.raises(ValueError, match="expected one of"):
        documents.updated(text.replace("new", "old"))
