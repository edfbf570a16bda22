# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The training script itself, on a tiny pipeline that was saved and is loaded as any other.

Most runs are in this process, where the imports are paid once; one goes through `accelerate launch`.
"""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, set_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_sd3 import MAX_SEQUENCE_LENGTH, tiny_sd3_pipeline

from flowbp import METHODS
from flowbp.training_utils import make_generator

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "training" / "train_flowbp_sd3.py"
LORA = "pytorch_lora_weights.safetensors"
RANK, ALPHA = 3, 5
STEPS = 6


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_flowbp_sd3", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-sd3")
    tiny_sd3_pipeline(torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text('the text "42"\na "7" in red\nblue "k9"\n')
    return path


@pytest.fixture
def arguments(model: Path, prompts: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": model,
        "prompts": prompts,
        "reward": "toy_reward:make_reward",
        "output_dir": tmp_path / "run",
        "resolution": 8,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        "num_inference_steps": STEPS,
        "max_train_steps": 2,
        "train_batch_size": 2,
        "rank": RANK,
        "lora_alpha": ALPHA,
        "learning_rate": 0.01,
        "num_validation_images": 2,
        "report_to": "none",
    }


def command_line(arguments: dict[str, Any], **changes: Any) -> list[str]:
    """Options as words; True is a flag, None leaves an option out, a list is several values."""
    words = []
    for name, value in {**arguments, **changes}.items():
        if value is None:
            continue
        words.append(f"--{name}")
        if isinstance(value, list):
            words += [str(item) for item in value]
        elif value is not True:
            words.append(str(value))
    return words


def lora_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / LORA)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def load_pipeline(model: Path, dtype: torch.dtype = torch.float32) -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images_of(pipe: StableDiffusion3Pipeline, output_type: str = "pt", seed: int = 0, number: int = 0) -> Any:
    """What the script's validation draws for the first prompt."""
    with torch.no_grad():
        return pipe(
            'the text "42"',
            height=8,
            width=8,
            num_inference_steps=STEPS,
            guidance_scale=3.5,
            negative_prompt="",
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            generator=make_generator("validation", seed, number),
            output_type=output_type,
        ).images


# Two updates with every method.

METHOD_OPTIONS = {
    "full": {},
    "draft-k": {"last_k": 2},
    "refl": {"last_n": 4},
    "draft-lv": {"num_noised": 1},
    "drtune": {"num_active": 2},
    "leapalign": {"samples_per_decode": 1},
    "flowbp-sparse": {"steps_per_forward": 2},
    "flowbp-bridge": {"num_active": 3, "gradient_checkpointing": True},
    "flowbp-lagrange": {"sigmas": "linear", "gradient_accumulation_steps": 2, "reward_clip": 0.9},
}


@pytest.mark.parametrize("name", METHODS)
def test_two_updates_with_every_method(script: ModuleType, arguments: dict[str, Any], name: str):
    script.main(command_line(arguments, method=name, **METHOD_OPTIONS[name]))
    output = arguments["output_dir"]
    log = log_of(output)
    assert [row["step"] for row in log] == [1, 2]
    assert all(row["gradient_norm"] > 0 and row["learning_rate"] == 0.01 for row in log)
    lora = lora_of(output)
    ups = [tensor for key, tensor in lora.items() if "lora_B" in key]
    assert all(key.startswith("transformer.") for key in lora) and all(t.dtype == torch.float32 for t in lora.values())
    # B starts at 0, so what is not 0 was trained.
    assert sum(bool(tensor.abs().max() > 0) for tensor in ups) > len(ups) / 2
    for picture in ("before_after.png", "reward_curve.png"):
        with Image.open(output / picture) as image:
            assert min(image.size) > 100
    assert not list(output.glob("checkpoint-*"))


# The LoRA that is saved.


