# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Every code block of the documents: Python is run, commands are parsed by the programs that they start.

A block that needs more than a test has says so in its first line, see `MARK`.
"""

import argparse
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from setuptools.config.setupcfg import read_configuration
from training_scripts import ROOT, load_script

from flowbp.training.comparison import backbone_of, planned_runs
from flowbp.training.train_command_line import parse_training_config

FOLDERS = ("", "docs", "training", "benchmarks", "model_cards")
DOCUMENTS = {path.relative_to(ROOT).as_posix(): path for folder in FOLDERS for path in (ROOT / folder).glob("*.md")}
RECIPES = ROOT / "training" / "recipes"
MARK = "# needs real weights"
# Blocks that a test of their own runs, by a piece of their code, which that test looks for too.
ELSEWHERE = {
    "def make_reward": "tests/rewards/test_reward_guide.py",
    "def colourfulness": "tests/rewards/test_reward_guide.py",
    "one_step = Row": "tests/engine/test_methods.py",
    "SD3Transformer2DModel.from_pretrained": "tests/training/test_lora_loading.py",
    "convert_state_dict_to_kohya": "tests/training/test_lora_loading.py",
    "# pipelines/flowbp/": "tests/project/test_documents.py",
    "prompts = ['the text \"42\" in red', 'the text \"7\" in blue']": "tests/project/test_documents.py",
}


class Block(NamedTuple):
    """A fenced or indented block: its language, "" for an indented one, and its text."""

    language: str
    code: str

    @property
    def is_marked(self) -> bool:
        return self.code.startswith(MARK)


def blocks(document: str) -> list[Block]:
    """All of a document, in order."""
    text = DOCUMENTS[document].read_text(encoding="utf-8")
    pattern = r"^```(?P<language>\w*)\n(?P<fenced>.*?)^```$|(?<=\n\n)(?P<indented>(?: {4}(?:make|python) [^\n]*\n)+)"
    found = re.finditer(pattern, text, re.DOTALL | re.MULTILINE)
    return [
        Block(each["language"] or "", each["fenced"] or re.sub("^ {4}", "", each["indented"], flags=re.M))
        for each in found
    ]


def test_the_languages_are_those_that_are_tested() -> None:
    found = {block.language for document in DOCUMENTS for block in blocks(document)}
    assert found == {"", "bash", "python", "yaml"}


# Python.


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What README's code leaves, in a folder of its own that has `demo`; one update in place of 20."""
    folder = tmp_path_factory.mktemp("blocks")
    (folder / "demo").symlink_to(ROOT / "demo")
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks("README.md"):
            if block.language == "python" and not block.is_marked:
                code = block.code.replace("max_train_steps=20", 'max_train_steps=1, report_to="none"')
                exec(compile(code, "README.md", "exec"), found)
        yield found


def test_the_code_of_the_readme_gives_a_gradient(names: dict[str, Any]) -> None:
    gradients = [parameter.grad for parameter in names["pipe"].transformer.parameters() if parameter.requires_grad]
    assert gradients and all(gradient is not None for gradient in gradients)
    assert torch.stack([gradient.norm() for gradient in gradients]).sum() > 0
    assert names["out"].rewards.shape == (1,)
    assert Path(names["result"].weights).exists() and len(names["result"].log) == 1


@pytest.mark.parametrize("document", sorted(set(DOCUMENTS) - {"README.md"}))
def test_python_runs(document: str, names: dict[str, Any]) -> None:
    """With what README's code leaves; a block that another test runs is not run again."""
    python = [block for block in blocks(document) if block.language == "python"]
    if document == "docs/loading.md":
        for folder in ("other-lora", "user/my-lora"):
            shutil.copytree("my-lora", folder)
        pipe = type(names["pipe"]).from_pretrained("demo/pipeline", **names["options"])
        names = {**names, "pipe": pipe}
    for block in python:
        code = compile(block.code, document, "exec")
        tests = [test for piece, test in ELSEWHERE.items() if piece in block.code]
        if not block.is_marked and not tests:
            exec(code, {**names})


