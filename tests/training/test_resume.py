# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and resuming, through the real scripts: exact, whatever ended the run before, and never from damage.

How checkpoint folders are written and read is in `test_checkpoints.py`; here it is what a run makes of them.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from kill_training import kill_runs
from resume_harness import (
    SD3,
    Process,
    check_same_end,
    largest_difference,
    lines_of,
    run_in_two_processes,
    sd3_arguments,
    state_of,
    tensors_of,
    wait_for,
)
from tiny_pipelines import tiny_flux_pipeline, tiny_klein_pipeline, tiny_wan_pipeline
from training_scripts import (
    PROMPTS,
    ErrorOf,
    accelerate_launch,
    command_line,
    environment,
    load_script,
    log_of,
    on_cpus,
    script_path,
    torchrun,
)
from warm_python import warm
from watched_updates import watch_updates

from flowbp.training import checkpoints, state_files
from flowbp.training.signals import TrainingStopped

UPDATES = 6
# Four places of the prompts' order for each update, and three prompts: an epoch ends with every third update.
CUTS = {"after the first update": 1, "at the end of an epoch": 3, "in the middle of an epoch": 5}
# Everything that a run carries from one update to the next. The reward is random. What is held out falls as it rises,
# so the best LoRA is an early one, and the guard raises an alarm from three evaluations, before and after a cut.
EVERYTHING = {
    "method": "flowbp-bridge",
    "num_active": 3,
    "num_inference_steps": 6,
    "step_sampling": "dirichlet",
    "reward": "resume_rewards:make_random_reward",
    "gradient_accumulation_steps": 2,
    "max_train_steps": UPDATES,
    "learning_rate": 0.06,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "use_ema": True,
    "ema_decay": 0.7,
    "eval_reward": "resume_rewards:make_opposite_reward",
    "eval_steps": 1,
    "num_eval_images": 4,
    "validation_steps": 4,
}


@pytest.fixture
def arguments(model: Path, prompts: Path, tmp_path: Path) -> dict[str, Any]:
    return sd3_arguments(model, prompts, tmp_path / "run")


# Exact, in one process.


