"""Check and time the GPU kernels on this machine: ``python -m mmvssm.check_gpu``.

The verdicts are kept. They decide which backend calls on the GPU get from now on, and
replace older verdicts. The check also runs by itself, the first time that a training
starts or an op is called on a kind of GPU.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from mmvssm.ops import backends
from mmvssm.ops.gpu_check import choice, stand_in
from mmvssm.ops.gpu_check.cases import everything, of_op, with_kernels
from mmvssm.ops.gpu_check.run import LIMITS, check, estimate
from mmvssm.ops.gpu_check.verdicts import ALL, Store, Verdict
from mmvssm.ops.operator import all_ops

BACKEND = 'cuda'
# Limit for the whole list, which takes long.
_ALL_SECONDS = 3600.0


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog='python -m mmvssm.check_gpu', description=__doc__
    )
    parser.add_argument(
        '--all',
        action='store_true',
        help='every option, dtype, scan order and kind of length; takes minutes',
    )
    parser.add_argument('--json', action='store_true', help='print the result as JSON')
    parser.add_argument(
        '--device', help='such as cuda:1 (default: the first GPU); cpu: see --fault'
    )
    parser.add_argument(
        '--fault',
        choices=stand_in.FAULTS,
        help='with --device cpu: show what the check does about such a fault',
    )
    parser.add_argument(
        '--ops', nargs='+', choices=sorted(all_ops), metavar='OP', help='only these'
    )
    parser.add_argument(
        '--limit',
        type=float,
        default=LIMITS.case,
        metavar='SECONDS',
        help='how long a single call may take (default: %(default)s)',
    )
    found = parser.parse_args(arguments)
    if found.fault and found.device != 'cpu':
        parser.error('--fault is for --device cpu')
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print and keep the verdicts. Returns 1 if some kernels are not used."""
    args = parse_args(arguments)
    device = torch.device(args.device or 'cuda')
    # On the CPU the CPU kernels take the place of the GPU kernels.
    supplier = backends.CPU if device.type == 'cpu' else backends.suppliers[BACKEND]
    reason = supplier.unavailable()
    if reason:
        _print_nothing_to_check(reason, args.json)
        return int(torch.cuda.is_available())
    if device.type == 'cpu':
        stand_in.install(args.fault)
    elif device.index is None:
        device = torch.device('cuda', torch.cuda.current_device())
    store = Store(device)
    store.forget()
    choice.forget()
    verdicts = _check(args, device)
    with store.lock():
        for name in [ALL] if args.all else verdicts:
            store.add(name, verdicts if args.all else {name: verdicts[name]})
    choice.settle(device, verdicts)
    results = {op: _result(op, verdict, device) for op, verdict in verdicts.items()}
    if device.type == 'cpu':
        # A verdict of the CPU says nothing about a GPU.
        store.forget()
    if args.json:
        print(json.dumps(dict(machine=store.machine, ops=results), indent=1))
    else:
        for op, result in results.items():
            print(f'{op}: {result["backend"]} is used by default')
            print('', *result['warnings'] or [result['why']], sep='  ')
    return int(any(result['backend'] != BACKEND for result in results.values()))


def _check(args: argparse.Namespace, device: torch.device) -> dict[str, Verdict]:
    small, names = device.type == 'cpu', args.ops or list(all_ops)
    if args.all:
        cases = [case for case in everything(small) if case.call.op in names]
    else:
        cases = [case for name in names for case in of_op(name, small)]
    cases = with_kernels(cases, BACKEND)
    print(
        f'{len(cases)} calls to check, in about {estimate(cases):.0f} s plus the time '
        f'to compile their kernels',
        file=sys.stderr,
    )
    limits = replace(LIMITS, case=args.limit)
    if args.all:
        limits = replace(limits, total=_ALL_SECONDS)
    return check(cases, BACKEND, str(device), fault=args.fault, limits=limits)


def _result(op: str, verdict: Verdict, device: torch.device) -> dict[str, Any]:
    """The verdict on an op, the backend that is used, and why."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        taken = backends.choose_backend(device, torch.float32, op=op)
    why = backends.explain_backend(device, torch.float32, op=op)[BACKEND]
    said = [str(warning.message) for warning in caught]
    return dict(backend=taken, why=why, warnings=said, **asdict(verdict))


def _print_nothing_to_check(reason: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dict(machine=None, ops={}, reason=reason)))
    else:
        print(f'There is nothing to check: {reason}')


if __name__ == '__main__':
    sys.exit(main())
