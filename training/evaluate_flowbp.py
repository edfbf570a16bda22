# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Judge LoRAs and fully trained transformers against their base model: the same prompts, the same noise, any rewards.

    accelerate launch training/evaluate_flowbp.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium --mixed_precision bf16 \
        --lora bridge=sd35-bridge lagrange=sd35-lagrange --prompts prompts.txt --num_images_per_prompt 4 \
        --guidance_scale 3.5 --rewards hpsv2.1,pickscore,imagereward --output_dir evaluation

Any pipeline of diffusers that makes images or videos is called as at inference; of videos a reward scores every
frame, or `--reward_frames` of them, and the mean counts. The output folder gets `scores.parquet` (every image),
`table.md`, `table.json` and `table.csv` (means, 95 % intervals, changes and win rates), `report.html` and `grid.png`.
Started again with the same settings, an evaluation resumes automatically; with more LoRAs, it adds those.
"""

import hashlib
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, PipelineQuantizationConfig
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from tqdm.auto import tqdm

from flowbp.extras import require
from flowbp.files import sha256
from flowbp.inference import BaseForLast, call_arguments, saved_class
from flowbp.judging.evaluation_folder import EvaluationFolder
from flowbp.judging.images import are_finite, to_pil
from flowbp.judging.lora_files import check_lora_file, download_lora
from flowbp.judging.loras import load_loras, scores_by_reward, use_model
from flowbp.judging.models import BASE, EvaluatedModel, Line, check_names, evaluated_lines, reward_names
from flowbp.judging.results import write_results
from flowbp.judging.transformers import Transformers, transformer_lines
from flowbp.rewards import check_columns, check_prompts, check_videos, load_reward, reward_needs, reward_spec
from flowbp.rewards.loading import parse_model_paths
from flowbp.rewards.ocr import quoted_text
from flowbp.training.command_line import add_options, make_config, make_parser, parse_args_with_config
from flowbp.training.distributed import check_number_of_processes
from flowbp.training.fingerprint import digests_of_code
from flowbp.training.model import (
    WEIGHT_DTYPES,
    freeze,
    launched_precision,
    load_quantization_config,
    missing_components,
)
from flowbp.training.options import COUNT, FINITE, NOT_NEGATIVE, POSITIVE, check_options, option
from flowbp.training.output_folder import OutputFolder
from flowbp.training.pipeline_columns import HELP as COLUMNS_HELP
from flowbp.training.pipeline_columns import (
    check_columns_of_call,
    image_columns,
    parse_columns,
    sources_of,
    with_images,
)
from flowbp.training.prompt_sets import PROMPT_SETS, PROMPTS_HELP
from flowbp.training.prompts import Record, columns_of, load_records, texts_of
from flowbp.training.saved_pipeline import SavedPipeline
from flowbp.training.script import run_script
from flowbp.training.seeds import derive_seed
from flowbp.training.setup import PATIENCE, check_dtype
from flowbp.videos import check_reward_frames

_models = partial(option, group="models")
_call = partial(option, group="what the pipeline is called with")
_data = partial(option, group="prompts and rewards")
_output = partial(option, group="output")


@dataclass(frozen=True)
class EvaluationConfig:
    """The options of an evaluation.

    Raises:
        ValueError: in one line, for a value of another type or outside its range.
    """

    pretrained_model_name_or_path: str = _models(MISSING, "Folder or Hub id of the base pipeline.", is_path=True)
    revision: str | None = _models(None, "Branch, tag or commit of the model on the Hub.")
    variant: str | None = _models(None, "Variant of the model files, such as fp16.")
    lora: tuple[str, ...] = _models(
        (),
        "[NAME=]SOURCE: LoRAs, folders, .safetensors files or Hub ids, each with the name that it gets in the tables. "
        "NAME=SOURCE,SOURCE: LoRAs of one method with different seeds, which get one line.",
        is_path=True,
    )
    transformer: tuple[str, ...] = _models(
        (),
        "[NAME=]SOURCE: transformers of which all weights were trained (--train full), output folders, their folders "
        "transformer or Hub ids, a line of the tables for each. NAME=SOURCE,SOURCE: several seeds.",
        is_path=True,
    )
    against: str = _models(BASE, "Line of the tables that the others are compared with.")
    lora_component: str = _models("transformer", "Which of the pipeline's transformers the LoRAs are for.")
    lora_scale: tuple[float, ...] = _models(
        (1.0,), "Factors on each LoRA, a line of the tables for each.", range=FINITE
    )
    base_for_last: tuple[int, ...] = _models(
        (0,),
        "Run this many of the last steps with the base model, a line of the tables for each number.",
        range=NOT_NEGATIVE,
    )
    mixed_precision: str | None = _models(
        None,
        "Dtype of the pipeline; rewards stay float32. Default: what accelerate launch was told.",
        choices=tuple(WEIGHT_DTYPES),
    )
    quantization_config_path: Path | None = _models(
        None,
        "JSON file of a diffusers quantisation config for the transformer with the LoRAs, as in training.",
    )
    offload: bool = _models(False, "The pipeline's models wait on the CPU between uses.")

    resolution: int | None = _call(None, "Height and width of the images in pixels. Default: 512.", range=COUNT)
    height: int | None = _call(None, "Height of the images. Default: --resolution.", range=COUNT)
    width: int | None = _call(None, "Width of the images. Default: --resolution.", range=COUNT)
    num_frames: int | None = _call(None, "Frames of a video. Default: the pipeline's.", range=COUNT)
    num_inference_steps: int = _call(25, "Steps of a rollout.", range=COUNT)
    guidance_scale: float | None = _call(None, "Guidance scale. Default: the pipeline's.", range=FINITE)
    flow_shift: float | None = _call(
        None, "Sample with FlowMatchEulerDiscreteScheduler of this shift, as in training.", range=POSITIVE
    )
    sigmas: str = _call(
        "stock",
        "stock: the scheduler's own; linear: linspace(1, 1 / N, N) before its shift.",
        choices=("stock", "linear"),
    )
    pipeline_arguments: Mapping[str, Any] | None = _call(
        None, "JSON object with more arguments of the pipeline's call, such as negative_prompt or true_cfg_scale."
    )
    pipeline_columns: tuple[str, ...] = _call((), COLUMNS_HELP)

    prompts: str = _data(MISSING, PROMPTS_HELP, is_path=True)
    prompt_column: str | None = _data(None, "Column of the prompts. Default: prompt, caption or text.")
    prompt_split: str = _data("train", "Split of a dataset.")
    group_column: str | None = _data(None, "Column that groups prompts: one more table by group for each reward.")
    num_prompts: int | None = _data(None, "Take this many of the first prompts. Default: all.", range=COUNT)
    num_images_per_prompt: int = _data(1, "Images of each prompt, from different noise.", range=COUNT)
    seed: int = _data(0, "Seed of the noise.")
    rewards: str = _data(MISSING, "Rewards with commas between them: names or package.module:factory.")
    reward_model_path: tuple[str, ...] = _data((), "NAME=FOLDER: local copies of rewards' weights.", is_path=True)
    reward_offload: bool = _data(False, "Rewards wait on the CPU between uses.")
    reward_frames: int | None = _data(
        None,
        "Of a video, score this many evenly spaced frames, the first and the last among them (1: the middle one); "
        "their mean counts. Default: all. Rewards of whole videos see all frames.",
        range=COUNT,
    )
    reward_text_column: str | None = _data(
        None, "Column of --prompts with the text that ocr looks for. Default: what is quoted."
    )

    output_dir: Path = _output(MISSING, "Folder of everything; all processes must see it.")
    batch_size: int = _output(4, "Images drawn and scored together.", range=COUNT)
    report_images: int = _output(64, "Images of each model in report.html: those that changed most.", range=COUNT)

    def __post_init__(self) -> None:
        check_options(self)
        parse_columns(self.pipeline_columns)
        if self.transformer and self.quantization_config_path is not None:
            raise ValueError("--transformer: trained weights are not quantised; leave --quantization_config_path out.")

    @property
    def call_columns(self) -> dict[str, tuple[str, ...]]:
        """See `TrainingConfig.call_columns`."""
        return parse_columns(self.pipeline_columns)

    @property
    def size(self) -> dict[str, int]:
        """Height and width."""
        both = self.resolution or 512
        return {"height": self.height or both, "width": self.width or both}


def parse_config(argv: list[str] | None = None) -> EvaluationConfig:
    """The config of a command line, and of the file that its `--config` names.

    Raises:
        ModuleNotFoundError: what the results are written with is not installed.
    """
    parser = make_parser(__doc__.partition("\n")[0])
    add_options(parser, EvaluationConfig)
    values = vars(parse_args_with_config(parser, argv))
    del values["config"]
    config = make_config(parser, EvaluationConfig, values)
    for package, purpose in {"matplotlib": "grid.png", "pyarrow": "scores.parquet"}.items():
        require(package, f"{purpose} of an evaluation")
    try:
        return replace(config, mixed_precision=config.mixed_precision or launched_precision())
    except ValueError as error:
        parser.error(str(error))


@dataclass(frozen=True)
class Plan:
    """What an evaluation will do, known before any model is loaded.

    Attributes:
        pipeline_class: that the model was saved with.
        saved: the model.
        quantization: of the base's transformer.
        call: arguments of the pipeline's call beside prompts and noise.
        records: of the prompts, in order.
        rewards: names.
        options: of the rewards.
        lines: of the tables.
        models: to evaluate, those of all lines.
        groups: `{reward: {group: places of its prompts}}`.
    """

    config: EvaluationConfig
    pipeline_class: type[DiffusionPipeline]
    saved: SavedPipeline
    quantization: QuantizationConfigMixin | None
    call: dict[str, Any]
    records: list[Record]
    rewards: list[str]
    options: dict[str, Any]
    lines: list[Line]
    grouped: dict[str, str]
    grouped_rewards: list[str]

    @property
    def models(self) -> list[EvaluatedModel]:
        """The models of all lines."""
        return [model for line in self.lines for model in line.models]

    @property
    def prompts(self) -> list[str]:
        """In order."""
        return [record.prompt for record in self.records]

    @property
    def groups(self) -> dict[str, dict[str, list[int]]]:
        """The places of each group's prompts, by reward, in the order in which `grouped` names the groups."""
        places: dict[str, list[int]] = {group: [] for group in self.grouped.values()}
        for place, prompt in enumerate(self.prompts if self.grouped else []):
            places[self.grouped[prompt]].append(place)
        places = {group: found for group, found in places.items() if found}
        return dict.fromkeys(self.grouped_rewards, places) if places else {}

    def seed_of(self, place: int) -> int:
        """The seed of an image's noise: it depends on its prompt's place and its number among the prompt's images."""
        prompt, number = divmod(place, self.config.num_images_per_prompt)
        return derive_seed("evaluation", self.config.seed, prompt, *([number] if number else []))

    def settings(self, device: torch.device) -> dict[str, Any]:
        """What images and scores depend on, as JSON has it."""
        config = self.config
        # All columns, because what a reward reads of them is known after it was loaded.
        records = [[record.prompt, record.columns] for record in self.records]
        content = json.dumps([records, self.options, self.grouped], default=str)
        return {
            "model": config.pretrained_model_name_or_path,
            "revision": config.revision,
            **({} if self.saved.commit is None else {"commit": self.saved.commit}),
            "variant": config.variant,
            "dtype": config.mixed_precision,
            "lora_component": config.lora_component,
            "flow_shift": config.flow_shift,
            "call": self.call,
            **({} if self.quantization is None else {"quantization": repr(self.quantization)}),
            **({"pipeline_columns": list(config.pipeline_columns)} if config.pipeline_columns else {}),
            "prompts": config.prompts,
            "prompts_sha256": hashlib.sha256(content.encode()).hexdigest(),
            "num_prompts": len(self.prompts),
            "num_images_per_prompt": config.num_images_per_prompt,
            "seed": config.seed,
            "batch_size": config.batch_size,
            "rewards": self.rewards,
            **({"reward_code": code} if (code := digests_of_code(self.rewards)) else {}),
            "reward_frames": config.reward_frames,
            "reward_model_path": list(config.reward_model_path),
            "device": device.type,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        }


