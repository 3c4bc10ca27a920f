"""The loss of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SMOOTHING = 0.9  # how much of the smoothed loss is kept from one entry to the next


def smooth(values: Sequence[float], *, keep: float = SMOOTHING) -> list[float]:
    """The running mean of values, older ones fading by `keep`; unbiased from the first value on."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed


def plot_loss(file: Path, log: Sequence[dict[str, Any]]) -> None:
    """Draw the loss, the smoothed loss and the learning rate over the steps into a PNG; nothing without a loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = [entry for entry in log if "loss" in entry]
    if not entries:
        return
    steps, losses = [entry["step"] for entry in entries], [entry["loss"] for entry in entries]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot()
    left.plot(steps, losses, color="tab:blue", alpha=0.3, label="loss")
    left.plot(steps, smooth(losses), color="tab:blue", label="smoothed loss")
    left.set_xlabel("step")
    left.set_ylabel("loss (nats a token)")
    right = left.twinx()
    right.plot(steps, [entry["learning_rate"] for entry in entries], color="tab:gray", ls="--", label="learning rate")
    right.set_ylabel("learning rate")
    left.legend(handles=[*left.get_lines(), *right.get_lines()], loc="upper right")
    figure.savefig(file, dpi=120)
