"""Implicit attention of scans and of linear attention (VMamba, Fig. 6, 9 and 10)."""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mmvssm.analysis import attention
from mmvssm.analysis.attention import MERGED, MODES
from mmvssm.analysis.routes import Mixing, find_mixers, record_mixings
from mmvssm.analysis.studies import plotting
from mmvssm.analysis.studies.common import Job, Study, print_table, rounded
from mmvssm.analysis.studies.images import StudyImage
from mmvssm.analysis.studies.subjects import StudyModel
from mmvssm.engine import UsageError

_SIGNED = 'PuOr'
# Exponent of the scale of the pictures.
_ROOT = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the study's own arguments."""
    add = parser.add_argument
    add(
        '--query',
        nargs=2,
        type=float,
        default=(0.5, 0.5),
        metavar=('Y', 'X'),
        help='whose attention is drawn, 0 to 1 from the top left (default: the centre)',
    )
    add('--stage', type=int, metavar='N', help='counted from 0 (default: the third)')
    add('--block', type=int, metavar='N', help='of the stage (default: the second)')
    add(
        '--layer',
        type=int,
        metavar='N',
        help='block of a backbone without stages (default: after two thirds)',
    )
    add('--modes', nargs='+', choices=MODES, default=list(MODES), help='default: all')
    add('--no-matrices', action='store_true', help='do not draw the L x L matrices')
    add('--no-rollout', action='store_true', help='no roll-out over the stage')


def run(job: Job) -> dict[str, Any]:
    """Record the mixers, draw what the query attends to, and how far that is."""
    if not all(0 <= x <= 1 for x in job.options.query):
        raise UsageError(f'--query takes Y X from 0 to 1, got {job.options.query}.')
    job.options.modes = [mode for mode in MODES if mode in job.options.modes]
    results, sheets = {}, {image.name: [] for image in job.images()}
    through = {image.name: [] for image in job.images()}
    for model in job.models():
        layer, stage = choose(model, job.options)
        found = None
        for image in job.progress(job.images(), f'attention of {model.label}'):
            mixings = _record(model, image, [layer])
            found = found or _start(layer, mixings[0], job.options.query)
            rows = _rows(mixings[0], job.options)
            _note(found, rows)
            sheets[image.name].append((model, rows))
            if not job.options.no_matrices and image is job.images()[0]:
                _draw_matrices(job, model, mixings[0])
            if not job.options.no_rollout:
                rolled = _roll_out(model, image, stage, job.options.query)
                through[image.name].append((model, rolled))
                found['rollout_layers'] = stage
        results[model.label] = found
    for image in job.images():
        _draw_rows(job, image, sheets[image.name])
        if through[image.name]:
            _draw_rollout(job, image, through[image.name])
    _print(results, len(job.images()))
    return results


