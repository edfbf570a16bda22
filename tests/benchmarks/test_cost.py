# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""benchmarks/cost.py: its instruments, its variants and its report, on a tiny model."""

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch

from flowbp import METHODS, get_method

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cost  # noqa: E402
import meters  # noqa: E402

CPU = torch.device("cpu")


def _bench(*options):
    return cost.build(cost.parse_args(["--model", "tiny", "--device", "cpu", *options]))


def _case(method, guidance_scale=3.5, num_steps=10):
    return cost.Case(
        method.draw(cost.stock_sigmas(num_steps), torch.Generator().manual_seed(1)),
        guidance_scale,
        method.unconditional_gradient and guidance_scale > 1,
        seed=1,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("cost") / "results" / "cost.json"
    options = ["--model", "tiny", "--device", "cpu", "--num_active", "1", "4", "--guidance_scale", "3.5"]
    threads = torch.get_num_threads()
    try:
        returned = cost.main([*options, "--repeats", "2", "--num_threads", "1", "--output", str(path)])
    finally:
        torch.set_num_threads(threads)
    written = json.loads(path.read_text(encoding="utf-8"))
    assert json.loads(json.dumps(returned)) == written
    return written, path.with_suffix(".md").read_text(encoding="utf-8")


# Instruments.


def test_saved_bytes_counts_each_storage_once_and_its_release():
    left = torch.randn(100, 30, requires_grad=True)
    right = torch.randn(30, 50, requires_grad=True)
    counter = meters.SavedBytes([right])
    with counter:
        product = left @ right
        squared = product * product
        assert counter.live == left.nbytes + product.nbytes
        squared.sum().backward()
    assert counter.live == 0
    assert counter.take_peak() == left.nbytes + product.nbytes
    assert counter.take_peak() == 0


def test_allocator_peaks_follow_the_stages():
    def run():
        stages = meters.Stages(CPU)
        stages.mark("rollout")
        first = torch.empty(3000, dtype=torch.float32)
        del first
        stages.mark("sweep")
        second = torch.empty(5000, dtype=torch.float32)
        third = torch.empty(2000, dtype=torch.float32)
        del second
        stages.mark("optimizer")
        del third
        stages.mark(None)

    peaks = meters.cpu_allocator_peaks(run)
    assert peaks == {"rollout": 12000, "sweep": 28000, "optimizer": 8000}


def test_stages_split_the_time():
    stages = meters.Stages(CPU)
    stages.mark("rollout")
    time.sleep(0.03)
    stages.mark("decode")
    stages.mark("rollout")
    time.sleep(0.02)
    stages.mark(None)
    time.sleep(0.02)
    assert 0.05 <= stages.seconds["rollout"] < stages.seconds["rollout"] + stages.seconds["decode"] < 5
    assert stages.cpu_seconds["rollout"] < 0.05
    assert stages.seconds["sweep"] == 0


# Variants.


@pytest.mark.parametrize("guidance_scale", [3.5, 1.0])
@pytest.mark.parametrize("name", METHODS)
def test_the_ways_of_one_graph_have_the_same_gradient(name, guidance_scale):
    num_steps = 12 if name == "refl" else 10
    bench = _bench("--batch", "2", "--num_inference_steps", str(num_steps))
    case = _case(get_method(name), guidance_scale, num_steps)
    gradients = {}
    for variant in ("sweep", "paper", "usual"):
        measured = cost.Measured()
        assert cost._run(measured, variant, bench, case, meters.Stages(CPU))
        gradients[variant] = measured.gradient
    for variant in ("paper", "usual"):
        difference = gradients["sweep"] - gradients[variant]
        # Measured: below 1e-6; float32 rounding and nothing else.
        assert difference.norm() < 2e-5 * gradients[variant].norm()
    assert gradients["usual"].norm() > 0


@pytest.mark.parametrize("unconditional_gradient", [False, True])
@pytest.mark.parametrize("variant", cost.VARIANTS)
def test_transformer_passes(variant, unconditional_gradient):
    bench = _bench()
    method = get_method("flowbp-sparse", num_active=3)
    case = dataclasses.replace(_case(method), unconditional_gradient=unconditional_gradient)
    batches = {True: [], False: []}

    def note(module, args, kwargs):
        batches[torch.is_grad_enabled()].append(len(kwargs["hidden_states"]))

    # A block inside, because the recorder stops gradients inside the transformer's own call.
    bench.pipe.transformer.transformer_blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    for _ in range(2):
        # Once before: the first recorded call of each kind runs with gradients, to see what it computes with.
        batches[True].clear()
        batches[False].clear()
        cost._run(cost.Measured(), variant, bench, case, meters.Stages(CPU))
    # Three active steps: the conditional branch alone, but for the usual way.
    both = variant == "usual" or unconditional_gradient
    alone = [1] * 3 if variant == "paper" and not unconditional_gradient else []
    assert batches == {False: [2] * 10 + alone, True: [2 if both else 1] * 3}


def test_saved_bytes_grow_with_the_batch():
    peaks = []
    for batch in (1, 2):
        bench = _bench("--batch", str(batch))
        measured = cost.Measured()
        cost._measure_memory(measured, "sweep", bench, _case(get_method("flowbp-sparse", num_active=2)))
        peaks.append(measured.peak_saved["sweep"])
    assert 1.7 < peaks[1] / peaks[0] <= 2


def test_too_little_memory_is_reported(monkeypatch):
    def exhausted(bench, case, stages):
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(cost, "UPDATES", {**cost.UPDATES, "paper": exhausted})
    bench, case = _bench(), _case(get_method("flowbp-sparse"))
    measured = cost.Measured()
    assert not cost._run(measured, "paper", bench, case, meters.Stages(CPU))
    assert cost.summary(measured) is None
    assert set(cost.compare(None, None).values()) == {None}


# The report.


def test_report_names_the_machine_and_the_versions(report):
    found, _ = report
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["versions"]) >= {"python", "flowbp", "torch", "diffusers", "transformers", "peft"}
    assert found["hardware"]["cpu"] and found["hardware"]["cores"] >= 1
    assert found["hardware"]["threads"] == 1 and found["hardware"]["gpu"] is None
    assert found["settings"]["method"] == "flowbp-sparse" and found["settings"]["repeats"] == 2
    assert found["settings"]["trainable_parameters"] < found["settings"]["transformer_parameters"]


