"""Runs an exported file where it will run, and compares it with PyTorch."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

from mmvssm.export.errors import DifferenceError, ExportError
from mmvssm.export.library import onnx_library
from mmvssm.export.signal_stack import same_signal_stack
from mmvssm.export.wrappers import ImageModel, Segmentor
from mmvssm.ops import BackendUnavailableError

# Largest difference, relative to the largest value that PyTorch gives: 1e-4 for logits
# of about 10. OpenVINO's functions are less exact, by so much.
BOUND = 1e-5
OPENVINO_FACTOR = 20
# Of the pixels, so many may get another class: where two logits are all but equal.
PIXEL_BOUND = 1e-4
# Two pixels of a small image are no sign of a fault.
_FEW_PIXELS = 2
_SECONDS_OF_TIMING = 30
# Sides of the smallest image that is tried, and what is beside the example's size.
_TINY = (32, 48)


class Runtime:
    """A file, loaded by onnxruntime or OpenVINO on the CPU.

    Args:
        name: ``'onnxruntime'``, ``'openvino'``, or ``'kernels'``: onnxruntime with our
            own kernels.
        file: What was exported.
        threads: How many it computes on.

    Raises:
        ExportError: The runtime is not installed, or unknown.
        BackendUnavailableError: There are no such kernels.
    """

    def __init__(self, name: str, file: str | Path, threads: int = 1):
        self.name = name
        if name == 'openvino':
            self._run = _openvino(file, threads)
        elif name in ('onnxruntime', 'kernels'):
            self._run = _onnxruntime(file, name == 'kernels', threads)
        else:
            raise ExportError(
                f'runtimes are onnxruntime, openvino and kernels, got {name!r}'
            )

    def __call__(self, image: np.ndarray) -> list[np.ndarray]:
        """Outputs in their order, of images (B, C, H, W)."""
        return self._run(image)


def _onnxruntime(
    file: str | Path, kernels: bool, threads: int
) -> Callable[[np.ndarray], list[np.ndarray]]:
    ort = require('onnxruntime')
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Between two calls its threads keep no core busy that PyTorch needs.
    options.add_session_config_entry('session.force_spinning_stop', '1')
    # Errors only: warnings are about initializers that it removes.
    options.log_severity_level = 3
    if kernels:
        options.register_custom_ops_library(onnx_library())
    session = ort.InferenceSession(
        str(file), options, providers=['CPUExecutionProvider']
    )
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})


def _openvino(
    file: str | Path, threads: int
) -> Callable[[np.ndarray], list[np.ndarray]]:
    core = require('openvino').Core()
    # In bfloat16, which it takes by itself on some processors, nothing is exact.
    settings = {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': threads}
    with same_signal_stack():
        model = core.compile_model(core.read_model(str(file)), 'CPU', settings)
        request = model.create_infer_request()

    def run(image: np.ndarray) -> list[np.ndarray]:
        with same_signal_stack():
            found = request.infer([image])
        return [np.array(found[output]) for output in model.outputs]

    return run


def require(module: str) -> object:
    """Import a package of the extra ``export``.

    Raises:
        ExportError: It is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExportError(
            f'{module} is not installed: pip install "mmvssm[export]", with '
            '-c constraints.txt from a checkout'
        ) from error


def installed_runtimes() -> list[str]:
    """``'onnxruntime'``, and ``'openvino'`` where it is installed."""
    from importlib.util import find_spec

    return ['onnxruntime', *(['openvino'] if find_spec('openvino') else [])]


