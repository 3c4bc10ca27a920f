"""Every way to decode that transformers has: beams, sampling, prompt lookup, caches, several answers to a question.

`python -m examples.decoding`, or cell by cell in a notebook.
"""

# %% A row of digits on a page of several tiles
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tiny.evaluate import CHECKPOINT, held_out

model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(CHECKPOINT, trust_remote_code=True)
sample = held_out("digit strings", 1)[0]
question, truth = sample.questions[0]
content = [{"type": "image", "image": sample.pages[0].picture}, {"type": "text", "text": question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
)
print(f"{question} ({len(inputs['pixel_values'])} tiles, written is {truth})")


def decode(name: str, **options: Any) -> list[str]:
    """The answers that some options of `generate` give; each beam and each sample has the page's tiles."""
    output = model.generate(**inputs, max_new_tokens=24, pad_token_id=processor.tokenizer.pad_token_id, **options)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{name}: {' | '.join(answers)}")
    return answers


# %% Three that must agree: prompt lookup guesses several tokens at once, a static cache is allocated once
greedy = decode("greedy", do_sample=False)
looked_up = decode("prompt lookup", do_sample=False, prompt_lookup_num_tokens=3)
static = decode("static cache", do_sample=False, cache_implementation="static")

# %% Beams, the best of them and the best two
best = decode("4 beams", do_sample=False, num_beams=4)
two = decode("the best 2 of 4 beams", do_sample=False, num_beams=4, num_return_sequences=2)

# %% Sampling, several answers at once
torch.manual_seed(0)
sampled = decode("sampled", do_sample=True, temperature=3.0, num_return_sequences=4)

# %% From the same tokens on: the cache of the first call is read again, and only what is new is computed
first = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
rest = model.generate(
    first.sequences, past_key_values=first.past_key_values, max_new_tokens=22, do_sample=False
)  # the pictures are in the cache
resumed = processor.decode(rest[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(f"stopped and resumed: {resumed}")
