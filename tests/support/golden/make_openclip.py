# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Makes openclip.safetensors: scores and image gradients of a tiny OpenCLIP model with random weights.

OpenCLIP computes them (for HPSv2.1, CLIP, PickScore), and on top of it a head in the layout of LAION's predictor. Both
packages go to a folder of their own, not into the environment of the tests:

    pip install --no-deps --target /tmp/openclip open_clip_torch==3.3.0 timm==1.0.31 torchvision==0.29.2 ftfy==6.3.1 \\
        regex==2026.11.15 wcwidth==0.9.4
    PYTHONPATH=/tmp/openclip python tests/support/golden/make_openclip.py

torchvision's compiled operators do not load beside a CPU build of torch; none of them is used.
"""

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

# torchvision's import registers functions for these two operators, which its compiled part would define.
library = torch.library.Library("torchvision", "DEF")
for operator in ("nms(Tensor a, Tensor b, float c) -> Tensor", "qnms(Tensor a, Tensor b, float c) -> Tensor"):
    library.define(operator)

from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg  # noqa: E402
from open_clip.transform import PreprocessCfg, image_transform_v2  # noqa: E402

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64).view(3, 1, 1)
SIZE, CONTEXT, LETTERS = 16, 16, "abcdefghijklmnopqrstuvwxyz"
START, END = 53, 54
# The third is longer than the context.
PROMPTS = ["a red dog", "cats", "many words that do not fit in it"]


def tokens(prompt: str) -> list[int]:
    """Ids of a vocabulary of letters: 1 to 26 inside a word, 27 to 52 at its end, 0 is padding."""
    ids = [START]
    for word in prompt.split():
        ids += [LETTERS.index(letter) + 1 for letter in word[:-1]] + [LETTERS.index(word[-1]) + 27]
    ids = [*ids, END]
    if len(ids) > CONTEXT:
        ids = [*ids[: CONTEXT - 1], END]
    return ids + [0] * (CONTEXT - len(ids))


def head_weight(number: int, *shape: int) -> torch.Tensor:
    """Numbers without a file: the head has 160,000 of them."""
    count = torch.Size(shape).numel()
    n = torch.arange(count, dtype=torch.float64)
    return (2 * torch.sin(number + 1.7 * n + 0.013 * n**2) / shape[-1] ** 0.5).view(shape).float()


def laion_head(width: int) -> torch.nn.Sequential:
    """The layers of LAION's predictor, dropout included, with `head_weight`'s numbers."""
    widths, dropout = [width, 1024, 128, 64, 16, 1], [0.2, 0.2, 0.1, None, None]
    layers: list[torch.nn.Module] = []
    for a, b, rate in zip(widths, widths[1:], dropout, strict=False):
        layers.append(torch.nn.Linear(a, b))
        if rate is not None:
            layers.append(torch.nn.Dropout(rate))
    head = torch.nn.Sequential(*layers)
    for number, parameter in enumerate(head.parameters()):
        parameter.data = head_weight(number, *parameter.shape)
    return head.eval()


def with_gradient(images: torch.Tensor, score) -> tuple[torch.Tensor, torch.Tensor]:
    images = images.double().requires_grad_()
    scores = score(images)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    return scores.detach(), gradient.float()


def main() -> None:
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=2, width=24, head_width=8, patch_size=4, image_size=SIZE)
    text = CLIPTextCfg(context_length=CONTEXT, vocab_size=55, width=16, heads=2, layers=2)
    model = CLIP(embed_dim=12, vision_cfg=vision, text_cfg=text, quick_gelu=False).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(0, 0.3)
        if "ln_" in name and name.endswith("weight"):
            parameter.add_(1)
    model.logit_scale.fill_(3.0)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    head = laion_head(12).double()
    model.double()
    texts = model.encode_text(torch.tensor([tokens(prompt) for prompt in PROMPTS]), normalize=True)

    def cosines(images: torch.Tensor) -> torch.Tensor:
        return (model.encode_image((images - MEAN) / STD, normalize=True) * texts).sum(-1)

    def padded(images: torch.Tensor) -> torch.Tensor:
        # The reference: half of the border before, rounded down, the rest after.
        canvas = images.new_zeros(len(images), 3, SIZE, SIZE)
        top, left = ((SIZE - side) // 2 for side in images.shape[2:])
        canvas[:, :, top : top + images.shape[2], left : left + images.shape[3]] = images
        return canvas

    out = {f"weights.{name}": tensor for name, tensor in weights.items()}
    for name, (height, width) in {"square": (16, 16), "tall": (16, 11), "wide": (13, 16)}.items():
        images = torch.rand(3, 3, height, width)
        out[f"{name}.images"] = images
        out[f"{name}.score"], out[f"{name}.gradient"] = with_gradient(images, lambda x: cosines(padded(x)))
    images = torch.rand(3, 3, 16, 21)
    out["crop.images"] = images
    out["crop.score"], out["crop.gradient"] = with_gradient(images, lambda x: cosines(x[..., 2:18]))
    out["aesthetic.score"], out["aesthetic.gradient"] = with_gradient(
        images,
        lambda x: head(model.encode_image((x[..., 2:18] - MEAN) / STD, normalize=True)).squeeze(-1),
    )
    # What the reference's own transform makes of 8-bit pictures.
    transform = image_transform_v2(PreprocessCfg(size=SIZE, resize_mode="longest", fill_color=0), is_train=False)
    for number, (height, width) in enumerate([(50, 37), (13, 90), (16, 16), (7, 9), (31, 32)]):
        smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 5, 5), (height, width), mode="bilinear")[0]
        picture = ((smooth + 0.3 * torch.rand(3, height, width)).clamp(0, 1) * 255).round().to(torch.uint8)
        out[f"picture{number}"] = picture
        out[f"pixels{number}"] = transform(Image.fromarray(picture.permute(1, 2, 0).numpy()))
    save_file(out, Path(__file__).with_name("openclip.safetensors"))


if __name__ == "__main__":
    main()
