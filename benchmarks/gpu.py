# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Checks and measures FlowBP on one GPU of 80 GB in one command of under 8 minutes.

    python benchmarks/gpu.py --out DIR                        # everything
    python benchmarks/gpu.py --out DIR --parts exact sd3      # some parts
    python benchmarks/gpu.py --out DIR --tiny                 # tiny models on a CPU: does the benchmark itself work?

DIR/gpu.json is written after every measurement. A part that fails or takes too long leaves a note there, and the next
one begins. The models have random weights and are built from configs; nothing is downloaded, and flowbp need not be
installed. benchmarks/README.md explains the numbers.
"""

import argparse
import functools
import gc
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [str(ROOT / name) for name in ("pipelines", "benchmarks", "tests/support")]
sys.path[:0] = FOLDERS
# Before torch and the Hugging Face libraries are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import cost  # noqa: E402
import gpu_measures as measures  # noqa: E402
import torch  # noqa: E402
from diffusers.utils.logging import set_verbosity_error  # noqa: E402
from gpu_exact import exact  # noqa: E402
from journal import Journal  # noqa: E402
from meters import GIB, Stages, hardware  # noqa: E402
from model_sizes import MODELS, call_arguments  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from updates import Bench, build_bench, sweep_update  # noqa: E402

from flowbp import get_method  # noqa: E402
from flowbp.publishing.run_info import versions  # noqa: E402
from flowbp.training.speed import set_attention_backend  # noqa: E402

TINY = {"sd3.5-medium": "tiny", "flux.1-dev": "tiny-flux", "flux.2-klein-4b": "tiny-klein"}
# With its number of active steps, and at N = 8 where a part has little time.
SPARSE = {"method": "flowbp-sparse", "num_active": 4}
FEW_STEPS = 8
# Of the whole run, imports included.
SECONDS = 470


@dataclass
class Run:
    """What all parts share.

    Attributes:
        journal: of the results.
        device: where the models are.
        is_tiny: whether tiny models stand in for those of real size.
    """

    journal: Journal
    device: torch.device
    is_tiny: bool

    def load(
        self,
        label: str,
        name: str,
        batch: int,
        resolution: int = 512,
        prepare: Callable[[torch.nn.Module], None] | None = None,
        lora: bool = True,
    ) -> Bench | None:
        """A model in bf16 with HPSv2.1's network as its reward; `None` if that failed. See `build_bench`."""
        loaded = []

        def build() -> dict[str, Any]:
            # Models that are gone may still be in memory.
            gc.collect()
            torch.manual_seed(0)
            reward = measures.ClipReward(self.device, self.is_tiny)
            bench = build_bench(
                self._size(name), self.device, torch.bfloat16, batch, reward=reward, prepare=prepare, lora=lora
            )
            self.resize(bench, name, batch, resolution)
            loaded.append(bench)
            return {
                "transformer_parameters": sum(p.numel() for p in bench.pipe.transformer.parameters()),
                "trained_parameters": sum(p.numel() for p in bench.parameters),
                "loaded": torch.cuda.memory_allocated() / GIB if self.device.type == "cuda" else None,
            }

        self.journal.attempt(f"{label}, load {self._size(name)}", build)
        return loaded[0] if loaded else None

    def resize(self, bench: Bench, name: str, batch: int, resolution: int, num_steps: int | None = None) -> None:
        """Let the bench's calls have another size; tiny models keep theirs."""
        model = MODELS[self._size(name)]
        resolution = model.resolution if self.is_tiny else resolution
        num_steps = FEW_STEPS if self.is_tiny else num_steps or model.num_inference_steps
        bench.call = call_arguments(model, bench.pipe, batch, resolution, num_steps)

    def time(
        self, label: str, bench: Bench, repeats: int = 1, warm_up: int = 0, seconds: float = 60, **method: Any
    ) -> None:
        """Write down an update of a method."""
        row = get_method(method.pop("method"), **method)

        def make_gradients(stages: Stages) -> None:
            # As a run does: their norms need whole gradients.
            sweep_update(bench, row, stages, measure_gradients=bench.sharded is None)

        self.journal.attempt(label, lambda: measures.timed(bench, make_gradients, repeats, warm_up), seconds)

    def _size(self, name: str) -> str:
        return TINY[name] if self.is_tiny else name


