"""SS2D's core of two checkouts of this repository, side by side on the CPU.

    git worktree add ../before COMMIT && (cd ../before && python setup.py build_ext -i)
    python benchmarks/ss2d_checkouts.py ../before [--runs 31] [--json FILE]

Each checkout has a process of its own. They take turns, run by run, so that whatever
else the machine does hits both alike. Printed are the medians at the SS2D rows of
``scan_cpu.py``, this checkout's relative to the other's, and the geometric mean.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Batch, channels, height, width and ssm_ratio of scan_cpu.py's rows.
ROWS = {
    's1l8 stage 1, 224, batch 4': (4, 96, 56, 56, 1),
    's1l8 stage 3, 224, batch 4': (4, 384, 14, 14, 1),
    's2l5 stage 1, 224, batch 4': (4, 96, 56, 56, 2),
    's1l8 stage 1, 512x512': (1, 96, 128, 128, 1),
    's1l8 stage 1, 800x1280': (1, 96, 200, 320, 1),
}


class Worker:
    """A process that runs one checkout."""

    def __init__(self, checkout: Path, threads: int):
        path = os.pathsep.join([str(checkout), str(HERE)])
        self.process = subprocess.Popen(
            [sys.executable, __file__, '--worker', str(threads), str(checkout)],
            env={**os.environ, 'PYTHONPATH': path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, row: str, which: str) -> float:
        """Seconds of one pass."""
        self.process.stdin.write(json.dumps([row, which]) + '\n')
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def work(threads: int, checkout: str) -> None:
    """Run what comes in, and say how long it took."""
    import torch
    from scan_cpu_inputs import ss2d_inputs

    import mmvssm
    from mmvssm.engine.launching.memory import keep_freed_memory

    assert Path(mmvssm.__file__).is_relative_to(Path(checkout).resolve())
    keep_freed_memory()
    torch.set_num_threads(threads)
    inputs = {name: ss2d_inputs(*shape) for name, shape in ROWS.items()}
    for line in sys.stdin:
        row, which = json.loads(line)
        start = time.perf_counter()
        with torch.set_grad_enabled(which == 'both'):
            y = mmvssm.ops.ss2d_scan(*inputs[row], backend='cpu')
            if which == 'both':
                torch.autograd.grad(y, inputs[row], torch.ones_like(y))
        print(time.perf_counter() - start, flush=True)


def compare(other: Path, runs: int, threads: int) -> dict:
    """Medians of both checkouts, and their ratios."""
    workers = {'other': Worker(other, threads), 'this': Worker(HERE.parent, threads)}
    rows = []
    for row in ROWS:
        for which in ('forward', 'both'):
            seconds = {name: [] for name in workers}
            for i in range(runs + 2):
                for name in list(workers)[:: 1 if i % 2 else -1]:
                    taken = workers[name].run(row, which)
                    # The first two fill caches.
                    if i > 1:
                        seconds[name].append(taken)
            medians = {name: statistics.median(x) for name, x in seconds.items()}
            ratio = medians['this'] / medians['other']
            rows.append(dict(row=row, which=which, ratio=ratio, seconds=medians))
            print(f'{row:28} {which:8} {1e3 * medians["other"]:8.3f} ms  {ratio:.3f}')
    mean = statistics.geometric_mean(row['ratio'] for row in rows)
    print(f'geometric mean {mean:.3f}')
    return dict(rows=rows, geometric_mean=mean, runs=runs, threads=threads)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('other', type=Path, help='the other checkout, with its kernels')
    parser.add_argument('--runs', type=int, default=31)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--json', type=Path, help='where to keep the result')
    args = parser.parse_args()
    found = compare(args.other.resolve(), args.runs, args.threads)
    if args.json:
        from mmvssm.collect_env import collect_env

        found['machine'] = collect_env()['Machine']
        args.json.write_text(json.dumps(found, indent=2) + '\n')


if __name__ == '__main__':
    if sys.argv[1:2] == ['--worker']:
        work(int(sys.argv[2]), sys.argv[3])
    else:
        main()
