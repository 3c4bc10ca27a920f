"""A conversation that does not start over: two pictures, a fork, an undo, and a file to go on from tomorrow.

python -m examples.conversation
"""

# %% The tiny trained model and two pages that it never saw

import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from nvlm import NVLM_D_Model
from tiny.evaluate import CHECKPOINT, held_out

model = NVLM_D_Model.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
chart, shapes = held_out("charts", 1)[0], held_out("shapes", 1)[0]

# %% Each question reads only what is new

session = model.start_chat(tokenizer, generation_config={"max_new_tokens": 24, "do_sample": False})
print("bars:", session.ask(chart.questions[0][0], [chart.pages[0].picture]))
print("shapes:", session.ask(shapes.questions[0][0], [shapes.pages[0].picture]))

# %% A fork goes its own way, an undo forgets

other = session.fork()
print("streamed: ", *other.stream(shapes.questions[1][0]), sep="")
session.undo()
print("turns:", len(session.history), "and", len(other.history))

# %% Saved and loaded

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "chat.safetensors"
    other.save(path)
    session.load(path)
print("same history:", session.history == other.history)
