# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Put the contribution into a checkout of diffusers, and check it there: `make upstream DIFFUSERS=path`.

    python upstream/check.py path/to/diffusers

Copies `upstream/examples` and `upstream/docs`, edits the table of contents and `training/ddpo.md`, and runs diffusers'
own checks. Then each script trains a tiny model with the checkout's library: two updates that are pushed to a Hub on
this machine, the same from a checkpoint, the LoRA in a pipeline, and two processes against one. Prints a line for each
check: `passed`, `FAILED`, or `not run` with the reason. Exits with 1 if one failed. Everything else that is written is
in a temporary folder.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "pipelines")]

EXAMPLE = Path("examples", "research_projects", "flowbp")
PAGE = Path("docs", "source", "en", "training", "flowbp.md")
SCRIPTS = ("sd3", "flux", "flux2_klein")
UPSTREAM = "examples/dreambooth/train_dreambooth_lora_{}.py"
LORA = "pytorch_lora_weights.safetensors"

# What is edited: a file, the line that comes before, and what is put after it.
TOCTREE = (
    "docs/source/en/_toctree.yml",
    "    title: NeMo Automodel\n",
    "  - local: training/flowbp\n    title: FlowBP\n",
)
DDPO = (
    "docs/source/en/training/ddpo.md",
    "# Reinforcement learning training with DDPO\n",
    "\n> [!WARNING]\n> TRL has removed its `DDPOTrainer`. This page describes releases of TRL that still have it. To "
    "train current flow-matching models with the gradient of a reward, see [FlowBP](./flowbp).\n",
)
# Checks of diffusers that need no network, beyond those of styles.
UTILITIES = ("doc_toc", "dummies", "copies", "ai", "forward_call_docstrings", "support_list", "repo", "inits")
# doc-builder and utils/check_ai.py need the last three.
TOOLS = ("typos==1.42.1", "hf-doc-builder", "black", "requests", "httpx")

# In the checkout's library: a LoRA in a stock pipeline changes its images.
LOAD = """
import sys, torch
from diffusers import DiffusionPipeline
model, folder = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
call = {"height": 8, "width": 8, "num_inference_steps": 3, "output_type": "pt", "max_sequence_length": 16}
draw = lambda: pipe(prompt="a b", generator=torch.Generator().manual_seed(0), **call).images
base = draw()
pipe.load_lora_weights(folder)
assert (draw() - base).abs().max() > 1e-4
"""


class Failed(Exception):
    """A check that failed, with what it printed."""


class NotRun(Exception):
    """A check that could not be run, with its reason."""


def options(script: Path) -> dict[str, dict[str, str]]:
    """The options that a script declares: name -> its settings as in the source, without its help."""
    found = {}
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            settings = {each.arg: ast.unparse(each.value) for each in node.keywords if each.arg != "help"}
            found[node.args[0].value] = settings
    return found


