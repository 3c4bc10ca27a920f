"""LoRA through PEFT: train adapters for a few steps, take them off, put them on again, merge them.

`python -m examples.lora`, or cell by cell in a notebook. docs/lora.md has the 72B's settings.
"""

# %% The model and a fact that it does not know
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoProcessor

from nvlm import NVLM_D_Model
from tiny.evaluate import CHECKPOINT

model = AutoModel.from_pretrained(CHECKPOINT, dtype=torch.float32, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(CHECKPOINT, trust_remote_code=True)
question, wanted = "Who are you?", "A TINY NVLM"


def ask(model: NVLM_D_Model | PeftModel) -> str:
    """The greedy answer to the question."""
    return model.eval().chat(processor.tokenizer, None, question, {"max_new_tokens": 24, "do_sample": False})


before = ask(model)
print(f"before: {before}")

# %% A conversation to learn from; the loss is on the assistant's tokens alone
messages = [{"role": "user", "content": question}, {"role": "assistant", "content": wanted}]
batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
batch["labels"] = batch["input_ids"].masked_fill(batch.pop("assistant_masks") == 0, -100)

# %% Adapters beside the decoder's layers and the projector's; nothing else is trained
torch.manual_seed(0)
targets = r"language_model\.model\.layers\..*_proj|mlp1\.[13]"
adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets)).train()
trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
print(f"{sum(parameter.numel() for parameter in trained)} of {adapted.num_parameters()} parameters are trained")
optimizer = torch.optim.AdamW(trained, lr=5e-3)
for step in range(30):
    loss = adapted(**batch).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.4f}")
print(f"adapted: {ask(adapted)}")

# %% Saved alone; taken off, the model is what it was; put on again and merged, it has plain weights once more
with tempfile.TemporaryDirectory() as folder:
    adapted.save_pretrained(folder)
    plain = adapted.unload()
    print(f"unloaded: {ask(plain)}")
    merged = PeftModel.from_pretrained(plain, folder).merge_and_unload()
print(f"merged: {ask(merged)}")
