# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""GenEval: its rules on detections made by hand, its models on tiny random ones."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from tiny_rewards import GENEVAL_METADATA as METADATA
from tiny_rewards import tiny_clip, tiny_detector
from transformers import (
    CLIPImageProcessorPil,
    Mask2FormerImageProcessorPil,
)

from flowbp.rewards import load_reward
from flowbp.rewards.geneval import (
    CLASSES,
    COLORS,
    COUNTING_THRESHOLD,
    MAX_OBJECTS,
    TASKS,
    THRESHOLD,
    Box,
    Detection,
    GenEval,
    find_objects,
    geneval,
    judge,
    read_metadata,
    relations,
)
from flowbp.rewards.tokens import Tokens

BY_TASK = {entry["tag"]: entry for entry in METADATA}


def detection(box: Box = (0, 0, 4, 4), score: float = 0.95) -> Detection:
    return Detection(box, score, np.ones((8, 8), dtype=bool))


def decide(task: str, objects: dict[str, Sequence[Detection]], colors: dict[str, list[str]] | None = None) -> Any:
    """A verdict with the colours of each class given; a class whose colour nobody should ask for has none."""
    return judge(BY_TASK[task], objects, lambda name, found: colors[name][: len(found)])


@pytest.fixture
def metadata_file(tmp_path: Path) -> Path:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, METADATA)) + "\n")
    return path


def test_single_object() -> None:
    assert decide("single_object", {"dog": [detection()]}).correct
    assert decide("single_object", {"dog": [detection()] * 3, "cat": [detection()]}).correct  # more is no fault
    verdict = decide("single_object", {"cat": [detection()]})
    assert not verdict.correct and verdict.reasons == ("expected 1 dog, found 0",)


def test_two_objects() -> None:
    assert decide("two_object", {"dog": [detection()], "tv remote": [detection()]}).correct
    assert not decide("two_object", {"dog": [detection()] * 2}).correct
    assert len(decide("two_object", {}).reasons) == 2


@pytest.mark.parametrize(("number", "correct"), [(0, False), (2, False), (3, True), (4, False), (5, False)])
def test_counting_is_exact(number: int, correct: bool) -> None:
    assert decide("counting", {"cat": [detection()] * number}).correct is correct


def test_colors_of_the_best_objects_only() -> None:
    cars = [detection(), detection(score=0.5)]
    assert decide("colors", {"car": cars[:1]}, {"car": ["pink"]}).correct
    assert decide("colors", {"car": cars}, {"car": ["pink", "red"]}).correct
    verdict = decide("colors", {"car": cars}, {"car": ["red", "pink"]})  # the best one is red
    assert verdict.reasons == ("expected 1 pink car, found red",)
    assert not decide("colors", {}).correct  # and nobody asks for the colour of nothing


def test_color_attribution_does_not_swap() -> None:
    objects = {"cup": [detection()], "bowl": [detection()]}
    assert decide("color_attr", objects, {"cup": ["red"], "bowl": ["green"]}).correct
    assert len(decide("color_attr", objects, {"cup": ["green"], "bowl": ["red"]}).reasons) == 2
    assert len(decide("color_attr", objects, {"cup": ["red"], "bowl": ["red"]}).reasons) == 1


