# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Two processes on the CPU, DDP and FSDP2: gradients are means, batches may be split; other kinds are refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from distributed_batches import tiny_pipeline
from tiny_pipelines import tiny_flux_pipeline, tiny_klein_pipeline
from tiny_sd3 import MAX_SEQUENCE_LENGTH, tiny_sd3_pipeline
from training_scripts import (
    SHARED_ARGUMENTS,
    arguments_of_run,
    command_line,
    log_of,
    lora_of,
    on_cpus,
    run_program,
    same,
    script_path,
    torchrun,
    write_prompts,
)

from flowbp.training.distributed import (
    all_ranks_max,
    check_distributed,
    check_environment,
    clip_gradients,
    full_lora,
    full_tensor,
    like,
    load_lora,
    prepare_transformer,
)
from flowbp.training.speed import block_classes

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
CONFIGS = sorted((ROOT / "training" / "accelerate_configs").glob("*.yaml"))
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def printed(command: list[str], **variables: str) -> Any:
    """What the first process printed last, in JSON."""
    return json.loads(run_program(command, on_cpus(**variables)).stdout.strip().splitlines()[-1])


def launch(config: str, *words: Any) -> list[str]:
    """The command that starts a program with one of the files for `accelerate launch`."""
    path = ROOT / "training" / "accelerate_configs" / f"{config}.yaml"
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path), *map(str, words)]


# Two processes.


@pytest.mark.parametrize(
    "variables, words, exchange, of_term, others",
    [
        # With nothing else, once DDP has agreed on its buckets in its first backward pass.
        pytest.param({}, [], "allreduce_", 0, set(), id="ddp"),
        # One for each of the two blocks that hold a LoRA. The frozen base is gathered for every call.
        pytest.param(FSDP2, [], "_reduce_scatter_base_", 2, {"_allgather_base_"}, id="fsdp2"),
        # And one for the parameters outside of blocks.
        pytest.param(FSDP2, ["full"], "_reduce_scatter_base_", 3, {"_allgather_base_"}, id="all weights"),
    ],
)
def test_gradients_of_two_processes_are_averaged(
    variables: dict[str, str], words: list[str], exchange: str, of_term: int, others: set[str]
) -> None:
    found = printed(torchrun(SUPPORT / "distributed_gradients.py", *words), **variables)
    assert len(found) == 7
    for method, of_method in found.items():
        assert of_method["apart"] > 0.1, method  # the processes have noise of their own
        assert of_method["difference"] < 1e-12, (method, of_method)
        assert of_method["of_norms"] < 1e-12, (method, of_method)
        # DDP: once in each of the two calls of `backward`.
        number = of_method["exchanges"].pop(exchange)
        assert number == (of_term * of_method["terms"] or 2), (method, of_method)
        # Between replays no process holds a whole parameter or gradient.
        assert of_method["held"] in (None, 0), (method, of_method)
    first, *later = found.values()
    assert first["exchanges"].keys() - others <= {"broadcast_"}
    assert all(of_method["exchanges"].keys() == others for of_method in later)


def test_a_batch_may_be_split_into_micro_batches_and_processes() -> None:
    found = printed(torchrun(SUPPORT / "distributed_batches.py"))
    for dtype, tolerance in (("float64", 1e-12), ("float32", 1e-6)):
        assert len(found[dtype]) == 7
        for method, of_method in found[dtype].items():
            assert of_method["half"] > 0.1, method  # the samples differ
            assert of_method["one_by_one"] < tolerance, (dtype, method, of_method)
            assert of_method["two_processes"] < tolerance, (dtype, method, of_method)


def test_a_sharded_transformer_trains_like_a_whole_one(tmp_path: Path) -> None:
    found = printed(torchrun(SUPPORT / "distributed_training.py", tmp_path), **FSDP2)
    assert 0.5 <= found["share"] < 0.55
    for whole, sharded in found["norms"]:
        assert whole > 0.05  # so that clipping scales
        assert sharded == pytest.approx(whole, rel=1e-4)
    # The step size of AdamW is the learning rate, 1e-2, wherever a gradient is not 0.
    assert found["moved"] > 0.01
    assert found["lora"] < 1e-5
    assert found["average"] < 1e-5 and found["averaged"] > 1e-3
    assert found["put_back"] == 0.0
    assert found["plain"] is True
    assert found["resumed"] == 0.0
    assert found["after_resuming"] > 1e-3
    assert found["images"] == 0.0
    assert found["shards"] is True
    assert found["sent"] == {}  # every process reads the checkpoint itself
    assert found["largest"] == [1.0, 0.0, float("inf")]


