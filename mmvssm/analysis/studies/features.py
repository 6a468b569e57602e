"""Distance between the global output and each local one: feature maps of Mamba®."""

import argparse
from typing import Any

import torch
from torch import Tensor

from mmvssm.analysis import features as lib
from mmvssm.analysis.studies import plotting
from mmvssm.analysis.studies.common import Job, Study, print_table, rounded
from mmvssm.analysis.studies.subjects import StudyModel
from mmvssm.analysis.tokens import Layer, compute_maps, tokens_inside, watch_blocks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this study."""
    parser.add_argument(
        '--distance',
        choices=lib.DISTANCES,
        default='l2',
        help='l2, or cosine: 1 minus the cosine of the angle (default: l2)',
    )


def run(job: Job) -> dict[str, Any]:
    """Compute and draw the maps."""
    distances, results = {}, {}
    for model in job.models():
        found, stages, kind = [], [], ''
        for image in job.progress(job.images(), f'features of {model.label}'):
            last, maps = outputs(model, model.prepare(image.pixels))
            kind = _kind(last)
            target = lib.global_output(last)
            found.append(
                lib.distance_map(last.patches, target, job.options.distance)[0]
            )
            stages.append(maps)
        distances[model.title] = found
        results[model.label] = _describe(job, found, kind)
        _draw_stages(job, model, stages)
    _draw_distances(job, distances)
    _print(results)
    return results


@torch.no_grad()
def outputs(model: StudyModel, images: Tensor) -> tuple[Layer, dict[str, Tensor]]:
    """The last output, and the mean over channels of the last map of each stage.

    Returns:
        The last map with its tokens; and by the name of the block a map (h, w) on the
        CPU, of the last block of each stage, or of each quarter of an isotropic
        backbone.
    """
    blocks = []

    def keep(layer: Layer) -> None:
        blocks.append((layer.name, layer.patches[0].mean(0).cpu()))

    with watch_blocks(model.backbone, images.shape[2:], keep):
        last = compute_maps(model.backbone, images)[-1]
    last = Layer(last.name, last.patches.cpu(), last.tokens.cpu())
    return last, _last_of_stages(blocks)


def _last_of_stages(blocks: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    if '.' in blocks[0][0]:
        by_stage = {name.partition('.')[0]: (name, x) for name, x in blocks}
        return dict(by_stage.values())
    quarters = min(4, len(blocks))
    return dict(blocks[len(blocks) * (i + 1) // quarters - 1] for i in range(quarters))


def _kind(last: Layer) -> str:
    """What the global output is."""
    count = last.tokens.shape[1]
    if not count:
        return 'mean of the local outputs'
    return 'the extra token' if count == 1 else f'mean of {count} extra tokens'


def _describe(job: Job, found: list[Tensor], kind: str) -> dict[str, Any]:
    every = torch.stack(found)
    result: dict[str, Any] = dict(
        global_output=kind,
        distance=job.options.distance,
        mean=rounded(every.mean()),
        max_over_mean=rounded((every.amax((1, 2)) / every.mean((1, 2))).mean()),
    )
    images = job.images()
    if all(image.mask is not None for image in images):
        masks = torch.stack(
            [
                tokens_inside(torch.from_numpy(image.mask), every.shape[1:])
                for image in images
            ]
        )
        for name, chosen in (
            ('mean_inside', every[masks]),
            ('mean_outside', every[~masks]),
        ):
            result[name] = rounded(chosen.mean()) if len(chosen) else None
    return result


def _draw_distances(job: Job, distances: dict[str, list[Tensor]]) -> None:
    """A row for each image, a column for each model; all in one range."""
    images = job.images()
    figure, panels = plotting.new_sheet(
        len(images), len(distances) + 1, plotting.cell_for(job.size)
    )
    relative = {
        title: [values / values.mean() for values in found]
        for title, found in distances.items()
    }
    high = max(x.max().item() for found in relative.values() for x in found)
    for i, (row, image) in enumerate(zip(panels, images)):
        plotting.show_image(row[0], image.pixels)
        for panel, found in zip(row[1:], relative.values()):
            plotting.show_map(panel, found[i], 0, high)
    plotting.label_columns(panels, ['image', *relative])
    plotting.add_colour_bar(
        figure,
        panels,
        0,
        high,
        f'{job.options.distance} distance to the global output / its mean',
    )
    plotting.save(figure, job.picture())


def _draw_stages(job: Job, model: StudyModel, stages: list[dict[str, Tensor]]) -> None:
    """A row for each image, a column for each stage; each map in its own range."""
    images, names = job.images(), list(stages[0])
    figure, panels = plotting.new_sheet(
        len(images), len(names) + 1, plotting.cell_for(job.size)
    )
    for row, image, maps in zip(panels, images, stages):
        plotting.show_image(row[0], image.pixels)
        for panel, values in zip(row[1:], maps.values()):
            low, high = values.min(), values.max()
            plotting.show_map(panel, (values - low) / (high - low).clamp(1e-12), 0, 1)
    plotting.label_columns(panels, [model.title, *(f'block {name}' for name in names)])
    plotting.add_colour_bar(
        figure, panels, 0, 1, 'mean of channels, from least to largest in the map'
    )
    plotting.save(figure, job.picture(f'stages_{model.label}'))


def _print(results: dict[str, Any]) -> None:
    header = ['distance to the global output', 'mean', 'largest / mean', 'on / off']
    rows = []
    for label, found in results.items():
        inside, outside = found.get('mean_inside'), found.get('mean_outside')
        ratio = f'{inside / outside:.3f}' if inside is not None and outside else '-'
        rows.append([label, found['mean'], found['max_over_mean'], ratio])
    print_table(header, rows)


STUDY = Study(
    name='features',
    shows='distance between the global and each local output; maps of each stage',
    run=run,
    add_arguments=add_arguments,
    masked=True,
)