def test_position() -> None:
    left, right = detection((0, 10, 10, 20)), detection((50, 10, 60, 20))
    assert decide("position", {"dog": [left], "cat": [right]}).correct
    assert "right of" in decide("position", {"dog": [right], "cat": [left]}).reasons[0]
    assert "neither side" in decide("position", {"dog": [left], "cat": [left]}).reasons[0]
    assert decide("position", {"dog": [left, right], "cat": [right]}).correct  # the best dog alone is looked at
    missing = decide("position", {"dog": [left]})
    assert missing.reasons == ("expected 1 cat, found 0", "nothing for dog to be left of")


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((-30, 0, -20, 10), {"left of"}),
        ((30, 0, 40, 10), {"right of"}),
        ((0, -30, 10, -20), {"above"}),  # rows count downwards
        ((0, 30, 10, 40), {"below"}),
        ((-30, 30, -20, 40), {"left of", "below"}),
        ((0, 0, 10, 10), set()),
        ((2, 0, 12, 10), set()),  # 2 apart, and a tenth of 10 + 10
        ((4, 0, 14, 10), set()),  # (4 - 2) / 4 is not beyond one half
        ((5, 0, 15, 10), {"right of"}),  # (5 - 2) / 5
        ((30, 60, 40, 70), {"below"}),  # (30 - 2) / 67 and (60 - 2) / 67
    ],
)
def test_relations(box: Box, expected: set[str]) -> None:
    assert relations(box, (0, 0, 10, 10)) == expected


