# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Seeds, checkpoints, the LoRA, quantisation configs, stages, and the list of what may leave the machine."""

import argparse
import fnmatch
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.optimization import get_scheduler
from tiny_sd3 import tiny_sd3_pipeline

from flowbp.arguments import add_model_arguments, add_reward_arguments, add_training_arguments, parse_training_args
from flowbp.recording import RecordingError
from flowbp.training_utils import (
    PUSHED_FILES,
    StageMeter,
    TrainingRun,
    add_lora,
    checkpoints,
    derive_seed,
    find_checkpoint,
    load_checkpoint,
    load_quantization_config,
    make_accelerator,
    make_generator,
    missing_components,
    read_log,
    save_checkpoint,
    to_pil,
)


def test_seeds_are_distinct():
    seeds = {
        derive_seed(purpose, seed, update, part, rank)
        for purpose in ("noise", "surrogate", "copies", "reward")
        for seed in range(4)
        for update in range(40)
        for part in range(4)
        for rank in range(4)
    }
    assert len(seeds) == 4 * 4 * 40 * 4 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed("noise", 1, 11) != derive_seed("noise", 11, 1)


def test_seeds_never_change():
    # A resumed run draws what the first one would have drawn, so these are part of the checkpoint format.
    assert derive_seed("noise", 0, 0) == 828296919176696148
    assert derive_seed("lora", 7) == 9111166230886480329


def test_generators_are_the_seed_s():
    first, again = make_generator("noise", 3), make_generator("noise", 3)
    assert torch.equal(torch.randn(4, generator=first), torch.randn(4, generator=again))
    assert first.initial_seed() == derive_seed("noise", 3) and first.device.type == "cpu"


