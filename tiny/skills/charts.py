"""Small bar charts on one tile: a bar's value, the largest and the smallest bar."""

from dataclasses import replace

from PIL import ImageDraw

from tiny.page import FONTS, Mark, Page, Sample, draw_letters, font, ink, middle, paper, rng_of
from tiny.skills.words import ALPHABET

BASE, UNIT, TALLEST = 107, 10, 9  # the axis in pixels from above, pixels a unit, the largest value
FACTS = tuple(f"value {value}" for value in range(1, TALLEST + 1))


class Charts:
    """Three or four bars of different values from 1 to 9, each with a letter on top; lines stand at every 3 units."""

    name = "charts"

    def __init__(self, *, seed: int, split: str) -> None:
        self.seed, self.split = seed, split

    def sample(self, index: int) -> Sample:
        """The sample of that number; its first question is for a value or for the largest bar, by turns."""
        rng = rng_of(self.name, seed=self.seed, split=self.split, index=index)
        page = paper(rng)
        draw = ImageDraw.Draw(page)
        count = int(rng.integers(3, 5))
        values = (rng.permutation(TALLEST)[:count] + 1).tolist()
        letters = rng.permutation(list(ALPHABET))[:count].tolist()
        for value in range(0, TALLEST + 1, 3):
            draw.line((4, BASE - value * UNIT, 108, BASE - value * UNIT), fill=(170, 170, 170))
        face = font(str(rng.choice(FONTS)), int(rng.integers(15, 19)))
        fill = tuple(int(value) for value in rng.integers(20, 190, size=3))
        first = int(rng.integers(0, 8 - 2 * (count - 1)))
        marks: list[Mark] = []
        for i, value in enumerate(values):
            x = middle(first + 2 * i) + rng.uniform(-1.5, 1.5)
            half, top = rng.uniform(6, 10), BASE - value * UNIT
            draw.rectangle((x - half, top, x + half, BASE), fill=fill)
            marks.append(Mark(f"bar {value}", x, top + 5))
            [letter] = draw_letters(draw, letters[i], x=x, y=top - 9, face=face, fill=ink(rng))
            marks.append(replace(letter, facts=(f"value {value}",)))
        asked = rng.permutation(count)[:2].tolist()
        value_of = [(f"What is the value of bar {letters[i]}?", str(values[i])) for i in asked]
        largest = ("Which bar is the largest?", letters[values.index(max(values))])
        smallest = ("Which bar is the smallest?", letters[values.index(min(values))])
        questions = [value_of[0], largest, smallest, value_of[1]]
        if index % 2:
            questions = [largest, *value_of, smallest]
        notes = ", ".join(f"{letter} {value}" for letter, value in zip(letters, values, strict=True))
        return Sample(self.name, [Page(page, marks)], questions, notes=f"Bars: {notes}.")
