# Copyright 2026 The FlowBP for diffusers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Pictures as files, and what is measured of them."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny_sd3 import MAX_SEQUENCE_LENGTH, tiny_sd3_pipeline

from flowbp.judging.images import draw_pictures, score_pictures, to_pil
from flowbp.rewards import load_reward
from flowbp.training.training_utils import make_generator


def test_pictures_are_those_of_the_pipelines_and_of_videos_the_middle_frames():
    images = torch.rand(2, 3, 4, 6)
    found = [np.asarray(image) for image in to_pil(images)]
    assert [image.shape for image in found] == [(4, 6, 3)] * 2
    expected = (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    assert all(np.array_equal(image, other) for image, other in zip(found, expected, strict=True))

    videos = torch.rand(2, 5, 3, 4, 6)
    of_middle = [image.tobytes() for image in to_pil(videos[:, 2])]
    assert [image.tobytes() for image in to_pil(videos)] == of_middle


def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    assert images.shape[1] == 3 and len(prompts) == len(images)
    return images[:, 0].mean((1, 2))


def test_of_videos_the_mean_over_the_frames_counts():
    videos = torch.rand(2, 5, 3, 4, 6)
    assert torch.allclose(score_pictures(redness, videos, ["a", "b"]), videos[:, :, 0].mean((1, 2, 3)))
    assert torch.equal(score_pictures(redness, videos[:, 0], ["a", "b"]), redness(videos[:, 0], ["a", "b"]))


@pytest.mark.parametrize("values", [(-0.01, 1.0), (0.0, 1.01)])
def test_pictures_outside_their_range_are_refused(values: tuple[float, float]):
    images = torch.tensor(values).repeat(1, 3, 2, 1)
    with pytest.raises(ValueError, match=r"Expected pictures in \[0, 1\], the pipeline made values from"):
        score_pictures(redness, images, ["a"])


def test_a_picture_that_is_not_finite_has_no_score_and_ends_nothing():
    reward = load_reward("toy_reward:make_reward:2,toy_reward:make_held_out_reward:1")
    module = torch.nn.Identity()

    def sample(prompt: str, generator: torch.Generator) -> torch.Tensor:
        picture = module(torch.rand(1, 3, 8, 8, generator=generator))
        return picture.fill_(torch.nan) if prompt == "b" or (prompt == "a" and picture[0, 0, 0, 0] > 0.5) else picture

    def noise(number: int) -> torch.Generator:
        # The first pixels of the seeds 0 and 1 are 0.50 and 0.76.
        return torch.Generator().manual_seed(number)

    drawn = draw_pictures(Accelerator(cpu=True), module, ["a", "b", "c"], noise, 2, sample, {"sum": reward})
    found = [[score == score for score in scores] for scores in drawn.scores.values()]
    assert len(found) == 3 and all(finite == [True, False, False, False, True, True] for finite in found)
    assert len(drawn.images) == 6 and drawn.diversity > 0 and drawn.high_frequency > 0 and 0 <= drawn.saturated < 1
    assert drawn.velocity_norm > 0
    drawn = draw_pictures(Accelerator(cpu=True), module, ["b"], noise, 2, sample, {"sum": reward})
    assert all(score != score for score in drawn.scores["sum"]) and drawn.diversity != drawn.diversity


def test_pictures_are_drawn_one_by_one_from_their_own_noise():
    pipe = tiny_sd3_pipeline()
    call = {"num_inference_steps": 3, "height": 8, "width": 8, "output_type": "pt"}
    call["max_sequence_length"] = MAX_SEQUENCE_LENGTH

    def sample(prompt: str, generator: torch.Generator) -> torch.Tensor:
        return pipe(prompt, generator=generator, **call).images

    def noise(number: int) -> torch.Generator:
        return make_generator("evaluation", 7, number)

    reward = load_reward("toy_reward:make_reward:2,toy_reward:make_held_out_reward:1")
    judges = {"sum": reward, "held out": load_reward("toy_reward:make_held_out_reward")}
    drawn = draw_pictures(Accelerator(cpu=True), pipe.transformer, ["a", "b", "c"], noise, 2, sample, judges)
    expected = torch.cat([sample(prompt, noise(number)) for number, prompt in enumerate("aabbcc")]).detach().float()
    assert [image.tobytes() for image in drawn.images] == [image.tobytes() for image in to_pil(expected)]
    red = expected[:, 0] - expected[:, 1:].mean(1)
    bright = expected.flatten(1).mean(1)
    assert drawn.scores.keys() == {"sum", "toy_reward:make_reward", "toy_reward:make_held_out_reward", "held out"}
    assert drawn.scores["toy_reward:make_reward"] == pytest.approx(red.flatten(1).mean(1).tolist(), abs=1e-6)
    assert drawn.scores["held out"] == pytest.approx(bright.tolist(), abs=1e-6)
    both = (2 * red.flatten(1).mean(1) + bright).tolist()
    assert drawn.scores["sum"] == pytest.approx(both, abs=1e-6)
    assert drawn.velocity_norm > 0 and drawn.diversity > 0 and 0 <= drawn.saturated < 1
    one = draw_pictures(Accelerator(cpu=True), pipe.transformer, ["a"], noise, 1, sample, judges)
    assert one.diversity is None and one.images[0].tobytes() == drawn.images[0].tobytes()
