# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Every check is needed: a mutation test.

A refusal is a place in a check where an error is raised or a verdict is noted. Each is left out in turn, and what it
refused must then go through, or be found by something else. `SCENARIOS` says what: a check that another one backs up
is known to be. A check without a scenario fails the test, so whoever adds one adds what it is for.
"""

import ast
import functools
import inspect
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from broken_loops import (
    AddsNoise,
    AltersLatents,
    BeginsLater,
    DecodesWithoutGradients,
    StepFirst,
    TwoLoops,
    WordsDrift,
)
from diffusers import ComponentsManager, DDIMScheduler, FirstBlockCacheConfig
from diffusers.models.attention_processor import JointAttnProcessor2_0
from families.family import embeddings
from families.paper import build_flux
from families.videos import build_wan_22, wan_prompts
from lifted import LIFTED
from tiny_sd3 import MAX_SEQUENCE_LENGTH, Float64Scheduler
from violations import (
    ANCHORED,
    GUIDANCE,
    PROMPTS,
    UNSEEN,
    VIOLATIONS,
    Anchored,
    PlainLoop,
    Surroundings,
    Violation,
    Zeros,
    adapter,
    along_a_direction,
    at_the_end,
    changed,
    checkpointed,
    disables,
    expected,
    fresh,
    frozen,
    fuses_lora,
    gradients,
    images_of,
    inactive,
    loop,
    loop_call,
    lora,
    masking,
    new_callback,
    relative_difference,
    run,
    run_anchored,
    scheduled_by,
    sd3,
    sd3_call,
    stepping,
    transformer_parameters,
    with_zeros,
)

from flowbp import (
    FlowBPCallback,
    Surrogate,
    Term,
    accounting,
    caches,
    checks,
    get_method,
    graph,
    guidance,
    hooks,
    kinds,
    marks,
    observers,
    placed,
    recording,
    replay,
    scoring,
    state,
    values,
)

# What becomes of a scenario that is not refused.
ACCEPTED, RIGHT, WRONG = "accepted", "the right gradient", "a wrong gradient"
# What else finds much.
NO_GRAPH = "does not require grad and does not have a grad_fn"
LEADS_ELSEWHERE = "graph leads to tensors of an earlier call"

SD3 = sd3()
CPU = torch.device("cpu")

Act = Callable[[], Any]


@dataclass(frozen=True, eq=False)
class Scenario:
    """What a refusal is for.

    Attributes:
        message: part of the refusal's message.
        act: does what is refused; returns nothing or one of the words above.
        without: what becomes of it where the refusal is left out: one of the words above, or a part of another error.
        refusal: its number in the check.
    """

    message: str
    act: Act
    without: str
    refusal: int = 0


def outcome(act: Act) -> str:
    """What becomes of a scenario, in words."""
    try:
        return act() or ACCEPTED
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# ---------------------------------------------------------------------------------------------------------------------
# Scenarios
# ---------------------------------------------------------------------------------------------------------------------


def named(violations: Sequence[Any], name: str) -> Any:
    (found,) = [each for each in violations if each.name == name]
    return found


def violates(violation: Violation, method: str = "full") -> Act:
    """Runs a violation, and judges the gradient of what is accepted."""

    def act() -> str:
        found = run(violation, method)
        if found.refused is not None:
            return found.refused
        if found.difference is None:
            return ACCEPTED
        return RIGHT if found.difference < violation.tolerance else WRONG

    return act


def known(name: str, method: str = "full") -> Act:
    """One of `VIOLATIONS`, `LIFTED` or `UNSEEN`."""
    return violates(named([*VIOLATIONS, *LIFTED, *UNSEEN], name), method)


def known_anchored(name: str) -> Act:
    """One of `ANCHORED`."""
    return anchors(named(ANCHORED, name))


def anchors(each: Anchored) -> Act:
    def act() -> str:
        found = run_anchored(each)
        return found.refused or (RIGHT if found.difference < 1e-6 else WRONG)

    return act


def looping(pipeline_class: type[PlainLoop], *changes: Any, method: str = "full", **more: Any) -> Act:
    """A sampling loop that is broken."""
    return violates(Violation("", 0, changed(loop(pipeline_class), *changes), call=loop_call, **more), method)


def stock(*changes: Any, build: Any = SD3, method: str = "full", **more: Any) -> Act:
    """The stock pipeline, changed."""
    return violates(Violation("", 0, changed(build, *changes), **more), method)


def scored_by_function(name: str) -> Act:
    """One of `VIOLATIONS`, whose images a function scores: its rewards have no graph but the images'."""
    violation = named(VIOLATIONS, name)

    def act() -> str:
        pipe = violation.build()
        callback = new_callback("full")
        with callback.record(pipe):
            images = images_of(pipe(**violation.call(pipe)))
        callback.backward(lambda images, prompts: along_a_direction(pipe, images), images, PROMPTS)
        found = gradients(transformer_parameters(pipe))
        return RIGHT if relative_difference(found, expected(violation, None)) < 1e-6 else WRONG

    return act


def recorded(pipe: Any, callback: FlowBPCallback | None = None, **changes: Any) -> tuple[FlowBPCallback, torch.Tensor]:
    """A rollout and its images."""
    callback = new_callback("full") if callback is None else callback
    with callback.record(pipe):
        images = pipe(**sd3_call(pipe, **changes)).images
    return callback, images


