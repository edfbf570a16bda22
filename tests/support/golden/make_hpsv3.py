# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Makes `hpsv3.json` and `hpsv3.safetensors`: what HPSv3's own code says, on a tiny Qwen2-VL.

The package hpsv3 1.0.0 and the transformers that it pins go into a folder of their own, never into the environment of
this repository:

    pip install --target SCRATCH --no-deps hpsv3==1.0.0 transformers==4.45.2 tokenizers==0.20.3 \
        huggingface_hub==0.30.2 torchvision==0.29.2
    python tests/support/golden/make_hpsv3.py SCRATCH

torch, numpy, Pillow, pandas and requests are this repository's. Run are the reference's `Qwen2VLRewardModelBT`, the
methods of its `HPSv3RewardInferencer` that prepare a batch and score it, and its resizing of pictures, unchanged; the
two classes are taken from the text of their files, because these import training code. Replaced are the sizes of the
model, the vocabulary, the chat template (a tiny one of the same form) and the wording of the question. Two compiled
operators of torchvision that nothing here calls are passed over.

The weights are not in the files: `random_weight` makes them from their names, here and in the test.
"""

import ast
import json
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from golden.make_imagereward import random_weight

FOLDER = Path(__file__).parent
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
BYTES = 256  # the vocabulary before the special tokens
VOCABULARY_SIZE = BYTES + len(SPECIAL) + 1  # and the reward token
# In the layout of the public `config.json` of Qwen2-VL.
CONFIG = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "vocab_size": 300,  # the public one, too, is larger than the tokenizer's
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "hidden_act": "silu",
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "bos_token_id": BYTES,
    "eos_token_id": BYTES + 2,
    "vision_start_token_id": BYTES + 3,
    "vision_end_token_id": BYTES + 4,
    "image_token_id": BYTES + 5,
    "video_token_id": VOCABULARY_SIZE + 1,  # there is none
    "vision_config": {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 2,
        "mlp_ratio": 2,
        "in_chans": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = "Rate this: {prompt}\n Score: <|Reward|>\nEND\n"
PROMPTS = ["two cats", "a dog, somewhat larger, in fog"]


def byte_vocabulary() -> dict[str, int]:
    """A byte-level vocabulary without merges: one token a byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    return {character: number for number, character in enumerate(sorted(ByteLevel.alphabet()))}


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """`random_weight` in float32."""
    return random_weight(name, shape).float()


def take(file: Path, name: str, namespace: dict[str, object]) -> type:
    """The class of that name from a Python file, run with the names that it needs and nothing else of the file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (node,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    exec(compile(ast.Module([node], []), str(file), "exec"), namespace)
    return namespace[name]


def main(scratch: str) -> None:
    """Runs the reference in `scratch` and writes both files."""
    sys.path.insert(0, scratch)
    operators = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        operators.define(f"{operator}(Tensor boxes, Tensor scores, float threshold) -> Tensor")

    package = Path(scratch, "hpsv3")
    module = types.ModuleType("hpsv3")  # without its __init__, which imports training code
    module.__path__ = [str(package)]
    sys.modules["hpsv3"] = module

    from collections.abc import Mapping

    import transformers
    from hpsv3.dataset.utils import process_vision_info
    from PIL import Image
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(byte_vocabulary()))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        Path(folder, "config.json").write_text(json.dumps(CONFIG))
        tokenizer = transformers.Qwen2Tokenizer(
            str(Path(folder, "vocab.json")), str(Path(folder, "merges.txt")), padding_side="right"
        )
        config = transformers.AutoConfig.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    processor = transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(), tokenizer, chat_template=CHAT_TEMPLATE
    )
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    assert len(processor.tokenizer) == VOCABULARY_SIZE

    model_class = take(
        package / "model" / "qwen2vl_trainer.py",
        "Qwen2VLRewardModelBT",
        {
            "torch": torch,
            "nn": torch.nn,
            "Qwen2VLForConditionalGeneration": transformers.Qwen2VLForConditionalGeneration,
            **{name: __import__("typing").__dict__[name] for name in ("Optional", "List")},
        },
    )
    # The constants of `hpsv3/config/HPSv3_7B.yaml`.
    reward_token = processor.tokenizer.convert_tokens_to_ids(["<|Reward|>"])
    model = model_class(config, 2, "special", reward_token, "ranknet")
    model.resize_token_embeddings(VOCABULARY_SIZE)
    model.config.pad_token_id = processor.tokenizer.pad_token_id
    weights = {name: weight(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights)

    before, after = QUESTION.split("\n", 1)
    inferencer_class = take(
        package / "inference.py",
        "HPSv3RewardInferencer",
        {
            "torch": torch,
            "Mapping": Mapping,
            "process_vision_info": process_vision_info,
            "INSTRUCTION": before.replace("{prompt}", "{text_prompt}") + "\n",
            "prompt_with_special_token": after,
            "prompt_without_special_token": "",
        },
    )
    inferencer = inferencer_class.__new__(inferencer_class)
    vars(inferencer).update(model=model.eval(), processor=processor, device="cpu", use_special_tokens=True)

    generator = np.random.RandomState(1)
    pictures = [generator.randint(0, 256, size, dtype=np.uint8) for size in ((40, 56, 3), (40, 56, 3))]
    images = [Image.fromarray(picture) for picture in pictures]
    batch = inferencer.prepare_batch(images, PROMPTS)
    with torch.no_grad():
        scores = inferencer.reward(images, PROMPTS)
    arrays = {
        "pictures": torch.from_numpy(np.stack(pictures)),
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "image_grid_thw": batch["image_grid_thw"],
        "pixel_values": batch["pixel_values"][::97],  # a sample of the rows
        "scores": scores,  # the mean, and the logarithm of the deviation
    }
    save_file({name: tensor.contiguous() for name, tensor in arrays.items()}, FOLDER / "hpsv3.safetensors")
    layout = ",\n".join(f"{json.dumps(name)}: {json.dumps(list(tensor.shape))}" for name, tensor in weights.items())
    (FOLDER / "hpsv3.json").write_text(f"{{\n{layout}\n}}\n")


if __name__ == "__main__":
    main(sys.argv[1])
