"""The selective scan on the GPU, shape by shape, beside its peers and the floor."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import gpu_floor
import gpu_peers
import torch
from gpu_device import Device, turns
from gpu_report import COMPILED
from scan_cpu_inputs import op_inputs
from torch import Tensor

from mmvssm.analysis.measuring.timing import Effort, reason
from mmvssm.ops import selective_scan

# Tensors of op_inputs that have the dtype of the activations: u, delta, B, C.
_ACTIVATIONS = (0, 1, 3, 4)


@dataclass(frozen=True)
class OpShape:
    """A scan; ``channels`` are those of a group."""

    batch: int
    groups: int
    channels: int
    length: int
    states: int


# The most telling ones first: the time may run out.
FULL = {
    'VMamba-T stage 1, 224, b128': OpShape(128, 4, 96, 3136, 1),
    'Vim-S, 224, b128': OpShape(128, 1, 768, 197, 16),
    'VMamba-T stage 1, 512, b4': OpShape(4, 4, 96, 16384, 1),
    'Vim-S, 1248, b1': OpShape(1, 1, 768, 6085, 16),
    'VMamba-T stage 3, 224, b128': OpShape(128, 4, 384, 196, 1),
    'VMamba-T v0 stage 1, 224, b128': OpShape(128, 4, 192, 3136, 16),
    'Vim-S, 512, b8': OpShape(8, 1, 768, 1025, 16),
    'Vim-S, 1024, b2': OpShape(2, 1, 768, 4097, 16),
}
QUICK = {'tiny, 1 state': OpShape(2, 2, 8, 13, 1), 'tiny': OpShape(1, 1, 8, 9, 4)}
DTYPES = {'bf16': torch.bfloat16, 'fp32': torch.float32}


def rows(
    device: Device, effort: Effort, quick: bool
) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Names of the rows, and what measures each."""
    rates = functools.cache(lambda: gpu_floor.measure_rates(device, quick))
    shapes = (QUICK if quick else FULL).items()
    for dtype, (name, shape) in itertools.product(DTYPES, shapes):
        yield (
            f'{name}, {dtype}',
            functools.partial(
                *(measure, device, effort, rates, shape, DTYPES[dtype]),
                scans=gpu_peers.scans,
            ),
        )
    # Compiling takes long, so this comes last.
    for name, shape in shapes:
        yield (
            f'{name}, bf16{COMPILED}',
            functools.partial(
                *(measure, device, effort, rates, shape, torch.bfloat16),
                scans=lambda device: (dict(torch=gpu_peers.compiled_scan(device)), {}),
            ),
        )


def make_inputs(
    device: Device, shape: OpShape, dtype: torch.dtype, channels_last: bool, seed: int
) -> list[Tensor]:
    """Leaves of the scan; the weights of the channels are float32."""
    inputs = op_inputs(
        **asdict(shape), channels_last=channels_last, seed=seed, device=device.name
    )
    return [
        x.detach().to(dtype if i in _ACTIVATIONS else torch.float32).requires_grad_()
        for i, x in enumerate(inputs)
    ]


def measure(
    device: Device,
    effort: Effort,
    rates: Callable[[], dict],
    shape: OpShape,
    dtype: torch.dtype,
    scans: Callable[[Device], tuple[dict[str, gpu_peers.Scan], dict[str, str]]],
) -> dict:
    """One row: times of all contenders, errors, memory, the floor."""
    contenders, left_out = scans(device)
    size = dtype.itemsize
    work = gpu_floor.scan_work(**asdict(shape), size=size)
    elements = shape.batch * shape.groups * shape.channels * shape.length
    for name, scan in list(contenders.items()):
        # Backward needs as much again.
        needed = 8 * scan.work_arrays * elements * shape.states
        if needed > device.free_memory():
            left_out[name] = f'needs about {needed / 2**30:.0f} GiB'
            del contenders[name]
    sets = range(device.sets(2 * size * elements))
    layouts = {
        last: [make_inputs(device, shape, dtype, last, seed) for seed in sets]
        for last in {scan.channels_last for scan in contenders.values()}
    }
    functions, errors = {}, {}
    for name, scan in contenders.items():
        made = layouts[scan.channels_last]
        for which, function in passes(scan.function, made).items():
            functions[name, which] = function
        try:
            errors[name] = error_of(scan.function, made[0])
        except Exception as error:
            left_out[name] = reason(error)
    times = device.measure(
        {key: f for key, f in functions.items() if key[0] in errors}, effort
    )
    found = {name: dict(error=error) for name, error in errors.items()}
    for (name, which), taken in times.items():
        found[name][which] = taken
    return dict(
        shape=asdict(shape),
        dtype=str(dtype).removeprefix('torch.'),
        rates=rates(),
        floor=gpu_floor.floors(work, rates()),
        contenders=found,
        left_out=left_out,
    )


def passes(
    function: Callable[..., Tensor], sets: list[list[Tensor]]
) -> dict[str, Callable[[], object]]:
    """``forward`` and ``both`` of a function, over sets of inputs in turn."""
    grads = {}

    def forward() -> None:
        with torch.no_grad():
            function(*next_set()[1])

    def both() -> None:
        number, inputs = next_set()
        out = function(*inputs)
        if number not in grads:
            grads[number] = torch.randn_like(out, requires_grad=False)
        wanted = [x for x in inputs if x.requires_grad]
        torch.autograd.grad(out, wanted, grads[number])

    next_set = turns(enumerate(sets))
    return dict(forward=forward, both=both)


def error_of(function: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, float]:
    """Relative errors of output and gradients of the first sequence of the batch.

    They are those of the run on the whole batch, against float64 on the same
    values. The gradients are those of u, delta, B and C.
    """
    with torch.enable_grad():
        out = function(*inputs)
        grad = torch.randn_like(out, requires_grad=False)
        leaves = [inputs[i] for i in _ACTIVATIONS]
        got = [out, *torch.autograd.grad(out, leaves, grad)]
        exact = [
            x.detach()[:1].double() if i in _ACTIVATIONS else x.detach().double()
            for i, x in enumerate(inputs)
        ]
        leaves = [exact[i].requires_grad_() for i in _ACTIVATIONS]
        u, delta, A, B, C, D, bias = exact
        out = selective_scan(u, delta, A, B, C, D, None, bias, True, backend='torch')
        want = [out, *torch.autograd.grad(out, leaves, grad[:1].double())]
    errors = [
        float((x[:1].detach() - y.detach()).norm() / y.detach().norm())
        for x, y in zip(got, want)
    ]
    return dict(output=errors[0], gradients=max(errors[1:]))
