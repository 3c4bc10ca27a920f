"""Pictures to tiles, against the documents' pipeline and against one thread; a ratio above 1 is faster than those."""

import io
import statistics
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode

from benchmarks.report import Figure, Section
from benchmarks.settings import Settings
from benchmarks.timing import take_turns
from nvlm.preprocessing import IMAGENET_MEAN, IMAGENET_STD, load_image, load_images, tile_grid

SIZES = [(448, 448), (640, 480), (1344, 896), (1920, 1080), (4000, 3000)]
TILE, MAX_NUM, PICTURES = 448, 6, 8


def photograph(width: int, height: int) -> Image.Image:
    """Gradients, waves and a little noise: about as compressible as a photograph."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = 128 + 80 * np.sin(x / 37) * np.cos(y / 23)
    picture = np.stack([x * 255 / width, y * 255 / height, waves], axis=-1)
    picture += np.random.default_rng(0).normal(0, 6, picture.shape)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def tile_by_tile(source: Image.Image | bytes) -> torch.Tensor:
    """The documents' way: cut PIL tiles, send each through torchvision's transforms, stack the tensors."""
    picture = (source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source))).convert("RGB")
    transform = transforms.Compose(
        [
            transforms.Resize((TILE, TILE), interpolation=InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    columns, rows = tile_grid(*picture.size, max_num=MAX_NUM, image_size=TILE)
    whole = picture.resize((columns * TILE, rows * TILE))
    corners = [(column * TILE, row * TILE) for row in range(rows) for column in range(columns)]
    tiles = [whole.crop((x, y, x + TILE, y + TILE)) for x, y in corners]
    if len(tiles) > 1:
        tiles.append(picture.resize((TILE, TILE)))
    return torch.stack([transform(tile) for tile in tiles])


def one_by_one(sources: list[bytes]) -> torch.Tensor:
    return torch.cat([load_image(source, TILE, MAX_NUM) for source in sources])


def ratio_of_medians(seconds: dict[str, list[float]]) -> tuple[float, float]:
    """(median seconds of "ours", that of "before" / that of "ours")."""
    before, ours = statistics.median(seconds["before"]), statistics.median(seconds["ours"])
    return ours, before / ours


def run(settings: Settings) -> Section:
    figures, data = [], dict[str, Any]()
    rounds = settings.rounds_or(9)
    for width, height in SIZES:
        picture = photograph(width, height)
        for kind, source in (("PIL", picture), ("JPEG", jpeg(picture))):
            if not torch.equal(tile_by_tile(source), load_image(source, TILE, MAX_NUM)):
                raise RuntimeError(f"{width}x{height} {kind}: the tiles differ, so the times mean nothing.")
            contenders = {
                "before": partial(tile_by_tile, source),
                "ours": partial(load_image, source, TILE, MAX_NUM),
            }
            name = f"{width}x{height} {kind}"
            data[name] = take_turns(contenders, rounds=rounds)
            taken, ratio = ratio_of_medians(data[name])
            figures.append(Figure(f"{name}, {taken * 1e3:.1f} ms: tile by tile in torchvision / load_image", ratio))
    for width, height in SIZES[1:]:
        sources = [jpeg(photograph(width, height))] * PICTURES
        contenders = {
            "before": partial(one_by_one, sources),
            "ours": partial(load_images, sources, TILE, MAX_NUM, num_workers=2),
        }
        name = f"{width}x{height} x{PICTURES}"
        data[name] = take_turns(contenders, rounds=max(3, rounds // 3))
        taken, ratio = ratio_of_medians(data[name])
        figures.append(Figure(f"{name}, {taken * 1e3:.1f} ms: one by one / load_images, 2 workers", ratio))
    return Section("preprocessing", f"pictures to at most {MAX_NUM} tiles of {TILE} pixels", figures, data)
