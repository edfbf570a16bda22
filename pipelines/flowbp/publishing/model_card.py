# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The model card of a run: README.md, made from `run.json`, the files in its folder, and `card_template.md`.

Texts of users (prompts, names, messages) are data everywhere: YAML is dumped, Markdown escaped, code quoted, and
only the template itself is read as a template.
"""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..files import write_atomically
from .card_code import (
    has_lora_loader,
    is_full,
    makes_videos,
    missing_components,
    sizes,
    source_words,
    training_command,
    usage_code,
)
from .card_text import WHOLE_PATH, hide_paths, last_part, markdown
from .published_files import allowed_files
from .run_info import redact, write_run_json

TEMPLATE = files(__package__) / "card_template.md"
# Options in the card's short table of settings; the long one has all.
SUMMARY = (
    "train init_lora lora_layers rank lora_alpha use_dora use_rslora optimizer learning_rate lr_scheduler "
    "max_grad_norm mixed_precision use_ema ema_decay velocity_anchor reward_clip"
).split()


def _interval(value: Mapping[str, float | None], decimals: int, sign: str = "") -> str:
    numbers = [value["mean"], value["low"], value["high"]]
    mean, low, high = ("–" if number is None else f"{number:{sign}.{decimals}f}" for number in numbers)
    return f"{mean} [{low}, {high}]"


def _rewards_table(rewards: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Name, role, number of images and the three intervals of each reward."""
    table = []
    for reward in rewards:
        low, high = reward["difference"]["low"], reward["difference"]["high"]
        # Two digits of what is uncertain.
        known = low is not None and high is not None and high > low
        decimals = min(6, max(0, 1 - math.floor(math.log10(high - low)))) if known else 3
        table.append(
            {
                "name": markdown(reward["name"]),
                "role": reward["role"],
                "images": reward["images"],
                "base": _interval(reward["base"], decimals),
                "trained": _interval(reward["trained"], decimals),
                "difference": _interval(reward["difference"], decimals, "+"),
            }
        )
    return table


def _license(base_model: str, local: bool) -> tuple[dict[str, Any], str]:
    """Metadata about the licence from the base model's own card, and a sentence."""
    try:
        source = Path(base_model).expanduser() / "README.md" if local else base_model
        card = ModelCard.load(source, ignore_metadata_errors=True).data.to_dict()
    except Exception:
        # No network, no card, or a card that cannot be read: the card of the run is written all the same.
        card = {}
    if not isinstance(card.get("license"), str | list):
        return {"license": "other"}, "The licence of the base model applies; it could not be looked up here."
    data = {name: card[name] for name in ("license", "license_name", "license_link") if card.get(name)}
    link = data.get("license_link")
    if isinstance(link, str) and not re.match(r"https?://", link):
        # Relative to the base model's repository.
        data.pop("license_link")
        if not local:
            data["license_link"] = f"https://huggingface.co/{base_model}/blob/main/{link}"
    name = markdown(data.get("license_name") or data["license"])
    return data, f"The licence of the base model applies: {name}."


def _size_names(settings: Mapping[str, Any]) -> list[str]:
    """Each size of the run's images as text: `512 x 768`, or `height 512` where one side is the pipeline's."""
    return [
        " x ".join(map(str, size.values())) if len(size) == 2 else "".join(f"{name} {size[name]}" for name in size)
        for size in sizes(settings)
    ]


def _summary(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of the card's short table of settings, as Markdown."""
    options, machine = run["settings"], run["hardware"]
    factors = (options.get("train_batch_size"), options.get("gradient_accumulation_steps"), machine["processes"])
    names = "(batch size, micro-batches, processes)"
    batch = f"{math.prod(factors)} = {' x '.join(map(str, factors))} {names}" if all(factors) else None
    minutes, seconds = divmod(round(run["timings"]["seconds"] or 0), 60)
    used = [name for name in SUMMARY if options.get(name) and (name != "ema_decay" or options.get("use_ema"))]
    table = {
        "method": f"{run['method']['title']} ({run['method']['name']})",
        **{f"method option `{name}`": value for name, value in run["method"]["options"].items()},
        "reward": options.get("reward"),
        "prompts": options.get("prompts"),
        "image size (height x width)": _size_names(options) or None,
        "updates": run["updates"],
        "prompts per update": batch,
        **{f"`{name}`": options[name] for name in used},
        "seed": options.get("seed"),
        "pipeline": run["pipeline_class"],
        "hardware": f"{machine['device']}, {machine['processes']} process(es); {machine['cpu']}",
        "time": f"{minutes // 60} h {minutes % 60} min {seconds} s",
    }
    return [(name, markdown(value)) for name, value in table.items() if value is not None]


def _metadata(
    run: Mapping[str, Any], images: Sequence[Mapping[str, Any]], local: bool, name: str, license_data: dict[str, Any]
) -> ModelCardData:
    """The metadata that the Hub's pages are made from.

    Args:
        run: of `run.json`, without images and paths.
        images: prompts and files that are in the folder.
        local: whether the base model is a folder, which is not named.
        name: of the result.
        license_data: of `_license`.
    """
    start = "image" if source_words(run["settings"]) else "text"
    task = f"{start}-to-{'video' if makes_videos(run) else 'image'}"
    names = [reward["name"] for reward in run["rewards"]] or [run["settings"].get("reward") or ""]
    tags = [re.sub(r"[^\w.]+", "-", reward, flags=re.ASCII).strip("-").lower() for reward in names]
    results = [
        EvalResult(
            task_type=task,
            dataset_type="prompts",
            dataset_name=_evaluation_prompts(run["settings"]),
            metric_type=reward["name"],
            metric_name=f"{reward['name']} ({reward['role']})",
            metric_value=reward["trained"]["mean"],
        )
        for reward in run["rewards"]
        if reward["trained"]["mean"] is not None
    ]
    kind = ["full-finetune"] if is_full(run) else ["lora", "template:sd-lora"]
    optional = {
        "base_model": None if local else run["base_model"],
        "base_model_relation": None if local else "finetune" if is_full(run) else "adapter",
        "widget": [{"text": image["prompt"], "output": {"url": image["trained"]}} for image in images] or None,
    }
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        tags=[task, "diffusers", *kind, "flowbp", "flow-matching", *filter(None, tags)],
        eval_results=results or None,
        model_name=name,
        **license_data,
        **{key: value for key, value in optional.items() if value is not None},
    )


