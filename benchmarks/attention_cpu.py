"""Linear attention on the CPU beside softmax attention and the scan of Vim.

    python benchmarks/attention_cpu.py

measures, float32, on sequences of 196 to 16384 positions with 384 channels
(those inside Vim-T), forward and forward with backward:

- ``linear``: :func:`mmvssm.ops.linear_attention`, with rotation and normaliser
  as in MLLA, 12 heads.
- ``softmax``: torch's ``scaled_dot_product_attention``, 12 heads.
- ``scan``: the selective scan of one direction of Vim, 16 states, on the
  backend that a call gets by itself. Vim scans in both directions.

None of them has the projections around it. All functions at all lengths take
turns in one run, and figures are medians. What is to be met is the growth of
the linear attention: per position, 16384 of them may cost at most 1.1 times as
much as 4096.

Then it measures the maps of MLLA-T's stages, for images of 224x224 and 512x512,
batch 1 and 8, one thread and two. With one thread that is processor time, which
other work on the machine changes little:

- ``compiled``: the same op by its compiled kernels, heads of 32 channels.
- ``torch``: the same op by the backend ``torch``.
- ``one head``: the compiled op with one query and one key of 32 channels for all
  values, as in the ablation's row without several heads.
- ``scan`` and ``scan, 1 state``: as above, at the same channels; VMamba's scans
  have one state.

A complete run writes ``benchmarks/results/attention_cpu.json`` and a plot
beside it; with ``--quick`` nothing is written unless ``--out`` says where to.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from scan_cpu import passes
from scan_cpu_inputs import op_inputs
from torch import Tensor

from mmvssm.analysis.measuring.timing import Effort, interleaved
from mmvssm.collect_env import collect_env
from mmvssm.engine import UsageError, run_tool
from mmvssm.engine.launching.memory import keep_freed_memory
from mmvssm.layers import rotary_tables
from mmvssm.ops import (
    backend_status,
    choose_backend,
    linear_attention,
    selective_scan,
)

HERE = Path(__file__).resolve().parent
PASSES = ('forward', 'both')
MOST_GROWTH = 1.1


@dataclass(frozen=True)
class Plan:
    """What is measured; lengths are squares, the last two show the growth."""

    lengths: tuple[int, ...] = (196, 1024, 4096, 16384)
    channels: int = 384
    heads: int = 12
    states: int = 16
    # MLLA-T's maps: side of the first stage and its channels; batches; threads.
    sides: tuple[int, ...] = (56, 128)
    first_channels: int = 64
    batches: tuple[int, ...] = (1, 8)
    thread_counts: tuple[int, ...] = (1, 2)
    # Turns so long that a first call that is not counted warms up the caches for
    # every length alike, but for the slowest of softmax.
    effort: Effort = Effort(rounds=6, turn=0.2, limit=1.2)

    stage_effort: Effort = Effort(rounds=5, turn=0.03, limit=0.3)


_BRIEF = Effort(rounds=2, turn=1e-4, limit=0.1)
QUICK = Plan((16, 36, 64), 16, 2, 4, (8,), 32, (1,), (1,), _BRIEF, _BRIEF)
HEAD = 32  # channels of a head of MLLA


@dataclass(frozen=True)
class Stage:
    """A stage of MLLA-T: maps (batch, channels, side, side)."""

    batch: int
    side: int
    channels: int

    def attention(
        self, backend: str = 'cpu', one_head: bool = False
    ) -> tuple[Callable, list[Tensor]]:
        """The op and its inputs, the values first, which are like the output."""
        keys = HEAD if one_head else self.channels
        generator = torch.Generator().manual_seed(0)
        inputs = [
            torch.randn(self.batch, self.side**2, width, generator=generator)
            for width in (self.channels, keys, keys)
        ]
        for x in inputs:
            x.requires_grad_()
        rotary = rotary_tables(self.side, self.side, keys, like=inputs[0]).unbind()

        def function(v: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return linear_attention(q, k, v, keys // HEAD, rotary, backend=backend)

        return function, inputs

    def scan(self, states: int) -> tuple[Callable, list[Tensor]]:
        """A scan of as many channels, and its inputs."""
        plan = Plan(channels=self.channels, states=states)
        return scan(plan, self.side**2, self.batch)


def linear(plan: Plan, length: int) -> tuple[Callable, list[Tensor]]:
    """The op and its inputs."""
    side = math.isqrt(length)
    inputs = _normal(3, 1, length, plan.channels)
    rotary = rotary_tables(side, side, plan.channels, like=inputs[0]).unbind()
    function = functools.partial(linear_attention, heads=plan.heads, rotary=rotary)
    return function, inputs


def softmax(plan: Plan, length: int) -> tuple[Callable, list[Tensor]]:
    """torch's op and its inputs, heads beside one another in memory."""
    inputs = _normal(3, 1, length, plan.heads, plan.channels // plan.heads)
    inputs = [x.detach().transpose(1, 2).requires_grad_() for x in inputs]
    return F.scaled_dot_product_attention, inputs


def scan(plan: Plan, length: int, batch: int = 1) -> tuple[Callable, list[Tensor]]:
    """The op and its inputs, with softplus and skip."""
    inputs = op_inputs(batch, 1, plan.channels, length, plan.states, channels_last=True)

    def function(u, delta, A, B, C, D, bias):
        return selective_scan(u, delta, A, B, C, D, None, bias, True)

    return function, inputs


MIXERS = {'linear': linear, 'softmax': softmax, 'scan': scan}


def _normal(number: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator).requires_grad_() for _ in range(number)
    ]


