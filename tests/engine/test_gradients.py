# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The engine's gradients against independent computations of them, with the paper's three backbones.

Three oracles: `brute_force` (each method's formula as one autograd graph, with its own code for what the pipelines do
around their transformer: packing, positions, shifted schedules, guidance, batch-norm statistics of the VAE), the stock
pipeline's own autograd, and the engine itself under other memory settings. Against the brute force the bound is 1e-10
(seen: 4e-15): float64 sigmas and with the stock scheduler's float32 sigmas and roundings, which the brute force
repeats. Autograd through the stock scheduler rounds the gradient itself to float32 at every step, so there the bound
is 1e-6 (seen: 5e-8).
"""

import dataclasses

import pytest
import torch
from brute_force import (
    Drawn,
    Rollout,
    Sampling,
    brute_force,
    decode,
    hinge,
    integrated_basis,
    leg_supports,
    plain,
    relative_difference,
    sample,
    stock_gradients,
    surrogate_graph,
    toy_reward,
)
from gradient_rows import (
    BRIDGE,
    EXACT,
    FLOAT32_SCHEDULER,
    GUIDED,
    LAGRANGE,
    LEAPALIGN,
    MODES,
    NOISE_SEED,
    OPTIONS,
    PROMPTS,
    ROLLOUTS,
    ROWS,
    SD3_MODES,
    TWO_CALLS,
    assert_agrees,
    drawn_steps,
    engine,
    found_gradients,
    pipeline_of,
    sampling_of,
)
from tiny_sd3 import add_random_lora, tiny_sd3_pipeline

from flowbp import FlowBPCallback, Objective, Surrogate, Term, get_method

# Each mode without the unconditional branch's gradient, and with it where there may be one.
BRANCHES = [(mode, False) for mode in MODES] + [(mode, True) for mode in MODES if mode in (*SD3_MODES, *GUIDED)]
# Rollouts of three lengths and batches; the longest, for time, not everywhere.
RUNS = [
    (mode, both, seed)
    for mode, both in BRANCHES
    for seed in ROLLOUTS
    if seed != 1 or mode in SD3_MODES or (mode in GUIDED and not both)
]


# ---------------------------------------------------------------------------------------------------------------------
# The brute force itself
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("float64_scheduler", "bound"), [(True, EXACT), (False, FLOAT32_SCHEDULER)])
def test_brute_force_is_the_stock_pipelines_autograd(mode: str, float64_scheduler: bool, bound: float):
    """Full backpropagation through its own loop is what autograd finds through the pipeline's."""
    pipe = pipeline_of(mode, 3, float64_scheduler)
    sampling = sampling_of(mode, PROMPTS[:2], 6, unconditional_gradient=True, float32_scheduler=not float64_scheduler)
    expected = brute_force(pipe, "full", {}, Drawn(), sampling)
    assert relative_difference(expected.gradients, stock_gradients(pipe, sampling)) < bound
    images = pipe(**sampling.call_arguments()).images
    torch.testing.assert_close(images, expected.images, rtol=0, atol=1e-13)
    assert images.shape == (2, 3, 8, 8 if mode in SD3_MODES else 12)


def test_brute_force_rows_that_are_exact_backpropagation_in_disguise():
    """Over two steps, leaps, bridges and Lagrange legs with coupling 1 are the sampler's own two steps."""
    pipe = tiny_sd3_pipeline(seed=4, float64_scheduler=True)
    sampling = Sampling(PROMPTS[:2], 2, 3.5)
    expected = brute_force(pipe, "full", {}, Drawn(), sampling).gradients
    lagrange = {**LAGRANGE, "active_supports": "all", "alpha": 1.0, "tau": None}
    for name, options, drawn in (
        ("draft-k", {"last_k": 2}, Drawn()),
        ("leapalign", {"alpha": 1.0, "tau": None}, Drawn(k=0, j=1)),
        ("flowbp-bridge", {**BRIDGE, "alpha": 1.0}, Drawn(active=(0, 1), j=1)),
        ("flowbp-lagrange", lagrange, Drawn(k=0, j=1)),
    ):
        found = brute_force(pipe, name, options, drawn, sampling)
        assert relative_difference(found.gradients, expected) < EXACT, name
        assert all(gap.max() < 1e-12 for gap in found.gaps.values()), name


