"""The result of ``models_cpu.py`` as tables, which are Markdown."""

from collections.abc import Callable, Iterator
from functools import partial

from scan_cpu_report import short

FIRST_WAY = 'float32, eager'


def ways(rows: list[dict]) -> list[str]:
    """Dtypes with eager or compiled, in the order in which they were measured."""
    return list(dict.fromkeys(_split(name)[1] for row in rows for name in _all(row)))


def models(rows: list[dict]) -> list[str]:
    """The models in the order in which they were measured."""
    return list(dict.fromkeys(_split(name)[0] for row in rows for name in _all(row)))


def speed(row: dict, model: str, way: str) -> float | None:
    """Images a second, None if the model was left out."""
    return row['contenders'].get(f'{model}, {way}', {}).get('images_per_second')


def times(row: dict, model: str, way: str, against: str) -> float | None:
    """How many times the speed of ``against`` the same way."""
    own, other = speed(row, model, way), speed(row, against, way)
    return own / other if own and other else None


def baseline(rows: list[dict], against: str) -> str:
    """``against`` if it was measured, else the first model."""
    known = models(rows)
    return against if against in known else known[0]


def groups(rows: list[dict]) -> Iterator[tuple[str, int, list[dict]]]:
    """Rows of one mode and number of threads, small images first."""
    timed = [row for row in rows if 'case' in row]
    keys = dict.fromkeys((row['case']['mode'], row['case']['threads']) for row in timed)
    for mode, threads in sorted(keys, key=lambda key: (key[0], -key[1])):
        same = [
            row
            for row in timed
            if (row['case']['mode'], row['case']['threads']) == (mode, threads)
        ]
        yield mode, threads, sorted(same, key=_column)


def summary(result: dict, against: str) -> str:
    """All tables, what was left out, the machine and the versions."""
    rows = result['rows']
    timed = [row for row in rows if 'case' in row]
    found = [_machine(result)]
    if timed:
        against = baseline(timed, against)
    # Of memory, only with the most threads: they hardly change it.
    counted = set()
    for mode, threads, same in groups(rows):
        where = f'{mode}, {threads} thread{"s" * (threads > 1)}'
        for way in ways(timed):
            tables = {
                f'images a second (times {against})': partial(_speed_cell, way, against)
            }
            if way != FIRST_WAY:
                tables[f'times its own speed in {FIRST_WAY}'] = partial(_gain_cell, way)
            if (mode, way) not in counted:
                tables[f'peak memory of a step, MB (times {against})'] = partial(
                    _memory_cell, way, against
                )
            counted.add((mode, way))
            for what, cell in tables.items():
                title = f'{where}, {way}: {what}'
                found.append(_table(title, same, models(timed), cell))
    found += [_differences(row) for row in rows if 'case' not in row]
    missing = [
        f'- {row["name"]}: {name}: {why}'
        for row in rows
        for name, why in row['left_out'].items()
    ]
    if missing:
        found.append('\n'.join(['Left out:', '', *missing]))
    return '\n\n'.join(text for text in found if text)


def _machine(result: dict) -> str:
    last = result['runs'][-1]
    machine = last['environment']['Machine']
    torch = dict.fromkeys(
        run['environment']['Packages']['torch'].partition(',')[0]
        for run in result['runs']
    )
    known = machine['instruction sets'].split()
    bfloat16 = [name for name in known if 'bf16' in name] or ['none']
    lines = [
        f'{machine["CPU"]} ({machine["CPU model"]}), torch {" and ".join(torch)}.',
        f'Instructions for bfloat16: {", ".join(bfloat16)}.',
    ]
    if last['quick']:
        lines.append('Tiny images: the figures say nothing.')
    return '\n'.join(lines)


def _table(
    title: str,
    rows: list[dict],
    names: list[str],
    cell: Callable[[dict, str], str],
) -> str:
    heads = [f'{_size(row)}, batch {row["case"]["batch"]}' for row in rows]
    lines = [[name, *(cell(row, name) for row in rows)] for name in names]
    lines = [line for line in lines if any(line[1:])]
    return f'{title}\n\n{_markdown([["", *heads], *lines])}' if lines else ''


def _markdown(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    rendered = [
        f'| {" | ".join(cell.ljust(width) for cell, width in zip(line, widths))} |'
        for line in lines
    ]
    rule = f'|{"|".join("-" * (width + 2) for width in widths)}|'
    return '\n'.join([rendered[0], rule, *rendered[1:]])


def _speed_cell(way: str, against: str, row: dict, model: str) -> str:
    own, ratio = speed(row, model, way), times(row, model, way, against)
    if own is None:
        return ''
    return short(own) if ratio is None else f'{short(own)} ({ratio:.2f})'


def _gain_cell(way: str, row: dict, model: str) -> str:
    own, first = speed(row, model, way), speed(row, model, FIRST_WAY)
    return f'{own / first:.2f}' if own and first else ''


def _memory_cell(way: str, against: str, row: dict, model: str) -> str:
    own, other = (
        row['contenders'].get(f'{name}, {way}', {}).get('peak_bytes')
        for name in (model, against)
    )
    if not own:
        return ''
    return f'{own / 1e6:.0f} ({own / other:.2f})' if other else f'{own / 1e6:.0f}'


def _differences(row: dict) -> str:
    heads = ['', 'largest', '/ standard deviation', 'same class', 'classes', 'images']
    lines = [
        [
            name,
            f'{found["largest"]:.2g}',
            f'{found["largest_over_std"]:.2g}',
            f'{100 * found["same_class"]:.0f} %',
            str(found['classes']),
            str(found['images']),
        ]
        for name, found in row['contenders'].items()
    ]
    title = (
        f'Logits of {row["dtype"]} beside those of float32, random weights, random '
        f'images of {row["size"][1]}x{row["size"][0]}'
    )
    return f'{title}\n\n{_markdown([heads, *lines])}'


def _size(row: dict) -> str:
    return f'{row["case"]["width"]}x{row["case"]["height"]}'


def _column(row: dict) -> tuple:
    case = row['case']
    return case['height'] * case['width'], case['width'], case['batch']


def _all(row: dict) -> list[str]:
    return [*row['contenders'], *row['left_out']]


def _split(name: str) -> tuple[str, str]:
    model, _, way = name.partition(', ')
    return model, way
