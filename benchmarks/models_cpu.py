"""Whole classifiers on the CPU, ours and others of about the same size, in one run.

    python benchmarks/models_cpu.py [--train] [--compile] [--dtypes float32 bfloat16]

measures images a second and peak memory of VMamba-T and -S, Vim-T and -S, Mamba®-S,
MLLA-T, Swin-T (mmseg's), ConvNeXt-T and DeiT-S (plain torch), all with 1000 classes,
random weights and no drop path. In each case, which is a size, a batch, a number of
threads and a mode, all of them take turns in one process. So their ratios hold,
whatever else slows the machine down.

- inference: logits of a batch, in ``eval()``, without gradients.
- training: the same in ``train()``, cross-entropy and all gradients. The step of the
  optimizer is not in it: it depends on the number of parameters alone.
- dtypes: ``bfloat16`` has weights and images in bfloat16, ``autocast`` casts float32
  weights. For both, the differences of the logits from those of float32 are stated.

Peak memory is that of a step in a process of its own: weights, activations, gradients
and work arrays, without the libraries. There it also shows whether a step fits into
memory and takes less than ``--longest`` seconds. If not, that model is left out of the
case, and a line says so.

Rows are kept in the JSON file as soon as they are measured, by default in the file of
this machine in ``benchmarks/results/models_cpu``. The same command goes on after an
interruption. With ``--quick`` nothing is written unless ``--json`` says where to.
"""

import argparse
import functools
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import machines
import torch
from gpu_part import read, write
from models_cpu_report import summary

import mmvssm
from mmvssm.analysis.measuring import probe
from mmvssm.analysis.measuring.steps import (
    DTYPES,
    MODELS,
    MODES,
    PEERS,
    Case,
    Contender,
    difference,
)
from mmvssm.analysis.measuring.timing import Effort, reason
from mmvssm.analysis.measuring.turns import measure
from mmvssm.engine import UsageError, run_tool
from mmvssm.engine.launching.memory import keep_freed_memory

QUICK_EFFORT = Effort(rounds=2, turn=0.0, limit=0.0)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 1
    add = parser.add_argument
    add(
        '--models',
        nargs='+',
        metavar='NAME',
        help=f'{", ".join(PEERS)}, or a name of mmvssm.list_models() (default: '
        f'{" ".join(MODELS)})',
    )
    add(
        '--sizes',
        nargs='+',
        type=_size,
        metavar='SIZE',
        help='side of square images, or HEIGHTxWIDTH (default: 224 512 1024)',
    )
    add('--batch', nargs='+', type=_count, help='images (default: 1 8)')
    add(
        '--threads',
        nargs='+',
        type=_count,
        help=f'of torch (default: {" ".join(map(str, sorted({cores, 1})))})',
    )
    add('--train', action='store_true', help='training, too')
    add('--compile', action='store_true', help='torch.compile, too: takes long')
    add('--dtypes', nargs='+', choices=DTYPES, default=['float32'])
    add(
        '--seconds',
        type=float,
        default=3,
        help='of timed steps after which a contender that had three of them gets no '
        'further turn in a case (default: 3)',
    )
    add(
        '--longest',
        type=float,
        default=20,
        help='of a step; a contender that takes longer is left out (default: 20)',
    )
    add(
        '--against', default='swin_t', metavar='NAME', help='who the others are held to'
    )
    add('--json', type=Path, metavar='FILE', help='rows; those it has are kept')
    add('--plot', type=Path, metavar='FILE', help='draw a picture')
    add('--again', action='store_true', help='measure also rows that the file has')
    add('--show', action='store_true', help='measure nothing, show what the file has')
    add(
        '--quick',
        action='store_true',
        help='tiny images, to see that it runs; the figures say nothing',
    )
    args = parser.parse_args(arguments)
    small = args.quick
    args.models = list(dict.fromkeys(args.models or MODELS))
    args.sizes = args.sizes or [(s, s) for s in ((64,) if small else (224, 512, 1024))]
    args.batch = args.batch or ([1] if small else [1, 8])
    args.threads = args.threads or ([1] if small else sorted({cores, 1}, reverse=True))
    if not args.json and not args.quick:
        args.json = machines.results_file('models_cpu')
    return args


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f'{text!r} is no number of at least 1')
    return int(text)


