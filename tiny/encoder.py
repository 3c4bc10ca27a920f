"""Pre-training of the tiny encoder: each patch says what stands at it.

A linear layer on every patch's features names the mark whose centre lies in the patch (or none), two more give the
patch's colours and its place on the tile. The three layers are thrown away afterwards.
"""

from pathlib import Path

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
from tiny.skills import Charts, Digits, DigitStrings, Shapes, Words
from tiny.skills.charts import TALLEST
from tiny.skills.clutter import Clutter
from tiny.skills.shapes import COLOURS, SHAPES
from tiny.skills.words import ALPHABET

LABELS = [
    "nothing",
    *(f"digit {digit}" for digit in range(10)),
    *(f"letter {letter}" for letter in ALPHABET),
    *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES),
    *(f"bar {value}" for value in range(1, TALLEST + 1)),
]
LABEL_IDS = {label: i for i, label in enumerate(LABELS)}
GRID = 8  # patches a side
MIXTURE = ((Clutter, 0.5), (Charts, 0.16), (DigitStrings, 0.14), (Words, 0.12), (Digits, 0.04), (Shapes, 0.04))


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


def label_tiles(page: Page) -> tuple[torch.Tensor, torch.Tensor]:
    """A page's tiles as the model gets them, the thumbnail last, and what stands at their patches.

    Returns:
        Pixels (tiles, 3, 112, 112) and label ids int64 (tiles, 64).
    """
    pixels = load_image(page.picture, input_size=TILE, max_num=6)
    columns, rows = tile_grid(*page.picture.size, image_size=TILE)
    labels = torch.zeros(len(pixels), GRID * GRID, dtype=torch.long)
    for mark in page.marks:
        column, row = int(mark.x // TILE), int(mark.y // TILE)
        x, y = mark.x - column * TILE, mark.y - row * TILE
        labels[row * columns + column, int(y // PATCH) * GRID + int(x // PATCH)] = LABEL_IDS[mark.label]
        if len(pixels) > 1:
            x, y = mark.x / columns, mark.y / rows
            labels[-1, int(y // PATCH) * GRID + int(x // PATCH)] = LABEL_IDS[mark.label]
    return pixels, labels


class TileStream:
    """Batches of labelled tiles, one after the other from seeded generators."""

    def __init__(self, *, seed: int, split: str) -> None:
        self._skills: list[Skill] = [skill(seed=seed, split=split) for skill, _ in MIXTURE]
        self._shares = [share for _, share in MIXTURE]
        self._rng = np.random.default_rng([seed, len(split)])
        self._index = 0

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels (size, 3, 112, 112) and label ids (size, 64)."""
        pixels: list[torch.Tensor] = []
        labels: list[torch.Tensor] = []
        while sum(map(len, pixels)) < size:
            skill = self._skills[self._rng.choice(len(self._skills), p=self._shares)]
            for page in skill.sample(self._index).pages:
                page_pixels, page_labels = label_tiles(page)
                pixels.append(page_pixels)
                labels.append(page_labels)
            self._index += 1
        return torch.cat(pixels)[:size], torch.cat(labels)[:size]


class LabelledEncoder(nn.Module):
    """The encoder with the three layers that pre-train it."""

    def __init__(self, encoder: InternVisionModel) -> None:
        super().__init__()
        width = encoder.config.hidden_size
        self.encoder = encoder
        self.names = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(LABELS)))
        self.colours = nn.Linear(width, 12)
        self.places = nn.Linear(width, GRID * GRID)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits of names (n, 64, labels), colours (n, 64, 12) and logits of places (n, 64, 64)."""
        patches = self.encoder(pixels).last_hidden_state[:, 1:]  # [n, 64, D]
        return self.names(patches), self.colours(patches), self.places(patches)


def losses(model: LabelledEncoder, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The three losses of a batch; patches with nothing count a fifth."""
    names, colours, places = model(pixels)
    weight = torch.ones(len(LABELS))
    weight[0] = 0.2
    quarters = nn.functional.avg_pool2d(pixels, PATCH // 2)  # [n, 3, 16, 16]
    quarters = rearrange(quarters, "n c (r y) (k x) -> n (r k) (c y x)", y=2, x=2)  # [n, 64, 12]
    own_place = torch.arange(GRID * GRID).expand(len(pixels), -1)
    return {
        "names": nn.functional.cross_entropy(names.flatten(0, 1), labels.flatten(), weight=weight),
        "colours": 0.1 * nn.functional.mse_loss(colours, quarters),
        "places": 0.02 * nn.functional.cross_entropy(places.flatten(0, 1), own_place.flatten()),
    }


@torch.no_grad()
def accuracy(model: LabelledEncoder, *, tiles: int, seed: int) -> dict[str, float]:
    """Share of patches named rightly on held-out pages, by what stands there."""
    model.eval()
    pixels, labels = TileStream(seed=seed, split="test").batch(tiles)
    names = torch.cat([model(part)[0].argmax(-1) for part in pixels.split(64)])
    groups: dict[str, list[bool]] = {}
    for label, is_right in zip(labels.flatten().tolist(), (names == labels).flatten().tolist(), strict=True):
        groups.setdefault(LABELS[label].split()[0], []).append(is_right)
    model.train()
    return {f"accuracy {group}": sum(rights) / len(rights) for group, rights in sorted(groups.items())}


def pretrain_encoder(folder: Path, *, steps: int, seed: int) -> InternVisionModel:
    """Train an encoder from nothing, save it to `folder` with its log, and return it."""
    torch.manual_seed(seed)
    model = LabelledEncoder(InternVisionModel(tiny_vision_config()))
    stream = TileStream(seed=seed, split="train")
    run = Run(steps=steps, learning_rate=1.5e-3, weight_decay=0.05)
    fit(
        folder,
        model,
        run,
        losses=lambda: losses(model, *stream.batch(run.batch_size)),
        measure=lambda: accuracy(model, tiles=512, seed=seed + 1),
        measure_every=1000,
    )
    model.encoder.save_pretrained(folder)
    return model.encoder
