# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`--pipeline_columns`: columns of the prompts' table that the pipeline's call gets, row by row."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline

from ..inference import call_arguments
from ..table_images import TableImage
from .prompts import Record

HELP = (
    "ARGUMENT=COLUMN: arguments of the pipeline's call that get images, masks or videos in columns of the prompts' "
    "table, row by row, such as image=source_image; ARGUMENT=COLUMN,COLUMN: a list. Each sample is then a call of its "
    "own."
)
Columns = Mapping[str, tuple[str, ...]]
"""Argument of the pipeline's call -> columns, several of which are a list."""


def parse_columns(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What the words of the option mean.

    Raises:
        ValueError: in one line.
    """
    found: dict[str, tuple[str, ...]] = {}
    for word in words:
        place, _, names = word.partition("=")
        columns = tuple(name.strip() for name in names.split(","))
        if not place.isidentifier() or not all(columns):
            raise ValueError(f"--pipeline_columns {word}: expected ARGUMENT=COLUMN, such as image=source_image")
        if place in found:
            raise ValueError(f"--pipeline_columns {word}: {place} stands twice; for a list write {place}=ONE,OTHER")
        found[place] = columns
    return found


def image_columns(columns: Columns) -> list[str]:
    """The columns of the table, each once."""
    return list(dict.fromkeys(name for names in columns.values() for name in names))


def check_columns_of_call(pipeline: type[DiffusionPipeline], columns: Columns, given: Collection[str]) -> None:
    """Refuse what the pipeline's call does not take, or gets otherwise.

    Args:
        given: names of its other arguments.

    Raises:
        ValueError: in one line.
    """
    try:
        call_arguments(pipeline, columns)
    except ValueError as error:
        raise ValueError(f"--pipeline_columns: {error}") from None
    for place in columns:
        if place in given:
            raise ValueError(f"--pipeline_columns {place}: the call has this argument already; leave one of them out")


def with_images(
    inputs: Callable[[Sequence[Record]], dict[str, Any]], columns: Columns
) -> Callable[[Sequence[Record]], dict[str, Any]]:
    """`inputs`, and of its one record what the option names.

    One, because pipelines that take several sources at once pair them with prompts in different ways: one by one, all
    with each, or the first with all.
    """
    if not columns:
        return inputs

    def both(records: Sequence[Record]) -> dict[str, Any]:
        (record,) = records
        found = {place: [record.columns[name].open() for name in names] for place, names in columns.items()}
        images = {place: values if len(values) > 1 else values[0] for place, values in found.items()}
        return {**inputs(records), **images}

    return both


def sources_of(records: Sequence[Record], columns: Columns) -> dict[str, list[TableImage]]:
    """The records' images by column, to be shown beside the results."""
    return {name: [record.columns[name] for record in records] for name in image_columns(columns)}
