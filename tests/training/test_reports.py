# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`Reports`: the log of a run, and what trackers get: TensorBoard's files are read back."""

import json
import math
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest
import torch
from accelerate.tracking import GeneralTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tiny_sd3 import tiny_sd3_pipeline
from updates_by_hand import STEPS, do_update, make_config, make_state

from flowbp import get_method
from flowbp.outputs import BackwardOutput
from flowbp.surrogate import Surrogate
from flowbp.training import TrainingConfig
from flowbp.training.reports import MicroBatch, Reports, finite, read_log, tracker_settings
from flowbp.training.stages import StageMeter
from flowbp.training.state import TrainingState


@pytest.fixture(scope="module")
def transformer() -> torch.nn.Module:
    return tiny_sd3_pipeline(torch.float32).transformer


@pytest.fixture
def start(transformer: torch.nn.Module, tmp_path: Path) -> Any:
    """Reports that have begun, and the state of the run."""

    def make(part_names: tuple[str, ...] = (), **values: Any) -> tuple[Reports, TrainingState]:
        (tmp_path / "run").mkdir(exist_ok=True)
        config = make_config(tmp_path / "run", **{"report_to": "tensorboard", **values})
        state = make_state(transformer, config)
        reports = Reports(config, state.accelerator, part_names)
        reports.begin([])
        return reports, state

    return make


def test_tags_and_groups_that_no_tracker_takes_are_told(transformer: torch.nn.Module, tmp_path: Path):
    (tmp_path / "run").mkdir()
    config = make_config(tmp_path / "run", report_to="tensorboard", tracker_tags=("a",), tracker_group="g")
    remarks = Reports(config, make_state(transformer, config).accelerator, ()).begin([])
    assert remarks == [
        f"--tracker_{option} has no effect: tensorboard takes no {option}." for option in ("group", "tags")
    ]


def surrogate() -> Surrogate:
    method = get_method("leapalign", alpha=0.5)
    return method.draw(torch.linspace(1, 0, STEPS + 1), torch.Generator().manual_seed(0))


def micro_batch(
    rewards: tuple[float, ...], gaps: tuple[float, ...] = (0.25, 0.75), parts: dict[str, float] | None = None
) -> MicroBatch:
    """Of two samples; the gaps are those of the inner step 3, and twice them those at the end."""
    out = BackwardOutput(
        torch.tensor(rewards),
        -torch.tensor(rewards).mean(),
        torch.tensor([1.0, 3.0]),
        {STEPS: 2 * torch.tensor(gaps), 3: torch.tensor(gaps)},
        torch.tensor(0.5),
        {3: torch.tensor(2.0)},
    )
    return MicroBatch(out, surrogate(), parts or {})


def report(reports: Reports, state: TrainingState, *micro_batches: MicroBatch, gradient: float = 1.0) -> Any:
    step = do_update(state, gradient)
    entry = reports.entry(state, step, micro_batches, StageMeter(torch.device("cpu")))
    reports.update(entry, micro_batches)
    return entry


def log_file(tmp_path: Path) -> list[dict[str, Any]]:
    """The log, in which what is no strict JSON fails."""
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON")) for line in lines]


def events_of(state: TrainingState, folder: Path) -> EventAccumulator:
    """What TensorBoard reads of the run's last file, of which there is one below the folder."""
    state.accelerator.end_training()
    (file,) = folder.glob("flowbp/events*")
    return EventAccumulator(str(file), {"scalars": 0, "histograms": 0, "images": 0}).Reload()


# The log.


def test_an_entry_has_means_over_micro_batches(start: Any, tmp_path: Path):
    reports, state = start(("red", "blue"), velocity_anchor=0.5)
    batches = [
        micro_batch((0.5, 1.0), parts={"red": 1.0, "blue": 2.0}),
        micro_batch((0.0, 0.5), gaps=(0.5, 0.5), parts={"red": 3.0, "blue": 3.0}),
    ]
    entry = report(reports, state, *batches)
    expected = {
        "step": 1,
        "reward": 0.5,
        "reward_std": pytest.approx(0.125**0.5),
        "loss": -0.5,
        "anchor": 0.5,
        "reward/red": 2.0,
        "reward/blue": 2.5,
        "gap/3": 0.5,
        f"gap/{STEPS}": 1.0,
        "gradient_norm/step_3": 2.0,
        "learning_rate": 1e-4,
        "skipped_updates": 0,
        "drawn_steps": [term.step for term in surrogate().terms],
    }
    assert {name: entry[name] for name in expected} == expected and entry["gradient_norm"] > 1
    assert log_file(tmp_path) == reports.log == [entry]


