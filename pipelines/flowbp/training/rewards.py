# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The rewards of a run: what trains, what judges, and the prompts of the evaluation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..judging.images import score_images
from ..rewards import check_columns, check_prompts, load_reward, option_names, part_names, reward_spec
from ..rewards.loading import parse_model_paths
from .config import TrainingConfig
from .pipeline_columns import image_columns
from .prompts import Record, has_columns, has_splits, load_records, texts_of

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
        columns: of the prompts' tables that reach a reward.
    """

    name: str
    training: torch.nn.Module
    plain: torch.nn.Module
    held_out: torch.nn.Module | None
    validation: tuple[Record, ...]
    evaluation: tuple[Record, ...]
    columns: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[torch.nn.Module]:
        """The modules."""
        return iter(module for module in (self.training, self.plain, self.held_out) if module is not None)

    @property
    def scoring(self) -> Callable[..., torch.Tensor]:
        """The training reward as `FlowBPCallback.backward` takes it, which calls it by its name in errors."""

        def score(images: torch.Tensor, prompts: Sequence[str], /, **columns: Sequence[Any]) -> torch.Tensor:
            return score_images(self.training, images.float(), prompts, columns)

        score.__qualname__ = self.name
        # The reward says it for itself.
        score.takes_videos = None
        return score


def validation_records(config: TrainingConfig, records: list[Record]) -> list[Record]:
    """The records of `--validation_prompt`, or the first of the training's."""
    if config.validation_prompt is None:
        return records[: config.num_validation_images]
    # The first of several rows with a prompt.
    known = {record.prompt: record for record in reversed(records)}
    # As the prompts of a table, which have no white space around them.
    found = [known.get(prompt, Record(prompt)) for prompt in map(str.strip, config.validation_prompt)]
    for record in found:
        if config.pipeline_columns and record.prompt not in known:
            raise ValueError(
                f"--validation_prompt {record.prompt!r}: --pipeline_columns needs its row; choose prompts of --prompts"
            )
    return found


def evaluation_records(config: TrainingConfig, validation: list[Record]) -> list[Record]:
    """The records of `--eval_prompts`; with `--eval_reward` alone those of the validation; else none."""
    source = config.eval_prompts
    if source is None:
        return [] if config.eval_reward is None else validation
    # What a source does not have was not meant for it.
    column = config.eval_prompt_column or (config.prompt_column if has_columns(source) else None)
    split = config.eval_prompt_split or (config.prompt_split if has_splits(source) else "train")
    return load_records(source, column=column, split=split, images=image_columns(config.call_columns))


def check_reward(config: TrainingConfig, reward: Reward | None) -> tuple[Reward, str]:
    """The training's reward and its name, checked without loading it.

    Args:
        config, reward: as `load_run_rewards` takes them.

    Raises:
        ValueError: for no reward, an unknown one, one that cannot train, or one that the held-out reward is too.
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
    if config.eval_reward is not None:
        for part in part_names(config.eval_reward):
            reward_spec(part)
    return given, name


def load_run_rewards(config: TrainingConfig, records: list[Record], reward: Reward | None) -> RunRewards:
    """The rewards of a run, tried on its prompts.

    Args:
        records: of the training.
        reward: in place of `config.reward`: a name, a weighted sum, or any
            `reward(images, prompts, **columns) -> (B,)`.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: see `load_reward`, `parse_model_paths`, `texts_of`,
            `check_columns`.
    """
    given, name = check_reward(config, reward)
    of_training, of_held_out = _model_paths(config, given)
    validation = validation_records(config, records)
    evaluation = evaluation_records(config, validation)
    texts = _texts(config, records, evaluation)
    shared = {"offload": config.reward_offload, "reward_frames": config.reward_frames}
    plain = load_reward(given, of_training, **shared, **texts)
    training = plain
    if config.reward_augment:
        training = load_reward(given, of_training, **shared, augment=True, **texts)
    shown = {"--validation_prompt" if config.validation_prompt is not None else "--prompts": validation}
    shown |= {"--eval_prompts": evaluation} if config.eval_prompts is not None else {}
    columns = _check_table(plain, {"--prompts": records}, config.sizes)
    # Images of validation and evaluation have the first size.
    columns |= _check_table(plain, shown, config.sizes[:1])
    held_out = None
    if config.eval_reward is not None:
        takes_texts = "texts" in option_names(config.eval_reward)
        held_out = load_reward(config.eval_reward, of_held_out, **shared, **(texts if takes_texts else {}))
        columns |= _check_table(held_out, shown, config.sizes[:1])
    count = 1 if config.validation_prompt is None else config.num_validation_images
    repeated = tuple(record for record in validation for _ in range(count))
    return RunRewards(name, training, plain, held_out, repeated, tuple(evaluation), tuple(columns))


def _check_table(
    reward: torch.nn.Module, records: Mapping[str, Sequence[Record]], sizes: Sequence[tuple[int, int]]
) -> dict[str, None]:
    """Try a reward on records by the option that they are from; the columns that reach it, as keys."""
    reached: dict[str, None] = {}
    for option, of_option in records.items():
        prompts = [record.prompt for record in of_option]
        check_prompts(reward, prompts, sizes)
        reached |= check_columns(reward, prompts, [record.columns for record in of_option], option)
    return reached


def _model_paths(config: TrainingConfig, given: Reward) -> tuple[dict[str, Any], dict[str, Any]]:
    """Folders of weights for the training's reward and for the held-out one."""
    paths = parse_model_paths(config.reward_model_path)
    if config.eval_reward is None:
        return paths, {}
    # A folder goes to whichever reward names it; `load_reward` refuses those that neither does.
    trained = part_names(given) if isinstance(given, str) else []
    of_held_out = {name: path for name, path in paths.items() if name in part_names(config.eval_reward)}
    return {name: path for name, path in paths.items() if name not in of_held_out or name in trained}, of_held_out


def _texts(config: TrainingConfig, records: Sequence[Record], evaluation: Sequence[Record]) -> dict[str, Any]:
    """The option `texts` of rewards that look for a text, with `--reward_text_column`."""
    column = config.reward_text_column
    if column is None:
        return {}
    texts = texts_of(records, column, config.prompts)
    if config.eval_prompts is not None:
        for prompt, text in texts_of(evaluation, column, config.eval_prompts).items():
            if texts.setdefault(prompt, text) != text:
                raise ValueError(
                    f"--reward_text_column {column}: one text expected for the prompt {prompt!r}, got "
                    f"{texts[prompt]!r} in --prompts and {text!r} in --eval_prompts; change one"
                )
    return {"texts": texts}
