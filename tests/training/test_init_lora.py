# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`--init_lora`: LoRAs of other tools are continued, from the images that diffusers gives with them; or refused."""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_ovis_image_pipeline
from tiny_sd3 import add_random_lora, save_random_lora, tiny_sd3_pipeline
from trained_backbones import FLUX, FLUX2, SD3, TrainedBackbone
from training_scripts import (
    LORA_FILE,
    SHARED_ARGUMENTS,
    arguments_of_run,
    backbone_of,
    check_round_trip,
    images_of,
    load_pipeline,
    load_script,
    lora_of,
    metadata_of,
    parse_config,
    same,
    watch_pictures,
    write_prompts,
)

from flowbp.training import TrainingConfig, train
from flowbp.training.loop import one_update
from flowbp.training.results import finish
from flowbp.training.setup import prepare

Tensors = dict[str, torch.Tensor]
# The original names of FLUX's layers, and those of diffusers that each of them became.
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
ATTENTION = {
    "double_blocks.0.img_attn.qkv": [f"{DOUBLE}.attn.to_{name}" for name in "qkv"],
    "double_blocks.0.txt_attn.qkv": [f"{DOUBLE}.attn.add_{name}_proj" for name in "qkv"],
    "double_blocks.0.img_attn.proj": [f"{DOUBLE}.attn.to_out.0"],
    "double_blocks.0.txt_attn.proj": [f"{DOUBLE}.attn.to_add_out"],
}
FLUX_LAYERS = {
    **ATTENTION,
    "double_blocks.0.img_mlp.0": [f"{DOUBLE}.ff.net.0.proj"],
    "single_blocks.0.linear2": [f"{SINGLE}.proj_out"],
    "single_blocks.0.modulation.lin": [f"{SINGLE}.norm.linear"],
}
FLUX2_LAYERS = {
    **ATTENTION,
    "double_blocks.0.txt_mlp.2": [f"{DOUBLE}.ff_context.linear_out"],
    "single_blocks.0.linear1": [f"{SINGLE}.attn.to_qkv_mlp_proj"],
}
ONE_BY_ONE = {layer: [layer] for layers in FLUX_LAYERS.values() for layer in layers}
SD3_LAYERS = {f"{DOUBLE}.attn.{name}": [f"{DOUBLE}.attn.{name}"] for name in ("to_q", "to_out.0", "add_k_proj")}


def kohya(layer: str) -> tuple[str, str, str]:
    """Names of both matrices and of alpha in the files of sd-scripts."""
    name = f"lora_unet_{layer.replace('.', '_')}"
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"


def comfy(layer: str) -> tuple[str, str, str]:
    name = f"diffusion_model.{layer}"
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"


def comfy_peft(layer: str) -> tuple[str, str, None]:
    return f"diffusion_model.{layer}.lora_A.weight", f"diffusion_model.{layer}.lora_B.weight", None


def xlabs(layer: str) -> tuple[str, str, None]:
    block, attention, kind = layer.rsplit(".", 2)
    name = f"{block}.processor.{kind}_lora{1 if attention == 'img_attn' else 2}"
    return f"{name}.down.weight", f"{name}.up.weight", None


def ai_toolkit(layer: str) -> tuple[str, str, None]:
    return f"transformer.{layer}.lora_A.weight", f"transformer.{layer}.lora_B.weight", None


def of_peft(layer: str) -> tuple[str, str, None]:
    return f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight", None


# Backbone, layers, names, dtype of the file.
FORMATS: dict[str, tuple[TrainedBackbone, dict[str, list[str]], Callable[[str], tuple], torch.dtype]] = {
    "ai-toolkit FLUX.1": (FLUX, ONE_BY_ONE, ai_toolkit, torch.float16),
    "sd-scripts FLUX.1": (FLUX, FLUX_LAYERS, kohya, torch.bfloat16),
    "ComfyUI FLUX.1": (FLUX, FLUX_LAYERS, comfy, torch.float32),
    "XLabs FLUX.1": (FLUX, ATTENTION, xlabs, torch.float32),
    "ComfyUI FLUX.2": (FLUX2, FLUX2_LAYERS, comfy_peft, torch.bfloat16),
    "sd-scripts FLUX.2": (FLUX2, FLUX2_LAYERS, kohya, torch.float32),
    "diffusers SD3 without metadata": (SD3, SD3_LAYERS, ai_toolkit, torch.float32),
    "peft SD3": (SD3, SD3_LAYERS, of_peft, torch.float32),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TrainedBackbone], Path]:
    """The folder of a backbone's tiny model."""
    root = tmp_path_factory.mktemp("models")

    def folder_of(backbone: TrainedBackbone) -> Path:
        if not (root / backbone.name).exists():
            backbone.build().save_pretrained(root / backbone.name)
        return root / backbone.name

    return folder_of


