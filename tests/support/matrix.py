# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Makes the matrix of docs/pipelines.md: every family of `families` compared with the oracle, one line for each class.

python tests/support/matrix.py            prints the table
python tests/support/matrix.py --write    writes it to docs/pipelines.md, and the verified classes into the package
"""

import argparse
import inspect
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from families import FAMILIES, WITH_INPUTS
from families.family import Family
from families.oracle import Outcome, try_case
from tqdm import tqdm

BOUND = 1e-6
ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "pipelines.md"
VERIFIED = ROOT / "pipelines" / "flowbp" / "verified_pipelines.py"
# Transformer pipelines that are no rows, by reason.
LEFT_OUT = {
    "they make sound alone": """
        AceStepPipeline LongCatAudioDiTPipeline StableAudio3AudioToAudioPipeline StableAudio3InpaintPipeline
        StableAudio3Pipeline StableAudioPipeline""",
    "their models predict noise, or velocities of another schedule than a flow's": """
        AllegroPipeline CogVideoXFunControlPipeline CogVideoXImageToVideoPipeline CogVideoXPipeline
        CogVideoXVideoToVideoPipeline CogView3PlusPipeline ConsisIDPipeline CosmosTextToWorldPipeline
        CosmosVideoToWorldPipeline DiTPipeline HunyuanDiTControlNetPipeline HunyuanDiTPAGPipeline HunyuanDiTPipeline
        LattePipeline PixArtAlphaPipeline PixArtSigmaPAGPipeline PixArtSigmaPipeline""",
    "its sampler draws noise at every step, and no other fits": "LTX2DFRTemporalRefinePipeline",
    "it decodes latents": "LTX2VideoDiffusionDecodePipeline",
    "its call fails in diffusers 0.42.1, by an argument that its `encode_prompt` does not take": """
        EasyAnimateControlPipeline""",
    "it detaches what it returns, and needs torchvision": "Cosmos2_5_TransferPipeline",
    "their sparse attention has no backward pass on CPUs": "AnyFlowFARPipeline Kandinsky6SRPipeline",
    "they sample discrete tokens": "AmusedImg2ImgPipeline AmusedInpaintPipeline AmusedPipeline VQDiffusionPipeline",
}
GROUPS = ("Images from text", "Images from pictures, masks and controls", "Videos")
MARKERS = ("<!-- matrix: made by `make matrix` -->", "<!-- end of the matrix -->")
HEAD = (
    "| pipeline | models | outcome | verified calls | both branches | conditional only | notes |",
    "|---|---|---|---|---|---|---|",
)
# What the table says of a refusal, by a pattern of the engine's message; \1 is the pattern's group.
REASONS = {
    r"step \d+ of (\w+) is not latents \+": r"`\1` does not take plain Euler steps",
    r"passes an? (\w+) to the transformer": r"a `\1` carries state from step to step",
    r"runs without gradients inside": "a part of the transformer runs without gradients",
    r"depend on outputs of earlier steps": "a step uses outputs of earlier steps",
    r"written into in place": "autograd refuses the pipeline's writes in place",
    r"moves tokens by other lengths": "the noise of some tokens falls by a schedule of their own",
    r"without noise on what is given": "noise is drawn on given frames at each step",
    r"`sigmas` must fall": "the sigmas do not fall from 1 to 0",
    r"(\w+) has no sigmas": r"`\1` has no sigmas of a flow",
    r"complete rollout, got none": "other pipelines or copies of the scheduler make the steps",
    r"a second sampling loop": "one call has several sampling loops",
}


def is_verified(family: Family) -> bool:
    """Whether at least one way to call the family's pipeline is expected to be verified."""
    return any(case.refused is None for case in family.cases(family.build()))


def left_out() -> set[str]:
    """Names of the classes that are no rows on purpose."""
    return set(" ".join(LEFT_OUT.values()).split())


def uncovered() -> list[str]:
    """Names of diffusers' pipelines that may sample a flow, and that neither a family nor `LEFT_OUT` has.

    They have a scheduler, and a transformer or the type of the scheduler says that it is one of flows.
    """
    known = {family.pipeline for family in FAMILIES} | left_out()
    found = []
    for name in dir(diffusers):
        pipeline = getattr(diffusers, name, None) if name.endswith("Pipeline") and name not in known else None
        if inspect.isclass(pipeline) and issubclass(pipeline, DiffusionPipeline):
            parts = inspect.signature(pipeline.__init__).parameters
            is_flow = "scheduler" in parts and re.search("Flow|_empty", str(parts["scheduler"].annotation))
            if is_flow or ("scheduler" in parts and any("transformer" in part for part in parts)):
                found.append(name)
    return found


def group(family: Family) -> str:
    """The heading under which a family's class stands."""
    return GROUPS[2 if family.output == "video" else family in WITH_INPUTS]


def largest(differences: list[float]) -> str:
    """One digit of the largest, such as 5e-8."""
    if not differences:
        return "-"
    return f"{max(differences):.0e}".replace("e-0", "e-") if max(differences) else "0"