def swept(misuse: Callable[[FlowBPCallback, torch.Tensor], Any]) -> Act:
    """Records as it should be, then misuses the callback."""

    def act() -> None:
        misuse(*recorded(sd3()()))

    return act


# The pipeline, before anything runs.


def records(make: Callable[[], Any]) -> Act:
    def act() -> None:
        with new_callback("full").record(make()):
            pass

    return act


def updated_under_inference_mode() -> None:
    with torch.inference_mode():
        pipe = sd3()()
    callback, images = recorded(pipe)
    callback.backward(mean(images))


def offloads_components(pipe: Any) -> None:
    pipe._components_manager = ComponentsManager()
    pipe._components_manager._auto_offload_enabled = True


def caches_blocks(pipe: Any) -> None:
    """Every step takes the blocks' residual from the step before."""
    pipe.transformer.requires_grad_(True)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=100.0))


def flux_call(pipe: Any) -> dict[str, Any]:
    prompts = {"prompt_embeds": embeddings(2, 5, 32), "pooled_prompt_embeds": embeddings(2, 32, seed=1)}
    generator = torch.Generator().manual_seed(1)
    return {**prompts, "height": 8, "width": 12, "num_inference_steps": 4, "generator": generator, "output_type": "pt"}


def disabled(pipe: Any) -> None:
    """Disabled adapters are frozen; these are not."""
    disables(pipe)
    for name, parameter in pipe.transformer.named_parameters():
        parameter.requires_grad_("lora_" in name)


def overlapping() -> str | None:
    """The block that opens first closes first."""
    pipe, second = sd3()(), sd3()()
    surroundings = Surroundings(pipe)
    try:
        with ExitStack() as other:
            with new_callback("full").record(pipe):
                other.enter_context(new_callback("full").record(second))
        return "left behind: " + ", ".join(surroundings.changes())
    finally:
        for owner, before in surroundings.classes.items():
            for name in [name for name, value in vars(owner).items() if before.get(name) is not value]:
                if name in before:
                    setattr(owner, name, before[name])
                else:
                    delattr(owner, name)


def nested() -> None:
    """Blocks of one callback for pipelines that have no class in common."""
    pipe, other = sd3()(), build_flux()
    callback = new_callback("full")
    with callback.record(pipe), callback.record(other):
        images = pipe(**sd3_call(pipe)).images
    callback.backward(along_a_direction(pipe, images))


# The pipeline's call.


def under_inference_mode(pipe: Any) -> dict[str, Any]:
    """Without guidance the transformer is given the embeddings as they are."""
    with torch.inference_mode():
        words, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, max_sequence_length=MAX_SEQUENCE_LENGTH)
    return sd3_call(pipe, prompt=None, prompt_embeds=words, pooled_prompt_embeds=pooled, guidance_scale=1.0)


def called_twice() -> None:
    pipe = sd3()()
    callback = new_callback("full")
    with callback.record(pipe):
        images = [pipe(**sd3_call(pipe)).images for _ in range(2)]
    callback.backward(along_a_direction(pipe, images[0]))


class Keeps(JointAttnProcessor2_0):
    """Adds what the second call computed to all that follow; an object among the arguments keeps it."""

    def __call__(self, attn: Any, *args: Any, cache: Any, **kwargs: Any) -> Any:
        result = super().__call__(attn, *args, **kwargs)
        hidden, *words = result if isinstance(result, tuple) else (result,)
        kept = cache.kept.setdefault(id(attn), [])
        if len(kept) < 2:
            kept.append(hidden)
        else:
            hidden = hidden + 0.5 * kept[1]
        return (hidden, *words) if words else hidden


def keeping() -> Act:
    """With `Keeps`, and an object for it among the arguments."""

    def change(pipe: Any) -> None:
        pipe.transformer.set_attn_processor({name: Keeps() for name in pipe.transformer.attn_processors})

    def call(pipe: Any) -> dict[str, Any]:
        return sd3_call(pipe, joint_attention_kwargs={"cache": SimpleNamespace(kept={})})

    return stock(change, call=call, method="draft-k")


