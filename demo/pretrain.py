# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Trains the demo's base model from scratch on a CPU: a small Stable Diffusion 3 that draws pictures of text.

First the `AutoencoderKL` (all of it, then its decoder alone), then the transformer and both text encoders together, by
flow matching on cached latents. While the latter train, the stock pipeline samples held-out prompts and a text
recogniser reads the pictures; training stops once enough of them are read right, on purpose long before all are, so
that reward training has something to improve.

    python demo/pretrain.py --output_dir demo/pipeline --work_dir /tmp/pretrain
"""

import argparse
import copy
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import EMAModel
from PIL import Image
from text_pictures import COLOURS, colours_right, draw_picture, parse_prompt, split_prompts
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from flowbp.rewards.ocr import OCRReward

RESOLUTION = 48
LATENT_CHANNELS = 8
TOKENS = 16  # the longest prompt has 15, start and end included
MAX_SEQUENCE_LENGTH = 1  # zero tokens that the pipeline adds in the place of T5's
EVALUATION_PROMPTS = 384  # of the held-out prompts; the others tell when to stop
Log = Callable[..., None]  # writes its keywords as one line of JSON

# glibc gives large blocks back to the system after each use and takes them again, zeroed page by page: on two cores
# this makes a training step several times slower. These settings make it keep them.
MALLOC_SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the finished pipeline (float16)")
    parser.add_argument("--work_dir", type=Path, required=True, help="folder of checkpoints, sample grids and the log")
    parser.add_argument("--vae", type=Path, help="folder of an already trained AutoencoderKL; its training is skipped")
    parser.add_argument("--checkpoint", type=Path, help="folder of a checkpoint to go on from")
    parser.add_argument("--vae_steps", type=int, default=1800)
    parser.add_argument("--decoder_steps", type=int, default=1600, help="further steps of the decoder alone")
    parser.add_argument("--vae_batch_size", type=int, default=16)
    parser.add_argument("--vae_learning_rate", type=float, default=2e-3)
    parser.add_argument("--max_train_steps", type=int, default=2400, help="0 saves and measures --checkpoint as it is")
    parser.add_argument("--train_batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--warmup_steps", type=int, default=100)
    parser.add_argument("--ema_decay", type=float, default=0.995)
    parser.add_argument("--pictures_per_prompt", type=int, default=2, help="drawn and encoded once, before training")
    parser.add_argument("--empty_captions", type=float, default=0.1, help="share of captions dropped, for guidance")
    parser.add_argument("--shift", type=float, default=3.0, help="of the scheduler's sigmas")
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--eval_steps", type=int, default=200)
    parser.add_argument("--stop_at", type=float, default=0.45, help="share read by PP-OCR v5 at which to stop")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with one token for each word of the prompts and one for each digit and quote."""
    # A merge made for one word also acts inside the others, the earlier ones first: green's "gr" has to come before
    # red's "re", and background's "backg" before green's "gr".
    colours = sorted(COLOURS, key=lambda colour: colour != "green")
    words = ["the", "text", "in", "on", "a", "background", *colours]
    vocabulary, merges = {}, []
    for character in '"0123456789abcdefghijklmnopqrstuvwxyz':
        for unit in (character, character + "</w>"):
            vocabulary[unit] = len(vocabulary)
    for word in words:
        units = [*word[:-1], word[-1] + "</w>"]
        while len(units) > 1:
            left, right = units[0], units[1]
            if left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
            units = [left + right, *units[2:]]
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)
    split = [word for word in words if len(tokenizer.tokenize(word)) != 1]
    if split:
        raise ValueError(f"expected one token for each word, the merges break up {', '.join(split)}")
    return tokenizer


