# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""No file that is loaded can run code, no test reaches the network, and how the sources keep both.

Hostile files make a folder, the marker, when their code runs; no test may leave one.
"""

import ast
import hashlib
import json
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from golden.make_hpsv3 import CONFIG as HPSV3_CONFIG
from golden.make_hpsv3 import QUESTION
from golden.make_imagereward import VOCABULARY
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_flux_pipeline, tiny_klein_pipeline
from tiny_rewards import (
    CLIP_CONFIG,
    GENEVAL_METADATA,
    HEAD_FILE,
    HPS_FILE,
    save_clip_tokenizer,
    save_qwen_processor,
    tiny_blip_config,
    tiny_detector,
)
from tiny_sd3 import save_random_lora, tiny_sd3_pipeline
from training_scripts import ROOT, SHARED_ARGUMENTS, command_line, environment, script_path, write_prompts
from transformers import AutoConfig, CLIPModel

from flowbp.publishing.published_files import LORA_FILE
from flowbp.rewards import load_reward, recogniser
from flowbp.rewards.blip import imagereward
from flowbp.rewards.geneval import geneval
from flowbp.rewards.hpsv3 import hpsv3
from flowbp.rewards.judges import unifiedreward_quality
from flowbp.rewards.openclip import hpsv2_1
from flowbp.training.command_line import read_recipe
from flowbp.training.prompts import load_prompts

MODELS = {
    "train_flowbp_sd3": lambda: tiny_sd3_pipeline(torch.float32),
    "train_flowbp_flux": tiny_flux_pipeline,
    "train_flowbp_flux2": tiny_klein_pipeline,
    "train_flowbp": tiny_flux_pipeline,
}


class Hostile:
    """What makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def write_hostile(path: Path, marker: Path, plain: bool = False) -> None:
    """A file as torch saves it, or a plain pickle, that makes the marker."""
    if plain:
        path.write_bytes(pickle.dumps(Hostile(marker)))
    else:
        torch.save({"state_dict": Hostile(marker)}, path)


CODE = """import os

os.mkdir({marker!r})


class Hostile:
    pass
"""
# Classes of transformers that look into a folder for code.
AUTO = "AutoConfig AutoModel AutoModelForCausalLM AutoModelForImageTextToText AutoTokenizer AutoImageProcessor".split()


def add_code(folder: Path, marker: Path) -> None:
    """A module that makes the marker, to which every JSON file of configuration in the folder points."""
    (folder / "modeling_hostile.py").write_text(CODE.format(marker=str(marker)))
    for file in folder.glob("*config.json"):
        classes = dict.fromkeys(AUTO, "modeling_hostile.Hostile")
        # Of tokenizers there are a slow and a fast one.
        classes["AutoTokenizer"] = ["modeling_hostile.Hostile", "modeling_hostile.Hostile"]
        content = {**json.loads(file.read_text()), "auto_map": classes, "custom_pipeline": "modeling_hostile"}
        file.write_text(json.dumps(content))


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A folder that is not there, and must not be when the test is over."""
    path = tmp_path / "the pickle was run"
    yield path
    assert not path.exists(), "code of a hostile file was run"


@pytest.mark.parametrize("plain", [True, False])
def test_the_hostile_pickle_works(tmp_path: Path, plain: bool):
    """Else nothing below would prove anything."""
    write_hostile(tmp_path / "file", tmp_path / "marker", plain)
    if plain:
        pickle.loads((tmp_path / "file").read_bytes())
    else:
        torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "marker").is_dir()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`run(script, arguments)` as a program in this process: "" or the one line of its error."""

    def start(name: str, arguments: dict[str, Any]) -> str:
        monkeypatch.setattr(sys, "argv", [str(script_path(name)), *command_line(arguments)])
        capsys.readouterr()
        try:
            runpy.run_path(str(script_path(name)), run_name="__main__")
        except SystemExit as ended:
            line = ended.code if isinstance(ended.code, str) else capsys.readouterr().err.removesuffix("\n")
            assert line.startswith(f"{name}.py: error: ") and "\n" not in line, line
            return line
        return ""

    return start


