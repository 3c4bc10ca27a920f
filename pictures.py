"""One picture of a conversation: its tiles, and a key of what they hold."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True, eq=False)
class Picture:
    """The tiles of one picture, as pixels or already encoded.

    Args:
        tiles: (tiles, C, S, S) pixels, or (tiles, tokens, D) pixel-shuffled features.
        is_encoded: whether they are features.
    """

    tiles: torch.Tensor
    is_encoded: bool

    @cached_property
    def key(self) -> str:
        """SHA-256 of the tiles' kind, dtype, shape and bytes: equal for equal pictures, whoever sent them."""
        digest = hashlib.sha256(f"{self.is_encoded} {self.tiles.dtype} {tuple(self.tiles.shape)}".encode())
        for tile in self.tiles.detach():
            digest.update(tile.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


def split_pictures(tiles: torch.Tensor | None, num_tiles: Sequence[int], *, is_encoded: bool) -> list[Picture]:
    """The pictures whose tiles lie one after the other; views, not copies."""
    return [] if tiles is None else [Picture(part, is_encoded) for part in tiles.split(list(num_tiles))]
