"""Several data files mixed by weights, in an order that can be asked for at any place (SPEC 8).

Draws come in blocks of `BLOCK`. Every block holds each source as often as its weight says, in an order of its own;
what a source gives is its lines in a new random order on each pass. So draw i needs nothing of the draws before it.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from .checks import check_keys, is_number, read_yaml, require
from .jsonl import JsonLines

BLOCK = 1000


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data file of a blend.

    Args:
        name: what logs call it.
        path: the JSON lines; pictures are named relative to its folder.
        weight: its share of the samples, relative to the others' weights.
    """

    name: str
    path: Path
    weight: float


@dataclass(frozen=True)
class Draw:
    """Which line of which source."""

    source: int
    line: int


def read_sources(path: str | Path) -> list[Source]:
    """The sources of a blend file: `sources: [{path: ..., weight: ..., name: ...}, ...]`, paths relative to it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no YAML, no sources, unknown keys, weights that are not above 0, or two of one name.
    """
    content = check_keys(read_yaml(path), where=str(path), known=["sources"], needed=["sources"])
    entries = content["sources"]
    expected = "a list of at least one {path, weight, name}"
    require(isinstance(entries, list) and len(entries) > 0, f"{path}: sources", entries, expected)
    sources = []
    for i, entry in enumerate(entries):
        where = f"{path}: sources[{i}]"
        check_keys(entry, where=where, known=["path", "weight", "name"], needed=["path", "weight"])
        file, weight = entry["path"], entry["weight"]
        require(isinstance(file, str) and file != "", f"{where}.path", file, "the path of a JSON lines file")
        require(is_number(weight) and weight > 0, f"{where}.weight", weight, "a number above 0")
        name = entry.get("name", Path(file).stem)
        require(isinstance(name, str) and name != "", f"{where}.name", name, "a text")
        sources.append(Source(name=name, path=Path(path).parent / file, weight=float(weight)))
    names = [source.name for source in sources]
    require(len(set(names)) == len(names), f"{path}: names", names, "names that are all different: give each a name")
    return sources


class Blend:
    """The endless sequence of draws from some sources; draw i is a function of the seed and i alone.

    Args:
        sources: the data files.
        seed: of all orders.

    Raises:
        FileNotFoundError, ValueError: a file is missing or has no samples; or a source's weight is too small to come
            up once in `BLOCK` draws.
    """

    def __init__(self, sources: list[Source], *, seed: int) -> None:
        self.sources = sources
        self.seed = seed
        self.files = [JsonLines(source.path) for source in sources]
        self.shares = _shares([source.weight for source in sources])
        for source, share in zip(sources, self.shares, strict=True):
            expected = f"at least 1/{BLOCK} of the sum of all weights"
            require(share > 0, f"weight of {source.name!r}", source.weight, expected)
        self._block = lru_cache(maxsize=4)(self._shuffled_block)
        self._pass = lru_cache(maxsize=2 * len(sources))(self._shuffled_pass)

    def __getstate__(self) -> dict[str, object]:
        return {"sources": self.sources, "seed": self.seed}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(state["sources"], seed=state["seed"])  # type: ignore[misc]

    def draw(self, index: int) -> Draw:
        """Which line of which source sample `index` is."""
        block, place = divmod(index, BLOCK)
        sources, ranks = self._block(block)
        source = int(sources[place])
        turn, rank = divmod(block * self.shares[source] + int(ranks[place]), len(self.files[source]))
        return Draw(source=source, line=int(self._pass(source, turn)[rank]))

    def _shuffled_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each of a block's draws the source, and how often that source came before in the block; (BLOCK,)."""
        order = np.random.default_rng((self.seed, 0, block)).permutation(
            np.repeat(range(len(self.shares)), self.shares)
        )
        ranks = np.empty(BLOCK, np.int64)
        for source, share in enumerate(self.shares):
            ranks[order == source] = np.arange(share)
        return order, ranks

    def _shuffled_pass(self, source: int, turn: int) -> np.ndarray:
        """The order of a source's lines on one pass, int (lines,)."""
        return np.random.default_rng((self.seed, 1, source, turn)).permutation(len(self.files[source]))


def _shares(weights: list[float]) -> list[int]:
    """How many of `BLOCK` draws each source gets: proportional, the largest remainders rounded up."""
    exact = np.array(weights) / sum(weights) * BLOCK
    shares = np.floor(exact).astype(int)
    for source in np.argsort(shares - exact, kind="stable")[: BLOCK - shares.sum()]:
        shares[source] += 1
    return [int(share) for share in shares]
