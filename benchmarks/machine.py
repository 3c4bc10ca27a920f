"""The limits of this machine: matrix products, and reading memory."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.report import Figure, Section
from benchmarks.settings import Settings
from benchmarks.timing import take_turns

ROWS, INNER, COLUMNS = 1025, 3200, 12800  # one tile through an MLP's first matrix
READ_BYTES = 2**30


def multiply_rate(dtype: torch.dtype, *, rounds: int) -> float:
    """Floating-point operations a second of one large matrix product."""
    left, right = torch.randn(ROWS, INNER).to(dtype), torch.randn(INNER, COLUMNS).to(dtype)
    output = torch.empty(ROWS, COLUMNS, dtype=dtype)
    seconds = take_turns({"mm": partial(torch.mm, left, right, out=output)}, rounds=rounds)["mm"]
    return 2 * ROWS * INNER * COLUMNS / statistics.median(seconds)


def read_rate(*, rounds: int) -> float:
    """Bytes a second of the fastest of three ways to read a gibibyte once."""
    numbers = torch.ones(READ_BYTES // 4)
    matrix = numbers.view(-1, 4096)
    vector = torch.ones(4096)
    ways: dict[str, Callable[[], Any]] = {
        "sum": numbers.sum,
        "amax": numbers.amax,
        "mv": partial(torch.mv, matrix, vector),
    }
    seconds = take_turns(ways, rounds=rounds)
    return READ_BYTES / min(statistics.median(taken) for taken in seconds.values())


def run(settings: Settings) -> Section:
    rounds = settings.rounds_or(7)
    with torch.inference_mode():
        rates = {str(dtype): multiply_rate(dtype, rounds=rounds) for dtype in (torch.float32, torch.bfloat16)}
        reading = read_rate(rounds=rounds)
    figures = [
        Figure(f"matrix product, {name.removeprefix('torch.')}", rate / 1e9, "GFLOP/s") for name, rate in rates.items()
    ]
    figures.append(Figure("reading memory", reading / 1e9, "GB/s"))
    return Section(
        "machine",
        f"one product ({ROWS} x {INNER}) ({INNER} x {COLUMNS}); reading 1 GiB",
        figures,
        {"multiply_flops": rates, "read_bytes_per_second": reading},
    )
