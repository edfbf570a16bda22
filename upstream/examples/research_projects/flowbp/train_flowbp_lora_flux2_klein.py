#!/usr/bin/env python
# coding=utf-8
# Copyright 2026 The HuggingFace Inc. team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

# /// script
# dependencies = [
#     "diffusers @ git+https://github.com/huggingface/diffusers.git",
#     "flowbp[optimizers]",
#     "sentencepiece",
#     "protobuf",
# ]
# ///

import argparse
import hashlib
import json
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedType, skip_first_batches
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, broadcast_object_list, set_seed
from datasets import load_dataset
from flowbp import FlowBPCallback, get_method, load_reward
from huggingface_hub import create_repo, upload_folder
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from tqdm.auto import tqdm

from diffusers import BitsAndBytesConfig, Flux2KleinPipeline, PipelineQuantizationConfig
from diffusers.optimization import get_scheduler
from diffusers.training_utils import _collate_lora_metadata, cast_training_params, free_memory
from diffusers.utils import check_min_version, is_wandb_available
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card


if is_wandb_available():
    import wandb

# Will error if the minimal version of diffusers is not installed. Remove at your own risks.
check_min_version("0.40.0.dev0")

logger = get_logger(__name__)


def save_model_card(repo_id, images, args, repo_folder):
    widget = []
    for i, image in enumerate(images):
        image.save(Path(repo_folder, f"image_{i}.png"))
        widget.append({"text": args.validation_prompt, "output": {"url": f"image_{i}.png"}})

    text = f"""
# FLUX.2-Klein FlowBP LoRA - {repo_id}

<Gallery />

These are LoRA weights for {args.pretrained_model_name_or_path}. They were trained with the gradient of the reward
`{args.reward}` on the prompts of `{args.dataset_name}`, without images, by the method `{args.method}` of
[FlowBP](https://huggingface.co/papers/2606.11075). A reward can be high for images that people do not prefer.

```py
import torch
from diffusers import Flux2KleinPipeline
pipeline = Flux2KleinPipeline.from_pretrained("{args.pretrained_model_name_or_path}", dtype=torch.bfloat16)
pipeline.load_lora_weights("{repo_id}")
sampling = {{"num_inference_steps": {args.num_inference_steps}, "guidance_scale": {args.guidance_scale}}}
image = pipeline.to("cuda")("a photo of a cat", height={args.resolution}, width={args.resolution}, **sampling).images[0]
```

Please adhere to the licensing terms of the base model.
"""
    base_model = args.pretrained_model_name_or_path
    model_card = load_or_create_model_card(
        repo_id, from_training=True, license="other", base_model=base_model, model_description=text, widget=widget
    )
    tags = ["text-to-image", "diffusers-training", "diffusers", "lora", "flowbp"]
    tags += ["flux2-klein", "flux2-klein-diffusers"]
    populate_model_card(model_card, tags=tags).save(Path(repo_folder, "README.md"))


def log_validation(rollout, args, accelerator, step, is_final_validation=False):
    logger.info(f"Running validation... \n Generating {args.num_validation_images} images: {args.validation_prompt}.")
    noise = [make_generator("validation", args.seed, i) for i in range(args.num_validation_images)]
    with torch.no_grad():
        images = [rollout([args.validation_prompt], [generator], output_type="pil")[0] for generator in noise]
    for tracker in accelerator.trackers if images else []:
        phase_name = "test" if is_final_validation else "validation"
        if tracker.name == "tensorboard":
            np_images = np.stack([np.asarray(image) for image in images])
            tracker.writer.add_images(phase_name, np_images, step, dataformats="NHWC")
        if tracker.name == "wandb":
            tracker.log({phase_name: [wandb.Image(image, caption=args.validation_prompt) for image in images]})
    return images


