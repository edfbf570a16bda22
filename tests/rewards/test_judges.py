# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The judges on tiny models: HPSv3 against its own code (`golden/make_hpsv3.py`), UnifiedReward part by part."""

import json
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden.make_hpsv3 import BYTES, CHAT_TEMPLATE, CONFIG, PROMPTS, QUESTION, SPECIAL, weight
from safetensors.torch import load_file, save_file
from tiny_rewards import GOLDEN, QWEN_2_5_VL, save_qwen_processor, save_qwen_vl
from torch import Tensor
from toy_reward import make_reward

from flowbp.rewards import WeightedReward, judges, load_reward
from flowbp.rewards import hpsv3 as hpsv3_module
from flowbp.rewards.hpsv3 import REWARD_TOKEN, HPSv3, hpsv3, hpsv3_question
from flowbp.rewards.judges import (
    MAX_NEW_TOKENS,
    UnifiedReward,
    parse_score,
    unifiedreward_alignment,
    unifiedreward_quality,
)
from flowbp.rewards.preprocessing import to_pil_images


@pytest.fixture(autouse=True)
def _fresh_models() -> Iterator[None]:
    """Both names of UnifiedReward share a model, which some tests change."""
    yield
    judges._unifiedreward_model.cache_clear()


@pytest.fixture(scope="module")
def hpsv3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hpsv3")
    save_qwen_processor(folder, CONFIG)
    layout = json.loads((GOLDEN / "hpsv3.json").read_text())
    save_file({name: weight(name, tuple(shape)) for name, shape in layout.items()}, folder / "HPSv3.safetensors")
    return folder


@pytest.fixture(scope="module")
def judge(hpsv3_folder: Path) -> HPSv3:
    return hpsv3(hpsv3_folder, QUESTION, torch.float32)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "hpsv3.safetensors")


@pytest.fixture(scope="module")
def images(golden: dict[str, Tensor]) -> Tensor:
    return golden["pictures"].permute(0, 3, 1, 2) / 255


