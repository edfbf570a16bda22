# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a training script keeps between updates; the loop itself is the script's.

Optimizer, checkpoints and resuming, skipped updates, evaluation and the guard, the log, and what is left at the end.
"""

import argparse
import json
import math
import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors import SafetensorError
from tqdm.auto import tqdm

from ..callback import BackwardOutput
from ..checks import RecordingError
from ..judging.figures import before_after, image_grid, reward_curve
from ..judging.guard import MIN_PICTURES, Alarm, Guard, Measurement
from ..judging.images import Drawn, draw_pictures
from ..judging.statistics import interval
from ..methods import METHODS, Method, Surrogate
from ..observers import adapters_off
from ..publishing.model_card import find_template, write_card
from ..publishing.push import PushError, push_folder
from ..publishing.run_info import (
    git_commit,
    hardware,
    one_line,
    redact,
    redact_text,
    settings,
    versions,
    write_run_json,
)
from ..rewards import WeightedReward, part_names
from ..verification import VerificationError, verify
from .arguments import Rewards
from .checkpoints import (
    CheckpointError,
    checkpoints,
    find_checkpoint,
    load_tensors,
    read_json,
    rotate,
    save_tensors,
    write_folder,
    write_json,
)
from .distributed import all_ranks_max, clip_gradients, full_lora, full_tensor, full_tensors, leave, like, load_lora
from .prompts import PromptSampler
from .training_utils import LORA_FILE, StageMeter, StopSignals, TrainingError, make_generator

# Options that a resumed run may have of its own without taking another course.
MAY_CHANGE = (
    "config output_dir resume_from_checkpoint max_train_steps checkpointing_steps checkpoints_total_limit report_to "
    "logging_dir push_to_hub hub_model_id prompt_embeds_dir dry_run strict select verify"
).split()
# What a picture depends on beside prompt, noise and LoRA.
OF_PICTURES = (
    "pretrained_model_name_or_path revision variant quantization_config_path mixed_precision seed resolution height "
    "width num_frames num_inference_steps guidance_scale true_cfg_scale negative_prompt sigmas flow_shift "
    "max_sequence_length pipeline_arguments"
).split()

# What a user can put right: `run_script` prints these in one line.
USER_ERRORS = (
    ValueError,
    OSError,
    ModuleNotFoundError,
    RecordingError,
    SafetensorError,
    TrainingError,
    PushError,
    VerificationError,
)

SaveLora = Callable[[Path, Mapping[str, torch.Tensor]], None]


def run_script(main: Callable[[], None]) -> None:
    """Run a training script's `main` as a program.

    Ends the process with the exit code 1 after an error (in one line what a user can put right, else a traceback; no
    secrets in either), 2 after a bad command line, 128 + the signal's number after a checkpoint on a signal. Several
    processes end here also when all is done.
    """
    code: int | str = 0
    try:
        main()
    except USER_ERRORS as error:
        code = f"{Path(sys.argv[0]).name}: error: {one_line(error)}"
    except SystemExit as stop:
        code = 0 if stop.code is None else stop.code
    except Exception:
        code = redact_text(traceback.format_exc())
    leave(code)


def verify_call(args: argparse.Namespace, method: Method, pipe: DiffusionPipeline, call: Mapping[str, Any]) -> None:
    """`--verify`: compare the engine's gradient of 3 steps with autograd through the stock pipeline, for row `full`.

    Where the run leaves the unconditional branch of guidance out, that is compared too. The main process prints.

    Args:
        args: of `parse_training_args`.
        method: the row that trains, for its default of `unconditional_gradient`.
        pipe: the run's own pipeline, with its LoRA.
        call: what the run calls it with, for one prompt.

    Raises:
        TrainingError: where a difference is out of its bound.
    """
    # Not 2: the last step of Stable Diffusion 3's own schedule is so short that its coupling would not be seen.
    steps: dict[str, Any] = {"num_inference_steps": 3}
    for key in ("sigmas", "timesteps"):
        if schedule := call.get(key):
            steps[key] = [schedule[len(schedule) * step // 3] for step in range(3)]
    choice = method.unconditional_gradient if args.unconditional_gradient is None else args.unconditional_gradient
    for unconditional_gradient in dict.fromkeys((True, choice)):
        found = verify(pipe, unconditional_gradient=unconditional_gradient, **{**call, **steps})
        if not found.is_within_bound:
            raise TrainingError(f"--verify: {found}; train with another call or dtype, and report this pipeline.")
        if PartialState().is_main_process:
            print(found)


def read_log(path: Path, last: int) -> list[dict[str, Any]]:
    """The logged updates of an earlier run up to number `last`, for the reward curve of a resumed one."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            # The line that a killed run was writing.
            continue
        if row["step"] <= last:
            rows.append(row)
    return rows


