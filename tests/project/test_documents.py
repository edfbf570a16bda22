# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What the documents say: links that lead somewhere, options that there are, and how modules are made."""

import ast
import graphlib
import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from training_scripts import ROOT, load_script

from flowbp.methods import METHODS, OPTIONS, Option, Row
from flowbp.training import TrainingConfig
from flowbp.training.comparison import ComparisonConfig
from flowbp.training.options import declarations

DOCUMENTS = [
    path for folder in ("", "docs", "training", "benchmarks", "model_cards") for path in (ROOT / folder).glob("*.md")
]


@pytest.mark.parametrize(
    "document", [*DOCUMENTS, *(ROOT / "upstream").glob("*.md")], ids=lambda path: path.relative_to(ROOT).as_posix()
)
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


def test_every_document_is_linked_from_a_readme() -> None:
    readmes = [(ROOT / folder / "README.md").read_text(encoding="utf-8") for folder in (".", "training", "benchmarks")]
    for document in (ROOT / "docs").iterdir():
        if document.suffix in (".md", ".ipynb", ".png"):
            assert any(document.name in readme for readme in readmes), document.name


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
    configs = (TrainingConfig, ComparisonConfig, load_script("evaluate_flowbp").EvaluationConfig)
    known |= {f"--{option}" for options in (OPTIONS, *map(declarations, configs)) for option in options}
    # argparse's own and a negative, accelerate's, pip's.
    others = {"--help", "--no-offload", "--no-unconditional_gradient", "--config_file", "--no-deps", "--dry-run"}
    for document in DOCUMENTS:
        found = set(re.findall(r"(?<![\w-])(--[a-z][\w-]+)", document.read_text(encoding="utf-8")))
        assert found <= known | others, (document, found - known - others)


def test_errors_in_troubleshooting_are_errors_of_the_code() -> None:
    """Each piece of a quoted message, as the literals that it is made of say it."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## Errors that come first")[2]
    messages = [each for row in rows_of_tables(text) for each in re.findall("`(.+?)`", row)]
    assert len(messages) > 8
    code = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    # Implicitly joined literals, and what is filled in.
    code = re.sub(r"\{[^{}\n]*\}", "...", re.sub(r'"\n\s*f?"', "", code))
    for message in messages:
        assert all(piece.strip() in code for piece in message.split("...")), message


# docs/life_of_a_gradient.md: the update that it follows, and the names that it mentions.

LIFE = ROOT / "docs" / "life_of_a_gradient.md"
PACKAGE = ROOT / "pipelines" / "flowbp"
ENGINE_MODULES = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}


def modules_of_package() -> dict[str, Path]:
    """Files of the modules of the package by their dotted names below it; "" is the package itself."""
    paths = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix("__init__").removesuffix("."): path for name, path in paths.items()}


def imports_of(path: Path, for_types: bool = True) -> set[str]:
    """Dotted names of the modules of the package that one of its files imports, at its top or in a function.

    Args:
        path: of the file.
        for_types: also what only type checkers import.
    """
    tree, known = ast.parse(path.read_text(encoding="utf-8")), modules_of_package()
    if not for_types:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        # The package that each dot stands for.
        folder = path.parents[node.level - 1].relative_to(PACKAGE).parts if node.level else ()
        parts = (node.module or "").split(".")
        if not node.level and parts.pop(0) != PACKAGE.name:
            continue
        module = ".".join(filter(None, (*folder, *parts)))
        names = [f"{module}.{each.name}".removeprefix(".") for each in node.names]
        found |= {name if name in known else module for name in names}
    return found - {".".join(path.relative_to(PACKAGE).with_suffix("").parts)}


def imported_by(module: str) -> set[str]:
    """Modules of the package that a module of the engine imports."""
    return imports_of(PACKAGE / f"{module}.py")


def rows_of_tables(text: str) -> dict[str, list[str]]:
    """`{first cell: other cells}` of all tables."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", text, re.MULTILINE)
    ]
    return {row[0]: row[1:] for row in rows}


def test_the_update_that_the_page_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = LIFE.read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], LIFE.name, "exec"), names)
    gradients = [parameter.grad for parameter in names["pipe"].transformer.parameters() if parameter.requires_grad]
    assert gradients and all(gradient is not None for gradient in gradients)
    trajectory, rows = names["callback"].trajectory, rows_of_tables(text)
    terms = trajectory.surrogate.terms
    assert rows["step"] == [str(term.step) for term in terms]
    assert rows["weight"] == [f"{term.weight:.3f}" for term in terms]
    assert rows["coupling"] == [f"{term.coupling:g}" for term in terms]
    with_latents = [number for number, step in trajectory.steps.items() if step.latents is not None]
    for name, steps in (
        ("`Trajectory.latents`", trajectory.latents),
        ("`Trajectory.velocities`", trajectory.velocities),
        ("`Trajectory.steps`", trajectory.steps),
        ("`ActiveStep.latents`", with_latents),
    ):
        assert rows[name][0] == ", ".join(map(str, sorted(steps))), name


