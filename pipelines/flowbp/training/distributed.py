# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Several processes: which kinds are supported, the transformer that the sweep calls, and tensors in shards.

Two kinds, both through accelerate: DDP, every process has the whole transformer; FSDP2, every process has a shard of
each parameter, as a DTensor, and gathers a block while it computes it. `--train full` is FSDP2 with one process too.
With FSDP2 every call of the transformer, and every function here that says *collective*, must be made by all
processes, in the same order.
"""

import atexit
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.torch_version import TorchVersion

from .speed import block_classes

# One process, and accelerate's kinds that wrap a model in DDP.
DDP_TYPES = tuple(kind for kind in DistributedType if kind == DistributedType.NO or kind.value.startswith("MULTI_"))


def check_environment() -> None:
    """Refuse by name, from the environment that a launcher set, what the sweep cannot run under.

    For the start of a script: accelerate itself asks for DeepSpeed or Megatron-LM to be installed first.

    Raises:
        ValueError: for DeepSpeed, Megatron-LM, parallelism within a model, and settings of FSDP that do not work.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "DeepSpeed is not supported: its engine wants its own backward, the sweep makes several; launch with "
            "training/accelerate_configs/several_gpus.yaml (DDP) or fsdp2_12b.yaml (FSDP2)."
        )
    if _is_set("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError(
            "Megatron-LM is not supported, it replaces the model; launch with "
            "training/accelerate_configs/several_gpus.yaml (DDP) or fsdp2_12b.yaml (FSDP2)."
        )
    if _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise ValueError(
            "parallelism_config (tensor, context or sequence parallelism, replicated shards) is not supported, "
            "expected DDP or FSDP2 over all processes; remove it from accelerate's config."
        )
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() != "no":
        raise ValueError(
            f"dynamo_backend {compiler} is not supported: accelerate would compile the wrapped transformer only, and "
            "the rollout calls the pipeline's own; set dynamo_backend: 'NO' in accelerate's config."
        )
    if not _is_set("ACCELERATE_USE_FSDP"):
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(
            f"FSDP version {version} is not supported: it flattens the LoRA and the frozen base into one parameter; "
            "set fsdp_version: 2 in accelerate's config, as in training/accelerate_configs/fsdp2_12b.yaml."
        )
    for variable, setting, is_refused, reason in (
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "fsdp_cpu_ram_efficient_loading", True, "text encoders would stay empty"),
        ("FSDP_OFFLOAD_PARAMS", "fsdp_offload_params", True, "it is not tested with the sweep"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "fsdp_activation_checkpointing", True, "use --gradient_checkpointing"),
        ("FSDP_RESHARD_AFTER_FORWARD", "fsdp_reshard_after_forward", False, "it keeps the whole base, use DDP"),
    ):
        if variable in os.environ and _is_set(variable) == is_refused:
            right = str(not is_refused).lower()
            raise ValueError(
                f"{setting}: {str(is_refused).lower()} is not supported ({reason}); set {setting}: {right} in "
                "accelerate's config."
            )
    if os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "SIZE_BASED_WRAP":
        raise ValueError(
            "fsdp_auto_wrap_policy: SIZE_BASED_WRAP is not supported; set TRANSFORMER_BASED_WRAP in accelerate's "
            "config."
        )


def check_distributed(accelerator: Accelerator) -> None:
    """Refuse by name the kinds of processes that the sweep cannot run under; see `check_environment`.

    Raises:
        ValueError: for anything but one process, DDP and FSDP2, and where accelerate runs another number of processes
            than were started.
    """
    check_environment()
    kind = accelerator.distributed_type
    if kind not in DDP_TYPES and not accelerator.is_fsdp2:
        name = "FSDP version 1" if kind == DistributedType.FSDP else kind.value
        raise ValueError(
            f"Processes of kind {name} are not supported, expected one process, DDP or FSDP2; launch with a config "
            "of training/accelerate_configs."
        )
    check_number_of_processes(accelerator)


def check_number_of_processes(accelerator: Accelerator) -> None:
    """Check that the processes that were started know of one another.

    Raises:
        ValueError: where accelerate runs another number of processes.
    """
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise ValueError(
            f"expected {expected} processes (WORLD_SIZE), accelerate runs {accelerator.num_processes}; on CPUs set "
            "ACCELERATE_USE_CPU=true."
        )
    if uses_fsdp2(accelerator):
        check_fsdp2(accelerator.num_processes, torch.__version__)