@pytest.mark.parametrize("use_dora", [None, True])
def test_the_script_trains_the_same_however_its_batch_is_split(tmp_path: Path, use_dora: bool | None) -> None:
    tiny_pipeline(torch.float32, 0.1, lora=False).save_pretrained(tmp_path / "model")
    arguments = {
        **SHARED_ARGUMENTS,
        "pretrained_model_name_or_path": tmp_path / "model",
        "prompts": write_prompts(tmp_path),
        "resolution": 8,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        "method": "flowbp-bridge",
        "use_dora": use_dora,
        "max_train_steps": 1,
        # So that a step is about the learning rate times the gradient, and not its sign.
        "adam_epsilon": 1,
        "adam_weight_decay": 0,
        "max_grad_norm": 1e6,
    }
    steps = {}
    for name, batch, passes, processes, variables in (
        ("one batch", 4, 1, 1, {}),
        ("one by one", 1, 4, 1, {}),
        ("two processes", 2, 1, 2, {}),
        ("two shards", 1, 2, 2, FSDP2),
    ):
        split = {"train_batch_size": batch, "gradient_accumulation_steps": passes, "output_dir": tmp_path / name}
        words = [script_path("train_flowbp_sd3"), *command_line(arguments, **split)]
        run_program([sys.executable, *words] if processes == 1 else torchrun(*words), on_cpus(**variables))
        # What LoRA's B matrices began at is 0.
        lora = lora_of(tmp_path / name)
        steps[name] = torch.cat([lora[key].flatten() for key in sorted(lora) if "lora_B" in key])
    whole = steps.pop("one batch")
    assert whole.norm() > 0
    for name, step in steps.items():
        assert (step - whole).norm() < 1e-6 * whole.norm(), name


# The second process' clock says that a checkpoint is overdue, the first one's, which writes it, does not.
ONE_OVERDUE = """
import os, sys
from training_scripts import load_script
from flowbp.training import state_files
from flowbp.training.script import run_script

write_folder = state_files.write_folder

def noted(folder, fill):
    write_folder(folder, fill)
    (folder.parent / f"wrote-{folder.name}").touch()

state_files.write_folder = noted

minutes = "1e-6" if os.environ["RANK"] == "1" else "1000"
run_script(lambda: load_script("train_flowbp_sd3").main([*sys.argv[1:], "--checkpointing_minutes", minutes]))
"""


def test_processes_agree_on_an_overdue_checkpoint(tmp_path: Path) -> None:
    tiny_sd3_pipeline(torch.float32).save_pretrained(tmp_path / "model")
    (tmp_path / "one_overdue.py").write_text(ONE_OVERDUE, encoding="utf-8")
    size = {"resolution": 8, "max_sequence_length": MAX_SEQUENCE_LENGTH}
    arguments = arguments_of_run(tmp_path / "model", tmp_path, **size, method="draft-k", train_batch_size=1)
    run_program(torchrun(tmp_path / "one_overdue.py", *command_line(arguments)), on_cpus())
    assert sorted(path.name for path in (tmp_path / "run").glob("wrote-*")) == [
        "wrote-checkpoint-1",
        "wrote-checkpoint-2",
    ]


# A thread of the process group is still busy, in Python, when all work is done.
LEAVE_BUSY = """
import atexit, json, time
import torch
import torch.distributed as dist
from accelerate import Accelerator
from flowbp.training.distributed import exit_process, prepare_transformer

def slow(future):
    time.sleep(2)
    return future.value()

accelerator = Accelerator()
model = prepare_transformer(accelerator, torch.nn.Linear(4, 4))
model(torch.ones(1, 4)).sum().backward()
dist.all_reduce(torch.ones(3), async_op=True).get_future().then(slow)
accelerator.end_training()
if accelerator.is_main_process:
    atexit.register(lambda: print(json.dumps({"exit": "functions"})))
exit_process(0)
"""


