"""Draw what was read of the data sets of a config."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmvssm.analysis.contact_sheet import evenly_spaced
from mmvssm.analysis.detection_sheet import Objects
from mmvssm.analysis.label_sheet import (
    write_class_sheet,
    write_mask_sheet,
    write_object_sheet,
)
from mmvssm.analysis.pictures import loads_bgr, to_picture
from mmvssm.engine.errors import UsageError

from .check import Inspected
from .reading import Reader, Sample, UnreadableError


def write_sheet(
    path: str | os.PathLike,
    inspected: Sequence[Inspected],
    ignored: int | None = 255,
    rows: int = 12,
) -> list[Path]:
    """Draw samples of the data sets with their labels.

    Images that findings name come first, then others, evenly spaced.

    Args:
        path: The PNG file; of several data sets, each gets a file of its own, with
            the split in its name.
        inspected: Of :func:`mmvssm.engine.labels.check.inspect_data`.
        ignored: The label that no loss counts.
        rows: The most samples to draw of a data set.

    Returns:
        The files written.

    Raises:
        UsageError: There is nothing to draw.
    """
    path, written = Path(path), []
    drawable = [found for found in inspected if found.reader is not None]
    for number, (report, reader, classes) in enumerate(drawable):
        samples = _samples(reader, report.problems, rows)
        if not samples:
            continue
        suffix = f'_{report.split.replace("+", "_")}' if len(drawable) > 1 else ''
        place = path.with_name(f'{path.stem}{suffix}{path.suffix or ".png"}')
        if place in written:
            place = place.with_name(f'{place.stem}_{number}{place.suffix}')
        written.append(_write(place, samples, reader, classes, ignored))
    if not written:
        raise UsageError('there is no image with labels that could be drawn.')
    return written


def _samples(reader: Reader, first: Sequence[int], rows: int) -> list[Sample]:
    order = [*first, *map(int, evenly_spaced(len(reader), rows))]
    found: list[Sample] = []
    for index in dict.fromkeys(order):
        if len(found) == rows:
            break
        try:
            sample = reader.read(index)
        except UnreadableError:
            continue
        if _is_drawable(sample):
            found.append(sample)
    return found


def _is_drawable(sample: Sample) -> bool:
    if sample.labels is not None:
        return sample.labels.shape == sample.image.shape[:2]
    return 'gt_bboxes' in sample.results or _has_class(sample)


def _has_class(sample: Sample) -> bool:
    return isinstance(sample.results.get('gt_label'), int)


def _write(
    path: Path,
    samples: Sequence[Sample],
    reader: Reader,
    classes: Sequence[str],
    ignored: int | None,
) -> Path:
    bgr = loads_bgr(reader.transforms[0])
    images = [to_picture(sample.image, bgr) for sample in samples]
    if all(_has_class(sample) for sample in samples):
        return write_class_sheet(path, images, [_class_of(s, classes) for s in samples])
    palette = list(reader.dataset.metainfo.get('palette') or [])
    rng = np.random.default_rng(0)
    while len(palette) < len(classes):
        palette.append(rng.integers(40, 220, 3).tolist())
    if all(sample.labels is not None for sample in samples):
        labels = [sample.labels for sample in samples]
        titles = [_title(sample, classes, ignored) for sample in samples]
        return write_mask_sheet(path, images, labels, titles, classes, palette, ignored)
    objects = [_objects(sample) for sample in samples]
    titles = [
        f'{os.path.basename(sample.path)}: {len(found.labels)} objects, '
        f'{int(sum(sample.results.get("gt_ignore_flags", [])))} crowds'
        for sample, found in zip(samples, objects)
    ]
    return write_object_sheet(path, images, objects, titles, classes, palette)


def _class_of(sample: Sample, classes: Sequence[str]) -> str:
    label = sample.results['gt_label']
    name = classes[label] if 0 <= label < len(classes) else 'no class'
    return f'{label} {name}\n{os.path.basename(sample.path)}'


def _title(sample: Sample, classes: Sequence[str], ignored: int | None) -> str:
    labels, counts = np.unique(sample.labels, return_counts=True)
    parts = []
    for label, count in sorted(zip(labels, counts), key=lambda pair: -pair[1])[:4]:
        name = 'ignored' if label == ignored else f'label {label}'
        if label != ignored and label < len(classes):
            name = classes[label]
        parts.append(f'{name} {count / sample.labels.size:.0%}')
    return f'{os.path.basename(sample.path)}: {", ".join(parts)}'


def _objects(sample: Sample) -> Objects:
    results = sample.results
    boxes = results['gt_bboxes']
    boxes = np.asarray(getattr(boxes, 'tensor', boxes), np.float32).reshape(-1, 4)
    masks = results.get('gt_masks')
    if masks is None:
        shape = (len(boxes), *sample.image.shape[:2])
        masks = np.zeros(shape, bool)
    else:
        masks = masks.to_ndarray().astype(bool)
    return Objects(boxes, masks, results['gt_bboxes_labels'])
