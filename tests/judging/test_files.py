# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Files that are complete or absent."""

import os
import stat
from pathlib import Path

import pytest

from flowbp import files
from flowbp.files import apply_umask, write_atomically


def test_text_is_written_as_utf_8_and_leaves_no_other_file(tmp_path: Path) -> None:
    # "\udcff" is how Python reads a byte of the command line that is not UTF-8.
    write_atomically(tmp_path / "a.json", "é 猫 \udcff")
    assert (tmp_path / "a.json").read_bytes() == "é 猫 \\udcff".encode()
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]


def test_an_interrupted_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "old")

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    # What was left behind is no obstacle.
    write_atomically(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("target")
    for name in ("a", "a.partial"):
        (tmp_path / name).symlink_to(tmp_path / "target")
    write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "target").read_text() == "target"
    assert (tmp_path / "a").read_text() == "new" and not (tmp_path / "a").is_symlink()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permissions for groups")
@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_get_the_permissions_of_the_umask(tmp_path: Path, umask: int, expected: int) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    for path in (tmp_path / "outside", folder / "private", folder / "public", folder / "inner" / "private"):
        path.write_text("content")
        path.chmod(0o666 if path.name == "public" else 0o400)
    (folder / "link").symlink_to(tmp_path / "outside")
    before = os.umask(umask)
    try:
        apply_umask(folder)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert {path.name for path in folder.iterdir()} == {"private", "public", "link", "inner"}
    assert mode(folder / "private") == mode(folder / "public") == expected
    # Where links lead, and what is in folders, is not touched.
    assert mode(tmp_path / "outside") == mode(folder / "inner" / "private") == 0o400