def make_generator(*parts):
    # Every part changes the seed. So noise depends neither on the number of processes nor on a resume.
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description="Train a LoRA of FLUX.2-Klein with the gradient of a reward.")
    parser.add_argument("--pretrained_model_name_or_path", type=str, required=True, help="Hub id or path of the model")
    parser.add_argument("--revision", type=str, default=None, help="Revision of the model on the Hub")
    parser.add_argument("--variant", type=str, default=None, help="Variant of the model files, e.g. fp16")
    parser.add_argument("--bnb_quantization_config_path", type=str, help="JSON file of a bitsandbytes config")
    parser.add_argument("--dataset_name", type=str, required=True, help="Prompts, on the Hub or in a folder of files")
    parser.add_argument("--dataset_config_name", type=str, default=None, help="Config of the dataset")
    parser.add_argument("--caption_column", type=str, default=None, help="Column of the prompts, if there are several")
    parser.add_argument("--reward", type=str, required=True, help="pickscore, hpsv2.1, ..., or package.module:factory")
    parser.add_argument("--reward_clip", type=float, default=None, help="Samples above this reward get no gradient")
    parser.add_argument("--method", type=str, default="flowbp-lagrange", help="How the reward's gradient returns")
    parser.add_argument("--method_options", type=json.loads, default={}, help='As JSON, such as {"alpha": 0.3}')
    parser.add_argument("--num_inference_steps", type=int, default=25, help="Steps of a rollout, as at inference")
    parser.add_argument("--guidance_scale", type=float, default=3.5, help="Guidance of a rollout, as at inference")
    parser.add_argument("--samples_per_decode", type=int, default=None, help="Images that are decoded at a time")
    parser.add_argument("--max_sequence_length", type=int, default=512, help="Length of prompts in tokens")
    parser.add_argument("--validation_prompt", type=str, default=None, help="Prompt to draw images of")
    parser.add_argument("--num_validation_images", type=int, default=4, help="Images of the validation prompt")
    parser.add_argument("--validation_epochs", type=int, default=50, help="Epochs between validations")
    parser.add_argument("--rank", type=int, default=4, help="Rank of the LoRA")
    parser.add_argument("--lora_alpha", type=int, default=4, help="Alpha of the LoRA, which is scaled by alpha / rank")
    parser.add_argument("--output_dir", type=str, default="flux2-klein-flowbp-lora", help="Folder of the results")
    parser.add_argument("--seed", type=int, default=None, help="A seed for reproducible training")
    parser.add_argument("--resolution", type=int, default=512, help="Height and width of the images")
    parser.add_argument("--train_batch_size", type=int, default=4, help="Prompts per device and rollout")
    parser.add_argument("--num_train_epochs", type=int, default=1)
    parser.add_argument("--max_train_steps", type=int, default=None, help="Updates, overrides num_train_epochs")
    parser.add_argument("--checkpointing_steps", type=int, default=500, help="Updates between checkpoints")
    parser.add_argument("--checkpoints_total_limit", type=int, default=None, help="Max number of checkpoints to keep")
    parser.add_argument("--resume_from_checkpoint", type=str, default=None, help='Name or path, or "latest"')
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1, help="Rollouts per device and update")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="Less memory, slower backward passes")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="Learning rate after warmup")
    parser.add_argument("--lr_scheduler", type=str, default="constant", help="Name of a scheduler of diffusers")
    parser.add_argument("--lr_warmup_steps", type=int, default=500, help="Updates of warmup, for schedulers with one")
    parser.add_argument("--optimizer", type=str.lower, default="AdamW", choices=["adamw", "prodigy"])
    parser.add_argument("--use_8bit_adam", action="store_true", help="Use 8-bit AdamW from bitsandbytes")
    parser.add_argument("--adam_beta1", type=float, default=0.9, help="beta1 of AdamW and Prodigy")
    parser.add_argument("--adam_beta2", type=float, default=0.999, help="beta2 of AdamW and Prodigy")
    parser.add_argument("--adam_weight_decay", type=float, default=1e-04, help="Weight decay of AdamW and Prodigy")
    parser.add_argument("--lora_layers", type=str, default=None, help="Names of layers to train, with commas")
    parser.add_argument("--adam_epsilon", type=float, default=1e-08, help="Epsilon of AdamW and Prodigy")
    parser.add_argument("--max_grad_norm", default=1.0, type=float, help="Max gradient norm")
    parser.add_argument("--push_to_hub", action="store_true", help="Whether to push the LoRA to the Hub")
    parser.add_argument("--hub_model_id", type=str, default=None, help="Repository to push to; default: output_dir")
    parser.add_argument("--logging_dir", type=str, default="logs", help="Folder of the logs in output_dir")
    parser.add_argument("--allow_tf32", action="store_true", help="Allow TF32 on Ampere GPUs")
    parser.add_argument("--report_to", type=str, default="tensorboard", help="tensorboard, wandb, comet_ml or all")
    parser.add_argument("--mixed_precision", type=str, choices=["no", "fp16", "bf16"], help="Of the base model")
    args = parser.parse_args(input_args)

    if args.use_8bit_adam and args.optimizer != "adamw":
        raise ValueError("`--use_8bit_adam` needs `--optimizer AdamW`.")
    if args.resume_from_checkpoint and args.seed is None:
        raise ValueError("`--resume_from_checkpoint` needs the `--seed` of that run, which is in its log.")
    return args


