# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Train a LoRA of any flow-matching pipeline of diffusers (docs/pipelines.md lists those that are verified).

    accelerate launch training/train_flowbp.py \
        --pretrained_model_name_or_path Qwen/Qwen-Image --mixed_precision bf16 \
        --pipeline_arguments '{"true_cfg_scale": 4.0, "negative_prompt": " "}' \
        --method flowbp-lagrange --reward my_package.my_module:make_reward --prompts prompts.txt

The pipeline's class is the one that the model was saved with, and it is called with prompts, as at inference. It may
make images or videos; of videos the reward scores every frame, and the mean counts. A pipeline that cannot be recorded
is refused in the first update, with the reason; for one that is not in the list, `--verify` compares the gradient with
autograd through its own code. Stable Diffusion 3, FLUX.1 and FLUX.2-Klein have scripts of their own, with the paper's
defaults. Here the options of the method that are left out have those for Stable Diffusion 3.5.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from flowbp.inference import call_arguments, saved_class
from flowbp.publishing.published_files import LORA_FILE
from flowbp.training.backbone import PROMPT_EMBEDS
from flowbp.training.prompts import Record
from flowbp.training.script import run_script, train_from_command_line
from flowbp.training.text_apart import TextApart
from flowbp.verified_pipelines import VERIFIED_PIPELINES

EULER = "FlowMatchEulerDiscreteScheduler"


class AnyPipeline(TextApart):
    """A pipeline of diffusers that encodes its prompts itself."""

    name = "sd3"
    pipeline_class = DiffusionPipeline
    defaults = {
        "lora_component": "transformer",
        # The attention layers of most of diffusers' transformers.
        "lora_layers": "to_k,to_q,to_v,to_out.0",
        # The pipeline's own, where they are None.
        "num_frames": None,
        "guidance_scale": None,
        "flow_shift": None,
        "pipeline_arguments": {},
        **PROMPT_EMBEDS,
        # Not every pipeline can be without its text encoders.
        "offload": False,
        "output_dir": Path("flowbp-lora"),
    }

    @property
    def transformer_name(self) -> str:
        """Of several transformers, the one that `--lora_component` names."""
        return self.config.lora_component

    # What guidance multiplies by is the pipeline's matter and not known here.
    is_guided = False
    guidance_gain = 1.0

    def check(self) -> None:
        """The class, its scheduler and the arguments of its call."""
        config = self.config
        self.pipeline_class = saved_class(self.index, config.lora_component)
        name = self.pipeline_class.__name__
        scheduler = self.index.get("scheduler", [None, None])[1]
        if scheduler == EULER and config.flow_shift is not None:
            raise ValueError(
                f"--flow_shift {config.flow_shift}: {name} has its own Euler scheduler; leave the option out."
            )
        if scheduler != EULER and config.flow_shift is None:
            raise ValueError(
                f"{name}: expected a model with {EULER}, got {scheduler}; only Euler steps of flow matching can be "
                "recorded: give --flow_shift to sample with that scheduler, here and at inference."
            )
        if config.undo_guidance:
            raise ValueError(
                "--undo_guidance needs to know what guidance multiplies by; here set --loss_scale to 1 over it"
            )
        for height, width in config.sizes:
            self.call(height, width)
        if name not in VERIFIED_PIPELINES and not config.verify:
            self.notes.append(
                f"{name} is not among the verified pipelines of docs/pipelines.md; --verify compares its gradient "
                "with autograd through its own code before the run."
            )
        super().check()

    def prompts_of(self, records: Sequence[Record]) -> dict[str, Any]:
        """The prompts themselves, and a negative prompt for each."""
        negative = (self.config.pipeline_arguments or {}).get("negative_prompt")
        several = {"negative_prompt": [negative] * len(records)} if isinstance(negative, str) else {}
        return {"prompt": [record.prompt for record in records], **several}

    def load(self, **components: Any) -> DiffusionPipeline:
        """With `--flow_shift`, the scheduler that it asks for."""
        shift = self.config.flow_shift
        scheduler = {} if shift is None else {"scheduler": FlowMatchEulerDiscreteScheduler(shift=shift)}
        return super().load(**scheduler, **components)

    def call(self, height: int, width: int) -> dict[str, Any]:
        """Size, steps and `--pipeline_arguments`, if the pipeline takes them."""
        config = self.config
        own = {
            "height": height,
            "width": width,
            "num_frames": config.num_frames,
            "num_inference_steps": config.num_inference_steps,
            "guidance_scale": config.guidance_scale,
        }
        found = call_arguments(self.pipeline_class, {**own, **(config.pipeline_arguments or {})})
        if isinstance(found.get("negative_prompt"), str):
            # One for each prompt comes with the prompts.
            del found["negative_prompt"]
        return found

    @property
    def has_loader(self) -> bool:
        """Whether `pipe.load_lora_weights` loads the result; where it does not, the transformer loads it."""
        return hasattr(self.pipeline_class, "save_lora_weights") and self.config.lora_component == "transformer"

    @property
    def lora_writer(self) -> type[DiffusionPipeline]:
        """Pipelines without a LoRA loader have no writer either."""
        return self.pipeline_class if self.has_loader else StableDiffusion3Pipeline

    def how_to_load(self, folder: Path) -> str:
        """By the pipeline, or by its transformer."""
        if self.has_loader:
            return super().how_to_load(folder)
        return f'pipe.{self.config.lora_component}.load_lora_adapter("{folder.as_posix()}", weight_name="{LORA_FILE}")'


def main(argv: list[str] | None = None) -> None:
    """Train."""
    train_from_command_line(AnyPipeline, __doc__, Path(__file__).parent, argv)


if __name__ == "__main__":
    run_script(main)
