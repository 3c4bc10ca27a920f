"""Coloured shapes on one tile: how many, which colour, where."""

import numpy as np
from PIL import ImageDraw

from tiny.page import TILE, Mark, Page, Sample, paper, rng_of

COLOURS = {"red": (215, 35, 35), "green": (30, 150, 50), "blue": (35, 70, 215), "yellow": (235, 190, 20)}
SHAPES = ("circle", "square", "triangle")
ZONES = (
    "top left", "top", "top right",
    "left", "centre", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
MOST = 4
FACTS = (
    *(f"kind {kind}" for kind in SHAPES),
    *(f"colour {colour}" for colour in COLOURS),
    *(f"zone {zone}" for zone in ZONES),
)


def draw_shape(draw: ImageDraw.ImageDraw, kind: str, *, x: float, y: float, radius: float, colour: str) -> Mark:
    """Draw a shape with its centre at (x, y) of a page of one tile."""
    fill = COLOURS[colour]
    if kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif kind == "square":
        half = radius * 0.87
        draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    else:
        corners = [(x, y - radius), (x - radius, y + radius * 0.8), (x + radius, y + radius * 0.8)]
        draw.polygon(corners, fill=fill)
    zone = ZONES[int(3 * y / TILE) * 3 + int(3 * x / TILE)]
    return Mark(f"{colour} {kind}", x, y, facts=(f"kind {kind}", f"colour {colour}", f"zone {zone}"))


def scatter(rng: np.random.Generator, *, count: int) -> tuple[Page, list[tuple[str, str, str]]]:
    """A page with shapes in different zones of a 3 x 3 grid.

    Returns:
        The page and the (colour, shape, zone) of each.
    """
    page = paper(rng)
    draw = ImageDraw.Draw(page)
    marks, things = [], []
    for zone in sorted(rng.permutation(len(ZONES))[:count]):
        colour, kind = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        x = (zone % 3 + 0.5) * TILE / 3 + rng.uniform(-4, 4)
        y = (zone // 3 + 0.5) * TILE / 3 + rng.uniform(-4, 4)
        marks.append(draw_shape(draw, kind, x=x, y=y, radius=rng.uniform(9, 14), colour=colour))
        things.append((colour, kind, ZONES[zone]))
    return Page(page, marks), things


def describe(things: list[tuple[str, str, str]]) -> str:
    """Shapes and their zones in words."""
    return ", ".join(f"{colour} {kind} {zone}" for colour, kind, zone in things)


def ask_count(rng: np.random.Generator, things: list[tuple[str, str, str]]) -> tuple[str, str]:
    """How many shapes there are: all of them, those of a kind, or those of a colour."""
    what = rng.integers(3)
    if what == 0:
        return "How many shapes are there?", str(len(things))
    if what == 1:
        kind = str(rng.choice(SHAPES))
        return f"How many {kind}s are there?", str(sum(thing[1] == kind for thing in things))
    colour = str(rng.choice(list(COLOURS)))
    return f"How many {colour} shapes are there?", str(sum(thing[0] == colour for thing in things))


def ask_colour(rng: np.random.Generator, things: list[tuple[str, str, str]]) -> tuple[str, str]:
    """The colour of a shape that is the only one of its kind, or of that in a zone."""
    kinds = [thing[1] for thing in things]
    unique = [thing for thing in things if kinds.count(thing[1]) == 1]
    if unique and rng.random() < 0.7:
        colour, kind, _ = unique[rng.integers(len(unique))]
        return f"What colour is the {kind}?", colour
    colour, _, zone = things[rng.integers(len(things))]
    return f"What colour is the shape at the {zone}?", colour


def ask_position(rng: np.random.Generator, things: list[tuple[str, str, str]]) -> tuple[str, str]:
    """Where a shape is that nothing else on the page equals; where all have a twin, what stands in a zone."""
    names = [thing[:2] for thing in things]
    unique = [thing for thing in things if names.count(thing[:2]) == 1]
    if unique:
        colour, kind, zone = unique[rng.integers(len(unique))]
        return f"Where is the {colour} {kind}?", zone
    _, kind, zone = things[rng.integers(len(things))]
    return f"What shape is at the {zone}?", kind


class Shapes:
    """One to four circles, squares and triangles in four colours, in different zones of a one-tile page."""

    name = "shapes"

    def __init__(self, *, seed: int, split: str) -> None:
        self.seed, self.split = seed, split

    def sample(self, index: int) -> Sample:
        """The sample of that number; its first question is for a count, a colour or a position, by turns."""
        rng = rng_of(self.name, seed=self.seed, split=self.split, index=index)
        page, things = scatter(rng, count=int(rng.integers(1, MOST + 1)))
        asks = [ask_count, ask_colour, ask_position]
        questions = [asks[(index + i) % 3](rng, things) for i in range(3)]
        return Sample(self.name, [page], questions, notes=f"Page: {describe(things)}.")
