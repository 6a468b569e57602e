"""How much of a second process's work is gained: one process against several.

    python benchmarks/scaling_cpu.py

trains the config's segmentor on random images in its batch size, one thread a
process, in three ways that take turns:

- ``alone``: one process, while the others sleep;
- ``side by side``: all of them, each for itself. What it takes longer than alone is
  the machine's: memory, caches, clock;
- ``together``: all of them with DDP through gloo. What it takes longer than side by
  side is the exchange of gradients, and waiting for the slowest.

Each process has the same batch in all three, so the efficiency is the time of a step
alone over that of a step together: of the medians, and of the fastest turns. Where
others use the machine at the same time, two processes get no more of it than one, and
both say little; the time of the processors that a step takes then still says what the
exchange costs, but for waiting. The result is ``benchmarks/results/scaling_cpu.json``.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from processes import run_ranks

HERE = Path(__file__).resolve().parent
WAYS = ('alone', 'side by side', 'together')


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'config',
        nargs='?',
        default=str(HERE.parent / 'configs/upernet_vmamba_quickstart.py'),
    )
    parser.add_argument('--ranks', type=int, default=2, help='processes (default: 2)')
    parser.add_argument('--rounds', type=int, default=101, help='turns of each way')
    parser.add_argument('--steps', type=int, default=1, help='steps of a turn')
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', help='override config entries'
    )
    parser.add_argument('--out', default=str(HERE / 'results/scaling_cpu.json'))
    return parser.parse_args()


def measure(
    rank: int, config: str, options: list[str] | None, rounds: int, steps: int
) -> dict:
    """Time steps in every turn of every way, in this process.

    Returns:
        ``seconds`` and ``cpu_seconds`` of a step under the names of the ways (``alone``
        on rank 0 only), the number of parameters and the images of a batch.
    """
    import torch.distributed as dist
    from mmengine.model import MMDistributedDataParallel
    from mmengine.optim import build_optim_wrapper
    from training_memory import build_model, random_batch

    from mmvssm.engine.launching.memory import keep_freed_memory

    keep_freed_memory()
    cfg, model = build_model(config, options)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    ddp = MMDistributedDataParallel(model)
    batch = random_batch(cfg)

    clocks = dict(seconds=time.perf_counter, cpu_seconds=time.process_time)
    taken = {clock: {way: [] for way in WAYS} for clock in clocks}
    ddp.train_step(batch, wrapper)
    for _ in range(rounds):
        for way in WAYS:
            dist.barrier()
            if way == 'alone' and rank:
                continue
            start = {name: clock() for name, clock in clocks.items()}
            for _ in range(steps):
                (ddp if way == 'together' else model).train_step(batch, wrapper)
            for name, clock in clocks.items():
                taken[name][way].append((clock() - start[name]) / steps)
    dist.barrier()
    return dict(
        taken,
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        batch_size=cfg.train_dataloader.batch_size,
    )


def summarise(found: list[dict]) -> dict:
    """Medians, and efficiencies with the quartiles of the turns.

    Args:
        found: What each rank has measured.
    """
    # A step takes as long as that of the slowest.
    taken, cpu = (
        {
            way: [
                max(turn)
                for turn in zip(*(r[clock][way] for r in found if r[clock][way]))
            ]
            for way in WAYS
        }
        for clock in ('seconds', 'cpu_seconds')
    )

    def ratio(above: str, below: str) -> dict:
        turns = [a / b for a, b in zip(taken[above], taken[below], strict=True)]
        low, _, high = statistics.quantiles(turns, n=4)
        return dict(
            of_medians=statistics.median(taken[above])
            / statistics.median(taken[below]),
            of_fastest=min(taken[above]) / min(taken[below]),
            of_cpu_seconds=statistics.median(cpu[above])
            / statistics.median(cpu[below]),
            quartiles=[low, high],
        )

    return dict(
        ranks=len(found),
        batch_size=found[0]['batch_size'],
        parameters=found[0]['parameters'],
        gradient_bytes=4 * found[0]['parameters'],
        turns=len(taken['alone']),
        seconds={way: statistics.median(turns) for way, turns in taken.items()},
        cpu_seconds={way: statistics.median(turns) for way, turns in cpu.items()},
        efficiency=ratio('alone', 'together'),
        efficiency_of_machine=ratio('alone', 'side by side'),
        efficiency_of_exchange=ratio('side by side', 'together'),
    )


def main(args: argparse.Namespace) -> None:
    """Measure, print, write the result."""
    from mmvssm.collect_env import collect_env
    from mmvssm.engine import require_file

    require_file(args.config, 'config')
    ranks = run_ranks(
        args.ranks, measure, args.config, args.cfg_options, args.rounds, args.steps
    )
    result = dict(config=Path(args.config).name, **summarise(ranks))
    print(
        f'{result["config"]}: {result["parameters"] / 1e6:.2f} M parameters, '
        f'{result["batch_size"]} images a process, {result["turns"]} turns'
    )
    for way, seconds in result['seconds'].items():
        cpu = result['cpu_seconds'][way]
        print(
            f'{way:24}{1000 * seconds:8.1f} ms a step, {1000 * cpu:.1f} of a processor'
        )
    for name in ('efficiency', 'efficiency_of_machine', 'efficiency_of_exchange'):
        found = result[name]
        low, high = found['quartiles']
        print(
            f'{name.replace("_", " "):24}{found["of_medians"]:8.2f}'
            f'    of the fastest {found["of_fastest"]:.2f}'
            f'    of processors {found["of_cpu_seconds"]:.2f}'
            f'    half of the turns within {low:.2f} and {high:.2f}'
        )
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        json.dumps(dict(environment=collect_env(), **result), indent=2) + '\n'
    )
    print(f'written to {out}')


if __name__ == '__main__':
    arguments = parse_args()
    from mmvssm.engine import run_tool

    run_tool(lambda: main(arguments))
