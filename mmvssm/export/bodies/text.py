"""Pieces of bodies in ONNX's text syntax, and functions made of them.

Names are unique in a whole body, subgraphs included. A subgraph reads names of the
graph around it; OpenVINO takes only constants so. Parameters become constants when they
are folded.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import onnx
from onnx import parser

# Of mmvssm's operators, and of the standard ones in their bodies.
DOMAIN, VERSION = 'mmvssm', 1
OPSET = 18

# 2 atanh(s) / s as a polynomial of s squared, for s up to 1/3. Relative error 2e-7.
_ATANH = (
    1.9999996802662272,
    0.6667584866935254,
    0.39593185675472586,
    0.342036193656746,
)


class Node(NamedTuple):
    """What a body may depend on.

    Attributes:
        name: Type of the node.
        inputs: Names of the inputs that are there, as the op's declaration has them.
        outputs: Number of outputs.
        attributes: Attributes by name.
    """

    name: str
    inputs: frozenset[str]
    outputs: int
    attributes: Mapping[str, Any]


class Variant(NamedTuple):
    """A body.

    Attributes:
        outputs: Names of the outputs.
        text: The nodes, in ONNX's text syntax. They read the inputs by the names of
            the op's declaration, and set the outputs.
    """

    outputs: tuple[str, ...]
    text: str


def function(
    name: str,
    inputs: Iterable[str],
    outputs: Iterable[str],
    attributes: Iterable[str],
    body: str,
) -> onnx.FunctionProto:
    """A local function of ``DOMAIN`` from the text of its body."""
    names = ', '.join(attributes)
    return parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>\n'
        f'{name} {f"<{names}>" if names else ""} ({", ".join(inputs)}) '
        f'=> ({", ".join(outputs)}) {{{body}}}'
    )


def constants(**values: int | float | list[int]) -> str:
    """Nodes ``Constant``: scalars of a number, int64 vectors of a list."""
    lines = []
    for name, value in values.items():
        if isinstance(value, list):
            lines.append(f'{name} = Constant <value_ints = {value}> ()')
        elif isinstance(value, int):
            lines.append(f'{name} = Constant <value_int = {value}> ()')
        else:
            lines.append(f'{name} = Constant <value_float = {value!r}> ()')
    return '\n'.join(lines)


SOFTPLUS_CONSTANTS = constants(
    two=2.0, atanh0=_ATANH[0], atanh1=_ATANH[1], atanh2=_ATANH[2], atanh3=_ATANH[3]
)


def softplus(raw: str, out: str) -> str:
    """max(x, 0) + log(1 + e) with e = exp(-|x|), to a relative error of 5e-7.

    log(1 + e) is 2 atanh(s) with s = e / (2 + e). Unlike the logarithm of 1 + e this is
    accurate at any e, also where runtimes have a fast and coarse logarithm. It needs
    ``SOFTPLUS_CONSTANTS``.
    """
    return f"""
        {out}_size = Abs({raw})
        {out}_below = Neg({out}_size)
        {out}_e = Exp({out}_below)
        {out}_e2 = Add({out}_e, two)
        {out}_s = Div({out}_e, {out}_e2)
        {out}_ss = Mul({out}_s, {out}_s)
        {out}_3 = Mul({out}_ss, atanh3)
        {out}_2 = Add({out}_3, atanh2)
        {out}_2s = Mul({out}_2, {out}_ss)
        {out}_1 = Add({out}_2s, atanh1)
        {out}_1s = Mul({out}_1, {out}_ss)
        {out}_0 = Add({out}_1s, atanh0)
        {out}_log = Mul({out}_0, {out}_s)
        {out}_above = Relu({raw})
        {out} = Add({out}_above, {out}_log)"""
