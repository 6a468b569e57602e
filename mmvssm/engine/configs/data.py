"""Say before anything is built that a data set is not what it should be."""

import json
import mmap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS

from mmvssm.engine.errors import UsageError

_ADE20K = """\
ADE20K (scene parsing, 2016) is laid out as

    data/ade/ADEChallengeData2016/
        images/training/*.jpg         annotations/training/*.png
        images/validation/*.jpg       annotations/validation/*.png

which is how its archive ADEChallengeData2016.zip unpacks. A copy kept
elsewhere: export ADE20K_ROOT=/path/to/ADEChallengeData2016"""

_COCO = """\
COCO 2017 is laid out as

    data/coco/
        annotations/instances_train2017.json    train2017/*.jpg
        annotations/instances_val2017.json      val2017/*.jpg

A copy kept elsewhere: export COCO_ROOT=/path/to/coco"""

_IMAGENET = """\
ImageNet-1K is laid out as

    data/imagenet/
        train/n01440764/*.JPEG ...    val/n01440764/*.JPEG ...

with the validation images sorted into folders of classes as those of the
training are, or with lists of all images in meta/train.txt and meta/val.txt.
A copy kept elsewhere: export IMAGENET_ROOT=/path/to/imagenet"""

_LAYOUTS = {
    'ADE20KDataset': _ADE20K,
    'CocoDataset': _COCO,
    'ImageNet': _IMAGENET,
    'mmpretrain.ImageNet': _IMAGENET,
}
# Data sets of MMPretrain with a folder for each class, or a list of the images.
_CLASS_FOLDERS = ('ImageNet', 'CustomDataset')

_HOW_ELSE = """\
For any data set: --cfg-options train_dataloader.dataset.data_root=PATH
val_dataloader.dataset.data_root=PATH test_dataloader.dataset.data_root=PATH
Nothing to download: `make quickstart` (segmentation), `make quickstart-det`
(detection) and `make quickstart-cls` (classification) make data of their own and
train on it."""


def check_datasets(cfg: Config, splits: Iterable[str] = ('train', 'val')) -> None:
    """Look for the files that the config's data sets are to be read from.

    Every folder in ``data_prefix`` must exist and hold files, every
    ``ann_file`` must exist. Data sets inside wrappers (``RepeatDataset``,
    ``ConcatDataset`` ...) count too; those read through a storage backend
    other than the local disk do not. The categories of COCO's annotation files
    must be the data set's classes.

    Args:
        cfg: The config.
        splits: Which of ``train``, ``val`` and ``test`` will be read.

    Raises:
        UsageError: Something is missing, and the message lists where it looked
            and how to lay the data out; or an annotation file cannot be read or
            has other categories; or a metric asks for more classes than there are.
    """
    splits = list(splits)
    _check_topk(cfg, splits)
    for dataset in check_folders(cfg, splits):
        if dataset.get('type') == 'CocoDataset':
            check_categories(dataset, cfg.get('default_scope'))


def check_folders(cfg: Config, splits: Iterable[str]) -> list[dict]:
    """Of :func:`check_datasets`, what needs no look into a file.

    Returns:
        Configs of the data sets, without those of wrappers.
    """
    datasets = [
        dataset
        for split in splits
        if (loader := cfg.get(f'{split}_dataloader'))
        for dataset in leaves(loader.get('dataset'))
    ]
    for dataset in datasets:
        _check_types(dataset)
    missing, types = [], []
    for dataset in datasets:
        absent = [path for path in _needed(dataset) if not _has_data(path)]
        if absent:
            missing += absent
            types.append(dataset.get('type'))
    missing += [path for path in _scored_against(cfg, splits) if not path.is_file()]
    if missing:
        looked = '\n'.join(f'    {p.absolute()}' for p in dict.fromkeys(missing))
        layouts = (f'{_LAYOUTS[t]}\n' for t in dict.fromkeys(types) if t in _LAYOUTS)
        raise UsageError(
            f'no data. Looked for, and did not find or found empty:\n'
            f'{looked}\n{"".join(layouts)}{_HOW_ELSE}'
        )
    for dataset in datasets:
        _check_class_folders(dataset)
    return datasets


def _check_class_folders(dataset: dict) -> None:
    """Refuse images that lie beside one another, with nothing that says their class."""
    named = dataset.get('ann_file') or not dataset.get('with_label', True)
    if named or _has_list(dataset) or not _is_of(dataset, *_CLASS_FOLDERS):
        return
    for path in _needed(dataset):
        if not any(child.is_dir() for child in path.iterdir()):
            raise UsageError(
                f'{path.absolute()} has no folders of classes: an image belongs into '
                'the folder of its class, CLASS/NAME.jpg.'
            )


def _has_list(dataset: dict) -> bool:
    """Whether MMPretrain's ``ImageNet`` finds a list of images by itself, or none."""
    split = dataset.get('split')
    if not split or not _is_of(dataset, 'ImageNet'):
        return False
    root = Path(dataset.get('data_root') or '').expanduser()
    return split == 'test' or (root / 'meta' / f'{split}.txt').exists()


