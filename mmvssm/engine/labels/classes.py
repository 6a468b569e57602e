"""Look at the images and class labels of a classifier's data set."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .reading import Reader, read_samples, report_missing_images
from .report import DatasetReport, Finding, shorten


def inspect_classes(
    reader: Reader,
    report: DatasetReport,
    number: int | None,
    images: int | None = None,
    seconds: float | None = None,
) -> None:
    """Count the images of each class, and open images.

    Args:
        reader: Of a data set whose images have a number each, ``gt_label``.
        report: What is found is added to it.
        number: How many classes the model tells apart, None if that is not known.
        images: How many to read, None for all.
        seconds: The time limit.
    """
    report.images = len(reader)
    _count(reader, report, number)
    gone = set()
    if seconds is None:
        gone = report_missing_images(
            reader,
            report,
            'set data_prefix to the folder that the names in the annotation file start '
            'from',
        )
    read_samples(reader, report, lambda index, sample: None, gone, images, seconds)


def _count(reader: Reader, report: DatasetReport, number: int | None) -> None:
    names = _names(reader.dataset) or [str(i) for i in range(number or 0)]
    counts: Counter = Counter()
    outside: list[tuple[str, int]] = []
    for info in reader.infos():
        label = info.get('gt_label')
        if not isinstance(label, int):
            continue
        counts[label] += 1
        if not 0 <= label < len(names):
            outside.append((info.get('img_path', ''), label))
    for i, name in enumerate(names):
        report.classes[name] = {'images': counts[i]}
    if outside:
        (path, label), *more = outside
        also = f', and {len(more)} more have such a label' if more else ''
        report.add(
            'error',
            f'{report.labels}: {path} has the label {label}, but there are '
            f'{len(names)} classes, numbered from 0 to {len(names) - 1}{also}: number '
            'them from 0 in the annotation file, or set num_classes of the head.',
        )
    empty = [name for i, name in enumerate(names) if not counts[i]]
    if empty and counts:
        report.add(
            'warning',
            f'{report.labels} has no image of {len(empty)} of the {len(names)} '
            f'classes: {shorten(empty)}.',
        )


def compare_classes(found: Sequence[tuple[DatasetReport, Any]]) -> None:
    """Refuse data sets that number their classes differently.

    A class without a folder in one of them shifts the numbers of those behind it, and a
    validation would compare with the wrong ones.

    Args:
        found: Reports, and the data sets: the first one is that of the training.
    """
    told = set()
    for names_of in (_folders, _names):
        known = [(report, names_of(dataset)) for report, dataset in found]
        known = [(report, names) for report, names in known if names]
        for report, names in known[1:]:
            other, first = known[0]
            if names == first or id(report) in told:
                continue
            told.add(id(report))
            # It explains other errors.
            text = _difference(report, names, other, first)
            report.findings.insert(0, Finding('error', text))


def _difference(
    report: DatasetReport,
    names: Sequence[str],
    other: DatasetReport,
    first: Sequence[str],
) -> str:
    parts = [
        f'{shorten(sorted(some))} only in {where}'
        for some, where in (
            (set(names) - set(first), report.split),
            (set(first) - set(names), other.split),
        )
        if some
    ]
    return (
        f'{report.labels} does not have the classes of {other.labels} in their order '
        f'({"; ".join(parts) or "the same names, in another order"}), so a number '
        'would stand for two classes: give both the same folders, even if one is '
        'empty, or the same metainfo=dict(classes=...).'
    )


def _folders(dataset: Any) -> list[str]:
    """The folders that the classes were numbered by, if they were."""
    found = getattr(dataset, 'folder_to_idx', None) or {}
    return sorted(found, key=found.get)


def _names(dataset: Any) -> list[str]:
    return list(dataset.metainfo.get('classes') or [])


def place_of_classes(config: dict) -> str:
    """Where the labels of a data set are: its list, or its folders."""
    root = Path(config.get('data_root') or '')
    prefix = config.get('data_prefix') or config.get('split') or ''
    if isinstance(prefix, dict):
        prefix = next(iter(prefix.values()), '')
    return str(root / (config.get('ann_file') or prefix))