@pytest.fixture(scope="module")
def written_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny UnifiedReward: Qwen2.5-VL with random weights."""
    folder = tmp_path_factory.mktemp("unifiedreward")
    save_qwen_vl(folder, QWEN_2_5_VL)
    return folder


def make_it_say(reward: UnifiedReward, text: str) -> None:
    """Weights under which the model writes `text` whatever it sees: each byte's embedding leads to the next byte."""
    model, tokenizer = reward.model, reward.conversation.tokenizer
    newline = tokenizer("\n")["input_ids"][0]  # the last token of the question
    steps = [newline, *tokenizer(text)["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert len(set(steps[:-1])) == len(steps) - 1  # no byte twice, so that each has one successor
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = torch.nn.functional.normalize(torch.randn(CONFIG["vocab_size"], CONFIG["hidden_size"]))
        model.get_input_embeddings().weight.copy_(embeddings)
        model.lm_head.weight.zero_()
        for old, new in zip(steps, steps[1:], strict=False):
            model.lm_head.weight[new] = embeddings[old]


def test_hpsv3_scores_are_the_references(judge: HPSv3, images: Tensor, golden: dict[str, Tensor]) -> None:
    scores = judge(images, PROMPTS)
    assert scores.shape == (2,) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, golden["scores"][:, 0], rtol=0, atol=1e-5)
    assert golden["scores"][:, 0].diff().abs() > 1e-2


def test_hpsv3_inputs_are_the_references(judge: HPSv3, images: Tensor, golden: dict[str, Tensor]) -> None:
    pictures = to_pil_images("hpsv3", images, PROMPTS)
    pixels = []
    for number, (picture, prompt) in enumerate(zip(pictures, PROMPTS, strict=True)):
        inputs = judge.conversation([picture], QUESTION, prompt, torch.device("cpu"))
        real = golden["attention_mask"][number].bool()
        assert torch.equal(inputs["input_ids"][0], golden["input_ids"][number][real])
        assert torch.equal(inputs["image_grid_thw"][0], golden["image_grid_thw"][number])
        pixels.append(inputs["pixel_values"])
    torch.testing.assert_close(torch.cat(pixels)[::97], golden["pixel_values"], rtol=0, atol=1e-5)


def test_hpsv3_counts_positions_as_the_reference(judge: HPSv3, images: Tensor, golden: dict[str, Tensor]) -> None:
    """With Qwen2-VL's own positions of an image the score is another: the parity above could fail."""
    inputs = judge.conversation(to_pil_images("hpsv3", images, PROMPTS)[:1], QUESTION, PROMPTS[0], "cpu")
    with torch.no_grad():
        hidden = judge.model(**inputs).last_hidden_state[inputs["input_ids"] == judge.reward_token_id]
        first, second, third = judge.head
        score = third(second(first(hidden).relu()).relu())[0, 0]
    assert (score - golden["scores"][0, 0]).abs() > 1e-3


def test_a_batch_of_one_is_a_batch_of_many(judge: HPSv3, images: Tensor) -> None:
    alone = [judge(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)]
    assert torch.equal(torch.cat(alone), judge(images, PROMPTS))


def test_hpsv3_in_bfloat16_under_autocast_and_in_a_sum_with_offload(
    hpsv3_folder: Path, judge: HPSv3, images: Tensor, golden: dict[str, Tensor]
) -> None:
    half = hpsv3(hpsv3_folder, QUESTION)
    assert half.model.dtype == torch.bfloat16 and half.head[0].weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        scores = half(images, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, golden["scores"][:, 0], rtol=0, atol=0.05)
    red = load_reward(make_reward())
    summed = WeightedReward({"hpsv3": half, "red": red}, {"hpsv3": 0.5, "red": -2.0}, offload=True)
    found = []
    for reward in (judge, half, red, summed):
        leaf = images.clone().requires_grad_()
        scores = reward(leaf, PROMPTS)
        found.append((scores.detach(), torch.autograd.grad(scores.sum(), leaf)[0]))
    precise, alone, of_red, of_sum = found
    assert torch.cosine_similarity(precise[1].flatten(), alone[1].flatten(), dim=0) > 0.98
    for place in (0, 1):
        torch.testing.assert_close(of_sum[place], 0.5 * alone[place] - 2 * of_red[place])


def test_judges_refuse_to_give_a_gradient(written_folder: Path, images: Tensor) -> None:
    judge = unifiedreward_quality(written_folder, dtype=torch.float32)
    leaf = images.clone().requires_grad_()
    with pytest.raises(ValueError, match="images that require a gradient") as error:
        judge(leaf, PROMPTS)
    assert "\n" not in str(error.value) and "unifiedreward-quality" in str(error.value)
    with torch.no_grad():
        assert not judge(leaf, PROMPTS).requires_grad
    assert not any(parameter.requires_grad for parameter in judge.parameters())


def test_hpsv3_with_a_gradient_has_the_references_scores(judge: HPSv3, images: Tensor, golden: dict[str, Tensor]):
    """To the rounding to 8 bits that the reference makes and a gradient does without."""
    leaf = images.clone().requires_grad_()
    scores = judge(leaf, PROMPTS)
    torch.testing.assert_close(scores.detach(), golden["scores"][:, 0], rtol=0, atol=5e-4)
    (gradient,) = torch.autograd.grad(scores.sum(), leaf)
    direction = gradient / gradient.norm()
    ends = [judge((images + step * direction).clamp(0, 1).requires_grad_(), PROMPTS).sum() for step in (0.1, -0.1)]
    torch.testing.assert_close((ends[0] - ends[1]) / 0.2, gradient.norm(), rtol=0.02, atol=0)


def test_hpsv3_refuses_other_weights(hpsv3_folder: Path, tmp_path: Path) -> None:
    save_qwen_processor(tmp_path, CONFIG)
    weights = load_file(hpsv3_folder / "HPSv3.safetensors")
    weights["visual.blocks.7.norm1.weight"] = weights.pop("visual.blocks.1.norm1.weight")
    save_file(weights, tmp_path / "HPSv3.safetensors")
    with pytest.raises(ValueError, match=r"missing model\.visual\.blocks\.1\.norm1\.weight") as error:
        hpsv3(tmp_path, QUESTION)
    assert "MizzenAI/HPSv3" in str(error.value) and "\n" not in str(error.value)


def test_hpsv3_refuses_a_head_of_another_shape(hpsv3_folder: Path, tmp_path: Path) -> None:
    save_qwen_processor(tmp_path, CONFIG)
    weights = load_file(hpsv3_folder / "HPSv3.safetensors")
    weights["rm_head.5.weight"] = torch.zeros(1, 16)
    save_file(weights, tmp_path / "HPSv3.safetensors")
    with pytest.raises(ValueError, match=r"2\.weight of shape \(1, 16\) instead of \(2, 16\)"):
        hpsv3(tmp_path, QUESTION)


@pytest.mark.parametrize("question", ["no place for a prompt <|Reward|>", "{prompt} without the token"])
def test_hpsv3_refuses_a_question_without_its_parts(question: str) -> None:
    with pytest.raises(ValueError, match="question: expected"):
        hpsv3(question=question)


def test_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="MizzenAI/HPSv3"):
        hpsv3(tmp_path, QUESTION)
    with pytest.raises(FileNotFoundError, match="CodeGoat24/UnifiedReward-qwen-7b"):
        unifiedreward_quality(tmp_path)