def measure(plan: Plan) -> list[dict]:
    """Times of all mixers at all lengths, in ``seconds[pass][mixer]``."""
    functions = {
        (which, who, length): function
        for length in plan.lengths
        for who, make in MIXERS.items()
        for which, function in passes(*make(plan, length)).items()
        if which in PASSES
    }
    times = interleaved(functions, plan.effort)
    return [
        dict(
            length=length,
            seconds={
                which: {who: times[which, who, length] for who in MIXERS}
                for which in PASSES
            },
        )
        for length in plan.lengths
    ]


def measure_stages(plan: Plan) -> list[dict]:
    """Times at the stages of MLLA-T, in ``seconds[pass][who]``."""
    stages = [
        Stage(batch, max(1, side >> number), plan.first_channels << number)
        for batch in plan.batches
        for side in plan.sides
        for number in range(4)
    ]
    threads_before, rows = torch.get_num_threads(), []
    for threads in plan.thread_counts:
        torch.set_num_threads(threads)
        for stage in stages:
            calls = {
                'compiled': stage.attention(),
                'torch': stage.attention('torch'),
                'one head': stage.attention(one_head=True),
                'scan': stage.scan(plan.states),
                'scan, 1 state': stage.scan(1),
            }
            functions = {
                (which, who): function
                for who, call in calls.items()
                for which, function in passes(*call).items()
                if which in PASSES
            }
            if threads == 1:
                functions = {
                    name: functools.partial(processor_seconds, function)
                    for name, function in functions.items()
                }
            times = interleaved(functions, plan.stage_effort)
            seconds = {
                which: {who: times[which, who] for who in calls} for which in PASSES
            }
            rows.append(dict(asdict(stage), threads=threads, seconds=seconds))
    torch.set_num_threads(threads_before)
    return rows


