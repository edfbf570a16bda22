# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""From a command line and a recipe (YAML) to a typed config.

The options are the fields of the config's class (`options.py`). The command line wins over the recipe, the recipe over
the defaults.
"""

import argparse
import difflib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..publishing.run_info import one_line
from .options import declarations, is_required, item_type, without_none, words_of

Config = TypeVar("Config")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds defaults where a help text has none of its own and there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_own = "default" in (action.help or "").lower()
        # 0 is a default too, and equal to False.
        is_empty = action.default is None or action.default is False or action.default in ("", [], {})
        return action.help if has_own or is_empty else super()._get_help_string(action)


def json_object(text: str) -> dict[str, Any]:
    """The value of an option that is a JSON object."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a JSON object expected, got {text}")
    return value


def path(text: str) -> Path:
    """The value of an option that is a path: not blank, which would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"a path expected, got {text!r}; give one or leave the option out")
    return Path(text)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with `--config`, for `add_options` and `parse_args_with_config`."""
    # The names of more than a hundred options would hide what follows.
    usage = "%(prog)s [--config RECIPE] [--OPTION VALUE ...]"
    parser = argparse.ArgumentParser(
        usage=usage,
        description=description,
        epilog="In options that name files or folders, also in recipes, a leading ~ is the home folder.",
        allow_abbrev=False,
    )
    _use_one_line_errors(parser)
    parser.add_argument(
        "--config", help="YAML recipe with values for these options, a path or the name of one that comes with flowbp."
    )
    return parser


def add_options(
    parser: argparse.ArgumentParser,
    config_class: type,
    defaults: Mapping[str, Any] | None = None,
    required: Collection[str] = (),
    without: Collection[str] = (),
) -> dict[str, Any]:
    """Add an option for each field of a config's class, in the groups that they name.

    Args:
        parser: of a script.
        config_class: a dataclass of `options.option` fields.
        defaults: those of a backbone, above the class'. Options of some backbones only are added if they are here.
        required: options that have a default in Python but must be given here.
        without: fields that are no options.

    Returns:
        The groups of `--help`, by heading.
    """
    defaults = defaults or {}
    groups: dict[str, Any] = {}
    for name, (field, declared, kind) in declarations(config_class).items():
        if name in without or (declared.of_backbone and name not in defaults):
            continue
        if declared.group not in groups:
            groups[declared.group] = parser.add_argument_group(declared.group)
        kind, default = without_none(kind), defaults.get(name, field.default)
        more: dict[str, Any] = {"help": declared.help.replace("%", "%%")}
        if is_required(field) or name in required:
            more["required"] = True
        else:
            more["default"] = default
        if declared.source:
            more["help"] += f" (default: %(default)s, {declared.source})"
        if kind is bool:
            more["action"] = "store_true" if field.default is False else argparse.BooleanOptionalAction
        else:
            item = item_type(kind)
            more |= {"type": path if kind is Path else item or kind, "choices": declared.choices}
            if item is not None:
                more["nargs"] = "+"
                if isinstance(default, tuple):
                    more["default"] = list(default)
            elif kind not in (str, int, float, Path):
                more["type"] = json_object
        groups[declared.group].add_argument(f"--{name}", *declared.aliases, dest=name, **more)
    return groups


