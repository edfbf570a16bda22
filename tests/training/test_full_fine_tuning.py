# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`--train full`: images and results of each script, checkpoints over several processes, and what is refused.

`test_distributed.py` compares the gradients of two processes.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from trained_backbones import BACKBONES, TrainedBackbone
from training_scripts import (
    SHARED_ARGUMENTS,
    CheckRefusal,
    command_line,
    images_of,
    load_pipeline,
    load_script,
    log_of,
    on_cpus,
    run_program,
    script_path,
    torchrun,
    watch_pictures,
    write_prompts,
)
from watched_updates import watch_updates

from flowbp import FlowBPCallback, get_method
from flowbp.training.checkpoints import CheckpointError, checkpoints
from flowbp.training.distributed import full_tensor, shard_all_weights
from flowbp.training.saved_state import check_saved_state

SUPPORT = Path(__file__).parents[1] / "support"
OF_LORA = ("rank", "lora_alpha")
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(autouse=True)
def _without_a_process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the tiny models, to be read only."""
    folder = tmp_path_factory.mktemp("models")
    for name, backbone in BACKBONES.items():
        backbone.build().save_pretrained(folder / name)
    return {name: folder / name for name in BACKBONES}


def arguments_of(backbone: TrainedBackbone, model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Of a run of two updates."""
    shared = {name: value for name, value in SHARED_ARGUMENTS.items() if name not in OF_LORA}
    return {
        **shared,
        "pretrained_model_name_or_path": model,
        "prompts": write_prompts(folder),
        "output_dir": folder / "run",
        "resolution": backbone.call["height"],
        "max_sequence_length": backbone.call["max_sequence_length"],
        "train": "full",
        **changes,
    }


