# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Train a LoRA of FLUX.1 with the gradient of a reward.

    accelerate launch training/train_flowbp_flux.py \
        --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --mixed_precision bf16 \
        --method flowbp-lagrange --reward my_package.my_module:make_reward --prompts prompts.txt

Every update: draw a surrogate, record a rollout of the stock pipeline, score its pictures, sweep the surrogate's
terms, step the optimizer. The LoRA in `--output_dir` loads with `pipe.load_lora_weights(output_dir)`.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import _collate_lora_metadata

from flowbp import FlowBPCallback
from flowbp.rewards import part_means
from flowbp.training.arguments import (
    add_method_arguments,
    add_model_arguments,
    add_prompt_embeds_arguments,
    add_reward_arguments,
    add_training_arguments,
    choose_method,
    choose_objective,
    choose_rewards,
    parse_training_args,
)
from flowbp.training.checkpoints import find_checkpoint
from flowbp.training.distributed import prepare_transformer
from flowbp.training.prompt_embeds import Embeds, prepare_prompt_embeds
from flowbp.training.prompts import load_prompts
from flowbp.training.training_run import TrainingRun, run_script, verify_call
from flowbp.training.training_utils import (
    WEIGHT_DTYPES,
    add_lora,
    freeze,
    load_pipeline_config,
    load_quantization_config,
    make_accelerator,
    make_generator,
    sample_generators,
    seed_rewards,
)

# The attention and feed-forward layers that diffusers' LoRA script for FLUX.1 trains.
LORA_LAYERS = (
    "attn.to_k,attn.to_q,attn.to_v,attn.to_out.0,attn.add_k_proj,attn.add_q_proj,attn.add_v_proj,attn.to_add_out,"
    "ff.net.0.proj,ff.net.2,ff_context.net.0.proj,ff_context.net.2"
)
TEXT_COMPONENTS = "text_encoder tokenizer text_encoder_2 tokenizer_2".split()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, and the recipe that `--config` names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", help="YAML recipe with values for these options; the command line wins over it.")
    add_model_arguments(parser, "a FLUX.1 pipeline", LORA_LAYERS)
    add_prompt_embeds_arguments(parser)

    rollout = parser.add_argument_group("rollout: what the pipeline is called with, as at inference")
    add = rollout.add_argument
    add("--resolution", type=int, default=512, help="Height and width of the pictures.")
    add("--num_inference_steps", type=int, default=25, help="Steps N of a rollout (the paper: 25).")
    add(
        "--guidance_scale", type=float, default=4.0, help="Distilled guidance, an input of the model (the paper: 4.0)."
    )
    add("--true_cfg_scale", type=float, default=1.0, help="Above 1: guidance by a second, unconditional call.")
    add("--negative_prompt", default="", help="Prompt of that call.")
    add("--max_sequence_length", type=int, default=512, help="Length of the T5 prompt.")

    add_method_arguments(parser)
    add_reward_arguments(parser)
    add_training_arguments(parser, output_dir="flux-flowbp-lora")
    args = parse_training_args(parser, argv)
    if args.negative_prompt and args.true_cfg_scale <= 1:
        parser.error("--negative_prompt has no effect without guidance; set --true_cfg_scale above 1")
    return args