def test_the_question_comes_from_the_authors_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, and with another text, the remedy is named; the package's code is never run."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps hpsv3==1\.0\.0"):
        hpsv3_question()
    file = tmp_path / "hpsv3" / "dataset" / "data_collator_qwen.py"
    file.parent.mkdir(parents=True)
    (tmp_path / "hpsv3" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    text = 'raise RuntimeError("run")\nINSTRUCTION = "Rate {text_prompt}."\nprompt_with_special_token = "<|Reward|>"\n'
    file.write_text(text)
    sys.path_importer_cache.pop(str(tmp_path), None)
    with pytest.raises(ValueError, match="another text"):
        hpsv3_question()
    digest = hpsv3_module.hashlib.sha256(b"Rate {text_prompt}.<|Reward|>").hexdigest()
    monkeypatch.setattr(hpsv3_module, "HPSV3_QUESTION_SHA256", digest)
    assert hpsv3_question() == "Rate {prompt}.<|Reward|>"


@pytest.mark.parametrize("name", ["unifiedreward-alignment", "unifiedreward-quality"])
def test_unifiedreward_by_name(written_folder: Path, images: Tensor, name: str) -> None:
    reward = load_reward(name, {name: written_folder})
    assert reward.name == name and reward.model.dtype == torch.bfloat16
    scores = reward(images.to(torch.bfloat16), PROMPTS)
    assert scores.shape == (2,) and scores.isnan().all() and reward.unparsed == 2  # random weights write no score


def test_unifiedreward_reads_the_score_that_is_written(written_folder: Path, images: Tensor) -> None:
    reward = unifiedreward_alignment(written_folder, dtype=torch.float32)
    make_it_say(reward, "Final Score:3")
    assert reward.answer(to_pil_images("x", images, PROMPTS)[0], PROMPTS[0]) == "Final Score:3"
    scores = reward(images, PROMPTS)
    assert scores.tolist() == [3.0, 3.0] and scores.dtype == torch.float32 and reward.unparsed == 0


def test_an_answer_without_a_score_is_nan_and_counted(
    written_folder: Path, images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    reward = unifiedreward_quality(written_folder, dtype=torch.float32)
    make_it_say(reward, "Fine. ")
    with caplog.at_level(logging.WARNING):
        scores = reward(images, PROMPTS)
    assert scores.isnan().all() and reward.unparsed == 2
    assert "2 answers" in caplog.text and "Fine. " in caplog.text and "unifiedreward-quality" in caplog.text


def test_unifiedreward_writes_what_greedy_decoding_writes(written_folder: Path, images: Tensor) -> None:
    """Random weights, and the model's own forward pass token by token instead of `generate`."""
    reward = unifiedreward_alignment(written_folder, "{prompt}?", torch.float32)
    picture = to_pil_images("x", images, PROMPTS)[0]
    inputs = reward.inputs(picture, PROMPTS[0])
    assert inputs["image_grid_thw"].tolist() == [[1, 36, 36]]  # 512 rounded to a multiple of 28, by 14
    start, written = inputs["input_ids"].shape[1], 12
    with torch.no_grad():
        for _ in range(written):
            following = reward.model(**inputs).logits[:, -1:].argmax(-1)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], following], dim=1)
            for name in ("attention_mask", "mm_token_type_ids"):
                last = torch.full_like(following, int(name == "attention_mask")).to(inputs[name].dtype)
                inputs[name] = torch.cat([inputs[name], last], dim=1)
    text = reward.conversation.tokenizer.decode(inputs["input_ids"][0, start:], skip_special_tokens=True)
    answer = reward.answer(picture, PROMPTS[0])
    assert answer.startswith(text) and len(text) > 0 and len(answer) <= MAX_NEW_TOKENS


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("The dog is there.\nFinal Score: 4", 4.0),
        ("final score:2.5 of 5", 2.5),
        ("Final Score: 5.0", 5.0),
        ("Final Score: seven", None),
        ("Final Score: 0", None),
        ("4", None),
    ],
)
def test_parse_score(answer: str, score: float | None) -> None:
    assert parse_score(answer) == score


