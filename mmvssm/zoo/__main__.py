"""Published weights: ``python -m mmvssm.zoo list | path | fetch | verify NAME``."""

import argparse
import sys

from mmvssm.errors import ZooError
from mmvssm.zoo import TABLE, fetch, path_of, verify

_SHOWN = ('top-1', 'mIoU', 'box AP', 'mask AP')


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog='python -m mmvssm.zoo', description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('list', help='all names, with figures and licences')
    for command, help in (
        ('path', 'where the file lies; exit code 1 if it is not there yet'),
        ('fetch', 'download the file if need be, and print where it lies'),
        ('verify', 'compare the SHA-256 of a file that was downloaded'),
    ):
        part = commands.add_parser(command, help=help)
        part.add_argument(
            'name', help='a name of the list, hf://OWNER/REPOSITORY/FILE, or an address'
        )
    return parser.parse_args()


def rows() -> list[tuple[str, ...]]:
    """Name, figures, licence and state of every row."""
    found = []
    for row in TABLE.values():
        figures = ', '.join(
            f'{name} {value}' for name, value in row.metrics.items() if name in _SHOWN
        )
        state = 'no file published'
        if row.url:
            state = 'here' if path_of(row.name).is_file() else ''
        found.append((row.name, figures, row.licence, state))
    return found


def main() -> int:
    """Run the command; gives the exit code."""
    args = parse_args()
    if args.command == 'list':
        widths = [max(map(len, column)) for column in zip(*rows(), strict=True)]
        for row in rows():
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print('  '.join(cells).rstrip())
        return 0
    try:
        if args.command == 'path':
            path = path_of(args.name)
            print(path)
            return 0 if path.is_file() else 1
        if args.command == 'fetch':
            print(fetch(args.name))
        else:
            path, digest = verify(args.name)
            print(f'{path} {digest}')
    except KeyboardInterrupt:
        return 130
    except (ZooError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
