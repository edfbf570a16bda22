# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Compare methods: train each with several seeds and other options, and evaluate all against the base.

    python training/compare_flowbp.py --config comparison.yaml

The recipe names a training script, options of all runs (`base`), `methods` with their own options, `seeds`, `axes`
(lists of values of any option) and the options of the `evaluation`; training/README.md explains it. All runs are
checked before the first one starts. Started again, a comparison skips finished runs and resumes the others. A run that
fails does not keep the next ones from starting. The table has a line for each method and value of the axes, over its
seeds.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flowbp.training.command_line import add_options, make_config, make_parser, parse_args_with_config
from flowbp.training.comparison import (
    ComparisonConfig,
    PlannedRun,
    as_words,
    backbone_of,
    check_evaluation,
    check_runs,
    evaluation_options,
    load_script,
    planned_runs,
    update_plan,
)
from flowbp.training.jobs import Job, run_jobs, visible_devices
from flowbp.training.output_folder import LOCK
from flowbp.training.script import run_script

FOLDER = Path(__file__).parent
RECIPES = FOLDER / "recipes"


def tell(line: str) -> None:
    """Print a line at once, before what the runs print."""
    print(line, file=sys.stderr, flush=True)


def parse_config(argv: list[str] | None = None) -> ComparisonConfig:
    """The config of a command line, and of the file that its `--config` names."""
    parser = make_parser(__doc__.partition("\n")[0])
    add_options(parser, ComparisonConfig)
    values = vars(parse_args_with_config(parser, argv))
    del values["config"]
    return make_config(parser, ComparisonConfig, values)


def command(config: ComparisonConfig, script: Path) -> list[str]:
    """The words that start a script: Python alone, to which signals come, or `accelerate launch`."""
    if config.launch is None:
        return [sys.executable, str(script)]
    # Backslashes are a part of Windows' paths.
    words = shlex.split(config.launch, posix=sys.platform != "win32")
    return [sys.executable, "-m", "accelerate.commands.launch", *words, str(script)]


def train_all(config: ComparisonConfig, runs: Sequence[PlannedRun], script: Path) -> dict[str, int]:
    """Run what is not finished; returns the exit codes of runs that failed, by name."""
    pending = [run for run in runs if not run.is_finished]
    tell(f"{len(runs)} runs, {len(runs) - len(pending)} of them finished before")
    words = command(config, script)
    jobs = [
        Job(
            run.name,
            # With what there is to resume from when it starts.
            lambda run=run: [*words, *run.words()],
            run.folder,
            None if config.jobs == 1 else run.folder.with_suffix(".log"),
        )
        for run in pending
    ]
    devices = visible_devices() if config.jobs > 1 and config.launch is None else []
    codes, signal_number = run_jobs(jobs, config.jobs, tell, devices)
    if signal_number:
        tell("Stopped; start again to resume.")
        sys.exit(128 + signal_number)
    failed = {name: code for name, code in codes.items() if code}
    # A process that was left from an earlier start may have finished one in the meantime.
    return {run.name: failed.get(run.name, 0) for run in pending if not run.is_finished}


def evaluate(config: ComparisonConfig, runs: Sequence[PlannedRun], options: Mapping[str, Any]) -> int:
    """Make the table of the finished runs; returns the evaluation's exit code."""
    folders: dict[str, list[str]] = {}
    for run in runs:
        if run.is_finished:
            folders.setdefault(run.line, []).append(str(run.folder))
    lora = [f"{line}={','.join(seeds)}" for line, seeds in folders.items()]
    folder = config.output_dir / "evaluation"
    script, path = load_script("evaluate_flowbp", FOLDER)
    words = as_words({**options, "lora": lora, "output_dir": str(folder)}, script.EvaluationConfig)
    job = Job("evaluation", lambda: [*command(config, path), *words], folder)
    codes, signal_number = run_jobs([job], 1, tell)
    return 128 + signal_number if signal_number else codes["evaluation"]


def main(argv: list[str] | None = None) -> None:
    """Compare."""
    config = parse_config(argv)
    script, path = load_script(config.script, FOLDER)
    runs, notes = planned_runs(config, RECIPES)
    lines = list(dict.fromkeys(run.line for run in runs))
    configs, made_of = check_runs(runs, backbone_of(script, path), RECIPES)
    options = evaluation_options(config, configs)
    check_evaluation(options, lines, config.output_dir, load_script("evaluate_flowbp", FOLDER)[0])
    config.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(config.output_dir / LOCK, timeout=0):
            for note in [*notes, *update_plan(config.output_dir, runs, options, made_of)]:
                tell(note)
            failed = train_all(config, runs, path)
            is_any = any(run.is_finished for run in runs)
            code = evaluate(config, runs, options) if is_any else 0
    except Timeout:
        raise ValueError(f"--output_dir {config.output_dir}: another comparison runs here; wait for it.") from None
    if failed:
        told = "; ".join(f"{name} (exit code {code})" for name, code in failed.items())
        tell(f"{len(failed)} of {len(runs)} runs failed and are not in the table; start again to retry: {told}")
    if code or failed:
        sys.exit(code or 1)


if __name__ == "__main__":
    run_script(main)
