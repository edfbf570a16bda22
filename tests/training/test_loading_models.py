# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Models from folders, the Hub's cache and the Hub: what loads, and what is said of those that do not."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from loopback_hub import Repository, loopback_hub
from tiny_pipelines import tiny_flux_pipeline, tiny_klein_pipeline
from tiny_sd3 import save_random_lora, tiny_sd3_pipeline
from training_scripts import (
    SHARED_ARGUMENTS,
    CheckRefusal,
    backbone_of,
    command_line,
    load_script,
    parse_config,
    put_into_cache,
)

from flowbp.training.model import missing_components
from flowbp.training.prompts import Record
from flowbp.training.saved_pipeline import SavedPipeline

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "user/model"
SHARD = "30KB"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model whose transformer is in shards, to be read only."""
    folder = tmp_path_factory.mktemp("sharded")
    tiny_sd3_pipeline(torch.float32).save_pretrained(folder, max_shard_size=SHARD)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """A function that puts a folder into an empty cache of the Hub, as the main branch of `MODEL`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return lambda folder: put_into_cache(tmp_path / "hub", "model", folder, COMMIT)


def arguments_of(model: Path | str, folder: Path, **more: Any) -> dict[str, Any]:
    """A script's arguments for a model."""
    prompts = folder / "prompts.txt"
    prompts.write_text('the text "42"\n')
    size = {"height": 8, "width": 8} if "pipeline_arguments" in more else {"resolution": 8}
    names = {"pretrained_model_name_or_path": model, "prompts": prompts, "output_dir": folder / "run"}
    return {**SHARED_ARGUMENTS, **names, **size, **more}


def state_of(pipe: DiffusionPipeline, component: str = "transformer") -> dict[str, torch.Tensor]:
    return getattr(pipe, component).state_dict()


# From the cache.


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("train_flowbp_sd3", lambda: tiny_sd3_pipeline(torch.float32)),
        ("train_flowbp_flux", tiny_flux_pipeline),
        ("train_flowbp_flux2", tiny_klein_pipeline),
        ("train_flowbp", tiny_flux_pipeline),
    ],
)
def test_a_cached_model_in_shards_loads_offline(
    name: str, build: Callable[[], DiffusionPipeline], cache: Callable[[Path], Path], tmp_path: Path
):
    stock = build()
    stock.save_pretrained(tmp_path / "saved", max_shard_size=SHARD)
    snapshot = cache(tmp_path / "saved")
    assert len(list((snapshot / "transformer").glob("*-of-*"))) > 1
    script = load_script(name)
    backbone = backbone_of(script)(parse_config(script, command_line(arguments_of(MODEL, tmp_path))))
    assert backbone.saved.fetch() == snapshot and backbone.saved.commit == COMMIT
    pipe, expected = backbone.load_pipeline(), state_of(stock)
    assert all(torch.equal(value, expected[key]) for key, value in state_of(pipe).items()) and expected
    if name != "train_flowbp":
        text = backbone.load_text_pipeline()
        assert text.vae is None and text.text_encoder is not None and pipe.text_encoder is None
        expected = state_of(stock, "text_encoder")
        assert all(torch.equal(value, expected[key]) for key, value in state_of(text, "text_encoder").items())


def test_a_run_and_its_evaluation_from_the_cache(sharded: Path, cache: Callable[[Path], Path], tmp_path: Path):
    cache(sharded)
    arguments = arguments_of(MODEL, tmp_path, max_sequence_length=2)
    embeds = {"precompute_prompt_embeds": True, "prompt_embeds_dir": tmp_path / "embeds"}
    load_script("train_flowbp_sd3").main(command_line(arguments, **embeds, max_train_steps=1))
    evaluation = {
        "pretrained_model_name_or_path": MODEL,
        "lora": [tmp_path / "run"],
        "prompts": arguments["prompts"],
        "rewards": "toy_reward:make_reward",
        "resolution": 8,
        "num_inference_steps": 2,
        "pipeline_arguments": {"max_sequence_length": 2},
        "output_dir": tmp_path / "evaluation",
    }
    load_script("evaluate_flowbp").main(command_line(evaluation))
    assert (tmp_path / "evaluation" / "table.md").is_file()


LOAD = """
import sys
from diffusers import StableDiffusion3Pipeline
from flowbp.training.saved_pipeline import SavedPipeline
for _ in range(2):
    print(SavedPipeline(StableDiffusion3Pipeline, sys.argv[1]).fetch(), flush=True)
    input()
"""


