# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What a pipeline's `encode_prompt` returned, sample by sample on disk, and joined again for a batch.

Nothing is known about the pipeline's class. A question is all arguments of the call, and an answer is found by its
question alone; how answers are joined is learned from a batch of two, or refused.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..file_errors import writing

RULES = "rules.json"
REMEDY = "leave --precompute_prompt_embeds out"
# Relative 2-norm by which a sample's embeddings may differ between a batch and the sample alone.
TOLERANCES = {torch.float16: 2e-2, torch.bfloat16: 5e-2, torch.float64: 1e-6}


class NotKept(ValueError):
    """What `--precompute_prompt_embeds` cannot keep or does not have, in one line."""


def ask(encode_prompt: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """The question of each sample of a call of `encode_prompt`: all its arguments but the device, as JSON.

    Raises:
        NotKept: for an argument that is neither text nor a plain value.
    """
    bound = inspect.signature(encode_prompt).bind(*args, **kwargs)
    bound.apply_defaults()
    given = {name: value for name, value in bound.arguments.items() if name != "device"}
    each = {
        name: value
        for name, value in given.items()
        if "prompt" in name and isinstance(value, list | tuple) and all(isinstance(one, str | None) for one in value)
    }
    count = max(map(len, each.values()), default=1)
    each = {name: value for name, value in each.items() if len(value) == count}

    def plain(value: Any) -> str:
        if isinstance(value, torch.dtype):
            return str(value)
        raise NotKept(
            f"encode_prompt gets a {type(value).__name__}, and only what depends on text can be kept; {REMEDY}."
        )

    samples = [{**given, **{name: value[place] for name, value in each.items()}} for place in range(count)]
    return [json.dumps(sample, default=plain, sort_keys=True) for sample in samples]


# An answer is a tree of tuples and dicts, whose leaves are a tensor, a list of tensors (one for each sample) or None.

Slots = dict[str, Any]


def take_apart(answer: Any, slots: Slots, path: str = "") -> Any:
    """Put an answer's leaves into `slots` by their paths; what is left of it, as JSON.

    Raises:
        NotKept: for a leaf of another type.
    """
    if isinstance(answer, tuple):
        return [take_apart(value, slots, f"{path}/{place}") for place, value in enumerate(answer)]
    if isinstance(answer, dict):
        return {key: take_apart(value, slots, f"{path}/{key}") for key, value in answer.items()}
    if not all(value is None or isinstance(value, torch.Tensor) for value in _list(answer)):
        raise NotKept(f"encode_prompt returns a {type(answer).__name__}, which cannot be kept; {REMEDY}.")
    slots[path] = answer
    return path


def put_together(shape: Any, slots: Slots) -> Any:
    """The answer that `take_apart` took apart."""
    if isinstance(shape, list):
        return tuple(put_together(each, slots) for each in shape)
    if isinstance(shape, dict):
        return {key: put_together(each, slots) for key, each in shape.items()}
    return slots[shape]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _lengths(values: Sequence[Any]) -> list[int] | None:
    """Lengths of sequences that differ in nothing else; None for others."""
    if not all(isinstance(value, torch.Tensor) and value.ndim > 1 for value in values):
        return None
    lengths = [value.shape[1] for value in values]
    return lengths if len(set(lengths)) > 1 else None


def _join_samples(values: Sequence[Any]) -> Any:
    if all(value is None for value in values):
        return None
    if isinstance(values[0], list):
        return [entry for value in values for entry in value]
    if (lengths := _lengths(values)) is not None:
        longest = max(lengths)
        padding = [value.new_zeros(len(value), longest - value.shape[1], *value.shape[2:]) for value in values]
        values = [torch.cat(pair, 1) for pair in zip(values, padding, strict=True)]
    return torch.cat(list(values))


def join(rules: Mapping[str, Any], answers: Sequence[Slots]) -> Slots:
    """The leaves of a batch's answer from those of its samples.

    Args:
        rules: by path. "shared": no sample has one of its own; "samples": one after another, shorter sequences padded
            with zeros; [path, dtype]: a mask of the padding of the sequences at that path, None without any.
        answers: of each sample.
    """
    joined: Slots = {}
    for path, rule in rules.items():
        if rule == "shared":
            joined[path] = answers[0][path]
        elif rule == "samples":
            joined[path] = _join_samples([answer[path] for answer in answers])
        else:
            padded, dtype = rule
            values = [answer[padded] for answer in answers]
            mask = None
            if (lengths := _lengths(values)) is not None:
                places = torch.arange(max(lengths), device=values[0].device)
                mask = places < torch.tensor(lengths, device=places.device)[:, None]
                mask = mask.to(getattr(torch, dtype))
            joined[path] = mask
    return joined


def learn_rules(calls: Sequence[tuple[Sequence[Slots], Slots]]) -> dict[str, Any]:
    """How the answers of single samples make up those of their batch.

    Args:
        calls: the answers of the samples, and that of their batch, for each call.

    Raises:
        NotKept: where they do not.
    """
    rules: dict[str, Any] = {}
    for path in dict.fromkeys(path for _, whole in calls for path in whole):
        own = [(answers, whole) for answers, whole in calls if path in whole]
        kinds = {str(whole[path].dtype).removeprefix("torch.") for _, whole in own if _is_mask(whole[path])}
        masks = [[other, kind] for kind in kinds for other in own[0][1] if other != path]
        fitting = (rule for rule in ("shared", "samples", *masks) if all(_fits(path, rule, *call) for call in own))
        if (rule := next(fitting, None)) is None:
            raise NotKept("it encodes the prompts of a batch otherwise than each alone")
        rules[path] = rule
    return rules


def _is_mask(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 2 and not value.is_floating_point()


def _fits(path: str, rule: Any, answers: Sequence[Slots], whole: Slots) -> bool:
    try:
        return _equal(join({path: rule}, answers)[path], whole[path])
    except (RuntimeError, TypeError, KeyError):
        # Shapes that do not fit together.
        return False


def _equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(_equal, found, expected))
    if not isinstance(found, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return found is expected
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    tolerance = TOLERANCES.get(expected.dtype, 1e-3)
    found, expected = (each.reshape(len(each), -1) if each.ndim else each.view(1, 1) for each in (found, expected))
    found, expected = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (found, expected))
    return bool(((found - expected).norm(dim=1) <= tolerance * expected.norm(dim=1)).all())


def count_values(slots: Slots) -> int:
    """Of all tensors together."""
    return sum(tensor.numel() for value in slots.values() for tensor in _list(value) if tensor is not None)


class KeptAnswers:
    """Answers on disk, a file for each question."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device

    def _path(self, question: str) -> Path:
        return self.folder / f"{hashlib.sha256(question.encode()).hexdigest()[:32]}.safetensors"

    def __contains__(self, question: str) -> bool:
        return self._path(question).exists()

    def write(self, question: str, answer: Any) -> None:
        """Keep the answer to the question of a single sample."""
        slots: Slots = {}
        shape = take_apart(answer, slots)
        tensors, kinds = {}, {}
        for path, value in slots.items():
            kinds[path] = None if value is None else len(value) if isinstance(value, list) else "tensor"
            for place, tensor in enumerate(_list(value)):
                if tensor is not None:
                    tensors[f"{path}:{place}"] = tensor.detach().cpu().contiguous().clone()
        described = {"question": question, "shape": json.dumps(shape), "kinds": json.dumps(kinds)}
        with writing(self.folder):
            save_file(tensors, self._path(question), metadata=described)

    def slots(self, question: str) -> tuple[Any, Slots]:
        """The answer to a question, taken apart.

        Raises:
            NotKept: for one that was not asked before training, and for a damaged file.
        """
        path = self._path(question)
        if not path.exists():
            raise NotKept(f"encode_prompt is asked for what is not in {self.folder}: {question}; {REMEDY}.")
        try:
            with safe_open(path, framework="pt") as file:
                described = file.metadata()
                kinds = json.loads(described["kinds"])
                tensors = {name: file.get_tensor(name).to(self.device) for name in file.keys()}
        except SafetensorError as error:
            raise NotKept(f"{path} is damaged ({error}); remove {self.folder} and start again.") from error
        # None; "tensor"; or how many a list has.
        slots: Slots = dict.fromkeys(kinds)
        for name, kind in kinds.items():
            if isinstance(kind, int):
                slots[name] = [tensors[f"{name}:{place}"] for place in range(kind)]
            elif kind is not None:
                slots[name] = tensors[f"{name}:0"]
        return json.loads(described["shape"]), slots

    def read(self, questions: Sequence[str]) -> Any:
        """The answer to a batch of questions.

        Raises:
            NotKept: see `slots`; and for a batch whose answers cannot be joined.
        """
        found = [self.slots(question) for question in questions]
        (shape, slots), *others = found
        if others:
            rules = json.loads((self.folder / RULES).read_text(encoding="utf-8"))
            if rules["problem"] is not None:
                raise NotKept(f"encode_prompt: {rules['problem']}; set --train_batch_size 1, or {REMEDY}.")
            slots = join(rules["join"], [each for _, each in found])
        return put_together(shape, slots)

    def finish(self, rules: Mapping[str, Any] | None, problem: str | None) -> None:
        """Write how answers are joined, or why they cannot be; the folder is complete then."""
        content = {"count": len(list(self.folder.glob("*.safetensors"))), "join": rules, "problem": problem}
        (self.folder / RULES).write_text(json.dumps(content), encoding="utf-8")

    def is_whole(self) -> bool:
        """Whether all answers are there, in files that are whole."""
        try:
            count = json.loads((self.folder / RULES).read_text(encoding="utf-8"))["count"]
            files = list(self.folder.glob("*.safetensors"))
            for path in files:
                with safe_open(path, framework="pt"):
                    pass
        except (OSError, ValueError, KeyError, SafetensorError):
            return False
        return len(files) == count
