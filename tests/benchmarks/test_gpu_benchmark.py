# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu.py on a CPU with tiny models, and the journal in which it writes its results."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu_measures import busy_and_gaps  # noqa: E402
from journal import Journal  # noqa: E402

PARTS = ("exact", "replays", "scripts", "speed", "full", "waiting", "sd3")


def _run(*options):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    ended = _run("--out", folder, "--tiny", "--parts", *PARTS)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    report = json.loads((folder / "gpu.json").read_text(encoding="utf-8"))
    assert [path.name for path in folder.iterdir()] == ["gpu.json"]
    assert report["is_tiny"] and report["versions"]["torch"] == torch.__version__
    assert report["cudnn_attention"] is False
    assert list(report["parts"]) == list(PARTS)
    return report["parts"]


def test_gradients_are_exact(parts):
    bounds = {"float64": 1e-13, "float32": 1e-5, "bfloat16": 0.05}
    assert len(parts["exact"]) == 12
    for name, found in parts["exact"].items():
        backbone, dtype = name.split(", ")[:2]
        assert backbone in ("SD3", "FLUX.1", "FLUX.2-Klein")
        del found["took"]
        # This is the rounding of the stock pipeline.
        found.pop("stock pipeline's autograd, float64", None)
        assert len(found) >= 3
        assert all(0 <= value < bounds[dtype] for value in found.values()), (name, found)


def test_wrong_replays_are_told_from_correct_ones(parts):
    assert len(parts["replays"]) == 6
    for name, found in parts["replays"].items():
        if "tolerance" not in found:
            continue
        tolerance = found["tolerance"]
        kinds = {kind: numbers for kind, numbers in found.items() if isinstance(numbers, dict)}
        assert {"whole", "whole, with gradients", "one sample alone", "wrong: LoRA lost"} <= set(kinds)
        for kind, numbers in kinds.items():
            assert 0 <= numbers["least"] <= numbers["median"] <= numbers["most"] < math.inf
            if kind == "wrong: LoRA lost":
                # Too small for a tolerance.
                assert 0 < numbers["most"] < tolerance
            elif kind.startswith("wrong"):
                assert numbers["least"] > tolerance, (name, kind)
            else:
                assert numbers["most"] < tolerance, (name, kind)
    sd3 = parts["replays"]["sd3.5-medium"]
    assert {"conditional samples alone", "wrong: other branch's samples"} <= set(sd3)


def test_updates_are_timed_by_stage(parts):
    timed = {name: found for name, found in parts["sd3"].items() if "stages" in found}
    for batch in ("batch 1", "batch 4"):
        assert {f"{batch}, sparse K=4, {variant}" for variant in ("sweep", "paper", "floor", "usual")} <= set(timed)
    assert {"batch 1, flowbp-lagrange", "batch 1, leapalign", "batch 4, full"} <= set(timed)
    # The paper's way makes the sweep's transformer calls.
    assert parts["sd3"]["batch 1, gradients against the sweep's"]["paper"] < 1e-3
    for found in timed.values():
        assert sum(found["stages"].values()) == pytest.approx(found["seconds"][-1], rel=1e-2)
        assert 0 < found["gradient_norm"] < math.inf


def test_a_resumed_script_ends_like_the_first(parts):
    (found,) = parts["scripts"].values()
    assert found["equal"] is True and len(found["seconds"]) == 2


def test_the_lora_s_dtype_is_compared(parts):
    assert 0 < parts["speed"]["LoRA in float32, gradients"]["bf16"] < 0.2
    norms = [parts["speed"][f"LoRA in {dtype}"]["gradient_norm"] for dtype in ("bf16", "float32")]
    assert norms[0] != norms[1] and norms[0] == pytest.approx(norms[1], rel=0.05)


def test_all_weights_are_trained(parts):
    for batch in (1, 4):
        assert parts["full"][f"batch {batch}, shard"]["dtype"] == "torch.float32"
        assert parts["full"][f"batch {batch}"]["gradient_norm"] > 0


def test_waiting_needs_a_gpu_but_runs(parts):
    # On a CPU nothing is reported as blocking, and nothing runs on a device.
    assert parts["waiting"]["blocking points"]["update"] == 0
    assert parts["waiting"]["batch 1, idle time"]["kernels"] == 0


def test_it_asks_for_a_gpu(tmp_path, monkeypatch, capsys):
    import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        gpu.main(["--out", str(tmp_path)])
    assert error.value.code == 2 and "this torch sees no GPU; use --tiny" in capsys.readouterr().err


# The journal.


def _failing():
    raise ValueError("no such thing")


def _exhausted():
    raise torch.OutOfMemoryError("simulated")


def _endless():
    while True:
        time.sleep(0.01)


def test_a_failure_is_written_down_and_the_next_measurement_runs(tmp_path):
    path = tmp_path / "results" / "found.json"
    with Journal(path, 60) as journal, journal.part("one", 30):
        assert not journal.attempt("failing", _failing)
        assert not journal.attempt("too large", _exhausted)
        assert not journal.attempt("endless", _endless, seconds=0.05)
        assert journal.attempt("good", lambda: {"value": 1 / 3, "several": [2 / 3]})
        written = json.loads(path.read_text(encoding="utf-8"))["parts"]["one"]
    assert written["failing"]["error"] == "ValueError: no such thing" and "_failing" in written["failing"]["where"]
    assert written["too large"]["out_of_memory"] == "simulated"
    assert written["endless"]["late"] == 0.05
    assert written["good"]["value"] == 0.3333 and written["good"]["several"] == [0.6667]


def test_a_part_ends_in_time_and_the_next_begins(tmp_path):
    with Journal(tmp_path / "found.json", 60) as journal:
        began = time.monotonic()
        with journal.part("long", 0.1):
            journal.attempt("endless", _endless)
            journal.attempt("never", dict)
        with journal.part("next", 30):
            journal.attempt("good", dict)
        assert time.monotonic() - began < 20
    assert set(journal.report["parts"]["long"]) == {"endless", "late"}
    assert set(journal.report["parts"]["next"]) == {"good"}


def test_all_parts_end_when_the_run_is_late(tmp_path):
    with Journal(tmp_path / "found.json", 0.1) as journal:
        for name in ("first", "second"):
            with journal.part(name, 30):
                journal.attempt("endless", _endless)
    assert set(journal.report["parts"]["second"]) >= {"late"}


def test_without_alarms_what_comes_too_late_does_not_begin(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("journal.HAS_ALARM", False)
    with Journal(tmp_path / "found.json", 60) as journal, journal.part("one", 0.01):
        journal.attempt("slow", lambda: time.sleep(0.05) or {"value": 1})
        journal.attempt("never", lambda: pytest.fail("it began"))
    found = journal.report["parts"]["one"]
    assert found["slow"]["value"] == 1 and found["never"] == {"late": 60} and "late" in found


def test_busy_time_counts_overlaps_once():
    busy, gaps = busy_and_gaps([(0, 1_000_000_000), (500_000_000, 800_000_000), (2_000_000_000, 2_500_000_000)])
    assert (busy, gaps) == (1.5, [1.0])
    assert busy_and_gaps([]) == (0, [])