class Run:
    """Two parameters (one in bfloat16) under AdamW and a warm-up."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.lora = {
            "a.lora_A.weight": torch.nn.Parameter(torch.randn(3, 4)),
            "a.lora_B.weight": torch.nn.Parameter(torch.randn(4, 3).bfloat16()),
        }
        self.optimizer = torch.optim.AdamW(self.lora.values(), lr=0.1, weight_decay=0.01)
        self.lr_scheduler = get_scheduler("cosine", self.optimizer, num_warmup_steps=2, num_training_steps=9)

    def update(self, number: int) -> None:
        for place, parameter in enumerate(self.lora.values()):
            noise = torch.randn(parameter.shape, generator=make_generator("gradient", number, place))
            parameter.grad = noise.to(parameter.dtype)
        self.optimizer.step()
        self.lr_scheduler.step()


def test_a_checkpoint_restores_everything_bit_for_bit(tmp_path: Path):
    whole = Run()
    for number in range(6):
        whole.update(number)

    first = Run()
    for number in range(3):
        first.update(number)
    state = {"update": 3, "prompts": {"position": 5}, "scaler": {}}
    save_checkpoint(tmp_path / "checkpoint-3", first.lora, first.optimizer, first.lr_scheduler, state)

    second = Run()
    lora, loaded = load_checkpoint(tmp_path / "checkpoint-3", second.optimizer, second.lr_scheduler)
    assert loaded == state
    for name, parameter in second.lora.items():
        assert lora[name].dtype == parameter.dtype and torch.equal(lora[name], first.lora[name])
        parameter.data.copy_(lora[name])
    saved, restored = first.optimizer.state_dict(), second.optimizer.state_dict()
    assert saved["param_groups"][0]["lr"] == second.lr_scheduler.get_last_lr()[0] != 0.1
    assert saved["state"].keys() == restored["state"].keys()
    for index, moments in saved["state"].items():
        for name, value in moments.items():
            found = restored["state"][index][name]
            assert found.dtype == value.dtype and torch.equal(found, value)
    assert second.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"]
    for number in range(3, 6):
        second.update(number)
        assert second.optimizer.param_groups[0]["lr"] == second.lr_scheduler.get_last_lr()[0]
    assert second.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()
    for name, parameter in whole.lora.items():
        assert torch.equal(second.lora[name], parameter)


def test_a_checkpoint_is_safetensors_and_json_only(tmp_path: Path):
    run = Run()
    run.update(0)
    save_checkpoint(tmp_path / "checkpoint-1", run.lora, run.optimizer, run.lr_scheduler, {"update": 1})
    names = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert names == {"lora.safetensors", "optimizer.safetensors", "state.json"}
    assert json.loads((tmp_path / "checkpoint-1" / "state.json").read_text())["update"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_saving_again_replaces_the_checkpoint_and_a_half_written_one(tmp_path: Path):
    run = Run()
    folder = tmp_path / "checkpoint-1"
    half = tmp_path / "checkpoint-1.partial"
    half.mkdir()
    (half / "rest").write_text("x")
    for update in (1, 2):
        run.update(update)
        save_checkpoint(folder, run.lora, run.optimizer, run.lr_scheduler, {"update": update})
    assert not half.exists() and not (folder / "rest").exists()
    fresh = Run()
    assert load_checkpoint(folder, fresh.optimizer, fresh.lr_scheduler)[1] == {"update": 2}


@pytest.mark.parametrize("name", ["lora.safetensors", "optimizer.safetensors", "state.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str):
    run = Run()
    run.update(0)
    folder = tmp_path / "checkpoint-1"
    save_checkpoint(folder, run.lora, run.optimizer, run.lr_scheduler, {"update": 1})
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"checkpoint-1 has no {name}; choose a complete checkpoint"):
        load_checkpoint(folder, run.optimizer, run.lr_scheduler)
    with pytest.raises(ValueError, match=f"checkpoint-1 has no {name}; choose a complete checkpoint"):
        find_checkpoint(tmp_path, "checkpoint-1")


def test_find_checkpoint(tmp_path: Path):
    names = ("checkpoint-2", "checkpoint-9", "checkpoint-10", "checkpoint-11.partial", "checkpoint-x", "logs")
    for age, name in enumerate(names):
        (tmp_path / name).mkdir()
        for file in ("state.json", "lora.safetensors", "optimizer.safetensors"):
            (tmp_path / name / file).write_text("{}")
        os.utime(tmp_path / name / "state.json", (1_000_000 + age, 1_000_000 + age))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-10"
    assert find_checkpoint(tmp_path, "checkpoint-2") == tmp_path / "checkpoint-2"
    assert find_checkpoint(tmp_path / "elsewhere", str(tmp_path / "checkpoint-9")) == tmp_path / "checkpoint-9"
    with pytest.raises(ValueError, match="checkpoint-3: not found; .* has checkpoint-2, checkpoint-9, checkpoint-10"):
        find_checkpoint(tmp_path, "checkpoint-3")


@pytest.mark.parametrize("choice", ["latest", "checkpoint-1"])
def test_find_checkpoint_where_there_is_none(tmp_path: Path, choice: str):
    (tmp_path / "latest").mkdir()  # a folder of that name is not what the word means
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=f"{choice}: not found; .* has no checkpoints"):
            find_checkpoint(folder, choice)


def test_the_log_of_a_resumed_run_ends_where_it_resumes(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    assert read_log(path, 5) == []
    path.write_text("".join(json.dumps({"step": step, "reward": step / 10}) + "\n" for step in range(1, 8)))
    assert read_log(path, 0) == []
    assert [row["step"] for row in read_log(path, 4)] == [1, 2, 3, 4]


def test_missing_components():
    config = {
        "_class_name": "StableDiffusion3Pipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder_3": [None, None],
        "tokenizer_3": [None, None],
    }
    assert missing_components(config) == {"text_encoder_3": None, "tokenizer_3": None}


def test_only_the_lora_its_card_and_its_pictures_are_pushed():
    assert PUSHED_FILES == ["README.md", "pytorch_lora_weights.safetensors", "before_after.png", "reward_curve.png"]
    written = ["log.jsonl", "logs/events.out", "checkpoint-1/optimizer.safetensors", "validation/000001.png", ".env"]
    written += ["checkpoint-1/lora.safetensors", "checkpoint-1/state.json", "prompts.txt"]
    assert not [name for name in written for pattern in PUSHED_FILES if fnmatch.fnmatch(name, pattern)]


def test_checkpoints_are_ordered_by_when_they_were_written(tmp_path: Path) -> None:
    """A folder may hold later updates of an earlier run; the newest checkpoint is this run's."""
    for age, update in ((2, 300), (1, 100)):
        folder = tmp_path / f"checkpoint-{update}"
        folder.mkdir()
        (folder / "state.json").write_text("{}")
        os.utime(folder / "state.json", (1_000_000 - age, 1_000_000 - age))
    (tmp_path / "checkpoint-400").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-300", "checkpoint-100"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-100"


# The LoRA.


