"""What a tool prints instead of a traceback when its user is at fault."""

from pathlib import Path


class UsageError(Exception):
    """A mistake of the user's; its message says what to do about it."""


def require_file(path: str, what: str) -> None:
    """Raise :class:`UsageError` unless ``path`` is a file (or a URL)."""
    if '://' not in path and not Path(path).is_file():
        raise UsageError(f'no {what} at {Path(path).absolute()}.')
