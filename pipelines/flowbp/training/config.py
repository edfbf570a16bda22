# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`TrainingConfig`: every option of a training run, with its type, default, range, help and source."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..methods import Method, get_method
from ..publishing.run_info import settings
from .config_checks import OF_LORA, check_combinations
from .model import launched_precision
from .optimizers import OPTIMIZERS
from .options import COUNT, FINITE, NORM, NOT_NEGATIVE, POSITIVE, SHARE, check_options, declarations, option
from .pipeline_columns import HELP as COLUMNS_HELP
from .pipeline_columns import parse_columns
from .prompt_sets import PROMPTS_HELP

# Those of diffusers' schedules that need no further options.
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
PAPER = "the paper's public code"

_model = partial(option, group="model")
_embeds = partial(option, group="prompt embeddings", of_backbone=True)
_rollout = partial(option, group="rollout: what the pipeline is called with, as at inference")
METHOD_GROUP = "method: a row of the table; options that are left out keep the row's default"
_method = partial(option, group=METHOD_GROUP)
_reward = partial(option, group="reward and prompts")
_training = partial(option, group="training")
_guard = partial(option, group="guard: evaluation on held-out prompts and rewards while training")
_reports = partial(option, group="reports")


class HasDefaults(Protocol):
    """A `Backbone` class, as far as options are concerned; see there."""

    __name__: str
    name: str
    defaults: Mapping[str, Any]


