# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""GenEval (Ghosh et al., arXiv 2310.11513): does an image show the objects, numbers, colours and places asked for?

The rules and thresholds are those of the benchmark's `evaluation/evaluate_images.py` (github.com/djghosh13/geneval):

- an object is found where the detector's score, class probability times mean probability of its mask, is above 0.3,
  or above 0.9 in counting tasks; the best 16 of a class are kept, and overlapping ones all count;
- every class that the prompt includes must be found at least `count` times; only the best `count` count further;
- colour: CLIP names one of ten colours for each object, cut out along its mask and put on grey; at least `count` must
  have the right one;
- position: the offset between the boxes' centres, each component shortened by a tenth of the two boxes' sizes, and
  divided by the offset's length, must be beyond 0.5 in the direction asked for;
- excluded classes must be found fewer than `count` times;
- a task's score is the share of correct images, the overall score the mean of the tasks' scores.

What differs: the detector is Meta's Mask2Former with Swin-S as transformers has it, not MMDetection's training of the
same architecture, and images that are not square are stretched to multiples of 32 where MMDetection pads them.
Neither could be run here with public weights, so public scores are not reproduced. CLIP is the same (ViT-L/14 of
OpenAI).
"""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

from ..extras import require
from .clip import CLIP_REPOSITORY, MODEL, clip_pixels, crop_short, load_clip
from .loading import MODEL_FILES, Source, find_files, load_pretrained
from .preprocessing import to_pil_images
from .tokens import Tokens

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MAX_OBJECTS = 16  # of a class
POSITION_THRESHOLD = 0.1  # of the boxes' sizes
DIRECTION = 0.5  # how much of the offset must point there
GREY = 0x99  # around an object whose colour is asked for

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # the metadata's tags
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
# COCO's 80 classes in the order of detectors, under the benchmark's names.
CLASSES = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush".split(",")
)

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; the last two are one beyond the object


@dataclass(frozen=True)
class Detection:
    """An object in an image.

    Attributes:
        box: around its mask.
        score: 0 to 1.
        mask: (H, W) of bool, the image's size.
    """

    box: Box
    score: float
    mask: np.ndarray


@dataclass(frozen=True)
class Verdict:
    """Whether an image is correct; if not, with one line per reason."""

    correct: bool
    reasons: tuple[str, ...]


def read_metadata(path: Path) -> dict[str, dict[str, Any]]:
    """The benchmark's `evaluation_metadata.jsonl`: prompt -> what its image must show.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not of the benchmark's form, or a prompt with two meanings, with the line's number.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"reward 'geneval': expected the benchmark's evaluation_metadata.jsonl, got {path}, which is no file; "
            "it is in the folder prompts of github.com/djghosh13/geneval."
        )
    metadata: dict[str, dict[str, Any]] = {}
    for line_number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            problem = _problem(entry)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem is None and metadata.setdefault(entry["prompt"], entry) != entry:
            problem = "its prompt was there before, with another meaning"
        if problem is not None:
            raise ValueError(f"{path}, line {line_number}: expected an entry of GenEval's metadata, got {problem}.")
    return metadata


def _problem(entry: dict[str, Any]) -> str | None:
    if entry["tag"] not in TASKS or not isinstance(entry["prompt"], str) or not entry["include"]:
        return f"tag {entry['tag']!r} (known: {', '.join(TASKS)}), prompt {entry['prompt']!r}"
    for group, wanted in enumerate([*entry["include"], *entry.get("exclude", [])]):
        if wanted["class"] not in CLASSES:
            return f"the class {wanted['class']!r}"
        if not isinstance(wanted["count"], int) or wanted["count"] < 1:
            return f"the count {wanted['count']!r}"
        if wanted.get("color", "red") not in COLORS:
            return f"the color {wanted['color']!r}"
        if "position" in wanted:
            direction, target = wanted["position"]
            if direction not in POSITIONS or target not in range(group):
                choices = ", ".join(POSITIONS)
                return f"the position {wanted['position']!r} (known: {choices}, with the number of an earlier include)"
    return None


