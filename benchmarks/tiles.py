"""Encoder time and memory against the number of tiles, 1 to 13: both must grow linearly."""

import statistics
from functools import partial
from typing import Any

import torch

from benchmarks.fits import Fit, fit
from benchmarks.models import Bench, random_tiles
from benchmarks.peaks import LiveTensors, peak_growth
from benchmarks.plots import plot_lines
from benchmarks.report import Figure, Section
from benchmarks.settings import Settings
from benchmarks.timing import seconds_of

TILES = {"tiny": tuple(range(1, 14)), "mid": (1, 2, 4, 7, 10, 13)}
ROUNDS = {"tiny": 9, "mid": 1}  # a tile takes the mid-size model seconds


def measure(bench: Bench, *, rounds: int) -> dict[str, list[float]]:
    """For each number of tiles: seconds, bytes of tensors at the peak, and by how much the process grew.

    Memory is watched in a run of its own where there are several, which takes some microseconds an operator; with a
    single one, of seconds, in that.
    """
    seconds: dict[int, list[float]] = {count: [] for count in TILES[bench.name]}
    memory: dict[int, tuple[int, int]] = {}
    with torch.no_grad():
        bench.model.extract_feature(random_tiles(bench, 1))
        for number in range(rounds if rounds == 1 else rounds + 1):
            for count, taken in seconds.items():
                encode = partial(bench.model.extract_feature, random_tiles(bench, count))
                if number:
                    taken.append(seconds_of(encode))
                    continue
                with LiveTensors() as live:
                    grown, watched = peak_growth(partial(seconds_of, encode))
                memory[count] = live.peak, grown
                if rounds == 1:
                    taken.append(watched)
    return {
        "tiles": list(seconds),
        "seconds": [statistics.median(taken) for taken in seconds.values()],
        "tensor_bytes": [tensors for tensors, _ in memory.values()],
        "process_bytes": [process for _, process in memory.values()],
    }


def run(settings: Settings) -> Section:
    figures, data, plots = [], dict[str, Any](), []
    for bench in settings.benches():
        found = measure(bench, rounds=settings.rounds_or(ROUNDS[bench.name]))
        fits: dict[str, Fit] = {name: fit(found["tiles"], found[name]) for name in ("seconds", "tensor_bytes")}
        data[bench.name] = found | {"fits": {name: vars(one) for name, one in fits.items()}}
        for name, label in (("seconds", "time"), ("tensor_bytes", "memory")):
            figures.append(Figure(f"{bench.name}: exponent of the encoder's {label} over tiles", fits[name].exponent))
        figures.append(Figure(f"{bench.name}: seconds a tile", fits["seconds"].slope, "s"))
        figures.append(Figure(f"{bench.name}: memory a tile", fits["tensor_bytes"].slope / 1e6, "MB"))
        for name, label, unit, scale in (("seconds", "time", "s", 1.0), ("tensor_bytes", "memory", "MB", 1e-6)):
            plots.append(
                plot_lines(
                    settings.output / f"tiles-{label}-{bench.name}.png",
                    {label: (found["tiles"], [value * scale for value in found[name]])},
                    title=f"Encoder {label} over tiles, {bench.name} model",
                    x_label="tiles",
                    y_label=unit,
                    fits={label: fit(found["tiles"], [value * scale for value in found[name]])},
                )
            )
    return Section("tiles", "encode and project 1 to 13 tiles at once", figures, data, plots)
