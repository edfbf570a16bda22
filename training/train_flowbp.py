# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Train a LoRA of any flow-matching pipeline of diffusers (README.md has the list of those that are verified).

    accelerate launch training/train_flowbp.py \
        --pretrained_model_name_or_path Qwen/Qwen-Image --mixed_precision bf16 \
        --pipeline_arguments '{"true_cfg_scale": 4.0, "negative_prompt": " "}' \
        --method flowbp-lagrange --reward my_package.my_module:make_reward --prompts prompts.txt

The pipeline's class is the one that the model was saved with, and it is called with prompts, as at inference. What it
makes may be images or videos; of videos the reward scores every frame, and the mean counts. A pipeline that cannot be
recorded is refused in the first update, with the reason; of one that is not in the list, `--verify` compares the
gradient with autograd through its own code. For Stable Diffusion 3, FLUX.1 and FLUX.2-Klein there are scripts of their
own, with the paper's defaults. Here options of the method that are left out have those for Stable Diffusion 3.5.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata

from flowbp import FlowBPCallback
from flowbp.inference import call_arguments, saved_class
from flowbp.judging.images import score_pictures
from flowbp.rewards import part_means
from flowbp.training.arguments import (
    add_method_arguments,
    add_model_arguments,
    add_reward_arguments,
    add_training_arguments,
    choose_method,
    choose_objective,
    choose_rewards,
    json_object,
    parse_training_args,
)
from flowbp.training.checkpoints import find_checkpoint
from flowbp.training.distributed import prepare_transformer
from flowbp.training.prompt_embeds import group_offload_encoder, text_encoders
from flowbp.training.prompts import load_prompts
from flowbp.training.training_run import TrainingRun, run_script, verify_call
from flowbp.training.training_utils import (
    LORA_FILE,
    WEIGHT_DTYPES,
    add_lora,
    freeze,
    load_pipeline_config,
    load_quantization_config,
    make_accelerator,
    make_generator,
    missing_components,
    sample_generators,
    seed_rewards,
)
from flowbp.verified_pipelines import VERIFIED_PIPELINES

# The attention layers of most of diffusers' transformers.
LORA_LAYERS = "to_k,to_q,to_v,to_out.0"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, and the recipe that `--config` names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", help="YAML recipe with values for these options; the command line wins over it.")
    add_model_arguments(parser, "a diffusers pipeline", LORA_LAYERS)
    parser.add_argument(
        "--lora_component", default="transformer", help="Which of the pipeline's transformers gets the LoRA."
    )

    rollout = parser.add_argument_group("rollout: what the pipeline is called with, as at inference")
    add = rollout.add_argument
    add("--height", type=int, default=512, help="Height of the pictures.")
    add("--width", type=int, default=512, help="Width of the pictures.")
    add("--num_frames", type=int, help="Frames of a video. Default: the pipeline's.")
    add("--num_inference_steps", type=int, default=25, help="Steps N of a rollout (the paper: 25).")
    add("--guidance_scale", type=float, help="Guidance scale. Default: the pipeline's.")
    add(
        "--flow_shift",
        type=float,
        help="Sample with FlowMatchEulerDiscreteScheduler of this shift, for models that were saved with another "
        "scheduler, such as Wan (3.0 for 480p, 5.0 for 720p) and Sana.",
    )
    add(
        "--pipeline_arguments",
        type=json_object,
        default={},
        help="JSON object with more arguments of the pipeline's call, such as negative_prompt or true_cfg_scale.",
    )

    add_method_arguments(parser)
    add_reward_arguments(parser)
    add_training_arguments(parser, output_dir="flowbp-lora")
    args = parse_training_args(parser, argv)
    if args.undo_guidance:
        parser.error("--undo_guidance needs to know what guidance multiplies by; here set --loss_scale to 1 over it")
    return args


def pipeline_class(args: argparse.Namespace, config: dict[str, Any]) -> type[DiffusionPipeline]:
    """The class that a model was saved with, if it can have a LoRA and its scheduler is what the recorder needs."""
    Pipeline = saved_class(config, args.lora_component)
    name = Pipeline.__name__
    scheduler = config.get("scheduler", [None, None])[1]
    if scheduler == "FlowMatchEulerDiscreteScheduler" and args.flow_shift is not None:
        raise ValueError(f"--flow_shift {args.flow_shift}: {name} has its own Euler scheduler; leave the option out.")
    if scheduler != "FlowMatchEulerDiscreteScheduler" and args.flow_shift is None:
        raise ValueError(
            f"{name}: expected a model with FlowMatchEulerDiscreteScheduler, got {scheduler}; only Euler steps of "
            "flow matching can be recorded: give --flow_shift to sample with that scheduler, here and at inference."
        )
    return Pipeline