def choose(model: StudyModel, options: argparse.Namespace) -> tuple[str, list[str]]:
    """The mixer that is looked into, and all mixers of its stage.

    Raises:
        UsageError: There is no such stage or block.
    """
    try:
        known = find_mixers(model.backbone)
    except ValueError as error:
        raise UsageError(f'{model.label}: {error}.') from error
    if len(next(iter(known.values()))) == 1:
        names = list(known)
        number = _pick('--layer', options.layer, len(names) * 2 // 3, len(names), model)
        return names[number], names
    last = max(position[0] for position in known.values())
    stage = _pick('--stage', options.stage, 2, last + 1, model)
    names = [name for name, position in known.items() if position[0] == stage]
    return names[_pick('--block', options.block, 1, len(names), model)], names


def _pick(
    name: str, given: int | None, usual: int, count: int, model: StudyModel
) -> int:
    if given is None:
        return min(usual, count - 1)
    if not 0 <= given < count:
        raise UsageError(
            f'{name} of {model.label} is 0 to {count - 1}, got {given}: leave it out, '
            'or give one that all models have.'
        )
    return given


def _record(
    model: StudyModel, image: StudyImage, layers: Sequence[str]
) -> list[Mixing]:
    try:
        images = model.prepare(image.pixels)
        return list(record_mixings(model.backbone, images, layers))
    except ValueError as error:
        raise UsageError(f'{model.label}: {error}.') from error


def _patch(size: tuple[int, int], query: Sequence[float]) -> tuple[int, int]:
    """Row and column of the patch at a relative place."""
    row, column = (
        min(int(at * side), side - 1) for at, side in zip(query, size, strict=True)
    )
    return row, column


def _rows(mixing: Mixing, options: argparse.Namespace) -> dict[str, dict[str, Tensor]]:
    """For each mode the maps of the query, by route."""
    row, column = _patch(mixing.size, options.query)
    number = row * mixing.size[1] + column
    return {
        mode: _worth_showing(attention.raster_rows(mixing, mode, number))
        for mode in _modes(mixing, options)
    }


def _modes(mixing: Mixing, options: argparse.Namespace) -> list[str]:
    """The modes to draw. Without step sizes, CBdt is CB."""
    gated = any(route.dt is not None for route in mixing.routes.values())
    modes = [mode for mode in options.modes if gated or mode != 'CBdt']
    return modes or ['CB']


def _worth_showing(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """All routes and what they make together; a single route is the latter."""
    names = list(found) if len(found) > 2 else [MERGED]
    return {name: found[name].double().cpu() for name in names}


def _roll_out(
    model: StudyModel, image: StudyImage, stage: Sequence[str], query: Sequence[float]
) -> Tensor:
    matrices = []
    images = model.prepare(image.pixels)
    for mixing in record_mixings(model.backbone, images, stage):
        found = attention.raster_matrices(mixing, 'decayed')
        matrices.append(found[MERGED].double().cpu())
    row, column = _patch(mixing.size, query)
    rolled = attention.rollout(matrices)[row * mixing.size[1] + column]
    return rolled.view(mixing.size)


def _start(layer: str, mixing: Mixing, query: Sequence[float]) -> dict[str, Any]:
    return dict(
        layer=layer,
        size=list(mixing.size),
        query=list(_patch(mixing.size, query)),
        attention={},
    )


def _note(found: dict[str, Any], rows: dict[str, dict[str, Tensor]]) -> None:
    """Add the numbers of an image: one more entry in each list."""
    for mode, maps in rows.items():
        for name, values in maps.items():
            entry = (
                found['attention']
                .setdefault(mode, {})
                .setdefault(name, dict(least=[], largest=[], distance=[]))
            )
            entry['least'].append(rounded(values.min()))
            entry['largest'].append(rounded(values.max()))
            entry['distance'].append(rounded(mean_distance(values, found['query'])))


def mean_distance(values: Tensor, query: Sequence[int]) -> float:
    """Mean distance from the query, weighed by the absolute values, in patches.

    Args:
        values: Map (H, W).
        query: Row and column.

    Returns:
        0 where all values are 0.
    """
    rows, columns = (
        torch.arange(side) - at for side, at in zip(values.shape, query, strict=True)
    )
    distances = (rows[:, None] ** 2 + columns**2).double().sqrt()
    weights = values.abs()
    total = weights.sum()
    return float((weights * distances).sum() / total) if total else 0.0


# Pictures


def _draw_rows(job: Job, image: StudyImage, sheet: list) -> None:
    lines = [
        (f'{model.title}\n{mode}', maps)
        for model, rows in sheet
        for mode, maps in rows.items()
    ]
    most = max(len(maps) for _, maps in lines)
    figure, panels = plotting.new_sheet(
        len(lines), 1 + most, plotting.cell_for(job.size, 1.5)
    )
    for line, (_, maps) in zip(panels, lines):
        plotting.show_image(line[0], image.pixels)
        _mark(line[0], image.pixels.shape, job.options.query)
        limit = max(float(values.abs().max()) for values in maps.values())
        signed = any(bool((values < 0).any()) for values in maps.values())
        # The merged map stands in the last column, below one another.
        for panel in line[len(maps) : -1]:
            panel.set_visible(False)
        places = [*line[1 : len(maps)], line[-1]]
        for panel, (name, values) in zip(places, maps.items(), strict=True):
            _show(panel, values, limit, signed)
            panel.set_title(name, fontsize=7, pad=2)
        _bar(figure, line, limit, signed)
    plotting.label_rows(panels, [title for title, _ in lines])
    name = image.name if len(job.images()) > 1 else ''
    plotting.save(figure, job.picture(name))


def _draw_matrices(job: Job, model: StudyModel, mixing: Mixing) -> None:
    modes = _modes(mixing, job.options)
    columns = len(mixing.routes) + 1 if len(mixing.routes) > 1 else 1
    figure, panels = plotting.new_sheet(len(modes), columns, 2.2)
    for line, mode in zip(panels, modes):
        found = _worth_showing(attention.raster_matrices(mixing, mode))
        limit = max(float(matrix.abs().max()) for matrix in found.values())
        signed = any(bool((matrix < 0).any()) for matrix in found.values())
        for panel, (name, matrix) in zip(line, found.items(), strict=True):
            _show(panel, matrix, limit, signed)
            panel.set_title(name, fontsize=8)
        _bar(figure, line, limit, signed)
    plotting.label_rows(panels, modes)
    figure.suptitle(
        f'{model.title}, {mixing.layer}: rows are queries, columns keys', fontsize=9
    )
    plotting.save(figure, job.picture(f'matrices_{model.label}'))


def _draw_rollout(job: Job, image: StudyImage, found: list) -> None:
    figure, panels = plotting.new_sheet(1, 1 + len(found), plotting.cell_for(job.size))
    plotting.show_image(panels[0, 0], image.pixels)
    _mark(panels[0, 0], image.pixels.shape, job.options.query)
    for panel, (_, values) in zip(panels[0, 1:], found, strict=True):
        _show(panel, values, float(values.max()), False)
    plotting.label_columns(panels, ['query', *(model.title for model, _ in found)])
    _bar(figure, panels[0, 1:], 1.0, False, 'roll-out / its largest')
    name = f'_{image.name}' if len(job.images()) > 1 else ''
    plotting.save(figure, job.picture(f'rollout{name}'))


def _show(panel: Axes, values: Tensor, limit: float, signed: bool) -> None:
    """Draw values on a root scale, on which small values show beside the largest."""
    scaled = values.double().numpy() / (limit or 1.0)
    scaled = np.sign(scaled) * np.abs(scaled) ** _ROOT
    low, colours = (-1, _SIGNED) if signed else (0, plotting.MAP_COLOURS)
    plotting.show_map(panel, scaled, low, 1, colours)


def _bar(
    figure: Figure, panels: Any, limit: float, signed: bool, label: str | None = None
) -> None:
    low, colours = (-1, _SIGNED) if signed else (0, plotting.MAP_COLOURS)
    label = label or f'value / {limit:.2g}'
    plotting.add_colour_bar(figure, panels, low, 1, f'root of {label}', colours)


def _mark(panel: Axes, shape: Sequence[int], query: Sequence[float]) -> None:
    height, width = shape[:2]
    panel.plot(
        query[1] * (width - 1),
        query[0] * (height - 1),
        marker='*',
        color='red',
        markeredgecolor='white',
        markersize=11,
    )


def _print(results: dict[str, Any], count: int) -> None:
    rows = [
        [
            f'{label}, {mode}, {name}',
            *(f'{sum(x) / count:.3g}' for x in entry.values()),
        ]
        for label, found in results.items()
        for mode, maps in found['attention'].items()
        for name, entry in maps.items()
    ]
    print_table(['means over the images', 'least', 'largest', 'distance'], rows)


STUDY = Study(
    name='attention',
    shows='what a place of the image attends to in a mixer',
    run=run,
    add_arguments=add_arguments,
    count=1,
)
