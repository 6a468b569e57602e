"""Look at the masks of a segmentation data set."""

import os
from collections.abc import Sequence

import numpy as np

from .heads import HeadLabels
from .reading import (
    Reader,
    Sample,
    UnreadableError,
    missing_files,
    read_samples,
    size_remedy,
    unused_images,
)
from .report import DatasetReport, shorten

# A mask is read into 8 bits.
_LABELS = 256


class MaskCounts:
    """Pixels of the masks, by the number in the file and what it becomes."""

    def __init__(self):
        self.pixels = np.zeros((_LABELS, _LABELS), np.int64)
        self.images = np.zeros(_LABELS, np.int64)
        self.first: dict[tuple[int, int], tuple[int, str]] = {}

    def add(self, index: int, sample: Sample) -> None:
        """Count one mask."""
        labels = sample.labels.astype(np.int64).ravel()
        stored = sample.stored
        if stored is None or stored.size != labels.size:
            stored = sample.labels
        pairs = stored.astype(np.int64).ravel() * _LABELS + labels
        counts = np.bincount(pairs, minlength=_LABELS**2).reshape(_LABELS, _LABELS)
        self.pixels += counts
        self.images += counts.any(0)
        for before, after in np.argwhere(counts):
            key = int(before), int(after)
            if key not in self.first or index < self.first[key][0]:
                self.first[key] = (index, sample.mask_path)

    @property
    def total(self) -> int:
        """All pixels."""
        return int(self.pixels.sum())

    def labels(self) -> list[int]:
        """Labels after loading."""
        return np.flatnonzero(self.pixels.any(0)).tolist()

    def stored(self) -> list[int]:
        """Numbers in the files."""
        return np.flatnonzero(self.pixels.any(1)).tolist()

    def share(self, label: int) -> float:
        """Of the pixels, those with a label after loading."""
        return float(self.pixels[:, label].sum() / max(self.total, 1))

    def of(self, label: int) -> tuple[int, int, str]:
        """A number in a file that becomes ``label``, the image's number, the mask."""
        before = int(np.flatnonzero(self.pixels[:, label])[0])
        return before, *self.first[before, label]


def inspect_masks(
    reader: Reader,
    report: DatasetReport,
    heads: Sequence[HeadLabels],
    images: int | None = None,
    seconds: float | None = None,
) -> MaskCounts:
    """Read images and masks, and say what contradicts the config.

    Args:
        reader: Of mmseg's data set.
        report: What is found is added to it.
        heads: What the model takes.
        images: How many to read, None for all. Where they show no more than one
            class, more are read until the time is over, if there is a limit.
        seconds: The time limit.
    """
    dataset = reader.dataset
    report.images = len(reader)
    gone = _check_files(reader, report)
    counts, ignored = MaskCounts(), ignored_label(heads)

    def look(index: int, sample: Sample) -> None:
        _check_sample(sample)
        if sample.labels is not None:
            counts.add(index, sample)

    read_samples(
        *(reader, report, look, gone, images, seconds),
        suffices=lambda: _is_varied(counts, ignored),
        what='images or masks',
    )
    classes = class_names(dataset, heads)
    _summarise(counts, report, classes, dataset, ignored)
    if counts.total:
        _judge(counts, report, classes, dataset, heads)
    elif report.read:
        report.add('note', f'the pipeline of {report.split} loads no masks.')
    return counts


def ignored_label(heads: Sequence[HeadLabels]) -> int | None:
    """The label that the first head ignores; the head of the predictions."""
    return heads[0].ignored if heads else 255


def class_names(dataset, heads: Sequence[HeadLabels]) -> list[str]:
    """Names of the classes, made up where there are none."""
    names = dataset.metainfo.get('classes')
    if names:
        return list(names)
    return [f'class {label}' for label in range(heads[0].number if heads else 0)]


def _is_varied(counts: MaskCounts, ignored: int | None) -> bool:
    return len([label for label in counts.labels() if label != ignored]) > 1