def main(args):
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=Path(args.output_dir, args.logging_dir)),
        # Buffers never change. They need not be sent before each of the passes of an update.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    # No autocast: a rollout computes what the pipeline computes at inference.
    accelerator.native_amp = False
    if accelerator.distributed_type != DistributedType.NO and "MULTI_" not in accelerator.distributed_type.value:
        raise ValueError(f"Expected one process or several with DDP, got {accelerator.distributed_type.value}.")

    # Make one log on every process with the configuration for debugging.
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
    logger.info(accelerator.state, main_process_only=False)

    # All processes need the same seed.
    if args.seed is None:
        args.seed = broadcast_object_list([torch.seed() % 2**32])[0]
    set_seed(args.seed)

    # These read what can be wrong before a model is loaded.
    method = get_method(args.method, backbone="flux2", **args.method_options)
    reward = load_reward(args.reward)
    dataset = load_dataset(args.dataset_name, args.dataset_config_name, split="train")
    column = args.caption_column or dataset.column_names[0]
    if column not in dataset.column_names or (args.caption_column is None and len(dataset.column_names) > 1):
        raise ValueError(f"`--caption_column` must be one of {dataset.column_names}, got {args.caption_column}.")
    prompts = [prompt.strip() for prompt in dataset[column] if prompt and prompt.strip()]

    if accelerator.is_main_process and args.push_to_hub:
        repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
        repo_id = create_repo(repo_id=repo_id, exist_ok=True).repo_id

    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[accelerator.mixed_precision]
    load_args = {"use_safetensors": True, "trust_remote_code": False}
    load_args.update(revision=args.revision, variant=args.variant, dtype=dtype)
    model, device = args.pretrained_model_name_or_path, accelerator.device

    # Encode every prompt once, keep the embeddings on the CPU and free the text encoders.
    pipeline = Flux2KleinPipeline.from_pretrained(model, transformer=None, vae=None, **load_args).to(device)
    encoded = dict.fromkeys(["", *prompts, *filter(None, [args.validation_prompt])])
    with torch.no_grad():
        for prompt in tqdm(encoded, "Encoding prompts", disable=not accelerator.is_main_process):
            embeds, _ = pipeline.encode_prompt(prompt, device, max_sequence_length=args.max_sequence_length)
            encoded[prompt] = {"prompt_embeds": embeds.cpu()}
    del pipeline
    free_memory()

    if args.bnb_quantization_config_path is not None:
        bnb_config = json.loads(Path(args.bnb_quantization_config_path).read_text())
        bnb_config = BitsAndBytesConfig(**{**bnb_config, "bnb_4bit_compute_dtype": dtype})
        load_args.update(quantization_config=PipelineQuantizationConfig(quant_mapping={"transformer": bnb_config}))
    pipeline = Flux2KleinPipeline.from_pretrained(model, text_encoder=None, tokenizer=None, **load_args).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.requires_grad_(False)
    pipeline.vae.requires_grad_(False)
    reward.to(device)
    if args.gradient_checkpointing:
        pipeline.transformer.enable_gradient_checkpointing()
        pipeline.vae.enable_gradient_checkpointing()

    # now we will add new LoRA weights to the transformer
    layers = ["to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj"]
    layers += [f"single_transformer_blocks.{block}.attn.to_out" for block in range(24)]
    if args.lora_layers is not None:
        layers = [layer.strip() for layer in args.lora_layers.split(",")]
    config = LoraConfig(r=args.rank, lora_alpha=args.lora_alpha, init_lora_weights="gaussian", target_modules=layers)
    pipeline.transformer.add_adapter(config)
    cast_training_params(pipeline.transformer, dtype=torch.float32)
    lora_parameters = [parameter for parameter in pipeline.transformer.parameters() if parameter.requires_grad]

    def save_lora(folder):
        lora_layers = get_peft_model_state_dict(pipeline.transformer)
        metadata = _collate_lora_metadata({"transformer": pipeline.transformer})
        Flux2KleinPipeline.save_lora_weights(folder, transformer_lora_layers=lora_layers, **metadata)

    # create custom saving & loading hooks so that `accelerator.save_state(...)` serializes in a nice format
    def save_model_hook(models, weights, output_dir):
        if accelerator.is_main_process:
            save_lora(output_dir)
        # make sure to clear weights so that the whole model is not saved too
        weights.clear()

    def load_model_hook(models, input_dir):
        models.clear()
        lora_state_dict = Flux2KleinPipeline.lora_state_dict(input_dir, use_safetensors=True)
        lora_state_dict = {name.removeprefix("transformer."): value for name, value in lora_state_dict.items()}
        if lora_state_dict.keys() != get_peft_model_state_dict(pipeline.transformer).keys():
            raise ValueError(f"The LoRA of {input_dir} has other layers than this run.")
        set_peft_model_state_dict(pipeline.transformer, lora_state_dict, adapter_name="default")

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)

    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32

    # Optimizer creation
    optimizer_args = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
    optimizer_args.update(weight_decay=args.adam_weight_decay, eps=args.adam_epsilon)
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy as optimizer_class

        optimizer_args.update(use_bias_correction=True, safeguard_warmup=True)
        if args.learning_rate <= 0.1:
            logger.warning("When using prodigy, it's generally better to set learning rate around 1.0")
    elif args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as optimizer_class
    else:
        optimizer_class = torch.optim.AdamW
    optimizer = optimizer_class(lora_parameters, **optimizer_args)

    # DataLoaders creation: the prompts are the dataset, and this generator decides their order.
    order = torch.Generator()
    train_dataloader = torch.utils.data.DataLoader(prompts, args.train_batch_size, shuffle=True, generator=order)

    # Scheduler and math around the number of training steps.
    num_batches = math.ceil(len(train_dataloader) / accelerator.num_processes)
    num_update_steps_per_epoch = math.ceil(num_batches / args.gradient_accumulation_steps)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * num_update_steps_per_epoch
    args.num_train_epochs = math.ceil(args.max_train_steps / num_update_steps_per_epoch)
    num_warmup_steps = args.lr_warmup_steps * accelerator.num_processes
    num_training_steps = args.max_train_steps * accelerator.num_processes
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, None, num_warmup_steps, num_training_steps)

    # Prepare everything with our `accelerator`. The pipeline keeps the transformer that is not wrapped.
    transformer, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        pipeline.transformer, optimizer, train_dataloader, lr_scheduler
    )

    config = {**vars(args), "method_options": json.dumps(args.method_options)}
    accelerator.init_trackers("flowbp-flux2-klein-lora", config)

    # Train!
    logger.info("***** Running training *****")
    logger.info(f"  Num prompts = {len(prompts)}, num epochs = {args.num_train_epochs}, seed = {args.seed}")
    total_batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    logger.info(f"  Total train batch size (w. parallel, distributed & accumulation) = {total_batch_size}")
    logger.info(f"  Total optimization steps = {args.max_train_steps}")
    global_step = 0

    def list_checkpoints():
        return sorted(Path(args.output_dir).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))

    # Potentially load in the weights and states from a previous save
    if args.resume_from_checkpoint:
        given = args.resume_from_checkpoint
        path = Path(given) if Path(given).is_dir() else Path(args.output_dir, given)
        path = next(reversed(list_checkpoints()), None) if given == "latest" else path
        if path is None:
            accelerator.print("There is no checkpoint. Starting a new training run.")
        else:
            accelerator.print(f"Resuming from checkpoint {path}")
            accelerator.load_state(path)
            global_step = int(path.name.split("-")[1])
    initial_global_step = global_step
    first_epoch = global_step // num_update_steps_per_epoch
    first_batch = global_step % num_update_steps_per_epoch * args.gradient_accumulation_steps

    size = {"height": args.resolution, "width": args.resolution}
    sampling = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}

    def rollout(prompts, generators, output_type="pt"):
        inputs = {}
        for name in encoded[""]:
            inputs[name] = torch.cat([encoded[prompt][name] for prompt in prompts]).to(device)
            inputs[f"negative_{name}"] = torch.cat([encoded[""][name]] * len(prompts)).to(device)
        return pipeline(**inputs, **size, **sampling, generator=generators, output_type=output_type).images

    def objective(rewards, weights):
        # The method weights samples, drops those of weight 0, and may undo the gain that guidance gives the gradient.
        gain = args.guidance_scale if method.undo_guidance and pipeline.do_classifier_free_guidance else 1.0
        losses = -rewards if args.reward_clip is None else torch.relu(args.reward_clip - rewards)
        return (weights * losses).sum() / (weights != 0).sum().clamp(min=1) / gain

    progress = tqdm(range(args.max_train_steps), "Steps", initial=global_step, disable=not accelerator.is_main_process)
    outputs = []

    for epoch in range(first_epoch, args.num_train_epochs):
        # The order depends on the seed and the epoch alone. A run that resumes goes on in the middle of it.
        order.manual_seed(args.seed + epoch)
        active_dataloader = skip_first_batches(train_dataloader, first_batch if epoch == first_epoch else 0)

        for batch in active_dataloader:
            if global_step >= args.max_train_steps:
                break
            with accelerator.accumulate(transformer):
                # Each sample has noise of its own, by its place in the update. All samples share one surrogate path.
                start = (len(outputs) * accelerator.num_processes + accelerator.process_index) * args.train_batch_size
                places = range(start, start + len(batch))
                callback = FlowBPCallback(
                    method,
                    generator=make_generator("surrogate", args.seed, global_step),
                    noise_generator=[make_generator("copies", args.seed, global_step, place) for place in places],
                    samples_per_decode=args.samples_per_decode,
                    strict=global_step == initial_global_step,
                )

                # Record: sample without gradients (some methods call the pipeline more than once).
                with callback.record(pipeline):
                    images = []
                    for _ in range(1 + callback.copies):
                        noise = [make_generator("noise", args.seed, global_step, place) for place in places]
                        images.append(rollout(batch, noise))

                # Score, backward: the reward's gradient goes back along the path, with the graph of one step at a time.
                scale = torch.tensor(1 / args.gradient_accumulation_steps, device=device)
                out = callback.backward(
                    reward,
                    torch.cat(images).float(),
                    batch,
                    objective=objective,
                    gradient_scale=(scale if accelerator.scaler is None else accelerator.scaler.scale(scale)).item(),
                    transformer=transformer,
                )
                outputs.append(torch.stack([out.rewards.mean(), out.loss]))

                # Step
                if accelerator.sync_gradients:
                    if accelerator.scaler is not None:
                        accelerator.scaler.unscale_(optimizer.optimizer)
                    grad_norm = accelerator.clip_grad_norm_(lora_parameters, args.max_grad_norm)
                    if accelerator.scaler is None and not torch.isfinite(grad_norm):
                        raise ValueError(f"The gradient of update {global_step + 1} is not finite.")
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()

            # Checks if the accelerator has performed an optimization step behind the scenes
            if accelerator.sync_gradients:
                progress.update(1)
                global_step += 1
                mean, loss = accelerator.reduce(torch.stack(outputs).mean(0), reduction="mean").tolist()
                lr = lr_scheduler.get_last_lr()[0]
                logs = {"reward": mean, "loss": loss, "grad_norm": grad_norm.item(), "lr": lr}
                outputs = []
                progress.set_postfix(**logs)
                accelerator.log(logs, step=global_step)

                if global_step % args.checkpointing_steps == 0:
                    # The folder gets its name when all processes have saved their state.
                    partial_path = Path(args.output_dir, "partial-checkpoint")
                    accelerator.save_state(partial_path)
                    accelerator.wait_for_everyone()
                    if accelerator.is_main_process:
                        save_path = Path(args.output_dir, f"checkpoint-{global_step}")
                        shutil.rmtree(save_path, ignore_errors=True)
                        partial_path.rename(save_path)
                        logger.info(f"Saved state to {save_path}")
                        if args.checkpoints_total_limit is not None:
                            for path in list_checkpoints()[: -args.checkpoints_total_limit]:
                                shutil.rmtree(path)
                    accelerator.wait_for_everyone()

        if accelerator.is_main_process and args.validation_prompt and epoch % args.validation_epochs == 0:
            log_validation(rollout, args, accelerator, global_step)

    # Save the lora layers
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_lora(args.output_dir)
        images = log_validation(rollout, args, accelerator, global_step, True) if args.validation_prompt else []
        if args.push_to_hub:
            save_model_card(repo_id, images, args, repo_folder=args.output_dir)
            names = ["README.md", "pytorch_lora_weights.safetensors", *(f"image_{i}.png" for i in range(len(images)))]
            upload_folder(repo_id=repo_id, folder_path=args.output_dir, allow_patterns=names)

    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
