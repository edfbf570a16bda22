# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Prompts as embeddings: encoded when they are needed, or once before training and kept on disk.

Both give what the pipeline's own `encode_prompt` gives, by the argument names of the pipeline's call.
"""

import argparse
import gc
import hashlib
import json
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from diffusers.training_utils import offload_models
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

Embeds = dict[str, torch.Tensor]
# Prompts encoded together, and kept in one file: a file of SD3.5 embeddings (256 tokens, bf16) has about 180 MB.
PROMPTS_PER_BATCH = 16
PROMPTS_PER_FILE = 64


def text_encoders(pipe: DiffusionPipeline) -> list[torch.nn.Module]:
    """The pipeline's text encoders, frozen and in evaluation mode."""
    return [
        module.requires_grad_(False).eval()
        for name, module in pipe.components.items()
        if name.startswith("text_encoder") and isinstance(module, torch.nn.Module)
    ]


def group_offload_encoder(encoder: torch.nn.Module, device: torch.device) -> None:
    """Keep a text encoder on the CPU and bring one layer at a time to `device`."""
    apply_group_offloading(
        encoder,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        use_stream=device.type == "cuda",
    )


class PromptEncoder:
    """Encodes prompts when they are needed.

    Args:
        pipe: with text encoders and tokenizers; other components are not used.
        encode: `encode(pipe, prompts) -> {argument of the call: (B, ...)}`.
        device: to compute on.
        offload: the encoders wait on the CPU between uses.
        group_offload: they stay on the CPU and diffusers' group offloading brings one layer at a time.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        encode: Callable[[DiffusionPipeline, list[str]], Embeds],
        device: torch.device,
        offload: bool = False,
        group_offload: bool = False,
    ) -> None:
        self.pipe = pipe
        self.encode = encode
        self.device = device
        self.offload = offload
        self.encoders = text_encoders(pipe)
        for encoder in self.encoders:
            if group_offload:
                group_offload_encoder(encoder, device)
            elif not offload:
                encoder.to(device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Embeds:
        """Embeddings `{argument: (B, ...)}` of B prompts."""
        with offload_models(*self.encoders, device=self.device, offload=self.offload):
            return self.encode(self.pipe, list(prompts))


class PromptEmbeds:
    """Embeddings that were encoded before training, read from disk a batch at a time.

    Args:
        folder: written by `precompute`.
        prompts: those that were encoded, in order.
        device: of the tensors that are given out.
    """

    def __init__(self, folder: Path, prompts: Sequence[str], device: torch.device) -> None:
        self.folder = folder
        self.device = device
        self.places = {prompt: divmod(number, PROMPTS_PER_FILE) for number, prompt in enumerate(prompts)}

    def __call__(self, prompts: Sequence[str]) -> Embeds:
        """Embeddings `{argument: (B, ...)}` of B prompts.

        Raises:
            ValueError: for a prompt that was not encoded, and for a damaged file.
        """
        rows: list[Embeds] = []
        for prompt in prompts:
            if prompt not in self.places:
                raise ValueError(f"No embeddings of {prompt!r} in {self.folder}; it was not among the run's prompts.")
            file, row = self.places[prompt]
            path = self.folder / f"{file:05d}.safetensors"
            try:
                with safe_open(path, framework="pt") as tensors:
                    rows.append({name: tensors.get_slice(name)[row : row + 1] for name in tensors.keys()})
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged ({error}); remove {self.folder} and start again.") from error
        return {name: torch.cat([row[name] for row in rows]).to(self.device) for name in rows[0]}


def hub_commit(model: str, revision: str | None) -> str | None:
    """The commit of a Hub model whose `model_index.json` is in the local cache; `None` for a folder."""
    found = try_to_load_from_cache(model, "model_index.json", revision=revision) if not Path(model).is_dir() else None
    return Path(found).parent.name if isinstance(found, str) else None


def cache_folder(root: Path, model: str, prompts: Sequence[str], settings: Mapping[str, Any]) -> Path:
    """Where the embeddings of these prompts belong: `root/<model>/<hash>`.

    Args:
        root: of all caches.
        model: folder or Hub id.
        prompts: all prompts of the run, in order.
        settings: what else the embeddings depend on (revision, dtype, lengths, versions).
    """
    content = json.dumps([model, list(prompts), {name: str(value) for name, value in settings.items()}])
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    return root / model.strip("/").replace("/", "--") / digest


def text_files(model: str) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the text encoders' and tokenizers' files in a local model; nothing for a Hub id.

    A folder can get other weights under the same name.
    """
    files = [path for part in ("text_encoder*", "tokenizer*") for path in Path(model).glob(f"{part}/*")]
    return sorted((f"{path.parent.name}/{path.name}", path.stat().st_size, path.stat().st_mtime_ns) for path in files)


