"""The picture of the result of ``models_cpu.py``."""

from pathlib import Path

import matplotlib
from models_cpu_report import FIRST_WAY, baseline, groups, models, speed, times, ways
from scan_cpu_report import short

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Of Okabe and Ito: told apart by colour-blind readers, and neighbours in grey, too.
# Black text can be read on all of them.
COLOURS = ('#56B4E9', '#D55E00', '#F0E442', '#009E73')
COMPILED = FIRST_WAY.replace('eager', 'compiled')


def plot(result: dict, against: str, path: Path) -> Path:
    """Draw speeds relative to ``against``, with as many threads as were measured.

    Returns:
        ``path``.
    """
    timed = [row for row in result['rows'] if 'case' in row]
    against = baseline(timed, against)
    most = max(row['case']['threads'] for row in timed)
    drawn = {
        mode: same for mode, threads, same in groups(result['rows']) if threads == most
    }
    sizes = list(dict.fromkeys(_size(row) for same in drawn.values() for row in same))
    names = models(timed)
    figure, panels = plt.subplots(
        len(drawn),
        len(sizes),
        figsize=(1.5 + 5 * len(sizes), 1.4 + 0.52 * len(names) * len(drawn)),
        layout='constrained',
        squeeze=False,
        sharey=True,
    )
    for line, (mode, same) in zip(panels, drawn.items()):
        for panel, size in zip(line, sizes):
            _panel(panel, [row for row in same if _size(row) == size], names, against)
            panel.set_title(f'{mode}, {size[1]}x{size[0]}', fontweight='bold')
            panel.set_xlabel(f'speed / speed of {against}')
    machine = result['runs'][-1]['environment']['Machine']
    diamonds = '. Diamonds: both by torch.compile' if COMPILED in ways(timed) else ''
    figure.suptitle(
        f'{FIRST_WAY.partition(",")[0]}, {most} thread{"s" * (most > 1)}, '
        f'{machine["CPU"]}.\nNumbers: images a second{diamonds}'
    )
    handles = {}
    for panel in panels.flat:
        handles |= dict(zip(*panel.get_legend_handles_labels()[::-1]))
    figure.legend(
        handles.values(),
        handles,
        loc='outside lower center',
        ncols=len(handles),
        frameon=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def _panel(panel: Axes, rows: list[dict], names: list[str], against: str) -> None:
    height = 0.8 / max(1, len(rows))
    for index, row in enumerate(rows):
        colour = COLOURS[index % len(COLOURS)]
        label = f'batch {row["case"]["batch"]}'
        for place, name in enumerate(names):
            at = place + (index - (len(rows) - 1) / 2) * height
            ratio = times(row, name, FIRST_WAY, against)
            other = times(row, name, COMPILED, against)
            if ratio is None:
                panel.text(0, at, ' not measured', va='center', fontsize=8)
                continue
            panel.barh(at, ratio, 0.92 * height, color=colour, label=label)
            label = None
            if other is not None:
                panel.plot(other, at, 'D', mfc='white', mec='black', ms=5)
            panel.text(
                0.01,
                at,
                short(speed(row, name, FIRST_WAY)),
                transform=panel.get_yaxis_transform(),
                va='center',
                fontsize=8,
            )
    panel.axvline(1, color='black', lw=1)
    panel.set_yticks(range(len(names)), names)
    if not panel.yaxis_inverted():
        panel.invert_yaxis()
    panel.set_xlim(left=0)
    panel.spines[['top', 'right']].set_visible(False)


def _size(row: dict) -> tuple[int, int]:
    return row['case']['height'], row['case']['width']
