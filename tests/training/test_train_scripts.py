# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The scripts for Stable Diffusion 3, FLUX.1 and FLUX.2-Klein, on tiny saved pipelines.

What a script must do is tested for all three. What the scripts share is tested once, with Stable Diffusion 3.
"""

import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, TorchAoConfig
from peft import LoraConfig, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from trained_backbones import BACKBONES, TRUE_GUIDANCE, VARIANTS, TrainedBackbone
from training_scripts import (
    ALPHA,
    METHOD_OPTIONS,
    RANK,
    CheckRefusal,
    accelerate_launch,
    arguments_of_run,
    backbone_of,
    check_dry_run,
    check_round_trip,
    check_run,
    command_line,
    environment,
    images_of,
    load_pipeline,
    load_script,
    log_of,
    lora_of,
    metadata_of,
    parse_config,
    run_program,
    same,
    watch_pictures,
)
from warm_python import warm
from watched_updates import check_float32_over_bfloat16, watch_updates

from flowbp import METHODS
from flowbp.checks import RecordingError
from flowbp.methods import OPTIONS


def rows(*names: str) -> pytest.MarkDecorator:
    """The backbones and variants of a test, by name."""
    return pytest.mark.parametrize("backbone", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def backbone(request: pytest.FixtureRequest) -> TrainedBackbone:
    return {**BACKBONES, **VARIANTS}[request.param]


@pytest.fixture(scope="module")
def script(backbone: TrainedBackbone) -> ModuleType:
    return load_script(backbone.script)


@pytest.fixture(scope="module")
def model(backbone: TrainedBackbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model, to be read only."""
    folder = tmp_path_factory.mktemp("model")
    backbone.build().save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(backbone: TrainedBackbone, model: Path, tmp_path: Path) -> dict[str, Any]:
    """Of a run of two updates, to be changed."""
    size = {"resolution": backbone.call["height"], "max_sequence_length": backbone.call["max_sequence_length"]}
    return arguments_of_run(model, tmp_path, **size, **backbone.options)


# Two updates with every method.


@pytest.mark.parametrize(
    ("backbone", "method"),
    [
        *itertools.product(BACKBONES, METHODS),
        *itertools.product(VARIANTS, ("full", "draft-lv", "flowbp-bridge", "flowbp-lagrange")),
    ],
    indirect=["backbone"],
    scope="module",
)
def test_two_updates(
    script: ModuleType,
    arguments: dict[str, Any],
    model: Path,
    backbone: TrainedBackbone,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
):
    drawn = watch_pictures(monkeypatch)
    script.main(command_line(arguments, method=method, **METHOD_OPTIONS[method]))
    output = arguments["output_dir"]
    check_run(output)
    layers = metadata_of(output)["transformer.target_modules"]
    assert set(layers) == set(backbone_of(script).defaults["lora_layers"].split(","))
    check_round_trip(model, lambda pipe: pipe.load_lora_weights(output), drawn, **backbone.call)
    for picture in ("before_after.png", "reward_curve.png"):
        with Image.open(output / picture) as image:
            assert min(image.size) > 100
    assert not [path for path in output.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    # The last update's, always.
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]


@rows(*BACKBONES)
def test_accelerate_launch(backbone: TrainedBackbone, arguments: dict[str, Any], model: Path):
    output = arguments["output_dir"]
    words = command_line(arguments, method="flowbp-lagrange", **METHOD_OPTIONS["flowbp-lagrange"])
    printed = run_program(accelerate_launch(backbone.script, words), warm(environment())).stdout
    assert f"LoRA, model card, run.json, before_after.png and reward_curve.png are in {output}" in printed
    check_run(output)
    load_pipeline(model).load_lora_weights(output)


# What every script does.


@rows(*BACKBONES)
def test_lora_and_optimizer_stay_float32_over_a_bfloat16_base(
    script: ModuleType,
    arguments: dict[str, Any],
    model: Path,
    backbone: TrainedBackbone,
    monkeypatch: pytest.MonkeyPatch,
):
    drawn = watch_pictures(monkeypatch)
    with watch_updates() as updates:
        script.main(command_line(arguments, mixed_precision="bf16", validation_steps=1, checkpointing_steps=1))
    output = arguments["output_dir"]
    check_float32_over_bfloat16(updates[-1])
    # The second checkpoint is of parameters that went through a validation and a saving.
    for file in ("checkpoint-1/lora", "checkpoint-2/lora", "checkpoint-2/optimizer", "pytorch_lora_weights"):
        tensors = load_file(output / f"{file}.safetensors")
        assert tensors and all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert (output / "validation" / "000001.png").is_file()
    check_round_trip(model, lambda pipe: pipe.load_lora_weights(output), drawn, **backbone.call)


