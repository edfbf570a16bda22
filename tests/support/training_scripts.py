# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""How the tests run the training scripts, and what they read of what the scripts leave.

Most runs are in the tests' process, where the imports are paid once; a few go through `accelerate launch`.
"""

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from safetensors import safe_open
from safetensors.torch import load_file
from warm_python import warm

from flowbp.judging import images as validation
from flowbp.publishing.published_files import LORA_FILE
from flowbp.training import Backbone, TrainingConfig
from flowbp.training.model import missing_components
from flowbp.training.seeds import make_generator
from flowbp.training.stages import StageMeter
from flowbp.training.train_command_line import parse_training_config

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
RANK, ALPHA = 3, 5
PROMPTS = ('the text "42"', 'a "7" in red', 'blue "k9"')

# What the runs of all scripts have in common; each adds its model and the size of its pictures.
SHARED_ARGUMENTS = {
    "reward": "toy_reward:make_reward",
    "num_inference_steps": 6,
    "max_train_steps": 2,
    "train_batch_size": 2,
    "rank": RANK,
    "lora_alpha": ALPHA,
    "learning_rate": 0.01,
    "num_validation_images": 1,
    "report_to": "none",
}
# An option or two of every method's, and the switches that change how its gradient is computed.
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "draft-k": {"last_k": 2},
    "refl": {"last_n": 4},
    "draft-lv": {"num_noised": 1},
    "drtune": {"num_active": 2},
    "leapalign": {"samples_per_decode": 1},
    "flowbp-sparse": {"num_active": 3},
    "flowbp-bridge": {"num_active": 3, "gradient_checkpointing": True},
    "flowbp-lagrange": {"gradient_accumulation_steps": 2, "reward_clip": 0.9},
}


def script_path(name: str) -> Path:
    """`training/<name>.py`."""
    return ROOT / "training" / f"{name}.py"


def load_script(name: str) -> ModuleType:
    """A training script as a module."""
    spec = importlib.util.spec_from_file_location(name, script_path(name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_prompts(folder: Path) -> Path:
    """A file of `PROMPTS`."""
    path = folder / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def arguments_of_run(model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of a run of two updates on `PROMPTS`, with its output in `folder / "run"`."""
    paths = {"pretrained_model_name_or_path": model, "prompts": write_prompts(folder), "output_dir": folder / "run"}
    return {**SHARED_ARGUMENTS, **paths, **changes}


def put_into_cache(hub: Path, name: str, folder: Path, commit: str) -> Path:
    """Make a folder's content the main branch of `user/name` in a cache of the Hub; returns the cache's folder."""
    repository = hub / f"models--user--{name}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(folder, repository / "snapshots" / commit))


def command_line(arguments: dict[str, Any], **changes: Any) -> list[str]:
    """Options as words; True is a flag, None leaves an option out, a list is several values."""
    words = []
    for name, value in {**arguments, **changes}.items():
        if value is None:
            continue
        words.append(f"--{name}")
        if isinstance(value, list):
            words += [str(item) for item in value]
        elif value is not True:
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return words


def lora_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's LoRA."""
    return load_file(folder / LORA_FILE)


def metadata_of(folder: Path) -> dict[str, Any]:
    """The adapter metadata of a run's LoRA."""
    with safe_open(folder / LORA_FILE, "pt") as file:
        return json.loads(file.metadata()["lora_adapter_metadata"])


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two LoRAs are equal bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest difference of two LoRAs' numbers."""
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def log_of(folder: Path) -> list[dict[str, float]]:
    """A run's log of updates."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def check_run(output: Path, prefix: str = "transformer.") -> None:
    """Two updates were made and logged, and a LoRA that was trained and its metadata are in the folder."""
    log = log_of(output)
    assert [row["step"] for row in log] == [1, 2]
    assert all(row["gradient_norm"] > 0 and row["learning_rate"] == 0.01 for row in log)
    lora = lora_of(output)
    assert all(key.startswith(prefix) for key in lora)
    assert all(tensor.dtype == torch.float32 for tensor in lora.values())
    # B starts at 0, so what is not 0 was trained.
    ups = [tensor for key, tensor in lora.items() if "lora_B" in key]
    assert sum(bool(tensor.abs().max() > 0) for tensor in ups) > len(ups) / 2
    metadata = metadata_of(output)
    assert metadata[f"{prefix}r"] == RANK and metadata[f"{prefix}lora_alpha"] == ALPHA
    trained = {key.removeprefix(prefix).rpartition(".lora_")[0] for key in lora}
    targets = metadata[f"{prefix}target_modules"]
    assert all(any(name == target or name.endswith(f".{target}") for target in targets) for name in trained)


def watch_pictures(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """A list that later runs fill with the tensors that become validation pictures, in order.

    A run's last ones are those of the trained model, one for each validation prompt, then those of the base model.
    """
    drawn: list[torch.Tensor] = []
    to_pil = validation.to_pil

    def keep(images: torch.Tensor) -> Any:
        drawn.append(images)
        return to_pil(images)

    monkeypatch.setattr(validation, "to_pil", keep)
    return drawn


def check_dry_run(
    script: ModuleType,
    arguments: dict[str, Any],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    stages: Sequence[str] = ("encode", "rollout", "decode", "reward", "sweep", "optimizer"),
) -> None:
    """A dry run prints its stages, their sum and the process' memory, and writes nothing into `folder`."""
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    script.main(command_line(arguments, dry_run=True, report_to="tensorboard", checkpointing_steps=1))
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(StageMeter(CPU).table().splitlines()[0])
    end = lines.index("", start)
    table = {line.split()[0]: line.split()[1:] for line in lines[start:end]}
    assert list(table) == ["stage", *stages, "update", "peak"], table
    seconds = [float(table[stage][0]) for stage in stages]
    # Each is rounded to a hundredth.
    assert max(seconds) > 0 and abs(sum(seconds) - float(table["update"][0])) < 0.01 * len(table)
    # What the whole run will take.
    estimate = {line.split()[0]: line for line in lines[end + 2 :]}
    assert list(estimate) == ["device", "updates", "images", "in", "checkpoints", "at"], estimate
    assert sorted(folder.rglob("*")) == before and not arguments["output_dir"].exists()


