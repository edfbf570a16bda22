# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's files must hold, checked before anything of it is used.

The manifest's hashes find damage to files. These checks find files that were wrong when they were written, by another
program or by a fault of this one.
"""

import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .checkpoints import check_folder, damaged, load_tensors, read_json
from .optimizers import OPTIMIZERS, OptimizerSpec

# Kinds of JSON values: a type; None; a tuple of alternatives; a list with the kind of its items; a dict with the kinds
# of some keys, or under `str` that of all.
_MAYBE = (float, None)
_STATE = {
    "format": int,
    "settings": {"train": str},
    "ingredients": dict,
    "scales": {str: float},
    "training": {
        "update": int,
        "skipped": int,
        "skipped_in_a_row": int,
        "prompts": {"position": int},
        "scaler": dict,
        "optimizer_name": str,
        "optimizer_numbers": dict,
        "lr_scheduler": {"last_epoch": int, "_step_count": int},
        "has_average": bool,
    },
    "evaluation": {
        "made_with": dict,
        "is_pending": bool,
        "training_rewards": [float],
        "guard": {
            "base": ({str: _MAYBE}, None),
            "window": [[(*_MAYBE, [_MAYBE])]],
            "norms": [[(*_MAYBE, [[float]])]],
            "raised": [str],
        },
        "alarms": [{"name": str, "update": int, "message": str}],
        "found": {str: {"update": int, "scores": {str: [_MAYBE]}}},
        "base_images": ({"prompts": [str], "made_with": dict, "scores": {str: [_MAYBE]}}, None),
        "history": [{"update": int, "mean": _MAYBE, "low": _MAYBE, "high": _MAYBE}],
    },
}
_SCALER = {
    **dict.fromkeys(("scale", "growth_factor", "backoff_factor"), float),
    "growth_interval": int,
    "_growth_tracker": int,
}
_WORDS = {
    int: "a whole number of 0 or more",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "an object",
    None: "null",
}
_MISSING = object()


def check_saved_state(folder: Path) -> None:
    """Check a run's checkpoint: the files against the manifest, then what they hold.

    Whether it fits the run that resumes is another question, and so is a state of another format.

    Raises:
        CheckpointError: naming the file, and in it the value that is missing, of another type, or out of its range.
    """
    check_folder(folder)
    path = folder / "state.json"
    state = read_json(path)
    if isinstance(state, dict) and state.get("format") not in (None, 3):
        return
    for expected, found in _misfits(state, _STATE, "state"):
        raise damaged(path, expected, found)
    training, best = state["training"], state["evaluation"]["found"].get("best")
    for expected, found in _misfits(best, ({"score": float}, None), "state.evaluation.found.best"):
        raise damaged(path, expected, found)
    for expected, found in _misfits(training["scaler"] or None, (_SCALER, None), "state.training.scaler"):
        raise damaged(path, expected, found)
    if (name := training["optimizer_name"]) not in OPTIMIZERS:
        raise damaged(path, f"one of {', '.join(OPTIMIZERS)} at state.training.optimizer_name", reprlib.repr(name))
    spec, numbers = OPTIMIZERS[name], training["optimizer_numbers"]
    for expected, found in _misfits(numbers, dict(spec.numbers), "state.training.optimizer_numbers"):
        raise damaged(path, expected, found)
    for number in ("d", "d_max"):
        if not numbers.get(number, 1) > 0:
            raise damaged(path, f"a positive training.optimizer_numbers.{number}", f"{numbers[number]}")
    if training["scaler"] and not training["scaler"]["scale"] > 0:
        raise damaged(path, "a positive training.scaler.scale", f"{training['scaler']['scale']}")
    if not training["skipped_in_a_row"] <= training["skipped"] <= training["update"]:
        counts = ", ".join(f"{name} {training[name]}" for name in ("skipped_in_a_row", "skipped", "update"))
        raise damaged(path, "at most as many skipped updates as updates", counts)
    if state["settings"]["train"] == "full":
        # Sharded: what is read of them is checked by `read_shards`.
        check_base_images(folder, state["evaluation"]["base_images"])
        return
    has_moments = training["update"] > training["skipped"]
    _check_tensors(folder, spec, has_moments, training["has_average"], best is not None)


def check_base_images(folder: Path, kept: Mapping[str, Any] | None) -> None:
    """Check that the base model's images are there, with a score of each."""
    count = 0 if kept is None else len(kept["prompts"])
    if (found := len(list(folder.glob("base_*.png")))) != count:
        raise damaged(folder, f"{count} images of the base model", f"{found}")
    for name, scores in ({} if kept is None else kept["scores"]).items():
        if len(scores) != count:
            raise damaged(
                folder / "state.json", f"{count} scores of {name} at state.evaluation.base_images", f"{len(scores)}"
            )


