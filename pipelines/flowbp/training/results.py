# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The end of a run: the weights that are chosen, closing images, run.json, the card, and the push."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import BitsAndBytesConfig, DiffusionPipeline

from ..file_errors import writing
from ..judging.images import Drawn
from ..judging.statistics import estimate
from ..publishing.model_card import write_card
from ..publishing.published_files import PUBLISHED_IMAGES
from ..publishing.push import push_folder
from ..publishing.run_info import git_commit, hardware, versions, write_run_json
from .console import duration, table
from .optimizers import OPTIMIZERS
from .pipeline_columns import sources_of
from .reports import finite

if TYPE_CHECKING:
    from .setup import Run


@dataclass(frozen=True)
class TrainingResult:
    """What a run made.

    Attributes:
        output_dir: folder of everything that was written.
        weights: file of the LoRA, or folder of the transformer with `train="full"`.
        update: that they are of.
        selected: "best" by the held-out reward, or "last".
        log: an entry for each update, as in log.jsonl; empty in processes but the main one.
        scores: by reward: `role` ("trained" or "held out"), and `base`, `trained` and `difference`, each with the
            `mean` and the ends `low` and `high` of its 95 % interval over prompts.
        alarms: that the guard raised.
        url: of the repository on the Hub, with `push_to_hub`; in the main process only.
    """

    output_dir: Path
    weights: Path
    update: int
    selected: str
    log: list[dict[str, Any]]
    scores: dict[str, dict[str, Any]]
    alarms: list[dict[str, Any]]
    url: str | None = None


def finish(run: "Run") -> TrainingResult:
    """Choose the final weights, save them, draw the closing images, write run.json and the card, and push. Collective.

    Raises:
        PushError: where pushing failed for good; everything is in the output folder.
    """
    config, accelerator, state, evaluation = run.config, run.accelerator, run.state, run.evaluation
    result = state.result()
    if accelerator.is_main_process:
        run.folder.check()
    # Before anything is drawn or scored, which may fail.
    state.trained.write(accelerator, config.output_dir, result)
    if run.rewards.evaluation and evaluation.found.get("last", {}).get("update") != state.update:
        with state.averaged():
            evaluation.evaluate(state.update)
    selected = "best" if config.select == "best" and evaluation.best_weights is not None else "last"
    if selected == "best":
        result = evaluation.best_weights
        evaluation.write_best()
        state.trained.write(accelerator, config.output_dir, result)
    state.trained.restore(result)
    update = evaluation.found["best"]["update"] if selected == "best" else state.update
    aligned = evaluation.validation.draw()
    base = evaluation.validation.of_base()
    scores = compared_scores(run, selected, base, aligned)
    if accelerator.is_main_process:
        with writing(config.output_dir):
            draw_figures(run, update, base, aligned)
            write_record(run, {"kind": selected, "update": update}, scores, base, aligned)
            write_card(config.output_dir)
        tell_result(run, selected, update, scores)
    accelerator.wait_for_everyone()
    url = None
    try:
        if config.push_to_hub and accelerator.is_main_process:
            url = push_folder(config.output_dir, config.hub_model_id, config.hub_private_repo)
            run.console.print(f"Pushed to {url}")
    finally:
        accelerator.end_training()
    weights = state.trained.path(config.output_dir)
    return TrainingResult(
        config.output_dir, weights, update, selected, run.reports.log, scores, evaluation.alarms, url
    )


def compared_scores(run: "Run", selected: str, base: Drawn, aligned: Drawn) -> dict[str, dict[str, Any]]:
    """Base and trained model by reward, on the evaluation's images, or without an evaluation on the closing images."""
    evaluation = run.evaluation
    if run.rewards.evaluation:
        before, after = evaluation.found["base"]["scores"], evaluation.found[selected]["scores"]
        count = run.config.num_eval_images
    else:
        before, after = ({name: finite(values) for name, values in drawn.scores.items()} for drawn in (base, aligned))
        count = 1
    return {
        name: {
            "role": "held out" if name in evaluation.held_out else "trained",
            "base": estimate(before[name], count),
            "trained": estimate(after[name], count),
            "difference": estimate(_differences(before[name], after[name]), count),
            "images": len(before[name]),
        }
        for name in before
        if name in after
    }


def _differences(before: Sequence[float | None], after: Sequence[float | None]) -> list[float | None]:
    return [None if old is None or new is None else new - old for old, new in zip(before, after, strict=True)]


def draw_figures(run: "Run", update: int, base: Drawn, aligned: Drawn) -> None:
    """before_after.png and reward_curve.png."""
    from ..judging.figures import before_after, reward_curve

    config, name, title = run.config, run.rewards.name, run.title
    before_after(
        base.images,
        aligned.images,
        [record.prompt for record in run.rewards.validation],
        config.output_dir / "before_after.png",
        title=f"{title}: before and after {update} updates",
        subtitle=f"reward: {name}",
        scores=(base.scores[name], aligned.scores[name]),
        sources=sources_of(run.rewards.validation, config.call_columns),
    )
    if any(entry["reward"] is not None for entry in run.reports.log):
        reward_curve(
            run.reports.log,
            config.output_dir / "reward_curve.png",
            title=f"{title}, reward {name}",
            held_out=run.evaluation.history if config.eval_reward is not None else (),
            chosen=update,
            held_out_title=config.eval_reward or "",
        )


