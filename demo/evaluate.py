# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Base against aligned on held-out prompts, with the same noise: rewards, exact reading, colours, 95 % intervals.

    python demo/evaluate.py --config demo/evaluation.yaml --output_dir demo/output

Writes `evaluation.json` into the output folder and prints a table.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from text_pictures import colours_right
from tqdm.auto import tqdm

from flowbp.judging.statistics import interval
from flowbp.rewards import load_reward
from flowbp.rewards.ocr import OCRReward
from flowbp.training.command_line import parse_args_with_config
from flowbp.training.model import missing_components
from flowbp.training.prompts import load_prompts
from flowbp.training.seeds import make_generator

# Rows of the table: what is measured of a picture, and whether it is a share.
MEASURES = {
    "training reward (log-probability per character)": False,
    "exact reading, training recogniser (PP-OCRv4)": True,
    "exact reading, held-out judge (PP-OCRv5)": True,
    "colours right": True,
}


@torch.no_grad()
def measure(
    pipe: StableDiffusion3Pipeline,
    reward: torch.nn.Module,
    prompts: list[str],
    call: dict[str, Any],
    seed: int,
    batch_size: int,
    title: str,
) -> dict[str, torch.Tensor]:
    """Draw a picture of each prompt, from noise that only `seed` and the prompt's place decide, and measure it.

    Returns:
        For each of `MEASURES` a `(len(prompts),)` float64 tensor; shares are 0 or 1.
    """
    trained, judge = OCRReward("v4"), OCRReward("v5")
    found: dict[str, list[torch.Tensor]] = {name: [] for name in MEASURES}
    for start in tqdm(range(0, len(prompts), batch_size), desc=title, unit="batch"):
        batch = prompts[start : start + batch_size]
        noise = [make_generator("evaluation", seed, start + place) for place in range(len(batch))]
        images = pipe(batch, generator=noise, output_type="pt", **call).images.float()
        values = (reward(images, batch), trained.exact(images, batch), judge.exact(images, batch))
        for name, value in zip(MEASURES, (*values, colours_right(images, batch)), strict=True):
            found[name].append(value.double())
    return {name: torch.cat(values) for name, values in found.items()}


def summarise(base: dict[str, torch.Tensor], aligned: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Mean and 95 % interval of base, aligned and their paired difference, for each measure."""
    rows = []
    for name, is_share in MEASURES.items():
        columns = {"base": base[name], "aligned": aligned[name], "change": aligned[name] - base[name]}
        row: dict[str, Any] = {"measure": name, "share": is_share}
        for column, values in columns.items():
            row[column] = {"mean": values.mean().item(), "interval": interval(values)}
        rows.append(row)
    return rows


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The rows as texts: name, base, aligned, change; shares in per cent, their change in points."""

    def cell(value: dict[str, Any], is_share: bool, sign: str) -> str:
        factor, digits = (100, 1) if is_share else (1, 2)
        mean, low, high = (factor * number for number in (value["mean"], *value["interval"]))
        return f"{mean:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"

    signs = {"base": "", "aligned": "", "change": "+"}
    return [
        [
            row["measure"] + (", %" if row["share"] else ""),
            *(cell(row[column], row["share"], sign) for column, sign in signs.items()),
        ]
        for row in rows
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text with aligned columns."""
    lines = [["", "base", "aligned", "change"], *cells(rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    padded = [
        line[0].ljust(widths[0])
        + "".join("   " + text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    ]
    return "\n".join([padded[0], "-" * len(padded[0]), *padded[1:]])


def main(argv: list[str] | None = None) -> None:
    """Evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--config", help="YAML file with values for these options; the command line wins over it.")
    add("--pretrained_model_name_or_path", required=True, help="Folder of the pipeline.")
    add("--output_dir", type=Path, required=True, help="Folder of the LoRA; evaluation.json goes there.")
    add("--reward", required=True, help="The training reward.")
    add("--eval_prompts", required=True, help="Held-out prompts, one a line.")
    add("--num_eval_prompts", type=int, default=384, help="How many of them.")
    add("--eval_batch_size", type=int, default=32, help="Pictures drawn together.")
    add("--resolution", type=int, required=True, help="Height and width of the pictures.")
    add("--num_inference_steps", type=int, required=True, help="Steps of a rollout.")
    add("--guidance_scale", type=float, required=True, help="Guidance scale.")
    add("--max_sequence_length", type=int, required=True, help="As in training.")
    add("--seed", type=int, default=0, help="Seed of the noise.")
    args = parse_args_with_config(parser, argv)
    prompts = load_prompts(args.eval_prompts)[: args.num_eval_prompts]

    path = args.pretrained_model_name_or_path
    missing = missing_components(StableDiffusion3Pipeline.load_config(path))
    pipe = StableDiffusion3Pipeline.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, **missing
    )
    pipe.set_progress_bar_config(disable=True)
    call = {
        "height": args.resolution,
        "width": args.resolution,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "max_sequence_length": args.max_sequence_length,
    }
    started = time.perf_counter()
    reward = load_reward(args.reward)
    base = measure(pipe, reward, prompts, call, args.seed, args.eval_batch_size, "base")
    pipe.load_lora_weights(args.output_dir)
    aligned = measure(pipe, reward, prompts, call, args.seed, args.eval_batch_size, "aligned")
    rows = summarise(base, aligned)
    report = {"prompts": len(prompts), "seed": args.seed, "seconds": time.perf_counter() - started, "rows": rows}
    (args.output_dir / "evaluation.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    print(f"\n{len(prompts)} held-out prompts, the same noise for both; mean [95 % interval]\n")
    print(table(rows))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: error: {' '.join(str(error).split())}")
