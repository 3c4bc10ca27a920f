"""What a benchmark is run with: how often, on which models, and where its plots go."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.models import Bench, mid_bench, tiny_bench

MODELS = ("tiny", "mid")


@dataclass
class Settings:
    """Given to every benchmark.

    Args:
        output: folder of the results.
        rounds: timed runs of each contender; None for each benchmark's own number.
        dtype: of the mid-size model.
        models: of `MODELS`, those to measure.
    """

    output: Path
    rounds: int | None = None
    dtype: torch.dtype = torch.bfloat16
    models: tuple[str, ...] = MODELS
    _built: dict[str, Bench] = field(default_factory=dict)

    def rounds_or(self, default: int) -> int:
        return default if self.rounds is None else self.rounds

    def bench(self, name: str) -> Bench:
        """A model, built once."""
        if name not in self._built:
            self._built[name] = tiny_bench() if name == "tiny" else mid_bench(self.dtype)
        return self._built[name]

    def benches(self) -> list[Bench]:
        """All models to measure."""
        return [self.bench(name) for name in self.models]
