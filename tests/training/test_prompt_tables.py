# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Tables of prompts give what their author wrote, row by row; a table that could mean something else is refused."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from flowbp.training.prompts import Record, _read_hub, load_records, texts_of

Write = Callable[[str, str], str]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file and returns its path as text."""

    def function(name: str, content: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode())
        return str(path)

    return function


def refusal(function: Callable, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message.startswith("prompts: ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "prompt\na red fox, sitting on a mat, oil painting\na dog\n",
            "line 2: one field expected for each of prompt, got 3: put fields with commas in double quotes",
        ),
        ("prompt,text\na dog,SHUT\n\na fox, red,OPEN\n", "line 4: one field expected for each of prompt, text, got 3"),
        ("prompt,text\na dog,SHUT\na fox\n", "line 3: one field expected for each of prompt, text, got 1"),
        ('prompt,n\n"a\nfox",1\n"a\ncat"\n', "line 4: one field expected for each of prompt, n, got 1"),
        ("a red fox, asleep\na dog, awake\n", "its first line is 'a red fox, asleep': add a header"),
        ("a red fox\na dog\n", "its first line is 'a red fox': add a header"),
        ("prompt;text\na;b\n", "its first line is 'prompt;text'"),
        ("Prompt,PROMPTS\na,b\n", "one column of prompts expected, got Prompt and PROMPTS: name one of"),
        ("prompt,n,n\na,1,2\n", "different names of columns expected, got prompt, n, n"),
        ('prompt,n\na dog,2\n"a red fox,1\na cat,3\n', "line 3: unexpected end of data"),
        ('prompt,n\n"OPEN" on a sign,1\n', "line 2: ',' expected after '\"': write a double quote within"),
        ('prompt\n"the text "42" in red"\n', "line 2: ',' expected after '\"'"),
    ],
)
def test_a_csv_file_that_could_mean_something_else_is_refused(write: Write, content: str, expected: str):
    path = write("p.csv", content)
    message = refusal(load_records, path)
    assert expected in message and path in message


def test_a_csv_file_gives_what_was_written(write: Write):
    rows = (
        "\ufeffprompt,code,count,share,is_new,when",
        '"a fox, red\r\nand ""old""",007,1,0.5,True,2026-01-31',
        'the text "42",10,2,1,false,NA\r\n',
        "None,9,3,2,true,\r\n",
    )
    path = write("p.csv", "\r\n".join(rows))
    names = ("code", "count", "share", "is_new", "when")
    assert load_records(path) == [
        Record('a fox, red\r\nand "old"', dict(zip(names, ("007", 1, 0.5, True, "2026-01-31"), strict=True))),
        Record('the text "42"', dict(zip(names, ("10", 2, 1.0, False, "NA"), strict=True))),
        Record("None", dict(zip(names, ("9", 3, 2.0, True, ""), strict=True))),
    ]
    assert texts_of(load_records(path), "code", path)["None"] == "9"
    assert "numbers that are text need a .jsonl file" in refusal(texts_of, load_records(path), "count", path)
    identity = "12345678901234567890"
    assert load_records(write("p.csv", f"prompt,id\na,{identity}\n")) == [Record("a", {"id": identity})]
    # Any name will do where it is given.
    assert load_records(write("p.csv", "words\na\n"), column="words") == [Record("a")]
    assert "holds no prompts" in refusal(load_records, write("p.csv", "prompt,n\n"))
    assert "add a header" in refusal(load_records, write("p.csv", "\ufeff"))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['{"prompt": "a"}', "", '{"caption": "b"}'], "line 3: 'prompt' expected as in other lines, got caption"),
        (['{"words": "a"}', '{"number": 1}'], "line 2: 'words' expected as in other lines, got number"),
        (['{"prompt": "a"}', '"b"'], 'line 2: an object expected, got "b"'),
        (['[{"prompt": "a"}]'], "line 1: an object expected"),
        (['{"prompt": "a"}', '{"prompt": 5}'], "'prompt': values of one type expected, got int and str"),
        (['{"prompt": 5}', '{"prompt": 6}'], "holds int64, expected text"),
        (['{"prompt": "a", "n": 1}', '{"prompt": "b", "n": "x"}'], "'n': values of one type expected"),
        (['{"prompt": "a", "prompt": "b"}'], "line 1: each key once expected, got prompt, prompt"),
        (['{"prompt": "a"}', '{"prompt": "b"'], "line 2: Expecting ',' delimiter"),
    ],
)
def test_json_lines_that_could_mean_something_else_are_refused(write: Write, lines: list[str], expected: str):
    path = write("p.jsonl", "\n".join(lines))
    message = refusal(load_records, path)
    assert expected in message and path in message


