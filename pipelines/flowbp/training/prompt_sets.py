# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Sets of prompts that have a name: where they are published, in which file and column, at a fixed revision."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

from huggingface_hub import cached_assets_path, get_session, hf_hub_download

from ..files import move

GITHUB = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class PromptSet:
    """Published files with prompts.

    Attributes:
        contents: what it is, for the documentation.
        repository: id of a dataset on the Hub, or `github.com/owner/name`.
        revision: commit, so that the prompts stay the same.
        files: in the order of the prompts.
        column: that holds the prompts; None for files without columns.
        count: number of prompts; None where it is not known.
        licence: as the repository states it.
        group: name of a further column with each file's name, for sets of several files.
    """

    contents: str
    repository: str
    revision: str
    files: tuple[str, ...]
    column: str | None
    count: int | None
    licence: str
    group: str | None = None

    def download(self) -> list[Path]:
        """The files, from huggingface_hub's cache if they are there. They are data; no code is run.

        Raises:
            Exception: of huggingface_hub or the network.
        """
        if not self.repository.startswith("github.com/"):
            hub = {"repo_type": "dataset", "revision": self.revision}
            return [Path(hf_hub_download(self.repository, file, **hub)) for file in self.files]
        name = self.repository.removeprefix("github.com/")
        folder = cached_assets_path("flowbp", name.replace("/", "--"), self.revision)
        for file in self.files:
            path = folder / file
            if not path.exists():
                answer = get_session().get(f"{GITHUB}/{name}/{self.revision}/{file}", follow_redirects=True)
                answer.raise_for_status()
                path.parent.mkdir(parents=True, exist_ok=True)
                # Other processes may do the same.
                with NamedTemporaryFile(dir=path.parent, delete=False) as partial:
                    partial.write(answer.content)
                move(Path(partial.name), path)
        return [folder / file for file in self.files]


_STYLES = ("anime", "concept-art", "paintings", "photo")
_FLOWBP = ("github.com/RuoyuWang-2077/FlowBP", "93b220ad48782357efd55bfdf5e0a987f9b035f2")

PROMPT_SETS = {
    "drawbench": PromptSet(
        "DrawBench",
        "sayakpaul/drawbench",
        "ad794cba698c253ffdb6d18eff3fc87b004c1135",
        ("DrawBench Prompts - Sheet1.csv",),
        column="Prompts",
        count=200,
        licence="not known, see the page",
    ),
    "flowbp-eval": PromptSet(
        "test prompts of the paper's code, from HPDv2",
        *_FLOWBP,
        ("assets/eval_prompts.txt",),
        column=None,
        count=400,
        licence="Apache-2.0",
    ),
    "flowbp-train": PromptSet(
        "training prompts of the paper's code, those of DanceGRPO, from HPDv2",
        *_FLOWBP,
        ("assets/prompts.txt",),
        column=None,
        count=None,
        licence="Apache-2.0",
    ),
    "geneval": PromptSet(
        "GenEval",
        "github.com/djghosh13/geneval",
        "af4902f24d3ca90ebbb446dd9891a59e0f82725f",
        ("prompts/evaluation_metadata.jsonl",),
        column="prompt",
        count=553,
        licence="MIT",
    ),
    "hpdv2": PromptSet(
        "benchmark prompts of HPSv2, 800 of each style, with a column `style`",
        "zhwang/HPDv2",
        "b9517430f34b1080d4f741118d2a440155a165cd",
        tuple(f"benchmark/{style}.json" for style in _STYLES),
        column="prompt",
        count=3200,
        licence="not stated there; the same files in ymhao/HPDv2: Apache-2.0",
        group="style",
    ),
    "parti-prompts": PromptSet(
        "PartiPrompts (P2), with columns `Category` and `Challenge`",
        "nateraw/parti-prompts",
        "944b156abfdad7627c3221b5ec4f6a6fb060a197",
        ("PartiPrompts.tsv",),
        column="Prompt",
        count=1632,
        licence="Apache-2.0",
    ),
}
PROMPTS_HELP = (
    ".txt, .jsonl, .json, .csv, .tsv or .parquet file, a datasets folder or Hub id, or a named set: "
    f"{', '.join(PROMPT_SETS)}."
)