def processor_seconds(function: Callable[[], object]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def stages_table(rows: list[dict]) -> str:
    """Milliseconds of the compiled attention, and of the others relative to it."""
    others = [who for who in rows[0]['seconds'][PASSES[0]] if who != 'compiled']
    columns = ('{:10}{:>8}{:>6}{:>18}{:>14}' + '{:>15}' * len(others)).format
    lines = [
        'MLLA-T, times relative to the compiled attention',
        columns('pass', 'threads', 'batch', 'map', 'compiled, ms', *others),
    ]
    for which in PASSES:
        for row in rows:
            times = {who: t['median'] for who, t in row['seconds'][which].items()}
            size = f'{row["side"]}x{row["side"]}x{row["channels"]}'
            ratios = (f'{times[who] / times["compiled"]:.2f}' for who in others)
            own = f'{1e3 * times["compiled"]:.3f}'
            lines.append(
                columns(which, row['threads'], row['batch'], size, own, *ratios)
            )
    return '\n'.join(lines)


def growth(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Time per position at the last length, over that at the one before."""
    shorter, longer = rows[-2:]
    return {
        which: {
            who: longer['seconds'][which][who]['median']
            / longer['length']
            / (shorter['seconds'][which][who]['median'] / shorter['length'])
            for who in MIXERS
        }
        for which in PASSES
    }


def table(rows: list[dict], grown: dict[str, dict[str, float]]) -> str:
    """Milliseconds of the linear attention, and of the others relative to it."""
    columns = '{:10}{:>10}{:>12}{:>18}{:>15}'.format
    lines = [
        columns('pass', 'length', 'linear, ms', 'softmax / linear', 'scan / linear')
    ]
    for which in PASSES:
        for row in rows:
            times = {who: t['median'] for who, t in row['seconds'][which].items()}
            ratios = (f'{times[who] / times["linear"]:.2f}' for who in list(MIXERS)[1:])
            lines.append(
                columns(which, row['length'], f'{1e3 * times["linear"]:.2f}', *ratios)
            )
    lines += [
        '',
        f'time per position, {rows[-1]["length"]} to {rows[-2]["length"]} positions',
    ]
    for which, found in grown.items():
        figures = ', '.join(f'{who} {value:.2f}' for who, value in found.items())
        miss = '' if found['linear'] <= MOST_GROWTH else ' !'
        lines.append(f'{which:10}{figures}; linear at most {MOST_GROWTH}{miss}')
    return '\n'.join(lines)


def plot(result: dict, path: Path) -> Path:
    """Draw time per position, and times relative to the linear attention."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    rows = result['rows']
    lengths = [row['length'] for row in rows]
    figure, panels = plt.subplots(1, 2, figsize=(14, 5.5), layout='constrained')
    colours = dict(zip(MIXERS, ('#2b6ea6', '#e0902f', '#5f9f4e')))
    for which, style in zip(PASSES, ('o-', 's--')):
        name = dict(forward='forward', both='forward + backward')[which]
        for who, colour in colours.items():
            seconds = [row['seconds'][which][who]['median'] for row in rows]
            ours = [row['seconds'][which]['linear']['median'] for row in rows]
            each = [1e6 * t / n for t, n in zip(seconds, lengths)]
            options = dict(color=colour, label=f'{who}, {name}')
            panels[0].plot(lengths, each, style, **options)
            if who != 'linear':
                ratios = [t / n for t, n in zip(seconds, ours)]
                panels[1].plot(lengths, ratios, style, **options)
    panels[1].axhline(1, color=colours['linear'], label='linear')
    panels[0].set_title('Time per position', fontweight='bold')
    panels[0].set_ylabel('microseconds')
    panels[1].set_title('Time / time of the linear attention', fontweight='bold')
    panels[1].set_ylabel('ratio')
    for panel in panels:
        panel.set_xscale('log', base=2)
        panel.set_yscale('log')
        panel.set_xticks(lengths, map(str, lengths))
        panel.set_xlabel('positions')
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    settings = result['settings']
    figure.suptitle(
        f'{settings["channels"]} channels, batch 1, float32, '
        f'threads: {settings["threads"]}, {result["environment"]["Machine"]["CPU"]}; '
        f'scan: {settings["states"]} states, backend {settings["scan_backend"]}'
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--threads', type=int, help="of torch (default: torch's own choice)"
    )
    parser.add_argument(
        '--quick',
        action='store_true',
        help='tiny shapes, to see that it runs; the figures say nothing',
    )
    parser.add_argument('--out', help='path of the JSON file')
    args = parser.parse_args()
    if args.out is None and not args.quick:
        args.out = str(HERE / 'results/attention_cpu.json')
    return args


def main(args: argparse.Namespace) -> None:
    """Measure, print, and write the result and its plot."""
    if args.out:
        # Now: without it the plot would fail when all is measured.
        import matplotlib  # noqa: F401
    missing = backend_status()['cpu']
    if missing:
        raise UsageError(f'the cpu backend cannot run here: {missing}.')
    if args.threads:
        torch.set_num_threads(args.threads)
    plan = QUICK if args.quick else Plan()
    settings = dict(
        threads=torch.get_num_threads(),
        quick=args.quick,
        keeps_freed_memory=keep_freed_memory(),
        channels=plan.channels,
        heads=plan.heads,
        states=plan.states,
        scan_backend=choose_backend('cpu', torch.float32),
    )
    rows = measure(plan)
    grown = growth(rows)
    print(table(rows, grown))
    stages = measure_stages(plan)
    print(f'\n{stages_table(stages)}')
    if args.out:
        out = Path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        result = dict(
            environment=collect_env(),
            settings=settings,
            rows=rows,
            growth=grown,
            stages=stages,
        )
        out.write_text(json.dumps(result, indent=2) + '\n')
        print(f'written to {out} and {plot(result, out.with_suffix(".png"))}')


if __name__ == '__main__':
    arguments = parse_args()
    run_tool(lambda: main(arguments))