def test_what_was_downloaded_loads_when_the_hub_is_gone(sharded: Path, tmp_path: Path):
    files = {path.relative_to(sharded).as_posix(): path.read_bytes() for path in sharded.rglob("*") if path.is_file()}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with loopback_hub() as hub:
        hub.repositories[MODEL] = Repository(files, [COMMIT])
        environment = {**hub.environment(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        process = subprocess.Popen([sys.executable, "-c", LOAD, MODEL], env=environment, **pipes)
        folder = Path(process.stdout.readline().strip())
        assert folder.name == COMMIT and hub.counts["get"] > 0
        for name, content in files.items():
            assert (folder / name).read_bytes() == content
    printed, errors = process.communicate("\n\n", timeout=120)
    assert process.returncode == 0 and printed.split() == [str(folder)], errors


def test_all_files_are_of_the_commit_that_the_run_started_with(model: Path, cache: Callable[[Path], Path]):
    snapshot = cache(model)
    saved = SavedPipeline(DiffusionPipeline, MODEL)
    other = Path(shutil.copytree(snapshot, snapshot.with_name("f" * 40)))
    (snapshot.parents[1] / "refs" / "main").write_text(other.name)
    assert saved.fetch() == snapshot and saved.commit == COMMIT
    assert SavedPipeline(DiffusionPipeline, MODEL).fetch() == other
    assert SavedPipeline(DiffusionPipeline, MODEL, revision=COMMIT).fetch() == snapshot


def test_kept_embeddings_are_of_that_commit_too(sharded: Path, cache: Callable[[Path], Path], tmp_path: Path):
    snapshot, script, records = cache(sharded), load_script("train_flowbp_sd3"), [Record("a")]
    options = {"precompute_prompt_embeds": True, "prompt_embeds_dir": tmp_path / "embeds", "max_sequence_length": 2}
    config = parse_config(script, command_line(arguments_of(MODEL, tmp_path, **options)))
    backbone = backbone_of(script)(config)
    other = Path(shutil.copytree(snapshot, snapshot.with_name("f" * 40)))
    (snapshot.parents[1] / "refs" / "main").write_text(other.name)
    for each in (backbone, backbone_of(script)(config)):
        each.prompt_inputs(Accelerator(cpu=True), records)
    assert len([path for path in (tmp_path / "embeds" / "user--model").iterdir() if path.is_dir()]) == 2


# What does not load.


def rename_weights(folder: Path, variant: str) -> None:
    """As `save_pretrained(variant=...)` names them."""
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.{variant}.safetensors"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4971248000\n")


def pickled(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")


def without(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


WEIGHTS = "diffusion_pytorch_model.safetensors"
COPY = "copy or download the folder again"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "only fp16": (
        lambda model: rename_weights(model, "fp16"),
        "component text_encoder has weights of the variant fp16 only; add --variant fp16.",
    ),
    "LFS pointer": (
        lambda model: lfs_pointer(model / "transformer" / WEIGHTS),
        f"transformer/{WEIGHTS}: expected transformer's file, got a Git LFS pointer to it; run `git lfs pull`",
    ),
    "LFS pointer of a tokenizer": (
        lambda model: lfs_pointer(model / "tokenizer_2" / "tokenizer.json"),
        "tokenizer_2/tokenizer.json: expected tokenizer_2's file, got a Git LFS pointer",
    ),
    "truncated": (
        lambda model: truncate(model / "vae" / WEIGHTS),
        f"vae/{WEIGHTS}: the file is damaged or incomplete (",
    ),
    "empty": (
        lambda model: (model / "text_encoder_2" / "model.safetensors").write_bytes(b""),
        "text_encoder_2/model.safetensors: the file is damaged or incomplete (",
    ),
    "truncated config": (
        lambda model: truncate(model / "text_encoder" / "config.json"),
        "text_encoder/config.json: the file is damaged or incomplete (",
    ),
    "truncated tokenizer": (
        lambda model: truncate(model / "tokenizer" / "tokenizer.json"),
        "component tokenizer: its CLIPTokenizer cannot be loaded (",
    ),
    "no tokenizer": (
        lambda model: without(model / "tokenizer_2" / "tokenizer.json"),
        f"component tokenizer_2: no vocabulary (tokenizer.json, or merges.txt and vocab.json); {COPY}",
    ),
    "no component": (lambda model: without(model / "text_encoder"), f"no files of the component text_encoder; {COPY}"),
    "no weights": (
        lambda model: without(model / "transformer" / WEIGHTS),
        f"component transformer has no weights (*.safetensors); {COPY}",
    ),
    "no config": (lambda model: without(model / "vae" / "config.json"), f"component vae: no config.json; {COPY}"),
    "no scheduler": (
        lambda model: without(model / "scheduler" / "scheduler_config.json"),
        f"no files of the component scheduler; {COPY}",
    ),
    "truncated scheduler": (
        lambda model: truncate(model / "scheduler" / "scheduler_config.json"),
        "component scheduler: its FlowMatchEulerDiscreteScheduler cannot be loaded (",
    ),
    "pickled": (
        lambda model: pickled(model / "transformer"),
        "component transformer: expected .safetensors, got pickled weights (.bin)",
    ),
    "no index": (
        lambda model: (model / "model_index.json").unlink(),
        "expected a pipeline with a model_index.json, got no such file; choose a model in diffusers' format.",
    ),
    "truncated index": (
        lambda model: truncate(model / "model_index.json"),
        "model_index.json: the file is damaged or incomplete (",
    ),
    "index that is a list": ((lambda model: (model / "model_index.json").write_text("[]")), "not a JSON object"),
    "unknown class": (
        lambda model: change_index(model, vae=["diffusers", "AutoencoderOfTheFuture"]),
        "component vae: this diffusers has no AutoencoderOfTheFuture; update diffusers",
    ),
}


def change_index(model: Path, **changes: Any) -> None:
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, **changes}))


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(model, tmp_path / "broken"))


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_models_are_told_in_one_line_before_anything_is_loaded(
    case: str, broken: Path, tmp_path: Path, check_refusal: CheckRefusal
):
    damage, message = DAMAGES[case]
    damage(broken)
    check_refusal("train_flowbp_sd3", arguments_of(broken, tmp_path), message)


