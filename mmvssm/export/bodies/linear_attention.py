"""The body of linear attention: two products in each head, and a normaliser.

Layout: (batch, heads, positions, channels of a head). Keys and values are summed up
first, so time and memory grow linearly with the length.
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


def variant(form: str, node: Node) -> Variant:
    """With or without rotation and normaliser."""
    text = _SIZES + _features('q') + _features('k')
    for x in 'qk':
        text += (
            _rotate(x)
            if 'cos' in node.inputs
            else f'\n{x}_turned = Identity({x}_features)'
        )
    text += _PRODUCTS
    if node.attributes['normalise']:
        text += _NORMALISE
    else:
        text += '\ny_heads = Identity(numerator)'
    return Variant(('y',), text + '\ny = Reshape(y_heads, merged)')


_SIZES = f"""
    {constants(zero=0.0, one=[1], keys=[1], last=[3], every=[-1], same=[0, 0])}
    {constants(pairs=[0, 0, -1, 2], merged=[0, 0, -1], swap=[1, 0], pair_axis=[2])}
    eps = Constant <value_float: float = @eps> ()
    heads_number = Constant <value_int: int = @heads> ()
    heads = Reshape(heads_number, one)
    by_head = Concat <axis = 0> (same, heads, every)
    length_number = Shape <start = 1, end = 2> (v)
    length = Cast <to = 1> (length_number)"""


def _features(x: str) -> str:
    """elu + 1, accurate for very negative values, too."""
    return f"""
    {x}_below = Min({x}, zero)
    {x}_exp = Exp({x}_below)
    {x}_above = Relu({x})
    {x}_features = Add({x}_exp, {x}_above)"""


def _rotate(x: str) -> str:
    """a cos - b sin, b cos + a sin of each pair (a, b)."""
    return f"""
    {x}_cos = Unsqueeze(cos, pair_axis)
    {x}_sin = Unsqueeze(sin, pair_axis)
    {x}_minus = Neg({x}_sin)
    {x}_sins = Concat <axis = 2> ({x}_minus, {x}_sin)
    {x}_pairs = Reshape({x}_features, pairs)
    {x}_swapped = Gather <axis = 3> ({x}_pairs, swap)
    {x}_by_cos = Mul({x}_pairs, {x}_cos)
    {x}_by_sin = Mul({x}_swapped, {x}_sins)
    {x}_turned = Add({x}_by_cos, {x}_by_sin)"""


_PRODUCTS = """
    k_apart = Reshape(k_turned, by_head)
    k_heads = Transpose <perm = [0, 2, 3, 1]> (k_apart)
    v_apart = Reshape(v, by_head)
    v_heads = Transpose <perm = [0, 2, 1, 3]> (v_apart)
    total = MatMul(k_heads, v_heads)
    state = Div(total, length)
    q_apart = Reshape(q_turned, by_head)
    q_heads = Transpose <perm = [0, 2, 1, 3]> (q_apart)
    numerator_heads = MatMul(q_heads, state)
    numerator = Transpose <perm = [0, 2, 1, 3]> (numerator_heads)"""

_NORMALISE = """
    k_mean = ReduceMean <keepdims = 1> (k_features, keys)
    by_mean = Mul(q_features, k_mean)
    by_mean_heads = Reshape(by_mean, by_head)
    normaliser = ReduceSum <keepdims = 1> (by_mean_heads, last)
    with_eps = Add(normaliser, eps)
    y_heads = Div(numerator, with_eps)"""
