"""What the decoder has read already: token ids, the tiles among them, and the KV cache that goes on from there."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, QuantizedCache

from .pictures import Picture


@dataclass(frozen=True)
class Prompt:
    """What the decoder is to read.

    Args:
        ids: token ids, `image_token_id` at each place of a feature.
        pictures: those whose features stand there, in order.
    """

    ids: list[int]
    pictures: list[Picture]

    @property
    def tile_keys(self) -> list[tuple[str, int]]:
        """One key a tile: its picture's, and its number there."""
        return [(picture.key, i) for picture in self.pictures for i in range(len(picture.tiles))]


@dataclass(frozen=True)
class Slots:
    """How tiles lie in prompts.

    Args:
        token_id: the token that stands at a place of a feature (the config's `image_token_id`).
        per_tile: features of a tile (the config's `num_image_token`).
    """

    token_id: int
    per_tile: int

    def whole_tiles(self, ids: Sequence[int]) -> int:
        """How many whole tiles some ids hold."""
        return list(ids).count(self.token_id) // self.per_tile

    def start_of(self, ids: Sequence[int], tile: int) -> int:
        """Where the features of a tile begin."""
        places = (i for i, token_id in enumerate(ids) if token_id == self.token_id)
        return next(place for count, place in enumerate(places) if count == tile * self.per_tile)


def count_equal(left: Sequence[object], right: Sequence[object]) -> int:
    """How many items at the beginning of two sequences are the same."""
    pairs = zip(left, right, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def shared_length(
    left: Sequence[int],
    left_tiles: Sequence[tuple[str, int]],
    right: Sequence[int],
    right_tiles: Sequence[tuple[str, int]],
    *,
    slots: Slots,
) -> int:
    """How many tokens at the beginning of two prompts are the same, pictures included; never a part of a tile."""
    length = count_equal(left, right)
    placeholders = list(left[:length]).count(slots.token_id)
    tiles = min(placeholders // slots.per_tile, count_equal(left_tiles, right_tiles))
    if tiles * slots.per_tile < placeholders:
        length = slots.start_of(left, tiles)
    return length


class Prefix:
    """A KV cache, and the ids and tiles that were read into it.

    A cache of transformers' plain kind (`DynamicCache`, offloaded or not) can be cut to any length and shared between
    forks: reading on makes new tensors. A quantised one can only be gone on from where it ends.
    """

    def __init__(self, ids: Sequence[int], tile_keys: Sequence[tuple[str, int]], cache: Cache) -> None:
        self.ids = list(ids)
        self.tile_keys = list(tile_keys)
        self.cache = cache

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values, where they are plain tensors."""
        layers = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in self.cache.layers]
        return sum(states.nbytes for layer in layers for states in layer if isinstance(states, torch.Tensor))

    def reusable(self, prompt: Prompt, *, slots: Slots) -> int:
        """How many tokens of a prompt need not be read again; at least its last one must be."""
        shared = shared_length(self.ids, self.tile_keys, prompt.ids, prompt.tile_keys, slots=slots)
        if shared >= len(prompt.ids):
            last_tile_starts = slots.whole_tiles(prompt.ids) - 1
            shared = len(prompt.ids) - 1
            if prompt.ids[-1] == slots.token_id:
                shared = slots.start_of(prompt.ids, last_tile_starts)
        return shared if shared == len(self.ids) or can_be_cut(self.cache) else 0

    def cut(self, length: int, *, slots: Slots) -> None:
        """Forget what follows the first `length` tokens."""
        if length < len(self.ids):
            self.ids = self.ids[:length]
            self.tile_keys = self.tile_keys[: slots.whole_tiles(self.ids)]
            for layer in plain_layers(self.cache):
                layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]

    def fork(self) -> "Prefix | None":
        """A prefix that goes its own way from here and shares the tensors so far; None if the cache can't be shared."""
        if not can_be_cut(self.cache):
            return None
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return Prefix(self.ids, self.tile_keys, cache)


def plain_layers(cache: Cache) -> list[Any]:
    """The layers of a cache that can be cut: `keys` and `values` are tensors (1, heads, L, D)."""
    return list(cache.layers)


def can_be_cut(cache: Cache) -> bool:
    """Whether each layer of a cache is a pair of tensors that hold all positions."""
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def can_go_on(cache: object) -> bool:
    """Whether a later call can read on from a cache: those of fixed length can't."""
    return isinstance(cache, QuantizedCache) or (isinstance(cache, DynamicCache) and can_be_cut(cache))


def stack(prefixes: Sequence[Prefix]) -> DynamicCache:
    """One cache with a prefix a row, shorter ones padded on the left; the attention mask must say where.

    The prefixes must be of caches that can be cut.
    """
    longest = max(len(prefix.ids) for prefix in prefixes)
    cache = DynamicCache()
    for i in range(len(prefixes[0].cache.layers)):
        layers = [plain_layers(prefix.cache)[i] for prefix in prefixes]
        keys = torch.cat([pad_left(layer.keys, longest) for layer in layers])  # [B, heads, L, D]
        values = torch.cat([pad_left(layer.values, longest) for layer in layers])  # [B, heads, L, D]
        cache.update(keys, values, i)
    return cache


def pad_left(states: torch.Tensor, length: int) -> torch.Tensor:
    """Keys or values (1, heads, l, D) -> (1, heads, length, D), zeros in front."""
    return nn.functional.pad(states, (0, 0, length - states.shape[2], 0))
