"""Look at the annotations of a data set in COCO's format."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from .reading import (
    Reader,
    Sample,
    UnreadableError,
    read_samples,
    report_missing_images,
    size_remedy,
)
from .report import DatasetReport, shorten

# Boxes may be rounded, and end this many pixels outside.
_SLACK = 2
# So many of the boxes outside are no accident.
_MANY = 0.25


def inspect_annotations(
    path: Path, report: DatasetReport, classes: Sequence[str], with_mask: bool
) -> None:
    """Say what is wrong in an annotation file, before mmdet reads it.

    Args:
        path: The file.
        report: What is found is added to it.
        classes: The names that the data set has.
        with_mask: Whether the pipeline loads masks.
    """
    content = json.loads(path.read_text())
    listed = content.get('images') or []
    images = {image.get('id'): image for image in listed}
    annotations = content.get('annotations') or []
    names = {c.get('id'): c.get('name') for c in content.get('categories') or []}
    report.images = len(images)
    used: Counter = Counter()
    dropped: Counter = Counter()
    crowds, outside, with_objects = 0, 0, set()
    for annotation in annotations:
        text = _unusable(annotation, images, with_mask)
        if text:
            report.add('error', f'{path}: {text}')
            return
        image = images.get(annotation['image_id'])
        name = names.get(annotation['category_id'])
        reason = _why_dropped(annotation, image, name, classes)
        if reason:
            dropped[reason] += 1
        else:
            used[name] += 1
            crowds += bool(annotation.get('iscrowd'))
            with_objects.add(annotation['image_id'])
        outside += _ends_outside(annotation['bbox'], image)
    for name in classes:
        report.classes[name] = {'objects': used[name]}
    report.ignored.update(dropped)
    total = len(annotations)
    _judge_ids(path, report, 'image', listed)
    _judge_ids(path, report, 'annotation', annotations)
    if set(report.split.split('+')) & {'val', 'test'}:
        _judge_evaluation(path, report, annotations)
    if outside > _MANY * total:
        report.add(
            'error',
            f'{path}: {outside} of the {total} boxes end outside of their image: a '
            'bbox is [left, top, width, height] in pixels, so write these in place of '
            'the right and bottom edge.',
        )
    if not used:
        why = f' ({shorten(f"{text}: {n}" for text, n in dropped.items())})'
        report.add(
            'error',
            f'{path} has no object to learn{why if dropped else ""}: a bbox is [left, '
            'top, width, height] in pixels, and at least 1 wide, high and in area.',
        )
        return
    for reason in ('an image_id of no image', 'a category_id of no category'):
        if dropped[reason]:
            report.add(
                'warning', f'{path}: {dropped[reason]} annotations have {reason}.'
            )
    small = dropped['smaller than a pixel'] + dropped['outside of the image']
    if small > _MANY * total:
        report.add(
            'warning',
            f'{path}: {small} of the {total} annotations are not used: boxes smaller '
            'than a pixel, or outside of the image.',
        )
    unseen = [name for name in classes if not used[name]]
    if unseen:
        report.add(
            'warning',
            f'{path} has no object of {len(unseen)} of the {len(classes)} classes: '
            f'{shorten(unseen)}.',
        )
    empty = len(images) - len(with_objects)
    report.add('note', f'images without objects: {empty}, crowd regions: {crowds}.')


def _unusable(annotation: dict, images: dict, with_mask: bool) -> str:
    """What of an annotation would end a training."""
    which = f'annotation {annotation.get("id")}'
    needed = ['id', 'image_id', 'category_id', 'bbox', 'area']
    absent = [key for key in needed if annotation.get(key) is None]
    if absent:
        return f'{which} has no {", ".join(absent)}: add what is missing.'
    box = annotation['bbox']
    numbers = isinstance(box, list) and all(isinstance(x, (int, float)) for x in box)
    if not numbers or len(box) != 4:
        return f'{which} has bbox {box!r:.60}: it must be [left, top, width, height].'
    if not with_mask or annotation.get('ignore'):
        return ''
    shape = annotation.get('segmentation')
    if not shape:
        return (
            f'{which} has no segmentation, but the pipeline loads masks: add the '
            'masks, or train a detector without a mask_head and with_mask=False of '
            'LoadAnnotations.'
        )
    image = images.get(annotation['image_id'])
    if image and isinstance(shape, dict):
        size = [int(image['height']), int(image['width'])]
        if list(map(int, shape.get('size') or [])) != size:
            return (
                f'the mask of {which} has the size {shape.get("size")}, its image '
                f'{image.get("file_name")} {size} (height, width): make them equal.'
            )
    return ''


def _why_dropped(
    annotation: dict, image: dict | None, name: str | None, classes: Iterable[str]
) -> str:
    """Why mmdet leaves an annotation out; empty where it does not."""
    if image is None:
        return 'an image_id of no image'
    if name is None:
        return 'a category_id of no category'
    if name not in classes:
        return 'a category that is no class of metainfo'
    if annotation.get('ignore'):
        return 'marked with ignore'
    left, top, width, height = annotation['bbox']
    inside = (
        min(left + width, image['width']) - max(left, 0),
        min(top + height, image['height']) - max(top, 0),
    )
    if annotation['area'] <= 0 or width < 1 or height < 1:
        return 'smaller than a pixel'
    if min(inside) <= 0:
        return 'outside of the image'
    return ''


def _ends_outside(box: Sequence[float], image: dict | None) -> bool:
    if image is None:
        return False
    left, top, width, height = box
    return (
        left + width > image['width'] + _SLACK
        or top + height > image['height'] + _SLACK
    )


def _judge_ids(path: Path, report: DatasetReport, what: str, found: list[dict]) -> None:
    """Refuse two of one id: mmdet would keep the last of them only."""
    counts = Counter(entry.get('id') for entry in found)
    twice = [number for number, count in counts.items() if count > 1]
    if twice:
        report.add(
            'error',
            f'{path}: {len(twice)} {what} ids occur more than once '
            f'({shorten(twice, 3)}): number the {what}s anew.',
        )


def _judge_evaluation(
    path: Path, report: DatasetReport, annotations: list[dict]
) -> None:
    """Refuse what COCO's evaluation fails on, or takes for something else."""
    absent = [found['id'] for found in annotations if found.get('iscrowd') is None]
    if absent:
        report.add(
            'error',
            f'{path}: {len(absent)} of the {len(annotations)} annotations have no '
            f'iscrowd (ids {shorten(absent, 3)}), which the evaluation needs: add '
            '"iscrowd": 0 to each, or 1 where it is a crowd.',
        )
    if any(found['id'] == 0 for found in annotations):
        # It marks detections with the id of their object, and 0 means none.
        report.add(
            'error',
            f'{path}: an annotation has the id 0, and the evaluation would count it '
            'as missed, even if it is found: number the annotations from 1.',
        )


def inspect_objects(
    reader: Reader,
    report: DatasetReport,
    images: int | None = None,
    seconds: float | None = None,
) -> None:
    """Open images, and compare them with what the annotation file says of them.

    Args:
        reader: Of mmdet's ``CocoDataset``.
        report: What is found is added to it.
        images: How many to read, None for all.
        seconds: The time limit.
    """
    gone = report_missing_images(
        reader, report, 'set data_prefix.img to the folder that file_name starts from'
    )
    read_samples(
        *(reader, report, lambda index, sample: _check_sample(sample, report)),
        *(gone, images, seconds),
    )


def _check_sample(sample: Sample, report: DatasetReport) -> None:
    height, width = sample.image.shape[:2]
    said = int(sample.results['height']), int(sample.results['width'])
    if said != (height, width):
        remedy = size_remedy(
            sample, said, 'boxes and masks are for another size, so export both anew.'
        )
        raise UnreadableError(
            f'{sample.path} is {height}x{width} (height x width), but '
            f'{report.labels} says {said[0]}x{said[1]}: {remedy}'
        )
