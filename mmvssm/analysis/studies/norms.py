"""Norms of local tokens by layer, as Mamba® shows them."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import NullFormatter
from torch import Tensor

from mmvssm.analysis import norms as lib
from mmvssm.analysis.studies import plotting
from mmvssm.analysis.studies.common import Job, Study, print_table, rounded
from mmvssm.analysis.studies.images import StudyImage
from mmvssm.analysis.studies.subjects import StudyModel
from mmvssm.analysis.tokens import tokens_inside
from mmvssm.engine import UsageError

_BINS = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this study."""
    parser.add_argument(
        '--layers',
        nargs='+',
        type=int,
        metavar='N',
        help='blocks to draw, counted from 0 (default: as the article, 7 15 19 23 of '
        '24)',
    )
    parser.add_argument(
        '--cutoff-ratio',
        type=float,
        default=2.0,
        metavar='R',
        help='a token is an outlier if its norm is above R times the median of its '
        'layer (default: 2)',
    )
    parser.add_argument(
        '--cutoff',
        type=float,
        metavar='NORM',
        help='a fixed norm for all layers, in the place of --cutoff-ratio',
    )
    parser.add_argument(
        '--num-pictures',
        type=int,
        default=3,
        metavar='N',
        help='maps of the first N images are drawn (default: 3)',
    )
    parser.add_argument(
        '--work-dir',
        metavar='DIR',
        help='norms over a training: the checkpoints of the work dir, for one config',
    )
    parser.add_argument(
        '--every',
        type=int,
        metavar='N',
        help='of --work-dir, only checkpoints whose iteration (or epoch) is a multiple '
        'of N',
    )


def run(job: Job) -> dict[str, Any]:
    """Measure, draw and list the norms."""
    options = job.options
    if options.every is not None and (options.every < 1 or not options.work_dir):
        raise UsageError('--every takes a positive number, and needs --work-dir.')
    if not all(x is None or x > 0 for x in (options.cutoff_ratio, options.cutoff)):
        raise UsageError('--cutoff-ratio and --cutoff must be positive.')
    if options.work_dir:
        return _over_training(job)
    norms, results = {}, {}
    for model in job.models():
        found = measure(job, model)
        norms[model.title] = found
        results[model.label] = describe(job, found)
    chosen = {title: choose_layers(options.layers, x) for title, x in norms.items()}
    for index, image in enumerate(job.images()[: max(options.num_pictures, 0)]):
        _draw_maps(job, image, index, norms, chosen)
    _draw_distributions(job, norms, chosen)
    _draw_layers(job, results, list(norms))
    _print(results)
    return results


def measure(job: Job, model: StudyModel) -> list[lib.LayerNorms]:
    """Norms of a model for all images, one item for each block."""
    found = []
    for image in job.progress(job.images(), f'norms of {model.label}'):
        try:
            layers = lib.token_norms(model.backbone, model.prepare(image.pixels))
        except ValueError as error:
            raise UsageError(f'{model.label}: {error}.') from error
        found.append([layer._replace(norms=layer.norms.cpu()) for layer in layers])
    merged = []
    for layers in zip(*found):
        norms = torch.cat([layer.norms for layer in layers])
        if not norms.isfinite().all():
            raise UsageError(
                f'{model.label}: the output of block {layers[0].name} holds NaN or '
                'infinity for these images.'
            )
        merged.append(lib.LayerNorms(layers[0].name, norms))
    return merged


def describe(job: Job, found: Sequence[lib.LayerNorms]) -> dict[str, Any]:
    """Numbers of each layer, as lists from the first block to the last."""
    cutoffs = [cutoff_of(job, layer.norms) for layer in found]
    result = dict(
        layers=[layer.name for layer in found],
        median=[rounded(layer.norms.median()) for layer in found],
        mean=[rounded(layer.norms.double().mean()) for layer in found],
        max=[rounded(layer.norms.max()) for layer in found],
        cutoff=[rounded(cutoff) for cutoff in cutoffs],
        outlier_share=[
            rounded(lib.outlier_share(layer.norms, cutoff))
            for layer, cutoff in zip(found, cutoffs)
        ],
    )
    if all(image.mask is not None for image in job.images()):
        for name, inside in (('mean_inside', True), ('mean_outside', False)):
            result[name] = [_mean_where(job, layer.norms, inside) for layer in found]
    return result


def cutoff_of(job: Job, norms: Tensor) -> float:
    """The norm above which a token of the layer is an outlier."""
    if job.options.cutoff is not None:
        return job.options.cutoff
    return lib.outlier_cutoff(norms, job.options.cutoff_ratio)