@pytest.mark.parametrize("name", ["train_flowbp", "evaluate_flowbp"])
def test_so_do_the_other_scripts(name: str, broken: Path, tmp_path: Path, check_refusal: CheckRefusal):
    damage, message = DAMAGES["truncated"]
    damage(broken)
    arguments = arguments_of(broken, tmp_path)
    if name == "evaluate_flowbp":
        lora = save_random_lora(tiny_sd3_pipeline(torch.float32), tmp_path / "lora", seed=0)
        known = ("pretrained_model_name_or_path", "prompts", "output_dir", "resolution")
        arguments = {key: arguments[key] for key in known} | {"lora": [lora], "rewards": "toy_reward:make_reward"}
    check_refusal(name, arguments, message)


def test_shards_are_counted(sharded: Path, tmp_path: Path):
    def refusal(file: str) -> str:
        folder = Path(shutil.copytree(sharded, tmp_path / file))
        next((folder / "transformer").glob(file)).unlink()
        with pytest.raises(ValueError) as caught:
            SavedPipeline(DiffusionPipeline, str(folder)).fetch()
        return str(caught.value)

    assert "component transformer: no shard 2 of " in refusal("*-00002-of-*")
    assert "component transformer: the index of its shards (*.index.json) is missing" in refusal("*.index.json")
    assert SavedPipeline(DiffusionPipeline, str(sharded)).fetch() == sharded


@pytest.mark.parametrize("max_shard_size", [SHARD, "1GB"])
def test_variants_load_with_their_option(tmp_path: Path, max_shard_size: str):
    tiny_sd3_pipeline(torch.float32).save_pretrained(tmp_path / "m", variant="fp16", max_shard_size=max_shard_size)
    index = SavedPipeline(DiffusionPipeline, str(tmp_path / "m")).index
    with pytest.raises(ValueError, match="variant fp16 only; add --variant fp16"):
        SavedPipeline(DiffusionPipeline, str(tmp_path / "m")).fetch()
    with pytest.raises(ValueError, match="variant fp16 only; add --variant fp16"):
        SavedPipeline(DiffusionPipeline, str(tmp_path / "m"), variant="bf16").fetch()
    folder = SavedPipeline(DiffusionPipeline, str(tmp_path / "m"), variant="fp16").fetch()
    pipe = DiffusionPipeline.from_pretrained(folder, variant="fp16", **missing_components(index))
    assert state_of(pipe)


def test_a_variant_that_no_component_has_is_refused(model: Path):
    with pytest.raises(ValueError, match="no weights of --variant fp16; leave the option out"):
        SavedPipeline(DiffusionPipeline, str(model), variant="fp16").fetch()


