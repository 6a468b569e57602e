"""The articles' studies of models: ``python tools/analyze.py STUDY --models MODEL...``.

A MODEL is a name of mmvssm.list_models() for the classifier, the config of a
segmentor, detector or classifier, or timm:NAME. ``MODEL=CHECKPOINT`` loads weights: a
file, an address or mmvssm://NAME of the zoo. Without them, weights are random, and
pictures say ``untrained``. Several models are drawn side by side.

Pictures and STUDY.json go to --out-dir. docs/studies.md explains both.
"""

import argparse


def parse_args() -> argparse.Namespace:
    """Parse the command line; the record of the study is ``study``."""
    from mmvssm.analysis.studies import STUDIES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(title='studies', metavar='STUDY', required=True)
    for study in STUDIES.values():
        kind = kinds.add_parser(study.name, help=study.shows, description=study.shows)
        add_common_arguments(kind, study)
        study.add_arguments(kind)
        kind.set_defaults(study=study)
    return parser.parse_args()


def add_common_arguments(parser: argparse.ArgumentParser, study) -> None:
    """Add what every study takes."""
    parser.add_argument(
        '--models',
        nargs='+',
        required=True,
        metavar='MODEL',
        help='NAME, CONFIG.py or timm:NAME, each with =CHECKPOINT for trained weights',
    )
    images = parser.add_mutually_exclusive_group()
    images.add_argument(
        '--images',
        nargs='+',
        metavar='FILE',
        help='files, folders or quoted patterns (default: scenes that are made here)',
    )
    images.add_argument(
        '--data',
        metavar='DIR',
        help='a folder of images; with one folder for each class they get labels',
    )
    parser.add_argument(
        '--num-images',
        type=int,
        metavar='N',
        help='images that are made, or taken from --data, 0 for all of them (default: '
        f'{study.count}{", all of --data" if study.labelled else ""})',
    )
    one = ' '.join(map(str, study.sizes[0]))
    several = ' '.join(str(height) for height, _ in study.sizes)
    parser.add_argument(
        '--size',
        nargs='+',
        metavar='SIZE',
        help=f'square sizes to compare, or HxW (default: {several})'
        if study.several_sizes
        else f'height and width of the images, or one number (default: {one})',
    )
    if study.masked:
        parser.add_argument(
            '--masks',
            nargs='+',
            metavar='FILE',
            help='where objects are: a folder of NAME.png, or a file for each image',
        )
        parser.add_argument(
            '--mask-background',
            nargs='+',
            type=int,
            default=[0],
            metavar='VALUE',
            help='values of masks that are no object (default: 0)',
        )
    parser.add_argument(
        '--out-dir', default='outputs', metavar='DIR', help='default: outputs'
    )
    parser.add_argument(
        '--device', help='such as cpu or cuda:1 (default: a GPU if there is one)'
    )
    parser.add_argument('--seed', type=int, default=0, help='default: 0')
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', help='override config entries'
    )


def main(args: argparse.Namespace) -> None:
    """Carry out the study."""
    from mmvssm.analysis.studies.common import run_study

    path = run_study(args.study, args)
    print(f'pictures and {path.name} are in {path.parent}')


if __name__ == '__main__':
    arguments = parse_args()
    from mmvssm.engine import run_tool

    run_tool(lambda: main(arguments))
