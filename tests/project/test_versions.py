# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What the package needs: ranges that were tested, and packages that only some uses need."""

import configparser
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from training_scripts import ROOT, environment

from flowbp.extras import EXTRAS, require
from flowbp.training.distributed import check_fsdp2

SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "setup.cfg", encoding="utf-8")
# What `import flowbp` must not need.
OTHERS = (
    "diffusers transformers accelerate peft huggingface_hub safetensors yaml PIL psutil tqdm filelock jinja2 datasets "
    "pyarrow matplotlib tensorboard scipy"
)


def requirements(text: str) -> dict[str, Requirement]:
    """By name; without the package's own extras."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("flowbp[")]
    return {canonicalize_name(each.name): each for each in found}


def pins(name: str) -> dict[str, Version]:
    return {
        package: Version(next(iter(each.specifier)).version)
        for package, each in requirements((ROOT / name).read_text(encoding="utf-8")).items()
    }


def test_ranges_are_those_of_the_tested_versions():
    extras = dict(SETTINGS["options.extras_require"])
    lowest = requirements("\n".join([SETTINGS["options"]["install_requires"], extras["training"]]))
    tested = pins("constraints-lowest.txt")
    assert set(tested) - set(lowest) == {"pytest", "pytest-xdist"}
    for name, each in lowest.items():
        (bound,) = [Version(spec.version) for spec in each.specifier if spec.operator == ">="]
        assert tested[name].release[: len(bound.release)] == bound.release, name
    # torchao was tried by hand, see setup.cfg.
    newest = {**pins("constraints.txt"), "torchao": Version("0.18.0")}
    for each in (lowest, *map(requirements, extras.values())):
        assert [name for name in each if name not in newest or newest[name] not in each[name].specifier] == []


def test_packages_of_extras_are_in_them():
    for package, extra in EXTRAS.items():
        assert package in requirements(SETTINGS["options.extras_require"][extra])


def run_without(packages: str, code: str, folder: Path) -> str:
    """What a Python prints that cannot import these packages."""
    blocked = f"import sys\nfor name in {packages!r}.split(): sys.modules[name] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + code],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_methods_and_surrogates_need_torch_only(tmp_path: Path):
    code = """
import flowbp, torch
for name in flowbp.METHODS:
    surrogate = flowbp.get_method(name).draw(torch.linspace(1, 0, 26), torch.Generator().manual_seed(0))
    print(name, isinstance(surrogate, flowbp.Surrogate))
"""
    from flowbp import METHODS

    assert run_without(OTHERS, code, tmp_path).splitlines() == [f"{name} True" for name in METHODS]


def test_what_needs_an_extra_says_so_in_one_line(tmp_path: Path):
    """Recording, the scripts' imports and prompts in text files need none."""
    (tmp_path / "p.csv").write_text("prompt,n\na cat,1\n")
    (tmp_path / "p.parquet").write_text("x")
    code = """
from flowbp import FlowBPCallback
from flowbp.scripts import compare_flowbp, evaluate_flowbp
from flowbp.scripts.train_flowbp_sd3 import SD3
from flowbp.training import TrainingConfig, train
from flowbp.training.prompts import load_records

print(load_records("p.csv"))
run = {"pretrained_model_name_or_path": "m", "prompts": "p.csv", "reward": "clip"}
evaluation = ["--pretrained_model_name_or_path", "m", "--prompts", "p.csv", "--rewards", "clip", "--output_dir", "e"]
for call in (
    lambda: load_records("user/prompts"),
    lambda: load_records("p.parquet"),
    lambda: load_records("."),
    lambda: train(TrainingConfig(**run, report_to="none"), SD3),
    lambda: train(TrainingConfig(**run), SD3),
    lambda: evaluate_flowbp.parse_config(evaluation),
):
    try:
        call()
    except (ModuleNotFoundError, ValueError) as error:
        print(error)
"""
    first, *told = run_without("datasets pyarrow matplotlib tensorboard", code, tmp_path).splitlines()
    assert first == "[Record(prompt='a cat', columns={'n': 1})]"
    remedy = 'pip install "flowbp[training]" (in a clone: pip install -e ".[training]")'
    assert all(remedy in line for line in told)
    needed = [
        *["needs datasets"] * 3,
        "the figures of a run needs matplotlib",
        "--report_to tensorboard",
        "matplotlib",
    ]
    assert len(told) == len(needed) and all(each in line for each, line in zip(needed, told, strict=True)), told


def test_shards_of_an_older_torch_are_refused_in_several_processes():
    check_fsdp2(1, "2.8.0+cu128")
    check_fsdp2(2, "2.13.0+cpu")
    with pytest.raises(ValueError, match=r"^FSDP2 over 2 processes needs torch 2.13 or later, got 2.8.0\+cu128: .*; "):
        check_fsdp2(2, "2.8.0+cu128")


def test_what_is_installed_is_not_refused(monkeypatch: pytest.MonkeyPatch):
    for package in EXTRAS:
        require(package, "this test")
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ModuleNotFoundError, match=r'^this test needs scipy, .*"flowbp\[geneval\]"'):
        require("scipy", "this test")
