"""The body of SS2D's core.

The positions of all K scans are read from the map by one ``Gather``, and the results
are put back by another. Their tables depend on the size of the map only. For the
default scan order the graph computes them; where the size is known, they are folded to
constants. For any other scan order they are attributes of the node, for the size of
the example.

One state: a sequence of H W positions is H lines of W positions. A ``Scan`` over the W
positions runs all lines of all scans at once, each from a state of zero. It gives the
output of a line, and the effect that a state before the line has on it: the product of
all decays times C. A ``Scan`` over the H lines then finds these states. All elementwise
work, softplus included, is in the first ``Scan``: there it stays in the caches. For the
scan by columns, too, a line has W positions; it need not be a line of the map.

More states: the effect would have N values for each output. So one ``Scan`` goes over
all positions; its steps have enough work.

Layout: channels last, (positions, scans, lines x batch, channels).
"""

from typing import Any

import numpy as np
from onnxscript import ir
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
from mmvssm.ops.scan_orders import is_cross, scan_order
from mmvssm.ops.scan_orders.tables import orders_of
from mmvssm.ops.ss2d_scan.declaration import SS2D_SCAN as OP  # noqa: F401

NAME = 'SS2DScan'
# Other scan orders have another name, because the kernel library does not know them.
ALONG_TABLE = 'SS2DScanAlongTable'
NAMES = (NAME, ALONG_TABLE)


def translate(call: Call) -> tuple[Any, ...]:
    """One node with channels last, of another name if the scan order is not cross."""
    x, *weights = call.inputs.values()
    x_proj = call.inputs['x_proj_weight']
    rank = sizes(call.inputs['dt_projs_weight'])[2]
    states = sizes(call.inputs['A'])[1]
    orders = orders_of(call.options['orders'])
    attributes = dict(
        channels_last=1,
        scans=sizes(x_proj)[0],
        states=states,
        split=[rank, states, states],
    )
    name, by_lines = NAME, states == 1 and not call.unrolled
    attributes |= call.length(*x.shape[2:])
    if not is_cross(orders):
        name = ALONG_TABLE
        attributes |= _tables(orders, x, by_lines)
        if call.unrolled:
            attributes['length'] = sizes(attributes['places'])[0] // sizes(x_proj)[0]
    y = add_node(name, (op.Transpose(x, perm=[0, 2, 3, 1]), *weights), attributes)
    return (op.Transpose(y, perm=[0, 3, 1, 2]),)


