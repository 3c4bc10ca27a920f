"""Runs that take turns: what slows the machine for a while slows every contender."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def seconds_of(work: Callable[[], Any]) -> float:
    """How long one run takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def take_turns(contenders: Mapping[str, Callable[[], Any]], *, rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each contender in each round; all of them run in every round, after `warm_up` rounds that don't count.

    Every other round goes backwards, so that none always runs behind the same other one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-warm_up, rounds):
        names = list(contenders)
        for name in names if number % 2 == 0 else reversed(names):
            taken = seconds_of(contenders[name])
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def median_ratio(above: list[float], below: list[float]) -> float:
    """The median over the rounds of the ratio within each round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
