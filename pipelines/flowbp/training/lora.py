# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The LoRA of a run: a new one, or one in a file that the run continues (`--init_lora`)."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load

from ..files import sha256
from ..judging.lora_files import check_lora_file, download_lora, is_of_peft, read_lora, with_prefix
from ..publishing.published_files import LORA_FILE
from ..rewards.loading import brief
from .backbone import Backbone
from .config import TrainingConfig
from .distributed import load_lora
from .seeds import derive_seed

# A LoRA's tensors in the names of peft, of kohya's scripts, and of diffusers before peft.
_DOWN = re.compile(r"(?P<layer>.*)[._](?:lora_A|lora_down|lora\d?\.down)\.weight")
_OTHERS = re.compile(r".*[._](?:lora_B|lora_up|lora\d?\.up)\.weight|.*\.alpha|.*\.lora_magnitude_vector(?:\.weight)?")
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class InitLora:
    """A LoRA that a run starts from.

    Attributes:
        settings: of peft's LoraConfig.
        tensors: float32, by peft's names.
        digest: SHA-256 of the file in hexadecimal, or "missing".
    """

    settings: Mapping[str, Any]
    tensors: Tensors
    digest: str

    def fill(self, config: TrainingConfig) -> TrainingConfig:
        """The config with the LoRA's rank and scale, where all layers have the same."""
        ranks = {tensor.shape[0] for name, tensor in self.tensors.items() if ".lora_A." in name}
        alpha = self.settings["lora_alpha"]
        is_same = not self.settings["alpha_pattern"] and int(alpha) == alpha
        return replace(
            config,
            rank=min(ranks) if len(ranks) == 1 else None,
            lora_alpha=int(alpha) if is_same else None,
            use_dora=self.settings["use_dora"],
            lora_dtype="float32" if self.settings["use_dora"] else config.lora_dtype,
            use_rslora=self.settings["use_rslora"],
        )


def read_init_lora(config: TrainingConfig, backbone: Backbone, checkpoint: Path | None) -> InitLora | None:
    """The LoRA of `--init_lora`, checked against the model before that is loaded; None without the option.

    Args:
        checkpoint: that the run resumes from; its LoRA counts then, and the other may be gone.

    Raises:
        ValueError: in one line, for what cannot be had, is no plain LoRA, does not fit the model whole, or is not as
            other options say.
    """
    if config.init_lora is None:
        return None
    source, where = config.init_lora, f"--init_lora {config.init_lora}"
    try:
        file = download_lora(source, "--init_lora")
        digest = sha256(file)
    except ValueError:
        if checkpoint is None:
            raise
        digest = "missing"
    if checkpoint is not None:
        file = checkpoint / LORA_FILE
    check_lora_file(source, file, "--init_lora")
    # Without memory, and long before the model itself is loaded.
    with init_empty_weights():
        model_class = getattr(diffusers, backbone.index[backbone.transformer_name][1])
        transformer = model_class.from_config(backbone.saved.config(backbone.transformer_name))
    layers = {name for name, part in transformer.named_modules() if _takes_lora(part)}
    original = {name: tensor.float() for name, tensor in load(file.read_bytes()).items()}
    tensors, settings, alphas = _in_diffusers_names(where, file, original, backbone.pipeline_class)
    _check_fit(where, tensors, transformer)
    try:
        transformer.load_lora_adapter(
            tensors,
            network_alphas=alphas or None,
            metadata=settings or None,
            adapter_name="default",
            low_cpu_mem_usage=True,
        )
    except Exception as error:  # diffusers and peft raise a dozen unrelated types
        raise ValueError(f"{where}: does not fit this {model_class.__name__}: {brief(error)}; use another.") from error
    named = {name.removeprefix("transformer.").replace("vector.weight", "vector"): tensors[name] for name in tensors}
    if wrong := named.keys() ^ get_peft_model_state_dict(transformer).keys():
        raise ValueError(f"{where}: expected both matrices of each layer, {min(wrong)} is missing or left over.")
    if not settings:
        _check_change(where, original, named, scales(transformer))
    kept = {"lora_dropout": 0.0, "inference_mode": False, "init_lora_weights": True}
    settings = {**transformer.peft_config["default"].to_dict(), **kept}
    settings["target_modules"] = sorted(settings["target_modules"])
    found = InitLora(settings, named, digest)
    _check_options(where, config, found, layers)
    return found


