# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Prompts: reading them from a file, folder or Hub dataset, and drawing batches of them for training."""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import datasets

T = TypeVar("T")

_BUILDERS = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_COLUMN_NAMES = ("prompt", "caption", "text")


@dataclass(frozen=True)
class Record:
    """A row of the prompts' table.

    Attributes:
        prompt: without surrounding white space.
        columns: the row's other columns of text, numbers or truth values, by name.
    """

    prompt: str
    columns: Mapping[str, Any] = field(default_factory=dict)


def load_records(source: str, *, column: str | None = None, split: str = "train") -> list[Record]:
    """Reads prompts with the other columns of their rows, in their order; rows with a blank prompt are left out.

    Args:
        source: a `.txt` file (one prompt a line), a `.jsonl`, `.csv` or `.parquet` file, a folder (written by
            `save_to_disk`, or holding data files that `datasets` knows), or the id of a dataset on the Hub.
        column: where the source has columns, the one that holds the prompts. By default `prompt`, else `caption`, else
            `text`, else the only column of text.
        split: the split of a folder or Hub dataset. A single file has none but "train".

    Returns:
        At least one record.

    Raises:
        FileNotFoundError: the source is no file, no folder and cannot be an id on the Hub.
        ValueError: anything else that keeps the prompts from being read, in one line.
    """
    table = _read(source, split)
    if isinstance(table, list):
        if column is not None:
            raise ValueError(f"prompts: column {column!r} was asked of {source!r}, but a .txt file has no columns")
        rows = [(prompt, {}) for prompt in table]
    else:
        name = _prompt_column(table, source, column)
        others = [each for each, kind in table.features.items() if each != name and _is_plain(kind)]
        columns = [list(table[each]) for each in others]
        values = zip(*columns, strict=True) if columns else [()] * len(table)
        rows = [
            (prompt, dict(zip(others, of_row, strict=True)))
            for prompt, of_row in zip(table[name], values, strict=True)
        ]
    records = [Record(prompt.strip(), columns) for prompt, columns in rows if prompt is not None and prompt.strip()]
    if not records:
        raise ValueError(f"prompts: {source!r} holds no prompts: at least one is needed")
    return records


def load_prompts(source: str, *, column: str | None = None, split: str = "train") -> list[str]:
    """The prompts of `load_records`."""
    return [record.prompt for record in load_records(source, column=column, split=split)]


def load_texts(source: str, column: str, *, prompt_column: str | None = None, split: str = "train") -> dict[str, str]:
    """Reads what another column says of each prompt, such as the text that a picture of it must show.

    Args:
        source: as for `load_prompts`, but not a `.txt` file.
        column: the other column, of text.
        prompt_column: `column` of `load_prompts`.
        split: the split of a folder or Hub dataset.

    Returns:
        Prompt, as `load_prompts` gives it, -> text, without surrounding white space.

    Raises:
        FileNotFoundError, ValueError: as for `load_prompts`; also a prompt without text, or with two different ones.
    """
    table = _read(source, split)
    if isinstance(table, list):
        raise ValueError(f"prompts: column {column!r} was asked of {source!r}, but a .txt file has no columns")
    texts: dict[str, str] = {}
    for prompt, text in zip(_column(table, source, prompt_column), _column(table, source, column), strict=True):
        if prompt is None or not prompt.strip():
            continue
        prompt, text = prompt.strip(), (text or "").strip()
        if not text:
            raise ValueError(f"prompts: column {column!r} of {source!r} has nothing for the prompt {prompt!r}")
        if texts.setdefault(prompt, text) != text:
            raise ValueError(
                f"prompts: column {column!r} of {source!r} has both {texts[prompt]!r} and {text!r} for the prompt "
                f"{prompt!r}: one is expected"
            )
    return texts


def _read(source: str, split: str) -> datasets.Dataset | list[str]:
    """A table, or the lines of a .txt file."""
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, split)
    if path.suffix in (".txt", *_BUILDERS):
        if not path.is_file():
            raise FileNotFoundError(f"prompts: no file {source!r}: check the path")
        if split != "train":
            raise ValueError(
                f"prompts: split {split!r} was asked of the file {source!r}, which has no splits: leave it out"
            )
        if path.suffix != ".parquet":
            _check_utf8(path)
        return path.read_text(encoding="utf-8-sig").split("\n") if path.suffix == ".txt" else _read_table(path)
    if path.exists():
        raise ValueError(
            f"prompts: {source!r} is neither a folder nor one of .txt, {', '.join(_BUILDERS)}: "
            "convert it to one of these"
        )
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        return _read_hub(source, split)
    raise FileNotFoundError(f"prompts: no file or folder {source!r}, and it cannot be a dataset id: check the path")


def _check_utf8(path: Path) -> None:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"prompts: line {number} of {str(path)!r} is not UTF-8: save the file as UTF-8"
                ) from error


