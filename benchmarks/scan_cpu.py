"""The compiled scan on the CPU beside its peers and the floor of the machine.

    python benchmarks/scan_cpu.py

measures four things, float32, with one and with two threads:

- ``op``: the selective scan at the shapes of Vim and of VMamba, forward and
  backward, against the published Python loop, a parallel scan in plain torch,
  our own ``torch`` backend and the floor (see ``scan_cpu_floor.py``).
- ``ss2d``: the fused core of VMamba's SS2D against our own unfused form, which
  runs the same scan on copies of the map.
- ``network``: VMamba-T classifiers against themselves on the published loop
  and against themselves with the core left out.
- ``memory``: peaks of forward and backward.

All that is compared takes turns, so that what else the machine does hits all
of it alike, and figures are medians. The process keeps the memory it frees
(:func:`mmvssm.engine.launching.memory.keep_freed_memory`): page faults would otherwise
be a large and erratic part of every time.

A peer of the op counts with the time on tensors as its published code has
them: channels-first for the loop, channels-last for the parallel scan. The
times on both are in the table and in the result.

A complete run writes the result of this machine to ``benchmarks/results/scan_cpu``
and a plot beside it. The kernels run on the best instruction set of the machine;
``MMVSSM_CPU_ISA=avx2`` measures another, and the floor with it. With ``--quick`` or
``--only`` nothing is written unless ``--out`` says where to.
"""

import argparse
import functools
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import machines
import scan_cpu_memory
import scan_cpu_peers as peers
import scan_cpu_report as report
import torch
from scan_cpu_floor import MOVED, Floor, floor_seconds
from scan_cpu_inputs import op_inputs, ss2d_inputs
from torch import Tensor
from unfused import unfused

from mmvssm.analysis.measuring import process_memory
from mmvssm.analysis.measuring.timing import Effort, interleaved
from mmvssm.backbones import VSSM
from mmvssm.engine import UsageError, run_tool
from mmvssm.engine.launching.memory import keep_freed_memory
from mmvssm.heads import ClassificationHead, ImageClassifier
from mmvssm.ops import (
    backend_status,
    list_scan_orders,
    scan_order,
    selective_scan,
    ss2d_scan,
    use_backend,
)

# Longest sequence on which the backward pass of the loop, whose time grows
# with the square of the length, is measured.
LOOP_BACKWARD = 256


@dataclass(frozen=True)
class OpShape:
    """A scan; ``channels`` are those of a group."""

    batch: int
    groups: int
    channels: int
    length: int
    states: int


@dataclass(frozen=True)
class Ss2dShape:
    """The core of a block with ``channels`` of VMamba."""

    batch: int
    channels: int
    height: int
    width: int
    ssm_ratio: int = 1


@dataclass(frozen=True)
class Network:
    """A classifier on square images; ``arch`` is VSSM's."""

    arch: str | dict
    image: int


@dataclass(frozen=True)
class Plan:
    """What is measured, by name, and how long."""

    op: dict[str, OpShape]
    ss2d: dict[str, Ss2dShape]
    network: dict[str, Network]
    op_memory: OpShape
    ss2d_memory: Ss2dShape
    effort: Effort
    floor: dict[str, int]


FULL = Plan(
    op={
        'Vim-T, 196': OpShape(1, 1, 384, 196, 16),
        'Vim-S, 1024': OpShape(1, 1, 768, 1024, 16),
        'VMamba stage 1, 224, batch 4': OpShape(4, 4, 192, 3136, 1),
        'VMamba stage 1, 512': OpShape(1, 4, 192, 16384, 1),
    },
    ss2d={
        's1l8 stage 1, 224, batch 4': Ss2dShape(4, 96, 56, 56),
        's1l8 stage 3, 224, batch 4': Ss2dShape(4, 384, 14, 14),
        's2l5 stage 1, 224, batch 4': Ss2dShape(4, 96, 56, 56, 2),
        's1l8 stage 1, 512x512': Ss2dShape(1, 96, 128, 128),
        's1l8 stage 1, 800x1280': Ss2dShape(1, 96, 200, 320),
    },
    network={
        'VMamba-T s1l8': Network('t_s1l8', 224),
        'VMamba-T s2l5': Network('t_s2l5', 224),
    },
    op_memory=OpShape(1, 4, 192, 16384, 1),
    ss2d_memory=Ss2dShape(1, 96, 128, 128),
    effort=Effort(),
    floor={},
)
QUICK = Plan(
    op={
        'Vim, tiny': OpShape(1, 1, 32, 12, 16),
        'VMamba, tiny': OpShape(2, 4, 16, 30, 1),
    },
    ss2d={'tiny': Ss2dShape(1, 16, 5, 6)},
    network={'tiny': Network(dict(depths=(1, 1, 1, 1), dims=8), 32)},
    # Large enough for what the process holds to show it.
    op_memory=OpShape(1, 4, 16, 16384, 1),
    ss2d_memory=Ss2dShape(1, 16, 256, 256),
    effort=Effort(rounds=2, turn=1e-4, limit=0.1),
    floor=dict(values=2**16, passes=100),
)