@pytest.mark.parametrize("mode", MODES)
def test_brute_force_tells_the_rows_and_branches_apart(mode: str):
    """The tiny pipelines are generic: every row, and the unconditional branch, changes the gradient by over 1 %."""
    pipe = pipeline_of(mode, 4)
    sampling = sampling_of(mode, PROMPTS[:2], 6)
    drawn = {
        "refl": Drawn(t=4, posterior_step=4),
        "drtune": Drawn(active=(1, 3), t=4, posterior_step=4),
        "leapalign": Drawn(k=1, j=3),
        "flowbp-sparse": Drawn(active=(0, 2, 3, 5)),
        "flowbp-bridge": Drawn(active=(0, 2, 3, 4, 5), j=3),
        "flowbp-lagrange": Drawn(k=1, j=3),
    }
    found = [
        brute_force(pipe, name, ROWS[name], drawn.get(name, Drawn()), sampling).gradients
        for name in ROWS
        if name != "draft-lv"
    ]
    uncoupled = brute_force(pipe, "leapalign", {**LEAPALIGN, "alpha": 0.0}, drawn["leapalign"], sampling)
    found.append(uncoupled.gradients)
    if mode in GUIDED:
        both = dataclasses.replace(sampling, unconditional_gradient=True)
        found.append(brute_force(pipe, "leapalign", LEAPALIGN, drawn["leapalign"], both).gradients)
    for place, one in enumerate(found):
        assert all(relative_difference(one, other) > 0.01 for other in found[:place])


def test_the_tiny_velocity_depends_on_sigma():
    """Not only on the state: the same latents at the next step's time have another velocity, by over 5 %."""
    pipe = tiny_sd3_pipeline(seed=4, float64_scheduler=True)
    rollout = sample(pipe, Sampling(PROMPTS[:2], 6, 3.5))
    with torch.no_grad():
        for step in range(5):
            moved = rollout.velocity(rollout.latents[step], step + 1) - rollout.velocities[step]
            assert moved.norm() > 0.05 * rollout.velocities[step].norm()


def test_brute_force_integrates_polynomials_exactly():
    """Its Lagrange weights, on uneven nodes: exact for every power below the order, so they also sum to the leg."""
    nodes = [0.93, 0.71, 0.52, 0.2]
    for order in (1, 2, 3, 4):
        weights = integrated_basis(nodes[:order], 0.93, 0.11)
        for power in range(order):
            integral = (0.11 ** (power + 1) - 0.93 ** (power + 1)) / (power + 1)
            found = sum(weight * node**power for weight, node in zip(weights, nodes, strict=False))
            assert found == pytest.approx(integral, abs=1e-14)
    assert leg_supports(2, 8, 3, "lagrange") == [2, 4, 7]  # the middle, 4.5, rounded to even
    assert leg_supports(3, 5, 3, "lagrange") == [3, 4]


# ---------------------------------------------------------------------------------------------------------------------
# The engine against the brute force
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "unconditional_gradient", "seed"), RUNS)
@pytest.mark.parametrize("name", ROWS)
def test_row_is_its_papers_formula(name: str, mode: str, unconditional_gradient: bool, seed: int):
    """Every row in every mode, one branch or both, on rollouts of different lengths and batches."""
    pipe = pipeline_of(mode, seed)
    sampling = sampling_of(mode, **ROLLOUTS[seed], seed=10 + seed, unconditional_gradient=unconditional_gradient)
    gradients, out, callback = engine(
        pipe, get_method(name, **ROWS[name]), sampling, seed=seed, unconditional_gradient=unconditional_gradient
    )
    assert {len(step.calls) for step in callback.trajectory.steps.values()} == {MODES[mode].calls}
    expected = brute_force(pipe, name, ROWS[name], drawn_steps(name, callback.surrogate), sampling)
    assert_agrees(gradients, out, expected)


