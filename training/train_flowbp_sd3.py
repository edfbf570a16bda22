# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Train a LoRA of Stable Diffusion 3 with the gradient of a reward.

    accelerate launch training/train_flowbp_sd3.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium \
        --method flowbp-lagrange --reward my_package.my_module:make_reward --prompts prompts.txt

Every update: draw a surrogate, record a rollout of the stock pipeline, score its pictures, sweep the surrogate's
terms, step the optimizer. The LoRA in `--output_dir` loads with `pipe.load_lora_weights(output_dir)`.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from tqdm.auto import tqdm

from flowbp import METHODS, FlowBPCallback, Objective, get_method, load_reward
from flowbp.config import parse_args_with_config
from flowbp.drawing import STEP_SAMPLING
from flowbp.figures import before_after, image_grid, reward_curve
from flowbp.methods import ACTIVE_SUPPORTS, ENDPOINTS, OPTIONS, Method
from flowbp.prompts import PromptSampler, load_prompts
from flowbp.recording import RecordingError
from flowbp.training_utils import (
    checkpoints,
    derive_seed,
    find_checkpoint,
    load_checkpoint,
    make_generator,
    missing_components,
    push_to_hub,
    read_log,
    save_checkpoint,
)
from flowbp.weights import LEG_WEIGHTS

# Options of the method table; those left out keep the method's default for this backbone.
METHOD_OPTIONS = tuple(OPTIONS)

# The attention layers that diffusers' LoRA script for SD3 trains.
LORA_LAYERS = (
    "attn.add_k_proj,attn.add_q_proj,attn.add_v_proj,attn.to_add_out,attn.to_k,attn.to_out.0,attn.to_q,attn.to_v"
)


