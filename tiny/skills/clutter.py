"""Pages full of digits, letters and shapes, on which the encoder is pre-trained; nothing is asked about them."""

import numpy as np
from PIL import Image, ImageDraw

from tiny.page import FONTS, Mark, Page, Sample, draw_letters, font, ink, middle, paper, rng_of
from tiny.skills.digits import write_digit
from tiny.skills.shapes import COLOURS, SHAPES, draw_shape
from tiny.skills.words import ALPHABET


class Clutter:
    """A one-tile page full of handwritten digits, of letters, or of shapes."""

    name = "clutter"

    def __init__(self, *, seed: int, split: str) -> None:
        self.seed, self.split = seed, split

    def sample(self, index: int) -> Sample:
        """The sample of that number."""
        rng = rng_of(self.name, seed=self.seed, split=self.split, index=index)
        page = paper(rng)
        draw = [self._digits, self._letters, self._shapes][rng.choice(3, p=[0.55, 0.3, 0.15])]
        return Sample(self.name, [Page(page, draw(page, rng))], [])

    def _digits(self, page: Image.Image, rng: np.random.Generator) -> list[Mark]:
        marks = []
        left, top = rng.integers(1, 3, size=2).tolist()
        for cell in range(9):
            x = middle(left + 2 * (cell % 3)) + rng.uniform(-2.5, 2.5)
            y = middle(top + 2 * (cell // 3)) + rng.uniform(-2.5, 2.5)
            marks.append(write_digit(page, int(rng.integers(10)), x=x, y=y, rng=rng, split=self.split, fill=ink(rng)))
        return marks

    def _letters(self, page: Image.Image, rng: np.random.Generator) -> list[Mark]:
        draw = ImageDraw.Draw(page)
        marks: list[Mark] = []
        for row in range(8):
            text = "".join(rng.choice(list(ALPHABET), size=rng.integers(4, 9)))
            face = font(str(rng.choice(FONTS)), int(rng.integers(15, 19)))
            x = middle(int(rng.integers(0, 9 - len(text)))) + rng.uniform(-2, 2)
            marks += draw_letters(draw, text, x=x, y=middle(row) + rng.uniform(-2, 2), face=face, fill=ink(rng))
        return marks

    def _shapes(self, page: Image.Image, rng: np.random.Generator) -> list[Mark]:
        draw = ImageDraw.Draw(page)
        marks = []
        for cell in range(16):
            kind, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
            x, y = (14 + 28 * (cell % 4) + rng.uniform(-3, 3), 14 + 28 * (cell // 4) + rng.uniform(-3, 3))
            marks.append(draw_shape(draw, kind, x=x, y=y, radius=rng.uniform(9, 14), colour=colour))
        return marks