class TextUnderInferenceMode(PlainLoop):
    def prepared(self, words: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return 2 * words


def scaled_by_argument(pipe: Any) -> dict[str, Any]:
    return sd3_call(pipe, joint_attention_kwargs={"scale": 0.5})


def scaled_and_checkpointed() -> str:
    """Autograd through the stock call is wrong itself, so the gradient is compared with one without checkpointing."""
    pipe = changed(sd3(lora_rank=2), checkpointed)()
    with (callback := new_callback("full")).record(pipe):
        images = pipe(**scaled_by_argument(pipe)).images
    callback.backward(along_a_direction(pipe, images), objective=lambda rewards, weights: -rewards.mean())
    wanted = expected(Violation("", 0, sd3(lora_rank=2), call=scaled_by_argument), None)
    return RIGHT if relative_difference(gradients(transformer_parameters(pipe)), wanted) < 1e-6 else WRONG


def drops_attention(layer: Zeros, hidden: torch.Tensor) -> torch.Tensor:
    """Draws inside of a kernel of attention."""
    ones = torch.ones_like(hidden)
    return hidden * torch.nn.functional.scaled_dot_product_attention(ones, ones, ones, dropout_p=0.5)


def in_a_thread(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Computes where no mode of this thread sees it."""
    found: list[torch.Tensor] = []

    def run_there() -> None:
        with torch.enable_grad():
            found.append(compute())

    thread = threading.Thread(target=run_there)
    thread.start()
    thread.join()
    return found[0]


class RefinesInAThread(PlainLoop):
    """One more transformer call after the loop."""

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        last = self.scheduler.timesteps[-1]
        return super().pictures(in_a_thread(lambda: latents - 0.1 * self.velocity(latents, last)))


class BrightensInAThread(PlainLoop):
    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        images = super().decoded(latents)
        return in_a_thread(lambda: images + 30 * self.transformer.proj_out.bias.mean())


# The scheduler's steps.


class Doubles(PlainLoop):
    """Goes on with each sample twice."""

    def step(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        following = super().step(latents, timestep)
        if len(following) > 2:
            return following
        self.texts = tuple((words.repeat(2, 1, 1), pooled.repeat(2, 1)) for words, pooled in self.texts)
        return following.repeat(2, 1, 1, 1)


def begins_later() -> str:
    """Evenly spaced, steps have the expected length wherever they are."""
    pipe = loop(BeginsLater)()
    pipe.scheduler = Float64Scheduler(shift=1.0)
    callback = FlowBPCallback(Surrogate(("posterior_mean", 2), (Term(2, -0.5),)))
    with callback.record(pipe):
        pipe(**loop_call(pipe))
    trajectory = callback.trajectory
    mean_at_4 = trajectory.latents[2] - trajectory.sigmas[4] * trajectory.velocities[2]
    return RIGHT if torch.allclose(callback.endpoint, mean_at_4) else WRONG


class LoopsAgain(PlainLoop):
    """Steps through the same schedule twice."""

    def sampled(self, latents: torch.Tensor, steps: int) -> torch.Tensor:
        latents = super().sampled(latents, steps)
        self.scheduler._step_index = None
        for timestep in self.scheduler.timesteps:
            latents = self.step(latents, timestep)
        return latents


class Momentum(Float64Scheduler):
    def step(self, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        before, self.before = getattr(self, "before", model_output), model_output
        return super().step(1.5 * model_output - 0.5 * before, *args, **kwargs)


class DetachedVelocity(PlainLoop):
    """All but the first."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.seen.append(super().velocity(latents, timestep))
        return self.seen[-1] if len(self.seen) == 1 else self.seen[-1].detach()


# What the pipeline returns.


def averages_arrays() -> None:
    pipe = sd3()()
    call = stepping(at_the_end(lambda pipe, seen: (seen[-1] + torch.from_numpy(seen[-2].numpy())) / 2))
    callback = new_callback("full")
    with callback.record(pipe):
        images = pipe(**call(pipe)).images
    callback.backward(along_a_direction(pipe, images))


def called_outside_of_its_block() -> None:
    pipe = sd3()()
    callback, _ = recorded(pipe)
    pipe(**sd3_call(pipe, callback_on_step_end=callback))


# The sweep, before it begins.


def stopped(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = step >= 2
    return inputs


def mean(images: torch.Tensor, prompts: Any = None) -> torch.Tensor:
    return images.flatten(1).mean(1)


@torch.no_grad()
def blind(images: torch.Tensor, prompts: Any) -> torch.Tensor:
    return mean(images)


def learned(images: torch.Tensor, prompts: Any) -> torch.Tensor:
    return blind(images, prompts) * torch.ones((), requires_grad=True)


def of_other(images: torch.Tensor) -> torch.Tensor:
    return mean(torch.zeros_like(images, requires_grad=True))


def without_copies() -> None:
    pipe = sd3()()
    callback, images = recorded(pipe, new_callback("draft-lv"))
    callback.backward(mean(images))


def twice() -> str:
    """Latents have no graph that the first call could free."""
    pipe = sd3()()
    callback, latents = recorded(pipe, output_type="latent")
    callback.backward(mean, latents, PROMPTS)
    once = gradients(transformer_parameters(pipe))
    callback.backward(mean, latents, PROMPTS)
    return WRONG if relative_difference(gradients(transformer_parameters(pipe)), once) > 0.5 else RIGHT


def two_transformers() -> None:
    """The second one is not wrapped."""
    pipe = build_wan_22()
    for module in (pipe.transformer, pipe.transformer_2):
        module.requires_grad_(True)
    callback = new_callback("full")
    with callback.record(pipe):
        videos = pipe(**wan_prompts(), num_inference_steps=3, guidance_scale=1.0, output_type="pt").frames
    callback.backward(mean(videos), transformer=torch.nn.DataParallel(pipe.transformer))


def turns_first_matrices(pipe: Any) -> None:
    """Neither values show it, because the second matrices are zero, nor norms."""
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if "lora_A" in name:
                parameter.mul_(-1)


# Guidance.

CONDITIONAL = {"unconditional_gradient": False}


class SharesTheNegative(PlainLoop):
    """Computes the unconditional branch for the first sample only."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        (words, pooled), (no_words, no_pooled) = self.texts
        both = self.branch(
            torch.cat([latents[:1], latents]),
            timestep,
            torch.cat([no_words[:1], words]),
            torch.cat([no_pooled[:1], pooled]),
        )
        return both[:1] + GUIDANCE * (both[1:] - both[:1])


class CallsForNothing(PlainLoop):
    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.branch(latents, timestep, *self.texts[1])
        return super().velocity(latents, timestep)


class CoarseNegative(PlainLoop):
    """Computes the unconditional branch at half the resolution."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        conditional = self.branch(latents, timestep, *self.texts[0])
        coarse = self.branch(torch.nn.functional.avg_pool2d(latents, 2), timestep, *self.texts[1])
        unconditional = torch.nn.functional.interpolate(coarse, scale_factor=2)
        return unconditional + GUIDANCE * (conditional - unconditional)


class MeansOfBranches(PlainLoop):
    """One branch's mean fills the first channel, the other's the others, so either may count against the sum."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        conditional, unconditional = (self.branch(latents, timestep, *text).mean() for text in self.texts)
        is_first = (torch.arange(4) < 1).to(latents.dtype).view(1, 4, 1, 1)
        return (conditional * is_first + unconditional * (1 - is_first)).expand_as(latents)


# Replays.


def without_gradients_inside(pipe: Any) -> None:
    part = pipe.transformer.transformer_blocks[0].ff
    part.forward = torch.no_grad()(part.forward)


def made_with(method: Any = None, **options: Any) -> str:
    """Options of the callback alone."""
    FlowBPCallback(get_method("full") if method is None else method, **options)
    return ACCEPTED


def changes_a_norm(pipe: Any) -> None:
    """What torch's own modules hold is not looked at: it shows in the values."""
    for block in pipe.transformer.transformer_blocks:
        block.norm1.norm.eps = 1.0


def answering(change: Callable[[torch.Tensor], Any]) -> Act:
    """A transformer answers otherwise when it is called again, which no attribute of it shows."""

    def build() -> Any:
        pipe = sd3()()
        forward, pipe.inside = pipe.transformer.forward, {"is_again": False}
        inside = pipe.inside

        @functools.wraps(forward)
        def answer(*args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            return change(result[0]) if inside["is_again"] else result

        pipe.transformer.forward = answer
        return pipe

    return stock(build=build, before_backward=lambda pipe: pipe.inside.update(is_again=True))


# Rewards and penalties.


def style(pipe: Any) -> None:
    """A LoRA on other layers than the trained one's."""
    adapter(lora(target_modules=["proj_out"]), "style")(pipe)
    frozen(pipe)


def fused_style(pipe: Any) -> None:
    style(pipe)
    adapter(lora())(pipe)
    pipe.transformer.set_adapters(["style", "default"])
    pipe.transformer.fuse_lora(adapter_names=["style"])
    for name, parameter in pipe.transformer.named_parameters():
        parameter.requires_grad_(".default." in name)


SCENARIOS: dict[str, list[Scenario]] = {
    # Recorder: the pipeline, before anything runs.
    "check_options": [
        Scenario("`method` must come from get_method()", lambda: made_with(method="full"), ACCEPTED),
        Scenario("`samples_per_decode` must be", lambda: made_with(samples_per_decode=0), ACCEPTED, 1),
        Scenario("`velocity_anchor` must be", lambda: made_with(velocity_anchor=-1.0), ACCEPTED, 2),
    ],
    "check_pipeline": [
        Scenario(
            "DiffusionPipeline of diffusers, got", records(lambda: sd3()().transformer), "no attribute 'components'"
        ),
    ],
    "check_components": [
        Scenario(
            "expected a scheduler and a component",
            stock(lambda pipe: pipe.register_modules(transformer=None)),
            "no attribute 'config'",
        )
    ],
    "check_inference_weights": [
        Scenario("weights were made under", updated_under_inference_mode, "do not track version counter")
    ],
    "check_offloading": [
        Scenario("components manager", stock(offloads_components), RIGHT),
        Scenario(
            "model CPU offload", stock(lambda pipe: pipe.enable_model_cpu_offload(device="cpu")), "another forward", 1
        ),
        Scenario(
            "group offloading",
            stock(lambda pipe: pipe.transformer.enable_group_offload(CPU, offload_type="leaf_level")),
            RIGHT,
            2,
        ),
        Scenario(
            "sequential CPU offload",
            stock(lambda pipe: accelerate.cpu_offload(pipe.transformer, "cpu")),
            "unknown device type",
            3,
        ),
    ],
    "check_cache": [Scenario("cache is on", stock(caches_blocks, build=build_flux, call=flux_call), "context is set")],
    "check_dropout": [
        Scenario("dropout 0.5", known("fresh LoRA with lora_dropout in training mode"), "draws random numbers")
    ],
    "check_other_components": [
        Scenario("seems meant for training", known("text encoder with a trainable LoRA"), WRONG),
        Scenario("seems meant for training", known("VAE that is trainable in part"), WRONG),
    ],
    "check_adapters": [
        Scenario("is fused into the weights", stock(fuses_lora, build=fresh), "does not require grad"),
        Scenario("is disabled", stock(disabled, build=fresh), "does not require grad", 1),
        Scenario("is not active", stock(inactive, build=fresh), "does not require grad", 2),
    ],
    "check_overlap": [
        Scenario("another record() block is open", overlapping, "left behind: StableDiffusion3Pipeline.__call__")
    ],
    "check_not_nested": [Scenario("recording already", nested, "Expected a complete rollout")],
    # The pipeline's call, as it begins.
    "check_user_tensors": [
        Scenario(
            "`prompt_embeds` was made under torch.inference_mode()",
            stock(call=under_inference_mode),
            "transformer input 2 at step 0 was made under",
        ),
        Scenario(
            "`prompt_embeds` requires a gradient",
            known("user's prompt_embeds require a gradient"),
            "that requires a gradient and is not the transformer's",
            1,
        ),
        Scenario(
            "`latents` requires a gradient",
            known("user's latents require a gradient"),
            "that requires a gradient and is not the transformer's",
            1,
        ),
    ],
    "check_number_of_calls": [
        Scenario("expected 1 pipeline call(s)", called_twice, "in the record() block (callback.copies is 0), got 2")
    ],
    "check_inference_mode": [
        Scenario(
            "inference mode is on",
            stock(around_record=lambda pipe: torch.inference_mode()),
            "transformer input 0 at step 0 was made under",
        )
    ],
    "check_has_sigmas": [
        Scenario(
            "has no sigmas",
            looping(PlainLoop, lambda pipe: setattr(pipe, "scheduler", DDIMScheduler())),
            "no attribute 'sigmas'",
        )
    ],
    "check_one_loop": [Scenario("a second sampling loop", looping(TwoLoops), "made more than the 5 steps")],
    # The transformer's calls.
    "check_arguments": [Scenario("passes a SimpleNamespace", keeping(), WRONG)],
    "check_text_cache": [
        Scenario("was written into after", known("text cache detached in a later step"), WRONG),
    ],
    "check_inference_tensors": [
        Scenario("torch.inference_mode()", looping(TextUnderInferenceMode), "do not track version counter")
    ],
    "check_lora_scale": [Scenario("a LoRA scale of 0.5", scaled_and_checkpointed, WRONG)],
    "check_unmarked": [
        Scenario("the trained parameter proj_out.weight", known("text times a weight's norm"), WRONG),
        Scenario(
            "the trained parameter proj_out.bias",
            known("brightens images by a trained bias"),
            "images depend on a tensor of shape",
        ),
        Scenario("(a refiner, a control network", known("the transformer refines after the loop"), "(a refiner) off"),
    ],
    "check_roots": [
        Scenario("outputs of earlier steps", known("unconditional branch of the step before"), WRONG),
        Scenario(
            "images depend on latents of earlier",
            scored_by_function("decodes the mean of its last two latents"),
            WRONG,
        ),
        Scenario("images depend on a transformer call", looping(RefinesInAThread), "the rewards of backward(rewards)"),
        Scenario(
            "images depend on a tensor of shape", looping(BrightensInAThread), "the rewards of backward(rewards)"
        ),
    ],
    "check_drift": [Scenario("neither the latents nor a timestep explain it", looping(WordsDrift), RIGHT)],
    "check_hooks": [
        Scenario("drops 0.5 of its output", known("part of a layer dropped in single calls"), "draws random numbers")
    ],
    "check_draws": [Scenario("draws random numbers", known("mask from a generator of the layer's own"), WRONG)],
    "check_random": [
        Scenario("draws random numbers at step 0", stock(build=with_zeros(masking(drops_attention))), RIGHT)
    ],
    # The scheduler's steps.
    "check_loop_has_begun": [Scenario("before any transformer ran", looping(StepFirst), "has no attribute 'plan'")],
    "check_handed_on": [
        Scenario("are not those that step 0 returned", looping(Doubles), "must match the size of tensor"),
        Scenario("are not those that step 0 returned", looping(AltersLatents), "detached, scaled or hooked", 1),
        Scenario("are not those that step 0 returned", looping(AddsNoise), RIGHT, 1),
        Scenario("detached, scaled or hooked", known("step callback detaches latents"), "writes to other places", 2),
        Scenario("detached, scaled or hooked", known("step callback hooks the latents' gradient"), WRONG, 2),
    ],
    "check_same_places": [
        Scenario(
            "writes to other places",
            known("source pasted by a mask that changes"),
            "a gradient reaches latents over which",
        )
    ],
    "check_place": [Scenario("made step 2 of its sigmas, expected step 0", begins_later, WRONG)],
    "check_number_of_steps": [Scenario("made more than the 5 steps", looping(LoopsAgain), WRONG)],
    "check_euler": [Scenario("is not latents + (sigmas[i + 1]", looping(PlainLoop, scheduled_by(Momentum)), WRONG)],
    "check_lengths": [
        Scenario("moves tokens by other lengths", known("steps that lose a part of the gradient"), WRONG),
    ],
    "check_connected": [Scenario("is not connected", looping(DetachedVelocity), RIGHT)],
    # What the pipeline returns.
    "check_returned": [
        Scenario(
            "what the pipeline returned carries no gradient", looping(DecodesWithoutGradients), "carry no gradient"
        ),
        Scenario("made numpy arrays of tensors", averages_arrays, ACCEPTED, 1),
    ],
    "check_not_numpy": [
        Scenario(
            "turns tensors into numpy arrays",
            stock(call=lambda pipe: sd3_call(pipe, output_type="np")),
            "Can't call numpy()",
        )
    ],
    "check_recorded_pipeline": [Scenario("outside of its record() block", called_outside_of_its_block, ACCEPTED)],
    # The sweep, before it begins.
    "check_complete": [
        Scenario(
            "Expected a complete rollout",
            stock(call=lambda pipe: sd3_call(pipe, callback_on_step_end=stopped)),
            "'NoneType' has no len()",
        ),
        Scenario("Expected 2 pipeline calls", without_copies, ACCEPTED, 1),
    ],
    "check_scoring_arguments": [
        Scenario(
            "needs the images and the prompts",
            swept(lambda it, images: it.backward(mean, images)),
            "'NoneType' has no len()",
        ),
        Scenario("need no images", swept(lambda it, images: it.backward(mean(images), images)), ACCEPTED, 1),
    ],
    "check_endpoint_reached": [
        Scenario(
            "do not depend on the recorded endpoint",
            swept(lambda it, images: it.backward(of_other(images))),
            "no attribute 'shape'",
        )
    ],
    "check_trainable": [
        Scenario("adapters are disabled", stock(disables, build=fresh), "has no trainable parameters"),
        Scenario("has no trainable parameters", stock(frozen), NO_GRAPH, 1),
    ],
    "check_accumulates": [
        Scenario(
            "post-accumulate-grad hook",
            known("optimizer steps within the backward pass"),
            "does not reproduce its recorded output",
        )
    ],
    "check_once": [Scenario("was called already", twice, WRONG)],
    "check_adjoints": [
        Scenario(
            "must have the endpoint's shape",
            swept(lambda it, images: it.sweep(torch.zeros(1, 4, 4, 4))),
            "Mismatch in shape",
        )
    ],
    "check_sampled_places": [
        Scenario("a gradient reaches latents over", known("source pasted, but after the last step"), WRONG)
    ],
    "check_one_wrapper": [Scenario("expected one transformer, the wrapped one", two_transformers, ACCEPTED)],
    "check_states": [
        Scenario("exchanged or switched", known("sets a LoRA's weight between record and backward"), WRONG)
    ],
    "check_versions": [
        Scenario(
            "before the optimizer's step",
            stock(build=fresh, before_backward=turns_first_matrices),
            "behind autograd's back",
        )
    ],
    "check_values": [
        Scenario(
            "behind autograd's back",
            known("changes a LoRA's first matrix through .data between record and backward"),
            WRONG,
        )
    ],
    "check_state": [
        Scenario("exchanged or switched", known("sets a LoRA's weight between record and backward"), WRONG)
    ],
    # Guidance.
    "check_guidance_sign": [Scenario("is -2 at step 0, below 0", known("guidance scale of -2"), WRONG)],
    "_branches": [
        Scenario(
            "an output of batch 3 for latents of batch 2",
            looping(SharesTheNegative, options=CONDITIONAL),
            "found outputs of several shapes",
        )
    ],
    "_probe": [
        Scenario(
            "that the velocity does not use",
            looping(CallsForNothing, options=CONDITIONAL),
            "'NoneType' object is not subscriptable",
        ),
        Scenario(
            "outputs of several shapes", looping(CoarseNegative, options=CONDITIONAL), "stack expects each tensor", 1
        ),
    ],
    "_unconditional_branch": [
        Scenario("with cosines", known("guides away from two prompts, conditional branch alone"), WRONG),
        Scenario("another branch with each probe", looping(MeansOfBranches, options=CONDITIONAL), WRONG, 1),
    ],
    # Replays.
    "check_runs_with_gradients": [Scenario("runs without gradients inside", stock(without_gradients_inside), RIGHT)],
    "check_reach": [Scenario("was computed with when", known("time embedding cached by timestep", "draft-k"), WRONG)],
    "check_graph": [Scenario(LEADS_ELSEWHERE, known("merged weight of an own adapter kept"), "unpack_hook")],
    "check_reproduced": [Scenario("does not reproduce", stock(before_backward=changes_a_norm), WRONG)],
    "Replay._problem": [
        Scenario(
            "it has 2 floating point outputs",
            answering(lambda output: (output, output.mean())),
            "zip() argument 2 is shorter",
        ),
        Scenario(
            "shape (4, 4, 4, 2), recorded was",
            answering(lambda output: (output[..., :2],)),
            "must match the size of tensor",
            1,
        ),
        Scenario("relative difference", answering(lambda output: (1.1 * output,)), WRONG, 2),
    ],
    # Rewards and penalties.
    "check_images_are_used": [
        Scenario(
            "not differentiable in the images",
            swept(lambda it, images: it.backward(learned, images, PROMPTS)),
            "expected Tensor as element",
        )
    ],
    "check_loss": [
        Scenario(
            "must return a scalar tensor",
            swept(lambda it, images: it.backward(mean(images), objective=lambda rewards, weights: -rewards)),
            "only for scalar outputs",
        )
    ],
    "check_images": [
        Scenario("not connected", swept(lambda it, images: it.backward(mean, images.detach(), PROMPTS)), NO_GRAPH),
        Scenario("all 2 images", swept(lambda it, images: it.backward(mean, images[:1], PROMPTS[:1])), ACCEPTED, 1),
    ],
    "check_rewards": [
        Scenario("one reward for each of 2 images", swept(lambda it, images: it.backward(mean(images)[:1])), ACCEPTED),
        Scenario(
            "backward(rewards) carry no gradient",
            swept(lambda it, images: it.backward(mean(images.detach()))),
            "must return a scalar tensor",
            1,
        ),
        Scenario(
            "the rewards of blind carry no gradient",
            swept(lambda it, images: it.backward(blind, images, PROMPTS)),
            NO_GRAPH,
            1,
        ),
    ],
    "check_loss_roots": [
        Scenario("on a trained parameter", known("objective with a penalty on trained weights"), WRONG),
        Scenario("latents of earlier steps", known("reward looks at latents that a step callback kept"), WRONG),
    ],
    "check_anchor": [
        Scenario(
            "without its LoRA, which has none",
            known_anchored("all weights"),
            "stays when its adapters are switched off",
        ),
        Scenario("stays when its adapters are switched off", known_anchored("trained bias beside the LoRA"), WRONG, 1),
    ],
}


# ---------------------------------------------------------------------------------------------------------------------
# Mutants
# ---------------------------------------------------------------------------------------------------------------------


def is_verdict(node: ast.AST) -> bool:
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    return is_call and ast.unparse(node.value.func) == "verdicts.add"


def is_refusal(node: ast.AST) -> bool:
    """Whether a statement raises an error, notes a verdict, or returns in words what is wrong."""
    if isinstance(node, ast.Raise):
        return node.exc is not None
    if isinstance(node, ast.Return):
        return isinstance(node.value, ast.JoinedStr)
    return is_verdict(node)


class LeavesOut(ast.NodeTransformer):
    """Takes one refusal out of a function; `found` has all of them."""

    def __init__(self, number: int | None = None) -> None:
        self.number = number
        self.found: list[ast.AST] = []

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.FunctionDef) and node.name == "message":
            # What a message is made of is no refusal.
            return node
        if not is_refusal(node):
            return self.generic_visit(node)
        self.found.append(node)
        return ast.copy_location(ast.Pass(), node) if len(self.found) - 1 == self.number else node


@functools.cache
def source_of(function: Callable[..., Any]) -> str:
    return textwrap.dedent(inspect.getsource(function))


@functools.cache
def refusals_of(function: Callable[..., Any]) -> list[ast.AST]:
    looking = LeavesOut()
    looking.visit(ast.parse(source_of(function)))
    return looking.found


def mutant(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    """The function without one of its refusals; one that has none does nothing."""
    if not refusals_of(function):
        return lambda *args, **kwargs: None
    tree = ast.fix_missing_locations(LeavesOut(number).visit(ast.parse(source_of(function))))
    found: dict[str, Any] = {}
    exec(compile(tree, inspect.getfile(function), "exec"), function.__globals__, found)
    return found[function.__name__]


def functions() -> dict[str, Callable[..., Any]]:
    """What is mutated, by name: every check, and what else refuses a gradient."""
    found = {name: value for name, value in vars(checks).items() if name.startswith("check_")}
    found |= {name: value for name, value in vars(scoring).items() if name.startswith("check_")}
    for name, value in vars(guidance).items():
        if inspect.isfunction(value) and value.__module__ == guidance.__name__ and refusals_of(value):
            found[name] = value
    return {**found, "Replay._problem": replay.Replay._problem}


def replace(monkeypatch: pytest.MonkeyPatch, original: Any, other: Any) -> None:
    """Put something else in the place of a function, wherever it is known by a name."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "flowbp"]
    classes = [value for module in modules for value in vars(module).values() if inspect.isclass(value)]
    for owner in dict.fromkeys([*modules, *classes]):
        for name, value in list(vars(owner).items()):
            if value is original:
                monkeypatch.setattr(owner, name, other)


def check_mutant(scenario: Scenario, monkeypatch: pytest.MonkeyPatch, original: Any, other: Any) -> None:
    """The scenario is refused in one line, and with `other` in the place of a function becomes what was expected."""
    message, without = scenario.message, scenario.without
    found = outcome(scenario.act)
    assert message in found
    assert message == RIGHT or ("\n" not in found and found.endswith("."))
    replace(monkeypatch, original, other)
    found = outcome(scenario.act)
    assert message not in found
    assert without in found


FUNCTIONS = functions()
RUNS = [(name, scenario) for name, scenarios in SCENARIOS.items() for scenario in scenarios]


def test_every_refusal_has_a_scenario():
    missing, left_over = [], SCENARIOS.keys() - FUNCTIONS.keys()
    for name, function in FUNCTIONS.items():
        found = {scenario.refusal for scenario in SCENARIOS.get(name, [])}
        refusals = refusals_of(function) or [None]
        missing += [
            f"{name}, number {number}: {ast.unparse(node)[:160] if node else 'does nothing by itself'}"
            for number, node in enumerate(refusals)
            if number not in found
        ]
        left_over |= {f"{name}, number {number}" for number in found if number >= len(refusals)}
    assert not missing, "add scenarios to SCENARIOS for:\n" + "\n".join(missing)
    assert not left_over


@pytest.mark.parametrize(("name", "scenario"), RUNS, ids=[f"{name}-{scenario.refusal}" for name, scenario in RUNS])
def test_a_refusal_is_needed(name: str, scenario: Scenario, monkeypatch: pytest.MonkeyPatch):
    check_mutant(scenario, monkeypatch, FUNCTIONS[name], mutant(FUNCTIONS[name], scenario.refusal))


# ---------------------------------------------------------------------------------------------------------------------
# What the checks rest on
# ---------------------------------------------------------------------------------------------------------------------


def says(value: Any) -> Callable[..., Any]:
    """A function that always returns the same."""
    return lambda *args, **kwargs: value


def flag(value: bool) -> Callable[..., torch.Tensor]:
    return says(torch.tensor(value))


def no_mode(self: Any, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """A mode that only lets pass."""
    return func(*args, **(kwargs or {}))


@contextmanager
def no_parts(*args: Any, **kwargs: Any) -> Iterator[set[int]]:
    yield set()


def reaching_nothing(*args: Any, **kwargs: Any) -> Any:
    returned, _, parts = FIRST_OF_ITS_KIND(*args, **kwargs)
    return returned, frozenset(), parts


def everything(module: torch.nn.Module) -> set[int]:
    return set(map(id, module.parameters()))


def passing(*args: Any, **kwargs: Any) -> Any:
    """A context that changes nothing."""
    return nullcontext()


FIRST_OF_ITS_KIND = kinds.first_of_its_kind


def of_check(name: str, place: int = 0) -> Scenario:
    """One of a check's scenarios."""
    return SCENARIOS[name][place]


# Function, what is put in its place, and what is not refused as it was.
INSTRUMENTS: list[tuple[Callable[..., Any], Callable[..., Any], Scenario]] = [
    (marks.TrainedUses.__torch_function__, no_mode, of_check("check_unmarked")),
    (marks.TrainedUses.note, says(None), of_check("check_unmarked", 2)),
    (marks.Draws.__torch_function__, no_mode, of_check("check_draws")),
    (state.parts_that_run, no_parts, of_check("check_runs_with_gradients")),
    (FIRST_OF_ITS_KIND, reaching_nothing, of_check("check_reach")),
    (state.ModelState.change, says(None), of_check("check_states")),
    (
        placed.Placed.in_place,
        passing,
        Scenario(RIGHT, known("layer skipped in single calls"), "exchanged or switched"),
    ),
    (
        placed.keeps_nothing,
        says(True),
        Scenario("exchanged or switched", known("processor for single calls that holds a tensor"), RIGHT),
    ),
    (
        caches.check_recomputed,
        says(None),
        Scenario(
            "gradient checkpointing recomputes",
            known("cached reference, checkpointing switched on before backward"),
            WRONG,
        ),
    ),
    (
        state.random_states,
        says([torch.get_rng_state()]),
        Scenario("draws random numbers at step 0", stock(build=with_zeros(masking(drops_attention))), WRONG),
    ),
    (state.fingerprint, says(None), of_check("check_values")),
    (graph.passes_gradient, flag(False), of_check("check_roots")),
    (
        graph.passed_places,
        lambda tensor, leaf, seed: (torch.ones_like(leaf, dtype=torch.bool), torch.tensor(True)),
        Scenario("detached, scaled or", known("step callback hooks the latents' gradient"), WRONG),
    ),
    (recording.Rollout._is_untouched, says(True), Scenario("are not those that", looping(AltersLatents), WRONG)),
    (values.agree, flag(True), of_check("check_handed_on", 2)),
    (values.holds_state, says(False), of_check("check_arguments")),
    (accounting.Accounting.step_ends, says(None), of_check("check_drift")),
    (recording.guidance_scales, says({}), of_check("check_guidance_sign")),
    (
        observers.removable_parameters,
        everything,
        Scenario("stays when its adapters are", known_anchored("trained bias beside the LoRA"), WRONG),
    ),
    (hooks.is_patched, says(False), of_check("check_overlap")),
    (replay.deviations, lambda new, old: torch.zeros(len(new)), of_check("check_reproduced")),
    (
        state.ModelState.under_autocast,
        passing,
        Scenario(RIGHT, known("pipeline with an autocast of its own"), "does not reproduce its recorded output"),
    ),
    (
        recording.calling_pipeline,
        says(None),
        Scenario(
            "a transformer call that is not recorded",
            known("another pipeline's code drafts the noise"),
            "`sigmas` must fall",
        ),
    ),
]
VERDICTS = [
    (name, scenario)
    for name, scenario in RUNS
    if name in FUNCTIONS and any(map(is_verdict, refusals_of(FUNCTIONS[name])[scenario.refusal :][:1]))
]


@pytest.mark.parametrize(
    ("function", "other", "scenario"), INSTRUMENTS, ids=[function.__qualname__ for function, _, _ in INSTRUMENTS]
)
def test_an_instrument_is_needed(
    function: Callable[..., Any], other: Callable[..., Any], scenario: Scenario, monkeypatch: pytest.MonkeyPatch
):
    check_mutant(scenario, monkeypatch, function, other)


@pytest.mark.parametrize(
    ("name", "scenario"), VERDICTS, ids=[f"{name}-{scenario.refusal}" for name, scenario in VERDICTS]
)
def test_verdicts_are_read(name: str, scenario: Scenario, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks.Verdicts, "read", says(None))
    assert scenario.message not in outcome(scenario.act)
