"""Tables and the chart of an ablation."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS

from mmvssm.analysis.flops import Complexity, count_flops
from mmvssm.heads import ClassificationHead, ImageClassifier

CLASSIFIER_SIZE = 224
SEGMENTOR_SIZE = (512, 2048)
_MISSING = '-'
_COLOURS = dict(
    baseline='#555555',
    unclear='#8a8a8a',
    worse='#c0504d',
    better='#2b6ea6',
    seed='#111111',
)
# A difference counts if it is larger than so many spreads of the baseline's seeds.
_CLEAR = 2


def count_row(cfg: Config) -> tuple[Complexity, Complexity | None]:
    """Parameters and FLOPs of a row.

    Args:
        cfg: Its config.

    Returns:
        The counts of the row as a classifier at 224x224, see :func:`count_classifier`,
        and those of the segmentor at 512x2048, None if the config is a classifier's.
    """
    # Nothing is computed, so the weights need neither memory nor values.
    parts = cfg.model
    if 'head' in cfg.model and 'img_size' in cfg.model.backbone:
        backbone = {**cfg.model.backbone, 'img_size': CLASSIFIER_SIZE}
        parts = {**cfg.model, 'backbone': backbone}
    with torch.device('meta'):
        model = revert_sync_batchnorm(MODELS.build(parts))
    channels = model.backbone.in_channels
    if 'head' in cfg.model:
        shape = (1, channels, CLASSIFIER_SIZE, CLASSIFIER_SIZE)
        return count_flops(model, shape), None
    return count_classifier(cfg), count_flops(model, (1, channels, *SEGMENTOR_SIZE))


def count_classifier(cfg: Config) -> Complexity:
    """Parameters and FLOPs of a row's backbone as the paper counts them.

    That is for a classifier with 1000 classes at 224x224.
    """
    arguments = dict(img_size=CLASSIFIER_SIZE, out_indices=(3,), out_norm=False)
    with torch.device('meta'):
        backbone = MODELS.build({**cfg.model.backbone, **arguments})
        head = ClassificationHead(backbone.out_channels[-1])
        classifier = ImageClassifier(backbone, head)
    shape = (1, backbone.in_channels, CLASSIFIER_SIZE, CLASSIFIER_SIZE)
    return count_flops(classifier, shape)


def complexity_table(
    rows: Iterable[tuple[Any, tuple[Complexity, Complexity | None]]],
) -> str:
    """Markdown table of parameters and FLOPs, ours and those of the paper.

    Args:
        rows: Each :class:`mmvssm.engine.configs.ablation.Row` with the result of
            :func:`count_row`.
    """
    lines = [
        ('Row', 'Config', 'Params', 'paper', 'FLOPs', 'paper', 'UperNet', 'at 512x2048')
    ]
    for row, (classifier, segmentor) in rows:
        paper = row.paper or {}
        lines.append(
            (
                row.label,
                f'[{row.name}]({row.name}.py)',
                f'{classifier.params / 1e6:.2f} M',
                f'{paper["params"]} M' if 'params' in paper else _MISSING,
                f'{classifier.flops / 1e9:.2f} G',
                f'{paper["flops"]} G' if 'flops' in paper else _MISSING,
                f'{segmentor.params / 1e6:.2f} M' if segmentor else _MISSING,
                f'{segmentor.flops / 1e9:.1f} G' if segmentor else _MISSING,
            )
        )
    return _markdown(lines)


def summarise(rows: Sequence[Any], results: Iterable[Mapping]) -> list[dict]:
    """Combine the results of all seeds of a row.

    Args:
        rows: Each a :class:`mmvssm.engine.configs.ablation.Row`; the first one is the
            baseline.
        results: Results of :func:`mmvssm.engine.configs.ablation.train_row`.

    Returns:
        A dict for each row with results: ``row``, ``label``, ``seeds``,
        ``values`` (one for each seed), ``mean``, ``spread`` (the largest value minus
        the smallest; None of one seed), ``difference`` (of the mean from the
        baseline's; None without a baseline), ``clear`` (whether the difference is
        larger than twice the spread of the baseline; None for the baseline itself and
        where its spread is not known), ``seconds_per_iteration`` and ``paper``
        (top-1 accuracy) with ``paper_difference``; None if the paper has no such row.
    """
    by_row = {row.name: [] for row in rows}
    for result in results:
        by_row[result['row']].append(result)
    first = [result['value'] for result in by_row[rows[0].name]]
    noise = _spread(first)
    top1 = _top1(rows[0])
    summary = []
    for row in rows:
        found = by_row[row.name]
        if not found:
            continue
        values = [result['value'] for result in found]
        times = [result['seconds_per_iteration'] for result in found]
        times = [seconds for seconds in times if seconds is not None]
        paper = _top1(row)
        difference = fmean(values) - fmean(first) if first else None
        known = row is not rows[0] and noise is not None
        summary.append(
            dict(
                row=row.name,
                label=row.label,
                seeds=[result['seed'] for result in found],
                values=values,
                mean=fmean(values),
                spread=_spread(values),
                difference=difference,
                clear=abs(difference) > _CLEAR * noise if known else None,
                seconds_per_iteration=fmean(times) if times else None,
                paper=paper,
                paper_difference=None if None in (paper, top1) else paper - top1,
            )
        )
    return summary


def _spread(values: Sequence[float]) -> float | None:
    return max(values) - min(values) if len(values) > 1 else None


def _top1(row: Any) -> float | None:
    return float(row.paper['top1']) if row.paper and 'top1' in row.paper else None


def write_results(
    summary: Sequence[Mapping], metric: str, stem: str | Path
) -> list[Path]:
    """Write a table as CSV and Markdown, and a bar chart.

    Args:
        summary: Of :func:`summarise`.
        metric: What was measured.
        stem: Path of the files without their ``.csv``, ``.md`` and ``.png``.

    Returns:
        The three files.
    """
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f'{stem.name}.{kind}') for kind in ('csv', 'md', 'png')]
    with paths[0].open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(summary[0])
        for line in summary:
            writer.writerow(
                ' '.join(map(str, value)) if isinstance(value, list) else value
                for value in line.values()
            )
    paths[1].write_text(result_table(summary, metric) + '\n')
    draw_results(summary, metric, paths[2])
    return paths


def result_table(summary: Sequence[Mapping], metric: str) -> str:
    """Markdown table of :func:`summarise`."""
    lines = [
        (
            'Row',
            metric,
            'spread',
            'from baseline',
            'over twice the spread',
            'seeds',
            's/iteration',
            'top-1 in the paper',
            'from baseline',
        )
    ]
    for line in summary:
        values = line['values']
        spread = f' ({min(values):.2f} to {max(values):.2f})' if len(values) > 1 else ''
        lines.append(
            (
                line['label'],
                f'{line["mean"]:.2f}{spread}',
                _plain(line['spread'], 2),
                _signed(line['difference'], 2),
                {True: 'yes', False: 'no', None: _MISSING}[line['clear']],
                str(len(values)),
                _plain(line['seconds_per_iteration'], 3),
                _plain(line['paper'], 1),
                _signed(line['paper_difference'], 1),
            )
        )
    return _markdown(lines)


def draw_results(summary: Sequence[Mapping], metric: str, path: str | Path) -> Path:
    """Draw bars: what was measured, and what the paper has.

    The dark band is the range of the baseline's seeds. The light one reaches twice
    their spread to both sides of their mean: a row that ends inside it is grey.

    Args:
        summary: Of :func:`summarise`.
        metric: What was measured.
        path: The PNG file to write.

    Returns:
        ``path``.
    """
    figure = Figure(figsize=(11, 1.6 + 0.36 * len(summary)), layout='constrained')
    ours, paper = figure.subplots(1, 2, sharey=True)
    labels = [line['label'] for line in summary]
    for axes, key, difference, title in (
        (ours, 'mean', 'difference', f'{metric} here (dots: seeds)'),
        (paper, 'paper', 'paper_difference', 'ImageNet-1K top-1 in the paper'),
    ):
        values = [line[key] for line in summary]
        axes.barh(
            labels,
            [value or 0.0 for value in values],
            color=[
                _colour(line[difference], axes is paper or line['clear'] is not False)
                for line in summary
            ],
        )
        for i, line in enumerate(summary):
            if values[i] is not None:
                text = f'{values[i]:.1f}'
                axes.annotate(
                    f'{text} ({_signed(line[difference], 1)})',
                    (0.01, i),
                    xycoords=('axes fraction', 'data'),
                    color='white',
                    va='center',
                    fontsize=9,
                )
        known = [value for value in values if value is not None]
        known += [v for line in summary for v in line['values']] if axes is ours else []
        if known:
            room = 0.6 * (max(known) - min(known)) or 1.0
            axes.set_xlim(max(0.0, min(known) - room), max(known) + 0.15 * room)
        axes.set_title(title, fontsize=11, fontweight='bold')
        axes.set_xlabel('difference from the baseline in brackets; axis cut')
    if summary[0]['difference'] is not None:
        _draw_spread(ours, summary[0])
    for i, line in enumerate(summary):
        seeds = len(line['values'])
        ours.plot(line['values'], [i] * seeds, 'o', color=_COLOURS['seed'], ms=4)
    ours.invert_yaxis()
    figure.savefig(path, dpi=100)
    return Path(path)


def _draw_spread(axes: Axes, baseline: Mapping) -> None:
    mean, values = baseline['mean'], baseline['values']
    room = _CLEAR * (baseline['spread'] or 0.0)
    bands = ((min(values), max(values), 0.12), (mean - room, mean + room, 0.06))
    for left, right, alpha in bands:
        axes.axvspan(left, right, color='black', alpha=alpha, zorder=0)
    axes.axvline(mean, color='black', lw=0.8)
    if room:
        text = 'grey: within twice the spread of the baseline'
        axes.set_xlabel(f'{axes.get_xlabel()}\n{text}')


def _colour(difference: float | None, clear: bool) -> str:
    if not difference:
        return _COLOURS['baseline']
    if not clear:
        return _COLOURS['unclear']
    return _COLOURS['better' if difference > 0 else 'worse']


def _plain(value: float | None, digits: int) -> str:
    return _MISSING if value is None else f'{value:.{digits}f}'


def _signed(value: float | None, digits: int) -> str:
    return _MISSING if value is None else f'{value:+.{digits}f}'


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of them the heads of the columns."""
    rule = ['---'] * len(lines[0])
    return '\n'.join(f'| {" | ".join(line)} |' for line in (lines[0], rule, *lines[1:]))
