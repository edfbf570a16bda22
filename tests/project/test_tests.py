# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Where tests are: in the folders that CONTRIBUTING.md names, and no module of tests needs another one."""

import ast
import re
from pathlib import Path

import pytest
from training_scripts import ROOT

TESTS = ROOT / "tests"
MODULES = sorted(TESTS.rglob("*.py"))
# They use helpers of the tests too.
OTHERS = sorted(path for folder in ("benchmarks", "demo", "docs") for path in (ROOT / folder).rglob("*.py"))


def imported(code: str) -> set[str]:
    """Modules that some code imports, and those that code in its strings does, which runs in other processes."""
    modules = set(re.findall(r"^\s*(?:from|import) +([\w.]+)", code, re.MULTILINE))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module or ""} | {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            modules |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return modules


def modules_of_tests(code: str) -> set[str]:
    """The modules of tests among them."""
    return {name for name in imported(code) if re.search(r"(?:^|\.)(?:test_\w+|conftest)$", name)}


@pytest.mark.parametrize(
    "code",
    [
        "from test_x import y",
        "import os, test_x as x",
        "from engine import test_x",
        "from tests.engine.test_x import y",
        "def f():\n    import test_x",
        'CODE = """\nfrom test_x import y\n"""',
        "importlib.import_module('test_x')",
    ],
)
def test_imports_of_tests_are_seen(code: str) -> None:
    assert len(modules_of_tests(code)) == 1
    assert not modules_of_tests(code.replace("test_x", "latest_x"))


@pytest.mark.parametrize("path", [*MODULES, *OTHERS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_needs_one_of_tests(path: Path) -> None:
    """What several share is in tests/support."""
    found = modules_of_tests(path.read_text(encoding="utf-8"))
    assert not found, f"move what it needs of {', '.join(found)} to tests/support"


def test_folders_and_files_are_those_of_the_table() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"\| folder \| what changed \| tests \|\n\|---\|---\|---\|\n((?:\|.*\n)+)", text)
    folders = set()
    for line in table.splitlines():
        folder, _, tests = (re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split("|"))
        (folder,) = folder
        folders.add(folder)
        for name in tests:
            assert list((ROOT / folder).glob(name)) or list((TESTS / "support").glob(name)), (folder, name)
    assert folders == {path.parent.relative_to(ROOT).as_posix() for path in MODULES if path.name.startswith("test_")}


def test_names_of_modules_differ() -> None:
    """pytest imports modules of tests by name, as there are no packages of tests."""
    names = [path.name for path in MODULES if path.parent.parent == TESTS]
    assert len(names) == len(set(names)) > 50