def write_record(
    run: "Run",
    selected: Mapping[str, Any],
    scores: Mapping[str, Mapping[str, Any]],
    base: Drawn,
    aligned: Drawn,
) -> None:
    """run.json and the images that the card shows."""
    config, accelerator, trained, log = run.config, run.accelerator, run.state.trained, run.reports.log
    stages = sorted({name for entry in log for name in entry if name.startswith("seconds/")})
    write_run_json(
        config.output_dir / "run.json",
        {
            "format": 3,
            "script": run.script,
            "command": run.command,
            "settings": {**config.settings(), "reward": run.rewards.name},
            "method": {"name": config.method, "title": run.title, "options": dict(run.method.options)},
            "base_model": config.pretrained_model_name_or_path,
            "pipeline_class": type(run.sampling.pipe).__name__,
            "transformer_class": trained.result_class,
            "bitsandbytes": bitsandbytes_arguments(run.sampling.pipe),
            "versions": versions(OPTIMIZERS[config.optimizer].library),
            "git": git_commit(),
            "hardware": {
                **hardware(accelerator.device, accelerator.num_processes),
                "distributed_type": accelerator.distributed_type.value,
            },
            "timings": {
                "started": run.started.isoformat(timespec="seconds"),
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": sum(entry["seconds"] for entry in log),
                "seconds_by_stage": {
                    name.removeprefix("seconds/"): sum(entry.get(name, 0.0) for entry in log) for name in stages
                },
            },
            "updates": run.state.update,
            "skipped_updates": run.state.skipped,
            "selected": dict(selected),
            "rewards": [{"name": name, **found} for name, found in scores.items()],
            "alarms": run.evaluation.alarms,
            "images": save_images(run, base, aligned),
            "hub_model_id": config.hub_model_id if config.push_to_hub else None,
        },
    )


def bitsandbytes_arguments(pipe: DiffusionPipeline) -> dict[str, Any] | None:
    """What `BitsAndBytesConfig` gets for the pipeline's quantised part; None where bitsandbytes quantises none."""
    # diffusers sets it where a part is quantised.
    found = vars(pipe).get("quantization_config")
    for config in [] if found is None else found.quant_mapping.values():
        if isinstance(config, BitsAndBytesConfig):
            return {name: value for name, value in config.to_diff_dict().items() if not name.startswith("_")}
    return None


def save_images(run: "Run", base: Drawn, aligned: Drawn) -> list[dict[str, str]]:
    """The closing images one by one, in the folder `images`; returns their prompts and file names."""
    folder = run.config.output_dir / "images"
    if folder.is_symlink():
        # Nothing is written or removed where a link leads.
        folder.unlink()
    folder.mkdir(exist_ok=True)
    # Those of an earlier run into the same folder would be published with this one's.
    for path in folder.glob("*_*.png"):
        if PUBLISHED_IMAGES.fullmatch(path.name):
            path.unlink()
    entries = []
    pairs = zip(run.rewards.validation, base.images, aligned.images, strict=True)
    for place, (record, old, new) in enumerate(pairs):
        entry = {"prompt": record.prompt, "base": f"images/{place}_base.png", "trained": f"images/{place}_trained.png"}
        old.save(run.config.output_dir / entry["base"])
        new.save(run.config.output_dir / entry["trained"])
        entries.append(entry)
    return entries


def tell_result(run: "Run", selected: str, update: int, scores: Mapping[str, Mapping[str, Any]]) -> None:
    """Which update was chosen, what it gained, and where everything is."""
    name = run.evaluation.judge
    found = scores[name]
    why = f"the best by the held-out reward {name}" if selected == "best" else "the last one"
    lines = [(run.state.trained.title, f"of update {update} of {run.state.update}, {why}")]
    if found["difference"]["mean"] is not None:
        interval = ""
        if found["difference"]["low"] is not None:
            interval = f" [{found['difference']['low']:+.3g}, {found['difference']['high']:+.3g}]"
        lines.append(
            (
                "gain",
                f"{name} {found['base']['mean']:.3g} -> {found['trained']['mean']:.3g}, "
                f"{found['difference']['mean']:+.3g}{interval} on {found['images']} images ({found['role']})",
            )
        )
    seconds = sum(entry["seconds"] for entry in run.reports.log)
    files = f"{run.state.trained.title}, model card, run.json, before_after.png and reward_curve.png"
    lines += [
        ("time", f"{duration(seconds)} in updates, {run.state.skipped} skipped"),
        ("files", f"{files} are in {run.config.output_dir}"),
        ("load", run.state.trained.how_to_load(run.sampling.backbone, run.config.output_dir)),
    ]
    run.console.print(table("Done", lines))
