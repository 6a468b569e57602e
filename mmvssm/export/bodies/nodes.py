"""Calls of our ops in an exported program, and the nodes that they become."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from onnx import TensorProto, defs
from onnxscript import ir
from onnxscript import opset18 as op
from onnxscript.values import Op as OnnxOp
from onnxscript.values import Opset

from mmvssm.export.bodies.text import DOMAIN, VERSION
from mmvssm.export.errors import ExportError
from mmvssm.ops.operator import Op

_OURS = Opset(DOMAIN, VERSION)
_TYPES = {
    int: defs.OpSchema.AttrType.INT,
    float: defs.OpSchema.AttrType.FLOAT,
    str: defs.OpSchema.AttrType.STRING,
    list: defs.OpSchema.AttrType.INTS,
}
_DTYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
}


class Call(NamedTuple):
    """A call of one of our ops.

    Attributes:
        inputs: Values of the graph by the names of the op's declaration, in order; None
            for one that is missing.
        options: Options by name.
        unrolled: Whether the bodies must not have control flow.
    """

    inputs: dict[str, Any]
    options: dict[str, Any]
    unrolled: bool

    @classmethod
    def of(
        cls,
        declared: Op[Any, Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        form: str,
    ) -> 'Call':
        """Sort the arguments of torch's op by the names in its schema.

        Raises:
            ExportError: The call does not compute in float32.
        """
        names = [argument.name for argument in declared.torch_op._schema.arguments]
        named = dict(zip(names, args)) | dict(kwargs)
        call = cls(
            {name: named.get(name) for name in declared.names},
            {name: named[name] for name in declared.option_types},
            form == 'unrolled',
        )
        call._refuse_dtypes(declared)
        return call

    def length(self, *sizes: Any) -> dict[str, int]:
        """The attribute of a scan that is unrolled: its number of positions.

        Raises:
            ExportError: One of the sizes is not fixed.
        """
        if not self.unrolled:
            return {}
        if not all(isinstance(size, int) for size in sizes):
            raise ExportError(
                "the form 'unrolled' writes out the positions of a fixed size; export "
                "with a fixed size, or in the form 'plain'"
            )
        return dict(length=prod(sizes))

    def _refuse_dtypes(self, declared: Op[Any, Any]) -> None:
        found = {name: x.dtype for name, x in self.inputs.items() if x is not None}
        for name, kind in declared.option_types.items():
            if kind is torch.dtype:
                found[name] = self.options[name]
        for name, dtype in found.items():
            if dtype is not None and int(dtype) != TensorProto.FLOAT:
                shown = _DTYPES.get(int(dtype), dtype)
                raise ExportError(
                    f'{declared.name} is exported to ONNX in float32 only, and its '
                    f'{name} is {shown}; convert the model and its input to float32, '
                    f'and export it without autocast'
                )


def add_node(
    name: str,
    inputs: Sequence[Any],
    attributes: Mapping[str, Any],
    outputs: Sequence[str] = ('y',),
) -> Any:
    """Add one node of our domain; its output, or a tuple of several.

    Args:
        name: Type of the node.
        inputs: Values, None for one that is missing.
        attributes: int, float, str, list of int, or tensors.
        outputs: Names of the outputs.
    """
    kind = defs.OpSchema.FormalParameter
    optional = defs.OpSchema.FormalParameterOption.Optional
    schema = defs.OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=[
            kind(f'x{i}', 'T', param_option=optional) for i, _ in enumerate(inputs)
        ],
        outputs=[kind(output, 'T') for output in outputs],
        type_constraints=[('T', ['tensor(float)'], '')],
        attributes=[
            defs.OpSchema.Attribute(
                key, _TYPES.get(type(value), defs.OpSchema.AttrType.TENSOR)
            )
            for key, value in attributes.items()
        ],
    )
    return OnnxOp(_OURS, name, schema)(*inputs, **attributes)


def sizes(x: Any) -> list[int]:
    """Sizes of a parameter."""
    return [int(size) for size in x.shape]


def dead() -> Any:
    """A value for an output that nothing reads."""
    return op.Constant(value=ir.tensor([0.0], dtype=ir.DataType.FLOAT))