def make_plan(config: EvaluationConfig) -> Plan:
    """Check everything that can be known before a model is loaded.

    Raises:
        ValueError, OSError: in one line.
    """
    lines = evaluated_lines(config.lora, config.lora_scale, config.base_for_last)
    if config.transformer:
        saved = SavedPipeline(DiffusionPipeline, config.pretrained_model_name_or_path, config.revision, config.variant)
        lines += transformer_lines(config.transformer, saved.config(config.lora_component))
        check_names(lines, "--transformer")
    elif not config.lora:
        raise ValueError("expected a model to evaluate; give --lora or --transformer.")
    names = [line.name for line in lines]
    if config.against not in names:
        raise ValueError(f"--against {config.against}: expected a line of the tables; choose from {', '.join(names)}.")
    return plan_lines(config, with_digests(lines))


def plan_lines(config: EvaluationConfig, lines: list[Line]) -> Plan:
    """The plan for these lines, which `compare_flowbp.py` makes before there are any.

    Raises:
        ValueError, OSError: in one line.
    """
    saved = SavedPipeline(DiffusionPipeline, config.pretrained_model_name_or_path, config.revision, config.variant)
    found = saved_class(saved.index, config.lora_component)
    if max(config.base_for_last) and "callback_on_step_end" not in inspect.signature(found.__call__).parameters:
        raise ValueError(f"--base_for_last: {found.__name__} takes no callback_on_step_end; leave the option out.")
    steps = config.num_inference_steps
    rollout: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": config.guidance_scale}
    if config.sigmas == "linear":
        rollout["sigmas"] = torch.linspace(1, 1 / steps, steps).tolist()
    arguments = {**config.size, "num_frames": config.num_frames, **rollout, **(config.pipeline_arguments or {})}
    call = call_arguments(found, arguments)
    check_reward_frames(config.reward_frames, found, config.num_frames)
    check_columns_of_call(found, config.call_columns, call)
    images = image_columns(config.call_columns)
    records = load_records(config.prompts, column=config.prompt_column, split=config.prompt_split, images=images)
    records = records[: config.num_prompts]
    rewards = reward_names(config.rewards)
    options, grouped, grouped_rewards = read_prompt_data(config, rewards, records)
    saved.check_folder()
    quantization = load_quantization_config(config.quantization_config_path, WEIGHT_DTYPES[config.mixed_precision])
    return Plan(config, found, saved, quantization, call, records, rewards, options, lines, grouped, grouped_rewards)


