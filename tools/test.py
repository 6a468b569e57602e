"""Evaluate: ``python tools/test.py CONFIG [CHECKPOINT]``.

A classifier's test also writes a report on each class, ``classes.json``, into the work
dir. A name of the zoo, such as vmamba_t_s1l8, stands for its config and the published
weights.
"""

import argparse
import os


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='a file, mmvssm::NAME.py, or a name of the zoo')
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help='what to evaluate: a file, an address, mmvssm://NAME or '
        'hf://OWNER/REPOSITORY/FILE (default: what was published for the config)',
    )
    parser.add_argument(
        '--weights',
        choices=('raw', 'ema'),
        help='of a file with both, take the raw or the averaged weights',
    )
    parser.add_argument(
        '--work-dir',
        help='folder for log and metrics (default: work_dirs/NAME of the config)',
    )
    parser.add_argument(
        '--out',
        metavar='DIR',
        help='write the predictions here: label maps, or boxes and masks, or the five '
        'best classes of each image, as JSON',
    )
    parser.add_argument('--show-dir', metavar='DIR', help='write painted images here')
    parser.add_argument('--show', action='store_true', help='open a window per image')
    parser.add_argument(
        '--wait-time',
        type=float,
        default=2,
        metavar='SECONDS',
        help='seconds for which --show shows an image',
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help='average over scales and flips, as set in the config',
    )
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='run code that the checkpoint contains; only for files of your own',
    )
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', help='override config entries'
    )
    parser.add_argument(
        '--launcher',
        default='none',
        choices=('none', 'pytorch', 'slurm', 'mpi'),
        help='job launcher',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def main(args: argparse.Namespace) -> None:
    """Evaluate."""
    from mmengine.runner import Runner

    from mmvssm import engine
    from mmvssm.checkpoints import trust

    cfg = engine.load_config(
        args.config,
        args.cfg_options,
        args.work_dir,
        required=('model', 'test_dataloader', 'test_evaluator'),
    )
    engine.add_class_report(cfg, out_file=f'{cfg.work_dir}/classes.json')
    checkpoint = args.checkpoint or engine.published_weights(args.config)
    if args.trust_checkpoint:
        trust(checkpoint)
    engine.require_file(checkpoint, 'checkpoint')
    engine.check_datasets(cfg, splits=('test',))
    if args.show or args.show_dir:
        engine.enable_painting(cfg, args.show_dir, args.show, args.wait_time)
    if args.out:
        engine.keep_predictions(cfg, args.out)
    if args.tta:
        engine.enable_tta(cfg)
    # The runner must not overwrite the weights that are loaded below.
    cfg.load_from, cfg.resume = None, False
    engine.prepare_launch(cfg, args.launcher)
    runner = Runner.from_cfg(cfg)
    engine.load_weights(runner.model, checkpoint, args.weights)
    runner.test()


if __name__ == '__main__':
    arguments = parse_args()
    from mmvssm.engine import run_tool

    run_tool(lambda: main(arguments))