def backbone_of(script: ModuleType) -> type[Backbone]:
    """The `Backbone` that a training script defines."""
    (found,) = (
        each
        for each in vars(script).values()
        if isinstance(each, type) and issubclass(each, Backbone) and each.__module__ == script.__name__
    )
    return found


def parse_config(script: ModuleType, words: list[str]) -> TrainingConfig:
    """What a training script makes of a command line."""
    return parse_training_config(backbone_of(script), script.__doc__, words, ROOT / "training" / "recipes")


def load_pipeline(model: Path, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """A saved pipeline as users load it."""
    missing = missing_components(DiffusionPipeline.load_config(model))
    pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype, **missing)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images_of(pipe: DiffusionPipeline, seed: int = 0, **call: Any) -> torch.Tensor:
    """What users get for the first prompt, from the noise of the scripts' first validation picture."""
    torch.manual_seed(make_generator("validation", seed, 0).initial_seed())
    with torch.no_grad():
        return pipe(
            prompt=PROMPTS[0],
            generator=make_generator("validation", seed, 0),
            num_inference_steps=SHARED_ARGUMENTS["num_inference_steps"],
            output_type="pt",
            return_dict=False,
            **call,
        )[0]


def check_round_trip(
    model: Path,
    load_lora: Callable[[DiffusionPipeline], Any],
    drawn: list[torch.Tensor],
    tolerance: float = 0.0,
    **call: Any,
) -> None:
    """A fresh pipeline draws what the run's base model drew, and with the LoRA what its trained model drew.

    Args:
        model: the saved pipeline.
        load_lora: loads the run's LoRA into the pipeline.
        drawn: of `watch_pictures`; the run had one validation prompt.
        tolerance: of pixels. Where a source is encoded, products of matrices depend on where the files' weights lie in
            memory.
        call: the pipeline's arguments.
    """
    trained, base = drawn[-2:]
    pipe = load_pipeline(model, trained.dtype)
    assert (images_of(pipe, **call) - base).abs().max() <= tolerance
    load_lora(pipe)
    assert (images_of(pipe, **call) - trained).abs().max() <= tolerance
    assert (trained - base).abs().max() > 1e-3


# What the fixtures of these names are; `conftest.py` gives the functions below their last two arguments.
ErrorOf = Callable[[str, list[str]], str]
CheckRefusal = Callable[[str, dict[str, Any], str], None]


def _no_model(*_: Any, **__: Any) -> None:
    pytest.fail("a model was loaded")


def error_of(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a script, started as a program, prints to stderr when it exits with an error, before it loads a model."""
    for owner in (DiffusionPipeline, ModelMixin):
        monkeypatch.setattr(owner, "from_pretrained", _no_model)
    monkeypatch.setattr(sys, "argv", [str(script_path(name)), *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(script_path(name)), run_name="__main__")
    code, printed = caught.value.code, capsys.readouterr().err
    if isinstance(code, str):
        # The interpreter prints it and exits with 1.
        return printed + code
    assert code == 2
    return printed.removesuffix("\n")


def check_refusal(
    name: str,
    arguments: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A command line is refused in one line that has `message` in it, before a model is loaded or anything written."""
    printed = error_of(name, command_line(arguments), monkeypatch, capsys)
    assert message in printed
    assert len(printed.splitlines()) == 1 and printed.startswith(f"{name}.py: error: ")
    assert not arguments["output_dir"].exists()


def environment() -> dict[str, str]:
    """Of a process that finds the package and the tests' rewards."""
    paths = [str(ROOT / "pipelines"), str(ROOT / "tests" / "support"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def accelerate_launch(name: str, words: Sequence[str]) -> list[str]:
    """The command that starts a script as users do, in one process on the CPU."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"]
    return [*launch, str(script_path(name)), *words]


def torchrun(*words: Any, processes: int = 2) -> list[str]:
    """The command that starts a program in several processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    return [*launch, *map(str, words)]


def on_cpus(**variables: str) -> dict[str, str]:
    """The environment of `torchrun`, warm: on CPUs accelerate has to be told, or each process trains alone."""
    own = {name: value for name, value in environment().items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    return warm({**own, "ACCELERATE_USE_CPU": "true", **variables})


def run_program(
    words: Sequence[Any], variables: Mapping[str, str], check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command in this environment to its end; fails with what it wrote where its exit code is not 0."""
    command = list(map(str, words))
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600, check=False)
    assert not check or done.returncode == 0, done.stderr[-8000:]
    return done
