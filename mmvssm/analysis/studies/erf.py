"""Effective receptive fields before and after training, as VMamba draws them."""

from typing import Any

import numpy as np
from torch import Tensor

from mmvssm.analysis import receptive_field as erf
from mmvssm.analysis.studies import plotting
from mmvssm.analysis.studies.common import Job, Study, print_table, rounded
from mmvssm.analysis.studies.subjects import StudyModel
from mmvssm.engine import UsageError


def run(job: Job) -> dict[str, Any]:
    """Compute the fields, draw them, and list how large they are."""
    fields, results = {}, {}
    for subject in job.subjects:
        for state in ('before', 'after') if subject.checkpoint else ('before',):
            model = job.build(subject, trained=state == 'after')
            field = mean_field(job, model)
            fields[model.label, state] = field
            results.setdefault(model.label, {})[state] = _describe(model, field)
    _draw_fields(job, fields)
    _draw_shares(job, fields)
    _print(results)
    return results


def mean_field(job: Job, model: StudyModel) -> Tensor:
    """Mean over the images of the model's receptive field, float64 (H, W)."""
    model.net.requires_grad_(False)
    total = 0
    images = job.images()
    for image in job.progress(images, f'erf of {model.label}'):
        field = erf.receptive_field(model.backbone, model.prepare(image.pixels))
        total = total + field.double().cpu()
    return total / len(images)


def _describe(model: StudyModel, field: Tensor) -> dict[str, Any]:
    try:
        squares = erf.squares_of(field)
    except ValueError as error:
        raise UsageError(f'{model.label}: {error}.') from error
    return dict(
        shares=[square.share for square in squares],
        sides=[square.side for square in squares],
        areas=[rounded(square.area) for square in squares],
    )


def _draw_fields(job: Job, fields: dict[tuple[str, str], Tensor]) -> None:
    labels = list(dict.fromkeys(label for label, _ in fields))
    states = [s for s in ('before', 'after') if any(s == state for _, state in fields)]
    figure, panels = plotting.new_sheet(
        len(states), len(labels), plotting.cell_for(job.size)
    )
    for row, state in zip(panels, states):
        for panel, label in zip(row, labels):
            if (label, state) in fields:
                # As published: the root makes small values visible.
                values = fields[label, state] ** 0.2
                plotting.show_map(panel, values / values.max(), 0, 1)
    plotting.label_columns(panels, labels)
    plotting.label_rows(panels, [f'{state} training' for state in states])
    plotting.add_colour_bar(figure, panels, 0, 1, '(gradient / largest)$^{0.2}$')
    plotting.save(figure, job.picture())


def _draw_shares(job: Job, fields: dict[tuple[str, str], Tensor]) -> None:
    figure, ((axis,),) = plotting.new_plot(cell=(5.5, 3.6))
    labels = list(dict.fromkeys(label for label, _ in fields))
    for (label, state), field in fields.items():
        look = plotting.style(labels.index(label))
        look['linestyle'] = '--' if state == 'before' else '-'
        reached = erf.cumulative_shares(field).numpy()
        sides = 2 * np.arange(len(reached)) + 1
        axis.plot(
            sides,
            reached,
            label=f'{label}, {state} training',
            markevery=max(len(sides) // 8, 1),
            **look,
        )
    axis.set(xlabel='side of the square in pixels', ylabel='share of the gradient')
    axis.set_ylim(0, 1.02)
    plotting.add_legend(figure, axis)
    plotting.save(figure, job.picture('shares'))


def _print(results: dict[str, Any]) -> None:
    header = ['side (part of the area) that holds', *map(str, erf.SHARES)]
    rows = [
        [
            f'{label}, {state} training',
            *(f'{s} ({a:.2%})' for s, a in zip(found['sides'], found['areas'])),
        ]
        for label, states in results.items()
        for state, found in states.items()
    ]
    print_table(header, rows)


STUDY = Study(
    name='erf',
    shows='effective receptive field before and after training',
    run=run,
)
