"""Files of checkpoints: written whole or not at all, checked before use."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from mmengine.fileio import LocalBackend, register_backend

from mmvssm.checkpoints import CheckpointError
from mmvssm.checkpoints.read import read_content

# The name under which mmengine finds WholeFileBackend.
WHOLE_FILE_BACKEND = 'mmvssm_whole_file'
POINTER = 'last_checkpoint'
_PARTIAL = '.partial'
# The last one is of a training stopped within an epoch.
_NAME = r'(?:iter_(\d+)|epoch_(\d+)(?:_iter_(\d+))?)\.pth'
# What a training needs to go on.
_NEEDED = ('meta', 'state_dict', 'message_hub', 'optimizer')


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one, or none, or all of it.

    The bytes go to a file beside it, are forced to the disk, and only then
    take the name.

    Args:
        path: The file; its folder is made where it is missing.
        content: All of it.

    Raises:
        OSError: The disk is full, for one. What stood at ``path`` still does.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + _PARTIAL)
    try:
        with open(partial, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Force a new name to the disk; some network disks cannot, and need not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def remove_partial(folder: str | Path) -> None:
    """Remove what writes that were cut short have left in ``folder``."""
    for partial in Path(folder).glob(f'*{_PARTIAL}'):
        partial.unlink(missing_ok=True)


@register_backend(WHOLE_FILE_BACKEND, force=True)
class WholeFileBackend(LocalBackend):
    """mmengine's local disk, with :func:`write_whole` for writing bytes.

    mmengine makes a backend anew for every file, from arguments that must be
    JSON: failures are therefore noted in the class. They are not raised,
    because only rank 0 writes and the others would wait for it in vain.

    Attributes:
        failures: What could not be written and why, until someone clears it.
    """

    failures: ClassVar[list[str]] = []

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes to a file; see :func:`write_whole`."""
        try:
            write_whole(filepath, obj)
        except OSError as error:
            self.failures.append(f'cannot write {filepath}: {error}')


def check_training_state(path: str | Path) -> None:
    """Read all of a checkpoint, and see that a training can go on from it.

    Args:
        path: A file on the local disk.

    Raises:
        CheckpointError: It is missing, truncated or damaged, or holds no state
            of a training.
    """
    content = read_content(path)
    absent = [
        key for key in _NEEDED if not (isinstance(content, dict) and key in content)
    ]
    if absent:
        raise CheckpointError(
            f'{path} holds no state of a training ({", ".join(absent)} missing); '
            'start from its weights instead: --cfg-options load_from=PATH'
        )
    parts = [content[key] for key in _NEEDED]
    if not all(isinstance(part, dict) for part in parts) or not all(
        isinstance(content['meta'].get(key), int) for key in ('epoch', 'iter')
    ):
        raise CheckpointError(f'{path} holds no training as mmengine saves it')


def has_checkpoints(folder: str | Path) -> bool:
    """Whether a training in ``folder`` has saved any, readable or not."""
    return bool(_candidates(Path(folder)))


def newest_training_state(
    folder: str | Path, skipped: Callable[[str], None]
) -> str | None:
    """The checkpoint that a training in ``folder`` goes on from.

    That is the one which ``last_checkpoint`` names, or one of a later
    iteration that was written after it (its training died before it moved the
    pointer). If it cannot be read the one written before it, and so on.

    Args:
        folder: Where the checkpoints ``iter_N.pth``, ``epoch_N.pth`` or
            ``epoch_N_iter_M.pth`` and ``last_checkpoint`` are.
        skipped: Called with the reason for every file passed over.

    Returns:
        Its path, or None where no training has saved yet.

    Raises:
        CheckpointError: There are checkpoints, and none can be read.
    """
    candidates = _candidates(Path(folder))
    for path in candidates:
        try:
            check_training_state(path)
        except CheckpointError as error:
            skipped(str(error))
        else:
            return str(path)
    if candidates:
        raise CheckpointError(
            f'none of the {len(candidates)} checkpoints in {folder} can be read: '
            f'{", ".join(path.name for path in candidates)}. To train from the '
            'start, remove them or give another --work-dir.'
        )
    return None


def _candidates(folder: Path) -> list[Path]:
    """Checkpoints, the one to take first."""
    steps = {
        path: tuple(int(number or 0) for number in match.groups())
        for path in folder.glob('*.pth')
        if (match := re.fullmatch(_NAME, path.name))
    }
    times = {path: path.stat().st_mtime_ns for path in steps}
    latest_first = sorted(steps, key=lambda path: (times[path], steps[path]))[::-1]
    pointed = _pointed(folder)
    if pointed not in steps:
        return latest_first
    # An earlier training in the same folder may have left higher numbers.
    ahead = [
        path
        for path in latest_first
        if steps[path] > steps[pointed] and times[path] >= times[pointed]
    ]
    first = [*ahead, pointed]
    return first + [path for path in latest_first if path not in first]


def _pointed(folder: Path) -> Path | None:
    """What ``last_checkpoint`` names, though the folder may have moved since."""
    try:
        name = (folder / POINTER).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return folder / Path(name).name if name else None
