# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Hooks for single calls, text caches, given tokens and inpainting, and what looks like them and must stay refused.

They are violations as those of `violations.py`, which explains them; `test_accounting.py` runs both.
"""

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    LTXConditionPipeline,
)
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.layer_skip import FeedForwardSkipHook
from families.family import added, embeddings, hole, pictures
from families.image_inputs import build_sd3_inpaint, plain_sd3_cases
from families.packed import build_qwen_image_21, qwen_image_21_cases
from families.packed_inputs import build_joy_image_plus, joy_image_plus_cases
from families.paper import build_flux2_klein, flux2_klein_kv_cases
from families.videos import build_ltx, ltx_condition_cases
from violations import (
    GUIDANCE,
    JUDGED,
    MANY,
    METHODS,
    STEPS,
    SWITCH,
    PlainLoop,
    Violation,
    adding,
    changed,
    checkpointed,
    frozen,
    loop,
    loop_call,
    scheduled_by,
    sd3,
    switching,
)

LIFTED: list[Violation] = []
SHORT = {"num_inference_steps": STEPS, "output_type": "pt", "return_dict": False}


# ---------------------------------------------------------------------------------------------------------------------
# Rule 4: hooks and attention processors that stand in the transformer for single calls
# ---------------------------------------------------------------------------------------------------------------------


class Weakened(PlainLoop):
    """Guidance away from the transformer with a hook on one of its layers, as autoguidance."""

    hook: Callable[[], ModelHook] = staticmethod(lambda: FeedForwardSkipHook(1.0))
    first_step = 0

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.seen.append(None)
        is_weak = len(self.seen) > self.first_step
        if is_weak:
            self.weaken()
        weak = self.branch(latents, timestep, *self.texts[0])
        if is_weak:
            self.strengthen()
        return weak + GUIDANCE * (self.branch(latents, timestep, *self.texts[0]) - weak)

    def weaken(self) -> None:
        part = self.transformer.transformer_blocks[0].ff
        self.placed = type(self).hook()
        HookRegistry.check_if_exists_or_initialize(part).register_hook(self.placed, "weak")

    def strengthen(self) -> None:
        self.transformer.transformer_blocks[0].ff._diffusers_hook.remove_hook("weak")


class WeakenedLater(Weakened):
    first_step = SWITCH


def with_hook(hook: Callable[[], ModelHook]) -> type[Weakened]:
    return type("WithHook", (Weakened,), {"hook": staticmethod(hook)})


class Fades(ModelHook):
    """Counts its calls, and weakens what its layer computes from call to call."""

    calls = 0

    def post_forward(self, module: torch.nn.Module, output: torch.Tensor) -> torch.Tensor:
        Fades.calls += 1
        return output / Fades.calls


class Stores(ModelHook):
    """Returns what its layer computed at its first call, as a cache does."""

    def __init__(self) -> None:
        super().__init__()
        self.stored: torch.Tensor | None = None

    def post_forward(self, module: torch.nn.Module, output: torch.Tensor) -> torch.Tensor:
        self.stored = output if self.stored is None else self.stored
        return self.stored


class Halves(FeedForwardSkipHook):
    """Of a class of the user's, which the engine does not know."""

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.fn_ref.original_forward(*args, **kwargs) / 2


class Identity:
    """An attention processor without attention scores."""

    def __init__(self, gain: float | torch.Tensor = 1.5) -> None:
        self.gain = gain

    def __call__(self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any) -> Any:
        return attn.to_out[0](attn.to_v(hidden_states)) * self.gain, attn.to_add_out(encoder_hidden_states)


class Perturbed(Weakened):
    """Guidance away from the transformer with another attention processor, as perturbed attention."""

    processor: Callable[[], Identity] = Identity

    def weaken(self) -> None:
        part = self.transformer.transformer_blocks[0].attn
        self.before, self.placed = part.processor, type(self).processor()
        part.processor = self.placed

    def strengthen(self) -> None:
        self.transformer.transformer_blocks[0].attn.processor = self.before


class PerturbedByTensor(Perturbed):
    """The processor holds a tensor, which it could write into."""

    processor = staticmethod(lambda: Identity(torch.tensor(1.5, dtype=torch.float64)))


