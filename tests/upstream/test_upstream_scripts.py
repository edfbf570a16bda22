# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The contribution to diffusers: scripts that train, resume and save as ours do, with the same gradient."""

import ast
import importlib.util
import logging
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.peft import PeftAdapterMixin
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import tiny_flux_pipeline, tiny_klein_pipeline, tiny_sd3_t5_pipeline
from training_scripts import PROMPTS, ROOT, command_line, load_pipeline, load_script, same

from flowbp import FlowBPCallback
from flowbp.training.prompt_sampler import PromptSampler, Record

FOLDER = ROOT / "upstream" / "examples" / "research_projects" / "flowbp"
MODELS = {"sd3": tiny_sd3_t5_pipeline, "flux": tiny_flux_pipeline, "flux2_klein": tiny_klein_pipeline}
OURS = {"sd3": "train_flowbp_sd3", "flux": "train_flowbp_flux", "flux2_klein": "train_flowbp_flux2"}
LORA = "pytorch_lora_weights.safetensors"
REQUIRED = {"pretrained_model_name_or_path": "m", "dataset_name": "d", "reward": "r"}
ARGUMENTS = {
    "reward": "resume_rewards:make_random_reward",
    "num_inference_steps": 6,
    "resolution": 8,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.01,
    "seed": 5,
}


