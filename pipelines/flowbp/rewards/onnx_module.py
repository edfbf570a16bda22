# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Runs a small ONNX graph with torch operations, so that a recogniser that ships as `.onnx` has gradients.

Only the operations (and their attributes) of the PP-OCR recognition graphs are supported; anything else is refused
when the file is loaded. Reading the file is plain protobuf parsing and executes no code.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv(x, weight, bias=None, *, kernel_shape, strides, pads, dilations, group):
    return F.conv2d(x, weight, bias, strides, _symmetric(pads), dilations, group)


def _average_pool(x, *, kernel_shape, strides, pads, ceil_mode=0, count_include_pad=0):
    return F.avg_pool2d(x, kernel_shape, strides, _symmetric(pads), bool(ceil_mode), bool(count_include_pad))


def _symmetric(pads: list[int]) -> list[int]:
    half = len(pads) // 2
    if pads[:half] != pads[half:]:
        raise ValueError(f"pads: expected the same padding on both sides, got {pads}")
    return pads[:half]


def _batch_norm(x, scale, bias, mean, variance, *, epsilon, momentum=0.9):
    return F.batch_norm(x, mean, variance, scale, bias, training=False, eps=epsilon)


def _cast(x, *, to):
    # Only shapes are cast in these graphs: 6 and 7 are ONNX's int32 and int64.
    if to not in (6, 7):
        raise ValueError(f"Cast: expected the target type 6 or 7 (integers), got {to}")
    return x.long()


def _slice(x, starts, ends, axes, steps=None):
    index = [slice(None)] * x.ndim
    steps = [1] * len(starts) if steps is None else steps.tolist()
    for start, end, axis, step in zip(starts.tolist(), ends.tolist(), axes.tolist(), steps, strict=True):
        index[axis] = slice(start, end, step)
    return x[tuple(index)]


def _reshape(x, shape):
    # A 0 keeps the input's size at that place.
    return x.reshape([x.shape[place] if size == 0 else size for place, size in enumerate(shape.tolist())])


def _squeeze(x, *, axes):
    return x.squeeze(tuple(axes))


def _unsqueeze(x, *, axes):
    for axis in sorted(axes):
        x = x.unsqueeze(axis)
    return x


def _softmax(x, *, axis):
    # Before opset 13 a softmax runs over all axes from `axis` on; the two readings agree on the last axis.
    if axis not in (-1, x.ndim - 1):
        raise ValueError(f"Softmax: expected the last axis, got {axis} of {x.ndim}")
    return x.softmax(-1)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "Add": lambda a, b: a + b,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": lambda x, low, high: x.clamp(low, high),
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Conv": _conv,
    "Div": lambda a, b: a / b,
    "GlobalAveragePool": lambda x: x.mean((2, 3), keepdim=True),
    "HardSigmoid": lambda x, *, alpha, beta: (x * alpha + beta).clamp(0, 1),
    "Identity": lambda x: x,
    "MatMul": lambda a, b: a @ b,
    "Mul": lambda a, b: a * b,
    "Pow": lambda a, b: a**b,
    "ReduceMean": lambda x, *, axes, keepdims=1: x.mean(axes, keepdim=bool(keepdims)),
    "Relu": lambda x: x.relu(),
    "Reshape": _reshape,
    "Shape": lambda x: torch.tensor(x.shape),
    "Sigmoid": lambda x: x.sigmoid(),
    "Slice": _slice,
    "Softmax": _softmax,
    "Sqrt": lambda x: x.sqrt(),
    "Squeeze": _squeeze,
    "Sub": lambda a, b: a - b,
    "Transpose": lambda x, *, perm: x.permute(perm),
    "Unsqueeze": _unsqueeze,
}


@dataclass
class _Step:
    operation: str
    function: Callable[..., Any]
    inputs: list[str]
    output: str


