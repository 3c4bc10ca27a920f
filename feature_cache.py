"""Pictures are encoded once: features by what a picture holds, within a budget of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from .pictures import Picture

DEFAULT_BYTES = 2**29


class FeatureCache:
    """Pixel-shuffled features of pictures seen before; where bytes run out, those unused for the longest time go.

    Sessions and threads may share one. A picture is known by the SHA-256 of its tiles, so nobody reaches the features
    of a picture that they do not have themselves.

    Args:
        max_bytes: the budget. A picture that is larger by itself is encoded whenever it is asked for.

    Raises:
        ValueError: a negative budget.
    """

    def __init__(self, *, max_bytes: int = DEFAULT_BYTES) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes is {max_bytes}, expected 0 (nothing is kept) or more.")
        self.max_bytes = max_bytes
        self._features: OrderedDict[tuple[str, int], torch.Tensor] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Callable[..., "FeatureCache"], tuple[int]]:
        """A copy, such as that of a copied model, is empty."""
        return _empty, (self.max_bytes,)

    def __len__(self) -> int:
        return len(self._features)

    @property
    def nbytes(self) -> int:
        """Bytes of the features held."""
        return self._nbytes

    def clear(self) -> None:
        """Forget all pictures."""
        with self._lock:
            self._features.clear()
            self._nbytes = 0

    def features(
        self, pictures: Sequence[Picture], *, encode: Callable[[torch.Tensor], torch.Tensor], version: int = 0
    ) -> list[torch.Tensor]:
        """The features (tiles, tokens, D) of each picture; those not known yet are encoded, all at once.

        Args:
            pictures: pixels, or features that stand for themselves.
            encode: pixels (tiles, C, S, S) -> features (tiles, tokens, D).
            version: of the encoder's weights; features made by another version are not used.
        """
        found = {picture.key: picture.tiles for picture in pictures if picture.is_encoded}
        with self._lock:
            for picture in pictures:
                known = self._features.get((picture.key, version))
                if known is not None:
                    self._features.move_to_end((picture.key, version))
                    found[picture.key] = known
        missing = {picture.key: picture.tiles for picture in pictures if picture.key not in found}
        if missing:
            tiles = list(missing.values())
            encoded = encode(tiles[0] if len(tiles) == 1 else torch.cat(tiles))
            for key, features in zip(missing, encoded.split([len(part) for part in tiles]), strict=True):
                found[key] = features
                self._keep((key, version), features)
        return [found[picture.key] for picture in pictures]

    def _keep(self, key: tuple[str, int], features: torch.Tensor) -> None:
        if features.nbytes > self.max_bytes:
            return
        if features.nbytes < features.untyped_storage().nbytes():
            features = features.clone()  # a view would hold all pictures that were encoded with this one
        with self._lock:
            if key in self._features:
                return
            self._features[key] = features
            self._nbytes += features.nbytes
            while self._nbytes > self.max_bytes:
                _, oldest = self._features.popitem(last=False)
                self._nbytes -= oldest.nbytes


def _empty(max_bytes: int) -> FeatureCache:
    return FeatureCache(max_bytes=max_bytes)
