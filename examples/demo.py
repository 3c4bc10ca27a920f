"""`make demo`: a tiny NVLM-D looks at a real photograph, tile by tile, and streams an answer."""

import time
from pathlib import Path
from threading import Thread

import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import AutoModel, AutoTokenizer, TextIteratorStreamer
from transformers.utils.logging import disable_progress_bar

from nvlm import load_image
from nvlm.preprocessing import tile_grid
from tiny.untrained import REPOSITORY, build_untrained

QUESTION = "<image>\nPlease describe the image shortly."


def draw_grid(columns: int, rows: int) -> str:
    """The tiles' numbers as they lie in the picture."""
    edge = "  +" + "--------+" * columns
    lines = [edge]
    for row in range(rows):
        names = [f"tile {row * columns + column + 1}".center(8) for column in range(columns)]
        lines += ["  |" + "|".join(names) + "|", edge]
    return "\n".join(lines)


def main() -> None:
    disable_progress_bar()
    path = build_untrained(Path(REPOSITORY) / ".cache" / "tiny-untrained")
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)

    photograph = Image.fromarray(load_sample_image("china.jpg"))
    size = model.config.tile_size
    pixel_values = load_image(photograph, input_size=size, max_num=6)
    columns, rows = tile_grid(*photograph.size, image_size=size)
    print(f"china.jpg, {photograph.width} x {photograph.height} pixels -> {columns} x {rows} tiles and a thumbnail,")
    print(f"each {size} x {size} pixels and {model.num_image_token} tokens: pixel_values {tuple(pixel_values.shape)}\n")
    print(draw_grid(columns, rows))

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    generation_config = {"max_new_tokens": 24, "do_sample": False, "streamer": streamer}
    start = time.perf_counter()
    thread = Thread(target=model.chat, args=(tokenizer, pixel_values, QUESTION, generation_config))
    thread.start()
    print("\nUser: " + QUESTION.replace("\n", " "))
    print("Assistant (random weights, so random words): ", end="")
    for text in streamer:
        if text == model.conv_template.sep:
            break
        print(text, end="", flush=True)
    thread.join()
    print(f"\n\n24 tokens in {time.perf_counter() - start:.1f} s, on {model.device}.")


if __name__ == "__main__":
    main()
