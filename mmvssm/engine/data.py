"""Say before anything is built that a data set is not where it should be."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from mmengine.config import Config

from .errors import UsageError

_ADE20K = """\
ADE20K (scene parsing, 2016) is laid out as

    data/ade/ADEChallengeData2016/
        images/training/*.jpg         annotations/training/*.png
        images/validation/*.jpg       annotations/validation/*.png

which is how its archive ADEChallengeData2016.zip unpacks. A copy kept
elsewhere: export ADE20K_ROOT=/path/to/ADEChallengeData2016"""

_HOW_ELSE = """\
For any data set: --cfg-options train_dataloader.dataset.data_root=PATH
val_dataloader.dataset.data_root=PATH test_dataloader.dataset.data_root=PATH
Nothing to download: `make quickstart` makes its own data and trains on it."""


def check_datasets(cfg: Config, splits: Iterable[str] = ('train', 'val')) -> None:
    """Look for the files that the config's data sets are to be read from.

    Every folder in ``data_prefix`` must exist and hold files, every
    ``ann_file`` must exist. Data sets inside wrappers (``RepeatDataset``,
    ``ConcatDataset`` ...) count too; those read through a storage backend
    other than the local disk do not.

    Args:
        cfg: The config.
        splits: Which of ``train``, ``val`` and ``test`` will be read.

    Raises:
        UsageError: Something is missing; the message lists where it looked
            and how to lay the data out.
    """
    missing, types = [], set()
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        for dataset in leaves(loader.dataset) if loader else ():
            absent = [path for path in _needed(dataset) if not _has_data(path)]
            if absent:
                missing += absent
                types.add(dataset.get('type'))
    if missing:
        looked = '\n'.join(f'    {p.absolute()}' for p in dict.fromkeys(missing))
        layout = f'{_ADE20K}\n' if 'ADE20KDataset' in types else ''
        raise UsageError(
            f'no data. Looked for, and did not find or found empty:\n'
            f'{looked}\n{layout}{_HOW_ELSE}'
        )


def leaves(dataset: dict) -> Iterator[dict]:
    """Configs of the data sets inside wrappers, or the one config itself."""
    inner = dataset.get('datasets') or [dataset.get('dataset')]
    if inner == [None]:
        yield dataset
    else:
        for child in inner:
            yield from leaves(child)


def _needed(dataset: dict) -> Iterator[Path]:
    backend = (dataset.get('backend_args') or {}).get('backend', 'local')
    root = dataset.get('data_root') or ''
    if backend != 'local' or '://' in root:
        return
    names = [*(dataset.get('data_prefix') or {}).values(), dataset.get('ann_file')]
    # An absolute name replaces the root, as in mmengine's BaseDataset.
    yield from (Path(root) / name for name in names if name)


def _has_data(path: Path) -> bool:
    return path.is_file() or next(path.rglob('*.*'), None) is not None