def finite(values: Sequence[float]) -> list[float | None]:
    """Numbers as strict JSON takes them: None for what is not finite."""
    return [value if math.isfinite(value) else None for value in values]


def estimate(scores: Sequence[float | None], count: int) -> dict[str, float | None]:
    """`mean` and 95 % bootstrap interval (`low`, `high`) over the prompts; None where there are too few of them.

    Args:
        scores: prompt by prompt, `count` of each; None for pictures without a score, which are left out.
    """
    rows = torch.tensor([math.nan if score is None else score for score in scores], dtype=torch.float64)
    of_prompts = rows.view(-1, count).nanmean(1)
    of_prompts = of_prompts[of_prompts.isfinite()]
    if len(of_prompts) == 0:
        return {"mean": None, "low": None, "high": None}
    # One prompt has no interval.
    low, high = interval(of_prompts) if len(of_prompts) > 1 else (None, None)
    return {"mean": of_prompts.mean().item(), "low": low, "high": high}


class TrainingRun:
    """State and reports of a run.

    Args:
        args: of `parse_training_args`.
        accelerator: of `make_accelerator`.
        method: the row that trains.
        pipe: the pipeline, for its name.
        transformer: with the LoRA, already wrapped or sharded.
        prompts: of the training.
        sample: `sample(prompt, generator) -> (1, 3, H, W)` or `(1, F, 3, H, W)`, the pipeline's own sampling.
        rewards: of `choose_rewards`.
        save_lora: `save_lora(folder, tensors)` writes a LoRA into a folder as the pipeline's users load it.

    Attributes:
        first_update: number of updates that the resumed run had done, 0 for a new one.
        meter: seconds and peak memory of the last update's stages.
        gradient_scale: what to multiply the gradients of one pass with.
        skipped: updates that were left out because something was not finite.

    Raises:
        ValueError: for a checkpoint that does not fit or is damaged.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        method: Method,
        pipe: DiffusionPipeline,
        transformer: torch.nn.Module,
        prompts: Sequence[str],
        sample: Callable[[str, torch.Generator], torch.Tensor],
        rewards: Rewards,
        save_lora: SaveLora,
    ) -> None:
        # What the run ends with is there, or nothing is trained.
        find_template()
        self.args = args
        self.accelerator = accelerator
        self.method = method
        self.pipe = pipe
        self.transformer = transformer
        self.sample = sample
        self.save_lora = save_lora
        self.parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
        )
        self.lr_scheduler = get_scheduler(
            args.lr_scheduler,
            self.optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
            num_cycles=args.lr_num_cycles,
            power=args.lr_power,
        )
        self.ema = EMAModel(self.parameters, decay=args.ema_decay) if args.use_ema else None
        device = accelerator.device
        # float16 gradients need a loss scale; it is off for the other dtypes.
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.mixed_precision == "fp16")
        self.sampler = PromptSampler(
            list(prompts), args.train_batch_size, args.seed, accelerator.process_index, accelerator.num_processes
        )
        self.meter = StageMeter(device)
        self.first_update = 0
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._rewards_since: list[float] = []
        self._passes: list[tuple[BackwardOutput, Mapping[str, float]]] = []
        self._signals = StopSignals()
        self._started = datetime.now(UTC)

        if args.validation_prompt:
            self.validation_prompts = [
                prompt for prompt in args.validation_prompt for _ in range(args.num_validation_images)
            ]
        else:
            self.validation_prompts = list(prompts[: args.num_validation_images])
        self.judges = {args.reward: rewards.plain}
        if rewards.held_out is not None:
            self.judges[args.eval_reward] = rewards.held_out
        # With the parts of a sum.
        self._held_out = [] if args.eval_reward is None else [args.eval_reward, *part_names(args.eval_reward)]
        self.part_names = list(rewards.training.weights) if isinstance(rewards.training, WeightedReward) else []
        self.evaluation_prompts = rewards.evaluation_prompts
        self.guard = Guard()
        self.alarms: list[dict[str, Any]] = []
        # `{"base", "last", "best"}`: each with its update and the scores of every evaluation picture.
        self.evaluations: dict[str, dict[str, Any]] = {}
        self.best_lora: dict[str, torch.Tensor] | None = None
        self._must_stop = False
        # Whether the evaluation and the validation that are due after the last update were made.
        self._is_judged = True
        earlier: list[dict[str, Any]] = []

        if args.resume_from_checkpoint is not None:
            folder = find_checkpoint(args.output_dir, args.resume_from_checkpoint, self._tell)
            self._resume(folder)
            earlier = read_log(folder.parent / "log.jsonl", self.first_update)
        elif checkpoints(args.output_dir) and not args.dry_run:
            self._tell(
                f"{args.output_dir} has checkpoints of an earlier run; --resume_from_checkpoint latest would go on "
                "from them until this run has written its own."
            )
        pictures = len(self.evaluation_prompts) * args.num_eval_images
        if args.eval_reward is not None and pictures < MIN_PICTURES:
            self._tell(
                f"The evaluation has {pictures} pictures; the alarm held-out-falls needs {MIN_PICTURES}, better 16 "
                "(--eval_prompts, --num_eval_images)."
            )
        self.done = self.first_update
        self.log: list[dict[str, Any]] = []
        self._log_path = args.output_dir / "log.jsonl"
        if not args.dry_run:
            hyperparameters = {name: str(value) for name, value in settings(vars(args)).items()}
            accelerator.init_trackers("flowbp", config=hyperparameters)
            if accelerator.is_main_process:
                self.log = earlier
                partial = self._log_path.with_suffix(".partial")
                partial.write_text("".join(json.dumps(row) + "\n" for row in self.log), encoding="utf-8")
                os.replace(partial, self._log_path)

    def _tell(self, message: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(redact(message), file=sys.stderr)

    # The loop.

    def updates(self) -> Iterator[int]:
        """The numbers of the updates still to do, with a progress bar; gradients are zero at the start of each.

        Raises:
            SystemExit: with 128 + the signal's number, after SIGTERM or SIGINT: the update was finished and a
                checkpoint written.
        """
        last = self.first_update + 1 if self.args.dry_run else self.args.max_train_steps
        self.progress = tqdm(
            range(self.first_update, last),
            initial=self.first_update,
            total=last,
            desc="updates",
            disable=not self.accelerator.is_main_process,
        )
        with self._signals:
            if not self.args.dry_run and self.evaluation_prompts and "base" not in self.evaluations:
                with adapters_off(self.transformer):
                    self._evaluate(0)
            if not self._is_judged and not self.args.dry_run:
                self._judge()
            for update in self.progress:
                if self._must_stop:
                    self._tell(f"Stopped by an alarm after update {self.done}, as --stop_on_alarm says.")
                    break
                self.optimizer.zero_grad(set_to_none=True)
                scale = self.scaler.scale(torch.ones((), device=self.accelerator.device)).item()
                self.gradient_scale = scale / self.args.gradient_accumulation_steps
                self.meter = StageMeter(self.accelerator.device)
                self._passes = []
                yield update
        self.progress.close()

    def next_batch(self) -> tuple[list[str], list[int]]:
        """This process' prompts of the next pass, and their places among all samples of the update."""
        size, processes = self.args.train_batch_size, self.accelerator.num_processes
        start = (len(self._passes) * processes + self.accelerator.process_index) * size
        return next(self.sampler), list(range(start, start + size))

    def collect(self, out: BackwardOutput, surrogate: Surrogate, parts: Mapping[str, float]) -> None:
        """Keep what a pass computed for the report.

        Args:
            out: of `backward`.
            surrogate: that was drawn.
            parts: mean of each part of the reward, see `part_means`.
        """
        self._passes.append((out, parts))
        self._surrogate = surrogate

    def optimizer_step(self) -> None:
        """Clip the gradients and step the optimizer, or skip the update where any process found something not finite.

        Raises:
            TrainingError: where the step made the LoRA itself not finite.
        """
        self.meter.mark("optimizer")
        self._rate = self.lr_scheduler.get_last_lr()[0]
        self.scaler.unscale_(self.optimizer)
        self.gradient_norm = clip_gradients(self.parameters, self.args.max_grad_norm)
        computed = torch.cat([torch.cat([out.rewards.float(), out.loss.float().view(1)]) for out, _ in self._passes])
        is_finite = math.isfinite(self.gradient_norm) and bool(computed.isfinite().all())
        skip, number = all_ranks_max(self.accelerator, [float(not is_finite), float(self._signals.number)])
        self._stop_signal = int(number)
        self.was_skipped = bool(skip)
        if self.was_skipped:
            self.skipped += 1
            self._skipped_in_a_row += 1
        else:
            self._skipped_in_a_row = 0
            self.scaler.step(self.optimizer)
            self.lr_scheduler.step()
            if self.ema is not None:
                self.ema.step(self.parameters)
        self.scaler.update()
        norm = full_tensor(torch.nn.utils.get_total_norm([parameter.detach() for parameter in self.parameters]))
        if not math.isfinite(norm.item()):
            raise TrainingError(
                "The optimizer's step made the LoRA not finite, so it is not saved; lower --learning_rate and resume "
                "from the last checkpoint."
            )
        self.meter.mark(None)

    def report(self, update: int) -> None:
        """Log an update; evaluate, draw validation pictures and write a checkpoint where they are due.

        Args:
            update: its number, from 0.

        Raises:
            SystemExit: see `updates`.
            TrainingError: after `--max_skipped_updates` in a row.
        """
        args, accelerator = self.args, self.accelerator
        self.done = update + 1
        row = self._row()
        reward = "skipped" if self.was_skipped else f"{row['reward']:.3f}"
        self.progress.set_postfix(reward=reward, s_per_update=f"{row['seconds']:.2f}")
        if row["gradient_norm"] == 0:
            self._tell(
                f"Update {self.done}: the gradient is exactly 0. Are all rewards above --reward_clip, or all samples "
                "dropped by --max_gap_j or --max_gap_0?"
            )
        if args.dry_run:
            return
        if self.was_skipped:
            self._tell(f"Update {self.done}: skipped, its reward, loss or gradient is not finite.")
        else:
            self._rewards_since.append(row["reward"])
            prefix = "gradient_norm/step_"
            norms = {int(name.removeprefix(prefix)): row[name] for name in row if name.startswith(prefix)}
            self._raise_alarms(self.guard.gradient(self.done, norms, self.gradient_norm))
        if accelerator.is_main_process:
            self.log.append(row)
            with self._log_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        scalars = {name: value for name, value in row.items() if isinstance(value, int | float)}
        scalars |= {f"drawn/{place}": step for place, step in enumerate(row["drawn_steps"])}
        accelerator.log(scalars, step=self.done)
        if self._skipped_in_a_row >= args.max_skipped_updates:
            raise TrainingError(
                f"{self._skipped_in_a_row} updates in a row had a reward, loss or gradient that is not finite, "
                f"expected fewer than --max_skipped_updates {args.max_skipped_updates}; lower --learning_rate or look "
                "at the reward, then resume from the last checkpoint."
            )
        self._is_judged = False
        if not self._stop_signal:
            # After a signal there is no time: launchers kill after 30 seconds. The resumed run makes up for it.
            self._judge()
            self._stop_signal = int(all_ranks_max(accelerator, [float(self._signals.number)])[0])
        is_last = self.done == args.max_train_steps or self._must_stop
        if self.done % args.checkpointing_steps == 0 or is_last or self._stop_signal:
            self._write_checkpoint()
        if self._stop_signal:
            name = signal.Signals(self._stop_signal).name
            self._tell(f"Stopped by {name} after update {self.done}; go on with --resume_from_checkpoint latest.")
            accelerator.end_training()
            raise SystemExit(128 + self._stop_signal)

    def _judge(self) -> None:
        """The evaluation and the validation that are due after the last update."""
        args = self.args
        if self.evaluation_prompts and (self.done % args.eval_steps == 0 or self.done == args.max_train_steps):
            with self._averaged():
                self._evaluate(self.done)
        if self.done % args.validation_steps == 0 and self.done < args.max_train_steps:
            with self._averaged():
                drawn = self._validate()
            self._log_pictures("validation", self.done, drawn)
        self._is_judged = True

    def _row(self) -> dict[str, Any]:
        """An update's line of the log, the same in every process."""
        device = self.accelerator.device
        outs = [out for out, _ in self._passes]
        # Processes have equally many of everything, and the same surrogate.
        rewards = self.accelerator.gather(torch.cat([out.rewards for out in outs]).float().to(device))
        means: dict[str, float] = {"loss": _mean([out.loss for out in outs])}
        if self.args.velocity_anchor:
            means["anchor"] = _mean([out.anchor for out in outs])
        for name in self.part_names:
            # Absent where the pictures were not finite and so not scored.
            of_passes = [parts.get(name, math.nan) for _, parts in self._passes]
            means[f"reward/{name}"] = sum(of_passes) / len(of_passes)
        for step in outs[0].gaps:
            means[f"gap/{step}"] = _mean([out.gaps[step] for out in outs])
        for step in outs[0].gradient_norms:
            means[f"gradient_norm/step_{step}"] = _mean([out.gradient_norms[step] for out in outs])
        local = torch.tensor(list(means.values()), dtype=torch.float32, device=device)
        gathered = self.accelerator.gather(local.view(1, -1)).mean(0).tolist()
        peak = max(self.meter.peaks.values()) if self.meter.peaks else _resident_bytes()
        values = {
            "reward": rewards.mean().item(),
            "reward_std": rewards.std(correction=0).item(),
            **dict(zip(means, gathered, strict=True)),
            "gradient_norm": self.gradient_norm,
            "learning_rate": self._rate,
            "seconds": sum(self.meter.seconds.values()),
            **{f"seconds/{stage}": seconds for stage, seconds in self.meter.seconds.items()},
            "memory_gib": peak / 2**30,
        }
        return {
            "step": self.done,
            **dict(zip(values, finite(list(values.values())), strict=True)),
            "skipped_updates": self.skipped,
            "drawn_steps": [term.step for term in self._surrogate.terms],
        }

    # Checkpoints.

    def _write_checkpoint(self) -> None:
        args = self.args
        lora = full_lora(self.transformer)
        moments = full_tensors(
            {
                f"{index}.{name}": value
                for index, values in self.optimizer.state_dict()["state"].items()
                for name, value in values.items()
            }
        )
        average = None if self.ema is None else [full_tensor(value) for value in self.ema.shadow_params]
        with self._averaged():
            final = full_lora(self.transformer)
        state = {
            "update": self.done,
            "is_judged": self._is_judged,
            "settings": self._course(),
            "prompts": self.sampler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "ema_step": None if self.ema is None else self.ema.optimization_step,
            "skipped": self.skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "rewards_since": self._rewards_since,
            "evaluated": self._evaluated(),
            "guard": self.guard.state_dict(),
            "alarms": self.alarms,
            "evaluations": self.evaluations,
        }

        def fill(folder: Path) -> None:
            save_tensors(folder / "lora.safetensors", lora)
            save_tensors(folder / "optimizer.safetensors", moments)
            if average is not None:
                save_tensors(folder / "ema.safetensors", {str(index): value for index, value in enumerate(average)})
            if self.best_lora is not None:
                save_tensors(folder / "best.safetensors", self.best_lora)
            write_json(folder / "state.json", state)
            self.save_lora(folder, final)

        if self.accelerator.is_main_process:
            write_folder(args.output_dir / f"checkpoint-{self.done}", fill)
            if args.checkpoints_total_limit is not None:
                rotate(args.output_dir, args.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()

    def _resume(self, folder: Path) -> None:
        where = f"--resume_from_checkpoint {folder}"
        state = read_json(folder / "state.json")
        lora = load_tensors(folder / "lora.safetensors")
        expected = {name: tensor.shape for name, tensor in full_lora(self.transformer).items()}
        if {name: tensor.shape for name, tensor in lora.items()} != expected:
            raise CheckpointError(
                f"{where}: its LoRA has other layers or another rank; use the --lora_layers and --rank of that run."
            )
        if bool(state["scaler"]) != self.scaler.is_enabled():
            raise CheckpointError(f"{where}: use the --mixed_precision of that run.")
        if (state["ema_step"] is None) != (self.ema is None):
            raise CheckpointError(
                f"{where}: that run was {'without' if self.ema else 'with'} --use_ema; this one must be too."
            )
        before, now = state["settings"], self._course()
        if before["lora_alpha"] != now["lora_alpha"]:
            raise CheckpointError(f"{where}: use the --lora_alpha of that run, {before['lora_alpha']}.")
        changes = [f"--{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]]
        if changes:
            self._tell(f"{where}: other settings than that run's: {'; '.join(changes)}.")
        load_lora(self.transformer, lora)
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in load_tensors(folder / "optimizer.safetensors").items():
            index, _, name = key.partition(".")
            moments.setdefault(int(index), {})[name] = (
                like(value, self.parameters[int(index)]) if value.ndim else value
            )
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        # Where the schedule is comes from the checkpoint, what it multiplies from --learning_rate, which may differ.
        schedule = self.lr_scheduler
        rates = [
            base * factor(state["lr_scheduler"]["last_epoch"])
            for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        schedule.load_state_dict({**state["lr_scheduler"], "base_lrs": schedule.base_lrs, "_last_lr": rates})
        # A schedule sets rates when it steps; until then the optimizer needs these.
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if self.ema is not None:
            average = load_tensors(folder / "ema.safetensors")
            self.ema.shadow_params = [
                like(average[str(index)], parameter) for index, parameter in enumerate(self.parameters)
            ]
            self.ema.optimization_step = state["ema_step"]
        self.sampler.load_state_dict(state["prompts"])
        self.scaler.load_state_dict(state["scaler"])
        self.first_update = state["update"]
        self.skipped, self._skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self._rewards_since = state["rewards_since"]
        self.alarms, self._is_judged = state["alarms"], state["is_judged"]
        self._must_stop = self.args.stop_on_alarm and bool(self.alarms) and not self.args.dry_run
        self.done = self.first_update
        # Scores of other pictures or rewards are of no use: then the evaluation begins afresh, with the base model.
        if state["evaluated"] == self._evaluated():
            self.guard.load_state_dict(state["guard"])
            self.evaluations = state["evaluations"]
            if (folder / "best.safetensors").is_file():
                self.best_lora = load_tensors(folder / "best.safetensors")

    def _course(self) -> dict[str, Any]:
        """The settings that the course of a run depends on."""
        return {name: value for name, value in settings(vars(self.args)).items() if name not in MAY_CHANGE}

    def _evaluated(self) -> dict[str, Any]:
        """What the scores of an evaluation are of: rewards, pictures, and what the pictures are made with."""
        given = settings(vars(self.args))
        return {
            "rewards": list(self.judges),
            "prompts": list(self.evaluation_prompts),
            "count": self.args.num_eval_images,
            "made_with": {name: given[name] for name in OF_PICTURES if name in given},
        }

    # Evaluation.

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The average of the LoRA in place of its last values, with `--use_ema`."""
        if self.ema is None:
            yield
            return
        # Not EMAModel.store, which moves to the CPU what may be a shard on a GPU.
        before = [parameter.detach().clone() for parameter in self.parameters]
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            for parameter, value in zip(self.parameters, before, strict=True):
                parameter.data.copy_(value)

    def _draw(self, purpose: str, prompts: Sequence[str], count: int) -> Drawn:
        return draw_pictures(
            self.accelerator,
            self.transformer,
            prompts,
            lambda number: make_generator(purpose, self.args.seed, number),
            count,
            self.sample,
            self.judges,
        )

    def _validate(self) -> Drawn:
        """Pictures of the validation prompts and their rewards, always from the same noise."""
        return self._draw("validation", self.validation_prompts, 1)

    def _evaluate(self, update: int) -> None:
        """Score the evaluation pictures, ask the guard, and keep the LoRA if it is the best so far."""
        args = self.args
        drawn = self._draw("evaluation", self.evaluation_prompts, args.num_eval_images)
        found = {"update": update, "scores": {name: finite(values) for name, values in drawn.scores.items()}}
        held_out = None if args.eval_reward is None else tuple(drawn.scores[args.eval_reward])
        since = self._rewards_since
        measurement = Measurement(
            update=update,
            training_rewards=sum(since) / len(since) if since else None,
            reward=tuple(drawn.scores[args.reward]),
            held_out=held_out,
            saturated=drawn.saturated,
            high_frequency=drawn.high_frequency,
            velocity_norm=drawn.velocity_norm,
            diversity=drawn.diversity,
        )
        self._rewards_since = []
        self.evaluations["last" if update else "base"] = found
        if update and held_out is not None:
            score = estimate(found["scores"][args.eval_reward], 1)["mean"]
            best = self.evaluations.get("best")
            if score is not None and (best is None or score > best["score"]):
                self.evaluations["best"] = {**found, "score": score}
                self.best_lora = {name: tensor.cpu() for name, tensor in full_lora(self.transformer).items()}
                self._write_best()
        self._log_pictures("evaluation", update, drawn)
        self._raise_alarms(self.guard.evaluate(measurement))

    def _write_best(self) -> None:
        def fill(folder: Path) -> None:
            self.save_lora(folder, self.best_lora)
            write_json(folder / "evaluation.json", self.evaluations["best"])

        if self.accelerator.is_main_process:
            write_folder(self.args.output_dir / "best", fill)

    def _raise_alarms(self, alarms: Sequence[Alarm]) -> None:
        for alarm in alarms:
            self.alarms.append(asdict(alarm))
            self._tell(f"Alarm {alarm.name} at update {alarm.update}: {alarm.message}")
            self.accelerator.log({f"alarm/{alarm.name}": 1}, step=self.done)
            self._must_stop = self._must_stop or self.args.stop_on_alarm

    def _log_pictures(self, what: str, update: int, drawn: Drawn) -> None:
        scores = {name: [score for score in values if math.isfinite(score)] for name, values in drawn.scores.items()}
        row = {f"{what}/{name}": sum(values) / len(values) for name, values in scores.items() if values}
        for name in ("saturated", "high_frequency", "velocity_norm", "diversity"):
            if (value := vars(drawn)[name]) is not None and math.isfinite(value):
                row[f"{what}/{name}"] = value
        self.accelerator.log(row, step=update)
        if not self.accelerator.is_main_process:
            return
        columns = self.args.num_eval_images if what == "evaluation" else 1
        columns *= max(1, 8 // columns)
        grid = image_grid(drawn.images, columns=min(columns, len(drawn.images)))
        folder = self.args.output_dir / what
        folder.mkdir(exist_ok=True)
        grid.save(folder / f"{update:06d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image(what, np.asarray(grid), update, dataformats="HWC")
            elif tracker.name == "wandb":
                tracker.log_images({what: [grid]}, step=update)

    # The end.

    def finish(self) -> None:
        """Choose the final LoRA, save it, draw the closing pictures, write run.json and the card, and push.

        After a dry run, print its table.

        Raises:
            PushError: where pushing failed for good; everything is in the output folder.
        """
        args, accelerator = self.args, self.accelerator
        if args.dry_run:
            if accelerator.is_main_process:
                print(self.meter.table())
            accelerator.end_training()
            return
        if self.evaluation_prompts and self.evaluations.get("last", {}).get("update") != self.done:
            with self._averaged():
                self._evaluate(self.done)
        selected = "best" if args.select == "best" and self.best_lora is not None else "last"
        if selected == "best":
            load_lora(self.transformer, self.best_lora)
            self._write_best()
        elif self.ema is not None:
            self.ema.copy_to(self.parameters)
        lora = full_lora(self.transformer)
        aligned = self._validate()
        with adapters_off(self.transformer):
            base = self._validate()
        if accelerator.is_main_process:
            self._write_results(selected, lora, base, aligned)
        accelerator.wait_for_everyone()
        try:
            if args.push_to_hub and accelerator.is_main_process:
                print(push_folder(args.output_dir, args.hub_model_id))
        finally:
            accelerator.end_training()

    def _write_results(self, selected: str, lora: Mapping[str, torch.Tensor], base: Drawn, aligned: Drawn) -> None:
        args = self.args
        partial = args.output_dir / "lora.partial"
        partial.mkdir(exist_ok=True)
        self.save_lora(partial, lora)
        os.replace(partial / LORA_FILE, args.output_dir / LORA_FILE)
        partial.rmdir()
        update = self.evaluations["best"]["update"] if selected == "best" else self.done
        title = METHODS[args.method].title
        before_after(
            base.images,
            aligned.images,
            self.validation_prompts,
            args.output_dir / "before_after.png",
            title=f"{title}: before and after {update} updates",
            subtitle=f"reward: {args.reward}",
            scores=(base.scores[args.reward], aligned.scores[args.reward]),
        )
        if any(row["reward"] is not None for row in self.log):
            reward_curve(self.log, args.output_dir / "reward_curve.png", title=f"{title}, reward {args.reward}")
        self._write_run_json({"kind": selected, "update": update}, base, aligned)
        write_card(args.output_dir)
        print(redact(f"LoRA, model card, run.json, before_after.png and reward_curve.png are in {args.output_dir}"))

    def _write_run_json(self, selected: Mapping[str, Any], base: Drawn, aligned: Drawn) -> None:
        args = self.args
        if self.evaluation_prompts:
            before, after = self.evaluations["base"]["scores"], self.evaluations[selected["kind"]]["scores"]
            count = args.num_eval_images
        else:
            before, after = (
                {name: finite(scores) for name, scores in drawn.scores.items()} for drawn in (base, aligned)
            )
            count = 1
        finished = datetime.now(UTC)
        stages = sorted({name for row in self.log for name in row if name.startswith("seconds/")})
        write_run_json(
            args.output_dir / "run.json",
            {
                "format": 1,
                "script": Path(sys.argv[0]).name,
                "command": sys.argv,
                "settings": settings(vars(args)),
                "method": {
                    "name": args.method,
                    "title": METHODS[args.method].title,
                    "options": dict(self.method.options),
                },
                "base_model": args.pretrained_model_name_or_path,
                "pipeline_class": type(self.pipe).__name__,
                "versions": versions(),
                "git": git_commit(),
                "hardware": {
                    **hardware(self.accelerator.device, self.accelerator.num_processes),
                    "distributed_type": self.accelerator.distributed_type.value,
                },
                "timings": {
                    "started": self._started.isoformat(timespec="seconds"),
                    "finished": finished.isoformat(timespec="seconds"),
                    "seconds": sum(row["seconds"] for row in self.log),
                    "seconds_by_stage": {
                        name.removeprefix("seconds/"): sum(row.get(name, 0.0) for row in self.log) for name in stages
                    },
                },
                "updates": self.done,
                "skipped_updates": self.skipped,
                "selected": dict(selected),
                "rewards": [
                    self._compared(name, before[name], after[name], count) for name in before if name in after
                ],
                "alarms": self.alarms,
                "images": self._save_images(base, aligned),
                "hub_model_id": args.hub_model_id if args.push_to_hub else None,
            },
        )

    def _compared(
        self, name: str, before: Sequence[float | None], after: Sequence[float | None], count: int
    ) -> dict[str, Any]:
        differences = [
            None if old is None or new is None else new - old for old, new in zip(before, after, strict=True)
        ]
        return {
            "name": name,
            "role": "held out" if name in self._held_out else "trained",
            "base": estimate(before, count),
            "lora": estimate(after, count),
            "difference": estimate(differences, count),
            "pictures": len(before),
        }

    def _save_images(self, base: Drawn, aligned: Drawn) -> list[dict[str, str]]:
        folder = self.args.output_dir / "images"
        if folder.is_symlink():
            # Nothing is written or removed where a link leads.
            folder.unlink()
        folder.mkdir(exist_ok=True)
        # Those of an earlier run into the same folder would be published with this one's.
        for path in folder.glob("*_*.png"):
            if re.fullmatch(r"[0-9]+_(base|lora)\.png", path.name):
                path.unlink()
        entries = []
        pairs: list[tuple[Image.Image, Image.Image]] = list(zip(base.images, aligned.images, strict=True))
        for number, (prompt, (old, new)) in enumerate(zip(self.validation_prompts, pairs, strict=True)):
            entry = {"prompt": prompt, "base": f"images/{number}_base.png", "lora": f"images/{number}_lora.png"}
            old.save(self.args.output_dir / entry["base"])
            new.save(self.args.output_dir / entry["lora"])
            entries.append(entry)
        return entries


def _mean(values: Sequence[torch.Tensor]) -> float:
    return torch.cat([value.detach().float().flatten() for value in values]).mean().item()


def _resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
