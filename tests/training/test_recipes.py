# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Recipes: each parses with its backbone's script and says what the row's defaults for that backbone are."""

import importlib
import sys
from pathlib import Path

import pytest

from flowbp import METHODS, get_method
from flowbp.training.arguments import choose_method

TRAINING = Path(__file__).parents[2] / "training"
RECIPES = sorted((TRAINING / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_recipe_spells_out_the_defaults_of_its_backbone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, _, method = path.stem.partition("_")
    monkeypatch.setattr(sys, "path", [str(TRAINING), *sys.path])
    script = importlib.import_module(f"train_flowbp_{backbone}")
    args = script.parse_args(["--config", str(path), "--prompts", "prompts.txt", "--reward", "ocr"])
    assert args.method == method.replace("_", "-")
    expected = get_method(args.method, backbone)
    assert choose_method(args, backbone) == expected
    assert args.undo_guidance in (None, expected.undo_guidance)
    assert (args.num_inference_steps, args.resolution, args.max_train_steps) == (25, 512, 300)
    assert args.guidance_scale == (3.5 if backbone == "sd3" else 4.0)
    assert args.train_batch_size * args.gradient_accumulation_steps == 64
    assert bool(args.unconditional_gradient) == expected.unconditional_gradient
    if backbone == "sd3":
        assert args.sigmas == "linear"  # FLUX pipelines have these sigmas of their own


def test_there_is_a_recipe_for_every_method_that_the_paper_runs() -> None:
    rows = [name.replace("-", "_") for name in METHODS if name not in ("full", "draft-k")]
    ours = ["flowbp_sparse", "flowbp_bridge", "flowbp_lagrange"]
    expected = [f"sd3_{row}" for row in rows] + [f"{backbone}_{row}" for backbone in ("flux", "flux2") for row in ours]
    assert sorted(path.stem for path in RECIPES) == sorted(expected)
