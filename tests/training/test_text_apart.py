# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`--offload` and `--precompute_prompt_embeds` of the script for any pipeline: the same numbers, or refused."""

import inspect
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, QwenImagePipeline
from diffusers.models.modeling_utils import ModelMixin
from families.family import ready
from families.packed import build_longcat_image
from PIL import Image
from tiny_pipelines import (
    tiny_flux_pipeline,
    tiny_qwen_image_pipeline,
    tiny_z_image_pipeline,
)
from training_scripts import (
    PROMPTS,
    CheckRefusal,
    arguments_of_run,
    backbone_of,
    command_line,
    lora_of,
    parse_config,
    same,
)
from transformers import PreTrainedModel

from flowbp.training import prompt_embeds
from flowbp.training.prompt_answers import KeptAnswers, NotKept, ask, join, learn_rules, put_together, take_apart
from flowbp.training.prompts import Record
from flowbp.training.text_apart import TextApart

NAME = "train_flowbp"
CPU = torch.device("cpu")
RECORDS = [Record(prompt) for prompt in (*PROMPTS, "a much longer prompt")]
# By name: what builds the pipeline, and the script's options. All have a second, unconditional call of the encoders.
MODELS: dict[str, tuple[Callable[[], DiffusionPipeline], dict[str, Any]]] = {
    # Padded to the longest of a batch, with a mask where lengths differ.
    "Qwen-Image": (
        tiny_qwen_image_pipeline,
        {"pipeline_arguments": {"true_cfg_scale": 4.0, "negative_prompt": "grey"}},
    ),
    # Lists of sequences; writes into its lists of prompts.
    "Z-Image": (
        tiny_z_image_pipeline,
        {"guidance_scale": 4.0, "pipeline_arguments": {"negative_prompt": "grey", "max_sequence_length": 20}},
    ),
    # Position ids without a batch.
    "FLUX.1": (
        tiny_flux_pipeline,
        {"pipeline_arguments": {"true_cfg_scale": 3.0, "negative_prompt": "grey", "max_sequence_length": 16}},
    ),
    # Its `encode_prompt` takes no device, and its call may have the text encoder rewrite prompts.
    "LongCat": (
        lambda: ready(build_longcat_image(), dtype=torch.float32),
        {"guidance_scale": 4.5, "pipeline_arguments": {"enable_prompt_rewrite": False}},
    ),
}


