# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Train a LoRA of Stable Diffusion 3 with the gradient of a reward.

    accelerate launch training/train_flowbp_sd3.py --config sd3_24gb \
        --prompts prompts.txt --eval_prompts held_out.txt

From Python: `train(TrainingConfig(...), SD3)`. Every update draws a surrogate, records a rollout of the stock
pipeline, scores its images, sweeps the surrogate's terms and steps the optimizer (`flowbp/training/loop.py`). The LoRA
in `--output_dir` loads with `pipe.load_lora_weights(output_dir)`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from flowbp.training import Backbone
from flowbp.training.backbone import PROMPT_EMBEDS
from flowbp.training.prompt_embeds import Embeds
from flowbp.training.prompts import Record
from flowbp.training.script import run_script, train_from_command_line


class SD3(Backbone):
    """Stable Diffusion 3 and 3.5."""

    name = "sd3"
    pipeline_class = StableDiffusion3Pipeline
    text_components = tuple("text_encoder tokenizer text_encoder_2 tokenizer_2 text_encoder_3 tokenizer_3".split())
    defaults = {
        # The attention layers that diffusers' LoRA script for SD3 trains.
        "lora_layers": "attn.add_k_proj,attn.add_q_proj,attn.add_v_proj,attn.to_add_out,attn.to_k,attn.to_out.0,"
        "attn.to_q,attn.to_v",
        # The paper's.
        "guidance_scale": 3.5,
        "negative_prompt": "",
        # The pipeline's own; without a T5 text encoder, the number of zero tokens that stand in for its prompt.
        "max_sequence_length": 256,
        "sigmas": "stock",
        **PROMPT_EMBEDS,
        "output_dir": Path("sd3-flowbp-lora"),
    }

    def load_text_pipeline(self) -> StableDiffusion3Pipeline:
        """Without T5 the pipeline takes the width of the zeros in its place from the transformer's config."""
        with torch.device("meta"):
            shape = SD3Transformer2DModel.from_config(self.saved.config("transformer"))
        return self.load(transformer=shape, vae=None)

    def encode(self, pipe: StableDiffusion3Pipeline, records: Sequence[Record], device: torch.device) -> Embeds:
        """Embeddings of the conditional branch; those of the unconditional one are the negative prompt's."""
        embeds, _, pooled, _ = pipe.encode_prompt(
            [record.prompt for record in records],
            None,
            None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_sequence_length,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def call(self, height: int, width: int) -> dict[str, Any]:
        """As at inference."""
        steps = self.config.num_inference_steps
        sigmas = {"sigmas": torch.linspace(1, 1 / steps, steps).tolist()} if self.config.sigmas == "linear" else {}
        return {
            "height": height,
            "width": width,
            "num_inference_steps": steps,
            "guidance_scale": self.config.guidance_scale,
            "max_sequence_length": self.config.max_sequence_length,
            **sigmas,
        }


def main(argv: list[str] | None = None) -> None:
    """Train."""
    train_from_command_line(SD3, __doc__, Path(__file__).parent, argv)


if __name__ == "__main__":
    run_script(main)
