# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Train a LoRA of FLUX.2-Klein with the gradient of a reward.

    accelerate launch training/train_flowbp_flux2.py --config flux2_24gb \
        --prompts prompts.txt --eval_prompts held_out.txt

The base model samples with guidance, two calls a step; the distilled one without, which the pipeline's config tells.

From Python: `train(TrainingConfig(...), Flux2Klein)`. Every update draws a surrogate, records a rollout of the stock
pipeline, scores its images, sweeps the surrogate's terms and steps the optimizer (`flowbp/training/loop.py`). The LoRA
in `--output_dir` loads with `pipe.load_lora_weights(output_dir)`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2KleinPipeline

from flowbp.training import Backbone
from flowbp.training.backbone import PROMPT_EMBEDS
from flowbp.training.prompt_embeds import Embeds
from flowbp.training.prompts import Record
from flowbp.training.script import run_script, train_from_command_line


class Flux2Klein(Backbone):
    """FLUX.2-Klein, 4B and 9B, base and distilled."""

    name = "flux2"
    pipeline_class = Flux2KleinPipeline
    text_components = ("text_encoder", "tokenizer")
    defaults = {
        # The layers that diffusers' LoRA script for FLUX.2-Klein trains: attention of both kinds of blocks, and the
        # joint projections of the single blocks.
        "lora_layers": ",".join(
            ["to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj"]
            + [f"single_transformer_blocks.{block}.attn.to_out" for block in range(24)]
        ),
        # The paper's; without effect on a distilled model.
        "guidance_scale": 4.0,
        "max_sequence_length": 512,
        **PROMPT_EMBEDS,
        "output_dir": Path("flux2-flowbp-lora"),
    }

    @property
    def is_guided(self) -> bool:
        """A distilled model ignores the guidance scale."""
        return self.config.guidance_scale > 1 and not self.index.get("is_distilled", False)

    def encode(self, pipe: Flux2KleinPipeline, records: Sequence[Record], device: torch.device) -> Embeds:
        """With the pipeline's own choice of the text encoder's layers, as at inference."""
        embeds, _ = pipe.encode_prompt(
            [record.prompt for record in records],
            device=device,
            max_sequence_length=self.config.max_sequence_length,
        )
        return {"prompt_embeds": embeds}

    def call(self, height: int, width: int) -> dict[str, Any]:
        """As at inference. The stock sigmas are the paper's: linspace(1, 1 / N, N) before the scheduler's shift."""
        return {
            "height": height,
            "width": width,
            "num_inference_steps": self.config.num_inference_steps,
            "guidance_scale": self.config.guidance_scale,
            "max_sequence_length": self.config.max_sequence_length,
        }


def main(argv: list[str] | None = None) -> None:
    """Train."""
    train_from_command_line(Flux2Klein, __doc__, Path(__file__).parent, argv)


if __name__ == "__main__":
    run_script(main)
