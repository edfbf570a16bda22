# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""A LoRA of the scripts loads where users take it, and docs/loading.md is right about it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from loopback_hub import USER, loopback_hub
from resume_harness import sd3_arguments
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_sd3 import add_random_lora, draw, save_random_lora, tiny_sd3_pipeline
from training_scripts import command_line

from flowbp.publishing.published_files import LORA_FILE

ROOT = Path(__file__).parents[2]
RANK = 3
*_, FUSING, _, FULL, EXPORT = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "loading.md").read_text(encoding="utf-8"), re.DOTALL
)


def base() -> StableDiffusion3Pipeline:
    """The base model that users load, always the same."""
    return tiny_sd3_pipeline(torch.float32)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LoRA of the base model."""
    return save_random_lora(base(), tmp_path_factory.mktemp("lora"), seed=5, rank=RANK)


def test_file_and_folder(lora: Path) -> None:
    """Both draw what the model drew that the LoRA was saved from, bit for bit; alpha is kept."""
    pipe = base()
    add_random_lora(pipe, RANK, torch.Generator().manual_seed(5))
    expected, plain = draw(pipe), draw(base())
    assert (expected - plain).abs().max() > 1e-2
    for source in (lora, str(lora), lora / LORA_FILE):
        pipe = base()
        pipe.load_lora_weights(source)
        assert torch.equal(draw(pipe), expected)
    (config,) = pipe.transformer.peft_config.values()
    assert (config.r, config.lora_alpha) == (RANK, 2 * RANK)


LOAD_BOTH = """
import sys, torch
from tiny_sd3 import draw, tiny_sd3_pipeline
remote, local, plain = (tiny_sd3_pipeline(torch.float32) for _ in range(3))
remote.load_lora_weights(sys.argv[1])
local.load_lora_weights(sys.argv[2])
here, there = ({n: p for n, p in pipe.transformer.named_parameters() if "lora_" in n} for pipe in (local, remote))
assert here and here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
assert torch.equal(draw(remote), draw(local)) and not torch.equal(draw(plain), draw(local))
print("equal")
"""


def test_hub(lora: Path, tmp_path: Path) -> None:
    """What `python -m flowbp.publishing.push` pushed loads by its name, equal to the folder bit for bit."""
    with loopback_hub() as hub:
        environment = hub.environment(tmp_path / "home")

        def run(*words: str) -> str:
            done = subprocess.run(
                [sys.executable, *words], env=environment, capture_output=True, text=True, check=False, timeout=300
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        repository = f"{USER}/repo"
        run("-m", "flowbp.publishing.push", str(lora), "--hub_model_id", repository)
        assert hub.repositories[repository].files == {LORA_FILE: (lora / LORA_FILE).read_bytes()}
        assert run("-c", LOAD_BOTH, repository, str(lora)).endswith("equal\n")
        assert hub.counts["get"] >= 1


def test_a_run_that_is_pushed_later_says_how_to_load_it_from_there(
    script: ModuleType, model: Path, prompts: Path, tmp_path: Path
) -> None:
    folder, other = tmp_path / "lora", f"{USER}/other"
    script.main(command_line(sd3_arguments(model, prompts, folder), max_train_steps=1))
    assert "pipe.load_lora_weights('lora')" in (folder / "README.md").read_text()
    with loopback_hub() as hub:
        environment = hub.environment(tmp_path / "home")

        def push(repository: str) -> tuple[str, str]:
            """The card in the repository, and what was said."""
            words = ["-m", "flowbp.publishing.push", str(folder), "--hub_model_id", repository]
            done = subprocess.run(
                [sys.executable, *words], env=environment, capture_output=True, text=True, check=True, timeout=300
            )
            full = repository if "/" in repository else f"{USER}/{repository}"
            return hub.repositories[full].files["README.md"].decode(), done.stderr

        # A name alone is one in the user's account.
        card, _ = push("other")
        assert f"pipe.load_lora_weights('{other}')" in card and "# other\n" in card
        assert json.loads(hub.repositories[other].files["run.json"])["hub_model_id"] == other
        assert push(other)[0] == card and len(hub.repositories[other].commits) == 1
        # What a user wrote is not overwritten.
        with (folder / "README.md").open("a") as file:
            file.write("Mine.\n")
        card, said = push("team/third")
        assert card.endswith("Mine.\n") and "README.md was edited and stays as it is; make it name team/third." in said


def largest_change(pipe: StableDiffusion3Pipeline, plain: StableDiffusion3Pipeline) -> float:
    """The largest difference of two transformers' weights, which have the same names."""
    weights, expected = pipe.transformer.state_dict(), plain.transformer.state_dict()
    assert weights.keys() == expected.keys()
    return max((weights[name] - tensor).abs().max().item() for name, tensor in expected.items())


