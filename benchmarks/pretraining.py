"""The whole path: what pretraining on class folders brings to a segmentor.

    python benchmarks/pretraining.py      # .venv-vision, of `make install-vision`

1. ``tools/quickstart.py`` trains a small VMamba classifier on images with a label each
   (``configs/classification/vmamba_quickstart.py``).
2. ``tools/quickstart.py --pretrained`` trains the quickstart's segmentor from its
   checkpoint, and without that option from random weights: as many iterations of the
   same schedule, with the same seeds. The schedule is short, as weights matter most
   there.

The checkpoint goes from one tool to the other as it is. The figures are written to
``benchmarks/results/pretraining.json``. Trainings that are finished are not repeated,
and the same command goes on with one that was interrupted. ``--quick`` only shows that
everything runs, with tiny images and two iterations; it writes figures only if
``--out`` names a file.
"""

import argparse
import hashlib
import itertools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TOOL = ROOT / 'tools/quickstart.py'
CLASSIFIER = ROOT / 'configs/classification/vmamba_quickstart.py'
SEGMENTOR = ROOT / 'configs/upernet_vmamba_quickstart.py'
QUICK_OPTIONS = (
    *('generator.num_train=14', 'generator.num_val=7', 'generator.size=64'),
    *('train_dataloader.batch_size=2', 'param_scheduler.0.end=1'),
    'param_scheduler.1.begin=1',
)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument(
        '--iterations', type=int, default=300, help='of a segmentor (default: 300)'
    )
    parser.add_argument(
        '--pretraining-iterations',
        type=int,
        default=1500,
        help='of the classifier (default: 1500)',
    )
    parser.add_argument('--work-dir', type=Path, default='work_dirs/pretraining')
    parser.add_argument('--out', type=Path, help='JSON file of the figures')
    parser.add_argument('--quick', action='store_true', help='see above')
    args = parser.parse_args(arguments)
    if args.quick:
        args.seeds, args.iterations, args.pretraining_iterations = [0, 1], 2, 2
    elif not args.out:
        args.out = HERE / 'results/pretraining.json'
    return args


def train(
    args: argparse.Namespace,
    name: str,
    config: Path,
    iterations: int,
    seed: int = 0,
    pretrained: str | None = None,
) -> dict:
    """Train, test and draw one model by the quickstart's tool, unless that is done.

    Args:
        name: Of its work dir and of its log.
        pretrained: The checkpoint to start from.

    Returns:
        Its ``metrics``, its ``checkpoint`` and the ``cpu_seconds`` that all of it took.

    Raises:
        UsageError: The tool failed, or it was done before with another config.
    """
    from mmvssm.engine import UsageError

    folder = args.work_dir / f'{name}_{iterations}_iterations'
    done, config_id = folder / 'pretraining.json', fingerprint(config)
    if done.is_file():
        found = json.loads(done.read_text())
        if found['config'] != config_id:
            raise UsageError(
                f'{folder} was trained with another state of {config.name}: name '
                'another --work-dir, or remove that folder.'
            )
        print(f'{name}: done before', flush=True)
        return found
    print(f'{name}: {iterations} iterations, log in {folder}.log', flush=True)
    command = [sys.executable, TOOL, '--config', config, '--work-dir', folder]
    command += ['--iterations', str(iterations)]
    command += ['--pretrained', pretrained] if pretrained else []
    command += ['--cfg-options', f'randomness.seed={seed}']
    environment = dict(os.environ)
    if args.quick:
        command += QUICK_OPTIONS
        for kind in ('', 'CLS_'):
            data = args.work_dir / f'data_{kind.lower()}'
            environment[f'MMVSSM_QUICKSTART_{kind}ROOT'] = str(data)
    folder.mkdir(parents=True, exist_ok=True)
    before = _children_seconds()
    with open(f'{folder}.log', 'a') as log:
        run = subprocess.run(command, env=environment, stdout=log, stderr=log)
    if run.returncode:
        raise UsageError(f'{name} failed, see {folder}.log')
    found = dict(
        config=config_id,
        metrics=json.loads((folder / 'metrics.json').read_text()),
        checkpoint=(folder / 'last_checkpoint').read_text().strip(),
        cpu_seconds=round(_children_seconds() - before, 1),
    )
    done.write_text(json.dumps(found))
    return found


