# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Recipes: option values for a training script from a YAML file, below those of the command line."""

import argparse
import difflib
from typing import Any

import yaml

from ..publishing.run_info import one_line


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds defaults where a help text has none of its own and there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_own = "default" in (action.help or "").lower()
        # 0 is a default too, and equal to False.
        is_empty = action.default is None or action.default is False or action.default in ("", [], {})
        return action.help if has_own or is_empty else super()._get_help_string(action)


def parse_args_with_config(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line, with `--config FILE` giving the values of options that the command line leaves out.

    The command line wins over the file, the file over the parser's defaults. The file is a flat YAML mapping from long
    option names, written with underscores, to values. A value passes the option's own `type`, `choices` and `nargs`:
    a list for an option of several values, true or false for a flag, null only where the default is None. A required
    option may come from the file. Groups of options that exclude each other are checked on the command line only.

    Any error, also one of the command line and of a later `parser.error(...)`, is a single line on stderr, with exit
    code 2. `--help` shows defaults.

    Args:
        parser: has a `--config` option and was built with `allow_abbrev=False`.
        argv: the arguments; those of the process by default.

    Raises:
        ValueError: the parser is not as described.
        SystemExit: with code 2, for errors of the user.
    """
    if parser.allow_abbrev:
        # An abbreviated --config would be an option to the parser and unseen by the search for the file.
        raise ValueError("parse_args_with_config: expected a parser built with allow_abbrev=False")
    if "--config" not in _options(parser):
        raise ValueError("parse_args_with_config: expected a parser with a --config option")

    def error(message: str) -> None:
        parser.exit(2, f"{parser.prog}: error: {one_line(message)}\n")

    # argparse's own error() prints the usage of every option first, which hides the line that matters.
    parser.error = error
    parser.formatter_class = _HelpFormatter

    search = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    search.error = error
    search.add_argument("--config")
    path = search.parse_known_args(argv)[0].config
    required = [action for action in parser._actions if action.required]
    from_file = argparse.Namespace()
    try:
        if path is not None:
            _read_into(from_file, parser, path)
        for action in required:
            action.required = not hasattr(from_file, action.dest)
        args, unknown = parser.parse_known_args(argv, from_file)
    except ValueError as wrong:
        parser.error(str(wrong))
    finally:
        for action in required:
            action.required = True
    if unknown:
        option = unknown[0].split("=")[0]
        parser.error(f"unknown argument {option}{_nearest(option, list(parser._option_string_actions))}")
    return args


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {
        option: action
        for action in parser._actions
        for option in action.option_strings
        # The negative half of a BooleanOptionalAction is the same key with the value false.
        if not (isinstance(action, argparse.BooleanOptionalAction) and option.startswith("--no-"))
    }


def _read_into(namespace: argparse.Namespace, parser: argparse.ArgumentParser, path: str) -> None:
    try:
        with open(path, encoding="utf-8") as file:
            recipe = yaml.safe_load(file)
    except OSError as error:
        raise ValueError(f"--config {path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not valid YAML in UTF-8: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"--config {path}: expected option names with values, got {_kind(recipe)}")

    keys = {
        option[2:].replace("-", "_"): action
        for option, action in _options(parser).items()
        if option.startswith("--") and option not in ("--config", "--help")
    }
    for key, value in recipe.items():
        if key not in keys:
            raise ValueError(f"--config {path}: unknown key {key}{_nearest(str(key), list(keys))}")
        try:
            setattr(namespace, keys[key].dest, _value(keys[key], value))
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"--config {path}: {key}: {error}") from error


def _value(action: argparse.Action, value: Any) -> Any:
    """What the option stores for a value of the file; the exceptions are those of the option's own `type`."""
    if value is None:
        if action.default is not None or action.required:
            raise ValueError("a value expected, got null: leave the key out to get the default")
        return None
    if isinstance(action, argparse.BooleanOptionalAction) or (action.nargs == 0 and isinstance(action.const, bool)):
        if not isinstance(value, bool):
            raise ValueError(f"true or false expected, got {value!r}")
        return action.const == value if isinstance(action.const, bool) else value
    if not isinstance(action, argparse._StoreAction):
        raise ValueError("this option can be given on the command line only")
    if action.nargs in (None, "?"):
        return _item(action, value)
    if not isinstance(value, list):
        raise ValueError(f"a list expected, got {value!r}: write [...]")
    if isinstance(action.nargs, int) and len(value) != action.nargs:
        raise ValueError(f"a list of {action.nargs} expected, got {len(value)}")
    if action.nargs == "+" and not value:
        raise ValueError("a list of at least one expected, got an empty one")
    return [_item(action, item) for item in value]


def _item(action: argparse.Action, value: Any) -> Any:
    if isinstance(value, dict | list) or value is None:
        raise ValueError(f"a single value expected, got {_kind(value)}")
    convert = action.type or str
    if convert is str and not isinstance(value, str):
        # YAML has already changed some of these (yes, 007, 1_000), so the text that was meant is lost.
        raise ValueError(f"text expected, got {value!r}: put it in quotes")
    try:
        item = convert(str(value))
    except argparse.ArgumentTypeError:
        raise
    except (ValueError, TypeError) as error:
        name = getattr(convert, "__name__", repr(convert))
        raise ValueError(f"{name} expected, got {value!r}") from error
    if action.choices is not None and item not in action.choices:
        raise ValueError(f"one of {', '.join(map(str, action.choices))} expected, got {value!r}")
    return item


def _kind(value: Any) -> str:
    return {dict: "a mapping", list: "a list", type(None): "nothing"}.get(type(value), repr(value))


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f": did you mean {near[0]}?" if near else ""
