# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The table of rewards: one `RewardSpec` per reward has everything that any other module needs to know about it.

To add a reward, add its spec to `_SPECS` and run `python docs/rewards_table.py --write`. Factories import what they
need when they are called, so importing this module stays cheap.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

# What a factory may be given of the prompts besides their text: option -> where it comes from, for the documentation.
PROMPT_DATA = {
    "texts": "the text to look for, in double quotes in the prompt or in a column of the prompts' table",
    "metadata_path": "`metadata_path`, the benchmark's `evaluation_metadata.jsonl`",
}


@dataclass(frozen=True)
class RewardSpec:
    """What is known about a reward before it is loaded.

    Attributes:
        name: in `load_reward`, `--reward` and logs; for a user's own reward `package.module:factory`.
        title: column title in tables and reports.
        factory: makes the reward, a module or a function `reward(images, prompts) -> (B,)`. Its keyword arguments are
            the reward's options; `model_path` gets the folder with its weights.
        score: range and meaning of the scores, in words (Markdown).
        weights: the repositories and files that the weights come from, and packages to install (Markdown).
        licence: of the weights, as far as known (Markdown).
        is_trainable: scores have a gradient in the images. A reward without one is a judge.
        needs: keys of `PROMPT_DATA` that the reward cannot score a prompt without.

    Raises:
        ValueError: an empty name or title, a factory that cannot be called, or `needs` that are not options of the
            factory.
    """

    name: str
    title: str
    factory: Callable[..., Any]
    score: str = ""
    weights: str = ""
    licence: str = ""
    is_trainable: bool = True
    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.name or not self.title:
            raise ValueError(f"RewardSpec: expected a name and a title, got {self.name!r} and {self.title!r}.")
        if not callable(self.factory):
            raise ValueError(f"reward {self.name!r}: expected a factory to call, got {type(self.factory).__name__}.")
        if wrong := sorted(self.needs - (self.options & set(PROMPT_DATA))):
            raise ValueError(
                f"reward {self.name!r}: expected needs among {', '.join(PROMPT_DATA)} that are arguments of its "
                f"factory, got {', '.join(wrong)}; add the argument or leave it out."
            )

    @property
    def options(self) -> frozenset[str]:
        """The factory's keyword arguments other than `model_path`."""
        return frozenset(self._parameters) - {"model_path"}

    @property
    def has_model_path(self) -> bool:
        """Whether the weights can come from a local folder."""
        return "model_path" in self._parameters

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return _named_parameters(self.factory)


def _named_parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(factory).parameters
    return {name: parameter for name, parameter in parameters.items() if parameter.kind in kinds}


# The factories of the table.


def _ocr(version: str, colour_invariant: bool = False) -> Callable[..., nn.Module]:
    def make(
        augment: bool = False, generator: torch.Generator | None = None, texts: Mapping[str, str] | None = None
    ) -> nn.Module:
        from .ocr import OCRReward

        return OCRReward(version, augment, generator, colour_invariant=colour_invariant, texts=texts)

    return make


def _from_weights(module: str, factory: str, **fixed: Any) -> Callable[..., nn.Module]:
    """The factory of a reward whose weights come from the Hub or from the folder `model_path`."""

    def make(model_path: Path | None = None) -> nn.Module:
        return getattr(importlib.import_module(f".{module}", __package__), factory)(model_path=model_path, **fixed)

    return make


def _vqa(question: str | None = None, model_path: Path | None = None) -> nn.Module:
    from .vqa import vqa

    return vqa(model_path, question)


def _geneval(metadata_path: Path | None = None, model_path: Path | None = None) -> nn.Module:
    from .geneval import geneval

    return geneval(metadata_path, model_path)


# The table.


def _hub(repo_id: str) -> str:
    return f"[{repo_id}](https://huggingface.co/{repo_id})"


# Licences are those that the pages stated when they were looked up; nothing is concluded from the licence of code.
_UNKNOWN_LICENCE = "not known, see the page"
_CLIP_L = _hub("openai/clip-vit-large-patch14")
_PICKSCORE = {"weights": _hub("yuvalkirstain/PickScore_v1"), "licence": _UNKNOWN_LICENCE}
_UNIFIEDREWARD = {
    "weights": _hub("CodeGoat24/UnifiedReward-qwen-7b"),
    "licence": _UNKNOWN_LICENCE,
    "is_trainable": False,
}
_OCR = {
    "score": "log-probability per character that PP-OCRv4 reads the text, at most 0",
    "weights": "in this package, converted from [PaddleOCR](https://github.com/PaddlePaddle/PaddleOCR)'s",
    "licence": "Apache-2.0",
    "needs": frozenset({"texts"}),
}

