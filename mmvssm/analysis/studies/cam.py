"""Class activation maps of classifiers, segmentors and detectors (Grad-CAM)."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import DATASETS
from torch import Tensor, nn

from mmvssm.analysis import cam
from mmvssm.analysis.studies import plotting
from mmvssm.analysis.studies.common import Job, Study, print_table, rounded
from mmvssm.analysis.studies.images import StudyImage
from mmvssm.analysis.studies.subjects import StudyModel
from mmvssm.engine import UsageError
from mmvssm.engine.labels.report import registered


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the study's own arguments."""
    parser.add_argument(
        '--target',
        type=int,
        metavar='CLASS',
        help='number of the class to explain (default: what the model predicts: the '
        'best class, the class of most pixels, the class of the best box)',
    )
    parser.add_argument(
        '--layer',
        metavar='NAME',
        help='module of the backbone to explain by, such as layers.2.blocks.7 '
        "(default: that of the family's record)",
    )


@dataclass
class _Explained:
    image: StudyImage
    values: Tensor
    target: int
    name: str
    score: float


def run(job: Job) -> dict[str, Any]:
    """Explain each image by each model, draw and list."""
    results, found = {}, {}
    for model in job.models():
        model.require_head()
        layer, reshape, name = choose_layer(model, job.options.layer)
        found[model.title] = rows = []
        for image in job.progress(job.images(), f'cam of {model.label}'):
            try:
                rows.append(_explain(model, image, layer, reshape, job.options.target))
            except ValueError as error:
                raise UsageError(f'{model.label}, {image.name}: {error}.') from error
        results[model.label] = dict(
            layer=name, images=[_describe(explained) for explained in rows]
        )
    _draw(job, found)
    _print(results)
    return results


def choose_layer(
    model: StudyModel, name: str | None
) -> tuple[nn.Module, cam.ToMap, str]:
    """The layer to explain by, what makes maps of it, and its name in the backbone.

    Raises:
        UsageError: There is no such layer, or the model is of another package.
    """
    try:
        layer, reshape = cam.target_layer_and_reshape(model.net)
    except ValueError as error:
        raise UsageError(f'{model.label}: {error}.') from error
    modules = dict(model.backbone.named_modules())
    if name is None:
        return layer, reshape, next(n for n, m in modules.items() if m is layer)
    if name not in modules:
        raise UsageError(
            f'--layer: the backbone of {model.label} has no module {name}; the default '
            f'is {next(n for n, m in modules.items() if m is layer)}.'
        )
    return modules[name], reshape, name


def _explain(
    model: StudyModel,
    image: StudyImage,
    layer: nn.Module,
    reshape: cam.ToMap,
    target: int | None,
) -> _Explained:
    images, noted = model.prepare(image.pixels), {}

    def score() -> Tensor:
        value, noted['target'] = _SCORES[model.task](model.net, images, target)
        noted['score'] = float(value.detach())
        return value

    values = cam.grad_cam(layer, reshape, score)
    names, number = _class_names(model), noted['target']
    name = names[number] if number < len(names) else f'class {number}'
    return _Explained(image, values.double().cpu(), number, name, noted['score'])


def _class_names(model: StudyModel) -> Sequence[str]:
    """Names of the classes, as the config's test data has them; or none."""
    data = (model.subject.cfg or {}).get('test_dataloader') or {}
    dataset = data.get('dataset') or {}
    kind = registered(DATASETS, dataset.get('type'))
    given = (dataset.get('metainfo') or {}).get('classes')
    names = given or (getattr(kind, 'METAINFO', None) or {}).get('classes') or ()
    return [names] if isinstance(names, str) else list(names)


def _check(target: int | None, classes: int) -> None:
    if target is not None and not 0 <= target < classes:
        raise UsageError(f'--target is 0 to {classes - 1}, got {target}.')


def score_classifier(
    net: nn.Module, images: Tensor, target: int | None
) -> tuple[Tensor, int]:
    """The logit of a class, and its number; None for the best class."""
    logits = net(images)
    logits = cam.first_tensor(logits)[0]
    _check(target, len(logits))
    number = int(logits.argmax()) if target is None else target
    return logits[number], number


