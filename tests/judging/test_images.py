# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Images, their scores and their measurements."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny_sd3 import MAX_SEQUENCE_LENGTH, tiny_sd3_pipeline

from flowbp.judging.images import draw_images, score_images, to_pil
from flowbp.rewards import load_reward


def test_pil_images_are_the_pipelines_and_of_videos_the_middle_frames():
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


def test_the_score_of_a_video_is_the_mean_over_its_frames():
    videos = torch.rand(2, 5, 3, 4, 6)
    assert torch.allclose(score_images(redness, videos, ["a", "b"], {}), videos[:, :, 0].mean((1, 2, 3)))
    assert torch.equal(score_images(redness, videos[:, 0], ["a", "b"], {}), redness(videos[:, 0], ["a", "b"]))


@pytest.mark.parametrize("values", [(-0.01, 1.0), (0.0, 1.01)])
def test_images_outside_their_range_are_refused(values: tuple[float, float]):
    images = torch.tensor(values).repeat(1, 3, 2, 1)
    with pytest.raises(ValueError, match=r"images in \[0, 1\], got values from"):
        score_images(redness, images, ["a"], {})


def test_an_image_that_is_not_finite_has_no_score_and_does_not_stop_the_run():
    reward = load_reward("toy_reward:make_reward:2,toy_reward:make_held_out_reward:1")
    module = torch.nn.Identity()

    def sample(place: int, generator: torch.Generator) -> torch.Tensor:
        image = module(torch.rand(1, 3, 8, 8, generator=generator))
        return image.fill_(torch.nan) if place == 1 or (place == 0 and image[0, 0, 0, 0] > 0.5) else image

    def noise(number: int) -> torch.Generator:
        # The first pixels of the seeds 0 and 1 are 0.50 and 0.76.
        return torch.Generator().manual_seed(number)

    drawn = draw_images(Accelerator(cpu=True), module, ["a", "b", "c"], noise, 2, sample, {"sum": reward})
    found = [[score == score for score in scores] for scores in drawn.scores.values()]
    assert len(found) == 3 and all(finite == [True, False, False, False, True, True] for finite in found)
    assert len(drawn.images) == 6 and drawn.diversity > 0 and drawn.high_frequency > 0 and 0 <= drawn.saturated < 1
    assert drawn.velocity_norm > 0
    drawn = draw_images(
        Accelerator(cpu=True), module, ["b"], noise, 2, lambda place, generator: sample(1, generator), {"sum": reward}
    )
    assert all(score != score for score in drawn.scores["sum"]) and drawn.diversity != drawn.diversity


def test_images_are_drawn_one_by_one_from_their_own_noise():
    pipe = tiny_sd3_pipeline()
    call = {"num_inference_steps": 3, "height": 8, "width": 8, "output_type": "pt"}
    call["max_sequence_length"] = MAX_SEQUENCE_LENGTH

    prompts = ["a", "b", "c"]

    def sample(place: int, generator: torch.Generator) -> torch.Tensor:
        return pipe(prompts[place], generator=generator, **call).images

    def noise(number: int) -> torch.Generator:
        return torch.Generator().manual_seed(number)

    reward = load_reward("toy_reward:make_reward:2,toy_reward:make_held_out_reward:1")
    judges = {"sum": reward, "held out": load_reward("toy_reward:make_held_out_reward")}
    counts: list[int] = []
    accelerator = Accelerator(cpu=True)
    drawn = draw_images(accelerator, pipe.transformer, prompts, noise, 2, sample, judges, counts.append)
    assert counts == [2, 2, 2]
    expected = torch.cat([sample(place, noise(number)) for number, place in enumerate([0, 0, 1, 1, 2, 2])])
    expected = expected.detach().float()
    assert [image.tobytes() for image in drawn.images] == [image.tobytes() for image in to_pil(expected)]
    red = expected[:, 0] - expected[:, 1:].mean(1)
    bright = expected.flatten(1).mean(1)
    assert drawn.scores.keys() == {"sum", "toy_reward:make_reward", "toy_reward:make_held_out_reward", "held out"}
    assert drawn.scores["toy_reward:make_reward"] == pytest.approx(red.flatten(1).mean(1).tolist(), abs=1e-6)
    assert drawn.scores["held out"] == pytest.approx(bright.tolist(), abs=1e-6)
    both = (2 * red.flatten(1).mean(1) + bright).tolist()
    assert drawn.scores["sum"] == pytest.approx(both, abs=1e-6)
    assert drawn.velocity_norm > 0 and drawn.diversity > 0 and 0 <= drawn.saturated < 1
    one = draw_images(accelerator, pipe.transformer, ["a"], noise, 1, sample, judges)
    assert one.diversity is None and one.images[0].tobytes() == drawn.images[0].tobytes()
