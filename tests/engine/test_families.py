# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The matrix: every family's pipeline against the stock pipeline as oracle, or refused for the stated reason."""

import functools
import inspect
import re
from pathlib import Path

import diffusers
import pytest
from diffusers import DiffusionPipeline
from families import FAMILIES
from families.family import Case, added
from families.oracle import try_case
from matrix import BOUND, DOCUMENT, MARKERS, by_class, is_verified, left_out, models, reason, uncovered, verified_in

from flowbp.verified_pipelines import VERIFIED_PIPELINES

README = Path(__file__).parents[2] / "README.md"


@functools.lru_cache(maxsize=1)
def built(number: int) -> tuple[DiffusionPipeline, list[Case]]:
    pipe = FAMILIES[number].build()
    return pipe, FAMILIES[number].cases(pipe)


@pytest.mark.parametrize("number", range(len(FAMILIES)), ids=[family.name for family in FAMILIES])
def test_gradient_is_the_stock_pipelines_or_refused(number: int) -> None:
    pipe, cases = built(number)
    assert type(pipe).__name__ == FAMILIES[number].pipeline
    for case in cases:
        outcome = try_case(pipe, case)
        if case.refused is not None:
            assert outcome.refused is not None and re.search(case.refused, outcome.refused), outcome
            assert outcome.refused.startswith(type(pipe).__name__) and "\n" not in outcome.refused
            assert reason(outcome.refused)  # the table has words for it
            continue
        assert outcome.refused is None, outcome
        assert outcome.difference < BOUND, outcome
        # Without gradients from step to step the comparison could not see a wrong coupling.
        assert outcome.coupling > 1e-2, outcome
        if case.unconditional_refused is not None:
            assert re.search(case.unconditional_refused, outcome.conditional_refused), outcome
        elif case.unconditional is not None:
            assert outcome.conditional_refused is None, outcome
            assert outcome.conditional_difference < BOUND, outcome


def test_enough_families_are_verified() -> None:
    verified = [family for family in FAMILIES if is_verified(family)]
    names = {family.pipeline for family in verified}
    assert len(names) >= 105
    assert {"QwenImagePipeline", "ZImagePipeline", "Lumina2Pipeline", "Krea2Pipeline"} <= names
    assert len([family for family in verified if family.output == "video"]) >= 2
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_every_pipeline_of_diffusers_is_in_the_matrix() -> None:
    """Whatever it takes: a transformer pipeline is a family, or it is left out by name and with a reason."""
    added("0.42", "BriaFibo2Pipeline")  # older ones still have pipelines under former names
    assert uncovered() == []
    assert all(hasattr(diffusers, name) for name in left_out())
    assert not left_out() & set(by_class())
    # As long as its own call fails.
    call_takes = inspect.signature(diffusers.EasyAnimateControlPipeline.encode_prompt).parameters
    assert "text_encoder_index" not in call_takes


def test_the_document_shows_the_matrix() -> None:
    shown = DOCUMENT.read_text(encoding="utf-8")
    table = shown[shown.index(MARKERS[0]) : shown.index(MARKERS[1])]
    rows = [line.strip("| ").split(" | ")[:4] for line in table.splitlines() if line.startswith("| `")]
    expected = []
    for pipeline, families in by_class().items():
        cases = [case for family in families for case in family.cases(family.build())]
        verified = list(dict.fromkeys(case.label for case in cases if case.refused is None))
        state = "verified" if verified else "refused"
        expected.append([f"`{pipeline}`", models(families), state, "; ".join(verified) or "-"])
    assert rows == expected
    # The list that the scripts read, and README's sentence.
    assert set(verified_in(table)) == VERIFIED_PIPELINES
    assert f"{len(VERIFIED_PIPELINES)} of {len(rows)} pipeline classes" in README.read_text(encoding="utf-8")


def test_variants_are_not_models_of_their_own() -> None:
    assert models(by_class()["SanaPipeline"]) == "Sana"
    assert models(by_class()["WanPipeline"]) == "Wan 2.1, Wan 2.2, Wan 2.2 5B"


@pytest.mark.parametrize("frozen", ["transformer", "transformer_2"])
def test_one_of_two_transformers_may_be_trained(frozen: str) -> None:
    """The other one of Wan 2.2 still passes gradients from step to step."""
    family = next(family for family in FAMILIES if family.name == "Wan 2.2")
    pipe = family.build()
    getattr(pipe, frozen).requires_grad_(False)
    for case in family.cases(pipe):
        outcome = try_case(pipe, case)
        assert outcome.difference < BOUND and outcome.coupling > 1e-2, outcome
        if case.unconditional is not None:
            assert outcome.conditional_difference < BOUND, outcome