def choose_layers(
    given: Sequence[int] | None, found: Sequence[lib.LayerNorms]
) -> list[int]:
    """Layers to draw: those that were given, or the article's, relative to the depth.

    Raises:
        UsageError: The model has no such layer.
    """
    count = len(found)
    if given is None:
        depths = (count * part // 24 for part in (8, 16, 20, 24))
        return sorted({max(depth - 1, 0) for depth in depths})
    if not all(0 <= layer < count for layer in given):
        raise UsageError(f'--layers are numbers from 0 to {count - 1}, got {given}.')
    return list(given)


def _mean_where(job: Job, norms: Tensor, inside: bool) -> float | None:
    """Mean norm of the tokens on objects, or of all others; None if there are none."""
    masks = [
        tokens_inside(torch.from_numpy(image.mask), norms.shape[1:]) == inside
        for image in job.images()
    ]
    chosen = norms[torch.stack(masks)]
    return rounded(chosen.double().mean()) if len(chosen) else None


def _draw_maps(
    job: Job,
    image: StudyImage,
    index: int,
    norms: dict[str, list[lib.LayerNorms]],
    chosen: dict[str, list[int]],
) -> None:
    """Maps of an image: a row for each model. Norms over the median, in one range."""
    columns = max(map(len, chosen.values()))
    width, height = plotting.cell_for(job.size)
    figure, panels = plotting.new_sheet(
        len(norms), columns + 1, (width + 0.1, height + 0.3)
    )
    maps = {
        title: [_relative(norms[title][i])[index] for i in layers]
        for title, layers in chosen.items()
    }
    high = max(values.max().item() for found in maps.values() for values in found)
    for row, (title, found) in zip(panels, maps.items()):
        plotting.show_image(row[0], image.pixels)
        for column, panel in enumerate(row[1:]):
            if column < len(found):
                plotting.show_map(panel, found[column], 0, high)
                panel.set_title(_name(norms[title][chosen[title][column]]), fontsize=8)
            else:
                panel.set_visible(False)
    plotting.label_rows(panels, list(maps))
    plotting.add_colour_bar(figure, panels, 0, high, 'L2 norm / median of the layer')
    plotting.save(figure, job.picture(f'maps_{image.name}'))


def _relative(layer: lib.LayerNorms) -> Tensor:
    return layer.norms / _median(layer)


def _median(layer: lib.LayerNorms) -> float:
    return max(layer.norms.median().item(), 1e-12)


def _name(layer: lib.LayerNorms) -> str:
    return f'block {layer.name}, median {layer.norms.median().item():.4g}'


def _draw_distributions(
    job: Job, norms: dict[str, list[lib.LayerNorms]], chosen: dict[str, list[int]]
) -> None:
    """Densities of norms over the median, with a logarithmic axis, in one range."""
    shown = {
        title: [norms[title][i] for i in layers] for title, layers in chosen.items()
    }
    high = 1.001 * max(
        _relative(layer).max().item() for layers in shown.values() for layer in layers
    )
    if job.options.cutoff is None:
        high = max(high, 1.05 * job.options.cutoff_ratio)
    edges = torch.linspace(0, high, _BINS + 1, dtype=torch.float64)
    columns = max(map(len, chosen.values()))
    figure, axes = plotting.new_plot(columns, len(norms), cell=(2.5, 2.0))
    lowest = []
    for row, (title, layers) in zip(axes, shown.items()):
        for axis, layer in zip(row, layers):
            density = lib.density(_relative(layer), edges)
            lowest.append(density[density > 0].min().item())
            axis.stairs(
                density, edges, fill=True, color=plotting.COLOURS[0], label='density'
            )
            axis.axvline(
                cutoff_of(job, layer.norms) / _median(layer),
                color=plotting.COLOURS[1],
                linestyle='--',
                label=f'cut-off of outliers: {_rule(job)}',
            )
            axis.set_title(_name(layer), fontsize=8)
        for axis in row[len(layers) :]:
            axis.set_visible(False)
        row[0].set_ylabel(f'{plotting.wrap(title)}\ndensity', fontsize=9)
    for axis in axes.flat:
        axis.set(yscale='log', xlim=(0, high), ylim=(min(lowest) / 2, None))
        axis.yaxis.set_minor_formatter(NullFormatter())
    for axis in axes[-1]:
        axis.set_xlabel('L2 norm / median', fontsize=9)
    plotting.add_legend(figure, axes[0, 0])
    plotting.save(figure, job.picture('distributions'))


def _draw_layers(job: Job, results: dict[str, Any], titles: Sequence[str]) -> None:
    """Median and largest norm, outlier share, and inside to outside, by layer."""
    ratios = all('mean_inside' in found for found in results.values())
    figure, axes = plotting.new_plot(3 if ratios else 2, cell=(3.6, 3.0))
    size, share, *others = axes[0]
    for i, (title, found) in enumerate(zip(titles, results.values())):
        style = plotting.style(i)
        layers = np.arange(len(found['layers']))
        size.plot(layers, found['max'], label=title, **style)
        size.plot(layers, found['median'], **{**style, 'alpha': 0.45})
        share.plot(layers, found['outlier_share'], **style)
        for axis in others:
            pairs = zip(found['mean_inside'], found['mean_outside'])
            ratio = [a / b if a is not None and b else np.nan for a, b in pairs]
            axis.plot(layers, ratio, **style)
    every = [x for found in results.values() for x in found['median'] + found['max']]
    plotting.scale_y(size, every)
    size.set(ylabel='L2 norm: largest, median (pale)')
    share.set(ylabel=f'share of outliers ({_rule(job)})')
    for axis in others:
        axis.set(ylabel='mean norm on objects / elsewhere')
        axis.axhline(1, color='0.5', linewidth=0.8)
    for axis in axes[0]:
        axis.set_xlabel('block')
    plotting.add_legend(figure, size)
    plotting.save(figure, job.picture('layers'))


def _rule(job: Job) -> str:
    if job.options.cutoff is not None:
        return f'norm > {job.options.cutoff:g}'
    return f'norm > {job.options.cutoff_ratio:g} x median'


def _print(results: dict[str, Any]) -> None:
    header = ['last block', 'median', 'largest', 'cut-off', 'outliers', 'on / off']
    rows = []
    for label, found in results.items():
        last = [found[key][-1] for key in ('median', 'max', 'cutoff')]
        inside = found.get('mean_inside', [None])[-1]
        outside = found.get('mean_outside', [None])[-1]
        ratio = f'{inside / outside:.3f}' if inside is not None and outside else '-'
        rows.append([label, *last, f'{found["outlier_share"][-1]:.2%}', ratio])
    print_table(header, rows)


# Over a training


def find_checkpoints(folder: str, every: int | None = None) -> list[tuple[int, Path]]:
    """Checkpoints of a work dir with their iterations or epochs, in order.

    Args:
        folder: The work dir.
        every: Keep multiples of this number only.

    Raises:
        UsageError: There are none.
    """
    found = {}
    for path in Path(folder).glob('*.pth'):
        match = re.fullmatch(r'(iter|epoch)_(\d+)\.pth', path.name)
        if match and (every is None or int(match[2]) % every == 0):
            found[int(match[2])] = path
    if not found:
        which = f' that are multiples of {every}' if every else ''
        raise UsageError(
            f'{Path(folder).absolute()} has no checkpoints iter_N.pth or epoch_N.pth'
            f'{which}. A training keeps all of them with --cfg-options '
            'default_hooks.checkpoint.max_keep_ckpts=-1.'
        )
    return sorted(found.items())


def _over_training(job: Job) -> dict[str, Any]:
    """Norms before the training and at each checkpoint."""
    if len(job.subjects) != 1 or job.subjects[0].checkpoint:
        raise UsageError(
            '--work-dir takes one model without a checkpoint: the config that was '
            'trained there.'
        )
    (subject,) = job.subjects
    found = find_checkpoints(job.options.work_dir, job.options.every)
    unit = 'epoch' if found[0][1].name.startswith('epoch') else 'iteration'
    steps = [(0, subject)]
    steps += [(n, replace(subject, checkpoint=str(path))) for n, path in found]
    described = [describe(job, measure(job, job.build(step))) for _, step in steps]
    numbers = [number for number, _ in steps]
    result = dict(unit=unit, steps=numbers, norms=described)
    _draw_training(job, result, choose_layers(job.options.layers, described[0]['max']))
    return {subject.label: result}


def _draw_training(job: Job, result: dict[str, Any], layers: Sequence[int]) -> None:
    figure, axes = plotting.new_plot(3, cell=(3.4, 2.9))
    names = result['norms'][0]['layers']
    for axis, key, label in zip(
        axes[0],
        ('median', 'max', 'outlier_share'),
        ('median L2 norm', 'largest L2 norm', f'outliers ({_rule(job)})'),
    ):
        drawn = []
        for i, layer in enumerate(layers):
            values = [found[key][layer] for found in result['norms']]
            drawn += values
            axis.plot(
                result['steps'],
                values,
                label=f'block {names[layer]}',
                **plotting.style(i),
            )
        axis.set(xlabel=result['unit'], ylabel=label)
        plotting.scale_y(axis, drawn)
    plotting.add_legend(figure, axes[0, 0])
    plotting.save(figure, job.picture('training'))


STUDY = Study(
    name='norms',
    shows='L2 norms of local tokens by layer: maps, distributions, outliers',
    run=run,
    add_arguments=add_arguments,
    masked=True,
)
