# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Bad command lines of the training scripts: one line, an exit code that is not 0, quickly, and no weights loaded.

What only one script has is tested with that script.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_pipelines import tiny_flux_pipeline, tiny_klein_pipeline
from tiny_sd3 import tiny_sd3_pipeline
from training_scripts import (
    CheckRefusal,
    ErrorOf,
    accelerate_launch,
    arguments_of_run,
    command_line,
    environment,
    run_program,
    script_path,
)
from warm_python import warm

MODELS = {
    "train_flowbp_sd3": lambda: tiny_sd3_pipeline(torch.float32),
    "train_flowbp_flux": tiny_flux_pipeline,
    "train_flowbp_flux2": tiny_klein_pipeline,
    "train_flowbp": tiny_flux_pipeline,
}
# A model that another script is for.
OTHERS = {
    "train_flowbp_sd3": "train_flowbp_flux",
    "train_flowbp_flux": "train_flowbp_sd3",
    "train_flowbp_flux2": "train_flowbp_flux",
}
TIME_LIMIT = 20  # seconds


pytestmark = pytest.mark.usefixtures("no_dataset_bars")


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of a script, whose files of weights hold none: whatever loads them fails in another way."""
    root = tmp_path_factory.mktemp("models")

    def folder_of(name: str) -> Path:
        if not (root / name).exists():
            MODELS[name]().save_pretrained(root / name)
            weights = list((root / name).rglob("*.safetensors"))
            assert len(weights) >= 3
            for file in weights:
                save_file({}, file, metadata={"format": "pt"})
        return root / name

    return folder_of


@pytest.fixture
def arguments_of(configs: Callable[[str], Path], tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """A script's arguments, which are good."""

    def make(name: str) -> dict[str, Any]:
        size: dict[str, Any] = {"resolution": 8, "max_sequence_length": 16}
        if name == "train_flowbp":
            size = {"height": 8, "width": 8, "pipeline_arguments": {"max_sequence_length": 16}}
        return arguments_of_run(configs(name), tmp_path, **size)

    return make


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that bad command lines name; the working directory."""
    contents: dict[str, bytes] = {
        "empty.txt": b"",
        "latin.txt": 'the text "42"\na caf\u00e9\n'.encode("latin-1"),
        "two.jsonl": b'{"a": "x", "b": "y"}\n',
        "unquoted.txt": b"a seven\n",
        "file": b"x",
        "key.yaml": b"last_j: 3\n",
        "value.yaml": b"rank: four\n",
        "broken/model_index.json": b"{",
        "list/model_index.json": b"[1]",
        "list/vae/config.json": b"[1]",
        "list/transformer/config.json": b"[1]",
        "nothing/weights.bin": b"x",
        "bad_rewards.py": b"def raising():\n    raise RuntimeError('one\\ntwo')\n",
        "reward_that_raises.py": b"raise RuntimeError('one\\ntwo')\n",
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


# What is wrong -> the arguments that say it, and what the one line must say. Files are those of `folder`. A few of
# each kind: `test_config`, `test_command_line`, `test_prompts`, `test_rewards`, `test_loading_models` have the others.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    # Prompts.
    "empty prompts": ({"prompts": "empty.txt"}, "'empty.txt' holds no prompts: at least one is needed"),
    "prompts in Latin-1": ({"prompts": "latin.txt"}, "line 2 of 'latin.txt' is not UTF-8: save the file as UTF-8"),
    "absent column": ({"prompts": "two.jsonl", "prompt_column": "c"}, "has no column 'c': choose one of a, b"),
    "absent evaluation prompts": ({"eval_prompts": "absent.txt"}, "no file 'absent.txt': check the path"),
    # Counts and ranges.
    "no updates": ({"max_train_steps": 0}, "--max_train_steps must be at least 1, got 0"),
    # Methods.
    "unknown method": ({"method": "flowbp-dense"}, "Unknown method 'flowbp-dense' (nearest: 'flowbp-sparse'); choose"),
    "another method's option": ({"method": "draft-k", "last_n": 3}, "draft-k has no option 'last_n' (nearest:"),
    "K above N": ({"method": "flowbp-sparse", "num_active": 7}, "use at most 6"),
    "too few steps": ({"method": "leapalign", "num_inference_steps": 2}, "needs at least 3; raise"),
    "unknown weights": ({"weights": "simpson"}, "invalid choice: 'simpson'"),
    # Rewards.
    "unknown reward": ({"reward": "orc"}, "got 'orc'; the nearest is 'o"),
    "factory that raises": ({"reward": "bad_rewards:raising"}, "raising': its factory raised RuntimeError"),
    "module that raises": ({"reward": "reward_that_raises:make"}, "RuntimeError: one two"),
    "unknown held-out reward": ({"eval_reward": "orc"}, "got 'orc'; the nearest is 'o"),
    "weights of an unknown reward": ({"reward_model_path": "orc=nothing"}, "got one of 'orc'"),
    "absent folder of weights": ({"reward": "clip", "reward_model_path": "clip=absent"}, "absent is not a folder"),
    "weights that cannot be had": ({"reward": "clip"}, "the files are not in the cache and the Hub cannot be reached"),
    "prompts without a text to read": ({"reward": "ocr", "prompts": "unquoted.txt"}, "between double quotes"),
    "augmentation that nothing reads": ({"reward_augment": True}, "make_reward does not have it, expected an ocr"),
    # Folders and files.
    "absent checkpoint": ({"resume_from_checkpoint": "latest"}, "--resume_from_checkpoint latest: "),
    "absent checkpoint path": ({"resume_from_checkpoint": "checkpoint-9"}, "checkpoint-9"),
    "a folder that is no checkpoint": ({"resume_from_checkpoint": "nothing"}, "nothing"),
    "checkpoint of an empty name": ({"resume_from_checkpoint": ""}, "checkpoint"),
    "absent model": ({"pretrained_model_name_or_path": "./no-model"}, "no-model"),
    "absent model of the Hub": ({"pretrained_model_name_or_path": "user/no-model"}, "user/no-model"),
    "folder without a model": ({"pretrained_model_name_or_path": "nothing"}, "nothing"),
    "broken model index": ({"pretrained_model_name_or_path": "broken"}, "broken"),
    "list for a model index": ({"pretrained_model_name_or_path": "list"}, "list"),
    "file for a model": ({"pretrained_model_name_or_path": "file"}, "file"),
    "absent recipe": ({"config": "absent.yaml"}, "--config absent.yaml: cannot be read: No such file"),
    "unknown key in a recipe": ({"config": "key.yaml"}, "unknown key last_j: did you mean last_"),
    "bad value in a recipe": ({"config": "value.yaml", "rank": None}, "--config value.yaml: rank: int expected"),
    "absent quantisation": ({"quantization_config_path": "no.json"}, "config_path no.json: FileNotFound"),
    # The rest.
    "unknown option": ({"learning_rat": 1}, "--learning_rat: did you mean --learning_rate?"),
    "no reward": ({"reward": None}, "the following arguments are required: --reward"),
    "no prompts": ({"prompts": None}, "the following arguments are required: --prompts"),
    "unknown tracker": ({"report_to": "tensorbord"}, "tensorbord"),
    "no layers": ({"lora_layers": ""}, "--lora_layers"),
}
SIZE = {name: {"resolution": 10} for name in MODELS} | {"train_flowbp": {"height": 10}}


@pytest.mark.parametrize("script", MODELS)
@pytest.mark.parametrize("case", BAD)
def test_a_bad_command_line_is_one_line_before_any_model(
    arguments_of: Callable[[str], dict[str, Any]], folder: Path, case: str, script: str, check_refusal: CheckRefusal
):
    changes, message = BAD[case]
    check_refusal(script, {**arguments_of(script), **changes}, message)


@pytest.mark.parametrize("script", MODELS)
def test_a_size_that_the_model_cannot_have(
    arguments_of: Callable[[str], dict[str, Any]], script: str, check_refusal: CheckRefusal
):
    (option,) = SIZE[script]
    message = f"--{option} must be a multiple of 4 for this model, got 10; use 8"
    check_refusal(script, {**arguments_of(script), **SIZE[script]}, message)


@pytest.mark.parametrize("script", OTHERS)
def test_a_model_of_another_pipeline(
    arguments_of: Callable[[str], dict[str, Any]],
    configs: Callable[[str], Path],
    script: str,
    check_refusal: CheckRefusal,
):
    changes = {"pretrained_model_name_or_path": configs(OTHERS[script])}
    check_refusal(script, {**arguments_of(script), **changes}, "Pipeline")


@pytest.mark.parametrize("script", MODELS)
@pytest.mark.parametrize("where", ["a file", "below a file", "not for us"])
def test_an_output_folder_that_cannot_be(
    arguments_of: Callable[[str], dict[str, Any]],
    folder: Path,
    script: str,
    where: str,
    error_of: ErrorOf,
):
    # /proc has no room for folders, root's neither.
    output = {"a file": folder / "file", "below a file": folder / "file" / "run", "not for us": Path("/proc/run")}[
        where
    ]
    printed = refusal_of(script, {**arguments_of(script), "output_dir": output}, error_of)
    assert str(output) in printed and (folder / "file").read_bytes() == b"x"


def refusal_of(script: str, arguments: dict[str, Any], error_of: ErrorOf) -> str:
    """The one line of a refusal, where the output folder is what is wrong."""
    printed = error_of(script, command_line(arguments))
    assert len(printed.splitlines()) == 1 and printed.startswith(f"{script}.py: error: ")
    return printed


# As users start it.

STARTED = {
    "empty prompts": "train_flowbp_sd3",
    "prompts in Latin-1": "train_flowbp_flux",
    "no updates": "train_flowbp_flux2",
    "unknown method": "train_flowbp",
    "another method's option": "train_flowbp_sd3",
    "K above N": "train_flowbp_flux",
    "absent checkpoint path": "train_flowbp_flux2",
    "unknown reward": "train_flowbp",
}


def errors_of(command: list[str], variables: dict[str, str]) -> list[str]:
    """The lines that a program which fails writes to stderr; it prints nothing."""
    done = run_program(command, variables, check=False)
    assert done.returncode in (1, 2) and not done.stdout, done
    return [line for line in done.stderr.splitlines() if not line.startswith("[transformers]")]


@pytest.mark.parametrize("case", STARTED)
def test_a_bad_command_line_of_a_program(arguments_of: Callable[[str], dict[str, Any]], folder: Path, case: str):
    """Its weights hold none, so it would say something else if it read them. The first starts as it does for users."""
    (changes, message), script = BAD[case], STARTED[case]
    arguments, is_cold = arguments_of(script), case == next(iter(STARTED))
    command = [sys.executable, str(script_path(script)), *command_line({**arguments, **changes})]
    before = os.times()
    errors = errors_of(command, environment() if is_cold else warm(environment()))
    assert len(errors) == 1 and errors[0].startswith(f"{script}.py: error: ") and message in errors[0], errors
    # Of a processor, which is what it needs where nothing else runs.
    assert not is_cold or os.times().children_user - before.children_user < TIME_LIMIT
    assert not arguments["output_dir"].exists()


def test_a_bad_command_line_by_accelerate_launch(arguments_of: Callable[[str], dict[str, Any]]):
    """accelerate adds what its process ended with."""
    command = accelerate_launch("train_flowbp", command_line(arguments_of("train_flowbp"), height=10))
    errors = errors_of(command, warm(environment()))
    lines = [line for line in errors if line.startswith("train_flowbp.py: error: ")]
    assert len(lines) == 1 and "--height must be a multiple of 4 for this model, got 10; use 8" in lines[0], errors


@pytest.mark.parametrize("script", MODELS)
def test_a_good_command_line_gets_as_far_as_the_weights(
    arguments_of: Callable[[str], dict[str, Any]], script: str, error_of: ErrorOf
):
    """Else the tests above could pass by refusing everything."""
    with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
        error_of(script, command_line(arguments_of(script)))