@pytest.fixture
def arguments_of(saved: Callable[[str], Path], tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """A script's arguments; the model is a copy that a test may change."""

    def make(name: str) -> dict[str, Any]:
        model = tmp_path / "model"
        if not model.exists():
            shutil.copytree(saved(name), model)
        size = {"resolution": 8, "max_sequence_length": 16}
        if name == "train_flowbp":
            size = {"height": 8, "width": 8, "pipeline_arguments": {"max_sequence_length": 16}}
        return {
            **SHARED_ARGUMENTS,
            "pretrained_model_name_or_path": model,
            "prompts": write_prompts(tmp_path),
            "output_dir": tmp_path / "run",
            "method": "draft-k",
            "last_k": 1,
            "max_train_steps": 1,
            "train_batch_size": 1,
            "num_inference_steps": 3,
            **size,
        }

    return make


Run = Callable[[str, dict[str, Any]], str]
Arguments = Callable[[str], dict[str, Any]]

# Names by which diffusers, transformers, peft and accelerate keep pickles.
PICKLES = (
    "diffusion_pytorch_model.bin pytorch_model.bin model.bin model.pt pytorch_model.pt diffusion_pytorch_model.ckpt "
    "adapter_model.bin pytorch_lora_weights.bin tokenizer.pkl optimizer.bin scheduler.bin random_states_0.pkl "
    "custom_checkpoint_0.pkl"
).split()


def weight_files(folder: Path) -> list[Path]:
    """All safetensors files under a folder."""
    found = sorted(folder.rglob("*.safetensors"))
    assert found
    return found


@pytest.mark.parametrize("script", MODELS)
def test_pickles_beside_a_pipelines_weights_are_not_read(run: Run, arguments_of: Arguments, marker: Path, script: str):
    arguments = arguments_of(script)
    for weights in weight_files(arguments["pretrained_model_name_or_path"]):
        for name in PICKLES:
            write_hostile(weights.parent / name, marker)
    assert run(script, arguments) == ""


@pytest.mark.parametrize("by_that_name", [True, False])
@pytest.mark.parametrize("script", MODELS)
def test_pickles_in_place_of_a_pipelines_weights_are_refused(
    run: Run, arguments_of: Arguments, marker: Path, script: str, by_that_name: bool
):
    arguments = arguments_of(script)
    files = weight_files(arguments["pretrained_model_name_or_path"])
    assert len(files) >= 3
    for weights in files:
        content = weights.read_bytes()
        weights.unlink()
        names = [weights.name] if by_that_name else PICKLES
        for name in names:
            write_hostile(weights.parent / name, marker)
        assert run(script, arguments), weights
        for name in names:
            (weights.parent / name).unlink()
        weights.write_bytes(content)


@pytest.mark.parametrize("script", ["train_flowbp_sd3", "train_flowbp"])
def test_code_in_a_pipelines_folder_is_not_run(run: Run, arguments_of: Arguments, marker: Path, script: str):
    """Code that the folder's files name: at worst the folder is refused."""
    arguments = arguments_of(script)
    model = arguments["pretrained_model_name_or_path"]
    index = json.loads((model / "model_index.json").read_text())
    parts = [name for name, spec in index.items() if isinstance(spec, list) and spec != [None, None]]
    for folder in (model, *(model / part for part in parts)):
        add_code(folder, marker)
    # Beside what each part's files say, that nobody asked for.
    assert run(script, arguments) == ""
    for changes in (
        {"_class_name": ["modeling_hostile", "HostilePipeline"]},
        {"_class_name": "HostilePipeline", "auto_map": {"HostilePipeline": "modeling_hostile.HostilePipeline"}},
        {"custom_pipeline": "modeling_hostile"},
        *({part: ["modeling_hostile", "Hostile"]} for part in parts),
    ):
        (model / "model_index.json").write_text(json.dumps({**index, **changes}))
        # Not all of these are read by every script; what is not read is no error.
        run(script, {**arguments, "dry_run": True})


def test_the_hostile_code_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is run where it is trusted; else the tests with `add_code` would prove nothing."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "hostile"}))
    add_code(tmp_path / "model", tmp_path / "marker")
    with pytest.raises(Exception):  # noqa: B017  what comes after the code was run does not matter
        AutoConfig.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert (tmp_path / "marker").is_dir()


# Rewards.


def clip_files(folder: Path) -> None:
    CLIPModel(CLIP_CONFIG).save_pretrained(folder)
    save_clip_tokenizer(folder)


def aesthetic_files(folder: Path) -> None:
    clip_files(folder)
    torch.save({}, folder / HEAD_FILE)


def hpsv2_files(folder: Path) -> None:
    clip_files(folder)
    torch.save({}, folder / HPS_FILE)


def imagereward_files(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    torch.save({}, folder / "ImageReward.pt")


def hpsv3_files(folder: Path) -> None:
    save_qwen_processor(folder, HPSV3_CONFIG)
    save_file({"embed_tokens.weight": torch.zeros(1)}, folder / "HPSv3.safetensors")


def unifiedreward_files(folder: Path) -> None:
    save_qwen_processor(folder, HPSV3_CONFIG)
    save_file({}, folder / "model.safetensors")


def geneval_files(folder: Path) -> None:
    tiny_detector().save_pretrained(folder / "detector")
    clip_files(folder / "clip")
    (folder / "metadata.jsonl").write_text(json.dumps(GENEVAL_METADATA[0]) + "\n")


# By reward: what writes a folder of the public files' layout, what loads it, and its files of weights.
REWARD_FOLDERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any], tuple[str, ...]]] = {
    "clip": (clip_files, lambda folder: load_reward("clip", {"clip": folder}), ("model.safetensors",)),
    "pickscore": (clip_files, lambda folder: load_reward("pickscore", {"pickscore": folder}), ("model.safetensors",)),
    "aesthetic": (
        aesthetic_files,
        lambda folder: load_reward("aesthetic", {"aesthetic": folder}),
        ("model.safetensors", HEAD_FILE),
    ),
    "hpsv2.1": (hpsv2_files, lambda folder: hpsv2_1(folder, CLIP_CONFIG), (HPS_FILE,)),
    "imagereward": (
        imagereward_files,
        lambda folder: imagereward(folder, tiny_blip_config()),
        ("ImageReward.pt",),
    ),
    "hpsv3": (hpsv3_files, lambda folder: hpsv3(folder, QUESTION), ("HPSv3.safetensors",)),
    "unifiedreward": (unifiedreward_files, unifiedreward_quality, ("model.safetensors",)),
    "vqa": (unifiedreward_files, lambda folder: load_reward("vqa", {"vqa": folder}), ("model.safetensors",)),
    "similarity": (
        clip_files,
        lambda folder: load_reward("similarity", {"similarity": folder}),
        ("model.safetensors",),
    ),
    "geneval": (
        geneval_files,
        lambda folder: geneval(folder / "metadata.jsonl", folder),
        ("detector/model.safetensors", "clip/model.safetensors"),
    ),
}


