"""Two pictures and questions that need both of them or one of the two."""

import numpy as np

from tiny.page import Page, Sample, ink, paper, rng_of
from tiny.skills.digits import write_number
from tiny.skills.shapes import describe, scatter

NAMES = ("first", "second")


class Pairs:
    """Two one-tile pictures, of shapes or of handwritten digits: which has more, where a thing is, are they equal."""

    name = "two pictures"

    def __init__(self, *, seed: int, split: str) -> None:
        self.seed, self.split = seed, split

    def sample(self, index: int) -> Sample:
        """The sample of that number; shapes and numbers by turns."""
        rng = rng_of(self.name, seed=self.seed, split=self.split, index=index)
        pages, questions, contents = self._shapes(rng) if index % 2 == 0 else self._numbers(rng)
        order = rng.permutation(len(questions))
        notes = f"First picture: {contents[0]}. Second picture: {contents[1]}."
        return Sample(self.name, pages, [questions[i] for i in order], notes=notes)

    def _shapes(self, rng: np.random.Generator) -> tuple[list[Page], list[tuple[str, str]], list[str]]:
        more = int(rng.integers(2))
        low, high = sorted(int(count) for count in rng.choice(np.arange(1, 5), size=2, replace=False))
        pages, things = zip(*(scatter(rng, count=high if i == more else low) for i in range(2)), strict=True)
        questions = [("Which picture has more shapes?", NAMES[more])]
        where = int(rng.integers(2))
        here = {thing[:2] for thing in things[where]}
        only_here = sorted(here - {thing[:2] for thing in things[1 - where]})
        if only_here:
            colour, kind = only_here[rng.integers(len(only_here))]
            questions.append((f"Which picture has a {colour} {kind}?", NAMES[where]))
        which = int(rng.integers(2))
        questions.append((f"How many shapes are in the {NAMES[which]} picture?", str(len(things[which]))))
        return list(pages), questions, [describe(shown) for shown in things]

    def _numbers(self, rng: np.random.Generator) -> tuple[list[Page], list[tuple[str, str]], list[str]]:
        first = rng.integers(0, 10, size=1).tolist()
        second = first if rng.random() < 0.4 else rng.integers(0, 10, size=1).tolist()
        pages = []
        for digits in (first, second):
            page = paper(rng)
            marks = write_number(page, digits, column=0, row=0, rng=rng, split=self.split, fill=ink(rng))
            pages.append(Page(page, marks))
        which = int(rng.integers(2))
        questions = [
            ("Do both pictures show the same digit?", "yes" if first == second else "no"),
            (f"Which digit is in the {NAMES[which]} picture?", str((first, second)[which][0])),
        ]
        if first != second:
            larger = NAMES[int(second > first)]
            questions.append(("Which picture shows the larger digit?", larger))
        return pages, questions, [str(digits[0]) for digits in (first, second)]
