# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The package that pip installs: what is in the wheel and the sdist, and that a run needs no clone of the repository.

Each kind of installation gets a virtual environment whose dependencies are those of the tests' own environment, by a
`.pth` file. Python does not follow the `.pth` files of a folder that was added so: the editable installation of the
tests' environment is not there.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

import pytest
import yaml
from check_release import problems
from huggingface_hub import ModelCard
from resume_harness import sd3_arguments
from training_scripts import ROOT, check_run, command_line

import flowbp

SUPPORT = ROOT / "tests" / "support"
REPOSITORY = "https://github.com/user/name"
SOURCES = "README.md LICENSE setup.py setup.cfg pyproject.toml pipelines training tests demo model_cards".split()
# The package of each folder, which is in the distributions without the files that only a checkout needs.
PACKAGES = {"pipelines/flowbp": "flowbp", "training": "flowbp/scripts"}
PATTERNS = ("*.py", "*.yaml", "*.json", "*.jinja", "publishing/*.md", "recognisers/*", "py.typed")


def run(*words: str | Path, cwd: Path, modules: Sequence[Path] = ()) -> str:
    """What a program prints that must succeed.

    Args:
        words: the program and its arguments.
        cwd: outside of the repository.
        modules: folders of further modules. Of the caller's PYTHONPATH, only the guard against the network stays.
    """
    path = os.pathsep.join(map(str, [SUPPORT / "no_network", *modules]))
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@dataclass(frozen=True)
class Distributions:
    """A copy of the sources, so that building leaves nothing in the repository, and what was built from it."""

    source: Path
    wheel: Path
    sdist: Path


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Both, built once, with the hooks that pip and build call."""
    folder = tmp_path_factory.mktemp("distributions")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, source / name)
    # The sdist, and from it the wheel.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=source)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return Distributions(source, wheel, sdist)


@dataclass(frozen=True)
class Installation:
    """A Python that has the package, and the folders of `flowbp` and `flowbp.scripts`."""

    python: Path
    package: Path
    scripts: Path


@pytest.fixture(scope="session", params=["wheel, --prefix", "sdist, --target", "editable"])
def installation(
    request: pytest.FixtureRequest, distributions: Distributions, tmp_path_factory: pytest.TempPathFactory
) -> Installation:
    """The package, installed without a network in a virtual environment of its own."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    python = environment / "bin" / "python"
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    target = environment / "target"
    dependencies = {path for path in sys.path if path.endswith("-packages")}
    (site_packages / "dependencies.pth").write_text("\n".join([str(target), *dependencies]))
    target.mkdir()
    source, wheel, sdist = distributions.source, distributions.wheel, distributions.sdist
    words, package, scripts = {
        "wheel, --prefix": (["--prefix", environment, wheel], site_packages / "flowbp", "scripts"),
        "sdist, --target": (["--target", target, sdist], target / "flowbp", "scripts"),
        "editable": (["--editable", source], source / "pipelines" / "flowbp", source / "training"),
    }[request.param]
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "--quiet"]
    run(python, "-m", "pip", "install", *offline, *words, cwd=environment)
    return Installation(python, package, package / scripts)


def packaged(source: Path) -> set[str]:
    """Files of the sources that belong to the package, by their names there."""
    return {
        f"{package}/{path.relative_to(source / folder).as_posix()}"
        for folder, package in PACKAGES.items()
        for pattern in PATTERNS
        for path in (source / folder).rglob(pattern)
    }


def test_the_wheel_has_the_package_and_nothing_else(distributions: Distributions) -> None:
    expected = packaged(distributions.source)
    for name in (
        "flowbp/py.typed",
        "flowbp/publishing/card_template.md",
        "flowbp/scripts/train_flowbp_sd3.py",
        "flowbp/scripts/recipes/sd3_flowbp_lagrange.yaml",
        "flowbp/scripts/accelerate_configs/fsdp2_12b.yaml",
    ):
        assert name in expected
    with zipfile.ZipFile(distributions.wheel) as wheel:
        sizes = {member.filename: member.file_size for member in wheel.infolist()}
    recognisers = {name: size for name, size in sizes.items() if name.startswith("flowbp/rewards/recognisers/")}
    assert set(recognisers) == {
        f"flowbp/rewards/recognisers/{name}" for name in ("NOTICE.md", "ppocr_v4.safetensors", "ppocr_v5.safetensors")
    }
    assert sum(recognisers.values()) <= 14e6
    assert max(size for name, size in sizes.items() if name not in recognisers) < 200e3
    assert {name for name in sizes if ".dist-info/" not in name} == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in sizes)


def test_the_sdist_has_the_package_and_what_builds_it(distributions: Distributions) -> None:
    with tarfile.open(distributions.sdist) as sdist:
        names = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}
    packages = {package: folder for folder, package in PACKAGES.items()}
    expected = {
        re.sub("^flowbp/scripts|^flowbp", lambda found: packages[found[0]], name)
        for name in packaged(distributions.source)
    }
    build = {"README.md", "LICENSE", "setup.py", "setup.cfg", "pyproject.toml", "PKG-INFO"}
    assert {name for name in names if not name.startswith("flowbp.egg-info/")} == expected | build