def test_json_lines_give_what_was_written(write: Write):
    rows = [
        {
            "prompt": "2026-01-31",
            "when": "2026-01-31T10:00:00",
            "n": 1,
            "include": [{"class": "bench", "at": ["x", 0]}],
        },
        {"n": 2.5, "prompt": "a\u2028b", "tag": "t", "include": [{"class": "dog"}]},
    ]
    path = write("p.jsonl", "\ufeff" + "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert load_records(path) == [
        Record("2026-01-31", {"when": "2026-01-31T10:00:00", "n": 1.0, "tag": None}),
        Record("a\u2028b", {"when": None, "n": 2.5, "tag": "t"}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.json", '\ufeff ["None", " a ", ""]', [Record("None"), Record("a")]),
        ("p.json", '[{"prompt": "2026-01-31", "n": 1}, {"prompt": "b"}]', [("2026-01-31", 1), ("b", None)]),
        ("p.json", '{"prompt": "a", "n": 1}\n{"prompt": "b", "n": 2}\n', [("a", 1), ("b", 2)]),
        ("p.tsv", 'prompt\tn\nthe word "ok"\t1\n"G I" in red\t2\n', [('the word "ok"', 1), ('"G I" in red', 2)]),
        ("p.json", '["a", {"prompt": "b"}]', 'entry 1: an object expected, got "a"'),
        ("p.json", '[{"prompt": "a"}, {"n": 1}]', "entry 2: 'prompt' expected as in other lines, got n: add it"),
        ("p.json", '["a"', "Expecting ',' delimiter"),
        ("p.json", "[]", "name one of its columns"),
        ("p.tsv", 'prompt\tn\n"a ""b"""\t1\n', "double quotes around fields may be a part of the text or not"),
        ("p.tsv", "prompt\tn\na\n", "line 2: one field expected for each of prompt, n, got 1"),
    ],
)
def test_arrays_and_tabs(write: Write, name: str, content: str, expected: str | list):
    path = write(name, content)
    if isinstance(expected, str):
        assert expected in refusal(load_records, path)
    else:
        records = [Record(each[0], {"n": each[1]}) if isinstance(each, tuple) else each for each in expected]
        assert load_records(path) == records
        # In a folder too.
        write(f"folder/{name}", content)
        assert load_records(str(Path(path).parent / "folder")) == records


@pytest.mark.parametrize(
    ("header", "column", "expected"),
    [
        ("Prompts,Category", None, "Prompts"),
        ("TEXT,n", None, "TEXT"),
        ("Prompt,prompt", None, None),
        ("text,Prompt", None, "Prompt"),
        ("Caption,x", "caption", "Caption"),
        ("Prompt,PROMPT", "prompt", "got Prompt and PROMPT: name one of them"),
        ("Prompts,Prompt", None, "got Prompts and Prompt: name one of them"),
    ],
)
def test_a_column_s_name_is_exact_or_told(
    write: Write, recwarn: pytest.WarningsRecorder, header: str, column: str | None, expected: str | None
):
    first, _ = header.split(",")
    for name in ("p.csv", "p.jsonl"):
        names = header.split(",")
        content = f"{header}\na,b\n" if name == "p.csv" else json.dumps(dict(zip(names, "ab", strict=True)))
        path = write(name, content)
        if expected is not None and expected.startswith("got"):
            assert expected in refusal(load_records, path, column=column)
            continue
        exact = next(each for each in (expected, "prompt", "caption", "text") if each in names)
        assert load_records(path, column=column)[0].prompt == "ab"[names.index(exact)]
        told = [str(each.message) for each in recwarn]
        assert told == (
            [] if expected is None else [f"prompts: the column {expected!r} of {path!r} holds the prompts."]
        )
        recwarn.clear()