def test_other_tests_look_for_the_blocks_that_they_run() -> None:
    python = [block.code for document in DOCUMENTS for block in blocks(document) if block.language == "python"]
    for piece, test in ELSEWHERE.items():
        assert any(piece in code for code in python) and (ROOT / test).is_file(), piece


# Commands.


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command, without comments, variables before it and what its output goes to."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):
            words.pop(0)
        if words:
            yield words


class _Parsed(Exception):
    """A program has understood its words."""


def check_program(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program of this repository parse its words.

    Args:
        words: its path, or `-m` and its module, and its arguments; `...` stands for what every run needs.
    """
    path, *arguments = words if words[0] != "-m" else [words[1].replace("flowbp.scripts.", "training/"), *words[2:]]
    path = path.removesuffix(".py") + ".py"
    if "..." in arguments:
        arguments.remove("...")
        arguments += ["--pretrained_model_name_or_path", "model", "--prompts", "prompts.txt", "--output_dir", "out"]
        arguments += [] if "--reward" in arguments else ["--reward", "toy_reward:make_reward"]
    script = Path(path).stem
    if path.startswith("training/train"):
        backbone = backbone_of(load_script(script), ROOT / path)
        parse_training_config(backbone, "", arguments, RECIPES)
    elif path.startswith("training/"):
        load_script(script).parse_config(arguments)
    else:
        parse_args = argparse.ArgumentParser.parse_args

        def parse_and_stop(*given: Any, **options: Any) -> None:
            parse_args(*given, **options)
            raise _Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        monkeypatch.syspath_prepend(ROOT / Path(path).parent)
        main = runpy.run_path(str(ROOT / path))["main"]
        with pytest.raises((_Parsed, SystemExit)) as ended:
            main()
        # --help ends with 0.
        assert ended.type is _Parsed or not ended.value.code, words


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail for a command that would not start."""
    program, *rest = words
    if program.startswith("--"):
        check_program(
            ["training/train_flowbp_sd3.py", "--pretrained_model_name_or_path", "x", *words, "..."], monkeypatch
        )
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), words
    elif program == "pip":
        extras = read_configuration(ROOT / "setup.cfg")["options"]["extras_require"]
        asked = re.findall(r"\[([\w,]+)\]", " ".join(rest))
        assert rest[0] == "install" and asked and set(",".join(asked).split(",")) <= set(extras), words
    elif program == "accelerate":
        arguments = launch_command_parser().parse_args(rest[1:])
        assert rest[0] == "launch" and (arguments.config_file is None or (ROOT / arguments.config_file).is_file())
        module = ["-m"] if arguments.module else []
        check_program([*module, arguments.training_script, *arguments.training_script_args], monkeypatch)
    elif program in ("python", ".venv/bin/python"):
        check_program(rest, monkeypatch)
    elif program == "echo":
        json.loads(rest[0])
    else:
        raise AssertionError(f"no check for {words}")


def comparison() -> str:
    """The only recipe in the documents."""
    (recipe,) = [block.code for document in DOCUMENTS for block in blocks(document) if block.language == "yaml"]
    return recipe


SHELL = [(document, block) for document in DOCUMENTS for block in blocks(document) if block.language in ("", "bash")]


@pytest.mark.parametrize(
    ("document", "block"), SHELL, ids=[f"{document}-{i}" for i, (document, _) in enumerate(SHELL)]
)
def test_commands_are_understood(document: str, block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("comparison.yaml").write_text(comparison())
    for words in commands(block.code):
        with monkeypatch.context() as patch:
            check_command(words, patch)
        # Training and judging take a model, and that of the demo is not named in a block.
        assert block.is_marked or not re.search(r"train_flowbp|evaluate_flowbp|^--", " ".join(words)), words


def test_the_runs_of_the_comparison_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("comparison.yaml").write_text(comparison())
    config = load_script("compare_flowbp").parse_config(["--config", "comparison.yaml"])
    runs, _ = planned_runs(config, RECIPES)
    assert len(runs) == 4 * 3 * 2  # methods, seeds, learning rates
    backbone = backbone_of(load_script(config.script), ROOT / "training" / f"{config.script}.py")
    for run in runs:
        parse_training_config(backbone, "", run.words(), RECIPES)
