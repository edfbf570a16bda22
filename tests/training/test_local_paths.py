# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`~` is the home folder in every option that names a path, alike from the command line, a recipe and Python."""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_scripts import load_script

from flowbp.training import TrainingConfig
from flowbp.training.command_line import add_options, make_config, make_parser, parse_args_with_config
from flowbp.training.options import check_options, declarations, option, without_none

HOME = str(Path("~").expanduser())


@dataclass(frozen=True)
class Config:
    source: str = option(MISSING, "Folder or Hub id.", "group", is_path=True)
    sources: tuple[str, ...] = option((), "NAME=SOURCE.", "group", is_path=True)
    output_dir: Path | None = option(None, "Folder.", "group")
    cache: Path = option(Path("~/cache"), "Folder.", "group")
    note: str = option("", "No path.", "group")

    def __post_init__(self) -> None:
        check_options(self)


def from_python(values: dict[str, Any], folder: Path) -> Config:
    return Config(**values)


def from_command_line(values: dict[str, Any], folder: Path) -> Config:
    parser = make_parser("A script.")
    add_options(parser, Config)
    argv = [
        text for name, value in values.items() for text in (f"--{name}", *([value] if type(value) is str else value))
    ]
    parsed = vars(parse_args_with_config(parser, argv))
    del parsed["config"]
    return make_config(parser, Config, parsed)


def from_recipe(values: dict[str, Any], folder: Path) -> Config:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    return from_command_line({"config": str(recipe)}, folder)


ways = pytest.mark.parametrize("read", [from_python, from_command_line, from_recipe])


@ways
def test_home_folder(read: Any, tmp_path: Path):
    values = {
        "source": "~/model",
        "sources": ["ocr=~/a", "~/b/c", "x=some/id", "~"],
        "output_dir": "~/x",
        "note": "~/as it is",
    }
    config = read(values, tmp_path)
    assert config.source == f"{HOME}/model"
    assert config.sources == (f"ocr={HOME}/a", f"{HOME}/b/c", "x=some/id", HOME)
    assert config.output_dir == Path(HOME, "x") and config.note == "~/as it is"
    # The default is what `settle` and `--help` know; who uses it expands it.
    assert config.cache == Path("~/cache")


@ways
@pytest.mark.parametrize("source", ["owner/name", "owner/na~me", "name", "./a/~/b", "/a=b/c", "a/b=~c", "../x/"])
def test_hub_ids_and_other_paths_are_as_given(read: Any, source: str, tmp_path: Path):
    assert read({"source": source, "sources": [source]}, tmp_path).sources == (source,)
    assert read({"source": source}, tmp_path).source == source


@pytest.mark.parametrize("read", [from_command_line, from_recipe])
def test_a_blank_path_is_not_the_current_folder(read: Any, tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        read({"source": "a", "output_dir": ""}, tmp_path)
    assert "a path expected, got ''" in capsys.readouterr().err


def test_options_of_the_scripts_that_may_name_a_local_path():
    def paths(config_class: type) -> set[str]:
        found = declarations(config_class).items()
        return {name for name, (_, declared, kind) in found if declared.is_path or without_none(kind) is Path}

    both = {"pretrained_model_name_or_path", "quantization_config_path", "prompts", "reward_model_path", "output_dir"}
    training = {"eval_prompts", "resume_from_checkpoint", "logging_dir", "prompt_embeds_dir", "init_lora"}
    assert paths(TrainingConfig) == both | training
    assert paths(load_script("evaluate_flowbp").EvaluationConfig) == both | {"lora", "transformer"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": ""}, "--source: a path expected, got ''; give one or leave the option out"),
        ({"source": "a", "sources": [" "]}, "--sources: a path expected, got ' '"),
        ({"source": "a", "output_dir": ""}, "--output_dir: a path expected, got ''"),
        ({"source": "~no-such-user/x"}, "--source: ~no-such-user/x is in the home folder of an unknown user"),
        ({"source": "a", "output_dir": "~no-such-user"}, "--output_dir: ~no-such-user is in"),
        ({"source": 3}, "--source: str expected, got 3"),
    ],
)
def test_what_is_no_path_is_refused(values: dict[str, Any], message: str):
    with pytest.raises(ValueError) as caught:
        Config(**values)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
