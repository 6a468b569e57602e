"""The picture of the result of ``scan_cpu.py``."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from scan_cpu_report import Figure, figures, short

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLOURS = ('#2b6ea6', '#e0902f', '#5f9f4e', '#9a6fb0')


@dataclass
class Panel:
    """Groups of bars; a value has a series, a group and a number of threads."""

    title: str
    unit: str
    log: bool = False
    values: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    marks: dict[tuple[str, str], float] = field(default_factory=dict)

    def add(
        self,
        series: str,
        group: str,
        threads: int,
        value: float,
        mark: float | None = None,
    ) -> None:
        """Add a value and the mark it is to meet."""
        self.values.setdefault(series, {}).setdefault(group, {})[threads] = value
        if mark is not None:
            self.marks[series, group] = mark

    def draw(self, axes: Axes) -> None:
        """Draw bars with their numbers, circles and marks."""
        axes.set_title(self.title, fontsize=12, fontweight='bold')
        axes.set_xlabel(self.unit)
        groups = list(dict.fromkeys(g for bars in self.values.values() for g in bars))
        height = 0.84 / max(1, len(self.values))
        for index, (series, bars) in enumerate(self.values.items()):
            shift = (index - (len(self.values) - 1) / 2) * height
            places = [groups.index(group) + shift for group in bars]
            most = [values[max(values)] for values in bars.values()]
            colour = COLOURS[index % len(COLOURS)]
            axes.barh(places, most, 0.9 * height, color=colour, label=series)
            for at, (group, values) in zip(places, bars.items()):
                self._annotate(
                    axes, at, height, values, self.marks.get((series, group))
                )
        axes.set_yticks(range(len(groups)), groups)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        if self.log:
            axes.set_xscale('log')
            axes.set_xlim(left=1)
        if len(self.values) > 1:
            axes.legend(
                loc='upper center',
                bbox_to_anchor=(0.5, -0.12),
                ncols=2 if len(self.values) > 3 else 3,
                fontsize=9,
                frameon=False,
            )

    def _annotate(
        self,
        axes: Axes,
        at: float,
        height: float,
        values: dict[int, float],
        mark: float | None,
    ) -> None:
        fewer = [value for count, value in values.items() if count < max(values)]
        axes.plot(fewer, [at] * len(fewer), 'o', mfc='white', mec='black', ms=5)
        ends = list(values.values())
        if mark is not None:
            axes.plot([mark] * 2, [at - 0.45 * height, at + 0.45 * height], 'k', lw=2.5)
            ends.append(mark)
        axes.annotate(
            short(values[max(values)]),
            (max(ends), at),
            xytext=(7, 0),
            textcoords='offset points',
            va='center',
            fontsize=9,
        )


def panels(result: dict) -> list[Panel]:
    """What there is to draw."""
    found = [
        _times_longer(result, 'forward'),
        _times_longer(result, 'forward + backward'),
        _panel(
            result,
            'Scan: floor of the machine / ours',
            'part of the floor reached',
            lambda f: f.ratio == 'floor / ours',
            lambda f: f'{f.which}, {f.case.partition(", ")[2]}',
            _shape_and_states,
        ),
        _panel(
            result,
            'SS2D: unfused / fused',
            'times the time of the fused form',
            lambda f: f.part == 'ss2d',
            lambda f: f.which,
            lambda f: f.shape.replace(', ', ',\n', 1),
        ),
        _networks(result),
        _panel(
            result,
            'Peak memory of forward + backward',
            'part (marks: at most)',
            lambda f: f.part == 'memory',
            lambda f: 'peak',
            lambda f: f'{f.which}:\n{f.ratio}'.replace(' (', '\n('),
        ),
    ]
    return [panel for panel in found if panel.values]


def _panel(
    result: dict,
    title: str,
    unit: str,
    wanted: Callable[[Figure], bool],
    series: Callable[[Figure], str],
    group: Callable[[Figure], str],
    log: bool = False,
) -> Panel:
    panel = Panel(title, unit, log)
    for figure in filter(wanted, figures(result)):
        panel.add(
            *(series(figure), group(figure), figure.threads, figure.value),
            figure.mark and figure.mark.must,
        )
    return panel


def _shape_and_states(figure: Figure) -> str:
    states = figure.case.partition(', ')[0]
    return f'{figure.shape}, {states}'.replace(', ', ',\n', 1)


def _times_longer(result: dict, which: str) -> Panel:
    def wanted(figure: Figure) -> bool:
        return (
            figure.part == 'op'
            and figure.which == which
            and figure.ratio != 'floor / ours'
            and figure.case.endswith('channels-last')
        )

    return _panel(
        result,
        f'Scan, {which}: peer / ours',
        'times our time on channels-last tensors',
        wanted,
        lambda f: f.ratio.removesuffix(' / ours'),
        _shape_and_states,
        log=True,
    )


def _networks(result: dict) -> Panel:
    panel = Panel('One image of 224 through VMamba-T', 'ms')
    for row in result.get('network', []):
        for core, times in row['seconds'].items():
            panel.add(core, row['name'], row['threads'], 1e3 * times['median'])
    return panel


def plot(result: dict, path: Path) -> Path:
    """Draw the result.

    Args:
        result: What ``scan_cpu.py`` writes; parts may be missing.
        path: Of the picture to write.

    Returns:
        ``path``.
    """
    drawn = panels(result)
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(7 * columns, 5.2 * rows + 0.6),
        layout='constrained',
        squeeze=False,
    )
    for panel, place in zip(drawn, axes.flat):
        panel.draw(place)
    for place in axes.flat[len(drawn) :]:
        place.axis('off')
    *fewer, most = sorted(result['settings']['threads'])
    circles = f', circles: {", ".join(map(str, fewer))}' if fewer else ''
    figure.suptitle(
        f'mmvssm cpu backend, float32, {result["environment"]["Machine"]["CPU"]}. '
        f'Bars: {most} threads{circles}. Black strokes: marks.'
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path