def test_report_is_computed_from_the_repeats(report):
    found, _ = report
    assert [case["num_terms"] for case in found["cases"]] == [1, 4]
    for case in found["cases"]:
        for variant in cost.VARIANTS:
            numbers = case[variant]
            assert len(numbers["seconds_of_repeats"]) == 2
            assert len(set(numbers["seconds_of_repeats"])) == 2, "two timings are never equal"
            assert numbers["seconds"]["total"] == statistics.median(numbers["seconds_of_repeats"])
            by_stage = [numbers["seconds"][stage] for stage in cost.STAGES]
            # The medians of two repeats are means, which add up.
            assert sum(by_stage) == pytest.approx(numbers["seconds"]["total"])
            assert min(by_stage) > 0
            for name in ("peak_allocated_bytes", "peak_saved_bytes"):
                assert numbers[name]["total"] == max(numbers[name][stage] for stage in cost.STAGES)
            # Whatever is kept for backward is allocated.
            assert 0 < numbers["peak_saved_bytes"]["total"] <= numbers["peak_allocated_bytes"]["total"]
        for one, other in cost.PAIRS:
            pairs = zip(case[one]["seconds_of_repeats"], case[other]["seconds_of_repeats"], strict=True)
            ratio = statistics.median(mine / theirs for mine, theirs in pairs)
            assert case[f"{one}_to_{other}"]["seconds"] == ratio
        assert case["gradient_difference"].keys() == {"paper", "usual"}
        # The paper's way computes the same calls as the sweep, the usual way others.
        assert case["gradient_difference"]["paper"] < 2e-5
        assert 0 < case["gradient_difference"]["usual"] < 2e-5


