# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`TrainingConfig`: the command line, recipes and Python set the same options, which are checked in the same way.

Most tests go over the declarations, so a new option is tested without being listed here.
"""

import contextlib
import io
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from training_scripts import ROOT, backbone_of, command_line, load_script

from flowbp.methods import BACKBONES, METHODS, find_row, get_method
from flowbp.training import Backbone, TrainingConfig
from flowbp.training.options import declarations, is_required, item_type, without_none
from flowbp.training.train_command_line import parse_training_config

DECLARED = declarations(TrainingConfig)
# Options of a method have names of their own on the command line and in recipes.
OPTIONS = [name for name in DECLARED if name != "method_options"]
REQUIRED = {"pretrained_model_name_or_path": "m", "prompts": "p.txt", "reward": "ocr"}
# Options that take no value of their type, and what an option needs beside it.
VALUES = {"report_to": "none", "method": "draft-k", "reward": "clip", "eval_reward": "clip", "offload": False}
VALUES |= {"lora_dtype": "base", "attention_backend": "native", "pipeline_columns": ("image=source", "mask=a,b")}
NEEDED = {
    "select": {"eval_reward": "clip"},
    "lr_warmup_steps": {"lr_scheduler": "linear"},
    "offload_ema": {"train": "full", "use_ema": True},
    "prodigy_d_coef": {"optimizer": "prodigy"},
}
NEEDED |= dict.fromkeys(("eval_prompt_column", "eval_prompt_split"), {"eval_prompts": "e.csv"})
# A tracker of accelerate's whose package is not installed.
NOT_INSTALLED = next(str(name) for name in LoggerType if name not in (LoggerType.ALL, *get_available_trackers()))
SCRIPTS = ("train_flowbp_sd3", "train_flowbp_flux", "train_flowbp_flux2", "train_flowbp")
ROWS = """
from flowbp.methods import FACTOR, METHODS, Option, Row

def row(name):
    defaults = {name: {"sd3": 1.0, "flux": 2.0, "flux2": 3.0}, "last_k": 2}
    return Row(METHODS["full"].draw, "Mine", "here", defaults, own_options=(Option(name, FACTOR, "100% sharp at 1."),))