def lora_arguments(**changes: object) -> argparse.Namespace:
    values = {"rank": 3, "lora_alpha": 6, "lora_layers": "attn.to_q, attn.to_out.0", "seed": 1}
    return argparse.Namespace(**{**values, **changes})


def test_the_lora_is_float32_on_a_frozen_model_of_another_dtype():
    transformer = tiny_sd3_pipeline(torch.bfloat16).transformer.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in transformer.named_parameters()}
    parameters = add_lora(transformer, lora_arguments())
    named = dict(transformer.named_parameters())
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    assert [id(parameter) for parameter in parameters] == [id(parameter) for parameter in trained.values()]
    # Two blocks, two layers of each, two matrices of each.
    assert len(trained) == 8 and all(".attn.to_" in name and ".lora_" in name for name in trained)
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    assert all(parameter.abs().max() == 0 for name, parameter in trained.items() if "lora_B" in name)
    frozen = {name.replace(".base_layer", ""): value for name, value in named.items() if name not in trained}
    assert frozen.keys() == before.keys()
    assert all(value.dtype == torch.bfloat16 and torch.equal(value, before[name]) for name, value in frozen.items())
    assert all(layer.scaling["default"] == 2 for layer in transformer.modules() if hasattr(layer, "scaling"))


def test_the_lora_s_start_is_the_seed_s():
    def start(seed: int) -> list[torch.Tensor]:
        transformer = tiny_sd3_pipeline(torch.float32).transformer.requires_grad_(False)
        torch.rand(7)  # The global generator's state must not matter.
        return add_lora(transformer, lora_arguments(seed=seed))

    first, again, other = start(1), start(1), start(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_layers_that_no_transformer_has_are_refused():
    transformer = tiny_sd3_pipeline(torch.float32).transformer
    with pytest.raises(ValueError, match="to_nowhere"):
        add_lora(transformer, lora_arguments(lora_layers="to_nowhere"))


# Quantisation configs.


def test_no_file_is_no_quantisation():
    assert load_quantization_config(None, torch.bfloat16) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "JSONDecodeError"),
        ("[1, 2]", "TypeError"),
        ('{"quant_method": "int3"}', "Unknown quantization type, got int3"),
        ("{}", "Unknown quantization type, got bitsandbytes"),
        ('{"load_in_8bit": true, "load_in_8bits": true}', "unknown load_in_8bits, expected some of .*load_in_8bit"),
        ('{"load_in_8bit": "yes"}', "load_in_8bit must be a boolean"),
        ('{"quant_method": "torchao"}', "torchao|quant_type"),
    ],
)
def test_a_file_that_is_no_quantisation_config_is_refused_in_one_line(
    tmp_path: Path, content: str | None, message: str
):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"--quantization_config_path .*config.json: .*({message})"):
        load_quantization_config(path, torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="bitsandbytes quantises where there is a GPU")
def test_bitsandbytes_without_a_gpu_is_refused_before_a_model_is_loaded(tmp_path: Path):
    path = tmp_path / "int8.json"
    path.write_text('{"load_in_8bit": true}')
    with pytest.raises(ValueError, match="int8.json: RuntimeError: No GPU found"):
        load_quantization_config(path, torch.bfloat16)


# Pictures and stages.


def test_pictures_are_those_of_the_pipelines_and_of_videos_the_middle_frames():
    images = torch.rand(2, 3, 4, 6)
    found = [np.asarray(image) for image in to_pil(images)]
    assert [image.shape for image in found] == [(4, 6, 3)] * 2
    expected = (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    assert all(np.array_equal(image, other) for image, other in zip(found, expected, strict=True))

    videos = torch.rand(2, 5, 3, 4, 6)
    of_middle = [image.tobytes() for image in to_pil(videos[:, 2])]
    assert [image.tobytes() for image in to_pil(videos)] == of_middle


def test_stages_add_up(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    meter = StageMeter(torch.device("cpu"))
    for stage, seconds in (("rollout", 2), ("rollout", 1), ("sweep", 4), ("rollout", 8), (None, 16), ("sweep", 32)):
        meter.mark(stage)
        now[0] += seconds
    # The last stage has not ended.
    assert meter.seconds == {"rollout": 11, "sweep": 4} and meter.peaks == {}
    lines = meter.table().splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["stage", "seconds", "peak", "GiB"],
        ["rollout", "11.00", "-"],
        ["sweep", "4.00", "-"],
        ["update", "15.00"],
    ]
    assert lines[4].startswith("peak of the whole process, loading included: ")


# Processes.


def run_arguments(folder: Path, **changes: object) -> argparse.Namespace:
    values = {
        "output_dir": folder / "run",
        "logging_dir": "logs",
        "report_to": "none",
        "dry_run": False,
        "allow_tf32": False,
        "hub_model_id": None,
        "push_to_hub": False,
    }
    return argparse.Namespace(**{**values, **changes})


@pytest.mark.parametrize("dry_run", [False, True])
def test_the_output_folder_is_made_unless_nothing_is_to_be_written(tmp_path: Path, dry_run: bool):
    args = run_arguments(tmp_path, dry_run=dry_run)
    accelerator = make_accelerator(args)
    assert args.output_dir.exists() == (not dry_run) and accelerator.num_processes == 1
    assert accelerator.mixed_precision == "no" and args.hub_model_id == "run"


def test_another_number_of_processes_than_were_started_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="expected 2 processes .*accelerate runs 1; on CPUs set ACCELERATE_USE_CPU"):
        make_accelerator(run_arguments(tmp_path))
    assert not (tmp_path / "run").exists()


