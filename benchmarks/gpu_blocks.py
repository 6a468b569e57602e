"""The cores of VMamba and of Vim on the GPU: fused, unfused, published, floor.

All run under autocast to bfloat16, as in a model.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import gpu_floor
import gpu_peers
import torch
from gpu_device import Device
from gpu_op import passes
from scan_cpu_inputs import ss2d_inputs
from torch import Tensor
from unfused import is_fused, unfused

from mmvssm.analysis.measuring.timing import Effort, reason
from mmvssm.layers.bimamba import BidirectionalMamba
from mmvssm.ops import bidirectional_scan, ss2d_scan
from mmvssm.ops.bidirectional_scan.direction import Direction

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Ss2dShape:
    """The core of the blocks of a stage of VMamba; ``depth`` is how many there are."""

    batch: int
    channels: int
    height: int
    width: int
    depth: int


@dataclass(frozen=True)
class VimShape:
    """The core of a block of Vim with ``channels``."""

    batch: int
    channels: int
    length: int


def stages(
    batch: int, height: int, width: int, dim: int = 96, depths=(2, 2, 8, 2)
) -> list[Ss2dShape]:
    """Of VMamba-T s1l8, or one like it, on images of that size."""
    return [
        Ss2dShape(batch, dim << i, height // (4 << i), width // (4 << i), depth)
        for i, depth in enumerate(depths)
    ]


SS2D = {
    'VMamba-T, 224, b128': stages(128, 224, 224),
    'VMamba-T, 512x512, b4': stages(4, 512, 512),
    'VMamba-T, 1280x800, b2': stages(2, 800, 1280),
}
VIM = {
    'Vim-S, 224, b128': VimShape(128, 384, 197),
    'Vim-S, 1248, b1': VimShape(1, 384, 6085),
    'Vim-S, 512, b8': VimShape(8, 384, 1025),
    'Vim-T, 1248, b1': VimShape(1, 192, 6085),
}
QUICK_SS2D = {'tiny': stages(1, 32, 64, 4, (1, 2))}
QUICK_VIM = {'tiny': VimShape(2, 16, 9)}


def rows(
    device: Device, effort: Effort, quick: bool
) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Names of the rows, and what measures each."""
    rates = functools.cache(lambda: gpu_floor.measure_rates(device, quick))
    vim = (QUICK_VIM if quick else VIM).items()
    ss2d = (QUICK_SS2D if quick else SS2D).items()
    for name, shapes in ss2d:
        for i, shape in enumerate(shapes):
            yield (
                f'{name}: stage {i + 1}',
                functools.partial(measure_ss2d, device, effort, rates, shape),
            )
    for name, shape in vim:
        yield name, functools.partial(measure_vim, device, effort, rates, shape)


def measure_ss2d(
    device: Device, effort: Effort, rates: Callable[[], dict], shape: Ss2dShape
) -> dict:
    """One row of SS2D's core."""
    names, left_out = gpu_peers.our_backends(device)
    cores = {}
    for name in names:
        if is_fused(ss2d_scan, name):
            cores[f'{name} fused'] = functools.partial(ss2d_scan, backend=name)
        else:
            left_out[f'{name} fused'] = 'it has no fused form'
        cores[f'{name} unfused'] = unfused(ss2d_scan, name)
    try:
        name, core = gpu_peers.published_ss2d()
        cores[f'published ({name})'] = core
    except ImportError as error:
        left_out['published'] = str(error)
    side = dict(height=shape.height, width=shape.width)
    elements = shape.batch * shape.channels * shape.height * shape.width
    sets = [
        _on(device, ss2d_inputs(shape.batch, shape.channels, **side, seed=seed))
        for seed in range(device.sets(DTYPE.itemsize * elements))
    ]
    work = gpu_floor.ss2d_work(
        *(shape.batch, shape.channels, shape.height * shape.width),
        states=1,
        size=DTYPE.itemsize,
    )
    return _measure(device, effort, rates, shape, work, cores, sets, left_out)