def check_fsdp2(num_processes: int, torch_version: str) -> None:
    """Refuse torch versions whose shards were not seen to train as one process does.

    Raises:
        ValueError: for several processes with a torch before 2.13.
    """
    if num_processes > 1 and TorchVersion(torch_version) < (2, 13):
        raise ValueError(
            f"FSDP2 over {num_processes} processes needs torch 2.13 or later, got {torch_version}: with torch "
            "2.8 they trained other weights than one process; update torch, or use one process or DDP."
        )


def uses_fsdp2(accelerator: Accelerator) -> bool:
    """Whether `prepare_transformer` shards. accelerate itself ignores FSDP's settings on the CPU; this does not."""
    on_cpu = accelerator.distributed_type == DistributedType.MULTI_CPU and _is_set("ACCELERATE_USE_FSDP")
    return accelerator.is_fsdp2 or on_cpu


def prepare_transformer(accelerator: Accelerator, transformer: torch.nn.Module) -> torch.nn.Module:
    """Place a transformer on its device, wrapped or sharded as the run's processes need it.

    The pipeline keeps calling `transformer` itself, and `backward(transformer=...)` gets what this returns. FSDP2
    replaces the parameters: collect those of the optimizer afterwards.

    Args:
        accelerator: that `check_distributed` has passed.
        transformer: with its LoRA and gradient checkpointing; for FSDP2 better not on the GPU yet, since its blocks
            go there one by one.

    Returns:
        The transformer itself (one process, FSDP2) or DDP's wrapper around it.

    Raises:
        ValueError: where FSDP2 cannot cut the transformer: it is quantised, or its blocks are not known.
    """
    if uses_fsdp2(accelerator):
        _shard(accelerator, transformer)
        return transformer
    transformer.to(accelerator.device)
    if accelerator.num_processes == 1:
        return transformer
    # With DDP's defaults: static_graph would expect the same backward pass every time, which terms and couplings
    # change, and unused parameters need no search, since every active step uses the whole transformer.
    wrapped = accelerator.prepare_model(transformer)
    # Buffers (tables of positions, hundreds of MB for SD3.5) never change, so they are not sent again at every pass.
    wrapped.forward_sync_buffers = False
    return wrapped


def check_full(accelerator: Accelerator) -> None:
    """Refuse processes that do not share the weights of `--train full`, and devices that cannot.

    Raises:
        ValueError: for several processes without FSDP2, on Windows, and for devices that have no exchange.
    """
    if sys.platform == "win32" or accelerator.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"--train full: expected CUDA or a CPU on Linux or macOS, where torch shards weights (FSDP2), got "
            f"{accelerator.device.type} on {sys.platform}; train a LoRA."
        )
    if accelerator.num_processes > 1 and not uses_fsdp2(accelerator):
        raise ValueError(
            f"--train full: expected FSDP2 for {accelerator.num_processes} processes, got DDP, in which each would "
            "hold all weights and moments; launch with training/accelerate_configs/fsdp2_full.yaml."
        )


def shard_all_weights(accelerator: Accelerator, transformer: torch.nn.Module, dtype: torch.dtype) -> None:
    """Train all weights: float32 shards, computed in a pipeline's dtype, so that images are those of the pipeline.

    Args:
        accelerator: that `check_full` has passed.
        transformer: of the pipeline in `dtype`; not on the GPU yet, since its blocks go there one by one.
        dtype: of the computation.

    Raises:
        ValueError: where a part of the pipeline's transformer is computed in another dtype, and see
            `prepare_transformer`.
    """
    if other := [name for name, each in transformer.named_parameters() if each.dtype != dtype]:
        raise ValueError(
            f"--train full computes all of {type(transformer).__name__} in {dtype}, expected no parts that diffusers "
            f"keeps in float32, got {len(other)} such as {other[0]}; use --mixed_precision no."
        )
    if not dist.is_initialized():
        backend = "nccl" if accelerator.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # Pipelines cast inputs to what the transformer says, and diffusers looks at the parameters for it.
    own = type(transformer)
    transformer.__class__ = type(
        own.__name__, (own,), {"dtype": property(lambda _: dtype), "__module__": own.__module__}
    )
    transformer.requires_grad_(True)
    _shard(accelerator, transformer, dtype)


