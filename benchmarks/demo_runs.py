# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Runs of the demo's recipe in this process, with the training script's own code: prepared, updated, judged.

Shared by results.py and gradients.py.
"""

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, chdir, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / folder) for folder in ("demo", "training")]

import evaluate  # noqa: E402
import text_pictures  # noqa: E402
import yaml  # noqa: E402
from diffusers import StableDiffusion3Pipeline  # noqa: E402
from meters import hardware  # noqa: E402
from run import ALLOCATOR, EVALUATION, RECIPE, ROLLOUT  # noqa: E402
from train_flowbp_sd3 import SD3  # noqa: E402

from flowbp.judging.guard import Guard, Measurement, high_frequency_energy, saturated_share  # noqa: E402
from flowbp.publishing.run_info import git_commit, versions  # noqa: E402
from flowbp.rewards import load_reward  # noqa: E402
from flowbp.training.comparison import as_words  # noqa: E402
from flowbp.training.config import TrainingConfig  # noqa: E402
from flowbp.training.prompts import load_prompts  # noqa: E402
from flowbp.training.setup import Run, prepare  # noqa: E402
from flowbp.training.train_command_line import parse_training_config  # noqa: E402

# One thread: it measures CPU seconds, and two runs share a machine of two cores.
ENVIRONMENT = {
    **ALLOCATOR,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}
MEASURES = dict(zip(evaluate.MEASURES, ("reward", "read_v4", "read_v5", "colours"), strict=True))


@contextmanager
def demo_config(options: Mapping[str, Any]) -> Iterator[TrainingConfig]:
    """The config of demo/recipe.yaml with other options, as in a recipe, in a folder that is removed."""
    with ExitStack() as closing:
        # Paths of the recipe are relative to the repository.
        closing.enter_context(chdir(ROOT))
        folder = closing.enter_context(tempfile.TemporaryDirectory())
        own = {"output_dir": f"{folder}/run", "report_to": "none", **options}
        words = ["--config", str(RECIPE), *as_words(own, TrainingConfig)]
        yield parse_training_config(SD3, "", words)


@contextmanager
def demo_run(options: Mapping[str, Any]) -> Iterator[Run]:
    """A run of `demo_config`, ready for `one_update`."""
    with demo_config(options) as config, ExitStack() as closing:
        yield prepare(config, SD3, None, None, closing)


def held_out_prompts() -> tuple[list[str], list[str]]:
    """The prompts that judge (384), and those that the learning rate is chosen by (128 others)."""
    judged = load_prompts(str(ROOT / "demo" / "prompts_eval.txt"))
    return judged, [prompt for prompt in text_pictures.split_prompts(0)[2] if prompt not in set(judged)]


@cache
def _judge() -> tuple[StableDiffusion3Pipeline, torch.nn.Module, dict[str, Any]]:
    settings = yaml.safe_load(EVALUATION.read_text(encoding="utf-8"))
    pipe = StableDiffusion3Pipeline.from_pretrained(
        ROOT / settings["pretrained_model_name_or_path"],
        text_encoder_3=None,
        tokenizer_3=None,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
    )
    pipe.set_progress_bar_config(disable=True)
    call = {**{name: settings[name] for name in ROLLOUT}, **dict.fromkeys(("height", "width"), settings["resolution"])}
    return pipe, load_reward(settings["reward"]), call


def judged(run: Run | None, prompts: Sequence[str], noises: int = 1) -> dict[str, float]:
    """Means of demo/evaluate.py's measures and of the guard's, over images of these prompts.

    Args:
        run: whose LoRA is saved, loaded by a stock pipeline and judged; None for the base model.
        prompts: one each image and noise.
        noises: how often each prompt is drawn; the noises are the same for all runs.
    """
    pipe, reward, call = _judge()
    watched: dict[str, list[torch.Tensor]] = {"saturated": [], "high_frequency": []}

    def watching(images: torch.Tensor, batch: list[str]) -> torch.Tensor:
        watched["saturated"].append(saturated_share(images))
        watched["high_frequency"].append(high_frequency_energy(images))
        return reward(images, batch)

    if run is not None:
        run.state.trained.write(run.accelerator, run.config.output_dir, run.state.result())
        pipe.load_lora_weights(run.config.output_dir)
    try:
        found = [evaluate.measure(pipe, watching, list(prompts), call, seed, 32, "judged") for seed in range(noises)]
    finally:
        pipe.unload_lora_weights()
    means = {short: torch.cat([each[name] for each in found]).mean().item() for name, short in MEASURES.items()}
    return means | {name: torch.cat(parts).mean().item() for name, parts in watched.items()}


def alarms(run: Run, base: Mapping[str, float], found: Mapping[str, float]) -> list[str]:
    """Names of the guard's alarms: about gradients in training, and about images at the end against the base's."""
    guard, raised = Guard(), []
    for update, each in ((0, base), (run.state.update, found)):
        raised = guard.evaluate(
            Measurement(
                update=update,
                training_rewards=None,
                reward=(each["reward"],),
                held_out=None,
                saturated=each["saturated"],
                high_frequency=each["high_frequency"],
                velocity_norm=float("nan"),
                diversity=None,
            )
        )
    return [*(alarm["name"] for alarm in run.evaluation.alarms), *(alarm.name for alarm in raised)]


def environment() -> dict[str, Any]:
    """What the numbers were measured with."""
    device = hardware(torch.device("cpu"))
    return {"cpu": device["cpu"], "threads": device["threads"], "versions": versions(), "git": git_commit()}
