# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Everything that a run needs before its first update: checked first, loaded then."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, is_bf16_available
from diffusers import DiffusionPipeline

from ..extras import require
from ..judging.models import folder_name
from ..methods import Method, find_row
from ..objectives import Objective
from ..publishing.push import check_access
from ..rewards import WeightedReward, check_videos
from ..verification import verify
from .backbone import Backbone
from .checkpointing import Checkpointer
from .checkpoints import clean, find_checkpoint
from .config import TrainingConfig
from .console import Console
from .distributed import (
    check_distributed,
    check_environment,
    check_full,
    prepare_transformer,
    shard_all_weights,
    uses_fsdp2,
)
from .evaluation import Evaluation
from .fingerprint import check_same_prompts, fingerprint
from .lora import InitLora, add_lora, read_init_lora
from .model import freeze
from .optimizers import check_optimizer
from .output_folder import OutputFolder
from .pipeline_columns import image_columns, with_images
from .prompts import Record, load_records
from .reports import Reports, read_log
from .resuming import find_resumed, resume
from .rewards import Reward, RunRewards, load_run_rewards
from .sampling import Sampling
from .seeds import make_generator
from .signals import StopSignals
from .speed import compile_blocks, compute_lora_in_base_dtype, make_deterministic, set_attention_backend
from .state import TrainingError, TrainingState
from .trained import FullWeights, LoraWeights, TrainedWeights
from .watch import ProcessWatch

# Processes wait for one another longer than NCCL's 10 minutes: while one encodes all prompts, or scores a last video.
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=2))


@dataclass
class Run:
    """A run that is ready to train.

    Attributes:
        command: the command line, None from Python.
        wrapped: the transformer that the sweep calls: DDP's wrapper, or the pipeline's own.
        first_update: updates that an earlier run had done.
    """

    config: TrainingConfig
    command: list[str] | None
    accelerator: Accelerator
    console: Console
    method: Method
    objective: Objective
    rewards: RunRewards
    sampling: Sampling
    wrapped: torch.nn.Module
    state: TrainingState
    reports: Reports
    evaluation: Evaluation
    checkpoints: Checkpointer
    folder: OutputFolder
    first_update: int
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def script(self) -> str | None:
        """The name of the script that was started, None from Python."""
        return None if self.command is None else Path(self.command[0]).name

    @property
    def title(self) -> str:
        """The method's name as papers write it."""
        return find_row(self.config.method).title


def prepare(
    config: TrainingConfig,
    backbone_class: type[Backbone],
    reward: Reward | None,
    command: Sequence[str] | None,
    closing: ExitStack,
) -> Run:
    """Check a run, then load it.

    Args:
        config: of the run, settled or not.
        backbone_class: of the model.
        reward: in place of `config.reward`.
        command: the command line, None from Python.
        closing: gets what is to be closed at the run's end.

    Raises:
        ValueError, OSError, TrainingError: in one line, for what does not fit; before any model is loaded if it can be
            known then.
    """
    if isinstance(reward, str):
        # Checked with the other options, and told with them in checkpoints and trackers.
        config, reward = replace(config, reward=reward), None
    config = config.settle(backbone_class)
    method, records, backbone, init = check_settings(config, backbone_class)
    config = backbone.config
    accelerator = make_accelerator(config)
    check_processes(config, accelerator)
    folder = claim_folder(config, accelerator, closing)
    closing.enter_context(ProcessWatch(accelerator, config.process_timeout_minutes))
    check_same_prompts(accelerator, records)
    rewards = load_run_rewards(config, records, reward)
    check_videos(list(rewards), backbone.pipeline_class, config.reward_frames)
    if config.push_to_hub:
        config = backbone.config = replace(config, hub_model_id=_repository(config, accelerator))
    console = Console(accelerator)
    sampling, trained, wrapped = load_model(config, accelerator, backbone, rewards, records, init)
    for note in backbone.notes:
        console.tell(note)
    if config.verify:
        verify_call(config, method, sampling, records[:1], console)
    state = TrainingState(config, accelerator, trained, records)
    parts = list(rewards.training.weights) if isinstance(rewards.training, WeightedReward) else []
    reports = Reports(config, accelerator, parts)
    signals = StopSignals()
    evaluation = Evaluation(config, accelerator, state, rewards, sampling, console, reports, signals)
    lora = None if init is None else init.digest
    made_of = fingerprint(config, records, rewards.evaluation, reward, lora, backbone.saved.commit)
    resumed = resume(config, state, evaluation, console, made_of)
    checkpoints = Checkpointer(config, accelerator, state, evaluation, console, signals, folder, made_of)
    for remark in reports.begin([] if resumed is None else read_log(resumed.parent / "log.jsonl", state.update)):
        console.tell(remark)
    return Run(
        config=config,
        command=None if command is None else list(command),
        accelerator=accelerator,
        console=console,
        method=method,
        objective=make_objective(config, method, backbone.guidance_gain),
        rewards=rewards,
        sampling=sampling,
        wrapped=wrapped,
        state=state,
        reports=reports,
        evaluation=evaluation,
        checkpoints=checkpoints,
        folder=folder,
        first_update=state.update,
    )