def test_processes_leave_although_a_thread_is_busy(tmp_path: Path) -> None:
    script = tmp_path / "busy.py"
    script.write_text(LEAVE_BUSY, encoding="utf-8")
    assert printed(torchrun(script)) == {"exit": "functions"}


def test_the_exit_code_of_a_process(tmp_path: Path) -> None:
    script = tmp_path / "exits.py"
    script.write_text(
        "from flowbp.training.distributed import exit_process; print('said'); exit_process(143)", encoding="utf-8"
    )
    for processes in ("1", "2"):
        done = run_program([sys.executable, script], on_cpus(WORLD_SIZE=processes), check=False)
        assert done.returncode == 143
        assert done.stdout == "said\n"


# One process.


def test_one_process_changes_nothing() -> None:
    pipe = tiny_sd3_pipeline(lora_rank=2)
    accelerator = Accelerator(cpu=True)
    check_distributed(accelerator)
    before = [id(parameter) for parameter in pipe.transformer.parameters()]
    assert prepare_transformer(accelerator, pipe.transformer) is pipe.transformer
    assert [id(parameter) for parameter in pipe.transformer.parameters()] == before
    assert all_ranks_max(accelerator, [1, -2.5]) == [1.0, -2.5]


def test_a_lora_is_loaded_as_it_was_saved() -> None:
    transformer = tiny_sd3_pipeline(lora_rank=2).transformer
    saved = full_lora(transformer)
    assert saved
    load_lora(transformer, {name: torch.zeros_like(tensor) for name, tensor in saved.items()})
    assert not any(tensor.any() for tensor in full_lora(transformer).values())
    assert all(tensor.any() for tensor in saved.values())  # copies: they do not follow the training
    load_lora(transformer, saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in full_lora(transformer).items())


@pytest.mark.parametrize("change", ["less", "more", "shape"])
def test_a_lora_of_other_layers_or_rank_is_refused(change: str) -> None:
    transformer = tiny_sd3_pipeline(lora_rank=2).transformer
    tensors = full_lora(transformer)
    name = sorted(tensors)[0]
    if change == "less":
        del tensors[name]
    elif change == "more":
        name = "another.lora_A.weight"
        tensors[name] = torch.zeros(2, 2)
    else:
        tensors[name] = torch.zeros(3, 16)
    with pytest.raises(ValueError, match=f"{name} differs"):
        load_lora(transformer, tensors)


def test_clipping_returns_the_norm_before() -> None:
    parameters = [
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.zeros(1)),
        torch.nn.Parameter(torch.ones(1)),
    ]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_gradients(parameters, 1.0) == pytest.approx(5)
    assert torch.allclose(parameters[0].grad, torch.tensor([0.6, 0.0]))
    assert clip_gradients(parameters, 10.0) == pytest.approx(1)
    assert torch.allclose(parameters[1].grad, torch.tensor([0.8]))
    parameters[1].grad[0] = float("nan")
    assert not torch.tensor(clip_gradients(parameters, 1.0)).isfinite()


def test_a_plain_tensor_is_its_own_whole() -> None:
    parameter = torch.nn.Parameter(torch.arange(3.0))
    assert torch.equal(full_tensor(parameter), parameter)
    assert not full_tensor(parameter).requires_grad
    assert like(torch.ones(3, dtype=torch.float64), parameter).dtype == torch.float32


# What is refused.


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config .* is not supported"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend INDUCTOR is not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1 is not supported"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP version 1 is not supported"),
        ({**FSDP2, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading: false"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: false"),
        ({**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing: false"),
        ({**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "false"}, "fsdp_reshard_after_forward: true"),
        ({**FSDP2, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "SIZE_BASED_WRAP is not supported"),
    ],
)
def test_the_environment_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words) as caught:
        check_environment()
    assert "\n" not in str(caught.value)


def test_another_number_of_processes_than_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="expected 2 processes .* accelerate runs 1"):
        check_distributed(accelerator)