def places(hook: Callable[[], ModelHook]) -> Callable[[Any], None]:
    """Places a hook on a layer, to stay."""

    def change(pipe: Any) -> None:
        part = pipe.transformer.transformer_blocks[0].ff
        HookRegistry.check_if_exists_or_initialize(part).register_hook(hook(), "placed")

    return change


rule_4 = adding(4, "hook|processor", LIFTED)
rule_4("layer skipped in single calls", Weakened, "right", methods=JUDGED)
rule_4(
    "layer skipped in single calls, conditional branch alone",
    Weakened,
    "right",
    methods=("full", "flowbp-sparse", "leapalign"),
    options={"unconditional_gradient": False},
    detached=True,
)
rule_4("layer skipped in single calls of late steps", WeakenedLater, "right", methods=("full", "draft-k", "drtune"))
# The oracle would recompute without the hooks.
rule_4(
    "layer skipped in single calls, recomputed in the backward pass", Weakened, "right", before_backward=checkpointed
)
rule_4("layer skipped in single calls, with a fresh LoRA", loop(Weakened, lora_rank=2), "right", call=loop_call)
rule_4("attention perturbed in single calls", Perturbed, "right", methods=JUDGED)
rule_4(
    "attention perturbed in single calls, recomputed in the backward pass",
    Perturbed,
    "right",
    before_backward=checkpointed,
)
rule_4(
    "attention perturbed in single calls, conditional branch alone",
    Perturbed,
    "right",
    methods=("full", "flowbp-bridge"),
    options={"unconditional_gradient": False},
    detached=True,
)
rule_4("step callback skips a layer", sd3(), "right", call=switching(places(lambda: FeedForwardSkipHook(1.0))))
rule_4(
    "step callback perturbs attention",
    sd3(),
    "right",
    call=switching(lambda pipe: setattr(pipe.transformer.transformer_blocks[0].attn, "processor", Identity())),
)
# Look alike.
rule_4(
    "part of a layer dropped in single calls",
    with_hook(lambda: FeedForwardSkipHook(0.5)),
    cause="drops 0.5 .* use dropout 1",
)
rule_4("hook for single calls that counts", with_hook(Fades), methods=("full", "flowbp-sparse", "draft-k"))
rule_4("hook for single calls that stores", with_hook(Stores), methods=("full", "flowbp-sparse", "draft-k"))
rule_4("hook for single calls of a class of the user's", with_hook(lambda: Halves(1.0)))
rule_4("step callback places a hook that stores", sd3(), "either", call=switching(places(Stores)))
rule_4(
    "sets the number of a hook that was placed",
    Weakened,
    before_backward=lambda pipe: setattr(pipe.placed, "dropout", 0.0),
)
rule_4(
    "sets the number of a processor that was placed",
    Perturbed,
    before_backward=lambda pipe: setattr(pipe.placed, "gain", 0.5),
)
rule_4("processor for single calls that holds a tensor", PerturbedByTensor)


# ---------------------------------------------------------------------------------------------------------------------
# Rule 3: text caches that the first step fills
# ---------------------------------------------------------------------------------------------------------------------


def with_cached_text(pipe: Any) -> dict[str, Any]:
    """Arguments of Qwen-Image 2.1's call."""
    guided = dict(qwen_image_21_cases(pipe)[1].arguments)
    return {**guided, "use_kv_cache": True, **SHORT, "generator": torch.Generator().manual_seed(1)}


def with_cached_reference(pipe: Any) -> dict[str, Any]:
    """Arguments of FLUX.2-Klein-KV's call."""
    referring = dict(flux2_klein_kv_cases(pipe)[1].arguments)
    return {**referring, **SHORT, "generator": torch.Generator().manual_seed(1)}


def deep_klein_kv() -> Any:
    """With two blocks of each kind, so that one may get the other's cache."""
    pipe = build_flux2_klein(Flux2KleinKVPipeline, is_distilled=True)
    for blocks in (pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks):
        blocks.append(copy.deepcopy(blocks[0]))
        for parameter in blocks[1].parameters():
            parameter.data = parameter.data.flip(0)
    return pipe