sharp, clash = row("sharpness"), row("rank")
"""


class Everything(Backbone):
    """Has every option."""

    name = "sd3"
    defaults = {name: field.default for name, (field, declared, _) in DECLARED.items() if declared.of_backbone}


def kind_of(name: str) -> Any:
    """The type of an option, or of each of its values."""
    kind = without_none(DECLARED[name][2])
    return item_type(kind) or kind


def other_value(name: str) -> Any:
    """A value that an option takes and that is not its default."""
    field, declared, kind = DECLARED[name]
    if name in VALUES:
        return VALUES[name]
    if declared.choices is not None:
        return next(choice for choice in reversed(declared.choices) if choice != field.default)
    if kind_of(name) is bool:
        return not field.default
    plain = {int: 7, float: 0.5, str: "some text", Path: Path("some/where")}.get(kind_of(name), {"key": [1, "b"]})
    return (plain, plain) if item_type(without_none(kind)) else plain


def from_command_line(folder: Path, backbone: type[Backbone] = Everything, **values: Any) -> TrainingConfig:
    changes = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    changes |= {name: None for name, value in values.items() if value is False}
    flags = [f"--no-{name}" for name, value in values.items() if value is False]
    return parse_training_config(backbone, "", [*command_line(REQUIRED, **changes), *flags])


def from_recipe(folder: Path, backbone: type[Backbone] = Everything, **values: Any) -> TrainingConfig:
    # Tuples, paths and mappings as YAML has them.
    plain = json.loads(json.dumps({**REQUIRED, **values}, default=str))
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return parse_training_config(backbone, "", ["--config", str(recipe)])


def from_python(folder: Path, backbone: type[Backbone] = Everything, **values: Any) -> TrainingConfig:
    return TrainingConfig(**{**REQUIRED, **values}).settle(backbone)


WAYS = (from_command_line, from_recipe, from_python)


def error_of(way: Callable[..., TrainingConfig], folder: Path, **values: Any) -> str:
    """The message, which is one line, with which a way refuses values."""
    printed = io.StringIO()
    with pytest.raises((SystemExit, ValueError)) as caught, contextlib.redirect_stderr(printed):
        way(folder, **values)
    message = str(caught.value)
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 2
        message = printed.getvalue().removesuffix("\n").partition(": error: ")[2]
    assert message and "\n" not in message
    return message


@pytest.fixture(autouse=True)
def _accelerate_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


@pytest.fixture(scope="module")
def backbones() -> dict[str, type[Backbone]]:
    return {name: backbone_of(load_script(name)) for name in SCRIPTS}


# Declarations.


def test_every_option_is_declared_in_full():
    for name, (_, declared, _) in DECLARED.items():
        assert declared.help[0].isupper() or declared.help[0] in ".N" or " " in declared.help, name
        assert declared.help.endswith(".") and declared.group, name
        assert kind_of(name) in (bool, int, float, str, Path, Mapping[str, Any]), name
    without_range = [name for name in OPTIONS if kind_of(name) in (int, float) and DECLARED[name][1].range is None]
    assert without_range == ["seed"]
    assert {name for name in DECLARED if is_required(DECLARED[name][0])} == {*REQUIRED} - {"reward"}


def test_every_option_is_read():
    folders = (ROOT / "pipelines" / "flowbp", ROOT / "training")
    text = "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py"))
    assert [name for name in DECLARED if not re.search(rf"\b(config|self)\.{name}\b", text)] == []


@pytest.mark.parametrize("name", OPTIONS)
def test_the_command_line_a_recipe_and_python_set_the_same_option(name: str, tmp_path: Path):
    values = {name: other_value(name), **NEEDED.get(name, {})}
    configs = [way(tmp_path, **values) for way in WAYS]
    assert configs[0] == configs[1] == configs[2] != from_python(tmp_path, **NEEDED.get(name, {}))
    assert getattr(configs[0], name) == values[name]
    assert [type(getattr(config, name)) for config in configs] == [type(getattr(configs[0], name))] * 3
    for alias in DECLARED[name][1].aliases:
        assert from_command_line(tmp_path, **{alias.removeprefix("--"): values[name]}) == configs[0]


def test_without_values_all_three_have_the_defaults(tmp_path: Path):
    config = from_python(tmp_path)
    assert from_command_line(tmp_path) == from_recipe(tmp_path) == config
    settled = {"resolution": (512,), "mixed_precision": "no", "offload": True, "select": "last"}
    settled |= {"lora_dtype": "float32", "learning_rate": 1e-4, "rank": 4, "lora_alpha": 4}
    for name, (field, _, _) in DECLARED.items():
        assert getattr(config, name) == {**REQUIRED, **settled}.get(name, field.default), name


@pytest.mark.parametrize("name", [name for name in OPTIONS if DECLARED[name][1].range is not None])
def test_a_number_out_of_range_is_refused_in_the_same_words(name: str, tmp_path: Path):
    expected = DECLARED[name][1].range
    numbers = (-1, 0, 1) if kind_of(name) is int else (-1.0, 0.0, 1.0, math.inf, math.nan)
    outside = [number for number in numbers if not expected.contains(number)]
    assert outside
    for number in outside:
        # YAML writes what is not finite in its own way.
        ways = WAYS if math.isfinite(number) else (from_command_line, from_python)
        messages = {error_of(way, tmp_path, **{name: number}) for way in ways}
        assert messages == {f"--{name} must be {expected.text}, got {number}"}


@pytest.mark.parametrize("name", [name for name in OPTIONS if DECLARED[name][1].choices is not None])
def test_what_is_no_choice_is_refused_with_the_choices(name: str, tmp_path: Path):
    for way in WAYS:
        message = error_of(way, tmp_path, **{name: "neither"})
        assert all(word in message for word in (name, "'neither'", *DECLARED[name][1].choices)), message


@pytest.mark.parametrize("name", DECLARED)
def test_a_value_of_another_type_is_refused(name: str, tmp_path: Path):
    wrong = {int: ("7", 7.0, True), float: ("0.5", True), bool: ("true", 1)}.get(kind_of(name), (7, True))
    is_list = item_type(without_none(DECLARED[name][2])) is not None
    for value in (*wrong, *([[each] for each in wrong] if is_list else [("a", "b")])):
        assert error_of(from_python, tmp_path, **{name: value}).startswith(f"--{name}: "), value
    if DECLARED[name][2] is without_none(DECLARED[name][2]):
        assert error_of(from_python, tmp_path, **{name: None}).startswith(f"--{name}: ")


def test_values_are_converted_to_the_declared_types():
    config = TrainingConfig(**REQUIRED, resolution=8, validation_prompt="a", tracker_tags=["b"], learning_rate=1)
    assert (config.resolution, config.validation_prompt, config.tracker_tags) == ((8,), ("a",), ("b",))
    assert type(config.learning_rate) is float
    assert TrainingConfig(**REQUIRED, output_dir="x").output_dir == Path("x")


@pytest.mark.parametrize("name", ["resolution", "height", "validation_prompt"])
def test_an_empty_list_is_refused(name: str):
    with pytest.raises(ValueError, match=f"--{name}: at least one value expected, got none"):
        TrainingConfig(**REQUIRED, **{name: []})
    assert TrainingConfig(**REQUIRED, tracker_tags=[]).tracker_tags == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr_warmup_steps": 1}, "--lr_warmup_steps has no effect with --lr_scheduler constant; choose constant_with"),
        (
            {"lr_warmup_steps": 3, "lr_scheduler": "linear", "max_train_steps": 2},
            "--lr_warmup_steps must be at most --max_train_steps 2, got 3",
        ),
        ({"prodigy_d_coef": 2.0}, "--prodigy_d_coef has no effect with --optimizer adamw; leave it out"),
        (
            {"optimizer": "prodigy", "learning_rate": 1e-4},
            "--learning_rate 0.0001: a factor on the rate that --optimizer prodigy finds, expected about 1; set it",
        ),
        ({"validation_prompt": ("a", " ")}, "--validation_prompt must not be blank"),
        ({"report_to": "tensorbord"}, "--report_to tensorbord: expected all, none or an installed tracker (tensorb"),
        # accelerate knows it, and would only leave it out without a word.
        ({"report_to": NOT_INSTALLED}, f"--report_to {NOT_INSTALLED}: expected all, none or an installed "),
        ({"use_dora": True, "quantization_config_path": Path("int8.json")}, "--use_dora: a DoRA needs its base's own"),
        ({"lora_dtype": "base", "use_dora": True}, "--lora_dtype base: a DoRA's norms of weights need float32"),
        ({"lora_layers": "to_q,,to_k"}, "--lora_layers has an empty name"),
        ({"group_offload": True, "offload": True}, "--offload and --group_offload exclude each other; choose one"),
        ({"eval_prompt_split": "test"}, "--eval_prompt_split needs --eval_prompts; leave it out"),
        ({"select": "best"}, "--select best needs --eval_reward, the held-out reward to choose by"),
        ({"eval_reward": "ocr"}, "--eval_reward ocr: --reward trains ocr; choose one that is held out"),
        ({"eval_reward": "clip:0.5,ocr:1"}, "--eval_reward clip:0.5,ocr:1: --reward trains ocr; choose"),
        ({"eval_reward": "clip:much"}, "expected a number as the weight of 'clip', got 'much'"),
        ({"resolution": 8, "height": 8}, "--resolution sets height and width; leave it out"),
        ({"height": (8, 16, 8), "width": (8, 16)}, "as many values, or one of them a single one, got 3 and 2"),
    ],
)
def test_options_that_exclude_each_other_are_refused_in_the_same_words(
    values: dict[str, Any], message: str, tmp_path: Path
):
    messages = {error_of(way, tmp_path, **values) for way in WAYS}
    assert len(messages) == 1 and message in messages.pop()


@pytest.mark.parametrize(
    ("values", "sizes"),
    [
        ({}, ((512, 512),)),
        ({"resolution": (8, 16)}, ((8, 8), (16, 16))),
        ({"height": 8}, ((8, 512),)),
        ({"width": (8, 16)}, ((512, 8), (512, 16))),
        ({"height": (8, 16), "width": (16, 24)}, ((8, 16), (16, 24))),
        ({"height": 8, "width": (16, 24)}, ((8, 16), (8, 24))),
    ],
)
def test_sizes(values: dict[str, Any], sizes: tuple[tuple[int, int], ...], tmp_path: Path):
    assert TrainingConfig(**REQUIRED, **values).sizes == sizes == from_python(tmp_path, **values).sizes


# Backbones.


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_backbone_has_its_defaults_and_only_its_options(
    backbones: dict[str, type[Backbone]], script: str, tmp_path: Path
):
    backbone = backbones[script]
    config = from_python(tmp_path, backbone)
    assert from_command_line(tmp_path, backbone) == config.settle(backbone) == config
    assert config.lora_layers and str(config.output_dir).endswith("flowbp-lora")
    own = {name for name, (_, declared, _) in DECLARED.items() if declared.of_backbone}
    assert backbone.defaults.keys() <= own
    for name in own:
        value = other_value(name)
        if name in backbone.defaults:
            assert getattr(from_python(tmp_path, backbone, **{name: value}), name) == value
            assert backbone.defaults[name] in (None, getattr(config, name))
            continue
        message = f"--{name}: {backbone.__name__} does not have this option; leave it out"
        assert error_of(from_python, tmp_path, backbone=backbone, **{name: value}) == message
        for way in (from_command_line, from_recipe):
            assert re.match(
                rf".*unknown (argument --(no-)?|key ){name}\b",
                error_of(way, tmp_path, backbone=backbone, **{name: value}),
            )


def test_the_dtype_is_what_accelerate_launch_was_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert from_python(tmp_path).mixed_precision == "bf16"
    assert from_command_line(tmp_path, mixed_precision="fp16").mixed_precision == "fp16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    message = "--mixed_precision must be no, fp16 or bf16, accelerate says fp8"
    assert {error_of(way, tmp_path) for way in WAYS} == {message}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"offload": True, "select": "last"}),
        ({"offload": False}, {"offload": False}),
        ({"group_offload": True}, {"offload": False}),
        ({"eval_prompts": "e.txt"}, {"select": "last"}),
        ({"optimizer": "adamw-8bit"}, {"learning_rate": 1e-4}),
        ({"optimizer": "prodigy"}, {"learning_rate": 1.0}),
        ({"optimizer": "prodigy", "learning_rate": 0.5}, {"learning_rate": 0.5}),
        ({"eval_reward": "clip"}, {"select": "best"}),
        ({"eval_reward": "clip", "select": "last"}, {"select": "last"}),
    ],
)
def test_what_depends_on_other_options(values: dict[str, Any], expected: dict[str, Any], tmp_path: Path):
    for way in WAYS:
        config = way(tmp_path, **values)
        assert {name: getattr(config, name) for name in expected} == expected


def test_a_pipeline_of_any_class_keeps_its_text_encoders_by_default(
    backbones: dict[str, type[Backbone]], tmp_path: Path
):
    for values, expected in (({}, False), ({"group_offload": True}, False), ({"offload": True}, True)):
        assert from_command_line(tmp_path, backbones["train_flowbp"], **values).offload is expected


# What becomes of the options.


def test_settings_are_json_without_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 30)
    values = {"resolution": (8, 16), "output_dir": tmp_path, "run_name": "k" * 30, "tracker_group": "hf_" + "z" * 30}
    options = {"step_sampling": "dirichlet", "dirichlet": (1, 2, 3)}
    settings = from_python(tmp_path, method_options=options, max_grad_norm=math.inf, **values).settings()
    assert json.loads(json.dumps(settings, allow_nan=False)) == settings
    assert settings.keys() == {*OPTIONS, *options}
    expected = {"resolution": [8, 16], "output_dir": str(tmp_path), "rank": 4, "learning_rate": 1e-4, "strict": False}
    expected |= {"run_name": "[redacted]", "tracker_group": "[redacted]", "revision": None, "dirichlet": [1, 2, 3]}
    assert {name: settings[name] for name in expected} == expected


def test_settings_of_a_full_fine_tuning_have_none_of_a_lora(
    backbones: dict[str, type[Backbone]], tmp_path: Path
) -> None:
    for way in WAYS:
        settings = way(tmp_path, backbones["train_flowbp_sd3"], train="full", mixed_precision="bf16").settings()
        assert not any(settings[name] for name in ("rank", "lora_alpha", "lora_layers", "lora_dtype"))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", METHODS)
def test_options_of_a_method_that_are_left_out_are_the_row_s_for_the_backbone(name: str, backbone: str):
    assert TrainingConfig(**REQUIRED, method=name).make_method(backbone) == get_method(name, backbone=backbone)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"method": "flowbp-bridge", "num_active": 4, "grad_rescale": 0.25, "alpha": 0},
            get_method("flowbp-bridge", num_active=4, grad_rescale=0.25, alpha=0.0),
        ),
        (
            {"step_sampling": "midpoint", "max_tail": "none", "tau": 0.5},
            get_method("flowbp-lagrange", step_sampling="midpoint", max_tail=None, tau=0.5),
        ),
        (
            {"step_sampling": "dirichlet", "dirichlet": (1, 2, 3.5), "active_supports": "all"},
            get_method("flowbp-lagrange", step_sampling="dirichlet", dirichlet=(1, 2, 3.5), active_supports="all"),
        ),
    ],
)
def test_options_of_a_method_in_all_three_ways(values: dict[str, Any], expected: Any, tmp_path: Path):
    in_python = {"method": values.get("method", "flowbp-lagrange")}
    in_python["method_options"] = {name: value for name, value in values.items() if name != "method"}
    found = [from_command_line(tmp_path, **values), from_recipe(tmp_path, **values)]
    assert [config.make_method("sd3") for config in (*found, from_python(tmp_path, **in_python))] == [expected] * 3
    assert expected != get_method(expected.name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tau": "low"}, "tau: (invalid )?number_or_none (value: |expected, got )'low'"),
        ({"max_tail": "few"}, "max_tail: (invalid )?integer_or_none (value: |expected, got )'few'"),
        ({"method": "flowbp-dense"}, "[Uu]nknown method 'flowbp-dense'"),
        ({"method": "os:nowhere"}, "method 'os:nowhere': expected a Row in os, got no such attribute"),
    ],
)
def test_a_method_that_cannot_be_is_refused(values: dict[str, Any], message: str, tmp_path: Path):
    for way in (from_command_line, from_recipe):
        assert re.search(message, error_of(way, tmp_path, **values))


def help_of(option: str, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """An option's lines of `--help` as one."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        # Lines so long that argparse breaks no word at a hyphen.
        patch.setenv("COLUMNS", "2000")
        parse_training_config(Everything, "", [*words, "--help"])
    return " ".join(capsys.readouterr().out.split()).partition(f" --{option} ")[2].partition(" --")[0]


