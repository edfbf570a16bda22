# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The code in a model card: Python that loads the result and samples, and the command that repeats the training.

Everything is read from `run`, the content of a run's `run.json`.
"""

import inspect
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from .. import videos
from .card_text import code_block, last_part
from .published_files import LORA_FILE, TRANSFORMER_FOLDER

# Options that are arguments of the pipeline's call under the same name; height and width are added for each size.
CALL = "num_frames num_inference_steps guidance_scale max_sequence_length".split()
# What pipelines that make videos call the number of frames.
FRAMES = ("num_frames", "frames")
# Of pipelines whose first result has another name than `images[0]`, or `frames[0]` for videos.
OUTPUTS = {"Kandinsky5I2IPipeline": "image[0]", "Kandinsky5T2IPipeline": "image[0]", "Cosmos3OmniPipeline": "video"}
DTYPES = {"no": "torch.float32", "fp16": "torch.float16", "bf16": "torch.bfloat16"}
# Scripts that are installed as modules of `flowbp.scripts`.
INSTALLED_SCRIPTS = ("train_flowbp", "train_flowbp_flux", "train_flowbp_flux2", "train_flowbp_sd3")
# Options that publish a run, or need its checkpoints.
NOT_REPRODUCED = ("--push_to_hub", "--hub_model_id", "--hub_private_repo", "--resume_from_checkpoint")


def _pipeline(run: Mapping[str, Any]) -> type[DiffusionPipeline] | None:
    """The pipeline's class; None where this diffusers has none of that name."""
    found = getattr(diffusers, run["pipeline_class"], None)
    return found if isinstance(found, type) and issubclass(found, DiffusionPipeline) else None


def _number_of_frames(run: Mapping[str, Any]) -> int | None:
    """How many frames the run asked for; None for the pipeline's default."""
    call = run["settings"] | (run["settings"].get("pipeline_arguments") or {})
    return next((call[name] for name in FRAMES if call.get(name) is not None), None)


def _has_frames(run: Mapping[str, Any]) -> bool:
    """Whether the pipeline returns frames, even a single one; for an unknown class, whether several were asked for."""
    pipeline = _pipeline(run)
    if pipeline is None:
        return (_number_of_frames(run) or 1) > 1
    return videos.makes_videos(pipeline)


def is_full(run: Mapping[str, Any]) -> bool:
    """Whether all weights of the transformer were trained."""
    return run["settings"].get("train") == "full"


def makes_videos(run: Mapping[str, Any]) -> bool:
    """Whether the run's pipeline makes videos of several frames."""
    return _has_frames(run) and _number_of_frames(run) != 1


def has_lora_loader(run: Mapping[str, Any]) -> bool:
    """Whether `load_lora_weights` loads the result: a LoRA of `transformer`, and not in all pipelines."""
    pipeline = _pipeline(run)
    is_main = run["settings"].get("lora_component") in (None, "transformer")
    return not is_full(run) and is_main and (pipeline is None or hasattr(pipeline, "load_lora_weights"))