def find_objects(class_logits: Tensor, mask_logits: Tensor, counting: bool) -> dict[str, list[Detection]]:
    """The objects that a Mask2Former found in one image, by class, best first.

    As MMDetection's `instance_postprocess` (mmdet 2.28): of all pairs of a query and a class the best as many as there
    are queries; a score is the class's probability times the mean probability within the mask, where that is above
    one half.

    Args:
        class_logits: (Q, 81), no object last.
        mask_logits: (Q, H, W) at the image's size.
        counting: with the threshold of counting tasks.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    best, places = probabilities.flatten().topk(len(class_logits))
    threshold = COUNTING_THRESHOLD if counting else THRESHOLD
    objects: dict[str, list[Detection]] = {}
    for probability, place in zip(best.tolist(), places.tolist(), strict=True):
        if probability <= threshold:
            break  # the mask cannot raise it, and the rest is lower
        query, label = divmod(place, probabilities.shape[1])
        logits = mask_logits[query].float()
        mask = logits > 0
        score = probability * ((logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6)).item()
        if score > threshold:
            rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            objects.setdefault(CLASSES[label], []).append(Detection(box, score, mask.cpu().numpy()))
    return {
        name: sorted(found, key=lambda detection: detection.score, reverse=True)[:MAX_OBJECTS]
        for name, found in objects.items()
    }


def relations(box: Box, target: Box) -> set[str]:
    """The `POSITIONS` of a box relative to another: none where they are too close, at most two."""
    boxes = np.array([box, target], dtype=float).reshape(2, 2, 2)  # box, corner, axis
    offset = boxes[0].mean(0) - boxes[1].mean(0)
    sizes = np.abs(boxes[:, 1] - boxes[:, 0]).sum(0)
    shortened = np.maximum(np.abs(offset) - POSITION_THRESHOLD * sizes, 0) * np.sign(offset)
    if (np.abs(shortened) < 1e-3).all():
        return set()
    x, y = shortened / np.linalg.norm(offset)
    holds = {"left of": x < -DIRECTION, "right of": x > DIRECTION, "above": y < -DIRECTION, "below": y > DIRECTION}
    return {name for name, is_so in holds.items() if is_so}


def judge(
    metadata: Mapping[str, Any],
    objects: Mapping[str, Sequence[Detection]],
    name_colors: Callable[[str, Sequence[Detection]], Sequence[str]],
) -> Verdict:
    """GenEval's decision for one image.

    Args:
        metadata: of the prompt, see `read_metadata`.
        objects: found in the image, by class, best first.
        name_colors: `(class, detections)` -> one of `COLORS` for each; called only where a colour is asked for.
    """
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []  # what met each include, None where nothing did
    for wanted in metadata["include"]:
        name, count = wanted["class"], wanted["count"]
        found = objects.get(name, [])[:count]
        reason = None
        if len(found) < count:
            reason = f"expected {count} {name}, found {len(found)}"
        if reason is None and "color" in wanted:
            colors = name_colors(name, found)
            if list(colors).count(wanted["color"]) < count:
                reason = f"expected {count} {wanted['color']} {name}, found {', '.join(colors)}"
        if reason is None and "position" in wanted:
            reason = _misplaced(wanted, found, groups)
        groups.append(found if reason is None else None)
        reasons += [] if reason is None else [reason]
    for unwanted in metadata.get("exclude", []):
        count = len(objects.get(unwanted["class"], []))
        if count >= unwanted["count"]:
            reasons.append(f"expected fewer than {unwanted['count']} {unwanted['class']}, found {count}")
    return Verdict(not reasons, tuple(reasons))


def _misplaced(
    wanted: Mapping[str, Any], found: Sequence[Detection], groups: Sequence[Sequence[Detection] | None]
) -> str | None:
    direction, target = wanted["position"]
    if groups[target] is None:
        return f"nothing for {wanted['class']} to be {direction}"
    for detection in found:
        for other in groups[target]:
            true = relations(detection.box, other.box)
            if direction not in true:
                got = " and ".join(sorted(true)) or "neither side of"
                return f"expected {wanted['class']} {direction} its target, found it {got} that"
    return None


class GenEval(nn.Module):
    """`reward(images, prompts)`: 1 for an image that shows what its prompt asks for, else 0. No gradient.

    Images are judged one at a time, as 8-bit images. The weights are frozen.

    Args:
        detector: Mask2Former with COCO's 80 classes.
        image_processor: the detector's.
        clip: for the colours.
        tokens: of CLIP's text encoder.
        metadata: of the prompts, see `read_metadata`.
    """

    def __init__(
        self,
        detector: Mask2FormerForUniversalSegmentation,
        image_processor: Mask2FormerImageProcessorPil,
        clip: CLIPModel,
        tokens: Tokens,
        metadata: Mapping[str, Mapping[str, Any]],
    ) -> None:
        super().__init__()
        if detector.config.num_labels != len(CLASSES):
            raise ValueError(
                f"detector: expected COCO's {len(CLASSES)} classes, got a model with {detector.config.num_labels}."
            )
        self.detector, self.clip = detector, clip
        self.image_processor, self.tokens, self.metadata = image_processor, tokens, metadata
        self._colors: dict[str, Tensor] = {}
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Judges images (B, 3, H, W) in [0, 1] of B prompts of the benchmark: (B,) of 1.0 or 0.0 in float32.

        Raises:
            ValueError: images that require a gradient, of another shape, not finite or out of range; a number of
                prompts other than B; a prompt that is not the benchmark's.
        """
        pil_images = to_pil_images("geneval", images, prompts)
        entries = [self._entry(prompt) for prompt in prompts]
        verdicts = [self.verdict(pil_image, entry) for pil_image, entry in zip(pil_images, entries, strict=True)]
        return torch.tensor([float(verdict.correct) for verdict in verdicts], device=images.device)

    def verdict(self, image: Image.Image, metadata: Mapping[str, Any]) -> Verdict:
        """The decision for one image, with reasons."""
        objects = self.objects(image, counting=metadata["tag"] == "counting")
        return judge(metadata, objects, lambda name, found: self.name_colors(image, name, found))

    @torch.no_grad
    def objects(self, image: Image.Image, counting: bool) -> dict[str, list[Detection]]:
        """What the detector finds in an image, see `find_objects`."""
        pixels = self.image_processor(images=image, return_tensors="pt")["pixel_values"]
        found = self.detector(pixel_values=pixels.to(self.detector.device, self.detector.dtype))
        # As MMDetection does it: to the size that the detector saw, then to the image's.
        masks = found.masks_queries_logits.float()
        for size in (pixels.shape[2:], (image.height, image.width)):
            masks = F.interpolate(masks, size=size, mode="bilinear", align_corners=False)
        return find_objects(found.class_queries_logits[0], masks[0], counting)

    @torch.no_grad
    def name_colors(self, image: Image.Image, name: str, found: Sequence[Detection]) -> list[str]:
        """The colour of each object: the one whose three captions are closest to it in CLIP's space."""
        colors = self._color_embeddings(name)
        whole, names = np.asarray(image), []
        for detection in found:
            left, top, right, bottom = detection.box
            cut = np.where(detection.mask[..., None], whole, GREY)[top:bottom, left:right]
            cut = torch.from_numpy(cut).permute(2, 0, 1)[None].float() / 255
            weight = self.clip.logit_scale
            pixels = clip_pixels(cut, weight, self.clip.config.vision_config.image_size, crop_short)
            embedding = F.normalize(self.clip.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)
            names.append(COLORS[(embedding @ colors.T).argmax().item()])
        return names

    def _color_embeddings(self, name: str) -> Tensor:
        if name not in self._colors:
            captions = (
                "a photo of a {color} {name}",
                "a photo of a {color}-colored {name}",
                "a photo of a {color} object",
            )
            texts = [caption.format(color=color, name=name) for color in COLORS for caption in captions]
            input_ids, attention_mask = self.tokens(texts, self.clip.device)
            embeddings = self.clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output
            means = F.normalize(embeddings.float(), dim=-1).view(len(COLORS), len(captions), -1).mean(1)
            self._colors[name] = F.normalize(means, dim=-1)
        return self._colors[name].to(self.clip.device)

    def _entry(self, prompt: str) -> Mapping[str, Any]:
        if prompt not in self.metadata:
            nearest = difflib.get_close_matches(prompt, self.metadata, n=1, cutoff=0.0)
            raise ValueError(
                f"reward 'geneval': expected a prompt of its metadata, got {prompt!r}; nearest: {nearest}."
            )
        return self.metadata[prompt]


