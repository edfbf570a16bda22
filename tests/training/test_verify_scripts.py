# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`--verify` of the training scripts: the run's own pipeline is compared before the first update."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import tiny_flux_pipeline, tiny_klein_pipeline, tiny_wan_pipeline, tiny_z_image_pipeline
from tiny_sd3 import MAX_SEQUENCE_LENGTH, tiny_sd3_pipeline
from training_scripts import (
    arguments_of_run,
    command_line,
    load_script,
    lora_of,
    same,
)

import flowbp.callback
from flowbp.training.script import run_script

WAN_SIZE = {"height": 16, "width": 16, "num_frames": 5}
# What builds the model, the script, and the options that it needs.
MODELS: dict[str, tuple[Callable[[], DiffusionPipeline], str, dict[str, Any]]] = {
    "SD3": (
        lambda: tiny_sd3_pipeline(torch.float32),
        "train_flowbp_sd3",
        {"resolution": 8, "max_sequence_length": MAX_SEQUENCE_LENGTH, "sigmas": "linear"},
    ),
    "FLUX.1": (tiny_flux_pipeline, "train_flowbp_flux", {"resolution": 8, "max_sequence_length": 16}),
    "FLUX.2-Klein": (tiny_klein_pipeline, "train_flowbp_flux2", {"resolution": 8, "max_sequence_length": 16}),
    "Z-Image": (
        tiny_z_image_pipeline,
        "train_flowbp",
        {
            "height": 8,
            "width": 8,
            "guidance_scale": 4.0,
            "pipeline_arguments": {"negative_prompt": "grey", "max_sequence_length": 20},
        },
    ),
    "Wan 2.1": (
        tiny_wan_pipeline,
        "train_flowbp",
        {**WAN_SIZE, "guidance_scale": 4.0, "pipeline_arguments": {"max_sequence_length": 16}},
    ),
}


@pytest.fixture
def arguments_of(saved: Callable[[str], Path], tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """A script's arguments for a model of `MODELS`."""

    def make(name: str) -> dict[str, Any]:
        return arguments_of_run(saved(name), tmp_path, **MODELS[name][2])

    return make


Arguments = Callable[[str], dict[str, Any]]


@pytest.fixture
def broken_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that scales every weight by 1.01."""
    sweep = flowbp.callback.sweep

    def broken(trajectories: Any, *args: Any, **kwargs: Any) -> Any:
        changed = []
        for each in trajectories:
            terms = tuple(replace(term, weight=1.01 * term.weight) for term in each.surrogate.terms)
            changed.append(replace(each, surrogate=replace(each.surrogate, terms=terms)))
        return sweep(changed, *args, **kwargs)

    monkeypatch.setattr(flowbp.callback, "sweep", broken)


@pytest.mark.parametrize("name", MODELS)
def test_the_runs_own_call_is_compared(arguments_of: Arguments, capsys: pytest.CaptureFixture[str], name: str) -> None:
    load_script(MODELS[name][1]).main(command_line(arguments_of(name), verify=True, dry_run=True))
    lines = [line for line in capsys.readouterr().out.splitlines() if "stock call" in line]
    # With gradients through both branches of guidance, and through the conditional one as in the run.
    assert len(lines) == 2 and all("3 steps, float32" in line and "within the bound" in line for line in lines)
    assert not any("too small to be tested" in line for line in lines)
    has_guidance = name != "FLUX.1"
    assert "without" not in lines[0] and ("without" in lines[1]) is has_guidance, lines


def test_the_runs_choice_of_branches(arguments_of: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    # LeapAlign sends gradients through both by default.
    load_script("train_flowbp_sd3").main(
        command_line(arguments_of("SD3"), verify=True, dry_run=True, method="leapalign")
    )
    assert len([line for line in capsys.readouterr().out.splitlines() if "stock call" in line]) == 1


def test_it_changes_nothing(arguments_of: Arguments, tmp_path: Path) -> None:
    script, arguments = load_script("train_flowbp"), arguments_of("Z-Image")
    script.main(command_line(arguments))
    script.main(command_line(arguments, verify=True, output_dir=tmp_path / "verified"))
    assert same(lora_of(arguments["output_dir"]), lora_of(tmp_path / "verified"))


@pytest.mark.usefixtures("broken_sweep")
@pytest.mark.parametrize("name", MODELS)
def test_a_difference_stops_the_run_with_one_line(
    arguments_of: Arguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    words = command_line(arguments_of(name), verify=True)
    script = load_script(MODELS[name][1])
    monkeypatch.setattr(sys, "argv", [MODELS[name][1] + ".py", *words])
    left: list[Any] = []
    monkeypatch.setattr("flowbp.training.script.exit_process", left.append)
    capsys.readouterr()
    run_script(lambda: script.main(words))
    (message,) = left
    assert message.startswith(f"{MODELS[name][1]}.py: error: --verify: ") and "\n" not in message, message
    assert "OUT OF THE BOUND (full) 1e-03; train with another call or dtype" in message, message
    assert "stock call" not in capsys.readouterr().out
    assert not (arguments_of(name)["output_dir"] / "log.jsonl").exists()


def test_it_is_advised_for_pipelines_outside_of_the_matrix(
    arguments_of: Arguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("train_flowbp")
    words = command_line(arguments_of("Z-Image"), dry_run=True)
    script.main(words)
    assert "--verify" not in capsys.readouterr().err
    monkeypatch.setattr(script, "VERIFIED_PIPELINES", frozenset())
    script.main(words)
    assert "ZImagePipeline is not among the verified pipelines" in capsys.readouterr().err
    script.main([*words, "--verify"])
    assert "is not among" not in capsys.readouterr().err
