"""The paper's ablation of tile tags at the tiny model's size (paper, Table 1): five ways to show a large page.

`python -m tiny.ablation` first teaches the pre-trained encoder and decoder to read numbers on pages of one tile,
without any tags. From there each way is trained with each seed on pages of several tiles, with the same number of
steps, and asked about held-out ones. A run that is finished is not run again. The results are written to
`docs/tile_tags.json` and `docs/tile_tags.png`.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, Qwen2ForCausalLM

from nvlm.modeling_intern_vit import InternVisionModel
from nvlm.training.run import train
from nvlm.training.stage import Stage
from tiny.assemble import REPOSITORY, assemble
from tiny.build import STAGES, WORK
from tiny.dataset import as_conversation, write_blend
from tiny.evaluate import held_out, score
from tiny.skills import make_skills

KINDS: dict[str, dict[str, Any]] = {
    "low resolution": {"tile_tag": "1d", "max_tiles": 1},
    "tiles without tags": {"tile_tag": "none"},
    "2-D grid tags": {"tile_tag": "2d_grid"},
    "2-D box tags": {"tile_tag": "2d_box"},
    "1-D tags": {"tile_tag": "1d"},
}
SEEDS = (0, 1, 2)
QUESTIONS = ("all digits", "one place")  # what the first and the second question of a digit string ask for
PAGES = 6000
DATA_SEED = 2
BASE_STEPS = 400
ROOT = WORK.parent / "tiny-ablation"
DOCS = REPOSITORY / "docs"


def stage_of(name: str, *, model: Path, data: str, steps: int, **changes: Any) -> Stage:
    """The tiny model's second stage with another start, other data and another length."""
    return Stage.from_yaml(
        STAGES / "tiny_sft.yaml",
        model=str(model),
        output=str(ROOT / name),
        blend=str(ROOT / data / "blend.yaml"),
        steps=steps,
        warmup_steps=min(20, steps),
        decay_steps=None,
        sequence_length=512,  # boxes make the longest tags
        **changes,
    )


def make_base() -> None:
    """Write the data, and train what all runs begin with: a reader of pages of one tile."""
    if (ROOT / "base" / "model.safetensors").exists():
        return
    shutil.rmtree(ROOT, ignore_errors=True)
    for skill in ("digits", "digit strings"):
        made = make_skills(seed=DATA_SEED, split="train")
        write_blend(ROOT / skill.replace(" ", "_"), made, {skill: PAGES}, form=as_conversation)
    assemble(
        ROOT / "start",
        encoder=InternVisionModel.from_pretrained(WORK / "encoder"),
        decoder=Qwen2ForCausalLM.from_pretrained(WORK / "decoder"),
        tokenizer=AutoTokenizer.from_pretrained(WORK / "vocabulary"),
        seed=DATA_SEED,
    )
    train(stage_of("base", model=ROOT / "start", data="digits", steps=BASE_STEPS, tile_tag="none"))


def run_one(kind: str, seed: int, *, steps: int, samples: int) -> list[float]:
    """Train and test one way with one seed, on one core.

    Returns:
        Per cent of exact answers for each of `QUESTIONS`.
    """
    torch.set_num_threads(1)
    name = f"{kind.replace(' ', '_')}-{seed}"
    results = ROOT / name / "results.json"
    if results.exists():
        return json.loads(results.read_text())
    shutil.rmtree(ROOT / name, ignore_errors=True)
    changes = KINDS[kind]
    size = {"batch_size": 16, "micro_batch_size": 16}
    train(stage_of(name, model=ROOT / "base", data="digit_strings", steps=steps, seed=seed, **size, **changes))
    model = AutoModel.from_pretrained(ROOT / name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / name)
    most = changes.get("max_tiles", 6)
    pages = held_out("digit strings", samples)
    scores = [score(model, tokenizer, pages, max_tiles=most, question=i) for i in range(len(QUESTIONS))]
    results.write_text(json.dumps(scores) + "\n")
    return scores


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Mean and standard deviation over the seeds, as a Markdown table."""
    lines = ["| exact match, % | " + " | ".join(QUESTIONS) + " |", "| --- |" + " ---: |" * len(QUESTIONS)]
    for kind, scores in results.items():
        cells = [f"{mean(scores[question]):.1f} ± {stdev(scores[question]):.1f}" for question in QUESTIONS]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(file: Path, results: dict[str, dict[str, list[float]]]) -> None:
    """Draw every run as a point and every mean as a bar."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, question in zip(figure.subplots(1, len(QUESTIONS)), QUESTIONS, strict=True):
        for place, (_, scores) in enumerate(results.items()):
            axes.bar(place, mean(scores[question]), color="tab:blue", alpha=0.4)
            axes.plot([place] * len(scores[question]), scores[question], "o", color="tab:blue")
        axes.set_xticks(range(len(results)), list(results), rotation=20, ha="right")
        axes.set_ylabel("exact match, %")
        axes.set_title(question)
    figure.savefig(file, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tiny.ablation", description=__doc__)
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of each run")
    parser.add_argument("--samples", type=int, default=200, help="held-out pages")
    parser.add_argument("--processes", type=int, default=2, help="runs side by side, one core each")
    options = parser.parse_args(arguments)
    make_base()
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        runs = {
            (kind, seed): pool.submit(run_one, kind, seed, steps=options.steps, samples=options.samples)
            for seed in SEEDS
            for kind in KINDS
        }
        results = {
            kind: {question: [runs[kind, seed].result()[i] for seed in SEEDS] for i, question in enumerate(QUESTIONS)}
            for kind in KINDS
        }
    settings = {"base_steps": BASE_STEPS, "steps": options.steps, "samples": options.samples, "seeds": list(SEEDS)}
    DOCS.mkdir(exist_ok=True)
    (DOCS / "tile_tags.json").write_text(json.dumps({**settings, "scores": results}, indent=2) + "\n")
    plot(DOCS / "tile_tags.png", results)
    print(table(results))


if __name__ == "__main__":
    main()