_SPECS = (
    RewardSpec(
        "aesthetic",
        "Aesthetic",
        _from_weights("clip", "aesthetic"),
        score="about 1 to 10; ignores the prompt",
        weights="`sac+logos+ava1-l14-linearMSE.pth` of "
        "[LAION's predictor](https://github.com/christophschuhmann/improved-aesthetic-predictor), from the copy "
        f"{_hub('camenduru/improved-aesthetic-predictor')}, on {_CLIP_L}",
        licence="not known, see the pages",
    ),
    RewardSpec(
        "clip",
        "CLIP",
        _from_weights("clip", "clip"),
        score="cosine (100 times that is what tables call CLIP score)",
        weights=_CLIP_L,
        licence=_UNKNOWN_LICENCE,
    ),
    RewardSpec(
        "geneval",
        "GenEval",
        _geneval,
        score="1 if the image shows what the prompt asks for, else 0",
        weights=f"{_hub('facebook/mask2former-swin-small-coco-instance')} and {_CLIP_L}; needs scipy "
        '(`pip install -e ".[geneval]"`)',
        licence="Mask2Former: `other`, see the pages",
        is_trainable=False,
        needs=frozenset({"metadata_path"}),
    ),
    RewardSpec(
        "hpsv2.1",
        "HPSv2.1",
        _from_weights("openclip", "hpsv2_1"),
        score="cosine, about 0.2 to 0.35",
        weights=f"{_hub('xswu/HPSv2')}, `HPS_v2.1_compressed.pt`",
        licence="Apache-2.0",
    ),
    RewardSpec(
        "hpsv3",
        "HPSv3",
        _from_weights("hpsv3", "hpsv3"),
        score="higher is better",
        weights=f"{_hub('MizzenAI/HPSv3')} on {_hub('Qwen/Qwen2-VL-7B-Instruct')}; the wording of its question is "
        "read from the authors' wheel: `pip install --no-deps hpsv3==1.0.0`",
        licence="not known, see the pages",
    ),
    RewardSpec(
        "imagereward",
        "ImageReward",
        _from_weights("blip", "imagereward"),
        score="about -2 to 2",
        weights=f"{_hub('THUDM/ImageReward')}, `ImageReward.pt`",
        licence="Apache-2.0",
    ),
    RewardSpec("ocr", "ocr", _ocr("v4"), **_OCR),
    RewardSpec(
        "ocr-shapes",
        "ocr-shapes",
        _ocr("v4", colour_invariant=True),
        **_OCR | {"score": "as `ocr`, from shapes alone: colours and contrast have no effect"},
    ),
    RewardSpec("ocr-v4", "ocr-v4", _ocr("v4"), **_OCR),
    RewardSpec(
        "ocr-v5",
        "ocr-v5",
        _ocr("v5"),
        **_OCR | {"score": "as `ocr`, by PP-OCRv5: slower, the held-out judge of what `ocr` trains"},
    ),
    RewardSpec(
        "pickscore",
        "PickScore",
        _from_weights("clip", "pickscore"),
        score="logit scale x cosine, about 18 to 24",
        **_PICKSCORE,
    ),
    RewardSpec(
        "pickscore/26",
        "pickscore/26",
        _from_weights("clip", "pickscore", normalized=True),
        score="`pickscore` divided by 26, near 1",
        **_PICKSCORE,
    ),
    RewardSpec(
        "similarity",
        "Similarity",
        _from_weights("similarity", "similarity"),
        score="cosine of CLIP's embeddings of an edited image and its source (column `source_image`), outside of the "
        "white part of the column `mask` if there is one",
        weights=_CLIP_L,
        licence=_UNKNOWN_LICENCE,
    ),
    RewardSpec(
        "unifiedreward-alignment",
        "UR-Align",
        _from_weights("judges", "unifiedreward_alignment"),
        score="1 to 5: how well the image agrees with the prompt",
        **_UNIFIEDREWARD,
    ),
    RewardSpec(
        "unifiedreward-quality",
        "UR-IQ",
        _from_weights("judges", "unifiedreward_quality"),
        score="1 to 5: how good the image looks",
        **_UNIFIEDREWARD,
    ),
    RewardSpec(
        "vqa",
        "VQA",
        _vqa,
        score="log-odds that a vision-language model answers yes to a question about image and prompt (columns "
        "`question` and `source_image` if there are any)",
        weights=_hub("Qwen/Qwen2.5-VL-7B-Instruct"),
        licence="Apache-2.0",
    ),
)

REWARDS: dict[str, RewardSpec] = {spec.name: spec for spec in _SPECS}


def reward_spec(name: str) -> RewardSpec:
    """The spec of one reward.

    Args:
        name: of `REWARDS`, or `package.module:factory`, which is imported. A user's spec has the factory's name as its
            title, counts as trainable, and needs the keys of `PROMPT_DATA` that are arguments of the factory without a
            default.

    Raises:
        ValueError: an unknown name, a module that cannot be imported, or no factory in it.
    """
    if name in REWARDS:
        return REWARDS[name]
    module_name, _, attribute = name.partition(":")
    if not all(word.isidentifier() for word in [*module_name.split("."), attribute]):
        nearest = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"reward: expected {', '.join(REWARDS)} or package.module:factory, got {name!r}; "
            f"the nearest is {nearest!r}."
        )
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise ValueError(
            f"reward {name!r}: expected an importable package.module:factory, got {type(error).__name__}: {error}; "
            "its folder must be on PYTHONPATH."
        ) from error
    parameters = _named_parameters(factory) if callable(factory) else {}
    required = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    return RewardSpec(name, _title(name), factory, needs=frozenset(required & set(PROMPT_DATA)))


def titles(names: Iterable[str]) -> dict[str, str]:
    """Column titles by reward: `RewardSpec.title`, or the reward's name where several rewards have the same title.

    Users' modules are not imported, so that the tables of an earlier evaluation can be written again without them.
    """
    short = {name: _title(name) for name in names}
    return {name: title if [*short.values()].count(title) == 1 else name for name, title in short.items()}


def _title(name: str) -> str:
    return REWARDS[name].title if name in REWARDS else name.rpartition(":")[2]
