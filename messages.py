"""From chat messages to rendered prompts: content parts are read, and what users write stays text (SPEC 6 and 9).

A chat template makes one string of its own control tokens and of the users' text. `Shield` keeps the two apart: before
rendering, a control token that a user wrote is replaced by a stand-in, and after rendering the stand-ins are text.
"""

import base64
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SOURCE_KEYS = ("image", "video", "path", "url", "base64")
Messages = list[dict[str, Any]]


def split_batch(conversation: Any) -> tuple[list[Messages], bool]:
    """Conversations as a list, and whether there were several: a list of messages is one conversation.

    Raises:
        ValueError: there are no messages, or a message is no dict.
    """
    is_batch = isinstance(conversation, Sequence) and len(conversation) > 0 and isinstance(conversation[0], Sequence)
    conversations = list(conversation) if is_batch else [conversation]
    for messages in conversations:
        expected = "A conversation must be a list of at least one {'role': ..., 'content': ...} dict"
        if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
            raise ValueError(f"{expected}, got {messages!r:.80}.")
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message:
                raise ValueError(f"{expected}; one of its messages is {message!r:.80}.")
    return conversations, is_batch


def take_visuals(messages: Messages) -> tuple[Messages, list[Any], list[Any]]:
    """Messages without pictures' and videos' content, the pictures, and the videos, in order; keys of None are dropped.

    A part is `{"type": "image", KEY: picture}` with KEY one of `image`, `path`, `url`, `base64`; or OpenAI's
    `{"type": "image_url", "image_url": {"url": ...}}`; a video's has `video` in the place of `image`. A part without
    any of them stands for a picture or a video that is passed elsewhere and gives none. `data:` URLs and base64 text
    become bytes; other text is a path.
    """
    stripped: Messages = []
    found: dict[str, list[Any]] = {"image": [], "video": []}
    for message in messages:
        kept = {key: value for key, value in message.items() if value is not None}
        content = kept.get("content")
        if isinstance(content, (list, tuple)):
            kept["content"] = [_strip_part(part, found) for part in content]
        stripped.append(kept)
    return stripped, found["image"], found["video"]


def _strip_part(part: Any, found: dict[str, list[Any]]) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = str(part.get("type", "")).removesuffix("_url")
    if kind not in found:
        return part
    source = part.get(f"{kind}_url")
    source = source.get("url") if isinstance(source, Mapping) else source
    if source is None:
        source = next((part[key] for key in SOURCE_KEYS if part.get(key) is not None), None)
    if source is not None:
        is_base64 = part.get("base64") is source
        found[kind].append(_decode(source, is_base64=is_base64))
    return {"type": kind}


def _decode(source: Any, *, is_base64: bool) -> Any:
    """Bytes out of base64 text or a `data:` URL, else the source itself.

    Raises:
        ValueError: damaged base64.
    """
    is_data_url = isinstance(source, str) and source.startswith("data:")
    if not (is_data_url or is_base64):
        return source
    text = source.partition(",")[2] if is_data_url else source
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(
            f"A picture or video is damaged base64 ({error}): expected data:TYPE;base64,... text."
        ) from error


class Shield:
    """Stand-ins for the control tokens that users write, in all the text of a call.

    A token may also come together from two texts that a template puts next to each other, so what could begin one at
    the end of a text is replaced as well. Everything else is left alone: templates may look at it.

    Args:
        tokens: what only a template may write: special tokens and the placeholders of pictures and videos.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        self._tokens = sorted(tokens, key=len, reverse=True)
        beginnings = sorted({token[:end] for token in self._tokens for end in range(1, len(token))}, key=len)
        whole, begun = "|".join(map(re.escape, self._tokens)), "|".join(map(re.escape, reversed(beginnings)))
        self._written = re.compile(rf"{whole}|(?:{begun})(?=\s*\Z)")
        # Letters and digits pass unchanged through JSON and through a template's filters; nobody can guess these.
        self._mark = f"shield{secrets.token_hex(8)}x"
        self._hidden: list[str] = []
        self._stand_in = re.compile(rf"{self._mark}(\d+)x")

    def hide(self, value: Any) -> Any:
        """A copy of a value with its text protected, through all its lists and dicts, keys included."""
        if isinstance(value, str):
            return self._written.sub(self._replace, value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(item) for item in value]
        return value

    def _replace(self, match: re.Match[str]) -> str:
        if match[0] not in self._hidden:
            self._hidden.append(match[0])
        return f"{self._mark}{self._hidden.index(match[0])}x"

    def reveal(self, text: str) -> str:
        """Rendered text with what was written in the places of the stand-ins."""
        return self._stand_in.sub(lambda match: self._hidden[int(match[1])], text)

    def split(self, rendered: str) -> list[tuple[str, bool]]:
        """Rendered text as (text, whether it is a token that the template wrote), stand-ins revealed."""
        tokens = "|".join(map(re.escape, self._tokens))
        pieces = re.split(f"({tokens})", rendered)
        return [(self.reveal(piece), i % 2 == 1) for i, piece in enumerate(pieces) if piece]
