"""Prompts of served requests, as token ids that equal those of `chat()` (SPEC 6, 9 and 11); needs no vLLM.

A request becomes a prompt in two steps, because a server tokenises before it knows how many tiles a picture has:
`chat_segments` gives each picture one image token, and `expand_pictures` puts the picture's tags and slots there.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise, zip_longest
from typing import Any

from transformers import PreTrainedTokenizerBase

from nvlm.conversation import IMAGE_TOKEN, Control, Segment
from nvlm.messages import Shield
from nvlm.prompt import IMAGE_PLACEHOLDER, encode_text

VIDEO_PLACEHOLDER = "<video>"


def chat_segments(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Any],
    variables: dict[str, Any],
    render: Callable[[list[Any], dict[str, Any]], str],
) -> list[Segment]:
    """Render messages by a chat template; what they and the template's variables say can hold no control token.

    Args:
        tokenizer: the checkpoint's.
        messages: the conversation; pictures are content parts of type `image`.
        variables: what else the template reads and a user may have written: tools, documents, options.
        render: (messages, variables) -> the rendered string, in which `<image>` is a picture.

    Returns:
        Text, special tokens, and one image token a picture.

    Raises:
        ValueError: the template asks for a video: vLLM's NVLM_D has none.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    shield = Shield({*special, IMAGE_TOKEN, IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER})
    rendered = render(shield.hide(messages), shield.hide(variables))
    segments: list[Segment] = []
    for text, is_token in shield.split(rendered):
        if is_token and text == VIDEO_PLACEHOLDER:
            raise ValueError("Videos are not served: expected pictures. Send a video's frames as pictures.")
        if is_token:
            segments.append(Control(IMAGE_TOKEN if text == IMAGE_PLACEHOLDER else text))
        else:
            segments.append(text)
    return segments


def expand_pictures(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    pictures: Sequence[Sequence[int]],
    *,
    image_token_id: int,
) -> tuple[list[int], list[range]]:
    """Put each picture's own ids in the place of its image token.

    Byte-pair merges cross the seams (`</Image>` and a newline behind it are one token), so text that touches a seam is
    tokenised again, together with the picture's text. All other ids stay as they came.

    Args:
        ids: a prompt with one `image_token_id` a picture.
        pictures: of each picture the ids of its tags and of its features' slots, the latter being `image_token_id`.

    Returns:
        The whole prompt's ids, and for each picture where its first to its last slot stand.

    Raises:
        ValueError: there are more or fewer image tokens than pictures.
    """
    places = [i for i, token_id in enumerate(ids) if token_id == image_token_id]
    if len(places) != len(pictures):
        raise ValueError(
            f"The prompt holds {len(places)} places of pictures ({IMAGE_TOKEN!r}, id {image_token_id}), but "
            f"{len(pictures)} pictures were passed. In a conversation each picture is a part of type image_url; in a "
            f"bare prompt write one {IMAGE_PLACEHOLDER!r} a picture."
        )
    joined: list[int] = []
    seams: set[int] = set()
    chunks = [list(ids[start + 1 : stop]) for start, stop in zip([-1, *places], [*places, len(ids)], strict=True)]
    for chunk, picture in zip_longest(chunks, pictures, fillvalue=()):
        for part in (chunk, picture):
            joined += part
            seams.add(len(joined))
    expanded = _merge(tokenizer, joined, seams)
    return expanded, _slot_ranges(
        expanded, [list(picture).count(image_token_id) for picture in pictures], image_token_id
    )


def _merge(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], seams: set[int]) -> list[int]:
    """`ids` with each run of text that has a seam inside tokenised as one."""
    controls = {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special or token.content == IMAGE_TOKEN
    }
    bounds = [-1, *(i for i, token_id in enumerate(ids) if token_id in controls), len(ids)]
    merged: list[int] = []
    for before, after in pairwise(bounds):
        run = list(ids[before + 1 : after])
        if any(seam in seams for seam in range(before + 2, after)):
            text = tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            run = encode_text(tokenizer, str(text))
        merged += run
        if after < len(ids):
            merged.append(ids[after])
    return merged


def _slot_ranges(ids: Sequence[int], counts: Sequence[int], image_token_id: int) -> list[range]:
    slots = [i for i, token_id in enumerate(ids) if token_id == image_token_id]
    ranges, start = [], 0
    for count in counts:
        ranges.append(range(slots[start], slots[start + count - 1] + 1))
        start += count
    return ranges
