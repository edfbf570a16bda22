# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What an update changes and a checkpoint holds: weights, optimizer, schedule, average, loss scale, prompts' order."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler

from ..outputs import BackwardOutput
from .checkpoints import CheckpointError
from .config import TrainingConfig
from .distributed import all_ranks_max, clip_gradients, full_tensor, local
from .optimizers import make_optimizer, optimizer_numbers
from .prompt_sampler import PromptSampler
from .prompts import Record
from .trained import TrainedWeights


class TrainingError(RuntimeError):
    """A run that cannot continue; the message says what was found and what to do."""


@dataclass(frozen=True)
class Step:
    """What an optimizer step did.

    Attributes:
        gradient_norm: 2-norm of the gradient before clipping.
        learning_rate: that it used.
        was_skipped: a reward, loss or gradient of some process was not finite, so nothing was changed.
        prodigy_d: what Prodigy multiplied the learning rate with, None for other optimizers.
    """

    gradient_norm: float
    learning_rate: float
    was_skipped: bool
    prodigy_d: float | None = None


def check_fits(config: TrainingConfig, folder: Path, state: Mapping[str, Any]) -> None:
    """Check the state of a checkpoint's `TrainingState.state_dict` against a config.

    Raises:
        CheckpointError: for a precision, optimizer or average that does not fit.
    """
    where = f"--resume_from_checkpoint {folder}"
    if bool(state["scaler"]) != (config.mixed_precision == "fp16"):
        raise CheckpointError(f"{where}: use the --mixed_precision of that run.")
    if (name := state["optimizer_name"]) != config.optimizer:
        raise CheckpointError(f"{where}: use the --optimizer of that run, {name}.")
    if state["has_average"] != config.use_ema:
        raise CheckpointError(
            f"{where}: that run was {'with' if state['has_average'] else 'without'} --use_ema; this one must be too."
        )


class TrainingState:
    """What an update changes.

    Attributes:
        update: updates that are done.
        skipped: those of them that changed nothing because something was not finite.
        parameters: that are trained.
        average: of the parameters over the updates, with `--use_ema`.
        is_whole: no optimizer step is under way or went wrong, so a checkpoint can be written.
        files: that a checkpoint has of its tensors.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        trained: TrainedWeights,
        records: Sequence[Record],
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.trained = trained
        self.transformer = trained.transformer
        self.parameters = list(trained.parameters.values())
        self.optimizer = make_optimizer(config, self.parameters)
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler,
            self.optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        self.average = [self._copy(parameter) for parameter in self.parameters] if config.use_ema else None
        # float16 gradients need a loss scale; it is off for the other dtypes.
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=config.mixed_precision == "fp16")
        self.sampler = PromptSampler(
            records, config.train_batch_size, config.seed, accelerator.process_index, accelerator.num_processes
        )
        self.update = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.is_whole = True
        self.files = trained.state_files(self)
        # The place in the prompts after the last whole update; those of an update that failed are drawn again.
        self._prompts = self.sampler.state_dict()

    @property
    def gradient_scale(self) -> float:
        """What the gradients of one call of the pipeline are multiplied with."""
        scale = self.scaler.scale(torch.ones((), device=self.accelerator.device)).item()
        calls = self.config.train_batch_size // self.config.samples_per_call
        return scale / (self.config.gradient_accumulation_steps * calls)

    def step(self, outs: Sequence[BackwardOutput]) -> Step:
        """Clip the gradients and step, or skip the update where any process found something not finite. Collective.

        Raises:
            TrainingError: where the step made the weights themselves not finite.
        """
        rate, prodigy_d = self.lr_scheduler.get_last_lr()[0], self.optimizer.param_groups[0].get("d")
        self.is_whole = False
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.parameters, self.config.max_grad_norm)
        computed = torch.cat([torch.cat([out.rewards.float(), out.loss.float().view(1)]) for out in outs])
        is_finite = math.isfinite(norm) and bool(computed.isfinite().all())
        was_skipped = bool(all_ranks_max(self.accelerator, [float(not is_finite)])[0])
        self.update += 1
        if was_skipped:
            self.skipped += 1
            self.skipped_in_a_row += 1
        else:
            self.skipped_in_a_row = 0
            self.scaler.step(self.optimizer)
            self.trained.has_changed = True
            self.lr_scheduler.step()
            self._update_average()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        size = full_tensor(torch.nn.utils.get_total_norm([parameter.detach() for parameter in self.parameters]))
        if not math.isfinite(size.item()):
            raise TrainingError(
                f"The optimizer's step made the {self.trained.title} not finite, so it is not saved; lower "
                "--learning_rate and resume from the last checkpoint."
            )
        self.is_whole, self._prompts = True, self.sampler.state_dict()
        return Step(norm, rate, was_skipped, prodigy_d)

    @torch.no_grad()
    def _update_average(self) -> None:
        # A constant decay from the first update, as the paper's code; diffusers' EMAModel warms its decay up.
        for average, parameter in zip(self.average or (), self.parameters, strict=False):
            local(average).lerp_(local(parameter).to(average.device), 1 - self.config.ema_decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The average in place of the last values, with `--use_ema`."""
        if self.average is None:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange the last values and the average, one at a time so that no second copy of all is needed."""
        for average, parameter in zip(self.average or (), self.parameters, strict=True):
            kept = local(parameter).to(average.device, copy=True)
            local(parameter).copy_(local(average))
            local(average).copy_(kept)

    def _copy(self, parameter: torch.Tensor) -> torch.Tensor:
        device = torch.device("cpu") if self.config.offload_ema else parameter.device
        return parameter.detach().to(device, copy=True)

    def result(self) -> dict[str, torch.Tensor]:
        """What a run would end with now, see `TrainedWeights.snapshot`. Collective."""
        with self.averaged():
            return self.trained.snapshot()

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """What is no tensor, as JSON has it."""
        return {
            "update": self.update,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "prompts": self._prompts,
            "scaler": self.scaler.state_dict(),
            "optimizer_name": self.config.optimizer,
            "optimizer_numbers": optimizer_numbers(self.optimizer, self.config.optimizer),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "has_average": self.average is not None,
        }

    def load(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint.

        Args:
            folder: that `files` has written.
            state: of `state_dict`.

        Raises:
            CheckpointError: for a LoRA, precision, optimizer or average that does not fit.
        """
        check_fits(self.config, folder, state)
        self.files.read(folder, state["optimizer_numbers"])
        self._load_schedule(state["lr_scheduler"])
        self.sampler.load_state_dict(state["prompts"])
        self._prompts = self.sampler.state_dict()
        self.scaler.load_state_dict(state["scaler"])
        self.update = state["update"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        if self.skipped_in_a_row >= self.config.max_skipped_updates:
            # The run ended for it; one that resumes gets as many updates again.
            self.skipped_in_a_row = 0

    def _load_schedule(self, schedule_state: Mapping[str, Any]) -> None:
        # Where the schedule is comes from the checkpoint, what it multiplies from --learning_rate, which may differ.
        schedule = self.lr_scheduler
        rates = [
            base * factor(schedule_state["last_epoch"])
            for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        place = {name: schedule_state[name] for name in ("last_epoch", "_step_count")}
        schedule.load_state_dict({**schedule.state_dict(), **place, "_last_lr": rates})
        # A schedule sets rates when it steps; until then the optimizer needs these.
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
