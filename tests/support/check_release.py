# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Whether a tag may be published: `python tests/support/check_release.py v0.1.0 https://github.com/user/name`.

.github/workflows/release.yml asks before it builds, with nothing but Python installed.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def problems(tag: str, repository: str, root: Path = ROOT) -> list[str]:
    """What keeps the checkout at `root` from being published, one line each.

    Args:
        tag: `v` and the version.
        repository: address of the repository that publishes.
        root: has setup.py, CHANGELOG.md and the package.
    """
    found = []
    version = _constant(root / "pipelines" / "flowbp" / "__init__.py", "__version__")
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, flowbp.__version__ is {version}; tag v{version}, or change __version__")
    notes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d$", notes, re.MULTILINE):
        found.append(f"CHANGELOG.md has no heading '## {version} - YYYY-MM-DD'; write the date of the release")
    address = _constant(root / "setup.py", "REPOSITORY_URL")
    if address != repository:
        found.append(f"setup.py has REPOSITORY_URL {address!r}, the repository is {repository}; set it")
    return found


def _constant(path: Path, name: str) -> str:
    return re.search(rf'^{name} = "(.*)"$', path.read_text(encoding="utf-8"), re.MULTILINE)[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tag")
    parser.add_argument("repository")
    sys.exit("\n".join(problems(**vars(parser.parse_args()))) or None)
