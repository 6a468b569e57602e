"""Our ops in standard ONNX operators, opset 18.

An exported program has calls of our ops. :func:`translations` makes one node of each,
of the domain ``mmvssm``. :func:`functions` makes a local function for each kind of
these nodes: its body has standard operators only. A runtime that knows the node (our
kernel library) takes its kernel, and any other one inlines the body.

There is one file for each op. To add one, write a file with

- ``OP``: the op's declaration;
- ``translate(call)``: the values of the op's outputs, from a :class:`.nodes.Call`;
- ``variant(node)``: the body for a :class:`.text.Node`; without it, ``translate``
  makes standard operators only;

and list it in ``_OPS``. ``tests/export/test_bodies.py`` says how an op is tested.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import onnx
from onnx import helper

from mmvssm.export.bodies import (
    add_norm,
    bidirectional_scan,
    linear,
    linear_attention,
    selective_scan,
    ss2d_scan,
)
from mmvssm.export.bodies.nodes import Call, dead
from mmvssm.export.bodies.text import DOMAIN, Node, Variant, function

FORMS = ('plain', 'function', 'unrolled')
_OPS: tuple[Any, ...] = (
    ss2d_scan,
    bidirectional_scan,
    selective_scan,
    linear_attention,
    add_norm,
    linear,
)
_MAKERS = {name: op for op in _OPS if hasattr(op, 'variant') for name in op.NAMES}


def translations(form: str) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Entries for ``custom_translation_table`` of ``torch.onnx.export``.

    Args:
        form: ``'plain'``, ``'function'``, or ``'unrolled'``: the nodes of a scan know
            the length, so that their bodies have no control flow.
    """
    return {op.OP.torch_op: _translation(op, form) for op in _OPS}


def _translation(op: Any, form: str) -> Callable[..., Any]:
    returned = len(op.OP.torch_op._schema.returns)

    def translate(*args: Any, **kwargs: Any) -> Any:
        outputs = op.translate(Call.of(op.OP, args, kwargs, form))
        # What the op saves for a backward pass.
        saved = [dead() for _ in range(returned - len(outputs))]
        return [*outputs, *saved] if returned > 1 else outputs[0]

    return translate


def functions(model: onnx.ModelProto) -> list[onnx.FunctionProto]:
    """Local functions for all nodes of our domain that a model has.

    If nodes of one type need several bodies, the most frequent one has the name of the
    type. Nodes with another body are renamed in ``model``.

    Args:
        model: The model, as torch exports it with :func:`translations`.
    """
    graphs = [model.graph, *model.functions]
    nodes = [node for graph in graphs for node in _nodes_of(graph)]
    found = []
    for name, op in _MAKERS.items():
        ours = [node for node in nodes if node.op_type == name]
        variants = [_variant(op, node) for node in ours]
        for number, (variant, _) in enumerate(Counter(variants).most_common()):
            named = f'{name}_{number}' if number else name
            own = [node for node, its in zip(ours, variants) if its == variant]
            for node in own:
                node.op_type = named
            attributes = sorted({a.name for node in own for a in node.attribute})
            inputs = op.OP.names
            found.append(
                function(named, inputs, variant.outputs, attributes, variant.text)
            )
    return found


def _nodes_of(graph: Any) -> Iterator[onnx.NodeProto]:
    """Nodes of our domain in a graph or function, and in its subgraphs."""
    for node in graph.node:
        if node.domain == DOMAIN:
            yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes_of(attribute.g)


def _variant(op: Any, node: onnx.NodeProto) -> Variant:
    there = frozenset(name for name, x in zip(op.OP.names, node.input) if x)
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return op.variant(Node(node.op_type, there, len(node.output), attributes))
