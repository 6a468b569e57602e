"""Print what a config will do: ``python tools/print_recipe.py configs/NAME.py``.

Needs neither data nor weights nor a GPU.
"""

import argparse
import json


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='a file, or mmvssm::NAME.py')
    parser.add_argument(
        '--at',
        nargs='+',
        type=int,
        metavar='ITERATION',
        help='iterations at which to print rates, from 0 (default: where they turn)',
    )
    parser.add_argument(
        '--world-size',
        type=int,
        metavar='N',
        help="number of processes (default: that of the config's batch)",
    )
    parser.add_argument(
        '--images',
        type=int,
        metavar='N',
        help='number of images to train on (default: those found, or published)',
    )
    parser.add_argument('--json', action='store_true', help='print JSON')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        metavar='KEY=VALUE',
        help='override config entries, e.g. train_dataloader.batch_size=4',
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Print."""
    from mmvssm import engine

    cfg = engine.load_config(
        args.config,
        args.cfg_options,
        required=('model', 'train_dataloader', 'train_cfg', 'optim_wrapper'),
    )
    recipe = engine.read_recipe(cfg, args.at, args.world_size, args.images)
    if args.json:
        print(json.dumps(recipe, indent=1))
    else:
        print(engine.format_recipe(recipe))


if __name__ == '__main__':
    arguments = parse_args()
    from mmvssm.engine import run_tool

    run_tool(lambda: main(arguments))
