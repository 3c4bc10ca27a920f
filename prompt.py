"""From segments to token ids: pictures stand in the text, and text cannot become control tokens (SPEC 6 and 9)."""

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .conversation import CONTROL_TOKENS, Content, Control, ConversationTemplate, Message, Segment, Tokens
from .tile_tags import tile_tags

IMAGE_PLACEHOLDER = "<image>"


def picture_segments(
    tags: Sequence[str], *, num_image_token: int, image_token: str, start: str = "<Image>", end: str = "</Image>"
) -> list[Segment]:
    """A picture in the prompt: each tile's tag, then `num_image_token` slots for its features."""
    segments: list[Segment] = [start]
    for tag in tags:
        segments += [tag, Control(image_token, num_image_token)]
    return [*segments, end]


def config_picture(
    config: Any,
    num_tiles: int,
    *,
    image_token: str,
    grid: tuple[int, int] | None = None,
    start: str = "<Image>",
    end: str = "</Image>",
) -> list[Segment]:
    """A picture of `num_tiles` tiles in the prompt, with the tags that a model's config asks for.

    Args:
        config: an `NVLM_D_Config`, or whatever has its fields.
        grid: (columns, rows) of the tiles, for the 2-D tags.
    """
    tags = tile_tags(
        num_tiles,
        kind=config.tile_tag,
        thumbnail_tag=config.thumbnail_tag,
        has_thumbnail=config.use_thumbnail,
        grid=grid,
        tile_size=config.tile_size,
    )
    return picture_segments(tags, num_image_token=config.num_image_token, image_token=image_token, start=start, end=end)


def place_pictures(text: str, pictures: Sequence[Sequence[Segment]]) -> list[Segment]:
    """Replace each `<image>` of a user's text by a picture, in order.

    Raises:
        ValueError: there are more or fewer `<image>` than pictures.
    """
    runs = text.split(IMAGE_PLACEHOLDER)
    if len(runs) - 1 != len(pictures):
        raise ValueError(f"The text has {len(runs) - 1} {IMAGE_PLACEHOLDER!r} for {len(pictures)} pictures.")
    segments: list[Segment] = [runs[0]]
    for picture, run in zip(pictures, runs[1:], strict=True):
        segments += [*picture, run]
    return segments


def place_in_turns(questions: Sequence[str], pictures: Sequence[Sequence[Segment]]) -> list[Content]:
    """The questions of a conversation with its pictures, in order, in the places of their `<image>`.

    Without any pictures `<image>` is text.
    """
    if not pictures:
        return list(questions)
    contents: list[Content] = []
    remaining = list(pictures)
    for question in questions:
        count = question.count(IMAGE_PLACEHOLDER)
        contents.append(place_pictures(question, remaining[:count]))
        remaining = remaining[count:]
    return contents


def render_turns(
    template: ConversationTemplate, turns: Sequence[tuple[Content, str | Tokens | None]], *, system: str | None
) -> list[Segment]:
    """A conversation as the prompt that asks for its next answer.

    Args:
        turns: (question, answer) pairs; the answer of the last one, None, is to come.
        system: the system message; None for a prompt that starts at the user's turn.
    """
    messages = [] if system is None else [Message("system", system)]
    for question, answer in turns:
        messages.append(Message("user", question))
        if answer is not None:
            messages.append(Message("assistant", [answer]))
    return template.render(messages)


def merge_text(segments: Sequence[Segment]) -> list[Segment]:
    """Join neighbouring texts: byte-pair merges cross them (`<Image><tile_1>` merges `><`), but never a control."""
    merged: list[Segment] = []
    for segment in segments:
        if isinstance(segment, str) and merged and isinstance(merged[-1], str):
            merged[-1] += segment
        else:
            merged.append(segment)
    return merged


def as_text(segments: Sequence[Segment]) -> str:
    """The prompt as one string, for people to read; two different prompts can have the same string."""
    return "".join(str(segment) for segment in segments)


def control_token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of a special token.

    Raises:
        ValueError: the tokenizer does not have that token.
    """
    token_id = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(token_id, int) or tokenizer.convert_ids_to_tokens(token_id) != token:
        raise ValueError(
            f"The tokenizer ({type(tokenizer).__name__}, {tokenizer.name_or_path!r}) has no token {token!r}: "
            "load the tokenizer that comes with the checkpoint."
        )
    return token_id


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, *, controls: frozenset[str] = CONTROL_TOKENS
) -> list[int]:
    """Token ids of text in which special tokens and `controls` are ordinary characters.

    The steps of a fast tokenizer are called one by one: its own switch for this (`split_special_tokens`) is state
    that is shared by all threads. Added tokens that are not special, such as `<tool_call>`, keep their ids.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    ordinary = sorted(set(added) - controls, key=len, reverse=True)  # of two that fit, the tokenizer takes the longer
    pieces = re.split("(" + "|".join(map(re.escape, ordinary)) + ")", text) if ordinary else [text]
    ids: list[int] = []
    for i, piece in enumerate(pieces):
        if i % 2:
            ids.append(control_token_id(tokenizer, piece))
        elif not tokenizer.is_fast:
            tokens = tokenizer.tokenize(piece, split_special_tokens=True)
            ids += [int(tokenizer.convert_tokens_to_ids(token)) for token in tokens]  # type: ignore[arg-type]
        else:
            backend = tokenizer.backend_tokenizer
            normal = backend.normalizer.normalize_str(piece) if backend.normalizer else piece
            words = backend.pre_tokenizer.pre_tokenize_str(normal) if backend.pre_tokenizer else [(normal, None)]
            ids += [token.id for word, _ in words for token in backend.model.tokenize(word)]
    return ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase, segments: Sequence[Segment]) -> list[int]:
    """Token ids of a prompt; only its controls become control tokens.

    Raises:
        ValueError: the tokenizer lacks one of the controls.
    """
    controls = CONTROL_TOKENS.union(segment.token for segment in segments if isinstance(segment, Control))
    ids: list[int] = []
    for segment in merge_text(segments):
        if isinstance(segment, Control):
            ids += [control_token_id(tokenizer, segment.token)] * segment.count
        elif isinstance(segment, Tokens):
            ids += segment.ids
        else:
            ids += encode_text(tokenizer, segment, controls=controls)
    return ids
