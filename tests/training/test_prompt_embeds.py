# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Prompt embeddings, encoded on the fly and kept on disk: the same numbers, and the same LoRA in the end."""

import os
import socket
import threading
import time
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import FluxPipeline
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file
from tiny_pipelines import tiny_flux_pipeline, tiny_klein_pipeline
from tiny_sd3 import MAX_SEQUENCE_LENGTH, tiny_sd3_pipeline
from training_scripts import (
    PROMPTS,
    SHARED_ARGUMENTS,
    command_line,
    distance,
    load_script,
    lora_of,
    same,
    write_prompts,
)
from transformers import PreTrainedModel

from flowbp.training import TrainingConfig, prompt_embeds
from flowbp.training.prompt_embeds import (
    Embeds,
    PromptEmbeds,
    PromptEncoder,
    cache_folder,
    fill_cache,
    is_complete,
    prepare_prompt_embeds,
    text_files,
)
from flowbp.training.prompts import Record

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-flux")
    tiny_flux_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(model: Path) -> FluxPipeline:
    return FluxPipeline.from_pretrained(model, transformer=None, vae=None, dtype=torch.float32)


def records_of(prompts: Sequence[str]) -> list[Record]:
    return [Record(prompt) for prompt in prompts]


def prompt_of(record: Record) -> str:
    return record.prompt


def encode(pipe: FluxPipeline, records: Sequence[Record]) -> Embeds:
    texts = [record.prompt for record in records]
    embeds, pooled, _ = pipe.encode_prompt(texts, None, device=CPU, max_sequence_length=16)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def equal(left: Embeds, right: Embeds) -> bool:
    """To rounding: a prompt's batch changes its last digits."""
    return left.keys() == right.keys() and all(
        torch.allclose(left[name], right[name], rtol=1e-5, atol=1e-6) for name in left
    )


@pytest.mark.parametrize("switches", [{}, {"offload": True}, {"group_offload": True}], ids=str)
def test_the_encoder_gives_what_the_pipeline_gives(pipe: FluxPipeline, switches: dict[str, bool]):
    with torch.no_grad():
        expected = encode(pipe, records_of(PROMPTS))
    encoder = PromptEncoder(pipe, encode, CPU, **switches)
    for _ in range(2):
        found = encoder(records_of(PROMPTS))
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        assert not any(tensor.requires_grad for tensor in found.values())
    assert expected["prompt_embeds"].shape == (3, 16, 32) and not torch.equal(*expected["prompt_embeds"][:2])
    for module in (pipe.text_encoder, pipe.text_encoder_2):
        assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())


def test_a_folder_for_everything_that_embeddings_depend_on(tmp_path: Path):
    settings = {"revision": None, "max_sequence_length": 77}
    folders = [
        cache_folder(tmp_path, "org/model", ["a", "b"], settings),
        cache_folder(tmp_path, "org/other", ["a", "b"], settings),
        cache_folder(tmp_path, "org/model", ["b", "a"], settings),
        cache_folder(tmp_path, "org/model", ["a", "b", "c"], settings),
        cache_folder(tmp_path, "org/model", ["a", "b"], {**settings, "revision": "main"}),
        cache_folder(tmp_path, "org/model", ["a", "b"], {**settings, "max_sequence_length": 78}),
    ]
    assert len(set(folders)) == len(folders)
    assert folders[0] == cache_folder(tmp_path, "org/model", ["a", "b"], dict(settings))
    assert folders[0].parent == tmp_path / "org--model" and not any(folder.exists() for folder in folders)
    assert cache_folder(tmp_path, "../../model/", [], {}).parent.parent == tmp_path


@contextmanager
def other_weights(model: Path) -> Iterator[None]:
    """Within it, a text encoder's file has another time."""
    weights = model / "text_encoder" / "model.safetensors"
    times = (weights.stat().st_atime_ns, weights.stat().st_mtime_ns)
    os.utime(weights, ns=(times[0], times[1] + 10**9))
    yield
    os.utime(weights, ns=times)


def test_a_local_model_s_text_files_count(model: Path):
    before = text_files(str(model))
    assert {"text_encoder/model.safetensors", "tokenizer_2/tokenizer.json"} <= {name for name, *_ in before}
    assert not any(name.startswith(("vae", "transformer")) for name, *_ in before)
    with other_weights(model):
        assert text_files(str(model)) != before
    assert text_files(str(model)) == before and text_files("org/no-such-folder") == []


