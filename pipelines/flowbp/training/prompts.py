# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts with the other columns of their table: read from a file, a folder, a named set or a dataset of the Hub."""

import csv
import json
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..extras import require
from ..table_images import TableImage
from .prompt_sets import PROMPT_SETS

if TYPE_CHECKING:
    import datasets

_FILES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
_DATA_SUFFIXES = (".arrow", *_FILES)
_COLUMN_NAMES = ("prompt", "caption", "text")
_TEXT = ("string", "large_string")
_IMAGE = "PIL.Image.Image"
# What the fields of a column may be read as; not with leading zeros, as in 007, or more digits than 64 bits have:
# numbers would lose them.
_FIELDS = (
    ("int64", re.compile(r"-?(0|[1-9][0-9]{0,17})"), int),
    (
        "float64",
        re.compile(r"[+-]?((0|[1-9][0-9]{0,17})(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.I),
        float,
    ),
    ("bool", re.compile("true|false", re.I), lambda field: field.lower() == "true"),
)


@dataclass(frozen=True)
class Record:
    """A row of the prompts' table.

    Attributes:
        prompt: without surrounding white space.
        columns: the row's other columns of text, numbers, truth values or images, by name.
    """

    prompt: str
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Table:
    """A table of prompts.

    Attributes:
        kinds: what each column holds, in the words of `datasets`: string, int64, ...
        columns: those of text, numbers, truth values, images or nothing ("null"); of one length.
    """

    kinds: Mapping[str, str]
    columns: Mapping[str, Sequence[Any]]


def load_records(
    source: str, *, column: str | None = None, split: str = "train", images: Collection[str] = ()
) -> list[Record]:
    """Reads prompts with the other columns of their rows, in their order; rows with a blank prompt are left out.

    Args:
        source: a name of `PROMPT_SETS`, a `.txt` file (one prompt a line), a `.jsonl`, `.json`, `.csv`, `.tsv` or
            `.parquet` file, a folder (written by `save_to_disk`, or holding data files that `datasets` knows), or the
            id of a dataset on the Hub. A `.json` file holds an array of objects or of prompts. A `.csv` or `.tsv` file
            needs a header, and as many fields in every row. Its columns hold numbers or truth values where every field
            is one; fields such as `007` make text of a column.
        column: where the source has columns, the one that holds the prompts, whatever its case. By default `prompt`,
            else `caption`, else `text`, each also in another case or the plural (`Prompts`), else, except in `.csv`
            and `.tsv` files, the only column of text. A warning tells a name that is not exact.
        split: the split of a folder or Hub dataset. Files and named sets have none but "train".
        images: other columns, of `datasets.Image` or of paths, relative to the table's folder, of images, videos and
            folders of frames. They become `TableImage`s, of which headers and hashes are read.

    Returns:
        At least one record.

    Raises:
        FileNotFoundError: the source is no file, no folder and cannot be an id on the Hub.
        ValueError: anything else that keeps the prompts from being read, in one line.
    """
    table = _read(source, split, column)
    if isinstance(table, list):
        if asked := [column] if column is not None else [*images]:
            raise ValueError(f"prompts: column {asked[0]!r} was asked of {source!r}, but a .txt file has no columns")
        rows = [(prompt, {}) for prompt in table]
    else:
        if column is None and source in PROMPT_SETS:
            column = PROMPT_SETS[source].column
        name = _prompt_column(table, source, column)
        unused = {"null", _IMAGE}
        others = [
            each for each in table.columns if each != name and (each in images or table.kinds[each] not in unused)
        ]
        columns = {each: _images(table, source, each) if each in images else table.columns[each] for each in others}
        rows = [
            (prompt, dict(zip(others, of_row, strict=True)))
            for prompt, *of_row in zip(table.columns[name], *columns.values(), strict=True)
        ]
    # Not with the byte order mark of a file that was joined to others, or that datasets has read.
    stripped = [(prompt.lstrip("\ufeff").strip(), columns) for prompt, columns in rows if prompt is not None]
    records = [Record(prompt, columns) for prompt, columns in stripped if prompt]
    if not records:
        raise ValueError(f"prompts: {source!r} holds no prompts: at least one is needed")
    _check_images(records, source, images)
    return records


def load_prompts(source: str, *, column: str | None = None, split: str = "train") -> list[str]:
    """The prompts of `load_records`."""
    return [record.prompt for record in load_records(source, column=column, split=split)]


def has_columns(source: str) -> bool:
    """Whether a source of `load_records` has columns whose names its user may know."""
    return source not in PROMPT_SETS and Path(source).suffix != ".txt"


def has_splits(source: str) -> bool:
    """Whether a source of `load_records` may have splits: folders and datasets of the Hub."""
    return source not in PROMPT_SETS and (Path(source).is_dir() or Path(source).suffix not in _FILES)


def columns_of(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Column -> its values in the order of the records; None where a record does not have it."""
    names = dict.fromkeys(name for record in records for name in record.columns)
    return {name: [record.columns.get(name) for record in records] for name in names}


def texts_of(records: Sequence[Record], column: str, source: str) -> dict[str, str]:
    """What another column says of each prompt, such as the text that an image of it must show.

    Returns:
        Prompt -> text, without surrounding white space.

    Raises:
        ValueError: no such column of text, a prompt without text, or with two different ones.
    """
    texts: dict[str, str] = {}
    for prompt, columns in ((record.prompt, record.columns) for record in records):
        if column not in columns:
            raise ValueError(
                f"prompts: {source!r} has no column {column!r} beside its prompts: "
                f"choose one of {', '.join(columns) or 'none (a .txt file has no columns)'}"
            )
        text = columns[column] or ""
        if not isinstance(text, str):
            raise ValueError(
                f"prompts: column {column!r} of {source!r} holds {text!r}, expected text; numbers that are text need "
                "a .jsonl file"
            )
        if not text.strip():
            raise ValueError(f"prompts: column {column!r} of {source!r} has nothing for the prompt {prompt!r}")
        if texts.setdefault(prompt, text.strip()) != text.strip():
            raise ValueError(
                f"prompts: column {column!r} of {source!r} has both {texts[prompt]!r} and {text.strip()!r} for the "
                f"prompt {prompt!r}: one is expected"
            )
    return texts


def _images(table: _Table, source: str, name: str) -> Sequence[TableImage | None]:
    """A column of images; those of paths once for each path."""
    if table.kinds[name] == _IMAGE:
        return table.columns[name]
    path = Path(source)
    if table.kinds[name] not in (*_TEXT, "null") or not path.exists():
        raise ValueError(
            f"prompts: column {name!r} of {source!r} holds {table.kinds[name]}, expected images of datasets, or paths "
            "in a file or folder here"
        )
    if urls := [each for each in table.columns[name] if each is not None and "://" in each]:
        raise ValueError(
            f"prompts: column {name!r} of {source!r} has the URL {urls[0]!r}, expected paths; make it a column of "
            "datasets.Image, or download the files"
        )
    folder = path if path.is_dir() else path.parent
    paths = [None if each is None or not each.strip() else folder / each for each in table.columns[name]]
    opened = {each: TableImage.of_file(each) for each in {*paths} - {None}}
    return [None if each is None else opened[each] for each in paths]


def _check_images(records: Sequence[Record], source: str, columns: Collection[str]) -> None:
    """Each record has an image in these columns, and each can be opened."""
    checked: set[TableImage] = set()
    for name in columns:
        for record in records:
            image = record.columns.get(name)
            if image is None:
                has = ", ".join(record.columns) or "none"
                raise ValueError(
                    f"prompts: no image in column {name!r} of {source!r} for the prompt {record.prompt!r}; its other "
                    f"columns: {has}"
                )
            if image not in checked:
                checked.add(image)
                try:
                    image.check()
                except ValueError as error:
                    raise ValueError(f"prompts: column {name!r} of {source!r}: {error}") from error


def _read(source: str, split: str, column: str | None) -> _Table | list[str]:
    """A table, or the lines of a .txt file."""
    path = Path(source)
    if source in PROMPT_SETS and path.exists():
        raise ValueError(f"prompts: {source!r} is a named set, and a file or folder here: write ./{source} for that")
    if (source in PROMPT_SETS or path.suffix in _FILES) and not path.is_dir() and split != "train":
        raise ValueError(f"prompts: split {split!r} was asked of {source!r}, which has no splits: leave it out")
    if source in PROMPT_SETS:
        return _read_set(source)
    if path.is_dir():
        return _read_folder(path, split, column)
    if path.suffix in _FILES:
        if not path.is_file():
            raise FileNotFoundError(f"prompts: no file {source!r}: check the path")
        return _read_file(path, path.suffix, column)
    if path.exists():
        raise ValueError(
            f"prompts: {source!r} is neither a folder nor one of {', '.join(_FILES)}: convert it to one of these"
        )
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        return _read_hub(source, split)
    raise FileNotFoundError(f"prompts: no file or folder {source!r}, and it cannot be a dataset id: check the path")


def _read_set(name: str) -> _Table | list[str]:
    chosen = PROMPT_SETS[name]
    try:
        files = chosen.download()
    except Exception as error:  # any error of huggingface_hub or the network
        raise ValueError(
            f"prompts: the set {name!r} is {', '.join(chosen.files)} of {chosen.repository} at {chosen.revision}, "
            f"which gave: {_reason(error)}: download the files, and name them here"
        ) from error
    # Files in a cache may have no suffix.
    tables = [
        _read_file(path, Path(file).suffix, chosen.column) for path, file in zip(files, chosen.files, strict=True)
    ]
    if chosen.group is None:
        return tables[0]
    return _joined(
        [
            _Table(
                {**table.kinds, chosen.group: "string"},
                {**table.columns, chosen.group: [Path(file).stem] * len(table.columns[chosen.column])},
            )
            for table, file in zip(tables, chosen.files, strict=True)
        ]
    )


def _read_file(path: Path, suffix: str, column: str | None) -> _Table | list[str]:
    if suffix != ".txt":
        return _read_table(path, suffix, column)
    _check_utf8(path)
    return path.read_text(encoding="utf-8-sig").split("\n")


def _check_utf8(path: Path) -> None:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"prompts: line {number} of {str(path)!r} is not UTF-8: save the file as UTF-8"
                ) from error


def _read_table(path: Path, suffix: str, column: str | None) -> _Table:
    if path.stat().st_size == 0:
        raise ValueError(f"prompts: {str(path)!r} is empty: at least one prompt is needed")
    library = _datasets() if suffix == ".parquet" else None
    try:
        if library is not None:
            return _plain(library.load_dataset("parquet", data_files=str(path), split="train"))
        _check_utf8(path)
        return _read_csv(path, suffix, column) if suffix in (".csv", ".tsv") else _read_json(path, suffix, column)
    except Exception as error:  # pyarrow and datasets raise a dozen unrelated types for a malformed file
        raise ValueError(f"prompts: {str(path)!r} is not a readable {suffix} file: {_reason(error)}") from error


def _read_csv(path: Path, suffix: str, column: str | None) -> _Table:
    """Not by pandas or pyarrow: the one takes surplus fields as an index, the other text after a closing quote."""
    if suffix == ".csv":
        return _read_fields(path, column)
    # Double quotes are a part of the text in the .tsv files of spreadsheets, and around it in those of pandas.
    table = _read_fields(path, column, delimiter="\t", quoting=csv.QUOTE_NONE)
    if any(isinstance(text, str) and text.startswith('"') for texts in table.columns.values() for text in texts):
        try:
            _read_fields(path, column, delimiter="\t")
        except ValueError:
            return table
        raise ValueError("double quotes around fields may be a part of the text or not: write a .csv or a .jsonl file")
    return table


def _read_fields(path: Path, column: str | None, **dialect: Any) -> _Table:
    rows: list[list[str]] = []
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True, **dialect)
        line = 1
        try:
            header = next(reader, [])
            if column is None and _find_column(header, None) is None:
                raise ValueError(
                    f"a header with one of {', '.join(_COLUMN_NAMES)} expected, its first line is "
                    f"{','.join(header)[:80]!r}: add a header, or name one of its columns: {', '.join(header)[:80]}"
                )
            if len(set(header)) < len(header):
                raise ValueError(f"different names of columns expected, got {', '.join(header)}: rename one")
            line = reader.line_num + 1
            for row in reader:
                if row and len(row) != len(header):
                    raise ValueError(
                        f"line {line}: one field expected for each of {', '.join(header)}, got {len(row)}: put fields "
                        "with commas in double quotes"
                    )
                if row:
                    rows.append(row)
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"line {line}: {error}: write a double quote within a quoted field twice") from None
    fields = zip(*rows, strict=True) if rows else [()] * len(header)
    typed = dict(zip(header, map(_typed, fields), strict=True))
    return _Table(
        {name: kind for name, (kind, _) in typed.items()}, {name: values for name, (_, values) in typed.items()}
    )


def _typed(fields: Sequence[str]) -> tuple[str, Sequence[Any]]:
    for kind, form, read in _FIELDS if fields else ():
        if all(map(form.fullmatch, fields)):
            return kind, [*map(read, fields)]
    return "string", fields


def _read_json(path: Path, suffix: str, column: str | None) -> _Table:
    """Not by pyarrow, which makes times of texts such as 2026-01-31; columns with nested values are left out."""
    text = path.read_text(encoding="utf-8-sig")
    rows: dict[str, Any] = {}
    if suffix == ".json" and text.lstrip().startswith("["):
        rows = {f"entry {place}": row for place, row in enumerate(json.loads(text, object_pairs_hook=_object), 1)}
        if rows and all(isinstance(row, str) for row in rows.values()):
            rows = {place: {_COLUMN_NAMES[0]: row} for place, row in rows.items()}
    else:
        # Many .json files hold lines too.
        for place, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    rows[f"line {place}"] = json.loads(line, object_pairs_hook=_object)
                except ValueError as error:
                    raise ValueError(f"line {place}: {error}") from None
    for place, row in rows.items():
        if not isinstance(row, dict):
            raise ValueError(f"{place}: an object expected, got {json.dumps(row)[:40]}: write {{...}}")
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    prompts = _find_column(names, column)
    for name in [prompts] if prompts is not None else [] if column is not None else names:
        for place, row in rows.items():
            if name not in row:
                raise ValueError(f"{place}: {name!r} expected as in other lines, got {', '.join(row)}: add it")
    columns = {name: [row.get(name) for row in rows.values()] for name in names}
    kinds = {name: kind for name, values in columns.items() if (kind := _kind(name, values)) is not None}
    columns = {
        name: [None if each is None else float(each) for each in columns[name]] if kind == "float64" else columns[name]
        for name, kind in kinds.items()
    }
    return _Table(kinds, columns)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"each key once expected, got {', '.join(key for key, _ in pairs)}: keep one")
    return found


def _kind(name: str, values: Sequence[Any]) -> str | None:
    """What a column of a JSON file holds; None for nested values."""
    types = {type(value) for value in values} - {type(None)}
    if types & {dict, list}:
        return None
    if types == {int, float}:
        return "float64"
    if len(types) > 1:
        found = " and ".join(sorted(kind.__name__ for kind in types))
        raise ValueError(f"{name!r}: values of one type expected, got {found}: put those that are text in quotes")
    if str in types:
        # Halves of characters, such as \\ud83d alone, which no tokenizer takes.
        "".join(filter(None, values)).encode()
    return {str: "string", bool: "bool", int: "int64", float: "float64"}[types.pop()] if types else "null"


def _datasets() -> ModuleType:
    """The library, which only its own folders, .parquet files and the Hub's datasets need.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    require("datasets", "reading folders, .parquet files and datasets of the Hub")
    import datasets

    return datasets


def _plain(table: "datasets.Dataset") -> _Table:
    kinds = {name: getattr(kind, "dtype", None) or str(kind) for name, kind in table.features.items()}
    is_plain = re.compile("string|large_string|bool|u?int.*|float.*").fullmatch
    columns = {name: table[name][:] for name, kind in kinds.items() if is_plain(kind)}
    return _Table(kinds, columns | {name: _of_rows(table, name) for name, kind in kinds.items() if kind == _IMAGE})


def _of_rows(table: "datasets.Dataset", name: str) -> list[TableImage]:
    """A column of `datasets.Image`, of which nothing is decoded or copied."""
    decode = table.features[name].decode_example
    encoded = table.select_columns(name).cast_column(name, _datasets().Image(decode=False))
    return [
        TableImage.of_row(f"row {row + 1}", lambda row=row: encoded[row][name], decode) for row in range(len(table))
    ]


def _joined(tables: Sequence[_Table]) -> _Table:
    """The rows of tables with the same columns, one after the other."""
    if len(names := {", ".join(sorted(table.kinds)) for table in tables}) > 1:
        raise ValueError(f"the same columns expected in all files, got {' and '.join(sorted(names))}: complete them")
    kinds = {}
    for name in tables[0].kinds:
        found = {table.kinds[name] for table in tables} - {"null"}
        if len(found) > 1:
            raise ValueError(f"{name!r}: {' and '.join(sorted(found))} in different files: make them alike")
        kinds[name] = found.pop() if found else "null"
    columns = {name: [each for table in tables for each in table.columns[name]] for name in tables[0].columns}
    return _Table(kinds, columns)


def _read_folder(path: Path, split: str, column: str | None) -> _Table:
    library = _datasets()
    try:
        if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return _read_data_files(path, split, column)
        saved = library.load_from_disk(str(path))
    except Exception as error:  # as in _read_table
        raise ValueError(f"prompts: cannot read a dataset from the folder {str(path)!r}: {_reason(error)}") from error
    splits = {"train": saved} if isinstance(saved, library.Dataset) else saved
    if split not in splits:
        raise ValueError(f"prompts: {str(path)!r} has no split {split!r}: choose one of {', '.join(splits)}")
    return _plain(splits[split])


def _read_data_files(path: Path, split: str, column: str | None) -> _Table:
    # datasets takes the files of one kind, and where some have a split in their name only those.
    splits = _datasets().load_dataset_builder(str(path)).config.data_files
    used = {Path(file).resolve() for files in splits.values() for file in files}
    found = [each for each in path.rglob("*") if each.suffix in _DATA_SUFFIXES and each.resolve() not in used]
    if unused := sorted(str(each.relative_to(path)) for each in found):
        raise ValueError(
            f"files that are read expected, got {', '.join(unused)}, which datasets leaves out: move them elsewhere, "
            "or convert and name them like the others"
        )
    files = [Path(file) for file in splits.get(split, [])]
    if files and {file.suffix for file in files} <= {".jsonl", ".json", ".csv", ".tsv"}:
        return _joined([_read_table(file, file.suffix, column) for file in files])
    return _plain(_datasets().load_dataset(str(path), split=split))


def _read_hub(source: str, split: str) -> _Table:
    load = _datasets().load_dataset
    try:
        table = load(source, split=split)
        if table.info.builder_name == "csv":
            # pandas would read prompts such as "None" or "NA" as missing, and takes surplus fields as an index.
            table = load(source, split=split, keep_default_na=False)
            if "__index_level_0__" in table.column_names:
                raise ValueError("a .csv file with more fields than its header: download, correct and name the file")
        return _plain(table)
    except Exception as error:  # as in _read_table, and any error of the network
        raise ValueError(
            f"prompts: {source!r} is no file or folder here, and as a dataset of the Hub it gave: {_reason(error)}"
        ) from error


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: `datasets` wraps what went wrong in an error that says only that it did."""
    while error.__cause__ is not None and not str(error).startswith("prompts: "):
        error = error.__cause__
    return " ".join(str(error).split()).removeprefix("prompts: ") or type(error).__name__


def _find_column(names: Sequence[str], column: str | None) -> str | None:
    """The column that `column`, or its absence, means: an exact name, else the only one alike; None without one.

    Raises:
        ValueError: several are alike.
    """
    for name in _COLUMN_NAMES if column is None else (column,):
        alike = [each for each in names if each.casefold() in (name.casefold(), f"{name}s" if column is None else "")]
        if name in alike or len(alike) == 1:
            return name if name in alike else alike[0]
        if alike:
            raise ValueError(f"prompts: one column of prompts expected, got {' and '.join(alike)}: name one of them")
    return None


def _prompt_column(table: _Table, source: str, column: str | None) -> str:
    text = [name for name, kind in table.kinds.items() if kind in _TEXT]
    names = ", ".join(table.kinds)
    found = _find_column(list(table.kinds), column)
    if found is None and column is None:
        if len(text) != 1:
            raise ValueError(
                f"prompts: {source!r} has no column {', '.join(_COLUMN_NAMES)} and not just one of text: "
                f"name one of its columns: {names}"
            )
        found = text[0]
    if found is None:
        raise ValueError(f"prompts: {source!r} has no column {column!r}: choose one of {names}")
    if found not in text:
        raise ValueError(
            f"prompts: column {found!r} of {source!r} holds {table.kinds[found]}, expected text: "
            f"columns of text are: {', '.join(text) or 'none'}; numbers that are text need a .jsonl file"
        )
    if found not in (_COLUMN_NAMES if column is None else (column,)):
        warnings.warn(f"prompts: the column {found!r} of {source!r} holds the prompts.", stacklevel=3)
    return found