@pytest.mark.parametrize(
    ("name", "own"), [("train_flowbp_sd3", "StableDiffusion3Pipeline"), ("train_flowbp_flux", "FluxPipeline")]
)
@pytest.mark.parametrize("where", ["file", "folder", "address"])
def test_single_files_are_to_be_converted(
    name: str, own: str, where: str, tmp_path: Path, check_refusal: CheckRefusal
):
    file = tmp_path / "models" / "sd3.5_medium.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"")
    address = "https://huggingface.co/user/model/blob/main/sd3.safetensors"
    model = {"file": file, "folder": file.parent, "address": address}[where]
    told = address if where == "address" else file
    message = f'convert it once: {own}.from_single_file("{told}").save_pretrained("FOLDER"), and give FOLDER.'
    check_refusal(name, arguments_of(model, tmp_path), message)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_lora_weights.safetensors", "got the folder of a LoRA; give the base model that it is for."),
        ("config.json", "got the folder of a single model; give the folder of the whole pipeline."),
    ],
)
def test_folders_of_something_else(file: str, message: str, tmp_path: Path):
    (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match=f"expected a pipeline with a model_index.json, {message}"):
        SavedPipeline(DiffusionPipeline, str(tmp_path))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "model_index.json").mkdir()
    with pytest.raises(OSError, match="model_index.json") as caught:
        SavedPipeline(DiffusionPipeline, str(tmp_path))
    assert "Hub" not in str(caught.value)


# The cache, and the Hub.


@pytest.fixture
def cached(model: Path, cache: Callable[[Path], Path]) -> Iterator[Path]:
    return cache(model)


def refusal_of_cached() -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        SavedPipeline(DiffusionPipeline, MODEL).fetch()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_damaged_file_of_the_cache_is_named_where_it_is(cached: Path, tmp_path: Path):
    link, blob = cached / "vae" / WEIGHTS, tmp_path / "blob"
    shutil.copy(link, blob)
    truncate(blob)
    link.unlink()
    link.symlink_to(blob)
    # Removing the link would change nothing.
    assert f"remove {blob} and start once with network access" in refusal_of_cached()
    lfs_pointer(blob)
    assert f"got a Git LFS pointer to it; remove {blob} and start once" in refusal_of_cached()


def test_an_incomplete_cache(cached: Path):
    without(cached / "transformer" / WEIGHTS)
    assert "component transformer has no weights (*.safetensors); start once with network" in refusal_of_cached()


@pytest.mark.parametrize(
    ("name", "reason"), [("user/other", "cache"), ("./models/sd3", "Repo id must"), ("a", "cache")]
)
def test_what_is_nowhere(name: str, reason: str, cached: Path):
    expected = f"{name}: no such folder, and the Hub does not give it: .*{reason}.*hf auth login"
    with pytest.raises(OSError, match=expected):
        SavedPipeline(DiffusionPipeline, name)
    with pytest.raises(OSError, match="no such folder, and the Hub does not give it"):
        SavedPipeline(DiffusionPipeline, MODEL, revision="v2")


REFUSE = """
import sys
from diffusers import DiffusionPipeline
from flowbp.training.saved_pipeline import SavedPipeline
for model in sys.argv[1:]:
    try:
        SavedPipeline(DiffusionPipeline, model).fetch()
    except (ValueError, OSError) as error:
        print(error)
"""


def test_the_hub_s_files_are_checked_by_name_before_they_are_downloaded(model: Path, tmp_path: Path):
    files = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    variant = {name.replace(".safetensors", ".fp16.safetensors"): content for name, content in files.items()}
    partial = {name: content for name, content in files.items() if not name.startswith("vae/")}
    with loopback_hub() as hub:
        hub.repositories = {
            "user/variant": Repository(variant, [COMMIT]),
            "user/partial": Repository(partial, [COMMIT]),
            "user/single": Repository({"model.safetensors": b""}, [COMMIT]),
        }
        environment = {**hub.environment(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        names = [*hub.repositories, "user/absent"]
        done = subprocess.run(
            [sys.executable, "-c", REFUSE, *names],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        # The index of two models.
        assert hub.counts["get"] == 2
    found = done.stdout.splitlines()
    assert len(found) == len(names)
    for line, message in zip(
        found,
        (
            "user/variant: component text_encoder has weights of the variant fp16 only; add --variant fp16.",
            "user/partial: no files of the component vae;",
            "user/single: expected a pipeline with a model_index.json, got no such file",
            "user/absent: no such folder, and the Hub does not give it: no such repository, or a private one;",
        ),
        strict=True,
    ):
        assert message in line
