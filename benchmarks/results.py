# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What each method achieves on the demo's pipeline, and at what cost: runs over seeds, judged on held-out prompts.

    python benchmarks/results.py --state DIR --jobs 2     # runs, hours; resumes; `touch DIR/stop` ends it
    python benchmarks/results.py --state DIR --status     # how far it is
    python benchmarks/results.py --state DIR --collect    # benchmarks/results/demo_methods.json
    python benchmarks/documents.py --write                # tables and figures of the documents from it

The queue is in order of value, so that it can be stopped anywhere; benchmarks/README.md describes it. Each finished
job is a JSON file in DIR; one that was killed is repeated.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import demo_runs
from filelock import FileLock, Timeout
from meters import Stages

from flowbp.files import write_atomically
from flowbp.judging.models import folder_name
from flowbp.methods import get_method
from flowbp.training.loop import one_update
from flowbp.training.setup import Run

RESULTS = Path(__file__).parent / "results" / "demo_methods.json"


@dataclass(frozen=True)
class Line:
    """A line of the tables: a method with options.

    Attributes:
        method: row of the table of methods.
        options: of the row, where they are not the row's defaults for SD3.
        run: options of the run.
        rate_of: line whose learning rate it takes; None for one of its own.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    rate_of: str | None = None


# The rows' defaults are for 25 steps. At the demo's 10, options that count places in the rollout are multiplied by
# 10 / 25 and rounded (last_n 11 -> 4, max_tail 10 -> 4); numbers of active steps, which are the cost, stay.
SCALED = {"refl": {"last_n": 4}, "flowbp-lagrange": {"max_tail": 4}}
LINES = {
    name: Line(name, SCALED.get(name, {}))
    for name in "flowbp-lagrange flowbp-bridge flowbp-sparse leapalign drtune draft-lv refl".split()
} | {"draft-1": Line("draft-k"), "draft-4": Line("draft-k", {"last_k": 4}), "full": Line("full")}
REFERENCE = "flowbp-lagrange"
# One standard error of a share of about 0.75 among the 256 images by which a learning rate is chosen: rates that are
# closer to each other are not told apart by one run each.
TIE = 0.027


def _variants(of: str, options: Mapping[str, list[Any]], **run: Any) -> dict[str, Line]:
    """Lines that differ from another one in one option, of the row or of the run."""
    line, found = LINES[of], {}
    for name, values in options.items():
        for value in values:
            found[f"{of} {name} {value}".lower()] = replace(line, options={**line.options, name: value}, rate_of=of)
    for name, value in run.items():
        found[f"{of} {name} {value}".lower()] = replace(line, run={name: value}, rate_of=of)
    return found


STARTS = {"active_supports": "start"}
# Groups of the ablations, in order of value.
ABLATIONS = {
    "endpoint": _variants("refl", {"endpoint": ["sample"]})
    | _variants("drtune", {"endpoint": ["sample"]})
    | _variants("flowbp-sparse", {"endpoint": ["posterior-mean"]}),
    "active steps": _variants("flowbp-sparse", {"num_active": [1, 2, 8]}),
    "coupling": _variants("flowbp-bridge", {"alpha": [0.0, 0.1, 1.0]})
    | _variants("flowbp-lagrange", {"alpha": [0.0, 0.5, 1.0]}),
    "quadrature": _variants("flowbp-lagrange", {"order": [1, 2, 4], "weights": ["uniform"]})
    | _variants("flowbp-lagrange", {name: [value] for name, value in STARTS.items()})
    | {
        f"flowbp-lagrange active_supports start weights {weights}": Line(
            "flowbp-lagrange", {**SCALED["flowbp-lagrange"], **STARTS, "weights": weights}, rate_of="flowbp-lagrange"
        )
        for weights in ("uniform", "adams-bashforth")
    },
    "late bias": _variants("flowbp-sparse", {"late_bias": [0.0, 4.0]}),
    "rescaling": _variants("flowbp-sparse", {"grad_rescale": [0.0, 1.0]})
    | _variants("flowbp-lagrange", {"grad_rescale": [1.0]}),
    "step sampling": _variants("flowbp-lagrange", {"step_sampling": ["uniform"]})
    | _variants("leapalign", {"step_sampling": ["dirichlet"]}),
    "sample weights": _variants("flowbp-lagrange", {"tau": [None]}) | _variants("leapalign", {"tau": [None]}),
    "unconditional gradient": _variants("leapalign", {}, unconditional_gradient=False)
    | _variants("flowbp-sparse", {}, unconditional_gradient=True),
    "an idea of ours": {
        "flowbp-lagrange closed supports": Line(
            "own_rows:CLOSED", SCALED["flowbp-lagrange"], rate_of="flowbp-lagrange"
        )
    },
}
ALL_LINES = LINES | {name: line for group in ABLATIONS.values() for name, line in group.items()}


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        updates: of the results at equal updates; equal CPU seconds are those of as many of `REFERENCE`.
        lines, ablations: which ones.
        seeds: of the methods.
        few: seeds of the ablations.
        tuning_seed: of the runs that choose the learning rate; the next seed decides where they do not tell.
        rates: from which it is chosen.
        prompts: of each list; None for all.
        rounds: updates over which costs are measured.
        options: of all runs.
    """

    updates: int = 120
    lines: tuple[str, ...] = tuple(LINES)
    ablations: tuple[str, ...] = tuple(ABLATIONS)
    seeds: int = 5
    few: int = 3
    tuning_seed: int = 100
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    prompts: int | None = None
    rounds: int = 12
    options: Mapping[str, Any] = field(default_factory=dict)


