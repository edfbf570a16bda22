# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""No gradient is silently wrong: every violation of the accounting is refused by name, or its gradient is right.

`violations` has the violations and the oracle. Below are record blocks that overlap.
"""

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from families.images import build_sd3_pag, sd3_pag_cases
from lifted import LIFTED
from violations import (
    ANCHORED,
    METHODS,
    UNSEEN,
    VIOLATIONS,
    Anchored,
    KeepsLatents,
    PlainLoop,
    Surroundings,
    Violation,
    along_a_direction,
    calls_transformer,
    expected,
    gradients,
    loop,
    loop_call,
    new_callback,
    problem,
    relative_difference,
    run,
    run_anchored,
    sd3,
    sd3_call,
    transformer_parameters,
    with_references,
)

from flowbp import FlowBPCallback, get_method
from flowbp.checks import RecordingError
from flowbp.sweep import all_or_nothing

RUNS = [(violation, method) for violation in [*VIOLATIONS, *LIFTED] for method in violation.methods]


@pytest.mark.parametrize(
    ("violation", "method"), RUNS, ids=[f"{each.rule}-{each.name}-{method}" for each, method in RUNS]
)
def test_it_is_refused_or_right(violation: Violation, method: str):
    outcome = run(violation, method)
    found = problem(violation, method, outcome)
    assert found is None, found


@pytest.mark.parametrize("anchored", ANCHORED, ids=lambda anchored: anchored.name)
def test_the_velocity_anchor_is_refused_or_right(anchored: Anchored):
    violation = Violation(anchored.name, 7, anchored.build, anchored.must, anchored.cause)
    found = problem(violation, "full", run_anchored(anchored))
    assert found is None, found


@pytest.mark.parametrize("violation", UNSEEN, ids=lambda violation: violation.name)
def test_verify_finds_what_nothing_else_can(violation: Violation):
    """The engine may refuse these; what it accepts with a wrong gradient is out of the bound of `verify`."""
    from flowbp import verify

    outcome = run(violation, "full")
    assert not outcome.left
    pipe = violation.build()
    try:
        found = verify(pipe, **sd3_call(pipe, num_inference_steps=3))
    except RecordingError:
        assert outcome.refused is not None
    else:
        assert outcome.refused is None and outcome.difference > 0.01
        assert not found.is_within_bound and found.difference > 0.01


def test_verify_finds_no_fault_where_there_is_none():
    from flowbp import verify

    right = [each for each in VIOLATIONS if each.must == "right" and each.name.startswith("user's")]
    assert len(right) > 3
    for violation in right:
        pipe = violation.build()
        assert verify(pipe, **sd3_call(pipe, num_inference_steps=3)).is_within_bound


# The tests' own instruments.


def test_there_are_violations_of_every_rule():
    counts = Counter(each.rule for each in VIOLATIONS if each.must != "right" and not each.is_table)
    counts[7] += sum(each.must != "right" for each in ANCHORED)
    counts[8] += len(UNSEEN)
    assert all(counts[rule] >= 3 for rule in range(1, 9)), counts
    names = [each.name for each in [*VIOLATIONS, *UNSEEN]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("method", METHODS)
def test_the_plain_loop_is_right_and_the_oracle_sees_a_wrong_one(method: str):
    plain = Violation("plain", 0, loop(PlainLoop), "right", call=loop_call)
    assert problem(plain, method, run(plain, method)) is None
    if method == "draft-lv":
        return
    kept = Violation("kept", 0, loop(KeepsLatents), "right", call=loop_call)
    pipe = kept.build()
    callback = new_callback(method)
    with callback.record(pipe):
        images = pipe(**loop_call(pipe))
    surrogate = callback.trajectory.surrogate
    callback.backward(along_a_direction(pipe, images), objective=lambda rewards, weights: -rewards.mean())
    found = gradients(transformer_parameters(pipe))
    wanted = expected(kept, surrogate)
    if method == "full":
        # The surrogate's steps give the chain rule of the undecorated call.
        assert relative_difference(wanted, expected(kept, None)) < 1e-12
    assert relative_difference(found, wanted) < 1e-12
    last = next(reversed(found))
    assert relative_difference({**found, last: 2 * found[last]}, wanted) > 1e-6


def test_what_is_left_behind_is_seen():
    pipe = sd3()()
    before = Surroundings(pipe)
    assert not before.changes()
    hooked = FlowBPCallback(get_method("full"))
    block = hooked.record(pipe)
    block.__enter__()
    assert any("step" in change for change in before.changes())
    block.__exit__(None, None, None)
    assert not before.changes()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_mid_call_puts_attention_processors_back(error: type[BaseException]):
    pipe = build_sd3_pag()
    before = pipe.transformer.attn_processors

    def fails(*_: object) -> None:
        raise error

    pipe.transformer.register_forward_hook(fails)
    arguments = {**sd3_pag_cases(pipe)[1].arguments, "num_inference_steps": 2}
    with pytest.raises(error), new_callback("full").record(pipe):
        pipe(**arguments)
    assert pipe.transformer.attn_processors == before


def test_each_update_may_skip_other_layers():
    """Their calls compute with other parameters, as their arguments say."""
    pipe = sd3()()

    def same_pipe() -> Any:
        pipe.transformer.zero_grad()
        return pipe

    for layer in (1, 0):
        arguments = {"skip_guidance_layers": [layer], "skip_layer_guidance_start": -0.1}
        outcome = run(Violation("", 3, same_pipe, call=functools.partial(sd3_call, **arguments)), "full")
        assert outcome.refused is None
        assert outcome.difference < 1e-6


def test_trained_parameters_without_a_gradient_are_told_once(caplog: pytest.LogCaptureFixture):
    """Autograd does not find one either."""
    pipe = sd3()()
    query = pipe.transformer.transformer_blocks[0].attn.to_q
    query.register_forward_hook(lambda part, inputs, output: output.detach())
    for _ in range(2):
        with new_callback("flowbp-sparse").record(pipe):
            pipe(**sd3_call(pipe))
    (message,) = [record.getMessage() for record in caplog.records if record.name == "flowbp.kinds"]
    assert "2 trained parameters of SD3Transformer2DModel, such as transformer_blocks.0.attn.to_q.weight" in message


def test_a_sweep_that_fails_leaves_no_first_gradient_and_notes_what_it_left():
    fresh, accumulated = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    accumulated.grad = torch.ones(1)
    with pytest.raises(KeyboardInterrupt) as caught, all_or_nothing([fresh, accumulated]):
        fresh.grad = torch.ones(1)
        raise KeyboardInterrupt
    assert fresh.grad is None
    assert "call zero_grad()" in caught.value.__notes__[0]
    with pytest.raises(KeyboardInterrupt) as caught, all_or_nothing([fresh]):
        raise KeyboardInterrupt
    assert not hasattr(caught.value, "__notes__")


class ThreeCalls(PlainLoop):
    """Takes no notice of the first call, and the third one sees the second."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.branch(latents, timestep, *self.texts[0])
        seen = self.branch(latents, timestep, *self.texts[0])
        return self.branch(latents + 0.2 * seen, timestep, *self.texts[1])


