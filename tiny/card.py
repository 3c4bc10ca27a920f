"""What stands beside the tiny checkpoint: its scores, its logs and curves, and the model card that tells of both."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from nvlm.training.plot import smooth
from tiny.evaluate import TARGETS, evaluate, table

LOGS = {
    "encoder": "names",
    "decoder": "loss",
    "pretrain": "loss",
    "sft": "loss",
    "answers": "loss",
}  # phase -> what its curve shows
SAMPLES = 500

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# A tiny NVLM-D that sees

NVLM-D's architecture with {parameters:.1f} million parameters ({megabytes:.1f} MB): an InternViT of {encoder_layers}
layers with {dummies} dummy heads, pixel shuffle, the two-layer projector, a Qwen2 decoder of {decoder_layers} layers
and a vocabulary of {vocabulary} tokens, with tiles of {tile} pixels and {tokens} tokens each. It was trained on
two CPU cores from nothing by `make tiny`, for tests and demonstrations of this repository's code; it knows nothing
but the seven skills below and is of no other use.

```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("tiny/checkpoint", trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained("tiny/checkpoint", trust_remote_code=True)
print(model.chat(tokenizer, None, "What is 37 + 5?"))
```

The modules here are links to the repository's own: copy the folder with `cp -rL`.

## Scores

Greedy answers, exact match. All handwriting, words and sums are of the test split: one in five of scikit-learn's
digits by index, one in five words and sums by hash. None of them was trained on, and no page either.

{scores}

{missed}

The last rows are digit strings again with the model broken on purpose: the score notices each fault.

## Training

{phases}

The encoder learned to name what stands at each patch with facts about it (at a letter, the value of the bar below it;
a shape's kind, colour and zone), the decoder to compute and to answer about notes in words; then the projector alone
learned to describe pages, and projector and decoder learned all skills, in two parts (`training/stages/tiny_*.yaml`).
The logs are in `logs/`, the curves:

![loss curves](curves.png)
"""


def read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of a log."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def plot_curves(file: Path, logs: dict[str, list[dict[str, Any]]]) -> None:
    """Draw the loss of every phase over its steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (phase, entries) in zip(figure.subplots(1, len(logs)), logs.items(), strict=True):
        steps, losses = [entry["step"] for entry in entries], [entry[LOGS[phase]] for entry in entries]
        axes.plot(steps, losses, color="tab:blue", alpha=0.3)
        axes.plot(steps, smooth(losses), color="tab:blue")
        axes.set_yscale("log")
        axes.set_title(phase)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
    figure.savefig(file, dpi=100)


def write_card(folder: Path, *, work: Path, phases: Iterable[str]) -> None:
    """Write a checkpoint's logs, curves and model card into its folder, and its scores unless they are there.

    Args:
        folder: the checkpoint.
        work: where `tiny.build` left the phases.
        phases: their names.
    """
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    scores = folder / "results.json"
    if not scores.exists():
        results = evaluate(model, AutoTokenizer.from_pretrained(folder), count=SAMPLES)
        scores.write_text(json.dumps(results, indent=2) + "\n")
    results = json.loads(scores.read_text())
    (folder / "logs").mkdir(exist_ok=True)
    for phase in LOGS:
        shutil.copy(work / phase / "log.jsonl", folder / "logs" / f"{phase}.jsonl")
    plot_curves(folder / "curves.png", {phase: read_log(folder / "logs" / f"{phase}.jsonl") for phase in LOGS})
    seconds = {phase: json.loads((work / "seconds" / f"{phase}.json").read_text())["seconds"] for phase in phases}
    rows = [f"| {phase} | {value / 60:.1f} |" for phase, value in seconds.items()]
    missed = [f"{name} ({value:.1f})" for name, value in results["scores"].items() if value < TARGETS[name]]
    stored = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    text = CARD.format(
        parameters=weights.stat().st_size / 2e6,
        megabytes=weights.stat().st_size / 1e6,
        encoder_layers=stored["vision_config"]["num_hidden_layers"],
        dummies=stored["vision_config"]["num_dummy_heads"],
        decoder_layers=stored["llm_config"]["num_hidden_layers"],
        vocabulary=stored["llm_config"]["vocab_size"],
        tile=model.config.tile_size,
        tokens=model.config.num_image_token,
        scores=table(results),
        missed=f"Below their targets: {', '.join(missed)}." if missed else "All targets are reached.",
        phases="\n".join(
            ["| phase | minutes on 2 cores |", "| --- | ---: |", *rows, f"| all | {sum(seconds.values()) / 60:.1f} |"]
        ),
    )
    (folder / "README.md").write_text(text)
    print(table(results))
