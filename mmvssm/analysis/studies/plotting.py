"""The look of the studies' pictures.

Maps are drawn in colours that the colour-blind can read (``viridis``, ``cividis`` for
matrices). Maps that are compared get one range and one colour bar. Curves differ in
colour, line and marker. Legends stand outside of the axes, so that nothing is cut off.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

# Okabe and Ito's colours without yellow, which is faint on white.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
LINES = ('-', '--', '-.', ':')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')
MAP_COLOURS = 'viridis'
_DPI = 120
_CELL = 1.9
_FONT = 9


def new_sheet(
    rows: int, columns: int, cell: tuple[float, float] | float = _CELL
) -> tuple[Figure, np.ndarray]:
    """A figure with panels for maps.

    Args:
        rows, columns: Number of panels.
        cell: Width and height of a panel in inches, or both.

    Returns:
        The figure, and its panels (rows, columns) without ticks.
    """
    width, height = cell if isinstance(cell, tuple) else (cell, cell)
    figure = Figure(
        figsize=(columns * width + 1.0, rows * height + 0.5), layout='constrained'
    )
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    return figure, panels


def cell_for(size: tuple[int, int], longer: float = _CELL) -> tuple[float, float]:
    """Width and height in inches of a panel for maps of a height and width."""
    height, width = size
    scale = longer / max(height, width)
    return max(width * scale, 0.6), max(height * scale, 0.6)


def new_plot(
    columns: int = 1, rows: int = 1, cell: tuple[float, float] = (4.2, 3.0)
) -> tuple[Figure, np.ndarray]:
    """A figure with axes (rows, columns) for curves."""
    figure = Figure(
        figsize=(columns * cell[0], rows * cell[1] + 0.5), layout='constrained'
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.tick_params(which='both', labelsize=_FONT - 1)
        axis.spines[['top', 'right']].set_visible(False)
    return figure, axes


def show_image(panel: Axes, pixels: np.ndarray) -> None:
    """Draw a picture, RGB uint8 (H, W, 3)."""
    panel.imshow(pixels)


def show_map(
    panel: Axes,
    values: Any,
    low: float,
    high: float,
    colours: str = MAP_COLOURS,
    over: np.ndarray | None = None,
) -> None:
    """Draw a map (h, w) in a range.

    Args:
        panel: Where.
        values: The map.
        low, high: The range; the same for maps that are compared.
        colours: Name of a colour map.
        over: Picture (H, W, 3) to lay it over. The map is stretched to its size.
    """
    values = np.asarray(values, dtype=np.float64)
    options = dict(cmap=colours, vmin=low, vmax=high, interpolation='nearest')
    if over is None:
        panel.imshow(values, **options)
        return
    height, width = over.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    panel.imshow(over, extent=extent)
    panel.imshow(values, extent=extent, alpha=0.6, **options)


def add_colour_bar(
    figure: Figure,
    panels: Sequence[Axes] | np.ndarray,
    low: float,
    high: float,
    label: str,
    colours: str = MAP_COLOURS,
) -> None:
    """Draw the colour bar of some panels, at their right."""
    norm = Normalize(low, high if high > low else low + 1e-12)
    bar = figure.colorbar(
        ScalarMappable(norm, colours),
        ax=list(np.ravel(panels)),
        fraction=0.03,
        pad=0.02,
        aspect=25,
    )
    bar.set_label(label, fontsize=_FONT)
    bar.ax.tick_params(labelsize=_FONT - 2)
    bar.outline.set_visible(False)


def label_columns(panels: np.ndarray, titles: Sequence[str]) -> None:
    """Write titles over the first row of panels."""
    for panel, title in zip(panels[0], titles):
        panel.set_title(wrap(title), fontsize=_FONT)


def label_rows(panels: np.ndarray, titles: Sequence[str]) -> None:
    """Write titles at the left of the first column of panels."""
    for panel, title in zip(panels[:, 0], titles):
        panel.set_ylabel(wrap(title), fontsize=_FONT)


def style(index: int) -> dict[str, Any]:
    """Colour, line and marker of the curve with this number."""
    return dict(
        color=COLOURS[index % len(COLOURS)],
        linestyle=LINES[index % len(LINES)],
        marker=MARKERS[index % len(MARKERS)],
        markersize=4,
        linewidth=1.5,
    )


def scale_y(axis: Axes, values: Sequence[float]) -> None:
    """Make the vertical axis logarithmic if the values spread over a factor of ten."""
    if min(values) > 0 and max(values) > 10 * min(values):
        axis.set_yscale('log')
        axis.yaxis.set_minor_formatter(NullFormatter())


def add_legend(figure: Figure, axis: Axes, columns: int | None = None) -> None:
    """Write the legend of an axis below all axes of the figure."""
    handles, labels = axis.get_legend_handles_labels()
    if not handles:
        return
    longest = max(map(len, labels))
    fit = max(1, int(figure.get_figwidth() / (0.075 * longest + 0.6)))
    figure.legend(
        handles,
        labels,
        loc='outside lower center',
        ncols=min(columns or fit, len(labels)),
        fontsize=_FONT,
        frameon=False,
    )


def wrap(text: str, width: int = 18) -> str:
    """Break a long label at spaces and underscores."""
    lines, line = [], ''
    for word in _words(text):
        if line and len(line) + len(word.rstrip()) > width:
            lines.append(line.rstrip())
            line = ''
        line += word
    return '\n'.join([*lines, line.rstrip()])


def _words(text: str) -> list[str]:
    words, word = [], ''
    for letter in text:
        word += letter
        if letter in ' _':
            words.append(word)
            word = ''
    return [*words, word]


def save(figure: Figure, path: Path) -> Path:
    """Write a figure, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Tight, because labels may stand beyond the edge that the layout assumes.
    figure.savefig(path, dpi=_DPI, bbox_inches='tight', pad_inches=0.08)
    return path
