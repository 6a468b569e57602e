"""Tests and measurements on a GPU in one command and a few minutes.

    benchmarks/gpu_suite.sh [--wheels DIR] [--minutes N] [--part PART ...] [--out DIR]

Parts, in this order, each with a share of the minutes, their most telling rows first:

- ``check``: ``python -m mmvssm.check_gpu``, which compiles the kernels, too.
- ``tests``: ``tests/gpu``, by pytest.
- ``op``: the selective scan beside its peers and the floor of the card.
- ``blocks``: the cores of VMamba and Vim, fused, unfused, published, floor.
- ``models``: whole models, inference and training step, beside transformers.

A part begins no further row when its time is out, says what it left out, and
goes on from there the next time it is asked for with the same ``--out``. Every
row is in ``PART.json`` as soon as it is measured, with all repetitions; at the
end all parts are in ``gpu_suite.json``, with the hardware and the versions, and
one table is printed.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import gpu_part
import gpu_report
from gpu_device import Device

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SHARES = {'check': 15, 'tests': 20, 'op': 15, 'blocks': 15, 'models': 35}
# Seconds a row may go on beyond the time of its part, and those kept to the end.
GRACE, REPORT = 30, 5
# Those that show that the check and the tests run at all.
QUICK_CHECK = ('selective_scan',)
QUICK_TESTS = 'add_rms_norm or (test_16_bit and 49)'
_SUMMARY = re.compile(r'(\d+) (passed|failed|skipped|errors?)')


def budgets(parts: list[str], seconds: float) -> dict[str, float]:
    """Seconds of each part, by its share."""
    total = sum(SHARES[part] for part in parts)
    return {part: seconds * SHARES[part] / total for part in parts}


def run_tests(args: argparse.Namespace, seconds: float) -> int:
    """Run pytest, which begins no test when the time is out."""
    if find_spec('pytest') is None:
        why = 'pytest is not installed; bring its wheel (--wheels)'
        gpu_part.write(args.out / 'tests.json', dict(why=why, failures=[]))
        return 1
    log = args.out / 'tests.log'
    environment = {
        'MMVSSM_GPU_TESTS_DEVICE': args.device,
        'MMVSSM_GPU_TESTS_SECONDS': str(seconds),
        # cuBLAS gives the same bits only with workspaces of its own.
        'CUBLAS_WORKSPACE_CONFIG': ':4096:8',
    }
    command = ['-m', 'pytest', '-q', '-p', 'no:cacheprovider']
    # The time may run out.
    files = ('selective_scan', 'ops', 'models')
    command += [f'tests/gpu/test_{name}.py' for name in files]
    # Most of the time goes into compiling kernels, for which one core is few.
    workers = min(6, (os.cpu_count() or 1) // 2)
    if Device(args.device).is_cuda and workers > 1 and find_spec('xdist'):
        command += ['-n', str(workers)]
    if args.quick:
        command += ['-k', QUICK_TESTS]
    with log.open('w') as file:
        status = execute(command, seconds + GRACE, environment, file)
    text = log.read_text(errors='replace')
    last = (text.strip().splitlines() or [''])[-1]
    counts = {kind.rstrip('s'): int(n) for n, kind in _SUMMARY.findall(last)}
    found = dict(
        counts,
        why='stopped, it went on for too long' if status is None else None,
        failures=re.findall(r'^(?:FAILED|ERROR) (\S+)', text, re.MULTILINE),
        last_line=last,
        log=log.name,
    )
    gpu_part.write(args.out / 'tests.json', found)
    return 0 if status == 0 else 1


def run_check(args: argparse.Namespace, seconds: float) -> int:
    """Let mmvssm check its kernels on this device; 0 if all of them are taken."""
    log = args.out / 'check.log'
    command = ['-m', 'mmvssm.check_gpu', '--json', '--device', args.device]
    if args.quick:
        command += ['--ops', *QUICK_CHECK]
    with log.open('w') as file:
        status = execute(command, seconds + GRACE, file=file)
    text = log.read_text(errors='replace')
    # Behind what it says on the way.
    start = text.find('{\n')
    found = json.loads(text[start:]) if status is not None and start >= 0 else {}
    ops = found.get('ops', {})
    if status is None:
        verdict = 'stopped, it went on for too long'
    elif not ops:
        verdict = (
            found.get('reason') or (text.strip().splitlines() or ['no output'])[-1]
        )
    else:
        verdict = ', '.join(f'{op} by {taken["backend"]}' for op, taken in ops.items())
    gpu_part.write(args.out / 'check.json', dict(found, verdict=verdict, log=log.name))
    return 0 if status == 0 else 1


def run_part(part: str, args: argparse.Namespace, seconds: float) -> int:
    """Measure a part, in another process if one loses the device."""
    end = time.monotonic() + seconds
    status = gpu_part.LOST
    while status == gpu_part.LOST and time.monotonic() < end:
        left = end - time.monotonic()
        command = [str(HERE / 'gpu_part.py'), part, '--out', str(args.out)]
        command += ['--device', args.device, '--seconds', f'{left:.1f}']
        command += ['--quick'] if args.quick else []
        status = execute(command, left + GRACE)
    if status is None:
        print(f'{part}: stopped, it went on for too long', flush=True)
    return 0 if status == 0 else 1


def execute(
    command: list[str], seconds: float, environment: dict | None = None, file=None
) -> int | None:
    """Exit status of a Python process; None if it had to be stopped."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=file,
        stderr=subprocess.STDOUT if file else None,
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # It and what it has started.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def collect(out: Path) -> dict[str, dict]:
    """What all parts have found so far."""
    found = {}
    for part in SHARES:
        file = out / f'{part}.json'
        if file.exists():
            found[part] = json.loads(file.read_text())
    return found


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--part', nargs='+', choices=SHARES, metavar='PART', default=list(SHARES)
    )
    parser.add_argument('--minutes', type=float, default=6.0, help='for all parts')
    parser.add_argument('--out', type=Path, help='folder of the results')
    parser.add_argument(
        '--again', action='store_true', help='forget what the parts have found before'
    )
    parser.add_argument(
        '--device', default='cuda', help='cpu only shows that the suite runs'
    )
    parser.add_argument(
        '--quick', action='store_true', help='tiny shapes; the figures say nothing'
    )
    args = parser.parse_args()
    if args.out is None:
        name = 'gpu_suite_quick' if args.quick else 'gpu_suite'
        args.out = ROOT / 'build' / name
    args.out = args.out.resolve()
    return args


def main(args: argparse.Namespace) -> int:
    """Run the parts; 0 if all of them ran through."""
    import torch

    device = Device(args.device)
    if device.is_cuda and not torch.cuda.is_available():
        print(
            'error: torch sees no CUDA device (--device cpu --quick shows that the '
            'suite runs)',
            file=sys.stderr,
        )
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes - REPORT
    status, left = 0, [part for part in SHARES if part in args.part]
    while left:
        # What earlier parts did not use is shared out; grace is the last one's, too.
        seconds = budgets(left, end - time.monotonic() - GRACE)[left[0]]
        part = left.pop(0)
        if args.again:
            (args.out / f'{part}.json').unlink(missing_ok=True)
        print(f'{part}: {max(0.0, seconds):.0f} s', flush=True)
        if seconds > 0:
            if part == 'check':
                status |= run_check(args, seconds)
            elif part == 'tests':
                status |= run_tests(args, seconds)
            else:
                status |= run_part(part, args, seconds)
    found = collect(args.out)
    gpu_part.write(args.out / 'gpu_suite.json', found)
    print(f'\n{gpu_report.table(found)}\n\nwritten to {args.out / "gpu_suite.json"}')
    return status


if __name__ == '__main__':
    sys.exit(main(parse_args()))
