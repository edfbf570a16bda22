# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What all tests share: one thread, no network, and no state that a test leaves to the next.

A test that connects to anything but loopback, itself or in a Python process that it starts, fails; see
`no_network/sitecustomize.py`, which also says what it cannot see.
"""

import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

# Before any Hugging Face library is imported, here and in the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import no_network.sitecustomize
import pytest
import torch

# The guard is on here from its import, and in the Python processes that tests start. Each process of pytest, xdist's
# too, has a file of its own for what was refused.
_REFUSED = tempfile.NamedTemporaryFile("r", prefix="flowbp-tests-", encoding="utf-8")
os.environ["FLOWBP_TEST_REFUSED"] = _REFUSED.name
_paths = [str(Path(no_network.sitecustomize.__file__).parent), os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _paths))

# So that failed asserts in these helpers show values.
pytest.register_assert_rewrite("training_scripts", "gradient_rows", "broken_loops")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None]:
    """Fail a test that reached for the network, in its fixtures too; libraries hide what the guard raises."""
    yield
    if refused := _REFUSED.read().splitlines():
        pytest.fail(refused[0] + (f" (and {len(refused) - 1} more)" if refused[1:] else ""), pytrace=False)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """One thread and a fixed global seed; a test must leave gradients on."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    assert torch.is_grad_enabled()
    yield
    was_enabled = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert was_enabled, "the test left gradients off"


# For the tests of scripts.


@pytest.fixture(scope="module")
def script(request: pytest.FixtureRequest) -> ModuleType:
    """The script that the test module's `NAME` is of, as a module; by default, that for Stable Diffusion 3."""
    from training_scripts import load_script

    return load_script(getattr(request.module, "NAME", "train_flowbp_sd3"))


@pytest.fixture(scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model, made when it is first asked for.

    The test module's `MODELS` has by name what builds the pipeline, alone or as the first of several.
    """
    root = tmp_path_factory.mktemp("models")

    def folder_of(name: str) -> Path:
        if not (root / name).exists():
            model = request.module.MODELS[name]
            (model[0] if isinstance(model, tuple) else model)().save_pretrained(root / name)
        return root / name

    return folder_of


@pytest.fixture(scope="module")
def no_dataset_bars() -> Iterator[None]:
    """Without the bar that datasets shows while it reads a file for the first time: refusals are one line."""
    import datasets

    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def error_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str, list[str]], str]:
    """`training_scripts.error_of`."""
    import training_scripts

    return partial(training_scripts.error_of, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture
def check_refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """`training_scripts.check_refusal`."""
    import training_scripts

    return partial(training_scripts.check_refusal, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model in float32, to be read only."""
    from tiny_sd3 import tiny_sd3_pipeline

    folder = tmp_path_factory.mktemp("tiny-sd3")
    tiny_sd3_pipeline(torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of prompts, to be read only."""
    from training_scripts import write_prompts

    return write_prompts(tmp_path_factory.mktemp("prompts"))
