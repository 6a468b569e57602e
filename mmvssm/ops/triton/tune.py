"""Measures which tiles of the Triton kernels are the fastest on this GPU.

    python -m mmvssm.ops.triton.tune                    # widths of all published models
    python -m mmvssm.ops.triton.tune --models vmamba_t vim_s --image 512 --batch 8

It takes minutes, most of them compiling, and writes the file that ops look tiles
up in from then on (:mod:`mmvssm.ops.triton.tuning`), after each width. Tiles that
do not compile, or whose results are others, are passed over.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from mmvssm.ops.triton import runtime, tiles, tuning

# Channels of the first stage, doubled from stage to stage; its groups are routes.
VMAMBA = {'vmamba_t': 96, 'vmamba_s': 96, 'vmamba_b': 128}
# Channels of the blocks, whose scan has twice as many.
PLAIN = {'vim_t': 192, 'vim_s': 384, 'vim_b': 768}
PLAIN |= {'mambar_t': 192, 'mambar_s': 384, 'mambar_b': 768, 'mambar_l': 1024}
AnyTile: TypeAlias = tiles.ScanTile | tiles.Tile
# Results in bfloat16 that differ by more are those of another function.
_TOLERANCE = 2e-2
_DEVICE = 'cuda'
_MOST_WARPS, _MOST_VALUES = 16, 64


@dataclass(frozen=True)
class Task:
    """A tile to be found.

    Attributes:
        function: That of ``tiles`` which chooses it.
        sizes: Its arguments.
        inputs: Makes the tensors of a run.
        run: An op that uses the tile; its output and, if it does, its gradients.
        fixed: Numbers of the tile that must stay what they are.
    """

    function: tuning.Tunable[AnyTile]
    sizes: tuple[int, ...]
    inputs: Callable[[], list[Tensor]]
    run: Callable[..., list[Tensor]]
    fixed: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.function.__name__


def tasks(models: list[str], image: int, batch: int) -> list[Task]:
    """What the models ask for, each tile once."""
    found: dict[tuple[str, tuple[int, ...]], Task] = {}
    for model in models:
        if model in VMAMBA:
            made = _vmamba_tasks(VMAMBA[model], image, batch)
        else:
            made = _plain_tasks(PLAIN[model], (image // 16) ** 2 + 1, batch)
        for task in made:
            found.setdefault((task.name, task.sizes), task)
    return list(found.values())


def _vmamba_tasks(width: int, image: int, batch: int) -> Iterator[Task]:
    for stage in range(4):
        channels, side = width << stage, max(1, image // (4 << stage))
        for backward in (False, True):
            yield scan_task(batch, 4, channels, side * side, 1, backward)


def _plain_tasks(width: int, length: int, batch: int) -> Iterator[Task]:
    for backward in (False, True):
        yield scan_task(batch, 1, 2 * width, length, 16, backward)
    yield convolution_task(batch, 2 * width, length)
    yield norm_task(batch * length, width)


def scan_task(
    batch: int, groups: int, channels: int, length: int, states: int, backward: bool
) -> Task:
    """One pass of the scan of ``groups`` times ``channels`` channels."""
    from mmvssm.ops import selective_scan

    rows = groups * channels

    def inputs() -> list[Tensor]:
        u, delta = (_normal(batch, length, rows).mT for _ in range(2))
        B, C = (
            _normal(batch, length, groups, states).permute(0, 2, 3, 1) for _ in 'BC'
        )
        A = -torch.rand(rows, states, device=_DEVICE) - 0.1
        D, bias = (torch.randn(rows, device=_DEVICE) for _ in range(2))
        return [u, delta, A, B, C, D, bias]

    def run(*tensors: Tensor) -> Tensor:
        u, delta, A, B, C, D, bias = tensors
        out = selective_scan(u, delta, A, B, C, D, None, bias, True, backend='triton')
        assert isinstance(out, Tensor), 'the last state is not asked for'
        return out

    # The forward pass is the same whatever the tile of the backward pass.
    timed = _both(run) if backward else _forward(run)
    return Task(tiles.scan_tile, (states, channels, backward), inputs, timed)


def convolution_task(batch: int, channels: int, length: int) -> Task:
    """The convolutions of the bidirectional scan."""
    from mmvssm.ops import Direction, bidirectional_scan

    # One state: the scan is to take little of the time.
    rank, states, taps = 8, 1, 4
    shapes: dict[str, tuple[int, ...]] = dict(
        conv_weight=(channels, taps),
        conv_bias=(channels,),
        x_proj_weight=(rank + 2 * states, channels),
        dt_proj_weight=(channels, rank),
        dt_proj_bias=(channels,),
        A=(channels, states),
        D=(channels,),
    )

    def inputs() -> list[Tensor]:
        weights: list[Tensor] = []
        for _ in range(2):
            way = Direction(
                **{
                    name: torch.randn(shape, device=_DEVICE) / 8
                    for name, shape in shapes.items()
                }
            )
            weights += way._replace(
                A=-way.A.abs(),
                x_proj_weight=way.x_proj_weight.bfloat16(),
                dt_proj_weight=way.dt_proj_weight.bfloat16(),
            )
        return [*(_normal(batch, length, channels).mT for _ in 'xz'), *weights]

    def run(x: Tensor, z: Tensor, *weights: Tensor) -> Tensor:
        half = len(weights) // 2
        ways = Direction(*weights[:half]), Direction(*weights[half:])
        return bidirectional_scan(x, z, *ways, backend='triton')

    return Task(tiles.convolution_tile, (channels,), inputs, _both(run))


def norm_task(rows: int, channels: int) -> Task:
    """Residual addition and RMS norm."""
    from mmvssm.ops import add_rms_norm

    def inputs() -> list[Tensor]:
        x, weight = _normal(rows, channels), torch.randn(channels, device=_DEVICE)
        return [x, weight, torch.randn(rows, channels, device=_DEVICE)]

    def run(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        return add_rms_norm(x, weight, residual, backend='triton')[0]

    # Its programs own whole rows.
    return Task(tiles.norm_tile, (channels,), inputs, _both(run), fixed=('channels',))


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=_DEVICE, dtype=torch.bfloat16)


def _both(run: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """Forward and backward: the output and all gradients."""

    def both(*inputs: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = run(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    return both


def _forward(run: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """The output alone."""

    @torch.no_grad()
    def forward(*inputs: Tensor) -> list[Tensor]:
        return [run(*inputs)]

    return forward


def neighbours(tile: AnyTile, fixed: tuple[str, ...] = ()) -> list[AnyTile]:
    """Tiles with one or two of the numbers halved or doubled.

    Those that would give a thread more than 64 values are left out.

    Args:
        fixed: Numbers that stay what they are.
    """
    free = [name for name in tile._fields if name not in fixed]
    found = []
    for factors in itertools.product((0.5, 1, 2), repeat=len(free)):
        if not 1 <= sum(factor != 1 for factor in factors) <= 2:
            continue
        numbers = {n: f * getattr(tile, n) for n, f in zip(free, factors)}
        changed = tile._replace(**{n: int(number) for n, number in numbers.items()})
        if min(numbers.values()) >= 1 and _fits(changed):
            found.append(changed)
    return found


def _fits(tile: AnyTile) -> bool:
    values = tile.channels * getattr(tile, 'rows', 1)
    return (
        tile.warps <= _MOST_WARPS
        and values <= _MOST_VALUES * 32 * tile.warps
        and tiles.SCAN_CHUNK % getattr(tile, 'part', 1) == 0
    )


def measure(run: Callable[[], object]) -> float:
    """Seconds of a call on the GPU, the median of many."""
    from triton.testing import do_bench

    milliseconds: float = do_bench(run, warmup=10, rep=50, return_mode='median')
    return milliseconds / 1e3


def tune(
    task: Task,
    time: Callable[[Callable[[], object]], float] = measure,
    say: Callable[[str], None] = print,
) -> AnyTile:
    """Find the fastest tile of a task, and keep it.

    Beginning with the tile that is chosen without measurements, it goes from the
    fastest so far to the fastest of its neighbours until none is faster.

    Args:
        task: What for.
        time: Seconds of a call.
        say: What becomes of the line that sums it up.

    Returns:
        The tile.

    Raises:
        RuntimeError: Kernels run on no GPU here.
    """
    inputs = task.inputs()
    default = task.function.__wrapped__(*task.sizes)
    with tuning.trying(task.name, task.sizes, default._asdict()):
        want = task.run(*inputs)
        seconds = {default: time(lambda: task.run(*inputs))}
    best: AnyTile = default
    before: AnyTile | None = None
    while best != before:
        before = best
        for tile in neighbours(best, task.fixed):
            if tile not in seconds:
                seconds[tile] = _try(task, tile, inputs, want, time)
        best = min(seconds, key=lambda tile: seconds[tile])
    tuning.record(task.name, task.sizes, best._asdict(), seconds[best])
    gain = seconds[default] / seconds[best]
    say(
        f'{task.name}{task.sizes}: {tuple(best)} {1e3 * seconds[best]:.3f} ms, '
        f'{gain:.2f} times as fast as {tuple(default)}, of {len(seconds)} tiles'
    )
    return best


def _try(
    task: Task,
    tile: AnyTile,
    inputs: list[Tensor],
    want: list[Tensor],
    time: Callable[[Callable[[], object]], float],
) -> float:
    """Seconds with a tile; infinity if it does not do."""
    with tuning.trying(task.name, task.sizes, tile._asdict()):
        try:
            got = task.run(*inputs)
            errors = [float((x - y).norm() / y.norm()) for x, y in zip(got, want)]
            # NaN is no small error.
            if not all(error < _TOLERANCE for error in errors):
                return float('inf')
            return time(lambda: task.run(*inputs))
        except Exception:
            # Triton has many ways to say that a tile is too large.
            return float('inf')


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    known = [*VMAMBA, *PLAIN]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--models', nargs='+', choices=known, default=known)
    parser.add_argument('--image', type=int, default=224, help='side of the images')
    parser.add_argument('--batch', type=int, default=32)
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    """Tune what the models ask for."""
    missing = runtime.unavailable()
    if missing or tuning.device_key() is None:
        reason = missing or "tiles are measured on a GPU, not in Triton's interpreter"
        print(f'error: {reason}', file=sys.stderr)
        return 2
    print(f'{tuning.device_key()}: {tuning.path()}')
    for task in tasks(args.models, args.image, args.batch):
        tune(task, say=lambda line: print(line, flush=True))
    return 0


if __name__ == '__main__':
    sys.exit(main(parse_args()))
