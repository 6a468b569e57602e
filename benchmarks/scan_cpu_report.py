"""The result of ``scan_cpu.py`` as tables, and beside the marks it is to meet."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

PASSES = {'forward': 'forward', 'both': 'forward + backward', 'backward': 'backward'}
LAYOUTS = {'channels_last': 'channels-last', 'channels_first': 'channels-first'}
# On which a peer's published code works; our torch backend takes both.
PEER_LAYOUT = {'loop': 'channels_first', 'parallel': 'channels_last'}


class Mark(NamedTuple):
    """What the worst figure of a name must reach, and what is aimed at."""

    must: float
    aim: float


AT_LEAST = {
    'forward: floor / ours, N = 16, channels-last': Mark(0.65, 0.75),
    'forward: floor / ours, N = 16, channels-first': Mark(0.65, 0.75),
    'forward: floor / ours, N = 1, channels-last': Mark(0.65, 0.75),
    'forward: floor / ours, N = 1, channels-first': Mark(0.45, 0.6),
    'backward: floor / ours, N = 16, channels-last': Mark(0.4, 0.5),
    'backward: floor / ours, N = 16, channels-first': Mark(0.4, 0.5),
    'backward: floor / ours, N = 1, channels-last': Mark(0.4, 0.5),
    'backward: floor / ours, N = 1, channels-first': Mark(0.4, 0.5),
}
AT_MOST = {
    'VMamba-T s1l8: ours / no core': Mark(1.15, 1.12),
    'VMamba-T s2l5: ours / no core': Mark(1.15, 1.12),
    # Forms that keep no copy of a map, and no states but a few.
    'op memory: peak / (inputs + outputs + gradients)': Mark(3, 1.1),
    'SS2D memory: fused / unfused': Mark(0.25, 0.2),
}


@dataclass(frozen=True)
class Figure:
    """One ratio.

    Attributes:
        part: Of the result.
        which: Pass, form or network.
        ratio: Of what to what.
        case: What a mark distinguishes further.
        shape: Name of the row it comes from.
        threads: Number of threads.
        value: The ratio.
    """

    part: str
    which: str
    ratio: str
    case: str
    shape: str
    threads: int
    value: float

    @property
    def name(self) -> str:
        """What a mark may be set for."""
        case = f', {self.case}' if self.case else ''
        return f'{self.which}: {self.ratio}{case}'

    @property
    def mark(self) -> Mark | None:
        """What it is to reach, or to stay within."""
        return AT_LEAST.get(self.name, AT_MOST.get(self.name))


def seconds(row: dict, which: str, who: str, layout: str) -> float | None:
    """Median time in a row of ``op``, None if it was not measured."""
    return row['seconds'][which].get(who, {}).get(layout, {}).get('median')


def figures(parts: dict[str, list[dict]]) -> Iterator[Figure]:
    """Every ratio that a mark is set for, and the others of their kind."""
    for row in parts.get('op', []):
        yield from _op_figures(row)
    for row in parts.get('ss2d', []):
        name, threads = row['name'], row['threads']
        for which, times in row['seconds'].items():
            value = times['unfused']['median'] / times['fused']['median']
            form = f'SS2D {PASSES[which]}'
            yield Figure('ss2d', form, 'unfused / fused', name, name, threads, value)
    for row in parts.get('network', []):
        name, threads = row['name'], row['threads']
        for ratio in ('loop / ours', 'ours / no core'):
            first, second = (row['seconds'][core] for core in ratio.split(' / '))
            value = first['median'] / second['median']
            yield Figure('network', name, ratio, '', name, threads, value)
    yield from _memory_figures(parts.get('memory', []))


def _op_figures(row: dict) -> Iterator[Figure]:
    states, threads = row['shape']['states'], row['threads']
    for layout, text in LAYOUTS.items():
        for which, people in row['seconds'].items():
            ours = seconds(row, which, 'ours', layout)
            others = {
                who: seconds(row, which, who, PEER_LAYOUT.get(who, layout))
                for who in people
                if who != 'ours'
            }
            if which in row['floor']:
                others['floor'] = row['floor'][which]
            for who, theirs in others.items():
                yield Figure(
                    *('op', PASSES[which], f'{who} / ours', f'N = {states}, {text}'),
                    *(row['name'], threads, theirs / ours),
                )


def _memory_figures(rows: list[dict]) -> Iterator[Figure]:
    sizes = {(row['what'], row['threads']): row['bytes'] for row in rows}
    for (what, threads), size in sizes.items():
        if what == 'op':
            needed = size['inputs'] + size['outputs'] + size['gradients']
            value = (size['inputs'] + size['peak']) / needed
            ratio = 'peak / (inputs + outputs + gradients)'
            yield Figure('memory', 'op memory', ratio, '', 'op', threads, value)
        if what == 'fused':
            value = size['peak'] / sizes['unfused', threads]['peak']
            ratio = 'fused / unfused'
            yield Figure('memory', 'SS2D memory', ratio, '', 'SS2D', threads, value)


def marks(parts: dict[str, list[dict]]) -> list[dict]:
    """The marks and, for each number of threads, the worst of their figures."""
    by_name = {}
    for figure in figures(parts):
        by_name.setdefault(figure.name, {}).setdefault(figure.threads, []).append(
            figure
        )
    found = []
    for name, mark in (AT_LEAST | AT_MOST).items():
        least = name in AT_LEAST
        worst = []
        for threads, same in by_name.get(name, {}).items():
            pick = min if least else max
            figure = pick(same, key=lambda figure: figure.value)
            value = figure.value
            met = value >= mark.must if least else value <= mark.must
            worst.append(dict(threads=threads, value=value, at=figure.shape, met=met))
        if worst:
            limit = 'at least' if least else 'at most'
            found.append(
                {'what': name, limit: mark.must, 'aim': mark.aim, 'worst': worst}
            )
    return found


# Tables


def tables(parts: dict[str, list[dict]]) -> str:
    """All times in milliseconds, and sizes, as text."""
    rendered = []
    for part, render in (
        ('op', _op_table),
        ('ss2d', _ss2d_table),
        ('network', _network_table),
        ('memory', _memory_table),
    ):
        if parts.get(part):
            rendered.append(render(parts[part]))
    return '\n\n'.join(rendered)


def marks_table(found: list[dict], threads: list[int]) -> str:
    """The marks, one line each; figures that miss them have an exclamation mark."""
    counts = (f'threads: {count}' for count in threads)
    lines = [['marks', 'must', 'aim', *counts, 'worst at']]
    for mark in found:
        sign, limit = '>=', mark.get('at least')
        if limit is None:
            sign, limit = '<=', mark['at most']
        worst = {value['threads']: value for value in mark['worst']}
        cells = [_against_mark(worst[count]) for count in threads]
        places = dict.fromkeys(worst[count]['at'] for count in threads)
        lines.append(
            [mark['what'], f'{sign} {limit:g}', f'{mark["aim"]:g}', *cells]
            + [' | '.join(places)]
        )
    return _align(lines)


def _against_mark(worst: dict) -> str:
    return short(worst['value']) + ('' if worst['met'] else ' !')


def _op_table(rows: list[dict]) -> str:
    peers = ('ours', 'loop', 'parallel', 'torch')
    lines = [['op, ms on tensors channels-last (channels-first)', 'threads', 'pass']]
    lines[0] += [*peers, 'floor', 'floor / ours']
    for row in rows:
        for which, text in PASSES.items():
            times = [
                [seconds(row, which, who, layout) for layout in LAYOUTS]
                for who in peers
            ]
            cells = [
                '' if None in pair else '{} ({})'.format(*map(_milliseconds, pair))
                for pair in times
            ]
            floor = row['floor'].get(which)
            if floor:
                fractions = (short(floor / time) for time in times[0])
                cells += [_milliseconds(floor), '{} ({})'.format(*fractions)]
            lines.append([row['name'], str(row['threads']), text, *cells])
    return f'{_align(lines)}\n\n{_rates_table(rows)}'


def _rates_table(rows: list[dict]) -> str:
    lines = [['rates of the floor, 1e9/s', 'threads', *rows[0]['rates']]]
    for row in rows:
        rates = [f'{rate / 1e9:.1f}' for rate in row['rates'].values()]
        lines.append([row['name'], str(row['threads']), *rates])
    return _align(lines)


def _ss2d_table(rows: list[dict]) -> str:
    orders = [n for n in rows[0]['seconds']['forward'] if n not in ('fused', 'unfused')]
    lines = [['SS2D, ms', 'threads', 'pass', 'fused', 'unfused', 'unfused / fused']]
    lines[0] += [f'{name} / fused' for name in orders]
    for row in rows:
        for which, times in row['seconds'].items():
            fused, unfused = (times[form]['median'] for form in ('fused', 'unfused'))
            lines.append(
                [row['name'], str(row['threads']), PASSES[which]]
                + [_milliseconds(fused), _milliseconds(unfused)]
                + [short(unfused / fused)]
                + [short(times[name]['median'] / fused) for name in orders]
            )
    return _align(lines)


def _network_table(rows: list[dict]) -> str:
    lines = [['network, ms', 'threads', 'ours', 'loop', 'no core']]
    for row in rows:
        cells = [_milliseconds(time['median']) for time in row['seconds'].values()]
        lines.append([row['name'], str(row['threads']), *cells])
    return _align(lines)


def _memory_table(rows: list[dict]) -> str:
    names = ('inputs', 'outputs', 'gradients', 'peak')
    lines = [['memory, MiB (peak: above the inputs)', 'threads', *names]]
    for row in rows:
        cells = [f'{row["bytes"][name] / 2**20:.1f}' for name in names]
        lines.append([row['what'], str(row['threads']), *cells])
    return _align(lines)


def _milliseconds(time: float) -> str:
    return short(1e3 * time)


def short(value: float) -> str:
    """Three digits, or the whole number."""
    return f'{value:.0f}' if value >= 100 else f'{value:.3g}'


def _align(lines: list[list[str]]) -> str:
    widths = {}
    for line in lines:
        for column, cell in enumerate(line):
            widths[column] = max(widths.get(column, 0), len(cell))
    return '\n'.join(
        '  '.join(cell.ljust(widths[i]) for i, cell in enumerate(line)).rstrip()
        for line in lines
    )
