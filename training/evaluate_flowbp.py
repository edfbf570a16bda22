# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Judge LoRAs against their base model: the same prompts, the same noise, any rewards.

    accelerate launch training/evaluate_flowbp.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium --mixed_precision bf16 \
        --lora bridge=sd35-bridge lagrange=sd35-lagrange --prompts prompts.txt --num_images_per_prompt 4 \
        --guidance_scale 3.5 --rewards hpsv2.1,pickscore,imagereward --output_dir evaluation

Any text-to-image or text-to-video pipeline of diffusers is called as at inference; of videos a reward scores every
frame, and the mean counts. The output folder gets `scores.parquet` (every image), `table.md`, `table.json` and
`table.csv` (means, 95 % intervals, changes and win rates), `report.html` and `grid.png`. Started again with the same
settings, an evaluation goes on where it stopped; with more LoRAs, it adds those.
"""

import argparse
import hashlib
import inspect
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors import SafetensorError
from tqdm.auto import tqdm

from flowbp.files import write_atomically
from flowbp.inference import BaseForLast, call_arguments, lora_models, saved_class
from flowbp.judging.figures import comparison
from flowbp.judging.images import frames, to_pil
from flowbp.judging.models import EvaluatedModel, evaluated_models, lora_file, reward_names
from flowbp.judging.report import report_html
from flowbp.judging.statistics import summarise
from flowbp.judging.store import Store, write_parquet
from flowbp.judging.tables import table_csv, table_markdown
from flowbp.rewards import REWARDS, WeightedReward, load_reward, titles
from flowbp.rewards.loading import parse_model_paths
from flowbp.rewards.ocr import quoted_text
from flowbp.training.arguments import json_object
from flowbp.training.command_line import parse_args_with_config
from flowbp.training.prompts import load_prompts, load_texts
from flowbp.training.training_run import run_script
from flowbp.training.training_utils import (
    PATIENCE,
    WEIGHT_DTYPES,
    derive_seed,
    freeze,
    load_pipeline_config,
    missing_components,
)

GRID_PROMPTS = 8  # columns of grid.png: the first prompts, not chosen ones


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, and the file that `--config` names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with values for these options; the command line wins over it.")

    add = parser.add_argument_group("models").add_argument
    add("--pretrained_model_name_or_path", required=True, help="Folder or Hub id of the base pipeline.")
    add("--revision", help="Branch, tag or commit of the model on the Hub.")
    add("--variant", help="Variant of the model files, such as fp16.")
    add(
        "--lora",
        nargs="+",
        required=True,
        metavar="[NAME=]SOURCE",
        help="LoRAs: folders, .safetensors files or Hub ids, each with the name that it gets in the tables.",
    )
    add("--lora_component", default="transformer", help="Which of the pipeline's transformers the LoRAs are for.")
    add("--lora_scale", nargs="+", type=float, default=[1.0], help="Factors on each LoRA, a row for each.")
    add(
        "--base_for_last",
        nargs="+",
        type=int,
        default=[0],
        help="Run this many of the last steps with the base model, a row for each number.",
    )
    add(
        "--mixed_precision",
        choices=tuple(WEIGHT_DTYPES),
        help="Dtype of the pipeline; rewards stay float32. Default: what accelerate launch was told.",
    )
    add("--offload", action="store_true", help="The pipeline's models wait on the CPU between uses.")

    add = parser.add_argument_group("what the pipeline is called with").add_argument
    add("--height", type=int, default=512, help="Height of the pictures.")
    add("--width", type=int, default=512, help="Width of the pictures.")
    add("--num_frames", type=int, help="Frames of a video. Default: the pipeline's.")
    add("--num_inference_steps", type=int, default=25, help="Steps (the paper: 25).")
    add("--guidance_scale", type=float, help="Guidance scale. Default: the pipeline's.")
    add("--flow_shift", type=float, help="Sample with FlowMatchEulerDiscreteScheduler of this shift, as in training.")
    add(
        "--sigmas",
        choices=("stock", "linear"),
        default="stock",
        help="stock: the scheduler's own; linear: linspace(1, 1 / N, N) before its shift, as the paper.",
    )
    add(
        "--pipeline_arguments",
        type=json_object,
        default={},
        help="JSON object with more arguments of the pipeline's call, such as negative_prompt or true_cfg_scale.",
    )

    add = parser.add_argument_group("prompts and rewards").add_argument
    add("--prompts", required=True, help=".txt, .jsonl, .csv or .parquet file, or a datasets folder or Hub id.")
    add("--prompt_column", help="Column of the prompts. Default: prompt, caption or text.")
    add("--prompt_split", default="train", help="Split of a dataset.")
    add("--group_column", help="Column that groups prompts: one more table by group for each reward.")
    add("--num_prompts", type=int, help="Take this many of the first prompts.")
    add("--num_images_per_prompt", type=int, default=1, help="Images of each prompt, from different noise.")
    add("--seed", type=int, default=0, help="Seed of the noise.")
    add("--rewards", required=True, help="Rewards with commas between them: names or package.module:factory.")
    add("--reward_model_path", nargs="+", default=[], metavar="NAME=FOLDER", help="Local copies of rewards' weights.")
    add("--reward_offload", action="store_true", help="Rewards wait on the CPU between uses.")
    add("--reward_text_column", help="Column of --prompts with the text that ocr looks for. Default: what is quoted.")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=Path, required=True, help="Folder of everything; all processes must see it.")
    add("--batch_size", type=int, default=4, help="Images drawn and scored together.")
    add("--report_images", type=int, default=64, help="Images of each row in report.html: those that changed most.")
    args = parse_args_with_config(parser, argv)

    for name in ("height", "width", "num_frames", "num_inference_steps", "num_prompts", "num_images_per_prompt"):
        if vars(args)[name] is not None and vars(args)[name] < 1:
            parser.error(f"--{name} must be at least 1, got {vars(args)[name]}")
    for name in ("batch_size", "report_images"):
        if vars(args)[name] < 1:
            parser.error(f"--{name} must be at least 1, got {vars(args)[name]}")
    if min(args.base_for_last) < 0:
        parser.error(f"--base_for_last must be at least 0, got {min(args.base_for_last)}")
    if not all(math.isfinite(scale) for scale in args.lora_scale):
        parser.error("--lora_scale must be finite numbers")
    if args.mixed_precision is None:
        args.mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if args.mixed_precision not in WEIGHT_DTYPES:
            parser.error(f"--mixed_precision must be no, fp16 or bf16, accelerate says {args.mixed_precision}")
    return args


def pipeline_class(args: argparse.Namespace, config: dict[str, Any]) -> type[DiffusionPipeline]:
    """The class that the model was saved with, if LoRAs and callbacks of this run can be used with it."""
    Pipeline = saved_class(config, args.lora_component)
    if max(args.base_for_last) and "callback_on_step_end" not in inspect.signature(Pipeline.__call__).parameters:
        raise ValueError(f"--base_for_last: {Pipeline.__name__} takes no callback_on_step_end; leave the option out.")
    return Pipeline


def geneval_tasks(path: str, prompts: Sequence[str]) -> dict[str, str]:
    """The task of each prompt of GenEval's `evaluation_metadata.jsonl`, in the order of the benchmark's table."""
    from flowbp.rewards.geneval import TASKS, read_metadata

    tasks = {prompt: entry["tag"] for prompt, entry in read_metadata(Path(path)).items()}
    missing = [prompt for prompt in prompts if prompt not in tasks]
    if missing:
        raise ValueError(f"--prompts {path}: GenEval's file has no prompt {missing[0]!r}; leave --prompt_column out.")
    return {prompt: tasks[prompt] for prompt in sorted(prompts, key=lambda prompt: TASKS.index(tasks[prompt]))}


def load_loras(pipe: DiffusionPipeline, rows: Sequence[EvaluatedModel], component: str) -> dict[str, str]:
    """Load the rows' LoRAs side by side; returns adapter names by source."""
    names: dict[str, str] = {}
    for source in dict.fromkeys(row.lora for row in rows if row.lora is not None):
        names[source] = name = f"lora_{len(names)}"
        file = lora_file(source)
        given = {"weight_name": file.name} if file is not None else {}
        where = file.parent if file is not None else source
        try:
            # As train_flowbp.py saves them: pipelines without a LoRA loader have the LoRA in the transformer itself.
            if hasattr(pipe, "load_lora_weights") and component == "transformer":
                pipe.load_lora_weights(where, adapter_name=name, use_safetensors=True, **given)
            else:
                model = getattr(pipe, component)
                model.load_lora_adapter(where, adapter_name=name, prefix=None, use_safetensors=True, **given)
        except (ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise ValueError(f"--lora {source}: does not fit {type(pipe).__name__}: {error}") from error
        # LoRAs of other models are skipped with a warning by diffusers.
        if not any(name in model.peft_config for model in lora_models(pipe)):
            raise ValueError(f"--lora {source}: has no layer of this {type(pipe).__name__}'s transformer.")
    return names


def use_row(pipe: DiffusionPipeline, row: EvaluatedModel, adapters: dict[str, str], steps: int) -> BaseForLast | None:
    """Switch to a row's model; returns the callback that its calls need."""
    # Loaders of pipelines know LoRAs of text encoders too.
    parts = [pipe] if hasattr(pipe, "set_adapters") else lora_models(pipe)
    for part in parts:
        if row.lora is None or row.base_for_last >= steps:
            part.disable_lora()
        else:
            part.enable_lora()
            part.set_adapters(adapters[row.lora], row.scale)
    return BaseForLast(row.base_for_last) if 0 < row.base_for_last < steps else None


def score(
    reward: torch.nn.Module, names: Sequence[str], images: torch.Tensor, prompts: Sequence[str]
) -> dict[str, list[float]]:
    """B scores by reward, of pictures (B, 3, H, W), or means over the frames of videos (B, F, 3, H, W)."""
    if bool(images.isnan().any()):
        raise ValueError("Expected pictures in [0, 1], the pipeline made NaN; try another --mixed_precision.")
    pictures, texts = frames(images, prompts)
    # Of several rewards load_reward makes a sum whose parts can be had alone.
    is_sum = isinstance(reward, WeightedReward) and list(reward.weights) == list(names)
    parts = reward.parts(pictures, texts) if is_sum else {names[0]: reward(pictures, texts)}
    found = {}
    for name, values in parts.items():
        # NaN is a judge's answer without a score; the tables leave such images out and count them.
        if values.shape != (len(pictures),) or bool(values.isinf().any()):
            raise ValueError(
                f"reward {name}: expected {len(pictures)} finite scores, got {tuple(values.shape)}: {values.tolist()}."
            )
        found[name] = values.double().unflatten(0, (len(images), -1)).nanmean(1).tolist()
    return found


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Evaluate."""
    args = parse_args(argv)

    # What can be known to be wrong is, before any model is loaded.
    source = {"revision": args.revision}
    model = args.pretrained_model_name_or_path
    config = load_pipeline_config(DiffusionPipeline, model, source)
    Pipeline = pipeline_class(args, config)
    size = {name: vars(args)[name] for name in ("height", "width", "num_frames")}
    steps, count = args.num_inference_steps, args.num_images_per_prompt
    rollout = {"num_inference_steps": steps, "guidance_scale": args.guidance_scale}
    if args.sigmas == "linear":
        rollout["sigmas"] = torch.linspace(1, 1 / steps, steps).tolist()
    call = call_arguments(Pipeline, {**size, **rollout, **args.pipeline_arguments})
    prompts = load_prompts(args.prompts, column=args.prompt_column, split=args.prompt_split)[: args.num_prompts]
    rewards = reward_names(args.rewards)
    model_paths = parse_model_paths(args.reward_model_path)
    columns = {"prompt_column": args.prompt_column, "split": args.prompt_split}
    options: dict[str, Any] = {}
    if args.reward_text_column is not None:
        options["texts"] = load_texts(args.prompts, args.reward_text_column, **columns)
    if any(name in REWARDS and name.startswith("ocr") for name in rewards) and "texts" not in options:
        for prompt in prompts:
            quoted_text(prompt)
    if "geneval" in rewards:
        # Its prompts come with what their pictures must show.
        options["metadata_path"] = args.prompts
    # What table by group there is: prompt -> group, and of which rewards.
    grouped, grouped_rewards = {}, rewards
    if args.group_column is not None:
        grouped = load_texts(args.prompts, args.group_column, **columns)
    elif "geneval" in rewards:
        grouped, grouped_rewards = geneval_tasks(args.prompts, prompts), ["geneval"]
    rows = evaluated_models(args.lora, args.lora_scale, args.base_for_last)
    for lora in {row.lora for row in rows if row.lora is not None and row.digest is None}:
        try:
            snapshot_download(lora, allow_patterns="*.safetensors")
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise ValueError(
                f"--lora {lora}: no such folder or file, and not found on the Hub or in its cache "
                f"({type(error).__name__}); give a folder, a .safetensors file or a Hub id."
            ) from error

    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[PATIENCE])
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise ValueError(
            f"expected {expected} processes (WORLD_SIZE), accelerate runs {accelerator.num_processes}; on CPUs set "
            "ACCELERATE_USE_CPU=true."
        )
    settings = {
        "model": str(model),
        "revision": args.revision,
        "variant": args.variant,
        "dtype": args.mixed_precision,
        "lora_component": args.lora_component,
        "flow_shift": args.flow_shift,
        "call": call,
        "prompts": args.prompts,
        "prompts_sha256": hashlib.sha256(json.dumps([prompts, options, grouped]).encode()).hexdigest(),
        "num_prompts": len(prompts),
        "num_images_per_prompt": count,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "rewards": rewards,
        "reward_model_path": args.reward_model_path,
        "device": accelerator.device.type,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    store = Store(args.output_dir, settings, rows, images=len(prompts) * count, batch_size=args.batch_size)
    pending = store.pending()
    if pending:
        reward = load_reward(",".join(rewards), model_paths, args.reward_offload, **options)
        freeze(reward).to(accelerator.device)

    # Batches are the same ones for any number of processes; each process takes its share of those that are left, of
    # which all must have the same list before the first of them finishes one.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        store.create()
    accelerator.wait_for_everyone()
    mine = pending[accelerator.process_index :: accelerator.num_processes]

    # The noise of an image depends on its prompt's place and its number among the prompt's images, and on no model.
    def seed_of(place: int) -> int:
        prompt, number = divmod(place, count)
        return derive_seed("evaluation", args.seed, prompt, *([number] if number else []))

    if pending:
        loading = {"variant": args.variant, "dtype": WEIGHT_DTYPES[args.mixed_precision], "use_safetensors": True}
        missing = missing_components(config)
        if args.flow_shift is not None:
            missing = {**missing, "scheduler": FlowMatchEulerDiscreteScheduler(shift=args.flow_shift)}
        pipe = Pipeline.from_pretrained(model, trust_remote_code=False, **missing, **loading, **source)
        pipe.set_progress_bar_config(disable=True)
        adapters = load_loras(pipe, rows, args.lora_component)
        if args.offload:
            pipe.enable_model_cpu_offload(device=accelerator.device)
        else:
            pipe.to(accelerator.device)
        if accelerator.is_main_process and len(pending) < len(store.batches()):
            print(f"Going on: {len(store.batches()) - len(pending)} of {len(store.batches())} batches were finished.")
        progress = tqdm(mine, unit="batch", disable=not accelerator.is_main_process)
        current: EvaluatedModel | None = None
        for row, batch in progress:
            if row is not current:
                callback, current = use_row(pipe, row, adapters, steps), row
                progress.set_description(row.name)
            places = store.places(batch)
            texts = [prompts[place // count] for place in places]
            arguments = dict(call)
            if isinstance(arguments.get("negative_prompt"), str):
                arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(texts)
            if callback is not None:
                arguments["callback_on_step_end"] = callback
            noise = [torch.Generator().manual_seed(seed_of(place)) for place in places]
            # What a pipeline or reward draws besides the given noise depends on the batch alone.
            torch.manual_seed(seed_of(places[0]))
            images = pipe(prompt=texts, generator=noise, **arguments)[0].float()
            store.add(row, batch, to_pil(images), score(reward, rewards, images, texts))
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        # The places of each group's prompts, by group; in the order in which `grouped` names them.
        groups: dict[str, list[int]] = {group: [] for group in grouped.values()}
        for place, prompt in enumerate(prompts if grouped else []):
            groups[grouped[prompt]].append(place)
        groups = {group: places for group, places in groups.items() if places}
        seeds = [seed_of(place) for place in range(store.images)]
        write_results(args, store, rewards, prompts, dict.fromkeys(grouped_rewards, groups) if groups else {}, seeds)
    accelerator.end_training()


def write_results(
    args: argparse.Namespace,
    store: Store,
    rewards: Sequence[str],
    prompts: Sequence[str],
    groups: Mapping[str, Mapping[str, Sequence[int]]],
    seeds: Sequence[int],
) -> None:
    """Write scores, tables, report and grid of a finished evaluation, and print the tables."""
    folder, count = args.output_dir, args.num_images_per_prompt
    found = {row.name: store.scores(row) for row in store.models}
    columns: dict[str, list[Any]] = {
        "model": [row.name for row in store.models for _ in seeds],
        "lora": [row.lora for row in store.models for _ in seeds],
        "lora_scale": [row.scale for row in store.models for _ in seeds],
        "base_for_last": [row.base_for_last for row in store.models for _ in seeds],
        "prompt_index": [place // count for place in range(len(seeds))] * len(store.models),
        "prompt": [prompts[place // count] for place in range(len(seeds))] * len(store.models),
        "image_index": [place % count for place in range(len(seeds))] * len(store.models),
        "seed": list(seeds) * len(store.models),
        "image": [
            str(store.image(row, place).relative_to(folder)) for row in store.models for place in range(len(seeds))
        ],
    }
    if groups:
        group_of = {place: group for group, places in next(iter(groups.values())).items() for place in places}
        columns["group"] = [group_of[place // count] for place in range(len(seeds))] * len(store.models)
    columns |= {reward: [value for row in store.models for value in found[row.name][reward]] for reward in rewards}
    write_parquet(folder / "scores.parquet", columns)

    scores = {
        reward: {
            name: torch.tensor(values[reward], dtype=torch.float64).unflatten(0, (-1, count))
            for name, values in found.items()
        }
        for reward in rewards
    }
    records = summarise(scores, groups)
    for reward in set(rewards) - {record["reward"] for record in records}:
        print(f"{reward} gave no image a score; it is left out of the tables.")
        del scores[reward]
    if not records:
        raise ValueError("Expected scores, got none from any reward; see scores.parquet.")
    write_atomically(
        folder / "table.json", json.dumps({"settings": store.settings, "records": records}, indent=2) + "\n"
    )
    write_atomically(folder / "table.md", table_markdown(records))
    write_atomically(folder / "table.csv", table_csv(records))
    write_atomically(folder / "report.html", report_html(store, records, scores, prompts, args.report_images))

    first = [place * count for place in range(min(GRID_PROMPTS, len(prompts)))]
    pictures = {}
    for row in store.models:
        pictures[row.name] = []
        for place in first:
            with Image.open(store.image(row, place)) as image:
                pictures[row.name].append(image.convert("RGB"))
    comparison(
        pictures,
        [prompts[place // count] for place in first],
        folder / "grid.png",
        title="Base and LoRAs on the first prompts",
        subtitle=f"The same noise in each column. Under each picture: {titles(rewards)[rewards[0]]}",
        scores={name: [values[rewards[0]][place] for place in first] for name, values in found.items()},
    )
    print(f"\n{len(prompts)} prompts, {count} images of each\n\n{table_markdown(records)}")
    print(f"Scores, tables, report.html and grid.png are in {folder}")


if __name__ == "__main__":
    run_script(main)