@pytest.mark.parametrize(
    ("mode", "seed"), [("sd3-guidance", 0), ("sd3-guidance", 1), ("flux-true-guidance", 5), ("klein", 5)]
)
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=lambda value: str(value).replace(" ", ""))
def test_options(name: str, options: dict[str, object], mode: str, seed: int):
    """Every option that changes a formula, at other values than the table's."""
    pipe = pipeline_of(mode, seed)
    sampling = sampling_of(mode, PROMPTS[:2], 8, seed=seed)
    gradients, out, callback = engine(pipe, get_method(name, **options), sampling, seed=20 + seed)
    same_draw = None
    if name in ("refl", "drtune"):
        method = get_method(name, **{**options, "endpoint": "posterior-mean"})
        same_draw = method.draw(pipe.scheduler.sigmas, torch.Generator().manual_seed(20 + seed)).endpoint
    drawn = drawn_steps(name, callback.surrogate, same_draw)
    assert_agrees(gradients, out, brute_force(pipe, name, options, drawn, sampling))


CHANGES = [
    ("sd3-guidance", {"num_images_per_prompt": 2}),
    ("sd3-guidance", {"negative_prompt": "grey"}),
    ("sd3-guidance", {"negative_prompt": "grey", "num_images_per_prompt": 2, "unconditional_gradient": True}),
    ("sd3-guidance", {"seeds": (3, 4)}),
    ("sd3-guidance", {"latents": torch.linspace(-2, 2, 128, dtype=torch.float64).reshape(2, 4, 4, 4).sin()}),
    ("sd3-guidance", {"sigmas": (1.0, 0.93, 0.8, 0.5, 0.31, 0.3, 0.11)}),
    ("sd3-guidance", {"guidance_scale": 1.2}),
    ("sd3-guidance", {"guidance_scale": 7.0, "unconditional_gradient": True}),
    ("flux", {"guidance_scale": 1.0}),
    ("flux", {"latents": torch.linspace(-2, 2, 192, dtype=torch.float64).reshape(2, 6, 16).sin()}),
    ("flux-true-guidance", {"true_cfg_scale": 1.0}),
    ("flux-true-guidance", {"true_cfg_scale": 1.2}),
    ("flux-true-guidance", {"true_cfg_scale": 6.0, "guidance_scale": 2.0, "unconditional_gradient": True}),
    ("flux-true-guidance", {"seeds": (3, 4)}),
    ("flux-true-guidance", {"size": (12, 4)}),
    ("klein", {"num_images_per_prompt": 2}),
    ("klein", {"num_images_per_prompt": 2, "unconditional_gradient": True, "seeds": (3, 4, 5, 6)}),
    ("klein", {"latents": torch.linspace(-2, 2, 48, dtype=torch.float64).reshape(2, 4, 2, 3).sin()}),
    ("klein", {"sigmas": (1.0, 0.93, 0.8, 0.5, 0.31, 0.3, 0.11)}),
    ("klein", {"guidance_scale": 1.2}),
    ("klein", {"size": (12, 4)}),
]


