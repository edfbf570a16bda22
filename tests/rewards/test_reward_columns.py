# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Columns of the prompts' table reach every kind of reward that has a place for them, sample by sample."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tiny_sd3 import tiny_sd3_pipeline
from toy_reward import make_reward

from flowbp import FlowBPCallback, get_method
from flowbp.columns import call_with_columns
from flowbp.rewards import check_columns, load_reward

IMAGES = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]
COLUMNS = {"share": [1.0, 10.0, 100.0], "name": ["x", "y", "z"]}
MEANS = IMAGES.flatten(1).mean(1)
SHARES = torch.tensor(COLUMNS["share"])


def named(images: torch.Tensor, prompts: Sequence[str], share: list[float]) -> torch.Tensor:
    assert len(share) == len(prompts) == len(images)
    return images.flatten(1).mean(1) * torch.tensor(share)


def optional(images: torch.Tensor, prompts: Sequence[str], *, share: list[float] | None = None) -> torch.Tensor:
    return images.flatten(1).mean(1) if share is None else named(images, prompts, share)


def whole(images: torch.Tensor, prompts: Sequence[str], **columns: list[Any]) -> torch.Tensor:
    assert columns.keys() == COLUMNS.keys() or not columns
    return optional(images, prompts, **{key: columns[key] for key in columns if key == "share"})


