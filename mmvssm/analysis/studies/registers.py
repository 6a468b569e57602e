"""Where each register of Mamba® looks."""

import argparse
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmvssm.analysis import features as lib
from mmvssm.analysis.studies import plotting
from mmvssm.analysis.studies.common import Job, Study, print_table, rounded
from mmvssm.analysis.studies.images import StudyImage
from mmvssm.analysis.studies.subjects import StudyModel
from mmvssm.analysis.tokens import compute_maps
from mmvssm.engine import UsageError

_COLUMNS = 7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this study."""
    parser.add_argument(
        '--measure',
        choices=lib.MEASURES,
        default='cosine',
        help='of a register and a local output: cosine of the angle, or dot product '
        'over the root of the channels (default: cosine)',
    )


def run(job: Job) -> dict[str, Any]:
    """Draw a sheet of all registers for each image and model."""
    results = {}
    for model in job.models():
        found = []
        for image in job.progress(job.images(), f'registers of {model.label}'):
            maps = register_maps(model, image, job.options.measure)
            _draw(job, model, image, maps)
            found.append(_describe(image, maps))
        results[model.label] = dict(
            registers=len(found[0]['peaks']), measure=job.options.measure, images=found
        )
    _print(results)
    return results


def register_maps(model: StudyModel, image: StudyImage, measure: str) -> Tensor:
    """Maps (n, h, w) of an image's registers."""
    with torch.no_grad():
        out = compute_maps(model.backbone, model.prepare(image.pixels))[-1]
    try:
        return lib.register_maps(out, measure)[0].cpu()
    except ValueError as error:
        raise UsageError(
            f'{model.label}: {error}. Give a Mamba®, or a Vim with class tokens.'
        ) from error


def _describe(image: StudyImage, maps: Tensor) -> dict[str, Any]:
    height, width = maps.shape[1:]
    peaks = maps.flatten(1).argmax(1)
    correlation = lib.mean_correlation(maps)
    return dict(
        image=image.name,
        peaks=[
            [rounded((i // width + 0.5) / height), rounded((i % width + 0.5) / width)]
            for i in peaks.tolist()
        ],
        mean=rounded(maps.mean((1, 2))),
        correlation=None if correlation is None else rounded(correlation),
    )


def _draw(job: Job, model: StudyModel, image: StudyImage, maps: Tensor) -> None:
    """The image and all its registers, in one range."""
    count = len(maps) + 1
    columns = min(_COLUMNS, count)
    rows = math.ceil(count / columns)
    width, height = plotting.cell_for(job.size, longer=1.5)
    figure, panels = plotting.new_sheet(rows, columns, (width, height + 0.25))
    low, high = maps.min().item(), maps.max().item()
    flat = panels.flat
    first = next(flat)
    plotting.show_image(first, image.pixels)
    first.set_title(plotting.wrap(model.title), fontsize=8)
    for number, (panel, values) in enumerate(zip(flat, maps)):
        plotting.show_map(panel, values, low, high)
        panel.set_title(f'register {number}', fontsize=8)
    for panel in np.ravel(panels)[count:]:
        panel.set_visible(False)
    label = 'cosine' if job.options.measure == 'cosine' else 'scaled dot product'
    plotting.add_colour_bar(figure, panels, low, high, f'{label} with local outputs')
    plotting.save(figure, job.picture(f'{model.label}_{image.name}'))


def _print(results: dict[str, Any]) -> None:
    rows = []
    for label, found in results.items():
        known = [
            one['correlation']
            for one in found['images']
            if one['correlation'] is not None
        ]
        mean = f'{sum(known) / len(known):.3f}' if known else '-'
        rows.append([label, found['registers'], mean])
    print_table(['', 'registers', 'mean correlation of their maps'], rows)


STUDY = Study(
    name='registers',
    shows='where each register looks, all registers of an image in one sheet',
    run=run,
    add_arguments=add_arguments,
)