def _check_files(reader: Reader, report: DatasetReport) -> set[int]:
    """Look for files that are missing; returns the numbers of their images."""
    dataset = reader.dataset
    suffix, prefix = dataset.img_suffix, dataset.data_prefix
    folder = prefix.get('img_path') or ''
    masks = prefix.get('seg_map_path')
    others = []
    if reader.is_local and not dataset.ann_file and folder != masks:
        others = unused_images(folder, suffix)
    if not len(reader):
        has = f' It has {shorten(others, 3)}.' if others else ''
        report.add(
            'error',
            f'{folder} has no image that ends in {suffix}.{has} Set img_suffix of the '
            'data set to how the names end.',
        )
    elif others:
        report.add(
            'warning',
            f'{folder} has {len(others)} images that do not end in {suffix} and are '
            f'left out ({shorten(others, 3)}): img_suffix takes one ending, so rename '
            'or move them.',
        )
    missing = missing_files(reader)
    for kind, files in missing.items():
        if not files:
            continue
        index, image, mask = files[0]
        more = f', and {len(files) - 1} more of the kind' if len(files) > 1 else ''
        if kind == 'image':
            text = f'{image} is missing{more}: add it, or take it out of the ann_file.'
        else:
            text = (
                f'{mask}, the mask of {image}, is missing{more}: add it, remove the '
                'image, or set seg_map_suffix to how the masks end.'
            )
        report.add('error', text, index)
    if reader.is_local and masks and not dataset.ann_file:
        _check_orphans(reader, report, masks)
    return {index for files in missing.values() for index, *_ in files}


def _check_orphans(reader: Reader, report: DatasetReport, folder: str) -> None:
    known = {info.get('seg_map_path') for info in reader.infos()}
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return
    suffix = reader.dataset.seg_map_suffix
    orphans = [
        name
        for name in names
        if name.endswith(suffix) and os.path.join(folder, name) not in known
    ]
    if orphans and len(reader):
        report.add(
            'warning',
            f'{folder} has {len(orphans)} masks without an image ({shorten(orphans, 3)}'
            '): are images missing, or named otherwise?',
        )


def _check_sample(sample: Sample) -> None:
    """Raise where the mask does not fit its image."""
    height, width = sample.image.shape[:2]
    if sample.labels is None:
        return
    mask, stored, labels = sample.mask_path, sample.stored, sample.labels
    if labels.ndim != 2:
        raise UnreadableError(
            f'{mask} has {labels.shape[-1]} channels, a picture of the labels rather '
            'than the labels: save it with one channel, whose numbers are those of '
            'the classes (0, 1, 2 ...).'
        )
    if labels.shape != (height, width):
        remedy = size_remedy(sample, labels.shape, 'make them equal.')
        raise UnreadableError(
            f'{mask} is {_size(labels)} (height x width), but its image '
            f'{sample.path} is {height}x{width}: {remedy}'
        )
    if stored is not None:
        _check_numbers(mask, stored)
    if labels.min() < 0 or labels.max() >= _LABELS:
        raise UnreadableError(
            f'{mask} has labels from {labels.min()} to {labels.max()} after loading: '
            'labels are 0 to 254, and 255 for ignored.'
        )


def _check_numbers(mask: str, stored: np.ndarray) -> None:
    if stored.dtype == bool:
        return
    if stored.dtype.kind == 'f' and not (stored == np.round(stored)).all():
        raise UnreadableError(
            f'{mask} has numbers that are not whole: save the numbers of the classes '
            '(0, 1, 2 ...) as 8-bit PNG.'
        )
    if stored.min() < 0 or stored.max() >= _LABELS:
        raise UnreadableError(
            f'{mask} has labels from {stored.min()} to {stored.max()}, and is read '
            'into 8 bits, which mixes them up: number the classes 0 to 254, and 255 '
            'for ignored.'
        )


def _summarise(
    counts: MaskCounts,
    report: DatasetReport,
    classes: list[str],
    dataset,
    ignored: int | None,
) -> None:
    for label, name in enumerate(classes[:_LABELS]):
        if label != ignored:
            report.classes[name] = {
                'of the pixels': counts.share(label),
                'images': int(counts.images[label]),
            }
    for label in counts.labels():
        if label == ignored:
            for before in np.flatnonzero(counts.pixels[:, label]).tolist():
                share = float(counts.pixels[before, label] / counts.total)
                report.ignored[_why_ignored(before, label, dataset)] = share


def _why_ignored(before: int, after: int, dataset) -> str:
    if before == 0 and dataset.reduce_zero_label:
        return '0 in the files, by reduce_zero_label=True'
    if before == after:
        return f'{before} in the files, by ignore_index={after}'
    return f'{before} in the files, which is no class of metainfo'