def without(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return images.flatten(1).mean(1)


class Module(torch.nn.Module):
    def forward(self, pictures: torch.Tensor, texts: Sequence[str], share: list[float]) -> torch.Tensor:
        return named(pictures, texts, share)


class Instance:
    def __call__(self, images: torch.Tensor, prompts: Sequence[str], share: list[float]) -> torch.Tensor:
        return named(images, prompts, share)


KINDS: dict[str, tuple[Callable[..., torch.Tensor], torch.Tensor]] = {
    "named": (named, MEANS * SHARES),
    "optional": (optional, MEANS * SHARES),
    "**columns": (whole, MEANS * SHARES),
    "lambda": (lambda images, prompts, share: named(images, prompts, share), MEANS * SHARES),
    "module": (Module(), MEANS * SHARES),
    "instance": (Instance(), MEANS * SHARES),
    "bound argument": (functools.partial(named, share=[2.0, 2.0, 2.0]), MEANS * 2),
    "no place": (without, MEANS),
    "built in": (make_reward(), make_reward()(IMAGES, PROMPTS)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offload", [False, True])
def test_a_reward_gets_the_columns_that_it_has_a_place_for(kind: str, offload: bool):
    reward, expected = KINDS[kind]
    torch.testing.assert_close(call_with_columns(reward, IMAGES, PROMPTS, COLUMNS), expected)
    # A sum of one part with offload; with a gradient it is differentiated part by part.
    module = load_reward(reward, offload=offload)
    torch.testing.assert_close(module(IMAGES, PROMPTS, **COLUMNS), expected)
    images = IMAGES.clone().requires_grad_()
    scores = module(images, PROMPTS, **COLUMNS)
    torch.testing.assert_close(scores.detach(), expected)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    leaf = IMAGES.clone().requires_grad_()
    scores = call_with_columns(reward, leaf, PROMPTS, COLUMNS)
    torch.testing.assert_close(gradient, torch.autograd.grad(scores.sum(), leaf)[0])


PARTS = """
def first():
    return lambda images, prompts, share: images.flatten(1).mean(1) * images.new_tensor(share)

def second():
    return lambda images, prompts, name: 0 * images.sum((1, 2, 3)) + images.new_tensor([ord(each) for each in name])
"""


def test_each_part_of_a_sum_gets_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path):
    (tmp_path / "parts_of_a_sum.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    reward = load_reward("parts_of_a_sum:first:2,parts_of_a_sum:second:1,toy_reward:make_held_out_reward")
    codes = torch.tensor([120.0, 121.0, 122.0])
    for images in (IMAGES, IMAGES.clone().requires_grad_()):
        expected = 2 * MEANS * SHARES + codes + MEANS
        torch.testing.assert_close(reward(images, PROMPTS, **COLUMNS).detach(), expected)
    torch.testing.assert_close(reward.parts(IMAGES, PROMPTS, **COLUMNS)["parts_of_a_sum:second"], codes)
    rows = [dict(zip(COLUMNS, values, strict=True)) for values in zip(*COLUMNS.values(), strict=True)]
    assert list(check_columns(reward, PROMPTS, rows, "p")) == ["share", "name"]


@pytest.mark.parametrize("samples_per_decode", [None, 1])
@pytest.mark.parametrize(("method", "repeats"), [("draft-k", 1), ("draft-lv", 1), ("draft-lv", 2)])
def test_columns_are_cut_with_the_samples(method: str, repeats: int, samples_per_decode: int | None):
    """In chunks, for copies, and where several images in a row have one prompt."""
    pipe = tiny_sd3_pipeline()
    pipe.transformer.requires_grad_(True)
    callback = FlowBPCallback(get_method(method), samples_per_decode=samples_per_decode)
    prompts, columns = ["a", "b"], {"share": [1.0, 10.0], "name": ["x", "y"]}
    call = {"num_inference_steps": 3, "height": 8, "width": 8, "max_sequence_length": 16, "output_type": "pt"}
    with callback.record(pipe):
        images = [pipe(prompts, num_images_per_prompt=repeats, **call).images for _ in range(1 + callback.copies)]
    seen: list[tuple[str, float, str]] = []

    def reward(images: torch.Tensor, prompts: Sequence[str], share: list[float], name: list[str]) -> torch.Tensor:
        seen.extend(zip(prompts, share, name, strict=True))
        return named(images, prompts, share)

    out = callback.backward(reward, torch.cat(images), prompts, columns=columns)
    a, b = ("a", 1.0, "x"), ("b", 10.0, "y")
    assert seen == ([a] * repeats + [b] * repeats) * (1 + callback.copies)
    shares = torch.tensor([share for _, share, _ in seen])
    torch.testing.assert_close(out.rewards, torch.cat(images).detach().flatten(1).mean(1) * shares)


def test_columns_of_another_length_and_columns_of_computed_rewards_are_refused():
    pipe = tiny_sd3_pipeline()
    pipe.transformer.requires_grad_(True)
    callback = FlowBPCallback(get_method("draft-k"))
    call = {"num_inference_steps": 2, "height": 8, "width": 8, "max_sequence_length": 16, "output_type": "pt"}
    with callback.record(pipe):
        images = pipe(["a", "b"], **call).images
    for values in ([1.0], "ab", [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match="Expected a list of 2 values of the column 'share'"):
            callback.backward(named, images, ["a", "b"], columns={"share": values})
    with pytest.raises(ValueError, match="need no images, prompts and columns"):
        callback.backward(images.flatten(1).mean(1), columns={"share": [1.0, 2.0]})


NO_VALUE = (
    "reward 'named': its parameter 'share' needs a column of that name, but --prompts has no value for the prompt"
)


@pytest.mark.parametrize(
    ("reward", "rows", "expected"),
    [
        (
            named,
            [{}, {}, {}],
            f"{NO_VALUE} 'a'; columns of text, numbers or truth values there: none. Add it, or give",
        ),
        (named, [{"name": "x"}] * 3, f"{NO_VALUE} 'a'; columns of text, numbers or truth values there: name."),
        (named, [{"share": 1.0}, {"share": 0.0}, {"share": None}], f"{NO_VALUE} 'c'"),
        (named, [{"share": 1.0}, {"name": "x"}, {"share": 1.0}], f"{NO_VALUE} 'b'"),
        (
            whole,
            [{"images": 1}] * 3,
            "reward 'whole': expected columns with other names than its parameters.*'images'",
        ),
        (whole, [{"prompts": 1}] * 3, "got 'prompts' in --prompts; rename the column"),
        (whole, [{"self": 1}] * 3, "got 'self' in --prompts"),
        (named, [{"share": 1.0, "prompts": "x"}] * 3, ["share"]),
        (optional, [{}, {}, {}], []),
        (optional, [{"share": 1.0}, {}, {}], ["share"]),
        (whole, [{"share": 1.0, "name": "x"}] * 3, ["share", "name"]),
        (without, [{"prompts": 1}] * 3, []),
        (Module(), [{"share": 1.0, "images": 1}] * 3, ["share"]),
    ],
)
def test_what_a_table_lacks_is_refused(reward: Callable[..., Any], rows: list[dict[str, Any]], expected: str | list):
    if isinstance(expected, list):
        assert list(check_columns(load_reward(reward), PROMPTS, rows, "--prompts")) == expected
        return
    with pytest.raises(ValueError, match=expected) as caught:
        check_columns(load_reward(reward, offload=True), PROMPTS, rows, "--prompts")
    assert "\n" not in str(caught.value)