def test_the_lora_round_trip_is_bit_equal(
    script: ModuleType, arguments: dict[str, Any], model: Path, monkeypatch: pytest.MonkeyPatch
):
    """Base and aligned pictures of the run's own model, against those of a pipeline that loads what it saved."""
    shown: list[tuple[list[Image.Image], list[Image.Image]]] = []
    draw = script.before_after

    def before_after(base: list[Image.Image], aligned: list[Image.Image], *rest: Any, **options: Any) -> Any:
        shown.append((base, aligned))
        return draw(base, aligned, *rest, **options)

    monkeypatch.setattr(script, "before_after", before_after)
    script.main(command_line(arguments, checkpointing_steps=2, seed=3))
    output = arguments["output_dir"]
    (base, aligned), pipe = shown[0], load_pipeline(model)
    before = images_of(pipe)
    assert images_of(pipe, "pil", seed=3)[0].tobytes() == base[0].tobytes()

    trained = load_pipeline(model)
    targets = script.LORA_LAYERS.split(",")
    trained.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    set_peft_model_state_dict(trained.transformer, load_file(output / "checkpoint-2" / "lora.safetensors"))

    pipe.load_lora_weights(output)
    assert torch.equal(images_of(pipe), images_of(trained))
    assert images_of(pipe, "pil", seed=3)[0].tobytes() == aligned[0].tobytes()
    assert (images_of(pipe) - before).abs().max() > 1e-3
    pipe.unload_lora_weights()
    assert torch.equal(images_of(pipe), before)


def test_adapter_metadata_is_in_the_file(script: ModuleType, arguments: dict[str, Any]):
    script.main(command_line(arguments, max_train_steps=1))
    with safe_open(arguments["output_dir"] / LORA, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.r"] == RANK and metadata["transformer.lora_alpha"] == ALPHA
    assert set(metadata["transformer.target_modules"]) == set(script.LORA_LAYERS.split(","))


def test_a_lora_with_no_update_changes_nothing(
    script: ModuleType, arguments: dict[str, Any], model: Path, tmp_path: Path
):
    # The first update of a warm-up has a learning rate of exactly 0.
    script.main(command_line(arguments, max_train_steps=1, lr_scheduler="constant_with_warmup", lr_warmup_steps=10))
    lora = lora_of(arguments["output_dir"])
    assert all(tensor.abs().max() == 0 for key, tensor in lora.items() if "lora_B" in key)
    assert all(tensor.abs().max() > 0 for key, tensor in lora.items() if "lora_A" in key)
    pipe = load_pipeline(model)
    before = images_of(pipe)
    pipe.load_lora_weights(arguments["output_dir"])
    assert torch.equal(images_of(pipe), before)


def test_lora_and_optimizer_stay_float32_over_a_bfloat16_base(
    script: ModuleType, arguments: dict[str, Any], model: Path
):
    script.main(
        command_line(arguments, mixed_precision="bf16", validation_steps=1, checkpointing_steps=1, learning_rate=0.01)
    )
    output = arguments["output_dir"]
    # The second checkpoint is of parameters that went through a validation and a saving.
    for file in ("checkpoint-1/lora", "checkpoint-2/lora", "checkpoint-2/optimizer", "pytorch_lora_weights"):
        tensors = load_file(output / f"{file}.safetensors")
        assert tensors and all(tensor.dtype == torch.float32 for tensor in tensors.values())
    trained = load_file(output / "checkpoint-2" / "lora.safetensors")
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in trained.values())
    assert (output / "validation" / "000001.png").is_file()
    pipe = load_pipeline(model, torch.bfloat16)
    before = images_of(pipe)
    pipe.load_lora_weights(output)
    assert not torch.equal(images_of(pipe), before)


# Seeds and resume.


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


@pytest.mark.parametrize("lr_scheduler", ["constant", "cosine"])
def test_a_resumed_run_ends_with_the_uninterrupted_run_s_lora(
    script: ModuleType, arguments: dict[str, Any], tmp_path: Path, lr_scheduler: str
):
    shared = {
        "max_train_steps": 4,
        "lr_scheduler": lr_scheduler,
        "lr_warmup_steps": 0 if lr_scheduler == "constant" else 3,
        "num_validation_images": 1,
        "method": "flowbp-sparse",
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 3,
    }
    script.main(command_line(arguments, **shared))
    whole = arguments["output_dir"]
    resumed = tmp_path / "resumed"
    script.main(command_line(arguments, **shared, output_dir=resumed, resume_from_checkpoint=whole / "checkpoint-2"))
    first, second = log_of(whole), log_of(resumed)
    assert [row["step"] for row in second] == [3, 4]
    assert [row["reward"] for row in second] == [row["reward"] for row in first[2:]]
    assert [row["learning_rate"] for row in second] == [row["learning_rate"] for row in first[2:]]
    assert same(lora_of(resumed), lora_of(whole))
    assert not same(
        load_file(whole / "checkpoint-2" / "lora.safetensors"), load_file(whole / "checkpoint-4" / "lora.safetensors")
    )


