# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Options of a run, declared once as fields of a dataclass: type, default, range, help and source.

The command line (`command_line.py`), recipes and Python set the same fields, which check themselves.
"""

import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Range:
    """Which numbers an option takes, in words and as a function."""

    text: str
    contains: Callable[[float], bool]


COUNT = Range("at least 1", lambda value: value >= 1)
POSITIVE = Range("above 0 and finite", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Range("at least 0 and finite", lambda value: 0 <= value < math.inf)
SHARE = Range("at least 0 and below 1", lambda value: 0 <= value < 1)
FINITE = Range("finite", math.isfinite)
NORM = Range("above 0 (inf does not clip)", lambda value: value > 0)


@dataclass(frozen=True)
class Declaration:
    """What is said of an option beside its type and default.

    Attributes:
        help: a sentence for `--help`.
        group: heading in `--help`.
        source: where the default is from (a paper's section, a library's own default); empty for ours.
        choices: the values, where they can be listed.
        range: of numbers, and of each number of a list.
        aliases: further flags of the command line.
        of_backbone: only backbones that name it among their defaults have it.
        is_path: text that may name a local file or folder, alone or as `NAME=PATH`; options of type `Path` always do.
            A leading `~` is the home folder, and the text must not be blank.
    """

    help: str
    group: str
    source: str = ""
    choices: tuple[str, ...] | None = None
    range: Range | None = None
    aliases: tuple[str, ...] = ()
    of_backbone: bool = False
    is_path: bool = False


def option(default: Any, help: str, group: str, **more: Any) -> Any:
    """A field of a config; `MISSING` as the default makes it required. See `Declaration` for the other arguments."""
    return field(default=default, kw_only=True, metadata={"option": Declaration(help, group, **more)})


def declarations(config_class: type) -> dict[str, tuple[Field, Declaration, Any]]:
    """Field, declaration and type of each option of a config class, by name."""
    hints = typing.get_type_hints(config_class)
    return {each.name: (each, each.metadata["option"], hints[each.name]) for each in fields(config_class)}


def is_required(each: Field) -> bool:
    """Whether an option has no default."""
    return each.default is MISSING


def without_none(kind: Any) -> Any:
    """`T` of `T | None`, and other types unchanged."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    return kind


def item_type(kind: Any) -> Any | None:
    """`T` of `tuple[T, ...]`; None for types that are no list."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None


def check_options(config: Any) -> None:
    """Convert the values of a config to the declared types, and check ranges and choices.

    For `__post_init__` of frozen dataclasses. A single value stands for a list of one, a mapping for words
    `NAME=VALUE`, text for a path, and a leading `~` of a path for the home folder.

    Raises:
        ValueError: in one line that names the option.
    """
    for name, (each, declared, kind) in declarations(type(config)).items():
        value = getattr(config, name)
        if value is None:
            if kind is without_none(kind):
                raise ValueError(f"--{name}: {_name(kind)} expected, got None")
            continue
        # Defaults stay as they are written: `settle` compares with them.
        if (declared.is_path or without_none(kind) is Path) and value != each.default:
            value = _expanded(name, value)
        value = _converted(name, without_none(kind), value)
        if value == () != each.default:
            raise ValueError(f"--{name}: at least one value expected, got none")
        for item in value if isinstance(value, tuple) else [value]:
            if declared.range is not None and not declared.range.contains(item):
                raise ValueError(f"--{name} must be {declared.range.text}, got {item}")
            if declared.choices is not None and item not in declared.choices:
                raise ValueError(f"--{name} must be one of {', '.join(declared.choices)}, got {item!r}")
        object.__setattr__(config, name, value)


def _converted(name: str, kind: Any, value: Any) -> Any:
    item = item_type(kind)
    if item is str and isinstance(value, Mapping):
        value = words_of(value)
    if item is not None:
        return tuple(_converted(name, item, each) for each in (value if isinstance(value, list | tuple) else [value]))
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if kind is str and isinstance(value, Path):
        return str(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    plain = Mapping if typing.get_origin(kind) is Mapping else kind
    if not isinstance(value, plain) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"--{name}: {_name(kind)} expected, got {value!r}")
    return value


def words_of(mapping: Mapping[str, Any]) -> list[str]:
    """A mapping as the command line has it: `NAME=VALUE`, of a list `NAME=VALUE,VALUE`."""
    return [f"{name}={','.join(map(str, of)) if isinstance(of, list | tuple) else of}" for name, of in mapping.items()]


def _expanded(name: str, value: Any) -> Any:
    """A path, `NAME=PATH`, or a list of these, with the home folder in place of `~`; other values unchanged."""
    if isinstance(value, Mapping):
        value = words_of(value)
    if isinstance(value, list | tuple):
        return tuple(_expanded(name, each) for each in value)
    if not isinstance(value, str | Path):
        return value
    if value == "" or str(value).isspace():
        # Path("") is the current folder.
        raise ValueError(f"--{name}: a path expected, got {value!r}; give one or leave the option out")
    label, path = re.fullmatch(r"([^=~/]*=)?(.*)", str(value), re.DOTALL).groups("")
    if not path.startswith("~"):
        return value
    try:
        return f"{label}{Path(path).expanduser()}"
    except RuntimeError as error:
        raise ValueError(f"--{name}: {path} is in the home folder of an unknown user; write it out") from error


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and typing.get_origin(kind) is None else str(kind)
