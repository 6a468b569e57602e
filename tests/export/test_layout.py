"""Transpositions that are moved, in graphs where they may be and where they may not."""

import numpy as np
import pytest

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
ir = pytest.importorskip('onnx_ir')

from mmvssm.export.layout import move_transpositions  # noqa: E402  may be missing

FIRST, LAST = 'perm = [0, 3, 1, 2]', 'perm = [0, 2, 3, 1]'
HEAD = """<ir_version: 10, opset_import: ["": 18]>
g (float[2, 3, 4, 5] x, float[2, 3, 4, 5] y, float[2, 4, 5, 3] z)
=> (float[N, a, b, c] out) <float two = {2.0}, float[4] row = {1.0, 2.0, 3.0, 4.0}>
"""
SHAPES = dict(x=(2, 3, 4, 5), y=(2, 3, 4, 5), z=(2, 4, 5, 3))


def moved(body):
    """Types of the nodes afterwards; the outputs must be the same."""
    model = onnx.parser.parse_model(HEAD + '{' + body + '}')
    changed = ir.from_proto(model)
    move_transpositions(changed)
    changed = ir.to_proto(changed)
    onnx.checker.check_model(changed, full_check=True)
    generator = np.random.default_rng(0)
    feeds = {
        name: generator.standard_normal(shape, np.float32)
        for name, shape in SHAPES.items()
    }
    outputs = []
    for proto in (model, changed):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=['CPUExecutionProvider']
        )
        outputs.append(session.run(['out'], feeds)[0])
    np.testing.assert_array_equal(*outputs)
    return [node.op_type for node in changed.graph.node]


def test_a_stream_of_sums():
    assert moved(f"""
        a = Transpose <{FIRST}> (x)
        b = Transpose <{FIRST}> (y)
        first = Add(a, b)
        last = Transpose <{LAST}> (first)
        doubled = Mul(last, two)
        c = Transpose <{FIRST}> (doubled)
        second = Add(first, c)
        third = Sigmoid(second)
        out = Transpose <{LAST}> (third)
    """) == ['Add', 'Mul', 'Add', 'Sigmoid', 'Transpose', 'Transpose']


@pytest.mark.parametrize(
    ('nodes', 'last'),
    [
        # Other axes.
        (f'b = Transpose <{LAST}> (z) c = Add(a, b)', 'Relu(c)'),
        # A row stands for other axes behind the transposition.
        ('c = Mul(a, row)', 'Relu(c)'),
        # The output of the graph is where it was.
        ('', 'Mul(two, a)'),
        # Not the inverse.
        (f'b = Transpose <{FIRST}> (a)', 'Relu(b)'),
        # One of the terms is not transposed.
        ('b = Sigmoid(z) c = Reshape(b, shape) d = Add(a, c)', 'Relu(d)'),
    ],
)
def test_what_stays(nodes, last):
    body = f"""
        shape = Constant <value_ints = [2, 5, 3, 4]> ()
        a = Transpose <{FIRST}> (x)
        {nodes}
        out = {last}
    """
    assert moved(body).count('Transpose') == 1 + nodes.count('Transpose')
