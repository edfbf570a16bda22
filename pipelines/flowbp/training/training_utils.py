# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the training scripts share besides the engine and the run's state (training_run.py).

Seeds, processes, quantisation configs, the LoRA, signals, and the measuring of stages.
"""

import argparse
import hashlib
import json
import resource
import signal
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed
from diffusers import DiffusionPipeline
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch.nn import Linear

from ..publishing.push import LORA_FILE as LORA_FILE
from ..publishing.push import check_access
from .checkpoints import clean
from .distributed import check_distributed, check_environment

# Processes wait for one another longer than NCCL's 10 minutes: while one encodes all prompts, or scores a last video.
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=2))
WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that any change of any part changes: what, run seed, update, process, ...

    Random numbers of an update depend on its number alone, so a resumed run needs no saved generator states.
    """
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_generator(*parts: int | str) -> torch.Generator:
    """CPU generator seeded with `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def sample_generators(purpose: str, seed: int, update: int, places: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator for each sample of a pass.

    They depend on the sample's place in the update and not on the pass or process that draws it, so that one process
    with a batch of 4, four passes of 1, and two processes with passes of 1 draw the same noise.

    Args:
        purpose: "noise", or "copies" for DRaFT-LV's.
        seed: of the run.
        update: its number.
        places: of the samples in the update, from 0.
    """
    return [make_generator(purpose, seed, update, place) for place in places]


def seed_rewards(seed: int, update: int, places: Sequence[int]) -> None:
    """Seed the global generators (torch, NumPy, Python), which rewards that augment at random draw from."""
    set_seed(derive_seed("reward", seed, update, places[0]) % 2**32)


def load_pipeline_config(pipeline: type[DiffusionPipeline], model: str, source: Mapping[str, Any]) -> dict[str, Any]:
    """The `model_index.json` of a saved pipeline.

    Args:
        pipeline: its class; `DiffusionPipeline` for any.
        model: folder or Hub id.
        source: `revision`.

    Raises:
        ValueError: for a pipeline of another class.
        OSError: where there is none.
    """
    config = DiffusionPipeline.load_config(model, **source)
    name = config.get("_class_name") if isinstance(config, Mapping) else None
    # A list is diffusers' mark of code that comes with the model.
    if not isinstance(name, str) or (pipeline is not DiffusionPipeline and name != pipeline.__name__):
        others = "train_flowbp.py takes any pipeline of diffusers that can be recorded"
        remedy = "choose another model" if pipeline is DiffusionPipeline else others
        raise ValueError(f"{model}: expected a saved {pipeline.__name__}, got {name}; {remedy}.")
    return config


def missing_components(config: Mapping[str, Any]) -> dict[str, None]:
    """Components that a pipeline was saved without, as the arguments `from_pretrained` wants for them.

    Args:
        config: of `DiffusionPipeline.load_config`.
    """
    return {name: None for name, spec in config.items() if spec == [None, None]}


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says what was found and what to do."""


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Processes and trackers of a run, its output folder, and with `--push_to_hub` its repository.

    The frozen model is cast by hand, without autocast: the rollout computes what the user's inference computes.

    Args:
        args: of `parse_training_args`.

    Raises:
        ValueError: where accelerate runs another number of processes than were started, or in a way that the sweep
            does not know; for a token or name that the Hub refuses.
    """
    check_environment()
    silent = args.report_to == "none" or args.dry_run
    accelerator = Accelerator(
        mixed_precision="no",
        kwargs_handlers=[PATIENCE],
        log_with=None if silent else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=str(args.output_dir), logging_dir=str(args.output_dir / args.logging_dir)
        ),
    )
    check_distributed(accelerator)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if args.hub_model_id is None:
        args.hub_model_id = args.output_dir.resolve().name
    if accelerator.is_main_process and not args.dry_run:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        clean(args.output_dir)
        if args.push_to_hub:
            # A bad token or name fails here, not after the training.
            args.hub_model_id = check_access(args.hub_model_id)
    accelerator.wait_for_everyone()
    return accelerator


