# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Errors of files name the file and what to do."""

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from flowbp.file_errors import message_of, writing
from flowbp.rewards import load_reward


def test_a_full_disk_is_named(tmp_path: Path):
    full = Path("/dev/full")
    if not full.is_char_device():
        pytest.skip("only Linux has a device that is always full")
    target = tmp_path / "run.json"
    with pytest.raises(OSError) as caught, writing(target), full.open("w") as file:
        file.write("x")
    remedy = "free space on that disk, or choose a folder on another one."
    assert message_of(caught.value) == f"{target}: No space left on device; {remedy}"


def test_what_is_in_the_way_is_named(tmp_path: Path):
    (tmp_path / "run").write_text("")
    for make in (lambda path: path.mkdir(), lambda path: (path / "images").mkdir()):
        with pytest.raises(OSError) as caught:
            make(tmp_path / "run")
        message = message_of(caught.value)
        assert str(tmp_path / "run") in message and "move the file that is in the way" in message


def test_permissions(tmp_path: Path):
    # As the system raises it; root is refused nothing.
    message = message_of(PermissionError(13, "Permission denied", str(tmp_path)))
    assert message == f"{tmp_path}: Permission denied; choose another path, or ask for permission."


def test_libraries_errors_get_the_path(tmp_path: Path):
    target = tmp_path / "absent" / "lora.safetensors"
    with pytest.raises(SafetensorError) as caught, writing(target):
        save_file({"a": torch.ones(1)}, target)
    assert message_of(caught.value).endswith(f"It was raised while {target} was written.")
    with pytest.raises(RuntimeError) as caught, writing(target):
        torch.save({"a": torch.ones(1)}, target)
    assert message_of(caught.value).endswith(f"It was raised while {target} was written.")


def test_a_path_that_is_known_stays(tmp_path: Path):
    with pytest.raises(FileNotFoundError) as caught, writing(tmp_path / "other"):
        (tmp_path / "absent").read_text()
    assert str(tmp_path / "absent") in message_of(caught.value) and "other" not in message_of(caught.value)


def test_notes_are_told():
    def broken(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        raise ValueError("expected colours")

    with pytest.raises(ValueError, match="expected colours") as caught:
        load_reward(broken)(torch.ones(1, 3, 2, 2), ["a"])
    assert message_of(caught.value) == "expected colours It was raised by the reward 'broken'."