@pytest.mark.parametrize(
    ("mode", "changes"), CHANGES, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
@pytest.mark.parametrize("name", ["full", "leapalign", "flowbp-lagrange"])
def test_pipeline_arguments(name: str, mode: str, changes: dict[str, object]):
    """The pipelines' own ways of giving noise, schedule, size and guidance."""
    pipe = pipeline_of(mode, 7)
    sampling = sampling_of(mode, PROMPTS[:2], 7, **changes)
    gradients, out, callback = engine(
        pipe, get_method(name, **ROWS[name]), sampling, seed=1, unconditional_gradient=sampling.unconditional_gradient
    )
    assert_agrees(gradients, out, brute_force(pipe, name, ROWS[name], drawn_steps(name, callback.surrogate), sampling))


def test_weights_of_a_thousand_draws():
    """The terms' weights alone, for many draws, lengths and uneven sigmas: cheap, so it covers more than gradients do.

    In a pretended rollout whose velocities are free scalars, a velocity's weight is the endpoint's derivative in it.
    """
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for name, options in [*ROWS.items(), *OPTIONS]:
        if options.get("endpoint") == "sample":
            continue
        method = get_method(name, **options)
        for steps in (6, 9, 25):
            uneven = torch.rand(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(steps))
            sigmas = torch.cat([uneven.sort(descending=True).values, uneven.new_zeros(1)])
            for seed in range(10):
                surrogate = method.draw(sigmas, torch.Generator().manual_seed(seed))
                velocities = torch.zeros(steps, dtype=torch.float64, requires_grad=True)
                rollout = Rollout(
                    sigmas=sigmas.tolist(),
                    latents=[zero] * (steps + 1),
                    velocities=[zero] * steps,
                    velocity=lambda x, step, values=velocities: values[step] + 0 * x,
                )
                graph, _ = surrogate_graph(name, options, drawn_steps(name, surrogate), rollout)
                (expected,) = torch.autograd.grad(graph.sum(), velocities)
                found = torch.zeros(steps, dtype=torch.float64)
                for term in surrogate.terms:
                    found[term.step] = term.weight
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", ["flux", *GUIDED])
@pytest.mark.parametrize("name", ROWS)
def test_recipe_of_the_backbone(name: str, mode: str):
    """The table's defaults for the backbone, with the float32 sigmas and roundings of the stock scheduler."""
    pipe = pipeline_of(mode, 6, float64_scheduler=False)
    method = get_method(name, backbone=MODES[mode].backbone)
    both = method.unconditional_gradient
    sampling = sampling_of(mode, PROMPTS[:2], 12, float32_scheduler=True, unconditional_gradient=both)
    gradients, out, callback = engine(pipe, method, sampling, seed=3, unconditional_gradient=None)
    expected = brute_force(pipe, name, method.options, drawn_steps(name, callback.surrogate), sampling)
    assert_agrees(gradients, out, expected)


@pytest.mark.parametrize("mode", TWO_CALLS)
def test_the_conditional_call_comes_first_and_alone_is_computed_again(mode: str):
    """Two calls a step; with `unconditional_gradient=False` the sweep runs the first of them only."""
    pipe = pipeline_of(mode, 0)
    sampling = sampling_of(mode, PROMPTS[:2], 6)
    prompts: list[torch.Tensor] = []
    handle = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: prompts.append(kwargs["encoder_hidden_states"].detach()), with_kwargs=True
    )
    engine(pipe, get_method("flowbp-sparse", num_active=2), sampling)
    handle.remove()
    # The first block sees the prompt through one linear layer.
    conditional = pipe.transformer.context_embedder(sampling.embeddings["prompt_embeds"])
    unconditional = pipe.transformer.context_embedder(sampling.embeddings["negative_prompt_embeds"])
    expected = [conditional, unconditional] * 6 + [conditional] * 2
    assert len(prompts) == len(expected)
    for found, prompt in zip(prompts, expected, strict=True):
        torch.testing.assert_close(found, prompt)


@pytest.mark.parametrize("seed", range(4))
def test_a_users_own_table(seed: int):
    """Any steps, weights and couplings, several of them coupled, against the definition of a term."""
    pipe = tiny_sd3_pipeline(seed=seed, float64_scheduler=True)
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randperm(7, generator=generator)[:4].sort().values.tolist()
    weights = (-torch.rand(4, generator=generator, dtype=torch.float64)).tolist()
    couplings = [0.0, *torch.rand(3, generator=generator, dtype=torch.float64).tolist()]
    couplings[1 + seed % 3] = 0.0
    rows = list(zip(steps, weights, couplings, strict=True))
    endpoint = "sample" if seed % 2 else ("posterior_mean", steps[-1])
    surrogate = Surrogate(endpoint, tuple(Term(*row) for row in rows))
    sampling = Sampling(PROMPTS[:2], 7, 3.5, seed=seed)
    gradients, out, _ = engine(pipe, surrogate, sampling)
    drawn = Drawn(posterior_step=None if seed % 2 else steps[-1])
    assert_agrees(gradients, out, brute_force(pipe, "table", {}, drawn, sampling, terms=rows))


