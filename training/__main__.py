# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`python -m flowbp.scripts`: print the scripts, recipes and configurations of accelerate, with their paths."""

from pathlib import Path

from flowbp.files import allow_any_character

FOLDER = Path(__file__).resolve().parent


def table() -> str:
    """Scripts by module name, recipes and configurations of accelerate by file name; one per line, with its path."""
    scripts = {f"flowbp.scripts.{path.stem}": path for path in FOLDER.glob("*.py") if not path.stem.startswith("__")}
    recipes = {path.name: path for path in (FOLDER / "recipes").iterdir()}
    configs = {path.name: path for path in (FOLDER / "accelerate_configs").iterdir()}
    width = max(map(len, [*scripts, *recipes, *configs]))
    parts = []
    for title, files in (
        ("Scripts: accelerate launch -m MODULE --help", scripts),
        ("Recipes: accelerate launch -m MODULE --config PATH, or the name without .yaml", recipes),
        ("Configurations of accelerate: accelerate launch --config_file PATH -m MODULE", configs),
    ):
        parts.append("\n".join([title, *(f"  {name:{width}}  {path}" for name, path in sorted(files.items()))]))
    return "\n\n".join(parts)


if __name__ == "__main__":
    allow_any_character()
    print(table())