def test_the_two_questions_differ_and_hold_the_prompt(written_folder: Path) -> None:
    rewards = [make(written_folder, dtype=torch.float32) for make in (unifiedreward_alignment, unifiedreward_quality)]
    assert rewards[0].question != rewards[1].question
    assert all(reward.question.count("{prompt}") == 1 and "Final Score:" in reward.question for reward in rewards)
    with pytest.raises(ValueError, match="where the prompt goes"):
        unifiedreward_alignment(written_folder, "How good?", torch.float32)


@pytest.mark.parametrize("token", ["<|image_pad|>", REWARD_TOKEN])
def test_a_prompt_with_a_special_token(judge: HPSv3, images: Tensor, token: str) -> None:
    with pytest.raises(ValueError, match="special token"):
        judge(images[:1], [f"a cat {token}"])


def test_bad_input(judge: HPSv3, images: Tensor) -> None:
    with pytest.raises(ValueError, match="expected a list of 2"):
        judge(images, PROMPTS[:1])
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        judge(images * math.nan, PROMPTS)


def test_a_chat_template_in_the_file_of_older_versions(hpsv3_folder: Path, tmp_path: Path) -> None:
    save_qwen_processor(tmp_path, CONFIG)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "HPSv3.safetensors").write_bytes((hpsv3_folder / "HPSv3.safetensors").read_bytes())
    with pytest.raises(ValueError, match="expected a chat template"):
        hpsv3(tmp_path, QUESTION)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    assert hpsv3(tmp_path, QUESTION).conversation.tokenizer.chat_template == CHAT_TEMPLATE
    (tmp_path / "chat_template.jinja").write_text("for text alone")
    assert hpsv3(tmp_path, QUESTION).conversation.tokenizer.chat_template == CHAT_TEMPLATE


def test_the_reward_token_is_the_one_that_the_weights_know(judge: HPSv3) -> None:
    assert judge.reward_token_id == BYTES + len(SPECIAL) == len(judge.model.get_input_embeddings().weight) - 1


def test_both_unifiedrewards_ask_one_model(written_folder: Path) -> None:
    names = ("unifiedreward-alignment", "unifiedreward-quality")
    first, second = (load_reward(name, {name: written_folder}) for name in names)
    assert first.model is second.model