def check_resolution(args: argparse.Namespace, source: dict[str, Any]) -> None:
    """Refuse a resolution that the pipeline would change, from the AutoencoderKL's config alone."""
    vae = AutoencoderKL.load_config(args.pretrained_model_name_or_path, subfolder="vae", **source)
    # Latents are packed two by two.
    multiple = 2 ** len(vae["block_out_channels"])
    if args.resolution % multiple:
        below = max(multiple, args.resolution // multiple * multiple)
        raise ValueError(
            f"--resolution must be a multiple of {multiple} for this model, got {args.resolution}; use {below}."
        )


def main(argv: list[str] | None = None) -> None:
    """Train."""
    args = parse_args(argv)

    # What can be known to be wrong is, before any model is loaded.
    method = choose_method(args, backbone="flux")
    # The distilled guidance is an input and multiplies nothing.
    guided = args.true_cfg_scale > 1
    objective = choose_objective(args, method, args.true_cfg_scale if guided else 1.0)
    prompts = load_prompts(args.prompts, column=args.prompt_column, split=args.prompt_split)
    source = {"revision": args.revision}
    model = args.pretrained_model_name_or_path
    load_pipeline_config(FluxPipeline, model, source)
    check_resolution(args, source)
    if args.resume_from_checkpoint is not None:
        find_checkpoint(args.output_dir, args.resume_from_checkpoint, tell=lambda message: None)
    weight_dtype = WEIGHT_DTYPES[args.mixed_precision]
    quantization_config = load_quantization_config(args.quantization_config_path, weight_dtype)
    rewards = choose_rewards(args, prompts)
    accelerator = make_accelerator(args)
    device = accelerator.device

    # Text: the embeddings that the stock pipeline makes, on the fly or once and kept.
    loading = {"variant": args.variant, "dtype": weight_dtype, "use_safetensors": True, **source}

    def load_text_pipeline() -> FluxPipeline:
        return FluxPipeline.from_pretrained(model, transformer=None, vae=None, trust_remote_code=False, **loading)

    def encode(pipe: FluxPipeline, texts: list[str]) -> Embeds:
        embeds, pooled, _ = pipe.encode_prompt(
            texts, None, device=device, max_sequence_length=args.max_sequence_length
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    prompt_embeds = prepare_prompt_embeds(
        args,
        accelerator,
        load_text_pipeline,
        encode,
        [*prompts, *rewards.evaluation_prompts],
        args.negative_prompt if guided else None,
    )

    # The model: everything is frozen, only the LoRA is trained, in float32.
    transformer = FluxTransformer2DModel.from_pretrained(
        model, subfolder="transformer", quantization_config=quantization_config, **loading
    )
    without = dict.fromkeys(TEXT_COMPONENTS)
    pipe = FluxPipeline.from_pretrained(model, transformer=transformer, trust_remote_code=False, **without, **loading)
    freeze(pipe.vae).to(device)
    freeze(transformer)
    pipe.set_progress_bar_config(disable=True)
    for module in rewards:
        freeze(module).to(device)
    add_lora(transformer, args)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
        pipe.vae.enable_gradient_checkpointing()
    # Several processes: the sweep calls the wrapped transformer, the rollout the pipeline's own.
    wrapped = prepare_transformer(accelerator, transformer)

    # What every call of the pipeline gets, in training and validation: the rollout is the user's inference.
    # Its stock sigmas are the paper's: linspace(1, 1 / N, N) before the scheduler's shift.
    call: dict[str, Any] = {
        "height": args.resolution,
        "width": args.resolution,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "true_cfg_scale": args.true_cfg_scale,
        "max_sequence_length": args.max_sequence_length,
        "output_type": "pt",
    }

    if args.verify:
        verify_call(args, method, pipe, {**prompt_embeds(prompts[:1]), **call})

    def save_lora(folder: Path, lora: Mapping[str, torch.Tensor]) -> None:
        FluxPipeline.save_lora_weights(
            folder,
            transformer_lora_layers=dict(lora),
            **_collate_lora_metadata({"transformer": transformer}),
        )

    run = TrainingRun(
        args,
        accelerator,
        method,
        pipe,
        transformer,
        prompts,
        sample=lambda prompt, generator: pipe(**prompt_embeds([prompt]), generator=generator, **call).images,
        rewards=rewards,
        save_lora=save_lora,
    )
    for update in run.updates():
        for _ in range(args.gradient_accumulation_steps):
            batch, places = run.next_batch()
            # Passes and processes share a surrogate, so that they do equal work; every sample has noise of its own.
            callback = FlowBPCallback(
                method,
                generator=make_generator("surrogate", args.seed, update),
                unconditional_gradient=args.unconditional_gradient,
                samples_per_decode=args.samples_per_decode,
                noise_generator=sample_generators("copies", args.seed, update, places),
                strict=args.strict or update == run.first_update,
                on_stage=run.meter.mark,
                velocity_anchor=args.velocity_anchor,
                measure_gradients=True,
            )
            seed_rewards(args.seed, update, places)
            run.meter.mark("encode")
            embeds = prompt_embeds(batch)
            run.meter.mark("rollout")
            with callback.record(pipe):
                pictures = []
                for _ in range(1 + callback.copies):
                    noise = sample_generators("noise", args.seed, update, places)
                    pictures.append(pipe(**embeds, generator=noise, callback_on_step_end=callback, **call).images)
            out = callback.backward(
                lambda images, texts: rewards.training(images.float(), texts),
                torch.cat(pictures),
                batch,
                objective=objective,
                gradient_scale=run.gradient_scale,
                transformer=wrapped,
            )
            run.collect(out, callback.surrogate, part_means(rewards.training))
        run.optimizer_step()
        run.report(update)
    run.finish()


if __name__ == "__main__":
    run_script(main)
