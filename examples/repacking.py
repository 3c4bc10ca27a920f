"""A checkpoint without its dummy heads, in parts, and put together again: the answers stay the same.

`python -m examples.repacking FOLDER`, or cell by cell in a notebook. The commands are `nvlm repack`, `nvlm extract` and
`nvlm compose`; here their functions are called.
"""

# %% Where to write, and a question to compare with
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from nvlm import load_image
from nvlm.cli.compose import compose
from nvlm.cli.extract import extract
from nvlm.cli.repack import repack
from tiny.evaluate import CHECKPOINT, held_out

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
sample = held_out("words", 1)[0]
question, truth = sample.questions[0]


def ask(checkpoint: Path) -> str:
    """The greedy answer of a checkpoint."""
    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    pixel_values = load_image(sample.pages[0].picture, input_size=model.config.tile_size, max_num=6)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return model.chat(tokenizer, pixel_values, question, {"max_new_tokens": 24, "do_sample": False})


print(f"as it is: {ask(CHECKPOINT)} (written is {truth})")

# %% What leaving out the dummy heads would save, told by the headers alone; then done
saved = repack(CHECKPOINT, folder / "smaller", drop_dummy_heads=True, dry_run=True)
print(f"dry run: {saved.old_bytes} -> {saved.new_bytes} bytes")
repack(CHECKPOINT, folder / "smaller", drop_dummy_heads=True)
print(f"repacked: {ask(folder / 'smaller')}")

# %% Each part as a checkpoint of its own: the decoder is an ordinary Qwen2
for part in ("encoder", "projector", "decoder"):
    extract(CHECKPOINT, folder / part, part=part)
encoder = AutoModel.from_pretrained(folder / "encoder")
decoder = AutoModelForCausalLM.from_pretrained(folder / "decoder")
print(f"extracted: {type(encoder).__name__}, {type(decoder).__name__}")

# %% One checkpoint of the three again; another decoder of the same sizes would do as well
parts = {part: folder / part for part in ("encoder", "projector", "decoder")}
compose(folder / "whole", **parts, config=CHECKPOINT / "config.json")
print(f"composed: {ask(folder / 'whole')}")
