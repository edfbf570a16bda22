# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Texts of users (prompts, names, messages) in a model card: escaped for Markdown, quoted as code, without paths."""

import json
import re
from collections.abc import Mapping
from typing import Any

# A path of two or more parts inside a text, where nothing before it makes it part of an address or a word.
PATH = re.compile(
    r"""file:/+[^\s"',;]+|\b[A-Za-z]:\\[^\s"',;]+|(?<![\w/:.~-])(?:~|\.{1,2})?/(?:[^\s/"',;=|]+/)+[^\s/"',;=|]*"""
)
# The beginning of a text that is one path.
WHOLE_PATH = re.compile(r"/|(?:~[\w.-]*|\.{1,2}|[A-Za-z]:)[/\\]|\\\\")


def last_part(path: str) -> str:
    """The last part of a path, with slashes of either kind."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def hide_paths(value: Any, folder: str | None = None) -> Any:
    """`value` with absolute paths in its strings shortened to their last part; Hub ids, URLs and relative paths stay.

    Args:
        value: what JSON holds.
        folder: a relative path that is shortened too.
    """
    if isinstance(value, Mapping):
        return {key: hide_paths(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [hide_paths(item, folder) for item in value]
    if not isinstance(value, str):
        return value
    option, equals, word = value.partition("=") if value.startswith("--") else ("", "", value)
    if word == folder or (WHOLE_PATH.match(word) and "\n" not in word):
        return option + equals + last_part(word)
    return PATH.sub(lambda found: last_part(found[0]), value)


def markdown(value: Any) -> str:
    """A value as text in a line or a table cell of Markdown, whatever characters it has."""
    if isinstance(value, list):
        return ", ".join(markdown(item) for item in value)
    if isinstance(value, dict):
        value = json.dumps(value, ensure_ascii=False)
    line = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#!{}])", r"\\\1", line)


def code_block(language: str, text: str) -> str:
    """A fenced block whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
