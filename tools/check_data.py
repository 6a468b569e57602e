"""Look into the data of a config: ``python tools/check_data.py CONFIG``.

Reads images and labels as the training would, counts them, and names what contradicts
the config. Exit code 0: nothing found; 1: there are findings; 2: it cannot run.
"""

import argparse
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='a file, or mmvssm::NAME.py')
    parser.add_argument(
        '--images',
        type=int,
        metavar='N',
        help='open N images of each split, evenly spaced (default: all)',
    )
    parser.add_argument('--json', metavar='FILE', help='write all counts here')
    parser.add_argument(
        '--sheet',
        metavar='FILE',
        help='draw images with their labels into this PNG file, one a split',
    )
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', help='override config entries'
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    """Look, print, write. Returns the exit code."""
    from mmengine.fileio import dump

    from mmvssm import engine
    from mmvssm.engine.configs.data import check_folders
    from mmvssm.engine.labels.check import findings, ignored_of, inspect_data
    from mmvssm.engine.labels.sheet import write_sheet

    if args.images is not None and args.images < 1:
        raise engine.UsageError(f'--images must be at least 1, not {args.images}.')
    cfg = engine.load_config(args.config, args.cfg_options)
    splits = [s for s in ('train', 'val', 'test') if cfg.get(f'{s}_dataloader')]
    if not splits:
        raise engine.UsageError(f'{args.config} has no data: no train_dataloader.')
    check_folders(cfg, splits)
    inspected = inspect_data(cfg, splits, args.images)
    for found in inspected:
        print(found.report.text(), end='\n\n')
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        dump([found.report.as_dict() for found in inspected], args.json, indent=2)
    number = len(list(findings(inspected)))
    some = '1 finding' if number == 1 else f'{number} findings'
    print(some if number else 'nothing found')
    if args.sheet:
        for path in write_sheet(args.sheet, inspected, ignored_of(cfg)):
            print(f'labels drawn in: {path}')
    return int(number > 0)


if __name__ == '__main__':
    arguments = parse_args()
    from mmvssm.engine import run_tool

    run_tool(lambda: main(arguments))
