"""Accuracy, speed, memory and FLOPs against the size of the image.

VMamba (table 9, Fig. 4 and 5), Vim (Fig. 1) and MLLA (Fig. 6).
"""

import argparse
import os
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import LogFormatter, NullFormatter
from torch import Tensor, nn

from mmvssm.analysis.flops import count_flops
from mmvssm.analysis.measuring import probe
from mmvssm.analysis.measuring.steps import (
    DTYPES,
    MODES,
    PEERS,
    Case,
    Contender,
    build,
)
from mmvssm.analysis.measuring.timing import Effort, reason
from mmvssm.analysis.measuring.turns import measure
from mmvssm.analysis.studies import plotting
from mmvssm.analysis.studies.common import (
    Job,
    Study,
    print_table,
    rounded,
    write_json,
)
from mmvssm.analysis.studies.subjects import Subject, published_accuracy
from mmvssm.backbones import set_img_shapes
from mmvssm.engine import UsageError

# Sides of the published measurements.
PUBLISHED = dict(vmamba=(224, 288, 384, 512, 640, 768), vim=(512, 640, 738, 1024, 1248))
# The size of the published accuracies.
_USUAL = (224, 224)
_PEERS = ('deit_t', 'deit_t_materialised', 'deit_s', 'deit_s_materialised')
_PEERS = (*_PEERS, 'swin_t_scaled')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the study's own arguments."""
    add = parser.add_argument
    add(
        '--published',
        choices=PUBLISHED,
        help='the sizes of an article in the place of --size: '
        + '; '.join(f'{k} {" ".join(map(str, v))}' for k, v in PUBLISHED.items()),
    )
    add(
        '--peers',
        nargs='*',
        default=list(_PEERS),
        metavar='NAME',
        help=f'who is measured, too, out of {", ".join(PEERS)}; nothing for nobody '
        f'(default: {" ".join(_PEERS)})',
    )
    add('--batch', type=int, default=1, help='images of a step (default: 1)')
    add('--train', action='store_true', help='measure training steps, too')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 1
    add('--threads', type=int, default=cores, help=f'of torch (default: {cores})')
    add('--dtype', choices=DTYPES, default=DTYPES[0], help='default: float32')
    add(
        '--seconds',
        type=float,
        default=3,
        help='of timed steps after which a model that had three gets no further turn '
        'in a size (default: 3)',
    )
    add(
        '--longest',
        type=float,
        default=20,
        help='of a step; a model that takes longer is left out (default: 20)',
    )
    add(
        '--no-memory',
        action='store_true',
        help='do not measure memory; on the CPU this saves a process for each model '
        'and size',
    )


def run(job: Job) -> dict[str, Any]:
    """Measure all models in turns, size by size; draw and list."""
    options = job.options
    _check(options)
    if options.published:
        job.sizes = [(side, side) for side in PUBLISHED[options.published]]
    job.sizes = sorted(set(job.sizes), key=lambda size: size[0] * size[1])
    results = {subject.label: _facts(job, subject) for subject in job.subjects}
    taken = set(results)
    peers = [name for name in dict.fromkeys(options.peers) if name not in taken]
    results |= {name: _peer_facts(job, name) for name in peers}
    who = [_contender(subject, options.dtype) for subject in job.subjects]
    who += [Contender(name, options.dtype) for name in peers]
    if not options.no_memory:
        probe.start([contender.model for contender in who])
    modes = MODES if options.train else MODES[:1]
    for size in job.progress(job.sizes, 'sizes'):
        for mode in modes:
            case = Case(*size, options.batch, options.threads, mode, job.device)
            _add(results, who, case, _measure(case, who, options))
        # Large sizes take long. Who stops them keeps the small ones.
        write_json(job, results)
    _draw(job, results)
    _draw_scatter(job, results)
    _print(job, results)
    return results


def _check(options: argparse.Namespace) -> None:
    unknown = [name for name in options.peers if name not in PEERS]
    if unknown:
        raise UsageError(
            f'--peers: there is no {unknown[0]}; there are {", ".join(PEERS)}.'
        )
    for name in ('batch', 'threads'):
        if getattr(options, name) < 1:
            raise UsageError(f'--{name} must be at least 1.')
    for name in ('seconds', 'longest'):
        if not getattr(options, name) >= 0:
            raise UsageError(f'--{name} must not be negative.')


def _measure(case: Case, who: list[Contender], options: argparse.Namespace) -> dict:
    effort = Effort(25, 0.02, options.seconds)
    threads = torch.get_num_threads()
    try:
        return measure(case, who, effort, options.longest, not options.no_memory)
    finally:
        torch.set_num_threads(threads)


def _add(
    results: dict[str, Any], who: list[Contender], case: Case, row: dict[str, Any]
) -> None:
    """Add what a case has found: one more entry in each list."""
    for contender in who:
        result = results[contender.model]
        entry = result.setdefault(
            case.mode, dict(images_per_second=[], peak_bytes=[], left_out=[])
        )
        found = row['contenders'].get(contender.name, {})
        speed = found.get('images_per_second')
        entry['images_per_second'].append(None if speed is None else rounded(speed))
        entry['peak_bytes'].append(found.get('peak_bytes'))
        entry['left_out'].append(row['left_out'].get(contender.name))