TINY = Size(
    2, (REFERENCE, "refl"), (), 2, 1, 100, (3e-4, 1e-3), 2, 1, {"train_batch_size": 2, "num_inference_steps": 5}
)


@dataclass(frozen=True)
class Job:
    """Something to do.

    Attributes:
        key: its name, and that of its file.
        work: `(found, check) -> record`; `check` raises where it is to stop.
    """

    key: str
    work: Callable[[Mapping[str, Any], Callable[[], None]], dict[str, Any]]


class Plan:
    """The queue.

    Args:
        size: how much is done.
    """

    def __init__(self, size: Size) -> None:
        self.size = size

    def jobs(self, found: Mapping[str, Any]) -> Iterator[Job | None]:
        """All jobs in order of value; None for those that wait for results of others.

        Args:
            found: records of finished jobs by key.
        """
        size = self.size
        yield Job("base", self._base)
        yield from (self._cost(name) for name in size.lines)
        for attempt in range(3):
            for name in size.lines:
                yield from self._tuning(name, attempt, found)
        for name in size.lines:
            yield from self._deciding(name, found)
        for seed in range(size.seeds):
            yield from (self._run(name, seed, found) for name in size.lines)
        for group in size.ablations:
            yield from (self._cost(name) for name in ABLATIONS[group])
            for seed in range(size.few):
                yield from (self._run(name, seed, found) for name in ABLATIONS[group])

    # What results decide.

    def updates(self, name: str, found: Mapping[str, Any]) -> int | None:
        """Updates that cost as many CPU seconds as `size.updates` of the reference."""
        cost = found.get(f"cost {name}")
        return None if cost is None else max(1, round(self.size.updates / cost["ratio"]))

    def judged_after(self, name: str, found: Mapping[str, Any]) -> list[int]:
        """Updates after which a run is judged: at equal CPU seconds, and for a method at equal updates too."""
        updates = self.updates(name, found)
        return [] if updates is None else sorted({updates, *([self.size.updates] if name in LINES else [])})

    def tried_rates(self, name: str, found: Mapping[str, Any]) -> list[float]:
        """The rates that are tried, as far as they are known: two in the middle, then on the better one's side."""
        rates = self.size.rates
        middle = len(rates) // 2
        tried = list(rates[max(middle - 1, 0) : middle + 1])
        reads = [self._read(name, rate, self.size.tuning_seed, found) for rate in tried]
        if len(reads) == 2 and None not in reads:
            further = middle - 2 if reads[0] >= reads[1] else middle + 1
            tried += [rates[further]] if 0 <= further < len(rates) else []
        return tried

    def undecided_rates(self, name: str, found: Mapping[str, Any]) -> list[float] | None:
        """The two best rates where they are within `TIE` of each other; None as long as that is not known."""
        reads = {rate: self._read(name, rate, self.size.tuning_seed, found) for rate in self.tried_rates(name, found)}
        if None in reads.values():
            return None
        best = sorted(reads, key=lambda rate: (-reads[rate], rate))[:2]
        return best if len(best) == 2 and reads[best[0]] - reads[best[1]] < TIE else []

    def rate(self, name: str, found: Mapping[str, Any]) -> float | None:
        """The rate with the highest exact reading by the held-out judge, of other seeds and other prompts."""
        name = ALL_LINES[name].rate_of or name
        undecided, first = self.undecided_rates(name, found), self.size.tuning_seed
        if undecided is None:
            return None
        seeds = (first, first + 1) if undecided else (first,)
        reads = {
            rate: [self._read(name, rate, seed, found) for seed in seeds]
            for rate in undecided or self.tried_rates(name, found)
        }
        if any(None in each for each in reads.values()):
            return None
        return max(reads, key=lambda rate: (sum(reads[rate]), -rate))

    def _read(self, name: str, rate: float, seed: int, found: Mapping[str, Any]) -> float | None:
        updates = self.updates(name, found)
        record = None if updates is None else found.get(self.key(name, rate, seed, updates))
        return None if record is None else record["read_v5"]

    # Jobs.

    def key(self, name: str, rate: float, seed: int, updates: int) -> str:
        return f"{name} rate {rate:g} seed {seed} updates {updates}"

    def _tuning(self, name: str, attempt: int, found: Mapping[str, Any]) -> Iterator[Job | None]:
        tried, updates = self.tried_rates(name, found), self.updates(name, found)
        if updates is not None and attempt < len(tried):
            yield self._job(name, tried[attempt], self.size.tuning_seed, [updates])
        elif self.undecided_rates(name, found) is None:
            yield None

    def _deciding(self, name: str, found: Mapping[str, Any]) -> Iterator[Job]:
        updates = self.updates(name, found)
        for rate in self.undecided_rates(name, found) or []:
            yield self._job(name, rate, self.size.tuning_seed + 1, [updates])

    def _run(self, name: str, seed: int, found: Mapping[str, Any]) -> Job | None:
        rate, judged_after = self.rate(name, found), self.judged_after(name, found)
        return None if rate is None or not judged_after else self._job(name, rate, seed, judged_after)

    def _job(self, name: str, rate: float, seed: int, judged_after: Sequence[int]) -> Job:
        def work(found: Mapping[str, Any], check: Callable[[], None]) -> dict[str, Any]:
            return self._train(name, rate, seed, judged_after, found["base"], check)

        return Job(self.key(name, rate, seed, judged_after[-1]), work)

    def _cost(self, name: str) -> Job:
        return Job(f"cost {name}", lambda found, check: self._measure_cost(name, check))

    def _prompts(self, seed: int) -> tuple[list[str], int]:
        judging, choosing = demo_runs.held_out_prompts()
        prompts, noises = (choosing, 2) if seed >= self.size.tuning_seed else (judging, 1)
        return prompts[: self.size.prompts], noises

    def _base(self, found: Mapping[str, Any], check: Callable[[], None]) -> dict[str, Any]:
        return demo_runs.judged(None, *self._prompts(0))

    def options(self, line: Line) -> dict[str, Any]:
        """Of a run, as in a recipe."""
        words = {name: "none" if value is None else value for name, value in line.options.items()}
        return {**self.size.options, **line.run, **words, "method": line.method}

    def _train(
        self,
        name: str,
        rate: float,
        seed: int,
        judged_after: Sequence[int],
        base: Mapping[str, float],
        check: Callable[[], None],
    ) -> dict[str, Any]:
        """One run, judged after some of its updates: the learning rate is constant, so a prefix is a run too."""
        line = ALL_LINES[name]
        options = {**self.options(line), "learning_rate": rate, "seed": seed, "max_train_steps": judged_after[-1]}
        judged, cpu = [], 0.0
        with demo_runs.demo_run(options) as run:
            if run.method != get_method(line.method, **line.options):
                raise RuntimeError(f"{name}: expected the options {line.options}, got {run.method.options}.")
            for update in range(judged_after[-1]):
                check()
                began = time.process_time()
                one_update(run, update)
                cpu += time.process_time() - began
                if update + 1 in judged_after:
                    found = demo_runs.judged(run, *self._prompts(seed))
                    alarms = demo_runs.alarms(run, base, found)
                    judged.append({"updates": update + 1, "cpu_seconds": cpu, **found, "alarms": alarms})
            log = run.reports.log
            return {
                "line": name,
                "method": line.method,
                "options": dict(run.method.options),
                "run": dict(line.run),
                "learning_rate": rate,
                "seed": seed,
                **judged[-1],
                "earlier": judged[:-1],
                "skipped_updates": run.state.skipped,
                # Means of ten updates.
                "training": [_mean(log[i : i + 10], "reward") for i in range(0, len(log), 10)],
                "gradient_norm": _mean(log, "gradient_norm"),
            }

    def _measure_cost(self, name: str, check: Callable[[], None]) -> dict[str, Any]:
        """CPU seconds of an update in turns with the reference's, so that what slows one down slows both."""
        from meters import cpu_allocator_peaks
        from torch import device

        with demo_runs.demo_run({**self.size.options, **SCALED[REFERENCE], "method": REFERENCE}) as run:
            runs = {"reference": run, "line": _with_line(run, ALL_LINES[name])}
            seconds: dict[str, list[float]] = {which: [] for which in runs}
            for _ in range(1 + self.size.rounds):
                for which, each in runs.items():
                    check()
                    began = time.process_time()
                    one_update(each, each.state.update)
                    seconds[which].append(time.process_time() - began)

            def whole_update() -> None:
                # One stage for all of it: the marks of `Stages` are what the profiler's trace is read by.
                stages = Stages(device("cpu"))
                stages.mark("sweep")
                one_update(runs["line"], run.state.update)
                stages.mark(None)

            peak = cpu_allocator_peaks(whole_update)["sweep"]
            # Of the line, without the round that warms up.
            log = run.reports.log[3::2]
        means = {which: sum(values[1:]) / len(values[1:]) for which, values in seconds.items()}
        stages = {key for entry in log for key in entry if key.startswith("seconds/")}
        total = sum(entry["seconds"] for entry in log)
        return {
            "line": name,
            "cpu_seconds": means["line"],
            "ratio": 1.0 if name == REFERENCE else means["line"] / means["reference"],
            "peak_mib": peak / 2**20,
            "stages": {key.removeprefix("seconds/"): _mean(log, key) * len(log) / total for key in sorted(stages)},
        }


