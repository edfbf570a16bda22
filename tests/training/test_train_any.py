# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The script for any pipeline, on tiny saved ones: images, videos, lists of samples, two transformers."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler
from safetensors.torch import load_file
from tiny_pipelines import (
    tiny_flux_pipeline,
    tiny_klein_pipeline,
    tiny_ovis_image_pipeline,
    tiny_wan_22_pipeline,
    tiny_wan_pipeline,
    tiny_z_image_pipeline,
)
from toy_reward import Motion, make_reward
from training_scripts import (
    METHOD_OPTIONS,
    CheckRefusal,
    accelerate_launch,
    arguments_of_run,
    backbone_of,
    check_dry_run,
    check_round_trip,
    check_run,
    command_line,
    environment,
    load_pipeline,
    load_script,
    log_of,
    lora_of,
    metadata_of,
    run_program,
    same,
    watch_pictures,
)
from watched_updates import check_float32_over_bfloat16, watch_updates

from flowbp import METHODS
from flowbp.checks import RecordingError
from flowbp.publishing.published_files import LORA_FILE

NAME = "train_flowbp"
# By name: what builds the pipeline, and what users give it.
MODELS: dict[str, tuple[Callable[[], DiffusionPipeline], dict[str, Any]]] = {
    "Z-Image": (
        tiny_z_image_pipeline,
        {"height": 8, "width": 8, "guidance_scale": 4.0, "negative_prompt": "grey", "max_sequence_length": 20},
    ),
    # diffusers has no LoRA loader for this one. Its own 130 bytes stand before every prompt.
    "Ovis-Image": (
        tiny_ovis_image_pipeline,
        {"height": 8, "width": 8, "guidance_scale": 4.0, "max_sequence_length": 136},
    ),
    "Wan 2.1": (
        tiny_wan_pipeline,
        {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 4.0, "max_sequence_length": 16},
    ),
    "Wan 2.2": (
        tiny_wan_22_pipeline,
        {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 4.0, "max_sequence_length": 16},
    ),
    "FLUX.1": (
        tiny_flux_pipeline,
        {"height": 8, "width": 8, "guidance_scale": 4.0, "max_sequence_length": 16},
    ),
    "FLUX.2-Klein": (
        tiny_klein_pipeline,
        {"height": 8, "width": 8, "guidance_scale": 4.0, "max_sequence_length": 16},
    ),
}
OPTIONS = ("height", "width", "num_frames", "guidance_scale")


@pytest.fixture
def arguments_of(saved: Callable[[str], Path], tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """The script's arguments for a model of `MODELS`."""

    def make(name: str) -> dict[str, Any]:
        call = MODELS[name][1]
        options = {option: call.get(option) for option in OPTIONS}
        others = {option: value for option, value in call.items() if option not in OPTIONS}
        return arguments_of_run(saved(name), tmp_path, **options, pipeline_arguments=others)

    return make


Arguments = Callable[[str], dict[str, Any]]


@pytest.mark.parametrize("method", METHODS)
def test_two_updates_with_every_method(
    script: ModuleType, arguments_of: Arguments, monkeypatch: pytest.MonkeyPatch, method: str
):
    arguments, drawn = arguments_of("Z-Image"), watch_pictures(monkeypatch)
    script.main(command_line(arguments, method=method, **METHOD_OPTIONS[method]))
    output = arguments["output_dir"]
    check_run(output)
    assert set(metadata_of(output)["transformer.target_modules"]) == set(
        backbone_of(script).defaults["lora_layers"].split(",")
    )
    model = arguments["pretrained_model_name_or_path"]
    check_round_trip(model, lambda pipe: pipe.load_lora_weights(output), drawn, **MODELS["Z-Image"][1])


@pytest.mark.parametrize("method", ["flowbp-lagrange", "draft-lv"])
def test_videos(
    script: ModuleType,
    arguments_of: Arguments,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
):
    """The reward scores frames, and the LoRA loads as any other."""
    arguments, drawn = arguments_of("Wan 2.1"), watch_pictures(monkeypatch)
    script.main(command_line(arguments, method=method, validation_steps=1))
    output = arguments["output_dir"]
    check_run(output)
    assert f'pipe.load_lora_weights("{output}")' in capsys.readouterr().out
    assert drawn[-1].shape == (1, 5, 3, 16, 16)
    model = arguments["pretrained_model_name_or_path"]
    check_round_trip(model, lambda pipe: pipe.load_lora_weights(output), drawn, **MODELS["Wan 2.1"][1])
    assert (output / "validation" / "000001.png").is_file() and (output / "before_after.png").is_file()


def test_rewards_of_whole_videos_and_of_chosen_frames(
    script: ModuleType, arguments_of: Arguments, monkeypatch: pytest.MonkeyPatch
):
    """Update, evaluation and validation score the same frames; `run.json` has the scores of the base model's video."""
    arguments, drawn = arguments_of("Wan 2.1"), watch_pictures(monkeypatch)
    rewards = {"toy_reward:make_reward": 1, "toy_reward:Motion": 2}
    words = {"reward": ",".join(f"{name}:{weight}" for name, weight in rewards.items()), "reward_frames": 2}
    words |= {"eval_reward": "toy_reward:make_held_out_reward", "num_eval_images": 1}
    script.main(command_line(arguments, method="draft-k", **words))
    output, video = arguments["output_dir"], drawn[0]
    assert {f"reward/{name}" for name in rewards} < log_of(output)[0].keys()
    red = torch.stack([make_reward()(video[:, frame], [""]) for frame in (0, 4)]).mean()
    expected = {"toy_reward:make_reward": red, "toy_reward:Motion": Motion()(video, [""]).mean()}
    expected[words["reward"]] = sum(weight * expected[name] for name, weight in rewards.items())
    expected["toy_reward:make_held_out_reward"] = video[:, [0, 4]].mean()
    found = json.loads((output / "run.json").read_text())["rewards"]
    assert {each["name"]: each["base"]["mean"] for each in found} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-4
    )


