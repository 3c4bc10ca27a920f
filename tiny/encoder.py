"""Pre-training of the tiny encoder: each patch says what stands at it.

A linear layer on every patch's features names the mark whose centre lies in the patch (or none), another the facts
about it (the letter on a bar knows the bar's value: what a question binds together lies at one patch), two more give
the patch's colours and its place on the tile. The four layers are thrown away afterwards.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import nn

from nvlm import load_image
from nvlm.configuration_intern_vit import InternVisionConfig
from nvlm.modeling_intern_vit import InternVisionModel
from nvlm.preprocessing import tile_grid
from tiny.backbone import Run, fit
from tiny.page import PATCH, TILE, Page, Skill
from tiny.skills import Charts, Digits, DigitStrings, Shapes, Words, charts, shapes
from tiny.skills.clutter import Clutter
from tiny.skills.words import ALPHABET

LABELS = [
    "nothing",
    *(f"digit {digit}" for digit in range(10)),
    *(f"letter {letter}" for letter in ALPHABET),
    *(f"{colour} {shape}" for colour in shapes.COLOURS for shape in shapes.SHAPES),
    *(f"bar {value}" for value in range(1, charts.TALLEST + 1)),
]
FACTS = [*shapes.FACTS, *charts.FACTS]
LABEL_IDS = {label: i for i, label in enumerate(LABELS)}
SHAPE_FACTS, BAR_FACTS = slice(0, len(shapes.FACTS)), slice(len(shapes.FACTS), None)
FACT_IDS = {fact: i for i, fact in enumerate(FACTS)}
GRID = 8  # patches a side
MIXTURE = ((Clutter, 0.4), (Charts, 0.18), (DigitStrings, 0.14), (Words, 0.12), (Digits, 0.04), (Shapes, 0.12))


def tiny_vision_config() -> InternVisionConfig:
    """InternViT with 5 heads of 32 and 6 layers."""
    return InternVisionConfig(
        hidden_size=160,
        num_attention_heads=5,
        num_dummy_heads=0,
        intermediate_size=640,
        num_hidden_layers=6,
        image_size=TILE,
        initializer_factor=1.0,
    )


class LabelledTiles(NamedTuple):
    """Tiles and what stands at their patches."""

    pixels: torch.Tensor  # [n, 3, 112, 112]
    labels: torch.Tensor  # [n, 64] int64, label ids
    facts: torch.Tensor  # [n, 64, facts] float32, 1 where a fact holds


def label_tiles(page: Page) -> LabelledTiles:
    """A page's tiles as the model gets them, the thumbnail last, with their labels."""
    pixels = load_image(page.picture, input_size=TILE, max_num=6)
    columns, rows = tile_grid(*page.picture.size, image_size=TILE)
    labels = torch.zeros(len(pixels), GRID * GRID, dtype=torch.long)
    facts = torch.zeros(len(pixels), GRID * GRID, len(FACTS))
    for mark in page.marks:
        column, row = int(mark.x // TILE), int(mark.y // TILE)
        places = [(row * columns + column, mark.x - column * TILE, mark.y - row * TILE)]
        if len(pixels) > 1:
            places.append((-1, mark.x / columns, mark.y / rows))
        for tile, x, y in places:
            patch = int(y // PATCH) * GRID + int(x // PATCH)
            labels[tile, patch] = LABEL_IDS[mark.label]
            facts[tile, patch] = 0
            facts[tile, patch, [FACT_IDS[fact] for fact in mark.facts]] = 1
    return LabelledTiles(pixels, labels, facts)


class TileStream:
    """Batches of labelled tiles, one after the other from seeded generators."""

    def __init__(self, *, seed: int, split: str) -> None:
        self._skills: list[Skill] = [skill(seed=seed, split=split) for skill, _ in MIXTURE]
        self._shares = [share for _, share in MIXTURE]
        self._rng = np.random.default_rng([seed, len(split)])
        self._index = 0

    def batch(self, size: int) -> LabelledTiles:
        """The next `size` tiles."""
        pages: list[LabelledTiles] = []
        while sum(len(page.pixels) for page in pages) < size:
            skill = self._skills[self._rng.choice(len(self._skills), p=self._shares)]
            pages += map(label_tiles, skill.sample(self._index).pages)
            self._index += 1
        return LabelledTiles(*(torch.cat(parts)[:size] for parts in zip(*pages, strict=True)))


class LabelledEncoder(nn.Module):
    """The encoder with the four layers that pre-train it."""

    def __init__(self, encoder: InternVisionModel) -> None:
        super().__init__()
        width = encoder.config.hidden_size
        self.encoder = encoder
        self.names = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(LABELS)))
        self.facts = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(FACTS)))
        self.colours = nn.Linear(width, 12)
        self.places = nn.Linear(width, GRID * GRID)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Names (n, 64, labels), facts (n, 64, facts) and places (n, 64, 64) as logits, colours (n, 64, 12)."""
        patches = self.encoder(pixels).last_hidden_state[:, 1:]  # [n, 64, D]
        return self.names(patches), self.facts(patches), self.places(patches), self.colours(patches)


def losses(model: LabelledEncoder, tiles: LabelledTiles) -> dict[str, torch.Tensor]:
    """The losses of a batch; patches with nothing count a fifth."""
    pixels, labels, truths = tiles
    names, facts, places, colours = model(pixels)
    weight = torch.ones(len(LABELS))
    weight[0] = 0.2
    quarters = nn.functional.avg_pool2d(pixels, PATCH // 2)  # [n, 3, 16, 16]
    quarters = rearrange(quarters, "n c (r y) (k x) -> n (r k) (c y x)", y=2, x=2)  # [n, 64, 12]
    own_place = torch.arange(GRID * GRID).expand(len(pixels), -1)
    return {
        "names": nn.functional.cross_entropy(names.flatten(0, 1), labels.flatten(), weight=weight),
        "shapes": 0.1 * fact_loss(facts[..., SHAPE_FACTS], truths[..., SHAPE_FACTS]),
        "bars": 0.1 * fact_loss(facts[..., BAR_FACTS], truths[..., BAR_FACTS]),
        "colours": 0.1 * nn.functional.mse_loss(colours, quarters),
        "places": 0.02 * nn.functional.cross_entropy(places.flatten(0, 1), own_place.flatten()),
    }


def fact_loss(logits: torch.Tensor, truths: torch.Tensor) -> torch.Tensor:
    """The loss of one kind of facts (n, 64, facts of the kind).

    However few patches have such facts, they count five times as much together as all patches that have none.
    """
    surprise = nn.functional.binary_cross_entropy_with_logits(logits, truths, reduction="none").sum(-1)  # [n, 64]
    has_facts = truths.any(-1)  # [n, 64]
    loss = 0.2 * surprise[~has_facts].mean()
    return loss + surprise[has_facts].mean() if has_facts.any() else loss


@torch.no_grad()
def accuracy(model: LabelledEncoder, *, tiles: int, seed: int) -> dict[str, float]:
    """Share of patches named rightly on held-out pages, by what stands there, and of those with all facts right."""
    model.eval()
    pixels, labels, truths = TileStream(seed=seed, split="test").batch(tiles)
    outputs = [model(part) for part in pixels.split(64)]
    names = torch.cat([output[0].argmax(-1) for output in outputs])
    are_facts_right = ((torch.cat([output[1] for output in outputs]) > 0) == (truths > 0)).all(-1)
    groups: dict[str, list[bool]] = {}
    for label, is_right in zip(labels.flatten().tolist(), (names == labels).flatten().tolist(), strict=True):
        groups.setdefault(LABELS[label].split()[0], []).append(is_right)
    of_shapes, of_bars = truths[..., SHAPE_FACTS].any(-1), truths[..., BAR_FACTS].any(-1)
    groups |= {
        "facts-of-shapes": are_facts_right[of_shapes].tolist(),
        "facts-of-bars": are_facts_right[of_bars].tolist(),
    }
    model.train()
    return {f"accuracy {group}": sum(rights) / len(rights) for group, rights in sorted(groups.items())}


def pretrain_encoder(folder: Path, *, steps: int, seed: int) -> None:
    """Train an encoder from nothing, and save it to `folder` with its log."""
    torch.manual_seed(seed)
    model = LabelledEncoder(InternVisionModel(tiny_vision_config()))
    stream = TileStream(seed=seed, split="train")
    run = Run(steps=steps, learning_rate=1.5e-3, weight_decay=0.05)
    fit(
        folder,
        model,
        run,
        outside=[model.names, model.facts, model.colours, model.places],
        losses=lambda: losses(model, stream.batch(run.batch_size)),
        measure=lambda: accuracy(model, tiles=512, seed=seed + 1),
        measure_every=500,
    )
    model.encoder.save_pretrained(folder)