def _with_line(run: Run, line: Line) -> Run:
    return replace(run, method=get_method(line.method, **line.options), config=replace(run.config, **dict(line.run)))


def _mean(entries: list[dict[str, Any]], name: str) -> float | None:
    values = [entry[name] for entry in entries if entry.get(name) is not None]
    return sum(values) / len(values) if values else None


# Running.


def load(state: Path) -> dict[str, Any]:
    """Records of finished jobs by key."""
    records = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(state.glob("*.json")))
    return {record["key"]: record for record in records}


def work(state: Path, size: Size) -> None:
    """Do jobs that no other worker does, until none is left or there is a file `stop`."""
    plan, environment, failed = Plan(size), demo_runs.environment(), set()

    def check() -> None:
        if (state / "stop").exists():
            sys.exit(f"Stopped; remove {state / 'stop'} and start again to continue.")

    while True:
        check()
        found, is_waiting = load(state), False
        for job in plan.jobs(found):
            if job is None or job.key in found or job.key in failed:
                is_waiting |= job is None and not failed
                continue
            path = state / f"{folder_name(job.key)}.json"
            # Released by the operating system if the process is killed.
            lock = FileLock(path.with_suffix(".lock"), timeout=0)
            try:
                with lock:
                    if path.exists() or (job.key != "base" and "base" not in found):
                        is_waiting = True
                        continue
                    print(time.strftime("%T"), job.key, flush=True)
                    record = {"key": job.key, **job.work(found, check), "environment": environment}
                    write_atomically(path, json.dumps(record) + "\n")
                    print(time.strftime("%T"), job.key, json.dumps(_told(record)), flush=True)
            except Timeout:
                is_waiting = True
                continue
            except Exception:
                # The others go on; started again, it is tried again.
                failed.add(job.key)
                print(time.strftime("%T"), job.key, traceback.format_exc(), flush=True)
            break
        else:
            if not is_waiting:
                break
            time.sleep(2)
    if failed:
        sys.exit(f"{len(failed)} jobs failed: {', '.join(sorted(failed))}")


