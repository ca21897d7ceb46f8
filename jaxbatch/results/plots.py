"""The style of all figures: colours for colour-blind readers, plain axes, and both PNG and PDF from one drawing."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxbatch.intervals import Interval

# Okabe and Ito's palette: people with any common form of colour blindness can distinguish its colours, in print too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

FINGERPRINT = "Numbers"  # the key of a figure's fingerprint in its PNG

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}


def subplots(*args, **kwargs):
    """``plt.subplots`` in the common style, drawn without a display."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        return plt.subplots(*args, **kwargs)


def save(figure, folder: pathlib.Path, name: str = "figure") -> pathlib.Path:
    """Writes ``name.png`` and ``name.pdf`` into ``folder`` and returns the PNG's path. The PNG carries the figure's :func:`fingerprint`."""
    import matplotlib
    from matplotlib import pyplot as plt

    path = folder / f"{name}.png"
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, metadata={FINGERPRINT: fingerprint(figure)})
        figure.savefig(path.with_suffix(".pdf"))
    plt.close(figure)
    return path


def fingerprint(figure) -> str:
    """A hash of the numbers and words that a figure shows. Fonts, colours and sizes do not change it.

    So two drawings can be compared although another release of matplotlib draws other pixels.

    Example:
        >>> drawings = [subplots() for _ in range(3)]
        >>> for (_, axes), value in zip(drawings, (1.0, 1.0 + 1e-9, 1.1)):
        ...     _ = axes.plot([0, 1], [0.0, value], label="loss")
        >>> one, almost, other = (fingerprint(figure) for figure, _ in drawings)
        >>> one == almost, one == other
        (True, False)
    """
    shown: list[Any] = [figure.get_suptitle()]
    for axes in figure.axes:
        shown += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), *(text.get_text() for text in axes.texts)]
        for line in axes.lines:
            shown += [line.get_label(), line.get_xydata()]
        for collection in axes.collections:
            shown += [path.vertices for path in collection.get_paths()] + [collection.get_offsets()]
        shown += [[patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height()] for patch in axes.patches if hasattr(patch, "get_width")]
        shown += [image.get_array() for image in axes.images]
    words = [one if isinstance(one, str) else _rounded(one) for one in shown]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


def _rounded(values) -> list[str]:
    """Four digits of every number: sums in another order may differ in the last ones."""
    numbers: np.ndarray = np.ravel(np.ma.filled(np.ma.asarray(values, float), np.nan))
    return [f"{float(value):.4g}" for value in np.where(np.abs(numbers) < 1e-12, 0.0, numbers)]


def band(axes, x: Sequence[float], intervals: Sequence[Interval], *, color: str, scale: float = 1.0, **style) -> None:
    """Draws a line through the values, with their intervals as a band; a place without an interval has no band."""
    values, lows, highs = (scale * np.array([interval[k] for interval in intervals]) for k in range(3))
    axes.plot(x, values, color=color, **style)
    axes.fill_between(x, np.where(np.isnan(lows), values, lows), np.where(np.isnan(highs), values, highs), color=color, alpha=0.2, lw=0)


def size_ticks(axes, sizes: Sequence[int]) -> None:
    """Makes the x-axis logarithmic, with marks at the measured batch sizes."""
    axes.set_xscale("log")
    axes.set_xticks(list(sizes), [f"{size:,}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("batch size")


def log_values(axis) -> None:
    """Makes an axis logarithmic, with plain numbers: 0.2, 1, 50, 10,000."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if axis.get_scale() != "log":
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    decades = np.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,), numticks=20))
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 and value == round(value) else f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def heat_map(
    axes,
    table: np.ndarray,
    write: Callable[[float], str],
    crossed: np.ndarray,
    *,
    log: bool = False,
    reverse: bool = False,
    label: str,
) -> None:
    """Draws a table as coloured cells with their numbers. Cells without a number are grey; ``crossed`` cells have a cross."""
    from matplotlib import colormaps, colors

    finite = table[np.isfinite(table)]
    ends = (finite.min(), finite.max()) if len(finite) else (1.0, 2.0)
    low = max(ends[0], 1e-3) if log else ends[0]
    high = max(ends[1], low * (1.5 if log else 1.01) + 1e-9)
    norm = (colors.LogNorm if log else colors.Normalize)(low, high, clip=True)
    colormap = colormaps["cividis_r" if reverse else "cividis"].with_extremes(bad="#E6E6E6")
    image = axes.imshow(np.ma.masked_invalid(table), cmap=colormap, norm=norm, aspect="auto", origin="lower")
    for row, column in np.ndindex(table.shape):
        value = table[row, column]
        cross = "× " if crossed[row, column] else ""
        if not np.isfinite(value):
            axes.text(column, row, "×" if cross else "–", ha="center", va="center", color="#666666")
            continue
        red, green, blue, _ = colormap(norm(value))  # type: ignore[arg-type]
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(column, row, cross + write(value), ha="center", va="center", color="white" if dark else "black", fontsize=9.5)  # type: ignore[arg-type]
    axes.grid(False)
    bar = axes.figure.colorbar(image, ax=axes, label=label, shrink=0.9)
    if log:
        log_values(bar.ax.yaxis)


def frame_cell(axes, column: int, row: int) -> None:
    """Draws a frame around one cell of a heat map."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, ec=COLORS[1], lw=2.5, zorder=3, clip_on=False))
