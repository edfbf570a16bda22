# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""LoRAs of which only some layers fit, or none: what `load_loras` says."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_sd3 import add_random_lora, draw, save_random_lora, tiny_sd3_pipeline
from training_scripts import put_into_cache

from flowbp.judging.lora_files import check_lora_file
from flowbp.judging.loras import load_loras
from flowbp.judging.models import EvaluatedModel
from flowbp.publishing.published_files import LORA_FILE

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> State:
    folder = save_random_lora(tiny_sd3_pipeline(torch.float32), tmp_path_factory.mktemp("lora"), seed=1)
    return load_file(folder / LORA_FILE)


def load(folder: Path, state: State) -> tuple[dict[str, str], dict[str, str]]:
    save_file(state, folder / LORA_FILE)
    return load_loras(tiny_sd3_pipeline(torch.float32), [EvaluatedModel("a", str(folder))], "transformer")


def test_a_lora_that_fits_needs_no_remark(lora: State, tmp_path: Path):
    assert load(tmp_path, lora) == ({str(tmp_path): "lora_0"}, {})


def test_layers_that_nothing_takes_are_counted(lora: State, tmp_path: Path):
    renamed = {name.replace(".0.attn.to_k", ".7.attn.to_k"): value for name, value in lora.items()}
    _, remarks = load(tmp_path, renamed)
    count = len(lora) // 2
    assert remarks == {str(tmp_path): f"only {count - 1} of its {count} layers fit StableDiffusion3Pipeline"}


@pytest.mark.parametrize("source", ["user/lora", f"user/lora/{LORA_FILE}", f"user/lora/none/{LORA_FILE}"])
def test_a_lora_in_the_cache_loads_offline(lora: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str):
    (tmp_path / "lora").mkdir()
    save_file(lora, tmp_path / "lora" / LORA_FILE)
    put_into_cache(tmp_path, "lora", tmp_path / "lora", "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    pipe = tiny_sd3_pipeline(torch.float32)
    if "none" in source:
        with pytest.raises(
            ValueError, match="--lora user/lora/none/.*: the repository user/lora has no file none/pyt"
        ):
            load_loras(pipe, [EvaluatedModel("a", source)], "transformer")
        return
    assert load_loras(pipe, [EvaluatedModel("a", source)], "transformer") == ({source: "lora_0"}, {})
    assert "lora_0" in pipe.transformer.peft_config


def test_a_folder_of_peft_is_loaded_with_its_scale(lora: State, tmp_path: Path):
    """The scale is in the config beside the file: without that the file is one in unknown names."""
    load(tmp_path, lora)
    (tmp_path / LORA_FILE).unlink()
    tensors = {name.replace("transformer.", "base_model.model.", 1): tensor for name, tensor in lora.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    LoraConfig(r=2, lora_alpha=4, target_modules=names).save_pretrained(tmp_path)
    check_lora_file("a", tmp_path / "adapter_model.safetensors")
    pipe, expected = tiny_sd3_pipeline(torch.float32), tiny_sd3_pipeline(torch.float32)
    assert load_loras(pipe, [EvaluatedModel("a", str(tmp_path))], "transformer")[1] == {}
    add_random_lora(expected, 2, torch.Generator().manual_seed(1))
    assert torch.equal(draw(pipe), draw(expected))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="has no layer of this|does not fit"):
        load_loras(tiny_sd3_pipeline(torch.float32), [EvaluatedModel("a", str(tmp_path))], "transformer")


def test_another_width_is_one_short_line(lora: State, tmp_path: Path):
    wide = {name: torch.cat([value, value], 1) if "lora_A" in name else value for name, value in lora.items()}
    with pytest.raises(
        ValueError, match=r"of its tensors have another shape, first .*lora_A.* with \[2, 32\]"
    ) as caught:
        load(tmp_path, wide)
    message = str(caught.value)
    assert message.startswith(f"--lora {tmp_path}: does not fit StableDiffusion3Pipeline: {len(lora) // 2} of its")
    assert message.endswith("expected [2, 16].") and "\n" not in message
