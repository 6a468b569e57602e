"""Gates of the mixers, and lengths of tokens (MLLA, Fig. 4 and 5)."""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmvssm.analysis import gates
from mmvssm.analysis.attention import MERGED
from mmvssm.analysis.norms import token_norms
from mmvssm.analysis.routes import Mixing, ScanRoute, record_mixings
from mmvssm.analysis.studies import plotting
from mmvssm.analysis.studies.common import Job, Study, print_table, rounded, spread
from mmvssm.analysis.studies.images import StudyImage
from mmvssm.analysis.studies.subjects import StudyModel
from mmvssm.analysis.tokens import tokens_inside
from mmvssm.engine import UsageError

_DISTANCES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
_SHOWN = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the study's own arguments."""
    parser.add_argument(
        '--layers',
        nargs='+',
        type=int,
        metavar='N',
        help='mixers whose input gates are drawn, counted from 0 (default: the last '
        'one of each quarter)',
    )
    parser.add_argument(
        '--num-pictures',
        type=int,
        default=2,
        metavar='N',
        help='maps of the first N images are drawn (default: 2)',
    )


def run(job: Job) -> dict[str, Any]:
    """Read the gates of all mixers and the lengths of all tokens; draw and list."""
    results, maps, titles = {}, {}, {}
    for model in job.models():
        found, drawn = [], []
        for image in job.progress(job.images(), f'gates of {model.label}'):
            layers = _read(model, image)
            chosen = _choose(job.options.layers, len(layers), model)
            drawn.append([(layers[i]['name'], layers[i].pop('map')) for i in chosen])
            found.append(layers)
        results[model.label] = _describe(found, _lengths(job, model))
        maps[model.label], titles[model.label] = drawn, model.title
    for index, image in enumerate(job.images()[: max(job.options.num_pictures, 0)]):
        chosen = {titles[label]: drawn[index] for label, drawn in maps.items()}
        _draw_maps(job, image, chosen)
    _draw_layers(job, results, titles)
    _print(results)
    return results


def _choose(given: Sequence[int] | None, count: int, model: StudyModel) -> list[int]:
    if given is None:
        return spread(count, _SHOWN)
    if not all(0 <= number < count for number in given):
        raise UsageError(
            f'--layers of {model.label} are 0 to {count - 1}, got '
            f'{" ".join(map(str, given))}.'
        )
    return list(given)


def _read(model: StudyModel, image: StudyImage) -> list[dict[str, Any]]:
    """Name and numbers of every mixer, and the map of its input gate."""
    try:
        mixings = list(record_mixings(model.backbone, model.prepare(image.pixels)))
    except ValueError as error:
        raise UsageError(f'{model.label}: {error}.') from error
    lengths = [_length(mixing) for mixing in mixings]
    shortest = min([length for length in lengths if length] or [0])
    distances = [k for k in _DISTANCES if k < shortest]
    return [_numbers(mixing, image, distances) for mixing in mixings]


def _length(mixing: Mixing) -> int | None:
    """Positions of the scans, None where there are none."""
    routes = [r for r in mixing.routes.values() if isinstance(r, ScanRoute)]
    return routes[0].dt.shape[1] if routes else None


def _numbers(
    mixing: Mixing, image: StudyImage, distances: Sequence[int]
) -> dict[str, Any]:
    gate = gates.input_gates(mixing).get(MERGED)
    found = dict(
        name='.'.join(map(str, mixing.position)),
        map=None if gate is None else gate.double().cpu(),
        forget=gates.forget_gates(mixing).get(MERGED),
        distances=distances,
        decay=gates.decay(mixing, distances),
    )
    if gate is not None:
        found.update(_means(found['map'], image.mask))
    return found


def _means(gate: Tensor, mask: np.ndarray | None) -> dict[str, float | None]:
    """Mean of a map, and of what is inside and outside objects."""
    found = dict(mean=float(gate.mean()), inside=None, outside=None)
    if mask is not None:
        inside = tokens_inside(torch.from_numpy(mask), gate.shape)
        for name, part in (('inside', gate[inside]), ('outside', gate[~inside])):
            found[name] = float(part.mean()) if part.numel() else None
    return found


def _lengths(job: Job, model: StudyModel) -> dict[str, Any]:
    """Mean and deviation of token lengths, with and without the normaliser."""
    found = dict(token_length=_deviations(job, model), token_length_unnormalised=None)
    with gates.without_normalisation(model.backbone) as changed:
        if changed:
            found['token_length_unnormalised'] = _deviations(job, model)
    return found


def _deviations(job: Job, model: StudyModel) -> dict[str, list[float]]:
    means, deviations = [], []
    for image in job.images():
        with torch.no_grad():
            layers = token_norms(model.backbone, model.prepare(image.pixels))
        norms = [layer.norms.double() for layer in layers]
        means.append([float(x.mean()) for x in norms])
        deviations.append([float(x.std(correction=0)) for x in norms])
    return dict(mean=_average(means), std=_average(deviations))


