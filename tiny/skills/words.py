"""Words in capital letters and several fonts, one on each tile."""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tiny.page import FONTS, TILE, Mark, Page, Sample, draw_letters, font, in_test_split, ink, middle, paper, rng_of
from tiny.skills.digits import PLACES

GRIDS = ((1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (2, 2))
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LEXICON = Path(__file__).with_name("lexicon.txt").read_text().split()


@cache
def lexicon(split: str) -> list[str]:
    """The words of a split: one in five is only for testing."""
    return [word for word in LEXICON if in_test_split(word) == (split == "test")]


def pick_word(rng: np.random.Generator, split: str) -> str:
    """A word; in training half of them are random letters, so that reading cannot become guessing."""
    if split == "train" and rng.random() < 0.5:
        return "".join(rng.choice(list(ALPHABET), size=rng.integers(3, 7)))
    words = lexicon(split)
    return words[rng.integers(len(words))]


def print_word(page: Image.Image, word: str, *, column: int, row: int, rng: np.random.Generator) -> list[Mark]:
    """Print a word somewhere in the tile (column, row) of a page."""
    face = font(str(rng.choice(FONTS)), int(rng.integers(15, 19)))
    x = column * TILE + middle(int(rng.integers(1, 8 - len(word)))) + rng.uniform(-2, 2)
    y = row * TILE + middle(int(rng.integers(0, 8))) + rng.uniform(-2, 2)
    return list(draw_letters(ImageDraw.Draw(page), word, x=x, y=y, face=face, fill=ink(rng)))


class Words:
    """A word of three to six capital letters on each tile of a page of one to four.

    The words of the test split never stand on a training page.
    """

    name = "words"

    def __init__(self, *, seed: int, split: str) -> None:
        self.seed, self.split = seed, split

    def sample(self, index: int) -> Sample:
        """The sample of that number; pages of two tiles are asked for both words first, larger ones for a place."""
        rng = rng_of(self.name, seed=self.seed, split=self.split, index=index)
        columns, rows = GRIDS[rng.integers(len(GRIDS))]
        page = paper(rng, columns=columns, rows=rows)
        marks: list[Mark] = []
        words = []
        for tile in range(columns * rows):
            word = pick_word(rng, self.split)
            marks += print_word(page, word, column=tile % columns, row=tile // columns, rng=rng)
            words.append(word)
        if len(words) == 1:
            questions = [("What word is written here?", words[0])]
            notes = words[0]
        else:
            places = PLACES[columns, rows]
            order = rng.permutation(len(words))
            questions = [(f"What word is at the {places[tile]}?", words[tile]) for tile in order[:2]]
            if len(words) == 2:
                questions = [("Read both words.", " ".join(words)), *questions[:1]]
            notes = ", ".join(f"{place} {word}" for place, word in zip(places, words, strict=True))
        return Sample(self.name, [Page(page, marks)], questions, notes=f"Page: {notes}.")