def score_segmentor(
    net: nn.Module, images: Tensor, target: int | None
) -> tuple[Tensor, int]:
    """Mean logit of a class where it is predicted; None for that of most pixels."""
    logits = net(images, mode='tensor')[0]
    if len(logits) == 1:
        logits = torch.cat((-logits, logits))
    _check(target, len(logits))
    predicted = logits.argmax(0)
    number = int(predicted.flatten().mode().values) if target is None else target
    if not (predicted == number).any():
        raise ValueError(f'no pixel is predicted as class {number}')
    return logits[number][predicted == number].mean(), number


def score_detector(
    net: nn.Module, images: Tensor, target: int | None
) -> tuple[Tensor, int]:
    """Score of the best box of a class; None for the best box of all."""
    from mmdet.structures import DetDataSample

    size = tuple(images.shape[2:])
    whole = dict(img_shape=size, ori_shape=size, batch_input_shape=size, pad_shape=size)
    sample = DetDataSample(metainfo=dict(whole, scale_factor=(1.0, 1.0), img_id=0))
    with _all_boxes(net):
        (found,) = net.predict(images, [sample], rescale=False)
    boxes = found.pred_instances
    chosen = boxes if target is None else boxes[boxes.labels == target]
    if not len(chosen):
        what = '' if target is None else f' of class {target}'
        raise ValueError(f'the detector finds no box{what}')
    best = int(chosen.scores.argmax())
    return chosen.scores[best], int(chosen.labels[best])


@contextmanager
def _all_boxes(net: nn.Module) -> Iterator[None]:
    """Let a detector give boxes of any score, of which the best one is explained."""
    cfgs = {id(c): c for m in net.modules() if (c := getattr(m, 'test_cfg', None))}
    before = [(c, c['score_thr']) for c in cfgs.values() if 'score_thr' in c]
    try:
        for cfg, _ in before:
            cfg['score_thr'] = 0.0
        yield
    finally:
        for cfg, threshold in before:
            cfg['score_thr'] = threshold


_SCORES = dict(
    classifier=score_classifier, segmentor=score_segmentor, detector=score_detector
)


def _describe(explained: _Explained) -> dict[str, Any]:
    values = explained.values
    row, column = divmod(int(values.argmax()), values.shape[1])
    return dict(
        image=explained.image.name,
        target=explained.target,
        name=explained.name,
        score=rounded(explained.score),
        size=list(values.shape),
        peak=[row, column],
        inside=_inside(explained),
    )


def _inside(explained: _Explained) -> float | None:
    """Share of the map that lies on objects, None without a mask."""
    mask = explained.image.mask
    if mask is None:
        return None
    values = _enlarge(explained.values, mask.shape)
    return rounded(values[torch.from_numpy(mask)].sum() / values.sum())


def _enlarge(values: Tensor, size: tuple[int, int]) -> Tensor:
    wide = F.interpolate(values[None, None], tuple(size), mode='bilinear')
    return wide[0, 0]


def _draw(job: Job, found: dict[str, list[_Explained]]) -> None:
    images = job.images()
    figure, panels = plotting.new_sheet(
        len(images), 1 + len(found), plotting.cell_for(job.size)
    )
    for panel, image in zip(panels[:, 0], images):
        plotting.show_image(panel, image.pixels)
    for column, rows in zip(panels[:, 1:].T, found.values()):
        for panel, explained in zip(column, rows):
            pixels = explained.image.pixels
            values = _enlarge(explained.values, pixels.shape[:2])
            plotting.show_map(panel, values, 0, 1, over=pixels)
            panel.set_xlabel(f'{explained.name}, {explained.score:.3g}', fontsize=7)
    plotting.label_columns(panels, ['image', *found])
    plotting.add_colour_bar(figure, panels, 0, 1, 'activation / its largest')
    plotting.save(figure, job.picture())


def _print(results: dict[str, Any]) -> None:
    rows = [
        [
            f'{label}, {found["image"]}',
            found['name'],
            f'{found["score"]:.3g}',
            '-' if found['inside'] is None else f'{found["inside"]:.0%}',
        ]
        for label, entry in results.items()
        for found in entry['images']
    ]
    print_table(['model and image', 'class', 'score', 'on objects'], rows)


STUDY = Study(
    name='cam',
    shows='class activation maps (Grad-CAM)',
    run=run,
    add_arguments=add_arguments,
    masked=True,
)
