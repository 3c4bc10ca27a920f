"""From a line of JSON to who says what: `{"messages": [{"role": ..., "content": ...}, ...]}`, as templates take it.

Content is a text, or a list of `{"type": "text", "text": ...}` and `{"type": "image", "image": "relative/path.png"}`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROLES = ("system", "user", "assistant")
REASONS = ("json", "form", "no_answer", "picture_missing", "picture_broken", "too_long")


class BadSampleError(ValueError):
    """A sample that cannot be trained on.

    Args:
        reason: one of `REASONS`.
        message: what is wrong, for people.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Picture:
    """A picture's place in a message."""

    path: Path


Part = str | Picture


@dataclass(frozen=True)
class Turn:
    """What one role says."""

    role: str
    parts: list[Part]

    @property
    def text(self) -> str:
        """All its text."""
        return "".join(part for part in self.parts if isinstance(part, str))


def parse_sample(line: bytes, *, folder: Path) -> list[Turn]:
    """The turns of a sample.

    Args:
        line: one JSON object.
        folder: what pictures' paths are relative to.

    Raises:
        BadSampleError: no JSON, another form than the module says, or no assistant says anything.
    """
    try:
        sample = json.loads(line)
    except ValueError as error:
        raise BadSampleError("json", f"no JSON ({error}), expected one object a line") from error
    messages = sample.get("messages") if isinstance(sample, dict) else None
    _require(isinstance(messages, list) and len(messages) > 0, "messages", messages, "a list of at least one message")
    turns = [_turn(message, f"messages[{i}]", folder) for i, message in enumerate(messages)]  # type: ignore[arg-type]
    if not any(turn.role == "assistant" and turn.text.strip() for turn in turns):
        raise BadSampleError("no_answer", "no assistant's turn with text in it, expected at least one to learn from")
    return turns


def _turn(message: Any, where: str, folder: Path) -> Turn:
    _require(isinstance(message, dict), where, message, "an object with role and content")
    extra = sorted(set(message) - {"role", "content"})
    _require(not extra, f"{where} has the keys {extra}, and", message, "only role and content")
    role, content = message.get("role"), message.get("content")
    _require(role in ROLES, f"{where}.role", role, f"one of {list(ROLES)}")
    if isinstance(content, str):
        return Turn(role, [content])
    _require(isinstance(content, list), f"{where}.content", content, "a text, or a list of parts")
    return Turn(role, [_part(part, f"{where}.content[{i}]", role, folder) for i, part in enumerate(content)])


def _part(part: Any, where: str, role: str, folder: Path) -> Part:
    _require(isinstance(part, dict), where, part, "an object with a type")
    kind, value = part.get("type"), part.get(part.get("type") if isinstance(part.get("type"), str) else "")
    _require(kind in ("text", "image"), f"{where}.type", kind, "'text' or 'image'")
    if kind == "text":
        _require(isinstance(value, str), f"{where}.text", value, "a text")
        return str(value)
    _require(role == "user", where, part, "pictures in user turns only")
    _require(isinstance(value, str) and value != "", f"{where}.image", value, "the path of a picture")
    return Picture(folder / str(value))


def _require(condition: bool, where: str, value: Any, expected: str) -> None:
    if not condition:
        raise BadSampleError("form", f"{where} is {value!r:.200}, expected {expected}")