def our_scan(*inputs: Tensor, backend: str = 'cpu') -> Tensor:
    """:func:`mmvssm.ops.selective_scan` with the arguments of the peers."""
    u, delta, A, B, C, D, bias = inputs
    return selective_scan(u, delta, A, B, C, D, None, bias, True, backend=backend)


SCANS = {
    'ours': our_scan,
    'loop': peers.loop_scan,
    'parallel': peers.parallel_scan,
    'torch': functools.partial(our_scan, backend='torch'),
}
CORES = {
    'fused': functools.partial(ss2d_scan, backend='cpu'),
    'unfused': unfused(ss2d_scan, 'cpu'),
}
# The other scan orders with four sets of weights, fused.
ORDERS = {
    name: functools.partial(ss2d_scan, backend='cpu', orders=name)
    for name in list_scan_orders()
    if name != 'cross' and len(scan_order(name, 2, 2)) == 4
}


def passes(
    function: Callable[..., Tensor], inputs: list[Tensor]
) -> dict[str, Callable[[], object]]:
    """What is timed of a function: ``forward``, ``both`` and ``backward``."""
    # The gradient as the op hands it on, with the strides of its output.
    grad = torch.ones_like(inputs[0], requires_grad=False)

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    def both() -> None:
        torch.autograd.grad(function(*inputs), inputs, grad)

    outputs = []

    def backward() -> None:
        if not outputs:
            outputs.append(function(*inputs))
        torch.autograd.grad(outputs[0], inputs, grad, retain_graph=True)

    return dict(forward=forward, both=both, backward=backward)


def measure_op(plan: Plan, threads: int) -> list[dict]:
    """Times of the op and of its peers, and the floors, at every shape.

    Times are in ``seconds[pass][peer][layout]``.
    """
    floor = Floor(**plan.floor)
    rows = []
    for name, shape in plan.op.items():
        functions = {('floor', key): f for key, f in floor.functions(threads).items()}
        for last in (True, False):
            layout = 'channels_last' if last else 'channels_first'
            inputs = op_inputs(**asdict(shape), channels_last=last)
            for who, scan in SCANS.items():
                for which, function in passes(scan, inputs).items():
                    if which == 'backward' and who != 'ours':
                        continue
                    slow = who == 'loop' and shape.length > LOOP_BACKWARD
                    if which == 'forward' or not slow:
                        functions[which, who, layout] = function
        times = interleaved(functions, plan.effort)
        costs = {key[1]: t['median'] for key, t in times.items() if key[0] == 'floor'}
        seconds = {}
        for key, taken in times.items():
            if key[0] != 'floor':
                which, who, layout = key
                seconds.setdefault(which, {}).setdefault(who, {})[layout] = taken
        rows.append(
            dict(
                name=name,
                shape=asdict(shape),
                threads=threads,
                seconds=seconds,
                rates={key: 1 / cost for key, cost in costs.items()},
                floor={
                    which: floor_seconds(which, costs, **asdict(shape))
                    for which in MOVED
                },
            )
        )
    return rows


def measure_ss2d(plan: Plan, threads: int) -> list[dict]:
    """Times of SS2D's core in ``seconds[pass][form]``: fused or not, and by order."""
    rows = []
    for name, shape in plan.ss2d.items():
        inputs = ss2d_inputs(**asdict(shape))
        functions = {
            (which, form): function
            for form, core in {**CORES, **ORDERS}.items()
            for which, function in passes(core, inputs).items()
            if which != 'backward'
        }
        times = interleaved(functions, plan.effort)
        seconds = {'forward': {}, 'both': {}}
        for (which, form), taken in times.items():
            seconds[which][form] = taken
        rows.append(
            dict(name=name, shape=asdict(shape), threads=threads, seconds=seconds)
        )
    return rows