def make_config(parser: argparse.ArgumentParser, config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """The config of parsed values; its errors are the parser's."""
    try:
        return config_class(**values)
    except ValueError as error:
        parser.error(str(error))


class _Loader(yaml.SafeLoader):
    """YAML without keys that stand twice, of which the last would win without a word, and without aliases (`*name`).

    Nested aliases make gigabytes of a few lines.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("expected values, got an alias (*name): write the value itself")
        return super().compose_node(parent, index)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"key {key} stands twice: keep one of them")
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_args_with_config(
    parser: argparse.ArgumentParser, argv: list[str] | None = None, recipes: Path | None = None
) -> argparse.Namespace:
    """Parses the command line, with `--config FILE` giving the values of options that the command line leaves out.

    The command line wins over the file, the file over the parser's defaults. The file is a flat YAML mapping from long
    option names, written with underscores, to values. A value passes the option's own `type`, `choices` and `nargs`:
    a list for an option of several values, true or false for a flag, null only where the default is None. A required
    option may come from the file. Groups of options that exclude each other are checked on the command line only.

    Any error, also one of the command line and of a later `parser.error(...)`, is a single line on stderr, with exit
    code 2. `--help` shows defaults.

    Args:
        parser: has a `--config` option and was built with `allow_abbrev=False`; an abbreviated `--config` would not be
            found before the other options.
        argv: the arguments; those of the process by default.
        recipes: folder of recipes that `--config` may name without a path and `.yaml`.

    Raises:
        SystemExit: with code 2, for errors of the user.
    """
    _use_one_line_errors(parser)
    path = given_early(parser, "config", argv)
    required = [action for action in parser._actions if action.required]
    from_file = argparse.Namespace()
    try:
        if path is not None:
            _read_into(from_file, parser, find_recipe(path, recipes))
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


def _use_one_line_errors(parser: argparse.ArgumentParser) -> None:
    def error(message: str) -> None:
        parser.exit(2, f"{parser.prog}: error: {one_line(message)}\n")

    # argparse's own error() prints the usage of every option first, which hides the line that matters.
    parser.error = error
    parser.formatter_class = _HelpFormatter


def given_early(parser: argparse.ArgumentParser, name: str, argv: list[str] | None) -> str | None:
    """The value of an option on the command line, before all options of the parser are known."""
    search = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    search.error = parser.error
    search.add_argument(f"--{name}")
    return vars(search.parse_known_args(argv)[0])[name]


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {
        option: action
        for action in parser._actions
        for option in action.option_strings
        # The negative half of a BooleanOptionalAction is the same key with the value false.
        if not (isinstance(action, argparse.BooleanOptionalAction) and option.startswith("--no-"))
    }


def find_recipe(path: str, recipes: Path | None) -> Path:
    """The file that `--config` means: a path, or a name in the folder of recipes."""
    given = Path(path)
    if recipes is None or given.is_file() or given.suffix or len(given.parts) > 1:
        return given
    named = recipes / f"{path}.yaml"
    if named.is_file():
        return named
    names = [file.stem for file in recipes.glob("*.yaml")]
    raise ValueError(f"--config {path}: neither a file nor a recipe of flowbp{_nearest(path, names)}")


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys and values of a recipe.

    Raises:
        ValueError: the file cannot be read, is no YAML mapping, or has a key twice.
    """
    try:
        recipe = _Loader(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise ValueError(f"--config {path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not valid YAML in UTF-8: {error}") from error
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"--config {path}: expected option names with values, got too many nested ones") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"--config {path}: expected option names with values, got {_kind(recipe)}")
    return recipe


def _read_into(namespace: argparse.Namespace, parser: argparse.ArgumentParser, path: Path) -> None:
    keys = {
        option[2:].replace("-", "_"): action
        for option, action in _options(parser).items()
        if option.startswith("--") and option not in ("--config", "--help")
    }
    for key, value in read_recipe(path).items():
        if key not in keys:
            raise ValueError(f"--config {path}: unknown key {key}{_nearest(str(key), list(keys))}")
        try:
            found = _value(keys[key], value)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"--config {path}: {key}: {error}") from error
        if isinstance(found, Path) and not found.is_absolute() and (path.parent / found).is_file():
            # A file that a recipe names lies beside it.
            found = path.parent / found
        if hasattr(namespace, keys[key].dest):
            raise ValueError(f"--config {path}: {key} stands twice, the other time by another name: keep one of them")
        setattr(namespace, keys[key].dest, found)


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
    if isinstance(value, dict) and action.nargs == "+" and action.type is str:
        value = words_of(value)
    if not isinstance(value, list):
        if action.nargs != "+" or isinstance(value, str):
            raise ValueError(f"a list expected, got {value!r}: write [...]")
        value = [value]
    if isinstance(action.nargs, int) and len(value) != action.nargs:
        raise ValueError(f"a list of {action.nargs} expected, got {len(value)}")
    if action.nargs == "+" and not value:
        raise ValueError("a list of at least one expected, got an empty one")
    return [_item(action, item) for item in value]


def _item(action: argparse.Action, value: Any) -> Any:
    if action.type is json_object and isinstance(value, dict):
        return value
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