def _judge(
    counts: MaskCounts,
    report: DatasetReport,
    classes: list[str],
    dataset,
    heads: Sequence[HeadLabels],
) -> None:
    ignored = ignored_label(heads)
    if _judge_range(counts, report, len(classes), dataset, heads):
        return
    inside = [x for x in counts.labels() if x < len(classes) and x != ignored]
    reduces, stored = dataset.reduce_zero_label, counts.stored()
    masks, number = f'the {report.read} masks of {report.labels}', len(classes)
    keep_zero = (
        'if 0 is a class, set reduce_zero_label=False of every data set (it is '
        'inherited with the ADE20K or quickstart base)'
    )
    example = counts.first[min(counts.first)]
    if not inside:
        remedy = keep_zero if reduces else 'number the classes 0, 1, 2 ...'
        if 255 in stored and ignored == 255:
            remedy += '; where 255 is a class, write another number into the masks'
        report.add(
            'error',
            f'every pixel of {masks} is ignored or no class ({example[1]} has '
            f'{shorten(_in_file(counts, example[0]))}): {remedy}.',
            example[0],
        )
        return
    if len(inside) == 1 and number > 1:
        _judge_single(counts, report, classes, dataset, ignored, keep_zero)
    elif reduces and number > 2 and {*range(number)} == {*stored} - {255}:
        # Nobody numbers 0 to K - 1 in full if K classes are 1 to K.
        whole = report.read == report.images and report.split == 'train'
        report.add(
            'error' if whole else 'warning',
            f'{masks} have the numbers 0 to {number - 1} for {number} classes, but '
            f'reduce_zero_label=True ignores 0 and takes {number} for the last class: '
            f'{keep_zero}.',
        )
    unseen = [
        name
        for label, name in enumerate(classes)
        if label not in inside and label != ignored
    ]
    if unseen and len(inside) > 1:
        whole = report.read == report.images
        report.add(
            'warning' if whole else 'note',
            f'{len(unseen)} of the {number} classes are in none of {masks}: '
            f'{shorten(unseen)}.',
        )


def _judge_range(
    counts: MaskCounts,
    report: DatasetReport,
    number: int,
    dataset,
    heads: Sequence[HeadLabels],
) -> bool:
    """Whether there are labels that are neither a class nor ignored."""
    for ignored in {head.ignored for head in heads} or {255}:
        outside = [x for x in counts.labels() if x >= number and x != ignored]
        if not outside:
            continue
        first = 1 if dataset.reduce_zero_label else 0
        label, index, mask = counts.of(outside[0])
        others = len(outside) - 1
        also = f' and {others} more such labels' if others else ''
        if outside == [255] and ignored != 255:
            remedy = (
                'this is what reduce_zero_label makes of 0, so set ignore_index=255 '
                'of the heads and the metric'
                if dataset.reduce_zero_label
                else 'set ignore_index=255 of the heads and the metric'
            )
        elif not first and label == number and counts.stored()[0] == 1:
            remedy = 'the labels begin at 1, so set reduce_zero_label=True'
        else:
            remedy = (
                'name its class in metainfo=dict(classes=...) and raise num_classes, '
                'or write another number into the masks (255 for what is to be '
                'ignored)'
            )
        report.add(
            'error',
            f'{mask} has the label {label}{also} ({counts.share(outside[0]):.2%} of '
            f'the pixels of {report.split}), but the {number} classes are '
            f'{first} to {number - 1 + first}, and {ignored} is ignored: {remedy}.',
            index,
        )
        return True
    return False


def _judge_single(
    counts: MaskCounts,
    report: DatasetReport,
    classes: list[str],
    dataset,
    ignored: int | None,
    keep_zero: str,
) -> None:
    """No more than one class: a model that always says it has 100% mIoU."""
    stored, number = counts.stored(), len(classes)
    (label,) = (x for x in counts.labels() if x < number and x != ignored)
    before, index, mask = counts.of(label)
    # For a class that is rare, a sample proves nothing. A validation of one class may
    # be meant.
    whole, trains = report.read == report.images, 'train' in report.split
    what = (
        f'{mask} and the others of the {report.read} masks read have one class only, '
        f'{classes[label]!r} ({before})'
    )
    if dataset.reduce_zero_label and 0 in stored:
        report.add(
            'error' if whole or trains else 'warning',
            f'{what}, because reduce_zero_label=True ignores 0: {keep_zero}.',
            index,
        )
    elif ignored in stored:
        report.add(
            'error' if whole or trains else 'warning',
            f'{what}, because {ignored} ({counts.share(ignored):.0%} of the pixels) is '
            f'ignored: if {ignored} is a class, write its number into the masks (such '
            'as 1 in place of 255).',
            index,
        )
    else:
        report.add(
            'error' if whole and trains else 'warning',
            f'{what}, so there is nothing to tell apart: check that these are the '
            'masks, and that they were saved with the numbers of the classes.',
            index,
        )


def _in_file(counts: MaskCounts, index: int) -> list[int]:
    return sorted({key[0] for key, first in counts.first.items() if first[0] == index})


def _size(array: np.ndarray) -> str:
    return 'x'.join(map(str, array.shape[:2]))