def geneval(metadata_path: Path | None = None, model_path: Path | None = None) -> GenEval:
    """`geneval`: GenEval on `facebook/mask2former-swin-small-coco-instance` and `openai/clip-vit-large-patch14`.

    Args:
        metadata_path: the benchmark's `evaluation_metadata.jsonl`; required.
        model_path: folder with the files of the two repositories in its folders `detector` and `clip`.

    Raises:
        ModuleNotFoundError, FileNotFoundError, ValueError: see `require`, `read_metadata`, `find_files`,
            `load_pretrained`.
    """
    require("scipy", "reward 'geneval': its detector")
    if metadata_path is None:
        raise ValueError(
            "reward 'geneval': expected metadata_path, the benchmark's evaluation_metadata.jsonl, got none; it is in "
            "the folder prompts of github.com/djghosh13/geneval."
        )
    metadata = read_metadata(metadata_path)
    source = Source("geneval", "facebook/mask2former-swin-small-coco-instance", MODEL, MODEL_FILES)
    detector_folder = find_files(source, None if model_path is None else Path(model_path) / "detector")
    clip_folder = None if model_path is None else Path(model_path) / "clip"
    clip, tokens = load_clip("geneval", CLIP_REPOSITORY, CLIP_REPOSITORY, clip_folder)
    detector = load_pretrained(
        source, Mask2FormerForUniversalSegmentation.from_pretrained, detector_folder, use_safetensors=True
    )
    # The class's own sizes, 800 to 1333 pixels, are the reference's, whatever the repository's file says.
    return GenEval(detector, Mask2FormerImageProcessorPil(), clip, tokens, metadata)
