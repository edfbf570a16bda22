# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The rewards of a run: what trains, what judges, on which prompts, and the objective that they become."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from toy_reward import make_held_out_reward, make_reward

from flowbp.rewards import WeightedReward
from flowbp.training import TrainingConfig
from flowbp.training.prompts import Record
from flowbp.training.rewards import RunRewards, load_run_rewards
from flowbp.training.setup import make_objective

TOY, HELD_OUT = "toy_reward:make_reward", "toy_reward:make_held_out_reward"
RECORDS = [Record("a", {"text": "x"}), Record("b", {"text": "y"}), Record("c", {"text": "z"})]
IMAGES = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
MODULE = """
import torch
made = []

class Texts(torch.nn.Module):
    def __init__(self, texts, augment, model_path):
        super().__init__()
        self.texts, self.augment, self.model_path = texts, augment, model_path
        made.append(self)

    def text_of(self, prompt):
        if prompt not in (self.texts or {}):
            raise ValueError(f"no text for {prompt}")

    def forward(self, images, prompts):
        return images.flatten(1).mean(1) + float(self.augment)

def reads(texts=None, augment=False, model_path=None):
    return Texts(texts, augment, model_path)

def judges(texts=None, model_path=None):
    return Texts(texts, False, model_path)
"""


def make_config(**values: Any) -> TrainingConfig:
    required = {"pretrained_model_name_or_path": "m", "prompts": "p.txt", "reward": TOY}
    return TrainingConfig(**{**required, **values})


def rewards_of(given: Any = None, /, **values: Any) -> RunRewards:
    return load_run_rewards(make_config(**values), RECORDS, given)


def names_of(records: Sequence[Record]) -> list[str]:
    return [record.prompt for record in records]