@pytest.fixture
def reward_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "reward"
    folder.mkdir()
    return folder


def refused(load: Callable[[Path], Any], folder: Path) -> str:
    """The one line of what a loader raises."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("name", REWARD_FOLDERS)
def test_pickles_in_place_of_a_rewards_weights_are_refused(name: str, plain: bool, reward_folder: Path, marker: Path):
    write, load, weights = REWARD_FOLDERS[name]
    write(reward_folder)
    for file in (reward_folder / weight for weight in weights):
        content = file.read_bytes()
        write_hostile(file, marker, plain)
        for pickled in PICKLES:
            write_hostile(file.parent / pickled, marker, plain)
        assert str(file.parent) in refused(load, reward_folder)
        # Those beside it are not looked for.
        file.unlink()
        assert f"{file.name} not in {file.parent}" in refused(load, reward_folder)
        file.write_bytes(content)


@pytest.mark.parametrize("kind", ["beside the class's own", "of a class that nobody knows"])
@pytest.mark.parametrize("name", REWARD_FOLDERS)
def test_code_in_a_rewards_folder_is_not_run(name: str, kind: str, reward_folder: Path, marker: Path):
    write, load, weights = REWARD_FOLDERS[name]
    write(reward_folder)
    for folder in {(reward_folder / weight).parent for weight in weights}:
        add_code(folder, marker)
        if kind.startswith("of"):
            for file in folder.glob("*config.json"):
                content = json.loads(file.read_text())
                hostile = {"model_type": "hostile", "tokenizer_class": "Hostile", "image_processor_type": "Hostile"}
                file.write_text(json.dumps({**content, **hostile, "architectures": ["Hostile"]}))
    try:
        load(reward_folder)
    except (ValueError, FileNotFoundError) as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("plain", [True, False])
def test_a_pickle_in_place_of_the_recogniser_is_not_run(
    tmp_path: Path, marker: Path, plain: bool, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "ppocr_v4.safetensors"
    write_hostile(file, marker, plain)
    monkeypatch.setattr(recogniser, "FOLDER", tmp_path)
    assert "SHA-256" in refused(recogniser.load_recogniser, "v4")
    monkeypatch.setitem(recogniser.SHA256, "v4", hashlib.sha256(file.read_bytes()).hexdigest())
    with pytest.raises(SafetensorError):
        recogniser.load_recogniser("v4")


# Prompts and their embeddings, recipes, LoRAs, checkpoints, evaluations.


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet", ".pkl"])
def test_a_pickle_in_place_of_prompts_is_refused(tmp_path: Path, marker: Path, suffix: str):
    write_hostile(tmp_path / f"prompts{suffix}", marker, plain=True)
    with pytest.raises(ValueError, match="^prompts: ") as error:
        load_prompts(str(tmp_path / f"prompts{suffix}"))
    assert "\n" not in str(error.value)


def test_code_in_a_folder_of_prompts_is_not_run(tmp_path: Path, marker: Path):
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("set.py", "script.py", "dataset.py", "__init__.py"):
        (folder / name).write_text(CODE.format(marker=str(marker)))
    for name in ("data.pkl", "data.pickle", "data.pt"):
        write_hostile(folder / name, marker, plain=True)
    with pytest.raises(ValueError, match="^prompts: cannot read a dataset from the folder") as error:
        load_prompts(str(folder))
    assert "\n" not in str(error.value)
    # datasets refuses folders with a script of their own name.
    (folder / "set.py").unlink()
    (folder / "train.jsonl").write_text('{"prompt": "a 7"}\n')
    assert load_prompts(str(folder)) == ["a 7"]


def test_a_saved_dataset_with_a_pickle_for_its_table_is_refused(tmp_path: Path, marker: Path):
    datasets.Dataset.from_dict({"prompt": ["a 7"]}).save_to_disk(tmp_path / "set")
    (table,) = (tmp_path / "set").glob("*.arrow")
    write_hostile(table, marker, plain=True)
    with pytest.raises(ValueError, match="^prompts: cannot read a dataset from the folder") as error:
        load_prompts(str(tmp_path / "set"))
    assert "\n" not in str(error.value)


def test_a_recipe_cannot_run_code(run: Run, arguments_of: Arguments, marker: Path, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f'seed: !!python/object/apply:os.mkdir ["{marker}"]\n')
    assert "not valid YAML" in run("train_flowbp_sd3", {**arguments_of("train_flowbp_sd3"), "config": recipe})


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        # 10 ** 9 times "x", in one list.
        (
            "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)),
            "an alias",
        ),
        ("seed: &seed 3\nrank: *seed\n", "expected values, got an alias (*name): write the value itself"),
        ("seed: " + "[" * 10_000, "too many nested ones"),
        ("seed: " + "{a: " * 10_000, "too many nested ones"),
    ],
    ids=["billion", "one", "lists", "mappings"],
)
def test_a_recipe_that_takes_all_memory_is_refused(tmp_path: Path, recipe: str, expected: str):
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(ValueError, match=re.escape(f"--config {tmp_path / 'recipe.yaml'}: ")) as error:
        read_recipe(tmp_path / "recipe.yaml")
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_pickle_in_place_of_kept_embeddings_is_replaced(
    run: Run, arguments_of: Arguments, marker: Path, tmp_path: Path
):
    arguments = {**arguments_of("train_flowbp_sd3"), "precompute_prompt_embeds": True, "dry_run": True}
    arguments["prompt_embeds_dir"] = tmp_path / "embeds"
    assert run("train_flowbp_sd3", arguments) == ""
    (kept,) = weight_files(tmp_path / "embeds")
    write_hostile(kept, marker)
    for name in PICKLES:
        write_hostile(kept.parent / name, marker)
    assert run("train_flowbp_sd3", arguments) == "" and load_file(kept)


def matching_manifest(manifest: Path, old: bytes, new: bytes) -> None:
    """Make a manifest say of a changed file what it said of the old one: an attacker would."""
    text = manifest.read_text()
    for kind in ("sha256", "sha1", "md5", "blake2b"):
        text = text.replace(hashlib.new(kind, old).hexdigest(), hashlib.new(kind, new).hexdigest())
    manifest.write_text(re.sub(rf"\b{len(old)}\b", str(len(new)), text))


@pytest.mark.parametrize("manifest_matches", [False, True])
def test_a_pickle_in_place_of_a_file_of_a_checkpoint_is_refused(
    run: Run, arguments_of: Arguments, marker: Path, tmp_path: Path, manifest_matches: bool
):
    """Whatever files a checkpoint has."""
    script = "train_flowbp_sd3"
    arguments = {**arguments_of(script), "checkpointing_steps": 1, "output_dir": tmp_path / "first"}
    assert run(script, arguments) == ""
    checkpoint = tmp_path / "first" / "checkpoint-1"
    files = {file.relative_to(checkpoint): file.read_bytes() for file in checkpoint.rglob("*") if file.is_file()}
    assert {"lora.safetensors", "optimizer.safetensors", "state.json"} <= {str(name) for name in files}
    resumed = {**arguments_of(script), "max_train_steps": 2, "resume_from_checkpoint": checkpoint, "dry_run": True}
    for name, content in files.items():
        write_hostile(checkpoint / name, marker)
        manifest = checkpoint / "manifest.json"
        if manifest_matches and manifest.is_file() and manifest.name != str(name):
            matching_manifest(manifest, content, (checkpoint / name).read_bytes())
        # What is only for users is not read, so with a manifest that says so it may be anything.
        ended = run(script, resumed)
        assert ended or (manifest_matches and str(name) == LORA_FILE), name
        for kept, old in files.items():
            (checkpoint / kept).write_bytes(old)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permissions for groups")
def test_files_of_a_run_have_the_permissions_of_the_umask(run: Run, arguments_of: Arguments, tmp_path: Path):
    """safetensors itself lets nobody else read them: not those who share a folder, nor a web server."""
    arguments = {**arguments_of("train_flowbp_sd3"), "checkpointing_steps": 1, "precompute_prompt_embeds": True}
    arguments |= {"prompt_embeds_dir": tmp_path / "embeds", "output_dir": tmp_path / "run"}
    # What a killed run leaves of a LoRA that it was writing is no obstacle.
    (tmp_path / "run" / "lora.partial").mkdir(parents=True)
    (tmp_path / "run" / "lora.partial" / ".tmp1a2b").write_bytes(b"half")
    before = os.umask(0o002)
    try:
        assert run("train_flowbp_sd3", arguments) == ""
    finally:
        os.umask(before)
    files = [file for folder in ("run", "embeds") for file in (tmp_path / folder).rglob("*") if file.is_file()]
    weights = {file.relative_to(tmp_path).parts[:2] for file in files if file.suffix == ".safetensors"}
    assert {("run", LORA_FILE), ("run", "checkpoint-1")} < weights and len(weights) >= 3
    # The lock is for the run's user alone.
    assert {
        file for file in files if file.stat().st_mode & 0o777 != 0o664 and not file.name.endswith(".lock")
    } == set()
    assert not (tmp_path / "run" / "lora.partial").exists()


def test_pickles_beside_the_files_of_a_checkpoint_are_not_read(
    run: Run, arguments_of: Arguments, marker: Path, tmp_path: Path
):
    script = "train_flowbp_sd3"
    arguments = {**arguments_of(script), "checkpointing_steps": 1}
    assert run(script, arguments) == ""
    for name in PICKLES:
        write_hostile(tmp_path / "run" / "checkpoint-1" / name, marker)
    ended = run(script, {**arguments, "max_train_steps": 2, "resume_from_checkpoint": "latest"})
    assert ended == "" or "checkpoint-1" in ended
    assert not [name for name in PICKLES if (tmp_path / "run" / "checkpoint-2" / name).exists()]


@pytest.fixture
def evaluation(saved: Callable[[str], Path], tmp_path: Path) -> dict[str, Any]:
    """Arguments of an evaluation of a random LoRA."""
    return {
        "pretrained_model_name_or_path": saved("train_flowbp_sd3"),
        "lora": [save_random_lora(tiny_sd3_pipeline(torch.float32), tmp_path / "lora", seed=1)],
        "prompts": write_prompts(tmp_path),
        "num_prompts": 1,
        "rewards": "toy_reward:make_reward",
        "height": 8,
        "width": 8,
        "num_inference_steps": 2,
        "pipeline_arguments": {"max_sequence_length": 16},
        "output_dir": tmp_path / "evaluation",
    }


@pytest.mark.parametrize("name", [LORA_FILE, "pytorch_lora_weights.bin", "adapter_model.pt", "lora.ckpt"])
def test_a_pickle_in_place_of_a_lora_is_refused(run: Run, evaluation: dict[str, Any], marker: Path, name: str):
    folder = evaluation["lora"][0]
    (folder / LORA_FILE).unlink()
    write_hostile(folder / name, marker)
    for lora in (folder, folder / name):
        assert str(lora) in run("evaluate_flowbp", {**evaluation, "lora": [lora]})


def test_a_lora_whose_metadata_takes_for_ever_is_refused(run: Run, evaluation: dict[str, Any]):
    """Before the pipeline is loaded; peft would match the expression with the names of all layers."""
    file = evaluation["lora"][0] / LORA_FILE
    with safe_open(file, "pt") as tensors:
        settings = json.loads(tensors.metadata()["lora_adapter_metadata"])
    settings["transformer.rank_pattern"] = {"(([a-z_]+)+)+!": 2}
    save_file(load_file(file), file, {"format": "pt", "lora_adapter_metadata": json.dumps(settings)})
    assert f"--lora {file.parent}: expected a plain LoRA" in run("evaluate_flowbp", evaluation)


@pytest.mark.parametrize("name", ["..", "."])
def test_an_evaluation_writes_into_its_folder_only(run: Run, evaluation: dict[str, Any], tmp_path: Path, name: str):
    before = set(tmp_path.rglob("*"))
    ended = run("evaluate_flowbp", {**evaluation, "lora": [f"{name}={evaluation['lora'][0]}"]})
    assert f"--lora: expected a name that folders can have on all systems, got {name!r}" in ended
    assert set(tmp_path.rglob("*")) == before


def test_pickles_in_place_of_an_evaluations_files_are_refused(
    run: Run, evaluation: dict[str, Any], marker: Path, tmp_path: Path
):
    """Or drawn again, of those that a second start reads; the others are written anew."""
    assert run("evaluate_flowbp", evaluation) == ""
    folder = evaluation["output_dir"]
    files = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    ends = {}
    for file, content in files.items():
        write_hostile(file, marker)
        for name in PICKLES:
            write_hostile(file.parent / name, marker)
        ends[str(file.relative_to(folder))] = run("evaluate_flowbp", evaluation)
        file.write_bytes(content)
    read = {name for name in ends if name == "settings.json" or name.startswith(("scores/", "images/"))}
    assert len(read) == 5 and {"settings.json"} <= {name for name, end in ends.items() if end} <= read


# No connection but to loopback: `no_network/sitecustomize.py` and `conftest.py`.

GUARDED = """
import socket, subprocess, sys
import pytest

