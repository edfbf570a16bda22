# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The optimizers of `--optimizer`, and what a checkpoint holds of them."""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..extras import remedy

if TYPE_CHECKING:
    from .config import TrainingConfig


@dataclass(frozen=True)
class Moment:
    """A tensor that an optimizer keeps for a parameter.

    Attributes:
        shapes: that it may have, from the parameter's.
        dtype: of a float32 parameter's; int64 stands for a Python integer.
        least: its smallest value.
    """

    shapes: Callable[[torch.Size], Sequence[tuple[int, ...]]] = lambda shape: [shape]
    dtype: torch.dtype = torch.float32
    least: float = -math.inf


@dataclass(frozen=True)
class OptimizerSpec:
    """A choice of `--optimizer`.

    Attributes:
        learning_rate: the default.
        layouts: names of the tensors that it keeps for a parameter; each parameter has one of these sets.
        copies: bytes of these tensors, as a multiple of the parameters'.
        numbers: what else its steps change, entries of its parameter group, with their types.
        library: that has it, where torch has not.
        devices: types of those that it computes on; None for all.
        can_be_sharded: it trains shards of parameters (FSDP2), and a checkpoint has all of its state then.
    """

    learning_rate: float
    layouts: Sequence[Mapping[str, Moment]]
    copies: float
    numbers: Mapping[str, type] = field(default_factory=dict)
    library: str | None = None
    devices: Sequence[str] | None = None
    can_be_sharded: bool = False


_SQUARES = Moment(least=0)
_COUNT = Moment(lambda shape: [()], torch.int64, 0)
_QUANTISED, _MAP = Moment(dtype=torch.uint8), Moment(lambda shape: [(256,)])
_ABSMAX = Moment(lambda shape: [(math.ceil(shape.numel() / 256),)], least=0)
_PRODIGY = {
    "step": _COUNT,
    "exp_avg_sq": _SQUARES,
    "s": Moment(lambda shape: [(shape.numel(),)]),
    # A single 0 for parameters that began with zeros.
    "p0": Moment(lambda shape: [(shape.numel(),), ()]),
}
OPTIMIZERS = {
    "adamw": OptimizerSpec(
        1e-4,
        [{"step": Moment(lambda shape: [()], least=1), "exp_avg": Moment(), "exp_avg_sq": _SQUARES}],
        copies=2,
        can_be_sharded=True,
    ),
    "adamw-8bit": OptimizerSpec(
        1e-4,
        [
            # Parameters of fewer than 4096 values.
            {"step": _COUNT, "state1": Moment(), "state2": _SQUARES},
            {
                **{"step": _COUNT, "state1": _QUANTISED, "qmap1": _MAP, "absmax1": _ABSMAX},
                **{"state2": _QUANTISED, "qmap2": _MAP, "absmax2": _ABSMAX},
            },
        ],
        copies=0.5,
        library="bitsandbytes",
        devices=("cuda", "cpu", "xpu"),
    ),
    "prodigy": OptimizerSpec(
        1.0,
        # Without the first moment where --adam_beta1 is 0.
        [{**_PRODIGY, "exp_avg": Moment()}, _PRODIGY],
        copies=4,
        numbers={"d": float, "d_max": float, "d_numerator": float, "k": int},
        library="prodigyopt",
    ),
}


def make_optimizer(config: "TrainingConfig", parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a run."""
    options = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.optimizer == "adamw":
        # Of all weights, torch's default takes 4 bytes a parameter more while it steps.
        return torch.optim.AdamW(parameters, foreach=False if config.train == "full" else None, **options)
    library = importlib.import_module(OPTIMIZERS[config.optimizer].library)
    if config.optimizer == "adamw-8bit":
        return library.optim.AdamW8bit(parameters, **options)
    with redirect_stdout(None):  # it prints that the weight decay is decoupled
        # As diffusers' LoRA scripts by default.
        return library.Prodigy(
            parameters, use_bias_correction=True, safeguard_warmup=True, d_coef=config.prodigy_d_coef, **options
        )


def check_optimizer(config: "TrainingConfig", is_sharded: bool, device: str = "cpu") -> None:
    """Try the optimizer of a run, before a model is loaded.

    Raises:
        ValueError: where its library is missing or refuses an option, and for shards or a device that it does not
            train.
    """
    spec = OPTIMIZERS[config.optimizer]
    if is_sharded and not spec.can_be_sharded:
        raise ValueError(
            f"--optimizer {config.optimizer} does not train sharded parameters (FSDP2), expected adamw; choose it, or "
            "launch with training/accelerate_configs/several_gpus.yaml (DDP)."
        )
    if spec.devices is not None and device not in spec.devices:
        raise ValueError(
            f"--optimizer {config.optimizer}: {spec.library} does not compute on {device}, expected one of "
            f"{', '.join(spec.devices)}; choose adamw."
        )
    try:
        make_optimizer(config, [torch.nn.Parameter(torch.zeros(1))])
    except ImportError as error:
        raise ValueError(
            f"--optimizer {config.optimizer}: it needs {spec.library} ({error}); {remedy('optimizers')}."
        ) from error
    except ValueError as error:
        raise ValueError(f"--optimizer {config.optimizer}: {error}") from error


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The tensors of an optimizer's state as `INDEX.NAME`, Python's integers as int64, sharded ones as they are."""
    # Not from `state_dict`: bitsandbytes nests tensors there.
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def optimizer_numbers(optimizer: torch.optim.Optimizer, name: str) -> dict[str, float]:
    """What else its steps change, as JSON has it."""
    return {number: optimizer.param_groups[0][number] for number in OPTIMIZERS[name].numbers}


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
    numbers: Mapping[str, float],
) -> None:
    """The way back from whole `optimizer_tensors` and `optimizer_numbers`."""
    # Seconds of imports that a command line which only needs the table does without.
    from torch.distributed.tensor import DTensor

    from .distributed import like

    state: dict[int, dict[str, torch.Tensor | int]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        if isinstance(parameter, DTensor) and value.ndim:
            value = like(value, parameter)
        state.setdefault(int(index), {})[name] = value.item() if value.dtype == torch.int64 else value
    (group,) = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": [{**group, **numbers}]})
