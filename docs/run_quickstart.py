# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Executes docs/quickstart.ipynb. Needs the extra `test`.

`python docs/run_quickstart.py` runs the notebook, `python docs/run_quickstart.py --write` saves its outputs too.
"""

import argparse
import os
import re
import tempfile
from pathlib import Path
from unittest.mock import patch

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent / "quickstart.ipynb"
UPDATES = "max_train_steps=32"
SHOWN_FOLDER = "quickstart-lora"


def run(folder: Path, working_directory: Path, updates: int | None = None) -> nbformat.NotebookNode:
    """Execute the notebook in a fresh kernel.

    Args:
        folder: where it writes the LoRA.
        working_directory: the root of the repository, or docs.
        updates: of the training run, in place of the notebook's.

    Returns:
        The notebook with clean outputs.

    Raises:
        CellExecutionError: where a cell raises an error; with its traceback.
        ValueError: where the notebook does not set its number of updates in the expected way.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    if updates is not None:
        cells = [cell for cell in notebook.cells if UPDATES in cell.source]
        if len(cells) != 1:
            raise ValueError(f"{NOTEBOOK.name}: expected one cell with {UPDATES}, got {len(cells)}; change UPDATES")
        cells[0].source = cells[0].source.replace(UPDATES, f"max_train_steps={updates}")
    with tempfile.TemporaryDirectory() as settings:
        # The user's kernels and settings have no effect, and nothing is written to the home folder.
        private = dict.fromkeys(
            ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"), settings
        )
        with patch.dict(os.environ, {**private, "QUICKSTART_OUTPUT_DIR": str(folder), "HF_HUB_OFFLINE": "1"}):
            NotebookClient(
                notebook,
                timeout=300,
                kernel_name="python3",
                resources={"metadata": {"path": str(working_directory)}},
                record_timing=False,
            ).execute()
    clean(notebook, folder)
    return notebook


def clean(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Remove what differs from run to run, and images that are there twice.

    These are progress bars, warnings, the time that training took, the output folder's path and Python's version.
    """
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "text" in output:
                    output.text = output.text.replace(str(folder), SHOWN_FOLDER)
                    output.text = re.sub(r"^  time .*\n", "", output.text, flags=re.MULTILINE)
                # PIL images come as PNG and as JPEG.
                output.get("data", {}).pop("image/jpeg", None)


def main() -> None:
    """Run the notebook, and save it where that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="Save the outputs.")
    write = parser.parse_args().write
    with tempfile.TemporaryDirectory() as folder:
        notebook = run(Path(folder), NOTEBOOK.parent)
    if write:
        nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