def make_text_encoder() -> CLIPTextModelWithProjection:
    tokenizer = make_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config)
    # CLIP's own scale, 0.02, is for weeks of training: here digits would stay alike for the first minutes.
    for name, parameter in encoder.named_parameters():
        if "token_embedding" in name or "position_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return encoder


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=RESOLUTION,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def make_transformer() -> SD3Transformer2DModel:
    transformer = SD3Transformer2DModel(
        sample_size=RESOLUTION // 4,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=12,
        qk_norm="rms_norm",
    )
    # Each block starts as the identity and the output as zero.
    zeroed = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        zeroed += [block.norm1.linear, block.norm1_context.linear]
    for layer in zeroed:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return transformer


def draw_batch(prompts: list[str], rng: random.Random) -> Tensor:
    """Pictures of the prompts, (B, 3, 48, 48), float32 in [0, 1]."""
    pictures = [np.asarray(draw_picture(*parse_prompt(prompt), RESOLUTION, rng)) for prompt in prompts]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def save_grid(images: Tensor, path: Path, columns: int = 8) -> None:
    """Write images (B, 3, H, W) in [0, 1] as one PNG, each picture twice as large."""
    rows = len(images) // columns
    grid = images[: rows * columns].unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    array = (grid.clamp(0, 1) * 255).round().byte().numpy()
    picture = Image.fromarray(array)
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(path)


class Reader:
    """Shares of pictures that PP-OCR v5 and v4 read exactly, and whose colours are as asked."""

    def __init__(self) -> None:
        self.recognisers = {"read": OCRReward("v5"), "read_v4": OCRReward("v4")}

    def __call__(self, images: Tensor, prompts: list[str]) -> dict[str, float]:
        shares = {"colours": colours_right(images, prompts)}
        for name, recogniser in self.recognisers.items():
            parts = range(0, len(images), 64)
            shares[name] = torch.cat([recogniser.exact(images[i : i + 64], prompts[i : i + 64]) for i in parts])
        return {name: round(right.float().mean().item(), 4) for name, right in shares.items()}


def train_vae(args: argparse.Namespace, prompts: list[str], log: Log) -> AutoencoderKL:
    vae = make_vae()
    log(stage="vae", parameters=sum(p.numel() for p in vae.parameters()))
    fit_vae(vae, vae.parameters(), args.vae_steps, args, prompts, log)
    rng = random.Random(args.seed + 3)
    latents = encode_pictures(vae, draw_batch(rng.choices(prompts, k=1024), rng), scaled=False)
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return vae


def train_decoder(vae: AutoencoderKL, args: argparse.Namespace, prompts: list[str], log: Log) -> None:
    """Train the decoder alone, which leaves latents as they are."""
    log(stage="decoder", parameters=sum(p.numel() for p in vae.decoder.parameters()))
    fit_vae(vae, vae.decoder.parameters(), args.decoder_steps, args, prompts, log)


def fit_vae(
    vae: AutoencoderKL,
    parameters: Iterable[torch.nn.Parameter],
    steps: int,
    args: argparse.Namespace,
    prompts: list[str],
    log: Log,
) -> None:
    """Train the given parameters of the VAE on drawn pictures for `steps` steps."""
    parameters = list(parameters)
    vae.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    rng = random.Random(args.seed)
    optimizer = torch.optim.AdamW(parameters, lr=args.vae_learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.vae_learning_rate, steps, pct_start=0.1)
    errors = []
    for step in range(1, steps + 1):
        images = draw_batch(rng.choices(prompts, k=args.vae_batch_size), rng) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):  # faster where the CPU has bfloat16
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        posterior, decoded = DiagonalGaussianDistribution(posterior.parameters.float()), decoded.float()
        loss = F.mse_loss(decoded, images) + 0.1 * F.l1_loss(decoded, images)
        loss = loss + 1e-5 * posterior.kl().mean() / images[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        errors.append(F.mse_loss(decoded.detach().clamp(-1, 1), images).item() / 4)  # of values in [0, 1]
        if step % 100 == 0:
            log(step=step, psnr=round(-10 * np.log10(np.mean(errors[-100:])), 2))
    vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, images: Tensor, scaled: bool = True) -> Tensor:
    """Latents (B, 8, 12, 12) of images (B, 3, 48, 48) in [0, 1]: the posterior's mean, shifted and scaled."""
    latents = torch.cat([vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(64)])
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor if scaled else latents


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return torch.cat([vae.decode(part).sample for part in latents.split(64)]).div(2).add(0.5).clamp(0, 1)


