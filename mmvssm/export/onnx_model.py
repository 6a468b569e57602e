"""Writes a model as an ONNX file, and checks it."""

import contextlib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial as partial_function
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmvssm.export import precision
from mmvssm.export import verify as checks
from mmvssm.export.blame import first_difference
from mmvssm.export.errors import DifferenceError, ExportError
from mmvssm.export.layout import move_transpositions
from mmvssm.export.wrappers import ImageModel, Normalisation, Segmentor, wrap

FORMS = ('plain', 'function', 'unrolled')
# What the bodies of our ops are written in. onnx converts the file to a later one.
OPSET = 18
NEWEST_OPSET = 23
DOMAIN = 'mmvssm'
# Key of the entry that says how the file was made.
METADATA = 'mmvssm'
# protobuf's own limit.
_MOST_BYTES = 2**31 - 2**24
# A constant of more numbers is left to be computed.
_FOLDED = 2**24


def to_onnx(
    model: nn.Module,
    file: str | Path,
    size: int | tuple[int, int] = 224,
    dynamic: Sequence[str] = (),
    form: str = 'plain',
    *,
    task: str | None = None,
    normalise: bool = False,
    normalisation: Normalisation | None = None,
    opset: int = OPSET,
    fp16: bool = False,
    int8: Iterable[str | Path] = (),
    images: Iterable[str | Path] = (),
    bound: float = checks.BOUND,
    runtimes: Sequence[str] | None = None,
    rounds: int = 5,
    metadata: Mapping[str, Any] | None = None,
) -> checks.Report:
    """Write a model as an ONNX file, run it, and compare it with PyTorch.

    The file has the input ``image`` (B, C, H, W) float32 and the outputs ``logits`` (B,
    K) of a classifier or (B, K, H, W) of a segmentor, ``labels`` (B, H, W) int64 of a
    segmentor, or ``map0``, ``map1`` ... of a backbone. It takes the name ``file`` only
    when the check has passed.

    Args:
        model: A classifier or backbone of this package, or a segmentor of mmseg, in
            eval mode, on the CPU.
        file: Where to write it.
        size: Height and width of the image, or one number for both.
        dynamic: Any of ``'batch'`` and ``'size'``; what is not named is 1, and
            ``size``.
        form: ``'plain'``: standard operators, with loops. ``'function'``: each of our
            ops is a local function of standard operators, in whose place
            :func:`mmvssm.onnx_library` puts our kernels. ``'unrolled'``: standard
            operators without control flow, of one size.
        task: ``'logits'``, ``'maps'`` or ``'seg'``; None: what the model is for. See
            :func:`mmvssm.export.wrappers.wrap`.
        normalise: Whether images shall be RGB of 0 to 255.
        normalisation: What the model wants; None: as its data preprocessor says, else
            ImageNet's.
        opset: Version of the standard operators, 18 or later.
        fp16: Whether linear layers and convolutions compute in float16. Then the
            difference is reported, and has no bound.
        int8: Image files to calibrate int8 linear layers and convolutions with. Then
            the difference is reported, and has no bound.
        images: Image files to check with, beside random images.
        bound, runtimes, rounds: See :func:`mmvssm.export.verify.verify`.
        metadata: More entries for the file's metadata, as JSON has them.

    Returns:
        What the check found; printed, it is a table.

    Raises:
        ExportError: The model cannot be exported so, or a package is missing.
        DifferenceError: The file differs from PyTorch. There is no file then.
    """
    for module in ('onnx', 'onnxscript', 'onnxruntime'):
        checks.require(module)
    size = (size, size) if isinstance(size, int) else tuple(size)
    images, int8 = list(images), list(int8)
    module = wrap(model, task, normalise, normalisation)
    _check_options(module, dynamic, form, opset, fp16, int8)
    file = Path(file)
    if file.is_dir():
        raise ExportError(f'{file} is a folder: name a file in it')
    if runtimes is None and form == 'function':
        # OpenVINO does not read local functions.
        runtimes = ['onnxruntime', *(['kernels'] if checks.has_kernels() else [])]
    built = build_proto(module, size, dynamic, form, opset)
    notes = dict(
        task=module.task,
        size=list(size),
        dynamic=list(dynamic),
        form=form,
        normalised_inside=module.normalised_inside,
        mean=list(module.normalisation.mean),
        std=list(module.normalisation.std),
        bgr=module.normalisation.bgr,
        versions=_versions(),
        **_labelling(module),
        **(metadata or {}),
    )
    partial = file.with_name(f'{file.name}.partial')
    check = partial_function(
        checks.verify,
        *(partial, module, size, dynamic),
        runtimes=runtimes,
        rounds=rounds,
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        proto = built.proto
        _save(proto, partial)
        try:
            report = check(images=images, bound=bound)
        except DifferenceError as error:
            if error.report is not None:
                error.report.file = str(file)
            raise _with_layer(error, built.traced, module, size, bound) from error
        if fp16 or int8:
            proto = (
                precision.to_float16(proto, built.layers)
                if fp16
                else precision.to_int8(partial, module, size, int8, built.layers)
            )
            _save(proto, partial)
            before, report = report, check(images=[*images, *int8], bound=None)
            report.before = before
            notes['precision'] = 'float16' if fp16 else 'int8'
        notes['error'] = _errors(report)
        _set_metadata(proto, notes)
        _save(proto, partial)
        os.replace(partial, file)
    except OSError as error:
        raise ExportError(f'cannot write {file}: {error}') from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    report.file = str(file)
    return report


def _labelling(module: ImageModel) -> dict[str, Any]:
    """How a segmentor makes labels of logits, and what they mean."""
    if not isinstance(module, Segmentor):
        return {}
    heads = module.model.decode_head
    head = heads[-1] if isinstance(heads, nn.ModuleList) else heads
    found = dict(
        align_corners=bool(module.model.align_corners),
        threshold=getattr(head, 'threshold', None),
        classes=[f'class {number}' for number in range(module.model.num_classes)],
    )
    meta = getattr(module.model, 'dataset_meta', None) or {}
    for key in ('classes', 'palette'):
        if meta.get(key) is not None:
            found[key] = np.asarray(meta[key]).tolist()
    return found


def _errors(report: checks.Report) -> dict[str, Any]:
    return {
        name: dict(relative=report.error(name), changed=report.changed(name))
        for name in report.runtimes()
    }


def _with_layer(
    error: DifferenceError,
    traced: Any,
    module: ImageModel,
    size: tuple[int, int],
    bound: float,
) -> DifferenceError:
    """The error, with the first layer that differs, if it can be found."""
    image = checks.random_images(module, (1, module.channels, *size))
    try:
        layer = first_difference(traced, module, image, bound)
    except Exception:
        # The graph may not run at all; what is known is said.
        layer = None
    if layer is None:
        return error
    return DifferenceError(
        f'{error}; the first layer that differs is {layer}', error.report
    )


def _check_options(
    module: ImageModel,
    dynamic: Sequence[str],
    form: str,
    opset: int,
    fp16: bool,
    int8: Sequence,
) -> None:
    if form not in FORMS:
        raise ExportError(f'form must be one of {FORMS}, got {form!r}')
    if not OPSET <= opset <= NEWEST_OPSET:
        raise ExportError(
            f'opset must be {OPSET} to {NEWEST_OPSET}, got {opset}: the operators of '
            f'the scan are those of {OPSET}'
        )
    if form == 'unrolled' and 'size' in dynamic:
        raise ExportError(
            "form='unrolled' has one size, because its steps are counted when it is "
            "written: leave out 'size' of dynamic, or take form='plain'"
        )
    if form == 'function' and opset != OPSET:
        raise ExportError(
            f"form='function' has functions of opset {OPSET}: take opset={OPSET}, or "
            "form='plain'"
        )
    if fp16 and int8:
        raise ExportError('fp16 and int8 exclude each other: give one of them')
    if form == 'function' and (fp16 or int8):
        raise ExportError(
            "form='function' is for our kernels, which take float32: take form='plain' "
            'with fp16 or int8'
        )
    where = {x.device.type for x in module.model.parameters()}
    if where - {'cpu'}:
        raise ExportError("the model is not on the CPU: call model.to('cpu') before")
    kinds = {x.dtype for x in module.model.parameters()} - {torch.float32}
    if kinds:
        raise ExportError(
            f'the model has weights of {", ".join(map(str, kinds))}: call '
            'model.float() before; fp16 makes a file with weights in float16'
        )
    number = sum(x.numel() * x.element_size() for x in module.model.parameters())
    if number > _MOST_BYTES:
        raise ExportError(
            f'the model has {number / 2**30:.1f} GiB of weights; an ONNX file takes '
            'less than 2 GiB'
        )


@dataclass(frozen=True)
class Built:
    """A graph, before it is checked.

    Attributes:
        proto: The ``onnx.ModelProto``.
        layers: Names of its linear layers and convolutions outside of our ops.
        traced: As torch made it: longer, but its nodes know their layers.
    """

    proto: Any
    layers: list[str]
    traced: Any


def build_proto(
    module: ImageModel,
    size: tuple[int, int],
    dynamic: Sequence[str] = (),
    form: str = 'plain',
    opset: int = OPSET,
) -> Built:
    """Make the graph of a module. It is not compared with PyTorch yet.

    Args:
        module: Of :func:`mmvssm.export.wrappers.wrap`.
        size, dynamic, form, opset: See :func:`to_onnx`.

    Raises:
        ExportError: torch cannot trace the model, or an operator has no translation.
    """
    import onnx

    from mmvssm.export import aten, bodies

    with _quiet():
        program = _trace(module, size, dynamic)
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                custom_translation_table={
                    **aten.translations(),
                    **bodies.translations(form),
                },
                input_names=['image'],
                output_names=list(module.output_names),
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(
                f'torch cannot write this model as ONNX: {_cause(error)}'
            ) from error
        traced = exported.model_proto
        traced.functions.extend(bodies.functions(traced))
        proto = _optimised(traced, inline=False)
        layers = precision.linear_nodes(proto)
        if form != 'function':
            proto = _optimised(proto, inline=True)
        if opset != OPSET:
            proto = onnx.version_converter.convert_version(proto, opset)
    _name_dimensions(proto, dynamic)
    proto.producer_name = DOMAIN
    proto.producer_version = _versions()['mmvssm']
    onnx.checker.check_model(proto, full_check=True)
    foreign = {node.domain for node in checks.all_nodes(proto.graph.node)} - {
        '',
        'ai.onnx',
    }
    if form != 'function' and foreign:
        raise ExportError(f'there are operators of {sorted(foreign)} left in the file')
    return Built(proto, layers, traced)


def _trace(module: ImageModel, size: tuple[int, int], dynamic: Sequence[str]) -> Any:
    from mmvssm.export.program import to_exported_program

    try:
        return to_exported_program(module, size, dynamic=dynamic)
    except (ExportError, DifferenceError):
        raise
    except Exception as error:
        # torch has no one kind of error for what it cannot trace.
        raise ExportError(f'torch cannot trace this model: {_cause(error)}') from error


def _optimised(proto: Any, inline: bool) -> Any:
    """Inline functions, fold constants, and drop what only debuggers read."""
    import onnx_ir
    from onnx_ir.passes import common
    from onnxscript import optimizer

    model = onnx_ir.from_proto(proto)
    optimizer.optimize_ir(
        model, input_size_limit=_FOLDED, output_size_limit=_FOLDED, inline=inline
    )
    move_transpositions(model)
    common.ClearMetadataAndDocStringPass()(model)
    return onnx_ir.to_proto(model)


def _name_dimensions(proto: Any, dynamic: Sequence[str]) -> None:
    """Call the free sizes of inputs and outputs by their names, not by torch's."""
    shape = proto.graph.input[0].type.tensor_type.shape
    names = ('batch' if 'batch' in dynamic else None, None)
    names += ('height', 'width') if 'size' in dynamic else (None, None)
    known = {
        dim.dim_param: name
        for dim, name in zip(shape.dim, names)
        if name and dim.dim_param
    }
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    for value in values:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(
                    r'\w+', lambda word: known.get(word[0], word[0]), dim.dim_param
                )


def _save(proto: Any, file: Path) -> None:
    import onnx

    onnx.save(proto, str(file))


def _set_metadata(proto: Any, notes: Mapping[str, Any]) -> None:
    import onnx

    kept = {entry.key: entry.value for entry in proto.metadata_props}
    kept[METADATA] = json.dumps(notes)
    onnx.helper.set_model_props(proto, kept)


def read_metadata(properties: Mapping[str, str], file: str | Path) -> dict[str, Any]:
    """How a file was made, from the properties that ONNX keeps beside a graph.

    Args:
        properties: ``custom_metadata_map`` of onnxruntime's ``get_modelmeta()``.
        file: Its name in messages.

    Raises:
        ExportError: It was not made by this package.
    """
    try:
        notes = json.loads(properties[METADATA])
    except (KeyError, ValueError) as error:
        raise ExportError(
            f'{file} does not say how it was made: it is not of tools/export.py'
        ) from error
    return dict(notes)


def _versions() -> dict[str, str]:
    import mmvssm

    return dict(mmvssm=mmvssm.__version__, torch=torch.__version__)


def _cause(error: BaseException) -> str:
    """The first line of what torch's exporter found at the bottom."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip('.')


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says of other packages, and of its progress."""
    loggers = [logging.getLogger(name) for name in ('torch.onnx', 'onnxscript')]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
