# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Backbones of pipelines that encode their prompts themselves, with the text encoders apart from the pipeline.

The pipeline's own call runs unchanged. What it asks of its `encode_prompt` is answered by a second pipeline that has
the text encoders alone (`--offload`), or was asked before training and is read from disk
(`--precompute_prompt_embeds`).
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, ModelMixin

from ..rewards.loading import brief
from .backbone import Backbone
from .pipeline_columns import with_images
from .prompt_answers import REMEDY, KeptAnswers, NotKept, ask, count_values, learn_rules, take_apart
from .prompt_embeds import PromptEncoder, cache_folder, cache_settings, fill_once
from .prompts import Record

OPTIONS = "--offload, --precompute_prompt_embeds"
Inputs = Callable[[Sequence[Record]], dict[str, Any]]


class Reached(Exception):
    """A pipeline's call has come to a model that is not there: it has encoded its prompts."""


class TextApart(Backbone):
    """A backbone whose pipeline calls its own `encode_prompt`.

    Attributes:
        encode_prompt: that the pipeline gets in place of its own; None to leave it.
    """

    encode_prompt: Callable[..., Any] | None = None

    @property
    def is_apart(self) -> bool:
        """Whether the pipeline is loaded without its text encoders."""
        return bool(self.config.offload or self.config.precompute_prompt_embeds)

    def check(self) -> None:
        """The pipeline's class must have an `encode_prompt` for the text encoders to be apart."""
        if self.is_apart:
            if not hasattr(self.pipeline_class, "encode_prompt"):
                name = self.pipeline_class.__name__
                raise ValueError(f"{OPTIONS}: {name} has no encode_prompt; leave them out.")
            self.text_components = tuple(name for name in self.saved.components() if name.startswith("text_encoder"))
        super().check()

    def prompts_of(self, records: Sequence[Record]) -> dict[str, Any]:
        """Arguments of the pipeline's call that depend on the records, without anything encoded."""
        raise NotImplementedError

    def prompt_inputs(self, accelerator: Accelerator, records: Sequence[Record]) -> Inputs:
        """`prompts_of`; what `encode_prompt` is asked before or beside the pipeline is prepared here."""
        if self.is_apart:
            different = {self.key(record): record for record in records}
            self.encode_prompt = self._encode_apart(accelerator, list(different.values()))
        return self.prompts_of

    def place(self, pipe: DiffusionPipeline, device: torch.device) -> None:
        """The pipeline gets its `encode_prompt` too."""
        super().place(pipe, device)
        if self.encode_prompt is not None:
            pipe.encode_prompt = self.encode_prompt

    # A pipeline whose call ends where its prompts are encoded.

    def load_for_text(self, device: torch.device, has_encoders: bool) -> DiffusionPipeline:
        """The pipeline without weights, but for its text encoders if they are wanted.

        Args:
            device: that it takes for its own.
            has_encoders: whether to load them; None in their place otherwise.
        """
        parts: dict[str, Any] = {}
        for name, kind in self.saved.components().items():
            if name in self.text_components:
                parts |= {} if has_encoders else {name: None}
            elif issubclass(kind, torch.nn.Module):
                parts[name] = self._without_weights(name, kind)
        pipe = self.load(**parts)
        pipe.set_progress_bar_config(disable=True)
        # Pipelines take the device of one of their models, here perhaps meta.
        own = {"device": device, "_execution_device": device}
        pipe.__class__ = type(type(pipe).__name__, (type(pipe),), own)
        return pipe

    def _without_weights(self, name: str, kind: type) -> torch.nn.Module:
        config = self.saved.config(name)
        with torch.device("meta"):
            is_of_diffusers = issubclass(kind, ModelMixin)
            model = kind.from_config(config) if is_of_diffusers else kind(kind.config_class.from_dict(config))

        def reach(*args: Any, **kwargs: Any) -> None:
            raise Reached

        model.forward = model.encode = reach
        # Not diffusers' own `to`, which warns of parts that are kept in float32 where there are weights.
        return torch.nn.Module.to(model, self.dtype)

    def _ask(
        self,
        pipe: DiffusionPipeline,
        encode_prompt: Callable[..., Any],
        records: Sequence[Record],
        size: tuple[int, int],
    ) -> None:
        """Run a pipeline's call until its prompts are encoded, by `encode_prompt`.

        Raises:
            NotKept: see `KeptAnswers`.
            ValueError: for whatever else ends it.
        """
        pipe.encode_prompt = encode_prompt
        noise = [torch.Generator() for _ in records]
        try:
            inputs = with_images(self.prompts_of, self.config.call_columns)
            pipe(generator=noise, **{**inputs(records), **self.call(*size)})
        except (Reached, NotKept) as end:
            if isinstance(end, NotKept):
                raise
        except Exception as error:  # any code of any pipeline
            name = self.pipeline_class.__name__
            raise ValueError(
                f"{OPTIONS}: {name}'s call fails without its text encoders ({brief(error)}); leave them out."
            ) from error

    def _encode_apart(self, accelerator: Accelerator, records: list[Record]) -> Callable[..., Any]:
        """What answers the pipeline, tried on its own call."""
        config, device = self.config, accelerator.device
        answer = self._kept(accelerator, records) if config.precompute_prompt_embeds else self._encoder(device, True)
        pipe = self.load_for_text(device, has_encoders=False)
        for size in config.sizes:
            self._ask(pipe, answer, records[: config.samples_per_call], size)
        return answer

    def _encoder(self, device: torch.device, is_beside: bool) -> Callable[..., Any]:
        """The pipeline's own `encode_prompt` on a pipeline with the text encoders.

        Args:
            is_beside: beside the pipeline that samples: the encoders wait on the CPU between uses.
        """
        config = self.config
        is_offloaded = is_beside and bool(config.offload)
        encoder = PromptEncoder(
            self.load_for_text(device, has_encoders=True), _encode, device, is_offloaded, config.group_offload
        )

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            return encoder(args, kwargs)

        return encode_prompt

    def _kept(self, accelerator: Accelerator, records: list[Record]) -> Callable[..., Any]:
        """What reads the answers that were kept, after they were."""
        config, own = self.config, self.pipeline_class.encode_prompt
        settings = {
            **cache_settings(config, self.saved.commit),
            "class": self.pipeline_class.__name__,
            "index": json.dumps(self.index),
            "transformer": json.dumps(self.saved.config(self.transformer_name)),
            "calls": json.dumps([self.call(*size) for size in config.sizes], default=str),
            "prompts": json.dumps([self.prompts_of([record]) for record in records], default=str),
        }
        keys = [self.key(record) for record in records]
        root, model = config.prompt_embeds_dir.expanduser(), config.pretrained_model_name_or_path
        folder = cache_folder(root, model, keys, settings)
        answers = KeptAnswers(folder, accelerator.device)
        with accelerator.local_main_process_first():

            def write(partial: Path) -> None:
                accelerator.print(f"Prompt embeddings: {len(records)} prompts, into {folder}")
                self._fill(KeptAnswers(partial, accelerator.device), records)

            fill_once(folder, answers.is_whole, write, accelerator.print)

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            return answers.read(ask(own, (None, *args), kwargs))

        return encode_prompt

    def _fill(self, answers: KeptAnswers, records: list[Record]) -> None:
        """Ask for each record alone, then for two together: those whose answers differ most in size."""
        encode, own = self._encoder(answers.device, False), self.pipeline_class.encode_prompt
        pipe, size = self.load_for_text(answers.device, has_encoders=False), self.config.sizes[0]
        sizes: list[int] = []

        def keep(*args: Any, **kwargs: Any) -> Any:
            questions = ask(own, (None, *args), kwargs)
            (question,) = questions
            if question not in answers:
                answers.write(question, encode(*args, **kwargs))
            _, slots = answers.slots(question)
            sizes[-1] += count_values(slots)
            return answers.read(questions)

        for record in records:
            sizes.append(0)
            self._ask(pipe, keep, [record], size)
            if not sizes[-1]:
                name = self.pipeline_class.__name__
                raise NotKept(f"{name} needs another model before it encodes its prompts; {REMEDY}.")
        if self.config.pipeline_columns:
            # A call has one sample, and nothing is joined.
            return answers.finish(None, "--pipeline_columns keeps samples apart")
        if len(records) == 1:
            records, sizes = records * 2, sizes * 2
        order = sorted(range(len(records)), key=sizes.__getitem__)
        calls: list[tuple[Any, Any]] = []

        def compare(*args: Any, **kwargs: Any) -> Any:
            # Asked first, because some pipelines write into their lists of prompts.
            questions, whole = ask(own, (None, *args), kwargs), {}
            result = encode(*args, **kwargs)
            take_apart(result, whole)
            calls.append(([answers.slots(each)[1] for each in questions], whole))
            return result

        rules, problem = None, None
        try:
            self._ask(pipe, compare, [records[order[0]], records[order[-1]]], size)
            rules = learn_rules(calls)
        except NotKept as error:
            problem = str(error)
        answers.finish(rules, problem)


def _encode(pipe: DiffusionPipeline, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The own `encode_prompt` of a pipeline, on its device."""
    own = type(pipe).encode_prompt
    bound = inspect.signature(own).bind(pipe, *args, **kwargs)
    if "device" in bound.signature.parameters:
        bound.arguments["device"] = pipe.device
    return own(*bound.args, **bound.kwargs)
