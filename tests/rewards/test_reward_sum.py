# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of rewards: one part's graph at a time, offloading, and what a training script logs of the parts."""

import json
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_sd3 import tiny_sd3_pipeline
from torch import Tensor, nn
from training_scripts import SHARED_ARGUMENTS, command_line, load_script, log_of

from flowbp.rewards import WeightedReward, load_reward, part_means
from flowbp.rewards.ocr import OCRReward, quoted_text
from flowbp.training.prompts import load_prompts, load_records, texts_of

WEIGHTS = {"a": 2.0, "b": -0.5, "c": 1.0}


class Saved:
    """A tensor that a graph keeps for its backward pass; the graph drops it when it is freed."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


@contextmanager
def watch_graphs() -> Iterator[weakref.WeakSet]:
    """All that graphs keep at the moment."""
    alive: weakref.WeakSet = weakref.WeakSet()

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield alive


class Small(nn.Module):
    """A differentiable reward; it writes down when it scores and where its weights are moved."""

    def __init__(self, seed: int, journal: list | None = None):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3, 4, 4, generator=generator), requires_grad=False)
        self.journal, self.seed = [] if journal is None else journal, seed

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.journal.append((self.seed, "score"))
        features = torch.tanh(images * self.weight.to(images))
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        return features.pow(2).sum((1, 2, 3)) * lengths

    def _apply(self, fn, recurse=True):
        # What `.to` does in the end; on the meta device it tells where the weights would go.
        self.journal.append((self.seed, "move", fn(self.weight.detach()).device.type))
        return super()._apply(fn, recurse)


@pytest.fixture
def images():
    return torch.rand(3, 3, 4, 4)


PROMPTS = ["one", "a", "three words here"]


def make(**options) -> tuple[WeightedReward, list]:
    journal: list = []
    rewards = {name: Small(seed, journal) for seed, name in enumerate(WEIGHTS)}
    return WeightedReward(rewards, WEIGHTS, **options), journal


def gradient_of(reward, images: Tensor, cotangent: Tensor | None = None) -> tuple[Tensor, Tensor]:
    images = images.detach().requires_grad_()
    scores = reward(images, PROMPTS)
    cotangent = torch.ones_like(scores) if cotangent is None else cotangent
    return scores.detach(), torch.autograd.grad(scores, images, cotangent)[0]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gradient_is_that_of_the_sum(images, offload, dtype):
    reward, _ = make(offload=offload)
    cotangent = torch.tensor([1.0, -2.0, 0.25])
    images = images.to(dtype)

    def together(images, prompts):
        return sum(weight * Small(seed)(images, prompts) for seed, weight in enumerate(WEIGHTS.values()))

    precise = images.to(torch.promote_types(dtype, torch.float32))
    expected, expected_gradient = gradient_of(together, precise, cotangent)
    scores, gradient = gradient_of(reward, images, cotangent)
    assert gradient.dtype == dtype and not scores.requires_grad
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(gradient, expected_gradient.to(dtype))
    with torch.no_grad():
        torch.testing.assert_close(reward(precise, PROMPTS), expected)


def test_one_graph_is_alive_at_a_time(images):
    counts: list[int] = []

    class Counting(Small):
        def forward(self, images, prompts):
            counts.append(len(alive))
            return super().forward(images, prompts)

    images.requires_grad_()
    with watch_graphs() as alive:
        reward = WeightedReward({name: Counting(seed) for seed, name in enumerate(WEIGHTS)}, WEIGHTS)
        scores = reward(images, PROMPTS)
        assert counts == [0, 0, 0]
        assert [tuple(saved.tensor.shape) for saved in alive] == [(3, 3, 4, 4)]  # the gradient, after the sum
        scores.sum().backward()
        # The plain sum: each part meets the graphs of those before it.
        counts.clear()
        parts = [Counting(seed)(images, PROMPTS) for seed in range(3)]
        assert counts[1] > counts[0] and counts[2] - counts[1] == counts[1] - counts[0]
        del parts


def test_scores_of_the_parts_are_kept(images):
    reward, _ = make()
    expected = {name: Small(seed)(images, PROMPTS) for seed, name in enumerate(WEIGHTS)}
    for needed in (False, True):
        reward(images.requires_grad_(needed), PROMPTS)
        assert list(reward.last_scores) == list(WEIGHTS)
        for name, score in reward.last_scores.items():
            assert not score.requires_grad
            torch.testing.assert_close(score, expected[name])
    parts = reward.parts(images, PROMPTS)
    for name, score in parts.items():
        torch.testing.assert_close(score, expected[name])


def test_means_are_over_what_was_differentiated(images):
    reward, _ = make()
    assert part_means(reward) == {}
    images.requires_grad_()
    whole = Small(0)(images, PROMPTS).detach()
    reward(images[:2], PROMPTS[:2])  # in two calls, as samples_per_decode makes them
    reward(images[2:], PROMPTS[2:])
    with torch.no_grad():
        reward(images, PROMPTS)  # a validation in between does not count
    means = part_means(reward)
    assert list(means) == list(WEIGHTS)
    assert means["a"] == pytest.approx(whole.mean().item())
    assert part_means(reward) == {}  # they were taken
    assert part_means(Small(0)) == {}


def test_second_derivatives_are_refused(images):
    reward, _ = make()
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


def test_finite_differences(images):
    reward, _ = make()
    assert torch.autograd.gradcheck(lambda x: reward(x, PROMPTS), images.double().requires_grad_())


def test_autocast_reaches_the_parts(images):
    class Product(nn.Module):
        def forward(self, images, prompts):
            product = images.flatten(1) @ torch.ones(48, 1)
            self.dtype = product.dtype
            return product.float().squeeze(1)

    part = Product()
    reward = WeightedReward({"a": part}, {"a": 1.0})
    _, expected = gradient_of(reward, images)
    assert part.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        _, gradient = gradient_of(reward, images)
    assert part.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, expected)


# Offloading


def test_offloaded_parts_work_in_turn_and_wait_on_the_cpu(images):
    reward, journal = make(offload=True)
    reward.to("meta")  # what a script does with its device
    assert not journal and not list(reward.parameters())
    visits = [(seed, event) for seed in range(3) for event in ("move", "score", "move")]
    for needed in (True, False):
        journal.clear()
        reward(images.requires_grad_(needed), PROMPTS)
        assert [entry[:2] for entry in journal] == visits
    journal.clear()
    reward.parts(images, PROMPTS)
    assert [entry[:2] for entry in journal] == visits


def test_an_offloaded_part_goes_where_the_images_are():
    # On the meta device nothing is computed, so it stands for a GPU here.
    reward, journal = make(offload=True)
    with pytest.raises(NotImplementedError):  # weights cannot come back from meta
        reward(torch.rand(3, 3, 4, 4, device="meta"), PROMPTS)
    assert journal[0] == (0, "move", "meta")


def test_without_offload_parts_follow_the_sum():
    reward, journal = make()
    reward.to(torch.float64)
    assert [entry[:2] for entry in journal] == [(seed, "move") for seed in range(3)]
    assert {parameter.dtype for parameter in reward.parameters()} == {torch.float64}


def test_an_offloaded_part_goes_back_when_it_fails(images):
    reward, journal = make(offload=True)
    with pytest.raises(RuntimeError):
        reward(images[..., :3], PROMPTS)
    assert journal[-1] == (0, "move", "cpu")


def test_one_offloaded_reward(images):
    reward = load_reward("toy_reward:make_reward", offload=True)
    assert isinstance(reward, WeightedReward) and reward.offload
    images.requires_grad_()
    plain = load_reward("toy_reward:make_reward")
    torch.testing.assert_close(gradient_of(reward, images), gradient_of(plain, images))


@pytest.mark.parametrize("offload", [False, True])
def test_users_rewards_are_frozen_and_without_dropout(offload, tmp_path, monkeypatch):
    (tmp_path / "reward_with_dropout.py").write_text(
        "import torch\n\n\nclass Reward(torch.nn.Sequential):\n"
        "    def __init__(self):\n        super().__init__(torch.nn.Conv2d(3, 1, 4), torch.nn.Dropout(0.5))\n\n"
        "    def forward(self, images, prompts):\n        return super().forward(images).mean((1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for spec in ("reward_with_dropout:Reward", "reward_with_dropout:Reward:2"):
        reward = load_reward(spec, offload=offload)
        parts = list(reward._parts.values()) if isinstance(reward, WeightedReward) else [reward]
        for part in parts:
            assert not any(module.training for module in part.modules())
            assert not any(parameter.requires_grad for parameter in part.parameters())


# Parts that cannot be trained with, or are no rewards


def test_a_part_without_a_gradient_is_refused(images):
    class Part(nn.Module):
        def forward(self, images, prompts):
            return images.detach().mean((1, 2, 3))

    reward = WeightedReward({"a": Small(0), "judge": Part()}, {"a": 1.0, "judge": 1.0})
    with pytest.raises(ValueError, match="^reward 'judge': expected scores with a gradient in the images") as error:
        reward(images.requires_grad_(), PROMPTS)
    assert "\n" not in str(error.value)


# The text that ocr looks for, from a column


def write_table(folder: Path, rows: list[dict]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    {"prompt": "a red sign ", "text": " 42", "other": 1},
    {"prompt": 'a "blue" sign', "text": "17", "other": 2},
    {"prompt": " ", "text": "9", "other": 3},
    {"prompt": "a red sign", "text": "42", "other": 4},
]


def test_texts_of_a_column(tmp_path):
    path = write_table(tmp_path, ROWS)
    texts = texts_of(load_records(str(path)), "text", "p")
    assert texts == {"a red sign": "42", 'a "blue" sign': "17"}
    assert set(texts) == set(load_prompts(str(path)))
    rows = [{"prompt": "p", "caption": "c", "text": "t"}]
    records = load_records(str(write_table(tmp_path, rows)), column="caption")
    assert texts_of(records, "text", "p") == {"c": "t"}


@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        (ROWS, "sign", "has no column 'sign' beside its prompts: choose one of text, other"),
        (ROWS, "other", "expected text"),
        ([*ROWS, {"prompt": "a red sign", "text": "43", "other": 5}], "text", "has both '42' and '43' for the prompt"),
        ([*ROWS, {"prompt": "another", "text": " ", "other": 5}], "text", "has nothing for the prompt 'another'"),
    ],
)
def test_bad_columns_of_texts_are_refused(tmp_path, rows, column, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        texts_of(load_records(str(write_table(tmp_path, rows))), column, "p")
    assert "\n" not in str(error.value)


def test_ocr_looks_for_the_text_of_the_column():
    texts = {"a red sign": "42", 'a "blue" sign': "17"}
    reward, plain = load_reward("ocr", texts=texts), OCRReward("v4")
    images = torch.rand(2, 3, 48, 96)
    prompts = list(texts)
    quoted = [f'a "{text}"' for text in texts.values()]
    assert [quoted_text(prompt) for prompt in quoted] == [reward.text_of(prompt) for prompt in prompts]
    torch.testing.assert_close(reward(images, prompts), plain(images, quoted))
    assert torch.equal(reward.exact(images, prompts), plain.exact(images, quoted))
    with pytest.raises(ValueError, match="expected one of the 2 that have texts, got 'a \"42\"'"):
        reward(images[:1], ['a "42"'])


# Through a training script


def test_a_script_trains_with_a_sum_and_logs_its_parts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "support")
    script = load_script("train_flowbp_sd3")
    model = tmp_path / "model"
    tiny_sd3_pipeline(torch.float32).save_pretrained(model)
    prompts = write_table(tmp_path, [{"prompt": f"a sign {number}", "text": str(number)} for number in range(3)])
    arguments = SHARED_ARGUMENTS | {
        "pretrained_model_name_or_path": model,
        "prompts": prompts,
        "resolution": 16,
        "max_sequence_length": 16,
        "method": "flowbp-sparse",
        "num_active": 2,
        "samples_per_decode": 1,
    }
    spec = "toy_reward:make_reward:0.5,ocr:0.25"
    runs = {
        "sum": {"reward": spec, "reward_text_column": "text"},
        "offloaded": {"reward": spec, "reward_text_column": "text", "reward_offload": True},
    }
    for name, changes in runs.items():
        script.main(command_line(arguments, output_dir=tmp_path / name, **changes))
    logs = {name: log_of(tmp_path / name) for name in runs}
    for row in logs["sum"]:
        parts = {key.removeprefix("reward/"): value for key, value in row.items() if key.startswith("reward/")}
        assert list(parts) == ["toy_reward:make_reward", "ocr"]
        total = 0.5 * parts["toy_reward:make_reward"] + 0.25 * parts["ocr"]
        assert row["reward"] == pytest.approx(total, rel=1e-4) and parts["ocr"] < 0
    for one, other in zip(logs["sum"], logs["offloaded"], strict=True):
        measured = {key for key in one if key.startswith(("seconds", "memory"))}
        assert {key: one[key] for key in one.keys() - measured} == {key: other[key] for key in other.keys() - measured}