@dataclass(frozen=True)
class TrainingConfig:
    """The options of a run. Fields that are None and belong to the backbone get its defaults, see `settle`.

    Raises:
        ValueError: in one line, for a value of another type or outside its range, and for options that exclude each
            other.
    """

    # The model, its LoRA, and what makes both fit the memory.
    pretrained_model_name_or_path: str = _model(MISSING, "Folder or Hub id of the pipeline.", is_path=True)
    revision: str | None = _model(None, "Branch, tag or commit of the model on the Hub.")
    variant: str | None = _model(None, "Variant of the model files, such as fp16.")
    train: str = _model(
        "lora",
        "What is trained: a LoRA, or all weights of the transformer (full), which FSDP2 shards over the processes.",
        choices=("lora", "full"),
    )
    lora_component: str | None = _model(None, "Which of the pipeline's transformers is trained.", of_backbone=True)
    init_lora: str | None = _model(
        None,
        "LoRA to start from, in place of a new one: a folder, a .safetensors file, a Hub id, or a Hub id and a file "
        "(user/name/file.safetensors). Rank, alpha and layers are then its own.",
        is_path=True,
    )
    rank: int | None = _model(None, "Rank of the LoRA. Default: 4, as in diffusers' LoRA scripts.", range=COUNT)
    lora_alpha: int | None = _model(
        None, "Scale of the LoRA: its update is multiplied by lora_alpha / rank. Default: 4.", range=COUNT
    )
    lora_layers: str | None = _model(
        None, "Names of the layers that get a LoRA, with commas between them.", of_backbone=True
    )
    use_dora: bool = _model(False, "Train a DoRA: a LoRA with a magnitude for each output of a layer.")
    use_rslora: bool = _model(False, "Multiply the LoRA's update by lora_alpha / sqrt(rank).")
    mixed_precision: str | None = _model(
        None,
        "Dtype that the model computes in; what is trained stays float32. Default: what accelerate launch was told.",
        choices=("no", "fp16", "bf16"),
    )
    quantization_config_path: Path | None = _model(
        None,
        "JSON file of a diffusers quantisation config for the frozen transformer; bitsandbytes' unless its "
        "quant_method says torchao or quanto.",
        aliases=("--bnb_quantization_config_path",),
    )
    gradient_checkpointing: bool = _model(False, "Recompute blocks of transformer and VAE: less memory.")
    group_offload: bool = _model(False, "Text encoders stay on the CPU, their layers visit the GPU.")
    lora_dtype: str | None = _model(
        None,
        "Dtype in which the LoRA's products are computed; its weights and their gradients are float32. Default: the "
        "base's where that is bfloat16.",
        choices=("base", "float32"),
    )
    compile_blocks: bool = _model(False, "Compile the transformer's repeated blocks (torch.compile, in place).")
    attention_backend: str | None = _model(None, "Attention of the transformer, as diffusers names its backends.")
    deterministic: bool = _model(
        False, "Deterministic kernels on GPUs too: slower, and a resumed run computes the same bits."
    )
    allow_tf32: bool = _model(False, "Allow TF32 matrix products on Ampere and later GPUs.")

    # Prompt embeddings.
    offload: bool | None = _embeds(
        None,
        "Text encoders wait on the CPU between uses. Default: they do, except with --group_offload and in "
        "train_flowbp.py.",
    )
    precompute_prompt_embeds: bool = _embeds(
        False, "Encode all prompts before the transformer is loaded, keep them on disk and free the text encoders."
    )
    prompt_embeds_dir: Path = _embeds(
        Path("~/.cache/flowbp/prompt_embeds"),
        "Folder of the kept embeddings, by model and a hash of prompts and settings.",
    )

    # What the pipeline is called with.
    resolution: tuple[int, ...] | None = _rollout(
        None,
        "Height and width of the images in pixels. Several: each micro-batch has one of them, in turn; evaluation and "
        "validation use the first. Default: 512, the paper's.",
        range=COUNT,
    )
    height: tuple[int, ...] | None = _rollout(
        None, "Heights, in place of --resolution: as many as --width, or one for all.", range=COUNT
    )
    width: tuple[int, ...] | None = _rollout(
        None, "Widths, in place of --resolution: as many as --height, or one for all.", range=COUNT
    )
    num_frames: int | None = _rollout(
        None, "Frames of a video. Default: the pipeline's.", range=COUNT, of_backbone=True
    )
    num_inference_steps: int = _rollout(25, "Steps N of a rollout.", range=COUNT, source=PAPER)
    guidance_scale: float | None = _rollout(
        None,
        "Guidance scale; an input of the model where guidance is distilled.",
        range=FINITE,
        of_backbone=True,
    )
    true_cfg_scale: float | None = _rollout(
        None, "Above 1: guidance by a second, unconditional call.", range=FINITE, of_backbone=True
    )
    negative_prompt: str | None = _rollout(None, "Prompt of the unconditional branch.", of_backbone=True)
    max_sequence_length: int | None = _rollout(
        None, "Length of the prompt in tokens of the longest text encoder.", range=COUNT, of_backbone=True
    )
    sigmas: str | None = _rollout(
        None,
        "stock: the scheduler's own; linear: linspace(1, 1 / N, N) before its shift, as the paper trains.",
        choices=("stock", "linear"),
        of_backbone=True,
    )
    flow_shift: float | None = _rollout(
        None,
        "Sample with FlowMatchEulerDiscreteScheduler of this shift, for models that were saved with another "
        "scheduler, such as Wan (3.0 for 480p, 5.0 for 720p) and Sana.",
        range=POSITIVE,
        of_backbone=True,
    )
    pipeline_arguments: Mapping[str, Any] | None = _rollout(
        None,
        "JSON object with more arguments of the pipeline's call, such as negative_prompt or true_cfg_scale.",
        of_backbone=True,
    )
    pipeline_columns: tuple[str, ...] = _rollout((), COLUMNS_HELP)

    # How the gradient returns.
    method: str = _method("flowbp-lagrange", "A row of the table, or package.module:row for one of your own.")
    method_options: Mapping[str, Any] | None = _method(
        None, "Options of the row; on the command line and in recipes each has its own name."
    )
    unconditional_gradient: bool | None = _method(
        None, "Send gradients through the unconditional branch of guidance too. Default: the method's."
    )
    samples_per_decode: int | None = _method(
        None, "Decode and score this many images at a time: less memory. Default: all.", range=COUNT
    )
    strict: bool = _method(
        False, "Repeat every active transformer call whole and compare, at every update; else at the first one only."
    )

    # Reward, objective and prompts.
    reward: str | None = _reward(None, "Name, weighted sum (a:0.7,b:0.3) or package.module:factory.")
    reward_model_path: tuple[str, ...] = _reward(
        (),
        "NAME=FOLDER: folders with the weights of rewards, by the reward's name, in place of the Hub.",
        is_path=True,
    )
    reward_offload: bool = _reward(False, "Rewards wait on the CPU and visit the GPU in turn.")
    reward_frames: int | None = _reward(
        None,
        "Of a video, score this many evenly spaced frames, the first and the last among them (1: the middle one), in "
        "training and evaluation; their mean counts. Default: all. Rewards of whole videos see all frames.",
        range=COUNT,
    )
    reward_augment: bool = _reward(False, "Shift, blur and noise images a little before an ocr reward.")
    reward_text_column: str | None = _reward(
        None, "Column of --prompts with the text that ocr looks for. Default: what is quoted."
    )
    reward_clip: float | None = _reward(
        None, "Samples with a reward above this stop contributing (hinge; the paper, for HPSv2.1: 0.55).", range=FINITE
    )
    loss_scale: float = _reward(1.0, "Factor on the loss.", range=POSITIVE)
    undo_guidance: bool | None = _reward(None, "Divide the loss by the guidance scale. Default: the method's.")
    prompts: str = _reward(MISSING, PROMPTS_HELP, is_path=True)
    prompt_column: str | None = _reward(None, "Column of the prompts. Default: prompt, caption or text.")
    prompt_split: str = _reward("train", "Split of a dataset.")

    # Optimizer and checkpoints, named as in diffusers' LoRA scripts.
    output_dir: Path | None = _training(None, "Folder of everything that is written.", of_backbone=True)
    overwrite_output_dir: bool = _training(
        False, "Remove what an earlier run left in --output_dir; without it such a folder is refused."
    )
    seed: int = _training(0, "Seed of noise, surrogates, prompt order and the LoRA's start.")
    train_batch_size: int = _training(4, "Prompts per process and micro-batch.", range=COUNT)
    gradient_accumulation_steps: int = _training(1, "Micro-batches per update.", range=COUNT)
    max_train_steps: int = _training(300, "Updates.", range=COUNT, source=PAPER)
    optimizer: str = _training(
        "adamw",
        "AdamW, AdamW with 8-bit state (bitsandbytes), or Prodigy (prodigyopt), which finds the size of its steps.",
        choices=tuple(OPTIMIZERS),
    )
    learning_rate: float | None = _training(
        None,
        "Learning rate after warm-up. Default: 1e-4, with prodigy 1; 1e-5, the paper's, with --train full.",
        range=POSITIVE,
    )
    lr_scheduler: str = _training("constant", "Schedule of the learning rate.", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = _training(0, "Updates of warm-up.", range=NOT_NEGATIVE)
    lr_num_cycles: int = _training(1, "Restarts of cosine_with_restarts.", range=COUNT)
    lr_power: float = _training(1.0, "Power of polynomial.", range=NOT_NEGATIVE)
    adam_beta1: float = _training(0.9, "AdamW and Prodigy.", range=SHARE)
    adam_beta2: float = _training(0.999, "AdamW and Prodigy.", range=SHARE)
    adam_weight_decay: float = _training(1e-4, "AdamW and Prodigy.", range=NOT_NEGATIVE, source=PAPER)
    adam_epsilon: float = _training(1e-8, "AdamW and Prodigy.", range=NOT_NEGATIVE)
    prodigy_d_coef: float = _training(
        1.0, "Factor on the size of the steps that Prodigy finds.", range=POSITIVE, source="prodigyopt"
    )
    max_grad_norm: float = _training(1.0, "Gradients are clipped to this norm.", range=NORM, source=PAPER)
    use_ema: bool = _training(False, "Validate, evaluate and save an average of what is trained over the updates.")
    ema_decay: float = _training(
        0.995, "Decay of that average, constant from the first update.", range=SHARE, source=PAPER
    )
    offload_ema: bool = _training(
        False, "Keep the average of --train full on the CPU: 4 bytes of GPU memory less for each parameter."
    )
    velocity_anchor: float = _training(
        0.0,
        "Weight of the mean squared distance between the outputs of trained and base model at active steps.",
        range=NOT_NEGATIVE,
    )
    max_skipped_updates: int = _training(
        10,
        "Stop with an error after this many updates in a row whose reward, loss or gradient is not finite.",
        range=COUNT,
    )
    checkpointing_steps: int = _training(
        500, "Updates between checkpoints.", range=COUNT, source="diffusers' LoRA scripts"
    )
    checkpointing_minutes: float = _training(
        15.0,
        "Minutes after which a checkpoint is written even where --checkpointing_steps asks for none; the next one "
        "replaces it.",
        range=POSITIVE,
    )
    checkpoints_total_limit: int | None = _training(None, "How many checkpoints to keep. Default: all.", range=COUNT)
    resume_from_checkpoint: str | None = _training(
        None, "latest (the newest whole one), or a checkpoint's name or path.", is_path=True
    )
    strict_resume: bool = _training(
        False, "Refuse to resume where prompts, rewards, settings or library versions are not those of the checkpoint."
    )
    process_timeout_minutes: float = _training(
        30.0, "Of several processes: end a run where one has not answered for so long.", range=POSITIVE
    )
    verify: bool = _training(
        False,
        "First compare the gradient of a rollout of 3 steps with autograd through the stock pipeline, and stop with "
        "an error where they differ. Takes the memory of all three steps' graphs at once.",
    )
    dry_run: bool = _training(
        False,
        "One update, then print peak memory and seconds by stage and an estimate for the whole run; nothing but the "
        "embeddings of --precompute_prompt_embeds is written.",
    )

    # Evaluation while training.
    eval_reward: str | None = _guard(None, "Held-out reward, as --reward: judges and never trains.")
    eval_prompts: str | None = _guard(
        None, "Held-out prompts, as --prompts. Default with --eval_reward: the validation prompts.", is_path=True
    )
    eval_prompt_column: str | None = _guard(None, "Column of --eval_prompts. Default: --prompt_column.")
    eval_prompt_split: str | None = _guard(None, "Split of --eval_prompts. Default: --prompt_split.")
    eval_steps: int = _guard(50, "Updates between evaluations.", range=COUNT)
    num_eval_images: int = _guard(2, "Images of each evaluation prompt, always from the same noise.", range=COUNT)
    select: str | None = _guard(
        None,
        "Which weights are the result: those with the best held-out reward, or the last. Default: best with "
        "--eval_reward.",
        choices=("best", "last"),
    )
    stop_on_alarm: bool = _guard(False, "Stop at the guard's first alarm and finish as at the end.")

    # Reports.
    validation_prompt: tuple[str, ...] | None = _reports(
        None, "Prompts of the validation images. Default: the first prompts."
    )
    num_validation_images: int = _reports(
        4, "Images of each --validation_prompt; without it, how many of the prompts.", range=COUNT
    )
    validation_steps: int = _reports(50, "Updates between validations.", range=COUNT)
    report_to: str = _reports("tensorboard", "An accelerate tracker, all, or none.")
    logging_dir: str = _reports("logs", "Folder of the tracker in --output_dir.", is_path=True)
    run_name: str | None = _reports(None, "Name of the run in the tracker. Default: the output folder's.")
    tracker_project: str = _reports("flowbp", "Project of the run in the tracker.")
    tracker_group: str | None = _reports(
        None, "Group of the run, where the tracker has groups (wandb, trackio, swanlab)."
    )
    tracker_tags: tuple[str, ...] = _reports(
        (), "Tags of the run, where the tracker has tags (wandb, swanlab, mlflow, clearml)."
    )
    push_to_hub: bool = _reports(False, "Push the result, its card, run.json and images to the Hub at the end.")
    hub_model_id: str | None = _reports(None, "Repository on the Hub. Default: the output folder's name.")
    hub_private_repo: bool = _reports(
        False, "Push to a private repository; one that is public is refused. Default: the account's for new ones."
    )

    def __post_init__(self) -> None:
        check_options(self)
        check_combinations(self)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of the images, in pixels, of each of the run's sizes."""
        if self.height is None and self.width is None:
            return tuple((size, size) for size in self.resolution or (512,))
        heights, widths = self.height or (512,), self.width or (512,)
        count = max(len(heights), len(widths))
        return tuple(zip(heights * (count // len(heights)), widths * (count // len(widths)), strict=True))

    @property
    def call_columns(self) -> dict[str, tuple[str, ...]]:
        """Argument of the pipeline's call -> columns of the prompts' table, of `pipeline_columns`."""
        return parse_columns(self.pipeline_columns)

    @property
    def samples_per_call(self) -> int:
        """How many samples of a micro-batch a call of the pipeline makes: all, or one where it starts from images."""
        return 1 if self.pipeline_columns else self.train_batch_size

    def settle(self, backbone: HasDefaults) -> "TrainingConfig":
        """The config with the backbone's defaults, and with what depends on other options or on accelerate.

        Raises:
            ValueError: for an option that the backbone does not have.
        """
        found: dict[str, Any] = {}
        for name, (field, declared, _) in declarations(type(self)).items():
            if name in backbone.defaults:
                if getattr(self, name) is None and (name != "lora_layers" or self.init_lora is None):
                    found[name] = backbone.defaults[name]
            elif declared.of_backbone and getattr(self, name) != field.default:
                raise ValueError(f"--{name}: {backbone.__name__} does not have this option; leave it out")
        if self.train == "full":
            if self.lora_layers not in (None, backbone.defaults["lora_layers"]):
                raise ValueError("--lora_layers is an option of a LoRA; leave it out, or train a LoRA (--train lora)")
            found["lora_layers"] = None
        if self.height is not None or self.width is not None:
            found["height"], found["width"] = zip(*self.sizes, strict=True)
        elif self.resolution is None:
            found["resolution"] = (512,)
        if self.mixed_precision is None:
            found["mixed_precision"] = launched_precision()
        dtype = found.get("mixed_precision", self.mixed_precision)
        if self.lora_dtype is None and self.train == "lora":
            found["lora_dtype"] = "base" if dtype == "bf16" and not self.use_dora else "float32"
        elif self.lora_dtype == "base" and dtype == "fp16":
            raise ValueError(
                "--lora_dtype base: gradients can vanish in float16; use --mixed_precision bf16, or leave it out"
            )
        elif self.lora_dtype == "base" and self.use_dora:
            raise ValueError("--lora_dtype base: a DoRA's norms of weights need float32; leave it out")
        if self.init_lora is None and self.train == "lora":
            found |= {name: 4 for name in ("rank", "lora_alpha") if getattr(self, name) is None}
        if "offload" in found and found["offload"] is None:
            found["offload"] = not self.group_offload
        if self.learning_rate is None:
            found["learning_rate"] = 1e-5 if self.train == "full" else OPTIMIZERS[self.optimizer].learning_rate
        if self.select is None:
            found["select"] = "last" if self.eval_reward is None else "best"
        return replace(self, **found)

    def make_method(self, backbone: str) -> Method:
        """The row with its options, those left out as the table has them for the backbone (see `get_method`).

        Raises:
            ValueError: for a row or an option that is not known.
        """
        return get_method(self.method, backbone=backbone, **(self.method_options or {}))

    def settings(self) -> dict[str, Any]:
        """All options as JSON has them, those of the method beside the others, without secrets.

        Those of a LoRA are None where none is trained.
        """
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "method_options"}
        if self.train == "full":
            own |= dict.fromkeys(OF_LORA)
        return settings({**own, **(self.method_options or {})})