def test_the_page_quotes_the_code() -> None:
    text = LIFE.read_text(encoding="utf-8")
    quoted = re.findall(r"```python\n# (pipelines/\S+)\n(.*?)```", text, re.DOTALL)
    assert quoted
    for name, code in quoted:
        lines = {line.strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()}
        assert {line.strip() for line in code.splitlines()} - {"..."} <= lines, name


def resolves(name: str, classes: dict[str, type]) -> bool:
    """Whether `module.name`, `module.Class.name` or `Class.name` is in the engine."""
    first, *others = name.split(".")
    found: Any = classes[first] if first in classes else importlib.import_module(f"flowbp.{first}")
    for other in others:
        # Fields of dataclasses are not attributes of the class.
        if isinstance(found, type) and other in getattr(found, "__dataclass_fields__", {}):
            return True
        if not hasattr(found, other):
            return False
        found = getattr(found, other)
    return True


def test_the_page_names_what_there_is() -> None:
    text = LIFE.read_text(encoding="utf-8")
    modules = [importlib.import_module(f"flowbp.{name}") for name in sorted(ENGINE_MODULES)]
    classes = {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__.startswith("flowbp")
    }
    dotted = set(re.findall(r"`([A-Za-z_]+(?:\.[A-Za-z_]+)+)`", text))
    of_engine = {name for name in dotted if name.partition(".")[0] in ENGINE_MODULES | set(classes)}
    # Others are torch's, diffusers' and the pipeline's.
    assert dotted - of_engine == {"flowbp.verify", "scheduler.step", "vae.decode", "torch.utils.checkpoint"}
    assert len(of_engine) > 40
    assert [name for name in sorted(of_engine) if not resolves(name, classes)] == []
    # And the other way round: every module of the engine has its place in an update.
    linked = set(re.findall(r"\]\(\.\./pipelines/flowbp/(\w+)\.py\)", text))
    assert linked <= ENGINE_MODULES
    assert imported_by("callback") <= linked | {"host"}


def test_modules_do_not_import_what_they_must_not_know() -> None:
    """The last column of CONTRIBUTING's table of modules."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"\| does not import \|\n\|---\|---\|---\|\n((?:\|.*\n)+)", text)
    seen = set()
    for line in table.splitlines():
        owners, _, others = line.strip("|").split("|")
        forbidden = set(re.findall(r"`(\w+)`", others)) or ENGINE_MODULES
        assert forbidden <= ENGINE_MODULES, line
        for owner in re.findall(r"`(\w+)`", owners):
            seen.add(owner)
            assert not imported_by(owner) & forbidden, (owner, imported_by(owner) & forbidden)
    # What the engine imports is in the table too.
    assert set().union(*map(imported_by, seen)) <= seen


def package_of(module: str) -> str:
    """The subpackage that a module is in, "engine" for those in none."""
    first = module.partition(".")[0]
    return first if first and (PACKAGE / first).is_dir() else "engine"


def test_packages_import_in_one_direction() -> None:
    """The last column of CONTRIBUTING's table of packages."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"\| may import \|\n\|---\|---\|---\|\n((?:\|.*\n)+)", text)
    allowed: dict[str, set[str]] = {"engine": set()}
    for line in table.splitlines():
        package, owned, others = line.strip("|").split("|")
        package = package.strip(" `")
        named = set(re.findall(r"`(\w+)`", others)) | {"engine"}
        assert allowed.setdefault(package, named) == named, line
        named_modules = {name for name in re.findall(r"`(\w+)`", owned) if name.islower()}
        assert all((PACKAGE / package / f"{name}.py").is_file() for name in named_modules), line
    # The package's own names are for its users.
    modules = {module: path for module, path in modules_of_package().items() if module}
    edges = {(package_of(module), package_of(other)) for module, path in modules.items() for other in imports_of(path)}
    assert {
        ("training", "judging"),
        ("training", "publishing"),
        ("judging", "rewards"),
        ("training", "engine"),
    } < edges
    for package, other in edges:
        assert package == other or other in allowed[package], (package, other)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: imports_of(path, for_types=False) for module, path in modules_of_package().items()}
    assert graph["training.loop"] >= {"callback", "training.setup"}
    graphlib.TopologicalSorter(graph).prepare()