# The training script itself, on the demo's pipeline.

DETERMINISTIC = ["--mixed_precision", "bf16", "--deterministic"]
FULL = [*DETERMINISTIC, "--train", "full", "--learning_rate", "1e-4"]
# Runs of one chain follow one another: the second resumes from the first one's checkpoint, and must end like it.
RESUMED = ["--resume_from_checkpoint", "{first}/checkpoint-1"]
CHAINS: dict[str, list[list[str]]] = {
    "deterministic, resumed": [DETERMINISTIC, [*DETERMINISTIC, *RESUMED]],
    "full fine-tuning under torchrun, resumed": [FULL, [*FULL, *RESUMED]],
    "AdamW with 8-bit state": [["--mixed_precision", "bf16", "--optimizer", "adamw-8bit"]],
    "Prodigy": [["--mixed_precision", "bf16", "--optimizer", "prodigy"]],
    "fp16, checkpointing, samples_per_decode, group offload": [
        ["--mixed_precision", "fp16", "--gradient_checkpointing", "--samples_per_decode", "1", "--group_offload"]
    ],
    # Compiling takes longest.
    "compiled blocks": [["--mixed_precision", "bf16", "--compile_blocks"]],
}
# At a time.
PROCESSES = 6


class Scripts:
    """Training runs of two updates in the background."""

    def __init__(self, is_tiny: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="flowbp_gpu_"))
        self.prompts = self.folder / "prompts.txt"
        self.prompts.write_text("a red square\na blue circle\n", encoding="utf-8")
        self.is_tiny = is_tiny
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.pool = ThreadPoolExecutor(PROCESSES)
        self.chains: dict[str, Future[dict[str, Any]]] = {}

    def start(self) -> None:
        """Start all chains; on a CPU the first only."""
        for name in list(CHAINS)[: 1 if self.is_tiny else None]:
            self.chains[name] = self.pool.submit(self._run_chain, name)

    def finish(self, journal: Journal) -> None:
        """Wait for the runs and write down how they ended."""
        for name, chain in self.chains.items():
            journal.attempt(name, functools.partial(self._outcome, chain), seconds=120)

    def kill(self) -> None:
        """End the runs that have not ended themselves."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in list(self.processes):
            if process.poll() is None:
                process.kill()

    def _run_chain(self, name: str) -> dict[str, Any]:
        folder = self.folder / str(list(CHAINS).index(name))
        folder.mkdir()
        outputs = [folder / str(number) for number in range(len(CHAINS[name]))]
        seconds = []
        for output, options in zip(outputs, CHAINS[name], strict=True):
            began = time.monotonic()
            self._run(output, [option.format(first=outputs[0]) for option in options])
            seconds.append(time.monotonic() - began)
        found: dict[str, Any] = {"seconds": seconds}
        if len(outputs) > 1:
            found["equal"] = len({_weights(output) for output in outputs}) == 1
            if not found["equal"]:
                raise RuntimeError("the resumed run ended with other weights")
        return found

    def _run(self, output: Path, options: list[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*FOLDERS, os.environ.get("PYTHONPATH", "")])}
        environment["OMP_NUM_THREADS"] = "2"
        if self.is_tiny:
            environment["ACCELERATE_USE_CPU"] = "true"
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"] if "full" in options else []
        )
        log = output.with_suffix(".log")
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, *launcher, *self._command(output), *options],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.folder,
            )
        self.processes.add(process)
        if process.wait():
            raise RuntimeError(
                f"exit code {process.returncode}: " + log.read_text(encoding="utf-8", errors="replace")[-800:]
            )

    def _command(self, output: Path) -> list[str]:
        options = {
            "pretrained_model_name_or_path": ROOT / "demo" / "pipeline",
            "reward": "toy_reward:make_reward",
            "eval_reward": "toy_reward:make_held_out_reward",
            "eval_prompts": self.prompts,
            "prompts": self.prompts,
            "resolution": 32 if self.is_tiny else 64,
            "max_sequence_length": 8,
            "num_inference_steps": 8,
            "train_batch_size": 2,
            "max_train_steps": 2,
            "eval_steps": 1,
            "checkpointing_steps": 1,
            "num_validation_images": 1,
            "report_to": "none",
            "output_dir": output,
        }
        words = [str(word) for option, value in options.items() for word in (f"--{option}", value)]
        return [str(ROOT / "training" / "train_flowbp_sd3.py"), *words]

    @staticmethod
    def _outcome(chain: "Future[dict[str, Any]]") -> dict[str, Any]:
        while not chain.done():
            time.sleep(0.2)
        return chain.result()


def _weights(output: Path) -> str:
    """A hash of the weights that a run wrote."""
    digest = hashlib.sha256()
    for path in sorted([*output.glob("*.safetensors"), *output.glob("transformer/*.safetensors")]):
        for name, tensor in sorted(load_file(path).items()):
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# The parts.


def exact_gradients(run: Run) -> None:
    """Gradients of tiny models on this device against brute force and autograd."""
    exact(run.journal, run.device)


def replays(run: Run) -> None:
    """How far correct and wrong replays differ from the recording, at 24, 57 and 25 blocks, in 8 steps."""
    for name in ("sd3.5-medium", "flux.1-dev", "flux.2-klein-4b"):
        bench = run.load(name, name, batch=2)
        if bench is not None:
            run.resize(bench, name, 2, 512, FEW_STEPS)
            run.journal.attempt(name, functools.partial(measures.replay_deviations, bench))
        del bench


def speed(run: Run) -> None:
    """SD3.5-M at 512 pixels, batch 4, N = 8: the LoRA's dtype, checkpointing, TF32, a card of 16 GB."""
    name = "sd3.5-medium"
    bench = run.load("batch 4", name, batch=4)
    if bench is None:
        return
    run.resize(bench, name, 4, 512, FEW_STEPS)
    run.time("LoRA in bf16", bench, repeats=3, warm_up=1, **SPARSE)
    with measures.float32_lora(bench):
        run.time("LoRA in float32", bench, repeats=3, **SPARSE)
    run.journal.attempt("LoRA in float32, gradients", functools.partial(measures.lora_dtypes, bench, **SPARSE))
    torch.backends.cuda.matmul.allow_tf32 = True
    run.time("allow_tf32", bench, repeats=3, **SPARSE)
    torch.backends.cuda.matmul.allow_tf32 = False
    with checkpointing(bench):
        run.time("checkpointing, samples_per_decode 1", bench, repeats=2, **SPARSE)
        # What CUDA reports of a card of 16 GB, less its context.
        with at_most(run.device, 15.0):
            run.time("checkpointing, samples_per_decode 1, in 16 GB", bench, **SPARSE)
    run.resize(bench, name, 1, 512, FEW_STEPS)
    with at_most(run.device, 15.0):
        run.time("batch 1, in 16 GB", bench, **SPARSE)


