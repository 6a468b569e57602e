"""The recursion of the selective scan, h = decay h + added and y = C h.

It goes along the first axis, as one ``Scan``, or without control flow for a fixed
length: L positions are c chunks of s positions. The s positions of all chunks are
written out, each chunk from a state of zero, together with the products p of all decays
up to there. The states at the ends of the c chunks are a recursion of the same form
with length c. Then p times the state before its chunk is added to each position. The
sizes s are those with the fewest nodes.
"""

import functools

from mmvssm.export.bodies.text import constants


def recursion(
    start: str,
    dt: str,
    du: str,
    decay_rate: str,
    out: str,
    length: int | None = None,
    one_state: bool = False,
) -> str:
    """The text of a selective scan.

    With any axes in front (batch, groups, ...), it also reads ``B_steps``
    (L, ..., N, 1) and ``C_steps`` (L, ..., 1, N).

    Args:
        start: The first state (..., N, D), which is zero.
        dt, du: Step sizes, and these times u, (L, ..., 1, D).
        decay_rate: A (..., N, D).
        out: Name of the output (L, ..., 1, D). ``{out}_last`` is the last state.
        length: L for a form without control flow; None for a ``Scan``.
        one_state: Whether N is 1.
    """
    product = 'Mul' if one_state else 'MatMul'
    if length is None and one_state:
        # Here OpenVINO 2026.4 overwrites the state before it computes C times the new
        # one, so this is done outside.
        return f"""
        {constants(first_axis=[0], from_second=[1], to_end=[2**63 - 1])}
        {out}_last, {out}_before = Scan <num_scan_inputs = 3, body = along_positions
            (float[] h, float[] dt_t, float[] du_t, float[] B_t)
            => (float[] h_next, float[] h_before) {{
                h_before = Identity(h)
                dt_A = Mul(dt_t, {decay_rate})
                decay = Exp(dt_A)
                kept = Mul(decay, h)
                added = Mul(du_t, B_t)
                h_next = Add(kept, added)
            }}> ({start}, {dt}, {du}, B_steps)
        {out}_first = Slice({out}_before, from_second, to_end, first_axis)
        {out}_end = Unsqueeze({out}_last, first_axis)
        {out}_states = Concat <axis = 0> ({out}_first, {out}_end)
        {out} = Mul(C_steps, {out}_states)"""
    if length is None:
        return f"""
        {out}_last, {out} = Scan <num_scan_inputs = 4, body = along_positions
            (float[] h, float[] dt_t, float[] du_t, float[] B_t, float[] C_t)
            => (float[] h_next, float[] y_t) {{
                dt_A = Mul(dt_t, {decay_rate})
                decay = Exp(dt_A)
                kept = Mul(decay, h)
                added = Mul(du_t, B_t)
                h_next = Add(kept, added)
                y_t = MatMul(C_t, h_next)
            }}> ({start}, {dt}, {du}, B_steps, C_steps)"""
    return f"""
        {constants(flat_shape=[length, -1], last_position=-1, next_axis=[1])}
        {constants(first_of_chunks=[0], after_zero=[1, 0, 0, 0])}
        dt_A = Mul({dt}, {decay_rate})
        decay = Exp(dt_A)
        added = Mul({du}, B_steps)
        added_flat = Reshape(added, flat_shape)
        decay_flat = Reshape(decay, flat_shape)
        {_written_out('decay_flat', 'added_flat', 'h_flat', length)}
        h_shape = Shape(added)
        h = Reshape(h_flat, h_shape)
        {out} = {product}(C_steps, h)
        {out}_last = Gather <axis = 0> (h, last_position)"""


def _written_out(decay: str, added: str, out: str, length: int) -> str:
    """All states of a recursion (L, X)."""
    size, *rest = _chunk_sizes(length)[1]
    if not rest:
        return _steps(decay, added, out, length, axis=0, products=False)
    # Names of this level.
    chunks, at = -(-length // size), f'{out}_'
    lines = [
        constants(
            **{
                f'{at}apart': [chunks, size, -1],
                f'{at}together': [chunks * size, -1],
                f'{at}before_last': [chunks - 1],
            }
        )
    ]
    padding = chunks * size - length
    if padding:
        lines.append(constants(**{f'{at}padding': [0, 0, padding, 0]}))
        for name, x in (('decay', decay), ('added', added)):
            lines.append(f'{at}{name}_padded = Pad({x}, {at}padding)')
        decay, added = f'{at}decay_padded', f'{at}added_padded'
    lines += [
        f'{at}decay = Reshape({decay}, {at}apart)',
        f'{at}added = Reshape({added}, {at}apart)',
        _steps(f'{at}decay', f'{at}added', f'{at}own', size, axis=1, products=True),
        f'{at}ends = Squeeze({at}own_{size - 1}, next_axis)',
        f'{at}products = Squeeze({at}own_p{size - 1}, next_axis)',
        _written_out(f'{at}products', f'{at}ends', f'{at}h', chunks),
        f'{at}all_but_last = Slice({at}h, first_of_chunks, {at}before_last, '
        'first_of_chunks)',
        f'{at}before = Pad({at}all_but_last, after_zero)',
        f'{at}before_chunk = Unsqueeze({at}before, next_axis)',
        f'{at}of_before = Mul({at}own_p, {at}before_chunk)',
        f'{at}states = Add({at}own, {at}of_before)',
        f'{at}padded_states = Reshape({at}states, {at}together)',
    ]
    if padding:
        lines.append(constants(**{f'{at}length': [length]}))
        lines.append(
            f'{out} = Slice({at}padded_states, first_of_chunks, {at}length, '
            'first_of_chunks)'
        )
    else:
        lines.append(f'{out} = Identity({at}padded_states)')
    return '\n'.join(lines)


def _steps(
    decay: str, added: str, out: str, size: int, axis: int, products: bool
) -> str:
    """The states of a few positions, and the products of their decays."""
    if size == 1:
        return f'{out} = Identity({added})'

    def split(x: str, name: str) -> str:
        parts = ', '.join(f'{out}_{name}{i}' for i in range(size))
        return f'{parts} = Split <axis = {axis}, num_outputs = {size}> ({x})'

    lines = [split(decay, 'd'), split(added, 'a')]
    lines.append(f'{out}_0 = Identity({out}_a0)')
    lines.append(f'{out}_p0 = Identity({out}_d0)')
    for i in range(1, size):
        lines.append(f'{out}_k{i} = Mul({out}_d{i}, {out}_{i - 1})')
        lines.append(f'{out}_{i} = Add({out}_k{i}, {out}_a{i})')
        if products:
            lines.append(f'{out}_p{i} = Mul({out}_p{i - 1}, {out}_d{i})')
    for name in ('', 'p') if products else ('',):
        parts = ', '.join(f'{out}_{name}{i}' for i in range(size))
        whole = f'{out}_p' if name else out
        lines.append(f'{whole} = Concat <axis = {axis}> ({parts})')
    return '\n'.join(lines)


@functools.cache
def _chunk_sizes(length: int) -> tuple[int, tuple[int, ...]]:
    """Number of nodes, and for each level the positions that are written out."""
    found = 2 * length + 2, (length,)
    for size in range(2, min(length, 17)):
        nodes, sizes = _chunk_sizes(-(-length // size))
        nodes += 3 * size + 11 + 3 * bool(length % size)
        found = min(found, (nodes, (size, *sizes)))
    return found