def test_resuming_the_latest_in_place_continues_its_log(script: ModuleType, arguments: dict[str, Any]):
    shared = {"num_validation_images": 1, "method": "draft-k", "checkpointing_steps": 1, "checkpoints_total_limit": 1}
    output = arguments["output_dir"]
    script.main(command_line(arguments, **shared))
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    first = log_of(output)
    script.main(command_line(arguments, **shared, max_train_steps=3, resume_from_checkpoint="latest"))
    assert log_of(output)[:2] == first and [row["step"] for row in log_of(output)] == [1, 2, 3]


# Recipes.


@pytest.mark.parametrize("recipe", sorted((ROOT / "training" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses_and_draws(script: ModuleType, recipe: Path):
    assert recipe.name.startswith("sd3"), "a recipe of another backbone needs its own script here"
    args = script.parse_args(["--config", str(recipe), "--prompts", "prompts.txt", "--reward", "ocr"])
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert content and all(vars(args)[name] == value for name, value in content.items())
    assert script.choose_method(args).name == content["method"]


def test_there_are_recipes():
    assert len(list((ROOT / "training" / "recipes").glob("sd3_*.yaml"))) >= 4


def recipe_file(folder: Path, **content: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_run_from_a_recipe_alone(script: ModuleType, arguments: dict[str, Any], tmp_path: Path):
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
    recipe = recipe_file(tmp_path, **{**plain, "method": "draft-k", "last_k": 3, "max_train_steps": 1})
    script.main(["--config", str(recipe)])
    assert len(log_of(arguments["output_dir"])) == 1


def test_the_command_line_wins_over_the_recipe(script: ModuleType, arguments: dict[str, Any], tmp_path: Path):
    recipe = recipe_file(tmp_path, method="draft-k", last_k=3, learning_rate=0.5, seed=9)
    args = script.parse_args(command_line(arguments, config=recipe, last_k=2, learning_rate=None))
    assert (args.method, args.last_k, args.learning_rate, args.seed) == ("draft-k", 2, 0.5, 9)
    assert script.choose_method(args).options["last_k"] == 2


def test_defaults_are_those_of_diffusers_and_the_paper(script: ModuleType):
    args = script.parse_args(["--pretrained_model_name_or_path", "m", "--prompts", "p.txt", "--reward", "ocr"])
    expected = {
        "rank": 4,
        "lora_alpha": 4,
        "learning_rate": 1e-4,
        "resolution": 512,
        "train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "lr_scheduler": "constant",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_weight_decay": 1e-4,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "checkpointing_steps": 500,
        "report_to": "tensorboard",
        "num_inference_steps": 25,
        "guidance_scale": 3.5,
        "max_train_steps": 300,
        "method": "flowbp-lagrange",
        "sigmas": "stock",
    }
    assert {name: vars(args)[name] for name in expected} == expected


def test_every_option_of_the_table_is_an_option_of_the_script(script: ModuleType):
    options = {option for row in METHODS.values() for option in row.options}
    assert options == set(script.METHOD_OPTIONS)


# Bad command lines: one line, an exit code, and no model loaded.


def run_as_program(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """What the program prints to stderr when it exits with an error."""

    def from_pretrained(*_: Any, **__: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", from_pretrained)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    code, printed = caught.value.code, capsys.readouterr().err
    if isinstance(code, str):
        # The interpreter prints it and exits with 1.
        return printed + code
    assert code == 2
    return printed.removesuffix("\n")


def bad(folder: Path) -> dict[str, tuple[dict[str, Any], str]]:
    empty = folder / "empty.txt"
    empty.write_text("\n\n")
    unknown_key = recipe_file(folder, last_j=3)
    return {
        "empty prompts": ({"prompts": empty}, "empty.txt"),
        "absent prompts": ({"prompts": folder / "absent.txt"}, "absent.txt"),
        "unknown method": ({"method": "flowbp-dense"}, "invalid choice: 'flowbp-dense' (choose from"),
        "another method's option": ({"method": "draft-k", "last_n": 3}, "draft-k has no option 'last_n' (nearest:"),
        "unknown choice": ({"weights": "simpson"}, "invalid choice: 'simpson'"),
        "resolution": ({"resolution": 10}, "--resolution must be a multiple of 4 for this model, got 10; use 8"),
        "more active than steps": ({"method": "flowbp-sparse", "num_active": 7}, "use at most 6"),
        "too few steps": ({"method": "leapalign", "num_inference_steps": 2}, "needs at least 3; raise"),
        "unknown reward": ({"reward": "orc"}, "orc"),
        "absent reward module": ({"reward": "no_such_module:make"}, "no_such_module"),
        "absent checkpoint": ({"resume_from_checkpoint": "latest"}, "run has no checkpoints"),
        "absent checkpoint path": ({"resume_from_checkpoint": folder / "checkpoint-9"}, "checkpoint-9: not found"),
        "zero steps": ({"max_train_steps": 0}, "--max_train_steps must be at least 1, got 0"),
        "zero batch": ({"train_batch_size": 0}, "--train_batch_size must be at least 1, got 0"),
        "negative learning rate": ({"learning_rate": -1}, "--learning_rate must be above 0, got -1.0"),
        "learning rate of NaN": ({"learning_rate": "nan"}, "--learning_rate must be above 0, got nan"),
        "clip of NaN": ({"reward_clip": "nan"}, "`clip` must be a finite number or None"),
        "no number": ({"rank": "four"}, "argument --rank: invalid int value: 'four'"),
        "unknown option": ({"learning_rat": 1}, "--learning_rat: did you mean --learning_rate?"),
        "no reward": ({"reward": None}, "the following arguments are required: --reward"),
        "unknown key": ({"config": unknown_key}, "unknown key last_j: did you mean last_"),
        "absent recipe": ({"config": folder / "absent.yaml"}, "absent.yaml: cannot be read"),
        "absent model": ({"pretrained_model_name_or_path": folder / "no-model"}, "no-model"),
        "unknown schedule": ({"lr_scheduler": "cosin"}, "cosin"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "empty prompts",
        "absent prompts",
        "unknown method",
        "another method's option",
        "unknown choice",
        "resolution",
        "more active than steps",
        "too few steps",
        "unknown reward",
        "absent reward module",
        "absent checkpoint",
        "absent checkpoint path",
        "zero steps",
        "zero batch",
        "negative learning rate",
        "learning rate of NaN",
        "clip of NaN",
        "no number",
        "unknown option",
        "no reward",
        "unknown key",
        "absent recipe",
        "absent model",
        "unknown schedule",
    ],
)
def test_a_bad_command_line_is_one_line_before_any_model(
    arguments: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    case: str,
):
    changes, message = bad(tmp_path)[case]
    printed = run_as_program(command_line(arguments, **changes), monkeypatch, capsys)
    assert message in printed
    assert len(printed.splitlines()) == 1 and printed.startswith("train_flowbp_sd3.py: error: ")
    assert not arguments["output_dir"].exists()


# As users start it.


def environment() -> dict[str, str]:
    paths = [str(ROOT / "pipelines"), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def test_accelerate_launch(arguments: dict[str, Any], model: Path):
    words = command_line(
        arguments, report_to="tensorboard", validation_steps=1, checkpointing_steps=1, validation_prompt=["a 42", "k9"]
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"]
    done = subprocess.run(
        [*launch, str(SCRIPT), *words], capture_output=True, text=True, check=False, env=environment(), timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    output = arguments["output_dir"]
    assert f"LoRA, before_after.png and reward_curve.png are in {output}" in done.stdout
    names = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    expected = {LORA, "before_after.png", "reward_curve.png", "log.jsonl", "validation/000001.png"}
    expected |= {f"checkpoint-{n}/{file}" for n in (1, 2) for file in ("lora.safetensors", "state.json")}
    assert expected <= names
    assert any("tfevents" in name for name in names if name.startswith("logs/"))
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".ckpt")) for name in names)
    # Two prompts, two pictures of each.
    with Image.open(output / "validation" / "000001.png") as grid:
        assert grid.width > grid.height
    load_pipeline(model).load_lora_weights(output)


def test_an_error_of_the_program_has_an_exit_code_and_one_line(arguments: dict[str, Any], tmp_path: Path):
    words = command_line(arguments, resume_from_checkpoint="latest")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if not line.startswith("[transformers]")]
    assert len(errors) == 1 and errors[0].startswith("train_flowbp_sd3.py: error: --resume_from_checkpoint latest")


def test_a_checkpoint_of_another_lora_is_refused(
    script: ModuleType, arguments: dict[str, Any], tmp_path: Path
) -> None:
    first = tmp_path / "first"
    script.main(command_line(arguments, output_dir=first, checkpointing_steps=2))
    checkpoint = first / "checkpoint-2"
    for changes, message in (
        ({"rank": RANK + 1}, "other layers or another rank"),
        ({"lora_layers": "attn.to_q"}, "other layers or another rank"),
        ({"mixed_precision": "fp16"}, "--mixed_precision of that run"),
    ):
        with pytest.raises(ValueError, match=message):
            script.main(command_line(arguments, **changes, resume_from_checkpoint=checkpoint, max_train_steps=3))
