# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Loads a reward's weights from a local folder, the Hub's cache, or the Hub."""

import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import httpx
from safetensors import SafetensorError

T = TypeVar("T")

# What the Hub's client raises; HfHubHTTPError is an OSError, the network's own errors are TransportErrors (of httpx in
# huggingface_hub 1, of httpx2 in 2; it exports the one it uses).
HUB_ERRORS = (OSError, httpx.TransportError, HFValidationError, EntryNotFoundError, RevisionResolutionError)

# Files of a tokenizer's repository, in the old layout and the new one.
TOKENIZER_FILES = ("tokenizer*.json", "tokenizer.model", "vocab.*", "merges.txt", "special_tokens_map.json")
# Of several copies of a model's weights only the safetensors one is downloaded.
MODEL_FILES = ("*config.json", "model*.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Source:
    """Files of a repository of the Hub that a reward needs.

    Attributes:
        reward: its name, for messages and for `--reward_model_path`.
        repo_id: `owner/name`.
        required: names of files that must be there. `model.safetensors` may be in shards, as transformers saves large
            models.
        patterns: glob patterns of further files to take if the repository has them.
    """

    reward: str
    repo_id: str
    required: tuple[str, ...]
    patterns: tuple[str, ...] = ()

    @property
    def page(self) -> str:
        """The page with the licence, where gated repositories ask for its acceptance."""
        return f"https://huggingface.co/{self.repo_id}"


def find_files(source: Source, model_path: Path | None = None) -> Path:
    """Finds the folder with a reward's files; downloads them to the Hub's cache if necessary.

    Args:
        source: what to look for.
        model_path: a local folder to use in place of the Hub. Nothing is downloaded then.

    Returns:
        A folder with all of `source.required`.

    Raises:
        FileNotFoundError: the files are missing and cannot be downloaded: offline, gated, or not in the repository.
            The message has the repository, the files, the page with the licence, the cache folder and the remedy.
    """
    if model_path is not None:
        folder = Path(model_path).expanduser()
        if not folder.is_dir():
            raise _missing(source, f"{folder} is not a folder")
    else:
        try:
            folder = Path(
                snapshot_download(
                    source.repo_id,
                    allow_patterns=[*source.required, *source.patterns],
                    # huggingface_hub 1 asks for the files of a commit even offline.
                    local_files_only=constants.HF_HUB_OFFLINE,
                )
            )
        except HUB_ERRORS as error:
            raise _missing(source, hub_reason(error)) from error
    absent = [name for name in _expected(source, folder) if not (folder / name).is_file()]
    if absent:
        raise _missing(source, f"{', '.join(absent)} not in {folder}")
    return folder


def find_tokenizer(source: Source, folder: Path) -> Path:
    """`folder` if it holds a tokenizer, else the folder of `source` as `find_files` gives it."""
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        return folder
    return find_files(source)


def load_checkpoint(source: Source, path: Path) -> Mapping[str, Any]:
    """Reads a file of `torch.save` to the CPU. Only tensors and plain values are read, no code is run.

    Raises:
        ValueError: the file is not a checkpoint of plain values, or is incomplete.
    """
    try:
        # Mapped, a file of many gigabytes is not held in memory twice; older formats cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f"reward {source.reward!r}: {path} is not a complete checkpoint of tensors ({brief(error)}); download "
            f"{path.name} again from {source.page}."
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"reward {source.reward!r}: expected {path} to hold a mapping, got {type(content).__name__}; download "
            f"{path.name} again from {source.page}."
        )
    return content


def load_weights(source: Source, module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Loads weights into a module, in the module's dtype; names and shapes must be exactly the module's.

    The module may be on the meta device (`accelerate.init_empty_weights`). Tensors of the right dtype are not copied.

    Raises:
        ValueError: a missing, unexpected or misshapen weight, in one line with the first few.
    """
    expected = module.state_dict()
    problems = [f"no {name}" for name in expected if name not in weights]
    problems += [f"unknown {name}" for name in weights if name not in expected]
    problems += [
        f"{name} of shape {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"reward {source.reward!r}: the weights are not those of {source.repo_id}: {', '.join(problems[:3])}{more}"
            f"; expected {', '.join(source.required)} from {source.page}."
        )
    module.load_state_dict(
        {name: weights[name].to(tensor.dtype).contiguous() for name, tensor in expected.items()}, assign=True
    )


def load_pretrained(source: Source, loader: Callable[..., T], folder: Path, **options: Any) -> T:
    """Calls a transformers class's `from_pretrained` on a folder of `find_files`: no network, no code of others.

    Args:
        source: for the message.
        loader: `CLIPModel.from_pretrained`, say.
        folder: with the files.
        options: of `loader`; for models `use_safetensors=True` belongs here.

    Raises:
        ValueError: what transformers finds wrong with the files, in one line.
    """
    try:
        return loader(folder, local_files_only=True, trust_remote_code=False, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError) as error:
        raise ValueError(
            f"reward {source.reward!r}: {folder} does not hold what {source.repo_id} has ({brief(error)}); "
            f"download it again from {source.page}."
        ) from error


def parse_model_paths(entries: Iterable[str]) -> dict[str, Path]:
    """`NAME=FOLDER` pairs of `--reward_model_path` as a mapping.

    Raises:
        ValueError: an entry without a name, an equals sign or a folder, or a name that is given twice.
    """
    paths: dict[str, Path] = {}
    for entry in entries:
        name, equals, folder = entry.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--reward_model_path: expected NAME=FOLDER, got {entry!r}.")
        if name in paths:
            raise ValueError(f"--reward_model_path: expected each reward once, got {name} twice.")
        paths[name] = Path(folder)
    return paths


def _expected(source: Source, folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if "model.safetensors" not in source.required or not index.is_file():
        return list(source.required)
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _missing(source, f"{index} is not an index of shards ({brief(error)})") from error
    return [*(name for name in source.required if name != "model.safetensors"), *sorted(shards)]


def _missing(source: Source, reason: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"reward {source.reward!r}: expected {', '.join(source.required)} of the repository {source.repo_id}, "
        f"got: {reason}; licence and access: {source.page}; cache folder: "
        f"{constants.HF_HUB_CACHE}; remedy: run once with network (after `hf auth login` where that page asks to "
        f"accept terms), or give a local copy: --reward_model_path {source.reward}=FOLDER."
    )


def hub_reason(error: Exception) -> str:
    """Why the Hub did not give a file, in a few words: its own messages have several lines and quote the request."""
    if isinstance(error, GatedRepoError):
        return "the repository is gated and this account was not given access"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository, or a private one"
    if isinstance(error, RevisionNotFoundError):
        return "no such revision"
    if isinstance(error, LocalEntryNotFoundError | RevisionResolutionError | httpx.TransportError):
        return "the files are not in the cache and the Hub cannot be reached (offline?)"
    if isinstance(error, HfHubHTTPError):
        return f"the Hub answered {error.response.status_code}"
    return brief(error)


def brief(error: BaseException) -> str:
    """An error's message in one line, of 200 characters at most."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
