# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Makes `imagereward.json` and `imagereward.safetensors`: what ImageReward's own modules say, on a tiny model.

The package image-reward 1.5 and what it was written for go into a folder of their own, never into the environment
of this repository:

    pip install --target SCRATCH --no-deps image-reward==1.5 timm==0.6.13 fairscale==0.4.13 transformers==4.45.2 \
        tokenizers==0.20.3 huggingface_hub==0.30.2 torchvision==0.29.2
    python tests/support/golden/make_imagereward.py SCRATCH

torch, numpy and Pillow are this repository's. Run are the reference's constructor, tokenizer, preprocessing, `score`
and `score_gard`, unchanged; replaced are the sizes of the vision transformer and of BERT, the 224 pixels, and the
vocabulary that would be downloaded. Passed over are the `__init__` files of the package, which import training code,
and two compiled operators of torchvision that nothing here calls.

The weights are not in the files: `random_weight` makes them from their names, here and in the test.
"""

import json
import sys
import tempfile
import types
import zlib
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent
IMAGE_SIZE = 32
VISION = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "add_cross_attention": True,
}
WORDS = "a photo of the red blue cat dog and on table ##s big old , . two".split()
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
PROMPTS = [
    "A photo of two cats, and a blue dog.",
    "the old table",
    "a big red dog " * 20,  # longer than 35 tokens
]


def random_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A float64 weight that depends on its name and shape alone, with outputs of order 1.

    NumPy promises that `RandomState` gives the same numbers in every version.
    """
    numbers = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1:
        is_scale = name.endswith("weight")  # of a layer normalisation
        numbers = 0.1 * numbers + is_scale
    elif name.endswith(("cls_token", "pos_embed")):
        numbers = 0.5 * numbers
    else:
        numbers = numbers / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(numbers)


def main(scratch: str) -> None:
    """Runs the reference in `scratch` and writes both files."""
    sys.path.insert(0, scratch)
    operators = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        operators.define(f"{operator}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    for package in ("ImageReward", "ImageReward.models"):
        module = types.ModuleType(package)
        module.__path__ = [str(Path(scratch, *package.split(".")))]
        sys.modules[package] = module

    from ImageReward import ImageReward as reference
    from ImageReward.models.BLIP import blip, blip_pretrain, vit
    from PIL import Image
    from safetensors.torch import save_file
    from transformers import BertTokenizer

    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocab.txt"
        vocabulary.write_text("\n".join(VOCABULARY) + "\n")
        blip.BertTokenizer = types.SimpleNamespace(from_pretrained=lambda _: BertTokenizer(str(vocabulary)))
        transformer = vit.VisionTransformer(img_size=IMAGE_SIZE, **VISION)
        blip_pretrain.create_vit = lambda *_: (transformer, VISION["embed_dim"])
        med_config = Path(folder) / "med_config.json"
        med_config.write_text(json.dumps({**TEXT, "vocab_size": len(VOCABULARY) + 2}))
        # The head's constructor has BERT's width in it.
        make_head, reference.MLP = reference.MLP, lambda _: make_head(TEXT["hidden_size"])
        model = reference.ImageReward(str(med_config)).double().eval()
    model.preprocess = reference._transform(IMAGE_SIZE)
    weights = {
        name: tensor if name.endswith("position_ids") else random_weight(name, tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(weights)

    # Pictures of the model's size: nothing is resized, so the gradient is that of the model and the normalisation.
    generator = np.random.RandomState(0)
    images = torch.from_numpy(generator.rand(len(PROMPTS), 3, IMAGE_SIZE, IMAGE_SIZE)).float().double()
    images.requires_grad_()
    tokens = model.blip.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    normalize = model.preprocess.transforms[-1]
    scores = model.score_gard(tokens.input_ids, tokens.attention_mask, normalize(images)).squeeze(-1)
    (gradient,) = torch.autograd.grad(scores.sum(), images)

    # 8-bit pictures of another size through everything the reference does to a picture.
    pictures = generator.randint(0, 256, (len(PROMPTS), 50, 70, 3), dtype=np.uint8)
    model.preprocess.transforms.append(lambda pixels: pixels.double())
    model.mlp.double()
    head = model.mlp.forward
    model.mlp.forward = lambda features: head(features.double())  # `score` makes them float32
    whole = [model.score(prompt, Image.fromarray(picture)) for prompt, picture in zip(PROMPTS, pictures, strict=True)]

    arrays = {
        "images": images.detach().float(),
        "scores": scores.detach(),
        "gradient": gradient.float(),
        "input_ids": tokens.input_ids,
        "attention_mask": tokens.attention_mask,
        "pictures": torch.from_numpy(pictures),
        "picture_scores": torch.tensor(whole, dtype=torch.float64),
    }
    save_file({name: tensor.contiguous() for name, tensor in arrays.items()}, FOLDER / "imagereward.safetensors")
    layout = ",\n".join(f"{json.dumps(name)}: {json.dumps(list(tensor.shape))}" for name, tensor in weights.items())
    (FOLDER / "imagereward.json").write_text(f"{{\n{layout}\n}}\n")


if __name__ == "__main__":
    main(sys.argv[1])