def _tables(orders: Any, x: Any, by_lines: bool) -> dict[str, Any]:
    """What the graph computes for the default scan order.

    torch traces such an op for one size only.
    """
    height, width = x.shape[2:]
    table = scan_order(orders, height, width).numpy()
    count, places = len(table), height * width
    lines = height if by_lines else 1
    steps = -(-table.shape[1] // lines)
    more = lines * steps - table.shape[1]
    table = np.pad(table, ((0, 0), (0, more)), constant_values=-1)
    # A padded place is read after the last one, where a row of zeros is.
    table = np.where(table < 0, places, table)
    scan = np.arange(count)[:, None]
    position = np.argsort(table, axis=1, kind='stable')[:, :places]
    tables = dict(
        lines=np.array([lines]),
        steps=np.array([steps]),
        places=_in_steps(table, lines),
        rows=_in_steps(table + scan * (places + 1), lines),
        back=(position % steps * count + scan) * lines + position // steps,
    )
    return {name: ir.tensor(t.ravel()) for name, t in tables.items()}


def _in_steps(table: np.ndarray, lines: int) -> np.ndarray:
    """(K, lines x steps) as (steps, K, lines)."""
    return table.reshape(len(table), lines, -1).transpose(2, 0, 1)


def variant(node: Node) -> Variant:
    """There are two bodies: for one state, and for any number of states."""
    one_state, length = node.attributes['states'] == 1, node.attributes.get('length')
    by_lines = one_state and length is None
    text = _SIZES
    if node.name == NAME:
        lines, steps = ('height', 'width') if by_lines else ('one', 'places_count')
        text += f'lines = Identity({lines})\nsteps = Identity({steps})' + _CROSS
    else:
        text += _GIVEN
    if by_lines:
        text += _LINES
    else:
        text += _POSITIONS + recursion(
            *('start', 'dt_steps', 'du_steps', 'decay_rate', 'ys'), length, one_state
        )
    count = node.attributes['scans']
    scans = ', '.join(f'y_scan{i}' for i in range(count))
    merge = _MERGE.replace('SCANS', scans).replace('COUNT', str(count))
    return Variant(('y',), text + merge)


_SIZES = f"""
    {constants(zero=[0], one=[1], every=[-1], scan_axis=[0, 0, -1])}
    {SOFTPLUS_CONSTANTS}
    split = Constant <value_ints: ints = @split> ()
    batch = Shape <start = 0, end = 1> (x)
    height = Shape <start = 1, end = 2> (x)
    width = Shape <start = 2, end = 3> (x)
    count = Shape <start = 0, end = 1> (dt_projs_weight)
    channels = Shape <start = 1, end = 2> (dt_projs_weight)
    rank = Shape <start = 2, end = 3> (dt_projs_weight)
    columns = Shape <start = 1, end = 2> (x_proj_weight)
    states = Shape <start = 1, end = 2> (A)
    places_count = Mul(height, width)
    x_positions = Transpose <perm = [1, 2, 0, 3]> (x)
    positions_shape = Concat <axis = 0> (every, batch, channels)
    x_places = Reshape(x_positions, positions_shape)
"""

# The place of a position is turned by 180 degrees for the scans from the end. A
# column has ``height`` places, which are ``width`` apart.
_CROSS = f"""
    {constants(first=0, step=1, pair=[2])}
    scan = Constant <value = int64[4, 1] {{0, 1, 2, 3}}> ()
    read = Identity(x_places)
    end = Squeeze(places_count)
    last = Sub(places_count, one)
    by_row = Range(first, end, step)
    map_shape = Concat <axis = 0> (height, width)
    turned_shape = Concat <axis = 0> (width, height)
    places_map = Reshape(by_row, map_shape)
    turned_map = Transpose <perm = [1, 0]> (places_map)
    by_column = Reshape(turned_map, every)
    forward = Concat <axis = 0> (by_row, by_column)
    backward = Sub(last, forward)
    by_scan = Concat <axis = 0> (forward, backward)
    lines_shape = Concat <axis = 0> (count, lines, steps)
    by_line = Reshape(by_scan, lines_shape)
    by_step = Transpose <perm = [2, 0, 1]> (by_line)
    places = Reshape(by_step, every)
    offset = Mul(scan, places_count)
    rows_by_step = Add(by_step, offset)
    rows = Reshape(rows_by_step, every)
    positions_turned = Reshape(by_row, turned_shape)
    positions_map = Transpose <perm = [1, 0]> (positions_turned)
    of_column = Reshape(positions_map, every)
    position_forward = Concat <axis = 0> (by_row, of_column)
    position_backward = Sub(last, position_forward)
    position_all = Concat <axis = 0> (position_forward, position_backward)
    position_shape = Concat <axis = 0> (count, every)
    position = Reshape(position_all, position_shape)
    position_step = Mod(position, steps)
    position_line = Div(position, steps)
    step_start = Mul(position_step, count)
    step_scan = Add(step_start, scan)
    scan_start = Mul(step_scan, lines)
    back_by_scan = Add(scan_start, position_line)
    back = Reshape(back_by_scan, every)
"""

_GIVEN = f"""
    {constants(a_row_of_zeros=[0, 0, 0, 1, 0, 0])}
    lines = Constant <value: tensor = @lines> ()
    steps = Constant <value: tensor = @steps> ()
    places = Constant <value: tensor = @places> ()
    rows = Constant <value: tensor = @rows> ()
    back = Constant <value: tensor = @back> ()
    read = Pad(x_places, a_row_of_zeros)
"""

# Of all scans at once: (K, L, B, R + 2N).
_PROJECT = """
    x_proj_shape = Concat <axis = 0> (every, channels)
    x_proj_rows = Reshape(x_proj_weight, x_proj_shape)
    x_proj = Transpose <perm = [1, 0]> (x_proj_rows)
    projected_rows = MatMul(read, x_proj)
    projected_shape = Concat <axis = 0> (zero, zero, count, every)
    projected_places = Reshape(projected_rows, projected_shape)
    projected = Transpose <perm = [2, 0, 1, 3]> (projected_places)
    dt_weight = Transpose <perm = [0, 2, 1]> (dt_projs_weight)
    dt_bias = Unsqueeze(dt_projs_bias, one)
"""

_LINES = f"""
    {_PROJECT}
    rows_shape = Concat <axis = 0> (every, batch, columns)
    projected_flat = Reshape(projected, rows_shape)
    projected_read = Gather <axis = 0> (projected_flat, rows)
    steps_shape = Concat <axis = 0> (steps, count, every, columns)
    projected_steps = Reshape(projected_read, steps_shape)
    dt_low_rank, B, C = Split <axis = 3> (projected_steps, split)
    u_read = Gather <axis = 0> (read, places)
    u_shape = Concat <axis = 0> (steps, count, every, channels)
    u = Reshape(u_read, u_shape)
    decay_shape = Concat <axis = 0> (count, one, channels)
    decay_rate = Reshape(A, decay_shape)
    rows_count = Mul(lines, batch)
    state_shape = Concat <axis = 0> (count, rows_count, channels)
    zeros = ConstantOfShape(state_shape)
    ones = ConstantOfShape <value = float[1] {{1}}> (state_shape)
    h_last, p_last, y_lines, effect = Scan <num_scan_inputs = 4, body = along_lines
        (float[] h, float[] p, float[] dt_t, float[] B_t, float[] C_t, float[] u_t)
        => (float[] h_next, float[] p_next, float[] y_t, float[] effect_t) {{
            projected_t = MatMul(dt_t, dt_weight)
            raw = Add(projected_t, dt_bias)
            {softplus('raw', 'dt')}
            dt_A = Mul(dt, decay_rate)
            decay = Exp(dt_A)
            du = Mul(dt, u_t)
            added = Mul(du, B_t)
            kept = Mul(decay, h)
            h_next = Add(kept, added)
            p_next = Mul(decay, p)
            y_t = Mul(h_next, C_t)
            effect_t = Mul(p_next, C_t)
        }}> (zeros, ones, dt_low_rank, B, C, u)
    lines_of_state = Concat <axis = 0> (count, lines, batch, channels)
    h_lines = Reshape(h_last, lines_of_state)
    p_lines = Reshape(p_last, lines_of_state)
    start_shape = Concat <axis = 0> (count, batch, channels)
    start = ConstantOfShape(start_shape)
    end_state, before_lines = Scan <num_scan_inputs = 2, scan_input_axes = [1, 1],
        scan_output_axes = [1], body = over_lines
        (float[] before, float[] p_line, float[] h_line)
        => (float[] after, float[] before_line) {{
            before_line = Identity(before)
            through = Mul(before, p_line)
            after = Add(through, h_line)
        }}> (start, p_lines, h_lines)
    before_state = Reshape(before_lines, state_shape)
    of_before = Mul(effect, before_state)
    ys = Add(y_lines, of_before)
"""


def _read(name: str, columns: str, *inner: str) -> str:
    """Read (K, L B, columns) along the scan orders, with other last axes."""
    return f"""
    {name}_rows_shape = Concat <axis = 0> (every, batch, {columns})
    {name}_flat = Reshape({name}, {name}_rows_shape)
    {name}_read = Gather <axis = 0> ({name}_flat, rows)
    {name}_steps_shape = Concat <axis = 0> (steps, count, batch, {', '.join(inner)})
    {name}_steps = Reshape({name}_read, {name}_steps_shape)"""


_POSITIONS = f"""
    {_PROJECT}
    dt_low_rank, B, C = Split <axis = 3> (projected, split)
    dt_shape = Concat <axis = 0> (count, every, rank)
    dt_rows = Reshape(dt_low_rank, dt_shape)
    step_sizes = MatMul(dt_rows, dt_weight)
    raw = Add(step_sizes, dt_bias)
    {softplus('raw', 'dt')}
    u_shape = Concat <axis = 0> (one, every, channels)
    u = Reshape(read, u_shape)
    du = Mul(dt, u)
    {_read('dt', 'channels', 'one', 'channels')}
    {_read('du', 'channels', 'one', 'channels')}
    {_read('B', 'states', 'states', 'one')}
    {_read('C', 'states', 'one', 'states')}
    decay_shape = Concat <axis = 0> (count, one, channels, states)
    A_scans = Reshape(A, decay_shape)
    decay_rate = Transpose <perm = [0, 1, 3, 2]> (A_scans)
    state_shape = Concat <axis = 0> (count, batch, states, channels)
    start = ConstantOfShape(state_shape)
"""

_MERGE = """
    y_flat = Reshape(ys, positions_shape)
    y_back = Gather <axis = 0> (y_flat, back)
    SCANS = Split <axis = 0, num_outputs = COUNT> (y_back)
    y_merged = Sum(SCANS)
    D_shape = Concat <axis = 0> (count, channels)
    D_scans = Reshape(Ds, D_shape)
    D = ReduceSum <keepdims = 0> (D_scans, zero)
    skip = Mul(x_places, D)
    y_places = Add(y_merged, skip)
    y_shape = Concat <axis = 0> (height, width, batch, channels)
    y_map = Reshape(y_places, y_shape)
    y = Transpose <perm = [2, 0, 1, 3]> (y_map)
"""
