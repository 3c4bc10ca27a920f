"""Scores the tiny NVLM-D as evaluation harnesses do: with VLMEvalKit's calls, and by lmms-eval on a task of our own.

`python -m examples.harness [FOLDER]`, or cell by cell in a notebook. lmms-eval need not be there; docs/evaluation.md
has the commands for the 72B.
"""

# %% A task for lmms-eval: pictures, a line of JSON a question, and what to make of them
import importlib.util
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from nvlm import load_image
from tiny.evaluate import CHECKPOINT, held_out

TASK = """task: tiny_pages
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/questions.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function pages.pictures
doc_to_text: question
doc_to_target: answer
metric_list:
  - metric: exact_match
"""
PICTURES = "from PIL import Image\n\n\ndef pictures(doc):\n    return [Image.open(doc['picture'])]\n"
folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".cache/harness").resolve()
folder.mkdir(parents=True, exist_ok=True)
samples = [sample for skill in ("digits", "digit strings", "words") for sample in held_out(skill, 4)]
tasks = []
for i, sample in enumerate(samples):
    question, answer = sample.questions[0]
    tasks.append({"picture": str(folder / f"{i}.png"), "question": question, "answer": answer})
    sample.pages[0].picture.save(tasks[-1]["picture"])
(folder / "questions.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
(folder / "tiny_pages.yaml").write_text(TASK.format(folder=folder))
(folder / "pages.py").write_text(PICTURES)

# %% VLMEvalKit's adapter loads the model once and calls `chat` for each question
model = AutoModel.from_pretrained(CHECKPOINT, dtype=torch.float32, trust_remote_code=True, device_map="auto").eval()
tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, trust_remote_code=True)
options = {"max_new_tokens": 24, "do_sample": False}
right = 0
for task in tasks:
    tiles = load_image(task["picture"], input_size=model.config.tile_size, max_num=6).to(model.device)
    right += model.chat(tokenizer, tiles, task["question"], options).strip() == task["answer"]
print(f"VLMEvalKit's calls: {right} of {len(tasks)} right")

# %% lmms-eval finds the model `nvlm_d` by this package's entry point
if importlib.util.find_spec("lmms_eval"):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager("WARNING", include_path=str(folder), model_name="nvlm_d")
    arguments = f"pretrained={CHECKPOINT},dtype=float32"
    report = simple_evaluate(
        model="nvlm_d", model_args=arguments, tasks=["tiny_pages"], batch_size=4, task_manager=manager
    )
    score = report["results"]["tiny_pages"]["exact_match,none"]
    print(f"lmms-eval: {round(score * len(tasks))} of {len(tasks)} right")
else:
    print(f"lmms-eval: not installed; its task is in {folder}")
