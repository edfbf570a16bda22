# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts are read from every kind of source, each bad one is refused in one line, and batches can be resumed."""

import datasets
import pytest

from flowbp.training.prompt_sampler import PromptSampler
from flowbp.training.prompts import load_prompts

ROWS = {"prompt": ["a red cat", "None", "tea, please"], "text": ["x", "y", "z"], "number": [1, 2, 3]}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def source(tmp_path):
    """Writes a file and returns its path as text."""

    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def refusal(*args, error: type[Exception] = ValueError, **kwargs) -> str:
    with pytest.raises(error) as caught:
        load_prompts(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_txt_is_one_prompt_a_line_without_blank_lines(source) -> None:
    path = source("p.txt", "\ufeffa red cat\r\n\n   \n  tea, please \nü")
    assert load_prompts(path) == ["a red cat", "tea, please", "ü"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tables_give_the_prompt_column_in_order(kind: str, tmp_path) -> None:
    path = str(tmp_path / f"p.{kind}")
    table = datasets.Dataset.from_dict(ROWS)
    {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[kind](path)
    assert load_prompts(path) == ROWS["prompt"]
    assert load_prompts(path, column="text") == ROWS["text"]


def test_changed_file_is_read_again(source) -> None:
    assert load_prompts(source("p.jsonl", '{"prompt": "one"}\n')) == ["one"]
    assert load_prompts(source("p.jsonl", '{"prompt": "another"}\n')) == ["another"]


def test_folders(tmp_path, source) -> None:
    table = datasets.Dataset.from_dict(ROWS)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(tmp_path / "two"))
    source("data/train.jsonl", '{"prompt": "t"}\n')
    source("data/test.jsonl", '{"prompt": "u"}\n')
    assert load_prompts(str(tmp_path / "one")) == ROWS["prompt"]
    assert load_prompts(str(tmp_path / "two"), split="test") == ["None"]
    assert load_prompts(str(tmp_path / "data")) == ["t"]
    assert load_prompts(str(tmp_path / "data"), split="test") == ["u"]


@pytest.mark.parametrize(
    ("header", "expected"),
    [("prompt,caption,text", "a"), ("text,caption,other", "b"), ("other,more,text", "c")],
)
def test_default_column(header: str, expected: str, source) -> None:
    assert load_prompts(source("p.csv", f"{header}\na,b,c\n")) == [expected]


def test_only_column_of_text_is_the_default(source) -> None:
    assert load_prompts(source("p.jsonl", '{"id": 1, "words": "a"}\n{"id": 2, "words": "b"}\n')) == ["a", "b"]


def test_missing_and_blank_rows_are_left_out(source) -> None:
    path = source("p.jsonl", '{"prompt": "a"}\n{"prompt": null}\n{"prompt": " "}\n{"prompt": "b"}\n')
    assert load_prompts(path) == ["a", "b"]


def test_absent_sources_are_refused(tmp_path) -> None:
    assert "no file" in refusal(str(tmp_path / "no.txt"), error=FileNotFoundError)
    assert "no file or folder" in refusal(str(tmp_path / "no"), error=FileNotFoundError)
    assert "'some/set' is no file or folder here" in refusal("some/set")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "", "holds no prompts"),
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.jsonl", "", "is empty"),
        ("p.csv", "", "is empty"),
        ("p.parquet", "", "is empty"),
        ("p.jsonl", '{"prompt": " "}\n', "holds no prompts"),
        ("p.txt", b"good\nb\xff\n", "line 2 of"),
        ("p.csv", b"prompt\ngood\nb\xff\n", "line 3 of"),
        ("p.jsonl", b'{"prompt": "\xff"}\n', "line 1 of"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"\n', "not a readable .jsonl file"),
        ("p.parquet", "no parquet", "not a readable .parquet file"),
        ("p.xml", "{}", "convert it to one of these"),
        ("p.json", "{}", "has no column prompt"),
        ("p.csv", "x,y\na,b\n", "name one of its columns: x, y"),
        ("p.csv", "prompt,y\n1,b\n", "column 'prompt' of"),
    ],
)
def test_bad_content_is_refused(name: str, content: str | bytes, expected: str, source) -> None:
    path = source(name, content)
    message = refusal(path)
    assert expected in message and path in message


def test_bad_column_and_split_are_refused_with_the_choices(tmp_path, source) -> None:
    path = source("p.csv", "prompt,n\na,1\n")
    assert "has no column 'z': choose one of prompt, n" in refusal(path, column="z")
    assert "holds int64, expected text: columns of text are: prompt" in refusal(path, column="n")
    assert "no splits" in refusal(path, split="test")
    assert "a .txt file has no columns" in refusal(source("p.txt", "a\n"), column="z")
    table = datasets.Dataset.from_dict(ROWS)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"a": table, "b": table}).save_to_disk(str(tmp_path / "two"))
    assert "choose one of train" in refusal(str(tmp_path / "one"), split="test")
    assert "choose one of a, b" in refusal(str(tmp_path / "two"))


PROMPTS = [f"prompt {i}" for i in range(10)]


def draw(sampler: PromptSampler, batches: int) -> list[str]:
    return [prompt for _ in range(batches) for prompt in next(sampler)]


def test_every_epoch_has_every_prompt_once_in_a_new_order() -> None:
    drawn = draw(PromptSampler(PROMPTS, 4, seed=0), 5)
    first, second = drawn[:10], drawn[10:]
    assert sorted(first) == sorted(second) == sorted(PROMPTS)
    assert first != second and first != PROMPTS


def test_order_depends_on_the_seed_only() -> None:
    assert draw(PromptSampler(PROMPTS, 3, seed=1), 9) == draw(PromptSampler(PROMPTS, 3, seed=1), 9)
    assert draw(PromptSampler(PROMPTS, 3, seed=1), 9) != draw(PromptSampler(PROMPTS, 3, seed=2), 9)


def test_processes_share_out_the_sequence_of_one() -> None:
    alone = PromptSampler(PROMPTS, 4, seed=3)
    pair = [PromptSampler(PROMPTS, 2, seed=3, process_index=i, num_processes=2) for i in range(2)]
    for _ in range(7):
        assert next(alone) == next(pair[0]) + next(pair[1])


def test_more_places_than_prompts() -> None:
    batch = next(PromptSampler(PROMPTS[:2], 5, seed=0))
    assert len(batch) == 5 and set(batch) == set(PROMPTS[:2])


@pytest.mark.parametrize("done", [0, 1, 4])
def test_resume(done: int) -> None:
    sampler = PromptSampler(PROMPTS, 3, seed=5)
    draw(sampler, done)
    resumed = PromptSampler(PROMPTS, 3, seed=5)
    resumed.load_state_dict(sampler.state_dict())
    assert draw(resumed, 8) == draw(sampler, 8)
