# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`train(config, backbone, reward=...)` from Python: no command line, any callable as the reward, errors to catch."""

import functools
import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from resume_harness import rows_of, sd3_arguments
from toy_reward import make_reward
from training_scripts import check_run, command_line, load_script, log_of, lora_of, same

from flowbp.checks import RecordingError
from flowbp.publishing.published_files import LORA_FILE
from flowbp.training import TrainingConfig, TrainingResult, train

SCRIPT = load_script("train_flowbp_sd3")
SD3 = SCRIPT.SD3
TOY, HELD_OUT = "toy_reward:make_reward", "toy_reward:make_held_out_reward"


@pytest.fixture
def configure(model: Path, prompts: Path, tmp_path: Path) -> Callable[..., TrainingConfig]:
    """Configs of two updates, in folders of their own."""

    def make(name: str = "run", **changes: Any) -> TrainingConfig:
        arguments = sd3_arguments(model, prompts, tmp_path / name)
        arguments = {**arguments, "reward": None, "max_train_steps": 2, **changes}
        options = {"num_active": arguments.pop("num_active")}
        return TrainingConfig(**{"method_options": options, **arguments})

    return make


@pytest.fixture(scope="module")
def of_script(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The LoRA of the script's run with these options and this reward."""
    folder = tmp_path_factory.mktemp("script") / "run"
    SCRIPT.main(command_line(sd3_arguments(model, prompts, folder), reward=TOY, max_train_steps=2))
    return lora_of(folder)


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's arguments, which no run may read."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])


def redness(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return make_reward()(images, prompts)


class Redness(torch.nn.Module):
    """The same as a module, with a parameter that is not to be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self.factor * redness(images, prompts)


def test_the_result_has_paths_log_and_scores(configure: Callable[..., TrainingConfig]):
    config = configure(eval_reward=HELD_OUT, eval_steps=1)
    result = train(config, SD3, reward=redness)
    assert isinstance(result, TrainingResult)
    assert result.output_dir == config.output_dir and result.weights == config.output_dir / LORA_FILE
    check_run(config.output_dir)
    assert result.log == log_of(config.output_dir)
    assert (result.selected, result.alarms, result.url) == ("best", [], None) and result.update in (1, 2)
    assert {name: found["role"] for name, found in result.scores.items()} == {
        "redness": "trained",
        HELD_OUT: "held out",
    }
    for found in result.scores.values():
        difference = found["trained"]["mean"] - found["base"]["mean"]
        assert found["difference"]["mean"] == pytest.approx(difference, abs=1e-6) and found["images"] == 2
    run = json.loads((config.output_dir / "run.json").read_text())
    assert run["command"] is None and run["script"] is None and run["settings"]["reward"] == "redness"
    assert run["selected"] == {"kind": "best", "update": result.update}
    assert [reward["name"] for reward in run["rewards"]] == ["redness", HELD_OUT]
    # The card says how the LoRA is loaded, and has no command.
    card = (config.output_dir / "README.md").read_text()
    assert "load_lora_weights" in card and "accelerate launch" not in card and "redness" in card


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        (redness, "redness"),
        (lambda images, prompts: redness(images, prompts), "<lambda>"),
        (functools.partial(redness), "partial"),
        (Redness(), "Redness"),
        (TOY, TOY),
        (f"{TOY}:1", f"{TOY}:1"),
        (None, TOY),
    ],
)
def test_any_reward_trains_as_the_script_does(
    configure: Callable[..., TrainingConfig], of_script: dict[str, torch.Tensor], reward: Any, name: str
):
    """A reward that is given counts in place of the option."""
    config = configure(reward=HELD_OUT if reward is not None else TOY)
    result = train(config, SD3, reward=reward)
    assert list(result.scores)[0] == name
    run = json.loads((config.output_dir / "run.json").read_text())
    assert run["settings"]["reward"] == name and (config.output_dir / "README.md").is_file()
    if isinstance(reward, torch.nn.Module):
        assert not reward.factor.requires_grad and reward.factor.grad is None and not reward.training
    assert same(lora_of(config.output_dir), of_script)


# Columns of the prompts' table.


@pytest.fixture
def table(tmp_path: Path) -> str:
    """A file of prompts whose rows have different columns."""
    rows = [{"prompt": "a", "share": 1}, {"prompt": "b", "share": 2}, {"prompt": "c", "share": 3, "tag": "x"}]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "table.jsonl")


@pytest.mark.parametrize(
    "changes",
    [
        {"train_batch_size": 2, "samples_per_decode": 1},
        {"train_batch_size": 3, "method": "draft-lv", "method_options": {"num_noised": 1}},
    ],
)
def test_columns_reach_the_reward_in_training_evaluation_and_validation(
    configure: Callable[..., TrainingConfig],
    table: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
):
    seen: list[tuple[bool, str, Any, Any]] = []

    def watched(images: torch.Tensor, prompts: Sequence[str], share: list, tag: Sequence = "none") -> torch.Tensor:
        tags = [tag] * len(prompts) if isinstance(tag, str) else tag
        seen.extend(zip([images.requires_grad] * len(prompts), prompts, share, tags, strict=True))
        return redness(images, prompts) * torch.tensor(share, dtype=images.dtype)

    (tmp_path / "held_out.tsv").write_text("WORDS\tshare\nd\t4\n")
    changes = {"eval_prompts": str(tmp_path / "held_out.tsv"), "eval_prompt_column": "words", **changes}
    with pytest.warns(UserWarning, match="the column 'WORDS' of .*held_out.tsv' holds the prompts"):
        train(configure(prompts=table, validation_prompt=("b", "c"), **changes), SD3, reward=watched)
    of_table = {("a", 1, None), ("b", 2, None), ("c", 3, "x")}
    trained = [each[1:] for each in seen if each[0]]
    assert set(trained) == of_table and len(trained) == 2 * changes["train_batch_size"] * (1 + ("method" in changes))
    # The held-out prompts have no column `tag`, so the parameter's default counts.
    assert {each[1:] for each in seen if not each[0]} == {("d", 4, "none"), ("b", 2, None), ("c", 3, "x")}
    assert re.search(r"columns +share, tag, for the rewards", capsys.readouterr().err)


# Sizes.


class Watched:
    """A reward that remembers the sizes of the images that it trains on."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        if images.requires_grad:
            self.sizes.append(tuple(images.shape[-2:]))
        return redness(images, prompts)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"resolution": (8, 16)}, [(8, 8), (16, 16)] * 2),
        ({"resolution": None, "height": (8, 16, 8), "width": (16, 8, 8)}, [(8, 16), (16, 8), (8, 8), (8, 16)]),
    ],
)
def test_micro_batches_have_the_sizes_in_turn(
    configure: Callable[..., TrainingConfig], sizes: dict[str, Any], expected: list[tuple[int, int]]
):
    runs = []
    for name in ("first", "again"):
        config, reward = configure(name, **sizes, gradient_accumulation_steps=2), Watched()
        result = train(config, SD3, reward=reward)
        assert reward.sizes == expected
        runs.append((lora_of(config.output_dir), rows_of(config.output_dir)))
        assert [entry["reward"] is not None for entry in result.log] == [True, True]
    assert same(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]
    # Images for people have the first size.
    with Image.open(config.output_dir / "images" / "0_base.png") as image:
        assert image.size == expected[0][::-1]
    other = configure("other", gradient_accumulation_steps=2)
    train(other, SD3, reward=redness)
    assert not same(lora_of(other.output_dir), runs[0][0])


