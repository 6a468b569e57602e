"""Peak memory of a training step on the CPU, with and without ``with_cp``.

    python benchmarks/training_memory.py configs/upernet_mambar_l.py

builds the segmentor of the config, backbone and heads, and takes one step with
the config's optimizer on random images of its crop size and its batch size:
loss, gradients, new weights. The peak is that of a process of its own, and all
the memory that process holds, the 0.3 GB of the libraries included. It keeps
what it frees, as ``tools/train.py`` does.

Of the configs that are named, all of which are measured, the result is
``benchmarks/results/training_memory.json``.
"""

import argparse
import json
import logging
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='+', metavar='CONFIG')
    parser.add_argument(
        '--with-cp',
        choices=('on', 'off', 'both'),
        default='both',
        help='whether blocks are recomputed in the backward pass',
    )
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', help='override config entries'
    )
    parser.add_argument('--out', default=str(HERE / 'results/training_memory.json'))
    return parser.parse_args()


def random_batch(cfg) -> dict:
    """Images and labels as the config's data loader would give them."""
    import torch
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    size = tuple(cfg.model.data_preprocessor.size)
    classes = cfg.model.decode_head.num_classes
    images, samples = [], []
    for _ in range(cfg.train_dataloader.batch_size):
        images.append(torch.randint(0, 256, (3, *size), dtype=torch.uint8))
        sample = SegDataSample(metainfo=dict(img_shape=size))
        sample.gt_sem_seg = PixelData(data=torch.randint(0, classes, (1, *size)))
        samples.append(sample)
    return dict(inputs=images, data_samples=samples)


def build_model(config: str, options: list[str] | None, **backbone) -> tuple:
    """The config and its segmentor, ready to train without an accelerator.

    Args:
        config: A file.
        options: ``'key=value'`` strings that override entries.
        backbone: Overrides of the backbone.
    """
    import torch
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    from mmvssm import engine

    # Optimizer constructors list every parameter.
    logging.disable(logging.INFO)
    torch.manual_seed(0)
    cfg = engine.load_config(
        config, options, required=('model', 'train_dataloader', 'optim_wrapper')
    )
    cfg.model.backbone.update(backbone)
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    return cfg, revert_sync_batchnorm(MODELS.build(cfg.model)).train()


def take_step(config: str, options: list[str] | None, with_cp: bool) -> dict:
    """Take one step in this process, which must be a fresh one.

    Returns:
        Settings, number of parameters, and ``peak``, bytes.
    """
    from mmengine.optim import build_optim_wrapper

    from mmvssm.analysis.measuring import process_memory
    from mmvssm.engine.launching.memory import keep_freed_memory

    keep_freed_memory()
    cfg, model = build_model(config, options, with_cp=with_cp)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    losses = model.train_step(random_batch(cfg), wrapper)
    return dict(
        config=Path(config).name,
        batch_size=cfg.train_dataloader.batch_size,
        size=list(cfg.model.data_preprocessor.size),
        with_cp=with_cp,
        parameters=sum(p.numel() for p in model.parameters()),
        loss=losses['loss'].item(),
        peak=process_memory.peak(),
    )


def measure(config: str, options: list[str] | None, with_cp: bool) -> dict:
    """:func:`take_step` in a new process."""
    from mmvssm.engine import UsageError

    with ProcessPoolExecutor(1, get_context('spawn')) as pool:
        try:
            return pool.submit(take_step, config, options, with_cp).result()
        except BrokenProcessPool as error:
            raise UsageError(
                f'the step of {config} with with_cp={with_cp} was killed, most likely '
                f'for want of memory; take a smaller train_dataloader.batch_size'
            ) from error


def main(args: argparse.Namespace) -> None:
    """Measure all, print a table, write the result."""
    from mmvssm.analysis.measuring import process_memory
    from mmvssm.collect_env import collect_env
    from mmvssm.engine import UsageError, require_file

    if not process_memory.possible():
        raise UsageError("this needs the counters of Linux's /proc")
    for config in args.configs:
        require_file(config, 'config')
    columns = '{:28}{:>16}{:>13}{:>9}{:>10}'.format
    print(columns('config', 'batch x size', 'parameters', 'with_cp', 'peak'))
    runs = []
    for config in args.configs:
        for with_cp in dict(on=[True], off=[False], both=[True, False])[args.with_cp]:
            run = measure(config, args.cfg_options, with_cp)
            runs.append(run)
            height, width = run['size']
            print(
                columns(
                    run['config'],
                    f'{run["batch_size"]} x {height}x{width}',
                    f'{run["parameters"] / 1e6:.1f} M',
                    'on' if with_cp else 'off',
                    f'{run["peak"] / 1e9:.2f} GB',
                ),
                flush=True,
            )
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    result = dict(environment=collect_env(), runs=runs)
    out.write_text(json.dumps(result, indent=2) + '\n')
    print(f'written to {out}')


if __name__ == '__main__':
    arguments = parse_args()
    from mmvssm.engine import run_tool

    run_tool(lambda: main(arguments))
