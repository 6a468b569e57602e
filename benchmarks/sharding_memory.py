"""Memory of each of several processes that train together, with and without FSDP.

    python benchmarks/sharding_memory.py configs/upernet_mambar_b.py

takes two steps on random images with the config's optimizer: by DDP, where every
process holds all weights, gradients and moments, and by ``mmvssm.FSDPStrategy``,
where it holds its part of them. Images are of 64x64 by default and there are two a
process, so that nearly all memory is what is sharded.

``held`` is what a process has before the second step, ``peak`` the most of the second
step; both above the memory of its libraries. The result is
``benchmarks/results/sharding_memory.json``.
"""

import argparse
import json
import logging
import os
import tempfile
from pathlib import Path

from processes import run_ranks

HERE = Path(__file__).resolve().parent


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('--ranks', type=int, default=2, help='processes (default: 2)')
    parser.add_argument('--size', type=int, default=64, help='of images (default: 64)')
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', help='override config entries'
    )
    parser.add_argument('--out', default=str(HERE / 'results/sharding_memory.json'))
    return parser.parse_args()


def take_steps(
    rank: int, config: str, options: list[str] | None, size: int, sharded: bool
) -> dict:
    """Take two steps in this process, which must be a fresh one.

    Returns:
        Parameters of the whole model, the second loss, and the bytes ``held`` and
        ``peak``.
    """
    from mmengine._strategy import DDPStrategy
    from training_memory import build_model, random_batch

    from mmvssm.analysis.measuring import process_memory
    from mmvssm.engine import FSDPStrategy

    cfg, model = build_model(config, options)
    model.data_preprocessor.size = (size, size)
    cfg.model.data_preprocessor.size = (size, size)
    # Batch norms of one pixel want two of them.
    cfg.train_dataloader.batch_size = 2
    parameters = sum(p.numel() for p in model.parameters())
    before = process_memory.held() - 4 * parameters
    with tempfile.TemporaryDirectory() as folder:
        arguments = dict(
            work_dir=folder,
            env_kwargs=dict(launcher='pytorch', randomness=dict(seed=0)),
        )
        if sharded:
            strategy = FSDPStrategy(**arguments)
        else:
            strategy = DDPStrategy(
                model_wrapper=dict(type='MMDistributedDataParallel', device_ids=None),
                **arguments,
            )
        logging.disable(logging.INFO)
        trained, wrapper = strategy.prepare(model, optim_wrapper=cfg.optim_wrapper)
        del model
        trained.train_step(random_batch(cfg), wrapper)
        held = process_memory.held()
        process_memory.reset_peak()
        losses = trained.train_step(random_batch(cfg), wrapper)
    return dict(
        parameters=parameters,
        loss=losses['loss'].item(),
        held=held - before,
        peak=process_memory.peak() - before,
    )


def main(args: argparse.Namespace) -> None:
    """Measure both, print, write the result."""
    from mmvssm.analysis.measuring import process_memory
    from mmvssm.collect_env import collect_env
    from mmvssm.engine import UsageError, require_file

    if not process_memory.possible():
        raise UsageError("this needs the counters of Linux's /proc")
    require_file(args.config, 'config')
    # Read by the C library when a process starts: what is freed is given back.
    os.environ['MALLOC_MMAP_THRESHOLD_'] = '65536'
    runs = []
    print(f'{"":8}{"rank":>6}{"held":>12}{"peak":>12}{"peak, a parameter":>20}')
    for name in ('DDP', 'FSDP'):
        ranks = run_ranks(
            args.ranks,
            take_steps,
            args.config,
            args.cfg_options,
            args.size,
            name == 'FSDP',
        )
        runs.append(dict(way=name, ranks=ranks))
        for rank, found in enumerate(ranks):
            held, peak = found['held'], found['peak']
            print(
                f'{name:8}{rank:6}{held / 1e9:9.2f} GB{peak / 1e9:9.2f} GB'
                f'{peak / found["parameters"]:14.1f} bytes',
                flush=True,
            )
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    result = dict(
        environment=collect_env(),
        config=Path(args.config).name,
        size=args.size,
        runs=runs,
    )
    out.write_text(json.dumps(result, indent=2) + '\n')
    print(f'written to {out}')


if __name__ == '__main__':
    arguments = parse_args()
    from mmvssm.engine import run_tool

    run_tool(lambda: main(arguments))
