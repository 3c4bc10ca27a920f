"""Sums and differences in text, without a picture."""

import numpy as np

from tiny.page import Sample, in_test_split, rng_of


class Arithmetic:
    """A number below 100 and one below 10, added in either order or subtracted, with answers of at least 0.

    One problem in five is only for testing; a + b and b + a are one problem.
    """

    name = "arithmetic"

    def __init__(self, *, seed: int, split: str) -> None:
        self.seed, self.split = seed, split

    def sample(self, index: int) -> Sample:
        """The sample of that number."""
        rng = rng_of(self.name, seed=self.seed, split=self.split, index=index)
        return Sample(self.name, [], [self._problem(rng) for _ in range(4)])

    def _problem(self, rng: np.random.Generator) -> tuple[str, str]:
        while True:
            a, b = int(rng.integers(100)), int(rng.integers(10))
            sign = "+" if rng.random() < 0.5 else "-"
            large, small = max(a, b), min(a, b)
            if in_test_split(f"{large} {sign} {small}") == (self.split == "test"):
                break
        if sign == "-":
            return f"What is {large} - {small}?", str(large - small)
        first, second = (a, b) if rng.random() < 0.5 else (b, a)
        return f"What is {first} + {second}?", str(a + b)