# Models


class Whole(nn.Module):
    """A model of a study as a function of images alone.

    A classifier and a segmentor give their logits, a detector the maps of its neck.
    """

    def __init__(self, net: nn.Module, task: str):
        super().__init__()
        self.net = net
        self.task = task

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        set_img_shapes(images, [images.shape[2:]] * len(images))
        if self.task == 'detector':
            return tuple(self.net.extract_feat(images))
        return self.net(images)


def _contender(subject: Subject, dtype: str) -> Contender:
    return Contender(subject.label, dtype, builder=partial(_build, subject))


def _build(subject: Subject, size: tuple[int, int]) -> nn.Module:
    """A model with random weights; by name, also without drop path."""
    if subject.source in _names():
        return build(subject.source, size)
    model = subject.build(trained=False)
    return Whole(model.net, model.task)


def _names() -> list[str]:
    import mmvssm

    return mmvssm.list_models()


def _facts(job: Job, subject: Subject) -> dict[str, Any]:
    """Parameters, FLOPs and accuracy of a model of the command line."""
    model = job.build(subject)
    net = Whole(model.net, model.task)
    found = dict(
        sizes=[list(size) for size in job.sizes],
        parameters=sum(p.numel() for p in net.parameters()),
        flops=[_flops(net, subject.label, size) for size in job.sizes],
        published_top1=published_accuracy(subject.source),
        accuracy=None,
    )
    labelled = job.options.data and job.source.labels
    if labelled and model.task == 'classifier' and subject.checkpoint:
        model.require_head()
        found['accuracy'] = [_accuracy(job, model, size) for size in job.sizes]
    return found


def _peer_facts(job: Job, name: str) -> dict[str, Any]:
    """The same of a peer, which is built for each size."""
    found = dict(
        sizes=[list(size) for size in job.sizes],
        parameters=None,
        flops=[],
        published_top1=None,
        accuracy=None,
    )
    # Torch's fused attention has no formula, and as many FLOPs as the other one.
    plain = f'{name}_materialised' if f'{name}_materialised' in PEERS else name
    for size in job.sizes:
        try:
            net = build(plain, size)
        except ImportError:
            # It is left out of the measurement, which says why.
            found['flops'].append(None)
            continue
        found['parameters'] = sum(p.numel() for p in net.parameters())
        found['flops'].append(_flops(net, name, size))
    return found


def _flops(net: nn.Module, label: str, size: tuple[int, int]) -> int | None:
    try:
        return count_flops(net, (1, 3, *size)).flops
    except Exception as error:
        print(f'  no FLOPs of {label} at {size[0]}x{size[1]}: {reason(error)}')
        return None


@torch.no_grad()
def _accuracy(job: Job, model: Any, size: tuple[int, int]) -> float:
    """Part of the images whose class the model finds."""
    source, right = job.source, 0
    for index in job.progress(range(len(source)), f'{model.label} at {size}'):
        image = source.load(index, size)
        logits = model.net(model.prepare(image.pixels))[0]
        if len(logits) != len(source.classes):
            raise UsageError(
                f'--data has {len(source.classes)} class folders, and {model.label} '
                f'knows {len(logits)} classes: give the data of its training.'
            )
        right += int(logits.argmax()) == image.label
    return right / len(source)


# Pictures


