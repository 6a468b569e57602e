"""Convert a published checkpoint to the names of this package.

Example: python tools/convert_checkpoint.py vssmtiny.pth vmamba_t_v0.safetensors
"""

import argparse


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Recognise a checkpoint by its keys, convert it and write '
        'it as .pth or .safetensors.'
    )
    parser.add_argument(
        'src',
        help='.pth or .safetensors file, its address, mmvssm://NAME or '
        'hf://OWNER/REPOSITORY/FILE',
    )
    parser.add_argument('dst', help='file to write, .pth or .safetensors')
    parser.add_argument('--prefix', help='use only the keys with this prefix')
    parser.add_argument(
        '--weights',
        choices=('raw', 'ema'),
        help='of a file with both, take the raw or the averaged weights',
    )
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='run code that the checkpoint contains; only for files of your own',
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Convert."""
    from mmvssm.checkpoints import convert, save_checkpoint, trust
    from mmvssm.engine import UsageError

    if args.trust_checkpoint:
        trust(args.src)
    try:
        checkpoint = convert(args.src, args.prefix, args.weights)
        save_checkpoint(checkpoint, args.dst)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    print(checkpoint)
    print(f'written to {args.dst}')


if __name__ == '__main__':
    arguments = parse_args()
    from mmvssm.engine import run_tool

    run_tool(lambda: main(arguments))
