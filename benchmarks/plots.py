"""Plots as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.fits import Fit


def plot_lines(
    file: Path,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    fits: Mapping[str, Fit] | None = None,
) -> Path:
    """Draw {name: (x, y)} as points and lines, and the straight lines that were fitted to some of them.

    Returns:
        The file, as `Section.plots` takes it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (x, y) in lines.items():
        found = (fits or {}).get(name)
        label = name if found is None else f"{name}: exponent {found.exponent:.2f}"
        [drawn] = axes.plot(x, y, marker="o", ls="" if found else "-", label=label)
        if found is not None:
            ends = [min(x), max(x)]
            axes.plot(ends, [found.constant + found.slope * end for end in ends], color=drawn.get_color(), lw=1)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    return file
