"""One model over several processes, each with its part of every layer; the answers are those of one process.

`torchrun --nproc-per-node 2 -m examples.tensor_parallel`: on 2 GPUs or on a CPU. docs/several_processes.md says more.
"""

# %% The plan is the model's own; transformers 4.57 has it under another name
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from nvlm import load_image
from tiny.evaluate import CHECKPOINT, held_out

if transformers.__version__.startswith("4."):
    plan: dict[str, Any] = {"tp_plan": "auto"}
else:
    from transformers.distributed import DistributedConfig

    plan = {"distributed_config": DistributedConfig(tp_plan="auto")}
disable_progress_bar()
model = AutoModel.from_pretrained(CHECKPOINT, dtype=torch.float32, trust_remote_code=True, **plan).eval()
tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)

# %% Every process asks the same; each computes its part and they add up
sample = held_out("words", 1)[0]
question, truth = sample.questions[0]
pixel_values = load_image(sample.pages[0].picture, input_size=model.config.tile_size, max_num=6)
answer = model.chat(tokenizer, pixel_values, question, {"max_new_tokens": 24, "do_sample": False})

# %% The first one tells
weight = model.language_model.model.layers[0].mlp.up_proj.weight
part = weight.to_local() if hasattr(weight, "to_local") else weight
rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
if rank == 0:
    rows = model.config.llm_config.intermediate_size
    print(f"process {rank} of {count} holds {part.shape[0]} of {rows} rows of a layer's up_proj")
    print(f"{question} {answer} (written is {truth})")
torch.distributed.destroy_process_group()