def test_kept_embeddings_are_the_encoder_s(
    pipe: FluxPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(prompt_embeds, "PROMPTS_PER_FILE", 4)
    monkeypatch.setattr(prompt_embeds, "PROMPTS_PER_BATCH", 3)
    prompts = [f"text {number}" for number in range(9)]
    encoder = PromptEncoder(pipe, encode, CPU)
    folder = tmp_path / "root" / "model" / "hash"
    half_written = folder.with_name(f"hash.{socket.gethostname()}.partial")
    half_written.mkdir(parents=True)
    (half_written / "00007.safetensors").write_text("rest")
    said: list[str] = []

    def say(line: str) -> None:
        assert not folder.exists() and not list(half_written.iterdir())
        said.append(line)

    fill_cache(folder, records_of(prompts), lambda: encoder, say)
    assert sorted(path.name for path in folder.iterdir()) == [f"0000{number}.safetensors" for number in range(3)]
    assert not half_written.exists()
    size = sum(tensor.nbytes for path in folder.iterdir() for tensor in load_file(path).values())
    assert said == [f"Prompt embeddings: 9 prompts, {size / 2**20:.1f} MiB, into {folder}"]

    kept = PromptEmbeds(folder, prompts, prompt_of, CPU)
    for batch in (["text 8"], ["text 3", "text 0", "text 4"], ["text 5", "text 5"]):
        found = kept(records_of(batch))
        assert equal(found, encoder(records_of(batch))) and len(found["prompt_embeds"]) == len(batch)
    with pytest.raises(ValueError, match="No embeddings of 'other' in .*hash; it was not among the run's prompts"):
        kept(records_of(["text 1", "other"]))


def test_a_full_disk_is_refused_before_anything_is_written(
    pipe: FluxPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9 - 100, 100))
    folder = tmp_path / "hash"
    with pytest.raises(OSError, match="need 0 MiB, .* has 0 MiB free; choose another --prompt_embeds_dir"):
        fill_cache(folder, records_of(PROMPTS), lambda: PromptEncoder(pipe, encode, CPU), say=lambda line: None)
    assert not folder.exists() and not list(tmp_path.rglob("*.safetensors"))


def test_a_stopped_encoding_leaves_no_folder(pipe: FluxPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prompt_embeds, "PROMPTS_PER_FILE", 1)

    def stops(pipe: FluxPipeline, records: Sequence[Record]) -> Embeds:
        if records == records_of(PROMPTS[2:]):
            raise KeyboardInterrupt
        return encode(pipe, records)

    with pytest.raises(KeyboardInterrupt):
        fill_cache(
            tmp_path / "hash", records_of(PROMPTS), lambda: PromptEncoder(pipe, stops, CPU), say=lambda line: None
        )
    assert not (tmp_path / "hash").exists()


def damage_nothing(folder: Path) -> None:
    """Absent."""


def damage_empty(folder: Path) -> None:
    folder.mkdir()


def damage_cut(folder: Path) -> None:
    folder.mkdir()
    (folder / "00000.safetensors").write_bytes(b"\0" * 100)


@pytest.mark.parametrize("damage", [damage_nothing, damage_empty, damage_cut])
def test_a_cache_is_complete_or_made_again(pipe: FluxPipeline, tmp_path: Path, damage: Callable[[Path], None]):
    folder, said = tmp_path / "hash", []
    damage(folder)
    assert not is_complete(folder, len(PROMPTS))
    made = []

    def make_encoder() -> PromptEncoder:
        made.append(PromptEncoder(pipe, encode, CPU))
        return made[-1]

    for _ in range(2):
        fill_cache(folder, records_of(PROMPTS), make_encoder, said.append)
        assert is_complete(folder, len(PROMPTS)) and not is_complete(folder, len(PROMPTS) + 1)
    assert len(made) == 1 and said[-1].endswith("exists already.")
    assert ("made again" in said[0]) == (damage is not damage_nothing)


def test_of_two_runs_one_encodes_and_the_other_waits(pipe: FluxPipeline, tmp_path: Path):
    folder, begun, said, made = tmp_path / "hash", threading.Event(), [], []

    def slow_encode(pipe: FluxPipeline, records: Sequence[Record]) -> Embeds:
        begun.set()
        time.sleep(0.2)
        return encode(pipe, records)

    def make_encoder() -> PromptEncoder:
        made.append(PromptEncoder(pipe, slow_encode, CPU))
        return made[-1]

    def run() -> None:
        fill_cache(folder, records_of(PROMPTS), make_encoder, said.append)

    first = threading.Thread(target=run)
    first.start()
    begun.wait()
    run()
    first.join()
    assert len(made) == 1 and is_complete(folder, len(PROMPTS))
    assert any("another run writes" in line for line in said) and said[-1].endswith("exists already.")


def prepare(
    model: Path,
    root: Path,
    load: Callable[[], FluxPipeline],
    negative_prompt: str | None = None,
    prompts: Sequence[str] = (*PROMPTS, "another"),
    **changes: Any,
) -> Callable[[Sequence[str]], Embeds]:
    """`prepare_prompt_embeds` of some prompts."""
    options = {
        "pretrained_model_name_or_path": str(model),
        "prompts": "prompts.txt",
        "mixed_precision": "no",
        "max_sequence_length": 16,
        "precompute_prompt_embeds": True,
        "prompt_embeds_dir": root,
        "offload": False,
        **changes,
    }
    negative = None if negative_prompt is None else Record(negative_prompt)
    embeds = prepare_prompt_embeds(
        TrainingConfig(**options), Accelerator(cpu=True), load, encode, prompt_of, records_of(prompts), negative
    )
    return lambda batch: embeds(records_of(batch))