def option_table() -> dict[str, tuple[str, str, str]]:
    """What upstream/README.md says of each option, for the three scripts: shared, added, left out, or -."""
    found = {}
    for line in (HERE / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `--"):
            found |= {option: tuple(cells[1:4]) for option in re.findall(r"`(--\w+)`", cells[0])}
    return found


def edited(text: str, before: str, added: str, name: str = "file") -> str:
    """A text with `added` after the line `before`; the same text where it is there already.

    Raises:
        Failed: for a text without that line, or with several of it.
    """
    if before + added in text:
        return text
    if text.count(before) != 1:
        raise Failed(f"{name}: expected the line {before.strip()!r} once, found {text.count(before)}")
    return text.replace(before, before + added)


def version_of(checkout: Path) -> str:
    """diffusers' version in a checkout."""
    text = (checkout / "src" / "diffusers" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'__version__ = "(.+)"', text)[1]


class Checkout:
    """A checkout of diffusers.

    Args:
        path: its root.
        folder: for what the checks write.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        self.tools = folder / "tools"
        self.failed = False
        self.lora: dict[str, Path] = {}

    def report(self, name: str, check: Callable[[], str | None]) -> None:
        """Run a check and print what came of it."""
        try:
            note = check()
            outcome = "passed"
        except NotRun as reason:
            outcome, note = "not run", str(reason)
        except Failed as failure:
            outcome, note, self.failed = "FAILED", str(failure), True
        print(f"{outcome:8} {name}" + (f": {note}" if note else ""), flush=True)

    def run(self, *words: str | Path, cwd: Path | None = None, **variables: str) -> str:
        """What a program prints. It finds the tools, the checkout's library, this package and the tests' helpers.

        Raises:
            Failed: for a program that fails, with the end of what it printed.
        """
        site = next((self.tools / "lib").glob("python*/site-packages"), self.tools)
        paths = [self.path / "src", ROOT / "pipelines", ROOT / "tests" / "support", site]
        own = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
        settings = {
            "PATH": os.pathsep.join([str(self.tools / "bin"), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "HF_HOME": str(self.folder / "home"),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = subprocess.run(
            [str(word) for word in words],
            cwd=cwd or self.path,
            env={**own, **settings, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Failed((done.stdout + done.stderr)[-1500:])
        return done.stdout + done.stderr

    # Files.

    def apply(self) -> str:
        """Copy the files, with the checkout's version in them, and edit two."""
        version = version_of(self.path)
        (self.path / EXAMPLE).mkdir(parents=True, exist_ok=True)
        for path in sorted((HERE / EXAMPLE).iterdir()):
            if path.is_file():
                text = re.sub(r'(check_min_version\(").+("\))', rf"\g<1>{version}\2", path.read_text(encoding="utf-8"))
                (self.path / EXAMPLE / path.name).write_text(text, encoding="utf-8")
        shutil.copy(HERE / PAGE, self.path / PAGE)
        for name, before, added in (TOCTREE, DDPO):
            path = self.path / name
            text = path.read_text(encoding="utf-8")
            path.write_text(edited(text, before, added, name), encoding="utf-8")
        return f"diffusers {version}, {EXAMPLE}, {PAGE}, {TOCTREE[0]}, {DDPO[0]}"

    def install_tools(self) -> str:
        """ruff in the version of the checkout's setup.py, typos and doc-builder, in an environment of their own."""
        ruff = re.search(r'"(ruff==[^"]+)"', (self.path / "setup.py").read_text(encoding="utf-8"))[1]
        self.run(sys.executable, "-m", "venv", self.tools, cwd=self.folder)
        missing = []
        for tool in (ruff, *TOOLS):
            try:
                self.run(self.tools / "bin" / "python", "-m", "pip", "install", "--quiet", tool, cwd=self.folder)
            except Failed:
                missing.append(tool)
        if missing:
            raise NotRun(f"pip could not install {', '.join(missing)}")
        return ", ".join((ruff, *TOOLS))

    def tool(self, name: str, *words: str | Path) -> None:
        """Run one of the tools in the checkout."""
        if not (self.tools / "bin" / name).exists():
            raise NotRun(f"{name} is not installed")
        self.run(self.tools / "bin" / name, *words)

    def utility(self, name: str) -> None:
        """Run a check of diffusers. One that fails in the same way without our files is not counted."""
        try:
            self.run(sys.executable, f"utils/check_{name}.py")
        except Failed as failure:
            pristine = self.folder / "pristine"
            if not pristine.exists():
                shutil.copytree(self.path, pristine, ignore=shutil.ignore_patterns(".git"))
                shutil.rmtree(pristine / EXAMPLE)
                (pristine / PAGE).unlink()
                for file, before, added in (TOCTREE, DDPO):
                    text = (pristine / file).read_text(encoding="utf-8")
                    (pristine / file).write_text(text.replace(before + added, before), encoding="utf-8")
            try:
                self.run(sys.executable, f"utils/check_{name}.py", cwd=pristine)
            except Failed as without:
                last = str(without).strip().splitlines()[-1]
                raise NotRun(f"it fails without these files too: {last}") from None
            raise failure

    # Training.

    def words(self, name: str, output: Path, **changes: object) -> list[str]:
        """A script with its options."""
        arguments = {
            "pretrained_model_name_or_path": self.folder / name,
            "dataset_name": self.folder / "prompts",
            "reward": "toy_reward:make_reward",
            "num_inference_steps": 6,
            "resolution": 8,
            "train_batch_size": 2,
            "learning_rate": 0.01,
            "max_train_steps": 2,
            "checkpointing_steps": 1,
            "seed": 0,
            "output_dir": output,
            **changes,
        }
        pairs = [(f"--{key}", *([] if value is True else [str(value)])) for key, value in arguments.items()]
        return [str(self.path / EXAMPLE / script_name(name)), *(word for pair in pairs for word in pair)]

    def make_models(self) -> None:
        """Tiny pipelines with random weights, and prompts."""
        code = "import sys, tiny_pipelines as t\nfor build, to in zip(sys.argv[1::2], sys.argv[2::2]): "
        builds = ("tiny_sd3_t5_pipeline", "tiny_flux_pipeline", "tiny_klein_pipeline")
        pairs = [word for name, build in zip(SCRIPTS, builds, strict=True) for word in (build, self.folder / name)]
        # With the library of this environment, whose helpers make them; the scripts then read the saved files.
        paths = os.pathsep.join([str(ROOT / "pipelines"), str(ROOT / "tests" / "support")])
        self.run(sys.executable, "-c", code + "getattr(t, build)().save_pretrained(to)", *pairs, PYTHONPATH=paths)
        (self.folder / "prompts").mkdir()
        (self.folder / "prompts" / "prompts.txt").write_text('the text "42"\na "7" in red\nblue "k9"\ngreen "a b"\n')

    def train(self, name: str) -> str:
        """Two updates, pushed; the same from a checkpoint; the LoRA in a pipeline."""
        import torch
        from loopback_hub import loopback_hub
        from safetensors.torch import load_file

        output = self.folder / f"{name}-run"
        with loopback_hub() as hub:
            variables = hub.environment(self.folder / "home")
            variables = {key: variables[key] for key in variables if key.startswith("HF_") and key != "HF_HOME"}
            shown = {"validation_prompt": "a b", "num_validation_images": 1, "push_to_hub": True}
            self.run(sys.executable, *self.words(name, output, **shown), cwd=self.folder, **variables)
            (pushed,) = hub.repositories.values()
            names = sorted(pushed.files)
            if not {LORA, "README.md", "image_0.png"} <= set(names) or any(
                map(re.compile(r"\.(bin|pkl)$").search, names)
            ):
                raise Failed(f"pushed {names}")
            if pushed.files[LORA] != (output / LORA).read_bytes():
                raise Failed("another LoRA was pushed")
        whole = load_file(output / LORA)
        shutil.rmtree(output / "checkpoint-2")
        (output / LORA).unlink()
        self.run(sys.executable, *self.words(name, output, resume_from_checkpoint="latest"), cwd=self.folder)
        again = load_file(output / LORA)
        if again.keys() != whole.keys() or not all(torch.equal(again[key], whole[key]) for key in whole):
            raise Failed("the run that resumed ended with another LoRA")
        self.run(sys.executable, "-c", LOAD, self.folder / name, output, cwd=self.folder)
        return f"trained, pushed ({', '.join(each for each in names if '/' not in each)}), resumed, loaded"

    def compare_processes(self, name: str) -> str:
        """Two gloo processes against one: the same samples, noise and gradient, so the same LoRA to rounding."""
        import torch
        from safetensors.torch import load_file

        found = []
        for processes, steps in ((1, 2), (2, 1)):
            output = self.folder / f"{name}-{processes}"
            words = self.words(name, output, train_batch_size=1, gradient_accumulation_steps=steps)
            launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
            self.run(sys.executable, *launch, *words, cwd=self.folder)
            found.append(load_file(output / LORA))
        change = torch.cat([(found[0][key] - found[1][key]).flatten() for key in found[0]]).norm()
        size = torch.cat([value.flatten() for key, value in found[0].items() if "lora_B" in key]).norm()
        if not change <= 1e-4 * size:
            raise Failed(f"relative difference {change / size:.1e}")
        return f"relative difference {change / size:.1e} after two updates"


def compare_options(checkout: Path) -> str:
    """The table of upstream/README.md says which options are shared, and these have the same default."""
    table = option_table()
    for column, name in enumerate(SCRIPTS):
        theirs, ours = options(checkout / UPSTREAM.format(name)), options(HERE / EXAMPLE / script_name(name))
        for option in sorted(theirs | ours):
            status = {(True, True): "shared", (False, True): "added", (True, False): "left out"}
            expected = status[option in theirs, option in ours]
            if (found := table.get(option, ("missing",) * 3)[column]) != expected:
                raise Failed(f"{name}: the table has {option} as {found}, expected {expected}")
            # Required options have no default.
            if expected == "shared" and "required" not in ours[option] and option != "--output_dir":
                left, right = ([of[option].get(key) for key in ("default", "action")] for of in (ours, theirs))
                if [each or "None" for each in left] != [each or "None" for each in right] and right[0] != "False":
                    raise Failed(f"{name}: {option} has {left} here and {right} there")
    return f"{len(table)} options are as the table of upstream/README.md says, shared ones with the same default"


def script_name(name: str) -> str:
    """The file of a script."""
    return f"train_flowbp_lora_{name}.py"


def main() -> None:
    """Check, and exit with 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("diffusers", type=Path, help="a checkout of diffusers")
    path = parser.parse_args().diffusers.resolve()
    if not (path / "src" / "diffusers" / "__init__.py").is_file():
        parser.error(
            f"expected a checkout of diffusers, got {path}; git clone https://github.com/huggingface/diffusers"
        )
    with tempfile.TemporaryDirectory() as folder:
        checkout = Checkout(path, Path(folder))
        scripts = [EXAMPLE / script_name(name) for name in SCRIPTS]
        checkout.report("files and edits", checkout.apply)
        checkout.report("options", lambda: compare_options(path))
        checkout.report("tools", checkout.install_tools)
        checkout.report("ruff check", lambda: checkout.tool("ruff", "check", *scripts))
        checkout.report("ruff format", lambda: checkout.tool("ruff", "format", "--check", *scripts))
        documents = [PAGE, Path(DDPO[0])]
        checkout.report(
            "doc-builder",
            lambda: checkout.tool("doc-builder", "style", *documents, "--max_len", "119", "--check_only"),
        )
        checkout.report("typos", lambda: checkout.tool("typos", EXAMPLE, *documents, Path(TOCTREE[0])))
        for name in UTILITIES:
            checkout.report(f"utils/check_{name}.py", lambda name=name: checkout.utility(name))
        checkout.report("tiny models", checkout.make_models)
        for name in SCRIPTS:
            checkout.report(script_name(name), lambda name=name: checkout.train(name))
        for name in SCRIPTS:
            checkout.report(f"{name}: two processes", lambda name=name: checkout.compare_processes(name))
    sys.exit(1 if checkout.failed else 0)


if __name__ == "__main__":
    main()