@pytest.fixture
def configure(saved: Callable[[TrainedBackbone], Path], tmp_path: Path) -> Callable[..., TrainingConfig]:
    """Configs of runs that start from a LoRA."""

    def make(backbone: TrainedBackbone, lora: Path | None, **changes: Any) -> TrainingConfig:
        call = {name: value for name, value in backbone.call.items() if name != "negative_prompt"}
        start = {"init_lora": lora, "rank": None, "lora_alpha": None}
        values = {"method": "draft-k", "checkpointing_steps": 1, **call, **start, **changes}
        return TrainingConfig(**arguments_of_run(saved(backbone), tmp_path, **values))

    return make


def class_of(backbone: TrainedBackbone) -> Any:
    return backbone_of(load_script(backbone.script))


def start_and_continue(config: TrainingConfig, backbone: TrainedBackbone) -> None:
    """A run of one update that draws its validation before it, too."""
    with ExitStack() as closing:
        run = prepare(config, class_of(backbone), None, None, closing)
        run.evaluation.validation.draw()
        one_update(run, 0)
        finish(run)


def write_lora(
    folder: Path,
    transformer: torch.nn.Module,
    layers: dict[str, list[str]],
    names: Callable[[str], tuple],
    dtype: torch.dtype,
) -> Tensors:
    """A random LoRA in another tool's names, with ranks and alphas of its own in each layer; the weights' changes.

    The values are powers of two, so that no dtype rounds what a conversion multiplies.
    """
    parts, changes, tensors = dict(transformer.named_modules()), {}, {}
    generator = torch.Generator().manual_seed(3)
    ranks, alphas = {}, {}

    def draw(*shape: int) -> torch.Tensor:
        exponents = torch.randint(-4, -1, shape, generator=generator)
        return torch.randn(shape, generator=generator).sign() * 2.0**exponents

    for place, (original, own) in enumerate(layers.items()):
        rank, weights = 2 ** (1 + place % 3), [parts[layer].weight for layer in own]
        down, ups = draw(rank, weights[0].shape[1]), [draw(len(weight), rank) for weight in weights]
        down_name, up_name, alpha_name = names(original)
        scale = 2.0 ** (place % 2) if alpha_name or names is of_peft else 1.0
        tensors |= {down_name: down.to(dtype), up_name: torch.cat(ups).to(dtype)}
        if alpha_name:
            tensors[alpha_name] = torch.tensor(scale * rank, dtype=dtype)
        ranks[original], alphas[original] = rank, scale * rank
        changes |= {layer: scale * up @ down for layer, up in zip(own, ups, strict=True)}
    folder.mkdir()
    if names is of_peft:
        config = LoraConfig(r=2, lora_alpha=2, rank_pattern=ranks, alpha_pattern=alphas, target_modules=[*layers])
        config.save_pretrained(folder)
        save_file(tensors, folder / "adapter_model.safetensors")
    else:
        save_file(tensors, folder / "their-lora.safetensors")
    return changes