def test_blocks_that_the_transformer_does_not_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    for name, value in {
        **FSDP2,
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": "1",
        "RANK": "0",
        "LOCAL_RANK": "0",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "OtherBlock")
    accelerator = Accelerator()
    try:
        pipe = tiny_sd3_pipeline(lora_rank=2)
        with pytest.raises(ValueError, match="SD3Transformer2DModel, got OtherBlock; .*: JointTransformerBlock"):
            prepare_transformer(accelerator, pipe.transformer)
        pipe.transformer.proj_out.weight = torch.nn.Parameter(
            pipe.transformer.proj_out.weight.to(torch.uint8), requires_grad=False
        )
        with pytest.raises(ValueError, match="FSDP2 cannot shard a quantised transformer"):
            prepare_transformer(accelerator, pipe.transformer)
    finally:
        torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


# The config files.


def test_there_is_a_config_file_for_each_kind_of_machine() -> None:
    assert [path.stem for path in CONFIGS] == ["cpu", "fsdp2_12b", "fsdp2_full", "one_gpu", "several_gpus"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_files_have_keys_that_accelerate_knows(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    # accelerate looks at the names of its own level only.
    options = {action.dest for action in launch_command_parser()._actions}
    assert set(yaml.safe_load(path.read_text(encoding="utf-8")).get("fsdp_config") or {}) <= options


@pytest.mark.parametrize(
    ("build", "blocks"),
    [
        (tiny_sd3_pipeline, {"JointTransformerBlock"}),
        (tiny_flux_pipeline, {"FluxTransformerBlock", "FluxSingleTransformerBlock"}),
        (tiny_klein_pipeline, {"Flux2TransformerBlock", "Flux2SingleTransformerBlock"}),
    ],
)
def test_a_config_file_shards_every_backbone(build: Any, blocks: set[str]) -> None:
    assert block_classes(build().transformer) == blocks


WHO = """
import json
from accelerate import Accelerator
from flowbp.training.distributed import check_distributed, uses_fsdp2
accelerator = Accelerator()
check_distributed(accelerator)
if accelerator.is_main_process:
    print(json.dumps([accelerator.num_processes, accelerator.device.type, uses_fsdp2(accelerator)]))
accelerator.end_training()
"""


@pytest.mark.parametrize(
    "name, words, expected",
    [
        ("cpu", [], [2, "cpu", False]),
        ("one_gpu", ["--cpu"], [1, "cpu", False]),
        ("several_gpus", ["--num_processes", "2", "--main_process_port", "0"], [2, "cpu", False]),
        ("fsdp2_12b", ["--num_processes", "2", "--main_process_port", "0"], [2, "cpu", True]),
        ("fsdp2_full", ["--num_processes", "2", "--main_process_port", "0"], [2, "cpu", True]),
    ],
)
def test_config_files_launch_what_they_say(tmp_path: Path, name: str, words: list[str], expected: list[Any]) -> None:
    script = tmp_path / "who.py"
    script.write_text(WHO, encoding="utf-8")
    assert printed(launch(name, *words, script)) == expected


def test_flux_trains_and_resumes_with_the_config_of_a_large_base(tmp_path: Path) -> None:
    tiny_flux_pipeline().save_pretrained(tmp_path / "model")
    arguments = {
        **SHARED_ARGUMENTS,
        "pretrained_model_name_or_path": tmp_path / "model",
        "prompts": write_prompts(tmp_path),
        "resolution": 8,
        "max_sequence_length": 16,
        "method": "flowbp-lagrange",
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        "use_ema": True,
        "checkpointing_steps": 1,
    }
    program = ["--num_processes", "2", "--main_process_port", "0", script_path("train_flowbp_flux")]
    for name, changes in {
        "whole": {},
        "resumed": {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-1"},
    }.items():
        words = command_line(arguments, output_dir=tmp_path / name, **changes)
        run_program(launch("fsdp2_12b", *program, *words), on_cpus())
    assert [row["step"] for row in log_of(tmp_path / "whole")] == [1, 2]
    lora, resumed = lora_of(tmp_path / "whole"), lora_of(tmp_path / "resumed")
    assert any(tensor.any() for name, tensor in lora.items() if "lora_B" in name)
    assert same(lora, resumed)
