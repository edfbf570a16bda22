# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The metadata that depends on the repository's address: links, and README.md as PyPI shows it.

All other metadata is in setup.cfg.
"""

import re
from pathlib import Path

from setuptools import setup

REPOSITORY_URL = ""
"""Address of the public repository, such as `https://github.com/user/name`: the only place where it stands.

While it is empty, the description has relative links as plain text and no relative images, and there are no project
links but the paper. Everything builds and installs, but release.yml refuses to publish.
"""

PROJECT_URLS = {
    "Paper": "https://arxiv.org/abs/2606.11075",
    **(
        {
            "Source": REPOSITORY_URL,
            "Changelog": f"{REPOSITORY_URL}/blob/main/CHANGELOG.md",
            "Issues": f"{REPOSITORY_URL}/issues",
        }
        if REPOSITORY_URL
        else {}
    ),
}

# Code blocks, inline code, images and links; code comes first because what looks like a link in it is not one.
CODE_OR_LINK = re.compile(
    r"(?P<code>^```.*?^```$|`[^`\n]+`)|(?P<image>!?)\[(?P<text>[^\[\]]*)\]\((?P<target>[^)\s]+)\)",
    re.DOTALL | re.MULTILINE,
)


def absolute_links(readme: str, repository_url: str) -> str:
    """Markdown whose relative links and images point into the repository, because PyPI has none of its files.

    Args:
        readme: Markdown, with paths relative to the root of the repository.
        repository_url: of a repository on GitHub; `""` removes relative links and images.
    """

    def replace(match: re.Match[str]) -> str:
        text, target = match["text"], match["target"]
        if match["code"] or re.match(r"[a-z]+:", target):
            return match[0]
        if not repository_url:
            return "" if match["image"] else text
        if match["image"]:
            return f"![{text}]({repository_url}/raw/main/{target})"
        return f"[{text}]({repository_url}{target if target.startswith('#') else f'/blob/main/{target}'})"

    return CODE_OR_LINK.sub(replace, readme)


if __name__ == "__main__":
    setup(
        long_description=absolute_links(Path("README.md").read_text(encoding="utf-8"), REPOSITORY_URL),
        project_urls=PROJECT_URLS,
    )
