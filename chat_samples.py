"""The samples of a batched chat: questions, histories and a flat row of pictures become one sample each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .chat_arguments import (
    History,
    check_history,
    check_list,
    check_placeholders,
    count_placeholders,
    read_pictures,
)
from .pictures import Picture
from .prompt import IMAGE_PLACEHOLDER

ONE_HISTORY = "hold one history (or None) a question"


@dataclass
class Sample:
    """One question with its history and its pictures, or the error that keeps it from being asked."""

    question: str
    history: list[tuple[str, str]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    error: ValueError | None = None

    @property
    def placeholders(self) -> int:
        """How many pictures its text takes."""
        return 0 if self.error else count_placeholders(self.question, self.history)


def read_samples(
    questions: Sequence[str],
    history: Sequence[History | None] | None,
    pixel_values: torch.Tensor | None,
    visual_features: torch.Tensor | None,
    num_patches_list: Sequence[int] | None,
    *,
    config: Any,
    errors: str,
) -> list[Sample]:
    """What `batch_chat` was given, sample by sample.

    Args:
        errors: "raise", or "return": a sample whose question, history or pictures are no good holds the error.

    Raises:
        ValueError: with "raise" whatever is wrong; with "return" what leaves open which pictures are whose.
    """
    questions = check_list(questions, name="questions", meaning="be a list of at least one question")
    if not questions:
        raise ValueError("questions must be a list of at least one question, got [].")
    given = [None] * len(questions) if history is None else check_list(history, name="history", meaning=ONE_HISTORY)
    if len(given) != len(questions):
        raise ValueError(f"history must {ONE_HISTORY}: {len(questions)} expected, got {len(given)}.")
    samples = [_read_sample(question, turns, errors) for question, turns in zip(questions, given, strict=True)]
    tiles = visual_features if pixel_values is None else pixel_values
    count = sum(sample.placeholders for sample in samples)
    if num_patches_list is None and isinstance(tiles, torch.Tensor) and len(tiles) == (count or len(samples)):
        num_patches_list = [1] * len(tiles)
    finite = errors == "raise"
    pictures = read_pictures(config, pixel_values, visual_features, num_patches_list, check_finite=finite)
    if count < len(pictures):
        for sample in samples:
            if not (sample.error or sample.placeholders or sample.history):
                sample.question = f"{IMAGE_PLACEHOLDER}\n{sample.question}"
    if not pictures:
        return samples
    check_placeholders(sum(sample.placeholders for sample in samples), pictures)
    for sample in samples:
        count = sample.placeholders
        sample.pictures, pictures = pictures[:count], pictures[count:]
        if errors == "return" and not all(torch.isfinite(picture.tiles).all() for picture in sample.pictures):
            sample.error = ValueError("A picture of this sample holds NaN or infinite values, expected finite ones.")
    return samples


def _read_sample(question: Any, turns: History | None, errors: str) -> Sample:
    try:
        history = check_history(turns)
        count_placeholders(question, history)
    except ValueError as error:
        if errors == "raise":
            raise
        return Sample("", error=error)
    return Sample(question, history)
