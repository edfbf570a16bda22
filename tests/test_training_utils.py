# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Seeds, checkpoints and the list of what may leave the machine."""

import fnmatch
import json
import os
from pathlib import Path

import pytest
import torch
from diffusers.optimization import get_scheduler

from flowbp.training_utils import (
    PUSHED_FILES,
    checkpoints,
    derive_seed,
    find_checkpoint,
    load_checkpoint,
    make_generator,
    missing_components,
    read_log,
    save_checkpoint,
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


def test_find_checkpoint(tmp_path: Path):
    names = ("checkpoint-2", "checkpoint-9", "checkpoint-10", "checkpoint-11.partial", "checkpoint-x", "logs")
    for age, name in enumerate(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
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
