# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`--use_dora` and `--use_rslora`: what peft calls by these names is trained, resumed, loaded and continued."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from resume_harness import check_same_end, sd3_arguments
from trained_backbones import SD3
from training_scripts import (
    ALPHA,
    RANK,
    SHARED_ARGUMENTS,
    check_round_trip,
    command_line,
    lora_of,
    metadata_of,
    watch_pictures,
)

from flowbp.judging.lora_files import check_lora_file
from flowbp.publishing.published_files import LORA_FILE

DORA, RSLORA = {"use_dora": True}, {"use_rslora": True}


@pytest.mark.parametrize("kind", [DORA, RSLORA, DORA | RSLORA], ids=str)
def test_it_is_trained_resumed_and_loaded_by_diffusers(
    script: ModuleType,
    model: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: dict[str, Any],
):
    def run(name: str, **changes: Any) -> Path:
        arguments = {**sd3_arguments(model, prompts, tmp_path / name), "method": "draft-k", "num_active": None}
        arguments["num_inference_steps"] = SHARED_ARGUMENTS["num_inference_steps"]
        script.main(
            command_line(arguments, **{**kind, "use_ema": True, "ema_decay": 0.5, "max_train_steps": 3, **changes})
        )
        return tmp_path / name

    drawn = watch_pictures(monkeypatch)
    whole = run("whole")
    # By the stock pipeline, bit for bit, on the base that the run has without what it trained.
    check_round_trip(model, lambda pipe: pipe.load_lora_weights(whole), drawn, **SD3.call)
    metadata = metadata_of(whole)
    for name in ("use_dora", "use_rslora"):
        assert metadata[f"transformer.{name}"] is (name in kind)
    state = json.loads((whole / "checkpoint-3" / "state.json").read_text())
    assert {*state["scales"].values()} == {ALPHA / RANK**0.5 if "use_rslora" in kind else ALPHA / RANK}
    check_lora_file("x", whole / LORA_FILE)

    resumed = run("resumed", max_train_steps=1)
    run("resumed", resume_from_checkpoint="latest")
    check_same_end(whole, resumed, 3)

    lora = lora_of(whole)
    magnitudes = [name for name in lora if "magnitude" in name]
    assert len(magnitudes) == (len(lora) // 3 if "use_dora" in kind else 0)
    before = {name: tensor for name, tensor in lora.items() if "lora_B" in name or "magnitude" in name}
    further = run("further", init_lora=whole, rank=None, lora_alpha=None, **dict.fromkeys(kind, None))
    assert metadata_of(further) == {**metadata, "transformer.init_lora_weights": True, **layers_of(further)}
    after = lora_of(further)
    # The last block's layers for text reach nothing.
    trained = [name for name in before if not torch.equal(after[name], before[name])]
    assert after.keys() == lora.keys() and len(trained) > 0.8 * len(before)


def layers_of(folder: Path) -> dict[str, Any]:
    return {"transformer.target_modules": metadata_of(folder)["transformer.target_modules"]}
