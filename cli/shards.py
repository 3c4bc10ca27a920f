"""Safetensors shards, written from others a block at a time (SPEC 2).

However large tensors and shards are, no more than a few blocks are in memory: sources are mapped, not read whole.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..checkpoint import Shape, printable
from .checkpoint_report import DTYPE_BITS, TensorInfo, read_header
from .checkpoint_source import StoredTensor

BLOCK_BYTES = 16_000_000
TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Piece:
    """A tensor to write.

    Args:
        name: its name in the shard to write.
        source: the tensor that it is made of.
        dtype: safetensors' name of its dtype.
        rows: spans (start, stop) of the source's first dimension that it is put together from.
        columns: how many of the source's second dimension it keeps, the first ones; None for all.
    """

    name: str
    source: StoredTensor
    dtype: str
    rows: tuple[tuple[int, int], ...]
    columns: int | None = None

    @property
    def shape(self) -> Shape:
        num_rows = sum(stop - start for start, stop in self.rows)
        rest = self.source.info.shape[1:]
        return (num_rows, *rest) if self.columns is None else (num_rows, self.columns, *rest[1:])

    @property
    def info(self) -> TensorInfo:
        """What the header of its shard says of it."""
        return TensorInfo(self.dtype, self.shape, math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8)


def whole_piece(tensor: StoredTensor, *, name: str | None = None, dtype: str | None = None) -> Piece:
    """A piece that is all of a tensor, by default under its own name and in its own dtype.

    Raises:
        ValueError: it is of no dtype that weights have, or has no dimensions.
    """
    if tensor.info.dtype not in TORCH_DTYPES or not tensor.info.shape:
        raise ValueError(
            f"Tensor {printable(tensor.name)} of {tensor.shard.name} is {tensor.info.dtype} {tensor.info.shape}, "
            f"expected one of {', '.join(TORCH_DTYPES)} with at least one dimension."
        )
    return Piece(name or tensor.name, tensor, dtype or tensor.info.dtype, rows=((0, tensor.info.shape[0]),))


def plan_shards(pieces: Iterable[Piece], *, max_bytes: int) -> dict[str, list[Piece]]:
    """{file name: its pieces}: in order, each file as full as `max_bytes` allows, a larger tensor alone in its own.

    Raises:
        ValueError: `max_bytes` is 0.
    """
    if max_bytes < 1:
        raise ValueError(f"The size of a shard is {max_bytes} bytes, expected at least 1.")
    groups: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if not groups or piece.info.num_bytes > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(piece)
        room -= piece.info.num_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, start=1)}


def total_bytes(pieces: Iterable[Piece]) -> int:
    return sum(piece.info.num_bytes for piece in pieces)


def is_written(path: Path, pieces: list[Piece]) -> bool:
    """Whether a file is all there and its header describes exactly these pieces."""
    try:
        header = read_header(path)
    except (OSError, ValueError):
        return False
    return not header.missing_bytes and header.tensors == {piece.name: piece.info for piece in pieces}


def write_shard(path: Path, pieces: list[Piece], *, scratch: Path, progress: Callable[[int], Any]) -> None:
    """Write a shard at one stroke: made and checked at `scratch`, on the same disk, then renamed.

    Every tensor's checksum is taken of what was meant to be written and compared with what the disk gives back.

    Args:
        path: the file to make.
        pieces: its tensors.
        scratch: where it is made; what lies there is overwritten.
        progress: called with the bytes of each block that has been written.

    Raises:
        ValueError: a value does not fit into the piece's dtype.
        OSError: the files cannot be read or written, or the disk gives back other bytes.
    """
    # As safetensors itself does: the widest dtype first, so that every tensor is aligned.
    pieces = sorted(pieces, key=lambda piece: -DTYPE_BITS[piece.dtype])
    header = _header(pieces)
    checksums: list[bytes] = []
    with scratch.open("wb") as file, ExitStack() as opened:
        handles: dict[Path, Any] = {}
        file.write(header)
        for piece in pieces:
            shard = piece.source.shard
            if shard not in handles:
                handles[shard] = opened.enter_context(safe_open(shard, framework="pt"))
            checksum = hashlib.sha256()
            for block in read_blocks(piece, handles[shard]):
                data = block.contiguous().flatten().view(torch.uint8).numpy().data
                file.write(data)
                checksum.update(data)
                progress(len(data))
            checksums.append(checksum.digest())
        file.flush()
        os.fsync(file.fileno())
    _verify(scratch, pieces, checksums, offset=len(header))
    os.replace(scratch, path)


def read_blocks(piece: Piece, handle: Any) -> Iterator[torch.Tensor]:
    """A piece's values in its dtype, some rows at a time, from the open source shard.

    Raises:
        ValueError: float16 is too narrow for a value.
    """
    values = handle.get_slice(piece.source.name)
    dtype = TORCH_DTYPES[piece.dtype]
    source = piece.source.info
    row_bytes = max(source.num_bytes // max(source.shape[0], 1), 1)
    num_rows = max(BLOCK_BYTES // row_bytes, 1)
    for first, last in piece.rows:
        for start in range(first, last, num_rows):
            stop = min(start + num_rows, last)
            block = values[start:stop] if piece.columns is None else values[start:stop, : piece.columns]
            converted = block.to(dtype)
            if piece.dtype == "F16" and (converted.isinf() & ~block.isinf()).any():
                raise ValueError(
                    f"Tensor {printable(piece.source.name)} has values up to {block.abs().max().item():.3g}, more than "
                    "float16 holds (65504): use bfloat16."
                )
            yield converted


def _header(pieces: list[Piece]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        start, end = end, end + piece.info.num_bytes
        entries[piece.name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": (start, end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _verify(path: Path, pieces: list[Piece], checksums: list[bytes], *, offset: int) -> None:
    """Read a written file again: its header must say what was planned, its bytes have the checksums."""
    if not is_written(path, pieces):
        raise OSError(f"{path} is not what was written to it: expected {len(pieces)} tensors. Is the disk sound?")
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            # Out of the page cache, so that it is the disk that answers.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(offset)
        for piece, expected in zip(pieces, checksums, strict=True):
            checksum = hashlib.sha256()
            left = piece.info.num_bytes
            while left:
                data = file.read(min(left, BLOCK_BYTES))
                if not data:
                    break
                checksum.update(data)
                left -= len(data)
            if checksum.digest() != expected:
                raise OSError(
                    f"{path} holds other values of {printable(piece.name)} than were written to it: run this again, "
                    "and check the disk if it happens twice."
                )
