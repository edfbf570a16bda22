# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Judging a run while it trains: evaluation images, the guard's alarms, the best weights, and validation images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from ..judging.guard import MIN_IMAGES, Alarm, Guard, Measurement
from ..judging.images import Drawn
from ..judging.statistics import estimate
from ..rewards import part_names
from .checkpoints import write_folder, write_json
from .config import TrainingConfig
from .console import Console
from .distributed import all_ranks_max
from .prompts import Record
from .reports import Reports, finite
from .rewards import RunRewards
from .sampling import Sampling
from .signals import JudgingStopped, StopSignals
from .state import TrainingState
from .trained import FullWeights, LoraWeights

# What an evaluation's images depend on beside prompt, noise and LoRA.
OF_IMAGES = (
    "pretrained_model_name_or_path revision variant quantization_config_path mixed_precision seed resolution height "
    "width num_frames num_inference_steps guidance_scale true_cfg_scale negative_prompt sigmas flow_shift "
    "max_sequence_length pipeline_arguments"
).split()


class Evaluation:
    """Draws and scores the images of fixed records from fixed noise, and keeps what they showed.

    Args:
        config: of the run.
        accelerator: of the run.
        state: whose weights are judged.
        rewards: of the run; the plain and the held-out one judge.
        sampling: of the run's pipeline.
        console, reports: of the run.
        signals: that stop the drawing between images.

    Attributes:
        found: `{"base", "last", "best"}`: each with its update and the scores of every evaluation image.
        history: `update`, `mean`, `low` and `high` (95 % interval) of each evaluation, by the reward `judge`.
        best_weights: a snapshot of what is trained, of `found["best"]`.
        alarms: that the guard raised.
        is_pending: whether what is due after the last update was not made yet.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        state: TrainingState,
        rewards: RunRewards,
        sampling: Sampling,
        console: Console,
        reports: Reports,
        signals: StopSignals,
    ) -> None:
        self.signals = signals
        self.config = config
        self.accelerator = accelerator
        self.state = state
        self.rewards = rewards
        self.sampling = sampling
        self.console = console
        self.reports = reports
        self.judges = {rewards.name: rewards.plain}
        if rewards.held_out is not None:
            self.judges[config.eval_reward] = rewards.held_out
        self.held_out = [] if config.eval_reward is None else [config.eval_reward, *part_names(config.eval_reward)]
        self.guard = Guard()
        self.found: dict[str, dict[str, Any]] = {}
        self.history: list[dict[str, Any]] = []
        self.best_weights: dict[str, torch.Tensor] | None = None
        self._base: Drawn | None = None
        self.alarms: list[dict[str, Any]] = []
        self.is_pending = False
        self._training_rewards: list[float] = []
        images = len(rewards.evaluation) * config.num_eval_images
        if config.eval_reward is not None and images < MIN_IMAGES:
            console.tell(
                f"The evaluation has {images} images; the alarm held-out-falls needs {MIN_IMAGES}, better 16 "
                "(--eval_prompts, --num_eval_images)."
            )

    @property
    def must_stop(self) -> bool:
        """Whether an alarm ends the run, as `--stop_on_alarm` says."""
        return self.config.stop_on_alarm and bool(self.alarms)

    @property
    def judge(self) -> str:
        """The name of the reward whose scores tell what a LoRA is worth: the held-out one, if there is one."""
        return self.config.eval_reward or self.rewards.name

    def before_training(self) -> None:
        """Judge the base model, and make up for what a stopped run had left out."""
        if self.rewards.evaluation and "base" not in self.found:
            with self.state.trained.left_out():
                self.evaluate(0)
        if isinstance(self.state.trained, FullWeights):
            # The base model is gone after the first update.
            self.base_images()
        if self.is_pending:
            self.judge_update()

    def add_update(self, entry: Mapping[str, Any], was_skipped: bool) -> None:
        """Take an update's reward into account, and ask the guard about its gradient norms."""
        self.is_pending = True
        if was_skipped:
            return
        self._training_rewards.append(entry["reward"])
        prefix = "gradient_norm/step_"
        norms = {int(name.removeprefix(prefix)): entry[name] for name in entry if name.startswith(prefix)}
        self._raise(self.guard.gradient(entry["step"], norms, entry["gradient_norm"]))

    @property
    def is_due(self) -> tuple[bool, bool]:
        """Whether an evaluation, and whether a validation is due after the last update."""
        config, update = self.config, self.state.update
        is_last = update == config.max_train_steps
        evaluation = bool(self.rewards.evaluation) and (update % config.eval_steps == 0 or is_last)
        return evaluation, update % config.validation_steps == 0 and not is_last

    def judge_update(self) -> None:
        """The evaluation and the validation that are due after the last update.

        Raises:
            JudgingStopped: a signal came; what was due stays pending.
        """
        update = self.state.update
        evaluation, validation = self.is_due
        if evaluation and self.found.get("last", {}).get("update") != update:
            with self.state.averaged():
                self.evaluate(update)
        if validation:
            with self.state.averaged():
                drawn = self.validate()
            self._log("validation", update, drawn, self.rewards.validation, 1)
        self.is_pending = False

    def validate(self) -> Drawn:
        """Images of the validation's records and their rewards, always from the same noise."""
        return self._draw("validation", self.rewards.validation, 1)

    def base_images(self) -> Drawn:
        """What `validate` draws of the base model."""
        if self._base is None:
            with self.state.trained.left_out():
                self._base = self.validate()
        return self._base

    def evaluate(self, update: int) -> None:
        """Score the evaluation images, ask the guard, and keep the weights if they are the best so far."""
        config = self.config
        drawn = self._draw("evaluation", self.rewards.evaluation, config.num_eval_images)
        found = {"update": update, "scores": {name: finite(values) for name, values in drawn.scores.items()}}
        held_out = None if config.eval_reward is None else tuple(drawn.scores[config.eval_reward])
        since = self._training_rewards
        measurement = Measurement(
            update=update,
            training_rewards=sum(since) / len(since) if since else None,
            reward=tuple(drawn.scores[self.rewards.name]),
            held_out=held_out,
            saturated=drawn.saturated,
            high_frequency=drawn.high_frequency,
            velocity_norm=drawn.velocity_norm,
            diversity=drawn.diversity,
        )
        self._training_rewards = []
        self.found["last" if update else "base"] = found
        score = estimate(found["scores"][self.judge], config.num_eval_images)
        self.history.append({"update": update, **score})
        if update and held_out is not None:
            # The mean over images, not over prompts, so that one image without a score does not weigh more.
            mean = estimate(found["scores"][config.eval_reward], 1)["mean"]
            best = self.found.get("best")
            if mean is not None and (best is None or mean > best["score"]):
                self.found["best"] = {**found, "score": mean}
                self.best_weights = self.state.trained.snapshot()
                self.write_best()
        self._log("evaluation", update, drawn, self.rewards.evaluation, config.num_eval_images)
        self._tell_scores(update)
        self._raise(self.guard.evaluate(measurement))

    def write_best(self) -> None:
        """Write the best LoRA and its scores into the folder `best`; of all weights, checkpoints have the best."""
        trained = self.state.trained

        def fill(folder: Path) -> None:
            trained.save(folder, self.best_weights)
            write_json(folder / "evaluation.json", self.found["best"])

        if self.accelerator.is_main_process and isinstance(trained, LoraWeights):
            write_folder(self.config.output_dir / "best", fill)

    def _draw(self, purpose: str, records: Sequence[Record], count: int) -> Drawn:
        with self.console.judging(purpose, len(records) * count) as show:

            def advance(images: int) -> None:
                show(images)
                if all_ranks_max(self.accelerator, [self.signals.number])[0]:
                    raise JudgingStopped

            return self.sampling.draw(purpose, records, count, self.judges, advance)

    def _tell_scores(self, update: int) -> None:
        texts = []
        for name, scores in self.found["last" if update else "base"]["scores"].items():
            score = _with_interval(estimate(scores, self.config.num_eval_images))
            base = estimate(self.found["base"]["scores"].get(name, []), self.config.num_eval_images)["mean"]
            role = ", held out" if name in self.held_out else ""
            against = f"; base {base:.3g}" if update and base is not None else ""
            texts.append(f"{name} {score}{role}{against}")
        of = f"after update {update}" if update else "of the base model"
        self.console.tell(f"Evaluation {of}: {' | '.join(texts)}")

    def _raise(self, alarms: Sequence[Alarm]) -> None:
        for alarm in alarms:
            self.alarms.append(asdict(alarm))
            self.console.tell(f"Alarm {alarm.name} at update {alarm.update}: {alarm.message}")
            self.reports.scalars({f"alarm/{alarm.name}": 1}, self.state.update)

    def _log(self, what: str, update: int, drawn: Drawn, records: Sequence[Record], count: int) -> None:
        scores = {name: [score for score in values if math.isfinite(score)] for name, values in drawn.scores.items()}
        means = {f"{what}/{name}": sum(values) / len(values) for name, values in scores.items() if values}
        for name in ("saturated", "high_frequency", "velocity_norm", "diversity"):
            if (value := vars(drawn)[name]) is not None and math.isfinite(value):
                means[f"{what}/{name}"] = value
        self.reports.scalars(means, update)
        if self.accelerator.is_main_process:
            prompts = [record.prompt for record in records for _ in range(count)]
            columns = min(len(prompts), count * max(1, 8 // count))
            title = (
                f"{what.capitalize()} after update {update}" if update else f"{what.capitalize()} of the base model"
            )
            from ..judging.figures import validation_strip

            strip = validation_strip(drawn.images, prompts, drawn.scores, columns, title)
            self.reports.images(what, strip, update)

    # Checkpoints.

    def _made_with(self) -> dict[str, Any]:
        """What the scores of an evaluation are of: rewards, records, and what the images are made with."""
        given = self.config.settings()
        return {
            "rewards": list(self.judges),
            "prompts": [record.prompt for record in self.rewards.evaluation],
            "count": self.config.num_eval_images,
            "made_with": {name: given[name] for name in OF_IMAGES},
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, but for `best_weights` and the base's images."""
        # JSON has no NaN, which the score of an image that is not finite is.
        scores = {} if self._base is None else {name: finite(each) for name, each in self._base.scores.items()}
        return {
            "made_with": self._made_with(),
            "is_pending": self.is_pending,
            "training_rewards": self._training_rewards,
            "guard": self.guard.state_dict(),
            "alarms": self.alarms,
            "found": self.found,
            "history": self.history,
            "base_images": None if self._base is None else self._of_base_images() | {"scores": scores},
        }

    def _of_base_images(self) -> dict[str, Any]:
        """What the validation's images are of."""
        given = self.config.settings()
        return {
            "prompts": [record.prompt for record in self.rewards.validation],
            "made_with": {name: given[name] for name in OF_IMAGES},
        }

    def save_base_images(self, folder: Path) -> None:
        """Write the base's images, if a resumed run cannot draw them again, into a checkpoint's folder."""
        for place, image in enumerate(self._base.images if self._base is not None else ()):
            image.save(folder / f"base_{place}.png")

    def load(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; scores of other images or rewards are of no use and are left out."""
        self._training_rewards = state["training_rewards"]
        self.alarms, self.is_pending = state["alarms"], state["is_pending"]
        if state["made_with"] == self._made_with():
            self.guard.load_state_dict(state["guard"])
            self.found, self.history = state["found"], state["history"]
            self.best_weights = self.state.load_best(folder, "best" in self.found)
        kept = state["base_images"]
        if kept is not None and self._of_base_images().items() <= kept.items() and [*kept["scores"]] == [*self.judges]:
            images = [Image.open(folder / f"base_{place}.png") for place in range(len(kept["prompts"]))]
            for image in images:
                image.load()
            scores = {
                name: [math.nan if score is None else score for score in each] for name, each in kept["scores"].items()
            }
            self._base = Drawn(images, scores, *[math.nan] * 3, None)


def _with_interval(score: Mapping[str, float | None]) -> str:
    if score["mean"] is None:
        return "without a score"
    if score["low"] is None:
        return f"{score['mean']:.3g}"
    return f"{score['mean']:.3g} [{score['low']:.3g}, {score['high']:.3g}]"
