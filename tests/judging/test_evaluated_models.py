# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Models and rewards as the command line names them."""

from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
import torch
from safetensors.torch import save_file

from flowbp.judging.models import EvaluatedModel, evaluated_lines, lora_file, reward_names


def write_lora(folder: Path, name: str = "pytorch_lora_weights.safetensors", value: float = 1.0) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"x.lora_A.weight": torch.tensor([value])}, folder / name)
    return folder


def test_models_are_the_base_and_every_lora_at_every_setting(tmp_path: Path) -> None:
    one, two = write_lora(tmp_path / "one"), write_lora(tmp_path / "two", "other.safetensors", 2.0)
    lines = evaluated_lines([str(one), f"second={two}", "user/third"], [0.5, 1.0], [0, 2])
    models = [model for line in lines for model in line.models]
    assert [line.name for line in lines] == [model.name for model in models]
    names = [model.name for model in models]
    assert names[:5] == ["base", "one × 0.5", "one × 0.5, base for last 2", "one × 1", "one × 1, base for last 2"]
    assert len(models) == 13 and names[5] == "second × 0.5" and names[-1] == "third × 1, base for last 2"
    assert models[1].digest == models[4].digest != models[5].digest and models[-1].digest is None
    assert len({model.folder for model in models}) == 13
    (_, line) = evaluated_lines([f"x={one}"], [1.0], [0])
    assert line.models == (EvaluatedModel("x", str(one), 1.0, 0, models[1].digest),)


def test_several_loras_of_one_name_are_seeds_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    one, two = write_lora(tmp_path / "seed_1"), write_lora(tmp_path / "seed_2", value=2.0)
    (_, line, other) = evaluated_lines([f"x={one},~/seed_2", f"y={two}"], [0.5], [0])
    assert (line.name, other.name) == ("x × 0.5", "y × 0.5")
    assert [(model.name, model.lora) for model in line.models] == [
        ("x × 0.5 seed_1", str(one)),
        ("x × 0.5 seed_2", str(two)),
    ]
    # Where the last parts of the sources are the same, numbers tell the seeds apart.
    (tmp_path / "other").mkdir()
    twin = write_lora(tmp_path / "other" / "seed_1", value=3.0)
    (_, line) = evaluated_lines([f"x={one},{twin}"], [1.0], [0])
    assert [model.name for model in line.models] == ["x #1", "x #2"]
    # A comma may be part of a folder's name.
    (_, line) = evaluated_lines([f"x={write_lora(tmp_path / 'a,b')}"], [1.0], [0])
    assert len(line.models) == 1


def test_the_file_of_a_lora(tmp_path: Path) -> None:
    folder = write_lora(write_lora(tmp_path / "one"), "second.safetensors")
    assert lora_file(str(folder)) == folder / "pytorch_lora_weights.safetensors"
    assert lora_file(str(folder / "second.safetensors")) == folder / "second.safetensors"
    assert lora_file("user/name") is None


@pytest.mark.parametrize(
    ("loras", "expected"),
    [
        (["{here}/missing"], "no such file or folder"),
        (["{here}/empty"], "expected one .safetensors file in the folder, got none"),
        (["{here}/two"], "got a.safetensors, b.safetensors"),
        (["={here}/one"], "expected NAME=SOURCE"),
        (["{here}/one", "{here}/one"], "'one' twice"),
        (["{here}/one,{here}/two"], "a name for several seeds"),
        (["x={here}/one,"], "expected NAME=SOURCE"),
        (["x={here}/one,{here}/one"], "expected LoRAs of different seeds, got .*one twice"),
        (["x={here}/one,{here}/copy"], "expected LoRAs of different seeds, got .*copy twice"),
        (["x={here}/one,u/v", "x={here}/one"], "'x' twice"),
        (["x={here}/one,u/v", "x one=u/v"], "'x one' twice"),
        (["base={here}/one"], "'base' twice"),
        (["LoRA={here}/one", "lora={here}/one"], "'LoRA' twice"),
        (["BASE={here}/one"], "'base' twice"),
        (["a/b={here}/one", "a_b={here}/one"], "'a/b' twice"),
        *(
            ([f"{name}={{here}}/one"], "expected a name that folders can have on all systems, got")
            for name in (".", "..", "con", "NUL.txt", "Com1", "end.", "x" * 101)
        ),
    ],
)
def test_loras_that_cannot_be_evaluated_are_refused(loras: list[str], expected: str, tmp_path: Path) -> None:
    write_lora(tmp_path / "one")
    write_lora(tmp_path / "copy")
    (tmp_path / "empty").mkdir()
    write_lora(write_lora(tmp_path / "two", "a.safetensors"), "b.safetensors")
    with pytest.raises(ValueError, match=expected) as caught:
        evaluated_lines([lora.format(here=tmp_path) for lora in loras], [1.0], [0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "..\\x", "a/../../x", "C:\\x", ".hidden", "console", "2.0"])
def test_a_models_folder_is_inside_the_output_folder(tmp_path: Path, name: str) -> None:
    (model,) = evaluated_lines([f"{name}={write_lora(tmp_path / 'one')}"], [1.0], [0])[1].models
    for system in (PurePosixPath, PureWindowsPath):
        assert system(model.folder).parts == (model.folder,) and model.folder not in (".", "..")


def test_rewards_are_names_without_weights() -> None:
    assert reward_names("hpsv2.1, pickscore/26,module:make") == ["hpsv2.1", "pickscore/26", "module:make"]
    for spec, expected in (
        ("ocr,,clip", "different names separated by commas, got ''"),
        ("clip,clip", "different names separated by commas, got 'clip' twice"),
        ("ocr:0.7,clip", "without weights, got 'ocr:0.7'"),
    ):
        with pytest.raises(ValueError, match=expected):
            reward_names(spec)