def compiled(run: Run) -> None:
    """What compiled blocks gain, N = 8, and how long compiling takes: SD3.5-M at 512, FLUX.1-dev at 1024 pixels."""
    for name, batch, resolution in (("sd3.5-medium", 4, 512), ("flux.1-dev", 1, 1024)):
        bench = run.load(name, name, batch, resolution)
        if bench is None:
            return
        run.resize(bench, name, batch, resolution, FEW_STEPS)
        run.time(f"{name}, not compiled", bench, repeats=2, warm_up=1, **SPARSE)
        measures.compile_blocks(bench)
        run.time(f"{name}, compiled, the first update", bench, seconds=100, **SPARSE)
        run.time(f"{name}, compiled", bench, repeats=2, warm_up=1, seconds=40, **SPARSE)
        del bench


def full(run: Run) -> None:
    """All weights of SD3.5-M trained at 512 pixels, N = 8, batch 1 and 4, by FSDP2 on one process."""
    from gpu_full import shard

    name = "sd3.5-medium"
    for batch in (1, 4):
        bench = run.load(f"batch {batch}", name, batch, lora=False)
        if bench is None:
            return
        run.resize(bench, name, batch, 512, FEW_STEPS)
        if run.journal.attempt(f"batch {batch}, shard", functools.partial(shard, bench)):
            run.time(f"batch {batch}", bench, repeats=2, warm_up=1, **SPARSE)
            with checkpointing(bench):
                run.time(f"batch {batch}, checkpointing, samples_per_decode 1", bench, **SPARSE)
        del bench