@rows(*BACKBONES)
def test_dry_run_writes_nothing(
    script: ModuleType, arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    check_dry_run(script, arguments, tmp_path, capsys)


def parsed(script: ModuleType, *words: str, **more: Any) -> dict[str, Any]:
    """What a script makes of a command line."""
    required = {"pretrained_model_name_or_path": "m", "prompts": "p.txt", "reward": "ocr"}
    return parse_config(script, [*command_line({**required, **more}), *words]).settings()


@rows(*BACKBONES)
def test_defaults_are_those_of_diffusers_and_the_paper(script: ModuleType, backbone: TrainedBackbone):
    found = parsed(script)
    expected = {
        "rank": 4,
        "lora_alpha": 4,
        "learning_rate": 1e-4,
        "train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_weight_decay": 1e-4,
        "max_grad_norm": 1.0,
        "checkpointing_steps": 500,
        "report_to": "tensorboard",
        "resolution": [512],
        "num_inference_steps": 25,
        "max_train_steps": 300,
        "method": "flowbp-lagrange",
        **backbone.defaults,
    }
    assert {name: found[name] for name in expected} == expected


@rows(*BACKBONES)
def test_every_option_of_the_table_is_an_option_of_the_script(script: ModuleType, capsys: pytest.CaptureFixture[str]):
    options = {option for row in METHODS.values() for option in row.options}
    with pytest.raises(SystemExit):
        script.main(["--help"])
    printed = capsys.readouterr().out
    assert options == set(OPTIONS) and all(f"  --{option} " in printed for option in options)


REFUSALS = [
    ("flux", {"sigmas": "linear"}, "unknown argument --sigmas"),
    ("flux", {"negative_prompt": "grey"}, "has no effect without guidance; set --true_cfg_scale above 1"),
    ("flux2", {"negative_prompt": "grey"}, "unknown argument --negative_prompt"),
]


@pytest.mark.parametrize(
    ("backbone", "changes", "message"),
    REFUSALS,
    indirect=["backbone"],
    scope="module",
)
def test_a_bad_command_line_is_one_line_before_any_model(
    backbone: TrainedBackbone,
    arguments: dict[str, Any],
    changes: dict[str, Any],
    message: str,
    check_refusal: CheckRefusal,
):
    check_refusal(backbone.script, {**arguments, **changes}, message)


# Options of one script.


@rows("flux")
def test_the_negative_prompt_counts_with_true_guidance(script: ModuleType, arguments: dict[str, Any], tmp_path: Path):
    loras = {}
    for run, changes in {"distilled": {}, "true": {"true_cfg_scale": 3.0}, "negative": TRUE_GUIDANCE}.items():
        script.main(command_line(arguments, method="draft-k", output_dir=tmp_path / run, **changes))
        loras[run] = lora_of(tmp_path / run)
    assert not same(loras["true"], loras["negative"]) and not same(loras["true"], loras["distilled"])


@rows("flux")
def test_a_quantised_base(script: ModuleType, arguments: dict[str, Any], tmp_path: Path):
    quantization = pytest.importorskip(
        "torchao.quantization",
        reason="torchao prints errors at import where its compiled parts do not fit torch, so it is not installed "
        "with the tests (pip install torchao==0.18.0 runs this one); bitsandbytes needs a GPU to quantise",
    )
    config = tmp_path / "int8.json"
    config.write_text(json.dumps(TorchAoConfig(quantization.Int8WeightOnlyConfig()).to_dict()))
    changes = {"quantization_config_path": config, "mixed_precision": "bf16", "gradient_checkpointing": True}
    with watch_updates() as updates:
        script.main(command_line(arguments, **changes))
    check_run(arguments["output_dir"])
    quantised = updates[-1].model.transformer_blocks[0].attn.to_q.base_layer.weight
    assert type(quantised).__name__ == "Int8Tensor"
    assert all(tensor.dtype == torch.float32 for tensor in (*updates[-1].parameters, *updates[-1].gradients))


@rows("flux2", "flux2 distilled")
def test_undoing_guidance_divides_by_what_guidance_multiplies_with(
    script: ModuleType, arguments: dict[str, Any], backbone: TrainedBackbone, tmp_path: Path
):
    """The base model's loss by 4, the distilled model's, which ignores the guidance scale, by 1."""
    losses = {}
    for switch in ("undo_guidance", "no-undo_guidance"):
        output = tmp_path / switch
        script.main(command_line(arguments, output_dir=output, max_train_steps=1, method="draft-k", **{switch: True}))
        losses[switch] = log_of(output)[0]["loss"]
    divisor = 4 if backbone is BACKBONES["flux2"] else 1
    assert losses["undo_guidance"] == pytest.approx(losses["no-undo_guidance"] / divisor) and losses["undo_guidance"]


# The LoRA that is saved.


@rows("sd3")
def test_the_lora_is_the_checkpoint_s_and_comes_off_again(
    script: ModuleType,
    arguments: dict[str, Any],
    model: Path,
    backbone: TrainedBackbone,
    monkeypatch: pytest.MonkeyPatch,
):
    drawn = watch_pictures(monkeypatch)
    script.main(command_line(arguments, checkpointing_steps=2, seed=3, sigmas="linear"))
    output, steps = arguments["output_dir"], arguments["num_inference_steps"]
    call = {**backbone.call, "seed": 3, "sigmas": torch.linspace(1, 1 / steps, steps).tolist()}
    trained = load_pipeline(model)
    targets = backbone_of(script).defaults["lora_layers"].split(",")
    trained.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    set_peft_model_state_dict(trained.transformer, load_file(output / "checkpoint-2" / "lora.safetensors"))
    assert torch.equal(images_of(trained, **call), drawn[-2])

    check_round_trip(model, lambda pipe: pipe.load_lora_weights(output), drawn, **call)
    pipe = load_pipeline(model)
    pipe.load_lora_weights(output)
    pipe.unload_lora_weights()
    assert torch.equal(images_of(pipe, **call), drawn[-1])


@rows("sd3")
def test_strict_refuses_what_the_sweep_does_not_see(
    script: ModuleType, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From the second update on, the unconditional samples of the transformer's outputs differ from call to call.

    The sweep computes the conditional samples only, so without `--strict` that is seen in the first update alone.
    """
    forward, calls = SD3Transformer2DModel.forward, itertools.count()

    def drifts(module: SD3Transformer2DModel, *args: Any, **kwargs: Any) -> Any:
        output = forward(module, *args, **kwargs)
        if updates and len(output[0]) == 2 * arguments["train_batch_size"]:
            output[0][: arguments["train_batch_size"]] += 1e-3 * next(calls)
        return output

    monkeypatch.setattr(SD3Transformer2DModel, "forward", drifts)
    with watch_updates() as updates:
        script.main(command_line(arguments, method="draft-k"))
    assert next(calls) > 0
    with watch_updates() as updates, pytest.raises(RecordingError, match="does not reproduce its recorded output"):
        script.main(command_line(arguments, method="draft-k", strict=True, output_dir=tmp_path / "strict"))
    assert len(updates) == 1


# Seeds, folders.


@rows("sd3")
def test_noise_differs_between_updates_and_comes_from_the_seed(
    script: ModuleType, arguments: dict[str, Any], tmp_path: Path
):
    one_prompt = tmp_path / "one.txt"
    one_prompt.write_text("a 42\n")
    rewards = {}
    for run, seed in (("first", 0), ("again", 0), ("other", 1)):
        # A learning rate that changes nothing: only the noise can make rewards differ.
        script.main(
            command_line(
                arguments,
                prompts=one_prompt,
                output_dir=tmp_path / run,
                seed=seed,
                learning_rate=1e-30,
                num_validation_images=1,
                train_batch_size=1,
                method="draft-k",
            )
        )
        rewards[run] = [row["reward"] for row in log_of(tmp_path / run)]
    assert len(set(rewards["first"])) == 2
    assert rewards["again"] == rewards["first"]
    assert not set(rewards["other"]) & set(rewards["first"])


@rows("sd3")
def test_resuming_the_latest_in_place_continues_its_log(script: ModuleType, arguments: dict[str, Any]):
    shared = {"num_validation_images": 1, "method": "draft-k", "checkpointing_steps": 1, "checkpoints_total_limit": 1}
    output = arguments["output_dir"]
    script.main(command_line(arguments, **shared))
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    first = log_of(output)
    # Pictures of a run that drew more of them; what others have put there stays.
    for name in ("7_base.png", "7_trained.png", "7_lora.png", "my_lora.png"):
        (output / "images" / name).write_bytes(b"old")
    script.main(command_line(arguments, **shared, max_train_steps=3, resume_from_checkpoint="latest"))
    found = sorted(path.name for path in (output / "images").iterdir())
    assert found == ["0_base.png", "0_trained.png", "my_lora.png"]
    assert log_of(output)[:2] == first and [row["step"] for row in log_of(output)] == [1, 2, 3]


@rows("sd3")
def test_nothing_is_written_or_removed_where_a_link_leads(
    script: ModuleType, arguments: dict[str, Any], tmp_path: Path
):
    outside, output = tmp_path / "outside", arguments["output_dir"]
    outside.mkdir()
    (outside / "7_base.png").write_bytes(b"mine")
    output.mkdir()
    (output / "images").symlink_to(outside)
    script.main(command_line(arguments, max_train_steps=1, method="draft-k"))
    assert [path.name for path in outside.iterdir()] == ["7_base.png"]
    assert not (output / "images").is_symlink() and (output / "images" / "0_trained.png").is_file()
