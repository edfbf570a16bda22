# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Training on pipelines that start from images: `--pipeline_columns` gives them columns of the prompts' table."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    QwenImageEditPlusPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.wan import pipeline_wan_i2v
from diffusers.utils import loading_utils
from families.family import ready, tiny_pipeline
from families.packed import byte_tokenizer, tiny_qwen25_vl
from families.packed_inputs import build_edit
from families.videos import WAN_SIZES, tiny_wan_vae
from PIL import Image
from tiny_pipelines import tiny_flux_pipeline, tiny_klein_pipeline, tiny_wan_pipeline
from tiny_sd3 import tiny_sd3_pipeline
from training_scripts import (
    PROMPTS,
    SHARED_ARGUMENTS,
    CheckRefusal,
    check_round_trip,
    check_run,
    command_line,
    distance,
    load_pipeline,
    load_script,
    lora_of,
    same,
    watch_pictures,
    write_prompts,
)
from transformers import BatchFeature, Qwen2VLImageProcessorPil

from flowbp.training import TrainingConfig, train
from flowbp.training.comparison import ComparisonConfig, as_words, evaluation_options
from flowbp.training.fingerprint import fingerprint
from flowbp.training.prompts import load_records
from flowbp.training.seeds import derive_seed, make_generator, seed_globally

NAME = "train_flowbp"
HELD_OUT = "toy_reward:make_held_out_reward"
SIZES = ((9, 8), (8, 8), (8, 10))


def tiny_sd3_controlnet() -> DiffusionPipeline:
    pipe = tiny_sd3_pipeline(torch.float32)
    config = {**pipe.transformer.config, "num_layers": 1, "extra_conditioning_channels": 0}
    controlnet = SD3ControlNetModel.from_config(config)
    return ready(StableDiffusion3ControlNetPipeline(**pipe.components, controlnet=controlnet), dtype=torch.float32)


def tiny_wan_i2v() -> DiffusionPipeline:
    # The latents, and those of the first frame with a mask of four frames.
    sizes = {**WAN_SIZES, "in_channels": 12, "num_layers": 1, "rope_max_seq_len": 32}
    models = {name: WanTransformer3DModel(**sizes) for name in ("transformer", "transformer_2")}
    parts = {**models, "vae": tiny_wan_vae(), "boundary_ratio": 0.9}
    return tiny_wan_pipeline(partial(tiny_pipeline, WanImageToVideoPipeline, shift=7.0, **parts))


def tiny_qwen_edit() -> DiffusionPipeline:
    tokenizer = byte_tokenizer("<|vision_start|>", "<|vision_end|>")
    text = {"tokenizer": tokenizer, "text_encoder": tiny_qwen25_vl(tokenizer), "config": {"joint_attention_dim": 16}}
    return build_edit(QwenImageEditPlusPipeline, **text, gain=3.0).to(torch.float32)


class EditProcessor:
    """Qwen2-VL's, whose class exists only with torchvision: a mark of an image stands for its patches."""

    def __call__(self, text: Sequence[str], images: Any, **options: Any) -> BatchFeature:
        patches = Qwen2VLImageProcessorPil()(images=images, return_tensors="pt")
        (count,) = (patches["image_grid_thw"].prod(1) // 4).tolist()
        tokenizer = byte_tokenizer("<|vision_start|>", "<|vision_end|>")
        tokens = tokenizer([each.replace("<|image_pad|>", "<|image_pad|>" * count) for each in text], **options)
        return BatchFeature({**tokens, **patches})


# By name: what builds the pipeline, what users give it, and which arguments are the column.
MODELS: dict[str, tuple[Callable[[], DiffusionPipeline], dict[str, Any], list[str]]] = {
    # Other areas than this are resized to it, and sources to one of Kontext's own sizes.
    "Kontext": (
        partial(tiny_flux_pipeline, FluxKontextPipeline),
        {"guidance_scale": 4.0, "max_area": 64, "_auto_resize": False, "max_sequence_length": 16},
        ["image"],
    ),
    "FLUX.2-Klein": (tiny_klein_pipeline, {"guidance_scale": 4.0, "max_sequence_length": 16}, ["image"]),
    "Fill": (
        partial(tiny_flux_pipeline, FluxFillPipeline, 48),
        {"guidance_scale": 4.0, "max_sequence_length": 16},
        ["image", "mask_image"],
    ),
    "Qwen-Image-Edit-Plus": (tiny_qwen_edit, {"true_cfg_scale": 3.0, "negative_prompt": " "}, ["image"]),
    "Wan 2.2 image to video": (
        tiny_wan_i2v,
        {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 4.0, "max_sequence_length": 16},
        ["image"],
    ),
    "SD3 ControlNet": (tiny_sd3_controlnet, {"guidance_scale": 3.0, "max_sequence_length": 2}, ["control_image"]),
}
# FLUX.2 takes no smaller images than of 64 pixels.
SCALE = {"FLUX.2-Klein": 8}


def picture(place: int, scale: int = 1) -> Image.Image:
    """A source of its own size and colours."""
    width, height = SIZES[place]
    pixels = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(place)) * 255
    return Image.fromarray(pixels.byte().numpy()).resize((scale * width, scale * height))


