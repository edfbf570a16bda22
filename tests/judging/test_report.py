# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The HTML report."""

import base64
import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flowbp.judging.evaluation_folder import EvaluationFolder
from flowbp.judging.models import EvaluatedModel
from flowbp.judging.report import EMBEDDED_SIDE, largest_changes, report_html
from flowbp.judging.statistics import summarise

PROMPTS = ["<b>one</b>", 'the "two" & 2', "three", "four", "five"]
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Elements of a page, in order, and its text by the tag that is open.

    Fails at the first tag that is not closed in order.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.order: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, text: str) -> None:
        if text.strip():
            self.texts.setdefault(self._open[-1], []).append(" ".join(text.split()))

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.elements if name == tag and attributes.items() <= found.items()]


def make_page(
    folder: Path,
    scores: dict[str, torch.Tensor],
    limit: int = 64,
    size: int = 8,
    prompts: list[str] = PROMPTS,
    names: tuple[str, str] = ("lora × 2", "<i>"),
    remarks: Sequence[str] = (),
) -> str:
    """A report of 5 images of three models; the scores `(3, 5)` are by reward."""
    models = [EvaluatedModel("base"), *(EvaluatedModel(name, f"user/lora_{name}", 2.0) for name in names)]
    settings = {"model": "a/model", "seed": 0, "note": "</script>"}
    kept = EvaluationFolder(folder, settings, models, images=5, batch_size=5, rewards=list(scores))
    kept.create()
    for model, of_model in zip(models, zip(*scores.values(), strict=True), strict=True):
        images = [Image.new("RGB", (size, size), (40 * place, 7, 0)) for place in range(5)]
        given = {reward: values.tolist() for reward, values in zip(scores, of_model, strict=True)}
        kept.add(model, 0, images, given)
    by_model = {
        reward: {model.name: line.reshape(len(prompts), -1) for model, line in zip(models, values, strict=True)}
        for reward, values in scores.items()
    }
    return report_html(kept, summarise(by_model, {}), by_model, prompts, limit, remarks)


def make_scores() -> dict[str, torch.Tensor]:
    base = torch.arange(5, dtype=torch.float64)
    change = torch.tensor([2.0, -2.0, 0.0, 1.0, -1.0], dtype=torch.float64)
    return {"x": torch.stack([base, base + change + 0.5, base]), "clip": torch.stack([base, base, base - change])}


def test_largest_changes_are_gains_then_losses() -> None:
    assert largest_changes([0.0, 3.0, -5.0, 1.0, 2.0], 10) == [1, 4, 3, 0, 2]
    assert largest_changes([0.0, 3.0, -5.0, 1.0, 2.0], 3) == [1, 4, 2]
    assert largest_changes([0.0, 3.0, -5.0, 1.0], 1) == [1]


def test_the_report_needs_no_other_file_and_begins_with_the_images(tmp_path: Path) -> None:
    text = make_page(tmp_path, make_scores())
    assert not re.search(r"https?://|src=\"(?!data:)|<link|@import|url\(", text)
    page = Page(text)
    assert page.texts["h2"] == ["Images", "Tables", "Models and settings"]
    tags = [tag for tag, _ in page.elements]
    assert max(i for i, tag in enumerate(tags) if tag == "img") < tags.index("table")
    assert "a/model" in page.texts["h1"][0] and "user/lora_lora × 2" in page.texts["td"]
    assert any("All 5 images" in each for each in page.texts["p"])


def test_texts_of_users_are_escaped(tmp_path: Path) -> None:
    text = make_page(tmp_path, make_scores())
    assert "<b>one" not in text and "<i>" not in text and text.count("</script>") == 1
    page = Page(text)
    assert set(page.texts["h3"]) == set(PROMPTS) and "<i>" in page.texts["b"]
    assert "</script>" in page.texts["td"]