def has_kernels() -> bool:
    """Whether onnxruntime can have our kernels, by :func:`mmvssm.onnx_library`."""
    try:
        onnx_library()
    except BackendUnavailableError:
        return False
    return True


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        runtime: Its name.
        images: ``'random'``, or the name of an image file.
        shape: B, C, H, W.
        error: Largest difference, relative to the largest value; None of labels alone.
            NaN where one of the two is not finite.
        changed: Part of the images or pixels that get another class; None of maps.
        number: Of the images or pixels.
    """

    runtime: str
    images: str
    shape: tuple[int, ...]
    error: float | None
    changed: float | None
    number: int


@dataclass
class Report:
    """What a check found.

    Attributes:
        file: What was checked.
        rows: The comparisons.
        nodes: Of the graph, with those inside of loops and branches.
        functions: Model-local functions.
        size: Of the file, in bytes.
        milliseconds: Median time of one image of the example's size, on one thread, by
            runtime and for ``'pytorch'``.
        before: Of the file in float32, if this one is in float16 or int8.
    """

    file: str
    rows: list[Row] = field(default_factory=list)
    nodes: int = 0
    functions: int = 0
    size: int = 0
    milliseconds: dict[str, float] = field(default_factory=dict)
    before: 'Report | None' = None

    def error(self, runtime: str) -> float | None:
        """The largest of a runtime; NaN if one is."""
        errors = [r.error for r in self.rows if r.runtime == runtime]
        known = [error for error in errors if error is not None]
        return float(np.max(known)) if known else None

    def changed(self, runtime: str) -> float | None:
        """Part of all images or pixels of a runtime that get another class."""
        rows = [r for r in self.rows if r.runtime == runtime and r.changed is not None]
        number = sum(row.number for row in rows)
        return sum(row.changed * row.number for row in rows) / number if rows else None

    def runtimes(self) -> list[str]:
        """Names, in the order of the comparisons."""
        return list(dict.fromkeys(row.runtime for row in self.rows))

    def __str__(self) -> str:
        functions = f', {self.functions} functions' if self.functions else ''
        lines = [
            f'{self.file}: {self.nodes} nodes{functions}, {self.size / 2**20:.1f} MiB',
            f'{"runtime":12} {"images":16} {"shape":18} {"error":>9} {"changed":>9}',
        ]
        for row in self.rows:
            shape = 'x'.join(map(str, row.shape))
            lines.append(
                f'{row.runtime:12} {row.images[-16:]:16} {shape:18} '
                f'{_number(row.error):>9} {_number(row.changed):>9}'
            )
        if self.milliseconds:
            lines.append(f'one image, one thread: {self._times()}')
        if self.before is not None:
            size = self.before.size / 2**20
            lines.append(f'in float32: {size:.1f} MiB, {self.before._times()}')
        return '\n'.join(lines)

    def _times(self) -> str:
        times = (f'{name} {time:.1f} ms' for name, time in self.milliseconds.items())
        return ', '.join(times) or 'not timed'


def _number(value: float | None) -> str:
    return '-' if value is None else f'{value:.1e}' if value else '0'


def check_sizes(
    module: ImageModel, size: tuple[int, int], dynamic: Sequence[str]
) -> list[tuple[int, int]]:
    """The example's size and, if it is dynamic, a larger, an odd and a tiny one."""
    if 'size' not in dynamic:
        return [size]
    height, width = size
    larger = (height + 32, width + 64)
    odd = (height - 1 if height % 2 == 0 else height, width + 1 + width % 2)
    return [size, larger, odd, _tiny(module, size)]


def _tiny(module: ImageModel, size: tuple[int, int]) -> tuple[int, int]:
    """The smallest of a few sizes that PyTorch takes."""
    for factor in (1, 2, 4, 8):
        tiny = (_TINY[0] * factor, _TINY[1] * factor)
        try:
            _eager(module, np.zeros((1, module.channels, *tiny), np.float32))
        except (ValueError, RuntimeError, AssertionError):
            continue
        return tiny
    return size