@pytest.fixture
def arguments(models: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    return arguments_of(BACKBONES["sd3"], models["sd3"], tmp_path)


def run(processes: int, *words: Any, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program of ours in several processes."""
    return run_program(torchrun(*words, processes=processes), on_cpus(**variables), check)


def transformer_of(output: Path) -> dict[str, torch.Tensor]:
    """The result of a run."""
    return load_file(output / "transformer" / "diffusion_pytorch_model.safetensors")


# Images, and the result as users load it.


@pytest.mark.parametrize("precision", ["bf16", "no"])
@pytest.mark.parametrize("name", BACKBONES)
def test_images_are_those_of_the_pipeline_before_and_after(
    name: str, precision: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, drawn = BACKBONES[name], watch_pictures(monkeypatch)
    changes = {"mixed_precision": precision, "use_ema": True, "ema_decay": 0.5, "gradient_checkpointing": True}
    arguments = arguments_of(backbone, models[name], tmp_path, **changes)
    with watch_updates() as updates:
        load_script(backbone.script).main(command_line(arguments))
    # Drawn before the first update, and after the last one.
    base, trained = drawn
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    pipe = load_pipeline(models[name], dtype)
    before = dict(pipe.transformer.named_parameters())
    # In float32, kernels that add in another order where FSDP2 puts the parameters.
    tolerance = 0.0 if precision == "bf16" else 1e-5
    assert (images_of(pipe, **backbone.call) - base).abs().max() <= tolerance
    loaded = type(pipe.transformer).from_pretrained(tmp_path / "run", subfolder="transformer", dtype=dtype)
    assert dict(loaded.config).items() >= {k: v for k, v in pipe.transformer.config.items() if k[0] != "_"}.items()
    moved = sum(not torch.equal(parameter, before[name]) for name, parameter in loaded.named_parameters())
    assert moved > 0.9 * len(before)
    pipe.transformer = loaded
    assert (images_of(pipe, **backbone.call) - trained).abs().max() <= tolerance
    assert (trained - base).abs().max() > 1e-3
    assert all(tensor.dtype == dtype for tensor in transformer_of(tmp_path / "run").values())
    # Weights, gradients and moments are float32 under both.
    assert len(updates) == 2 and all(entry["gradient_norm"] > 0 for entry in log_of(tmp_path / "run"))
    (update, _) = updates
    of_adam = [value for state in update.optimizer.state.values() for value in state.values()]
    assert {each.dtype for each in (*update.parameters, *update.gradients, *of_adam)} == {torch.float32}
    assert str(models[name]) not in (tmp_path / "run" / "transformer" / "config.json").read_text()


def gradients_of(pipe: DiffusionPipeline, call: dict[str, Any]) -> torch.Tensor:
    """Of all weights, in float32."""
    callback = FlowBPCallback(get_method("flowbp-bridge"), generator=torch.Generator().manual_seed(0))
    with callback.record(pipe):
        noise = torch.Generator().manual_seed(1)
        images = pipe(prompt=["a"], num_inference_steps=6, output_type="pt", generator=noise, **call).images
    callback.backward(images.float().square().mean((1, 2, 3)))
    parameters = pipe.transformer.parameters()
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    return torch.cat([full_tensor(each).float().flatten() for each in gradients])


@pytest.mark.parametrize("name", BACKBONES)
def test_gradients_in_bfloat16_are_those_of_the_bfloat16_pipeline(name: str, models: dict[str, Path]) -> None:
    pipes = [load_pipeline(models[name], torch.bfloat16) for _ in range(2)]
    for pipe in pipes:
        pipe.vae.requires_grad_(False)
        pipe.transformer.eval().requires_grad_(True)
    shard_all_weights(Accelerator(), pipes[1].transformer, torch.bfloat16)
    plain, sharded = (gradients_of(pipe, BACKBONES[name].call) for pipe in pipes)
    # The sharded ones are added up in float32. With rounded timesteps the difference is 3 to 8 %.
    assert 0 < (plain - sharded).norm() / plain.norm() < 5e-3


def test_an_average_on_the_cpu_gives_the_same(script: ModuleType, arguments: dict[str, Any], tmp_path: Path) -> None:
    for name, offload in (("here", False), ("there", True)):
        changes = {"use_ema": True, "offload_ema": offload or None, "output_dir": tmp_path / name}
        script.main(command_line(arguments, **{key: value for key, value in changes.items() if value is not None}))
    here, there = transformer_of(tmp_path / "here"), transformer_of(tmp_path / "there")
    assert all(torch.equal(here[name], there[name]) for name in here)


# Checkpoints.


def test_a_checkpoint_of_two_processes_is_read_by_one_and_three(tmp_path: Path) -> None:
    program = SUPPORT / "full_checkpoints.py"
    for writers, readers in ((2, (1, 3)), (1, (3, 2))):
        folder = tmp_path / f"of_{writers}" / "checkpoint-2"
        folder.parent.mkdir()
        run(writers, program, "write", folder, **FSDP2)
        files = sorted(path.name for path in folder.iterdir())
        assert len([name for name in files if name.startswith("shard-")]) == writers
        assert {Path(name).suffix for name in files} == {".safetensors", ".json"}
        for count in readers:
            found = json.loads(run(count, program, "read", folder, **FSDP2).stdout.strip().splitlines()[-1])
            assert found["difference"] == 0.0 and found["update"] == 2 and found["tensors"] > 100


def test_a_process_killed_while_saving_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    program = SUPPORT / "full_checkpoints.py"
    run(2, program, "write", tmp_path / "checkpoint-1", **FSDP2)
    done = run(2, program, "kill", tmp_path / "checkpoint-2", check=False, **FSDP2)
    assert done.returncode != 0
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-1"]
    run(1, program, "read", tmp_path / "checkpoint-1", **FSDP2)


def test_a_run_of_two_processes_trains_and_resumes_like_one(
    script: ModuleType, arguments: dict[str, Any], tmp_path: Path
) -> None:
    shared = {**arguments, "checkpointing_steps": 1, "use_ema": True, "eval_reward": "toy_reward:make_held_out_reward"}
    shared |= {"eval_steps": 1, "adam_epsilon": 1, "adam_weight_decay": 0, "eval_prompts": shared["prompts"]}
    script.main(command_line(shared))
    two = {**shared, "output_dir": tmp_path / "two", "train_batch_size": 1}
    run(2, script_path("train_flowbp_sd3"), *command_line(two), **FSDP2)
    one, other = transformer_of(tmp_path / "run"), transformer_of(tmp_path / "two")
    base = load_pipeline(arguments["pretrained_model_name_or_path"]).transformer.state_dict()
    moved = max((one[name] - base[name]).abs().max().item() for name in one)
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-4 * moved
    # The base is gone; its images and scores are the checkpoint's.
    resumed = {**shared, "output_dir": tmp_path / "two", "resume_from_checkpoint": "checkpoint-1"}
    shutil.rmtree(tmp_path / "two" / "checkpoint-2")
    script.main(command_line(resumed))
    again = transformer_of(tmp_path / "two")
    assert max((one[name] - again[name]).abs().max().item() for name in one) < 1e-4 * moved
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("run", "two")]
    for key in ("base", "trained"):
        values = [[each[key]["mean"] for each in record["rewards"]] for record in records]
        assert values[0] == pytest.approx(values[1], abs=1e-5)
    images = [Image.open(tmp_path / name / "images" / "0_base.png").tobytes() for name in ("run", "two")]
    assert images[0] == images[1]


@pytest.fixture(scope="module")
def trained(script: ModuleType, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run with an average, to be copied."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = arguments_of(BACKBONES["sd3"], models["sd3"], folder, use_ema=True, checkpointing_steps=1)
    script.main(command_line(arguments))
    return arguments["output_dir"]


def test_a_resumed_run_ends_bit_for_bit_the_same(
    script: ModuleType, arguments: dict[str, Any], trained: Path, tmp_path: Path
) -> None:
    resumed = {**arguments, "use_ema": True, "resume_from_checkpoint": trained / "checkpoint-1"}
    script.main(command_line(resumed))
    whole, again = transformer_of(trained), transformer_of(tmp_path / "run")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    names = [f"images/0_{kind}.png" for kind in ("base", "trained")]
    assert [(trained / name).read_bytes() for name in names] == [
        (tmp_path / "run" / name).read_bytes() for name in names
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_prompt": "another"}, "--train full it is gone after the first update"),
        ({"guidance_scale": 2.0}, "--train full it is gone after the first update"),
        ({"train": "lora"}, "use the --train of that run, full"),
        ({"use_ema": None}, "that run was with --use_ema; this one must be too"),
    ],
)
def test_what_cannot_be_resumed(
    script: ModuleType, arguments: dict[str, Any], trained: Path, changes: dict[str, Any], message: str
) -> None:
    resumed = {**arguments, "use_ema": True, "resume_from_checkpoint": trained / "checkpoint-1", **changes}
    with pytest.raises((SystemExit, ValueError), match=message):
        script.main(command_line({name: value for name, value in resumed.items() if value is not None}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "base_0.png").unlink(), "base_0.png"),
        (lambda folder: os.truncate(folder / "shard-00001-model-00001-of-00001.safetensors", 100), "bytes, found 100"),
    ],
)
def test_damage_is_found(trained: Path, tmp_path: Path, damage: Any, message: str) -> None:
    shutil.copytree(trained / "checkpoint-1", tmp_path / "checkpoint-1")
    check_saved_state(tmp_path / "checkpoint-1")
    damage(tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match=message):
        check_saved_state(tmp_path / "checkpoint-1")


# What is refused.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 8}, "--rank is an option of a LoRA; leave it out"),
        ({"lora_layers": "to_q"}, "--lora_layers is an option of a LoRA"),
        ({"velocity_anchor": 0.1}, "--velocity_anchor compares with the base model"),
        ({"verify": True}, "--verify needs whole parameters; leave it out, or train a LoRA"),
        ({"mixed_precision": "fp16"}, "--train full computes in bf16 or float32"),
        ({"offload_ema": True}, "--offload_ema has no effect without --use_ema"),
        ({"offload_ema": True, "use_ema": True, "train": "lora"}, "--offload_ema needs --train full"),
        ({"quantization_config_path": "nf4.json"}, "--quantization_config_path leaves weights that cannot be trained"),
        ({"optimizer": "adamw-8bit"}, "--optimizer other than adamw does not train shards; leave it out"),
    ],
)
def test_what_does_not_go_with_full_fine_tuning(
    arguments: dict[str, Any], changes: dict[str, Any], message: str, check_refusal: CheckRefusal
) -> None:
    check_refusal("train_flowbp_sd3", {**arguments, **changes}, message)


def test_several_processes_without_fsdp2_are_refused(arguments: dict[str, Any]) -> None:
    done = run(2, script_path("train_flowbp_sd3"), *command_line(arguments), check=False)
    assert "--train full: expected FSDP2 for 2 processes, got DDP" in done.stderr and done.returncode != 0
    assert "Loading pipeline components" not in done.stderr