def logits_for(objects: list[tuple[str, float, float]], queries: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a detector that sees these (class, probability, mask logit), each in its own row of an image."""
    probabilities = torch.full((queries, len(CLASSES) + 1), 1e-9)
    masks = torch.full((queries, queries, 6), -5.0)
    for row, (name, probability, logit) in enumerate(objects):
        probabilities[row, CLASSES.index(name)] = probability
        probabilities[row, -1] = 1 - probability
        masks[row, row, 1:4] = logit
    probabilities[len(objects) :, -1] = 1
    return probabilities.log(), masks


def test_an_object_is_a_mask_with_its_box_and_score() -> None:
    objects = find_objects(*logits_for([("dog", 0.8, 1.0), ("dog", 0.9, 3.0), ("cat", 0.7, 0.1)]), counting=False)
    assert list(objects) == ["dog", "cat"]
    best, second = objects["dog"]
    assert best.box == (1, 1, 4, 2) and second.box == (1, 0, 4, 1) and objects["cat"][0].box == (1, 2, 4, 3)
    assert best.mask.shape == (20, 6) and best.mask.sum() == 3 and best.mask[1, 1:4].all()
    for found, probability, logit in ((best, 0.9, 3.0), (second, 0.8, 1.0), (objects["cat"][0], 0.7, 0.1)):
        assert found.score == pytest.approx(probability * torch.tensor(logit).sigmoid().item(), abs=1e-5)


def test_thresholds() -> None:
    sure, likely, unlikely = ("cat", 0.99, 9.0), ("cat", 0.85, 9.0), ("cat", 0.29, 9.0)
    faint = ("cat", 0.5, 0.1)  # 0.5 x 0.52
    logits = logits_for([sure, likely, unlikely, faint])
    assert [len(find_objects(*logits, counting)["cat"]) for counting in (False, True)] == [2, 1]
    assert (THRESHOLD, COUNTING_THRESHOLD) == (0.3, 0.9)


def test_sixteen_of_a_class_are_kept() -> None:
    objects = find_objects(*logits_for([("dog", 0.5 + 0.02 * number, 9.0) for number in range(20)]), counting=False)
    scores = [found.score for found in objects["dog"]]
    assert len(scores) == MAX_OBJECTS == 16 and scores == sorted(scores, reverse=True) and scores[0] > 0.87


def test_one_query_may_be_two_objects() -> None:
    """As in the reference, where the best pairs of a query and a class count."""
    class_logits, masks = logits_for([("dog", 0.45, 9.0)])
    class_logits[0, CLASSES.index("sheep")] = class_logits[0, CLASSES.index("dog")]
    assert set(find_objects(class_logits.log_softmax(-1), masks, counting=False)) == {"dog", "sheep"} - set()


def test_metadata(metadata_file: Path) -> None:
    metadata = read_metadata(metadata_file)
    assert list(metadata.values()) == METADATA and tuple(entry["tag"] for entry in metadata.values()) == TASKS
    assert len(CLASSES) == 80 == len(set(CLASSES)) and len(COLORS) == 10


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 7"),
        ('{"tag": "colors"}', "KeyError"),
        ("[1]", "TypeError"),
        (json.dumps({**METADATA[0], "tag": "colours"}), "tag 'colours'"),
        (json.dumps({**METADATA[0], "include": [{"class": "dragon", "count": 1}]}), "the class 'dragon'"),
        (json.dumps({**METADATA[0], "include": [{"class": "dog", "count": 0}]}), "the count 0"),
        (json.dumps({**METADATA[3], "include": [{"class": "car", "count": 1, "color": "teal"}]}), "the color 'teal'"),
        (json.dumps({**METADATA[4], "include": METADATA[4]["include"][::-1]}), "the position"),
        (json.dumps({**METADATA[0], "include": METADATA[1]["include"]}), "another meaning"),
    ],
)
def test_bad_metadata(metadata_file: Path, line: str, message: str) -> None:
    metadata_file.write_text(metadata_file.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message) as error:
        read_metadata(metadata_file)
    assert "line 7" in str(error.value) and "\n" not in str(error.value)


def test_no_metadata(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected metadata_path.*djghosh13/geneval"):
        geneval()
    with pytest.raises(FileNotFoundError, match="djghosh13/geneval"):
        geneval(tmp_path / "nothing.jsonl")


@pytest.fixture(scope="module")
def reward() -> GenEval:
    torch.manual_seed(0)
    clip, tokenizer = tiny_clip()
    for name, parameter in clip.named_parameters():  # of a size at which captions and pictures differ
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.5)
    metadata = {entry["prompt"]: entry for entry in METADATA}
    image_processor = Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})
    return GenEval(tiny_detector(), image_processor, clip, Tokens("geneval", tokenizer, 77), metadata)


def see_only(reward: GenEval, name: str, logit: float) -> None:
    """Biases under which every query is an object of one class with about this logit over no object."""
    with torch.no_grad():
        reward.detector.class_predictor.weight.zero_()
        reward.detector.class_predictor.bias.fill_(-50)
        reward.detector.class_predictor.bias[-1] = 0
        reward.detector.class_predictor.bias[CLASSES.index(name)] = logit


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8))


def test_objects_are_those_of_transformers_post_processing(reward: GenEval) -> None:
    """At 384 pixels, where transformers' own post-processing resizes nothing."""
    see_only(reward, "dog", 5.0)
    picture, processor = (
        noise(384, 384),
        Mask2FormerImageProcessorPil(size={"shortest_edge": 384, "longest_edge": 384}),
    )
    small, reward.image_processor = reward.image_processor, processor
    found = reward.objects(picture, counting=False)["dog"]
    reward.image_processor = small
    with torch.no_grad():
        outputs = reward.detector(**processor(images=picture, return_tensors="pt"))
    (expected,) = processor.post_process_instance_segmentation(
        outputs, threshold=THRESHOLD, target_sizes=[(384, 384)], return_binary_maps=True
    )
    infos = expected["segments_info"]
    assert len(found) == len(infos) > 1 and {info["label_id"] for info in infos} == {CLASSES.index("dog")}
    for place, info in enumerate(sorted(infos, key=lambda info: info["score"], reverse=True)):
        mask = expected["segmentation"][info["id"]].numpy().astype(bool)
        assert found[place].score == pytest.approx(info["score"], abs=1e-5)
        assert np.array_equal(found[place].mask, mask)
        rows, columns = np.nonzero(mask)
        assert found[place].box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


@pytest.mark.parametrize("size", [(48, 48), (40, 72), (90, 50)])
def test_masks_have_the_images_size(reward: GenEval, size: tuple[int, int]) -> None:
    see_only(reward, "dog", 5.0)
    found = reward.objects(noise(*size), counting=False)["dog"]
    assert found and all(detection.mask.shape == size for detection in found)


def test_colors_are_those_of_clip(reward: GenEval) -> None:
    """Against transformers' own image processor, one caption and one image at a time."""
    tokenizer = reward.tokens.tokenizer
    boxes = [(0, 0, 40, 25), (40, 0, 80, 25), (3, 25, 33, 60), (40, 27, 59, 50), (60, 25, 80, 60)]
    pixels = np.array(noise(60, 80)) // 4
    for (left, top, right, bottom), color in zip(boxes, ("red", "yellow", "blue", "white", "black"), strict=True):
        pixels[top:bottom, left:right] += np.array(ImageColor.getrgb(color), dtype=np.uint8) // 4 * 3
    picture = Image.fromarray(pixels)
    mask = np.random.RandomState(1).rand(60, 80) < 0.8
    found = [Detection(box, 0.9, mask) for box in boxes]
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    captions = ("a photo of a {} cup", "a photo of a {}-colored cup", "a photo of a {} object")

    def embed_text(text: str) -> torch.Tensor:
        ids = tokenizer(text, return_tensors="pt")
        return F.normalize(reward.clip.get_text_features(**ids).pooler_output, dim=-1)

    with torch.no_grad():
        means = [torch.cat([embed_text(caption.format(color)) for caption in captions]).mean(0) for color in COLORS]
        texts = F.normalize(torch.stack(means), dim=-1)
        expected, margins = [], []
        for box in boxes:
            grey = Image.new("RGB", picture.size, "#999")
            cut = Image.composite(picture, grey, Image.fromarray(mask)).crop(box)
            pixels = processor(images=cut, return_tensors="pt")["pixel_values"]
            vision = F.normalize(reward.clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
            best = (vision @ texts.T)[0].topk(2)
            expected.append(COLORS[best.indices[0]])
            margins.append((best.values[0] - best.values[1]).item())
    assert min(margins) > 1e-3 and len(set(expected)) > 1
    assert reward.name_colors(picture, "cup", found) == expected


def test_images_to_scores(reward: GenEval) -> None:
    """The whole path: every query is a sure dog, so dogs are there, three cats are not."""
    see_only(reward, "dog", 5.0)
    prompts = [METADATA[number]["prompt"] for number in (0, 1, 2, 0)]
    images = torch.rand(4, 3, 48, 56)
    correct = reward(images, prompts)
    assert correct.tolist() == [1, 0, 0, 1] and correct.dtype == torch.float32
    alone = [reward(images[i : i + 1], prompts[i : i + 1]).item() for i in range(4)]
    assert alone == correct.tolist()
    see_only(reward, "dog", -5.0)
    assert reward(images, prompts).sum() == 0


def test_counting_uses_the_higher_threshold(reward: GenEval) -> None:
    see_only(reward, "dog", 0.4)  # a probability of 0.6
    assert reward.objects(noise(48, 48), counting=False) and not reward.objects(noise(48, 48), counting=True)


def test_bad_input(reward: GenEval) -> None:
    images = torch.rand(1, 3, 48, 48)
    with pytest.raises(ValueError, match=r"got 'a dog'; nearest: \['a photo of a dog'\]"):
        reward(images, ["a dog"])
    with pytest.raises(ValueError, match="images that require a gradient"):
        reward(images.requires_grad_(), ["a photo of a dog"])
    detector = tiny_detector()
    detector.config.id2label = {0: "one"}
    with pytest.raises(ValueError, match="80 classes"):
        GenEval(detector, reward.image_processor, reward.clip, reward.tokens, {})


def test_the_factory_reads_local_folders(metadata_file: Path, tmp_path: Path, reward: GenEval) -> None:
    clip, tokenizer = tiny_clip()
    reward.detector.save_pretrained(tmp_path / "detector")
    clip.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    loaded = load_reward("geneval", {"geneval": tmp_path}, metadata_path=metadata_file)
    size = loaded.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (800, 1333)
    assert not any(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training
    assert loaded.metadata == reward.metadata
    for name, parameter in loaded.detector.named_parameters():
        assert torch.equal(parameter, reward.detector.get_parameter(name)), name
    with pytest.raises(FileNotFoundError, match="facebook/mask2former-swin-small-coco-instance"):
        geneval(metadata_file, tmp_path / "clip")