@pytest.mark.parametrize("name", FORMATS)
def test_a_lora_of_another_tool_is_continued(
    configure: Callable[..., TrainingConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    """Images at update 0 are those that diffusers draws with it, and those of weights that are changed by hand."""
    backbone, layers, names, dtype = FORMATS[name]
    drawn = watch_pictures(monkeypatch)
    changes = write_lora(tmp_path / "lora", backbone.build().transformer, layers, names, dtype)
    config = configure(backbone, tmp_path / "lora")
    start_and_continue(config, backbone)
    model, output = config.pretrained_model_name_or_path, tmp_path / "run"
    pipe, by_hand = load_pipeline(model), load_pipeline(model)
    if names is not of_peft:
        pipe.load_lora_weights(tmp_path / "lora", weight_name="their-lora.safetensors")
        assert torch.equal(images_of(pipe, **backbone.call), drawn[0])
    parts = dict(by_hand.transformer.named_modules())
    for layer, change in changes.items():
        parts[layer].weight.data += change
    torch.testing.assert_close(images_of(by_hand, **backbone.call), drawn[0], rtol=1e-3, atol=1e-4)
    # The base is the model without it, and the result has what was trained on top.
    check_round_trip(Path(model), lambda pipe: pipe.load_lora_weights(output), drawn, **backbone.call)
    assert (drawn[0] - drawn[-1]).abs().max() > 1e-2 and not torch.equal(drawn[0], drawn[-2])
    lora = lora_of(output)
    assert {key.removeprefix("transformer.").partition(".lora_")[0] for key in lora} == changes.keys()
    assert all(tensor.dtype == torch.float32 for tensor in lora.values())
    run = json.loads((output / "run.json").read_text())
    assert run["settings"]["init_lora"].endswith("lora") and run["settings"]["rank"] is None


def changed(source: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A LoRA with other tensors and the same metadata."""
    folder.mkdir()
    settings = {"format": "pt", "lora_adapter_metadata": json.dumps(metadata_of(source))}
    save_file(change(lora_of(source)), folder / LORA_FILE, settings)
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of SD3 as the scripts write it: rank 2, alpha 4."""
    return save_random_lora(tiny_sd3_pipeline(torch.float32), tmp_path_factory.mktemp("own"), seed=1)


@pytest.mark.parametrize("in_file", [False, True])
def test_a_result_is_continued_with_its_rank_scale_and_layers(
    configure: Callable[..., TrainingConfig], own: Path, monkeypatch: pytest.MonkeyPatch, in_file: bool
):
    drawn = watch_pictures(monkeypatch)
    same_values = {"rank": 2, "lora_alpha": 4, "lora_layers": "to_q, to_k,to_v,to_out.0"} if in_file else {}
    config = configure(SD3, own / LORA_FILE if in_file else own, **same_values)
    start_and_continue(config, SD3)
    pipe = load_pipeline(Path(config.pretrained_model_name_or_path))
    pipe.load_lora_weights(own)
    assert torch.equal(images_of(pipe, **SD3.call), drawn[0])
    metadata, before = metadata_of(config.output_dir), metadata_of(own)
    for name in ("r", "lora_alpha", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern"):
        assert metadata[f"transformer.{name}"] == before[f"transformer.{name}"]
    settings = json.loads((config.output_dir / "run.json").read_text())["settings"]
    assert (settings["rank"], settings["lora_alpha"]) == (2, 4)
    assert lora_of(config.output_dir).keys() == lora_of(own).keys()


def test_a_pipeline_without_a_loader_starts_from_what_its_transformer_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pipe = tiny_ovis_image_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    add_random_lora(SimpleNamespace(transformer=pipe.transformer), 2, torch.Generator().manual_seed(0))
    pipe.transformer.save_lora_adapter(tmp_path / "lora")
    call = {"height": 8, "width": 8, "guidance_scale": 4.0}
    config = TrainingConfig(
        **{**SHARED_ARGUMENTS, **call, "rank": None, "lora_alpha": None},
        pretrained_model_name_or_path=tmp_path / "model",
        prompts=write_prompts(tmp_path),
        output_dir=tmp_path / "run",
        method="draft-k",
        init_lora=tmp_path / "lora",
        pipeline_arguments={"max_sequence_length": 136},
    )
    drawn = watch_pictures(monkeypatch)
    start_and_continue(config, SimpleNamespace(script="train_flowbp"))
    loaded = load_pipeline(tmp_path / "model")
    loaded.transformer.load_lora_adapter(tmp_path / "lora", weight_name=LORA_FILE, prefix=None)
    assert torch.equal(images_of(loaded, **call, max_sequence_length=136), drawn[0])
    # A result is a start as well.
    start_and_continue(
        TrainingConfig(**{**vars(config), "init_lora": str(tmp_path / "run"), "output_dir": tmp_path / "next"}),
        SimpleNamespace(script="train_flowbp"),
    )
    assert not same(lora_of(tmp_path / "run"), lora_of(tmp_path / "next"))


def test_the_lora_stays_float32_over_bfloat16(configure: Callable[..., TrainingConfig], own: Path):
    with ExitStack() as closing:
        config = configure(SD3, own, mixed_precision="bf16")
        run = prepare(config, class_of(SD3), None, None, closing)
        found = {f"transformer.{name}": value for name, value in run.state.result().items()}
        assert same(found, lora_of(own))
        assert all(parameter.dtype == torch.float32 for parameter in run.state.parameters)


# Resuming.


def test_a_run_resumes_without_the_file(configure: Callable[..., TrainingConfig], own: Path, tmp_path: Path, capsys):
    copy = shutil.copytree(own, tmp_path / "copy")
    backbone = class_of(SD3)
    whole = configure(SD3, copy, output_dir=tmp_path / "whole", use_ema=True)
    train(whole, backbone)
    half = configure(SD3, copy, output_dir=tmp_path / "half", max_train_steps=1, use_ema=True)
    train(half, backbone)
    capsys.readouterr()
    resumed = configure(SD3, copy, output_dir=tmp_path / "half", resume_from_checkpoint="latest", use_ema=True)
    shutil.rmtree(copy)
    train(resumed, backbone)
    assert same(lora_of(tmp_path / "whole"), lora_of(tmp_path / "half"))
    assert "content of --init_lora was " in capsys.readouterr().err
    first = {**changes_of(resumed), "resume_from_checkpoint": "checkpoint-1"}
    with pytest.raises(ValueError, match="content of --init_lora was .*, is missing; --strict_resume"):
        train(configure(SD3, copy, **first, strict_resume=True), backbone)
    # Without the option the run is another one.
    with pytest.raises(ValueError, match="its LoRA has other layers or another rank; use the .*--init_lora"):
        train(configure(SD3, None, **first), backbone)


def changes_of(config: TrainingConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("output_dir", "resume_from_checkpoint", "use_ema")}


# Refusals.


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def added(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: torch.ones(shape)}


def with_value(value: float) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor.fill_(value) for name, tensor in tensors.items()}


FIRST = "transformer.transformer_blocks.0.attn.to_k"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (added(f"{FIRST}.lokr_w1", 2, 2), "expected a LoRA's matrices alone, got .*to_k.lokr_w1"),
        (added(f"{FIRST}.hada_w1_a", 2, 2), "expected a LoRA's matrices alone, got .*to_k.hada_w1_a"),
        (added(f"{FIRST}.dora_scale", 16), "expected a LoRA's matrices alone, got .*to_k.dora_scale"),
        (added(f"{FIRST}.lora_B.bias", 16), "expected a LoRA's matrices alone, got .*to_k.lora_B.bias"),
        (added("transformer.proj_out.weight", 4, 16), "expected a LoRA's matrices alone, got .*proj_out.weight"),
        (added("transformer.norm_out.diff", 4), "expected a LoRA's matrices alone, got .*norm_out.diff"),
        (
            added("text_encoder.a.lora_A.weight", 2, 8),
            "1 of its 25 tensors are not for the transformer, first text_enc",
        ),
        (added(f"{FIRST}.alpha"), "1 of its 13 layers are not in this SD3Transformer2DModel, first .*to_k.alpha"),
        (
            renamed("transformer_blocks.0", "transformer_blocks.7"),
            "first transformer_blocks.7.attn.to_k; use a LoRA of",
        ),
        (renamed("transformer.", "lora_unet_"), "layers are not in this SD3Transformer2DModel, first lora_unet_"),
        (
            lambda tensors: {**tensors, f"{FIRST}.lora_A.weight": torch.ones(2, 8)},
            r"has the shape \[2, 8\], the layer",
        ),
        (
            lambda tensors: {**tensors, f"{FIRST}.lora_B.weight": torch.ones(8, 2)},
            r"has the shape \[8, 2\], the layer",
        ),
        (
            lambda tensors: {**tensors, f"{FIRST}.lora_B.weight": torch.ones(16, 3)},
            "does not fit this SD3Transformer2DM",
        ),
        (
            lambda tensors: {name: value for name, value in tensors.items() if name != f"{FIRST}.lora_B.weight"},
            "expected both matrices of each layer, transformer_blocks.0.attn.to_k.lora_B.weight is missing",
        ),
        (with_value(math.nan), "expected a plain LoRA with finite values, got NaN"),
        (lambda tensors: {}, "expected a plain LoRA with finite values, got 'transformer.r': 2 in its metadata"),
    ],
)
def test_what_is_no_lora_of_this_model_is_refused_before_it_is_loaded(
    configure: Callable[..., TrainingConfig],
    own: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Tensors], Tensors],
    message: str,
):
    config = configure(SD3, changed(own, tmp_path / "lora", change))
    check_refused(config, SD3, rf"--init_lora {tmp_path}/lora: .*{message}", monkeypatch)


