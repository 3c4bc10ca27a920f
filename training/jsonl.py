"""A JSON Lines file by line number, without its lines in memory: only where each begins and ends."""

import os
from pathlib import Path
from typing import Any

import numpy as np

_CHUNK = 1 << 24


class JsonLines:
    """The lines of a file that are not blank.

    Safe in forked and in spawned workers: reading moves no shared file position.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: all its lines are blank.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such file, expected JSON lines, one sample a line.")
        self._starts, self._ends = _line_bounds(self.path)
        if len(self._starts) == 0:
            raise ValueError(f"{path} has no samples: expected JSON lines, one sample a line.")
        self._descriptor: int | None = None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> bytes:
        """The text of one line, without its end."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        start, end = int(self._starts[index]), int(self._ends[index])
        return os.pread(self._descriptor, end - start, start)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]

    def number(self, index: int) -> int:
        """The number of a line in its file, as editors count: from 1, blank lines counted. Reads the file up to it."""
        left, number = int(self._starts[index]), 1
        with self.path.open("rb") as file:
            while left > 0 and (chunk := file.read(min(left, _CHUNK))):
                number += chunk.count(b"\n")
                left -= len(chunk)
        return number

    def place(self, index: int) -> str:
        """How messages name a line."""
        return f"{self.path}, line {self.number(index)}"


def _line_bounds(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Where the lines begin and end, in bytes, for all lines that are not blank, each int64 (lines,)."""
    breaks, offset, last = [], 0, b""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + offset)
            offset += len(chunk)
            last = chunk[-1:]
    ends = np.concatenate([*breaks, np.array([offset] if last not in (b"", b"\n") else [], np.int64)])
    ends = ends.astype(np.int64)
    starts = np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1] + 1])
    kept = ends > starts
    with path.open("rb") as file:
        for line in np.flatnonzero(ends - starts == 1):  # a carriage return alone is a blank line too
            file.seek(starts[line])
            kept[line] = file.read(1) != b"\r"
    return starts[kept], ends[kept]
