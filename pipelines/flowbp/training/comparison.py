# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""A comparison: methods x seeds x other options, planned from one recipe and checked before the first run starts.

Other tools call it a sweep, which here is the reverse pass of one update.
"""

import contextlib
import importlib.util
import io
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from ..files import write_atomically
from ..judging.models import BASE, can_be_folder, folder_name
from ..methods import OPTIONS, find_row
from ..publishing.published_files import LORA_FILE
from .backbone import Backbone
from .checkpoints import checkpoints
from .command_line import find_recipe, read_recipe
from .config import TrainingConfig
from .fingerprint import changes, fingerprint
from .options import COUNT, check_options, declarations, item_type, option, without_none, words_of
from .rewards import check_reward
from .setup import check_settings
from .train_command_line import parse_training_config

PLAN = "comparison.json"
# What each run has of its own, or what the next start would have to know.
OF_RUNS = ("method", "seed", "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "dry_run", "push_to_hub")
# Options of the evaluation that are those of the training where it does not say otherwise, and arguments of the
# pipeline's call that the training's scripts have options for.
SHARED = (
    "pretrained_model_name_or_path revision variant quantization_config_path mixed_precision lora_component "
    "num_frames num_inference_steps guidance_scale flow_shift sigmas reward_frames pipeline_columns"
).split()
OF_CALL = ("max_sequence_length", "negative_prompt", "true_cfg_scale")

_runs = partial(option, group="runs")


@dataclass(frozen=True)
class ComparisonConfig:
    """The options of a comparison.

    Raises:
        ValueError: in one line, for a value of another type or outside its range.
    """

    script: str = _runs(
        "train_flowbp_sd3", "Training script: one of flowbp.scripts, or the path of your own.", is_path=True
    )
    base: Mapping[str, Any] | None = _runs(
        None, "Options of all runs; `config` names a training recipe that they override."
    )
    methods: Mapping[str, Any] = _runs(
        MISSING, "Options by method: {refl: {last_n: 4}, ...}. Another name is possible if `method` is among them."
    )
    seeds: tuple[int, ...] = _runs((0,), "Seeds of each method's runs.")
    axes: Mapping[str, Any] | None = _runs(None, "Lists of values by option: {learning_rate: [1.0e-4, 3.0e-4]}.")
    evaluation: Mapping[str, Any] = _runs(
        MISSING, "Options of evaluate_flowbp.py, such as prompts and rewards. Model and rollout are the training's."
    )
    output_dir: Path = _runs(MISSING, "Folder of everything.")
    jobs: int = _runs(1, "Runs at a time, each on one GPU in turn; what they print goes to a file each.", range=COUNT)
    launch: str | None = _runs(
        None, "Options of `accelerate launch`, to start runs and evaluation with it. Default: one process each."
    )

    def __post_init__(self) -> None:
        check_options(self)
        axes = {f"axes {name}": values for name, values in (self.axes or {}).items()}
        for name, values in {"seeds": self.seeds, **axes}.items():
            if not isinstance(values, list | tuple) or not values or any(values.count(each) > 1 for each in values):
                raise ValueError(f"--{name}: expected a list of different values, got {values!r}")
        for label, options in self.methods.items():
            if not isinstance(options or {}, Mapping):
                raise ValueError(f"--methods {label}: expected options with values, got {options!r}")


@dataclass(frozen=True)
class PlannedRun:
    """A training of a comparison.

    Attributes:
        line: of the tables: the method, and the values of the axes.
        options: all that its recipe would have.
        folder: its output folder, whose last part is its name among the line's seeds.
    """

    line: str
    options: Mapping[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        """In messages."""
        return f"{self.line}, seed {self.options['seed']}"

    @property
    def is_finished(self) -> bool:
        """Whether it wrote its LoRA, and the card, which is the last that a run writes."""
        return (self.folder / LORA_FILE).is_file() and (self.folder / "README.md").is_file()

    @property
    def has_begun(self) -> bool:
        """Whether something of a run is in its folder."""
        return self.is_finished or bool(checkpoints(self.folder))

    def words(self) -> list[str]:
        """Its command line, which resumes from a checkpoint if there is one."""
        resume = ["--resume_from_checkpoint=latest"] if checkpoints(self.folder) else []
        return [*as_words(self.options, TrainingConfig), *resume]


def as_words(options: Mapping[str, Any], config_class: type) -> list[str]:
    """Options as words of a command line, which reads them as it would read them in a recipe."""
    declared, words = declarations(config_class), []
    for name, value in options.items():
        if isinstance(value, Mapping) and name in declared and item_type(without_none(declared[name][2])) is str:
            value = words_of(value)
        if isinstance(value, bool) and name in declared:
            # Flags that are off by default have no word for it.
            words += [f"--{name}"] if value else [] if declared[name][0].default is False else [f"--no-{name}"]
        elif isinstance(value, list | tuple):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, Mapping) else value}")
    return words


def load_script(name: str, folder: Path) -> tuple[ModuleType, Path]:
    """A script as a module, and its file.

    Args:
        name: of a script in the folder, or the path of another one.
        folder: of flowbp's scripts.

    Raises:
        ValueError: there is no such script.
    """
    path = Path(name) if name.endswith(".py") else folder / f"{name}.py"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("train_*.py")))
        raise ValueError(f"--script {name}: expected {known}, or the path of a script; got no such file.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, path


def backbone_of(script: ModuleType, path: Path) -> type[Backbone]:
    """The `Backbone` that a training script defines."""
    for each in vars(script).values():
        if isinstance(each, type) and issubclass(each, Backbone) and each.__module__ == script.__name__:
            return each
    raise ValueError(f"--script {path}: expected a training script with a Backbone, got none; name another script.")


def planned_runs(config: ComparisonConfig, recipes: Path) -> tuple[list[PlannedRun], list[str]]:
    """All runs, line by line, and notes for the user.

    Args:
        config: of the comparison.
        recipes: folder of the recipes that `config` in `base` may name.

    Raises:
        ValueError: for options that are set twice or by the comparison itself, and names that cannot be told apart.
    """
    shared, of_method, owner = base_options(config.base or {}, recipes)
    axes, runs, methods = config.axes or {}, [], []
    for label, given in config.methods.items():
        own = dict(given or {})
        methods.append(own.pop("method", label))
        _check_names(f"methods {label}", own)
        for name in own:
            if name in axes:
                raise ValueError(f"--methods {label}: {name} is an axis too; leave one of them out.")
        for values in itertools.product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            line = " ".join([label, *(f"{name} {value}" for name, value in point.items())])
            for seed in config.seeds:
                options = {**shared, **(of_method if methods[-1] == owner else {}), **own, **point}
                folder = config.output_dir / folder_name(line) / f"seed-{seed}"
                options.setdefault("run_name", f"{folder_name(line)}-seed-{seed}")
                options |= {"method": methods[-1], "seed": seed, "output_dir": str(folder)}
                runs.append(PlannedRun(line, options, folder))
    _check_names("axes", axes)
    _check_lines({run.line for run in runs}, config.output_dir)
    notes = []
    if of_method and owner not in methods:
        notes.append(f"Not used: options of {owner} in base, which is not among the methods: {', '.join(of_method)}.")
    return runs, notes


def base_options(given: Mapping[str, Any], recipes: Path) -> tuple[dict[str, Any], dict[str, Any], str | None]:
    """The options of `base`: those of all runs, those of its method's row alone, and that method."""
    options = dict(given)
    recipe = options.pop("config", None)
    if recipe is not None:
        path = find_recipe(str(recipe), recipes)
        options = {**{name: _beside(path, name, value) for name, value in read_recipe(path).items()}, **options}
    owner = options.pop("method", None)
    known = {*OPTIONS, *(find_row(owner).declarations if owner is not None else ())}
    of_method = {name: options.pop(name) for name in list(options) if name in known}
    if of_method and owner is None:
        raise ValueError(
            f"--base: {', '.join(of_method)} belongs to a method; write it in methods, or say which with `method`."
        )
    _check_names("base", options)
    return options, of_method, owner


