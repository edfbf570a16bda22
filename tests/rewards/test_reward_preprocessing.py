# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Preprocessing of rewards against transformers' PIL image processors, OpenCLIP's transform and finite differences."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from safetensors.torch import load_file
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flowbp.rewards.clip import crop_short
from flowbp.rewards.openclip import crop_long
from flowbp.rewards.preprocessing import CLIP_MEAN, CLIP_STD, center_crop, check_images, normalize, pad, resize

STD = torch.tensor(CLIP_STD).view(3, 1, 1)
GOLDEN = Path(__file__).parents[1] / "support" / "golden" / "openclip.safetensors"


def random_picture(generator: np.random.Generator) -> Image.Image:
    """8-bit, of a random size and aspect ratio; noise, smooth colours, or sharp black and white edges."""
    width, height = (int(round(2 ** generator.uniform(4, 9))) for _ in range(2))
    kind = generator.integers(3)
    if kind == 0:
        values = generator.integers(0, 256, (height, width, 3))
    elif kind == 1:
        small = Image.fromarray(generator.integers(0, 256, (4, 4, 3)).astype(np.uint8))
        values = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))
    else:
        values = 255 * generator.integers(0, 2, (height // 4 + 1, width // 4 + 1, 3))
        values = values.repeat(4, 0).repeat(4, 1)[:height, :width]
    return Image.fromarray(values.astype(np.uint8))


def to_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def pillow_padded(picture: Image.Image, size: int) -> torch.Tensor:
    """HPSv2's preparation with Pillow alone: (3, size, size), normalised."""
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    canvas = Image.new("RGB", (size, size))
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    canvas.paste(resized, ((size - width) // 2, (size - height) // 2))
    return (to_tensor(canvas)[0] - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / STD


def test_agrees_with_the_image_processors_on_100_images():
    generator = np.random.default_rng(0)
    clip = CLIPImageProcessorPil()
    blip = BlipImageProcessorPil(size={"height": 224, "width": 224})
    worst = dict.fromkeys(("clip", "blip", "hps"), 0.0)
    for _ in range(100):
        picture = random_picture(generator)
        x = to_tensor(picture)
        for name, ours, theirs in (
            ("clip", crop_short(x, 224), clip(picture, return_tensors="pt")["pixel_values"][0]),
            ("blip", resize(x, 224, 224), blip(picture, return_tensors="pt")["pixel_values"][0]),
            ("hps", crop_long(x, 224), pillow_padded(picture, 224)),
        ):
            # In units of 1 / 255 / std.
            difference = (normalize(ours)[0] - theirs) * STD * 255
            worst[name] = max(worst[name], difference.abs().max().item())
    print({name: round(value, 3) for name, value in worst.items()})
    assert max(worst.values()) < 1.2, worst  # the bound is 2


def test_agrees_with_openclip_s_own_transform():
    golden = load_file(GOLDEN)
    for number in range(5):
        picture = golden[f"picture{number}"]
        ours = normalize(crop_long(picture[None].float() / 255, 16))[0]
        assert ((ours - golden[f"pixels{number}"]) * STD * 255).abs().max() < 1.2


def test_what_clamping_changes_of_a_gradient():
    """The numbers in docs/rewards.md: gradients through `hpsv2.1`'s preprocessing with and without clamping.

    The paper's training code resizes with torchvision, which does not clamp. Pixels at 0 or 1 are left out: pipelines
    clamp their images themselves, so that these have no gradient in either case.
    """
    with get_sample_data("grace_hopper.jpg") as file, Image.open(file) as picture:
        side = min(picture.size)
        square = picture.convert("RGB").crop((0, 0, side, side)).resize((512, 512), Image.Resampling.LANCZOS)
    photograph = to_tensor(square)
    differences = []
    for contrast in (0.8, 1, 2):
        image = ((photograph - 0.5) * contrast + 0.5).clamp(0, 1).requires_grad_()
        plain = torch.nn.functional.interpolate(image, (224, 224), mode="bicubic", antialias=True)
        upstream = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0))
        ours, theirs = (torch.autograd.grad(resized, image, upstream)[0] for resized in (crop_long(image, 224), plain))
        is_unclamped = (image > 0) & (image < 1)
        differences.append(((ours - theirs)[is_unclamped].norm() / theirs[is_unclamped].norm()).item())
    print([round(difference, 3) for difference in differences])
    assert differences == pytest.approx([0, 0.042, 0.093], rel=0.2, abs=1e-5)


def test_what_needs_no_resize_is_left_as_it_is():
    images = torch.rand(2, 3, 224, 224)
    assert torch.equal(crop_short(images, 224), images)
    assert torch.equal(crop_long(images, 224), images)
    assert torch.equal(resize(images.bfloat16(), 224, 224), images.bfloat16().float())


@pytest.mark.parametrize(("height", "width"), [(9, 9), (9, 14), (30, 11), (5, 1), (1, 40)])
def test_sizes_crops_and_borders(height, width):
    images = torch.ones(1, 3, height, width)
    assert crop_short(images, 8).shape == crop_long(images, 8).shape == (1, 3, 8, 8)
    torch.testing.assert_close(crop_short(images, 8), torch.ones(1, 3, 8, 8))
    # The border is black, and at most one wider at the end.
    rows, columns = (crop_long(images, 8)[0, 0].amax(axis) > 0.5 for axis in (1, 0))
    for inside in (rows, columns):
        before, after = inside.int().argmax().item(), inside.flip(0).int().argmax().item()
        assert after - before in (0, 1) and inside.sum() == 8 - before - after


def test_odd_margins():
    images = torch.arange(7.0).expand(1, 3, 4, 7)
    assert center_crop(images, 4)[0, 0, 0].tolist() == [1, 2, 3, 4]
    assert pad(images[..., :3] + 1, 4)[0, 0, 0].tolist() == [1, 2, 3, 0]
    assert pad(images + 1, 10)[0, 0, :, 3].tolist() == [0, 0, 0, 3, 3, 3, 3, 0, 0, 0]


@pytest.mark.parametrize("crop", [crop_short, crop_long])
def test_gradients_agree_with_finite_differences(crop):
    generator = torch.Generator().manual_seed(0)
    # Smooth, so that nothing overshoots [0, 1], where the cut has a kink.
    images = torch.rand(2, 3, 3, 3, generator=generator, dtype=torch.float64)
    images = torch.nn.functional.interpolate(0.3 + 0.4 * images, (7, 10), mode="bilinear").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: normalize(crop(x, 5)), images)
    assert torch.autograd.gradcheck(lambda x: normalize(crop(x, 12)), images)


def test_dtypes():
    images = torch.rand(1, 3, 20, 30)
    expected = resize(images, 8, 8)
    assert resize(images.double(), 8, 8).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resize(images, 8, 8), expected)
    for dtype in (torch.bfloat16, torch.float16):
        half = images.to(dtype).requires_grad_()
        small = resize(half, 8, 8)
        assert small.dtype == torch.float32
        small.sum().backward()
        assert half.grad.dtype == dtype and (half.grad != 0).all()
        torch.testing.assert_close(small, expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (torch.rand(3, 8, 8), None, "expected a float tensor (B, 3, H, W), got (3, 8, 8)"),
        (torch.rand(1, 4, 8, 8), None, "got (1, 4, 8, 8)"),
        (torch.rand(0, 3, 8, 8), None, "got (0, 3, 8, 8)"),
        (torch.ones(1, 3, 8, 8, dtype=torch.uint8), None, "of torch.uint8"),
        (torch.full((1, 3, 8, 8), 1.01), None, "expected finite values in [0, 1], got 1.01 to 1.01"),
        (torch.full((1, 3, 8, 8), -0.5), None, "got -0.5 to -0.5"),
        (torch.full((1, 3, 8, 8), float("nan")), None, "got nan to nan"),
        (torch.full((1, 3, 8, 8), float("inf")), None, "got inf to inf"),
        (torch.rand(2, 3, 8, 8), ["one"], "prompts: expected a list of 2, one per image, got 1"),
        (torch.rand(2, 3, 8, 8), "ab", "got one string"),
    ],
)
def test_bad_input_is_refused(images, prompts, message):
    with pytest.raises(ValueError) as error:
        check_images(images, prompts)
    assert message in str(error.value) and "\n" not in str(error.value)