class Shared(torch.nn.Module):
    """As processes share a model; notes which of its calls are for a pass that exchanges gradients."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module, self.is_apart, self.exchanged = module, False, []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.exchanged.append(not self.is_apart)
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.is_apart = True
        yield
        self.is_apart = False


def test_processes_exchange_gradients_with_the_last_call_that_is_differentiated():
    pipe, callback = loop(ThreeCalls)(), new_callback("flowbp-sparse")
    with callback.record(pipe):
        images = pipe(**loop_call(pipe))
    shared = Shared(pipe.transformer)
    callback.backward(along_a_direction(pipe, images), transformer=shared)
    assert shared.exchanged == [False, False, False, True]


# Record blocks that overlap.


def test_nested_record_blocks_of_pipelines_that_share_parts_are_refused():
    pipe, second = sd3()(), loop(PlainLoop)()
    surroundings = [Surroundings(pipe), Surroundings(second)]
    with pytest.raises(RecordingError, match="PlainLoop: another record.. block is open .*; close it before this one"):
        with new_callback("full").record(pipe), new_callback("full").record(second):
            pass
    assert not [change for each in surroundings for change in each.changes()]


def test_interleaved_record_blocks_are_refused():
    """The first block goes on, and whichever is closed first, no hook stays on a class."""
    pipe, second = sd3()(), sd3()()
    surroundings = Surroundings(pipe)
    callback = new_callback("full")
    with ExitStack() as first:
        first.enter_context(callback.record(pipe))
        with pytest.raises(RecordingError, match="another record"), ExitStack() as other:
            other.enter_context(new_callback("full").record(second))
            first.close()
        images = pipe(**sd3_call(pipe)).images
    assert not surroundings.changes()
    callback.backward(along_a_direction(pipe, images), objective=lambda rewards, weights: -rewards.mean())
    wanted = expected(Violation("plain", 0, sd3()), None)
    assert relative_difference(gradients(transformer_parameters(pipe)), wanted) < 1e-6


def test_two_pipelines_that_share_a_transformer_are_recorded_one_after_the_other():
    pipe = sd3()()
    with_references(pipe)
    surroundings = Surroundings(pipe)
    wanted = expected(Violation("plain", 0, sd3()), None)
    for each in (pipe, pipe.other):
        callback = new_callback("full")
        with callback.record(each):
            images = each(**sd3_call(each)).images
        callback.backward(along_a_direction(each, images), objective=lambda rewards, weights: -rewards.mean())
        assert relative_difference(gradients(transformer_parameters(pipe)), wanted) < 1e-6
        pipe.transformer.zero_grad()
    calls_transformer(pipe)
    assert not surroundings.changes()