def _misfits(value: Any, kind: Any, place: str) -> Iterator[tuple[str, str]]:
    """What was expected and what was found, for each value that is not of its kind."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    fitting = [each for each in kinds if _is_of(value, each)]
    if not fitting:
        words = " or ".join(_WORDS[type(each) if isinstance(each, list | dict) else each] for each in kinds)
        yield f"{words} at {place}", "nothing" if value is _MISSING else reprlib.repr(value)
    elif isinstance(fitting[0], list):
        for number, item in enumerate(value):
            yield from _misfits(item, fitting[0][0], f"{place}[{number}]")
    elif isinstance(fitting[0], dict):
        of_all = fitting[0].get(str)
        for name in fitting[0] if of_all is None else value:
            yield from _misfits(value.get(name, _MISSING), of_all or fitting[0][name], f"{place}.{name}")


def _is_of(value: Any, kind: Any) -> bool:
    """Whether the value itself, not what is in it, is of a kind."""
    if kind is int:
        return type(value) is int and value >= 0
    if kind is float:
        return type(value) in (int, float)
    return value is None if kind is None else type(value) is (type(kind) if isinstance(kind, list | dict) else kind)


def _check_tensors(folder: Path, spec: OptimizerSpec, has_moments: bool, has_average: bool, has_best: bool) -> None:
    lora = load_tensors(folder / "lora.safetensors")
    shapes = {name: tensor.shape for name, tensor in lora.items()}
    moments = load_tensors(folder / "optimizer.safetensors")
    _check_moments(folder / "optimizer.safetensors", moments, shapes, spec)
    if bool(moments) != has_moments:
        expected = "moments of the updates before" if has_moments else "no moments before the first update"
        raise damaged(folder / "optimizer.safetensors", expected, f"{len(moments)} tensors")
    if has_average:
        path = folder / "ema.safetensors"
        average = load_tensors(path)
        if average.keys() != {str(index) for index in range(len(lora))}:
            raise damaged(path, f"tensors 0 to {len(lora) - 1}", reprlib.repr(sorted(average)))
        if Counter(tensor.shape for tensor in average.values()) != Counter(shapes.values()):
            raise damaged(path, "the shapes of lora.safetensors", "others")
    if has_best:
        path = folder / "best.safetensors"
        if {name: tensor.shape for name, tensor in load_tensors(path).items()} != shapes:
            raise damaged(path, "the names and shapes of lora.safetensors", "others")


def _check_moments(
    path: Path, moments: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], spec: OptimizerSpec
) -> None:
    """Check an optimizer's state. A parameter that has got no gradient yet has none."""
    by_index: dict[str, dict[str, torch.Tensor]] = {}
    for key, values in moments.items():
        index, _, name = key.partition(".")
        by_index.setdefault(index, {})[name] = values
    for index, found in by_index.items():
        layout = next((each for each in spec.layouts if each.keys() == found.keys()), None)
        if layout is None or index not in map(str, range(len(shapes))):
            names = " or ".join(", ".join(each) for each in spec.layouts)
            raise damaged(
                path, f"{names} of parameters 0 to {len(shapes) - 1}", f"{', '.join(sorted(found))} of {index}"
            )
        # Which parameter it is of is not known: the files have other orders. Squares have the parameter's shape.
        shape = found["exp_avg_sq" if "exp_avg_sq" in found else "state2"].shape
        for name, moment in layout.items():
            values, where = found[name], f"at {index}.{name}"
            if shape not in shapes.values() or values.shape not in moment.shapes(shape):
                raise damaged(path, f"a shape of lora.safetensors {where}", f"{tuple(values.shape)}")
            if values.dtype != moment.dtype:
                raise damaged(path, f"{moment.dtype} {where}", f"{values.dtype}")
            if (values < moment.least).any():
                raise damaged(path, f"values of {moment.least} or more {where}", f"{values.min().item()}")