def _takes_lora(part: torch.nn.Module) -> bool:
    return isinstance(part, torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d)


def _in_diffusers_names(
    where: str, file: Path, tensors: Tensors, pipeline: type[DiffusionPipeline]
) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, float]]:
    """Tensors, settings and scales as the transformer's `load_lora_adapter` takes them.

    Args:
        where: start of messages.
        file: of the LoRA.
        tensors: of the file.
        pipeline: whose class knows the names of other tools.
    """
    for name in tensors:
        if not _DOWN.fullmatch(name) and not _OTHERS.fullmatch(name):
            raise ValueError(f"{where}: expected a LoRA's matrices alone, got {name}; use another file.")
    alphas: Mapping[str, torch.Tensor] = {}
    found, settings = read_lora(file)
    if hasattr(pipeline, "lora_state_dict") and not is_of_peft(file, tensors):
        has_alphas = "return_alphas" in inspect.signature(pipeline.lora_state_dict).parameters
        more = {"return_alphas": True} if has_alphas else {}
        try:
            found, *others = pipeline.lora_state_dict(dict(tensors), return_lora_metadata=True, **more)
        except Exception as error:  # of a dozen unrelated types, for names that the conversion does not know
            raise ValueError(
                f"{where}: {pipeline.__name__} cannot read its names: {brief(error)}; use another."
            ) from error
        alphas = others[0] or {} if has_alphas else {}
    if not any(".lora_A." in name for name in found):
        found = convert_unet_state_dict_to_peft(found)
    found = {name: found[name].float() for name in sorted(found)}
    return with_prefix(found), settings, {name: float(value) for name, value in alphas.items()}


def _check_fit(where: str, tensors: Tensors, transformer: torch.nn.Module) -> None:
    """Check that tensors are for layers of the transformer, each of the right shape."""
    outside = [name for name in tensors if not name.startswith("transformer.")]
    if outside:
        raise ValueError(
            f"{where}: {len(outside)} of its {len(tensors)} tensors are not for the transformer, first {outside[0]}; "
            "the result would lack them: remove them from the file, or use another."
        )
    parts, name = dict(transformer.named_modules()), type(transformer).__name__
    layers = {key: key.removeprefix("transformer.").partition(".lora_")[0] for key in tensors}
    unknown = sorted({layer for layer in layers.values() if not _takes_lora(parts.get(layer))})
    if unknown:
        raise ValueError(
            f"{where}: {len(unknown)} of its {len({*layers.values()})} layers are not in this {name}, first "
            f"{unknown[0]}; use a LoRA of this model, in names that diffusers reads."
        )
    for key, layer in layers.items():
        shape, found = parts[layer].weight.shape, tensors[key].shape
        fits = found[1:] == shape[1:] if ".lora_A." in key else found[0] == shape[0]
        if not fits:
            raise ValueError(
                f"{where}: {key} has the shape {list(found)}, the layer of this {name} {list(shape)}; use a LoRA of "
                "this model."
            )


