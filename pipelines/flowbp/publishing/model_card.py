# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The model card of a run: README.md from run.json, the files in the folder, and `model_cards/template.md`.

Texts of users (prompts, names, messages) are data everywhere: YAML is dumped, Markdown escaped, code quoted, and
nothing but the template itself is read as a template.
"""

import inspect
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..files import write_atomically
from .push import LORA_FILE, allowed_files
from .run_info import redact

# Options of the table of the card's main part; the others are in the long one.
SUMMARY = (
    "lora_layers rank lora_alpha learning_rate lr_scheduler max_grad_norm mixed_precision use_ema ema_decay "
    "velocity_anchor reward_clip"
).split()
# Options that are arguments of the pipeline's call under the same name.
CALL = "height width num_frames num_inference_steps guidance_scale max_sequence_length".split()
# What pipelines that make videos call the number of frames.
FRAMES = ("num_frames", "frames")
# Pipelines whose pictures are not in `images`.
PICTURES = {"Kandinsky5T2IPipeline": "image"}
DTYPES = {"no": "torch.float32", "fp16": "torch.float16", "bf16": "torch.bfloat16"}
# A path inside a text: of two parts or more, after nothing that makes it a part of an address or a word.
PATH = re.compile(
    r"""file:/+[^\s"',;]+|\b[A-Za-z]:\\[^\s"',;]+|(?<![\w/:.~-])(?:~|\.{1,2})?/(?:[^\s/"',;=|]+/)+[^\s/"',;=|]*"""
)

