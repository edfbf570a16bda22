# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`Backbone`: what makes a model special. Each script in `training/` has one; copy a script to add a model."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from diffusers.training_utils import _collate_lora_metadata

from ..inference import usual_size_multiple
from ..videos import check_reward_frames
from .config import TrainingConfig
from .model import WEIGHT_DTYPES, freeze, load_quantization_config, missing_components
from .pipeline_columns import check_columns_of_call
from .prompt_embeds import Embeds, group_offload_encoder, prepare_prompt_embeds, text_encoders
from .prompts import Record
from .saved_pipeline import SavedPipeline

# What backbones have that encode prompts apart from the pipeline's call.
PROMPT_EMBEDS = {
    "offload": None,
    "precompute_prompt_embeds": False,
    "prompt_embeds_dir": Path("~/.cache/flowbp/prompt_embeds"),
}


class Backbone:
    """How a model is loaded, how prompts are encoded, what its pipeline is called with, how its LoRA is saved.

    The base class does what diffusers' text-to-image pipelines with `encode_prompt` have in common. A subclass sets
    the attributes below, defines `encode` and `call`, and overrides what its model does otherwise.

    Args:
        config: settled for this backbone (`TrainingConfig.settle`).

    Attributes:
        name: whose defaults the options of the methods have, one of `methods.BACKBONES`.
        pipeline_class: of the saved model; `DiffusionPipeline` for any.
        text_components: of the pipeline, which the training frees or keeps apart.
        defaults: of the options that depend on the backbone; those that it does not name it does not have.
        saved: the pipeline that the config names.
        index: its `model_index.json`.
        notes: lines for the user, told when the run begins.

    Raises:
        ValueError: for a model or a size that does not fit, before any weights are loaded.
    """

    name: ClassVar[str]
    pipeline_class: type[DiffusionPipeline]
    text_components: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Mapping[str, Any]]

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.notes: list[str] = []
        self.dtype = WEIGHT_DTYPES[config.mixed_precision]
        self.saved = SavedPipeline(
            self.pipeline_class, config.pretrained_model_name_or_path, config.revision, config.variant
        )
        self.index = self.saved.index
        self.check()
        self.quantization_config = load_quantization_config(config.quantization_config_path, self.dtype)
        self.saved.check_folder()

    def check(self) -> None:
        """Refuse what configs alone show to be wrong.

        Raises:
            ValueError: in one line.
        """
        if self.config.negative_prompt and not self.is_guided:
            scale = "true_cfg_scale" if "true_cfg_scale" in self.defaults else "guidance_scale"
            raise ValueError(f"--negative_prompt has no effect without guidance; set --{scale} above 1")
        check_reward_frames(self.config.reward_frames, self.pipeline_class, self.config.num_frames)
        if self.config.pipeline_columns:
            check_columns_of_call(self.pipeline_class, self.config.call_columns, self.call(*self.config.sizes[0]))
        multiple = self.size_multiple()
        for height, width in self.config.sizes:
            for option, size in (("height", height), ("width", width)):
                if multiple is not None and size % multiple:
                    name = "resolution" if self.config.resolution else option
                    below = max(multiple, size // multiple * multiple)
                    raise ValueError(
                        f"--{name} must be a multiple of {multiple} for this model, got {size}; use {below}."
                    )

    @property
    def is_guided(self) -> bool:
        """Whether a step evaluates an unconditional branch too."""
        return self.config.guidance_scale > 1

    @property
    def guidance_gain(self) -> float:
        """The factor on the conditional branch's gradient, which `undo_guidance` divides the loss by."""
        return self.config.guidance_scale if self.is_guided else 1.0

    @property
    def transformer_name(self) -> str:
        """The component that gets the LoRA."""
        return "transformer"

    def size_multiple(self) -> int | None:
        """What heights and widths must be a multiple of, in pixels; None where the configs do not say it as usual."""
        return usual_size_multiple(self.saved.config("vae"), self.saved.config(self.transformer_name))

    # Prompts.

    def load_text_pipeline(self) -> DiffusionPipeline:
        """The pipeline with text encoders and tokenizers alone."""
        return self.load(transformer=None, vae=None)

    def key(self, record: Record) -> str:
        """What a record's embeddings depend on: the name under which they are kept."""
        return record.prompt

    def encode(self, pipe: DiffusionPipeline, records: Sequence[Record], device: torch.device) -> Embeds:
        """Embeddings of B records, `{argument of the call: (B, ...)}`, by the pipeline's own `encode_prompt`."""
        raise NotImplementedError

    def prompt_inputs(
        self, accelerator: Accelerator, records: Sequence[Record]
    ) -> Callable[[Sequence[Record]], dict[str, Any]]:
        """What gives the arguments of the call that depend on the records.

        Args:
            records: all that the run will use.
        """
        return prepare_prompt_embeds(
            self.config,
            accelerator,
            self.load_text_pipeline,
            lambda pipe, batch: self.encode(pipe, batch, accelerator.device),
            self.key,
            records,
            Record(self.config.negative_prompt or "") if self.is_guided else None,
            self.saved.commit,
        )

    # The pipeline.

    def load_pipeline(self) -> DiffusionPipeline:
        """The pipeline that samples, without its text encoders; on the CPU, but for quantised weights."""
        quantization = None
        if self.quantization_config is not None:
            quantization = PipelineQuantizationConfig(quant_mapping={self.transformer_name: self.quantization_config})
        return self.load(**dict.fromkeys(self.text_components), quantization_config=quantization)

    def load(self, **components: Any) -> DiffusionPipeline:
        """The saved pipeline, its files checked first.

        Args:
            components: to use in place of the saved ones, None for those to leave out; options of `from_pretrained`.

        Raises:
            ValueError, OSError: see `SavedPipeline.fetch`.
        """
        return self.pipeline_class.from_pretrained(
            self.saved.fetch(),
            variant=self.config.variant,
            dtype=self.dtype,
            use_safetensors=True,
            trust_remote_code=False,
            **{**missing_components(self.index), **components},
        )

    def transformer(self, pipe: DiffusionPipeline) -> torch.nn.Module:
        """The part of the pipeline that gets the LoRA."""
        return getattr(pipe, self.transformer_name)

    def place(self, pipe: DiffusionPipeline, device: torch.device) -> None:
        """Freeze all modules, and move all to the device but the transformer, which may be sharded first.

        Text encoders that are still in the pipeline may stay on the CPU.
        """
        transformer, encoders = self.transformer(pipe), text_encoders(pipe)
        for component in pipe.components.values():
            if not isinstance(component, torch.nn.Module):
                continue
            freeze(component)
            if self.config.group_offload and any(component is encoder for encoder in encoders):
                group_offload_encoder(component, device)
            elif component is not transformer:
                component.to(device)
        for module in transformer.modules():
            # HiDream's experts: their code for evaluation runs without gradients, the other computes the same with.
            if hasattr(module, "moe_infer"):
                module.train()

    def call(self, height: int, width: int) -> dict[str, Any]:
        """Arguments of every call of the pipeline, in training, evaluation and validation; the size is in pixels."""
        raise NotImplementedError

    # The result.

    @property
    def lora_writer(self) -> type[DiffusionPipeline]:
        """The class whose `save_lora_weights` writes the file, which is the same for all pipelines."""
        return self.pipeline_class

    def save_lora(self, folder: Path, lora: Mapping[str, torch.Tensor], transformer: torch.nn.Module) -> None:
        """Write a LoRA as the pipeline's users load it.

        Args:
            folder: that exists.
            lora: tensors by peft's names.
            transformer: that it is of.
        """
        self.lora_writer.save_lora_weights(
            folder, transformer_lora_layers=dict(lora), **_collate_lora_metadata({"transformer": transformer})
        )

    def how_to_load(self, folder: Path) -> str:
        """Python that loads the result into a pipeline `pipe`."""
        return f'pipe.load_lora_weights("{folder.as_posix()}")'