def _check_topk(cfg: Config, splits: Iterable[str]) -> None:
    """Refuse a metric that would fail after the first epoch."""
    head = (cfg.get('model') or {}).get('head')
    number = head.get('num_classes') if isinstance(head, dict) else None
    for key, metric in _metrics(cfg, splits):
        topk = metric.get('topk') or 0
        most = max(topk) if isinstance(topk, (list, tuple)) else topk
        if isinstance(number, int) and most > number:
            raise UsageError(
                f'{key} counts whether the true class is among the first {most}, and '
                f'the model knows {number}: set {key}.topk to numbers up to {number}.'
            )


def _metrics(cfg: Config, splits: Iterable[str]) -> Iterator[tuple[str, dict]]:
    for split in splits:
        key = f'{split}_evaluator'
        found = cfg.get(key) or []
        for metric in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(metric, dict):
                yield key, metric


def leaves(dataset: dict) -> Iterator[dict]:
    """Configs of the data sets inside wrappers, or the one config itself."""
    if not isinstance(dataset, dict):
        raise UsageError(f'a data set of the config is {dataset!r:.80}, not a dict.')
    inner = dataset.get('datasets') or [dataset.get('dataset')]
    if inner == [None]:
        yield dataset
    else:
        for child in inner:
            yield from leaves(child)


def _check_types(dataset: dict) -> None:
    for key, kind, what in (
        ('data_root', str, 'a string'),
        ('ann_file', str, 'a string'),
        # MMPretrain's data sets take a string, too.
        ('data_prefix', (dict, str), 'a dict of strings'),
        ('backend_args', dict, 'a dict'),
        ('metainfo', dict, 'a dict'),
    ):
        value = dataset.get(key)
        if value is None or isinstance(value, kind):
            continue
        raise UsageError(f'{key} of a data set must be {what}, not {value!r:.80}.')
    for name in _prefixes(dataset):
        if not isinstance(name, str):
            raise UsageError(f'data_prefix must hold strings, not {name!r:.80}.')


def _needed(dataset: dict) -> Iterator[Path]:
    backend = (dataset.get('backend_args') or {}).get('backend', 'local')
    root = dataset.get('data_root') or ''
    if backend != 'local' or '://' in root:
        return
    names = [name for name in (*_prefixes(dataset), dataset.get('ann_file')) if name]
    if _is_of(dataset, *_CLASS_FOLDERS):
        root = Path(root).expanduser()
        # Then the folders of the classes are in the root.
        names = names or ['.']
    # An absolute name replaces the root, as in mmengine's BaseDataset.
    yield from (Path(root) / name for name in names)


def _prefixes(dataset: dict) -> list[Any]:
    """Where images and labels are, below the root."""
    found = dataset.get('data_prefix') or {}
    if not found and _is_of(dataset, 'ImageNet'):
        found = dataset.get('split') or {}
    return [found] if isinstance(found, str) else list(found.values())


def _is_of(dataset: dict, *kinds: str) -> bool:
    return str(dataset.get('type')).removeprefix('mmpretrain.') in kinds


def _scored_against(cfg: Config, splits: Iterable[str]) -> Iterator[Path]:
    for _, metric in _metrics(cfg, splits):
        path = metric.get('ann_file')
        if path and '://' not in path:
            yield Path(path)


def _has_data(path: Path) -> bool:
    return path.is_file() or next(path.rglob('*.*'), None) is not None


def check_categories(dataset: dict, scope: str | None) -> None:
    """Refuse a file whose categories mmdet would ignore or mix up.

    It numbers the categories it knows in the order of the file, so one that is
    missing shifts the numbers of those behind it.
    """
    files = [path for path in _needed(dataset) if path.suffix == '.json']
    classes = (dataset.get('metainfo') or {}).get('classes')
    if classes is None:
        kind = DATASETS.get(f'{scope}.{dataset["type"]}' if scope else dataset['type'])
        if kind is None:
            return  # What builds it says so.
        classes = kind.METAINFO['classes']
    classes = (classes,) if isinstance(classes, str) else tuple(classes)
    for path in files:
        names = tuple(category.get('name') for category in _read_categories(path))
        if tuple(name for name in names if name in classes) != classes:
            raise UsageError(
                f'{path} does not have the classes of the config in their order. It '
                f'has {_shorten(names)}, the config {_shorten(classes)}: set '
                'metainfo=dict(classes=...) of the data sets to what the file has, and '
                'num_classes of the heads to their number.'
            )


def _read_categories(path: Path) -> list[dict]:
    """The categories of a COCO file, without parsing the hundreds of MB before."""
    try:
        with (
            path.open('rb') as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            start = content.rfind(b'"categories"')
            tail = content[start:].decode() if start >= 0 else ''
            if not content[-64:].rstrip().endswith(b'}'):
                raise ValueError('it does not end as JSON does')
        found = json.JSONDecoder().raw_decode(tail.partition(':')[2].lstrip())[0]
        if not all(isinstance(category, dict) for category in found):
            raise ValueError('its categories are no objects')
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(
            f'{path} is no annotation file of COCO, or is cut short: {error}.'
        ) from error
    return found


def _shorten(names: Sequence[str]) -> str:
    first = ', '.join(map(str, names[:8]))
    return f'{first} and {len(names) - 8} more' if len(names) > 8 else first or 'none'