@pytest.fixture
def table(tmp_path: Path) -> str:
    """A file of prompts with texts."""
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,text\na,x\nb,y\nc,z\n")
    return str(path)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """A user's module `my_rewards`; the rewards that it made."""
    (tmp_path / "my_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return importlib.import_module("my_rewards").made


def test_rewards_without_an_evaluation():
    rewards = rewards_of()
    assert rewards.training is rewards.plain and rewards.held_out is None and rewards.evaluation == ()
    assert list(rewards) == [rewards.training, rewards.plain] and rewards.name == TOY
    assert torch.equal(rewards.plain(IMAGES, ["a", "b"]), make_reward()(IMAGES, ["a", "b"]))


def test_the_held_out_reward_is_one_of_the_modules():
    rewards = rewards_of(eval_reward=HELD_OUT)
    assert torch.equal(rewards.plain(IMAGES, ["a", "b"]), make_reward()(IMAGES, ["a", "b"]))
    assert torch.equal(rewards.held_out(IMAGES, ["a", "b"]), make_held_out_reward()(IMAGES, ["a", "b"]))
    assert list(rewards) == [rewards.training, rewards.plain, rewards.held_out]


class Redness(torch.nn.Module):
    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return images[:, 0].mean((1, 2))


def redness(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return images[:, 0].mean((1, 2))


@pytest.mark.parametrize(
    ("given", "name"),
    [(redness, "redness"), (Redness(), "Redness"), (HELD_OUT, HELD_OUT), (f"{TOY}:2", f"{TOY}:2")],
)
def test_a_reward_that_is_given_counts_in_place_of_the_option(given: Any, name: str):
    rewards = rewards_of(given)
    assert rewards.name == name and rewards_of(given, reward=None).name == name
    expected = given if callable(given) else make_held_out_reward() if given == HELD_OUT else make_reward()
    factor = 2 if name.endswith(":2") else 1
    assert torch.equal(rewards.plain(IMAGES, ["a", "b"]), factor * expected(IMAGES, ["a", "b"]))
    offloaded = rewards_of(given, reward_offload=True).training
    assert isinstance(offloaded, WeightedReward) and offloaded.offload


@pytest.mark.parametrize(
    ("given", "values", "message"),
    [
        (None, {"reward": None}, "expected a reward, got none; set `reward` in the config, or give it to train"),
        (
            None,
            {"reward": f"{TOY}:0.5,geneval"},
            "--reward .*: expected rewards with a gradient, got geneval, which",
        ),
        ("geneval", {}, "--reward geneval: expected rewards with a gradient"),
        (None, {"reward_augment": True}, f"--reward_augment: {TOY} does not have it, expected an ocr reward"),
        (redness, {"reward_augment": True}, "--reward_augment: redness does not have it"),
        (None, {"reward_model_path": "pickscore=."}, "pickscore"),
        (None, {"reward_model_path": "pickscore=.", "eval_reward": HELD_OUT}, "pickscore"),
        (redness, {"reward_model_path": "redness=."}, "redness"),
        (redness, {"eval_reward": "hpsv2.1:much"}, "expected a number as the weight of 'hpsv2.1'"),
    ],
)
def test_what_cannot_be_is_refused(given: Any, values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        rewards_of(given, **values)
    assert "\n" not in str(caught.value)


def test_a_function_with_the_name_of_the_held_out_reward_is_refused():
    def clip(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return images.flatten(1).mean(1)

    for eval_reward in ("clip", "pickscore:2,clip:1"):
        message = f"--eval_reward {eval_reward}: the training's reward is called clip; choose one that is held out"
        with pytest.raises(ValueError, match=message):
            rewards_of(clip, eval_reward=eval_reward)


# Options of rewards.


def test_only_the_training_is_augmented_and_all_know_the_texts(made: list[Any], table: str):
    rewards = rewards_of(
        reward="my_rewards:reads",
        eval_reward="my_rewards:judges",
        reward_augment=True,
        prompts=table,
        reward_text_column="text",
    )
    assert [module.augment for module in rewards] == [True, False, False] and len(made) == 3
    assert all(module.texts == {"a": "x", "b": "y", "c": "z"} for module in rewards)
    # A held-out reward that looks for no text gets none.
    values = {"reward": "my_rewards:reads", "prompts": table, "reward_text_column": "text"}
    assert rewards_of(**values, eval_reward=HELD_OUT).held_out is not None


def test_prompts_that_a_reward_cannot_score_are_refused(made: list[Any], table: str, tmp_path: Path):
    (held_out := tmp_path / "held_out.csv").write_text("prompt,text\nd,w\n")
    values = {"reward": "my_rewards:reads", "prompts": table, "reward_text_column": "text"}
    assert names_of(rewards_of(**values, eval_prompts=str(held_out)).evaluation) == ["d"]
    with pytest.raises(ValueError, match="no text for v"):
        rewards_of(**values, validation_prompt="v")
    with pytest.raises(ValueError, match="no text for a"):
        rewards_of(reward=TOY, eval_reward="my_rewards:judges")


def test_folders_of_weights_go_to_the_rewards_that_name_them(made: list[Any], table: str, tmp_path: Path):
    folder = tmp_path / "weights"
    folder.mkdir()
    rewards = rewards_of(
        reward="my_rewards:reads",
        eval_reward="my_rewards:judges",
        reward_model_path=f"my_rewards:judges={folder}",
        prompts=table,
        reward_text_column="text",
    )
    assert rewards.plain.model_path is None and rewards.held_out.model_path == folder


# Prompts.


def test_records_of_the_validation():
    assert names_of(rewards_of(num_validation_images=2).validation) == ["a", "b"]
    given = rewards_of(num_validation_images=2, validation_prompt=("b", "v")).validation
    assert names_of(given) == ["b", "b", "v", "v"]
    # With the columns that the training's table has of them.
    assert given[0] is RECORDS[1] and given[2] == Record("v")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, []),
        ({"eval_prompts": True}, ["x", "y"]),
        ({"eval_prompts": True, "eval_reward": HELD_OUT}, ["x", "y"]),
        # Those of the validation, given or the first ones, once each.
        ({"eval_reward": HELD_OUT, "validation_prompt": ("u", "v")}, ["u", "v"]),
        ({"eval_reward": HELD_OUT, "num_validation_images": 2}, ["a", "b"]),
    ],
)
def test_records_of_the_evaluation(values: dict[str, Any], expected: list[str], tmp_path: Path):
    (tmp_path / "evaluation.txt").write_text("x\ny\n")
    if "eval_prompts" in values:
        values = {**values, "eval_prompts": str(tmp_path / "evaluation.txt")}
    rewards = rewards_of(**values)
    assert names_of(rewards.evaluation) == expected
    assert (rewards.held_out is None) == ("eval_reward" not in values)


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        ("e.txt", {"prompt_column": "caption", "prompt_split": "test"}, "of the .txt"),
        ("e.csv", {"prompt_column": "caption", "prompt_split": "test"}, "of the caption"),
        ("e.csv", {"prompt_column": "caption", "eval_prompt_column": "prompt"}, "of the prompt"),
        ("set", {"prompt_split": "test"}, "of the test"),
        ("set", {"prompt_split": "test", "eval_prompt_split": "train"}, "of the train"),
        ("set", {}, "of the train"),
    ],
)
def test_held_out_prompts_are_read_as_the_training_s_unless_told(
    source: str, options: dict[str, Any], expected: str, tmp_path: Path
):
    (tmp_path / "e.txt").write_text("of the .txt\n")
    (tmp_path / "e.csv").write_text("prompt,caption\nof the prompt,of the caption\n")
    splits = {name: Dataset.from_dict({"prompt": [f"of the {name}"]}) for name in ("train", "test")}
    DatasetDict(splits).save_to_disk(str(tmp_path / "set"))
    assert names_of(rewards_of(eval_prompts=str(tmp_path / source), **options).evaluation) == [expected]


# The objective.


@pytest.mark.parametrize(
    ("undo_guidance", "backbone", "factor"),
    [(None, "sd3", 1), (None, "flux2", 0.25), (True, "sd3", 0.25), (False, "flux2", 1)],
)
def test_undoing_guidance_is_the_method_s_choice_unless_given(
    undo_guidance: bool | None, backbone: str, factor: float
):
    config = make_config(undo_guidance=undo_guidance)
    objective = make_objective(config, config.make_method(backbone), 4.0)
    rewards, weights = torch.tensor([0.5, -0.25]), torch.tensor([1.0, 2.0])
    assert objective(rewards, weights).item() == pytest.approx(factor * (-weights * rewards).mean().item())


def test_clip_and_loss_scale_reach_the_objective():
    config = make_config(method="draft-k", reward_clip=0.5, loss_scale=3)
    objective = make_objective(config, config.make_method("sd3"), 4.0)
    assert objective(torch.tensor([0.75, 0.25]), torch.ones(2)).item() == pytest.approx(3 * 0.25 / 2)