OBJECTIVES = [
    ("refl", {}, Objective(clip=0.5, scale=2.5), hinge(0.5, 2.5)),
    ("draft-lv", {}, Objective(clip=0.5, scale=0.5), hinge(0.5, 0.5)),
    ("leapalign", {}, Objective(clip=0.45), hinge(0.45, 1.0)),
    ("flowbp-lagrange", {}, Objective(clip=0.5, scale=0.1, undo_guidance=3.5), hinge(0.5, 0.1, 3.5)),
    ("flowbp-bridge", {}, Objective(undo_guidance=3.5), lambda rewards, weights: plain(rewards, weights) / 3.5),
    ("leapalign", {"max_gap_j": 0.2}, None, plain),
    ("flowbp-lagrange", {"max_gap_0": 0.19}, None, plain),
    ("flowbp-lagrange", {"max_gap_j": 0.27, "max_gap_0": 0.195}, Objective(clip=0.5), hinge(0.5, 1.0)),
    (
        "leapalign",
        {},
        lambda rewards, weights: (weights * (rewards - 1) ** 2).sum() + rewards.prod(),
        lambda rewards, weights: (weights * (rewards - 1) ** 2).sum() + rewards.prod(),
    ),
]


@pytest.mark.parametrize(("name", "options", "objective", "formula"), OBJECTIVES)
@pytest.mark.parametrize("reward_as_function", [False, True])
def test_objectives(
    name: str, options: dict[str, float], objective: object, formula: object, reward_as_function: bool
):
    """The hinge, sample weights, the gap filter, undone guidance and a user's own objective that mixes samples."""
    pipe = tiny_sd3_pipeline(seed=6, float64_scheduler=True)
    options = {**ROWS[name], **options}
    sampling = Sampling(PROMPTS, 7, 3.5, seed=6)
    gradients, out, callback = engine(
        pipe,
        get_method(name, **options),
        sampling,
        seed=3,
        reward_as_function=reward_as_function,
        backward={} if objective is None else {"objective": objective},
    )
    expected = brute_force(pipe, name, options, drawn_steps(name, callback.surrogate), sampling, formula)
    if "max_gap_j" in options or "max_gap_0" in options:
        assert 0 < (expected.weights > 0).sum() < len(PROMPTS)  # the filter drops some and keeps some
    assert_agrees(gradients, out, expected)


def test_no_sample_kept():
    """Where the gap filter drops every sample the loss and all gradients are zero, not NaN."""
    pipe = tiny_sd3_pipeline(seed=6, float64_scheduler=True)
    method = get_method("leapalign", **LEAPALIGN, max_gap_j=1e-9)
    gradients, out, _ = engine(pipe, method, Sampling(PROMPTS, 7, 3.5))
    assert out.loss == 0
    assert (out.weights == 0).all()
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_gradient_scale_and_accumulation():
    """Two rollouts add up in `.grad`, each scaled; what `backward` reports is not scaled."""
    pipe = tiny_sd3_pipeline(seed=8, float64_scheduler=True)
    total, sampled = None, []
    for place, (name, scale) in enumerate((("flowbp-lagrange", 0.25), ("flowbp-bridge", 640.0))):
        sampling = Sampling(PROMPTS[:2], 7, 3.5, seed=place)
        gradients, out, callback = engine(
            pipe,
            get_method(name, **ROWS[name]),
            sampling,
            seed=place,
            backward={"gradient_scale": scale},
            zero_grad=place == 0,
        )
        drawn = drawn_steps(name, callback.surrogate)
        expected = brute_force(pipe, name, ROWS[name], drawn, sampling, gradient_scale=scale)
        torch.testing.assert_close(out.loss, expected.loss, rtol=EXACT, atol=0)
        sampled.append(expected.gradients)
        total = expected.gradients if total is None else {key: total[key] + expected.gradients[key] for key in total}
        assert_agrees(gradients, out, dataclasses.replace(expected, gradients=total))
    assert relative_difference(sampled[0], total) > 0.01


