"""From samples to the model's inputs: rows padded on the right, or packed behind one another.

A packed row holds several samples; position ids begin anew at each, which is how transformers knows that they must not
see one another (`masking_utils.find_packed_sequence_indices`; only without an attention mask).

Logits are computed at places with loss alone: `logits_to_keep` says which columns hold any, and `shift_labels` are the
labels of those columns. With a vocabulary of 152064 the rest would cost more than a small decoder itself.

A batch without pictures gets a blank tile whose tokens stand after everything else: no loss depends on it, but encoder
and projector run in every batch. Devices that share the gradients or the weights wait for each other at each layer.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from .data import Item
from .encoding import IGNORED, Example


class Collator:
    """A list of samples -> a batch.

    Args:
        pad_token_id: what short rows are filled up with.
        image_token_id: the id at which features stand.
        num_image_token: tokens of a tile.
        tile_size: side of a tile in pixels.
        row_length: most tokens of a packed row; None for one sample a row.
    """

    def __init__(
        self, *, pad_token_id: int, image_token_id: int, num_image_token: int, tile_size: int, row_length: int | None
    ) -> None:
        self._pad_token_id = pad_token_id
        self._image_token_id = image_token_id
        self._num_image_token = num_image_token
        self._tile_size = tile_size
        self._row_length = row_length

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """The batch of some samples.

        Returns:
            `input_ids` (B, L); `attention_mask` (B, L), or packed `position_ids` (B, L); `pixel_values`
            (tiles, 3, S, S) in the order of the rows; `labels` and `shift_labels` (B, K) and `logits_to_keep` (K,),
            the columns whose next token has loss in any row; `counts`, numbers by name of what the batch is made of.
        """
        rows = self._rows([item.example for item in items])
        tiles = [example.tiles for row in rows for example in row if example.tiles is not None]
        if not tiles:
            tiles = [torch.zeros(1, 3, self._tile_size, self._tile_size)]
            rows[-1] = [*rows[-1], self._blank()]
        length = max(sum(len(example.input_ids) for example in row) for row in rows)
        input_ids = torch.full((len(rows), length), self._pad_token_id)
        labels = torch.full((len(rows), length), IGNORED)
        attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
        position_ids = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            start = 0
            for example in row:
                stop = start + len(example.input_ids)
                input_ids[i, start:stop] = example.input_ids
                labels[i, start:stop] = example.labels
                labels[i, start] = IGNORED  # a row's first token is predicted by nothing, a packed one's by a stranger
                attention_mask[i, start:stop] = 1
                position_ids[i, start:stop] = torch.arange(stop - start)
                start = stop
            position_ids[i, start:] = torch.arange(length - start)  # padding sees itself alone
        packed = self._row_length is not None
        return {
            "input_ids": input_ids,
            **({"position_ids": position_ids} if packed else {"attention_mask": attention_mask}),
            "pixel_values": torch.cat(tiles),
            **_loss_columns(labels),
            "counts": _counts(items, rows=len(rows) * length),
        }

    def _rows(self, examples: list[Example]) -> list[list[Example]]:
        """The samples of each row: packed, each in the first row that still has room, the longest first."""
        if self._row_length is None:
            return [[example] for example in examples]
        rows: list[list[Example]] = []
        room: list[int] = []
        for example in sorted(examples, key=lambda example: -len(example.input_ids)):
            size = len(example.input_ids)
            place = next((i for i, left in enumerate(room) if left >= size), len(rows))
            if place == len(rows):
                rows.append([])
                room.append(self._row_length)
            rows[place].append(example)
            room[place] -= size
        return rows

    def _blank(self) -> Example:
        ids = torch.full((self._num_image_token,), self._image_token_id)
        return Example(ids, torch.full_like(ids, IGNORED), None)


def _loss_columns(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the loss needs of labels (B, L): see the module's docstring."""
    shifted = torch.cat([labels[:, 1:], torch.full((len(labels), 1), IGNORED)], dim=1)  # [B, L]
    columns = (shifted != IGNORED).any(0).nonzero()[:, 0]  # [K]
    kept = shifted[:, columns]  # [B, K]
    return {"labels": kept, "shift_labels": kept, "logits_to_keep": columns}


def _counts(items: Sequence[Item], *, rows: int) -> dict[str, int]:
    """Samples, tokens, tokens with loss, places in all rows, tiles, samples of each source, skipped ones by reason."""
    examples = [item.example for item in items]
    return {
        "samples": len(items),
        "tokens": sum(len(example.input_ids) for example in examples),
        "answer_tokens": sum(int((example.labels != IGNORED).sum()) for example in examples),
        "places": rows,
        "tiles": sum(0 if example.tiles is None else len(example.tiles) for example in examples),
        **Counter(f"source/{item.source}" for item in items),
        **Counter(f"skipped/{reason}" for item in items for reason in item.skipped),
    }
