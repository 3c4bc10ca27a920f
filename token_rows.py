"""Rows of token ids for one batch: shortened, padded to one length, and marked by what their text was."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any
from unicodedata import normalize

from transformers import PreTrainedTokenizerBase

from .conversation import Control, Segment
from .prompt import encode_text


def shorten(row: Sequence[int], *, max_length: int | None, truncation: Any, side: str) -> list[int]:
    """A row cut to `max_length`, where `truncation` asks for it, at the tokenizer's `truncation_side`.

    Raises:
        ValueError: a truncation without a length.
    """
    if truncation in (None, False, "do_not_truncate"):
        return list(row)
    if max_length is None:
        raise ValueError(f"truncation={truncation!r} needs max_length, the number of tokens to keep; got None.")
    return list(row[:max_length] if side == "right" else row[max(0, len(row) - max_length) :])


def pad(
    rows: Sequence[Sequence[int]],
    *,
    value: int | None,
    padding: Any,
    side: str,
    max_length: int | None = None,
    multiple: int | None = None,
) -> list[list[int]]:
    """Rows filled up with `value` at one side.

    Args:
        padding: True or "longest", "max_length", or False or "do_not_pad", as in transformers.
        multiple: the length is rounded up to a multiple of it.

    Raises:
        ValueError: an unknown `padding`, no length for "max_length", or no value to fill up with.
    """
    if padding in (None, False, "do_not_pad"):
        return [list(row) for row in rows]
    if padding not in (True, "longest", "max_length"):
        raise ValueError(f"padding is {padding!r}, expected True, 'longest', 'max_length', False or 'do_not_pad'.")
    length = max(map(len, rows))
    if padding == "max_length":
        if max_length is None:
            raise ValueError("padding='max_length' needs max_length, the number of tokens of a row; got None.")
        length = max_length
    length = -(-length // (multiple or 1)) * (multiple or 1)
    gaps = [length - len(row) for row in rows]
    if max(gaps) > 0 and value is None:
        raise ValueError("Rows of different lengths need padding, but the tokenizer has no pad_token: set one.")
    fill = [[value or 0] * gap for gap in gaps]
    return [[*gap, *row] if side == "left" else [*row, *gap] for gap, row in zip(fill, rows, strict=True)]


def token_marks(tokenizer: PreTrainedTokenizerBase, segments: Sequence[Segment], marked: Sequence[bool]) -> list[int]:
    """For each token of `encode_prompt(tokenizer, segments)`, 1 if any of its text is of a marked segment, else 0.

    Raises:
        ValueError: the tokenizer's tokens are not bytes of its text, as those of byte-level BPE are.
    """
    marks: list[int] = []
    pairs = zip(segments, marked, strict=True)
    for is_text, group in groupby(pairs, key=lambda pair: isinstance(pair[0], str)):
        if is_text:
            marks += _text_marks(tokenizer, [(str(text), mark) for text, mark in group])
        else:
            marks += [int(mark) for control, mark in group for _ in range(_count(control))]
    return marks


def _count(control: Segment) -> int:
    return control.count if isinstance(control, Control) else 0


def _text_marks(tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, bool]]) -> list[int]:
    run, byte_marks = "", list[bool]()  # byte_marks: one a byte of the run as the tokenizer normalises it
    for text, mark in texts:
        run += text
        size = len(normalize("NFC", run).encode())
        byte_marks += [mark] * (size - len(byte_marks))
        del byte_marks[size:]
    lengths = list(_token_sizes(tokenizer, encode_text(tokenizer, run)))
    if sum(lengths) != len(byte_marks):
        raise ValueError(
            f"Tokens cannot be matched to their text: {sum(lengths)} bytes of tokens for {len(byte_marks)} of text. "
            f"This needs a byte-level BPE tokenizer such as the checkpoint's, got {type(tokenizer).__name__}."
        )
    marks, start = [], 0
    for length in lengths:
        marks.append(int(any(byte_marks[start : start + length])))
        start += length
    return marks


def _token_sizes(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Iterator[int]:
    """How many bytes each token is long: one a character of its name, but for added tokens."""
    added = {token_id: len(token.content.encode()) for token_id, token in tokenizer.added_tokens_decoder.items()}
    for token_id in ids:
        yield added[token_id] if token_id in added else len(tokenizer.convert_ids_to_tokens(token_id))