def read_prompt_data(
    config: EvaluationConfig, rewards: list[str], records: list[Record]
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """What rewards and tables need of the prompts' table: options, groups, and the rewards with tables by group."""
    prompts = [record.prompt for record in records]
    options: dict[str, Any] = {}
    needs = reward_needs(config.rewards)
    if config.reward_text_column is not None:
        options["texts"] = texts_of(records, config.reward_text_column, config.prompts)
    elif "texts" in needs:
        for prompt in prompts:
            quoted_text(prompt)
    if "metadata_path" in needs:
        # Its prompts come with what their images must show.
        chosen = PROMPT_SETS.get(config.prompts)
        options["metadata_path"] = config.prompts if chosen is None else str(chosen.download()[0])
    if config.group_column is not None:
        return options, texts_of(records, config.group_column, config.prompts), rewards
    if "metadata_path" in needs:
        with_metadata = [name for name in rewards if "metadata_path" in reward_spec(name).needs]
        return options, geneval_tasks(options["metadata_path"], prompts), with_metadata
    return options, {}, rewards


def geneval_tasks(path: str, prompts: Sequence[str]) -> dict[str, str]:
    """The task of each prompt of GenEval's `evaluation_metadata.jsonl`, in the order of the benchmark's table."""
    from flowbp.rewards.geneval import TASKS, read_metadata

    tasks = {prompt: entry["tag"] for prompt, entry in read_metadata(Path(path)).items()}
    missing = [prompt for prompt in prompts if prompt not in tasks]
    if missing:
        raise ValueError(f"--prompts {path}: GenEval's file has no prompt {missing[0]!r}; leave --prompt_column out.")
    return {prompt: tasks[prompt] for prompt in sorted(prompts, key=lambda prompt: TASKS.index(tasks[prompt]))}


def with_digests(lines: Sequence[Line]) -> list[Line]:
    """Lines whose LoRAs of the Hub are in its cache, and known by their content too: the Hub may get others."""

    @cache
    def digest(lora: str) -> str:
        file = download_lora(lora)
        check_lora_file(lora, file)
        return sha256(file)

    def found(model: EvaluatedModel) -> EvaluatedModel:
        is_known = model.lora is None or model.digest is not None
        return model if is_known else replace(model, digest=digest(model.lora))

    return [replace(line, models=tuple(map(found, line.models))) for line in lines]


def make_accelerator() -> Accelerator:
    """Processes that share the batches.

    Raises:
        ValueError: where accelerate runs another number of processes than were started.
    """
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[PATIENCE])
    check_number_of_processes(accelerator)
    return accelerator