def check_settings(
    config: TrainingConfig, backbone_class: type[Backbone]
) -> tuple[Method, list[Record], Backbone, InitLora | None]:
    """Check what can be known without loading a model or writing anything.

    Returns:
        The method, the records of the training, the backbone, and the LoRA that the run starts from. The backbone's
        config has that LoRA's rank and scale.

    Raises:
        ValueError, OSError, ModuleNotFoundError: in one line.
    """
    check_environment()
    require("matplotlib", "the figures of a run")
    method = config.make_method(backbone_class.name)
    # Tried once on the run's number of steps, so that options which do not fit it fail now.
    method.draw(torch.linspace(1, 0, config.num_inference_steps + 1), make_generator("trial"))
    images = image_columns(config.call_columns)
    records = load_records(config.prompts, column=config.prompt_column, split=config.prompt_split, images=images)
    backbone, checkpoint = backbone_class(config), None
    if config.resume_from_checkpoint is not None:
        checkpoint, _ = find_resumed(config)
    init = read_init_lora(config, backbone, checkpoint)
    if init is not None:
        backbone.config = init.fill(config)
    return method, records, backbone, init


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Processes and trackers of a run.

    The frozen model is cast by hand, without autocast: the rollout computes what the user's inference computes.

    Raises:
        ValueError: where accelerate runs another number of processes than were started, or in a way that the sweep
            does not know, and for a dtype that the device lacks.
    """
    is_silent = config.report_to == "none" or config.dry_run
    logs = config.output_dir / config.logging_dir
    accelerator = Accelerator(
        mixed_precision="no",
        kwargs_handlers=[PATIENCE],
        log_with=None if is_silent else config.report_to,
        project_config=ProjectConfiguration(
            project_dir=str(config.output_dir),
            # TensorBoard knows a run by its folder.
            logging_dir=str(logs if config.run_name is None else logs / folder_name(config.run_name)),
        ),
    )
    check_distributed(accelerator)
    check_dtype(config.mixed_precision, accelerator.device)
    if config.deterministic:
        make_deterministic()
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    return accelerator


def check_dtype(mixed_precision: str, device: torch.device) -> None:
    """Refuse bfloat16 where a GPU lacks it.

    Raises:
        ValueError: in one line.
    """
    if mixed_precision == "bf16" and device.type != "cpu" and not is_bf16_available():
        raise ValueError(
            f"--mixed_precision bf16: this {device.type} device does not compute in bfloat16 (Apple's do since macOS "
            "14); use fp16 or no"
        )


def check_processes(config: TrainingConfig, accelerator: Accelerator) -> None:
    """Check the options that depend on how processes share a model.

    Raises:
        ValueError: for compiled blocks or an optimizer that shards do not have, and for DDP with `--train full`.
    """
    is_sharded = config.train == "full" or uses_fsdp2(accelerator)
    if config.compile_blocks and is_sharded:
        raise ValueError("--compile_blocks is not tested with shards (FSDP2, --train full); leave it out")
    if config.train == "full":
        check_full(accelerator)
    check_optimizer(config, is_sharded, accelerator.device.type)


def claim_folder(config: TrainingConfig, accelerator: Accelerator, closing: ExitStack) -> OutputFolder:
    """The output folder, which no other run writes into, without what killed runs left behind.

    Raises:
        ValueError: see `OutputFolder.claim`.
    """
    folder = OutputFolder(config.output_dir)
    if accelerator.is_main_process and not config.dry_run:
        folder.claim(_continues(config), config.overwrite_output_dir, config.init_lora)
        closing.callback(folder.release)
        clean(config.output_dir)
    accelerator.wait_for_everyone()
    return folder


def _continues(config: TrainingConfig) -> bool:
    """Whether a run resumes from a checkpoint of its own output folder, however that is named."""
    choice = config.resume_from_checkpoint
    if choice in (None, "latest"):
        return choice == "latest"
    checkpoint = find_checkpoint(config.output_dir, choice, tell=lambda line: None, check=lambda path: None)
    return checkpoint.parent.resolve() == config.output_dir.resolve()


def _repository(config: TrainingConfig, accelerator: Accelerator) -> str:
    """The repository of `--push_to_hub`; a bad token or name fails here, not after the training."""
    name = config.hub_model_id or config.output_dir.resolve().name
    return check_access(name, config.hub_private_repo) if accelerator.is_main_process and not config.dry_run else name


def make_objective(config: TrainingConfig, method: Method, guidance_gain: float) -> Objective:
    """The objective of a run.

    Args:
        method: which says whether to undo the gain of guidance where `--undo_guidance` does not.
        guidance_gain: factor of guidance on the conditional branch.
    """
    undo_guidance = method.undo_guidance if config.undo_guidance is None else config.undo_guidance
    return Objective(config.reward_clip, config.loss_scale, guidance_gain if undo_guidance else 1.0)


def load_model(
    config: TrainingConfig,
    accelerator: Accelerator,
    backbone: Backbone,
    rewards: RunRewards,
    records: Sequence[Record],
    init: InitLora | None,
) -> tuple[Sampling, TrainedWeights, torch.nn.Module]:
    """Text first, which may be freed, then the pipeline with what is trained of its transformer.

    Returns:
        The sampling, what is trained, and the transformer that the sweep calls.
    """
    inputs = backbone.prompt_inputs(accelerator, [*records, *rewards.evaluation, *rewards.validation])
    inputs = with_images(inputs, config.call_columns)
    pipe: DiffusionPipeline = backbone.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    backbone.place(pipe, accelerator.device)
    for module in rewards:
        freeze(module).to(accelerator.device)
    transformer = backbone.transformer(pipe)
    if config.attention_backend is not None:
        set_attention_backend(transformer, config.attention_backend)
    if config.train == "lora":
        add_lora(transformer, config, init)
        if config.lora_dtype == "base":
            compute_lora_in_base_dtype(transformer)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
        vae = pipe.components.get("vae")
        if vae is not None and vae._supports_gradient_checkpointing:
            vae.enable_gradient_checkpointing()
    if config.compile_blocks:
        compile_blocks(transformer)
    sampling = Sampling(config, accelerator, backbone, pipe, inputs)
    if config.train == "full":
        model_class = type(transformer)
        shard_all_weights(accelerator, transformer, backbone.dtype)
        name = backbone.transformer_name
        return sampling, FullWeights(transformer, model_class, name, backbone.dtype), transformer
    wrapped = prepare_transformer(accelerator, transformer)
    return sampling, LoraWeights(transformer, partial(backbone.save_lora, transformer=transformer)), wrapped


def verify_call(
    config: TrainingConfig, method: Method, sampling: Sampling, records: Sequence[Record], console: Console
) -> None:
    """`--verify`: compare the engine's gradient of 3 steps with autograd through the stock pipeline, for row `full`.

    Where the run leaves the unconditional branch of guidance out, that is compared too.

    Raises:
        TrainingError: where a difference is out of its bound.
    """
    height, width = config.sizes[0]
    call = {**sampling.inputs(records), **sampling.backbone.call(height, width), "output_type": "pt"}
    # Not 2: the last step of Stable Diffusion 3's own schedule is so short that its coupling would not be seen.
    steps: dict[str, Any] = {"num_inference_steps": 3}
    for key in ("sigmas", "timesteps"):
        if schedule := call.get(key):
            steps[key] = [schedule[len(schedule) * step // 3] for step in range(3)]
    choice = method.unconditional_gradient if config.unconditional_gradient is None else config.unconditional_gradient
    for unconditional_gradient in dict.fromkeys((True, choice)):
        found = verify(sampling.pipe, unconditional_gradient=unconditional_gradient, **{**call, **steps})
        if not found.is_within_bound:
            raise TrainingError(f"--verify: {found}; train with another call or dtype, and report this pipeline.")
        console.print(str(found))
