# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Peak GPU memory of `--train full` on 1, 2, 4 and 8 GPUs, computed from the models' public configurations.

    python benchmarks/memory_full.py --output benchmarks/results/memory_full_computed.json

As `memory.py`, whose parts it uses: activations are counted on torch's meta device. What FSDP2 adds is computed from
the sizes of its groups (a group for each block, and one for what lies outside of them).
"""

import argparse
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import memory
from memory import GPUS, MARGIN, MODELS, Pass, build, clip_score, decode_pass, meta, no_grad_peak, transformer_pass
from meters import GIB

NUMBERS_OF_GPUS = (1, 2, 4, 8)
# Bytes of a parameter: float32 weight, gradient and two moments of AdamW; the average in float32.
RESIDENT, AVERAGE = 16, 4
# Bytes of a gathered parameter and its gradient in bf16, and of the float32 copy of it that is exchanged.
GATHERED, EXCHANGED = 2, 4


@cache
def groups(name: str) -> tuple[int, int, int, int]:
    """Parameters of a model: all, those of its largest block, and those outside of blocks; bytes of its buffers."""
    transformer = build(*MODELS[name].transformer)
    names = transformer._no_split_modules
    blocks = [part for part in transformer.modules() if type(part).__name__ in names]
    sizes = [sum(each.numel() for each in block.parameters()) for block in blocks]
    total = sum(each.numel() for each in transformer.parameters())
    return total, max(sizes), total - sum(sizes), sum(each.nbytes for each in transformer.buffers())


@cache
def activations(name: str, pixels: int, batch: int) -> tuple[Pass, int]:
    """A replay's forward and backward pass with gradient checkpointing, gradients freed at once; a rollout's call."""
    model = MODELS[name]
    transformer = build(*model.transformer).requires_grad_(True)
    transformer.enable_gradient_checkpointing()
    for parameter in transformer.parameters():
        # FSDP2 takes a block's gradients away when all of them are there.
        parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
    replay = transformer_pass(transformer, model.inputs(batch, pixels))
    inputs = model.inputs(batch * model.branches_per_call, pixels)
    return replay, no_grad_peak(lambda: transformer(**inputs, return_dict=False)[0])


def compute(name: str, gpus: int, pixels: int, batch: int, keeps_average: bool) -> dict[str, Any]:
    """Peak bytes of each stage on each GPU, with gradient checkpointing, one image decoded at a time and prompts
    encoded before.

    Args:
        name: of the model.
        gpus: that share the weights.
        pixels: height and width.
        batch: samples of each GPU.
        keeps_average: whether the average over the updates is on the GPU.
    """
    total, block, outside, buffers = groups(name)
    static = memory._static(name, 4, None, "clip-vit-h")
    shard = -(-total // gpus)
    resident = {
        "weights_gradients_adamw": shard * RESIDENT,
        "average": shard * AVERAGE * keeps_average,
        "buffers": buffers,
        "vae": static["vae"],
        "reward": static["reward"],
    }
    replay, call = activations(name, pixels, batch)
    vae = build(*MODELS[name].vae)
    vae.enable_gradient_checkpointing()
    latents = meta(batch, vae.config.latent_channels, pixels // 8, pixels // 8)
    decode = decode_pass(vae, lambda images: clip_score(memory._reward(), images), latents, 1)
    base = sum(resident.values())
    # A block, the next one that is gathered ahead, and what lies outside of blocks.
    gathered = GATHERED * (2 * block + outside)
    # Gradients of a block, their float32 copy, and that of the block before, which is still being exchanged.
    exchanged = GATHERED * block + EXCHANGED * 2 * block
    stages = {
        "rollout": base + gathered + call,
        "decode+reward": base + decode["peak"],
        "sweep": base + gathered + exchanged + replay.peak,
        # AdamW's step, one parameter at a time: temporary values of the largest.
        "optimizer": base + EXCHANGED * 3 * block // gpus,
    }
    peak = max(stages.values())
    return {
        "model": name,
        "gpus": gpus,
        "resolution": pixels,
        "batch": batch,
        "average": keeps_average,
        "parameters": total,
        "resident": resident,
        "stages": stages,
        "peak": peak,
        "fits": {gpu: peak / GIB + MARGIN <= size for gpu, size in GPUS.items()},
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    lines = [
        "# Peak GPU memory of `--train full`, computed",
        "",
        f"By `{report['command']}`. Each GPU's largest stage in GiB, without and with the average over the updates "
        "(`--use_ema`; `--offload_ema` keeps it on the CPU): float32 weights, gradients and AdamW moments in shards, "
        "computed in bf16, `--gradient_checkpointing --samples_per_decode 1 --precompute_prompt_embeds`, reward CLIP "
        f"ViT-H/14. *Fits in 80 GB*: the larger number and {MARGIN} GiB. Batch: of each GPU.",
        "",
        "| model | pixels | batch | "
        + " | ".join(f"{count} GPUs" for count in NUMBERS_OF_GPUS)
        + " | fits in 80 GB |",
        "|" + "---|" * (4 + len(NUMBERS_OF_GPUS)),
    ]
    rows: dict[tuple[Any, ...], dict[tuple[int, bool], dict[str, Any]]] = {}
    for row in report["rows"]:
        key = (MODELS[row["model"]].title, row["resolution"], row["batch"])
        rows.setdefault(key, {})[row["gpus"], row["average"]] = row
    for key, found in rows.items():
        cells = [f"{found[n, False]['peak'] / GIB:.1f} / {found[n, True]['peak'] / GIB:.1f}" for n in NUMBERS_OF_GPUS]
        fitting = [count for count in NUMBERS_OF_GPUS if found[count, True]["fits"]["80 GB"]]
        fits = f"from {fitting[0]} GPU{'s' if fitting[0] > 1 else ''} on" if fitting else "no"
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(cells)} | {fits} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Compute the table and print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS), help="Default: all.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the table goes beside it as .md.")
    args = parser.parse_args(argv)
    rows = [
        compute(name, gpus, pixels, batch, keeps_average)
        for name in args.model
        for pixels, batch in ((512, 1), (512, 4), (1024, 1))
        for gpus in NUMBERS_OF_GPUS
        for keeps_average in (False, True)
    ]
    command = "python benchmarks/memory_full.py --output benchmarks/results/memory_full_computed.json"
    report = {"command": command, "computed": True, "margin_gib": MARGIN, "rows": rows}
    print(markdown(report), end="")
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    args.output.with_suffix(".md").write_text(markdown(report), encoding="utf-8")


if __name__ == "__main__":
    main()
