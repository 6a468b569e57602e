"""Make the small data set that the quickstart trains on."""

import argparse
from functools import partial

from tqdm import tqdm

from mmvssm.datasets import QUICKSTART_CLASSES, make_quickstart_dataset


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--root', default='data/quickstart', help='folder to make')
    parser.add_argument(
        '--num-train', type=int, default=480, help='number of training images'
    )
    parser.add_argument(
        '--num-val', type=int, default=96, help='number of validation images'
    )
    parser.add_argument(
        '--size', type=int, default=128, help='shorter side of the images in pixels'
    )
    parser.add_argument('--seed', type=int, default=0, help='seed of the generator')
    parser.add_argument(
        '--overwrite', action='store_true', help='replace a data set of other settings'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        root = make_quickstart_dataset(
            args.root,
            args.num_train,
            args.num_val,
            args.size,
            args.seed,
            args.overwrite,
            progress=partial(tqdm, desc='making images', unit='image'),
        )
    except (ValueError, FileExistsError, ImportError) as error:
        raise SystemExit(f'error: {error}') from error
    print(
        f'{args.num_train} training and {args.num_val} validation images '
        f'of {len(QUICKSTART_CLASSES)} classes are in {root}\n'
        f'  images       {root}/images/{{training,validation}}\n'
        f'  labels       {root}/annotations/{{training,validation}}\n'
        f'  description  {root}/meta.json'
    )


if __name__ == '__main__':
    main()