def test_repeated_prompts_keep_their_own_columns(write: Write):
    path = write("p.csv", "prompt,text\na,x\na,y\n")
    assert load_records(path) == [Record("a", {"text": "x"}), Record("a", {"text": "y"})]
    assert "has both 'x' and 'y' for the prompt 'a'" in refusal(texts_of, load_records(path), "text", path)


def test_files_of_a_folder_are_read_like_single_files(write: Write, tmp_path: Path):
    folder = str(tmp_path / "set")
    write("set/one.csv", "prompt,n\nNone,1\n")
    write("set/two.csv", "prompt,n\nNA,2\n")
    write("set/README.md", "Prompts.")
    assert load_records(folder) == [Record("None", {"n": 1}), Record("NA", {"n": 2})]
    path = write("set/two.csv", "prompt,n\na fox, red,2\n")
    message = refusal(load_records, folder)
    assert path in message and "line 2: one field expected for each of prompt, n, got 3" in message
    write("set/two.csv", "caption,n\nb,2\n")
    assert "the same columns expected in all files, got caption, n and n, prompt" in refusal(load_records, folder)
    # The second mark is what joining two files leaves.
    write("texts/p.txt", "\ufeffa\r\n\r\n\ufeffb\n\ufeff\n")
    for source in (tmp_path / "texts", tmp_path / "texts" / "p.txt"):
        assert load_records(str(source)) == [Record("a"), Record("b")]


@pytest.mark.parametrize("name", ["other.csv", "other.txt", "more/other.parquet"])
def test_files_of_a_folder_that_would_be_left_out_are_refused(write: Write, tmp_path: Path, name: str):
    for used in ("a.jsonl", "b.jsonl"):
        write(f"set/{used}", '{"prompt": "a"}\n')
    assert len(load_records(str(tmp_path / "set"))) == 2
    path = tmp_path / "set" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("prompt\nc\n")
    assert f"got {Path(name)}, which datasets leaves out" in refusal(load_records, str(tmp_path / "set"))


def test_a_file_beside_those_with_a_split_in_their_name_is_refused(write: Write, tmp_path: Path):
    for name in ("train", "test"):
        write(f"set/{name}.jsonl", f'{{"prompt": "{name}"}}\n')
    assert load_records(str(tmp_path / "set"), split="test") == [Record("test")]
    write("set/more.jsonl", '{"prompt": "more"}\n')
    assert "got more.jsonl, which datasets leaves out" in refusal(load_records, str(tmp_path / "set"))


def test_many_rows_are_read_in_seconds(write: Write):
    count = 20_000
    path = write("p.csv", "prompt,n\n" + "".join(f'"a fox, {number}",{number}\n' for number in range(count)))
    start = time.perf_counter()
    records = load_records(path)
    assert len(records) == count and records[-1] == Record(f"a fox, {count - 1}", {"n": count - 1})
    # A million rows take 50 times as long.
    assert time.perf_counter() - start < 5


def test_a_dataset_of_the_hub_that_is_a_csv_file(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # A folder in place of the Hub: datasets reads both alike.
    monkeypatch.chdir(tmp_path)
    write("set/data.csv", "prompt\nNone\nNA\na\n")
    assert _read_hub("set", "train").columns["prompt"] == ["None", "NA", "a"]
    write("set/data.csv", "prompt\na fox, red\na dog, brown\n")
    message = refusal(_read_hub, "set", "train")
    assert "'set'" in message and "a .csv file with more fields than its header: download" in message