def load_pipeline(plan: Plan, device: torch.device) -> tuple[DiffusionPipeline, dict[str, str], dict[str, str]]:
    """The pipeline with all LoRAs, and by source their adapters' names and the remarks of `load_loras`."""
    config = plan.config
    parts: dict[str, Any] = dict(missing_components(plan.saved.index))
    if config.flow_shift is not None:
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=config.flow_shift)
    if plan.quantization is not None:
        quantized = {config.lora_component: plan.quantization}
        parts["quantization_config"] = PipelineQuantizationConfig(quant_mapping=quantized)
    pipe = plan.pipeline_class.from_pretrained(
        plan.saved.fetch(),
        trust_remote_code=False,
        use_safetensors=True,
        variant=config.variant,
        dtype=WEIGHT_DTYPES[config.mixed_precision],
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    adapters, remarks = load_loras(pipe, plan.models, config.lora_component)
    if config.offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe, adapters, remarks


def draw_and_score(
    plan: Plan,
    folder: EvaluationFolder,
    batches: Sequence[tuple[EvaluatedModel, int]],
    reward: torch.nn.Module,
    accelerator: Accelerator,
) -> None:
    """Finish this process' batches."""
    count = plan.config.num_images_per_prompt
    pipe, adapters, remarks = load_pipeline(plan, accelerator.device)
    trained = Transformers(pipe, plan.config.lora_component)
    for source, remark in remarks.items():
        accelerator.print(f"--lora {source}: {remark}.")
    if accelerator.is_main_process:
        folder.settings_file.add_remarks(remarks)
    progress = tqdm(batches, unit="batch", disable=not accelerator.is_main_process)
    current: EvaluatedModel | None = None
    told: EvaluatedModel | None = None
    for model, batch in progress:
        if model is not current:
            trained.use(model.transformer)
            callback, current = use_model(pipe, model, adapters, plan.config.num_inference_steps), model
            progress.set_description(model.name)
        places = folder.places(batch)
        records = [plan.records[place // count] for place in places]
        prompts = [record.prompt for record in records]
        # Images of sources in calls of their own.
        size = 1 if plan.config.pipeline_columns else len(places)
        parts = [draw(plan, pipe, places[first : first + size], callback) for first in range(0, len(places), size)]
        images = torch.cat(parts)
        not_finite = int((~are_finite(images)).sum())
        if not_finite and model is not told:
            progress.write(f"{model.name}: {not_finite} of {len(prompts)} images are not finite.", file=sys.stderr)
            told = model
        scores = scores_by_reward(reward, plan.rewards, images, prompts, columns_of(records))
        folder.add(model, batch, to_pil(images), scores, not_finite)


def draw(plan: Plan, pipe: DiffusionPipeline, places: Sequence[int], callback: BaseForLast | None) -> torch.Tensor:
    """The images at these places, in one call of the pipeline."""
    arguments = dict(plan.call)
    if isinstance(arguments.get("negative_prompt"), str):
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(places)
    if callback is not None:
        arguments["callback_on_step_end"] = callback
    inputs = with_images(lambda batch: {"prompt": [record.prompt for record in batch]}, plan.config.call_columns)
    noise = [torch.Generator().manual_seed(plan.seed_of(place)) for place in places]
    # What a pipeline or reward draws besides the given noise depends on the batch alone.
    torch.manual_seed(plan.seed_of(places[0]))
    records = [plan.records[place // plan.config.num_images_per_prompt] for place in places]
    return pipe(**inputs(records), generator=noise, **arguments)[0].float()


def main(argv: list[str] | None = None) -> None:
    """Evaluate."""
    config = parse_config(argv)
    plan = make_plan(config)
    accelerator = make_accelerator()
    check_dtype(config.mixed_precision, accelerator.device)
    folder = OutputFolder(config.output_dir)
    with ExitStack() as closing:
        if accelerator.is_main_process:
            # Also an earlier evaluation's, which this one resumes.
            folder.claim(is_resumed=True, overwrite=False)
            closing.callback(folder.release)
        accelerator.wait_for_everyone()
        evaluate(plan, accelerator)


@torch.no_grad()
def evaluate(plan: Plan, accelerator: Accelerator) -> None:
    """Finish all batches, and write the results. Collective.

    Raises:
        ValueError, OSError: in one line.
    """
    config = plan.config
    model_paths = parse_model_paths(config.reward_model_path)
    images = len(plan.prompts) * config.num_images_per_prompt
    settings = plan.settings(accelerator.device)
    folder = EvaluationFolder(config.output_dir, settings, plan.models, images, config.batch_size, plan.rewards)
    if accelerator.is_main_process:
        for line in folder.discard_damaged():
            print(line, file=sys.stderr)
    accelerator.wait_for_everyone()
    pending = folder.pending()
    if pending:
        shared = {"offload": config.reward_offload, "reward_frames": config.reward_frames}
        reward = load_reward(",".join(plan.rewards), model_paths, **shared, **plan.options)
        check_videos([reward], plan.pipeline_class, config.reward_frames)
        check_prompts(reward, plan.prompts, [(config.size["height"], config.size["width"])])
        check_columns(reward, plan.prompts, [record.columns for record in plan.records], "--prompts")
        freeze(reward).to(accelerator.device)
    # Batches are the same ones for any number of processes; each process takes its share of those that are left, of
    # which all must have the same list before the first of them finishes one.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.create()
        if len(pending) < len(folder.batches()):
            done = len(folder.batches()) - len(pending)
            print(f"Resuming: {done} of {len(folder.batches())} batches were finished.")
    accelerator.wait_for_everyone()
    if pending:
        mine = pending[accelerator.process_index :: accelerator.num_processes]
        draw_and_score(plan, folder, mine, reward, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        seeds = [plan.seed_of(place) for place in range(folder.images)]
        sources = sources_of(plan.records, config.call_columns)
        tables, remarks = write_results(
            folder, plan.lines, config.against, plan.prompts, plan.groups, seeds, config.report_images, sources
        )
        print(tables)
        for remark in remarks:
            print(remark, file=sys.stderr)
        print(f"Scores, tables, report.html and grid.png are in {config.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