@pytest.fixture(scope="module")
def whole(script: ModuleType, model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with everything that was not interrupted."""
    output = tmp_path_factory.mktemp("whole")
    script.main(command_line(sd3_arguments(model, prompts, output), **EVERYTHING))
    return output


def test_what_is_cut_is_worth_a_cut(whole: Path):
    """The run below has what its comparisons are about; else they would prove nothing."""
    positions = [
        state_of(whole / f"checkpoint-{cut}")["training"]["prompts"]["position"] % len(PROMPTS)
        for cut in CUTS.values()
    ]
    assert positions == [1, 0, 2]
    states = [state_of(whole / f"checkpoint-{update}")["evaluation"] for update in range(1, UPDATES + 1)]
    alarms = [(alarm["name"], alarm["update"]) for alarm in states[-1]["alarms"]]
    assert len(alarms) == 1 and alarms[0][0] == "held-out-falls" and 3 < alarms[0][1] <= 5, alarms
    assert all(state["guard"] != after["guard"] for state, after in zip(states, states[1:], strict=False))
    assert {state["found"]["best"]["update"] for state in states} == {1}
    files = {path.name for path in (whole / "checkpoint-1").iterdir()}
    assert {f"{name}.safetensors" for name in ("lora", "optimizer", "ema", "best")} <= files
    rates = [row["learning_rate"] for row in log_of(whole)]
    assert all(now != after for now, after in zip(rates, rates[1:], strict=False)) and max(rates) == 0.06
    # Different tensors everywhere, update by update.
    for update in range(1, UPDATES):
        now, after = (tensors_of(whole / f"checkpoint-{number}") for number in (update, update + 1))
        for file in ("lora", "optimizer", "ema", "pytorch_lora_weights"):
            own = [name for name in now if name.startswith(f"{file}.")]
            assert largest_difference({n: now[n] for n in own}, {n: after[n] for n in own}) > 1e-4, file


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_resumed_run_is_exact(script: ModuleType, whole: Path, arguments: dict[str, Any], cut: int):
    with watch_updates() as updates:
        script.main(command_line(arguments, **EVERYTHING, seed=0, resume_from_checkpoint=whole / f"checkpoint-{cut}"))
    assert len(updates) == UPDATES - cut
    check_same_end(whole, arguments["output_dir"], UPDATES)


@pytest.mark.parametrize(
    "changes",
    [
        # The copies have noise of their own.
        {"method": "draft-lv", "num_active": None, "num_noised": 1},
        # The scale of the loss is state too.
        {"mixed_precision": "fp16"},
        {"velocity_anchor": 0.1, "lr_scheduler": "linear"},
    ],
    ids=["draft-lv", "fp16", "velocity anchor"],
)
def test_other_runs_are_exact_too(
    script: ModuleType, arguments: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
):
    arguments = {**arguments, **changes, "max_train_steps": 3}
    script.main(command_line(arguments))
    resumed = {**arguments, "output_dir": tmp_path / "resumed"}
    script.main(command_line(resumed, resume_from_checkpoint=arguments["output_dir"] / "checkpoint-1"))
    check_same_end(arguments["output_dir"], tmp_path / "resumed", 3)


OTHER_SCRIPTS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "train_flowbp_flux": (tiny_flux_pipeline, {"resolution": 8}),
    "train_flowbp_flux2": (tiny_klein_pipeline, {"resolution": 8}),
    "train_flowbp": (tiny_wan_pipeline, {"height": 16, "width": 16, "num_frames": 5}),
}


@pytest.mark.parametrize("name", OTHER_SCRIPTS)
def test_the_other_scripts_resume_exactly(arguments: dict[str, Any], tmp_path: Path, name: str):
    build, changes = OTHER_SCRIPTS[name]
    build().save_pretrained(tmp_path / "model")
    arguments = {**arguments, "resolution": None, "max_sequence_length": None, **changes}
    arguments |= {"pretrained_model_name_or_path": tmp_path / "model", "num_inference_steps": 3, "train_batch_size": 1}
    arguments |= {"reward": "resume_rewards:make_random_reward", "use_ema": True}
    if name == "train_flowbp":
        arguments["pipeline_arguments"] = {"max_sequence_length": 16}
    else:
        arguments["max_sequence_length"] = 16
    other = load_script(name)
    other.main(command_line(arguments))
    resumed = {**arguments, "output_dir": tmp_path / "resumed"}
    other.main(command_line(resumed, resume_from_checkpoint=arguments["output_dir"] / "checkpoint-1"))
    check_same_end(arguments["output_dir"], tmp_path / "resumed", 2)


# Exact, in two processes, and from one to two and back.


@pytest.fixture(scope="module")
def plain_arguments(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a short run with a reward that is not random."""
    return {
        **sd3_arguments(model, prompts, tmp_path_factory.mktemp("plain")),
        "reward": "resume_rewards:make_waiting_reward",
        "max_train_steps": 3,
        "use_ema": True,
        "ema_decay": 0.7,
    }


@pytest.fixture(scope="module")
def plain(script: ModuleType, plain_arguments: dict[str, Any]) -> Path:
    """The folder of the short run."""
    script.main(command_line(plain_arguments))
    return plain_arguments["output_dir"]


# By what gets the signal: its number, the processes it goes to, and what torchrun reports of the first that ended.
IN_TWO = {
    "a worker": (signal.SIGINT, ["reached-1"], "exitcode  : 130"),
    "torchrun": (signal.SIGTERM, [], ""),
}


@pytest.fixture(scope="module")
def stopped_in_two(
    plain_arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, str]]:
    """Runs of two processes that were stopped in their first update: their folders, and what went to stderr."""
    found = {}
    for what, (number, workers, _) in IN_TWO.items():
        folder = tmp_path_factory.mktemp("stopped")
        changes = {"output_dir": folder / "run", "train_batch_size": 1, "checkpointing_steps": 100}
        with (folder / "err").open("a") as errors:
            process = subprocess.Popen(
                torchrun(script_path(SD3), *command_line(plain_arguments, **changes)),
                env=on_cpus(FLOWBP_TEST_WAIT=str(folder), FLOWBP_TEST_WAIT_CALL="1"),
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            for rank in range(2):
                wait_for(folder / f"reached-{rank}")
            for target in [int((folder / name).read_text()) for name in workers] or [process.pid]:
                os.kill(target, number)
            (folder / "go").touch()
            # torchrun's own code says only that a worker ended with one.
            assert process.wait(200) == 1, (folder / "err").read_text()[-3000:]
        found[what] = (folder / "run", (folder / "err").read_text())
    return found


@pytest.fixture(scope="module")
def in_two(
    model: Path,
    prompts: Path,
    plain: Path,
    plain_arguments: dict[str, Any],
    stopped_in_two: dict[str, tuple[Path, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[Any, Path]:
    """Folders of runs in two processes, all of which have half the batch: by cut, and by other names below."""
    root = tmp_path_factory.mktemp("two")
    half = {"train_batch_size": 1}
    everything = {**sd3_arguments(model, prompts, root / "whole"), **EVERYTHING, **half}
    runs = {"whole": everything}
    for cut in CUTS.values():
        resumed = {"output_dir": root / f"{cut}", "resume_from_checkpoint": root / "whole" / f"checkpoint-{cut}"}
        runs[cut] = {**everything, **resumed}
    runs["plain"] = {**plain_arguments, **half, "output_dir": root / "plain"}
    from_one = {"output_dir": root / "from-one", "resume_from_checkpoint": plain / "checkpoint-1"}
    runs["from one"] = {**runs["plain"], **from_one}
    for what, (folder, _) in stopped_in_two.items():
        runs[what] = {**runs["plain"], "output_dir": folder, "resume_from_checkpoint": "latest"}
    jobs = [{"name": SD3, "words": command_line(arguments), "environment": {}} for arguments in runs.values()]
    for name, found in zip(runs, run_in_two_processes(jobs, root), strict=True):
        assert found["processes"] == 2 and found["endings"] == ["done", "done"], (name, found)
        assert found["apart"] == 0 and found["finite"], (name, found)
    return {name: arguments["output_dir"] for name, arguments in runs.items()}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_resumed_run_of_two_processes_is_exact(in_two: dict[Any, Path], cut: int):
    check_same_end(in_two["whole"], in_two[cut], UPDATES)
    assert json.loads((in_two[cut] / "run.json").read_text())["hardware"]["processes"] == 2


# Sums over samples have another order where the samples are shared out in another way, which shows in the last bits of
# float32; Adam divides gradients by their size, so that the LoRA, which moves by 0.01 in an update, has it too.
SHARED_OUT = 1e-4


def test_a_run_of_two_processes_resumes_in_one(
    script: ModuleType, plain: Path, plain_arguments: dict[str, Any], in_two: dict[Any, Path], tmp_path: Path
):
    resumed = {**plain_arguments, "output_dir": tmp_path, "resume_from_checkpoint": in_two["plain"] / "checkpoint-1"}
    script.main(command_line(resumed))
    check_same_end(in_two["plain"], tmp_path, 3, tolerance=SHARED_OUT)
    assert [row["drawn_steps"] for row in log_of(tmp_path)] == [row["drawn_steps"] for row in log_of(plain)]


def test_a_run_of_one_process_resumes_in_two(plain: Path, in_two: dict[Any, Path]):
    check_same_end(plain, in_two["from one"], 3, tolerance=SHARED_OUT)
    check_same_end(plain, in_two["plain"], 3, tolerance=SHARED_OUT)


# Signals.


def check_stopped(output: Path, printed: str, name: str) -> None:
    """A run was stopped by a signal after its first update, with a checkpoint, and says how to resume."""
    lines = lines_of(printed)
    told = f"Stopped by {name} after update 1; resume with --resume_from_checkpoint latest."
    assert sum(told in line for line in lines) == 1, lines
    assert [path.name for path in checkpoints.checkpoints(output)] == ["checkpoint-1"]
    checkpoints.check_folder(output / "checkpoint-1")
    assert [row["step"] for row in log_of(output)] == [1]
    assert not (output / "pytorch_lora_weights.safetensors").exists()


def stop(arguments: dict[str, Any], folder: Path) -> Process:
    """A process that is in the first update of the short run, and stays there until the file `go` is there."""
    words = command_line(arguments, checkpointing_steps=100)
    process = Process(SD3, words, folder, {"FLOWBP_TEST_WAIT": str(folder), "FLOWBP_TEST_WAIT_CALL": "1"})
    wait_for(folder / "reached-0")
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_update_and_writes_a_checkpoint(
    script: ModuleType,
    plain: Path,
    plain_arguments: dict[str, Any],
    tmp_path: Path,
    number: signal.Signals,
    code: int,
):
    arguments = {**plain_arguments, "output_dir": tmp_path / "run"}
    process = stop(arguments, tmp_path)
    process.send_signal(number)
    time.sleep(0.3)
    assert process.poll() is None
    (tmp_path / "go").touch()
    assert process.ended() == code
    check_stopped(tmp_path / "run", process.told.read_text(), number.name)
    stopping, stopped = process.lines()
    assert stopping.startswith(f"{number.name}: stopping after this update or image, with a checkpoint."), stopping
    assert stopped.startswith(f"Stopped by {number.name}"), stopped
    script.main(command_line(arguments, resume_from_checkpoint="latest"))
    check_same_end(plain, tmp_path / "run", 3)


def test_what_is_due_after_a_stopped_update_is_made_up_for(
    script: ModuleType, plain_arguments: dict[str, Any], tmp_path: Path
):
    """Launchers kill soon, so the checkpoint comes first; the resumed run ends as one that was not stopped."""
    judged = {
        **plain_arguments,
        "eval_reward": "resume_rewards:make_opposite_reward",
        "eval_steps": 1,
        "num_eval_images": 4,
        "validation_steps": 1,
    }
    script.main(command_line(judged, output_dir=tmp_path / "whole"))
    process = stop({**judged, "output_dir": tmp_path / "run"}, tmp_path)
    process.terminate()
    (tmp_path / "go").touch()
    assert process.ended() == 143
    evaluation = state_of(tmp_path / "run" / "checkpoint-1")["evaluation"]
    assert evaluation["is_pending"] and evaluation["found"].keys() == {"base"}
    assert not (tmp_path / "run" / "validation").exists()
    script.main(command_line(judged, output_dir=tmp_path / "run", resume_from_checkpoint="latest"))
    check_same_end(tmp_path / "whole", tmp_path / "run", 3)
    for folder in ("evaluation", "validation"):
        old, new = (
            {path.name: path.read_bytes() for path in (tmp_path / run / folder).iterdir()} for run in ("whole", "run")
        )
        assert old == new and "000001.png" in old


def test_a_signal_during_an_evaluation_stops_it_between_images(
    script: ModuleType, plain_arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Three prompts and two images of each: the base model's evaluation, and the beginning of the first update's.
    monkeypatch.setenv("FLOWBP_TEST_SIGNAL_CALL", "8")
    judged = {
        **plain_arguments,
        "output_dir": tmp_path / "run",
        "checkpointing_steps": 100,
        "num_validation_images": 3,
    }
    judged |= {"eval_reward": "resume_rewards:make_signalling_reward", "eval_steps": 1}
    with pytest.raises(TrainingStopped) as caught:
        script.main(command_line(judged))
    assert caught.value.signal_number == signal.SIGTERM
    assert [row["step"] for row in log_of(tmp_path / "run")] == [1]
    assert state_of(tmp_path / "run" / "checkpoint-1")["evaluation"]["is_pending"]
    strip = tmp_path / "run" / "evaluation" / "000001.png"
    assert not strip.exists()
    # The resumed run makes up for it.
    monkeypatch.setenv("FLOWBP_TEST_SIGNAL_CALL", "0")
    script.main(command_line(judged, resume_from_checkpoint="latest", max_train_steps=2))
    assert [row["step"] for row in log_of(tmp_path / "run")] == [1, 2] and strip.exists()
    evaluation = state_of(tmp_path / "run" / "checkpoint-2")["evaluation"]
    assert [entry["update"] for entry in evaluation["history"]] == [0, 1, 2] and not evaluation["is_pending"]


def test_a_second_interrupt_stops_at_once(plain_arguments: dict[str, Any], tmp_path: Path):
    process = stop({**plain_arguments, "output_dir": tmp_path / "run"}, tmp_path)
    code, sent = None, 0
    while code is None and sent < 100:
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        code, sent = process.poll(), sent + 1
    # Python ends itself with the signal; shells call that 130 too.
    assert code == -signal.SIGINT and sent > 1
    # On a slow machine a third one may come before it has ended.
    assert "KeyboardInterrupt: a second SIGINT" in process.lines()
    assert not checkpoints.checkpoints(tmp_path / "run")


def test_a_signal_to_the_worker_of_accelerate_launch(
    script: ModuleType, plain: Path, plain_arguments: dict[str, Any], tmp_path: Path
):
    arguments = {**plain_arguments, "output_dir": tmp_path / "run"}
    with (tmp_path / "err").open("w") as errors:
        process = subprocess.Popen(
            accelerate_launch(SD3, command_line(arguments, checkpointing_steps=100)),
            env=warm({**environment(), "FLOWBP_TEST_WAIT": str(tmp_path), "FLOWBP_TEST_WAIT_CALL": "1"}),
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        wait_for(tmp_path / "reached-0")
        os.kill(int((tmp_path / "reached-0").read_text()), signal.SIGTERM)
        (tmp_path / "go").touch()
        assert process.wait(200) == 1
    printed = (tmp_path / "err").read_text()
    assert "returned non-zero exit status 143" in printed
    check_stopped(tmp_path / "run", printed, "SIGTERM")
    script.main(command_line(arguments, resume_from_checkpoint="latest"))
    check_same_end(plain, tmp_path / "run", 3)


@pytest.mark.parametrize("what", IN_TWO)
def test_a_signal_stops_two_processes_together(
    in_two: dict[Any, Path], stopped_in_two: dict[str, tuple[Path, str]], what: str
):
    number, _, reported = IN_TWO[what]
    output, printed = stopped_in_two[what]
    told = f"Stopped by {number.name} after update 1; resume with --resume_from_checkpoint latest."
    assert printed.count(told) == 1 and reported in printed, printed[-3000:]
    # What was there before `in_two` resumed it: no checkpoint but that of the signal.
    assert sorted(path.name for path in output.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 3)]
    check_same_end(in_two["plain"], output, 3)


# When.


@pytest.mark.parametrize(("minutes", "expected"), [(0.0001, [1, 2, 3]), (None, [3])])
def test_a_checkpoint_is_written_after_so_many_minutes(
    script: ModuleType,
    arguments: dict[str, Any],
    minutes: float | None,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
):
    written, write_folder = [], state_files.write_folder

    def noted(folder: Path, fill: Any) -> None:
        write_folder(folder, fill)
        written.append(folder.name)

    monkeypatch.setattr(state_files, "write_folder", noted)
    script.main(command_line(arguments, checkpointing_steps=100, checkpointing_minutes=minutes, max_train_steps=3))
    assert written == [f"checkpoint-{update}" for update in expected]
    # One that the steps did not ask for is kept until the next one is there.
    assert [path.name for path in checkpoints.checkpoints(arguments["output_dir"])] == ["checkpoint-3"]


# Damage.


def damage(path: Path, kind: str) -> None:
    """Damage a file: "missing", "empty", "half" (of it), or "bit" (one is flipped)."""
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "bit":
        place = len(content) * 2 // 3
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
    else:
        path.write_bytes(content[: len(content) // 2 if kind == "half" else 0])


FILES = ("lora", "optimizer", "ema", "best", "pytorch_lora_weights")


@pytest.mark.parametrize("file", [*(f"{name}.safetensors" for name in FILES), "state.json", "manifest.json"])
def test_a_damaged_file_is_refused_by_name(whole: Path, arguments: dict[str, Any], file: str, error_of: ErrorOf):
    files = {path.name for path in (whole / "checkpoint-3").iterdir()}
    assert files == {f"{name}.safetensors" for name in FILES} | {"state.json", "manifest.json"}
    checkpoint = arguments["output_dir"] / "checkpoint-3"
    for kind in ("missing", "empty", "half", "bit"):
        shutil.copytree(whole / "checkpoint-3", checkpoint)
        damage(checkpoint / file, kind)
        words = command_line(arguments, **EVERYTHING, resume_from_checkpoint="checkpoint-3")
        # Fails where a model is loaded.
        printed = error_of(SD3, words)
        assert len(printed.splitlines()) == 1 and printed.startswith(f"{SD3}.py: error: "), (kind, printed)
        assert str(checkpoint / file) in printed, (kind, printed)
        assert sorted(path.name for path in arguments["output_dir"].iterdir()) == ["checkpoint-3"]
        shutil.rmtree(checkpoint)


def test_the_latest_whole_checkpoint_is_taken_and_told(
    script: ModuleType, whole: Path, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    output = arguments["output_dir"]
    for name in ("checkpoint-5", "checkpoint-6", "best"):
        shutil.copytree(whole / name, output / name)
    shutil.copy(whole / "log.jsonl", output)
    damage(output / "checkpoint-6" / "optimizer.safetensors", "bit")
    capsys.readouterr()
    script.main(command_line(arguments, **EVERYTHING, resume_from_checkpoint="latest"))
    told = [line for line in lines_of(capsys.readouterr().err) if "checkpoint-6" in line]
    assert len(told) == 1 and "Using checkpoint-5 instead" in told[0]
    assert str(output / "checkpoint-6" / "optimizer.safetensors") in told[0]
    check_same_end(whole, output, UPDATES)


def test_a_full_disk_leaves_the_old_checkpoint(
    script: ModuleType, plain: Path, plain_arguments: dict[str, Any], tmp_path: Path
):
    arguments = {**plain_arguments, "output_dir": tmp_path / "run"}
    output = arguments["output_dir"]
    shutil.copytree(plain / "checkpoint-1", output / "checkpoint-1")
    shutil.copy(plain / "log.jsonl", output)
    words = command_line(arguments, resume_from_checkpoint="latest", checkpoints_total_limit=1)
    # Enough for the LoRA and everything before it, and not for the moments, which are twice as large.
    sizes = {path.name: path.stat().st_size for path in (plain / "checkpoint-1").iterdir()}
    limit = (sizes["lora.safetensors"] + sizes["optimizer.safetensors"]) // 2
    process = Process(SD3, words, tmp_path, file_size_limit=limit)
    assert process.ended() == 1
    errors = [line for line in process.lines() if line.startswith(f"{SD3}.py: error: ")]
    assert len(errors) == 1 and f"{output / 'checkpoint-2'}: not written: " in errors[0], process.lines()
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-1"]
    checkpoints.check_folder(output / "checkpoint-1")
    script.main(command_line(arguments, resume_from_checkpoint="latest"))
    check_same_end(plain, output, 3)


# Killed.


@pytest.mark.parametrize("rotations", [None, 1])
def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path: Path, rotations: int | None):
    # The first kill is while the third checkpoint is written.
    random.seed(5)
    counts = kill_runs(3, rotations, tmp_path)
    assert counts["kills"] == 3 and counts["resumes"] >= 1, counts
