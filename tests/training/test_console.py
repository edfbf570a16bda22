# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Lines, bars, tables and stages of a run, as the person who watches it sees them."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState

from flowbp.training.console import Console, duration, size, table
from flowbp.training.stages import StageMeter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still until a test changes it."""
    now = [100.0]
    for name in ("time.time", "tqdm.std.time", "time.perf_counter"):
        monkeypatch.setattr(name, lambda: now[0])
    return now


def last_bar(printed: str, what: str) -> str:
    """The last state of a bar: `N/N [TIME, ...]`."""
    return [line for line in printed.replace("\n", "\r").split("\r") if line.startswith(what)][-1].split("| ")[1]


def test_the_updates_bar_leaves_pauses_out(clock: list[float], capsys: pytest.CaptureFixture[str]):
    console, numbers = Console(Accelerator()), []
    for update in console.updates(1, 4):
        numbers.append(update)
        clock[0] += 10
        console.show(reward=f"{update}.5")
        with console.pause():
            clock[0] += 1000
    assert numbers == [1, 2, 3]
    assert last_bar(capsys.readouterr().err, "updates") == "4/4 [00:30<00:00, 10.00s/it, reward=3.5]"
    # Nor is there an error without a bar.
    with console.pause():
        console.show(reward="1")
    assert capsys.readouterr().err == ""


def test_images_have_a_bar_of_their_own(clock: list[float], capsys: pytest.CaptureFixture[str]):
    with Console(Accelerator()).drawing("evaluation", 8) as advance:
        for _ in range(2):
            clock[0] += 10
            advance(2)
        printed = capsys.readouterr().err
    assert last_bar(printed, "evaluation") == "4/8 [00:20<00:20,  5.00s/image]"


def test_lines_are_without_secrets_and_of_the_main_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 30)
    console = Console(Accelerator())
    console.tell(f"told {'k' * 30}")
    console.print(f"printed hf_{'z' * 30}")
    assert capsys.readouterr() == ("printed [redacted]\n", "told [redacted]\n")
    monkeypatch.setitem(PartialState._shared_state, "process_index", 1)
    console.tell("told")
    console.print("printed")
    assert list(console.updates(0, 2)) == [0, 1]
    with console.drawing("evaluation", 2) as advance:
        advance(2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 min 0 s"), (59.4, "0 min 59 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (3600, "1 h 0 min")]
    + [(7325, "2 h 2 min"), (100 * 3600, "100 h 0 min")],
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0.0 MiB"), (1.5 * 2**20, "1.5 MiB"), (2**30, "1.0 GiB"), (2**31, "2.0 GiB")]
)
def test_sizes(count: float, text: str):
    assert size(count) == text


def test_tables_are_aligned():
    assert table("Done", [("a", "1"), ("long", "2")]) == "Done\n  a     1\n  long  2"


def test_stages_add_up(clock: list[float]):
    meter = StageMeter(torch.device("cpu"))
    for stage, seconds in (("rollout", 2), ("rollout", 1), ("sweep", 4), ("rollout", 8), (None, 16), ("sweep", 32)):
        meter.mark(stage)
        clock[0] += seconds
    # The last stage has not ended.
    assert meter.seconds == {"rollout": 11, "sweep": 4} and meter.peaks == {}
    lines = meter.table().splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["stage", "seconds", "peak", "GiB"],
        ["rollout", "11.00", "-"],
        ["sweep", "4.00", "-"],
        ["update", "15.00"],
    ]
    assert lines[4].startswith("peak of the whole process, loading included: ")