def reason(message: str) -> str:
    """A refusal in the table's words."""
    for pattern, words in REASONS.items():
        if match := re.search(pattern, message):
            return match.expand(words)
    raise ValueError(f"REASONS has no words for: {message}")


def models(families: Iterable[Family]) -> str:
    """The names of a class' models, without those that are variants of another, such as "Sana, DPM-Solver"."""
    names = [family.name for family in families]
    return ", ".join(
        name for name in names if not any(re.match(f"{re.escape(other)}(,| with)", name) for other in names)
    )


def notes(family: Family, outcomes: list[Outcome], alone: bool) -> list[str]:
    """The family's note, and what its pipeline refuses, one entry for each reason.

    Args:
        family: whose calls were tried.
        outcomes: of its calls.
        alone: whether the class has no other family, so that its name need not be repeated.
    """
    refused = [(outcome.case, reason(outcome.refused)) for outcome in outcomes if outcome.refused is not None]
    if len(refused) == len(outcomes):
        words = "; ".join(dict.fromkeys(words for _, words in refused)) + (f" ({family.note})" if family.note else "")
        return [words if alone else f"refused ({family.name}): {words}"]
    entries = [family.note] if family.note else []
    for words in dict.fromkeys(words for _, words in refused):
        calls = ", ".join(case for case, of_case in refused if of_case == words)
        entries.append(f"refused ({calls}): {words}")
    return entries


def row(tried: list[tuple[Family, list[Outcome]]]) -> str:
    """The line of a class.

    Args:
        tried: the families of the class, with the outcomes of their calls.
    """
    verified = [outcome for _, outcomes in tried for outcome in outcomes if outcome.refused is None]
    differences = [outcome.difference for outcome in verified]
    conditional = [o.conditional_difference for o in verified if o.conditional_difference is not None]
    remarks = [entry for family, outcomes in tried for entry in notes(family, outcomes, len(tried) == 1)]
    kept_out = [outcome.case for outcome in verified if outcome.conditional_refused is not None]
    if kept_out:
        remarks.append("conditional branch alone refused: " + ", ".join(kept_out))
    cells = [
        f"`{tried[0][0].pipeline}`",
        models(family for family, _ in tried),
        "verified" if verified else "refused",
        "; ".join(dict.fromkeys(outcome.case for outcome in verified)) or "-",
        largest(differences),
        largest(conditional),
        "; ".join(remarks),
    ]
    return "| " + " | ".join(cells) + " |"


def by_class() -> dict[str, list[Family]]:
    """The families of each pipeline class, group by group."""
    classes: dict[str, list[Family]] = {}
    for family in sorted(FAMILIES, key=lambda family: GROUPS.index(group(family))):
        classes.setdefault(family.pipeline, []).append(family)
    return classes


def table() -> str:
    """The whole matrix in Markdown."""
    rows: dict[str, list[str]] = {heading: [] for heading in GROUPS}
    for families in tqdm(by_class().values()):
        tried = []
        for family in families:
            pipe = family.build()
            tried.append((family, [try_case(pipe, case) for case in family.cases(pipe)]))
        rows[group(families[0])].append(row(tried))
    verified = verified_in("\n".join(sum(rows.values(), [])))
    summary = f"{len(verified)} of {sum(map(len, rows.values()))} pipeline classes are verified"
    versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}"
    lines = [f"{summary}, in {len(FAMILIES)} configurations ({versions})."]
    for heading, of_group in rows.items():
        lines += ["", f"### {heading}", "", *HEAD, *of_group]
    left_out = "; ".join(f"{why}: {', '.join(f'`{name}`' for name in of.split())}" for why, of in LEFT_OUT.items())
    return "\n".join([*lines, "", f"Left out, because {left_out}."])


def verified_in(text: str) -> list[str]:
    """The classes that a table has as verified, sorted by name."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return sorted({line.split("`")[1] for line in lines if line.split(" | ")[2] == "verified"})


def write_verified(classes: list[str]) -> None:
    """Put the verified classes into the package."""
    before, _, _ = VERIFIED.read_text(encoding="utf-8").partition("VERIFIED_PIPELINES")
    names = textwrap.fill(" ".join(classes), 119, initial_indent="    ", subsequent_indent="    ")
    made = f'VERIFIED_PIPELINES = frozenset(\n    """\n{names}\n    """.split()\n)\n'
    VERIFIED.write_text(before + made, encoding="utf-8")


def main() -> None:
    """Print the table; with `--write` put it between the document's markers, and the classes into the package."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table and the classes to their files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    made = table()
    print(made)
    if args.write:
        before, rest = DOCUMENT.read_text(encoding="utf-8").split(MARKERS[0])
        after = rest.split(MARKERS[1])[1]
        DOCUMENT.write_text(f"{before}{MARKERS[0]}\n{made}\n{MARKERS[1]}{after}", encoding="utf-8")
        write_verified(verified_in(made))


if __name__ == "__main__":
    main()
