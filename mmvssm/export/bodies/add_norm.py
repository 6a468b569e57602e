"""The body of residual addition and RMS norm, in the form that runtimes fuse."""

from typing import Any

from mmvssm.export.bodies.nodes import Call, add_node
from mmvssm.export.bodies.text import Node, Variant, constants
from mmvssm.ops.add_norm.declaration import ADD_RMS_NORM as OP  # noqa: F401

NAME = 'AddRMSNorm'
NAMES = (NAME,)


def translate(call: Call) -> tuple[Any, ...]:
    """One node; without a residual stream, the stream is x."""
    tensors = list(call.inputs.values())
    attributes = dict(eps=float(call.options['eps']))
    return tuple(add_node(NAME, tensors, attributes, ('y', 'stream')))


def variant(node: Node) -> Variant:
    """With or without a residual stream."""
    stream = 'Add(x, residual)' if 'residual' in node.inputs else 'Identity(x)'
    return Variant(
        ('y', 'stream'),
        f"""
        {constants(two=2.0, channels=[-1])}
        eps = Constant <value_float: float = @eps> ()
        stream = {stream}
        square = Pow(stream, two)
        mean = ReduceMean <keepdims = 1> (square, channels)
        more = Add(mean, eps)
        root = Sqrt(more)
        normalised = Div(stream, root)
        y = Mul(normalised, weight)""",
    )
