# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`compare_flowbp.py`: what it plans and refuses, killed and started again, runs that fail, and jobs."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from filelock import FileLock
from resume_harness import Process, sd3_arguments, wait_for
from training_scripts import ROOT, load_script, lora_of, parse_config, same, script_path

from flowbp.training.comparison import as_words
from flowbp.training.config import TrainingConfig
from flowbp.training.jobs import Job, run_jobs, visible_devices
from flowbp.training.output_folder import LOCK

RECIPES = sorted((ROOT / "training" / "recipes").glob("*.yaml"))
Start = Callable[..., int]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("compare_flowbp")


@pytest.fixture
def recipe(model: Path, prompts: Path, tmp_path: Path) -> dict[str, Any]:
    """Two methods with two seeds each."""
    base = sd3_arguments(str(model), str(prompts), tmp_path)
    base = {name: value for name, value in base.items() if name not in ("method", "num_active", "output_dir")}
    return {
        "base": {**base, "max_train_steps": 2},
        "methods": {"flowbp-sparse": {"num_active": 2}, "refl": {"last_n": 2}},
        "seeds": [0, 1],
        "output_dir": str(tmp_path / "out"),
        "evaluation": {"prompts": str(prompts), "rewards": "toy_reward:make_reward"},
    }


def write(recipe: dict[str, Any], path: Path) -> list[str]:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return ["--config", str(path)]