def _check_change(where: str, original: Tensors, tensors: Tensors, factors: Mapping[str, float]) -> None:
    """Check that a LoRA in diffusers' names changes weights as much as the original.

    Conversions keep the sum of squares where they split layers. Some of diffusers' leave layers or scales out.

    Args:
        where: start of messages.
        original: of the file, in any names.
        tensors: by peft's names.
        factors: by layer, see `scales`.
    """
    expected = 0.0
    for name, down in original.items():
        if match := _DOWN.fullmatch(name):
            up = name.replace("lora_A", "lora_B").replace("lora_down", "lora_up").replace(".down.", ".up.")
            if up not in original:
                raise ValueError(f"{where}: expected both matrices of each layer, {up} is missing.")
            alpha = original.get(f"{match['layer']}.alpha")
            expected += _square(down, original[up], 1.0 if alpha is None else alpha.item() / len(down))
    found = sum(
        _square(tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"], factor)
        for layer, factor in factors.items()
    )
    if abs(found - expected) > 1e-4 * expected:
        raise ValueError(
            f"{where}: diffusers {diffusers.__version__} loads another LoRA than the file has: the norm of its change "
            f"of the weights is {found**0.5:.4g}, expected {expected**0.5:.4g}; use one in diffusers' own names."
        )


def _square(down: torch.Tensor, up: torch.Tensor, scale: float) -> float:
    """The sum of the squares of `scale * up @ down`."""
    down, up = down.double().flatten(1), up.double().flatten(1)
    return scale**2 * ((up.T @ up) * (down @ down.T)).sum().item()


def _check_options(where: str, config: TrainingConfig, lora: InitLora, layers: set[str]) -> None:
    """Check that options are as the file, where they are given."""
    own = lora.fill(config)
    for name in ("rank", "lora_alpha", "use_dora", "use_rslora"):
        given, found = getattr(config, name), getattr(own, name)
        if given not in (None, False, found):
            text = "others in some layers" if found is None else found
            raise ValueError(f"--{name} {given}: {where} has {text}; leave --{name} out.")
    if config.lora_layers is not None:
        names = tuple(name.strip() for name in config.lora_layers.split(","))
        asked = {layer for layer in layers if f".{layer}".endswith(tuple(f".{name}" for name in names))}
        other = asked ^ {name.partition(".lora_")[0] for name in lora.tensors}
        if other:
            raise ValueError(
                f"--lora_layers {config.lora_layers}: {where} has other layers, {len(other)} differ, one is "
                f"{min(other)}; leave --lora_layers out."
            )


def add_lora(transformer: torch.nn.Module, config: TrainingConfig, init: InitLora | None = None) -> None:
    """Add the run's LoRA, in float32, to a frozen transformer.

    Args:
        transformer: of the pipeline, quantised or not.
        config: with rank, scale, layers and seed.
        init: a LoRA to start from, whose rank, scale and layers count.

    Raises:
        ValueError: where no layer has one of the names of `--lora_layers`, or peft cannot adapt one.
    """
    if init is not None:
        transformer.load_lora_adapter(
            with_prefix(init.tensors),
            metadata=with_prefix(init.settings),
            adapter_name="default",
            low_cpu_mem_usage=True,
        )
    else:
        torch.manual_seed(derive_seed("lora", config.seed))
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.lora_alpha,
            use_dora=config.use_dora,
            use_rslora=config.use_rslora,
            init_lora_weights="gaussian",
            target_modules=[name.strip() for name in config.lora_layers.split(",")],
        )
        try:
            transformer.add_adapter(lora)
        except ValueError as error:
            layers = {
                name.rpartition(".")[2] for name, part in transformer.named_modules() if type(part) is torch.nn.Linear
            }
            raise ValueError(
                f"--lora_layers {config.lora_layers}: {error} Its linear layers are called "
                f"{', '.join(sorted(layers))}."
            ) from error
    cast_training_params(transformer, dtype=torch.float32)
    if init is not None:
        # diffusers rounds to the transformer's dtype.
        load_lora(transformer, init.tensors)


def scales(transformer: torch.nn.Module) -> dict[str, float]:
    """What each layer's LoRA is multiplied by, by the layer's name: alpha / rank, with rsLoRA alpha / sqrt(rank)."""
    return {
        name: part.scaling["default"]
        for name, part in transformer.named_modules()
        if isinstance(part, LoraLayer) and "default" in part.scaling
    }
