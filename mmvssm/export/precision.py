"""Files whose linear layers and convolutions compute in float16 or int8.

Scans, norms and all else stay in float32, as they do under autocast in PyTorch.
"""

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mmvssm.export.verify import all_nodes, load_images
from mmvssm.export.wrappers import ImageModel

_LAYERS = ('Conv', 'ConvTranspose', 'MatMul', 'Gemm')
_FLOAT, _FLOAT16 = 1, 10


def linear_nodes(proto: Any) -> list[str]:
    """Names of the linear layers and convolutions of a graph: their weight is constant.

    Args:
        proto: An ``onnx.ModelProto``. Where our ops are functions still, what is inside
            of them is not looked at.
    """
    constants = {x.name for x in proto.graph.initializer if x.data_type == _FLOAT}
    return [
        node.name
        for node in proto.graph.node
        if node.op_type in _LAYERS and not node.domain and node.input[1] in constants
    ]


def to_float16(proto: Any, names: Iterable[str]) -> Any:
    """Let some layers compute in float16, with weights that are stored so.

    Args:
        proto: Changed in place.
        names: Of the nodes.

    Returns:
        ``proto``.
    """
    from onnx import helper, numpy_helper

    chosen = set(names)
    constants = {x.name: x for x in proto.graph.initializer if x.data_type == _FLOAT}
    nodes: list[Any] = []
    narrow: dict[str, str] = {}

    def narrowed(name: str) -> str:
        """The tensor of that name in float16."""
        if name not in narrow:
            narrow[name] = f'{name}_float16'
            if name in constants:
                values = numpy_helper.to_array(constants[name])
                limit = np.finfo(np.float16).max
                values = np.clip(values, -limit, limit).astype(np.float16)
                tensor = numpy_helper.from_array(values, narrow[name])
                proto.graph.initializer.append(tensor)
            else:
                nodes.append(
                    helper.make_node('Cast', [name], [narrow[name]], to=_FLOAT16)
                )
        return narrow[name]

    for node in proto.graph.node:
        if node.name not in chosen:
            nodes.append(node)
            continue
        inputs = [narrowed(name) if name else '' for name in node.input]
        output = node.output[0]
        del node.input[:]
        node.input.extend(inputs)
        node.output[0] = f'{output}_of_float16'
        nodes += [node, helper.make_node('Cast', [node.output[0]], [output], to=_FLOAT)]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    _drop_unused(proto)
    return proto


def _drop_unused(proto: Any) -> None:
    """Drop initializers that no node reads."""
    used = {name for node in all_nodes(proto.graph.node) for name in node.input}
    used |= {output.name for output in proto.graph.output}
    kept = [x for x in proto.graph.initializer if x.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)


def to_int8(
    file: str | Path,
    module: ImageModel,
    size: tuple[int, int],
    images: Iterable[str | Path],
    names: Iterable[str],
) -> Any:
    """Quantise some layers, with a scale for each output channel of their weights.

    Args:
        file: The file in float32.
        module: Says how images are normalised.
        size: The images are resized to it.
        images: Files to measure the range of the activations with.
        names: Of the nodes.

    Returns:
        An ``onnx.ModelProto`` with pairs of QuantizeLinear and DequantizeLinear.

    Raises:
        ExportError: An image cannot be read.
    """
    import onnx
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.images = load_images(module, images, size)

        def get_next(self) -> dict[str, np.ndarray] | None:
            found = next(self.images, None)
            return None if found is None else {'image': found[1]}

    with tempfile.TemporaryDirectory() as folder, _quiet():
        target = str(Path(folder, 'int8.onnx'))
        quantization.quantize_static(
            str(file),
            target,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            op_types_to_quantize=list(_LAYERS),
            nodes_to_quantize=list(names),
            extra_options=dict(MatMulConstBOnly=True),
        )
        return onnx.load(target)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without advice to prepare the file, which is done."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
