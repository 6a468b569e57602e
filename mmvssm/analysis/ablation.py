"""Tables and the chart of an ablation."""

import csv
import math
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
from torch import nn

from mmvssm.analysis.flops import Complexity, count_flops
from mmvssm.analysis.measuring.steps import MODES, Case, Contender
from mmvssm.analysis.measuring.timing import Effort
from mmvssm.analysis.measuring.turns import measure
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
    if 'head' in cfg.model:
        return count_classifier(cfg), None
    # Nothing is computed, so the weights need neither memory nor values.
    with torch.device('meta'):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
    shape = (1, model.backbone.in_channels, *SEGMENTOR_SIZE)
    return count_classifier(cfg), count_flops(model, shape)


def count_classifier(cfg: Config) -> Complexity:
    """Parameters and FLOPs of :func:`build_classifier` at 224x224."""
    with torch.device('meta'):
        model = revert_sync_batchnorm(build_classifier(cfg))
    channels = model.backbone.in_channels
    return count_flops(model, (1, channels, CLASSIFIER_SIZE, CLASSIFIER_SIZE))


def build_classifier(cfg: Config) -> nn.Module:
    """A row as the papers count and time it: a classifier of images of 224x224.

    Args:
        cfg: Its config. If it is a segmentor's, its backbone gets a head of 1000
            classes.

    Returns:
        The model, with random weights, (B, C, 224, 224) -> (B, classes).
    """
    backbone = {**cfg.model.backbone}
    if 'head' in cfg.model:
        if 'img_size' in backbone:
            backbone['img_size'] = CLASSIFIER_SIZE
        return MODELS.build({**cfg.model, 'backbone': backbone})
    backbone.update(img_size=CLASSIFIER_SIZE, out_indices=(3,), out_norm=False)
    net = MODELS.build(backbone)
    return ImageClassifier(net, ClassificationHead(net.out_channels[-1]))


def measure_speed(
    configs: Mapping[str, Config], batch: int, threads: int, effort: Effort
) -> dict[str, dict[str, float | None]]:
    """Images a second of rows that take turns on the CPU, see :func:`build_classifier`.

    Args:
        configs: The config of each row, by its name.
        batch: Images of a step.
        threads: Of torch.
        effort: How long to measure.

    Returns:
        By row ``inference`` and ``training``, which is a step without the optimizer's;
        None if the row could not be run, of which the reason is printed.
    """
    size = (CLASSIFIER_SIZE, CLASSIFIER_SIZE)
    who = [
        Contender(name, builder=lambda _, cfg=cfg: build_classifier(cfg))
        for name, cfg in configs.items()
    ]
    found = {name: {} for name in configs}
    for mode in MODES:
        case = Case(*size, batch, threads, mode)
        measured = measure(case, who, effort, longest=math.inf, memory=False)
        for contender in who:
            facts = measured['contenders'].get(contender.name, {})
            found[contender.model][mode] = facts.get('images_per_second')
    return found


def speed_table(
    rows: Sequence[Any], speeds: Mapping[str, Mapping[str, float | None]]
) -> str:
    """Markdown table of :func:`measure_speed`, beside the paper's.

    Args:
        rows: Each a :class:`mmvssm.engine.configs.ablation.Row`. What the others are
            compared with is the first one.
        speeds: By the names of the rows.
    """
    lines = [
        (
            *('Row', 'inference, images/s', '/ first', 'in the paper'),
            *('training, images/s', '/ first', 'in the paper'),
        )
    ]
    for row in rows:
        line = [row.label]
        for mode in MODES:
            speed, first = (speeds[name][mode] for name in (row.name, rows[0].name))
            published = [_published_speed(x, mode) for x in (row, rows[0])]
            line += [
                _plain(speed, 2),
                _ratio(speed, first),
                _ratio(*published),
            ]
        lines.append(tuple(line))
    return _markdown(lines)


def _published_speed(row: Any, mode: str) -> float | None:
    value = (row.paper or {}).get(f'{mode}_images_per_second')
    return None if value is None else float(value)


def _ratio(a: float | None, b: float | None) -> str:
    return _MISSING if None in (a, b) else f'{a / b:.2f}'


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
        known = [value for value in values if value is not None]
        known += [v for line in summary for v in line['values']] if axes is ours else []
        if known:
            room = 0.6 * (max(known) - min(known)) or 1.0
            axes.set_xlim(max(0.0, min(known) - room), max(known) + 0.15 * room)
        _write_values(axes, values, [line[difference] for line in summary])
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


def _write_values(
    axes: Axes, values: Sequence[float | None], differences: Sequence[float | None]
) -> None:
    """Write into each bar what it is, or beside it if it is short."""
    left, right = axes.get_xlim()
    for i, value in enumerate(values):
        if value is None:
            continue
        fits = value - left > 0.35 * (right - left)
        axes.annotate(
            f'{value:.1f} ({_signed(differences[i], 1)})',
            (left if fits else value, i),
            xytext=(4 if fits else 8, 0),
            textcoords='offset points',
            color='white' if fits else _COLOURS['seed'],
            va='center',
            fontsize=9,
        )


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