def test_every_image_is_embedded_and_described(tmp_path: Path) -> None:
    page = Page(make_page(tmp_path, make_scores()))
    images = page.all("img")
    assert len(images) == 15
    found = next(image for image in images if "two" in image["alt"] and "lora × 2" in image["alt"])
    assert found["alt"] == 'Image of lora × 2 for the prompt “the "two" & 2”; x -0.5, CLIP 1'
    kind, content = found["src"].split(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.size == (8, 8) and image.getpixel((0, 0)) == (40, 7, 0)
    # Enlarged by a whole factor.
    assert found["style"] == "width: 192px"


def test_large_images_are_reduced(tmp_path: Path) -> None:
    page = Page(make_page(tmp_path, make_scores(), size=2 * EMBEDDED_SIDE))
    kind, content = page.all("img")[0]["src"].split(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.size == (EMBEDDED_SIDE, EMBEDDED_SIDE)
        assert np.allclose(image.getpixel((0, 0)), (0, 7, 0), atol=3)
    assert "style" not in page.all("img")[0]


def test_cards_are_sorted_by_the_leader_s_change_and_can_be_sorted_by_any(tmp_path: Path) -> None:
    page = Page(make_page(tmp_path, make_scores()))
    assert page.texts["h3"] == [PROMPTS[place] for place in (0, 3, 2, 4, 1)]
    changes = [json.loads(card["data-change"]) for card in page.all("div", **{"class": "card"})]
    assert [change["lora × 2/x"] for change in changes] == [2.5, 1.5, 0.5, -0.5, -1.5]
    assert [change["<i>/clip"] for change in changes] == [-2.0, -1.0, 0.0, 1.0, 2.0]
    # The script joins the chosen values, as the keys are joined.
    options = [option["value"] for option in page.all("option")]
    assert options == ["x", "clip", "lora × 2", "<i>"]
    assert {f"{model}/{reward}" for model in options[2:] for reward in options[:2]} == changes[0].keys()
    # Without JavaScript the selectors could do nothing, and stay hidden.
    assert "hidden" in page.all("form")[0]


def test_only_the_largest_changes_are_shown(tmp_path: Path) -> None:
    page = Page(make_page(tmp_path, make_scores(), limit=2))
    assert page.texts["h3"] == [PROMPTS[0], PROMPTS[1]]
    assert any("2 of 5 images" in each for each in page.texts["p"])


def test_images_without_a_score_say_so_and_do_not_count_as_changes(tmp_path: Path) -> None:
    scores = make_scores()
    scores["x"][1, 0] = torch.nan
    page = Page(make_page(tmp_path, scores))
    changes = {
        card: json.loads(found["data-change"])
        for card, found in zip(page.texts["h3"], page.all("div", **{"class": "card"}), strict=True)
    }
    assert changes[PROMPTS[0]]["lora × 2/x"] == 0
    assert "x no score" in page.texts["span"] and len(page.texts["i"]) == 5 * 2 * 2 - 1
    assert "nan" not in " ".join(page.texts["span"] + page.texts["i"])


def test_a_model_without_scores_does_not_lead_and_remarks_are_below_the_tables(tmp_path: Path) -> None:
    scores = make_scores()
    # The other model loses at every image, which is more than nothing.
    scores["x"][1], scores["x"][2] = torch.nan, scores["x"][0] - torch.arange(1.0, 6.0)
    page = Page(make_page(tmp_path, scores, limit=2, remarks=["lora × 2: no finite images, so it has <no> scores."]))
    assert any("largest gains and losses of <i> in x" in each for each in page.texts["p"])
    assert page.texts["h3"] == [PROMPTS[0], PROMPTS[4]] and "no scores" in page.texts["td"]
    assert page.texts["li"] == ["lora × 2: no finite images, so it has <no> scores."]
    assert not Page(make_page(tmp_path, make_scores())).all("ul")


def test_several_images_of_a_prompt_are_numbered(tmp_path: Path) -> None:
    page = Page(make_page(tmp_path, make_scores(), prompts=["one prompt"]))
    assert page.texts["h3"] == ["one prompt"] * 5
    assert page.texts["small"] == [f"· image {number} of 5" for number in (1, 4, 3, 5, 2)]
