"""A page: a picture that the project draws itself, what stands where on it, and questions with their answers."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE = 112  # pixels; pages are whole tiles, so cutting them changes no pixel
PATCH = 14  # pixels; what is read stands near the middle of a patch
DESCRIBE = "Describe the page."
SPLITS = ("train", "test")
FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSans-Oblique.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "cmss10.ttf",
)
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Mark:
    """What stands at a point (x, y) of a page, in pixels: "digit 7", "letter Q", "red circle", "bar 4".

    `facts` say more about it: a shape's kind, colour and zone, the value of the bar below a letter.
    """

    label: str
    x: float
    y: float
    facts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """A picture and its marks."""

    picture: Image.Image
    marks: list[Mark] = field(default_factory=list)


@dataclass(frozen=True)
class Sample:
    """Pages and what can be asked about them: (question, answer) pairs, each of which stands for itself."""

    skill: str
    pages: list[Page]
    questions: list[tuple[str, str]]
    notes: str = ""  # what is on the pages, in words

    def caption(self) -> "Sample":
        """The same pages with a single question, to describe them."""
        return replace(self, questions=[(DESCRIBE, self.notes)])

    def messages(self, pictures: list[str] | None = None) -> list[dict[str, Any]]:
        """One conversation about the pages, in the form that chat templates take.

        Args:
            pictures: where the pages' pictures are, one a page; without them the notes stand for the pages.
        """
        turns: list[dict[str, Any]] = []
        for i, (question, answer) in enumerate(self.questions):
            parts = [{"type": "image", "image": picture} for picture in pictures or []] if i == 0 else []
            if i == 0 and self.notes and pictures is None:
                question = f"{self.notes}\n{question}"
            turns.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return turns


class Skill(Protocol):
    """A seeded generator: sample number `index` is always the same, whatever was drawn before it."""

    name: str

    def sample(self, index: int) -> Sample:
        """The sample of that number."""


def rng_of(name: str, *, seed: int, split: str, index: int) -> np.random.Generator:
    """The random numbers of one sample; no two of skills, seeds, splits and indices share any.

    Raises:
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {list(SPLITS)}.")
    return np.random.default_rng([zlib.crc32(name.encode()), seed, SPLITS.index(split), index])


def is_one_in_five(key: str) -> bool:
    """True for a fifth of all texts, by a hash."""
    return zlib.crc32(key.encode()) % 5 == 0


def in_test_split(key: str) -> bool:
    """Whether a thing (a word, a sum) is kept for testing: one in five, by its name."""
    return is_one_in_five(key)


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of matplotlib's own fonts: they are the same on every machine."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def paper(rng: np.random.Generator, *, columns: int = 1, rows: int = 1) -> Image.Image:
    """A blank page of whole tiles in a light colour."""
    colour = tuple(int(value) for value in rng.integers(215, 256, size=3))
    return Image.new("RGB", (columns * TILE, rows * TILE), colour)


def ink(rng: np.random.Generator) -> Colour:
    """A dark colour."""
    red, green, blue = (int(value) for value in rng.integers(0, 90, size=3))
    return red, green, blue


def middle(patch: int) -> float:
    """The middle of a patch, counted along one side of a page, in pixels."""
    return PATCH * (patch + 0.5)


def draw_letters(
    draw: ImageDraw.ImageDraw, text: str, *, x: float, y: float, face: ImageFont.FreeTypeFont, fill: Colour
) -> Iterator[Mark]:
    """Letters on one line, a patch apart, each centred on its own place, from (x, y), the first one's centre."""
    for i, letter in enumerate(text):
        centre = x + i * PATCH
        draw.text((centre, y), letter, font=face, fill=fill, anchor="mm")
        yield Mark(f"letter {letter}", centre, y)
