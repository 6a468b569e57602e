"""Exports one op and runs the file; skips tests where a package is missing."""

import io

import pytest
import torch
from torch import nn

from mmvssm import onnx_library
from mmvssm.export.signal_stack import same_signal_stack

WHY = 'this needs pip install mmvssm[export]'
onnx = pytest.importorskip('onnx', reason=WHY)
pytest.importorskip('onnxscript', reason=WHY)
onnxruntime = pytest.importorskip('onnxruntime', reason=WHY)

DYNAMIC = torch.export.Dim.DYNAMIC


class Call(nn.Module):
    """A call of an op: some tensors are inputs of the model, the others its weights."""

    def __init__(self, function, weights):
        super().__init__()
        self.function, self.names = function, list(weights)
        for i, weight in enumerate(weights.values()):
            self.register_buffer(f'weight{i}', weight.detach().float())

    def forward(self, inputs):
        weights = {
            name: getattr(self, f'weight{i}') for i, name in enumerate(self.names)
        }
        return self.function(**inputs, **weights)


def exported(function, inputs, weights, form, dynamic=None):
    """The model of a call, with a local function for our node.

    Args:
        function: An op, or what calls one.
        inputs: float tensors by the names of the function's arguments.
        weights: The other tensors.
        form: See ``translations``.
        dynamic: For each input its dynamic axes.
    """
    from mmvssm.export import bodies

    inputs = {name: x.detach().float() for name, x in inputs.items()}
    axes = None
    if dynamic is not None:
        axes = {name: dict.fromkeys(dynamic.get(name, ()), DYNAMIC) for name in inputs}
    with torch.no_grad():
        program = torch.export.export(
            Call(function, weights).eval(),
            (inputs,),
            dynamic_shapes=None if axes is None else (axes,),
        )
        model = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=18,
            custom_translation_table=bodies.translations(form),
        ).model_proto
    model.functions.extend(bodies.functions(model))
    onnx.checker.check_model(model, full_check=True)
    return model


def inlined(model):
    """Without local functions, and with constants folded."""
    from onnx import inliner
    from onnxscript import ir, optimizer

    folded = ir.from_proto(inliner.inline_local_functions(model))
    limit = 2**22
    optimizer.optimize_ir(folded, input_size_limit=limit, output_size_limit=limit)
    found = ir.to_proto(folded)
    onnx.checker.check_model(found, full_check=True)
    return found


def nodes_of(graph):
    """Nodes of a graph and its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes_of(attribute.g)


def run_onnxruntime(model, inputs, kernels=False):
    """Outputs in float64; with our kernels in the place of local functions, or not."""
    options = onnxruntime.SessionOptions()
    if kernels:
        options.register_custom_ops_library(onnx_library())
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=['CPUExecutionProvider']
    )
    # A name that torch gave has the input's name in it, and the order is the same.
    names = [x.name for x in session.get_inputs()]
    assert len(names) == len(inputs)
    feeds = {
        name: x.detach().float().numpy() for name, x in zip(names, inputs.values())
    }
    return [torch.from_numpy(y).double() for y in session.run(None, feeds)]


def run_openvino(model, inputs):
    """Outputs in float64."""
    openvino = pytest.importorskip('openvino', reason=WHY)
    core = openvino.Core()
    read = core.read_model(io.BytesIO(model.SerializeToString()))
    settings = {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': 1}
    with same_signal_stack():
        compiled = core.compile_model(read, 'CPU', settings)
        found = compiled([x.detach().float().numpy() for x in inputs.values()])
    return [
        torch.from_numpy(found[i].copy()).double() for i in range(len(compiled.outputs))
    ]
