"""Pictures to tiles, against the documents' pipeline and against one thread.

    python -m benchmarks.preprocessing [--json FILE] [--rounds N]

Ratios are of medians of runs that take turns, so that a busy machine weighs on both sides alike; above 1 is faster.
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode

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


def medians(rounds: int, *contenders: Callable[[], Any]) -> list[float]:
    """Each contender's median time in seconds, after one run each to warm up."""
    times: list[list[float]] = [[] for _ in contenders]
    for round_number in range(rounds + 1):
        for own_times, contender in zip(times, contenders, strict=True):
            start = time.perf_counter()
            contender()
            if round_number:
                own_times.append(time.perf_counter() - start)
    return [statistics.median(own_times) for own_times in times]


def report(name: str, seconds: list[float], results: dict[str, Any]) -> None:
    before, after = seconds
    results[name] = {"before_ms": before * 1e3, "after_ms": after * 1e3, "ratio": before / after}
    print(f"{name:44} {before * 1e3:9.1f} ms {after * 1e3:9.1f} ms {before / after:6.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--rounds", type=int, default=15, help="timed runs of each contender (default 15)")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}

    print(f"{'load_image: per-tile torchvision / here':44} {'torchvision':>12} {'here':>12}  ratio")
    for width, height in SIZES:
        picture = photograph(width, height)
        for kind, source in (("PIL", picture), ("JPEG", jpeg(picture))):
            if not torch.equal(tile_by_tile(source), load_image(source, TILE, MAX_NUM)):
                raise SystemExit(f"{width}x{height} {kind}: the tiles differ, so the times mean nothing")
            seconds = medians(
                arguments.rounds,
                partial(tile_by_tile, source),
                partial(load_image, source, TILE, MAX_NUM),
            )
            report(f"{width}x{height} {kind}", seconds, results)

    print(
        f"\n{f'{PICTURES} JPEGs: one by one / load_images, 2 workers':44} {'one by one':>12} {'load_images':>12}  ratio"
    )
    for width, height in SIZES[1:]:
        sources = [jpeg(photograph(width, height))] * PICTURES
        seconds = medians(
            max(3, arguments.rounds // 2),
            partial(one_by_one, sources),
            partial(load_images, sources, TILE, MAX_NUM, num_workers=2),
        )
        report(f"{width}x{height} x{PICTURES}", seconds, results)

    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
