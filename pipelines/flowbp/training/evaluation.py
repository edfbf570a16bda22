# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Evaluation while training: scores of held-out images, the guard's alarms, and the best weights."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..judging.guard import MIN_IMAGES, Alarm, Guard, Measurement
from ..judging.statistics import estimate
from ..rewards import part_names
from .config import TrainingConfig
from .console import Console
from .reports import Reports, finite
from .rewards import RunRewards
from .sampling import Sampling
from .scored_images import ScoredImages
from .signals import StopSignals
from .state import TrainingState
from .validation import Validation


class Evaluation:
    """Draws and scores the images of fixed records from fixed noise, and keeps what they showed.

    Args:
        state: whose weights are judged.
        rewards: of the run; the plain and the held-out one judge.
        sampling: of the run's pipeline.
        signals: that stop the drawing between images.

    Attributes:
        validation: the images for people, which are drawn in the same way.
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
        self.config = config
        self.accelerator = accelerator
        self.state = state
        self.rewards = rewards
        self.console = console
        self.reports = reports
        self.images = ScoredImages(config, accelerator, rewards, sampling, console, reports, signals)
        self.validation = Validation(state, self.images)
        self.held_out = [] if config.eval_reward is None else [config.eval_reward, *part_names(config.eval_reward)]
        self.guard = Guard()
        self.found: dict[str, dict[str, Any]] = {}
        self.history: list[dict[str, Any]] = []
        self.best_weights: dict[str, torch.Tensor] | None = None
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
        if self.state.trained.loses_base:
            self.validation.of_base()
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
            DrawingStopped: a signal came; what was due stays pending.
        """
        update = self.state.update
        evaluation, validation = self.is_due
        if evaluation and self.found.get("last", {}).get("update") != update:
            with self.state.averaged():
                self.evaluate(update)
        if validation:
            self.validation.draw_and_log(update)
        self.is_pending = False

    def evaluate(self, update: int) -> None:
        """Score the evaluation images, ask the guard, and keep the weights if they are the best so far."""
        config = self.config
        drawn = self.images.draw("evaluation", self.rewards.evaluation, config.num_eval_images)
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
        self.images.log("evaluation", update, drawn, self.rewards.evaluation, config.num_eval_images)
        self._tell_scores(update)
        self._raise(self.guard.evaluate(measurement))

    def write_best(self) -> None:
        """See `TrainedWeights.write_best`."""
        if self.accelerator.is_main_process:
            self.state.trained.write_best(self.config.output_dir, self.best_weights, self.found["best"])

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
        self.alarms += map(asdict, alarms)
        for alarm in alarms:
            self.console.tell(f"Alarm {alarm.name} at update {alarm.update}: {alarm.message}")
            self.reports.scalars({f"alarm/{alarm.name}": 1}, self.state.update)

    # Checkpoints.

    def _made_with(self) -> dict[str, Any]:
        """What the scores of an evaluation are of: rewards, records, and what the images are made with."""
        return {
            "rewards": list(self.images.judges),
            "count": self.config.num_eval_images,
            **self.images.origin(self.rewards.evaluation),
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, but for `best_weights` and the base's images."""
        return {
            "made_with": self._made_with(),
            "is_pending": self.is_pending,
            "training_rewards": self._training_rewards,
            "guard": self.guard.state_dict(),
            "alarms": self.alarms,
            "found": self.found,
            "history": self.history,
            "base_images": self.validation.state_dict(),
        }

    def load(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; scores of other images or rewards are dropped."""
        self._training_rewards = state["training_rewards"]
        self.alarms, self.is_pending = state["alarms"], state["is_pending"]
        if state["made_with"] == self._made_with():
            self.guard.load_state_dict(state["guard"])
            self.found, self.history = state["found"], state["history"]
            self.best_weights = self.state.files.read_best(folder) if "best" in self.found else None
        self.validation.load(folder, state["base_images"])


def _with_interval(score: Mapping[str, float | None]) -> str:
    if score["mean"] is None:
        return "without a score"
    if score["low"] is None:
        return f"{score['mean']:.3g}"
    return f"{score['mean']:.3g} [{score['low']:.3g}, {score['high']:.3g}]"