CONNECT = "socket.socket().connect(('192.0.2.1', 80))"
LOOK_UP = "socket.getaddrinfo('huggingface.co', 443)"

@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("here", CONNECT),
        ("here", LOOK_UP),
        ("here", "socket.socket(socket.AF_INET6).connect_ex(('2001:db8::1', 80))"),
        ("here", "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))"),
        ("here", "socket.gethostbyname('huggingface.co')"),
        ("child", CONNECT),
        ("child", LOOK_UP),
        ("grandchild", CONNECT),
    ],
    ids=list("01234567"),
)
def test_refused(place, code):
    code = f"import socket\\ntry:\\n    {code}\\nexcept ConnectionRefusedError:\\n    pass"
    if place == "here":
        exec(code)
    else:
        if place == "grandchild":
            code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], check=True)"
        subprocess.run([sys.executable, "-c", code], check=True)

@pytest.fixture
def reaching():
    yield
    with pytest.raises(OSError, match="only loopback is allowed"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)

def test_refused_in_a_fixture(reaching):
    pass

def test_allowed(tmp_path):
    left, right = socket.socketpair()
    left.send(b"x")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        server.listen()
        socket.socket(socket.AF_UNIX).connect(str(tmp_path / "socket"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for host in ("127.0.0.1", "localhost"):
            socket.create_connection((host, port), timeout=5).close()
        code = f"import socket; socket.create_connection(('localhost', {port}), timeout=5).close()"
        subprocess.run([sys.executable, "-c", code], check=True)
    socket.getaddrinfo(socket.gethostname(), 80)
"""


def test_a_test_that_reaches_for_the_network_fails(tmp_path: Path):
    """Itself, in a process that it starts, in a fixture; and one that stays on this machine does not."""
    (tmp_path / "test_guarded.py").write_text(GUARDED)
    words = ["-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", "-rA", "--rootdir", str(tmp_path)]
    # Its `conftest` sets a file of its own for what is refused, so none of this fails this test too.
    paths = [str(ROOT / "tests"), environment()["PYTHONPATH"]]
    done = subprocess.run(
        [sys.executable, *words, "-c", os.devnull, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**environment(), "PYTHONPATH": os.pathsep.join(paths)},
        cwd=tmp_path,
        timeout=300,
    )
    ends = re.findall(r"^(PASSED|FAILED|ERROR) \S+::(\w+)", done.stdout, re.MULTILINE)
    errors = [name for end, name in ends if end == "ERROR"]
    assert done.returncode == 1 and "FAILED" not in {end for end, _ in ends}, done.stdout[-3000:]
    assert errors == ["test_refused"] * 8 + ["test_refused_in_a_fixture"]
    assert [name for end, name in ends if end == "PASSED"] == [*errors, "test_allowed"]
    lines = re.findall(r"^no network in tests: \S+ tried to reach (.+), only loopback is allowed$", done.stdout, re.M)
    connect, look_up = "192.0.2.1 port 80", "huggingface.co (look-up)"
    assert lines[:3] + lines[4:8] == [connect, look_up, "2001:db8::1 port 80", look_up, connect, look_up, connect]
    assert lines[3] == "192.0.2.1 port 9" and lines[8] == "192.0.2.1 (look-up)" and len(lines) == 9


def test_the_guard_reaches_processes_and_runs_what_it_hides(tmp_path: Path):
    """A system's or an environment's own `sitecustomize` still runs."""
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.hidden = True\n")
    code = "import socket\nassert hidden\n"
    code += "try:\n    socket.getaddrinfo('x.org', 1)\nexcept OSError as error:\n    print(error)"
    paths = os.pathsep.join([str(ROOT / "tests" / "support" / "no_network"), str(tmp_path)])
    alone = {**os.environ, "PYTHONPATH": paths}
    del alone["FLOWBP_TEST_REFUSED"]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=alone, timeout=60)
    assert done.stdout == "no network in tests: -c tried to reach x.org (look-up), only loopback is allowed\n", done


# What the sources must keep.

SOURCES = [
    path
    for folder in ("pipelines", "training", "demo", "benchmarks", "upstream")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.is_file()
]
# What unpickles, and what nothing here needs.
MODULES = {"dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
# `module.name` that may only be called with these constants, and those that may not be used at all.
CALLS = {
    ("torch", "load"): {"weights_only": True},
}
FORBIDDEN = {
    "yaml": {"load", "load_all", "full_load", "unsafe_load", "full_load_all", "unsafe_load_all"},
    "os": {"system", "popen"},
    "torch.jit": {"load"},
    "torch.hub": {"load"},
}
# Classes that read no weights.
WITHOUT_WEIGHTS = re.compile(r"(Tokenizer|Config|ImageProcessor|Processor|Scheduler)(Fast|Pil)?$")
# Classes of which a folder can bring its own code.
WITH_CODE = re.compile(r"^(Auto(Model|Config|Tokenizer|\w*Processor|FeatureExtractor)\w*|\w*Pipeline\w*)$")


def constants_of(call: ast.Call, tree: ast.AST) -> dict[str, Any]:
    """The call's keyword arguments that are constants, those of `**name` included if one dict is all of the name."""
    found: dict[str, Any] = {}
    for keyword in call.keywords:
        if isinstance(keyword.value, ast.Constant) and keyword.arg:
            found[keyword.arg] = keyword.value.value
        elif keyword.arg is None:
            name = ast.unparse(keyword.value)
            values = [
                node.value
                for node in ast.walk(tree)
                if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr)
                for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
                if ast.unparse(target).partition("[")[0] == name
            ]
            if len(values) == 1 and isinstance(values[0], ast.Dict):
                for key, value in zip(values[0].keys, values[0].values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                        found[key.value] = value.value
    return found


def unsafe(source: str) -> list[str]:
    """What a source does that could run the code of a file, with its lines."""
    tree = ast.parse(source)
    found: list[tuple[int, str]] = []
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    # `load_pretrained(source, Class.from_pretrained, folder, ...)` says trust_remote_code=False itself.
    handed = {
        id(call.args[1]): call
        for call in calls.values()
        if ast.unparse(call.func) == "load_pretrained" and len(call.args) > 1
    }
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = {f"{module}.{alias.name}".strip(".") for alias in node.names}
            if any(name.split(".")[0] in MODULES for name in names):
                found.append((line, "imports what unpickles"))
            guarded = {f"{owner}.{name}" for owner, name in CALLS} | {"pickle"}
            guarded |= {f"{owner}.{name}" for owner, names in FORBIDDEN.items() for name in names}
            if module and (module == "pickle" or names & guarded):
                found.append((line, "imports a loader by its own name"))
            if any(alias.name in ("pickle", "torch", "yaml", "os") and alias.asname for alias in node.names):
                found.append((line, "renames a module with loaders"))
        if isinstance(node, ast.Name) and node.id in BUILTINS:
            found.append((line, node.id))
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            if (node.arg, node.value.value) in (("shell", True), ("trust_remote_code", True), ("allow_pickle", True)):
                found.append((line, f"{node.arg}=True"))
        if not isinstance(node, ast.Attribute):
            continue
        owner = ast.unparse(node.value)
        if owner == "pickle" and node.attr != "UnpicklingError":
            found.append((line, f"pickle.{node.attr}"))
        if node.attr in FORBIDDEN.get(owner, ()):
            found.append((line, f"{owner}.{node.attr}"))
        if (owner, node.attr) in CALLS:
            given = constants_of(calls[id(node)], tree) if id(node) in calls else {}
            if not CALLS[owner, node.attr].items() <= given.items():
                found.append((line, f"{owner}.{node.attr} without {CALLS[owner, node.attr]}"))
        if node.attr == "from_pretrained":
            call = calls.get(id(node)) or handed.get(id(node))
            if call is None:
                found.append((line, "from_pretrained that is not called here"))
                continue
            given, name = constants_of(call, tree), owner.rpartition(".")[2]
            from_nothing = call.args and isinstance(call.args[0], ast.Constant) and call.args[0].value is None
            if not WITHOUT_WEIGHTS.search(name) and not from_nothing and given.get("use_safetensors") is not True:
                found.append((line, f"{name}.from_pretrained without use_safetensors=True"))
            if id(node) not in handed and WITH_CODE.match(name) and given.get("trust_remote_code") is not False:
                found.append((line, f"{name}.from_pretrained without trust_remote_code=False"))
    return [f"{line}: {text}" for line, text in sorted(found)]


def test_no_source_can_run_a_files_code():
    found = {str(path.relative_to(ROOT)): unsafe(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert len(found) > 30 and {path: lines for path, lines in found.items() if lines} == {}
    # The one place that gives transformers its folders.
    loading = ast.parse((ROOT / "pipelines" / "flowbp" / "rewards" / "loading.py").read_text(encoding="utf-8"))
    (load_pretrained,) = (node for node in loading.body if getattr(node, "name", "") == "load_pretrained")
    calls = [node for node in ast.walk(load_pretrained) if isinstance(node, ast.Call)]
    (call,) = (node for node in calls if ast.unparse(node.func) == "loader")
    assert constants_of(call, loading) == {"local_files_only": True, "trust_remote_code": False}


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "load = torch.load",
        "from torch import load",
        "import torch as t",
        "import pickle; pickle.load(file)",
        "from pickle import load",
        "import joblib",
        "from dill import loads",
        "yaml.load(file)",
        "from yaml import load",
        "eval(text)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "numpy.load(path, allow_pickle=True)",
        "Model.from_pretrained(path)",
        "Model.from_pretrained(path, use_safetensors=False)",
        "given = {'use_safetensors': True}\ngiven['use_safetensors'] = None\nModel.from_pretrained(path, **given)",
        "options = {'use_safetensors': None}\nModel.from_pretrained(path, **options)",
        "AutoConfig.from_pretrained(path)",
        "FluxPipeline.from_pretrained(path, use_safetensors=True)",
        "FluxPipeline.from_pretrained(path, use_safetensors=True, trust_remote_code=True)",
        "load = CLIPModel.from_pretrained",
        "load_pretrained(source, CLIPModel.from_pretrained, folder)",
    ],
)
def test_what_the_sources_must_not_have_is_seen(source: str):
    assert unsafe(source)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "import pickle\ntry:\n    pass\nexcept pickle.UnpicklingError:\n    pass",
        "yaml.safe_load(file)",
        "loading = {'use_safetensors': True}\nFluxPipeline.from_pretrained(path, trust_remote_code=False, **loading)",
        "load_pretrained(source, AutoTokenizer.from_pretrained, folder)",
        "load_pretrained(source, CLIPModel.from_pretrained, folder, use_safetensors=True)",
        "model.eval()",
    ],
)
def test_what_the_sources_may_have_is_not(source: str):
    assert unsafe(source) == []