def check_refused(
    config: TrainingConfig, backbone: TrainedBackbone, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner in (DiffusionPipeline, ModelMixin):
        monkeypatch.setattr(owner, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        train(config, class_of(backbone))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not config.output_dir.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 3}, "--rank 3: --init_lora .* has 2; leave --rank out"),
        ({"lora_alpha": 2}, "--lora_alpha 2: --init_lora .* has 4; leave"),
        ({"lora_layers": "to_q"}, "--lora_layers to_q: --init_lora .* has other layers, 9 differ, one is"),
        ({"use_dora": True}, "--use_dora True: --init_lora .* has False"),
        ({"use_rslora": True}, "--use_rslora True: --init_lora .* has False"),
        ({"init_lora": "nowhere.safetensors"}, "--init_lora nowhere.safetensors: expected a folder, a file or a Hub"),
        ({"init_lora": "user/nothing"}, "--init_lora user/nothing: no such folder or file, and not found on the Hub"),
        (
            {"init_lora": "user/nothing/a/b.safetensors"},
            "--init_lora user/nothing/a/b.safetensors: no such folder or f.*its cache .*Hub cannot be reached",
        ),
    ],
)
def test_options_that_differ_from_the_lora_are_refused(
    configure: Callable[..., TrainingConfig],
    own: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    message: str,
):
    check_refused(configure(SD3, own, **options), SD3, message, monkeypatch)


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        # What diffusers leaves out without a word: a layer outside the blocks, and a scale.
        (kohya, {"lora_unet_img_in": 4}, "tensors are not for the transformer, first x_embedder.lora_A.weight"),
        (ai_toolkit, {"lora_unet_x": 4}, "loads another LoRA than the file has: the norm"),
        (kohya, {"text_encoders.t5xxl.transformer.q": 8}, "loads another LoRA than the file has: the norm"),
        (kohya, {"lora_te1_text_model_encoder_layers_0_mlp_fc1": 8}, "not for the transformer, first text_encoder"),
    ],
)
def test_what_a_conversion_of_diffusers_would_leave_out_is_refused(
    configure: Callable[..., TrainingConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: Callable[[str], tuple],
    more: dict[str, int],
    message: str,
):
    layers = ONE_BY_ONE if names is ai_toolkit else FLUX_LAYERS
    write_lora(tmp_path / "lora", FLUX.build().transformer, layers, names, torch.float32)
    file = tmp_path / "lora" / "their-lora.safetensors"
    extra = {
        f"{name}.lora_{end}.weight": torch.ones((2, width) if end == "down" else (32, 2))
        for name, width in more.items()
        for end in ("down", "up")
    }
    save_file({**load_file(file), **extra}, file)
    check_refused(configure(FLUX, file), FLUX, f"--init_lora .*{message}", monkeypatch)


def test_a_lora_of_another_model_is_refused(
    configure: Callable[..., TrainingConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_lora(tmp_path / "flux", FLUX.build().transformer, ONE_BY_ONE, ai_toolkit, torch.float32)
    write_lora(tmp_path / "kohya", FLUX.build().transformer, FLUX_LAYERS, kohya, torch.float32)
    message = "layers are not in this SD3Transformer2DModel, first .*; use a LoRA of this model, in names that diff"
    for name in ("flux", "kohya"):
        check_refused(configure(SD3, tmp_path / name), SD3, f"--init_lora {tmp_path}/{name}: .*{message}", monkeypatch)


# The command line.


def test_the_lora_of_the_command_line_counts_before_the_recipe(own: Path, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rank: 16\nlora_alpha: 16\nlora_layers: to_q\n")
    words = ["--config", str(recipe), "--pretrained_model_name_or_path", "m", "--prompts", "p.txt", "--reward", "ocr"]
    script = load_script("train_flowbp_sd3")
    assert parse_config(script, words).rank == 16
    config = parse_config(script, [*words, "--init_lora", str(own), "--lora_alpha", "3"])
    assert (config.rank, config.lora_alpha, config.lora_layers) == (None, 3, None)
    # In a recipe with a LoRA, its own values count.
    recipe.write_text(f"rank: 16\ninit_lora: {own}\n")
    config = parse_config(script, words)
    assert (config.rank, config.lora_alpha, config.lora_layers) == (16, None, None)
