"""`make demo`: the tiny trained NVLM-D looks at pages that it has never seen, and answers.

`python -m examples.demo` draws one held-out page of each skill; another `--seed` draws others. With `--picture FILE
--question TEXT` it is asked about a picture of your own: it was trained on capital letters, handwritten digits,
coloured shapes and bar charts on plain paper, and on nothing else.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase, TextIteratorStreamer
from transformers.utils.logging import disable_progress_bar

from nvlm import NVLM_D_Model, load_image
from nvlm.preprocessing import tile_grid
from tiny.evaluate import CHECKPOINT, TARGETS, held_out
from tiny.page import TILE

PAGES = Path(__file__).resolve().parent.parent / ".cache" / "demo"


def draw_grid(columns: int, rows: int) -> str:
    """The tiles' numbers as they lie in the picture."""
    edge = "  +" + "--------+" * columns
    lines = [edge]
    for row in range(rows):
        names = [f"tile {row * columns + column + 1}".center(8) for column in range(columns)]
        lines += ["  |" + "|".join(names) + "|", edge]
    return "\n".join(lines)


def stream(
    model: NVLM_D_Model, tokenizer: PreTrainedTokenizerBase, pictures: Sequence[Image.Image], question: str
) -> str:
    """Ask about some pictures, print the answer as it comes, and return it."""
    tiles = [load_image(picture, input_size=TILE, max_num=6) for picture in pictures]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    arguments = {
        "tokenizer": tokenizer,
        "pixel_values": torch.cat(tiles).to(model.dtype) if tiles else None,
        "question": "<image>\n" * len(tiles) + question,
        "generation_config": {"max_new_tokens": 32, "do_sample": False, "streamer": streamer},
        "num_patches_list": [len(picture) for picture in tiles] or None,
    }
    thread = Thread(target=model.chat, kwargs=arguments)
    thread.start()
    print(f"  User: {question}\n  Assistant: ", end="", flush=True)
    answer = ""
    for text in streamer:
        answer += text
        print(text, end="", flush=True)
    thread.join()
    return answer


def describe_picture(picture: Image.Image, where: Path) -> str:
    """Where a picture is, how large, and how it is cut."""
    columns, rows = tile_grid(*picture.size, image_size=TILE)
    tiles = f"{columns} x {rows} tiles and a thumbnail" if columns * rows > 1 else "one tile"
    return f"  {where}: {picture.width} x {picture.height} pixels, {tiles} of {TILE} x {TILE} pixels"


def show_skills(model: NVLM_D_Model, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> None:
    """Draw a page of each skill and ask about it."""
    PAGES.mkdir(parents=True, exist_ok=True)
    right = 0
    for skill in TARGETS:
        sample = held_out(skill, 1, seed=seed)[0]
        question, truth = sample.questions[0]
        print(f"{skill}:")
        for i, page in enumerate(sample.pages):
            file = PAGES / f"{skill.replace(' ', '_')}-{i}.png"
            page.picture.save(file)
            print(describe_picture(page.picture, file.relative_to(PAGES.parent.parent)))
            columns, rows = tile_grid(*page.picture.size, image_size=TILE)
            if columns * rows > 1:
                print(draw_grid(columns, rows))
        answer = stream(model, tokenizer, [page.picture for page in sample.pages], question)
        right += answer == truth
        print("   (right)\n" if answer == truth else f"   (wrong: {truth})\n")
    print(f"{right} of {len(TARGETS)} answers are right.")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=2026, help="which held-out pages are drawn")
    parser.add_argument("--picture", type=Path, help="a picture of your own")
    parser.add_argument("--question", default="Describe the page.", help="what to ask about it")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    start = time.perf_counter()
    model = AutoModel.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"An NVLM-D of {parameters / 1e6:.1f} million parameters, trained by `make tiny`, on {model.device}.\n")
    if options.picture:
        picture = Image.open(options.picture).convert("RGB")
        print(describe_picture(picture, options.picture))
        stream(model, tokenizer, [picture], options.question)
        print()
    else:
        show_skills(model, tokenizer, seed=options.seed)
    print(f"{time.perf_counter() - start:.1f} s.")


if __name__ == "__main__":
    main()
