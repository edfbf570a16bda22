# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""A Stable Diffusion 3 pipeline with random weights, small enough to run hundreds of times in a test.

Every component is the real class built from a config, and nothing is downloaded. The weights are redrawn at a scale
where velocities have size about one and depend on the state, the prompt and the step, so a wrong coupling, a wrong
step or a swapped guidance branch changes gradients by percents.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

MAX_SEQUENCE_LENGTH = 2
"""What tests pass as `max_sequence_length`: without T5, the pipeline adds this many zero tokens (256 by default)."""

TEXT_LENGTH = 20
ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
CHARACTERS = 'abcdefghijklmnopqrstuvwxyz0123456789"'


class Float64Scheduler(FlowMatchEulerDiscreteScheduler):
    """The Euler scheduler with float64 sigmas and float64 steps.

    The stock scheduler computes sigmas in float32 and rounds the latents that it is given to float32, which leaves
    gradients in a float64 model correct to about 1e-7 only. This one is for comparisons below that. It shifts by a
    constant or, where the pipeline passes `mu`, by exp(mu).
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Like the stock method, in float64. `timesteps` must be None; `mu` is for dynamic shifting, "exponential"."""
        if timesteps is not None or (mu is not None) != self.config.use_dynamic_shifting:
            raise ValueError(
                "Float64Scheduler expects `sigmas` or `num_inference_steps`, and `mu` if it shifts dynamically only; "
                f"got timesteps={timesteps}, mu={mu}; set `use_dynamic_shifting` as the pipeline needs it"
            )
        super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas, mu=mu)
        if sigmas is None:
            sigmas = np.linspace(self.sigma_max, self.sigma_min, num_inference_steps, dtype=np.float64)
        unshifted = torch.as_tensor(np.asarray(sigmas, dtype=np.float64), device=device)
        shift = self.shift if mu is None else math.exp(mu)
        shifted = shift * unshifted / (1 + (shift - 1) * unshifted)
        self.timesteps = shifted * self.config.num_train_timesteps
        self.sigmas = torch.cat([shifted, shifted.new_zeros(1)])

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        """One Euler step of `sample` (any shape) along `model_output`, in their dtype; always returns a tuple."""
        if self.step_index is None:
            self._init_step_index(timestep)
        step = self.step_index
        self._step_index += 1
        return (sample + (self.sigmas[step + 1] - self.sigmas[step]) * model_output,)


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows lower-case letters, digits and the quotation mark, one token each."""
    words = [*CHARACTERS, *(character + "</w>" for character in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TEXT_LENGTH)


def tiny_text_encoder(width: int) -> CLIPTextModelWithProjection:
    """A two-layer CLIP text encoder whose hidden size and projection are `width`."""
    tokens = 2 * len(CHARACTERS) + 2
    config = CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
        pad_token_id=tokens - 1,
    )
    return CLIPTextModelWithProjection(config)


def tiny_vae(channels: int, **config: object) -> AutoencoderKL:
    """An `AutoencoderKL` that makes pictures twice as large as its latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=8,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **config,
    )


def redraw(module: torch.nn.Module, gain: float, generator: torch.Generator) -> None:
    """Redraws every parameter: matrices N(0, gain^2 / fan_in), biases N(0, 0.1^2), norms' scales around 1."""
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim > 1:
            fan_in = math.prod(parameter.shape[1:])
            value = noise * gain / math.sqrt(fan_in)
        elif name.endswith("weight"):
            value = 1 + 0.1 * noise
        else:
            value = 0.1 * noise
        parameter.data.copy_(value)


def tiny_sd3_pipeline(
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    lora_rank: int | None = None,
    float64_scheduler: bool = False,
    shift: float = 3.0,
) -> StableDiffusion3Pipeline:
    """Builds the pipeline.

    Latents are (B, 4, 4, 4) and images (B, 3, 8, 8). Only the transformer's parameters require gradients.

    Args:
        dtype: dtype of every component.
        seed: seed of the weights.
        lora_rank: adds a LoRA with random (non-zero) matrices to the attention layers; then only its parameters,
            which are in `dtype` too, require gradients.
        float64_scheduler: takes `Float64Scheduler` in place of the stock scheduler.
        shift: the scheduler's shift.
    """
    generator = torch.Generator().manual_seed(seed)
    width = 16
    transformer = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=width // 2,
        num_attention_heads=2,
        joint_attention_dim=2 * width,
        caption_projection_dim=width,
        pooled_projection_dim=2 * width,
        pos_embed_max_size=4,
        dual_attention_layers=(0,),
    )
    vae = tiny_vae(4)
    text_encoder = tiny_text_encoder(width)
    text_encoder_2 = tiny_text_encoder(width)
    for module, gain in ((transformer, 1.0), (vae, 0.7), (text_encoder, 1.0), (text_encoder_2, 1.0)):
        redraw(module, gain, generator)
        module.requires_grad_(False)
        module.eval()
    scheduler_class = Float64Scheduler if float64_scheduler else FlowMatchEulerDiscreteScheduler
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=scheduler_class(shift=shift),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tiny_tokenizer(),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    if lora_rank is None:
        transformer.requires_grad_(True)
    else:
        add_random_lora(pipe, lora_rank, generator)
    pipe.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def add_random_lora(
    pipe: DiffusionPipeline,
    rank: int,
    generator: torch.Generator,
    layers: Sequence[str] = ATTENTION_LAYERS,
    **settings: object,
) -> None:
    """Adds a LoRA of this rank to the layers, both of its matrices random; only it requires gradients."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(layers), **settings)
    pipe.transformer.requires_grad_(False)
    pipe.transformer.add_adapter(config)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(parameter * (1 + 0.3 * noise) if "magnitude" in name else 0.3 * noise)


def save_random_lora(
    pipe: DiffusionPipeline, folder: Path, seed: int, rank: int = 2, layers: Sequence[str] = ATTENTION_LAYERS
) -> Path:
    """A random LoRA, whose alpha is twice its rank, in a file as the scripts write it; `pipe` keeps it."""
    add_random_lora(pipe, rank, torch.Generator().manual_seed(seed), layers)
    type(pipe).save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        **_collate_lora_metadata({"transformer": pipe.transformer}),
    )
    return folder


def draw(pipe: StableDiffusion3Pipeline) -> torch.Tensor:
    """The pipeline's image of one prompt, always from the same noise."""
    with torch.no_grad():
        return pipe(
            'the text "42"',
            height=8,
            width=8,
            num_inference_steps=3,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            generator=torch.Generator().manual_seed(1),
            output_type="pt",
            return_dict=False,
        )[0]


def mixing_samples(module: torch.nn.Module, inputs: object, returned: torch.Tensor) -> torch.Tensor:
    """A forward hook that makes every sample of a batch depend on all of it."""
    return returned + 0.3 * returned.mean(0, keepdim=True)
