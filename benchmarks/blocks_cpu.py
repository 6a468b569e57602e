"""A block of Vim-S on the CPU beside the same block in plain torch.

    python benchmarks/blocks_cpu.py

times one block, residual addition, RMS norm and mixer, on sequences of 197 and
1025 positions, float32, forward and forward + backward, with one and with two
threads:

- ``ours``: :class:`mmvssm.layers.MambaBlock` as it is.
- ``torch linear``: the same with the products of ``in_proj`` and ``out_proj``
  by ``torch.nn.functional.linear``, as everywhere else in torch. Its BLAS is
  slow on processors that are not Intel's; this leaves that gain out.
- ``plain``: ``conv1d``, ``linear`` and two gated scans, the second one on
  flipped copies, the addition and the norm written out. The scan is our
  compiled one, so that what ``ours`` gains comes on top of the scan's own gain.
- ``loop``: the same with the published Python loop for the scan.

All take turns, so that what else the machine does hits all alike, and figures
are medians. A complete run writes ``benchmarks/results/blocks_cpu.json``; with
``--quick`` nothing is written unless ``--out`` says where to.
"""

import argparse
import functools
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import scan_cpu_peers as peers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvssm.analysis.measuring.timing import Effort, interleaved
from mmvssm.collect_env import collect_env
from mmvssm.engine import UsageError, run_tool
from mmvssm.engine.launching.memory import keep_freed_memory
from mmvssm.layers import MambaBlock
from mmvssm.ops import backend_status, selective_scan, use_backend

HERE = Path(__file__).resolve().parent
# Longest sequence on which the backward pass of the loop, whose time grows
# with the square of the length, is measured.
LOOP_BACKWARD = 256
# What plain / ours is to be at least, everywhere.
MARK = 1.3
PASSES = {'forward': 'forward', 'both': 'forward + backward'}


@dataclass(frozen=True)
class Shape:
    """A block with that many channels on a batch of sequences."""

    channels: int
    length: int
    batch: int = 1


FULL = {'Vim-S, 197': Shape(384, 197), 'Vim-S, 1025': Shape(384, 1025)}
QUICK = {'tiny': Shape(32, 9)}


def fast_scan(*inputs: Tensor) -> Tensor:
    """The compiled scan; u, delta, A, B, C, D, z, bias."""
    return selective_scan(*inputs, True, backend='cpu')


def loop_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    bias: Tensor,
) -> Tensor:
    """The published loop, gated."""
    y = peers.loop_scan(u, delta, A, B[:, None], C[:, None], D, bias)
    return y * F.silu(z)


def one_direction(
    x: Tensor, z: Tensor, mixer: nn.Module, suffix: str, scan: Callable
) -> Tensor:
    """A scan of x (B, D, L) with the weights whose names end on ``suffix``."""
    conv, x_proj, dt_proj = (
        getattr(mixer, name + suffix) for name in ('conv1d', 'x_proj', 'dt_proj')
    )
    A = -torch.exp(mixer.A_b_log if suffix else mixer.A_log)
    u = F.conv1d(
        x, conv.weight, conv.bias, padding=conv.weight.shape[2] - 1, groups=x.shape[1]
    )
    u = F.silu(u[..., : x.shape[2]])
    rank, states = dt_proj.weight.shape[1], A.shape[1]
    projected = F.linear(u.mT, x_proj.weight)
    dt, B, C = projected.split((rank, states, states), dim=-1)
    delta = F.linear(dt, dt_proj.weight).mT
    D = getattr(mixer, f'D{suffix}')
    return scan(u, delta, A, B.mT, C.mT, D, z, dt_proj.bias)


def plain_block(
    block: MambaBlock, x: Tensor, residual: Tensor, scan: Callable
) -> tuple[Tensor, Tensor]:
    """``block(x, residual)`` in plain torch operations."""
    residual = x + residual
    scale = torch.rsqrt(residual.square().mean(-1, keepdim=True) + block.norm.eps)
    mixer = block.mixer
    x = F.linear(residual * scale * block.norm.weight, mixer.in_proj.weight)
    x, z = x.mT.chunk(2, dim=1)
    y = one_direction(x, z, mixer, '', scan)
    y = y + one_direction(x.flip(-1), z.flip(-1), mixer, '_b', scan).flip(-1)
    if mixer.average:
        y = y / 2
    return F.linear(y.mT, mixer.out_proj.weight), residual


