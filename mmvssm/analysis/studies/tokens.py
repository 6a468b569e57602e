"""Accuracy of a linear head on tokens of large norm and on the rest (Mamba®)."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmvssm.analysis import token_pooling as lib
from mmvssm.analysis.studies import plotting
from mmvssm.analysis.studies.common import Job, Study, print_table, rounded
from mmvssm.analysis.studies.images import ImageSource, open_images
from mmvssm.analysis.studies.subjects import StudyModel
from mmvssm.analysis.tokens import Layer, compute_maps, watch_blocks
from mmvssm.engine import UsageError

# Top-1 of Vim-B on ImageNet in the article. Where it says only that 10 and 20 per cent
# are equal to all, that is the number of all.
ARTICLE = dict(top_5=81.0, top_10=81.1, top_20=81.1, rest_80=79.3, all=81.1)
_TITLES = dict(
    top_5='5 % of largest norm',
    top_10='10 %',
    top_20='20 %',
    rest_80='other 80 %',
    all='all local tokens',
    extra='class tokens or registers',
)
# One of so many images of a class is for the test.
_HELD_OUT = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this study."""
    parser.add_argument(
        '--test-data',
        metavar='DIR',
        help='class folders to test on (default: DIR/val where --data is DIR/train, or '
        f'else every {_HELD_OUT}th image of a class)',
    )
    parser.add_argument('--batch-size', type=int, default=16, metavar='N')
    parser.add_argument(
        '--decay',
        type=float,
        default=1e-3,
        help='weight decay of the linear head (default: 0.001)',
    )


def run(job: Job) -> dict[str, Any]:
    """Compute pools of all images once for each model, and train a head on each."""
    if job.options.batch_size < 1 or not job.options.decay >= 0:
        raise UsageError('--batch-size is at least 1, and --decay at least 0.')
    train, test = _split(job)
    classes = train[0].classes
    results = {}
    for model in job.models():
        pools = [_pools(job, model, *part) for part in (train, test)]
        labels = [
            torch.tensor([x.labels[i] for i in which]) for x, which in (train, test)
        ]
        found = {}
        for name in job.progress(list(pools[0]), f'heads of {model.label}'):
            pairs = [(pool[name], y) for pool, y in zip(pools, labels)]
            try:
                share = lib.linear_accuracy(*pairs, len(classes), job.options.decay)
            except ValueError as error:
                raise UsageError(f'{model.label}: {error}.') from error
            found[name] = rounded(100 * share)
        results[model.label] = dict(
            accuracy=found,
            classes=len(classes),
            train_images=len(labels[0]),
            test_images=len(labels[1]),
        )
    _draw(job, results)
    header = ['accuracy of a linear head, %', *_TITLES]
    rows = [
        [label, *(found['accuracy'].get(name, '-') for name in _TITLES)]
        for label, found in results.items()
    ]
    print_table(header, [*rows, ['Vim-B, ImageNet (article)', *ARTICLE.values(), '-']])
    return {**results, 'article': dict(model='Vim-B, ImageNet', accuracy=ARTICLE)}


_Part = tuple[ImageSource, list[int]]


def _split(job: Job) -> tuple[_Part, _Part]:
    """Images to train and to test on: a source and indices of both."""
    source, options = job.source, job.options
    folder = options.test_data
    if folder is None and options.data and Path(options.data).name == 'train':
        beside = Path(options.data).parent / 'val'
        folder = str(beside) if beside.is_dir() else None
    if folder:
        test = open_images(None, folder, job.options.num_images or 0, labelled=True)
        if list(test.classes) != list(source.classes):
            raise UsageError(
                f'{folder} has other class folders than {options.data}: '
                f'{len(test.classes)} and {len(source.classes)} classes.'
            )
        return (source, list(range(len(source)))), (test, list(range(len(test))))
    seen: dict[int, int] = {}
    parts: tuple[list[int], list[int]] = ([], [])
    for index, label in enumerate(source.labels):
        seen[label] = seen.get(label, 0) + 1
        parts[seen[label] % _HELD_OUT == 0].append(index)
    if not all(parts):
        raise UsageError(
            f'there are too few images: one of {_HELD_OUT} in each class is for the '
            f'test, and no class has as many (--num-images is {len(source)}).'
        )
    return (source, parts[0]), (source, parts[1])


def _pools(
    job: Job, model: StudyModel, source: ImageSource, which: list[int]
) -> dict[str, Tensor]:
    """Features (n, C) of all images, by the name of the pool."""
    batch = job.options.batch_size
    starts = range(0, len(which), batch)
    found = []
    for start in job.progress(starts, f'tokens of {model.label}'):
        images = [source.load(i, job.size) for i in which[start : start + batch]]
        found.append(
            pools_of(model, torch.cat([model.prepare(x.pixels) for x in images]))
        )
    return {name: torch.cat([pools[name] for pools in found]) for name in found[0]}


@torch.no_grad()
def pools_of(model: StudyModel, images: Tensor) -> dict[str, Tensor]:
    """Pools of a batch.

    Tokens are ranked by the norm of the last block's output, with the residual stream.
    What is averaged is the last output of the backbone, which a head would get.
    """
    last: list[Layer] = []
    with watch_blocks(model.backbone, images.shape[2:], last.append):
        out = compute_maps(model.backbone, images)[-1]
    pools = lib.pool_by_norm(out.patches, last[-1].patches.norm(dim=1))
    if out.tokens.shape[1]:
        pools['extra'] = out.tokens.flatten(1)
    return {name: pool.cpu() for name, pool in pools.items()}


def _draw(job: Job, results: dict[str, Any]) -> None:
    titles = {subject.label: subject.title for subject in job.subjects}
    figure, ((axis,),) = plotting.new_plot(cell=(7.0, 3.6))
    series = {titles[label]: found['accuracy'] for label, found in results.items()}
    series['Vim-B, ImageNet (article)'] = ARTICLE
    width = 0.8 / len(series)
    hatches = ('', '//', '..', 'xx', '\\\\')
    for i, (label, found) in enumerate(series.items()):
        places = [
            x + (i + 0.5) * width - 0.4 for x, n in enumerate(_TITLES) if n in found
        ]
        axis.bar(
            places,
            [found[name] for name in _TITLES if name in found],
            width * 0.92,
            label=label,
            color=plotting.COLOURS[i % len(plotting.COLOURS)],
            hatch=hatches[i % len(hatches)],
            edgecolor='white',
        )
    axis.set_xticks(np.arange(len(_TITLES)))
    axis.set_xticklabels([plotting.wrap(x, 12) for x in _TITLES.values()], fontsize=8)
    axis.set(ylabel='accuracy of a linear head, %', ylim=(0, 100))
    axis.grid(axis='x', visible=False)
    plotting.add_legend(figure, axis)
    plotting.save(figure, job.picture())


STUDY = Study(
    name='tokens',
    shows='accuracy of a linear head on tokens of large norm, on the rest, on all',
    run=run,
    add_arguments=add_arguments,
    count=210,
    labelled=True,
)