def write_pictures(folder: Path, scale: int = 1) -> None:
    for place in range(len(PROMPTS)):
        picture(place, scale).save(folder / f"{place}.png")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of `PROMPTS` with a source for each, beside it."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_pictures(folder)
    rows = [{"prompt": prompt, "source": f"{place}.png"} for place, prompt in enumerate(PROMPTS)]
    path = folder / "table.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def arguments_of(saved: Callable[[str], Path], table: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The script's arguments for a model of `MODELS`."""

    def make(name: str, **changes: Any) -> dict[str, Any]:
        call = dict(MODELS[name][1])
        if name in SCALE:
            write_pictures(table.parent, SCALE[name])
        size = {"height": call.pop("height", 8), "width": call.pop("width", 8)}
        return {
            **SHARED_ARGUMENTS,
            "pretrained_model_name_or_path": saved(name),
            "prompts": table,
            "pipeline_columns": [f"{place}=source" for place in MODELS[name][2]],
            "output_dir": tmp_path / "run",
            "method": "draft-k",
            **size,
            **{option: call.pop(option) for option in ("guidance_scale", "num_frames") if option in call},
            "pipeline_arguments": call,
            **changes,
        }

    return make


Arguments = Callable[..., dict[str, Any]]


def call_of(name: str, place: int) -> dict[str, Any]:
    source = picture(place, SCALE.get(name, 1))
    return {"height": 8, "width": 8, **MODELS[name][1], **dict.fromkeys(MODELS[name][2], source)}