@pytest.fixture
def arguments_of(saved: Callable[[str], Path], tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    def make(name: str) -> dict[str, Any]:
        own = {"prompt_embeds_dir": tmp_path / "cache", "height": 8, "width": 8, **MODELS[name][1]}
        return arguments_of_run(saved(name), tmp_path, **own)

    return make


Arguments = Callable[[str], dict[str, Any]]


def prepare(script: ModuleType, arguments: dict[str, Any], **changes: Any) -> tuple[TextApart, Any]:
    """The backbone of a run, and what gives its pipeline's arguments."""
    backbone = backbone_of(script)(parse_config(script, command_line(arguments, **changes)))
    return backbone, backbone.prompt_inputs(Accelerator(cpu=True), RECORDS)


def images_of(backbone: TextApart, inputs: Any, batches: Sequence[Sequence[Record]]) -> list[torch.Tensor]:
    pipe = backbone.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    backbone.place(pipe, CPU)
    assert all(pipe.components[name] is None for name in backbone.text_components)
    call = {**backbone.call(*backbone.config.sizes[0]), "num_inference_steps": 2}
    noise = lambda batch: [torch.Generator().manual_seed(place) for place in range(len(batch))]  # noqa: E731
    return [pipe(generator=noise(batch), **inputs(batch), **call)[0] for batch in batches]


def must_not_load(*_: Any, **__: Any) -> None:
    pytest.fail("text encoders were loaded")


@pytest.mark.parametrize("name", MODELS)
def test_the_pipeline_makes_the_same_images_without_its_text_encoders(
    script: ModuleType, arguments_of: Arguments, monkeypatch: pytest.MonkeyPatch, name: str
):
    """Of one prompt, of equal ones, and of prompts of different lengths."""
    arguments, offloaded = arguments_of(name), []
    offload_models = prompt_embeds.offload_models
    spy = lambda *modules, **how: offloaded.append((len(modules), how["offload"])) or offload_models(*modules, **how)  # noqa: E731
    batches = [RECORDS[:1], RECORDS[2:], [RECORDS[3], RECORDS[3]], RECORDS]
    expected = images_of(*prepare(script, arguments), batches)
    with monkeypatch.context() as patches:
        patches.setattr(prompt_embeds, "offload_models", spy)
        found = images_of(*prepare(script, arguments, offload=True), batches)
    assert all(map(torch.equal, found, expected))
    assert offloaded and all(count > 0 and is_offloaded for count, is_offloaded in offloaded)
    kept = prepare(script, arguments, precompute_prompt_embeds=True)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", must_not_load)
    for prepared in (kept, prepare(script, arguments, precompute_prompt_embeds=True)):
        # Qwen-Image's encoder sees padding in a batch, which changes the last digits.
        for one, other in zip(images_of(*prepared, batches), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_training_and_its_verification_are_the_same(script: ModuleType, arguments_of: Arguments, tmp_path: Path):
    arguments = {**arguments_of("Qwen-Image"), "method": "draft-k", "eval_reward": "toy_reward:make_held_out_reward"}
    runs = {"plain": {}, "kept": {"precompute_prompt_embeds": True, "verify": True}}
    for run, switches in runs.items():
        script.main(command_line(arguments, output_dir=tmp_path / run, **switches))
    assert same(lora_of(tmp_path / "kept"), lora_of(tmp_path / "plain"))


def test_another_folder_for_everything_that_answers_depend_on(
    script: ModuleType, arguments_of: Arguments, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    arguments = {**arguments_of("Qwen-Image"), "precompute_prompt_embeds": True}
    folders = lambda: {path.parent for path in (tmp_path / "cache").rglob("rules.json")}  # noqa: E731
    backbone, inputs = prepare(script, arguments)
    negative = arguments["pipeline_arguments"]
    changes: list[dict[str, Any]] = [
        {"pipeline_arguments": {**negative, "negative_prompt": "blue"}},
        {"pipeline_arguments": {**negative, "max_sequence_length": 9}},
        {"mixed_precision": "bf16"},
    ]
    for count, change in enumerate(changes, 2):
        prepare(script, arguments, **change)
        assert len(folders()) == count
    weights = arguments["pretrained_model_name_or_path"] / "text_encoder" / "model.safetensors"
    weights.touch()
    prepare(script, arguments)
    assert len(folders()) == len(changes) + 2
    # Nothing but what was asked is answered, and a damaged file is named.
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", must_not_load)
    with pytest.raises(NotKept, match='asked for what is not in .*"prompt": "another"') as caught:
        images_of(backbone, inputs, [[Record("another")]])
    assert "\n" not in str(caught.value)
    folder = next(iter(folders()))
    answers = KeptAnswers(folder, CPU)
    assert answers.is_whole()
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    assert not answers.is_whole()


def test_prompts_that_a_batch_changes_need_calls_of_one(
    script: ModuleType, arguments_of: Arguments, monkeypatch: pytest.MonkeyPatch
):
    own = QwenImagePipeline.encode_prompt

    def encode_prompt(self: Any, prompt: list[str], *args: Any, **kwargs: Any) -> Any:
        embeds, mask = own(self, prompt, *args, **kwargs)
        return embeds * (1 + 0.01 * len(prompt)), mask

    encode_prompt.__signature__ = inspect.signature(own)
    monkeypatch.setattr(QwenImagePipeline, "encode_prompt", encode_prompt)
    arguments = {**arguments_of("Qwen-Image"), "precompute_prompt_embeds": True}
    with pytest.raises(
        NotKept, match="prompts of a batch otherwise than each alone; set --train_batch_size 1"
    ) as caught:
        prepare(script, arguments)
    assert "\n" not in str(caught.value)
    prepare(script, arguments, train_batch_size=1)
    prepare(script, arguments, precompute_prompt_embeds=None, offload=True)


def test_prompts_that_depend_on_another_model_are_refused(
    script: ModuleType, arguments_of: Arguments, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(QwenImagePipeline, "check_inputs", lambda self, *_, **__: self.vae.encode(None))
    with pytest.raises(NotKept, match="QwenImagePipeline needs another model before it encodes its prompts; leave"):
        prepare(script, arguments_of("Qwen-Image"), precompute_prompt_embeds=True)


@pytest.mark.parametrize("option", ["offload", "precompute_prompt_embeds"])
def test_a_pipeline_that_needs_its_text_encoders_is_refused_before_it_is_loaded(
    script: ModuleType, arguments_of: Arguments, monkeypatch: pytest.MonkeyPatch, option: str
):
    arguments = {**arguments_of("LongCat"), "pipeline_arguments": {}, option: True}
    monkeypatch.setattr(ModelMixin, "from_pretrained", must_not_load)
    with pytest.raises(ValueError, match="LongCatImagePipeline's call fails without its text encoders") as caught:
        prepare(script, arguments)
    assert "\n" not in str(caught.value)


def test_a_pipeline_without_encode_prompt_is_refused(
    arguments_of: Arguments, tmp_path: Path, check_refusal: CheckRefusal
):
    arguments = arguments_of("FLUX.1")
    index = json.loads((arguments["pretrained_model_name_or_path"] / "model_index.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text(
        json.dumps({**index, "_class_name": "JoyImageEditPlusPipeline"})
    )
    changes = {"pretrained_model_name_or_path": tmp_path / "other", "pipeline_arguments": {}, "offload": True}
    check_refusal(NAME, {**arguments, **changes}, "JoyImageEditPlusPipeline has no encode_prompt")


# Answers.


def encode_prompt(prompt: list[str], negative_prompt: Any = None, device: Any = None, words: Any = None) -> None:
    """What is asked in the tests below."""


def test_a_question_is_all_arguments_of_a_sample_but_the_device():
    asked = partial(ask, encode_prompt)
    both = asked([["a", "b"]], {"negative_prompt": "c", "device": CPU})
    assert both == [*asked([["a"]], {"negative_prompt": "c"}), *asked([["b"], "c"], {})] and len({*both}) == 2
    # Lists of something else belong to all samples.
    different = [
        {},
        {"negative_prompt": ["d", "d"]},
        {"words": ["a", "b"]},
        {"words": ["a"]},
        {"words": torch.float16},
    ]
    assert len({asked([["a", "b"]], each)[0] for each in different}) == 5
    for value in (Image.new("RGB", (1, 1)), torch.ones(1)):
        with pytest.raises(
            NotKept, match=f"encode_prompt gets a {type(value).__name__}, and only what depends on text"
        ):
            asked([["a"]], {"words": value})


def test_answers_are_kept_and_joined_by_what_a_batch_of_two_shows(tmp_path: Path):
    def answer(*lengths: int) -> Any:
        """Sequences of ones; a mask where lengths differ, a list, a tensor of all samples, nothing."""
        longest = max(lengths)
        sequences = torch.stack([torch.arange(longest).add(1.0) * (torch.arange(longest) < each) for each in lengths])
        mask = (sequences > 0).int() if len({*lengths}) > 1 else None
        return {"embeds": (sequences[..., None], mask)}, [torch.ones(each) for each in lengths], torch.eye(2), None

    kept = KeptAnswers(tmp_path, CPU)
    for length in (2, 3, 5):
        kept.write(str(length), answer(length))
    slots: dict[str, Any] = {}
    take_apart(answer(5, 2), slots)
    rules = learn_rules([([kept.slots("5")[1], kept.slots("2")[1]], slots)])
    kept.finish(rules, None)
    assert kept.is_whole() and not KeptAnswers(tmp_path / "none", CPU).is_whole()
    for lengths in ((2,), (3, 5), (5, 5, 5), (2, 3, 5)):
        found, expected = {}, {}
        shape = take_apart(kept.read([str(each) for each in lengths]), found)
        assert shape == take_apart(answer(*lengths), expected) and found.keys() == expected.keys()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert put_together(shape, found)[0]["embeds"][0] is found["/0/embeds/0"]
    slots["/0/embeds/0"] = 1.01 * slots["/0/embeds/0"]
    with pytest.raises(NotKept, match="prompts of a batch otherwise"):
        learn_rules([([kept.slots("5")[1], kept.slots("2")[1]], slots)])
    with pytest.raises(NotKept, match="encode_prompt returns a int"):
        take_apart((torch.ones(1), 3), {})
    assert join({}, []) == {}


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, 5e-4), (torch.float16, 1e-2), (torch.bfloat16, 2e-2)], ids=str
)
def test_a_batch_may_round_otherwise_than_its_samples(dtype: torch.dtype, rounding: float):
    sample = {"": torch.ones(1, 2, 8, dtype=dtype)}
    assert learn_rules([([sample, sample], {"": torch.full((2, 2, 8), 1 + rounding, dtype=dtype)})]) == {"": "samples"}
    with pytest.raises(NotKept):
        learn_rules([([sample, sample], {"": torch.full((2, 2, 8), 1 + 10 * rounding, dtype=dtype)})])