def torch_linear_block(
    block: MambaBlock, x: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """``block(x, residual)`` with torch's own linear layers."""
    with mock.patch('mmvssm.layers.linear.linear', F.linear):
        return block(x, residual)


CONTENDERS = {
    'ours': lambda block, x, residual: block(x, residual),
    'torch linear': torch_linear_block,
    'plain': functools.partial(plain_block, scan=fast_scan),
    'loop': functools.partial(plain_block, scan=loop_scan),
}


def make_block(shape: Shape) -> tuple[MambaBlock, Tensor, Tensor]:
    """A block as it starts, and its input."""
    torch.manual_seed(0)
    block = MambaBlock(shape.channels)
    size = (shape.batch, shape.length, shape.channels)
    x, residual = (torch.randn(size, requires_grad=True) for _ in range(2))
    return block, x, residual


def passes(shape: Shape) -> dict[tuple[str, str], Callable[[], object]]:
    """What is timed: pass and contender -> function."""
    block, *inputs = make_block(shape)
    leaves = [*inputs, *block.parameters()]
    grads = [torch.ones_like(x, requires_grad=False) for x in inputs]

    def forward(contender: Callable) -> None:
        with torch.no_grad():
            contender(block, *inputs)

    def both(contender: Callable) -> None:
        torch.autograd.grad(contender(block, *inputs), leaves, grads)

    return {
        (which, name): functools.partial(function, contender)
        for name, contender in CONTENDERS.items()
        for which, function in (('forward', forward), ('both', both))
        if (which, name) != ('both', 'loop') or shape.length <= LOOP_BACKWARD
    }


def measure(shapes: dict[str, Shape], threads: int, effort: Effort) -> list[dict]:
    """Times in ``seconds[pass][contender]``, and how often ours fits in the rest."""
    rows = []
    for name, shape in shapes.items():
        with use_backend('cpu'):
            times = interleaved(passes(shape), effort)
        seconds = {which: {} for which in PASSES}
        for (which, contender), taken in times.items():
            seconds[which][contender] = taken
        ratios = {
            which: {
                contender: taken['median'] / found['ours']['median']
                for contender, taken in found.items()
                if contender != 'ours'
            }
            for which, found in seconds.items()
        }
        rows.append(
            dict(
                name=name,
                shape=asdict(shape),
                threads=threads,
                seconds=seconds,
                over_ours=ratios,
            )
        )
    return rows


def table(rows: list[dict]) -> str:
    """Milliseconds of all, and the ratio the mark is for."""
    lines = [
        f'{"ms":14}{"threads":>8} {"":20}'
        + ''.join(f'{name:>14}' for name in CONTENDERS)
        + f'{"plain / ours":>14}'
    ]
    for row in rows:
        for which, found in row['seconds'].items():
            cells = [
                f'{1e3 * found[name]["median"]:14.2f}'
                if name in found
                else f'{"-":>14}'
                for name in CONTENDERS
            ]
            ratio = row['over_ours'][which]['plain']
            lines.append(
                f'{row["name"]:14}{row["threads"]:8} {PASSES[which]:20}'
                + ''.join(f'{cell:>14}' for cell in cells)
                + f'{ratio:13.2f}{" " if ratio >= MARK else "!"}'
            )
    return '\n'.join(lines)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--threads', type=int, nargs='+', default=[1, 2])
    parser.add_argument(
        '--quick',
        action='store_true',
        help='a tiny block, to see that it runs; the figures say nothing',
    )
    parser.add_argument('--out', help='path of the JSON file')
    args = parser.parse_args()
    if args.out is None and not args.quick:
        args.out = str(HERE / 'results/blocks_cpu.json')
    return args


def main(args: argparse.Namespace) -> None:
    """Measure, print and write the result."""
    missing = backend_status()['cpu']
    if missing:
        raise UsageError(f'the cpu backend cannot run here: {missing}.')
    settings = dict(
        threads=args.threads,
        quick=args.quick,
        keeps_freed_memory=keep_freed_memory(),
        load_average_before=os.getloadavg()[0] if hasattr(os, 'getloadavg') else None,
    )
    quick = Effort(rounds=2, turn=1e-4, limit=0.1)
    effort = quick if args.quick else Effort(limit=1.0)
    before, rows = torch.get_num_threads(), []
    for threads in args.threads:
        torch.set_num_threads(threads)
        rows += measure(QUICK if args.quick else FULL, threads, effort)
        print(f'threads: {threads}: done', flush=True)
    torch.set_num_threads(before)
    print(f'\n{table(rows)}')
    worst = min(ratios['plain'] for row in rows for ratios in row['over_ours'].values())
    print(f'\nplain / ours, the worst: {worst:.2f}; to be at least {MARK}')
    if args.out:
        out = Path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        mark = {'what': 'plain / ours', 'at least': MARK, 'worst': worst}
        result = dict(
            environment=collect_env(), settings=settings, blocks=rows, mark=mark
        )
        out.write_text(json.dumps(result, indent=2) + '\n')
        print(f'written to {out}')


if __name__ == '__main__':
    arguments = parse_args()
    run_tool(lambda: main(arguments))