def _average(images: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Means over the images, for each layer; None where no image has a number."""
    found = []
    for values in zip(*images):
        known = [value for value in values if value is not None]
        found.append(rounded(sum(known) / len(known)) if known else None)
    return found


def _describe(images: list[list[dict]], lengths: dict[str, Any]) -> dict[str, Any]:
    """Numbers of a model, as lists from the first mixer to the last."""

    def mean(name: str) -> list[float | None]:
        return _average([[layer.get(name) for layer in layers] for layers in images])

    first, found = images[0], dict(layers=[layer['name'] for layer in images[0]])
    gated = any(layer.get('mean') is not None for layer in first)
    found['input_gate'] = None
    if gated:
        found['input_gate'] = {key: mean(key) for key in ('mean', 'inside', 'outside')}
    found['forget_gate'] = found['decay'] = None
    if any(layer['forget'] is not None for layer in first):
        found['forget_gate'] = mean('forget')
        found['decay'] = dict(
            distances=list(first[0]['distances']),
            left=[
                _average([layers[i]['decay'] for layers in images])
                for i in range(len(first))
            ],
        )
    return dict(found, **lengths)


# Pictures


def _draw_maps(job: Job, image: StudyImage, found: dict[str, list]) -> None:
    lines = {
        title: [(name, gate / gate.mean()) for name, gate in layers if gate is not None]
        for title, layers in found.items()
    }
    lines = {title: layers for title, layers in lines.items() if layers}
    if not lines:
        return
    most = max(map(len, lines.values()))
    figure, panels = plotting.new_sheet(
        len(lines), 1 + most, plotting.cell_for(job.size)
    )
    for line, layers in zip(panels, lines.values()):
        plotting.show_image(line[0], image.pixels)
        low = min(float(gate.min()) for _, gate in layers)
        high = max(float(gate.max()) for _, gate in layers)
        for panel in line[1 + len(layers) :]:
            panel.set_visible(False)
        for panel, (name, gate) in zip(line[1:], layers):
            plotting.show_map(panel, gate, low, high)
            panel.set_title(f'block {name}', fontsize=8)
        plotting.add_colour_bar(figure, line, low, high, 'Δ / its mean')
    plotting.label_rows(panels, list(lines))
    name = image.name if len(job.images()) > 1 else ''
    plotting.save(figure, job.picture(name))


def _draw_layers(job: Job, results: dict[str, Any], titles: dict[str, str]) -> None:
    figure, axes = plotting.new_plot(2, 2)
    (forget, left), (ratio, lengths) = axes
    forget.set(ylabel='forget gate exp(ΔA), mean', ylim=(0, 1.02))
    left.set(xlabel='distance in positions', ylabel='left in the state', ylim=(0, 1.02))
    left.set_xscale('symlog', linthresh=1)
    left.set_xticks(_DISTANCES[::2], list(map(str, _DISTANCES[::2])))
    ratio.set(ylabel='Δ inside objects / outside')
    ratio.axhline(1, color='0.6', linewidth=0.8)
    lengths.set(ylabel='deviation of token lengths', yscale='log')
    for axis in (forget, ratio, lengths):
        axis.set_xlabel('depth (part of all blocks)')
        axis.set_xlim(0, 1)
    for i, (label, found) in enumerate(results.items()):
        style = dict(plotting.style(i), label=titles[label])
        _curve(forget, found['forget_gate'], style)
        if found['decay']:
            layers = [x for x in found['decay']['left'] if x]
            mean = [sum(values) / len(values) for values in zip(*layers)]
            left.plot(found['decay']['distances'], mean, **style)
        if found['input_gate']:
            sides = found['input_gate']['inside'], found['input_gate']['outside']
            ratios = [a / b if a and b else None for a, b in zip(*sides)]
            _curve(ratio, ratios, style)
        _curve(lengths, found['token_length']['std'], style)
        if found['token_length_unnormalised']:
            bare = dict(style, label=f'{style["label"]}, not normalised', alpha=0.5)
            bare.update(markerfacecolor='white', linewidth=1)
            _curve(lengths, found['token_length_unnormalised']['std'], bare)
    for axis in axes.flat:
        if not axis.lines or axis is ratio and len(axis.lines) == 1:
            axis.text(
                *(0.5, 0.5, 'none of the models has this'),
                transform=axis.transAxes,
                ha='center',
                fontsize=8,
            )
    plotting.add_legend(figure, lengths)
    plotting.save(figure, job.picture('layers'))


def _curve(axis: Any, values: Sequence[float | None] | None, style: dict) -> None:
    if not values:
        return
    depths = (np.arange(len(values)) + 0.5) / len(values)
    known = [(x, y) for x, y in zip(depths, values) if y is not None]
    if known:
        every = max(len(known) // 8, 1)
        axis.plot(*zip(*known), **dict(style, markevery=every))


def _print(results: dict[str, Any]) -> None:
    rows = []
    for label, found in results.items():
        gate = found['input_gate'] or {}
        columns = (gate.get('mean'), gate.get('inside'), gate.get('outside'))
        columns = (*columns, found['forget_gate'], found['token_length']['std'])
        rows += [
            [f'{label}, block {name}', *(_cell(column, i) for column in columns)]
            for i, name in enumerate(found['layers'])
        ]
    header = ['mean over the images', 'Δ', 'inside', 'outside', 'exp(ΔA)', 'deviation']
    print_table(header, rows)


def _cell(column: Sequence[float | None] | None, index: int) -> str:
    value = column[index] if column else None
    return '-' if value is None else f'{value:.3g}'


STUDY = Study(
    name='gates',
    shows='input gates, forget gates and lengths of tokens',
    run=run,
    add_arguments=add_arguments,
    masked=True,
)
