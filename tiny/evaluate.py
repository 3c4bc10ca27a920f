"""How much the tiny model understands: exact match on pages, handwriting, words and sums that it never saw.

`python -m tiny.evaluate [FOLDER] [--json FILE]` prints the table of all skills, greedy, 500 samples each, and what
three faults made on purpose cost: a score that does not notice them would measure nothing.
"""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from nvlm import NVLM_D_Model, load_image
from nvlm.preprocessing import tile_grid
from tiny.page import TILE, Sample
from tiny.skills import make_skills

CHECKPOINT = Path(__file__).resolve().parent / "checkpoint"
TARGETS = {
    "digits": 95,
    "digit strings": 90,
    "words": 85,
    "shapes": 95,
    "charts": 85,
    "two pictures": 85,
    "arithmetic": 95,
}
TEST_SEED = 1
MOST_NEW_TOKENS = 24
BATCH = 25
TileOrder = Callable[[torch.Tensor], torch.Tensor]


def in_order(tiles: torch.Tensor) -> torch.Tensor:
    """The tiles of a picture as they are."""
    return tiles


def backwards(tiles: torch.Tensor) -> torch.Tensor:
    """The tiles of a picture from the last to the first, the thumbnail still at the end."""
    return torch.cat([tiles[:-1].flip(0), tiles[-1:]]) if len(tiles) > 1 else tiles


def ask(
    model: NVLM_D_Model,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    question: int = 0,
    max_tiles: int = 6,
    order: TileOrder = in_order,
) -> list[str]:
    """The model's greedy answers to one question of each sample, asked alone."""
    pictures = [page.picture for sample in samples for page in sample.pages]
    tiles = [order(load_image(picture, input_size=TILE, max_num=max_tiles)) for picture in pictures]
    answers = model.batch_chat(
        tokenizer,
        torch.cat(tiles).to(model.dtype) if tiles else None,
        ["<image>\n" * len(sample.pages) + sample.questions[question][0] for sample in samples],
        {"max_new_tokens": MOST_NEW_TOKENS, "do_sample": False},
        num_patches_list=[len(picture) for picture in tiles] or None,
        tile_grids=[tile_grid(*picture.size, max_num=max_tiles, image_size=TILE) for picture in pictures] or None,
    )
    return [str(answer) for answer in answers]


def score(
    model: NVLM_D_Model,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    question: int = 0,
    max_tiles: int = 6,
    order: TileOrder = in_order,
    description: str = "",
) -> float:
    """Per cent of samples of which a question, by default the first, is answered exactly."""
    right = 0
    batches = [samples[i : i + BATCH] for i in range(0, len(samples), BATCH)]
    for batch in tqdm(batches, desc=description, leave=False, mininterval=5):
        answers = ask(model, tokenizer, batch, question=question, max_tiles=max_tiles, order=order)
        right += sum(answer == sample.questions[question][1] for answer, sample in zip(answers, batch, strict=True))
    return 100 * right / len(samples)


def held_out(skill: str, count: int, *, seed: int = TEST_SEED) -> list[Sample]:
    """The first samples of a skill's test split."""
    generator = next(made for made in make_skills(seed=seed, split="test") if made.name == skill)
    return [generator.sample(index) for index in range(count)]


@contextlib.contextmanager
def changed(config: Any, name: str, value: object) -> Iterator[None]:
    """A config with one field changed for a while."""
    before = getattr(config, name)
    setattr(config, name, value)
    try:
        yield
    finally:
        setattr(config, name, before)


def faults(model: NVLM_D_Model, tokenizer: Any, samples: Sequence[Sample]) -> dict[str, float]:
    """The scores of the model with its pixel shuffle swapped, its tags dropped, and its tiles swapped."""
    scores = {}
    with changed(model.config, "ps_version", "v1" if model.config.ps_version == "v2" else "v2"):
        scores["pixel shuffle swapped"] = score(model, tokenizer, samples, description="pixel shuffle")
    with changed(model.config, "tile_tag", "none"):
        scores["tags dropped"] = score(model, tokenizer, samples, description="tags")
    scores["tiles swapped"] = score(model, tokenizer, samples, order=backwards, description="tiles")
    return scores


def evaluate(model: NVLM_D_Model, tokenizer: Any, *, count: int) -> dict[str, Any]:
    """The scores of all skills, and those of the three faults on digit strings, in per cent."""
    scores = {skill: score(model, tokenizer, held_out(skill, count), description=skill) for skill in TARGETS}
    return {"samples": count, "scores": scores, "faults": faults(model, tokenizer, held_out("digit strings", count))}


def table(results: dict[str, Any]) -> str:
    """Results as a Markdown table."""
    lines = [f"| exact match on {results['samples']} held-out samples | % | target |", "| --- | ---: | ---: |"]
    lines += [f"| {skill} | {value:.1f} | {TARGETS[skill]} |" for skill, value in results["scores"].items()]
    whole = results["scores"]["digit strings"]
    lines += [
        f"| digit strings, {fault} | {value:.1f} | {whole - 20:.1f} or less |"
        for fault, value in results["faults"].items()
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tiny.evaluate", description=__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=CHECKPOINT, help="the checkpoint, by default the tiny one"
    )
    parser.add_argument("--samples", type=int, default=500, help="samples of each skill")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args(arguments)
    model = AutoModel.from_pretrained(options.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    results = evaluate(model, tokenizer, count=options.samples)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