def waiting(run: Run) -> None:
    """Blocking points and idle time of an update of SD3.5-M, N = 25."""
    for batch in (1, 4):
        bench = run.load(f"batch {batch}", "sd3.5-medium", batch)
        if bench is None:
            return
        if batch == 1:
            run.journal.attempt("blocking points", functools.partial(measures.waiting, bench, **SPARSE))
        run.journal.attempt(f"batch {batch}, idle time", functools.partial(measures.idle_time, bench, **SPARSE))
        del bench


def sd3(run: Run) -> None:
    """Seconds and memory of SD3.5-M at 512 pixels, against the paper's way and the floor."""
    for batch in (1, 4):
        _sd3(run, batch)


def _sd3(run: Run, batch: int) -> None:
    label = f"batch {batch}"
    bench = run.load(label, "sd3.5-medium", batch)
    if bench is None:
        return
    bench.pipe.scheduler.set_timesteps(bench.call["num_inference_steps"], device=run.device)
    sigmas = bench.pipe.scheduler.sigmas.cpu()
    surrogate = get_method(SPARSE["method"], num_active=4).draw(sigmas, torch.Generator().manual_seed(0))
    case = cost.Case(surrogate, bench.call["guidance_scale"], unconditional_gradient=False, seed=0)
    ways = {variant: functools.partial(cost.UPDATES[variant], bench, case) for variant in cost.VARIANTS}
    for variant, way in ways.items():
        measure = functools.partial(measures.timed, bench, way, warm_up=variant == "sweep")
        run.journal.attempt(f"{label}, sparse K=4, {variant}", measure)
    run.journal.attempt(f"{label}, stock rollout", functools.partial(measures.stock_rollout, bench))
    with checkpointing(bench):
        run.time(f"{label}, sparse K=4, checkpointing, samples_per_decode 1", bench, **SPARSE)
    if batch == 1:
        compared = {variant: ways[variant] for variant in ("sweep", "paper")}
        run.journal.attempt(
            f"{label}, gradients against the sweep's",
            functools.partial(measures.gradient_differences, bench, compared, "sweep"),
        )
    # The slowest comes last.
    for method in ("flowbp-lagrange", "leapalign") if batch == 1 else ("full",):
        run.time(f"{label}, {method}", bench, method=method)


@contextmanager
def checkpointing(bench: Bench) -> Iterator[None]:
    """What saves memory in training: gradient checkpointing, and decoding one sample at a time."""
    parts = (bench.pipe.transformer, bench.pipe.vae)
    for part in parts:
        part.enable_gradient_checkpointing()
    bench.samples_per_decode = 1
    try:
        yield
    finally:
        bench.samples_per_decode = None
        for part in parts:
            part.disable_gradient_checkpointing()


@contextmanager
def at_most(device: torch.device, gib: float) -> Iterator[None]:
    """Let torch have no more of the device's memory than a smaller card has."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_per_process_memory_fraction(gib * GIB / torch.cuda.get_device_properties(device).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def flux(run: Run) -> None:
    """Seconds and memory of FLUX.1-dev at 512 and 1024 pixels: the LoRA's dtype, attention, checkpointing."""
    name = "flux.1-dev"
    bench = run.load("512", name, batch=1)
    if bench is None:
        return
    run.time("512, sparse K=4", bench, warm_up=1, **SPARSE)
    with measures.float32_lora(bench):
        run.time("512, sparse K=4, LoRA in float32", bench, **SPARSE)
    run.resize(bench, name, 1, 1024, FEW_STEPS)
    run.time("1024, N=8", bench, repeats=2, warm_up=1, **SPARSE)
    with measures.float32_lora(bench):
        run.time("1024, N=8, LoRA in float32", bench, repeats=2, **SPARSE)
    with checkpointing(bench):
        run.time("1024, N=8, checkpointing", bench, **SPARSE)
        # What CUDA reports of a card of 40 GB, less its context.
        with at_most(run.device, 38.4):
            run.time("1024, N=8, checkpointing, in 40 GB", bench, **SPARSE)
    # PyTorch's own choice is flash attention here.
    for backend in ("_native_efficient", "_native_flash") if run.device.type == "cuda" else ("_native_math",):
        set_attention_backend(bench.pipe.transformer, backend)
        run.time(f"1024, N=8, attention {backend}", bench, repeats=2, **SPARSE)