def must_not_load() -> FluxPipeline:
    pytest.fail("the text encoders were loaded")


def test_kept_or_not_they_are_the_same_with_the_negative_prompt_s(model: Path, tmp_path: Path):
    def load() -> FluxPipeline:
        return FluxPipeline.from_pretrained(model, transformer=None, vae=None, dtype=torch.float32)

    flying = prepare(model, tmp_path, load, "grey", precompute_prompt_embeds=False)
    assert not list(tmp_path.iterdir())
    kept = prepare(model, tmp_path, load, "grey")
    batch = [PROMPTS[1], "another"]
    found = kept(batch)
    assert equal(found, flying(batch))
    names = ("prompt_embeds", "pooled_prompt_embeds")
    assert found.keys() == {*names, *(f"negative_{name}" for name in names)}
    assert equal(
        {name: found[f"negative_{name}"] for name in names},
        PromptEncoder(load(), encode, CPU)(records_of(["grey", "grey"])),
    )
    assert not any("negative" in name for name in prepare(model, tmp_path, load)(batch))


def test_encoders_are_freed_and_loaded_only_where_something_changed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    alive: list[weakref.ref] = []

    def load() -> FluxPipeline:
        pipe = FluxPipeline.from_pretrained(model, transformer=None, vae=None, dtype=torch.float32)
        alive.extend(weakref.ref(module) for module in (pipe.text_encoder, pipe.text_encoder_2))
        return pipe

    first = prepare(model, tmp_path, load)
    assert len(alive) == 2 and all(reference() is None for reference in alive)
    assert "3 prompts" not in (printed := capsys.readouterr().out) and "Prompt embeddings: 4 prompts" in printed
    again = prepare(model, tmp_path, must_not_load)
    assert "exists already" in capsys.readouterr().out
    assert equal(first(PROMPTS), again(PROMPTS))
    for changes in ({"max_sequence_length": 15}, {"mixed_precision": "bf16"}, {"prompts": PROMPTS}):
        prepare(model, tmp_path, load, **changes)
        assert "exists already" not in capsys.readouterr().out
    with other_weights(model):
        prepare(model, tmp_path, load)
        assert "exists already" not in capsys.readouterr().out
    prepare(model, tmp_path, must_not_load, offload=True)


# The scripts.

SCRIPTS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "train_flowbp_sd3": (lambda: tiny_sd3_pipeline(torch.float32), {"max_sequence_length": MAX_SEQUENCE_LENGTH}),
    "train_flowbp_flux": (tiny_flux_pipeline, {"max_sequence_length": 16, "true_cfg_scale": 3.0}),
    "train_flowbp_flux2": (tiny_klein_pipeline, {"max_sequence_length": 16}),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_way_to_encode_trains_the_same_lora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
):
    build, changes = SCRIPTS[name]
    build().save_pretrained(tmp_path / "model")
    script, cache = load_script(name), tmp_path / "cache"
    arguments = {
        **SHARED_ARGUMENTS,
        "pretrained_model_name_or_path": tmp_path / "model",
        "prompts": write_prompts(tmp_path),
        "prompt_embeds_dir": cache,
        "resolution": 8,
        "method": "draft-k",
        **changes,
    }

    def train(run: str, **switches: bool) -> dict[str, torch.Tensor]:
        script.main(command_line(arguments, output_dir=tmp_path / run, **switches))
        return lora_of(tmp_path / run)

    encoders: list[weakref.ref] = []
    load_encoder, load_model = PreTrainedModel.from_pretrained.__func__, ModelMixin.from_pretrained.__func__

    def note_encoder(cls: type, *args: Any, **kwargs: Any) -> Any:
        module = load_encoder(cls, *args, **kwargs)
        encoders.append(weakref.ref(module))
        return module

    def encoders_are_freed(cls: type, *args: Any, **kwargs: Any) -> Any:
        assert encoders and all(encoder() is None for encoder in encoders)
        return load_model(cls, *args, **kwargs)

    plain = train("plain")
    assert not cache.exists()
    assert same(train("offload", offload=True), plain)
    assert same(train("group offload", group_offload=True), plain)

    with monkeypatch.context() as patches:
        patches.setattr(PreTrainedModel, "from_pretrained", classmethod(note_encoder))
        patches.setattr(ModelMixin, "from_pretrained", classmethod(encoders_are_freed))
        capsys.readouterr()
        kept = train("kept", precompute_prompt_embeds=True)
    assert "Prompt embeddings: " in capsys.readouterr().out
    assert len(list(cache.rglob("*.safetensors"))) == 1
    # Embeddings differ by the rounding of a larger batch.
    assert distance(kept, plain) < 1e-4

    with monkeypatch.context() as patches:
        patches.setattr(PreTrainedModel, "from_pretrained", classmethod(lambda *_, **__: must_not_load()))
        again = train("again", precompute_prompt_embeds=True)
    assert "exists already" in capsys.readouterr().out
    assert same(again, kept)
