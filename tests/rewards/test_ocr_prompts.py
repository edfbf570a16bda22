# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The text that an `ocr` reward looks for is the one that was meant, and fits the images; if not, one line says so."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flowbp.rewards import check_prompts, load_reward
from flowbp.rewards.ocr import quoted_text
from flowbp.training import TrainingConfig
from flowbp.training.prompts import Record, load_records
from flowbp.training.rewards import RunRewards, load_run_rewards

SQUARE, WIDE = (512, 512), (512, 2048)


def refusal(function: Callable, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def reward() -> torch.nn.Module:
    return load_reward("ocr")


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('the text "42" in red', "42"),
        ('a 5" nail next to the word "ok"', "ok"),
        ('the word "ok" next to a 5" nail and a 12" ruler', "ok"),
        ('the number "5" on a 3" plate', "5"),
        ("a “vintage” sign", "vintage"),
        ("a „vintage“ sign", "vintage"),
        ("一个写着“你好”的牌子", "你好"),
        ('看板"営業中"です', "営業中"),
        ('"STOP" above and "STOP" below', "STOP"),
        ("a sign: \"it's 5 o'clock\"", "it's 5 o'clock"),
    ],
)
def test_text_that_was_meant(prompt: str, text: str):
    assert quoted_text(prompt) == text


@pytest.mark.parametrize(
    "prompt",
    [
        'a 5" nail and a 3" screw',
        'a 5" nail',
        'the text "5" nail"',
        'the text "a 5" nail and a 6" nail"',
        'a sign that reads OPEN" and the word "ok"',
        'a sign that reads OPEN" and ok" too',
        'the text " ok "',
        'the text "ok" and "',
        "the text 'ok'",
        "the text «ok»",
    ],
)
def test_quotes_that_do_not_pair_are_refused(prompt: str):
    message = refusal(quoted_text, prompt)
    assert "expected a text between double quotes" in message and repr(prompt) in message


@pytest.mark.parametrize(
    "prompt", ['a "vintage" sign that reads "OPEN"', 'a “vintage” sign that reads "OPEN"', '"vintage""OPEN"']
)
def test_two_texts_are_refused(prompt: str):
    message = refusal(quoted_text, prompt)
    assert "expected one text between double quotes, got 'vintage' and 'OPEN'; quote one" in message
    assert "--reward_text_column" in message and repr(prompt) in message


PROMPTS = [f'a "{number}"' for number in range(19)]


def test_any_prompt_of_a_run_is_checked(reward: torch.nn.Module):
    check_prompts(reward, PROMPTS, sizes=[SQUARE, WIDE])
    message = refusal(check_prompts, reward, [*PROMPTS, 'a "café\u0e01"'])
    assert repr('a "café\u0e01"') in message and "'\u0e01'; quote another text" in message


def test_texts_that_images_of_a_size_cannot_hold_are_refused(reward: torch.nn.Module):
    long = 'a "GRAND HOTEL"'
    check_prompts(reward, [long], sizes=[WIDE])
    message = refusal(check_prompts, reward, [*PROMPTS, long], sizes=[WIDE, SQUARE])
    assert repr(long) in message and "images of height 512 and width 512" in message
    assert "6 columns, got 'GRAND HOTEL', which needs 11; use images that are wider" in message
    # Without sizes it is found when the first image is scored.
    check_prompts(reward, [long])
    assert refusal(reward, torch.rand(1, 3, *SQUARE), [long]) == message


@pytest.mark.parametrize("size", [(64, 64), (48, 65), (96, 40), (50, 171)])
def test_what_is_checked_is_what_is_scored(reward: torch.nn.Module, size: tuple[int, int]):
    def is_taken(check: Callable[[str], object], text: str) -> bool:
        try:
            check(f'a "{text}"')
        except ValueError:
            return False
        return True

    texts = ["123456789012345678901234"[:count] for count in range(1, 25)] + ["11", "111", "1111"]
    images = torch.rand(1, 3, *size)
    checked = [is_taken(lambda prompt: check_prompts(reward, [prompt], sizes=[size]), text) for text in texts]
    assert checked == [is_taken(lambda prompt: reward(images, [prompt]), text) for text in texts]
    assert True in checked and False in checked


def test_parts_of_a_sum_and_texts_of_a_column_are_checked():
    part = load_reward("ocr:0.5,ocr-v5", texts={"a sign": "GRAND HOTEL", "another": "7", "blank": " "})
    check_prompts(part, ["a sign", "another"], sizes=[WIDE])
    assert "'a sign'" in refusal(check_prompts, part, ["another", "a sign"], sizes=[SQUARE])
    # The score of a text without characters would be infinite.
    assert "got 'blank'" in refusal(check_prompts, part, ["blank"])
    assert "got 'blank'" in refusal(part, torch.rand(1, 3, 48, 48), ["blank"])


def test_a_users_reward_with_a_text_of_its_own_is_asked():
    class Reads(torch.nn.Module):
        def text_of(self, prompt: str) -> str:
            raise ValueError(f"no text for {prompt}")

    assert "no text for a sign" in refusal(check_prompts, Reads(), ["a sign"], sizes=[SQUARE])


def rewards_of_a_run(folder: Path, table: str, **options) -> RunRewards:
    (folder / "prompts.csv").write_text(table)
    values = {"pretrained_model_name_or_path": "m", "prompts": str(folder / "prompts.csv"), "reward": "ocr", **options}
    config = TrainingConfig(**values)
    return load_run_rewards(config, load_records(config.prompts), None)


@pytest.mark.parametrize(
    ("texts", "options"),
    [
        (["7", "HOTELS 1"], {"resolution": 64}),
        (["7"], {"resolution": 64, "validation_prompt": 'a "HOTELS 1"'}),
        (["7"], {"resolution": 64, "eval_prompts": "eval.txt"}),
        (["7", "HOTELS 1"], {"height": 64, "width": (128, 64)}),
    ],
)
def test_a_run_checks_all_its_prompts_at_its_sizes(tmp_path: Path, monkeypatch, texts: list[str], options: dict):
    monkeypatch.chdir(tmp_path)
    Path("eval.txt").write_text('a "7"\na "HOTELS 1"\n')
    table = "prompt\n" + "".join(f'a "{text}"\n' for text in texts)
    assert "got 'HOTELS 1', which needs 8" in refusal(rewards_of_a_run, tmp_path, table, **options)
    rewards_of_a_run(tmp_path, table, **options | {"resolution": None, "height": 64, "width": 128})


def test_texts_of_training_and_evaluation_agree(tmp_path: Path):
    (tmp_path / "eval.csv").write_text("prompt,text\na sign,8x\n")
    options = {"reward_text_column": "text", "eval_prompts": str(tmp_path / "eval.csv")}
    message = refusal(rewards_of_a_run, tmp_path, "prompt,text\na sign,7x\n", **options)
    assert "one text expected for the prompt 'a sign', got '7x' in --prompts and '8x' in --eval_prompts" in message
    found = rewards_of_a_run(tmp_path, "prompt,text\na shop,7x\n", **options)
    assert found.training.texts == {"a shop": "7x", "a sign": "8x"}


def test_a_validation_prompt_has_the_columns_of_its_row(tmp_path: Path):
    options = {"reward_text_column": "text", "validation_prompt": " a sign "}
    found = rewards_of_a_run(tmp_path, "prompt,text\na sign,SHUT\n", num_validation_images=1, **options)
    assert found.validation == (Record("a sign", {"text": "SHUT"}),)
