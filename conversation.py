"""Conversation templates: who says what becomes one row of segments (SPEC 6).

A segment is either text, which can never turn into a control token, or a `Control`, which is one, or `Tokens` that the
model wrote. Only a template makes controls, so whatever a user, a history or a system message contains cannot open or
close a turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Control:
    """A special token of the tokenizer, `count` times."""

    token: str
    count: int = 1

    def __str__(self) -> str:
        return self.token * self.count


@dataclass(frozen=True)
class Tokens:
    """What a model generated, as the ids that it generated, and what they say."""

    ids: tuple[int, ...]
    text: str

    def __str__(self) -> str:
        return self.text


Segment = str | Control | Tokens
Content = str | Sequence[Segment]


@dataclass(frozen=True)
class Message:
    """What one role says: plain text, or segments where pictures stand in it."""

    role: str
    content: Content


@dataclass(frozen=True)
class ConversationTemplate:
    """A chat format of the ChatML family.

    Args:
        name: what a config calls it.
        system_message: the system message of users who give none.
        turn_start: the token that opens a turn; the role's name follows it.
        sep: the token that closes a turn; generation stops at it.
        turn_end: plain text between turns (none in NVLM: there is no newline after `<|im_end|>`).
        roles: the role names that may speak.
    """

    name: str
    system_message: str
    turn_start: str = "<|im_start|>"
    sep: str = "<|im_end|>"
    turn_end: str = ""
    roles: tuple[str, ...] = ("system", "user", "assistant")

    def render(self, messages: Sequence[Message]) -> list[Segment]:
        """The prompt that asks the assistant to go on after `messages`.

        Raises:
            ValueError: a role that the template does not have.
        """
        segments: list[Segment] = []
        for message in messages:
            if message.role not in self.roles:
                raise ValueError(f"Unknown role {message.role!r}: the template {self.name!r} has {list(self.roles)}.")
            content = [message.content] if isinstance(message.content, str) else message.content
            segments += [Control(self.turn_start), f"{message.role}\n", *content, Control(self.sep), self.turn_end]
        return [*segments, Control(self.turn_start), "assistant\n"]


TEMPLATES = {"chatml": ConversationTemplate(name="chatml", system_message="Answer the questions.")}

IMAGE_TOKEN = "<|vision_pad|>"  # where a picture's features stand

# Never written by users, also where a tokenizer fails to mark them as special.
CONTROL_TOKENS = frozenset({IMAGE_TOKEN}.union(*((t.turn_start, t.sep) for t in TEMPLATES.values())))


def get_conv_template(name: str) -> ConversationTemplate:
    """The template of that name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in TEMPLATES:
        raise ValueError(f"Unknown conversation template {name!r}: expected one of {sorted(TEMPLATES)}.")
    return TEMPLATES[name]