def test_what_is_not_finite_is_null_in_the_log_and_left_out_elsewhere(start: Any, tmp_path: Path):
    reports, state = start(("red",))
    report(reports, state, micro_batch((math.nan, 1.0), gaps=(math.inf, 0.5)), gradient=math.nan)
    (entry,) = log_file(tmp_path)
    missing = {name for name, value in entry.items() if value is None}
    assert missing == {"reward", "reward_std", "loss", "reward/red", "gap/3", f"gap/{STEPS}", "gradient_norm"}
    assert entry["skipped_updates"] == 1
    events = events_of(state, tmp_path / "run" / "logs")
    assert not missing & set(events.Tags()["scalars"])
    (histogram,) = events.Histograms("gap_j")
    assert histogram.histogram_value.num == 1


def test_a_resumed_run_continues_the_log(start: Any, tmp_path: Path):
    reports, _ = start(report_to="none")
    earlier = [{"step": 1, "reward": 0.5}]
    reports.begin(earlier)
    assert log_file(tmp_path) == earlier and reports.log == earlier


def test_a_dry_run_writes_nothing(start: Any, tmp_path: Path):
    reports, state = start(dry_run=True)
    assert report(reports, state, micro_batch((0.5, 1.0)))["reward"] == 0.75
    assert list((tmp_path / "run").iterdir()) == [] and reports.log == []