def check_size(args: argparse.Namespace, config: dict[str, Any], source: dict[str, Any]) -> None:
    """Refuse a size that the model cannot cut into patches, where VAE and transformer say so in the usual way."""
    model = args.pretrained_model_name_or_path

    def of(part: str) -> dict[str, Any]:
        component = getattr(diffusers, config.get(part, (None, ""))[1] or "", None)
        return {} if component is None else component.load_config(model, subfolder=part, **source)

    vae, transformer = of("vae"), of(args.lora_component)
    patch = transformer.get("patch_size")
    patch = patch[-1] if isinstance(patch, list | tuple) else patch
    if "block_out_channels" not in vae or not isinstance(patch, int):
        return
    multiple = 2 ** (len(vae["block_out_channels"]) - 1) * patch
    if transformer.get("in_channels") == 4 * vae.get("latent_channels", 0):
        # Latents are packed two by two.
        multiple *= 2
    for name in ("height", "width"):
        size = vars(args)[name]
        if size % multiple:
            below = max(multiple, size // multiple * multiple)
            raise ValueError(f"--{name} must be a multiple of {multiple} for this model, got {size}; use {below}.")


def main(argv: list[str] | None = None) -> None:
    """Train."""
    args = parse_args(argv)

    # What can be known to be wrong is, before any model is loaded.
    method = choose_method(args, backbone="sd3")
    objective = choose_objective(args, method, 1.0)
    source = {"revision": args.revision}
    model = args.pretrained_model_name_or_path
    config = load_pipeline_config(DiffusionPipeline, model, source)
    Pipeline = pipeline_class(args, config)
    check_size(args, config, source)
    given = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
    call = call_arguments(Pipeline, {name: vars(args)[name] for name in given} | args.pipeline_arguments)
    prompts = load_prompts(args.prompts, column=args.prompt_column, split=args.prompt_split)
    if args.resume_from_checkpoint is not None:
        find_checkpoint(args.output_dir, args.resume_from_checkpoint, tell=lambda message: None)
    weight_dtype = WEIGHT_DTYPES[args.mixed_precision]
    quantization_config = load_quantization_config(args.quantization_config_path, weight_dtype)
    rewards = choose_rewards(args, prompts)
    accelerator = make_accelerator(args)
    device = accelerator.device

    # The model: everything is frozen, only the LoRA is trained, in float32.
    loading = {"variant": args.variant, "dtype": weight_dtype, "use_safetensors": True, **source}
    parts: dict[str, Any] = dict(missing_components(config))
    if quantization_config is not None:
        transformer_class = getattr(diffusers, config[args.lora_component][1])
        parts[args.lora_component] = transformer_class.from_pretrained(
            model, subfolder=args.lora_component, quantization_config=quantization_config, **loading
        )
    if args.flow_shift is not None:
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=args.flow_shift)
    pipe = Pipeline.from_pretrained(model, trust_remote_code=False, **parts, **loading)
    pipe.set_progress_bar_config(disable=True)
    transformer = getattr(pipe, args.lora_component)
    encoders = text_encoders(pipe)
    for component in pipe.components.values():
        if not isinstance(component, torch.nn.Module):
            continue
        freeze(component)
        if args.group_offload and any(component is encoder for encoder in encoders):
            group_offload_encoder(component, device)
        elif component is not transformer:
            component.to(device)
    for module in rewards:
        freeze(module).to(device)
    for module in transformer.modules():
        # HiDream's experts: their code for evaluation runs without gradients, the other computes the same with them.
        if hasattr(module, "moe_infer"):
            module.train()
    add_lora(transformer, args)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
        vae = pipe.components.get("vae")
        if vae is not None and vae._supports_gradient_checkpointing:
            vae.enable_gradient_checkpointing()
    # Several processes: the sweep calls the wrapped transformer, the rollout the pipeline's own.
    wrapped = prepare_transformer(accelerator, transformer)

    # Every call, in training and validation, is the user's inference.
    def with_prompts(texts: list[str]) -> dict[str, Any]:
        arguments = {"prompt": texts, **call}
        if isinstance(arguments.get("negative_prompt"), str):
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(texts)
        return arguments

    def sample(texts: list[str], generator: torch.Generator | list[torch.Generator]) -> torch.Tensor:
        pictures = pipe(generator=generator, **with_prompts(texts))[0]
        if pictures.shape[-2:] != (args.height, args.width):
            made = " x ".join(str(size) for size in pictures.shape[-2:])
            raise ValueError(f"{Pipeline.__name__} makes {made} of {args.height} x {args.width}; ask for that size.")
        return pictures

    if args.verify:
        verify_call(args, method, pipe, with_prompts(prompts[:1]))
    elif Pipeline.__name__ not in VERIFIED_PIPELINES and accelerator.is_main_process:
        print(
            f"{Pipeline.__name__} is not among the verified pipelines of README.md; --verify compares its gradient "
            "with autograd through its own code before the run.",
            file=sys.stderr,
        )

    # The file is the same for all pipelines; those without a LoRA loader load it into the transformer.
    has_loader = hasattr(Pipeline, "save_lora_weights") and args.lora_component == "transformer"
    writer = Pipeline if has_loader else StableDiffusion3Pipeline

    def save_lora(folder: Path, lora: Mapping[str, torch.Tensor]) -> None:
        writer.save_lora_weights(
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
        sample=lambda prompt, generator: sample([prompt], generator),
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
            run.meter.mark("rollout")
            with callback.record(pipe):
                pictures = []
                for _ in range(1 + callback.copies):
                    noise = sample_generators("noise", args.seed, update, places)
                    pictures.append(sample(batch, noise))
            out = callback.backward(
                lambda images, texts: score_pictures(rewards.training, images.float(), texts),
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
    if accelerator.is_main_process and not args.dry_run:
        if has_loader:
            print(f'Load it with pipe.load_lora_weights("{args.output_dir}").')
        else:
            print(
                f'Load it with pipe.{args.lora_component}.load_lora_adapter("{args.output_dir}", '
                f'weight_name="{LORA_FILE}").'
            )


if __name__ == "__main__":
    run_script(main)
