# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The command line of a training script: the options of `TrainingConfig` and those of the rows of the table."""

import argparse
from pathlib import Path
from typing import Any

from ..methods import METHODS, Option, find_row
from .command_line import (
    add_options,
    find_recipe,
    given_early,
    make_config,
    make_parser,
    parse_args_with_config,
    read_recipe,
)
from .config import METHOD_GROUP, HasDefaults, TrainingConfig
from .options import declarations


def add_method_options(
    parser: argparse.ArgumentParser, group: Any, backbone: str, argv: list[str] | None, recipes: Path | None
) -> list[str]:
    """Add the options of all rows of the table, or of the user's own row if `--method` names one; returns names."""
    rows = dict(METHODS)
    method = given_early(parser, "method", argv)
    if method is None and (recipe := given_early(parser, "config", argv)) is not None:
        try:
            method = read_recipe(find_recipe(recipe, recipes)).get("method")
        except ValueError as error:
            parser.error(str(error))
    if isinstance(method, str) and method not in rows:
        try:
            rows = {method: find_row(method)}
        except ValueError as error:
            parser.error(str(error))
    owners: dict[str, list[str]] = {}
    declared: dict[str, Option] = {}
    for row, content in rows.items():
        defaults = content.defaults(backbone)
        for name, found in content.declarations.items():
            declared[name] = found
            owners.setdefault(name, []).append(f"{row} {_text(defaults[name])}")
    for name, found in declared.items():
        if name in declarations(TrainingConfig):
            parser.error(f"--method {method}: its option {name!r} is an option of the run; give it another name")
        kind = found.kind
        group.add_argument(
            f"--{name}",
            type=kind.parse,
            choices=kind.choices,
            nargs=kind.nargs,
            metavar=kind.metavar,
            # argparse formats help texts with %.
            help=f"{found.help} Defaults: {', '.join(owners[name])}.".replace("%", "%%"),
        )
    return list(declared)


def _text(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(map(_text, default))
    return f"{default:g}" if isinstance(default, float) else str(default).lower()


def parse_training_config(
    backbone: HasDefaults, description: str, argv: list[str] | None = None, recipes: Path | None = None
) -> TrainingConfig:
    """The config of a command line and of the recipe that its `--config` names, with the backbone's defaults.

    Args:
        backbone: of the script.
        description: first line of `--help`.
        argv: the arguments; those of the process by default.
        recipes: folder of the recipes that `--config` may name without a path.

    Raises:
        SystemExit: with code 2 and one line, for what the user can put right.
    """
    parser = make_parser(description)
    groups = add_options(parser, TrainingConfig, backbone.defaults, required=("reward",), without=("method_options",))
    names = add_method_options(parser, groups[METHOD_GROUP], backbone.name, argv, recipes)
    values = vars(parse_args_with_config(parser, argv, recipes))
    del values["config"]
    # --resolution and its two parts exclude each other, and the command line wins over the recipe.
    parts = ("height", "width")
    has_resolution = given_early(parser, "resolution", argv) is not None
    has_parts = any(given_early(parser, name, argv) is not None for name in parts)
    if has_resolution != has_parts:
        values |= dict.fromkeys(parts if has_resolution else ("resolution",))
    if values["init_lora"] is not None:
        # What the recipe or the backbone says of a new LoRA gives way to the LoRA of the command line.
        is_new = given_early(parser, "init_lora", argv) is not None
        for name in ("rank", "lora_alpha", "lora_layers"):
            if given_early(parser, name, argv) is None and (is_new or values[name] == parser.get_default(name)):
                values[name] = None
    given = {name: value for name in names if (value := values.pop(name)) is not None}
    config = make_config(parser, TrainingConfig, {**values, "method_options": given or None})
    try:
        return config.settle(backbone)
    except ValueError as error:
        parser.error(str(error))