def klein(run: Run) -> None:
    """Seconds and memory of FLUX.2-Klein 4B at 1024 pixels."""
    bench = run.load("1024", "flux.2-klein-4b", batch=1, resolution=1024)
    if bench is None:
        return
    run.time("1024, sparse K=4", bench, **SPARSE)
    run.journal.attempt("1024, stock rollout", functools.partial(measures.stock_rollout, bench))
    run.journal.attempt("1024, graphs of sparse K=4 alive", functools.partial(measures.graphs_alive, bench, **SPARSE))


def nf4(run: Run) -> None:
    """FLUX.1-dev at 1024 pixels with an nf4 base in 24 GB."""
    bench = run.load("1024", "flux.1-dev", batch=1, resolution=1024, prepare=measures.quantise)
    if bench is None:
        return
    run.resize(bench, "flux.1-dev", 1, 1024, FEW_STEPS)
    # What CUDA reports of an RTX 4090, less its context.
    with checkpointing(bench), at_most(run.device, 22.6):
        run.time("1024, sparse K=4, N=8, checkpointing, in 24 GB", bench, **SPARSE)


# In order of value, each with its limit in seconds.
PARTS: dict[str, tuple[Callable[[Run], None], float]] = {
    "exact": (exact_gradients, 60),
    "replays": (replays, 60),
    "speed": (speed, 75),
    "flux": (flux, 100),
    "full": (full, 60),
    "nf4": (nf4, 40),
    "compiled": (compiled, 150),
    "waiting": (waiting, 60),
    "sd3": (sd3, 140),
    "klein": (klein, 45),
}
# These may share the device with the scripts; timings may not.
BESIDE_SCRIPTS = ("exact", "replays")
# The others were measured before (results/gpu_h200.json) and do not fit beside them.
DEFAULT_PARTS = ("scripts", "exact", "replays", "speed", "flux", "full", "nf4", "compiled")


def measure(run: Run, parts: Sequence[str]) -> None:
    """Run the parts in their order, the scripts in the background of the first ones."""
    scripts = Scripts(run.is_tiny)
    try:
        if "scripts" in parts:
            scripts.start()
        for beside in (True, False):
            for name, (part, seconds) in PARTS.items():
                if name in parts and (name in BESIDE_SCRIPTS) == beside:
                    with run.journal.part(name, seconds):
                        part(run)
            if beside and scripts.chains:
                with run.journal.part("scripts", 150):
                    scripts.finish(run.journal)
                scripts.kill()
    finally:
        scripts.kill()


def failures(report: dict[str, Any]) -> list[str]:
    """What did not end as it should, in words."""
    return [
        f"{part}: {name}: {key}: {str(found[key])[:200]}"
        for part, results in report["parts"].items()
        for name, found in results.items()
        for key in ("error", "late", "limit")
        if key in found
    ]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="Folder of gpu.json.")
    parser.add_argument("--tiny", action="store_true", help="Tiny models on a CPU.")
    names = ["scripts", *PARTS]
    parser.add_argument(
        "--parts", nargs="+", choices=names, default=DEFAULT_PARTS, help=f"Default: {' '.join(DEFAULT_PARTS)}."
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"Limit of the whole run (default: {SECONDS}).")
    args = parser.parse_args(argv)
    if not args.tiny and not torch.cuda.is_available():
        parser.error("this torch sees no GPU; use --tiny to try the benchmark on a CPU.")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 where a measurement failed or was late."""
    args = parse_args(argv)
    set_verbosity_error()
    if args.tiny:
        torch.set_num_threads(1)
    # As the engine does (flowbp.state.without_cudnn_attention): all ways of an update get the same kernels.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # What is imported stays, and collecting garbage between measurements need not look at it.
    gc.freeze()
    device = torch.device("cpu" if args.tiny else "cuda")
    slower = 20.0 if args.tiny else 1.0
    with Journal(args.out / "gpu.json", args.seconds * slower, slower, STARTED) as journal:
        journal.report |= {
            "hardware": hardware(device),
            "versions": {**versions(), "cudnn": torch.backends.cudnn.version()},
            "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled(),
            "is_tiny": args.tiny,
        }
        measure(Run(journal, device, args.tiny), args.parts)
        failed = failures(journal.report)
        for line in failed:
            journal.say("FAILED", line)
        journal.say("done", journal.path)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
