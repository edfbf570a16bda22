# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Makes the matrix of the README: every family of `families` put through the oracle.

python tests/support/matrix.py            prints the table
python tests/support/matrix.py --write    puts it into README.md, and the verified classes into flowbp (make matrix)
"""

import argparse
import inspect
import re
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from families import FAMILIES
from families.family import Family
from families.oracle import Outcome, try_case
from tqdm import tqdm

BOUND = 1e-6
ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
VERIFIED = ROOT / "pipelines" / "flowbp" / "verified_pipelines.py"
# Arguments of pipelines that begin with more than text.
OTHER_INPUTS = re.compile("^(.*_)?(image|images|video|audio)$|^(image|video|audio)_|audio")
SOUND = {"StableAudio3Pipeline"}
MARKERS = ("<!-- matrix: made by `make matrix` -->", "<!-- end of the matrix -->")


def is_verified(family: Family) -> bool:
    """Whether at least one way to call the family's pipeline is expected to be verified."""
    return any(case.refused is None for case in family.cases(family.build()))


def uncovered() -> list[str]:
    """Names of diffusers' text-to-image and text-to-video pipelines with the Euler scheduler that no family has.

    A pipeline counts as one of them if it is built with that scheduler and its call takes no picture, video or sound.
    """
    covered = {family.pipeline for family in FAMILIES} | SOUND
    found = []
    for name in dir(diffusers):
        pipeline = getattr(diffusers, name, None) if name.endswith("Pipeline") and name not in covered else None
        if not (inspect.isclass(pipeline) and issubclass(pipeline, DiffusionPipeline)):
            continue
        scheduler = inspect.signature(pipeline.__init__).parameters.get("scheduler")
        if scheduler is None or "FlowMatchEulerDiscreteScheduler" not in str(scheduler.annotation):
            continue
        if not any(OTHER_INPUTS.search(parameter) for parameter in inspect.signature(pipeline.__call__).parameters):
            found.append(name)
    return found


def largest(differences: list[float]) -> str:
    """One digit of the largest, such as 5e-8."""
    if not differences:
        return "-"
    return f"{max(differences):.0e}".replace("e-0", "e-") if max(differences) else "0"


def row(family: Family, outcomes: list[Outcome]) -> str:
    """One line of the table."""
    verified = [outcome for outcome in outcomes if outcome.refused is None]
    refused = [outcome for outcome in outcomes if outcome.refused is not None]
    differences = [outcome.difference for outcome in verified]
    conditional = [o.conditional_difference for o in verified if o.conditional_difference is not None]
    state = "verified" if verified else "refused"
    notes = [family.note] if family.note else []
    # What was found; what to do about it follows the semicolon.
    found = [outcome.refused.removeprefix(f"{family.pipeline}: ").split(";")[0] for outcome in refused]
    for message in dict.fromkeys(found):
        cases = ", ".join(outcome.case for outcome, of_case in zip(refused, found, strict=True) if of_case == message)
        notes.append(f"refused{f' ({cases})' if verified else ''}: *{message}*")
    kept_out = [outcome.case for outcome in verified if outcome.conditional_refused is not None]
    if kept_out:
        notes.append("conditional branch alone refused: " + ", ".join(kept_out))
    cells = [
        family.name,
        f"`{family.pipeline}`",
        state,
        "; ".join(outcome.case for outcome in verified) or "-",
        largest(differences),
        largest(conditional),
        "; ".join(notes),
    ]
    return "| " + " | ".join(cells) + " |"


def table() -> str:
    """The whole matrix in Markdown."""
    lines = [
        "| model | pipeline | outcome | calls that were verified | both branches | conditional only | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in tqdm(FAMILIES):
        pipe = family.build()
        lines.append(row(family, [try_case(pipe, case) for case in family.cases(pipe)]))
    verified = verified_in("\n".join(lines))
    classes = len({family.pipeline for family in FAMILIES})
    summary = f"Of {classes} pipeline classes ({len(FAMILIES)} rows) {len(verified)} are verified in some row."
    return "\n".join([f"{summary} By diffusers {diffusers.__version__}, torch {torch.__version__}.", "", *lines])


def verified_in(text: str) -> list[str]:
    """The classes that a table has as verified, sorted by name."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and "`" in line]
    return sorted({line.split("`")[1] for line in lines if line.split(" | ")[2] == "verified"})


def write_verified(classes: list[str]) -> None:
    """Put the verified classes into the package."""
    before, _, _ = VERIFIED.read_text(encoding="utf-8").partition("VERIFIED_PIPELINES")
    names = "".join(f'        "{name}",\n' for name in classes)
    made = f"VERIFIED_PIPELINES = frozenset(\n    {{\n{names}    }}\n)\n"
    VERIFIED.write_text(before + made, encoding="utf-8")


def main() -> None:
    """Print the table, or put it between the README's markers and the verified classes into the package."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table and the classes to their files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    made = table()
    print(made)
    if args.write:
        text = README.read_text(encoding="utf-8")
        before, rest = text.split(MARKERS[0])
        after = rest.split(MARKERS[1])[1]
        README.write_text(f"{before}{MARKERS[0]}\n{made}\n{MARKERS[1]}{after}", encoding="utf-8")
        write_verified(verified_in(made))


if __name__ == "__main__":
    main()