# Those of diffusers' schedules that need no further options.
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, and the recipe that `--config` names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--config", help="YAML recipe with values for these options; the command line wins over it.")

    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--pretrained_model_name_or_path", required=True, help="Folder or Hub id of a Stable Diffusion 3 pipeline.")
    add("--revision", help="Branch, tag or commit of the model on the Hub.")
    add("--variant", help="Variant of the model files, such as fp16.")
    add("--rank", type=int, default=4, help="Rank of the LoRA.")
    add("--lora_alpha", type=int, default=4, help="Scale of the LoRA: its update counts lora_alpha / rank.")
    add("--lora_layers", default=LORA_LAYERS, help="Names of the layers that get a LoRA, with commas between them.")
    add(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        help="Dtype of the frozen model; the LoRA stays float32. Default: what accelerate launch was told.",
    )
    add("--gradient_checkpointing", action="store_true", help="Recompute the transformer's blocks: less memory.")
    add("--allow_tf32", action="store_true", help="Allow TF32 matrix products on Ampere and later GPUs.")

    rollout = parser.add_argument_group("rollout: what the pipeline is called with, as at inference")
    add = rollout.add_argument
    add("--resolution", type=int, default=512, help="Height and width of the pictures.")
    add("--num_inference_steps", type=int, default=25, help="Steps N of a rollout (the paper: 25).")
    add("--guidance_scale", type=float, default=3.5, help="Guidance scale (the paper: 3.5).")
    add("--negative_prompt", default="", help="Prompt of the unconditional branch.")
    add("--max_sequence_length", type=int, default=77, help="Length of the T5 prompt; without T5, of its zeros.")
    add(
        "--sigmas",
        choices=("stock", "linear"),
        default="stock",
        help="stock: the scheduler's own; linear: linspace(1, 1 / N, N) before its shift, as the paper.",
    )

    method = parser.add_argument_group("method: a row of the table; options left out keep the row's default")
    add = method.add_argument
    add("--method", choices=tuple(METHODS), default="flowbp-lagrange", help="How the gradient returns.")
    add("--last_k", type=int, help="draft-k: how many of the last steps.")
    add("--last_n", type=int, help="refl: the endpoint is drawn among this many last steps.")
    add("--num_noised", type=int, help="draft-lv: re-noised copies of the sample.")
    add("--num_active", type=int, help="drtune, flowbp-sparse, flowbp-bridge: active steps K.")
    add("--early_stop_ratio", type=float, help="drtune: share of the last steps among which it stops.")
    add("--alpha", type=float, help="leapalign, flowbp-bridge, flowbp-lagrange: coupling at step j.")
    add("--tau", type=float, help="leapalign, flowbp-lagrange: floor of the gaps in the sample weights.")
    add("--late_bias", type=float, help="flowbp-sparse, flowbp-bridge: preference for late steps.")
    add("--grad_rescale", type=float, help="FlowBP rows: 0 leaves the weights, 1 makes them stand for all steps.")
    add("--order", type=int, help="flowbp-lagrange: support steps of a leg.")
    add("--active_supports", choices=ACTIVE_SUPPORTS, help="flowbp-lagrange: supports that get a gradient.")
    add("--support_scale", type=float, help="flowbp-lagrange: factor on supports other than the left end.")
    add("--weights", choices=LEG_WEIGHTS, help="flowbp-lagrange: weights of a leg.")
    add("--anchor_lambda", type=float, help="flowbp-lagrange: 1 is no single leap blended into the first leg.")
    add("--step_sampling", choices=STEP_SAMPLING, help="rows with k and j: how they are drawn.")
    add("--dirichlet", type=float, nargs=3, metavar=("TAIL", "MIDDLE", "HEAD"), help="Its concentrations.")
    add("--max_tail", type=int, help="rows with k and j: cap on N - j.")
    add("--tail_ratio", type=float, help="FlowBP rows: share of the last steps that can be active.")
    add("--endpoint", choices=ENDPOINTS, help="What the reward sees.")
    add("--max_gap_j", type=float, help="leapalign, flowbp-lagrange: drop samples with a larger gap at j.")
    add("--max_gap_0", type=float, help="leapalign, flowbp-lagrange: drop samples with a larger gap at the end.")
    add(
        "--unconditional_gradient",
        action=argparse.BooleanOptionalAction,
        help="Send gradients through the unconditional branch of guidance too. Default: the method's.",
    )
    add("--samples_per_decode", type=int, help="Decode and score this many pictures at a time: less memory.")
    add("--steps_per_forward", type=int, default=1, help="Steps evaluated together where they can be: more speed.")

    reward = parser.add_argument_group("reward and prompts")
    add = reward.add_argument
    add("--reward", required=True, help="Name, weighted sum (a:0.7,b:0.3) or package.module:factory.")
    add("--reward_augment", action="store_true", help="Shift, blur and noise pictures a little before the reward.")
    add("--reward_clip", type=float, help="Reward at which a sample stops to count (hinge; HPSv2.1: 0.55).")
    add("--loss_scale", type=float, default=1.0, help="Factor on the loss.")
    add(
        "--undo_guidance",
        action=argparse.BooleanOptionalAction,
        help="Divide the loss by the guidance scale. Default: the method's.",
    )
    add("--prompts", required=True, help=".txt, .jsonl, .csv or .parquet file, or a datasets folder or Hub id.")
    add("--prompt_column", help="Column of the prompts. Default: prompt, caption or text.")
    add("--prompt_split", default="train", help="Split of a dataset.")

    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--output_dir", type=Path, default=Path("sd3-flowbp-lora"), help="Folder of everything that is written.")
    add("--seed", type=int, default=0, help="Seed of noise, surrogates, prompt order and the LoRA's start.")
    add("--train_batch_size", type=int, default=4, help="Prompts per process and pass.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Passes per update.")
    add("--max_train_steps", type=int, default=300, help="Updates (the paper: 300).")
    add("--learning_rate", type=float, default=1e-4, help="Learning rate after warm-up.")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="Schedule of the learning rate.")
    add("--lr_warmup_steps", type=int, default=0, help="Updates of warm-up.")
    add("--lr_num_cycles", type=int, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=float, default=1.0, help="Power of polynomial.")
    add("--adam_beta1", type=float, default=0.9, help="AdamW.")
    add("--adam_beta2", type=float, default=0.999, help="AdamW.")
    add("--adam_weight_decay", type=float, default=1e-4, help="AdamW.")
    add("--adam_epsilon", type=float, default=1e-8, help="AdamW.")
    add("--max_grad_norm", type=float, default=1.0, help="Gradients are clipped to this norm.")
    add("--checkpointing_steps", type=int, default=500, help="Updates between checkpoints.")
    add("--checkpoints_total_limit", type=int, help="How many checkpoints to keep.")
    add("--resume_from_checkpoint", help="latest, or a checkpoint's name or path.")

    report = parser.add_argument_group("reports")
    add = report.add_argument
    add("--validation_prompt", nargs="+", help="Prompts of the validation pictures. Default: the first prompts.")
    add("--num_validation_images", type=int, default=4, help="Pictures of each, or how many of the first prompts.")
    add("--validation_steps", type=int, default=50, help="Updates between validations.")
    add("--report_to", default="tensorboard", help="An accelerate tracker, all, or none.")
    add("--logging_dir", default="logs", help="Folder of the tracker in --output_dir.")
    add("--push_to_hub", action="store_true", help="Push LoRA and pictures to the Hub at the end.")
    add("--hub_model_id", help="Repository on the Hub. Default: the output folder's name.")

    args = parse_args_with_config(parser, argv)
    counts = (
        "rank lora_alpha resolution num_inference_steps max_sequence_length train_batch_size max_train_steps "
        "gradient_accumulation_steps checkpointing_steps validation_steps num_validation_images steps_per_forward"
    ).split()
    for name, value in vars(args).items():
        optional = name in ("samples_per_decode", "checkpoints_total_limit") and value is not None
        if (name in counts or optional) and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    for name in ("learning_rate", "max_grad_norm", "loss_scale"):
        if not vars(args)[name] > 0:
            parser.error(f"--{name} must be above 0, got {vars(args)[name]}")
    if args.mixed_precision is None:
        args.mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if args.mixed_precision not in ("no", "fp16", "bf16"):
            parser.error(f"--mixed_precision must be no, fp16 or bf16, accelerate says {args.mixed_precision}")
    return args