def test_report_shows_constant_memory(report):
    one, four = report[0]["cases"]

    def saved(case, variant):
        return case[variant]["peak_saved_bytes"]["sweep"]

    assert saved(four, "sweep") == saved(one, "sweep")
    for variant in ("paper", "usual"):
        assert saved(four, variant) > 3.5 * saved(one, variant)
    # At one step the paper's way keeps what the sweep keeps, and the usual way both branches.
    assert saved(one, "paper") < 1.1 * saved(one, "sweep")
    assert saved(one, "usual") > 1.5 * saved(one, "sweep")


def test_targets_are_judged(report):
    found, _ = report
    by_name = {target["target"]: target for target in found["targets"]}
    case = found["cases"][1]
    clock = found["target_clock"]
    share = case["sweep_to_paper"]
    assert by_name["guidance 3.5: memory / paper's way, K = 4"]["value"] == share["peak_allocated_bytes"]
    assert by_name["guidance 3.5: seconds / paper's way, K = 4"]["value"] == share[clock]
    floor = by_name["guidance 3.5: seconds / floor, K = 4"]
    assert floor["value"] == case["sweep_to_floor"][clock] and floor["bound"] == 1.03
    assert not any("K = 8" in name for name in by_name)
    for target in found["targets"]:
        assert target["reached"] == (target["value"] <= target["bound"])


def test_tables_hold_the_numbers_and_the_papers_way_first(report):
    found, table = report
    case = found["cases"][1]
    assert "| guidance | K | sweep | paper | usual | floor | sweep / paper | sweep / usual | sweep / floor |" in table
    seconds = [f"{case[variant]['cpu_seconds']['total']:.2f}" for variant in cost.VARIANTS]
    assert f"| 3.5 | 4 | {' | '.join(seconds)} | {case['sweep_to_paper']['cpu_seconds']:.2f} |" in table
    assert f"{case['sweep']['peak_saved_bytes']['total'] / 2**20:.2f}" in table
    assert found["hardware"]["cpu"] in table


# Models and the command line.


@pytest.mark.parametrize(("name", "parameters"), [("100m", 102.6e6), ("sd3.5-medium", 2243e6)])
def test_model_sizes(name, parameters):
    cls, config = cost.MODELS[name].transformer
    with torch.device("meta"):
        transformer = cls(**config)
    assert sum(p.numel() for p in transformer.parameters()) == pytest.approx(parameters, rel=1e-3)


def test_default_numbers_of_active_steps():
    def counts(name, num_steps=10):
        return [method.options["num_active"] for method in cost.chosen_methods(name, None, num_steps)]

    assert counts("flowbp-sparse") == [1, 2, 4, 8]
    assert counts("flowbp-bridge") == [2, 4, 8]
    assert counts("flowbp-sparse", num_steps=4) == [1, 2, 4]
    assert [method.options["last_k"] for method in cost.chosen_methods("draft-k", [3], 10)] == [3]
    assert len(cost.chosen_methods("flowbp-lagrange", None, 10)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "flowbp-lagrange", "--num_active", "3"], "flowbp-lagrange has no number of active steps"),
        (["--num_active", "11"], "use at most 10"),
        (["--resolution", "100"], "--resolution must be a multiple of 16"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--output", "cost.txt"], "--output must end in .json, got cost.txt"),
        (["--steps_per_forward", "1"], "unrecognized arguments"),
        (["--num_activ", "2"], "unrecognized arguments"),
    ],
)
def test_refusals(options, message, capsys):
    with pytest.raises(SystemExit) as error:
        cost.parse_args(options)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