# What a script keeps between updates.


def start_run(folder: Path, *words: str) -> TrainingRun:
    """A run of a tiny transformer whose pictures are grey and whose LoRA is not trained."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config")
    add_model_arguments(parser, "a pipeline", "attn.to_q")
    add_reward_arguments(parser)
    add_training_arguments(parser, str(folder / "run"))
    required = (
        "--pretrained_model_name_or_path",
        "m",
        "--prompts",
        "p.txt",
        "--reward",
        "grey",
        "--report_to",
        "none",
    )
    args = parse_training_args(parser, [*required, *words])
    transformer = tiny_sd3_pipeline(torch.float32).transformer.requires_grad_(False)
    return TrainingRun(
        args,
        make_accelerator(args),
        transformer,
        add_lora(transformer, args),
        ["a", "b"],
        sample=lambda prompt, generator: torch.full((1, 3, 8, 8), 0.5),
        reward=lambda images, prompts: images.mean((1, 2, 3)),
        save_lora=lambda folder: None,
    )


@pytest.mark.parametrize(
    ("words", "scale"), [((), 0.25), (("--mixed_precision", "bf16"), 0.25), (("--mixed_precision", "fp16"), 2.0**14)]
)
def test_gradients_are_scaled_by_the_passes_and_the_loss_scale(tmp_path: Path, words: tuple[str, ...], scale: float):
    run = start_run(tmp_path, "--gradient_accumulation_steps", "4", *words)
    next(run.updates())
    assert run.gradient_scale == scale
    for parameter in run.parameters:
        parameter.grad = torch.full_like(parameter, 4 * run.gradient_scale)
    count = sum(parameter.numel() for parameter in run.parameters)
    # The optimizer gets what four passes with gradients of 1 have as their mean.
    assert run.optimizer_step(0) == pytest.approx(count**0.5)


def test_gradients_are_clipped_and_then_cleared(tmp_path: Path):
    run = start_run(tmp_path, "--max_grad_norm", "0.5")
    updates = run.updates()
    next(updates)
    for parameter in run.parameters:
        parameter.grad = torch.ones_like(parameter)
    assert run.optimizer_step(0) > 1
    assert torch.cat([parameter.grad.flatten() for parameter in run.parameters]).norm().item() == pytest.approx(0.5)
    next(updates)
    assert all(parameter.grad is None for parameter in run.parameters)


def test_gradients_that_are_not_finite_are_refused(tmp_path: Path):
    run = start_run(tmp_path)
    next(run.updates())
    before = [parameter.detach().clone() for parameter in run.parameters]
    for parameter in run.parameters:
        parameter.grad = torch.full_like(parameter, float("nan"))
    with pytest.raises(RecordingError, match="Update 3: the gradient holds NaN or infinite values"):
        run.optimizer_step(2)
    assert all(torch.equal(parameter, old) for parameter, old in zip(run.parameters, before, strict=True))


def test_validation_pictures_are_of_the_first_prompts_or_of_those_given(tmp_path: Path):
    assert start_run(tmp_path, "--num_validation_images", "1").validation_prompts == ["a"]
    given = start_run(tmp_path, "--num_validation_images", "2", "--validation_prompt", "x", "y")
    images, scores = given.validate()
    assert given.validation_prompts == ["x", "x", "y", "y"]
    assert len(images) == 4 and scores == [0.5] * 4