def fingerprint(config: Path) -> str:
    """What changes with a config, or with one that it inherits from."""
    from mmengine.config import Config

    content = json.dumps(Config.fromfile(config).to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compare(runs: list[dict]) -> dict:
    """Mean and spread of the two ways to start, and what the better start gains.

    Args:
        runs: Each with ``start``, which is ``'random'`` or ``'pretrained'``, ``seed``
            and ``mIoU``.

    Returns:
        For each start ``mean`` and ``spread``, the standard deviation over the seeds;
        ``gain``, the difference of the means; ``beyond_spread``, whether it is larger
        than both spreads together.
    """
    found = {}
    for start in ('random', 'pretrained'):
        values = [run['mIoU'] for run in runs if run['start'] == start]
        found[start] = dict(
            mean=round(float(np.mean(values)), 2),
            # Of one run nobody knows it.
            spread=round(float(np.std(values, ddof=1)), 2) if values[1:] else None,
        )
    gain = found['pretrained']['mean'] - found['random']['mean']
    spreads = [found[start]['spread'] for start in found]
    return dict(
        found,
        gain=round(gain, 2),
        beyond_spread=None not in spreads and gain > sum(spreads),
    )


def main(args: argparse.Namespace) -> None:
    """Pretrain, train all segmentors one after another, compare, write."""
    from mmengine.config import Config

    from mmvssm.collect_env import collect_env

    classifier = train(args, 'classifier', CLASSIFIER, args.pretraining_iterations)
    accuracy = classifier['metrics']['accuracy/top1']
    print(f'classifier: top-1 accuracy {accuracy:.1f} %', flush=True)
    # Another classifier is another start.
    starts = dict(random=None, pretrained=classifier['checkpoint'])
    names = dict(random='random', pretrained=f'from_{args.pretraining_iterations}')
    runs = []
    for seed, (start, checkpoint) in itertools.product(args.seeds, starts.items()):
        name = f'{names[start]}_seed{seed}'
        found = train(args, name, SEGMENTOR, args.iterations, seed, checkpoint)
        figures = dict(mIoU=found['metrics']['mIoU'], cpu_seconds=found['cpu_seconds'])
        runs.append(dict(start=start, seed=seed, **figures))
        print(f'{name}: mIoU {figures["mIoU"]:.2f}', flush=True)
    result = dict(
        environment=collect_env(),
        pretraining=dict(
            data=Config.fromfile(CLASSIFIER).generator,
            iterations=args.pretraining_iterations,
            top1=accuracy,
            cpu_seconds=classifier['cpu_seconds'],
        ),
        segmentors=dict(
            data=Config.fromfile(SEGMENTOR).generator, iterations=args.iterations
        ),
        comparison=compare(runs),
        runs=runs,
    )
    report(result['comparison'], len(args.seeds))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + '\n')
        print(f'written to {args.out}')


def report(found: dict, seeds: int) -> None:
    """Print the comparison."""
    for start in ('random', 'pretrained'):
        spread = found[start]['spread']
        print(
            f'{start:10} weights: mIoU {found[start]["mean"]:.2f}'
            + ('' if spread is None else f' ± {spread:.2f} ({seeds} seeds)')
        )
    word = 'more' if found['beyond_spread'] else 'no more'
    print(f'difference: {found["gain"]:+.2f}, {word} than both spreads together')


if __name__ == '__main__':
    arguments = parse_args()
    from mmvssm.engine import run_tool

    run_tool(lambda: main(arguments))