def upstream_script(name: str) -> ModuleType:
    """One of the scripts as a module."""
    spec = importlib.util.spec_from_file_location(f"upstream_{name}", FOLDER / f"train_flowbp_lora_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def drawn() -> list[Image.Image]:
    """The images of all validations."""
    return []


@pytest.fixture
def pushed() -> list[str]:
    """The names of the files of all pushes."""
    return []


@pytest.fixture
def train(
    saved: Callable[[str], Path],
    drawn: list[Image.Image],
    pushed: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Path]:
    """Runs a script with `ARGUMENTS` and changes of them; -> its output folder."""
    # The tests of other scripts look at what is logged.
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    (tmp_path / "prompts").mkdir()
    # Three micro-batches an epoch: its second update has one alone.
    (tmp_path / "prompts" / "prompts.txt").write_text("\n".join([*PROMPTS, "", *PROMPTS[:2]]))

    def upload_folder(repo_id: str, folder_path: str, allow_patterns: list[str]) -> None:
        files = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        pushed.extend(filter_repo_objects(files, allow_patterns=allow_patterns))

    def run(name: str, output: str, **changes: Any) -> Path:
        required = {"pretrained_model_name_or_path": saved(name), "dataset_name": tmp_path / "prompts"}
        words = command_line({**ARGUMENTS, **required, "output_dir": tmp_path / output}, **changes)
        script = upstream_script(name)
        script.create_repo = lambda repo_id, exist_ok: SimpleNamespace(repo_id="user/name")
        script.upload_folder = upload_folder
        log_validation = script.log_validation
        script.log_validation = lambda *args: drawn.extend(found := log_validation(*args)) or found
        script.main(script.parse_args(words))
        return tmp_path / output

    return run


def test_a_run_that_resumes_ends_with_the_same_lora_which_diffusers_loads(
    name: str,
    train: Callable[..., Path],
    saved: Callable[[str], Path],
    drawn: list[Image.Image],
    pushed: list[str],
    tmp_path: Path,
) -> None:
    limit, resumed = {"sd3": (2, "checkpoint-2"), "flux": (None, "checkpoint-1"), "flux2_klein": (2, "latest")}[name]
    shown = {"validation_prompt": PROMPTS[0], "num_validation_images": 1, "checkpointing_steps": 1}
    # The user's own files are not pushed.
    for own in ("notes.md", "image_of_mine.png"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / own).touch()
    folder = train(name, "run", max_train_steps=3, checkpoints_total_limit=limit, push_to_hub=True, **shown)
    assert sorted(pushed) == ["README.md", "image_0.png", LORA]
    (code,) = re.findall(r"```py\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    head, *rest = code.splitlines()
    assert head == "import torch" and rest[0].startswith("from diffusers import ")
    steps = [int(path.name.removeprefix("checkpoint-")) for path in sorted(folder.glob("*checkpoint*"))]
    assert steps == [1, 2, 3][-(limit or 3) :]
    lora = load_file(folder / LORA)
    ups = [tensor for key, tensor in lora.items() if "lora_B" in key]
    assert {tensor.dtype for tensor in lora.values()} == {torch.float32}
    assert sum(bool(tensor.abs().max() > 0) for tensor in ups) > len(ups) / 2
    # Of a run that is done nothing is left to train, also in the middle of an epoch.
    train(name, "run", max_train_steps=3, resume_from_checkpoint=folder / "checkpoint-3")
    assert same(load_file(folder / LORA), lora)
    # After the first update the run is in the middle of an epoch. The reward needs the random states.
    shutil.rmtree(folder / "checkpoint-3")
    (folder / LORA).rename(folder / "whole.safetensors")
    train(name, "run", max_train_steps=3, resume_from_checkpoint=resumed)
    assert same(load_file(folder / LORA), lora)
    # What users get is what the run has drawn in the end.
    pipe, script = load_pipeline(saved(name)), upstream_script(name)
    base, trained = (
        pipe(
            prompt=PROMPTS[0],
            height=8,
            width=8,
            num_inference_steps=6,
            guidance_scale=3.5,
            max_sequence_length=script.parse_args(command_line(REQUIRED)).max_sequence_length,
            generator=script.make_generator("validation", ARGUMENTS["seed"], 0),
        ).images[0]
        for load in (lambda: None, lambda: pipe.load_lora_weights(folder, weight_name=LORA))
        if load() is None
    )
    assert trained.tobytes() == drawn[-1].tobytes() != base.tobytes()


def test_a_gradient_is_that_of_the_training_script(
    name: str,
    train: Callable[..., Path],
    saved: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[list[torch.Tensor]] = []
    batches: list[list[str]] = []
    step, add_adapter, backward = torch.optim.AdamW.step, PeftAdapterMixin.add_adapter, FlowBPCallback.backward

    def watched_step(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        found.append([each.grad.clone() for group in self.param_groups for each in group["params"]])
        return step(self, *args, **kwargs)

    def seeded(self: PeftAdapterMixin, *args: Any, **kwargs: Any) -> None:
        torch.manual_seed(0)
        add_adapter(self, *args, **kwargs)

    def watched_backward(self: FlowBPCallback, reward: Any, images: Any, prompts: list[str], **kwargs: Any) -> Any:
        batches.append(prompts)
        return backward(self, reward, images, prompts, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched_step)
    monkeypatch.setattr(PeftAdapterMixin, "add_adapter", seeded)
    monkeypatch.setattr(FlowBPCallback, "backward", watched_backward)
    options = {"method_options": {"alpha": 0.4}, "max_train_steps": 2, "reward": "toy_reward:make_reward"}
    sampling = {"guidance_scale": 3.0, "max_sequence_length": 16}
    batch = {"train_batch_size": 1, "gradient_accumulation_steps": 2}
    train(name, "upstream", reward_clip=0.9, **options, **sampling, **batch)
    theirs = found[:]
    found.clear()
    # The same prompts in the same order.
    order = iter(batches[:])
    monkeypatch.setattr(PromptSampler, "__next__", lambda self: [Record(*next(order))])
    own = {**ARGUMENTS, **sampling, **batch, "reward": "toy_reward:make_reward", "reward_clip": 0.9, "alpha": 0.4}
    own |= {"pretrained_model_name_or_path": saved(name), "prompts": tmp_path / "prompts" / "prompts.txt"}
    own |= {"max_train_steps": 2, "report_to": "none", "output_dir": tmp_path / "own", "num_validation_images": 1}
    load_script(OURS[name]).main(command_line(own))
    assert len(found) == len(theirs) == 2 and batches[:4] == batches[4:]
    for update, (left, right) in enumerate(zip(theirs, found, strict=True)):
        norm = torch.cat([each.flatten() for each in right]).norm()
        difference = torch.cat([(a - b).flatten() for a, b in zip(left, right, strict=True)]).norm()
        assert norm > 0 and difference <= 1e-5 * norm, (update, difference / norm)


def test_a_loss_scale_changes_nothing(train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of float16, which needs a GPU: gradients are scaled, and scaled back before they are clipped."""
    changes = {"max_train_steps": 1, "reward": "toy_reward:make_reward"}
    plain = load_file(train("sd3", "plain", **changes) / LORA)

    class Scaled(accelerate.Accelerator):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    monkeypatch.setattr(accelerate, "Accelerator", Scaled)
    scaled = load_file(train("sd3", "scaled", **changes) / LORA)
    assert same(plain, scaled)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_8bit_adam": True, "optimizer": "prodigy"}, "`--use_8bit_adam` needs `--optimizer AdamW`"),
        ({"resume_from_checkpoint": "latest", "seed": None}, "needs the `--seed` of that run"),
        ({"caption_column": "caption"}, r"must be one of \['text'\], got caption"),
        ({"method": "flowbp-brdige"}, "flowbp-bridge"),
        ({"method_options": {"alfa": 1}}, "alpha"),
    ],
)
def test_what_cannot_be_done_is_refused_before_a_model_is_loaded(
    changes: dict[str, Any], message: str, train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        train("sd3", "refused", **changes)


# The documents and the edits.


@pytest.fixture(scope="module")
def check() -> ModuleType:
    """`upstream/check.py` as a module."""
    spec = importlib.util.spec_from_file_location("upstream_check", ROOT / "upstream" / "check.py")
    module = importlib.util.module_from_spec(spec)
    path = sys.path[:]
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def test_options_are_those_of_the_table_and_each_is_read(check: ModuleType) -> None:
    table = check.option_table()
    for column, name in enumerate(check.SCRIPTS):
        path = FOLDER / check.script_name(name)
        declared = check.options(path).keys()
        assert {option for option, status in table.items() if status[column] in ("shared", "added")} == declared
        code = path.read_text(encoding="utf-8")
        for option in declared:
            assert re.search(rf"\bargs\.{option[2:]}\b", code), (name, option)
        assert 350 <= len(code.splitlines()) <= 450
        # As long as those that the draft of the issue tells.
        imported = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
        names = {each.name for node in imported if (node.module or "").startswith("flowbp") for each in node.names}
        assert names == {"FlowBPCallback", "get_method", "load_reward"}


def test_results_are_those_of_the_readme(check: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:read|colors|one step|the graphs|`).*$", (FOLDER / "README.md").read_text("utf-8"), re.M)
    numbers = {number for row in rows for number in re.findall(r"\d+\.\d+", row)}
    issue = (check.HERE / "ISSUE.md").read_text(encoding="utf-8")
    numbers |= set(re.findall(r"\d+\.\d+ (?:GiB|%|to)", issue))
    numbers |= {" ".join(pair) for pair in re.findall(r"(\d+ of) (?:the )?(\d+ pipeline classes)", issue)}
    assert len(numbers) > 60 and not [
        each for each in numbers if each.removesuffix(" to").removesuffix(" %") not in readme
    ]


def test_edits_are_made_once(check: ModuleType) -> None:
    for _, before, added in (check.TOCTREE, check.DDPO):
        text = f"first\n{before}last\n"
        once = check.edited(text, before, added)
        assert once == f"first\n{before}{added}last\n" == check.edited(once, before, added)
        with pytest.raises(check.Failed, match="expected the line"):
            check.edited("other\n", before, added)


def test_the_code_of_the_page_trains_a_stock_pipeline(
    saved: Callable[[str], Path], check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (check.HERE / check.PAGE).read_text(encoding="utf-8")
    (code,) = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) <= 40
    changes = {
        '"stabilityai/stable-diffusion-3.5-medium"': repr(str(saved("sd3"))),
        "torch.bfloat16": "torch.float32",
        '"cuda"': '"cpu"',
        '"pickscore"': '"toy_reward:make_reward"',
        "512": "8",
        "range(100)": "range(1)",
        "25": "6",
    }
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, check.PAGE.name, "exec"), {})
    lora = load_file(tmp_path / "sd3-flowbp-lora" / LORA)
    assert any(tensor.abs().max() > 0 for key, tensor in lora.items() if "lora_B" in key)