def _evaluation_prompts(settings: Mapping[str, Any]) -> str:
    """What the rewards were measured on; the validation prompts may be the training's own."""
    return settings.get("eval_prompts") or "validation prompts"


def _run_text(run: Mapping[str, Any]) -> dict[str, Any]:
    """The template's variables that need nothing but `run.json` without paths."""
    options, git, selected = run["settings"], run["git"], run["selected"]
    best = selected["kind"] == "best"
    return {
        "is_full": is_full(run),
        "trained": "fine-tuned transformer" if is_full(run) else "LoRA",
        "method": markdown(run["method"]["title"]),
        "reward": markdown(options.get("reward") or [reward["name"] for reward in run["rewards"]] or [""]),
        "versions": run["versions"],
        "rewards": _rewards_table(run["rewards"]),
        "held_out": any(reward["role"] == "held out" for reward in run["rewards"]),
        "evaluation_prompts": markdown(_evaluation_prompts(options)),
        "prompts_are_known": not options.get("eval_prompts") and not options.get("validation_prompt"),
        "selected_update": selected["update"],
        "is_best": best,
        "selected_why": "the best by the held-out reward" if best else "the last one",
        "updates": run["updates"],
        "skipped_updates": run["skipped_updates"],
        "alarms": [{key: markdown(value) for key, value in alarm.items()} for alarm in run["alarms"]],
        "sizes": [markdown(name) for name in _size_names(options)],
        "has_lora_loader": has_lora_loader(run),
        "has_other_base": options.get("quantization_config_path") is not None and not run.get("bitsandbytes"),
        "summary": _summary(run),
        "settings": [(markdown(key), markdown(value)) for key, value in options.items() if value is not None],
        "reproduce": training_command(run),
        "init_lora": markdown(options.get("init_lora") or ""),
        "resumed": markdown(options.get("resume_from_checkpoint") or ""),
        "commit": "commit unknown" if git is None else git["commit"] + (" with local changes" if git["dirty"] else ""),
        "libraries": ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "diffusers", "peft")),
    }


def make_card(output_dir: Path) -> str:
    """The text of a run's card.

    Args:
        output_dir: with `run.json`; images that may be published (`allowed_files`) are shown.

    Raises:
        OSError, ValueError, KeyError: `run.json` is missing or is not as the training writes it.
    """
    content = redact(json.loads((output_dir / "run.json").read_text(encoding="utf-8")))
    # Lone surrogates, which a command line may have, are not Unicode text and cannot be in a card.
    run = json.loads(json.dumps(content, ensure_ascii=False).encode("utf-8", "replace"))
    published = {path.relative_to(output_dir).as_posix() for path in allowed_files(output_dir)}
    images = [image for image in run.pop("images") if image["trained"] in published]
    base_path = run["base_model"]
    local = bool(WHOLE_PATH.match(base_path)) or Path(base_path).expanduser().exists()
    license_data, license_text = _license(base_path, local)
    # In everything but the prompts; the base model's folder also where its path is relative.
    run = hide_paths(run, base_path if local else None)
    base, result = markdown(run["base_model"]), run["hub_model_id"] or output_dir.resolve().name
    prompt = images[0]["prompt"] if images else "a photo of a cat"
    with as_file(TEMPLATE) as template:
        card = ModelCard.from_template(
            _metadata(run, images, local, last_part(result), license_data),
            template_path=str(template),
            title=markdown(last_part(result)),
            base=base if local else f"[{base}](https://huggingface.co/{run['base_model']})",
            gallery=bool(images),
            before_after="before_after.png" in published,
            has_sources=bool(source_words(run["settings"])),
            use=usage_code(run, missing_components(base_path), result, prompt),
            license_text=license_text,
            **_run_text(run),
        )
    return str(card)


def write_card(output_dir: Path) -> Path:
    """Write README.md of a run's folder, see `make_card`; returns the file."""
    path = output_dir / "README.md"
    write_atomically(path, make_card(output_dir))
    return path


def name_repository(output_dir: Path, repo_id: str) -> None:
    """Name a repository in `run.json` and in the card, which says how to load the result from it.

    A card that differs from what the training wrote was edited: it stays as it is, and a line says so.

    Args:
        output_dir: the run's folder, with `run.json`.
        repo_id: `user/name`.
    """
    card, record = output_dir / "README.md", output_dir / "run.json"
    try:
        is_own = not card.exists() or card.read_text(encoding="utf-8") == make_card(output_dir)
    except (KeyError, TypeError, ValueError):
        # No card can be made of a record that is not as the training wrote it.
        is_own = False
    write_run_json(record, {**json.loads(record.read_text(encoding="utf-8")), "hub_model_id": repo_id})
    if is_own:
        write_card(output_dir)
    else:
        print(f"{card} was edited and stays as it is; make it name {repo_id}.", file=sys.stderr)
