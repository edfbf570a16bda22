# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Tables as Markdown and CSV."""

import csv
import io
import math
import re

import torch

from flowbp.judging.statistics import pairwise, summarise
from flowbp.judging.tables import table_csv, table_markdown


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def paper_records() -> list[dict]:
    names = ["hpsv2.1", "pickscore", "imagereward", "unifiedreward-alignment", "unifiedreward-quality"]
    scores = {}
    for place, name in enumerate(names):
        base = normal(40, 1, seed=place)
        scores[name] = {"base": base, "Sparse": base + 0.1, "Bridge": base - 0.2}
    scores["geneval"] = {model: (normal(40, 1, seed=9) > 0).double() for model in ("base", "Sparse", "Bridge")}
    tasks = {"single_object": range(0, 40, 2), "two_object": range(1, 40, 2)}
    return summarise(scores, {"geneval": {task: list(places) for task, places in tasks.items()}})


def test_the_table_has_the_paper_s_shape() -> None:
    parts = re.split(r"\n\n", table_markdown(paper_records()))
    assert parts[0] == "Score: mean [95 % interval]"
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in parts[1].splitlines()]
    assert lines[0] == ["", "HPSv2.1", "PickScore", "ImageReward", "UR-Align", "UR-IQ", "GenEval, %"]
    assert [line[0] for line in lines[2:]] == ["base", "Sparse", "Bridge"]
    assert len({len(line) for line in parts[1].splitlines()}) == 1
    assert re.fullmatch(r"-?\d\.\d\d \[-?\d\.\d\d, -?\d\.\d\d\]", lines[2][1])
    captions = parts[::2]
    assert "Change against the base, same noise" in captions and "GenEval by group, %" in captions
    by_group = parts[2 * captions.index("GenEval by group, %") + 1].splitlines()
    heads = [cell.strip() for cell in by_group[0].strip("|").split("|")]
    assert heads == ["", "single_object", "two_object", "overall"]
    assert len(captions) == 5 and captions[-1] == "Intervals are 95 % bootstrap intervals over prompts.\n"
    change = parts[2 * captions.index("Change against the base, same noise") + 1]
    assert "+0.100 [+0.100, +0.100]" in change and "-0.200 [-0.200, -0.200]" in change


def test_numbers_are_rounded_to_their_interval() -> None:
    values = {"base": 20 + 1e-3 * normal(100, 1), "lora": 20 + 1e-3 * normal(100, 1, seed=1)}
    table = table_markdown(summarise({"pickscore": values}, {}))
    assert re.search(r"\| base +\| +(19\.99|20\.00)\d{3} \[", table), table


def test_csv_holds_every_number_of_the_records() -> None:
    records = paper_records()
    lines = list(csv.DictReader(io.StringIO(table_csv(records))))
    assert {line["measure"] for line in lines} == {
        "score", "change", "win_rate", "overall", "group single_object", "group two_object"
    }  # fmt: skip
    for record in records:
        line = next(x for x in lines if (x["reward"], x["model"]) == (record["reward"], record["model"]))
        assert float(line["mean"]) == record["score"]["mean"]
        assert [float(line["low"]), float(line["high"])] == record["score"]["interval"]


def test_a_model_without_scores_has_a_line_that_says_so() -> None:
    broken = torch.full((40, 1), math.nan, dtype=torch.float64)
    scores = {"x": {"base": broken, "good": normal(40, 1)}, "clip": {"base": normal(40, 1), "good": broken}}
    records = summarise(scores, {"clip": {"a": list(range(20)), "b": list(range(20, 40))}})
    text = table_markdown(records, ["base: no finite images.", "good: a remark\nof two lines"])
    assert text.endswith("\n\n- base: no finite images.\n- good: a remark of two lines\n")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    base, good = [line for line in lines if line[0] == "base"], [line for line in lines if line[0] == "good"]
    assert base[0][1] == "no scores" != base[0][2] and good[0][2] == "no scores" != good[0][1]
    # By group, then the change and the win rate, which need the scores of both.
    assert good[1][1:] == ["no scores"] * 3 and "no scores" not in base[1]
    assert good[2][1:] == good[3][1:] == ["no scores"] * 2
    found = list(csv.DictReader(io.StringIO(table_csv(records))))
    assert [line["mean"] for line in found if (line["reward"], line["model"]) == ("clip", "good")] == [""] * 4


def test_names_of_users_stay_in_their_cells() -> None:
    values = normal(4, 1)
    text = table_markdown(summarise({"x": {"a|b\nc": values}}, {"x": {"of | two\nlines": [0, 1], "b": [2, 3]}}))
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert {len(line) for line in lines[:3]} == {2} and {len(line) for line in lines[3:]} == {4}
    assert lines[2][0].strip() == r"a\|b c" and lines[3][1].strip() == r"of \| two lines"


def test_lines_of_seeds_and_pairs_say_what_their_intervals_are() -> None:
    base = normal(40, 1)
    scores = {"base": base, "one": base + 0.5, "a": base + 0.25, "b": base + 0.75}
    lines = {"base": ["base"], "one": ["one"], "both": ["a", "b"]}
    records, pairs = summarise({"x": scores}, {}, lines, "both"), pairwise({"x": scores}, lines)
    text = table_markdown(records, [], pairs)
    assert "Change against both (2 seeds), same noise" in text and "Change against the base" not in text
    assert "are over seeds (Student's t; Welch's where both have several)" in text
    matrix = text[text.index("x: line minus column, same noise") :].splitlines()[2:7]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in matrix]
    assert cells[0] == ["", "base", "one", "both (2 seeds)"]
    assert cells[2] == ["base", "", "-0.5 [-0.5, -0.5]", "-0.5 [-3.7, +2.7]"]
    assert [line[place] for place, line in enumerate(cells[2:], 1)] == ["", "", ""]
    found = {
        (line["model"], line["measure"], line["against"]): line
        for line in csv.DictReader(io.StringIO(table_csv(records, pairs)))
    }
    assert len(found) == 3 + 2 * 2 + 6
    # Three decimals for the base's interval over prompts, whatever the seeds' says.
    values = {"base": 1e-2 * base, "a": base, "b": base + 1}
    text = table_markdown(summarise({"x": values}, {}, {"base": ["base"], "s": ["a", "b"]}))
    assert re.search(r"base +\| +-?0\.\d{4} \[", text)
    assert found["one", "difference", "both"]["over"] == "seeds" == found["both", "score", ""]["over"]
    assert found["one", "difference", "base"]["over"] == "prompts" and found["both", "score", ""]["seeds"] == "2"
    assert float(found["one", "difference", "base"]["mean"]) == 0.5