def test_a_log_is_read_up_to_an_update_without_a_line_that_was_cut(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    assert read_log(path, 5) == []
    entries = [{"step": step, "reward": step / 10, "seconds": 1.5} for step in (1, 2, 3)]
    whole = "".join(json.dumps(entry) + "\n" for entry in entries)
    path.write_text(whole)
    assert read_log(path, 2) == entries[:2] and read_log(path, 3) == entries
    for cut in range(len(json.dumps(entries[2])), 0, -1):
        path.write_text(whole[: len(whole) - 1 - cut])
        assert read_log(path, 3) == entries[:2]


def test_numbers_that_json_does_not_have_become_none():
    assert finite([1.5, math.nan, math.inf, -math.inf, 0.0]) == [1.5, None, None, None, 0.0]


# Trackers.


def test_tensorboard_has_scalars_histograms_and_images(start: Any, tmp_path: Path):
    reports, state = start()
    for first in (0.5, 0.25):
        entry = report(reports, state, micro_batch((first, 1.0)), micro_batch((0.0, 0.5), gaps=(1.25, 1.75)))
    reports.scalars({"evaluation/red": 0.5}, 2)
    reports.images("evaluation", Image.new("RGB", (6, 4), "red"), 2)
    events = events_of(state, tmp_path / "run" / "logs")
    numbers = {name: value for name, value in entry.items() if isinstance(value, float)}
    for name, value in numbers.items():
        assert [event.step for event in events.Scalars(name)] == [1, 2]
        assert events.Scalars(name)[1].value == pytest.approx(value)
    drawn = [events.Scalars(f"drawn/{place}")[1].value for place in range(len(entry["drawn_steps"]))]
    assert drawn == entry["drawn_steps"] and events.Scalars("evaluation/red")[0].value == 0.5
    # The values of all samples of an update.
    expected = {"gap_j": (0.25, 1.75, 4.0), "gap_0": (0.5, 3.5, 8.0), "sample_weight": (1.0, 3.0, 8.0)}
    for name, (low, high, total) in expected.items():
        first, second = events.Histograms(name)
        assert (first.step, second.step) == (1, 2) and first.histogram_value.num == 4
        assert (first.histogram_value.min, first.histogram_value.max) == (low, high)
        assert first.histogram_value.sum == pytest.approx(total)
    (image,) = events.Images("evaluation")
    assert (image.step, image.height, image.width) == (2, 4, 6)
    assert Image.open(tmp_path / "run" / "evaluation" / "000002.png").size == (6, 4)


def test_without_connectors_there_are_no_histograms(start: Any, tmp_path: Path):
    reports, state = start()
    batch = micro_batch((0.5, 1.0))
    without = BackwardOutput(**{**vars(batch.out), "gaps": {}})
    report(reports, state, MicroBatch(without, batch.surrogate, {}))
    assert events_of(state, tmp_path / "run" / "logs").Tags()["histograms"] == []


def test_settings_are_typed_for_trackers():
    config = make_config(Path("run"), resolution=(8, 16), method_options={"num_active": 3}, tracker_tags=())
    found = tracker_settings(config.settings())
    assert all(type(value) in (bool, int, float, str) for value in found.values())
    expected = {"rank": 4, "learning_rate": 1e-4, "strict": False, "resolution": "[8, 16]", "num_active": 3}
    expected |= {"tracker_tags": "[]", "output_dir": "run"}
    assert {name: found[name] for name in expected} == expected and "revision" not in found
    assert all(type(found[name]) is type(value) for name, value in expected.items())


def test_tensorboard_has_the_settings_as_hyperparameters(start: Any, tmp_path: Path):
    _, state = start(rank=3, strict=True, resolution=(8, 16))
    state.accelerator.end_training()
    (file,) = (tmp_path / "run" / "logs").glob("flowbp/*/events*")
    content = EventAccumulator(str(file)).Reload().SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    # TensorBoard's writer has truth values among the numbers.
    expected = {"rank": 3, "strict": 1, "learning_rate": 1e-4, "resolution": "[8, 16]"}
    kinds = {name: "string_value" if isinstance(value, str) else "number_value" for name, value in expected.items()}
    assert {name: found[name].WhichOneof("kind") for name in expected} == kinds
    assert {name: getattr(found[name], kinds[name]) for name in expected} == expected


def test_a_named_run_has_a_folder_of_its_own_in_tensorboard(start: Any, tmp_path: Path):
    reports, state = start(run_name="first")
    report(reports, state, micro_batch((0.5, 1.0)))
    assert events_of(state, tmp_path / "run" / "logs" / "first").Scalars("reward")[0].value == 0.75


class Recorder(GeneralTracker):
    """Stands for a tracker whose package is not installed."""

    requires_logging_directory = False
    main_process_only = True
    given: dict[str, Any] = {}

    def __init__(self, project: str, **arguments: Any) -> None:
        super().__init__()
        type(self).given = {"project": project, **arguments}

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        type(self).given["settings"] = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("tracker", "expected"),
    [
        ("wandb", {"name": "mine", "group": "g", "tags": ["a", "b"], "dir": "RUN"}),
        ("trackio", {"name": "mine", "group": "g"}),
        ("swanlab", {"experiment_name": "mine", "group": "g", "tags": ["a", "b"], "logdir": "RUN"}),
        ("mlflow", {"run_name": "mine", "tags": {"a": "true", "b": "true"}}),
        ("clearml", {"task_name": "mine", "tags": ["a", "b"]}),
    ],
)
def test_name_group_and_tags_are_passed_on(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, expected: dict[str, Any]
):
    recorder = type("Recorder", (Recorder,), {"name": tracker})
    available = accelerate.tracking._available_trackers
    monkeypatch.setattr(
        accelerate.tracking, "_available_trackers", [*available, accelerate.tracking.LoggerType(tracker)]
    )
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, tracker, recorder)
    options = {"tracker_project": "p", "tracker_group": "g", "tracker_tags": ("a", "b")}
    reports, state = start(report_to=tracker, run_name="mine", **options)
    config: TrainingConfig = reports.config
    expected = {name: str(config.output_dir) if value == "RUN" else value for name, value in expected.items()}
    given = recorder.given
    assert given.pop("settings") == tracker_settings(config.settings())
    # Some trackers are also given a folder by accelerate.
    assert given.pop("logging_dir", None) in (None, str(config.output_dir / "logs" / "mine"))
    assert given == {"project": "p", **expected}
    state.accelerator.end_training()
    # The folder's name is the run's where it has no other.
    start(report_to=tracker)
    assert {"run"} == {value for name, value in recorder.given.items() if name.endswith("name")}
