# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""What a user's reward does wrong is told with the reward's name, alone or in a sum; nothing ends a run quietly."""

import copy
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowbp.rewards import load_reward

PROMPTS = ["a", "b"]
MODULE = """
import sys
import torch

def returns(made):
    return lambda: lambda images, prompts: made(images)

a_list = returns(lambda images: images.flatten(1).mean(1).tolist())
a_scalar = returns(lambda images: images.mean())
too_many = returns(lambda images: images.flatten(2).mean(2))
nothing = returns(lambda images: None)
fails = returns(lambda images: {}["missing key"])
leaves = returns(lambda images: sys.exit(0))

class Brightness(torch.nn.Module):
    kind = "brightness"

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, images, prompts):
        if "b" not in prompts:
            raise KeyError("no b")
        return self.scale * images.flatten(1).mean(1)

def factory_leaves():
    sys.exit(0)
"""


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The name of a user's module of rewards."""
    (tmp_path / "failing_rewards.py").write_text(MODULE)
    (tmp_path / "leaves_at_once.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "failing_rewards", raising=False)
    return "failing_rewards"


def images(requires_grad: bool = False) -> torch.Tensor:
    made = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return made.requires_grad_(requires_grad)


FORMS: dict[str, Callable[[str], Any]] = {
    "alone": lambda name: load_reward(name),
    "in a sum": lambda name: load_reward(f"toy_reward:make_reward,{name}:0.5"),
    "offloaded": lambda name: load_reward(name, offload=True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize(
    ("attribute", "found"), [("a_list", "list"), ("a_scalar", "()"), ("too_many", "(2, 3)"), ("nothing", "NoneType")]
)
def test_what_is_not_a_score_for_each_image(module: str, form: str, attribute: str, found: str, requires_grad: bool):
    reward = FORMS[form](f"{module}:{attribute}")
    with pytest.raises(ValueError) as caught:
        reward(images(requires_grad), PROMPTS)
    assert str(caught.value) == (
        f"reward '{module}:{attribute}': expected a tensor of shape (2,), got {found}; return one for each image."
    )


@pytest.mark.parametrize("form", FORMS)
def test_an_error_keeps_its_type_and_gets_the_name_once(module: str, form: str):
    with pytest.raises(KeyError, match="missing key") as caught:
        FORMS[form](f"{module}:fails")(images(True), PROMPTS)
    assert caught.value.__notes__ == [f"It was raised by the reward '{module}:fails'."]
    assert f"reward '{module}:fails'" in "".join(traceback.format_exception(caught.value))


def test_functions_and_modules_are_named_too():
    def broken(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        raise ValueError("no")

    for form in (load_reward(broken), load_reward(load_reward(broken))):
        with pytest.raises(ValueError, match="no") as caught:
            form(images(), PROMPTS)
        assert caught.value.__notes__ == ["It was raised by the reward 'broken'."]


@pytest.mark.parametrize("form", FORMS)
def test_sys_exit_is_an_error(module: str, form: str):
    with pytest.raises(RuntimeError, match=rf"reward '{module}:leaves': expected scores, got sys.exit\(0\)"):
        FORMS[form](f"{module}:leaves")(images(True), PROMPTS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "failing_rewards:factory_leaves",
            "reward 'failing_rewards:factory_leaves': its factory raised SystemExit: 0",
        ),
        ("leaves_at_once:make", "reward 'leaves_at_once:make': expected an importable .*, got SystemExit: 0"),
    ],
)
def test_sys_exit_while_a_reward_is_made_is_an_error(module: str, name: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_reward(name)


def test_a_users_module_keeps_what_it_has(module: str):
    reward = load_reward(f"{module}:Brightness")
    expected = 2 * images().flatten(1).mean(1)
    for each in (reward, copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert torch.equal(each(images(), PROMPTS), expected)
        assert each.kind == "brightness" and not each.training and not each.scale.requires_grad
        with pytest.raises(AttributeError, match="colour"):
            each.colour  # noqa: B018
    with pytest.raises(KeyError, match="no b"):
        reward(images(), ["a", "c"])