@pytest.mark.parametrize("name", MODELS)
def test_two_updates(script: ModuleType, arguments_of: Arguments, monkeypatch: pytest.MonkeyPatch, name: str):
    """The LoRA, loaded into a stock pipeline, draws from the first row's source what the run drew."""
    # Without it diffusers fails; it mends texts that were decoded wrongly.
    monkeypatch.setattr(pipeline_wan_i2v, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    processor = property(lambda pipe: EditProcessor(), lambda pipe, none: None)
    monkeypatch.setattr(QwenImageEditPlusPipeline, "processor", processor, raising=False)
    arguments, drawn = arguments_of(name), watch_pictures(monkeypatch)
    # The other methods may look at the last steps alone, which Wan 2.2's other transformer makes.
    script.main(command_line(arguments, method="full" if "Wan" in name else "draft-k", verify=True))
    output, model = arguments["output_dir"], arguments["pretrained_model_name_or_path"]
    check_run(output)
    check_round_trip(model, lambda pipe: pipe.load_lora_weights(output), drawn, 1e-5, **call_of(name, 0))


@pytest.mark.parametrize("name", ["Kontext", "SD3 ControlNet"])
def test_each_sample_of_a_batch_has_its_own_source_and_prompt(
    script: ModuleType, arguments_of: Arguments, tmp_path: Path, name: str
):
    """What a batch of three draws is what a stock pipeline draws of each row; the update is that of batches of one."""
    seen: list[tuple[torch.Tensor, str, Image.Image]] = []

    def watching(images: torch.Tensor, prompts: Sequence[str], source: Sequence[Image.Image]) -> torch.Tensor:
        seen.extend(zip(images.detach(), prompts, source, strict=True))
        return images[:, 0].flatten(1).mean(1)

    options = {"reward": None, "train_batch_size": 3, "max_train_steps": 1}
    config = TrainingConfig(**arguments_of(name, **options))
    train(config, script.AnyPipeline, reward=watching)
    pipe = load_pipeline(config.pretrained_model_name_or_path)
    trained = seen[:3]
    assert {prompt for _, prompt, _ in trained} == {*PROMPTS}
    for place, (image, prompt, source) in enumerate(trained):
        row = PROMPTS.index(prompt)
        assert source.tobytes() == picture(row).tobytes()
        seed_globally(0, 0, [place])
        with torch.no_grad():
            expected = pipe(
                prompt=prompt,
                generator=make_generator("noise", 0, 0, place),
                num_inference_steps=6,
                output_type="pt",
                return_dict=False,
                **call_of(name, row),
            )[0]
        assert (image - expected[0]).abs().max() < 1e-5
        assert (image - trained[place - 1][0]).abs().max() > 0.1
    one = {"train_batch_size": 1, "gradient_accumulation_steps": 3, "output_dir": tmp_path / "one"}
    train(TrainingConfig(**arguments_of(name, **options | one)), script.AnyPipeline, reward=watching)
    assert same(lora_of(config.output_dir), lora_of(tmp_path / "one"))


def test_a_script_that_encodes_prompts_itself_takes_references(
    script: ModuleType, arguments_of: Arguments, tmp_path: Path
):
    """As `train_flowbp.py` trains, with embeddings of prompts alone."""
    own, arguments = load_script("train_flowbp_flux2"), arguments_of("FLUX.2-Klein", max_train_steps=1)
    layers = {"lora_layers": "to_k,to_q"}
    script.main(command_line(arguments, **layers))
    for option in ("height", "width", "pipeline_arguments"):
        del arguments[option]
    own.main(command_line(arguments, **layers, resolution=8, max_sequence_length=16, output_dir=tmp_path / "own"))
    assert distance(lora_of(arguments["output_dir"]), lora_of(tmp_path / "own")) < 1e-4


def test_a_source_is_encoded_in_the_same_way_by_each_call(
    script: ModuleType, arguments_of: Arguments, monkeypatch: pytest.MonkeyPatch
):
    """Stable Diffusion 3's ControlNet draws from torch's generator for it: DRaFT-LV's copies, and both validations."""
    seen: list[torch.Tensor] = []
    forward = SD3ControlNetModel.forward

    def watching(self: SD3ControlNetModel, *args: Any, controlnet_cond: torch.Tensor, **kwargs: Any) -> Any:
        if not any(torch.equal(controlnet_cond, each) for each in seen):
            seen.append(controlnet_cond.clone())
        return forward(self, *args, controlnet_cond=controlnet_cond, **kwargs)

    monkeypatch.setattr(SD3ControlNetModel, "forward", watching)
    changes = {"method": "draft-lv", "num_noised": 2, "train_batch_size": 1, "max_train_steps": 1}
    script.main(command_line(arguments_of("SD3 ControlNet", **changes)))
    # One of the update, one of the validation.
    assert len(seen) == 2


@pytest.mark.parametrize("option", ["offload", "precompute_prompt_embeds"])
def test_text_encoders_may_be_apart(script: ModuleType, arguments_of: Arguments, tmp_path: Path, option: str):
    arguments = arguments_of("Kontext", max_train_steps=1)
    script.main(command_line(arguments))
    apart = {option: True, "prompt_embeds_dir": tmp_path / "kept", "output_dir": tmp_path / "apart"}
    script.main(command_line(arguments, **apart))
    assert distance(lora_of(arguments["output_dir"]), lora_of(tmp_path / "apart")) < 1e-5


def write_table(folder: Path, **columns: Any) -> Path:
    """A table of `PROMPTS` with these columns."""
    rows = [
        {"prompt": prompt} | {name: values[place] for name, values in columns.items()}
        for place, prompt in enumerate(PROMPTS)
    ]
    path = folder / "table.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_column_of_paths_is_opened_beside_the_table(tmp_path: Path):
    """Images are RGB and turned as EXIF says; folders and files of several images are videos; only where asked for."""
    frames = [picture(0).resize((4, 4)).rotate(90 * turn) for turn in range(3)]
    (tmp_path / "frames").mkdir()
    for place, frame in enumerate(frames):
        frame.save(tmp_path / "frames" / f"{place}.png")
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(0).convert("L").save(tmp_path / "turned.png", exif=turned)
    path = write_table(tmp_path, source=["turned.png", "frames", str(tmp_path / "film.gif")], other=["a", "b", "c"])
    records = load_records(str(path), images=["source"])
    turned, folder, film = (record.columns["source"].open() for record in records)
    assert (turned.mode, turned.size) == ("RGB", picture(0).size[::-1])
    assert [frame.tobytes() for frame in folder] == [frame.tobytes() for frame in frames]
    assert len(film) == 3 and film[1].mode == "RGB"
    assert records[1].columns["source"].shown((4, 4)).tobytes() == frames[1].tobytes()
    assert records[0].columns["other"] == "a"
    assert load_records(str(path))[0].columns["source"] == "turned.png"


@pytest.mark.parametrize("suffix", ["parquet", "folder"])
def test_a_column_of_datasets_images(tmp_path: Path, suffix: str):
    datasets = pytest.importorskip("datasets")
    picture(2).save(tmp_path / "2.png")
    rows = {"prompt": list(PROMPTS), "source": [picture(0), picture(1), str(tmp_path / "2.png")]}
    features = datasets.Features({"prompt": datasets.Value("string"), "source": datasets.Image()})
    dataset, path = datasets.Dataset.from_dict(rows, features), tmp_path / f"table.{suffix}"
    dataset.to_parquet(path) if suffix == "parquet" else dataset.save_to_disk(path)
    records = load_records(str(path), images=["source"])
    assert [record.columns["source"].open().tobytes() for record in records] == [
        picture(place).tobytes() for place in range(3)
    ]
    assert len({str(record.columns["source"]) for record in records}) == 3
    assert load_records(str(path))[0].columns == {}


COLUMN = {
    "missing": ({}, "no image in column 'source' of .* for the prompt .*; its other columns: other"),
    "empty": (
        {"source": ["0.png", None, "0.png"]},
        "no image in column 'source' of .* for the prompt 'a \"7\" in red'",
    ),
    "numbers": ({"source": [1, 2, 3]}, "column 'source' of .* holds int64, expected images of datasets, or paths"),
    "no file": (
        {"source": ["0.png", "1.png", "9.png"]},
        r"column 'source' of .*: .*9.png: expected an image .*No such",
    ),
    "no image": (
        {"source": ["0.png", "1.png", "table.jsonl"]},
        "table.jsonl: expected an image or a video, got: cannot id",
    ),
    "URL": ({"source": ["https://x.y/0.png"] * 3}, "has the URL 'https://x.y/0.png', expected paths"),
    "no frames": ({"source": ["0.png", "1.png", "frames"]}, "frames: expected an image or a video, got: no frames"),
    "no library": ({"source": ["0.png", "1.png", "film.mp4"]}, "film.mp4: reading a video needs imageio"),
}


@pytest.mark.parametrize(("columns", "message"), COLUMN.values(), ids=COLUMN)
def test_a_column_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: dict[str, Any], message: str
):
    monkeypatch.setattr(loading_utils, "is_imageio_available", lambda: False)
    (tmp_path / "frames").mkdir()
    (tmp_path / "film.mp4").touch()
    for place in range(2):
        picture(place).save(tmp_path / f"{place}.png")
    with pytest.raises(ValueError, match=message) as caught:
        load_records(str(write_table(tmp_path, other=["a"] * 3, **columns)), images=["source"])
    assert "\n" not in str(caught.value)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no word": ({"pipeline_columns": ["image"]}, "--pipeline_columns image: expected ARGUMENT=COLUMN"),
    "twice": ({"pipeline_columns": ["image=a", "image=b"]}, "image stands twice; for a list write image=ONE,OTHER"),
    "unknown": ({"pipeline_columns": ["imge=source"]}, "takes no argument imge here; did you mean image?"),
    "own": ({"pipeline_columns": ["prompt=source"]}, "takes no argument prompt here"),
    "given": (
        {"pipeline_columns": ["height=source"]},
        "--pipeline_columns height: the call has this argument already",
    ),
    "column": ({"pipeline_columns": ["image=sourc"]}, "no image in column 'sourc'"),
    "validation": ({"validation_prompt": "typed"}, "--validation_prompt 'typed': --pipeline_columns needs its row"),
    "evaluation": ({"eval_reward": "clip", "eval_prompts": "PROMPTS"}, "column 'source' was asked of"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_before_a_model_is_loaded(
    arguments_of: Arguments, tmp_path: Path, changes: dict[str, Any], message: str, check_refusal: CheckRefusal
):
    if "eval_prompts" in changes:
        changes = {**changes, "eval_prompts": write_prompts(tmp_path)}
    check_refusal(NAME, arguments_of("Kontext", **changes), message)


def test_a_changed_source_is_another_run(table: Path):
    """The fingerprint is of the images, wherever they lie."""
    config = TrainingConfig(pretrained_model_name_or_path="m", prompts=str(table))

    def found(path: Path) -> dict[str, Any]:
        return fingerprint(config, load_records(str(path), images=["source"]), [], None, None, None)

    before = found(table)
    moved = table.parent.rename(table.parent.with_name("moved")) / table.name
    assert found(moved) == before
    picture(2).save(moved.parent / "1.png")
    assert {name for name, value in found(moved).items() if value != before[name]} == {"prompts"}


def has(path: Path, color: tuple[int, int, int]) -> bool:
    """Whether an image has a square of at least 100 pixels of just this colour."""
    with Image.open(path) as image:
        return (np.asarray(image.convert("RGB")) == color).all(-1).sum() > 100


def test_sources_are_shown_beside_the_results_and_evaluated_with(
    script: ModuleType, arguments_of: Arguments, table: Path, tmp_path: Path
):
    colors = [(255, 0, 128), (0, 255, 1), (1, 2, 255)]
    for place, color in enumerate(colors):
        Image.new("RGB", SIZES[place], color).save(table.parent / f"{place}.png")
    arguments = arguments_of(
        "Kontext", validation_steps=1, eval_reward=HELD_OUT, num_eval_images=1, eval_prompts=table
    )
    script.main(command_line(arguments))
    run, folder = arguments["output_dir"], tmp_path / "evaluation"
    shown = [run / "before_after.png", run / "validation" / "000001.png"]
    assert all(has(path, colors[0]) for path in shown)
    assert all(has(run / "evaluation" / "000000.png", color) for color in colors)
    kept = "pretrained_model_name_or_path prompts pipeline_columns height width guidance_scale num_inference_steps"
    judged = {name: arguments[name] for name in (*kept.split(), "pipeline_arguments")}
    load_script("evaluate_flowbp").main(
        command_line(judged, lora=run, rewards="toy_reward:make_reward", output_dir=folder, batch_size=2, seed=3)
    )
    assert all(has(folder / "grid.png", color) for color in colors)
    report = (folder / "report.html").read_text()
    assert report.count("<b>source</b>") == 3 and report.count('alt="source of the prompt') == 3
    # The first model is the base.
    pipe, images = load_pipeline(judged["pretrained_model_name_or_path"]), sorted((folder / "images").glob("*base*/*"))
    for place, path in enumerate(images):
        with Image.open(table.parent / f"{place}.png") as source, torch.no_grad():
            call = {**call_of("Kontext", place), "image": source, "num_inference_steps": 6}
            noise = torch.Generator().manual_seed(derive_seed("evaluation", 3, place))
            expected = pipe(prompt=PROMPTS[place], generator=noise, **call).images[0]
        with Image.open(path) as image:
            assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1
    assert len(images) == 3


def test_a_comparison_hands_the_option_on():
    """From a mapping of its recipe to the words of a run and of the evaluation."""
    given = {"image": "source", "mask": ["a", "b"]}
    assert as_words({"pipeline_columns": given}, TrainingConfig) == ["--pipeline_columns", "image=source", "mask=a,b"]
    config = TrainingConfig(pretrained_model_name_or_path="m", prompts="p.csv", pipeline_columns=given)
    comparison = ComparisonConfig(methods={"full": {}}, evaluation={"rewards": "clip"}, output_dir="out")
    options = evaluation_options(comparison, {"full": config})
    assert options["pipeline_columns"] == config.pipeline_columns == ("image=source", "mask=a,b")
