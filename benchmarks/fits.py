"""Whether a cost grows linearly: an affine fit, and the exponent of what is left without the constant."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Fit:
    """y = constant + slope * x by least squares, and y - constant ~ x ** exponent.

    Args:
        exponent: slope of log(y - constant) over log(x), 1 for a straight line.
        plain_exponent: slope of log(y) over log(x), which a constant flattens.
        worst: the largest distance of a point from the line, as a share of y.
    """

    constant: float
    slope: float
    exponent: float
    plain_exponent: float
    worst: float


def fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Fit points with positive coordinates.

    The exponent needs a constant that does not come from the assumption of a straight line: it is the one of
    y = constant + slope * x ** exponent, which is searched for over the exponent, the other two by least squares.

    Raises:
        ValueError: fewer than four points, or coordinates that aren't positive.
    """
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    if len(xs) < 4 or len(xs) != len(ys) or (xs <= 0).any() or (ys <= 0).any():
        raise ValueError(f"A fit needs at least four points with positive coordinates, got x {list(x)}, y {list(y)}.")
    slope, constant = np.polyfit(xs, ys, 1)
    exponents = np.arange(0.3, 3.001, 0.005)
    exponent = min(exponents, key=lambda power: _squares(xs**power, ys))
    return Fit(
        constant=float(constant),
        slope=float(slope),
        exponent=float(exponent),
        plain_exponent=float(np.polyfit(np.log(xs), np.log(ys), 1)[0]),
        worst=float(np.max(np.abs(constant + slope * xs - ys) / ys)),
    )


def _squares(xs: np.ndarray, ys: np.ndarray) -> float:
    """What is left of y after the best constant + slope * xs, weighted so that small values count as much as large."""
    design = np.stack([np.ones_like(xs), xs], axis=1) / ys[:, None]
    _, left, rank, _ = np.linalg.lstsq(design, np.ones_like(ys), rcond=None)
    return float(left[0]) if left.size else (0.0 if rank == 2 else np.inf)
