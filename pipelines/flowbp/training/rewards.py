# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The rewards of a run: what trains, what judges, and the prompts of the evaluation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..judging.images import score_images
from ..rewards import check_prompts, load_reward, option_names, part_names, reward_spec
from ..rewards.loading import parse_model_paths
from .config import TrainingConfig
from .prompts import Record, load_records, load_texts

Reward = str | Callable[..., torch.Tensor]


@dataclass(frozen=True)
class RunRewards:
    """The rewards of a run.

    Attributes:
        name: of the training reward, in logs and reports.
        training: of the updates.
        plain: the same without augmentation, for evaluation and validation; often the same module.
        held_out: of `--eval_reward`, None without it.
        validation: records whose images are drawn for people, one for each image.
        evaluation: records of `--eval_prompts`; with `--eval_reward` alone those of the validation; else
            empty.
    """

    name: str
    training: torch.nn.Module
    plain: torch.nn.Module
    held_out: torch.nn.Module | None
    validation: tuple[Record, ...]
    evaluation: tuple[Record, ...]

    def __iter__(self) -> Iterator[torch.nn.Module]:
        """The modules."""
        return iter(module for module in (self.training, self.plain, self.held_out) if module is not None)

    @property
    def scoring(self) -> Callable[[torch.Tensor, Sequence[str]], torch.Tensor]:
        """The training reward as `FlowBPCallback.backward` takes it, which calls it by its name in errors."""

        def score(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            return score_images(self.training, images.float(), prompts)

        score.__qualname__ = self.name
        return score


def validation_records(config: TrainingConfig, records: list[Record]) -> list[Record]:
    """The records of `--validation_prompt`, or the first of the training's."""
    if config.validation_prompt is None:
        return records[: config.num_validation_images]
    known = {record.prompt: record for record in records}
    # As the prompts of a table, which have no white space around them.
    return [known.get(prompt, Record(prompt)) for prompt in map(str.strip, config.validation_prompt)]


def load_run_rewards(config: TrainingConfig, records: list[Record], reward: Reward | None) -> RunRewards:
    """The rewards of a run, tried on its prompts.

    Args:
        config: of the run.
        records: of the training.
        reward: in place of `config.reward`: a name, a weighted sum, or any `reward(images, prompts) -> (B,)`.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: see `load_reward`, `parse_model_paths`, `load_texts`.
    """
    given = config.reward if reward is None else reward
    if given is None:
        raise ValueError("expected a reward, got none; set `reward` in the config, or give it to train(reward=...)")
    name = given if isinstance(given, str) else getattr(given, "__name__", type(given).__name__)
    if isinstance(given, str):
        if judges := [part for part in part_names(given) if not reward_spec(part).is_trainable]:
            raise ValueError(
                f"--reward {given}: expected rewards with a gradient, got {judges[0]}, which can only judge; use it "
                "as --eval_reward or in evaluate_flowbp.py."
            )
    known_options = option_names(given) if isinstance(given, str) else set()
    if config.reward_augment and "augment" not in known_options:
        raise ValueError(
            f"--reward_augment: {name} does not have it, expected an ocr reward or a factory with an argument "
            "augment; leave it out."
        )
    if config.eval_reward is not None and name in (config.eval_reward, *part_names(config.eval_reward)):
        raise ValueError(
            f"--eval_reward {config.eval_reward}: the training's reward is called {name}; choose one that is held "
            "out, or give yours another name."
        )
    of_training, of_held_out = _model_paths(config, given)
    validation = validation_records(config, records)
    evaluation: list[Record] = []
    if config.eval_prompts is not None:
        evaluation = load_records(config.eval_prompts)
    elif config.eval_reward is not None:
        evaluation = validation
    texts = _texts(config)
    plain = load_reward(given, of_training, config.reward_offload, **texts)
    training = plain
    if config.reward_augment:
        training = load_reward(given, of_training, config.reward_offload, augment=True, **texts)
    prompts = [record.prompt for record in records]
    shown = [record.prompt for record in (*validation, *evaluation)]
    check_prompts(plain, prompts, config.sizes)
    # Images of validation and evaluation have the first size.
    check_prompts(plain, shown, config.sizes[:1])
    held_out = None
    if config.eval_reward is not None:
        takes_texts = "texts" in option_names(config.eval_reward)
        held_out = load_reward(
            config.eval_reward, of_held_out, config.reward_offload, **(texts if takes_texts else {})
        )
        check_prompts(held_out, shown, config.sizes[:1])
    count = 1 if config.validation_prompt is None else config.num_validation_images
    repeated = tuple(record for record in validation for _ in range(count))
    return RunRewards(name, training, plain, held_out, repeated, tuple(evaluation))


def _model_paths(config: TrainingConfig, given: Reward) -> tuple[dict[str, Any], dict[str, Any]]:
    """Folders of weights for the training's reward and for the held-out one."""
    paths = parse_model_paths(config.reward_model_path)
    if config.eval_reward is None:
        return paths, {}
    # A folder goes to whichever reward names it; `load_reward` refuses those that neither does.
    trained = part_names(given) if isinstance(given, str) else []
    of_held_out = {name: path for name, path in paths.items() if name in part_names(config.eval_reward)}
    return {name: path for name, path in paths.items() if name not in of_held_out or name in trained}, of_held_out


def _texts(config: TrainingConfig) -> dict[str, Any]:
    """The option `texts` of rewards that look for a text, with `--reward_text_column`."""
    column = config.reward_text_column
    if column is None:
        return {}
    texts = load_texts(config.prompts, column, prompt_column=config.prompt_column, split=config.prompt_split)
    if config.eval_prompts is not None:
        for prompt, text in load_texts(config.eval_prompts, column).items():
            if texts.setdefault(prompt, text) != text:
                raise ValueError(
                    f"--reward_text_column {column}: one text expected for the prompt {prompt!r}, got "
                    f"{texts[prompt]!r} in --prompts and {text!r} in --eval_prompts; change one"
                )
    return {"texts": texts}
