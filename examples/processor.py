"""The tiny NVLM-D as any vision-language model of transformers: processor, batches, pipeline, streaming.

`python -m examples.processor`, or cell by cell in a notebook.
"""

# %% A checkpoint, its processor, and pages that it never saw
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer, pipeline

from tiny.evaluate import CHECKPOINT, held_out
from tiny.page import Sample

model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(CHECKPOINT, trust_remote_code=True)
samples = [held_out(skill, 1)[0] for skill in ("words", "two pictures", "arithmetic")]
greedy = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": processor.tokenizer.pad_token_id}
chat = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}


def conversation(sample: Sample) -> list[dict[str, Any]]:
    """A question with its pages before it. A picture may also be a `path`, an `image_url`, `base64` or bytes."""
    pages = [{"type": "image", "image": page.picture} for page in sample.pages]
    return [{"role": "user", "content": [*pages, {"type": "text", "text": sample.questions[0][0]}]}]


# %% One conversation: messages to tensors, tensors to tokens, the new ones to text
inputs = processor.apply_chat_template(conversation(samples[0]), **chat)
output = model.generate(**inputs, **greedy)
answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(f"one conversation: {answer}")

# %% Several at once, with two, one and no pictures: padded on the left, so that all go on at the same place
batch = processor.apply_chat_template([conversation(sample) for sample in samples], **chat)
print("padding:", (batch["attention_mask"] == 0).sum(1).tolist(), "tokens; tiles:", len(batch["pixel_values"]))
output = model.generate(**batch, **greedy)
answers = processor.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
for sample, text in zip(samples, answers, strict=True):
    print(f"batch: {text} (asked: {sample.questions[0][0]})")

# %% The same in one call
pipe: Any = pipeline("image-text-to-text", model=model, processor=processor)
[result] = pipe(text=conversation(samples[0]), return_full_text=False, generate_kwargs=greedy)
print(f"pipeline: {result['generated_text']}")

# %% Text as it comes
print("streamed: ", end="")
model.generate(
    **inputs, **greedy, streamer=TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
)