def _told(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("read_v5", "reward", "ratio", "cpu_seconds") if name in record}


def status(state: Path, size: Size) -> str:
    """How many jobs are finished."""
    found = load(state)
    jobs = [job for job in Plan(size).jobs(found) if job is None or job.key != "base"]
    done = sum(job is not None and job.key in found for job in jobs)
    rates = {name: Plan(size).rate(name, found) for name in size.lines}
    return f"{done} of {len(jobs)} jobs are finished; learning rates: {rates}"


def collect(state: Path, output: Path, size: Size) -> None:
    """Write all records into one file: a line each, environments once."""
    plan, found = Plan(size), load(state)
    environments: list[Any] = []
    records = []
    for key in dict.fromkeys(job.key for job in plan.jobs(found) if job is not None and job.key in found):
        record = dict(found[key])
        if record["environment"] not in environments:
            environments.append(record["environment"])
        record["environment"] = environments.index(record["environment"])
        records.append(rounded(record))
    rates = {name: rate for name in size.lines if (rate := plan.rate(name, found)) is not None}
    head = {"updates": size.updates, "tuning_seed": size.tuning_seed, "learning_rates": rates}
    lines = ",\n".join(json.dumps(record) for record in records)
    text = f'{{{json.dumps(head)[1:-1]},\n"environments": {json.dumps(environments)},\n"records": [\n{lines}\n]}}\n'
    json.loads(text)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, text)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main(argv: list[str] | None = None) -> None:
    """Run, tell or collect."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--state", type=Path, required=True, help="Folder of the finished jobs.")
    add("--jobs", type=int, default=1, help="Processes, each on one thread.")
    add("--tiny", action="store_true", help="A few updates of two methods, to test the benchmark itself.")
    add("--status", action="store_true", help="Say how far it is.")
    add("--collect", action="store_true", help="Write --output from what is finished.")
    add("--output", type=Path, default=RESULTS, help="File of --collect.")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    size = TINY if args.tiny else Size()
    if args.status:
        print(status(args.state, size))
    elif args.collect:
        collect(args.state, args.output, size)
    elif args.worker:
        work(args.state, size)
    else:
        args.state.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, __file__, "--state", str(args.state), "--worker", *(["--tiny"] if args.tiny else [])]
        environment = {**os.environ, **demo_runs.ENVIRONMENT}
        workers = [subprocess.Popen(words, env=environment) for _ in range(args.jobs)]
        codes = [worker.wait() for worker in workers]
        if any(codes):
            sys.exit(max(1, *codes))


if __name__ == "__main__":
    main()
