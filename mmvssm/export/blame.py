"""Finds the first layer whose output differs between PyTorch and a graph."""

import ast
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

_SCOPES = 'pkg.torch.onnx.name_scopes'


def first_difference(
    traced: Any, module: nn.Module, image: np.ndarray, bound: float
) -> str | None:
    """Name of the first layer whose output differs.

    Args:
        traced: The ``onnx.ModelProto`` as torch's exporter made it: its nodes say what
            layer they are of.
        module: What it was exported from.
        image: To run both on.
        bound: Allowed difference, relative to the largest value of the output.

    Returns:
        The name of a layer of ``module``, in the order in which they finish, or None if
        it is not found.
    """
    import onnx
    import onnxruntime

    wanted = _outputs_of_layers(module, image)
    last = _last_values(traced.graph.node)
    shared = [name for name in wanted if name in last]
    if not shared:
        return None
    model = onnx.ModelProto()
    model.CopyFrom(traced)
    there = {output.name for output in model.graph.output}
    for value in dict.fromkeys(last[name] for name in shared):
        if value not in there:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(value))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=['CPUExecutionProvider']
    )
    values = [last[name] for name in shared]
    found = session.run(values, {session.get_inputs()[0].name: image})
    for name, got in zip(shared, found):
        want = wanted[name]
        # The last node of a layer may belong to what torch made of its neighbour.
        if got.shape != want.shape or got.dtype != want.dtype:
            continue
        largest = float(np.abs(want).max(initial=0)) or 1.0
        if not float(np.abs(got - want).max(initial=0)) <= bound * largest:
            return name
    return None


def _outputs_of_layers(module: nn.Module, image: np.ndarray) -> dict[str, np.ndarray]:
    """By name, in the order in which the layers finish."""
    found: dict[str, np.ndarray] = {}
    hooks = []
    for name, layer in module.named_modules():

        def keep(_: Any, __: Any, output: Any, name: str = name) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                found[name] = output.numpy()

        hooks.append(layer.register_forward_hook(keep))
    try:
        with torch.no_grad():
            module(torch.from_numpy(image))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _last_values(nodes: Iterable[Any]) -> dict[str, str]:
    """The output of the last node of each layer."""
    found = {}
    for node in nodes:
        for name in _scopes(node.metadata_props):
            found[name] = node.output[0]
    return found


def _scopes(properties: Sequence[Any]) -> list[str]:
    for entry in properties:
        if entry.key == _SCOPES:
            try:
                # The last one is the node itself.
                return list(ast.literal_eval(entry.value))[:-1]
            except (ValueError, SyntaxError):
                return []
    return []