WHOLE_PATH = re.compile(r"/|(?:~[\w.-]*|\.{1,2}|[A-Za-z]:)[/\\]|\\\\")


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def hide_paths(value: Any, folder: str | None = None) -> Any:
    """`value` with absolute paths in its strings shortened to their last part; Hub ids, URLs and relative paths stay.

    Args:
        value: what JSON holds.
        folder: a relative path that is shortened too.
    """
    if isinstance(value, Mapping):
        return {key: hide_paths(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [hide_paths(item, folder) for item in value]
    if not isinstance(value, str):
        return value
    option, equals, word = value.partition("=") if value.startswith("--") else ("", "", value)
    if word == folder or (WHOLE_PATH.match(word) and "\n" not in word):
        return option + equals + _last(word)
    return PATH.sub(lambda found: _last(found[0]), value)


def markdown(value: Any) -> str:
    """A value as text in a line or a cell of Markdown, whatever characters it has."""
    if isinstance(value, list):
        return ", ".join(markdown(item) for item in value)
    if isinstance(value, dict):
        value = json.dumps(value, ensure_ascii=False)
    line = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#!{}])", r"\\\1", line)


def code_block(language: str, text: str) -> str:
    """A fenced block whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _interval(value: Mapping[str, float | None], decimals: int, sign: str = "") -> str:
    numbers = [value["mean"], value["low"], value["high"]]
    mean, low, high = ("–" if number is None else f"{number:{sign}.{decimals}f}" for number in numbers)
    return f"{mean} [{low}, {high}]"


def _reward_rows(rewards: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for reward in rewards:
        low, high = reward["difference"]["low"], reward["difference"]["high"]
        # Two digits of what is uncertain.
        known = low is not None and high is not None and high > low
        decimals = min(6, max(0, 1 - math.floor(math.log10(high - low)))) if known else 3
        rows.append(
            {
                "name": markdown(reward["name"]),
                "role": reward["role"],
                "pictures": reward["pictures"],
                "base": _interval(reward["base"], decimals),
                "lora": _interval(reward["lora"], decimals),
                "difference": _interval(reward["difference"], decimals, "+"),
            }
        )
    return rows


def _license(base_model: str, local: bool) -> tuple[dict[str, Any], str]:
    """Metadata about the licence from the base model's own card, and a sentence."""
    try:
        source = Path(base_model).expanduser() / "README.md" if local else base_model
        card = ModelCard.load(source, ignore_metadata_errors=True).data.to_dict()
    except Exception:
        # No network, no card, or a card that cannot be read: none of it is worth a training's result.
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


def _missing_components(base_model: str) -> list[str]:
    """Components that a local pipeline was saved without: `from_pretrained` wants to be told."""
    try:
        index = json.loads((Path(base_model).expanduser() / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [name for name, spec in index.items() if spec == [None, None]]


def _pipeline(run: Mapping[str, Any]) -> type[DiffusionPipeline] | None:
    """The pipeline's class, None where this diffusers has none of that name."""
    found = getattr(diffusers, run["pipeline_class"], None)
    return found if isinstance(found, type) and issubclass(found, DiffusionPipeline) else None


def _number_of_frames(run: Mapping[str, Any]) -> int | None:
    """How many frames the run asked for, None for the pipeline's default."""
    call = run["settings"] | (run["settings"].get("pipeline_arguments") or {})
    return next((call[name] for name in FRAMES if call.get(name) is not None), None)


def _has_frames(run: Mapping[str, Any]) -> bool:
    """Whether the pipeline puts out frames, be it only one; of a class that is not known, whether it made several."""
    pipeline = _pipeline(run)
    if pipeline is None:
        return (_number_of_frames(run) or 1) > 1
    return any(name in inspect.signature(pipeline.__call__).parameters for name in FRAMES)


def _makes_videos(run: Mapping[str, Any]) -> bool:
    return _has_frames(run) and _number_of_frames(run) != 1


def _has_lora_loader(run: Mapping[str, Any]) -> bool:
    """Whether `load_lora_weights` loads the file: it does into `transformer` alone, and not all pipelines have it."""
    pipeline = _pipeline(run)
    is_main = run["settings"].get("lora_component") in (None, "transformer")
    return is_main and (pipeline is None or hasattr(pipeline, "load_lora_weights"))


def _use(run: Mapping[str, Any], missing: Sequence[str], lora: str, prompt: str) -> str:
    """Python that loads base and LoRA and draws a picture with the training's settings."""
    options = run["settings"]
    loading = [f"dtype={DTYPES.get(options.get('mixed_precision') or 'no', 'torch.float32')}"]
    loading += [f"{name}={options[name]!r}" for name in ("revision", "variant") if options.get(name)]
    loading += [f"{name}=None" for name in missing]
    call: dict[str, Any] = {name: options[name] for name in CALL if options.get(name) is not None}
    if options.get("resolution") is not None:
        call |= {"height": options["resolution"], "width": options["resolution"]}
    if (options.get("true_cfg_scale") or 1) > 1:
        call["true_cfg_scale"] = options["true_cfg_scale"]
    if options.get("negative_prompt"):
        call["negative_prompt"] = options["negative_prompt"]
    call |= options.get("pipeline_arguments") or {}
    words = [f"{name}={value!r}" for name, value in call.items()]
    if options.get("sigmas") == "linear":
        steps = options["num_inference_steps"]
        words.append(f"sigmas=torch.linspace(1, 1 / {steps}, {steps}).tolist()")
    shift = options.get("flow_shift")
    load = f"load_lora_weights({lora!r})"
    if not _has_lora_loader(run):
        component = options.get("lora_component") or "transformer"
        load = f'{component}.load_lora_adapter({lora!r}, weight_name="{LORA_FILE}")'
    video = _makes_videos(run)
    output = "frames" if _has_frames(run) else PICTURES.get(run["pipeline_class"], "images")
    # Of a video of one frame, the frame.
    picture = f"{output}[0][0]" if output == "frames" and not video else f"{output}[0]"
    lines = [
        "import torch",
        f"from diffusers import DiffusionPipeline{'' if shift is None else ', FlowMatchEulerDiscreteScheduler'}",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({run['base_model']!r}, {', '.join(loading)})",
        f"pipe.{load}",
        *([] if shift is None else [f"pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift={shift!r})"]),
        'pipe.to("cuda")',
        f"prompt = {prompt!r}",
        f"{'video' if video else 'image'} = pipe(",
        # By name: of some pipelines the first argument is a picture.
        *(f"    {word}," for word in ["prompt=prompt", *words]),
        f").{picture}",
    ]
    return code_block("python", "\n".join(lines))


def _reproduce(run: Mapping[str, Any]) -> str:
    """The command of the training, without what publishes and what needs its checkpoints, an option a line."""
    words = [str(word) for word in run["command"]]
    if words and words[0].endswith(".py"):
        words = words[1:]
    lines: list[list[str]] = [["accelerate", "launch"]]
    processes = run["hardware"]["processes"]
    lines[0] += ["--num_processes", str(processes)] if processes > 1 else []
    precision = run["settings"].get("mixed_precision", "no")
    if precision != "no" and not any(word.partition("=")[0] == "--mixed_precision" for word in words):
        # It may have come from accelerate's own configuration, which others do not have.
        lines[0] += ["--mixed_precision", precision]
    lines[0].append(f"training/{_last(run['script'])}")
    for word in words:
        if word.startswith("--") or len(lines) == 1:
            lines.append([])
        lines[-1].append(word)
    left_out = ("--push_to_hub", "--hub_model_id", "--resume_from_checkpoint")
    kept = [line for line in lines if line[0].partition("=")[0] not in left_out]
    return code_block("bash", " \\\n    ".join(shlex.join(line) for line in kept))


def _summary(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows of the card's main table."""
    options, machine = run["settings"], run["hardware"]
    passes = (options.get("train_batch_size"), options.get("gradient_accumulation_steps"), machine["processes"])
    batch = f"{math.prod(passes)} = {' x '.join(map(str, passes))} (batch, passes, processes)" if all(passes) else None
    minutes, seconds = divmod(round(run["timings"]["seconds"] or 0), 60)
    used = [name for name in SUMMARY if options.get(name) and (name != "ema_decay" or options.get("use_ema"))]
    rows = {
        "method": f"{run['method']['title']} ({run['method']['name']})",
        **{f"its `{name}`": value for name, value in run["method"]["options"].items()},
        "reward": options.get("reward"),
        "prompts": options.get("prompts"),
        "updates": run["updates"],
        "prompts in an update": batch,
        **{f"`{name}`": options[name] for name in used},
        "seed": options.get("seed"),
        "pipeline": run["pipeline_class"],
        "hardware": f"{machine['device']}, {machine['processes']} process(es); {machine['cpu']}",
        "time": f"{minutes // 60} h {minutes % 60} min {seconds} s",
    }
    return [(name, markdown(value)) for name, value in rows.items() if value is not None]


def find_template() -> Path:
    """Only until training_run.py stops asking for it."""
    return Path(__file__).with_name("card_template.md")


def write_card(output_dir: Path) -> Path:
    """Write README.md of a run's folder, see `make_card`; returns the file."""
    path = output_dir / "README.md"
    write_atomically(path, make_card(output_dir))
    return path


def make_card(output_dir: Path) -> str:
    """The text of a run's card.

    Args:
        output_dir: with `run.json`; pictures that may be published (`allowed_files`) are shown.

    Raises:
        OSError, ValueError, KeyError: `run.json` is missing or is not as the training writes it.
    """
    content = redact(json.loads((output_dir / "run.json").read_text(encoding="utf-8")))
    # What is no Unicode (lone surrogates of command lines) can be in no card.
    run = json.loads(json.dumps(content, ensure_ascii=False).encode("utf-8", "replace"))
    files = {path.relative_to(output_dir).as_posix() for path in allowed_files(output_dir)}
    images = [image for image in run.pop("images") if image["lora"] in files]
    base_path = run["base_model"]
    local = bool(WHOLE_PATH.match(base_path)) or Path(base_path).expanduser().exists()
    license_data, license_text = _license(base_path, local)
    # Everything but prompts; the base model's folder also where its path is relative.
    run = hide_paths(run, base_path if local else None)
    options, base_model, git = run["settings"], run["base_model"], run["git"]
    lora = run["hub_model_id"] or output_dir.resolve().name
    task = "text-to-video" if _makes_videos(run) else "text-to-image"
    names = [reward["name"] for reward in run["rewards"]] or [options.get("reward") or ""]
    tags = [re.sub(r"[^\w.]+", "-", name, flags=re.ASCII).strip("-").lower() for name in names]
    # Those of the validation may be the training's own.
    evaluation_prompts = options.get("eval_prompts") or "validation prompts"
    results = [
        EvalResult(
            task_type=task,
            dataset_type="prompts",
            dataset_name=evaluation_prompts,
            metric_type=reward["name"],
            metric_name=f"{reward['name']} ({reward['role']})",
            metric_value=reward["lora"]["mean"],
        )
        for reward in run["rewards"]
        if reward["lora"]["mean"] is not None
    ]
    optional = {
        "base_model": None if local else base_model,
        "base_model_relation": None if local else "adapter",
        "widget": [{"text": image["prompt"], "output": {"url": image["lora"]}} for image in images] or None,
    }
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        tags=[task, "diffusers", "lora", "template:sd-lora", "flowbp", "flow-matching", *filter(None, tags)],
        eval_results=results or None,
        model_name=_last(lora),
        **license_data,
        **{key: value for key, value in optional.items() if value is not None},
    )
    selected = run["selected"]
    card = ModelCard.from_template(
        data,
        template_path=str(find_template()),
        title=markdown(_last(lora)),
        base=markdown(base_model) if local else f"[{markdown(base_model)}](https://huggingface.co/{base_model})",
        method=markdown(run["method"]["title"]),
        reward=markdown(options.get("reward") or names),
        versions=run["versions"],
        gallery=bool(images),
        before_after="before_after.png" in files,
        rewards=_reward_rows(run["rewards"]),
        held_out=any(reward["role"] == "held out" for reward in run["rewards"]),
        evaluation_prompts=markdown(evaluation_prompts),
        prompts_are_known=not options.get("eval_prompts") and not options.get("validation_prompt"),
        selected_update=selected["update"],
        is_best=selected["kind"] == "best",
        selected_why="the best by the held-out reward" if selected["kind"] == "best" else "the last one",
        updates=run["updates"],
        skipped_updates=run["skipped_updates"],
        alarms=[{key: markdown(value) for key, value in alarm.items()} for alarm in run["alarms"]],
        use=_use(run, _missing_components(base_path), lora, images[0]["prompt"] if images else "a photo of a cat"),
        has_lora_loader=_has_lora_loader(run),
        summary=_summary(run),
        settings=[(markdown(key), markdown(value)) for key, value in options.items() if value is not None],
        reproduce=_reproduce(run),
        resumed=markdown(options.get("resume_from_checkpoint") or ""),
        commit="(commit unknown)" if git is None else git["commit"] + (" with local changes" if git["dirty"] else ""),
        libraries=", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "diffusers", "peft")),
        license_text=license_text,
    )
    return str(card)