@pytest.fixture
def start(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Compare in this process, where the imports are paid once; returns the exit code.

    Its attribute `started` has the names of what was started.
    """

    def run_here(jobs: Sequence[Job], at_once: int, tell: Any, devices: Any = ()) -> tuple[dict[str, int], int]:
        codes = {}
        for job in jobs:
            assert job.is_free
            start.started.append(job.name)
            _, path, *words = job.command()
            try:
                load_script(Path(path).stem).main(words)
                codes[job.name] = 0
            except RuntimeError:
                codes[job.name] = 1
        return codes, 0

    def start(recipe: dict[str, Any], *more: str) -> int:
        start.started = []
        try:
            script.main([*write(recipe, tmp_path / "recipe.yaml"), *more])
        except SystemExit as end:
            return end.code
        return 0

    monkeypatch.setattr(script, "run_jobs", run_here)
    return start


def records_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "evaluation" / "table.json").read_text())["records"]


def test_killed_and_started_again_it_ends_as_one_that_was_not(
    start: Start, recipe: dict[str, Any], tmp_path: Path
) -> None:
    """With real processes, which are killed during the second run; the other one runs in this process."""
    out = tmp_path / "out"
    # The second run waits in its third update.
    recipe["base"] |= {"max_train_steps": 3, "reward": "resume_rewards:make_waiting_reward"}
    first, second = out / "flowbp-sparse" / "seed-0", out / "flowbp-sparse" / "seed-1"
    later = {"FLOWBP_TEST_WAIT_AFTER": str(first / "README.md")}
    waiting = {"FLOWBP_TEST_WAIT": str(tmp_path), "FLOWBP_TEST_WAIT_CALL": "3", **later}
    words = write(recipe, tmp_path / "killed.yaml")
    process = Process("compare_flowbp", words, tmp_path, waiting)
    wait_for(tmp_path / "reached-0")
    process.kill()
    os.kill(int((tmp_path / "reached-0").read_text()), signal.SIGKILL)
    assert process.ended() == -signal.SIGKILL and not (second / "README.md").exists()
    finished = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file() and path.name != LOCK}
    assert first / "README.md" in finished
    process = Process("compare_flowbp", words, tmp_path)
    code, printed, told = process.ended(500), process.printed.read_text(), process.told.read_text()
    assert code == 0, told[-3000:]
    assert "4 runs, 1 of them finished before" in told and "flowbp-sparse, seed 0: started" not in told
    assert "refl (2 seeds)" in printed
    assert all(path.stat().st_mtime_ns == changed for path, changed in finished.items())

    whole = tmp_path / "whole"
    assert start(recipe, "--output_dir", str(whole)) == 0
    runs = [path.parent.relative_to(whole) for path in whole.glob("*/*/README.md")]
    assert len(runs) == 4 and all(same(lora_of(whole / run), lora_of(out / run)) for run in runs)
    assert records_of(out) == records_of(whole)
    # One line for the seeds of a method.
    lines = {record["model"]: record for record in records_of(out)}
    assert [*lines] == ["base", "flowbp-sparse", "refl"] and lines["refl"]["score"]["over"] == "seeds"
    # All is done: nothing but the tables is made again.
    assert start(recipe, "--output_dir", str(whole)) == 0 and start.started == ["evaluation"]


def test_a_run_that_fails_keeps_no_other_from_running(
    start: Start, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "moody.py").write_text(
        "import os\nfrom toy_reward import make_reward as toy\n\n\ndef make_reward():\n    reward = toy()\n\n"
        "    def score(images, prompts):\n        if 'FLOWBP_TEST_MOOD' in os.environ:\n"
        "            raise RuntimeError('not today')\n        return reward(images, prompts)\n\n    return score\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FLOWBP_TEST_MOOD", "bad")
    recipe["methods"] = {"moody": {"method": "full", "reward": "moody:make_reward"}, "refl": {"last_n": 2}}
    recipe["seeds"] = [3]
    trained = tmp_path / "trained.txt"
    trained.write_text("one\ntwo\n")
    recipe["base"]["prompts"] = str(trained)
    assert start(recipe) == 1 and start.started == ["moody, seed 3", "refl, seed 3", "evaluation"]
    told = "1 of 2 runs failed and are not in the table; start again to retry: moody, seed 3"
    assert told in capsys.readouterr().err
    assert [record["model"] for record in records_of(tmp_path / "out")] == ["base", "refl"]
    monkeypatch.delenv("FLOWBP_TEST_MOOD")
    assert start(recipe) == 0 and start.started == ["moody, seed 3", "evaluation"]
    assert [record["model"] for record in records_of(tmp_path / "out")] == ["base", "moody", "refl"]
    settings = json.loads((tmp_path / "out" / "moody" / "seed-3" / "run.json").read_text())["settings"]
    assert (settings["method"], settings["seed"], settings["reward"]) == ("full", 3, "moody:make_reward")
    assert settings["run_name"] == "moody-seed-3"

    # The recipe changes: what is there is kept apart, and what is new is added.
    longer = {**recipe, "base": {**recipe["base"], "max_train_steps": 3}}
    with pytest.raises(ValueError, match="moody, seed 3 began with .*: max_train_steps was 2, is 3; restore"):
        start(longer)
    judged = {**recipe, "evaluation": {**recipe["evaluation"], "seed": 7}}
    with pytest.raises(ValueError, match="the evaluation began with other options: seed was None, is 7; restore"):
        start(judged)
    (tmp_path / "out" / "draft-k" / "seed-3").mkdir(parents=True)
    more = {**recipe, "methods": {"refl": {"last_n": 2}, "draft-k": {"last_k": 1}}}
    trained.write_text("one\n")
    assert start(more) == 0 and start.started == ["draft-k, seed 3", "evaluation"]
    told = capsys.readouterr().err
    assert "Changed since the first run: prompts was 2 prompts" in told
    assert "Not in this recipe any more, and left out of the tables: moody, seed 3." in told
    (tmp_path / "out").rename(tmp_path / "moved")
    assert start({**more, "output_dir": str(tmp_path / "moved")}) == 0 and start.started == ["evaluation"]
    (tmp_path / "moved").rename(tmp_path / "out")
    (tmp_path / "out" / "comparison.json").unlink()
    with pytest.raises(ValueError, match="holds a run of something else"):
        start(more)
    (tmp_path / "out" / "comparison.json").write_text("{}")
    with pytest.raises(ValueError, match="comparison.json is damaged"):
        start(more)
    with FileLock(tmp_path / "out" / LOCK), pytest.raises(ValueError, match="another comparison runs here"):
        start(more)
    assert start.started == []


def test_options_of_one_method_in_base_are_for_that_method_alone(
    script: ModuleType, recipe: dict[str, Any], tmp_path: Path
) -> None:
    shared = {**recipe["base"], "method": "flowbp-sparse", "num_active": 3, "use_ema": True, "num_inference_steps": 6}
    (tmp_path / "shared.yaml").write_text(yaml.safe_dump(shared))
    recipe |= {
        "base": {"config": str(tmp_path / "shared.yaml"), "use_ema": False, "learning_rate": 0.5},
        "methods": {"flowbp-sparse": None, "flowbp-bridge": {"alpha": 0.25}, "one": {"method": "flowbp-sparse"}},
        "axes": {"learning_rate": [0.25, 0.125], "rank": [1, 2]},
        "seeds": [7],
    }
    config = script.parse_config(write(recipe, tmp_path / "recipe.yaml"))
    runs, notes = script.planned_runs(config, script.RECIPES)
    assert not notes and len(runs) == 3 * 4
    assert runs[1].line == "flowbp-sparse learning_rate 0.25 rank 2" and runs[1].folder.name == "seed-7"
    configs, _ = script.check_runs(runs, load_script("train_flowbp_sd3").SD3, script.RECIPES)
    found = [(each.method, each.method_options) for each in configs.values()]
    sparse = [("flowbp-sparse", {"num_active": 3})] * 4
    assert found == [*sparse, *[("flowbp-bridge", {"alpha": 0.25})] * 4, *sparse]
    assert [(each.learning_rate, each.rank) for each in configs.values()][:4] == [
        (0.25, 1), (0.25, 2), (0.125, 1), (0.125, 2)
    ]  # fmt: skip
    assert not any(each.use_ema for each in configs.values()) and {each.seed for each in configs.values()} == {7}
    recipe["methods"] = {"refl": {"last_n": 2}}
    _, notes = script.planned_runs(script.parse_config(write(recipe, tmp_path / "recipe.yaml")), script.RECIPES)
    assert notes == ["Not used: options of flowbp-sparse in base, which is not among the methods: num_active."]


def test_the_evaluation_has_the_base_of_the_runs(script: ModuleType, recipe: dict[str, Any], tmp_path: Path) -> None:
    config = script.parse_config(write(recipe, tmp_path / "recipe.yaml"))
    runs, _ = script.planned_runs(config, script.RECIPES)
    configs, _ = script.check_runs(runs, load_script("train_flowbp_sd3").SD3, script.RECIPES)
    # Where there is no GPU, runs over such a base are refused.
    quantised = {name: replace(each, quantization_config_path=Path("nf4.json")) for name, each in configs.items()}
    options = script.evaluation_options(config, quantised)
    assert options["quantization_config_path"] == "nf4.json" and options["num_inference_steps"] == 4
    assert "quantization_config_path" not in script.evaluation_options(config, configs)


def changed(recipe: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    first, _, rest = path.partition("/")
    inner = changed(recipe.get(first) or {}, rest, value) if rest else value
    others = {name: each for name, each in recipe.items() if name != first}
    return others if inner is ... else {**others, first: inner}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("methods/refl", {}, "refl, seed 0: refl: .*last_n"),
        ("methods/refl/num_active", 2, "refl, seed 0: refl has no option 'num_active'"),
        ("methods/refl/lst_n", 2, "refl, seed 0: unknown argument --lst_n: did you mean --last_n"),
        ("methods/refl/seed", 2, "methods refl: seed is set by the comparison"),
        ("methods/new", {}, "new, seed 0: .*'new'"),
        ("methods/refl", 3, "methods refl: expected options with values, got 3"),
        ("methods/a=b", {"method": "full"}, "got 'a=b'"),
        ("methods/REFL", {"method": "full"}, "expected lines with different names"),
        ("methods/con", {"method": "full"}, "that folders can have on all systems"),
        ("methods/base", {"method": "full"}, "none of them base; got 'base'"),
        ("base/rank", 0, "flowbp-sparse, seed 0: --rank must be at least 1"),
        ("base/num_active", 2, "base: num_active belongs to a method"),
        ("base/output_dir", "x", "base: output_dir is set by the comparison"),
        ("base/push_to_hub", True, "base: push_to_hub is set by the comparison"),
        ("base/train", "full", "flowbp-sparse, seed 0: --train full: the evaluation takes LoRAs"),
        ("base/reward", "toy_reward:nothing", "flowbp-sparse, seed 0: reward 'toy_reward:nothing'"),
        ("base/prompts", "nowhere.txt", "flowbp-sparse, seed 0: .*nowhere.txt"),
        ("base/pretrained_model_name_or_path", "nowhere", "flowbp-sparse, seed 0: .*nowhere"),
        ("base/config", "nowhere", "config nowhere: neither a file nor a recipe"),
        ("axes", {"learning_rate": 1e-4}, "axes learning_rate: expected a list of different values"),
        ("axes", {"last_n": [2]}, "methods refl: last_n is an axis too"),
        ("axes", {"seed": [2]}, "axes: seed is set by the comparison"),
        ("axes", {"learning_rate": [1e-4, -1.0]}, "learning_rate -1.0, seed 0: --learning_rate must be above 0"),
        ("axes", {"num_inference_steps": [4, 5]}, "the runs have several values of num_inference_steps; say which"),
        ("axes", {"resolution": [8, 16]}, "the runs have several values of sizes"),
        ("seeds", [1, 1], "seeds: expected a list of different values"),
        ("evaluation/rewards", "toy_reward:nothing", "--evaluation: .*toy_reward:nothing"),
        ("evaluation/prompts", ..., "--evaluation: .*required: --prompts"),
        ("evaluation/against", "nobody", "against nobody: expected base or one of flowbp-sparse, refl"),
        ("evaluation/lora", ["x"], "evaluation: lora is set by the comparison"),
        ("evaluation/pipeline_arguments", "x", "pipeline_arguments: expected arguments with values"),
        ("script", "nowhere", "expected train_flowbp, .*, or the path of a script"),
        ("script", str(script_path("evaluate_flowbp")), "expected a training script with a Backbone"),
        ("output_dir", "a,b", "expected a path without commas"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_started(
    start: Start, recipe: dict[str, Any], tmp_path: Path, path: str, value: Any, message: str, capsys: Any
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        if start(changed(recipe, path, value)) == 2:
            # By the parser.
            raise ValueError(capsys.readouterr().err.strip())
    assert "\n" not in str(caught.value)
    assert start.started == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_words_say_what_a_recipe_says(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    backbone = path.stem.partition("_")[0]
    script = load_script("train_flowbp" if backbone in ("edit", "video") else f"train_flowbp_{backbone}")
    own = {"prompts": "p.txt", "reward": "ocr", "eval_prompts": "e.txt", "reward_clip": -0.25, "use_ema": True}
    own |= {"offload": False, "validation_prompt": ["a", "b"], "prompt_column": None}
    more = as_words(own, TrainingConfig)
    content.pop("reward", None), content.pop("eval_reward", None)
    words = as_words({**content, "quantization_config_path": None, **own}, TrainingConfig)
    config = parse_config(script, words)
    whole = as_words({"eval_reward": config.eval_reward}, TrainingConfig)
    by_file = parse_config(script, ["--config", str(path), *more, *whole])
    differing = {"eval_reward", "quantization_config_path", "select"}
    assert {name: value for name, value in vars(config).items() if name not in differing} == {
        name: value for name, value in vars(by_file).items() if name not in differing
    }


def test_a_truth_value_of_a_row_s_own_option_is_a_word() -> None:
    assert as_words({"own": False, "use_ema": False, "offload": False}, TrainingConfig) == [
        "--own=False",
        "--no-offload",
    ]


# Jobs.


def job(name: str, code: str, folder: Path, log: bool = False) -> Job:
    return Job(name, lambda: [sys.executable, "-c", code], folder / name, folder / f"{name}.log" if log else None)


def test_jobs_run_side_by_side_with_a_gpu_each_and_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    code = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES']); sys.exit({})"
    told: list[str] = []
    jobs = [job(name, code.format(number), tmp_path, log=True) for number, name in enumerate("abc")]
    assert run_jobs(jobs, 2, told.append, visible_devices()) == ({"a": 0, "b": 1, "c": 2}, 0)
    assert {(tmp_path / f"{name}.log").read_text() for name in "ab"} == {"4\n", "7\n"}
    assert told[0] == f"a: started, see {tmp_path / 'a.log'}" and told[-1] == "c: ended with exit code 2"


def test_a_job_waits_for_the_process_that_has_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    waiting = f"waiting for the process that writes into {tmp_path / 'a'}"
    told: list[str] = []
    lock = FileLock(tmp_path / "a" / LOCK)
    lock.acquire()

    def tell(line: str) -> None:
        told.append(line)
        if waiting in line:
            lock.release()

    assert run_jobs([job("a", "", tmp_path), job("b", "", tmp_path)], 1, tell) == ({"a": 0, "b": 0}, 0)
    assert told == ["b: started", "b: done", f"a: {waiting}", "a: started", "a: done"]


def test_a_signal_is_passed_on_and_starts_no_more(tmp_path: Path) -> None:
    code = (
        "import pathlib, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\ntime.sleep(60)"
    )

    def tell(line: str) -> None:
        if line == "a: started":
            wait_for(tmp_path / "ready")
            os.kill(os.getpid(), signal.SIGTERM)

    began = time.monotonic()
    assert run_jobs([job("a", code, tmp_path), job("b", "", tmp_path)], 1, tell) == ({"a": 7}, signal.SIGTERM)
    assert time.monotonic() - began < 50
