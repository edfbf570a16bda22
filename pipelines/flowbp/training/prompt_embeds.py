# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts as embeddings: encoded when they are needed, or once before training and kept on disk.

Both give what the pipeline's own `encode_prompt` gives, by the argument names of the pipeline's call.
"""

import hashlib
import json
import re
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from diffusers.training_utils import offload_models
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..file_errors import writing
from ..files import apply_umask, move
from .config import TrainingConfig
from .prompts import Record

Embeds = dict[str, torch.Tensor]
Encode = Callable[[DiffusionPipeline, list[Record]], Embeds]
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
    """Calls text encoders when they are needed.

    Args:
        pipe: with text encoders and tokenizers; other components are not used.
        encode: `encode(pipe, ...)`, such as `encode(pipe, records) -> {argument of the call: (B, ...)}`.
        device: to compute on.
        offload: the encoders wait on the CPU between uses.
        group_offload: they stay on the CPU and diffusers' group offloading brings one layer at a time.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        encode: Callable[..., Any],
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
    def __call__(self, *arguments: Any) -> Any:
        """What `encode` gives for these arguments."""
        with offload_models(*self.encoders, device=self.device, offload=self.offload):
            return self.encode(self.pipe, *arguments)


class PromptEmbeds:
    """Embeddings that were encoded before training, read from disk a batch at a time.

    Args:
        folder: written by `fill_cache`.
        keys: of the records that were encoded, in order; see `Backbone.key`.
        key: gives a record's.
        device: of the returned tensors.
    """

    def __init__(self, folder: Path, keys: Sequence[str], key: Callable[[Record], str], device: torch.device) -> None:
        self.folder = folder
        self.key = key
        self.device = device
        self.places = {each: divmod(place, PROMPTS_PER_FILE) for place, each in enumerate(keys)}

    def __call__(self, records: Sequence[Record]) -> Embeds:
        """Embeddings `{argument: (B, ...)}` of B records.

        Raises:
            ValueError: for a record that was not encoded, and for a damaged file.
        """
        found: list[Embeds] = []
        for record in records:
            place = self.places.get(self.key(record))
            if place is None:
                raise ValueError(
                    f"No embeddings of {record.prompt!r} in {self.folder}; it was not among the run's prompts."
                )
            path = self.folder / f"{place[0]:05d}.safetensors"
            try:
                with safe_open(path, framework="pt") as tensors:
                    found.append({name: tensors.get_slice(name)[place[1] : place[1] + 1] for name in tensors.keys()})
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged ({error}); remove {self.folder} and start again.") from error
        return {name: torch.cat([each[name] for each in found]).to(self.device) for name in found[0]}


def cache_folder(root: Path, model: str, keys: Sequence[str], settings: Mapping[str, Any]) -> Path:
    """Where the embeddings of these records belong: `root/<name of the model>/<hash>`.

    Args:
        root: of all caches.
        model: folder or Hub id.
        keys: of all records of the run, in order.
        settings: what else the embeddings depend on (revision, dtype, lengths, versions).
    """
    content = json.dumps([model, list(keys), {name: str(value) for name, value in settings.items()}])
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    # A name on all systems, of any path: C:\\models\\sd3 would lead to another disk.
    return root / re.sub(r"[^\w.-]+", "--", model)[-100:].strip("-.") / digest


