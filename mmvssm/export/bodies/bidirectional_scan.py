"""The body of the mixer of Vim and Mamba®: one ``Scan`` for both directions.

The sequence and its reverse are one sequence with twice the channels. So one
convolution, one product with the projections of both, and one ``Scan`` over all
positions compute both directions. Then the second half is reversed again.

Layout: convolution and projections have channels first, (batch, 2, channels,
positions). The ``Scan`` has (positions, batch, 2, states, channels).
"""

from typing import Any

from onnxscript import opset18 as op

from mmvssm.export.bodies.nodes import Call, add_node, sizes
from mmvssm.export.bodies.recursion import recursion
from mmvssm.export.bodies.text import (
    SOFTPLUS_CONSTANTS,
    Node,
    Variant,
    constants,
    softplus,
)
from mmvssm.ops.bidirectional_scan.declaration import BIDIRECTIONAL_SCAN as OP

NAME = 'BidirectionalScan'
NAMES = (NAME,)
_WEIGHTS = [name.removeprefix('forward_') for name in OP.names if 'forward_' in name]


def translate(call: Call) -> tuple[Any, ...]:
    """One node with channels last; a shorter convolution begins with zeros."""
    inputs = dict(call.inputs)
    convolutions = ['forward_conv_weight', 'backward_conv_weight']
    taps = max(sizes(inputs[name])[1] for name in convolutions)
    for name in convolutions:
        missing = taps - sizes(inputs[name])[1]
        if missing:
            padding = op.Constant(value_ints=[0, missing, 0, 0])
            inputs[name] = op.Pad(inputs[name], padding)
    x, z, *weights = inputs.values()
    x, z = (op.Transpose(t, perm=[0, 2, 1]) for t in (x, z))
    channels, states = sizes(call.inputs['forward_A'])
    rank = sizes(call.inputs['forward_dt_proj_weight'])[1]
    attributes = dict(
        average=int(call.options['average']),
        channels_last=1,
        split=[rank, states, states],
        group=2 * channels,
        pads=[0, taps - 1, 0, 0],
        **call.length(call.inputs['x'].shape[2]),
    )
    y = add_node(NAME, (x, z, *weights), attributes)
    return (op.Transpose(y, perm=[0, 2, 1]),)


def variant(node: Node) -> Variant:
    """With the sum of the directions or their mean, which is in the weights."""
    length = node.attributes.get('length')
    scan = recursion(
        *('start', 'dt', 'du', 'decay_rate', 'ys'),
        length,
        one_state=node.attributes['split'][-1] == 1,
    )
    scale = 0.5 if node.attributes['average'] else 1.0
    return Variant(('y',), constants(scale=scale) + _INPUT + scan + _OUTPUT)


def _both(*names: str) -> str:
    """Weights of both directions, one after the other along the first axis."""
    return ''.join(
        f'\n{name} = Concat <axis = 0> (forward_{name}, backward_{name})'
        for name in names
    )


_INPUT = f"""
    {constants(zero=[0], one=[1], both=[2], row_axes=[1, 2], every=[-1])}
    {constants(beyond_last=[2**63 - 1])}
    {constants(from_last=[-1], beyond_first=[-(2**63)], state_axis=[3], last_axis=[4])}
    {SOFTPLUS_CONSTANTS}
    split = Constant <value_ints: ints = @split> ()
    batch = Shape <start = 0, end = 1> (x)
    channels = Shape <start = 0, end = 1> (forward_A)
    states = Shape <start = 1, end = 2> (forward_A)
    rank = Shape <start = 1, end = 2> (forward_dt_proj_weight)
    {_both(*_WEIGHTS)}
    taps = Unsqueeze(conv_weight, row_axes)
    x_proj_shape = Concat <axis = 0> (both, every, channels)
    x_proj_rows = Reshape(x_proj_weight, x_proj_shape)
    before_C = Add(rank, states)
    rows_dt_B = Slice(x_proj_rows, zero, before_C, one)
    rows_C = Slice(x_proj_rows, before_C, beyond_last, one)
    scaled_C = Mul(rows_C, scale)
    x_proj = Concat <axis = 1> (rows_dt_B, scaled_C)
    dt_proj_shape = Concat <axis = 0> (both, channels, rank)
    dt_proj_columns = Reshape(dt_proj_weight, dt_proj_shape)
    dt_proj = Transpose <perm = [0, 2, 1]> (dt_proj_columns)
    bias_shape = Concat <axis = 0> (both, one, channels)
    dt_bias = Reshape(dt_proj_bias, bias_shape)
    D_scaled = Mul(D, scale)
    skip_weight = Reshape(D_scaled, bias_shape)
    A_shape = Concat <axis = 0> (both, channels, states)
    A_directions = Reshape(A, A_shape)
    decay_rate = Transpose <perm = [0, 2, 1]> (A_directions)

    x_reversed = Slice(x, from_last, beyond_first, one, from_last)
    x_both = Concat <axis = 2> (x, x_reversed)
    x_channels = Transpose <perm = [0, 2, 1]> (x_both)
    x_row = Unsqueeze(x_channels, both)
    convolved = Conv <group: int = @group, pads: ints = @pads>
        (x_row, taps, conv_bias)
    sigmoid = Sigmoid(convolved)
    u_channels = Mul(convolved, sigmoid)
    u_shape = Concat <axis = 0> (batch, both, channels, every)
    u_directions = Reshape(u_channels, u_shape)
    projected = MatMul(x_proj, u_directions)
    dt_low_rank, B, C = Split <axis = 2> (projected, split)
    dt_rows = Transpose <perm = [0, 1, 3, 2]> (dt_low_rank)
    step_sizes = MatMul(dt_rows, dt_proj)
    u_first = Transpose <perm = [3, 0, 1, 2]> (u_directions)
    u = Unsqueeze(u_first, state_axis)
    steps_first = Transpose <perm = [2, 0, 1, 3]> (step_sizes)
    steps_row = Unsqueeze(steps_first, state_axis)
    raw = Add(steps_row, dt_bias)
    {softplus('raw', 'dt')}
    du = Mul(dt, u)
    B_first = Transpose <perm = [3, 0, 1, 2]> (B)
    B_steps = Unsqueeze(B_first, last_axis)
    C_first = Transpose <perm = [3, 0, 1, 2]> (C)
    C_steps = Unsqueeze(C_first, state_axis)
    state_shape = Concat <axis = 0> (batch, both, states, channels)
    start = ConstantOfShape(state_shape)
"""

_OUTPUT = """
    skip = Mul(u, skip_weight)
    with_skip = Add(ys, skip)
    y_forward, y_reversed = Split <axis = 2, num_outputs = 2> (with_skip)
    y_backward = Slice(y_reversed, from_last, beyond_first, zero, from_last)
    y_steps = Add(y_forward, y_backward)
    y_shape = Concat <axis = 0> (every, batch, channels)
    y_positions = Reshape(y_steps, y_shape)
    y_batch = Transpose <perm = [1, 0, 2]> (y_positions)
    z_sigmoid = Sigmoid(z)
    gate = Mul(z, z_sigmoid)
    y = Mul(y_batch, gate)"""