# Notebooks.


def test_a_run_in_another_thread(configure: Callable[..., TrainingConfig], of_script: dict[str, torch.Tensor]):
    """As servers of notebooks run cells."""
    config, results = configure(), []
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: results.append(train(config, SD3, reward=redness)))
    thread.start()
    thread.join()
    assert len(results) == 1 and same(lora_of(config.output_dir), of_script)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_dry_run_has_no_result(configure: Callable[..., TrainingConfig], capsys: pytest.CaptureFixture[str]):
    config = configure(dry_run=True)
    assert train(config, SD3, reward=redness) is None
    assert "The whole run, estimated from this update" in capsys.readouterr().out and not config.output_dir.exists()


# Errors.


def failing(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    raise KeyError("my own")


def without_gradient(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return redness(images, prompts).detach()


def of_another_shape(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return redness(images, prompts).mean()


@pytest.mark.parametrize(
    ("changes", "reward", "error", "message"),
    [
        ({}, None, ValueError, "expected a reward, got none; set `reward` in the config, or give it to train"),
        ({}, 3, ValueError, "expected a function or a module, got int"),
        ({}, Redness, ValueError, "got the class Redness; create an instance"),
        ({"prompts": "nowhere.txt"}, redness, FileNotFoundError, "nowhere.txt"),
        ({"pretrained_model_name_or_path": "nowhere"}, redness, (ValueError, OSError), "nowhere"),
        ({"true_cfg_scale": 2}, redness, ValueError, "--true_cfg_scale: SD3 does not have this option"),
        ({"method_options": {"num_active": 5}}, redness, ValueError, "use at most 4"),
        ({"resume_from_checkpoint": "latest"}, redness, ValueError, "--resume_from_checkpoint latest"),
        (
            {},
            lambda images, prompts, share: images,
            ValueError,
            "parameter 'share' .* --prompts has no .* there: none",
        ),
        (
            {"prompts": "table.jsonl", "validation_prompt": ("a", "z")},
            lambda images, prompts, share: images,
            ValueError,
            "parameter 'share' needs a column of that name, but --validation_prompt has no value for the prompt 'z'",
        ),
        ({"prompts": "hpdv2", "prompt_split": "test"}, redness, ValueError, "'hpdv2', which has no splits: leave it"),
    ],
)
def test_what_does_not_fit_is_a_one_line_error_before_any_model(
    configure: Callable[..., TrainingConfig],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    reward: Any,
    error: Any,
    message: str,
    table: str,
):
    monkeypatch.chdir(Path(table).parent)
    for owner in (DiffusionPipeline, ModelMixin):
        monkeypatch.setattr(owner, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(error, match=message) as caught:
        train(configure(**changes), SD3, reward=reward)
    assert "\n" not in str(caught.value) and not list((Path(table).parent / "run").glob("[!.]*"))


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (failing, KeyError, "my own"),
        (without_gradient, RecordingError, "the rewards of without_gradient carry no gradient"),
        (of_another_shape, ValueError, "shape"),
    ],
)
def test_errors_of_a_reward_are_raised_as_they_are(
    configure: Callable[..., TrainingConfig], reward: Any, error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        train(configure(), SD3, reward=reward)
    # The next run is not disturbed.
    assert train(configure("next"), SD3, reward=redness) is not None