class OnnxModule(nn.Module):
    """An ONNX graph with one input and one output as a module: `module(x)`, differentiable in `x`, weights frozen.

    Weights are buffers, so `.to(device, dtype)` works; `x` must have their dtype and device. Values that only depend
    on constants are computed once, hard swish runs as one operation, and values are freed after their last use.
    `metadata` has the file's own key-value pairs.

    Args:
        path: the `.onnx` file (opset 10 to 12, weights inside the file).
        logits: return what goes into the graph's final softmax instead of what comes out of it.

    Raises:
        ValueError: another opset, an operation, attribute or number of outputs that this module does not know, or
            `logits` for a graph that does not end in a softmax.
    """

    def __init__(self, path: str | Path, logits: bool = False) -> None:
        import onnx

        super().__init__()
        model = onnx.load(str(path), load_external_data=False)
        graph = model.graph
        opsets = {opset.domain: opset.version for opset in model.opset_import}
        if set(opsets) != {""} or not 10 <= opsets[""] <= 12:
            raise ValueError(
                f"{path}: expected ONNX opset 10, 11 or 12 alone, got {opsets}; export it with one of these."
            )
        constants = {item.name: _to_tensor(onnx, item) for item in graph.initializer}
        inputs = [item.name for item in graph.input if item.name not in constants]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise ValueError(f"{path}: expected one input and one output, got {len(inputs)} and {len(graph.output)}.")
        steps: list[_Step] = []
        alias: dict[str, str] = {}  # outputs of Identity nodes
        for node in graph.node:
            attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
            if node.op_type == "Constant" and set(attributes) == {"value"}:
                constants[node.output[0]] = _to_tensor(onnx, attributes["value"])
                continue
            names, function = [alias.get(name, name) for name in node.input], _bind(path, node, attributes)
            if node.op_type == "Identity":
                alias[node.output[0]] = names[0]
            elif all(name in constants for name in names):
                constants[node.output[0]] = function(*[constants[name] for name in names])
            else:
                steps.append(_Step(node.op_type, function, names, node.output[0]))
        self.input, self.output = inputs[0], alias.get(graph.output[0].name, graph.output[0].name)
        if logits:
            last = steps.pop()
            if last.operation != "Softmax" or last.output != self.output:
                raise ValueError(f"{path}: logits=True needs a graph that ends in a Softmax, got {last.operation}.")
            self.output = last.inputs[0]
        self.metadata = {item.key: item.value for item in model.metadata_props}
        self._steps, self._dead = _plan(_fuse_hard_swish(steps, constants), self.output)
        self._fixed: dict[str, Any] = {}  # shapes and indices (they stay on the CPU) and single numbers
        self._buffer_of: dict[str, str] = {}
        for name in sorted({name for step in self._steps for name in step.inputs} & set(constants)):
            value = constants[name]
            if not value.is_floating_point():
                self._fixed[name] = value
            elif value.numel() == 1:
                self._fixed[name] = value.item()
            else:
                self._buffer_of[name] = f"weight_{len(self._buffer_of)}"
                self.register_buffer(self._buffer_of[name], value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the graph's output for `x`, whose dtype and device are those of the weights."""
        values = {**self._fixed, self.input: x}
        values.update((name, getattr(self, buffer)) for name, buffer in self._buffer_of.items())
        for step, dead in zip(self._steps, self._dead, strict=True):
            values[step.output] = step.function(*[values[name] for name in step.inputs])
            for name in dead:
                del values[name]
        return values[self.output]


def _plan(steps: list[_Step], output: str) -> tuple[list[_Step], list[list[str]]]:
    """The steps that `output` needs and, for each, the values that nobody reads after it."""
    needed: list[_Step] = []
    dead: list[list[str]] = []
    read = {output}
    for step in reversed(steps):
        if step.output in read:
            needed.append(step)
            dead.append(sorted(set(step.inputs) - read))
            read.update(step.inputs)
    return needed[::-1], dead[::-1]


def _fuse_hard_swish(steps: list[_Step], constants: dict[str, Tensor]) -> list[_Step]:
    """Writes x clip(x + 3, 0, 6) / 6 (PP-OCRv4) and x HardSigmoid(x) (v5) as one operation, which takes a third off
    the time of a forward and backward pass. The steps that this leaves without a reader stay."""
    made = {step.output: step for step in steps}
    return [
        step if (x := _hard_swish_input(step, made, constants)) is None else _Step("", F.hardswish, [x], step.output)
        for step in steps
    ]


def _hard_swish_input(step: _Step, made: dict[str, _Step], constants: dict[str, Tensor]) -> str | None:
    """x, if the step is the last of a hard swish of x, else None."""

    def numbers(names: list[str]) -> list[float]:
        return [constants[name].item() for name in names if name in constants and constants[name].numel() == 1]

    def gated(product: _Step | None, operation: str) -> tuple[str, _Step] | tuple[None, None]:
        """(x, the step that makes g) if the product is x * g and the operation makes g."""
        if product is not None and product.operation == "Mul":
            for x, g in (product.inputs, product.inputs[::-1]):
                if g in made and made[g].operation == operation:
                    return x, made[g]
        return None, None

    x, gate = gated(step, "HardSigmoid")
    if gate is not None and gate.inputs == [x]:
        given = gate.function.keywords
        # The files have 1/6 rounded in two ways, 0.16666667 and 0.16666670.
        return x if abs(given["alpha"] - 1 / 6) < 1e-6 and given["beta"] == 0.5 else None
    if step.operation == "Div" and numbers(step.inputs[1:]) == [6]:
        x, gate = gated(made.get(step.inputs[0]), "Clip")
        if gate is not None and numbers(gate.inputs[1:]) == [0, 6]:
            shifted = made.get(gate.inputs[0])
            if shifted is not None and shifted.operation == "Add" and x in shifted.inputs:
                return x if numbers(shifted.inputs) == [3] else None
    return None


def _to_tensor(onnx, proto) -> Tensor:
    return torch.from_numpy(onnx.numpy_helper.to_array(proto).copy())


def _bind(path, node, attributes: dict[str, Any]) -> Callable[..., Any]:
    """The torch function of an ONNX node with its attributes filled in, checked against the function's signature."""
    function = OPERATIONS.get(node.op_type)
    if function is None or len(node.output) != 1:
        raise ValueError(
            f"{path}: expected the operations {', '.join(OPERATIONS)} with one output each, got {node.op_type} "
            f"(node {node.name or node.output[0]!r}); add it to OPERATIONS in {__name__}."
        )
    try:
        inspect.signature(function).bind(*node.input, **attributes)
    except TypeError as error:
        raise ValueError(f"{path}: {node.op_type} with inputs or attributes not supported here: {error}.") from None
    return partial(function, **attributes)
