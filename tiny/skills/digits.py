"""Handwritten digits: one number on one tile, or groups of digits over several tiles."""

from functools import cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from tiny.page import TILE, Colour, Mark, Page, Sample, ink, middle, paper, rng_of

GRIDS = ((2, 1), (1, 2), (3, 1), (1, 3), (2, 2))  # (columns, rows) of tiles
PLACES = {
    (2, 1): ("left", "right"),
    (1, 2): ("top", "bottom"),
    (3, 1): ("left", "middle", "right"),
    (1, 3): ("top", "middle", "bottom"),
    (2, 2): ("top left", "top right", "bottom left", "bottom right"),
}


@cache
def handwriting(split: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """The digits of scikit-learn (1797 of them, 8x8), every fifth of which is only for testing.

    Returns:
        The pictures as uint8 (n, 8, 8), 255 the ink, and for each of the ten digits the indices of its pictures.
    """
    data = load_digits()
    chosen = (np.arange(len(data.target)) % 5 == 4) == (split == "test")
    pictures = np.clip(data.images[chosen] * 16, 0, 255).astype(np.uint8)  # [n, 8, 8], were 0..16
    labels = data.target[chosen]
    return pictures, [np.flatnonzero(labels == digit) for digit in range(10)]


def write_digit(
    page: Image.Image, digit: int, *, x: float, y: float, rng: np.random.Generator, split: str, fill: Colour
) -> Mark:
    """Write one handwritten digit, a little turned, sheared and stretched, with its centre at (x, y).

    Training varies more than testing: half of its digits lie between two hands' writing of the same digit.
    """
    pictures, indices = handwriting(split)
    strokes = Image.fromarray(pictures[rng.choice(indices[digit])])
    spread = 1.0
    if split == "train":
        spread = 1.4
        if rng.random() < 0.5:
            other = Image.fromarray(pictures[rng.choice(indices[digit])])
            strokes = Image.blend(strokes, other, rng.uniform(0.1, 0.5))
    size = rng.uniform(25, 31)
    scale_x = 8 / size * (1 + spread * rng.uniform(-0.08, 0.1))
    scale_y = 8 / size * (1 + spread * rng.uniform(-0.08, 0.08))
    angle, shear = np.radians(spread * rng.uniform(-9, 9)), spread * rng.uniform(-0.15, 0.15)
    cos, sin = np.cos(angle), np.sin(angle)
    # A pixel of the mask comes from `matrix` times its place, both from their centres.
    matrix = np.array([[cos * scale_x, (shear * cos - sin) * scale_x], [sin * scale_y, (shear * sin + cos) * scale_y]])
    side = 36
    left, top = round(x - side / 2), round(y - side / 2)
    centre = np.array([x - left, y - top])
    shift = np.array([4.0, 4.0]) - matrix @ centre
    numbers = (*matrix[0], shift[0], *matrix[1], shift[1])
    mask = strokes.transform((side, side), Image.Transform.AFFINE, numbers, Image.Resampling.BICUBIC)
    page.paste(fill, (left, top), mask)
    return Mark(f"digit {digit}", x, y)


def write_number(
    page: Image.Image, digits: list[int], *, column: int, row: int, rng: np.random.Generator, split: str, fill: Colour
) -> list[Mark]:
    """Write digits side by side somewhere in the tile (column, row) of a page."""
    first = int(rng.integers(1, 8 - 2 * len(digits) + 1))  # the patch of the first digit; each digit takes two
    line = int(rng.integers(1, 7))
    marks = []
    for i, digit in enumerate(digits):
        x = column * TILE + middle(first + 2 * i) + rng.uniform(-2.5, 2.5)
        y = row * TILE + middle(line) + rng.uniform(-2.5, 2.5)
        marks.append(write_digit(page, digit, x=x, y=y, rng=rng, split=split, fill=fill))
    return marks


class Digits:
    """A number of one to three handwritten digits on a page of one tile."""

    name = "digits"

    def __init__(self, *, seed: int, split: str) -> None:
        self.seed, self.split = seed, split

    def sample(self, index: int) -> Sample:
        """The sample of that number."""
        rng = rng_of(self.name, seed=self.seed, split=self.split, index=index)
        page = paper(rng)
        digits = rng.integers(0, 10, size=rng.integers(1, 4)).tolist()
        marks = write_number(page, digits, column=0, row=0, rng=rng, split=self.split, fill=ink(rng))
        question = str(rng.choice(["What number is written here?", "Read the number."]))
        number = "".join(map(str, digits))
        return Sample(self.name, [Page(page, marks)], [(question, number)], notes=f"Page: {number}.")


class DigitStrings:
    """One or two handwritten digits on each tile of a page of two to four, asked for all together or one place."""

    name = "digit strings"

    def __init__(self, *, seed: int, split: str) -> None:
        self.seed, self.split = seed, split

    def sample(self, index: int) -> Sample:
        """The sample of that number; the first question is always for the whole string."""
        rng = rng_of(self.name, seed=self.seed, split=self.split, index=index)
        columns, rows = GRIDS[rng.integers(len(GRIDS))]
        page, fill = paper(rng, columns=columns, rows=rows), ink(rng)
        marks: list[Mark] = []
        numbers = []
        for tile in range(columns * rows):
            digits = rng.integers(0, 10, size=rng.integers(1, 3)).tolist()
            where = {"column": tile % columns, "row": tile // columns}
            marks += write_number(page, digits, **where, rng=rng, split=self.split, fill=fill)
            numbers.append("".join(map(str, digits)))
        questions = [("Read all digits on the page.", "".join(numbers))]
        places = PLACES[columns, rows]
        for tile in rng.permutation(len(numbers))[:2]:
            questions.append((f"What number is at the {places[tile]}?", numbers[tile]))
        notes = ", ".join(f"{place} {number}" for place, number in zip(places, numbers, strict=True))
        return Sample(self.name, [Page(page, marks)], questions, notes=f"Page: {notes}.")