@pytest.mark.parametrize(
    ("name", "component"), [("Ovis-Image", "transformer"), ("Wan 2.2", "transformer"), ("Wan 2.2", "transformer_2")]
)
def test_one_of_two_transformers_and_a_pipeline_without_lora_loader(
    script: ModuleType,
    arguments_of: Arguments,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    component: str,
):
    """The line that the script prints is the one that loads its LoRA."""
    arguments, drawn = arguments_of(name), watch_pictures(monkeypatch)
    script.main(command_line(arguments, lora_component=component, method="full"))
    output = arguments["output_dir"]
    check_run(output)
    (loads,) = re.findall(r"^  load   (.+)$", capsys.readouterr().out, re.MULTILINE)
    has_loader = name == "Wan 2.2" and component == "transformer"
    assert loads.startswith("pipe.load_lora_weights(" if has_loader else f"pipe.{component}.load_lora_adapter(")

    def load(pipe: DiffusionPipeline) -> None:
        if has_loader:
            pipe.load_lora_weights(str(output))
        else:
            getattr(pipe, component).load_lora_adapter(str(output), weight_name=LORA_FILE)
        assert getattr(pipe, component).active_adapters()

    check_round_trip(arguments["pretrained_model_name_or_path"], load, drawn, **MODELS[name][1])


@pytest.mark.parametrize(("name", "backbone"), [("FLUX.1", "flux"), ("FLUX.2-Klein", "flux2")])
def test_it_trains_what_a_backbone_s_own_script_trains(
    script: ModuleType, arguments_of: Arguments, tmp_path: Path, name: str, backbone: str
):
    own = load_script(f"train_flowbp_{backbone}")
    arguments = arguments_of(name)
    changes = {"method": "draft-k", "last_k": 2, "lora_layers": backbone_of(own).defaults["lora_layers"]}
    script.main(command_line(arguments, **changes))
    for option in ("height", "width", "pipeline_arguments"):
        del arguments[option]
    output = tmp_path / "own"
    own.main(command_line(arguments, **changes, resolution=8, max_sequence_length=16, output_dir=output))
    assert same(lora_of(arguments["output_dir"]), lora_of(output))


def test_lora_and_optimizer_stay_float32_over_a_bfloat16_base(
    script: ModuleType, arguments_of: Arguments, monkeypatch: pytest.MonkeyPatch
):
    arguments, drawn = arguments_of("Z-Image"), watch_pictures(monkeypatch)
    with watch_updates() as updates:
        script.main(command_line(arguments, mixed_precision="bf16", validation_steps=1, checkpointing_steps=1))
    check_float32_over_bfloat16(updates[-1])
    model, output = arguments["pretrained_model_name_or_path"], arguments["output_dir"]
    check_round_trip(model, lambda pipe: pipe.load_lora_weights(output), drawn, **MODELS["Z-Image"][1])


def test_group_offload_trains_the_same(script: ModuleType, arguments_of: Arguments, tmp_path: Path):
    arguments = arguments_of("Z-Image")
    script.main(command_line(arguments, method="draft-k"))
    script.main(command_line(arguments, method="draft-k", group_offload=True, output_dir=tmp_path / "offloaded"))
    assert same(lora_of(arguments["output_dir"]), lora_of(tmp_path / "offloaded"))


