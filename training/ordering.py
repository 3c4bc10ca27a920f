"""Which samples share a micro-batch: with similar lengths together, less of a batch is padding."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

WINDOW = 32  # micro-batches that are sorted together


class LengthGroups:
    """A new order of draws, in which those of a micro-batch have similar lengths.

    Draws are taken in windows of `WINDOW` micro-batches, sorted by length and cut into micro-batches, which then go in
    random order. So place i is a function of the seed, i and the lengths in i's window alone.

    Args:
        length: draw index -> its approximate length in tokens.
        micro_batch_size: samples of a micro-batch.
        seed: of the order of micro-batches.
    """

    def __init__(self, length: Callable[[int], float], *, micro_batch_size: int, seed: int) -> None:
        self._length = length
        self._size = micro_batch_size
        self._seed = seed
        self._window = lru_cache(maxsize=2)(self._sorted_window)

    def __getstate__(self) -> dict[str, Any]:
        return {"length": self._length, "micro_batch_size": self._size, "seed": self._seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __call__(self, index: int) -> int:
        """The draw that stands at a place."""
        window, place = divmod(index, WINDOW * self._size)
        return int(self._window(window)[place])

    def _sorted_window(self, window: int) -> np.ndarray:
        """The draws of a window in their order, int64 (WINDOW * micro_batch_size,)."""
        count = WINDOW * self._size
        draws = np.arange(window * count, (window + 1) * count)
        lengths = np.array([self._length(int(draw)) for draw in draws])
        batches = draws[np.argsort(lengths, kind="stable")].reshape(WINDOW, self._size)  # [WINDOW, M]
        return np.random.default_rng((self._seed, 2, window)).permutation(batches).reshape(-1)