def test_fusing_as_the_document_says(lora: Path) -> None:
    """Fused weights draw the same and the document's last lines restore the base model, up to float32 rounding."""
    steps = [line.replace('"my-lora"', repr(str(lora))) for line in FUSING.splitlines()]
    assert [step.partition("(")[0] for step in steps] == [
        *["pipe.load_lora_weights", "pipe.fuse_lora", "pipe.unfuse_lora", "pipe.unload_lora_weights"]
    ]
    plain, pipe = base(), base()
    images = []
    for step in steps:
        exec(step, {"pipe": pipe})
        images.append(draw(pipe))
    loaded, fused, unfused, unloaded = images
    assert (loaded - draw(plain)).abs().max() > 0.1
    for drawn, expected in ((fused, loaded), (unfused, loaded), (unloaded, draw(plain))):
        torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-5)
    assert not hasattr(pipe.transformer, "peft_config") and largest_change(pipe, plain) < 2e-7

    # What the document warns of: unloading alone leaves the LoRA in the weights, where nothing can remove it.
    pipe = base()
    for step in steps:
        if "unfuse" not in step:
            exec(step, {"pipe": pipe})
    assert not hasattr(pipe.transformer, "peft_config") and largest_change(pipe, plain) > 0.1
    torch.testing.assert_close(draw(pipe), fused, rtol=1e-4, atol=1e-5)


def test_unloading_without_fusing(lora: Path) -> None:
    """Restores the base model bit for bit."""
    plain, pipe = base(), base()
    pipe.load_lora_weights(lora)
    pipe.unload_lora_weights()
    assert largest_change(pipe, plain) == 0 and torch.equal(draw(pipe), draw(plain))


def test_two_adapters_with_weights(lora: Path, tmp_path: Path) -> None:
    """`set_adapters` adds both with their weights: the weights' change is the weighted sum of the two."""
    other = save_random_lora(base(), tmp_path / "other", seed=6, rank=RANK)
    pipe = base()
    pipe.load_lora_weights(lora, adapter_name="one")
    pipe.load_lora_weights(other, adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.7, -0.4])
    drawn = draw(pipe)

    by_hand = base()
    weights = by_hand.transformer.state_dict()
    for folder, strength in ((lora, 0.7), (other, -0.4)):
        tensors = load_file(folder / LORA_FILE)
        for name in tensors:
            if name.endswith(".lora_A.weight"):
                layer = name.removesuffix(".lora_A.weight")
                change = tensors[f"{layer}.lora_B.weight"] @ tensors[name]
                # alpha / rank is 2.
                weights[layer.removeprefix("transformer.") + ".weight"] += strength * 2 * change
    torch.testing.assert_close(drawn, draw(by_hand), rtol=1e-4, atol=1e-5)

    pipe.set_adapters("one")
    single = base()
    single.load_lora_weights(lora)
    torch.testing.assert_close(draw(pipe), draw(single), rtol=1e-5, atol=1e-6)
    assert (drawn - draw(single)).abs().max() > 1e-2