def choose_method(args: argparse.Namespace) -> Method:
    """The row with its options, tried once on the run's number of steps, so that what does not fit fails now."""
    given = {name: vars(args)[name] for name in METHOD_OPTIONS if vars(args)[name] is not None}
    method = get_method(args.method, backbone="sd3", **given)
    method.draw(torch.linspace(1, 0, args.num_inference_steps + 1), make_generator("trial"))
    return method


def check_resolution(args: argparse.Namespace, source: dict[str, Any]) -> None:
    """Refuse a resolution that the model cannot cut into patches, from its configs alone."""
    vae = AutoencoderKL.load_config(args.pretrained_model_name_or_path, subfolder="vae", **source)
    transformer = SD3Transformer2DModel.load_config(
        args.pretrained_model_name_or_path, subfolder="transformer", **source
    )
    multiple = 2 ** (len(vae["block_out_channels"]) - 1) * transformer["patch_size"]
    if args.resolution % multiple:
        below = max(multiple, args.resolution // multiple * multiple)
        raise ValueError(
            f"--resolution must be a multiple of {multiple} for this model, got {args.resolution}; use {below}."
        )


def main(argv: list[str] | None = None) -> None:
    """Train."""
    args = parse_args(argv)

    # What can be known to be wrong is, before any model is loaded.
    method = choose_method(args)
    undo_guidance = method.undo_guidance if args.undo_guidance is None else args.undo_guidance
    objective = Objective(args.reward_clip, args.loss_scale, args.guidance_scale if undo_guidance else 1.0)
    prompts = load_prompts(args.prompts, column=args.prompt_column, split=args.prompt_split)
    source = {"revision": args.revision}
    check_resolution(args, source)
    resumed = find_checkpoint(args.output_dir, args.resume_from_checkpoint) if args.resume_from_checkpoint else None
    plain_reward = load_reward(args.reward)
    reward = load_reward(args.reward, augment=True) if args.reward_augment else plain_reward

    # Accelerate does the processes and trackers. The frozen model is cast by hand below, without autocast, so that the
    # rollout computes what the user's inference computes.
    accelerator = Accelerator(
        mixed_precision="no",
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=str(args.output_dir), logging_dir=str(args.output_dir / args.logging_dir)
        ),
    )
    rank, device = accelerator.process_index, accelerator.device
    expected_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected_processes:
        raise ValueError(
            f"expected {expected_processes} processes (WORLD_SIZE), accelerate runs {accelerator.num_processes}; on "
            "CPUs set ACCELERATE_USE_CPU=true."
        )
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    hub_model_id = args.hub_model_id or args.output_dir.resolve().name
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        if args.push_to_hub:
            from huggingface_hub import create_repo

            # A bad token or name fails here, not after the training.
            hub_model_id = create_repo(hub_model_id, exist_ok=True).repo_id
    accelerator.wait_for_everyone()

    # Load. Everything is frozen; only the LoRA is trained, in float32.
    weight_dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision]
    config = StableDiffusion3Pipeline.load_config(args.pretrained_model_name_or_path, **source)
    pipe = StableDiffusion3Pipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        variant=args.variant,
        dtype=weight_dtype,
        use_safetensors=True,
        **source,
        **missing_components(config),
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    for module in (reward, plain_reward):
        module.requires_grad_(False).eval().to(device)

    torch.manual_seed(derive_seed("lora", args.seed))
    target_modules = [name.strip() for name in args.lora_layers.split(",")]
    lora_config = LoraConfig(
        r=args.rank, lora_alpha=args.lora_alpha, init_lora_weights="gaussian", target_modules=target_modules
    )
    pipe.transformer.add_adapter(lora_config)
    cast_training_params(pipe.transformer, dtype=torch.float32)
    if args.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    parameters = [parameter for parameter in pipe.transformer.parameters() if parameter.requires_grad]

    optimizer = torch.optim.AdamW(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    # float16 gradients need a loss scale; it is off for the other dtypes.
    scaler = torch.amp.GradScaler(device.type, enabled=args.mixed_precision == "fp16")
    sampler = PromptSampler(prompts, args.train_batch_size, args.seed, rank, accelerator.num_processes)

    first_update = 0
    if resumed is not None:
        lora, state = load_checkpoint(resumed, optimizer, lr_scheduler)
        expected = {name: tensor.shape for name, tensor in get_peft_model_state_dict(pipe.transformer).items()}
        if {name: tensor.shape for name, tensor in lora.items()} != expected:
            raise ValueError(
                f"--resume_from_checkpoint {resumed}: its LoRA has other layers or another rank; use the "
                "--lora_layers and --rank of that run."
            )
        if bool(state["scaler"]) != scaler.is_enabled():
            raise ValueError(f"--resume_from_checkpoint {resumed}: use the --mixed_precision of that run.")
        set_peft_model_state_dict(pipe.transformer, lora)
        first_update = state["update"]
        sampler.load_state_dict(state["prompts"])
        scaler.load_state_dict(state["scaler"])
    # Several processes: the sweep calls the wrapped transformer, the rollout the pipeline's own.
    transformer = accelerator.prepare_model(pipe.transformer) if accelerator.num_processes > 1 else None

    settings = {name: str(value) for name, value in vars(args).items()}
    accelerator.init_trackers("flowbp-sd3", config=settings)
    log_path = args.output_dir / "log.jsonl"
    log = []
    if accelerator.is_main_process:
        log = read_log(log_path, first_update)
        log_path.write_text("".join(json.dumps(row) + "\n" for row in log), encoding="utf-8")

    # What every call of the pipeline gets, in training and validation: the rollout is the user's inference.
    call: dict[str, Any] = {
        "height": args.resolution,
        "width": args.resolution,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "negative_prompt": args.negative_prompt,
        "max_sequence_length": args.max_sequence_length,
    }
    if args.sigmas == "linear":
        call["sigmas"] = torch.linspace(1, 1 / args.num_inference_steps, args.num_inference_steps).tolist()

    if args.validation_prompt:
        validation_prompts = [prompt for prompt in args.validation_prompt for _ in range(args.num_validation_images)]
    else:
        validation_prompts = prompts[: args.num_validation_images]

    @torch.no_grad()
    def validate() -> tuple[list[Image.Image], list[float]]:
        """Pictures of the validation prompts and their rewards, always from the same noise."""
        images, scores = [], []
        for number, prompt in enumerate(validation_prompts):
            generator = make_generator("validation", args.seed, number)
            image = pipe(prompt, generator=generator, output_type="pt", **call).images
            scores += plain_reward(image.float(), [prompt]).tolist()
            images += pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(image))
        return images, scores

    def report_validation(update: int) -> None:
        images, scores = validate()
        grid = image_grid(images, columns=min(8, len(images)))
        folder = args.output_dir / "validation"
        folder.mkdir(exist_ok=True)
        grid.save(folder / f"{update:06d}.png")
        accelerator.log({"validation/reward": sum(scores) / len(scores)}, step=update)
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("validation", np.asarray(grid), update, dataformats="HWC")

    def lora_state() -> dict[str, torch.Tensor]:
        return get_peft_model_state_dict(pipe.transformer)

    def save(update: int) -> None:
        folder = args.output_dir / f"checkpoint-{update}"
        state = {"update": update, "prompts": sampler.state_dict(), "scaler": scaler.state_dict()}
        save_checkpoint(folder, lora_state(), optimizer, lr_scheduler, state)
        if args.checkpoints_total_limit is not None:
            for old in checkpoints(args.output_dir)[: -args.checkpoints_total_limit]:
                shutil.rmtree(old)

    progress = tqdm(
        range(first_update, args.max_train_steps),
        initial=first_update,
        total=args.max_train_steps,
        desc="updates",
        disable=not accelerator.is_main_process,
    )
    for update in progress:
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss_scale = scaler.scale(torch.ones((), device=device)).item()
        rewards, losses = [], []
        for part in range(args.gradient_accumulation_steps):
            batch = next(sampler)
            # Surrogates are shared by the processes, so that all do equal work; noise is not.
            callback = FlowBPCallback(
                method,
                generator=make_generator("surrogate", args.seed, update, part),
                unconditional_gradient=args.unconditional_gradient,
                samples_per_decode=args.samples_per_decode,
                steps_per_forward=args.steps_per_forward,
                noise_generator=make_generator("copies", args.seed, update, part, rank),
            )
            # Rewards that augment at random draw from torch's global generator.
            torch.manual_seed(derive_seed("reward", args.seed, update, part, rank))
            with callback.record(pipe):
                pictures = []
                for _ in range(1 + callback.copies):
                    noise = make_generator("noise", args.seed, update, part, rank)
                    pictures.append(
                        pipe(batch, generator=noise, output_type="pt", callback_on_step_end=callback, **call).images
                    )
            out = callback.backward(
                lambda images, prompts: reward(images.float(), prompts),
                torch.cat(pictures),
                batch,
                objective=objective,
                gradient_scale=loss_scale / args.gradient_accumulation_steps,
                transformer=transformer,
            )
            rewards.append(out.rewards)
            losses.append(out.loss)
        scaler.unscale_(optimizer)
        gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        if not torch.isfinite(gradient_norm) and not scaler.is_enabled():
            raise RecordingError(
                f"Update {update + 1}: the gradient holds NaN or infinite values; lower the learning rate."
            )
        scaler.step(optimizer)
        scaler.update()
        lr_scheduler.step()

        done = update + 1
        scores = accelerator.gather(torch.cat(rewards).float().to(device))
        row = {
            "step": done,
            "reward": scores.mean().item(),
            "reward_std": scores.std(correction=0).item(),
            "loss": accelerator.gather(torch.stack(losses).float().to(device)).mean().item(),
            "gradient_norm": gradient_norm.item(),
            "learning_rate": lr_scheduler.get_last_lr()[0],
            "seconds": time.perf_counter() - started,
        }
        accelerator.log({name: value for name, value in row.items() if name != "step"}, step=done)
        progress.set_postfix(reward=f"{row['reward']:.3f}", s_per_update=f"{row['seconds']:.2f}")
        if row["gradient_norm"] == 0:
            progress.write(
                f"Update {done}: the gradient is exactly 0. Are all rewards above --reward_clip, or all samples "
                "dropped by --max_gap_j or --max_gap_0?"
            )
        if accelerator.is_main_process:
            log.append(row)
            with log_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if done % args.checkpointing_steps == 0:
                save(done)
            if done % args.validation_steps == 0 and done < args.max_train_steps:
                report_validation(done)
        accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        StableDiffusion3Pipeline.save_lora_weights(
            args.output_dir,
            transformer_lora_layers=lora_state(),
            **_collate_lora_metadata({"transformer": pipe.transformer}),
        )
        aligned, aligned_scores = validate()
        pipe.transformer.disable_adapters()
        base, base_scores = validate()
        before_after(
            base,
            aligned,
            validation_prompts,
            args.output_dir / "before_after.png",
            title=f"{METHODS[args.method].title}: before and after {args.max_train_steps} updates",
            subtitle=f"reward: {args.reward}",
            scores=(base_scores, aligned_scores),
        )
        reward_curve(
            log, args.output_dir / "reward_curve.png", title=f"{METHODS[args.method].title}, reward {args.reward}"
        )
        print(f"LoRA, before_after.png and reward_curve.png are in {args.output_dir}")
        if args.push_to_hub:
            print(push_to_hub(args.output_dir, hub_model_id))
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RecordingError) as error:
        # One line for what the user can put right.
        sys.exit(f"train_flowbp_sd3.py: error: {' '.join(str(error).split())}")
