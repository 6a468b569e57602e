"""Make the small data set that a quickstart trains on."""

import argparse
from functools import partial

from tqdm import tqdm

from mmvssm.datasets import make_quickstart_dataset
from mmvssm.datasets.layouts import LAYOUTS, SUFFIXES

ROOTS = {
    'ade20k': 'data/quickstart',
    'coco': 'data/quickstart_coco',
    'imagenet': 'data/quickstart_cls',
}
FOUR_BANDS = '_four_bands'


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        '--layout',
        default='ade20k',
        choices=LAYOUTS,
        help='layout of the files: label maps, objects, or a folder for each class',
    )
    parser.add_argument(
        '--classification',
        dest='layout',
        action='store_const',
        const='imagenet',
        default=argparse.SUPPRESS,
        help='the same as --layout imagenet',
    )
    parser.add_argument(
        '--root',
        help=f'folder to make (default: {", ".join(ROOTS.values())}, with '
        f'{FOUR_BANDS} at the end where there are four)',
    )
    parser.add_argument(
        '--num-train', type=int, default=480, help='number of training images'
    )
    parser.add_argument(
        '--num-val', type=int, default=96, help='number of validation images'
    )
    parser.add_argument(
        '--size', type=int, default=128, help='shorter side of the images in pixels'
    )
    parser.add_argument(
        '--bands',
        type=int,
        default=3,
        choices=tuple(SUFFIXES),
        help='3: JPEG photos; 4: TIFF files with a band of heights',
    )
    parser.add_argument('--seed', type=int, default=0, help='seed of the generator')
    parser.add_argument(
        '--overwrite',
        action='store_true',
        help='replace a data set that was made with other settings',
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Make the data set, and say where it is."""
    from mmvssm.engine import UsageError

    default = ROOTS[args.layout] + (FOUR_BANDS if args.bands == 4 else '')
    try:
        root = make_quickstart_dataset(
            args.root or default,
            args.num_train,
            args.num_val,
            args.size,
            args.seed,
            args.overwrite,
            progress=partial(tqdm, desc='making images', unit='image'),
            layout=args.layout,
            bands=args.bands,
        )
    except (ValueError, FileExistsError, ImportError) as error:
        raise UsageError(str(error)) from error
    layout = LAYOUTS[args.layout]
    print(
        f'{args.num_train} training and {args.num_val} validation images '
        f'of {len(layout.classes)} classes are in {root}\n'
        f'  images       {root}/{layout.images}\n'
        f'  labels       {root}/{layout.labels}\n'
        f'  description  {root}/meta.json'
    )


if __name__ == '__main__':
    arguments = parse_args()
    from mmvssm.engine import run_tool

    run_tool(lambda: main(arguments))
