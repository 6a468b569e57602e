"""The body of linear attention: two products in each head, and a normaliser.

Keys and values are summed up first, so time and memory grow linearly with the length.

Layout: channels first, (batch, heads, channels of a head, positions). There the two
channels of a pair are whole rows, which the rotation can swap; and the maps around the
op often have channels first, so that transpositions cancel.
"""

from typing import Any

from mmvssm.export.bodies.nodes import Call, add_node
from mmvssm.export.bodies.text import Node, Variant, constants
from mmvssm.ops.linear_attention.declaration import LINEAR_ATTENTION as OP  # noqa: F401

NAME = 'LinearAttention'
NAMES = (NAME,)


def translate(call: Call) -> tuple[Any, ...]:
    """One node."""
    options = call.options
    attributes = dict(
        heads=int(options['heads']),
        normalise=int(options['normalise']),
        eps=float(options['eps']),
    )
    return (add_node(NAME, list(call.inputs.values()), attributes),)


def variant(node: Node) -> Variant:
    """With or without rotation and normaliser."""
    text = _SIZES
    if 'cos' in node.inputs:
        text += _ROTATE
    else:
        text += _features('apart', [0, 2, 3, 1], 'heads')
        text += """
            q_heads, k_heads = Split <axis = 0, num_outputs = 2> (heads)
            q_turned = Identity(q_heads)
            k_turned = Identity(k_heads)"""
    text += _PRODUCTS
    if node.attributes['normalise']:
        text += _NORMALISE
    else:
        text += '\ny_heads = Identity(numerator)'
    return Variant(('y',), text + _END)


_SIZES = f"""
    {constants(zero=0.0, one=[1], positions=[-1], every=[-1], pair=[2])}
    {constants(same=[0], same_two=[0, 0], swap=[1, 0])}
    eps = Constant <value_float: float = @eps> ()
    heads_number = Constant <value_int: int = @heads> ()
    heads_count = Reshape(heads_number, one)
    length = Shape <start = 1, end = 2> (v)
    length_float = Cast <to = 1> (length)
    apart = Concat <axis = 0> (same_two, heads_count, every)
    together = Concat <axis = 0> (same_two, every, length)"""


def _features(shape: str, axes: list[int], out: str) -> str:
    """elu + 1 of queries and keys, also accurate for very negative values."""
    return f"""
    both = Concat <axis = 0> (q, k)
    both_apart = Reshape(both, {shape})
    both_first = Transpose <perm = {axes}> (both_apart)
    below = Min(both_first, zero)
    exp = Exp(below)
    above = Relu(both_first)
    {out} = Add(exp, above)"""


# (a, b) of each pair -> (a cos - b sin, b cos + a sin). The tables are (heads, pairs, 1
# or 2, L).
_ROTATE = f"""
    pairs_apart = Concat <axis = 0> (same_two, heads_count, every, pair)
    {_features('pairs_apart', [0, 2, 3, 4, 1], 'pairs')}
    table_shape = Concat <axis = 0> (same, heads_count, every, one)
    cos_apart = Reshape(cos, table_shape)
    sin_apart = Reshape(sin, table_shape)
    cosine = Transpose <perm = [1, 2, 3, 0]> (cos_apart)
    sine = Transpose <perm = [1, 2, 3, 0]> (sin_apart)
    minus_sine = Neg(sine)
    sines = Concat <axis = 2> (minus_sine, sine)
    swapped = Gather <axis = 3> (pairs, swap)
    by_cos = Mul(pairs, cosine)
    by_sin = Mul(swapped, sines)
    rotated = Add(by_cos, by_sin)
    turned = Reshape(rotated, together)
    q_turned, k_turned = Split <axis = 0, num_outputs = 2> (turned)
    heads = Reshape(pairs, together)
    q_heads, k_heads = Split <axis = 0, num_outputs = 2> (heads)"""

_PRODUCTS = """
    v_apart = Reshape(v, apart)
    v_heads = Transpose <perm = [0, 2, 3, 1]> (v_apart)
    k_last = Transpose <perm = [0, 1, 3, 2]> (k_turned)
    total = MatMul(v_heads, k_last)
    state = Div(total, length_float)
    numerator = MatMul(state, q_turned)"""

_NORMALISE = """
    k_mean_column = ReduceMean <keepdims = 1> (k_heads, positions)
    k_mean = Transpose <perm = [0, 1, 3, 2]> (k_mean_column)
    normaliser = MatMul(k_mean, q_heads)
    with_eps = Add(normaliser, eps)
    y_heads = Div(numerator, with_eps)"""

_END = """
    merged = Concat <axis = 0> (same, every, length)
    y_first = Reshape(y_heads, merged)
    y = Transpose <perm = [0, 2, 1]> (y_first)"""
