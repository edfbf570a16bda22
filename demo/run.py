# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The demo: train a LoRA of the bundled pipeline against a text recogniser, then judge it with another one.

    make demo        (or: python demo/run.py [--output_dir DIR])

Needs no GPU, no account and no network.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

from flowbp.files import allow_any_character

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "demo" / "recipe.yaml"
# A file of its own, because each script refuses options that it does not have.
EVALUATION = ROOT / "demo" / "evaluation.yaml"

ROLLOUT = ("num_inference_steps", "guidance_scale", "max_sequence_length")

# Training makes and frees the same large blocks in every update. glibc's allocator gives them back to the system each
# time, and the page faults that follow can cost more than the arithmetic; told to keep them, it does not.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "MALLOC_TOP_PAD_": str(2**26),
}


def main() -> None:
    """Train, evaluate, and say where the results are."""
    allow_any_character()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "demo" / "output", help="Folder of the results.")
    output = parser.parse_args().output_dir.resolve()
    environment = {
        **os.environ,
        **ALLOCATOR,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    started = time.perf_counter()

    def run(*command: str) -> None:
        finished = subprocess.run(command, cwd=ROOT, env=environment, check=False)
        if finished.returncode:
            sys.exit(finished.returncode)

    print("Training a LoRA of the bundled pipeline against a text recogniser ...", flush=True)
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    # One thread: where another program takes a core, threads that wait for each other are many times slower than one,
    # and the numbers are the same on any count of cores.
    launch += ["--num_cpu_threads_per_process", "1"]
    script = str(ROOT / "training" / "train_flowbp_sd3.py")
    run(sys.executable, *launch, script, "--config", str(RECIPE), "--output_dir", str(output))
    trained = time.perf_counter() - started

    print("\nDrawing held-out prompts with the base and with the LoRA ...", flush=True)
    run(sys.executable, str(ROOT / "demo" / "evaluate.py"), "--config", str(EVALUATION), "--output_dir", str(output))

    print(f"\nTraining took {trained:.0f} s, all of it {time.perf_counter() - started:.0f} s.")
    print(f"Pictures: {output / 'before_after.png'}\n          {output / 'reward_curve.png'}")
    settings = yaml.safe_load(EVALUATION.read_text(encoding="utf-8"))
    rollout = ", ".join(f"{name}={settings[name]}" for name in ROLLOUT)
    print("\nUse the LoRA:\n")
    print(
        f'  pipe = StableDiffusion3Pipeline.from_pretrained("{ROOT.as_posix()}/demo/pipeline", text_encoder_3=None, '
        "tokenizer_3=None, dtype=torch.float32)"
    )
    print(f'  pipe.load_lora_weights("{output.as_posix()}")')
    print(f"  pipe('the text \"42\" in red on a yellow background', {rollout}).images[0]")


if __name__ == "__main__":
    main()
