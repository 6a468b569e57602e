"""One part of ``gpu_suite.py`` in a process of its own.

Rows that the part's file has already are not measured again. After each row the
file is written anew, so whatever ends the process costs one row.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from gpu_device import Device

from mmvssm.analysis.measuring.timing import Effort, reason

PARTS = {'op': 'gpu_op', 'blocks': 'gpu_blocks', 'models': 'gpu_models'}
EFFORT = Effort(rounds=12, turn=0.0, limit=1.0)
QUICK_EFFORT = Effort(rounds=2, turn=0.0, limit=0.0)
# Exit status when the device answers no more and a new process must go on.
LOST = 3


def read(file: Path) -> dict:
    """What a part has found so far; what is cut off or not there is nothing."""
    try:
        found = json.loads(file.read_text())
        return found if isinstance(found.get('rows'), list) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def write(file: Path, found: dict) -> None:
    """Write all of a file or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f'.{os.getpid()}')
    unfinished.write_text(json.dumps(found, indent=1) + '\n')
    unfinished.replace(file)


def run(
    rows: Iterable[tuple[str, Callable[[], dict]]],
    file: Path,
    facts: dict,
    seconds: float,
    alive: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Measure the rows that are missing until the time is out.

    Args:
        facts: Of this process; kept beside the rows, which have their number.
        seconds: After which no further row is begun.
        alive: Raises if the device can do no more.

    Returns:
        Whether the device is still good.
    """
    end = clock() + seconds
    before = read(file)
    done = {row['name']: row for row in before.get('rows', [])}
    runs = [*before.get('runs', []), facts]
    left = [(name, measure) for name, measure in rows if name not in done]
    while left and clock() < end:
        name, measure = left.pop(0)
        print(f'{file.stem}: {name}', flush=True)
        start = clock()
        try:
            row = measure()
        except Exception as error:
            row = dict(failed=reason(error))
        done[name] = dict(name=name, run=len(runs) - 1, took=clock() - start, **row)
        names = [other for other, _ in left]
        write(file, dict(runs=runs, rows=list(done.values()), left_out=names))
        try:
            alive()
        except Exception as error:
            print(f'{file.stem}: the device is lost: {reason(error)}', flush=True)
            return False
    if left:
        print(f'{file.stem}: out of time, {len(left)} rows left out', flush=True)
    return True


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('part', choices=PARTS)
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--seconds', type=float, required=True)
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--quick', action='store_true')
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    """Run the part; 0, or ``LOST``."""
    from mmvssm.collect_env import collect_env

    device = Device(args.device)
    facts = dict(
        quick=args.quick,
        hardware=device.facts(),
        environment=collect_env(),
    )
    effort = QUICK_EFFORT if args.quick else EFFORT
    rows = importlib.import_module(PARTS[args.part]).rows(device, effort, args.quick)

    def alive() -> None:
        device.synchronize()
        torch.zeros(1, device=device.name)

    good = run(rows, args.out / f'{args.part}.json', facts, args.seconds, alive)
    return 0 if good else LOST


if __name__ == '__main__':
    sys.exit(main(parse_args()))
