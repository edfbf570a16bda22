# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The log of a run: a line of `log.jsonl` for each update, and the trackers."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from ..file_errors import writing
from ..files import write_atomically
from ..outputs import BackwardOutput
from ..surrogate import Surrogate
from .config import TrainingConfig
from .stages import StageMeter, peak_resident_bytes
from .state import Step, TrainingState


@dataclass(frozen=True)
class MicroBatch:
    """What one micro-batch of one process computed.

    Attributes:
        out: of `FlowBPCallback.backward`.
        surrogate: that was drawn.
        parts: mean of each part of a weighted sum of rewards.
    """

    out: BackwardOutput
    surrogate: Surrogate
    parts: Mapping[str, float]


def finite(values: Sequence[float]) -> list[float | None]:
    """Numbers as strict JSON takes them: None for what is not finite."""
    return [value if math.isfinite(value) else None for value in values]


def read_log(path: Path, last: int) -> list[dict[str, Any]]:
    """The logged updates of an earlier run up to number `last`, for the reward curve of a resumed one."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        # A killed run leaves a part of a line, a machine without power also bytes that nobody wrote.
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            entry = json.loads(line)
            if 0 < entry["step"] <= last and entry["seconds"] >= 0 and "reward" in entry:
                entries.append(entry)
    return entries


class Reports:
    """`log.jsonl` and the trackers of a run. With `--dry_run` nothing is written.

    Args:
        accelerator: of the run, with its trackers.
        part_names: parts of the training reward, if it is a sum.

    Attributes:
        log: an entry for each update, also those before a resumed run; the main process' only.
    """

    def __init__(self, config: TrainingConfig, accelerator: Accelerator, part_names: Sequence[str]) -> None:
        self.config = config
        self.accelerator = accelerator
        self.part_names = part_names
        self.log: list[dict[str, Any]] = []
        self._path = config.output_dir / "log.jsonl"

    def begin(self, earlier: list[dict[str, Any]]) -> list[str]:
        """Start the trackers, and the log with an earlier run's entries; returns remarks on options without effect."""
        config, arguments = self.config, self._tracker_arguments()
        if config.dry_run:
            return []
        self.accelerator.init_trackers(
            config.tracker_project, tracker_settings(config.settings()), init_kwargs=arguments
        )
        if self.accelerator.is_main_process:
            self.log = earlier
            write_atomically(self._path, "".join(json.dumps(entry) + "\n" for entry in self.log))
        trackers = [tracker.name for tracker in self.accelerator.trackers]
        return [
            f"--tracker_{option} has no effect: {' and '.join(trackers) or 'no tracker'} takes no {option}."
            for option in ("group", "tags")
            if vars(config)[f"tracker_{option}"] and not any(option in arguments.get(name, {}) for name in trackers)
        ]

    def _tracker_arguments(self) -> dict[str, dict[str, Any]]:
        """Name, group and tags, by the names that each tracker has for them."""
        config, folder = self.config, str(self.config.output_dir)
        name = config.run_name or config.output_dir.resolve().name
        group, tags = config.tracker_group, list(config.tracker_tags)
        return {
            "wandb": {"name": name, "group": group, "tags": tags, "dir": folder},
            "trackio": {"name": name, "group": group},
            "swanlab": {"experiment_name": name, "group": group, "tags": tags, "logdir": folder},
            "mlflow": {"run_name": name, "tags": dict.fromkeys(tags, "true")},
            "clearml": {"task_name": name, "tags": tags},
        }

    def entry(
        self, state: TrainingState, step: Step, micro_batches: Sequence[MicroBatch], meter: StageMeter
    ) -> dict[str, Any]:
        """What the log says of an update, the same in every process. Collective."""
        outs = [each.out for each in micro_batches]
        # Processes have equally many of everything, and the same surrogate.
        rewards = self._gathered([out.rewards for out in outs])
        means = self._means(micro_batches)
        peak = max(meter.peaks.values()) if meter.peaks else peak_resident_bytes()
        values = {
            "reward": rewards.mean().item(),
            "reward_std": rewards.std(correction=0).item(),
            **means,
            "gradient_norm": step.gradient_norm,
            "learning_rate": step.learning_rate,
            **({} if step.prodigy_d is None else {"prodigy_d": step.prodigy_d}),
            "seconds": meter.total,
            **{f"seconds/{stage}": seconds for stage, seconds in meter.seconds.items()},
            "memory_gib": peak / 2**30,
        }
        return {
            "step": state.update,
            **dict(zip(values, finite(list(values.values())), strict=True)),
            "skipped_updates": state.skipped,
            "drawn_steps": [term.step for term in micro_batches[-1].surrogate.terms],
        }

    def update(self, entry: Mapping[str, Any], micro_batches: Sequence[MicroBatch]) -> None:
        """Log an update's entry. Collective."""
        if self.config.dry_run:
            return
        outs, step = [each.out for each in micro_batches], entry["step"]
        if self.accelerator.is_main_process:
            self.log.append(dict(entry))
            with writing(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        scalars = {name: value for name, value in entry.items() if isinstance(value, int | float)}
        scalars |= {f"drawn/{place}": drawn for place, drawn in enumerate(entry["drawn_steps"])}
        self.accelerator.log(scalars, step=step)
        self._log_histograms(outs, step)

    def _means(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Means over micro-batches and processes."""
        outs = [each.out for each in micro_batches]
        means: dict[str, float] = {"loss": _mean([out.loss for out in outs])}
        if self.config.velocity_anchor:
            means["anchor"] = _mean([out.anchor for out in outs])
        for name in self.part_names:
            # Absent where the images were not finite and so not scored.
            of_parts = [each.parts.get(name, math.nan) for each in micro_batches]
            means[f"reward/{name}"] = sum(of_parts) / len(of_parts)
        for step in outs[0].gaps:
            means[f"gap/{step}"] = _mean([out.gaps[step] for out in outs])
        for step in outs[0].gradient_norms:
            means[f"gradient_norm/step_{step}"] = _mean([out.gradient_norms[step] for out in outs])
        local = torch.tensor(list(means.values()), dtype=torch.float32, device=self.accelerator.device)
        gathered = self.accelerator.gather(local.view(1, -1)).mean(0).tolist()
        return dict(zip(means, gathered, strict=True))

    def _gathered(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.accelerator.gather(torch.cat(list(values)).detach().float().to(self.accelerator.device))

    def _log_histograms(self, outs: Sequence[BackwardOutput], update: int) -> None:
        """Connector gaps (at step j, and at the end, d_0) and weights of the samples, all of an update's."""
        if not outs[0].gaps:
            return
        *inner, last = sorted(outs[0].gaps)
        found = {"sample_weight": self._gathered([out.weights for out in outs])}
        if inner:
            found["gap_j"] = self._gathered([out.gaps[step] for out in outs for step in inner])
        found["gap_0"] = self._gathered([out.gaps[last] for out in outs])
        if not self.accelerator.is_main_process:
            return
        for name, values in found.items():
            values = values[values.isfinite()].cpu().numpy()
            if not len(values):
                continue
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    tracker.writer.add_histogram(name, values, update)
                elif tracker.name == "wandb":
                    import wandb

                    tracker.log({name: wandb.Histogram(values)}, step=update)

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """Log numbers to the trackers."""
        self.accelerator.log(dict(values), step=update)

    def images(self, what: str, image: Image.Image, update: int) -> None:
        """Save an image that shows several, and log it to the trackers that take images.

        Args:
            what: "validation" or "evaluation", also the folder's name.
            image: to save.
            update: its number.
        """
        if not self.accelerator.is_main_process:
            return
        folder = self.config.output_dir / what
        folder.mkdir(exist_ok=True)
        path = folder / f"{update:06d}.png"
        with writing(path):
            image.save(path)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image(what, np.asarray(image), update, dataformats="HWC")
            elif tracker.name == "wandb":
                tracker.log_images({what: [image]}, step=update)


def tracker_settings(settings: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Settings with the types that trackers keep: what is None is left out, lists and mappings become JSON."""
    return {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in settings.items()
        if value is not None
    }


def _mean(values: Sequence[torch.Tensor]) -> float:
    return torch.cat([value.detach().float().flatten() for value in values]).mean().item()
