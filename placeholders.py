"""Placeholders of pictures and videos in rendered prompts, and what takes their places (SPEC 6)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .conversation import Control, Segment
from .prompt import as_text


@dataclass(frozen=True)
class Piece:
    """A part of a rendered prompt.

    Args:
        kind: "text", "control" (a special token), "image" or "video" (a placeholder).
        text: what stands in the prompt.
        generated: whether the template says that the assistant wrote it.
    """

    kind: str
    text: str
    generated: bool = False


@dataclass(frozen=True)
class Visual:
    """A picture or a video: what stands for it in the model's prompt, and its tiles."""

    segments: list[Segment]
    tiles: torch.Tensor  # [tiles, 3, S, S]


@dataclass(frozen=True)
class Visuals:
    """The pictures and the videos of a call: one list for each prompt, or one for all prompts."""

    images: list[list[Visual]]
    videos: list[list[Visual]]

    @property
    def tiles(self) -> list[torch.Tensor]:
        """Those of all pictures and then of all videos."""
        return [visual.tiles for group in (*self.images, *self.videos) for visual in group]

    def fill(self, prompts: Sequence[Sequence[Piece]]) -> tuple[list[list[list[Segment]]], torch.Tensor | None]:
        """Each piece of each prompt as segments, and all tiles (tiles, 3, S, S) in the order of the placeholders.

        Raises:
            ValueError: there are more or fewer placeholders than pictures or videos.
        """
        check_counts(prompts, kind="image", passed=[len(group) for group in self.images])
        check_counts(prompts, kind="video", passed=[len(group) for group in self.videos])
        queues = {
            "image": iter([visual for group in self.images for visual in group]),
            "video": iter([visual for group in self.videos for visual in group]),
        }
        tiles: list[torch.Tensor] = []

        def segments(piece: Piece) -> list[Segment]:
            if piece.kind in queues:
                visual = next(queues[piece.kind])
                tiles.append(visual.tiles)
                return visual.segments
            return [Control(piece.text) if piece.kind == "control" else piece.text]

        filled = [[segments(piece) for piece in prompt] for prompt in prompts]
        return filled, torch.cat(tiles) if tiles else None


def check_counts(prompts: Sequence[Sequence[Piece]], *, kind: str, passed: list[int]) -> None:
    """Check that each prompt's placeholders are as many as its pictures, or all prompts' as all pictures.

    Raises:
        ValueError: they are not; the message has both numbers.
    """
    found = [sum(piece.kind == kind for piece in prompt) for prompt in prompts]
    if sum(found) != sum(passed) or (len(found) == len(passed) and found != passed):
        raise ValueError(
            f"The number of {kind} tokens in the prompts should be the same as the number of {kind}s passed: found "
            f"{found}, passed {passed}. Put one <{kind}> where each {kind} stands."
        )


def replacement_offsets(prompt: Sequence[Piece], filled: Sequence[Sequence[Segment]]) -> Iterator[dict[str, Any]]:
    """Where each placeholder stood in a prompt and what took its place, in characters, as transformers tells it."""
    start, new_start = 0, 0
    for piece, segments in zip(prompt, filled, strict=True):
        replacement = as_text(segments)
        stop, new_stop = start + len(piece.text), new_start + len(replacement)
        if piece.kind in ("image", "video"):
            yield {
                "type": piece.kind,
                "span": (start, stop),
                "new_span": (new_start, new_stop),
                "text": piece.text,
                "replacement": replacement,
            }
        start, new_start = stop, new_stop