def test_dry_run_writes_nothing(
    script: ModuleType, arguments_of: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    check_dry_run(script, arguments_of("Wan 2.1"), tmp_path, capsys)


def test_accelerate_launch(arguments_of: Arguments):
    arguments = arguments_of("Wan 2.1")
    output = arguments["output_dir"]
    printed = run_program(accelerate_launch(NAME, command_line(arguments)), environment()).stdout
    assert f'  load   pipe.load_lora_weights("{output}")' in printed.splitlines()
    check_run(output)
    load_pipeline(arguments["pretrained_model_name_or_path"]).load_lora_weights(output)


# Refusals: one line, an exit code, and no model loaded.

REFUSALS = {
    "unknown argument": (
        {"pipeline_arguments": {"true_cfg_scal": 2.0, "max_sequence_length": 16}},
        "FluxPipeline takes no argument true_cfg_scal here; did you mean true_cfg_scale?",
    ),
    "unknown option of a pipeline without frames": ({"num_frames": 5}, "FluxPipeline takes no argument num_frames"),
    "the script's own argument": ({"pipeline_arguments": {"output_type": "pil"}}, "takes no argument output_type"),
    "several images of a prompt": (
        {"pipeline_arguments": {"num_images_per_prompt": 2}},
        "takes no argument num_images_per_prompt",
    ),
    "self": ({"pipeline_arguments": {"self": 1}}, "takes no argument self"),
    "no JSON": ({"pipeline_arguments": "true_cfg_scale=2"}, "--pipeline_arguments: invalid json_object value"),
    "no JSON object": ({"pipeline_arguments": "[1]"}, "a JSON object expected, got [1]"),
    "no such transformer": (
        {"lora_component": "transformer_2"},
        "--lora_component transformer_2: FluxPipeline has transformer.",
    ),
    "undo guidance": ({"undo_guidance": True}, "--undo_guidance needs to know what guidance multiplies by"),
    "frames of images": ({"reward_frames": 2}, "--reward_frames 2: FluxPipeline makes images, not videos"),
    "images for a reward of videos": (
        {"reward": "toy_reward:Motion"},
        "it takes videos, but FluxPipeline makes images",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_bad_command_line_is_one_line_before_any_model(
    arguments_of: Arguments, case: str, check_refusal: CheckRefusal
):
    changes, message = REFUSALS[case]
    check_refusal(NAME, {**arguments_of("FLUX.1"), **changes}, message)


@pytest.mark.parametrize(
    ("component", "found", "message"),
    [
        (
            "scheduler",
            ["diffusers", "DPMSolverMultistepScheduler"],
            "expected a model with FlowMatchEulerDiscreteScheduler, got DPMSolverMultistepScheduler",
        ),
        ("scheduler", [None, None], "expected a model with FlowMatchEulerDiscreteScheduler, got None"),
        ("transformer", [None, None], "--lora_component transformer: FluxPipeline has no transformer."),
        (
            "transformer",
            ["diffusers", "OmniGenTransformer2DModel"],
            "diffusers cannot add a LoRA to its OmniGenTransformer2DModel",
        ),
        ("_class_name", "MyPipeline", "MyPipeline: not a pipeline of diffusers"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    arguments_of: Arguments, tmp_path: Path, component: str, found: Any, message: str, check_refusal: CheckRefusal
):
    arguments = arguments_of("FLUX.1")
    index = json.loads((arguments["pretrained_model_name_or_path"] / "model_index.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text(json.dumps({**index, component: found}))
    check_refusal(NAME, {**arguments, "pretrained_model_name_or_path": other}, message)


def test_an_unknown_layer_is_refused(script: ModuleType, arguments_of: Arguments):
    with pytest.raises(ValueError, match="to_z"):
        script.main(command_line(arguments_of("Z-Image"), lora_layers="to_z"))


def test_a_scheduler_of_another_kind_that_was_saved_is_refused_by_the_recorder(
    script: ModuleType, arguments_of: Arguments, tmp_path: Path
):
    """The same class with stochastic steps: only the recorder can see that."""
    arguments = arguments_of("Z-Image")
    model = tmp_path / "stochastic"
    shutil.copytree(arguments["pretrained_model_name_or_path"], model)
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "stochastic_sampling": True}))
    with pytest.raises(RecordingError, match="is not latents"):
        script.main(command_line(arguments, pretrained_model_name_or_path=model))


def test_a_model_saved_with_another_scheduler_trains_with_flow_shift(
    script: ModuleType, arguments_of: Arguments, tmp_path: Path
):
    """Released Wan models come with UniPC: `--flow_shift` gives the LoRA of the same model with Euler steps."""
    arguments = arguments_of("Wan 2.1")
    saved = arguments["pretrained_model_name_or_path"]
    shift = json.loads((saved / "scheduler" / "scheduler_config.json").read_text())["shift"]
    model = tmp_path / "unipc"
    shutil.copytree(saved, model)
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True).save_pretrained(
        model / "scheduler"
    )
    index = json.loads((model / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="got UniPCMultistepScheduler; .* give --flow_shift"):
        script.main(command_line(arguments, pretrained_model_name_or_path=model, output_dir=tmp_path / "refused"))
    found = []
    for name, changes in (
        ("euler", {}),
        ("shift", {"pretrained_model_name_or_path": model, "flow_shift": shift}),
    ):
        script.main(command_line(arguments, output_dir=tmp_path / name, **changes))
        found.append(load_file(tmp_path / name / LORA_FILE))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