def measure_vim(
    device: Device, effort: Effort, rates: Callable[[], dict], shape: VimShape
) -> dict:
    """One row of the core of Vim's mixer: convolutions, scans, gate."""
    names, left_out = gpu_peers.our_backends(device)
    cores = {}
    for name in names:
        if is_fused(bidirectional_scan, name):
            cores[f'{name} fused'] = _two_ways(
                functools.partial(bidirectional_scan, backend=name)
            )
        else:
            left_out[f'{name} fused'] = 'it has no fused form'
        cores[f'{name} unfused'] = _two_ways(unfused(bidirectional_scan, name))
    inner = 2 * shape.channels
    elements = shape.batch * inner * shape.length
    sets = [
        _vim_inputs(device, shape, seed)
        for seed in range(device.sets(2 * DTYPE.itemsize * elements))
    ]
    work = gpu_floor.two_way_work(
        shape.batch, inner, shape.length, states=16, size=DTYPE.itemsize
    )
    return _measure(device, effort, rates, shape, work, cores, sets, left_out)


def _two_ways(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A bidirectional scan of flat tensors: x, z and the weights of both ways."""

    def core(x: Tensor, z: Tensor, *weights: Tensor) -> Tensor:
        half = len(Direction._fields)
        ways = Direction(*weights[:half]), Direction(*weights[half:])
        return function(x.mT, z.mT, *ways, average=True)

    return core


def _vim_inputs(device: Device, shape: VimShape, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    mixer = BidirectionalMamba(shape.channels)
    inner = 2 * shape.channels
    size = (shape.batch, shape.length, inner)
    inputs = [torch.randn(size, device=device.name) for _ in 'xz']
    for end in ('', '_b'):
        conv, x_proj, dt_proj = (
            getattr(mixer, name + end) for name in ('conv1d', 'x_proj', 'dt_proj')
        )
        decay = mixer.A_b_log if end else mixer.A_log
        inputs += [
            *(conv.weight.squeeze(1), conv.bias, x_proj.weight),
            *(dt_proj.weight, dt_proj.bias, -decay.exp(), getattr(mixer, f'D{end}')),
        ]
    return _on(device, inputs, activations=2)


def _on(device: Device, inputs: list[Tensor], activations: int = 1) -> list[Tensor]:
    """Leaves on the device, the first of them in bfloat16."""
    return [
        x.detach().to(device.name, DTYPE if i < activations else None).requires_grad_()
        for i, x in enumerate(inputs)
    ]


def _measure(
    device: Device,
    effort: Effort,
    rates: Callable[[], dict],
    shape: Ss2dShape | VimShape,
    work: dict[str, gpu_floor.Work],
    cores: dict[str, Callable[..., Tensor]],
    sets: list[list[Tensor]],
    left_out: dict[str, str],
) -> dict:
    """Times of the cores, under autocast, and how far their outputs are apart."""
    kind = torch.device(device.name).type

    def mixed(core: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*inputs: Tensor) -> Tensor:
            with torch.autocast(kind, DTYPE):
                return core(*inputs)

        return call

    functions, outputs = {}, {}
    for name, core in cores.items():
        try:
            with torch.no_grad():
                outputs[name] = mixed(core)(*sets[0]).float().cpu()
        except Exception as error:
            left_out[name] = reason(error)
            continue
        for which, function in passes(mixed(core), sets).items():
            functions[name, which] = function
    found = {name: {} for name in outputs}
    first = next(iter(outputs.values()), None)
    for name, out in outputs.items():
        found[name]['difference'] = float((out - first).norm() / first.norm())
    for (name, which), taken in device.measure(functions, effort).items():
        found[name][which] = taken
    return dict(
        shape=asdict(shape),
        rates=rates(),
        floor=gpu_floor.floors(work, rates()),
        contenders=found,
        left_out=left_out,
    )