@contextmanager
def making(cache: Callable[[type, int], Any]) -> Iterator[None]:
    """Qwen-Image 2.1's pipeline makes its caches by `cache(class, number of layers)`."""
    module = sys.modules[added("0.41", "QwenImage21Pipeline").__module__]
    of_diffusers = module.QwenImage21KVCache
    with mock.patch.object(module, "QwenImage21KVCache", functools.partial(cache, of_diffusers)):
        yield


def one_for_all(pipe: Any) -> AbstractContextManager[None]:
    """Both branches get one cache, in which the second prompt takes the first one's place."""
    made: list[Any] = []

    def cache(of_diffusers: type, layers: int) -> Any:
        made.append(of_diffusers(layers))
        return made[0]

    return making(cache)


def of_the_call_before(pipe: Any) -> AbstractContextManager[None]:
    """The cache holds what another prompt left in it."""

    def cache(of_diffusers: type, layers: int) -> Any:
        made = of_diffusers(layers)
        for each in made.layer_caches:
            each.store(*embeddings(2, 1, 3, 2, 16))
        return made

    return making(cache)


def changing(change: Callable[[Any], None]) -> Callable[[Any], AbstractContextManager[None]]:
    """The first layer's cache is changed when the scheduler makes the second step."""

    @contextmanager
    def around(pipe: Any) -> Iterator[None]:
        made: list[Any] = []

        def cache(of_diffusers: type, layers: int) -> Any:
            made.append(of_diffusers(layers))
            return made[-1]

        def callback(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
            if step == 1:
                change(made[0].layer_caches[0])
            return inputs

        pipe.callback = callback
        with making(cache):
            yield

    return around


def calling_back(pipe: Any) -> dict[str, Any]:
    return {**with_cached_text(pipe), "callback_on_step_end": lambda *args: pipe.callback(*args)}


def brightens_by_keys(pipe: Any) -> AbstractContextManager[None]:
    """The images depend on what the cache holds."""

    def change(cache: Any) -> None:
        pipe.brightness = cache.k.detach().mean()

    return changing(change)(pipe)


def brightening(pipe: Any) -> dict[str, Any]:
    def callback(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        pipe.callback(pipe, step, timestep, inputs)
        return {"latents": inputs["latents"] + pipe.brightness} if step == STEPS - 1 else inputs

    return {**with_cached_text(pipe), "callback_on_step_end": callback}


rule_3 = adding(3, "KVCache", LIFTED)
QWEN = {"build": build_qwen_image_21, "call": with_cached_text}
KLEIN = {"build": deep_klein_kv, "call": with_cached_reference}
rule_3("cached text", must="right", methods=JUDGED, **QWEN)
rule_3("cached reference image", must="right", methods=JUDGED, **KLEIN)
rule_3(
    "cached text, its projection alone trained",
    # What only the call that fills the cache computes with.
    changed(build_qwen_image_21, frozen, lambda pipe: pipe.transformer.txt_in.requires_grad_(True)),
    "right",
    call=with_cached_text,
)
rule_3("cached text, recomputed in the backward pass", must="right", before_backward=checkpointed, **QWEN)
rule_3(
    "cached text under checkpointing",
    changed(build_qwen_image_21, checkpointed),
    "right",
    call=with_cached_text,
)
# Look alike.
rule_3(
    "cached reference under checkpointing",
    changed(deep_klein_kv, checkpointed),
    cause="recomputes",
    call=with_cached_reference,
)
rule_3(
    "cached reference, checkpointing switched on before backward",
    must="refused",
    cause="checkpointing",
    before_backward=checkpointed,
    **KLEIN,
)
rule_3("one text cache for both branches", cause="written into", around=one_for_all, **QWEN)
rule_3("text cache of another prompt", cause="not filled in the first step", around=of_the_call_before, **QWEN)
rule_3(
    "text cache written in a later step",
    cause="written into",
    around=changing(lambda cache: cache.k.mul_(0.5)),
    build=build_qwen_image_21,
    call=calling_back,
)
rule_3(
    "text cache detached in a later step",
    cause="written into",
    # The values stay, and a part of the gradient goes.
    around=changing(lambda cache: setattr(cache, "k", cache.k.detach().clone())),
    build=build_qwen_image_21,
    call=calling_back,
)
rule_3(
    "images depend on a text cache",
    build_qwen_image_21,
    cause="images depend on what a text cache holds",
    around=brightens_by_keys,
    call=brightening,
)
for number, cached in enumerate((QWEN, KLEIN)):
    rule_3(
        f"copies without the first step, {number}",
        must="either",
        cause="not filled in the first step",
        methods=("draft-lv",),
        refused_by=("draft-lv",),
        **cached,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Rule 8: steps whose length differs by token
# ---------------------------------------------------------------------------------------------------------------------


def build_ltx_condition() -> Any:
    return build_ltx(LTXConditionPipeline)


def given_frame(number: int = 3, **changes: Any) -> Callable[[Any], dict[str, Any]]:
    """A call of LTX with conditions, by the number of the family's case."""

    def call(pipe: Any) -> dict[str, Any]:
        arguments = dict(ltx_condition_cases(pipe)[number].arguments)
        return {**arguments, **SHORT, "generator": torch.Generator().manual_seed(1), **changes}

    return call


class FreezesAToken(FlowMatchEulerDiscreteScheduler):
    """From the third step on, it leaves one token as it is."""

    def step(self, *args: Any, per_token_timesteps: torch.Tensor, **kwargs: Any) -> Any:
        timesteps = per_token_timesteps.expand(-1, args[2].shape[1]).clone()
        if (self.step_index or 0) > 1:
            timesteps[:, 1] = 0
        return super().step(*args, per_token_timesteps=timesteps, **kwargs)


class HurriesAToken(FlowMatchEulerDiscreteScheduler):
    """Moves one token twice as far as the others."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        (following,) = super().step(*args, **kwargs)
        return (torch.cat([following[:, :1], 2 * following[:, 1:2] - args[2][:, 1:2], following[:, 2:]], 1),)


class LosesGradients(FlowMatchEulerDiscreteScheduler):
    """Its steps have the right values and nine tenths of the velocity's gradient."""

    def step(self, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().step(0.9 * model_output + 0.1 * model_output.detach(), *args, **kwargs)


def ltx_with(scheduler: type[FlowMatchEulerDiscreteScheduler]) -> Callable[[], Any]:
    return changed(build_ltx_condition, scheduled_by(scheduler))


class WeighedGuidance(LTXConditionPipeline):
    """Its guidance depends on a trained weight."""

    @property
    def guidance_scale(self) -> torch.Tensor:
        return 1 + self.transformer.proj_out.weight.detach().norm()


def dims_what_is_given(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Alters the first frame's tokens alone."""
    latents = inputs["latents"].clone()
    latents[:, :1] *= 0.9
    return {"latents": latents}


rule_8 = adding(8, "moves tokens by other lengths than 0 and", LIFTED)
LTX = {"build": build_ltx_condition, "call": given_frame()}
rule_8("first frame given", must="right", methods=JUDGED, **LTX)
rule_8(
    "first frame given, conditional branch alone",
    must="right",
    options={"unconditional_gradient": False},
    detached=True,
    methods=("full", "flowbp-bridge"),
    **LTX,
)
rule_8("negative velocities", build_ltx_condition, "right", methods=("draft-k", "refl", "drtune"), call=given_frame(1))
rule_8("token that is frozen after it moved", ltx_with(FreezesAToken), "right", methods=MANY, call=given_frame(1))
# Look alike.
rule_8("first frame given in part", build_ltx_condition, call=given_frame(4))
rule_8("token that moves twice as far", ltx_with(HurriesAToken), call=given_frame(1))
rule_8("steps that lose a part of the gradient", ltx_with(LosesGradients), call=given_frame(1))
rule_8("noise on the frame that is given", build_ltx_condition, cause="image_cond_noise_scale=0", call=given_frame(5))
rule_8(
    "step callback alters what is given",
    build_ltx_condition,
    cause="are not those that step 0 returned",
    call=given_frame(callback_on_step_end=dims_what_is_given),
)
rule_8(
    "guidance of given tokens by a trained weight",
    changed(build_ltx_condition, lambda pipe: setattr(pipe, "__class__", WeighedGuidance)),
    cause="velocities of step 0 depend on the trained parameter proj_out.weight",
    call=given_frame(),
)


# ---------------------------------------------------------------------------------------------------------------------
# Rule 1: velocities that are constant 0
# ---------------------------------------------------------------------------------------------------------------------


class LeavesTheFirstStepOut(PlainLoop):
    """Its first velocity is 0, as CFG-Zero*'s."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.seen.append(None)
        unconditional, conditional = (self.branch(latents, timestep, *text) for text in reversed(self.texts))
        velocity = unconditional + GUIDANCE * (conditional - unconditional)
        return torch.zeros_like(velocity) if len(self.seen) == 1 else velocity


class Detaches(PlainLoop):
    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return super().velocity(latents, timestep).detach()


rule_1 = adding(1, "is not connected", LIFTED)
rule_1("first velocity of 0", LeavesTheFirstStepOut, "right", methods=JUDGED)
rule_1(
    "first velocity of 0, conditional branch alone",
    LeavesTheFirstStepOut,
    "right",
    options={"unconditional_gradient": False, "strict": True},
    detached=True,
)
# Look alike.
rule_1("detached velocity", Detaches)
# All of its outputs are 0, whose gradient is not.
begins_at_zero = changed(
    loop(Detaches), lambda pipe: [value.data.zero_() for value in pipe.transformer.proj_out.parameters()]
)
rule_1("detached velocity of 0", begins_at_zero, call=loop_call)


# ---------------------------------------------------------------------------------------------------------------------
# Rule 1: a source that is written into the latents after every step
# ---------------------------------------------------------------------------------------------------------------------


class Pastes(PlainLoop):
    """Inpainting with a text-to-image model, with another mask for the second sample."""

    def sampled(self, latents: torch.Tensor, steps: int) -> torch.Tensor:
        self.mask = torch.ones_like(latents[:, :1])
        self.mask[0, :, :2], self.mask[1, :, :, 1:] = 0, 0
        self.source, self.noise = embeddings(2, *latents.shape, seed=3)
        self.scheduler.set_timesteps(steps)
        for number, timestep in enumerate(self.scheduler.timesteps):
            latents = self.step(latents, timestep)
            self.seen.append(latents)
            latents = self.pasted(latents, number)
        return latents

    def pasted(self, latents: torch.Tensor, number: int) -> torch.Tensor:
        sigma = self.scheduler.sigmas[number + 1]
        return self.mask * latents + (1 - self.mask) * ((1 - sigma) * self.source + sigma * self.noise)


def pasting(pasted: Callable[[Pastes, torch.Tensor, int], torch.Tensor]) -> type[Pastes]:
    """Inpainting that does something else after a step. `pipe.mask` is 1 where latents are kept."""
    return type("ChangedPastes", (Pastes,), {"pasted": pasted})


def pastes_only(*steps: int) -> type[Pastes]:
    return pasting(lambda pipe, latents, number: Pastes.pasted(pipe, latents, number) if number in steps else latents)


def pastes_elsewhere_later(pipe: Pastes, latents: torch.Tensor, number: int) -> torch.Tensor:
    pipe.mask = pipe.mask.flip(-1) if number == SWITCH else pipe.mask
    return Pastes.pasted(pipe, latents, number)


def lets_gradients_through(pipe: Pastes, latents: torch.Tensor, number: int) -> torch.Tensor:
    """Its values are those of inpainting."""
    return Pastes.pasted(pipe, latents, number) + 0.5 * (1 - pipe.mask) * (latents - latents.detach())


def moves_gradients(pipe: Pastes, latents: torch.Tensor, number: int) -> torch.Tensor:
    """Its values are those of inpainting."""
    return Pastes.pasted(pipe, latents, number) + pipe.mask * (latents - latents.detach()).flip(2)


class ComputesBeforePasting(Pastes):
    """Its transformer gets the latents as they were before the source was written."""

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return super().velocity(self.seen[-1] if self.seen else latents, timestep)


class MovesOtherLatents(Pastes):
    """Its scheduler gets latents through which a gradient reaches earlier ones."""

    def step(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        earlier = self.seen[-2] if len(self.seen) > 1 else latents
        velocity = self.velocity(latents, timestep)
        latents = latents + (1 - self.mask) * (earlier - earlier.detach())
        return self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]


def build_text_to_image_inpainting() -> Any:
    return build_sd3_inpaint(16)


def inpainting(**changes: Any) -> Callable[[Any], dict[str, Any]]:
    """A call of Stable Diffusion 3's inpainting pipeline, whose second sample has another mask."""

    def call(pipe: Any) -> dict[str, Any]:
        masks = torch.cat([hole()[:1], hole()[1:].mT])
        arguments = dict(plain_sd3_cases(pipe)[1].arguments)
        source = {"image": pictures(seed=5), "mask_image": masks, "strength": 1.0}
        return {**arguments, **SHORT, **source, "generator": torch.Generator().manual_seed(1), **changes}

    return call


def editing(pipe: Any) -> dict[str, Any]:
    """A call of JoyImage-Edit-Plus, whose latents hold the source beside the target."""
    return {**joy_image_plus_cases(pipe)[1].arguments, **SHORT, "generator": torch.Generator().manual_seed(1)}


rule_1 = adding(1, "are not those that step|as it is", LIFTED)
SD3_INPAINTING = {"build": build_text_to_image_inpainting, "call": inpainting(), "must": "right"}
JOY_IMAGE = {"build": build_joy_image_plus, "call": editing, "must": "right"}
ONE_BRANCH = {"options": {"unconditional_gradient": False}, "detached": True}
rule_1("source pasted", Pastes, "right", methods=tuple(METHODS))
rule_1("inpainting", methods=tuple(METHODS), **SD3_INPAINTING)
rule_1("inpainting, conditional branch alone", methods=JUDGED, **SD3_INPAINTING, **ONE_BRANCH)
rule_1(
    "inpainting from a later step",
    methods=("full", "drtune", "flowbp-bridge"),
    **{**SD3_INPAINTING, "call": inpainting(strength=0.7, num_inference_steps=8)},
)
rule_1("sources restored", methods=("full", "refl", "draft-lv", "drtune", "flowbp-lagrange"), **JOY_IMAGE)
rule_1("sources restored, conditional branch alone", methods=("full", "flowbp-bridge"), **JOY_IMAGE, **ONE_BRANCH)
# Nothing comes after it.
rule_1("source pasted after the last step alone", pastes_only(STEPS - 1), "right", methods=MANY)
# Look alike.
OTHER_PLACES = "writes to other places of the latents before step"
SEEN_BEFORE = "a gradient reaches latents over which"
rule_1(
    "source pasted by a soft mask",
    pasting(lambda pipe, x, _: pipe.mask * x + (1 - pipe.mask) * (0.5 * x + 0.5 * pipe.source)),
)
rule_1("source pasted with a part of the gradient", pasting(lets_gradients_through))
rule_1("source pasted with gradients of other places", pasting(moves_gradients))
rule_1("source pasted by a mask that changes", pasting(pastes_elsewhere_later), cause=OTHER_PLACES)
rule_1("source pasted at first", pastes_only(0, 1), cause=OTHER_PLACES)
rule_1("source pasted later", pastes_only(*range(1, STEPS)), cause=OTHER_PLACES)
rule_1(
    "source pasted everywhere once",
    pasting(lambda pipe, x, step: pipe.source.clone() if step == SWITCH else Pastes.pasted(pipe, x, step)),
)
rule_1("source pasted, but after the last step", pastes_only(*range(STEPS - 1)), cause=SEEN_BEFORE, methods=MANY)
rule_1("transformer before the source is pasted", ComputesBeforePasting, cause=SEEN_BEFORE, methods=JUDGED)
rule_1(
    "earlier latents pasted",
    pasting(lambda pipe, x, step: pipe.mask * x + (1 - pipe.mask) * pipe.seen[max(0, step - 1)]),
    cause="depend on latents of earlier steps",
)
rule_1("scheduler with earlier latents", MovesOtherLatents, cause="step 2 depend on latents of earlier steps")
rule_1(
    "trained weight pasted",
    pasting(lambda pipe, x, _: pipe.mask * x + (1 - pipe.mask) * pipe.transformer.proj_out.weight.detach().norm()),
    cause="depend on the trained parameter",
)
rule_1("latents detached in part", pasting(lambda pipe, x, _: pipe.mask * x + (1 - pipe.mask) * x.detach()))
rule_1("latents scaled before the source is pasted", pasting(lambda *args: 0.9 * Pastes.pasted(*args)))