def missing_components(base_model: str) -> list[str]:
    """Components that a local pipeline was saved without, which `from_pretrained` must be told."""
    try:
        index = json.loads((Path(base_model).expanduser() / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [name for name, spec in index.items() if spec == [None, None]]


def sizes(settings: Mapping[str, Any]) -> list[dict[str, int]]:
    """The sizes of the run's images in pixels, each as the arguments `height` and `width` of the pipeline's call.

    Args:
        settings: of the run. `resolution` (a square), or `height` and `width`: a number or a list, None or absent for
            the pipeline's default. A single height goes with all widths, and the reverse.

    Returns:
        In the order of the settings; empty where the run left the size to the pipeline.
    """
    if settings.get("resolution") is not None:
        given = dict.fromkeys(("height", "width"), settings["resolution"])
    else:
        given = {name: settings[name] for name in ("height", "width") if settings.get(name) is not None}
    values = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
    count = max(map(len, values.values()), default=0)
    return [{name: value[number % len(value)] for name, value in values.items()} for number in range(count)]


def _call_words(settings: Mapping[str, Any]) -> list[str]:
    """The arguments of the pipeline's call other than the prompt, as Python; of several sizes the first."""
    call: dict[str, Any] = {name: settings[name] for name in CALL if settings.get(name) is not None}
    call |= next(iter(sizes(settings)), {})
    if (settings.get("true_cfg_scale") or 1) > 1:
        call["true_cfg_scale"] = settings["true_cfg_scale"]
    if settings.get("negative_prompt"):
        call["negative_prompt"] = settings["negative_prompt"]
    call |= settings.get("pipeline_arguments") or {}
    words = [f"{name}={value!r}" for name, value in call.items()]
    if settings.get("sigmas") == "linear":
        steps = settings["num_inference_steps"]
        words.append(f"sigmas=torch.linspace(1, 1 / {steps}, {steps}).tolist()")
    return words


def source_words(settings: Mapping[str, Any]) -> list[str]:
    """The arguments of the pipeline's call that are images of the prompts' table (`pipeline_columns`), as Python."""
    words = []
    for word in settings.get("pipeline_columns") or ():
        place, _, columns = word.partition("=")
        load, suffix = ("load_video", "mp4") if "video" in place else ("load_image", "png")
        values = ", ".join(f"{load}({f'{column}.{suffix}'!r})" for column in columns.split(","))
        words.append(f"{place}=[{values}]" if "," in columns else f"{place}={values}")
    return words


def _is_required(run: Mapping[str, Any], component: str) -> bool:
    """Whether `from_pretrained` takes the component: it ignores arguments that have a default in the pipeline."""
    pipeline = _pipeline(run)
    parameters = {} if pipeline is None else inspect.signature(pipeline.__init__).parameters
    return component in parameters and parameters[component].default is inspect.Parameter.empty


def _loading(run: Mapping[str, Any], missing: Sequence[str], result: str) -> list[str]:
    """Lines of Python that import what is needed and make `pipe`, as in `usage_code`."""
    settings = run["settings"]
    component = settings.get("lora_component") or "transformer"
    dtype = f"dtype={DTYPES.get(settings.get('mixed_precision') or 'no', 'torch.float32')}"
    words = [dtype, *(f"{name}={settings[name]!r}" for name in ("revision", "variant") if settings.get(name))]
    words += [f"{name}=None" for name in missing]
    names, before, after = ["DiffusionPipeline"], [], []
    if arguments := run.get("bitsandbytes"):
        names += ["BitsAndBytesConfig", "PipelineQuantizationConfig"]
        before.append(
            f"quantized = BitsAndBytesConfig({', '.join(f'{name}={arguments[name]!r}' for name in arguments)})"
        )
        words.append(f"quantization_config=PipelineQuantizationConfig(quant_mapping={{{component!r}: quantized}})")
    if is_full(run):
        transformer = run["transformer_class"]
        names.append(transformer)
        source = f'{result!r}, subfolder="{TRANSFORMER_FOLDER}"'
        load = f"{transformer}.from_pretrained({source}, {dtype})"
        if _is_required(run, component):
            before.append(f"{component} = {load}")
            words.insert(0, f"{component}={component}")
        else:
            after.append(f"pipe.{component} = {load}")
    elif has_lora_loader(run):
        after.append(f"pipe.load_lora_weights({result!r})")
    else:
        after.append(f'pipe.{component}.load_lora_adapter({result!r}, weight_name="{LORA_FILE}")')
    if (shift := settings.get("flow_shift")) is not None:
        names.append("FlowMatchEulerDiscreteScheduler")
        after.append(f"pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift={shift!r})")
    base = f"pipe = DiffusionPipeline.from_pretrained({run['base_model']!r}, {', '.join(words)})"
    return ["import torch", f"from diffusers import {', '.join(names)}", "", *before, base, *after]


def usage_code(run: Mapping[str, Any], missing: Sequence[str], result: str, prompt: str) -> str:
    """A block of Python that loads base model and result and samples with the training's settings.

    Args:
        result: the run's repository or folder.
    """
    video = makes_videos(run)
    output = OUTPUTS.get(run["pipeline_class"], "frames[0]" if _has_frames(run) else "images[0]")
    # Of a video of one frame, the frame.
    first = f"{output}[0]" if _has_frames(run) and not video else output
    sources = source_words(run["settings"])
    loaders = [name for name in ("load_image", "load_video") if any(f"{name}(" in word for word in sources)]
    head, *rest = _loading(run, missing, result)
    lines = [
        head,
        *([f"from diffusers.utils import {', '.join(loaders)}"] if loaders else []),
        *rest,
        'pipe.to("cuda")',
        f"prompt = {prompt!r}",
        f"{'video' if video else 'image'} = pipe(",
        # By name: the first argument of some pipelines is an image.
        *(f"    {word}," for word in ["prompt=prompt", *sources, *_call_words(run["settings"])]),
        f").{first}",
    ]
    return code_block("python", "\n".join(lines))


def training_command(run: Mapping[str, Any]) -> str | None:
    """A block with the command of the training, one option per line, without the options `NOT_REPRODUCED`.

    None for a run that was started from Python, which has no command line.
    """
    if run["command"] is None:
        return None
    words = [str(word) for word in run["command"]]
    if words and words[0].endswith(".py"):
        words = words[1:]
    lines: list[list[str]] = [["accelerate", "launch"]]
    processes = run["hardware"]["processes"]
    lines[0] += ["--num_processes", str(processes)] if processes > 1 else []
    precision = run["settings"].get("mixed_precision", "no")
    if precision != "no" and not any(word.partition("=")[0] == "--mixed_precision" for word in words):
        # It may come from the user's own configuration of accelerate, which other machines do not have.
        lines[0] += ["--mixed_precision", precision]
    script = last_part(run["script"])
    module = script.removesuffix(".py")
    lines[0] += ["-m", f"flowbp.scripts.{module}"] if module in INSTALLED_SCRIPTS else [script]
    for word in words:
        if word.startswith("--") or len(lines) == 1:
            lines.append([])
        lines[-1].append(word)
    kept = [line for line in lines if line[0].partition("=")[0] not in NOT_REPRODUCED]
    return code_block("bash", " \\\n    ".join(shlex.join(line) for line in kept))
