# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the training scripts share besides the engine and the loop itself.

Seeds, processes, the LoRA and its optimizer, checkpoints, the log of updates, validation pictures, the measuring of
stages, and the push to the Hub.
"""

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import Linear
from tqdm.auto import tqdm

from .figures import before_after, image_grid, reward_curve
from .methods import METHODS
from .prompts import PromptSampler
from .recording import RecordingError

LORA_FILE = "pytorch_lora_weights.safetensors"
# Processes wait for one another longer than NCCL's 10 minutes: while one encodes all prompts, or scores a last video.
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=2))
WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# What `push_to_hub` may send. Everything else in the output folder stays there.
PUSHED_FILES = ["README.md", LORA_FILE, "before_after.png", "reward_curve.png"]


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that any change of any part changes: what, run seed, update, process, ...

    Random numbers of an update depend on its number alone, so a resumed run needs no saved generator states.
    """
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_generator(*parts: int | str) -> torch.Generator:
    """CPU generator seeded with `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def missing_components(config: Mapping[str, Any]) -> dict[str, None]:
    """Components that a pipeline was saved without, as the arguments `from_pretrained` wants for them.

    Args:
        config: of `DiffusionPipeline.load_config`.
    """
    return {name: None for name, spec in config.items() if spec == [None, None]}


def save_checkpoint(
    folder: Path,
    lora: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    state: Mapping[str, Any],
) -> None:
    """Write a checkpoint that `load_checkpoint` reads: safetensors and JSON only.

    Args:
        folder: made anew; a half-written folder of that name is replaced.
        lora: adapter parameters by name.
        optimizer: whose state per parameter is written.
        lr_scheduler: learning rate schedule.
        state: plain values (update, position in the prompts, loss scaler).
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in lora.items()}, partial / "lora.safetensors"
    )
    moments = {
        f"{index}.{name}": value.detach().cpu().contiguous()
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    save_file(moments, partial / "optimizer.safetensors")
    content = {**state, "lr_scheduler": lr_scheduler.state_dict()}
    (partial / "state.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load_checkpoint(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a checkpoint into optimizer and schedule.

    Returns:
        The adapter parameters by name, and the plain values that were saved.

    Raises:
        ValueError: naming the file that is missing.
    """
    check_checkpoint(folder)
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    lr_scheduler.load_state_dict(state.pop("lr_scheduler"))
    # A schedule sets rates when it steps; until then the optimizer needs those of the checkpoint.
    for group, rate in zip(optimizer.param_groups, lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    return load_file(folder / "lora.safetensors"), state


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints `checkpoint-UPDATE` in a folder, in the order in which they were written.

    Not in the order of updates: the folder may hold later updates of an earlier run.
    """
    found = [
        path
        for path in output_dir.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name) and (path / "state.json").is_file()
    ]
    return sorted(found, key=lambda path: (path / "state.json").stat().st_mtime_ns)


def check_checkpoint(folder: Path) -> None:
    """Raise ValueError, naming the file, where a checkpoint lacks one."""
    for name in ("lora.safetensors", "optimizer.safetensors", "state.json"):
        if not (folder / name).is_file():
            raise ValueError(f"Checkpoint {folder} has no {name}; choose a complete checkpoint.")


def find_checkpoint(output_dir: Path, choice: str) -> Path:
    """The checkpoint that `--resume_from_checkpoint` means.

    Args:
        output_dir: the run's folder.
        choice: `latest`, a checkpoint's name in `output_dir`, or a path.

    Raises:
        ValueError: where there is none, naming those that exist.
    """
    existing = checkpoints(output_dir)
    if choice == "latest" and existing:
        return existing[-1]
    for path in (output_dir / choice, Path(choice)):
        if choice != "latest" and path.is_dir():
            check_checkpoint(path)
            return path
    names = ", ".join(path.name for path in existing) or "no checkpoints"
    raise ValueError(f"--resume_from_checkpoint {choice}: not found; {output_dir} has {names}.")


def read_log(path: Path, last: int) -> list[dict[str, Any]]:
    """The logged updates of an earlier run up to number `last`, for the reward curve of a resumed one."""
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [row for row in rows if row["step"] <= last]


def push_to_hub(output_dir: Path, repo_id: str) -> str:
    """Push the files of `PUSHED_FILES` that exist, and nothing else.

    Args:
        output_dir: the run's folder.
        repo_id: `user/name`.

    Returns:
        The commit's address.
    """
    from huggingface_hub import HfApi

    commit = HfApi().upload_folder(
        repo_id=repo_id, folder_path=output_dir, allow_patterns=PUSHED_FILES, commit_message="FlowBP LoRA"
    )
    return commit.commit_url


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Processes and trackers of a run, its output folder, and with `--push_to_hub` its repository.

    The frozen model is cast by hand, without autocast: the rollout computes what the user's inference computes.

    Args:
        args: of `parse_training_args`.

    Raises:
        ValueError: where accelerate runs another number of processes than were started.
    """
    silent = args.report_to == "none" or args.dry_run
    accelerator = Accelerator(
        mixed_precision="no",
        kwargs_handlers=[PATIENCE],
        log_with=None if silent else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=str(args.output_dir), logging_dir=str(args.output_dir / args.logging_dir)
        ),
    )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise ValueError(
            f"expected {expected} processes (WORLD_SIZE), accelerate runs {accelerator.num_processes}; on "
            "CPUs set ACCELERATE_USE_CPU=true."
        )
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if args.hub_model_id is None:
        args.hub_model_id = args.output_dir.resolve().name
    if accelerator.is_main_process and not args.dry_run:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        if args.push_to_hub:
            from huggingface_hub import create_repo

            # A bad token or name fails here, not after the training.
            args.hub_model_id = create_repo(args.hub_model_id, exist_ok=True).repo_id
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


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Pictures of `(B, 3, H, W)` in [0, 1], or of the middle frames of videos `(B, F, 3, H, W)`."""
    if images.ndim == 5:
        images = images[:, images.shape[1] // 2]
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))


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


