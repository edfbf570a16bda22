# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""docs/quickstart.ipynb runs from a clone, and was committed with clean outputs of its own code."""

import copy
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from safetensors.torch import load_file
from training_scripts import ROOT

DOCS = ROOT / "docs"


@pytest.fixture
def run_quickstart() -> ModuleType:
    """docs/run_quickstart.py as a module."""
    spec = importlib.util.spec_from_file_location("run_quickstart", DOCS / "run_quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def committed() -> nbformat.NotebookNode:
    """The notebook as it is in the repository."""
    return nbformat.read(DOCS / "quickstart.ipynb", as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> dict[str, nbformat.NotebookNode]:
    """Cells with code by their ids."""
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def kinds(cell: nbformat.NotebookNode) -> list[str]:
    """What the outputs of a cell are: streams by name, others by their media types."""
    return [output.get("name") or " ".join(sorted(output.data)) for output in cell.outputs]


def printed(cell: nbformat.NotebookNode) -> str:
    """What a cell prints."""
    return "".join(output.text for output in cell.outputs if "text" in output)


def test_the_notebook_runs_and_writes_a_lora(
    run_quickstart: ModuleType, committed: nbformat.NotebookNode, tmp_path: Path
) -> None:
    executed = run_quickstart.run(tmp_path, DOCS, updates=2)
    lora = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    # The B matrices start at zero. The last block has no output for the text.
    trained = [bool((tensor != 0).any()) for name, tensor in lora.items() if re.search(r"attn\.to_\w+.*lora_B", name)]
    assert trained and all(trained)
    assert (tmp_path / "reward_curve.png").exists()
    expected, found = code_cells(committed), code_cells(executed)
    # The committed outputs are those of this code; numbers that a CPU rounds in its own way are left out.
    assert {name: kinds(cell) for name, cell in found.items()} == {
        name: kinds(cell) for name, cell in expected.items()
    }
    assert printed(found["kept"]) == printed(expected["kept"])
    weights = [re.findall("step .*(?=, gradient norm)", printed(cells["terms"])) for cells in (found, expected)]
    assert weights[0] == weights[1] and len(weights[0]) == 4
    assert "within the bound" in printed(found["compare"])
    assert "update 2 of 2" in printed(found["training"])


@pytest.mark.parametrize("folder", [ROOT, DOCS], ids=["root", "docs"])
def test_files_are_found_from_the_root_and_from_docs(
    folder: Path, committed: nbformat.NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("QUICKSTART_OUTPUT_DIR", str(tmp_path))
    names: dict[str, Path] = {}
    exec(compile(code_cells(committed)["setup"].source, "quickstart.ipynb", "exec"), names)
    assert names["demo"].resolve() == ROOT / "demo" and names["output_dir"] == tmp_path


def write_notebook(path: Path, source: str) -> None:
    """A notebook of one cell."""
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), path)


def test_a_cell_that_fails_fails_the_run(run_quickstart: ModuleType, tmp_path: Path) -> None:
    run_quickstart.NOTEBOOK = tmp_path / "failing.ipynb"
    write_notebook(run_quickstart.NOTEBOOK, "assert 1 + 1 == 3")
    with pytest.raises(CellExecutionError, match="AssertionError"):
        run_quickstart.run(tmp_path, tmp_path)


def test_a_number_of_updates_that_is_not_found_is_an_error(run_quickstart: ModuleType, tmp_path: Path) -> None:
    run_quickstart.NOTEBOOK = tmp_path / "other.ipynb"
    write_notebook(run_quickstart.NOTEBOOK, "max_train_steps = 1")
    with pytest.raises(ValueError, match="expected one cell with max_train_steps=.*, got 0"):
        run_quickstart.run(tmp_path, tmp_path, updates=2)


def test_outputs_are_cleaned(run_quickstart: ModuleType) -> None:
    outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="a warning"),
        nbformat.v4.new_output("stream", name="stdout", text="Done\n  time  1 min 2 s\n  files  /tmp/folder/x\n"),
        nbformat.v4.new_output("display_data", data={"image/png": "a", "image/jpeg": "b", "text/plain": "c"}),
    ]
    cell = nbformat.v4.new_code_cell("", outputs=outputs, metadata={"execution": {"iopub.execute_input": "now"}})
    notebook = nbformat.v4.new_notebook(
        cells=[cell], metadata={"language_info": {"name": "python", "version": "3.11.7"}}
    )
    run_quickstart.clean(notebook, Path("/tmp/folder"))
    assert kinds(cell) == ["stdout", "image/png text/plain"]
    assert printed(cell) == "Done\n  files  quickstart-lora/x\n"
    assert cell.metadata == {} and "version" not in notebook.metadata["language_info"]


def test_the_committed_outputs_are_complete_clean_and_small(
    run_quickstart: ModuleType, committed: nbformat.NotebookNode
) -> None:
    cells = list(code_cells(committed).values())
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum("image/png" in kind for cell in cells for kind in kinds(cell)) == 4
    cleaned = copy.deepcopy(committed)
    run_quickstart.clean(cleaned, Path("/tmp/folder"))
    assert cleaned == committed, "run docs/run_quickstart.py --write"
    text = "".join(map(printed, cells))
    assert re.findall(r"(?:^|[\s\"'(])/\w+", text) == [] and "Warning" not in text
    assert (DOCS / "quickstart.ipynb").stat().st_size < 600_000


def test_links_lead_to_files_and_headings(committed: nbformat.NotebookNode) -> None:
    text = "\n".join(cell.source for cell in committed.cells if cell.cell_type == "markdown")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets
    for target in targets:
        name, _, heading = target.partition("#")
        assert (DOCS / name).is_file(), target
        titles = re.findall(r"^#+ (.+)$", (DOCS / name).read_text(encoding="utf-8"), re.MULTILINE)
        anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not heading or heading in anchors, target