def test_a_fully_trained_transformer(tmp_path: Path) -> None:
    """docs/loading.md puts it into the base pipeline."""
    pipe, code = base(), FULL
    pipe.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        pipe.transformer.proj_out.weight.add_(1)
    pipe.transformer.save_pretrained(tmp_path / "run" / "transformer")
    for name, path in (("sd35-full", "run"), ("stabilityai/stable-diffusion-3.5-medium", "base")):
        assert code.count(f'"{name}"') == 1
        code = code.replace(f'"{name}"', repr(str(tmp_path / path)))
    missing = ("text_encoder_3", "tokenizer_3", "feature_extractor", "image_encoder")
    found: dict[str, Any] = {"missing": dict.fromkeys(missing)}
    exec(code.replace("transformer=transformer,", "transformer=transformer, **missing,"), found)
    expected = pipe.transformer.to(torch.bfloat16).state_dict()
    loaded = found["pipe"].transformer.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in expected.items())


def export(source: Path, target: Path) -> dict[str, torch.Tensor]:
    """What the code in docs/loading.md makes of a LoRA."""
    names = ('"my-lora/pytorch_lora_weights.safetensors"', '"my-lora-comfyui.safetensors"')
    code = EXPORT
    for name, path in zip(names, (source, target), strict=True):
        assert code.count(name) == 1
        code = code.replace(name, repr(str(path)))
    exec(compile(code, "docs/loading.md", "exec"), {})
    return load_file(target)


def test_export(lora: Path, tmp_path: Path) -> None:
    """Every layer is there under the name that ComfyUI knows, with the same numbers and its alpha."""
    original = load_file(lora / LORA_FILE)
    exported = export(lora / LORA_FILE, tmp_path / "exported.safetensors")
    expected = {}
    for name, tensor in original.items():
        layer, _, matrix = name.removesuffix(".weight").rpartition(".")
        layer = "lora_" + layer.replace(".", "_")
        expected[f"{layer}.{'lora_down' if matrix == 'lora_A' else 'lora_up'}.weight"] = tensor
        expected[f"{layer}.alpha"] = torch.tensor(2.0 * RANK)
    assert "lora_transformer_transformer_blocks_0_attn_to_out_0.lora_up.weight" in expected
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())


def test_diffusers_reads_the_export_for_flux(tmp_path: Path) -> None:
    """It has a reader of this layout for FLUX.1's attention layers: same change of the weights, up to rounding."""
    layers = [f"transformer_blocks.1.attn.{name}" for name in ("to_q", "to_out.0", "add_k_proj", "to_add_out")]
    layers += [f"single_transformer_blocks.0.attn.{name}" for name in ("to_k", "to_v")]
    matrices = {f"{layer}.lora_A.weight": torch.randn(RANK, 5) for layer in layers}
    matrices |= {f"{layer}.lora_B.weight": torch.randn(7, RANK) for layer in layers}
    metadata = {"r": RANK, "lora_alpha": 2 * RANK}
    FluxPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=matrices, transformer_lora_adapter_metadata=metadata
    )
    export(tmp_path / LORA_FILE, tmp_path / "exported.safetensors")
    original, found = load_file(tmp_path / LORA_FILE), FluxPipeline.lora_state_dict(tmp_path / "exported.safetensors")
    assert len(original) == 2 * len(layers) and found.keys() == original.keys()
    for name, down in original.items():
        if ".lora_A." in name:
            other = name.replace(".lora_A.", ".lora_B.")
            # alpha / rank is 2; this reader multiplies it into the matrices.
            torch.testing.assert_close(found[other] @ found[name], 2 * original[other] @ down)


def test_the_metadata_that_the_export_reads(lora: Path) -> None:
    """Is what the scripts write."""
    with safe_open(lora / LORA_FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.lora_alpha"] == 2 * RANK and metadata["transformer.r"] == RANK


def test_weights_without_metadata_are_not_exported_silently(lora: Path, tmp_path: Path) -> None:
    """Their alpha is not known."""
    save_file(load_file(lora / LORA_FILE), tmp_path / LORA_FILE)
    with pytest.raises((KeyError, TypeError)):
        export(tmp_path / LORA_FILE, tmp_path / "exported.safetensors")