def test_help_has_the_meaning_of_an_option_its_default_and_where_that_is_from(capsys: pytest.CaptureFixture[str]):
    assert help_of("checkpointing_steps", capsys).endswith(
        f"{DECLARED['checkpointing_steps'][1].help} (default: 500, diffusers' LoRA scripts)"
    )
    assert help_of("revision", capsys).endswith(DECLARED["revision"][1].help)
    meaning = find_row("draft-k").declarations["last_k"].help
    assert help_of("last_k", capsys).endswith(f"{meaning} Defaults: draft-k 1.")
    assert "flowbp-sparse" in help_of("num_active", capsys) and "drtune" in help_of("num_active", capsys)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user's module `my_rows`."""
    (tmp_path / "my_rows.py").write_text(ROWS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("rows")
def test_a_row_of_the_user_s_own_has_its_options_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    own = {"method": "my_rows:sharp"}
    expected = get_method("my_rows:sharp", sharpness=4.0)
    for way in (from_command_line, from_recipe):
        config = way(tmp_path, **own, sharpness=4)
        assert config == from_python(tmp_path, **own, method_options={"sharpness": 4.0})
        assert config.make_method("sd3") == expected and config.settings()["sharpness"] == 4.0
        assert way(tmp_path, **own).make_method("flux").options == {"sharpness": 2.0, "last_k": 2}
        assert "sharpness" in error_of(way, tmp_path, **own, sharpness="very")
        # Options of the table's other rows are not there.
        assert "num_active" in error_of(way, tmp_path, **own, num_active=3)
        message = "--method my_rows:clash: its option 'rank' is an option of the run; give it another name"
        assert error_of(way, tmp_path, method="my_rows:clash") == message
    # The command line's method counts.
    (tmp_path / "recipe.yaml").write_text("method: full\n")
    words = ["--config", str(tmp_path / "recipe.yaml"), *command_line({**REQUIRED, **own}, sharpness=4)]
    assert parse_training_config(Everything, "", words).make_method("sd3") == expected
    described = help_of("sharpness", capsys, "--method", "my_rows:sharp")
    assert described.endswith("100% sharp at 1. Defaults: my_rows:sharp 1.")
