# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""`train`: draw, record, score, sweep, step."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from ..callback import FlowBPCallback
from ..rewards import part_means
from .backbone import Backbone
from .config import TrainingConfig
from .overview import print_estimate, tell_plan, tell_update
from .prompts import Record, columns_of
from .reports import MicroBatch
from .results import TrainingResult, finish
from .rewards import Reward
from .seeds import make_generator, sample_generators, seed_globally
from .setup import Run, prepare
from .stages import StageMeter


def train(
    config: TrainingConfig,
    backbone: type[Backbone],
    reward: Reward | None = None,
    command: Sequence[str] | None = None,
) -> TrainingResult | None:
    """Train a LoRA, or all weights, with the gradient of a reward.

    Args:
        config: the options.
        backbone: of the model, such as `flowbp.scripts.train_flowbp_sd3.SD3`.
        reward: a name or weighted sum in place of `config.reward`, or any `reward(images, prompts) -> (B,)` that is
            differentiable in the images `(B, 3, H, W)` in [0, 1].
        command: the command line of a script, for run.json.

    Returns:
        Paths, log and scores; None after a dry run.

    Raises:
        ValueError, OSError: in one line, for what does not fit; before any model is loaded if it can be known then.
        RecordingError: for a pipeline whose gradient would be wrong.
        TrainingError: for a run that cannot continue.
        TrainingStopped: after a signal; the update was finished and a checkpoint written.
        PushError: where pushing failed for good; everything else is there.
    """
    with ExitStack() as closing:
        run = prepare(config, backbone, reward, command, closing)
        tell_plan(run)
        if run.config.dry_run:
            return print_estimate(run, one_update(run, run.first_update))
        with run.checkpoints.guard():
            run.evaluation.before_training()
            for update in run.console.updates(run.first_update, run.config.max_train_steps):
                if run.evaluation.must_stop:
                    run.console.tell(f"Stopped by an alarm after update {update}, as --stop_on_alarm says.")
                    break
                one_update(run, update)
                run.checkpoints.after_update()
            return finish(run)


def one_update(run: Run, update: int) -> StageMeter:
    """Record, score and sweep each micro-batch, then step and log."""
    config, meter = run.config, StageMeter(run.accelerator.device)
    micro_batches = []
    for index in range(1 if config.dry_run else config.gradient_accumulation_steps):
        records = next(run.state.sampler)
        start = (index * run.accelerator.num_processes + run.accelerator.process_index) * len(records)
        for first in range(0, len(records), config.samples_per_call):
            of_call = records[first : first + config.samples_per_call]
            places = range(start + first, start + first + len(of_call))
            micro_batches.append(one_call(run, update, run.sampling.size(update, index), of_call, places, meter))
    meter.mark("optimizer")
    step = run.state.step([each.out for each in micro_batches])
    meter.mark(None)
    entry = run.reports.entry(run.state, step, micro_batches, meter)
    # First: an error of a tracker or a full disk must not leave a state that was not told of its last update.
    run.evaluation.add_update(entry, step.was_skipped)
    run.reports.update(entry, micro_batches)
    tell_update(run, step, entry)
    return meter


def one_call(
    run: Run, update: int, size: tuple[int, int], records: Sequence[Record], places: Sequence[int], meter: StageMeter
) -> MicroBatch:
    """Record, score and sweep one call of the pipeline.

    Args:
        places: of the samples in the update.
    """
    config = run.config
    # Calls and processes share a surrogate, so that they do equal work; every sample has its own noise.
    callback = FlowBPCallback(
        run.method,
        generator=make_generator("surrogate", config.seed, update),
        unconditional_gradient=config.unconditional_gradient,
        samples_per_decode=config.samples_per_decode,
        noise_generator=sample_generators("copies", config.seed, update, places),
        strict=config.strict or update == run.first_update,
        on_stage=meter.mark,
        velocity_anchor=config.velocity_anchor,
        measure_gradients=run.state.trained.has_whole_gradients,
    )
    meter.mark("encode")
    inputs = run.sampling.inputs(records)
    meter.mark("rollout")
    with callback.record(run.sampling.pipe):
        images = []
        for _ in range(1 + callback.copies):
            # Copies start from the same noise, also where a pipeline draws some of torch's for its sources.
            seed_globally(config.seed, update, places)
            noise = sample_generators("noise", config.seed, update, places)
            images.append(run.sampling.images(inputs, noise, size))
    out = callback.backward(
        run.rewards.scoring,
        torch.cat(images),
        [record.prompt for record in records],
        columns={name: values for name, values in columns_of(records).items() if name in run.rewards.columns},
        objective=run.objective,
        gradient_scale=run.state.gradient_scale,
        transformer=run.wrapped,
    )
    return MicroBatch(out, callback.surrogate, part_means(run.rewards.training))
