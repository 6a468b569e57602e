"""Fewer transpositions between channels first and channels last."""

from typing import Any

# What computes each value alone, from one or two tensors.
_ELEMENTWISE = {'Add', 'Sub', 'Mul', 'Div', 'Relu', 'Sigmoid', 'Tanh', 'Erf'}


def move_transpositions(model: Any) -> None:
    """Move transpositions behind elementwise operators, where many meet their inverse.

    The residual stream of a model has channels first, and norms and linear layers want
    channels last. So both terms of each sum are transposed, and so is the sum. Behind
    the sum, one transposition is left, which the next one undoes.

    Args:
        model: An ``onnx_ir.Model``; its graph is changed, subgraphs are not.
    """
    from onnx_ir.passes import common

    # In order: what is moved is seen by the operators that come later.
    for node in list(model.graph):
        if node.domain not in ('', 'ai.onnx'):
            continue
        if node.op_type == 'Transpose':
            _undo(node)
        elif node.op_type in _ELEMENTWISE:
            _move_behind(node)
    common.RemoveUnusedNodesPass()(model)


def _undo(node: Any) -> None:
    """Where a transposition and its inverse meet, read what was there before."""
    before = _transposition(node.inputs[0])
    if before is None or node.outputs[0].is_graph_output():
        return
    first, second = _axes(before), _axes(node)
    if [first[axis] for axis in second] == list(range(len(first))):
        node.outputs[0].replace_all_uses_with(before.inputs[0])


def _move_behind(node: Any) -> None:
    import onnx_ir as ir

    (out,) = node.outputs
    found = [_transposition(x) for x in node.inputs]
    moved = [before for before in found if before is not None]
    if not moved or out.is_graph_output():
        return
    axes = _axes(moved[0])
    alike = all(
        _axes(before) == axes if before is not None else _is_number(x)
        for before, x in zip(found, node.inputs)
    )
    if not alike:
        return
    inputs = [
        x if before is None else before.inputs[0]
        for before, x in zip(found, node.inputs)
    ]
    inner = ir.Value(type=out.type)
    if out.shape is not None:
        sizes = [None] * len(axes)
        for place, axis in enumerate(axes):
            sizes[axis] = out.shape[place]
        inner.shape = ir.Shape(sizes)
    same = ir.node(
        node.op_type, inputs, node.attributes, outputs=[inner], name=node.name
    )
    back = ir.node('Transpose', [inner], dict(perm=axes))
    back.outputs[0].type, back.outputs[0].shape = out.type, out.shape
    node.graph.insert_before(node, [same, back])
    out.replace_all_uses_with(back.outputs[0])
    node.graph.remove(node, safe=True)


def _transposition(x: Any) -> Any:
    """The transposition that a value comes from, or None."""
    node = x.producer()
    if node is None or node.op_type != 'Transpose' or 'perm' not in node.attributes:
        return None
    return node


def _axes(node: Any) -> list[int]:
    return list(node.attributes['perm'].as_ints())


def _is_number(x: Any) -> bool:
    constant = x.const_value
    return constant is not None and constant.size == 1 and len(constant.shape) <= 1