def text_files(model: str) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files that read prompts in a local model; nothing for a Hub id.

    A folder can get other weights under the same name.
    """
    files = [path for part in ("text_encoder*", "tokenizer*", "processor*") for path in Path(model).glob(f"{part}/*")]
    return sorted((f"{path.parent.name}/{path.name}", path.stat().st_size, path.stat().st_mtime_ns) for path in files)


def cache_settings(config: TrainingConfig, commit: str | None) -> dict[str, Any]:
    """What embeddings depend on beside model and records, for `cache_folder`; `commit` as `SavedPipeline` has it."""
    return {
        "revision": config.revision,
        "variant": config.variant,
        "mixed_precision": config.mixed_precision,
        "max_sequence_length": config.max_sequence_length,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "files": text_files(config.pretrained_model_name_or_path),
        "commit": commit,
        "prompts_per_file": PROMPTS_PER_FILE,
    }


def is_complete(folder: Path, count: int) -> bool:
    """Whether a cache holds the embeddings of `count` records, in files that are whole."""
    for start in range(0, count, PROMPTS_PER_FILE):
        try:
            with safe_open(folder / f"{start // PROMPTS_PER_FILE:05d}.safetensors", framework="pt") as tensors:
                sizes = {tensors.get_slice(name).get_shape()[0] for name in tensors.keys()}
        except (OSError, SafetensorError):
            return False
        if sizes != {min(PROMPTS_PER_FILE, count - start)}:
            return False
    return True


def fill_cache(
    folder: Path, records: Sequence[Record], make_encoder: Callable[[], PromptEncoder], say: Callable[[str], None]
) -> None:
    """Encode all records once, see `fill_once`.

    Raises:
        OSError: where the disk has less room than the embeddings need.
    """
    fill_once(
        folder,
        lambda: is_complete(folder, len(records)),
        lambda partial: write_cache(folder, partial, records, make_encoder(), say),
        say,
    )


def fill_once(
    folder: Path, is_whole: Callable[[], bool], write: Callable[[Path], None], say: Callable[[str], None]
) -> None:
    """Write a folder once, unless another run did; of two runs at a time one writes and the other waits.

    Args:
        folder: that is complete or absent; one that is not complete is made again.
        is_whole: tells whether it is complete.
        write: `write(partial)` fills an empty folder, which gets the folder's name as the last step.
        say: gets a line on what is done.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"Prompt embeddings: another run writes {folder}; waiting for it.")
        lock.acquire()
    try:
        if is_whole():
            say(f"Prompt embeddings: {folder} exists already.")
            return
        if folder.exists():
            say(f"Prompt embeddings: {folder} is not complete; it is made again.")
            shutil.rmtree(folder)
        # Of this machine alone: locks do not reach other machines with the same disk.
        partial = folder.with_name(f"{folder.name}.{socket.gethostname()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write(partial)
        apply_umask(partial)
        try:
            move(partial, folder)
        except OSError:
            if not is_whole():
                raise
            # Another machine was faster; both wrote the same.
            shutil.rmtree(partial)
    finally:
        lock.release()
        clear_device_cache(garbage_collection=True)


def write_cache(
    folder: Path, partial: Path, records: Sequence[Record], encoder: PromptEncoder, say: Callable[[str], None]
) -> None:
    """Encode all records and write them as safetensors into `partial`; see `fill_cache`."""
    size = sum(tensor.nbytes for tensor in encoder(records[:1]).values()) * len(records)
    say(f"Prompt embeddings: {len(records)} prompts, {size / 2**20:.1f} MiB, into {folder}")
    free = shutil.disk_usage(partial).free
    if free < size:
        raise OSError(
            f"Prompt embeddings need {size / 2**20:.0f} MiB, {folder} has {free / 2**20:.0f} MiB free; choose another "
            "--prompt_embeds_dir."
        )
    for start in range(0, len(records), PROMPTS_PER_FILE):
        of_file = records[start : start + PROMPTS_PER_FILE]
        batches = [
            encoder(of_file[first : first + PROMPTS_PER_BATCH]) for first in range(0, len(of_file), PROMPTS_PER_BATCH)
        ]
        joined = {name: torch.cat([batch[name] for batch in batches]).cpu().contiguous() for name in batches[0]}
        with writing(folder):
            save_file(joined, partial / f"{start // PROMPTS_PER_FILE:05d}.safetensors")


def prepare_prompt_embeds(
    config: TrainingConfig,
    accelerator: Accelerator,
    load_pipeline: Callable[[], DiffusionPipeline],
    encode: Encode,
    key: Callable[[Record], str],
    records: Sequence[Record],
    negative: Record | None,
    commit: str | None = None,
) -> Callable[[Sequence[Record]], Embeds]:
    """What gives a batch's embeddings, by the argument names of the pipeline's call.

    With `--precompute_prompt_embeds` all records of the run are encoded now, by one process, and the text encoders are
    freed; otherwise they stay and encode each batch.

    Args:
        load_pipeline: loads the text encoders and tokenizers, in a pipeline without the rest.
        encode: `encode(pipe, records) -> {argument of the call: (B, ...)}`, with the pipeline's own `encode_prompt`.
        key: what a record's embeddings depend on, see `Backbone.key`.
        records: of training, evaluation and validation.
        negative: of the unconditional branch, `None` without guidance. Its embeddings get the arguments' names with
            `negative_` in front.
        commit: of the model on the Hub, `None` for a folder.

    Returns:
        `embeds(records) -> {argument: (B, ...)}`.
    """
    device = accelerator.device

    def make_encoder() -> PromptEncoder:
        return PromptEncoder(load_pipeline(), encode, device, config.offload, config.group_offload)

    source: Callable[[Sequence[Record]], Embeds]
    if config.precompute_prompt_embeds:
        everything = {key(each): each for each in (*records, *([] if negative is None else [negative]))}
        root, model = config.prompt_embeds_dir.expanduser(), config.pretrained_model_name_or_path
        folder = cache_folder(root, model, list(everything), cache_settings(config, commit))
        with accelerator.local_main_process_first():
            fill_cache(folder, list(everything.values()), make_encoder, say=accelerator.print)
        source = PromptEmbeds(folder, list(everything), key, device)
    else:
        source = make_encoder()
    of_negative = {} if negative is None else source([negative])

    def embeds(batch: Sequence[Record]) -> Embeds:
        found = source(batch)
        for name, value in of_negative.items():
            found[f"negative_{name}"] = value.expand(len(batch), *value.shape[1:])
        return found

    return embeds