def encode_tokens(pipe: StableDiffusion3Pipeline, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What `pipe.encode_prompt` gives for these token ids (B, 16), with gradients: (B, 17, 128) and (B, 128)."""
    outputs = [encoder(tokens, output_hidden_states=True) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    embeddings = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return F.pad(embeddings, (0, 0, 0, MAX_SEQUENCE_LENGTH)), torch.cat(
        [output.text_embeds for output in outputs], dim=-1
    )


def tokenize(pipe: StableDiffusion3Pipeline, prompts: list[str]) -> Tensor:
    return pipe.tokenizer(
        prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def check_encoding(pipe: StableDiffusion3Pipeline, prompts: list[str]) -> None:
    """Raise RuntimeError where training would encode prompts otherwise than the stock pipeline does."""
    ours = encode_tokens(pipe, tokenize(pipe, prompts))
    stock = pipe.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE_LENGTH
    )
    if not (torch.equal(ours[0], stock[0]) and torch.equal(ours[1], stock[2])):
        raise RuntimeError(
            "expected the text embeddings of pipe.encode_prompt; the installed diffusers computes others"
        )


def sample(pipe: StableDiffusion3Pipeline, prompts: list[str], args: argparse.Namespace) -> Tensor:
    """Pictures (B, 3, 48, 48) in [0, 1] by the stock pipeline, the same noise each time."""
    generator = torch.Generator().manual_seed(args.seed)
    images = []
    for start in range(0, len(prompts), 64):
        images.append(
            pipe(
                prompts[start : start + 64],
                height=RESOLUTION,
                width=RESOLUTION,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                max_sequence_length=MAX_SEQUENCE_LENGTH,
                generator=generator,
                output_type="pt",
            ).images
        )
    return torch.cat(images)


def train_flow(
    args: argparse.Namespace,
    pipe: StableDiffusion3Pipeline,
    prompts: list[str],
    stop_prompts: list[str],
    reader: Reader,
    log: Log,
) -> None:
    """Train transformer and text encoders until `stop_at`; leaves the averaged weights in the pipeline."""
    rng = random.Random(args.seed + 1)
    latents = torch.cat([encode_pictures(pipe.vae, draw_batch(prompts, rng)) for _ in range(args.pictures_per_prompt)])
    tokens, empty = tokenize(pipe, prompts), tokenize(pipe, [""])
    modules = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2])
    parameters = list(modules.parameters())
    log(stage="flow", cached=len(latents), parameters=[sum(p.numel() for p in m.parameters()) for m in modules])
    average = EMAModel(parameters, decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / args.warmup_steps) * (1 - 0.9 * min(1.0, step / args.max_train_steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(args.seed)
    losses = []
    for step in range(1, args.max_train_steps + 1):
        chosen = torch.randint(len(latents), (args.train_batch_size,), generator=generator)
        clean = latents[chosen]
        ids = tokens[chosen % len(prompts)]
        dropped = torch.rand(len(ids), 1, generator=generator) < args.empty_captions
        embeddings, pooled = encode_tokens(pipe, torch.where(dropped, empty, ids))
        noise = torch.randn(clean.shape, generator=generator)
        sigma = torch.sigmoid(torch.randn(len(clean), generator=generator))  # logit-normal, as Stable Diffusion 3
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        velocity = pipe.transformer(noisy, embeddings, pooled, sigma * 1000, return_dict=False)[0]
        loss = F.mse_loss(velocity, noise - clean)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.step(parameters)
        losses.append(loss.item())
        if step % 50 == 0:
            log(stage="flow", step=step, loss=round(float(np.mean(losses[-50:])), 4))
        if step % args.eval_steps == 0 or step == args.max_train_steps:
            average.store(parameters)
            average.copy_to(parameters)
            images = sample(pipe, stop_prompts, args)
            result = reader(images, stop_prompts)
            log(stage="flow", step=step, **result)
            save_grid(images[:64], args.work_dir / f"samples-{step:05d}.png")
            pipe.save_pretrained(args.work_dir / f"checkpoint-{step}")
            if result["read"] >= args.stop_at:
                return
            if step < args.max_train_steps:
                average.restore(parameters)


def make_pipeline(
    vae: AutoencoderKL,
    transformer: SD3Transformer2DModel,
    text_encoder: CLIPTextModelWithProjection,
    text_encoder_2: CLIPTextModelWithProjection,
    shift: float,
) -> StableDiffusion3Pipeline:
    tokenizer = make_tokenizer()
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    """A saved pipeline, computing in float32."""
    pipe = StableDiffusion3Pipeline.from_pretrained(
        folder,
        text_encoder_3=None,
        tokenizer_3=None,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_half(pipe: StableDiffusion3Pipeline, folder: Path) -> None:
    """Write the pipeline in float16 without touching the one in memory."""
    half = {
        name: copy.deepcopy(getattr(pipe, name)).half()
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2")
    }
    StableDiffusion3Pipeline(**{**pipe.components, **half}).save_pretrained(folder)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    log_file = open(args.work_dir / "log.jsonl", "a", encoding="utf-8")

    def log(**values) -> None:
        line = json.dumps({"minutes": round((time.monotonic() - started) / 60, 2), **values})
        print(line, flush=True)
        log_file.write(line + "\n")
        log_file.flush()

    pretraining, reward_training, held_out = split_prompts(args.seed)
    evaluation, stop_prompts = held_out[:EVALUATION_PROMPTS], held_out[EVALUATION_PROMPTS:]
    if args.vae is None:
        vae = train_vae(args, pretraining, log)
    else:
        vae = AutoencoderKL.from_pretrained(args.vae, use_safetensors=True, local_files_only=True)
        vae.eval().requires_grad_(False)
    if args.decoder_steps:
        train_decoder(vae, args, pretraining, log)
    vae.save_pretrained(args.work_dir / "vae")

    reader = Reader()
    drawn = draw_batch(evaluation, random.Random(args.seed + 2))
    latents = encode_pictures(vae, drawn)
    returned = decode_latents(vae, latents)
    psnr = -10 * torch.log10(F.mse_loss(returned, drawn)).item()
    log(stage="drawn", **reader(drawn, evaluation))
    log(
        stage="round trip",
        psnr=round(psnr, 2),
        latent_std=round(latents.std().item(), 3),
        latent_mean=round(latents.mean().item(), 3),
        **reader(returned, evaluation),
    )
    save_grid(drawn[:64], args.work_dir / "drawn.png")
    save_grid(returned[:64], args.work_dir / "round-trip.png")

    if args.checkpoint is None:
        parts = (make_transformer(), make_text_encoder(), make_text_encoder())
    else:
        earlier = load_pipeline(args.checkpoint)
        parts = (earlier.transformer, earlier.text_encoder, earlier.text_encoder_2)
    pipe = make_pipeline(vae, *parts, args.shift)
    check_encoding(pipe, [*stop_prompts[:4], ""])
    if args.max_train_steps:
        train_flow(args, pipe, pretraining, stop_prompts, reader, log)
    save_half(pipe, args.output_dir)

    saved = load_pipeline(args.output_dir)
    images = sample(saved, evaluation, args)
    save_grid(images[:64], args.work_dir / "samples-saved.png")
    log(stage="saved", **reader(images, evaluation))
    here = Path(__file__).parent
    (here / "prompts_train.txt").write_text("\n".join(reward_training) + "\n", encoding="utf-8")
    (here / "prompts_eval.txt").write_text("\n".join(evaluation) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in MALLOC_SETTINGS.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC_SETTINGS})
    main()