def _beside(recipe: Path, name: str, value: Any) -> Any:
    """A file that a recipe names lies beside it."""
    declared = declarations(TrainingConfig)
    if name in declared and without_none(declared[name][2]) is Path and isinstance(value, str):
        path = recipe.parent / value
        return str(path) if not Path(value).is_absolute() and path.is_file() else value
    return value


def _check_names(where: str, options: Mapping[str, Any]) -> None:
    for name in options:
        if name in OF_RUNS:
            raise ValueError(f"--{where}: {name} is set by the comparison for each run; leave it out.")


def _check_lines(lines: set[str], output_dir: Path) -> None:
    folders = [folder_name(line).casefold() for line in lines]
    for line in sorted(lines):
        name = folder_name(line)
        is_name = re.fullmatch(r"[^=]{1,90}", line) and can_be_folder(name)
        if not is_name or line == BASE or folders.count(name.casefold()) > 1:
            raise ValueError(
                f"--methods: expected lines with different names of at most 90 characters without '=', that folders "
                f"can have on all systems, none of them {BASE}; got {line!r}; choose other names or values."
            )
    if "," in str(output_dir):
        raise ValueError(f"--output_dir {output_dir}: expected a path without commas; choose another.")


# Checks.


def check_runs(
    runs: Sequence[PlannedRun], backbone: type[Backbone], recipes: Path
) -> tuple[dict[str, TrainingConfig], dict[str, Any]]:
    """Check every run as its script would, without loading a model.

    Returns:
        By line: the config of its first run, and the `fingerprint` of its runs.

    Raises:
        ValueError: naming the run.
    """
    configs: dict[str, TrainingConfig] = {}
    made_of: dict[str, Any] = {}
    for run in runs:
        try:
            if run.options.get("train", "lora") != "lora":
                raise ValueError(f"--train {run.options['train']}: the evaluation takes LoRAs; leave it out")
            config = _parsed(
                partial(parse_training_config, backbone, "", as_words(run.options, TrainingConfig), recipes)
            )
            if run.line not in configs:
                configs[run.line] = config
                check_reward(config, None)
                _, records, found, init = check_settings(config, backbone)
                lora = None if init is None else init.digest
                made_of[run.line] = fingerprint(config, records, (), None, lora, found.saved.commit)
        except (ValueError, OSError) as error:
            raise ValueError(f"{run.name}: {error}") from error
    return configs, made_of