def precompute(folder: Path, prompts: Sequence[str], encoder: PromptEncoder, say: Callable[[str], None]) -> None:
    """Encode all prompts once and write them as safetensors, the folder as the last step.

    Args:
        folder: of `cache_folder`.
        prompts: without repetitions.
        encoder: what encodes them.
        say: gets a line with the size before anything is written.

    Raises:
        OSError: where the disk has less room than the embeddings need.
    """
    size = sum(tensor.nbytes for tensor in encoder(prompts[:1]).values()) * len(prompts)
    say(f"Prompt embeddings: {len(prompts)} prompts, {size / 2**20:.1f} MiB, into {folder}")
    # Of this machine alone: of several, one process of each writes, perhaps to one disk.
    partial = folder.with_name(f"{folder.name}.{socket.gethostname()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if free < size:
        raise OSError(
            f"Prompt embeddings need {size / 2**20:.0f} MiB, {folder} has {free / 2**20:.0f} MiB free; choose another "
            "--prompt_embeds_dir."
        )
    for start in range(0, len(prompts), PROMPTS_PER_FILE):
        of_file = prompts[start : start + PROMPTS_PER_FILE]
        batches = [
            encoder(of_file[first : first + PROMPTS_PER_BATCH]) for first in range(0, len(of_file), PROMPTS_PER_BATCH)
        ]
        joined = {name: torch.cat([batch[name] for batch in batches]).cpu().contiguous() for name in batches[0]}
        save_file(joined, partial / f"{start // PROMPTS_PER_FILE:05d}.safetensors")
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        # Another machine was faster; both wrote the same.
        shutil.rmtree(partial)


def prepare_prompt_embeds(
    args: argparse.Namespace,
    accelerator: Accelerator,
    load_pipeline: Callable[[], DiffusionPipeline],
    encode: Callable[[DiffusionPipeline, list[str]], Embeds],
    prompts: Sequence[str],
    negative_prompt: str | None,
) -> Callable[[Sequence[str]], Embeds]:
    """What gives a batch's embeddings, by the argument names of the pipeline's call.

    With `--precompute_prompt_embeds` all prompts of the run are encoded now, by one process, and the text encoders are
    freed; otherwise they stay and encode each batch.

    Args:
        args: of `parse_training_args`.
        accelerator: of the run.
        load_pipeline: loads the text encoders and tokenizers, in a pipeline without the rest.
        encode: `encode(pipe, prompts) -> {argument of the call: (B, ...)}`, with the pipeline's own `encode_prompt`.
        prompts: of training and evaluation; those of the validation are added.
        negative_prompt: of the unconditional branch, `None` without guidance. Its embeddings get the arguments' names
            with `negative_` in front.

    Returns:
        `embeds(prompts) -> {argument: (B, ...)}`.
    """
    device = accelerator.device
    source: Callable[[Sequence[str]], Embeds]
    if args.precompute_prompt_embeds:
        negative = [] if negative_prompt is None else [negative_prompt]
        everything = list(dict.fromkeys([*prompts, *(args.validation_prompt or ()), *negative]))
        settings = {
            name: value
            for name, value in vars(args).items()
            if name in ("revision", "variant", "mixed_precision", "max_sequence_length")
        }
        settings |= {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
        settings["files"] = text_files(args.pretrained_model_name_or_path)
        settings["commit"] = hub_commit(args.pretrained_model_name_or_path, args.revision)
        settings["prompts_per_file"] = PROMPTS_PER_FILE
        root = args.prompt_embeds_dir.expanduser()
        folder = cache_folder(root, args.pretrained_model_name_or_path, everything, settings)
        with accelerator.local_main_process_first():
            if folder.is_dir():
                accelerator.print(f"Prompt embeddings: {folder} exists already.")
            else:
                encoder = PromptEncoder(load_pipeline(), encode, device, args.offload, args.group_offload)
                precompute(folder, everything, encoder, say=accelerator.print)
                del encoder
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        source = PromptEmbeds(folder, everything, device)
    else:
        source = PromptEncoder(load_pipeline(), encode, device, args.offload, args.group_offload)
    of_negative = {} if negative_prompt is None else source([negative_prompt])

    def embeds(batch: Sequence[str]) -> Embeds:
        found = source(batch)
        for name, value in of_negative.items():
            found[f"negative_{name}"] = value.expand(len(batch), *value.shape[1:])
        return found

    return embeds
