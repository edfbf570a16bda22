# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Train a LoRA of FLUX.1 with the gradient of a reward.

    accelerate launch training/train_flowbp_flux.py --config flux_24gb \
        --prompts prompts.txt --eval_prompts held_out.txt

From Python: `train(TrainingConfig(...), Flux)`. Every update draws a surrogate, records a rollout of the stock
pipeline, scores its images, sweeps the surrogate's terms and steps the optimizer (`flowbp/training/loop.py`). The LoRA
in `--output_dir` loads with `pipe.load_lora_weights(output_dir)`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline

from flowbp.training import Backbone
from flowbp.training.backbone import PROMPT_EMBEDS
from flowbp.training.prompt_embeds import Embeds
from flowbp.training.prompts import Record
from flowbp.training.script import run_script, train_from_command_line


class Flux(Backbone):
    """FLUX.1-dev, and FLUX.1 with true guidance."""

    name = "flux"
    pipeline_class = FluxPipeline
    text_components = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    defaults = {
        # The attention and feed-forward layers that diffusers' LoRA script for FLUX.1 trains.
        "lora_layers": "attn.to_k,attn.to_q,attn.to_v,attn.to_out.0,attn.add_k_proj,attn.add_q_proj,attn.add_v_proj,"
        "attn.to_add_out,ff.net.0.proj,ff.net.2,ff_context.net.0.proj,ff_context.net.2",
        # The paper's, an input of the distilled model.
        "guidance_scale": 4.0,
        "true_cfg_scale": 1.0,
        "negative_prompt": "",
        "max_sequence_length": 512,
        **PROMPT_EMBEDS,
        "output_dir": Path("flux-flowbp-lora"),
    }

    @property
    def is_guided(self) -> bool:
        """The distilled guidance is an input and multiplies nothing."""
        return self.config.true_cfg_scale > 1

    @property
    def guidance_gain(self) -> float:
        """That of true guidance."""
        return self.config.true_cfg_scale if self.is_guided else 1.0

    def encode(self, pipe: FluxPipeline, records: Sequence[Record], device: torch.device) -> Embeds:
        """Embeddings of CLIP (pooled) and T5."""
        embeds, pooled, _ = pipe.encode_prompt(
            [record.prompt for record in records],
            None,
            device=device,
            max_sequence_length=self.config.max_sequence_length,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def call(self, height: int, width: int) -> dict[str, Any]:
        """As at inference. The stock sigmas are the paper's: linspace(1, 1 / N, N) before the scheduler's shift."""
        return {
            "height": height,
            "width": width,
            "num_inference_steps": self.config.num_inference_steps,
            "guidance_scale": self.config.guidance_scale,
            "true_cfg_scale": self.config.true_cfg_scale,
            "max_sequence_length": self.config.max_sequence_length,
        }


def main(argv: list[str] | None = None) -> None:
    """Train."""
    train_from_command_line(Flux, __doc__, Path(__file__).parent, argv)


if __name__ == "__main__":
    run_script(main)