def _parsed(parse: Callable[[], Any]) -> Any:
    """What a script's parser returns; its errors, which end programs, as ValueError."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return parse()
    except SystemExit:
        raise ValueError(printed.getvalue().strip().partition("error: ")[2]) from None


def evaluation_options(config: ComparisonConfig, configs: Mapping[str, TrainingConfig]) -> dict[str, Any]:
    """The options of the evaluation, those that it does not name as the training's.

    Raises:
        ValueError: where the runs do not agree on one of these, or for one that the comparison sets.
    """
    given = dict(config.evaluation)
    for name in ("lora", "output_dir"):
        if name in given:
            raise ValueError(f"--evaluation: {name} is set by the comparison; leave it out.")
    own_arguments = given.pop("pipeline_arguments", None) or {}
    if not isinstance(own_arguments, Mapping):
        raise ValueError(f"--evaluation: pipeline_arguments: expected arguments with values, got {own_arguments!r}.")
    found: dict[str, Any] = {}
    for name in ("sizes", "pipeline_arguments", *SHARED, *OF_CALL):
        is_given = name in given or name in own_arguments
        if name == "sizes":
            is_given = not given.keys().isdisjoint(("resolution", "height", "width"))
        first, *others = (getattr(each, name) for each in configs.values())
        if not is_given and any(other != first for other in others):
            raise ValueError(f"--evaluation: the runs have several values of {name}; say which one to evaluate with.")
        if not is_given and first not in (None, "", ()):
            found[name] = str(first) if isinstance(first, Path) else first
    arguments = {**found.pop("pipeline_arguments", {}), **{name: found.pop(name) for name in OF_CALL if name in found}}
    if sizes := found.pop("sizes", None):
        found["height"], found["width"] = sizes[0]
    return {**found, **given, "pipeline_arguments": {**arguments, **own_arguments}}


def check_evaluation(options: Mapping[str, Any], lines: Sequence[str], output_dir: Path, script: ModuleType) -> None:
    """Check an evaluation before there is anything to evaluate, without loading a model.

    Raises:
        ValueError, OSError: in one line.
    """
    words = as_words({**options, "lora": ["x=y"], "output_dir": output_dir}, script.EvaluationConfig)
    try:
        config = _parsed(partial(script.parse_config, words))
        if config.against not in (BASE, *lines):
            raise ValueError(f"--against {config.against}: expected {BASE} or one of {', '.join(lines)}.")
        script.plan_lines(config, [])
    except (ValueError, OSError) as error:
        raise ValueError(f"--evaluation: {error}") from error


# What is on the disk beside the runs.


def update_plan(
    folder: Path, runs: Sequence[PlannedRun], evaluation: Mapping[str, Any], made_of: Mapping[str, Any]
) -> list[str]:
    """Compare a comparison with what its folder has, then write it there. Runs may be added.

    Returns:
        Notes for the user.

    Raises:
        ValueError: a run or the evaluation has begun with other options, or a folder holds a run of something else.
    """
    path, notes = folder / PLAN, []
    kept: dict[str, Any] = {"runs": {}, "evaluation": None, "made of": {}}
    if path.is_file():
        try:
            kept = {name: json.loads(path.read_text(encoding="utf-8"))[name] for name in kept}
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"--output_dir {folder}: {PLAN} is damaged; restore it, or choose another folder."
            ) from error
    plan = {run.name: json.loads(json.dumps(dict(run.options))) for run in runs}
    for options in plan.values():
        # The folder may be moved, or named from another one.
        del options["output_dir"]
    remedy = "restore the recipe, choose another folder, or remove"
    for run in runs:
        old = kept["runs"].get(run.name)
        if run.has_begun and old is None:
            raise ValueError(f"--output_dir: {run.folder} holds a run of something else; move it or choose another.")
        if run.has_begun and old != plan[run.name]:
            told = "; ".join(changes(old, plan[run.name]))
            raise ValueError(
                f"--output_dir {folder}: {run.name} began with other options: {told}; {remedy} {run.folder}."
            )
    judged = json.loads(json.dumps(dict(evaluation)))
    if (folder / "evaluation" / "settings.json").is_file() and kept["evaluation"] != judged:
        told = "; ".join(changes(kept["evaluation"] or {}, judged))
        raise ValueError(
            f"--output_dir {folder}: the evaluation began with other options: {told}; {remedy} its folder."
        )
    # What the first run of a line was made of stays, so that each start tells the same.
    begun = {run.line for run in runs if run.has_begun} & kept["made of"].keys()
    told = dict.fromkeys(change for line in sorted(begun) for change in changes(kept["made of"][line], made_of[line]))
    notes += [f"Changed since the first run: {change}." for change in told]
    of_lines = {**kept["made of"], **made_of, **{line: kept["made of"][line] for line in begun}}
    left_out = [name for name in kept["runs"] if name not in plan]
    if left_out:
        notes.append(f"Not in this recipe any more, and left out of the tables: {'; '.join(left_out)}.")
    content = {"runs": {**kept["runs"], **plan}, "evaluation": judged, "made of": of_lines}
    write_atomically(path, json.dumps(content, indent=2) + "\n")
    return notes