def random_images(
    module: ImageModel, shape: tuple[int, int, int, int], seed: int = 0
) -> np.ndarray:
    """Noise on two scales, normalised or of 0 to 255 as the module takes it."""
    rng = np.random.default_rng(seed)
    batch, channels, height, width = shape
    coarse = rng.standard_normal((batch, channels, -(-height // 16), -(-width // 16)))
    coarse = coarse.repeat(16, 2).repeat(16, 3)[:, :, :height, :width]
    noise = coarse + 0.5 * rng.standard_normal(shape)
    if module.normalised_inside:
        noise = np.clip(np.round(128 + 50 * noise), 0, 255)
    return noise.astype(np.float32)


def load_images(
    module: ImageModel,
    paths: Iterable[str | Path],
    size: tuple[int, int] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Read image files as the module takes them.

    Args:
        module: Says how they are normalised.
        paths: Files that Pillow reads.
        size: Height and width to resize to; None leaves them.

    Yields:
        The name of each file, and the image (1, C, H, W).

    Raises:
        ExportError: A file cannot be read, or the module takes other than 1 or 3
            channels.
    """
    from PIL import Image

    for path in paths:
        if module.channels not in (1, 3):
            raise ExportError(
                f'{path} is read with 1 or 3 channels, and the model takes '
                f'{module.channels}: leave out the images'
            )
        try:
            with Image.open(path) as picture:
                picture = picture.convert('RGB' if module.channels == 3 else 'L')
        except OSError as error:
            raise ExportError(f'cannot read the image {path}: {error}') from error
        if size is not None:
            picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
        pixels = np.asarray(picture, np.float32)
        pixels = pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)
        yield Path(path).name, prepare(module, pixels[None])


def prepare(module: ImageModel, image: np.ndarray) -> np.ndarray:
    """RGB of 0 to 255 -> what the module takes."""
    if module.normalised_inside:
        return np.ascontiguousarray(image, np.float32)
    wanted = module.normalisation
    if wanted.bgr:
        image = image[:, ::-1]
    mean, std = (
        np.asarray(numbers, np.float32).reshape(-1, 1, 1)
        for numbers in (wanted.mean, wanted.std)
    )
    return np.ascontiguousarray((image - mean) / std, np.float32)


def verify(
    file: str | Path,
    module: ImageModel,
    size: tuple[int, int],
    dynamic: Sequence[str] = (),
    *,
    images: Iterable[str | Path] = (),
    bound: float | None = BOUND,
    pixel_bound: float = PIXEL_BOUND,
    runtimes: Sequence[str] | None = None,
    rounds: int = 5,
) -> Report:
    """Run a file and compare it with PyTorch.

    It runs on random images at the example's size, with one image and, if the batch is
    dynamic, three; if the size is dynamic at three more sizes, an odd and a tiny one
    among them; and on the images given.

    Args:
        file: What was exported.
        module: What it was exported from.
        size: Height and width of the example.
        dynamic: Which of ``'batch'`` and ``'size'`` are free in the file.
        images: Image files. They are resized to the example's size unless the size is
            dynamic.
        bound: Of the difference, relative to the largest value that PyTorch gives; for
            OpenVINO 20 times as much. None checks only that all numbers are finite.
        pixel_bound: Of the part of the images or pixels whose class changes; for
            OpenVINO 20 times as much.
        runtimes: Names; None: onnxruntime, and OpenVINO where it is installed. Also
            ``'kernels'``: onnxruntime with :func:`mmvssm.onnx_library`.
        rounds: How often each is timed, within half a minute; 0 times nothing.

    Raises:
        DifferenceError: A bound is exceeded, or a number is not finite, or a runtime
            does not run the file.
        ExportError: A runtime is not installed, or an image cannot be read.
    """
    report = Report(str(file))
    report.nodes, report.functions, report.size = describe(file)
    cases = list(_cases(module, size, dynamic, images))
    names = list(runtimes or installed_runtimes())
    with _telling_logits(file, module) as (path, compared):
        wanted = [_eager(compared, image) for _, image in cases]
        for name in names:
            try:
                run = Runtime(name, path)
                for (kind, image), want in zip(cases, wanted):
                    report.rows.append(compare(name, kind, image, want, run(image)))
            except ExportError:
                raise
            except Exception as error:
                # Runtimes raise kinds of their own.
                raise DifferenceError(
                    f'{name} does not run the file (runtimes= or --runtimes can leave '
                    f'it out): {_first_line(error)}',
                    report,
                ) from error
            _judge(report, name, bound, pixel_bound)
    if rounds:
        running = {name: Runtime(name, file) for name in names}
        report.milliseconds = _times(module, running, cases[0][1], rounds)
    return report


class _LabelsAndLogits(nn.Module):
    """A segmentor that gives both."""

    def __init__(self, module: Segmentor):
        super().__init__()
        self.logits = Segmentor(
            *(module.model, module.channels, module.normalisation),
            *(module.normalised_inside, 'logits'),
        )

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (logits,) = self.logits(image)
        return self.logits.labels(logits), logits


@contextmanager
def _telling_logits(
    file: str | Path, module: ImageModel
) -> Iterator[tuple[str | Path, nn.Module]]:
    """A file of labels, with its logits as a second output, and the same of PyTorch.

    Labels alone would hide any fault of a model that finds one class everywhere.
    """
    onnx = require('onnx')
    values: list[str] = []
    if isinstance(module, Segmentor) and module.task == 'seg':
        model = onnx.load(str(file))
        made_by = {node.output[0]: node for node in model.graph.node}
        node = made_by.get('labels')
        values = list(node.input) if node and node.op_type == 'ArgMax' else []
    if not values:
        yield file, module
        return
    value = onnx.helper.make_tensor_value_info(values[0], 1, [None] * 4)
    model.graph.output.append(value)
    path = Path(f'{file}.logits')
    try:
        onnx.save(model, str(path))
        del model
        yield path, _LabelsAndLogits(module)
    finally:
        path.unlink(missing_ok=True)


def _cases(
    module: ImageModel,
    size: tuple[int, int],
    dynamic: Sequence[str],
    images: Iterable[str | Path],
) -> Iterator[tuple[str, np.ndarray]]:
    batches = (1, 3) if 'batch' in dynamic else (1,)
    sizes = check_sizes(module, size, dynamic)
    shapes = [(batch, *size) for batch in batches]
    # Each size once; batch and size vary together.
    shapes += [
        (batches[i % len(batches)], *other) for i, other in enumerate(sizes[1:], 1)
    ]
    for seed, (batch, *others) in enumerate(shapes):
        shape = (batch, module.channels, *others)
        yield 'random', random_images(module, shape, seed)
    yield from load_images(module, images, None if 'size' in dynamic else size)


def _eager(module: nn.Module, image: np.ndarray) -> list[np.ndarray]:
    with torch.no_grad():
        return [x.numpy() for x in module(torch.from_numpy(image))]


def compare(
    runtime: str,
    kind: str,
    image: np.ndarray,
    want: Sequence[np.ndarray],
    got: Sequence[np.ndarray],
) -> Row:
    """One row of a report, from the outputs of PyTorch and of a runtime."""
    shapes = [x.shape for x in want], [x.shape for x in got]
    if shapes[0] != shapes[1]:
        raise ValueError(f'outputs have shapes {shapes[1]}, PyTorch gives {shapes[0]}')
    error: float | None = None
    changed: float | None = None
    number = 0
    for a, b in zip(want, got):
        if a.dtype.kind == 'i':
            changed, number = float((a != b).mean()), a.size
            continue
        here = _difference(a, b)
        error = here if error is None else float(np.maximum(error, here))
        if len(want) == 1 and a.shape[1] > 1:
            other = a.argmax(1) != b.argmax(1)
            changed, number = float(other.mean()), other.size
    return Row(runtime, kind, image.shape, error, changed, number)


def _difference(want: np.ndarray, got: np.ndarray) -> float:
    """Largest, relative to the largest wanted value; NaN if one is not finite."""
    if not (np.isfinite(want).all() and np.isfinite(got).all()):
        return float('nan')
    if not want.size:
        return 0.0
    largest = float(np.abs(want).max())
    return float(np.abs(want - got).max()) / max(largest, 1e-12)


def _judge(
    report: Report, runtime: str, bound: float | None, pixel_bound: float
) -> None:
    factor = OPENVINO_FACTOR if runtime == 'openvino' else 1
    for row in report.rows:
        if row.runtime != runtime:
            continue
        at = f'{runtime} at {"x".join(map(str, row.shape))} ({row.images})'
        if row.error is not None and not np.isfinite(row.error):
            raise DifferenceError(
                f'{at}: there is a number that is not finite in the outputs', report
            )
        if bound is None:
            continue
        if row.error is not None and row.error > bound * factor:
            raise DifferenceError(
                f'{at} differs from PyTorch by {row.error:.1e} of the largest value, '
                f'and the bound is {bound * factor:.1e}',
                report,
            )
        allowed = max(pixel_bound * factor * row.number, _FEW_PIXELS)
        if row.error is None and row.changed * row.number > allowed:
            raise DifferenceError(
                f'{at} gives {row.changed:.1e} of the pixels another class than '
                f'PyTorch, and the bound is {pixel_bound * factor:.1e}',
                report,
            )


def describe(file: str | Path) -> tuple[int, int, int]:
    """Nodes (with those inside of others), functions and bytes of a file."""
    onnx = require('onnx')
    model = onnx.load(str(file))
    return (
        count_nodes(model.graph.node),
        len(model.functions),
        Path(file).stat().st_size,
    )


def count_nodes(nodes: Iterable) -> int:
    """Number of nodes of a graph, and of those inside of loops and branches."""
    return sum(1 for _ in all_nodes(nodes))


def all_nodes(nodes: Iterable) -> Iterator:
    """Nodes of a graph, and those inside of loops and branches."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from all_nodes(attribute.g.node)


def _times(
    module: ImageModel, running: dict[str, Runtime], image: np.ndarray, rounds: int
) -> dict[str, float]:
    """Medians, taken by turns, so that other work on the machine meets all alike."""
    runs: dict[str, Callable] = dict(pytorch=lambda x: _eager(module, x), **running)
    times: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    with one_thread():
        for place in range(rounds + 1):
            if place > 1 and time.perf_counter() - began > _SECONDS_OF_TIMING:
                break
            for name, run in runs.items():
                start = time.perf_counter()
                run(image)
                # The first one fills caches.
                if place:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(found) for name, found in times.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:500]
