# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Windows and macOS, as far as Linux can stand in for them: training/README.md says what was simulated."""

import io
import json
import subprocess
import sys
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from resume_harness import sd3_arguments
from training_scripts import ROOT, command_line, environment, log_of
from updates_by_hand import make_config

from flowbp import files
from flowbp.training import checkpoints, distributed, jobs, setup, stages
from flowbp.training.backbone import Backbone
from flowbp.training.jobs import Job, run_jobs
from flowbp.training.optimizers import check_optimizer
from flowbp.training.prompt_embeds import cache_folder
from flowbp.training.signals import StopSignals

WINDOWS = SimpleNamespace(platform="win32")


def test_a_training_and_its_evaluation_as_on_windows(model: Path, tmp_path: Path) -> None:
    """Help, dry run, training, resuming and evaluation: see `windows.py` for what differs from this system."""
    (tmp_path / "prompts.txt").write_text('the text "42" – ±\na "7" in 赤\nblue "k9"', encoding="utf-8")
    output = tmp_path / "run-数"
    train = sd3_arguments(model, tmp_path / "prompts.txt", output)
    train |= {"eval_reward": "toy_reward:make_held_out_reward", "eval_steps": 1, "use_ema": True}
    train |= {"precompute_prompt_embeds": True, "prompt_embeds_dir": tmp_path / "embeds", "checkpoints_total_limit": 1}
    judge = {name: train[name] for name in ("pretrained_model_name_or_path", "prompts", "resolution")}
    judge |= {"lora": [f"×={output}"], "rewards": train["reward"], "num_inference_steps": 4, "num_prompts": 1}
    judge |= {"pipeline_arguments": {"max_sequence_length": train["max_sequence_length"]}}
    script, more = "train_flowbp_sd3", {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    runs = [
        [script, ["--help"]],
        [script, command_line(train, dry_run=True)],
        [script, command_line(train)],
        [script, command_line(train, **more)],
        ["evaluate_flowbp", command_line(judge, output_dir=tmp_path / "judged")],
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "windows.py"), json.dumps(runs)],
        env={**environment(), "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        check=False,
        timeout=300,
    )
    printed = done.stdout.decode("cp1252")
    assert done.returncode == 0, done.stderr.decode("cp1252")[-3000:]
    # The folder's name, and that of the table's line.
    assert "run-\\u6570" in printed and "| × " in printed
    assert [row["step"] for row in log_of(output)] == [1, 2, 3]
    names = {path.name for path in output.iterdir() if path.is_dir()}
    assert names == {"best", "checkpoint-3", "evaluation", "images"}
    assert (tmp_path / "judged" / "report.html").is_file()


# Files.


def test_windows_gets_time_to_let_go_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries, replace = [], files.os.replace

    def refuse_twice(*paths: Path) -> None:
        tries.append(paths)
        if len(tries) < 3:
            raise PermissionError(13, "in use")
        replace(*paths)

    monkeypatch.setattr(files.os, "replace", refuse_twice)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    with pytest.raises(PermissionError):
        files.write_atomically(tmp_path / "file", "text")
    monkeypatch.setattr(files, "sys", WINDOWS)
    files.write_atomically(tmp_path / "file", "two\nlines")
    assert len(tries) == 3 and (tmp_path / "file").read_bytes() == b"two\nlines"


def test_a_checkpoint_that_is_open_elsewhere_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint-1"
    checkpoints.write_folder(folder, lambda path: checkpoints.write_json(path / "state.json", {}))
    # What macOS and Windows put there is no damage.
    for name in (".DS_Store", "._state.json", "Thumbs.db", "desktop.ini"):
        (folder / name).touch()

    def refuse(*paths: Path) -> None:
        raise PermissionError(13, "in use")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "move", refuse)
        with pytest.raises(PermissionError):
            checkpoints.remove(folder)
        patch.setattr(checkpoints, "sys", WINDOWS)
        checkpoints.remove(folder)
    checkpoints.check_folder(folder)
    checkpoints.remove(folder)
    assert not list(tmp_path.iterdir())


def test_paths_of_windows() -> None:
    root = PureWindowsPath("D:/cache")
    found = cache_folder(root, "C:\\models\\sd3:x?", [], {})
    assert found.parent == root / "C--models--sd3--x" and not set(':?"<>|*') & set(str(found)[2:])
    assert Backbone.how_to_load(None, PureWindowsPath("C:\\new\\run")) == 'pipe.load_lora_weights("C:/new/run")'


def test_any_character_can_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stream)
    files.allow_any_character()
    print("赤 ±", flush=True)
    assert stream.buffer.getvalue() == b"\\u8d64 \xb1\n"


# Processes.


def test_jobs_get_signals_of_the_console_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "sys", WINDOWS)
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        if "started" in line:
            StopSignals._remember(signals[0], 2, None)

    signals: list[StopSignals] = []
    enter = StopSignals.__enter__
    monkeypatch.setattr(StopSignals, "__enter__", lambda self: signals.append(self) or enter(self))
    code = "import time; time.sleep(0.3)"
    job = Job("one", lambda: [sys.executable, "-c", code], tmp_path)
    assert run_jobs([job], 1, tell) == ({"one": 0}, 2)


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
def test_the_process_memory_is_in_bytes(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(getrusage=lambda _: SimpleNamespace(ru_maxrss=3 * 2**20), RUSAGE_SELF=0)
    memory = SimpleNamespace(rss=1, peak_wset=3 * 2**30)
    monkeypatch.setattr(stages, "sys", SimpleNamespace(platform=system))
    monkeypatch.setattr(stages.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: memory))
    monkeypatch.setitem(sys.modules, "resource", None if system == "win32" else usage)
    assert stages.peak_resident_bytes() == (3 * 2**20 if system == "darwin" else 3 * 2**30)


# Devices.


@pytest.mark.parametrize(
    ("system", "device", "is_refused"),
    [("linux", "cuda", False), ("darwin", "cpu", False), ("darwin", "mps", True), ("win32", "cuda", True)],
)
def test_where_all_weights_can_be_trained(
    system: str, device: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "sys", SimpleNamespace(platform=system))
    accelerator: Any = SimpleNamespace(device=torch.device(device), num_processes=1)
    if not is_refused:
        return distributed.check_full(accelerator)
    with pytest.raises(ValueError, match=f"--train full: expected CUDA or a CPU .*got {device} on {system}; train a"):
        distributed.check_full(accelerator)


def test_what_a_device_does_not_compute_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, optimizer="adamw-8bit")
    with pytest.raises(ValueError, match="adamw-8bit: bitsandbytes does not compute on mps, .*; choose adamw"):
        check_optimizer(config, False, "mps")
    setup.check_dtype("bf16", torch.device("mps"))
    monkeypatch.setattr(setup, "is_bf16_available", lambda: False)
    setup.check_dtype("bf16", torch.device("cpu"))
    with pytest.raises(ValueError, match="--mixed_precision bf16: this mps device"):
        setup.check_dtype("bf16", torch.device("mps"))