def _read_table(path: Path) -> datasets.Dataset:
    if path.stat().st_size == 0:
        raise ValueError(f"prompts: {str(path)!r} is empty: at least one prompt is needed")
    # pandas would read prompts such as "None" or "NA" as missing.
    options = {"keep_default_na": False} if path.suffix == ".csv" else {}
    try:
        return datasets.load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train", **options)
    except Exception as error:  # pyarrow, pandas and datasets raise a dozen unrelated types for a malformed file
        raise ValueError(f"prompts: {str(path)!r} is not a readable {path.suffix} file: {_reason(error)}") from error


def _read_folder(path: Path, split: str) -> datasets.Dataset:
    try:
        if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(str(path), split=split)
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # as in _read_table
        raise ValueError(f"prompts: cannot read a dataset from the folder {str(path)!r}: {_reason(error)}") from error
    splits = {"train": saved} if isinstance(saved, datasets.Dataset) else saved
    if split not in splits:
        raise ValueError(f"prompts: {str(path)!r} has no split {split!r}: choose one of {', '.join(splits)}")
    return splits[split]


def _read_hub(source: str, split: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # as in _read_table, and any error of the network
        raise ValueError(
            f"prompts: {source!r} is no file or folder here, and as a dataset of the Hub it gave: {_reason(error)}"
        ) from error


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: `datasets` wraps what went wrong in an error that says only that it did."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def _is_plain(kind: Any) -> bool:
    dtype = str(getattr(kind, "dtype", ""))
    return dtype in ("string", "large_string", "bool") or dtype.startswith(("int", "uint", "float"))


def _column(table: datasets.Dataset, source: str, column: str | None) -> list[str | None]:
    return list(table[_prompt_column(table, source, column)])


def _prompt_column(table: datasets.Dataset, source: str, column: str | None) -> str:
    text = [
        name for name, kind in table.features.items() if getattr(kind, "dtype", None) in ("string", "large_string")
    ]
    names = ", ".join(table.column_names)
    if column is None:
        column = next((name for name in _COLUMN_NAMES if name in table.column_names), None)
        if column is None and len(text) == 1:
            column = text[0]
        if column is None:
            raise ValueError(
                f"prompts: {source!r} has no column {', '.join(_COLUMN_NAMES)} and not just one of text: "
                f"name one of its columns: {names}"
            )
    if column not in table.column_names:
        raise ValueError(f"prompts: {source!r} has no column {column!r}: choose one of {names}")
    if column not in text:
        raise ValueError(
            f"prompts: column {column!r} of {source!r} holds {table.features[column]}, expected text: "
            f"columns of text are: {', '.join(text) or 'none'}"
        )
    return column


class PromptSampler(Generic[T]):
    """Endless batches of prompts (or records of them), in an order that only the seed decides.

    All processes walk one sequence: the prompts, shuffled anew in every epoch by `(seed, epoch)`. Each process takes
    its own part of every `num_processes * batch_size` places of it, so a prompt repeats among the processes' batches
    only where an epoch ends there, or where there are fewer prompts than places. Batches run on over the end of an
    epoch.

    Args:
        prompts: at least one.
        batch_size: prompts per process and batch.
        seed: decides the order.
        process_index: this process, from 0 to `num_processes - 1`.
        num_processes: how many processes draw from the sequence.

    Raises:
        ValueError: no prompts, or a number out of its range.
    """

    def __init__(
        self, prompts: Sequence[T], batch_size: int, seed: int, process_index: int = 0, num_processes: int = 1
    ) -> None:
        if not prompts:
            raise ValueError("PromptSampler: at least one prompt expected, got none")
        if batch_size < 1:
            raise ValueError(f"PromptSampler: batch_size of at least 1 expected, got {batch_size}")
        if not 0 <= process_index < num_processes:
            raise ValueError(
                "PromptSampler: process_index from 0 to num_processes - 1 expected, "
                f"got {process_index} of {num_processes}"
            )
        self.prompts = list(prompts)
        self.batch_size = batch_size
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes
        self.position = 0
        self._epoch = -1
        self._order: list[int] = []

    def __iter__(self) -> Iterator[list[T]]:
        return self

    def __next__(self) -> list[T]:
        start = self.position + self.process_index * self.batch_size
        self.position += self.num_processes * self.batch_size
        return [self._at(place) for place in range(start, start + self.batch_size)]

    def _at(self, place: int) -> T:
        epoch, index = divmod(place, len(self.prompts))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = list(range(len(self.prompts)))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
        return self.prompts[self._order[index]]

    def state_dict(self) -> dict[str, int]:
        """`position`: how many places of the common sequence all processes together have used."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on at a saved position; prompts and seed must be those of the run that saved it.

        Raises:
            ValueError: `position` is absent, not an integer, or negative.
        """
        position = state.get("position")
        if type(position) is not int or position < 0:
            raise ValueError(f"PromptSampler: a position of 0 or more expected in the saved state, got {position!r}")
        self.position = position
