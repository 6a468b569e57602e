"""Look into the images and labels of a config before it trains on them."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.registry import DATASETS, DefaultScope

from mmvssm.engine.configs.config import is_classifier, is_detector, scope_of
from mmvssm.engine.configs.data import check_categories, leaves
from mmvssm.engine.configs.explain import explain
from mmvssm.engine.errors import UsageError
from mmvssm.engine.launching.ranks import Ranks

from .boxes import inspect_annotations, inspect_objects
from .classes import compare_classes, inspect_classes, place_of_classes
from .heads import (
    HeadLabels,
    classification_heads,
    contradictions,
    detection_heads,
    segmentation_heads,
)
from .masks import class_names, ignored_label, inspect_masks
from .reading import Reader
from .report import DatasetReport, registered

VARIABLE = 'MMVSSM_DATA_CHECK'
SAMPLE_IMAGES = 64
SAMPLE_SECONDS = 5.0
# An annotation file of more bytes takes too long to be read before each training.
_LARGE_FILE = 64 * 1024**2


class WrongPartError(UsageError):
    """A part of the config cannot be built, which is nothing about the data."""


class Inspected(NamedTuple):
    """A data set that was looked into; ``reader`` is None where it cannot be read."""

    report: DatasetReport
    reader: Reader | None
    classes: list[str]


def check_labels(cfg: Config, splits: Iterable[str] = ('train', 'val')) -> None:
    """Look into a sample of a config's data, and refuse what contradicts the config.

    At most 64 images of each split are read, or for 5 seconds in all. Likely mistakes
    are logged. Rank 0 reads; the others wait for what it says. Nothing happens where
    the environment variable ``MMVSSM_DATA_CHECK`` is 0.

    Args:
        cfg: The config.
        splits: Which of ``train``, ``val`` and ``test`` to look into.

    Raises:
        UsageError: Labels contradict the classes, ``num_classes``, ``ignore_index`` or
            ``reduce_zero_label``, or a file is missing or broken. On all ranks.
    """
    if os.environ.get(VARIABLE) == '0':
        return
    ranks = Ranks()
    said = ''
    if is_main_process():
        try:
            said = _say(cfg, splits)
        except UsageError as error:
            said = str(error)
    said = ranks.gather(said)[0]
    if said:
        raise UsageError(said)


def _say(cfg: Config, splits: Iterable[str]) -> str:
    """Log warnings; returns the first error, '' without any."""
    found = inspect_data(cfg, splits, SAMPLE_IMAGES, SAMPLE_SECONDS)
    for report, *_ in found:
        for text in report.of('warning'):
            print_log(f'{report.split}: {text}', 'current', level=30)
    errors = [text for report, *_ in found for text in report.of('error')]
    if not errors:
        return ''
    more = f'{len(errors) - 1} more; ' if len(errors) > 1 else ''
    return (
        f'{errors[0]} ({more}`python tools/check_data.py {cfg.filename or "CONFIG"}` '
        f'looks at all images, {VARIABLE}=0 trains without this check)'
    )


def inspect_data(
    cfg: Config,
    splits: Iterable[str] = ('train', 'val', 'test'),
    images: int | None = None,
    seconds: float | None = None,
) -> list[Inspected]:
    """Look into the data sets of a config.

    Data sets inside wrappers count one by one; those that two splits share, once.

    Args:
        cfg: The config.
        splits: Which of ``train``, ``val`` and ``test``.
        images: How many of each split, None for all.
        seconds: A limit of time for all of them; None for none. With one, annotation
            files of more than 64 MiB are left out.
    """
    datasets: list[tuple[list[str], dict]] = []
    for split in splits:
        loader = cfg.get(f'{split}_dataloader') or {}
        for dataset in leaves(loader.get('dataset')) if loader else ():
            same = [names for names, other in datasets if other == dataset]
            if same:
                same[0].append(split)
            else:
                datasets.append(([split], dataset))
    with DefaultScope.overwrite_default_scope(scope_of(cfg)):
        expected = _heads_of(cfg)
        found = []
        for names, dataset in datasets:
            siblings = sum(names[0] in others for others, _ in datasets)
            number = None if images is None else max(1, images // siblings)
            limit = seconds / len(datasets) if seconds else None
            split = '+'.join(dict.fromkeys(names))
            found.append(_inspect(dataset, split, expected, cfg, number, limit))
        if is_classifier(cfg):
            compare_classes([(f.report, f.reader.dataset) for f in found if f.reader])
        return found


def _heads_of(cfg: Config) -> list[HeadLabels]:
    if is_classifier(cfg):
        return classification_heads(cfg.model)
    return (detection_heads if is_detector(cfg) else segmentation_heads)(cfg.model)


def _inspect(
    config: dict,
    split: str,
    heads: list[HeadLabels],
    cfg: Config,
    images: int | None,
    seconds: float | None,
) -> Inspected:
    classifies = is_classifier(cfg)
    place = place_of_classes(config) if classifies else _place(config)
    report = DatasetReport(split, place)
    kind = registered(DATASETS, config.get('type'))
    if kind is None:
        _make_reader(config, cfg)  # Says so.
    # Classes of images have no colours.
    if not classifies and (text := _wrong_palette(config, is_detector(cfg))):
        report.add('error', f'{_name(cfg)}: {text}')
        return Inspected(report, None, [])
    if is_detector(cfg):
        return _inspect_objects(config, report, heads, cfg, images, seconds)
    if not hasattr(kind, 'get_gt_labels' if classifies else 'get_label_map'):
        # It need not take what the toolbox's data sets take.
        report.add('note', f'labels of {config.get("type")} are not looked into.')
        return Inspected(report, None, [])
    try:
        reader = _make_reader(config, cfg)
    except WrongPartError:
        raise
    except Exception as error:
        # A data set of the user's can fail in any way.
        report.add('error', f'{report.labels}: the data set of {split}: {error}')
        return Inspected(report, None, [])
    dataset = reader.dataset
    if classifies:
        classes = list(dataset.metainfo.get('classes') or [])
        if classes:
            _contradict(heads, classes, report, cfg)
        number = heads[0].number if heads else None
        inspect_classes(reader, report, number, images, seconds)
    else:
        classes = class_names(dataset, heads)
        _contradict(heads, classes, report, cfg)
        inspect_masks(reader, report, heads, images, seconds)
    _check_channels(report, cfg)
    return Inspected(report, reader, classes)


def _inspect_objects(
    config: dict,
    report: DatasetReport,
    heads: list[HeadLabels],
    cfg: Config,
    images: int | None,
    seconds: float | None,
) -> Inspected:
    kind = registered(DATASETS, config.get('type'))
    classes = (config.get('metainfo') or {}).get('classes')
    classes = classes or getattr(kind, 'METAINFO', {}).get('classes') or ()
    classes = [classes] if isinstance(classes, str) else list(classes)
    _contradict(heads, classes, report, cfg)
    nothing = Inspected(report, None, classes)
    if getattr(kind, '__name__', '') != 'CocoDataset':
        report.add('note', f'annotations of {config.get("type")} are not looked into.')
        return nothing
    path = Path(report.labels)
    if not path.is_file():
        report.add('note', f'{path} is no file of this machine, and not looked into.')
        return nothing
    if seconds and path.stat().st_size > _LARGE_FILE:
        report.add('note', f'{path} is large: tools/check_data.py looks into it.')
        return nothing
    try:
        check_categories(config, cfg.get('default_scope'))
        inspect_annotations(path, report, classes, _loads_masks(config))
        if report.of('error'):
            return nothing
        reader = _make_reader(config, cfg)
    except WrongPartError:
        raise
    except (UsageError, json.JSONDecodeError) as error:
        report.add('error', str(error))
        return nothing
    except Exception as error:
        # What the file has of any other kind ends in any error.
        report.add('error', f'{path} cannot be read: {type(error).__name__}: {error}.')
        return nothing
    inspect_objects(reader, report, images, seconds)
    _check_channels(report, cfg)
    return Inspected(report, reader, classes)


def _contradict(
    heads: list[HeadLabels], classes: list[str], report: DatasetReport, cfg: Config
) -> None:
    for text in contradictions(heads, classes, _name(cfg), report.split):
        report.add('error', text)


def _wrong_palette(config: dict, detects: bool) -> str:
    """Colours that do not fit the classes, as those of an inherited config.

    mmdet takes a palette with colours to spare, mmseg does not.
    """
    metainfo = config.get('metainfo') or {}
    classes, palette = metainfo.get('classes'), metainfo.get('palette')
    if not classes or not palette or isinstance(classes, str):
        return ''
    if len(classes) == len(palette) or (detects and len(classes) < len(palette)):
        return ''
    return (
        f'metainfo has {len(classes)} classes and a palette of {len(palette)} colours: '
        'give it one colour for each class, or drop an inherited palette by '
        'metainfo=dict(_delete_=True, classes=...).'
    )


def _make_reader(config: dict, cfg: Config) -> Reader:
    try:
        return Reader(config)
    except Exception as error:
        if said := explain(error, cfg):
            raise WrongPartError(said) from error
        raise


def _place(config: dict) -> str:
    """Where the labels of a data set are."""
    prefix = config.get('data_prefix') or {}
    name = prefix.get('seg_map_path') or config.get('ann_file') or ''
    return str(Path(config.get('data_root') or '') / name)


def _name(cfg: Config) -> str:
    return str(cfg.filename or 'the config')


def _loads_masks(config: dict) -> bool:
    return any(
        part.get('with_mask')
        for part in config.get('pipeline') or []
        if isinstance(part, dict)
    )


def _check_channels(report: DatasetReport, cfg: Config) -> None:
    mean = (cfg.model.get('data_preprocessor') or {}).get('mean')
    expected = len(mean) if isinstance(mean, (list, tuple)) else None
    others = [number for number in report.channels if number != expected]
    if expected and expected != 1 and others:
        report.add(
            'error',
            f'{_name(cfg)}: the images of {report.split} have '
            f'{_listed(report.channels)} channels, but data_preprocessor.mean '
            f'has {expected} numbers: give mean, std and in_channels of the backbone '
            'as many as there are channels.',
        )
    elif len(report.channels) > 1:
        report.add(
            'error',
            f'{report.labels}: the images of {report.split} have '
            f'{_listed(report.channels)} channels: save them with equally many.',
        )


def _listed(numbers: Iterable[int]) -> str:
    return ' and '.join(map(str, sorted(numbers)))


def findings(found: Iterable[Inspected]) -> Iterator[str]:
    """Errors and warnings of data sets."""
    for report, *_ in found:
        yield from report.of('error', 'warning')


def ignored_of(cfg: Config) -> int | None:
    """The label that a segmentor's head ignores."""
    return ignored_label(segmentation_heads(cfg.model))