def test_a_batch_is_the_sum_of_its_samples():
    """DRaFT-LV with a list of generators: four samples at once, and one after the other."""
    pipe = tiny_sd3_pipeline(seed=8, float64_scheduler=True)
    prompts = (*PROMPTS, "a 5")
    found = []
    for parts in ([[0, 1, 2, 3]], [[0], [1], [2], [3]]):
        pipe.transformer.zero_grad(set_to_none=True)
        for part in parts:
            callback = FlowBPCallback(
                get_method("draft-lv", num_noised=2),
                noise_generator=[torch.Generator().manual_seed(NOISE_SEED + sample) for sample in part],
            )
            sampling = Sampling(tuple(prompts[sample] for sample in part), 5, 3.5, seeds=tuple(part))
            with callback.record(pipe):
                images = [pipe(**sampling.call_arguments()).images for _ in range(1 + callback.copies)]
            callback.backward(
                toy_reward, torch.cat(images), sampling.image_prompts(), gradient_scale=len(part) / len(prompts)
            )
        found.append(found_gradients(pipe))
    assert relative_difference(*found) < 1e-12


@pytest.mark.parametrize("name", ["full", "flowbp-bridge"])
def test_dora(name: str):
    """Through a DoRA, whose matrices and magnitudes alone get gradients."""
    pipe = tiny_sd3_pipeline(seed=9, float64_scheduler=True)
    add_random_lora(pipe, 2, torch.Generator().manual_seed(9), use_dora=True, use_rslora=True)
    sampling = Sampling(PROMPTS[:2], 7, 3.5)
    gradients, out, callback = engine(pipe, get_method(name, **ROWS[name]), sampling)
    assert all("lora_" in key for key in gradients) and any("magnitude" in key for key in gradients)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    drawn = drawn_steps(name, callback.surrogate)
    assert_agrees(gradients, out, brute_force(pipe, name, ROWS[name], drawn, sampling))


def test_two_halves():
    """`callback.endpoint` and `callback.sweep` alone, also for latents that the user decodes."""
    pipe = tiny_sd3_pipeline(seed=2, float64_scheduler=True)
    sampling = Sampling(PROMPTS[:2], 7, 3.5)
    method = get_method("flowbp-bridge", **BRIDGE)
    for output_type in ("pt", "latent"):
        pipe.transformer.zero_grad(set_to_none=True)
        callback = FlowBPCallback(method, generator=torch.Generator().manual_seed(4), unconditional_gradient=False)
        with callback.record(pipe):
            images = pipe(**{**sampling.call_arguments(), "output_type": output_type}).images
        if output_type == "latent":
            images = decode(pipe, images)
        loss = -toy_reward(images, sampling.image_prompts()).mean()
        (adjoint,) = torch.autograd.grad(loss, callback.endpoint)
        callback.sweep(adjoint)
        drawn = drawn_steps("flowbp-bridge", callback.surrogate)
        expected = brute_force(pipe, "flowbp-bridge", BRIDGE, drawn, sampling)
        assert relative_difference(found_gradients(pipe), expected.gradients) < EXACT


# ---------------------------------------------------------------------------------------------------------------------
# The engine against the stock pipeline's autograd, and against itself
# ---------------------------------------------------------------------------------------------------------------------


# Other backbones, for time, with two rows.
MEMORY_RUNS = [
    (mode, both, name)
    for mode, both in BRANCHES
    for name in (ROWS if mode in SD3_MODES else ("full", "flowbp-sparse"))
]


@pytest.mark.parametrize(("mode", "unconditional_gradient", "name"), MEMORY_RUNS)
def test_memory_settings_do_not_change_the_gradient(mode: str, unconditional_gradient: bool, name: str):
    """`samples_per_decode`: same drawn steps, same gradient."""
    pipe = pipeline_of(mode, 3)
    sampling = sampling_of(mode, PROMPTS, 8)
    method = get_method(name, **ROWS[name])
    reference = None
    for samples_per_decode in (None, 1, 2, 3):
        gradients, _, _ = engine(
            pipe,
            method,
            sampling,
            seed=6,
            reward_as_function=True,
            unconditional_gradient=unconditional_gradient,
            memory={"samples_per_decode": samples_per_decode},
        )
        if reference is None:
            reference = gradients
        else:
            assert relative_difference(gradients, reference) < EXACT