def measure_network(plan: Plan, threads: int) -> list[dict]:
    """Times of one image through a classifier, in ``seconds[core]``."""
    cores = {'ours': ss2d_scan, 'loop': peers.loop_ss2d, 'no core': peers.no_ss2d}
    rows = []
    for name, network in plan.network.items():
        torch.manual_seed(0)
        backbone = VSSM(network.arch, out_indices=(3,), out_norm=False)
        head = ClassificationHead(backbone.out_channels[-1])
        model = ImageClassifier(backbone, head).eval()
        image = torch.randn(1, 3, network.image, network.image)
        functions = {
            core: functools.partial(run_network, model, image, function)
            for core, function in cores.items()
        }
        rows.append(
            dict(
                name=name,
                image=network.image,
                threads=threads,
                seconds=interleaved(functions, plan.effort),
            )
        )
    return rows


@torch.no_grad()
def run_network(model: torch.nn.Module, image: Tensor, core: Callable) -> Tensor:
    """Logits of an image by a model whose SS2D layers have another core."""
    with mock.patch('mmvssm.layers.ss2d.ss2d_scan', core), use_backend('cpu'):
        return model(image)


def measure_memory(plan: Plan, threads: int) -> list[dict]:
    """Peaks of the op and of the two forms of SS2D, see ``scan_cpu_memory``."""
    tasks = {
        'op': plan.op_memory,
        'fused': plan.ss2d_memory,
        'unfused': plan.ss2d_memory,
    }
    rows = []
    for what, shape in tasks.items():
        found = scan_cpu_memory.measure(what, threads, **asdict(shape))
        rows.append(dict(what=what, shape=asdict(shape), threads=threads, bytes=found))
    return rows


PARTS = {
    'op': measure_op,
    'ss2d': measure_ss2d,
    'network': measure_network,
    'memory': measure_memory,
}


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--threads', type=int, nargs='+', default=[1, 2])
    parser.add_argument(
        '--only',
        type=lambda names: names.split(','),
        metavar='PART,...',
        help=f'of {", ".join(PARTS)}',
    )
    parser.add_argument(
        '--quick',
        action='store_true',
        help='tiny shapes, to see that it runs; the figures say nothing',
    )
    parser.add_argument('--out', help='path of the JSON file')
    args = parser.parse_args()
    unknown = sorted(set(args.only or ()) - set(PARTS))
    if unknown:
        parser.error(f'--only: no part {unknown}, there are {list(PARTS)}')
    if args.out is None and not args.quick and not args.only:
        args.out = str(machines.results_file('scan_cpu'))
    return args


def measure(plan: Plan, parts: list[str], threads: list[int]) -> dict[str, list[dict]]:
    """Run the parts; each one's rows, of all numbers of threads."""
    if 'memory' in parts and not process_memory.possible():
        print('memory: only measured on Linux, left out')
        parts = [part for part in parts if part != 'memory']
    found = {part: [] for part in parts}
    before = torch.get_num_threads()
    for part, count in itertools.product(parts, threads):
        torch.set_num_threads(count)
        found[part] += PARTS[part](plan, count)
        print(f'{part}, threads: {count}: done', flush=True)
    torch.set_num_threads(before)
    return found


def main(args: argparse.Namespace) -> None:
    """Measure, print, and write the result and its plot."""
    if args.out:
        # Now: without matplotlib it would fail when all is measured.
        import scan_cpu_plot
    missing = backend_status()['cpu']
    if missing:
        raise UsageError(f'the cpu backend cannot run here: {missing}.')
    settings = dict(
        threads=args.threads,
        quick=args.quick,
        keeps_freed_memory=keep_freed_memory(),
        load_average_before=os.getloadavg()[0] if hasattr(os, 'getloadavg') else None,
    )
    plan = QUICK if args.quick else FULL
    parts = measure(plan, args.only or list(PARTS), args.threads)
    marks = report.marks(parts)
    print(f'\n{report.tables(parts)}\n\n{report.marks_table(marks, args.threads)}')
    if args.out:
        out = Path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        result = dict(**machines.facts(), settings=settings, **parts, marks=marks)
        out.write_text(json.dumps(result, indent=2) + '\n')
        picture = scan_cpu_plot.plot(result, out.with_suffix('.png'))
        print(f'written to {out} and {picture}')


if __name__ == '__main__':
    arguments = parse_args()
    run_tool(lambda: main(arguments))
