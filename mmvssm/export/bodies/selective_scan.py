"""The body of the selective scan: one ``Scan`` over all positions.

Layout: (positions, batch, groups, states, channels of a group).
"""

from typing import Any

from mmvssm.export.bodies.nodes import Call, add_node, dead, sizes
from mmvssm.export.bodies.recursion import recursion
from mmvssm.export.bodies.text import (
    SOFTPLUS_CONSTANTS,
    Node,
    Variant,
    constants,
    softplus,
)
from mmvssm.ops.selective_scan.declaration import SELECTIVE_SCAN as OP  # noqa: F401

NAME = 'SelectiveScan'
NAMES = (NAME,)


def translate(call: Call) -> tuple[Any, ...]:
    """One node; with a second output if the caller wants the last state."""
    length = call.length(call.inputs['u'].shape[2])
    attributes = dict(
        delta_softplus=int(call.options['delta_softplus']),
        states=sizes(call.inputs['A'])[1],
        **length,
    )
    tensors = list(call.inputs.values())
    if call.options['return_last_state']:
        return tuple(add_node(NAME, tensors, attributes, ('out', 'last_state')))
    return add_node(NAME, tensors, attributes, ('out',)), dead()


def variant(node: Node) -> Variant:
    """The body for the options and optional inputs of a node."""
    text = _SIZES
    raw = 'delta'
    if 'delta_bias' in node.inputs:
        raw = 'raw'
        text += """
            bias = Unsqueeze(delta_bias, one)
            raw = Add(delta, bias)"""
    if node.attributes['delta_softplus']:
        text += softplus(raw, 'dt')
    else:
        text += f'\ndt = Identity({raw})'
    length = node.attributes.get('length')
    text += _SCAN + recursion(
        *('start', 'dt_steps', 'du_steps', 'decay_rate', 'ys'),
        length,
        one_state=node.attributes['states'] == 1,
    )
    text += _OUTPUT
    out = 'y'
    if 'D' in node.inputs:
        text += f"""
            D_column = Unsqueeze(D, one)
            skip = Mul(D_column, u)
            with_skip = Add({out}, skip)"""
        out = 'with_skip'
    if 'z' in node.inputs:
        text += f"""
            z_sigmoid = Sigmoid(z)
            gate = Mul(z, z_sigmoid)
            gated = Mul({out}, gate)"""
        out = 'gated'
    text += f'\nout = Identity({out})'
    if node.outputs == 1:
        return Variant(('out',), text)
    return Variant(('out', 'last_state'), text + _LAST)


_SIZES = f"""
    {constants(one=[1], two_axes=[3], last_axis=[4], every=[-1])}
    {SOFTPLUS_CONSTANTS}
    batch = Shape <start = 0, end = 1> (u)
    channels = Shape <start = 1, end = 2> (u)
    length = Shape <start = 2, end = 3> (u)
    groups = Shape <start = 1, end = 2> (B)
    states = Shape <start = 1, end = 2> (A)
    each = Div(channels, groups)"""

_SCAN = """
    du = Mul(dt, u)
    grouped = Concat <axis = 0> (batch, groups, one, each, length)
    dt_groups = Reshape(dt, grouped)
    du_groups = Reshape(du, grouped)
    dt_steps = Transpose <perm = [4, 0, 1, 2, 3]> (dt_groups)
    du_steps = Transpose <perm = [4, 0, 1, 2, 3]> (du_groups)
    B_first = Transpose <perm = [3, 0, 1, 2]> (B)
    C_first = Transpose <perm = [3, 0, 1, 2]> (C)
    B_steps = Unsqueeze(B_first, last_axis)
    C_steps = Unsqueeze(C_first, two_axes)
    A_shape = Concat <axis = 0> (groups, each, states)
    A_groups = Reshape(A, A_shape)
    decay_rate = Transpose <perm = [0, 2, 1]> (A_groups)
    state_shape = Concat <axis = 0> (batch, groups, states, each)
    start = ConstantOfShape(state_shape)
"""

_OUTPUT = """
    y_groups = Transpose <perm = [1, 2, 3, 4, 0]> (ys)
    y_shape = Shape(u)
    y = Reshape(y_groups, y_shape)"""

_LAST = """
    last_groups = Transpose <perm = [0, 1, 3, 2]> (ys_last)
    last_shape = Concat <axis = 0> (batch, channels, states)
    last_state = Reshape(last_groups, last_shape)"""