def load_quantization_config(path: Path | None, dtype: torch.dtype) -> QuantizationConfigMixin | None:
    """A diffusers quantisation config from a JSON file, for a model's `from_pretrained`.

    Args:
        path: file with the config's arguments; `quant_method` says whose they are, bitsandbytes' where it is left out.
        dtype: what 4-bit weights of bitsandbytes are computed in where the file does not say.

    Raises:
        ValueError: for a file that cannot be read as such a config, and where its library or a GPU is missing.
    """
    if path is None:
        return None
    try:
        content = {"quant_method": "bitsandbytes", **json.loads(path.read_text(encoding="utf-8"))}
        if content.get("load_in_4bit"):
            content.setdefault("bnb_4bit_compute_dtype", str(dtype).removeprefix("torch."))
        config = DiffusersAutoQuantizer.from_dict(content)
        # diffusers takes keys that it does not know without a word.
        known = config.to_dict()
        if unknown := content.keys() - known:
            raise ValueError(f"unknown {', '.join(sorted(unknown))}, expected some of {', '.join(sorted(known))}")
        DiffusersAutoQuantizer.from_config(config).validate_environment(device_map=None)
    except (OSError, ValueError, TypeError, KeyError, AssertionError, ImportError, RuntimeError) as error:
        # The libraries raise all of these for a file that they cannot use.
        raise ValueError(f"--quantization_config_path {path}: {type(error).__name__}: {error}") from error
    return config


def freeze(module: torch.nn.Module) -> torch.nn.Module:
    """Switch gradients and dropout off."""
    return module.requires_grad_(False).eval()


def add_lora(transformer: torch.nn.Module, args: argparse.Namespace) -> list[torch.nn.Parameter]:
    """Add the run's LoRA, in float32, to a frozen transformer.

    Args:
        transformer: of the pipeline, on its device, quantised or not.
        args: of `parse_training_args`.

    Returns the LoRA's parameters.

    Raises:
        ValueError: where no layer has one of the names of `--lora_layers`.
    """
    torch.manual_seed(derive_seed("lora", args.seed))
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=[name.strip() for name in args.lora_layers.split(",")],
    )
    try:
        transformer.add_adapter(config)
    except ValueError as error:
        layers = {name.rpartition(".")[2] for name, part in transformer.named_modules() if type(part) is Linear}
        raise ValueError(
            f"--lora_layers {args.lora_layers}: {error} Its linear layers are called {', '.join(sorted(layers))}."
        ) from error
    cast_training_params(transformer, dtype=torch.float32)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


class StageMeter:
    """Seconds and peak memory by stage.

    Attributes:
        seconds: wall time by stage, the GPU's work included.
        peaks: largest number of allocated bytes on the GPU by stage; empty on the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._stage: str | None = None
        self._started = 0.0

    def mark(self, stage: str | None) -> None:
        """The stage that runs ends here and `stage` begins; `None` ends the update."""
        if stage == self._stage:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._stage is not None:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._started
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(self.device)
                self.peaks[self._stage] = max(self.peaks.get(self._stage, 0), peak)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._stage, self._started = stage, now

    def table(self) -> str:
        """What `--dry_run` prints."""
        lines = [f"{'stage':<10} {'seconds':>9}   {'peak GiB':>8}"]
        for stage, seconds in self.seconds.items():
            peak = f"{self.peaks[stage] / 2**30:8.2f}" if stage in self.peaks else f"{'-':>8}"
            lines.append(f"{stage:<10} {seconds:9.2f}   {peak}")
        if self.peaks:
            lines.append(f"{'update':<10} {sum(self.seconds.values()):9.2f}   {max(self.peaks.values()) / 2**30:8.2f}")
        else:
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            lines.append(f"{'update':<10} {sum(self.seconds.values()):9.2f}")
            lines.append(f"peak of the whole process, loading included: {resident:.2f} GiB")
        return "\n".join(lines)


class StopSignals:
    """Remembers SIGTERM or SIGINT instead of dying of it; a context manager.

    torchrun sends its workers the signal that it gets itself, and SIGKILL 30 seconds later; they are in sessions of
    their own, which the terminal's Ctrl-C does not reach. A second SIGINT stops at once.

    Attributes:
        number: of the signal that came, 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._is_interrupted = False

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self._is_interrupted:
            raise KeyboardInterrupt
        self._is_interrupted = self._is_interrupted or number == signal.SIGINT
        self.number = self.number or number
