"""A training step alone, and on cores that others use at the same time.

    python benchmarks/contention.py [--hogs 1] [--twin] [--json [FILE]]

trains the quickstart's segmentor on random images. Blocks of steps alone and beside
``--hogs`` processes that only loop take turns; between their blocks the hogs are
stopped. ``ratio``, also in the JSON, is the median time of a step beside the hogs over
that alone. Two threads on two cores with one hog have a fair share if it is at most 2.

With ``--twin``, a second training of the same model takes the place of the hogs in a
third kind of block: ``twin_ratio``, at best 2 on cores that are all used.

``--settings`` compares how threads wait for one another: ``default`` is the environment
as it is, ``passive`` and ``active`` set ``OMP_WAIT_POLICY``, and ``NAME=VALUE``, or
several with commas, sets any variables. The libraries read them as they are loaded, so
each setting trains in a process of its own. The blocks of all of them take turns, and
processes whose turn it is not are stopped. The column ``/ first`` is the time alone
over that of the first setting:

    python benchmarks/contention.py --settings default passive GOMP_SPINCOUNT=1000
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

# As the user has it: what is imported later may change it.
ENVIRONMENT = dict(os.environ)
HERE = Path(__file__).resolve().parent
WORKER = HERE / 'contention_worker.py'
CONFIG = HERE.parent / 'configs/upernet_vmamba_quickstart.py'
POLICIES = ('passive', 'active')


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--hogs', type=int, default=1, help='busy processes (default: 1)')
    add('--twin', action='store_true', help='also beside a second training')
    add('--threads', type=int, help="of a training (default: torch's own choice)")
    add('--steps', type=int, default=30, help='counted of each kind, at least')
    add('--block', type=int, default=5, help='counted steps of a turn (default: 5)')
    add(
        '--settings',
        nargs='+',
        default=['default'],
        metavar='SETTING',
        help='default, passive, active or NAME=VALUE[,NAME=VALUE...]',
    )
    add('--config', default=str(CONFIG), help="of a segmentor (default: quickstart's)")
    add('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override config entries')
    add(
        '--json',
        nargs='?',
        const='',
        metavar='FILE',
        help="write the result (default: this machine's file in results/contention)",
    )
    args = parser.parse_args(arguments)
    if min(args.steps, args.block, args.threads or 1) < 1 or args.hogs < 0:
        parser.error('--steps, --block and --threads are at least 1, --hogs at least 0')
    if not args.hogs and not args.twin:
        parser.error('--hogs 0 without --twin leaves nothing to measure')
    return args


def environment(setting: str) -> dict[str, str]:
    """All variables of the processes of a setting."""
    if setting == 'default':
        return dict(ENVIRONMENT)
    if setting in POLICIES:
        return dict(ENVIRONMENT, OMP_WAIT_POLICY=setting.upper())
    pairs = [pair.partition('=') for pair in setting.split(',')]
    if not all(name and sign for name, sign, _ in pairs):
        from mmvssm.engine import UsageError

        raise UsageError(
            f"'{setting}' is no setting; give default, passive, active or NAME=VALUE"
        )
    return {**ENVIRONMENT, **{name: value for name, _, value in pairs}}


class Process:
    """A process of ``contention_worker.py``, stopped but where it is ``running``.

    Attributes:
        ready: What it says of itself when it can begin.
    """

    def __init__(self, setting: str, *arguments: str, task: dict):
        self.setting = setting
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), *arguments],
            env=environment(setting),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        # Not before it is ready: until then it does not know when to end.
        self.ready = self.ask(task)
        self.stop()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # This also ends what is stopped.
        self._process.kill()
        self._process.communicate()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def ask(self, question: dict) -> dict:
        """Its answer.

        Raises:
            UsageError: It has ended.
        """
        try:
            self._process.stdin.write(json.dumps(question) + '\n')
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ''
        if not answer:
            from mmvssm.engine import UsageError

            raise UsageError(
                f"the process with the setting '{self.setting}' ended with code "
                f'{self._process.wait()}; what it printed is above'
            )
        return json.loads(answer)


class Hog(Process):
    """A process that only loops."""

    def __init__(self):
        super().__init__('default', 'hog', task={})


class Training(Process):
    """A process with a model, which trains for ever or when it is told to."""

    def __init__(self, args: argparse.Namespace, setting: str, forever: bool):
        task = dict(config=args.config, options=args.cfg_options, threads=args.threads)
        super().__init__(setting, task=dict(task, forever=forever))

    def steps(self, count: int) -> list[float]:
        """Seconds of steps that it takes now."""
        return self.ask(dict(steps=count))['seconds']


@contextmanager
def running(processes: list[Process]) -> Iterator[None]:
    """Let stopped processes run inside."""
    for process in processes:
        process.go_on()
    try:
        yield
    finally:
        for process in processes:
            process.stop()


def measure(args: argparse.Namespace) -> list[dict]:
    """Seconds of all steps, round by round, for each setting.

    Returns:
        For each setting its name, ``ready`` (see :class:`Process`) and ``rounds``,
        each with the seconds of its steps ``alone``, beside ``hogs`` and beside a
        ``twin``.
    """
    with ExitStack() as stack:
        hogs = [stack.enter_context(Hog()) for _ in range(args.hogs)]
        found, trainings, others = [], [], []
        for setting in args.settings:
            print(f'{setting}: starts', flush=True)
            training = stack.enter_context(Training(args, setting, forever=False))
            beside = {'alone': []} | ({'hogs': hogs} if hogs else {})
            if args.twin:
                twin = stack.enter_context(Training(args, setting, forever=True))
                beside['twin'] = [twin]
            trainings.append(training)
            others.append(beside)
            found.append(dict(setting=setting, ready=training.ready, rounds=[]))
        for number in range(-(-args.steps // args.block)):
            for result, training, beside in zip(found, trainings, others):
                taken = {}
                # There and back, so that a drift of the machine cancels out.
                for kind in list(beside)[:: -1 if number % 2 else 1]:
                    with running([training, *beside[kind]]):
                        taken[kind] = training.steps(args.block)
                result['rounds'].append(taken)
    return found


def summarise(found: list[dict]) -> list[dict]:
    """Medians and ratios of each setting.

    Args:
        found: What :func:`measure` returns.
    """
    results = []
    for one in found:
        rounds = one['rounds']
        median = {
            kind: statistics.median(t for taken in rounds for t in taken[kind])
            for kind in rounds[0]
        }
        result = dict(
            setting=one['setting'],
            ready=one['ready'],
            steps=sum(len(taken['alone']) for taken in rounds),
            seconds={kind: median[kind] for kind in sorted(median)},
        )
        result['alone_over_first'] = (
            median['alone'] / (results or [result])[0]['seconds']['alone']
        )
        for kind, name in (('hogs', 'ratio'), ('twin', 'twin_ratio')):
            if kind in median:
                result[name] = median[kind] / median['alone']
                result[f'{name}_of_rounds'] = [
                    statistics.median(taken[kind]) / statistics.median(taken['alone'])
                    for taken in rounds
                ]
        results.append(result)
    return results


def table(results: list[dict], hogs: int) -> str:
    """The ratios, in brackets the lowest and the highest of a round."""
    lines = [['setting', 'alone, ms', '/ first', f'ratio, hogs: {hogs}', 'twin_ratio']]
    for result in results:
        cells = [
            f'{result[name]:.2f} ({min(each):.2f} to {max(each):.2f})'
            if (each := result.get(f'{name}_of_rounds'))
            else '-'
            for name in ('ratio', 'twin_ratio')
        ]
        alone = f'{1e3 * result["seconds"]["alone"]:.1f}'
        relative = f'{result["alone_over_first"]:.3f}'
        lines.append([result['setting'], alone, relative, *cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return '\n'.join(
        '  '.join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
        for line in lines
    )


def main(args: argparse.Namespace) -> None:
    """Measure, print and write."""
    import machines

    from mmvssm.engine import UsageError, require_file

    if not hasattr(signal, 'SIGSTOP'):
        raise UsageError('this system cannot stop and continue processes')
    require_file(args.config, 'config')
    for setting in args.settings:
        environment(setting)
    facts = machines.facts()
    results = summarise(measure(args))
    first = results[0]
    print(
        f'\n{Path(args.config).name}, threads: {first["ready"]["threads"]}, '
        f'{first["steps"]} steps of each kind\n\n{table(results, args.hogs)}'
    )
    if args.json is not None:
        out = Path(args.json or machines.results_file('contention'))
        ratios = {n: first[n] for n in ('ratio', 'twin_ratio') if n in first}
        result = dict(
            ratios,
            config=Path(args.config).name,
            hogs=args.hogs,
            block=args.block,
            settings=results,
            **facts,
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + '\n')
        print(f'\nwritten to {out}')


if __name__ == '__main__':
    parsed = parse_args()
    from mmvssm.engine import run_tool

    run_tool(lambda: main(parsed))
