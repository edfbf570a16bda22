# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Rewards of videos: whole ones, and the mean over chosen frames by any reward of images."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, SanaVideoPipeline, StableDiffusion3Pipeline, WanPipeline, WanVideoToVideoPipeline
from tiny_pipelines import tiny_wan_pipeline
from toy_reward import Motion, make_held_out_reward, make_reward

from flowbp import FlowBPCallback, get_method
from flowbp.judging.loras import scores_by_reward
from flowbp.rewards import check_videos, load_reward
from flowbp.videos import check_reward_frames, chosen_frames, makes_videos, score_samples, takes_videos

PROMPTS = ["a", "longer"]
COLUMNS = {"share": [2.0, -1.0]}


def curved(images: torch.Tensor, prompts: Sequence[str], share: Sequence[float] = (1.0, 1.0)) -> torch.Tensor:
    """A reward of images that is not linear in them, and that depends on prompt and column."""
    factors = images.new_tensor([len(prompt) * each for prompt, each in zip(prompts, share, strict=True)])
    ramp = torch.linspace(0, 1, images[0].numel()).to(images).view_as(images[0])
    return (images.pow(3) * ramp).mean((1, 2, 3)) * factors


def moving(videos: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return Motion()(videos, prompts)


moving.takes_videos = True


@pytest.fixture
def videos() -> torch.Tensor:
    return torch.rand(2, 6, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def of_frames(frames: Sequence[int], reward: Callable[..., torch.Tensor] = curved) -> Callable[..., torch.Tensor]:
    """The mean over frames, one frame at a time."""

    def mean(videos: torch.Tensor, prompts: Sequence[str], **columns: Any) -> torch.Tensor:
        return sum(reward(videos[:, frame], prompts, **columns) for frame in frames) / len(frames)

    return mean


def test_chosen_frames_are_evenly_spaced_with_the_first_and_the_last():
    for total in range(1, 40):
        assert chosen_frames(total, None) == chosen_frames(total, total) or total == 1
        assert chosen_frames(total, 1) == [total // 2]
        for count in range(2, total + 1):
            frames = chosen_frames(total, count)
            gaps = {after - before for before, after in zip(frames, frames[1:], strict=False)}
            assert frames[0] == 0 and frames[-1] == total - 1 and len(frames) == count
            assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1
    assert chosen_frames(81, 5) == [0, 20, 40, 60, 80]
    with pytest.raises(ValueError, match="--reward_frames 6: expected at most the video's 5 frames"):
        chosen_frames(5, 6)


@pytest.mark.parametrize(("reward_frames", "frames"), [(None, range(6)), (3, [0, 3, 5]), (2, [0, 5]), (1, [3])])
def test_score_and_gradient_are_those_of_the_mean_over_the_chosen_frames(
    videos: torch.Tensor, reward_frames: int | None, frames: Sequence[int]
):
    """Against a loop over frames and finite differences; other frames have a gradient of exactly 0."""
    alone = functools.partial(score_samples, curved, prompts=PROMPTS, columns=COLUMNS, reward_frames=reward_frames)
    summed = load_reward(curved, offload=True, reward_frames=reward_frames)
    for scorer in (alone, lambda leaf: summed(leaf, PROMPTS, **COLUMNS)):
        leaf = videos.clone().requires_grad_()
        scores = scorer(leaf)
        torch.testing.assert_close(scores.detach(), of_frames(frames)(videos, PROMPTS, **COLUMNS))
        (gradient,) = torch.autograd.grad(scores.sum(), leaf)
        assert (gradient != 0).flatten(2).any(-1).tolist() == [[frame in frames for frame in range(6)]] * 2
        assert torch.autograd.gradcheck(scorer, leaf)
        with torch.no_grad():
            assert torch.equal(scorer(videos), scores)


class Instance:
    takes_videos = True

    def __call__(self, videos: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return moving(videos, prompts)


WHOLE = {"function": moving, "module": Motion(), "instance": Instance(), "partial": functools.partial(moving)}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_reward_that_takes_videos_gets_them_whole_alone_and_in_a_sum(videos: torch.Tensor, kind: str):
    expected = moving(videos, PROMPTS)
    assert takes_videos(WHOLE[kind]) is True and takes_videos(curved) is False
    for reward in (load_reward(WHOLE[kind]), load_reward(WHOLE[kind], offload=True, reward_frames=2)):
        assert torch.equal(reward(videos, PROMPTS), expected)
        assert scores_by_reward(reward, ["x"], videos, PROMPTS, {})["x"] == expected.tolist()
        with pytest.raises(ValueError, match=r"Expected videos \(B, F, 3, H, W\), which the reward takes, got \(2, 3"):
            reward(videos[:, 0], PROMPTS)


def test_each_part_of_a_sum_has_its_own_kind(videos: torch.Tensor):
    reward = load_reward("toy_reward:make_reward:2,toy_reward:Motion:-3", reward_frames=2)
    expected = {
        "toy_reward:make_reward": of_frames([0, 5], make_reward())(videos, PROMPTS),
        "toy_reward:Motion": moving(videos, PROMPTS),
    }
    found = scores_by_reward(reward, list(expected), videos, PROMPTS, {})
    for name, scores in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]).double(), scores)
    total = 2 * expected["toy_reward:make_reward"] - 3 * expected["toy_reward:Motion"]
    torch.testing.assert_close(reward(videos, PROMPTS), total)
    assert torch.autograd.gradcheck(lambda leaf: reward(leaf, PROMPTS), videos.clone().requires_grad_())


def test_frames_without_a_score_are_left_out_by_judges_and_stop_updates(videos: torch.Tensor):
    def judge(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        scores = images.mean((1, 2, 3))
        return torch.where(torch.arange(len(images)) % 6 == 2, torch.nan, scores)

    expected = of_frames([0, 1, 3, 4, 5], lambda images, prompts: images.mean((1, 2, 3)))(videos, PROMPTS)
    torch.testing.assert_close(score_samples(judge, videos, PROMPTS, {}), expected)
    assert score_samples(judge, videos.clone().requires_grad_(), PROMPTS, {}).isnan().all()


def silent(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return images.mean()


def odd(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return images.mean((1, 2, 3))


odd.takes_videos = "yes"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda videos: score_samples(silent, videos, PROMPTS, {}), r"a score of each of 12 frames, .*got \(\)"),
        (lambda videos: load_reward(odd), "takes_videos of function: expected True or False, got 'yes'"),
        (lambda videos: load_reward(curved, reward_frames=7)(videos, PROMPTS), "at most the video's 6 frames"),
        (lambda videos: load_reward(curved, reward_frames=2)(videos[0], PROMPTS), "expected videos, got images"),
        (
            lambda videos: load_reward(load_reward(curved, offload=True), reward_frames=2),
            "expected no reward_frames for a sum",
        ),
        (lambda videos: check_reward_frames(2, FluxPipeline, None), "2: FluxPipeline makes images, not videos"),
        (lambda videos: check_reward_frames(9, WanPipeline, 5), "9: a video has 5 frames"),
        (
            lambda videos: check_videos([load_reward(curved), load_reward(moving)], FluxPipeline, None),
            "reward 'moving': it takes videos, but FluxPipeline makes images",
        ),
        (lambda videos: check_videos([load_reward(moving)], WanPipeline, 2), "every reward takes whole videos"),
    ],
)
def test_what_does_not_fit_is_refused(videos: torch.Tensor, call: Callable[[torch.Tensor], Any], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        call(videos)
    assert "\n" not in str(caught.value)


def test_pipelines_of_videos_are_known_by_their_call():
    made = (WanPipeline, WanVideoToVideoPipeline, SanaVideoPipeline)
    assert all(map(makes_videos, made)) and not any(map(makes_videos, (FluxPipeline, StableDiffusion3Pipeline)))
    check_videos([load_reward(curved), load_reward(moving)], WanPipeline, 2)
    check_reward_frames(5, WanPipeline, 5)


@pytest.mark.parametrize("samples_per_decode", [None, 1])
def test_the_engine_sends_back_the_gradient_of_the_chosen_frames(samples_per_decode: int | None):
    """Through `FlowBPCallback.backward`, against the mean written out as a graph of the whole video."""
    pipe = tiny_wan_pipeline()
    pipe.transformer.requires_grad_(True)
    call = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 16}
    rewards = {
        "frames": (load_reward(make_held_out_reward(), reward_frames=2), of_frames([0, 4], make_held_out_reward())),
        "all frames": (make_held_out_reward(), of_frames(range(5), make_held_out_reward())),
        "whole": (Motion(), moving),
    }
    for reward, expected in rewards.values():
        found = []
        for is_function in (True, False):
            callback = FlowBPCallback(get_method("draft-k", last_k=1), samples_per_decode=samples_per_decode)
            with callback.record(pipe):
                noise = torch.Generator().manual_seed(0)
                videos = pipe(PROMPTS, generator=noise, output_type="pt", **call).frames
            arguments = (reward, videos, PROMPTS) if is_function else (expected(videos, PROMPTS),)
            out = callback.backward(*arguments)
            gradients = [each.grad.flatten() for each in pipe.transformer.parameters() if each.grad is not None]
            found.append((out.rewards, torch.cat(gradients)))
            pipe.transformer.zero_grad()
        (scores, gradient), (expected_scores, expected_gradient) = found
        torch.testing.assert_close(scores, expected_scores)
        assert expected_gradient.norm() > 0
        assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
