# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the documents say: code that runs, links that lead somewhere, options that there are."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from training_scripts import ROOT

from flowbp.methods import METHODS, OPTIONS, Option, Row

DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "training" / "README.md"]


def test_the_code_of_the_readme_gives_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "callback.backward" in block]
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    gradients = [parameter.grad for parameter in names["pipe"].transformer.parameters() if parameter.requires_grad]
    assert gradients and all(gradient is not None for gradient in gradients)
    assert torch.stack([gradient.norm() for gradient in gradients]).sum() > 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_to_files_and_headings_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, target


def test_the_table_of_options_is_that_of_the_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("methods_table", ROOT / "docs" / "methods_table.py")
    methods_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(methods_table)
    text = methods_table.DOCUMENT.read_text(encoding="utf-8")
    assert methods_table.updated(text) == text, "run docs/methods_table.py --write"
    # One line for a row with a default of its own.
    monkeypatch.setitem(OPTIONS, "sharpness", Option("sharpness", OPTIONS["alpha"].kind, "How sharp."))
    row = Row(METHODS["full"].draw, "New", "here", {"sharpness": {"sd3": 1.5, "flux": 2.0, "flux2": 0}})
    monkeypatch.setitem(METHODS, "new", row)
    line = "| `sharpness` | `new` | a number of at least 0 | 1.5 / 2 / 0 | How sharp. |"
    assert line not in text and line in methods_table.updated(text).splitlines()


def test_options_in_the_documents_are_options() -> None:
    # The quoted words of our programs, and what they generate.
    folders = ("training", "pipelines", "benchmarks", "demo", "docs")
    programs = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    known = {
        option for path in programs for option in re.findall(r"\"(--[a-z0-9_-]+)\"", path.read_text(encoding="utf-8"))
    }
    known |= {f"--{option}" for option in OPTIONS}
    # argparse's own and a negative, accelerate's, pip's.
    others = {"--help", "--no-offload", "--config_file", "--no-deps"}
    for document in DOCUMENTS:
        found = set(re.findall(r"(?<![\w-])(--[a-z][\w-]+)", document.read_text(encoding="utf-8")))
        assert found <= known | others, (document, found - known - others)