def _draw(job: Job, results: dict[str, Any]) -> None:
    panels = [('inference, images/s', partial(_speed, mode='inference'))]
    if job.options.train:
        panels.append(('training, images/s', partial(_speed, mode='training')))
    panels.append(('time a pixel / that of the\nsmallest size', _growth))
    if any(x for r in results.values() for x in r['inference']['peak_bytes']):
        for mode in MODES[: 1 + job.options.train]:
            panels.append((f'{mode}, peak memory in MB', partial(_memory, mode=mode)))
    panels.append(('FLOPs in G', lambda r: [x and x / 1e9 for x in r['flops']]))
    if any(result['accuracy'] for result in results.values()):
        panels.append(('top-1 in %', _top1))
    figure, axes = plotting.new_plot(2, -(-len(panels) // 2))
    sides = [(height * width) ** 0.5 for height, width in job.sizes]
    for axis, (title, values) in zip(axes.flat, panels):
        for i, (label, result) in enumerate(results.items()):
            known = [
                (x, y) for x, y in zip(sides, values(result) or []) if y is not None
            ]
            style = dict(plotting.style(i), label=label)
            axis.plot(*(zip(*known) if known else ((), ())), **style)
        axis.set(xlabel='side of the image in pixels', ylabel=title, xscale='log')
        if values is _growth:
            axis.set_ylim(bottom=0)
        elif values is not _top1:
            axis.set_yscale('log')
            _plain_numbers(axis, axis.yaxis)
        _tick_sides(axis, sides)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    plotting.add_legend(figure, axes.flat[0])
    plotting.save(figure, job.picture())


class _Plain(LogFormatter):
    """Numbers without powers of ten."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f'{x:g}' if super().__call__(x, pos) else ''


def _plain_numbers(axis: Axes, which: Axis) -> None:
    """Numbers of a logarithmic axis; between powers of ten, if there are few powers."""
    which.set_major_formatter(_Plain())
    which.set_minor_formatter(_Plain(minor_thresholds=(1.5, 0.5)))
    axis.tick_params(which='minor', labelsize=7)


def _tick_sides(axis: Axes, sides: list[float]) -> None:
    # As many as have room.
    shown = sides[:: -(-len(sides) // 6)]
    axis.set_xticks(shown, [f'{side:.0f}' for side in shown])
    axis.xaxis.set_minor_formatter(NullFormatter())


def _speed(result: dict[str, Any], mode: str) -> list[float | None]:
    return result[mode]['images_per_second']


def _memory(result: dict[str, Any], mode: str) -> list[float | None]:
    return [x and x / 1e6 for x in result[mode]['peak_bytes']]


def _top1(result: dict[str, Any]) -> list[float] | None:
    return result['accuracy'] and [100 * x for x in result['accuracy']]


def _growth(result: dict[str, Any]) -> list[float | None]:
    """Seconds for each pixel, over those at the smallest size: 1 is linear growth."""
    speeds = result['inference']['images_per_second']
    pixels = [height * width for height, width in result['sizes']]
    times = [x and 1 / (x * n) for x, n in zip(speeds, pixels)]
    first = next((time for time in times if time), None)
    return [time and time / first for time in times]


def _draw_scatter(job: Job, results: dict[str, Any]) -> None:
    """Accuracy against time, for models whose accuracy was published."""
    if _USUAL not in job.sizes:
        return
    at = job.sizes.index(_USUAL)
    points = [
        (1000 / result['inference']['images_per_second'][at], top1, label)
        for label, result in results.items()
        if (top1 := result['published_top1']) is not None
        and result['inference']['images_per_second'][at] is not None
    ]
    if not points:
        return
    figure, ((axis,),) = plotting.new_plot(cell=(7.0, 4.6))
    groups = list(dict.fromkeys(label.split('_')[0] for _, _, label in points))
    for i, group in enumerate(groups):
        own = sorted(p for p in points if p[2].split('_')[0] == group)
        style = dict(plotting.style(i), linestyle='none', markersize=7)
        axis.plot([p[0] for p in own], [p[1] for p in own], label=group, **style)
    axis.set(
        xscale='log',
        xlabel=f'ms an image of 224x224, batch {job.options.batch}, {job.device}',
        ylabel='published top-1 in %',
    )
    _plain_numbers(axis, axis.xaxis)
    axis.margins(x=0.18, y=0.08)
    _name_points(axis, points)
    plotting.add_legend(figure, axis)
    plotting.save(figure, job.picture('scatter'))


def _name_points(axis: Axes, points: list[tuple[float, float, str]]) -> None:
    """Write names beside points, on whichever side is free."""
    axis.figure.draw_without_rendering()
    scale = 72 / axis.figure.dpi
    places = {p: axis.transData.transform(p[:2]) * scale for p in points}
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places.values()]
    for point in sorted(points):
        x, y = places[point]
        width, height = 4.2 * len(point[2]), 8
        boxes = []
        for dy in (-3, 5, -11, 13, -19, 21, -27):
            for dx in (6, -6):
                left, low = x + dx - (width if dx < 0 else 0), y + dy
                boxes.append(((dx, dy), (left, low, left + width, low + height)))
        free = (b for b in boxes if not any(_meet(b[1], other) for other in taken))
        offset, box = next(free, boxes[0])
        taken.append(box)
        axis.annotate(
            *point[2:],
            point[:2],
            xytext=offset,
            textcoords='offset points',
            ha='left' if offset[0] > 0 else 'right',
            fontsize=7,
        )


def _meet(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return (
        one[0] < other[2]
        and other[0] < one[2]
        and one[1] < other[3]
        and other[1] < one[3]
    )


def _print(job: Job, results: dict[str, Any]) -> None:
    header = ['images a second', *(f'{h}x{w}' for h, w in job.sizes)]
    rows = [
        [f'{label}, {mode}', *map(_cell, result[mode]['images_per_second'])]
        for label, result in results.items()
        for mode in MODES
        if mode in result
    ]
    print_table(header, rows)


def _cell(value: float | None) -> str:
    return '-' if value is None else f'{value:.3g}'


STUDY = Study(
    name='scaling',
    shows='speed, memory, FLOPs and accuracy against the size of the image',
    run=run,
    add_arguments=add_arguments,
    sizes=((224, 224), (384, 384), (512, 512)),
    several_sizes=True,
)