class TrainingRun:
    """What a script keeps between updates: optimizer, checkpoints, log, validation. The loop itself is the script's.

    Args:
        args: of `parse_training_args`.
        accelerator: of `make_accelerator`.
        transformer: with the LoRA.
        parameters: of the LoRA.
        prompts: of the training.
        sample: `sample(prompt, generator) -> (1, 3, H, W)` or `(1, F, 3, H, W)`, the pipeline's own sampling.
        reward: `(images, prompts) -> (B,)`, without augmentation, for validation.
        save_lora: writes the LoRA into a folder.

    Attributes:
        sampler: iterator over the batches of this process.
        first_update: number of updates that the resumed run had done, 0 for a new one.
        meter: seconds and peak memory of the last update's stages.
        gradient_scale: what to multiply the gradients of one pass with.

    Raises:
        ValueError: for a checkpoint that does not fit.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        transformer: torch.nn.Module,
        parameters: list[torch.nn.Parameter],
        prompts: Sequence[str],
        sample: Callable[[str, torch.Generator], torch.Tensor],
        reward: Callable[[torch.Tensor, Sequence[str]], torch.Tensor],
        save_lora: Callable[[Path], None],
    ) -> None:
        self.args = args
        self.accelerator = accelerator
        self.transformer = transformer
        self.parameters = parameters
        self.sample = sample
        self.reward = reward
        self.save_lora = save_lora
        self.optimizer = torch.optim.AdamW(
            parameters,
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
        device = accelerator.device
        # float16 gradients need a loss scale; it is off for the other dtypes.
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.mixed_precision == "fp16")
        self.sampler = PromptSampler(
            prompts, args.train_batch_size, args.seed, accelerator.process_index, accelerator.num_processes
        )
        self.meter = StageMeter(device)
        self.first_update = 0
        if args.resume_from_checkpoint:
            self._resume(find_checkpoint(args.output_dir, args.resume_from_checkpoint))
        if args.validation_prompt:
            self.validation_prompts = [
                prompt for prompt in args.validation_prompt for _ in range(args.num_validation_images)
            ]
        else:
            self.validation_prompts = list(prompts[: args.num_validation_images])
        self.log: list[dict[str, Any]] = []
        self._log_path = args.output_dir / "log.jsonl"
        if not args.dry_run:
            accelerator.init_trackers("flowbp", config={name: str(value) for name, value in vars(args).items()})
            if accelerator.is_main_process:
                self.log = read_log(self._log_path, self.first_update)
                content = "".join(json.dumps(row) + "\n" for row in self.log)
                self._log_path.write_text(content, encoding="utf-8")

    def lora_state(self) -> dict[str, torch.Tensor]:
        """The LoRA's tensors by name."""
        return get_peft_model_state_dict(self.transformer)

    def _resume(self, folder: Path) -> None:
        lora, state = load_checkpoint(folder, self.optimizer, self.lr_scheduler)
        expected = {name: tensor.shape for name, tensor in self.lora_state().items()}
        if {name: tensor.shape for name, tensor in lora.items()} != expected:
            raise ValueError(
                f"--resume_from_checkpoint {folder}: its LoRA has other layers or another rank; use the "
                "--lora_layers and --rank of that run."
            )
        if bool(state["scaler"]) != self.scaler.is_enabled():
            raise ValueError(f"--resume_from_checkpoint {folder}: use the --mixed_precision of that run.")
        set_peft_model_state_dict(self.transformer, lora)
        self.first_update = state["update"]
        self.sampler.load_state_dict(state["prompts"])
        self.scaler.load_state_dict(state["scaler"])

    def updates(self) -> Iterator[int]:
        """The numbers of the updates still to do, with a progress bar; gradients are zero at the start of each."""
        last = self.first_update + 1 if self.args.dry_run else self.args.max_train_steps
        self.progress = tqdm(
            range(self.first_update, last),
            initial=self.first_update,
            total=last,
            desc="updates",
            disable=not self.accelerator.is_main_process,
        )
        for update in self.progress:
            self.optimizer.zero_grad(set_to_none=True)
            scale = self.scaler.scale(torch.ones((), device=self.accelerator.device)).item()
            self.gradient_scale = scale / self.args.gradient_accumulation_steps
            self.meter = StageMeter(self.accelerator.device)
            yield update

    def optimizer_step(self, update: int) -> float:
        """Clip the gradients and step the optimizer; returns the gradients' norm before.

        Raises:
            RecordingError: for gradients that are not finite.
        """
        self.meter.mark("optimizer")
        self.scaler.unscale_(self.optimizer)
        gradient_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.args.max_grad_norm)
        if not torch.isfinite(gradient_norm) and not self.scaler.is_enabled():
            raise RecordingError(
                f"Update {update + 1}: the gradient holds NaN or infinite values; lower the learning rate."
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.lr_scheduler.step()
        self.meter.mark(None)
        return gradient_norm.item()

    def report(
        self,
        update: int,
        rewards: list[torch.Tensor],
        losses: list[torch.Tensor],
        gradient_norm: float,
        parts: Mapping[str, float],
    ) -> None:
        """Log an update, and write its checkpoint and validation pictures where they are due.

        Args:
            update: its number, from 0.
            rewards: `(B,)` of each pass.
            losses: scalar of each pass.
            gradient_norm: of `optimizer_step`.
            parts: mean of each part of the reward, see `part_means`.
        """
        args, accelerator, done = self.args, self.accelerator, update + 1
        scores = accelerator.gather(torch.cat(rewards).float().to(accelerator.device))
        row = {
            "step": done,
            "reward": scores.mean().item(),
            "reward_std": scores.std(correction=0).item(),
            **{
                f"reward/{name}": accelerator.gather(torch.tensor([mean], device=accelerator.device)).mean().item()
                for name, mean in parts.items()
            },
            "loss": accelerator.gather(torch.stack(losses).float().to(accelerator.device)).mean().item(),
            "gradient_norm": gradient_norm,
            "learning_rate": self.lr_scheduler.get_last_lr()[0],
            "seconds": sum(self.meter.seconds.values()),
        }
        self.progress.set_postfix(reward=f"{row['reward']:.3f}", s_per_update=f"{row['seconds']:.2f}")
        if row["gradient_norm"] == 0 and accelerator.is_main_process:
            self.progress.write(
                f"Update {done}: the gradient is exactly 0. Are all rewards above --reward_clip, or all samples "
                "dropped by --max_gap_j or --max_gap_0?"
            )
        if args.dry_run:
            return
        accelerator.log({name: value for name, value in row.items() if name != "step"}, step=done)
        if accelerator.is_main_process:
            self.log.append(row)
            with self._log_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if done % args.checkpointing_steps == 0:
                self._save_checkpoint(done)
            if done % args.validation_steps == 0 and done < args.max_train_steps:
                self._report_validation(done)
        accelerator.wait_for_everyone()

    def _save_checkpoint(self, update: int) -> None:
        folder = self.args.output_dir / f"checkpoint-{update}"
        state = {"update": update, "prompts": self.sampler.state_dict(), "scaler": self.scaler.state_dict()}
        save_checkpoint(folder, self.lora_state(), self.optimizer, self.lr_scheduler, state)
        if self.args.checkpoints_total_limit is not None:
            for old in checkpoints(self.args.output_dir)[: -self.args.checkpoints_total_limit]:
                shutil.rmtree(old)

    @torch.no_grad()
    def validate(self) -> tuple[list[Image.Image], list[float]]:
        """Pictures of the validation prompts and their rewards, always from the same noise."""
        images, scores = [], []
        for number, prompt in enumerate(self.validation_prompts):
            image = self.sample(prompt, make_generator("validation", self.args.seed, number))
            scores += self.reward(image.float(), [prompt]).tolist()
            images += to_pil(image)
        return images, scores

    def _report_validation(self, update: int) -> None:
        images, scores = self.validate()
        grid = image_grid(images, columns=min(8, len(images)))
        folder = self.args.output_dir / "validation"
        folder.mkdir(exist_ok=True)
        grid.save(folder / f"{update:06d}.png")
        self.accelerator.log({"validation/reward": sum(scores) / len(scores)}, step=update)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("validation", np.asarray(grid), update, dataformats="HWC")

    def finish(self) -> None:
        """Save the LoRA, draw the closing pictures and push them if asked to; after a dry run, print its table."""
        args = self.args
        if self.accelerator.is_main_process:
            if args.dry_run:
                print(self.meter.table())
            else:
                self._save_results()
        self.accelerator.end_training()

    def _save_results(self) -> None:
        args = self.args
        self.save_lora(args.output_dir)
        aligned, aligned_scores = self.validate()
        self.transformer.disable_adapters()
        base, base_scores = self.validate()
        title = METHODS[args.method].title
        before_after(
            base,
            aligned,
            self.validation_prompts,
            args.output_dir / "before_after.png",
            title=f"{title}: before and after {args.max_train_steps} updates",
            subtitle=f"reward: {args.reward}",
            scores=(base_scores, aligned_scores),
        )
        reward_curve(self.log, args.output_dir / "reward_curve.png", title=f"{title}, reward {args.reward}")
        print(f"LoRA, before_after.png and reward_curve.png are in {args.output_dir}")
        if args.push_to_hub:
            print(push_to_hub(args.output_dir, args.hub_model_id))