def _shard(accelerator: Accelerator, transformer: torch.nn.Module, dtype: torch.dtype | None = None) -> None:
    """FSDP2 by torch's own call: accelerate's needs an optimizer, does nothing on the CPU and keeps the root whole.

    Args:
        transformer: to shard.
        dtype: that float32 shards are computed in; None leaves all dtypes as they are.
    """
    quantizer = getattr(transformer, "hf_quantizer", None)
    if quantizer is not None or not all(parameter.is_floating_point() for parameter in transformer.parameters()):
        raise ValueError(
            "FSDP2 cannot shard a quantised transformer; leave --quantization_config_path away, or launch with "
            "training/accelerate_configs/several_gpus.yaml (DDP)."
        )
    plugin = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else FullyShardedDataParallelPlugin()
    try:
        names = block_classes(transformer, plugin.transformer_cls_names_to_wrap or ())
    except ValueError as error:
        raise ValueError(f"FSDP2: {error} Set fsdp_transformer_layer_cls_to_wrap in accelerate's config.") from error
    settings = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        # The root too, against torch's default: outside of a call all parameters are shards, so those of a rollout,
        # of a replay, of the optimizer and of a checkpoint are the same.
        "reshard_after_forward": True,
    }
    if dtype == torch.bfloat16:
        # Inputs stay as the pipeline gives them: torch would round timesteps too.
        settings["mp_policy"] = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*reversed([each for each in transformer.modules() if type(each).__name__ in names]), transformer):
        if dtype is not None:
            for parameter in part.parameters():
                if not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.to(accelerator.device, torch.promote_types(dtype, torch.float32))
        fully_shard(part, **settings)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process' shard of a sharded tensor, which shares its memory; a plain tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor, detached; a plain tensor unchanged but detached. Collective."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of whole tensors by name. Collective.

    In the order of the names: a dictionary's own may differ between processes (safetensors files are read in any
    order), and they would then gather different tensors with one another.
    """
    return {name: full_tensor(tensors[name]).clone() for name in sorted(tensors)}


def like(full: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """A whole tensor in the layout, device and dtype of `reference`, which may be sharded.

    Args:
        full: the same on every process, any device and dtype.
        reference: plain or sharded, of the same shape.
    """
    full = full.to(reference.device, reference.dtype)
    if not isinstance(reference, DTensor):
        return full
    # Every process has the values already: each cuts its own shard, nothing is sent.
    return distribute_tensor(full, reference.device_mesh, reference.placements, src_data_rank=None)


def full_lora(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the LoRA's whole tensors by peft's names, on every process. Collective."""
    return full_tensors(get_peft_model_state_dict(transformer))


def load_lora(transformer: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """The way back from `full_lora`: write whole tensors into a LoRA, sharded or not.

    Args:
        transformer: with a LoRA of these names and shapes.
        tensors: whole, the same on every process.

    Raises:
        ValueError: for other names or shapes, naming one.
    """
    own = get_peft_model_state_dict(transformer)
    wrong = sorted(own.keys() ^ tensors.keys()) or [name for name in own if own[name].shape != tensors[name].shape]
    if wrong:
        raise ValueError(f"expected the LoRA's own layers and rank, {wrong[0]} differs; use the LoRA of that run.")
    set_peft_model_state_dict(transformer, {name: like(tensors[name], own[name]) for name in own})


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> float:
    """Scale gradients down to a 2-norm, over all parameters and shards, of at most `max_norm`. Collective.

    Returns:
        The norm before, the same on every process; not finite if any gradient is not, and then the gradients are
        unusable.
    """
    return full_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_norm)).item()


def all_ranks_max(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """The largest of each value over the processes, NaN if one is NaN; in float32. Collective.

    For flags: a signal was received, something is not finite.

    Args:
        values: as many on every process.
    """
    if accelerator.num_processes == 1:
        return [float(value) for value in values]
    gathered = accelerator.gather(torch.tensor([list(values)], dtype=torch.float32, device=accelerator.device))
    return gathered.amax(0).tolist()


def exit_process(code: int | str) -> None:
    """End this process, one of several without Python's own shutdown; a process that is alone and done returns.

    Args:
        code: to exit with, or what to print to stderr before exiting with 1, as `sys.exit` takes them.

    DDP keeps its process group and the threads of it alive beyond `destroy_process_group`. A thread that still lets go
    of a tensor then needs the interpreter that is being taken down: the process crashes or hangs with all work done
    (https://github.com/pytorch/pytorch/issues/190489). What was written is flushed, and exit functions are run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if code == 0:
            return
        sys.exit(code)
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # The other processes may still be leaving a last exchange with this one.
    time.sleep(1)
    os._exit(code)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1", "yes", "y", "on", "t")