def _size(text: str) -> tuple[int, int]:
    sides = [_count(side) for side in text.split('x')]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f'{text!r} is not SIDE or HEIGHTxWIDTH')
    return sides[0], sides[-1]


def cases(args: argparse.Namespace) -> list[Case]:
    """What is measured, small images first."""
    modes = MODES if args.train else MODES[:1]
    return [
        Case(*size, batch, threads, mode)
        for size, batch, threads, mode in itertools.product(
            sorted(args.sizes), args.batch, args.threads, modes
        )
    ]


def contenders(args: argparse.Namespace) -> list[Contender]:
    """Who takes turns in every case."""
    return [
        Contender(*who)
        for who in itertools.product(
            args.models, args.dtypes, (False, True) if args.compile else (False,)
        )
    ]


def rows(
    args: argparse.Namespace,
) -> list[tuple[str, set[str], Callable[[], dict]]]:
    """Names of the rows, the contenders each must have, and what measures it."""
    who = contenders(args)
    names = {contender.name for contender in who}
    effort = QUICK_EFFORT if args.quick else Effort(25, 0.02, args.seconds)
    found = [
        (case.name, names, functools.partial(measure, case, who, effort, args.longest))
        for case in cases(args)
    ]
    size = min(args.sizes)
    for dtype in args.dtypes:
        if dtype != 'float32':
            name = f'difference of {dtype}, {size[1]}x{size[0]}'
            work = functools.partial(differences, args, dtype, size)
            found.append((name, set(args.models), work))
    return found


def differences(args: argparse.Namespace, dtype: str, size: tuple[int, int]) -> dict:
    """How logits of a dtype differ from those of float32, for each model."""
    torch.set_num_threads(max(args.threads))
    count = 4 if args.quick else 64
    found, left_out = {}, {}
    for name in args.models:
        try:
            found[name] = difference(name, dtype, size, count)
        except Exception as error:
            left_out[name] = reason(error)
    return dict(dtype=dtype, size=size, contenders=found, left_out=left_out)


def run(args: argparse.Namespace) -> dict:
    """Measure the rows that the file does not have, and write each of them."""
    result = read(args.json) if args.json and args.json.exists() else {}
    done = {row['name']: row for row in result.get('rows', [])}
    runs = result.get('runs', [])
    if args.show:
        if not done:
            raise UsageError(f'{args.json} has no rows to show')
        return result
    if args.json and args.json.exists() and not result:
        raise UsageError(f'{args.json} is no result of this benchmark')
    facts = dict(
        machines.facts(), quick=args.quick, keeps_freed_memory=keep_freed_memory()
    )
    for other in runs:
        if (other['machine'], other['quick']) != (facts['machine'], args.quick):
            raise UsageError(
                f'{args.json} has rows of another machine or of --quick: '
                f'{other["machine"]}, not {facts["machine"]}; name another --json'
            )
    result = dict(runs=[*runs, facts], rows=list(done.values()))
    probe.start(args.models)
    for name, asked, work in rows(args):
        row = done.get(name)
        if row and not args.again and asked <= {*row['contenders'], *row['left_out']}:
            print(f'{name}: kept', flush=True)
            continue
        print(name, flush=True)
        start = time.monotonic()
        found = dict(work(), took=time.monotonic() - start, run=len(runs))
        done[name] = dict(name=name, **found)
        result['rows'] = list(done.values())
        if args.json:
            write(args.json, result)
    return result


def check(args: argparse.Namespace) -> None:
    """Raise a UsageError for what would fail later."""
    known = {*PEERS, *mmvssm.list_models()}
    for name in (*args.models, args.against):
        if name not in known:
            raise UsageError(f"no model '{name}'; there are {', '.join(sorted(known))}")
    if args.show and not args.json:
        raise UsageError('--show needs --json FILE')
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise UsageError(f'--plot needs matplotlib: {error}') from error


def main(args: argparse.Namespace) -> int:
    """Measure, write, print, draw."""
    check(args)
    try:
        result = run(args)
    except KeyboardInterrupt:
        print('\ninterrupted; the same command goes on with the rows that are missing')
        return 130
    print(f'\n{summary(result, args.against)}')
    if args.json and not args.show:
        print(f'\nwritten to {args.json}')
    if args.plot:
        from models_cpu_plot import plot

        print(f'drawn in {plot(result, args.against, args.plot)}')
    return 0


if __name__ == '__main__':
    parsed = parse_args()
    run_tool(lambda: main(parsed))