def test_twine_accepts_both(distributions: Distributions) -> None:
    said = run(sys.executable, "-m", "twine", "check", "--strict", distributions.wheel, distributions.sdist, cwd=ROOT)
    assert said.count("PASSED") == 2


def test_the_description_for_pypi_has_no_relative_link(distributions: Distributions) -> None:
    with zipfile.ZipFile(distributions.wheel) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(wheel.read(name).decode())
    assert metadata["Version"] == flowbp.__version__ and metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Paper, https://arxiv.org/abs/2606.11075" in metadata.get_all("Project-URL")
    description = metadata.get_payload()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall("^#.*", description, re.MULTILINE) == re.findall("^#.*", readme, re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", description, flags=re.DOTALL))
    assert [target for target in targets if not target.startswith("https://")] == []


def test_links_become_links_into_the_repository() -> None:
    spec = importlib.util.spec_from_file_location("flowbp_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    code = "```python\nrow[0](x)\n```\n`[a](b)`, [k, j) and "
    text = code + "![An image](docs/a.png) [`b`](docs/b.md#c), [one\nmore](#d) and [paper](https://e.org/f)"
    assert setup.absolute_links(text, REPOSITORY) == (
        f"{code}![An image]({REPOSITORY}/raw/main/docs/a.png) [`b`]({REPOSITORY}/blob/main/docs/b.md#c), "
        f"[one\nmore]({REPOSITORY}#d) and [paper](https://e.org/f)"
    )
    assert setup.absolute_links(text, "") == code + " `b`, one\nmore and [paper](https://e.org/f)"


def test_only_what_is_a_release_is_published(tmp_path: Path) -> None:
    """release.yml asks `problems`; only its last job may get a token of PyPI, after the tests and the build."""
    assert problems("v0", REPOSITORY)[0].startswith("the tag is v0")
    package = tmp_path / "pipelines" / "flowbp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "1.2.0"\n')
    for notes, address, expected in (
        ("## 1.2.0 - unreleased", "", 2),
        ("## 1.2.0 - 2026-12-01", "", 1),
        ("## 1.2.0 - unreleased", REPOSITORY, 1),
        ("## 1.2.0 - 2026-12-01", REPOSITORY, 0),
    ):
        (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{notes}\n")
        (tmp_path / "setup.py").write_text(f'REPOSITORY_URL = "{address}"\n')
        assert len(problems("v1.2.0", REPOSITORY, tmp_path)) == expected
        assert len(problems("v1.2.1", REPOSITORY, tmp_path)) == expected + 1
    flows = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
    matrix = flows["tests"]["jobs"]["tests"]["strategy"]["matrix"]
    supported = re.findall(r"Python :: (3\.\d+)$", (ROOT / "setup.cfg").read_text(encoding="utf-8"), re.MULTILINE)
    assert matrix["python"] == supported
    jobs = flows["release"]["jobs"]
    assert all(flow["permissions"] == {"contents": "read"} for flow in flows.values())
    assert {name: (job.get("needs"), job.get("permissions")) for name, job in jobs.items()} == {
        "tests": (None, None),
        "build": ("tests", None),
        "publish": ("build", {"id-token": "write"}),
    }


def test_scripts_recipes_and_configurations_are_found(installation: Installation, tmp_path: Path) -> None:
    """By Python and, with `python -m flowbp.scripts`, by the user."""
    code = "import flowbp, flowbp.scripts; print(flowbp.__file__, flowbp.scripts.__file__)"
    scripts = installation.scripts
    found = run(installation.python, "-c", code, cwd=tmp_path).split()
    assert found == [str(installation.package / "__init__.py"), str(scripts / "__init__.py")]
    printed = run(installation.python, "-m", "flowbp.scripts", cwd=tmp_path)
    paths = re.findall(r"^  (\S+) +(/.*)$", printed, re.MULTILINE)
    expected = {path for pattern in ("*/*.yaml", "*/*.json", "[!_]*.py") for path in scripts.glob(pattern)}
    assert {Path(path) for _, path in paths} == expected and len(paths) == len(expected)
    assert ("flowbp.scripts.evaluate_flowbp", str(scripts / "evaluate_flowbp.py")) in paths
    assert ("sd3_flowbp_lagrange.yaml", str(scripts / "recipes" / "sd3_flowbp_lagrange.yaml")) in paths


@pytest.mark.parametrize("installation", ["wheel, --prefix", "sdist, --target"], indirect=True)
def test_training_without_a_clone(installation: Installation, model: Path, prompts: Path, tmp_path: Path) -> None:
    """Two updates with an installed recipe, found by its name, leave a LoRA that was trained and its card."""
    arguments = {"config": "sd3_flowbp_sparse", "mixed_precision": "no", "gradient_accumulation_steps": 1}
    launch = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    run(
        *[installation.python, "-m", "accelerate.commands.launch", *launch, "--cpu"],
        *["-m", "flowbp.scripts.train_flowbp_sd3"],
        *command_line({**sd3_arguments(model, prompts, tmp_path / "lora"), **arguments}),
        cwd=tmp_path,
        modules=[SUPPORT],
    )
    check_run(tmp_path / "lora")
    card = ModelCard.load(tmp_path / "lora" / "README.md")
    assert card.data.library_name == "diffusers" and "FlowBP-Sparse" in card.text
