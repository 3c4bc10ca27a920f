"""`make tiny`: the tiny checkpoint from nothing but seeds: vocabulary, encoder, decoder, data, and the two stages.

Each phase leaves its result in `.cache/tiny/`, and one that is there already is not run again.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

from nvlm.modeling_intern_vit import InternVisionModel
from nvlm.training.run import train
from nvlm.training.stage import Stage
from tiny.assemble import REPOSITORY, assemble, publish
from tiny.card import write_card
from tiny.dataset import as_caption, as_conversation, as_it_is, write_blend
from tiny.decoder import pretrain_decoder
from tiny.encoder import pretrain_encoder
from tiny.evaluate import CHECKPOINT
from tiny.skills import make_skills
from tiny.vocabulary import build_vocabulary

WORK = REPOSITORY / ".cache" / "tiny"
STAGES = REPOSITORY / "training" / "stages"
SEED = 0
CAPTIONS = {"digits": 3000, "shapes": 3500, "charts": 3500}  # pages of one tile
CONVERSATIONS = {
    "digits": 6000,
    "digit strings": 12000,
    "words": 14000,
    "shapes": 10000,
    "charts": 8000,
    "two pictures": 10000,
    "arithmetic": 6000,
}
QUESTIONS = {
    "digits": 1500,
    "digit strings": 5000,
    "words": 6000,
    "shapes": 14000,
    "charts": 12000,
    "two pictures": 10000,
    "arithmetic": 5000,
}
STEPS = {"encoder": 2600, "decoder": 600}  # those of the two stages are in their YAML files


def write_data(folder: Path) -> None:
    """The training pages of all stages; no seed is used twice."""
    data = {
        "conversations": (SEED, CONVERSATIONS, as_conversation),
        "captions": (SEED + 1, CAPTIONS, as_caption),
        "questions": (SEED + 3, QUESTIONS, as_it_is),
    }
    for name, (seed, counts, form) in data.items():
        write_blend(folder / name, make_skills(seed=seed, split="train"), counts, form=form)


def put_together(folder: Path) -> None:
    """An NVLM-D of the two backbones and a new projector."""
    assemble(
        folder,
        encoder=InternVisionModel.from_pretrained(WORK / "encoder"),
        decoder=Qwen2ForCausalLM.from_pretrained(WORK / "decoder"),
        tokenizer=AutoTokenizer.from_pretrained(WORK / "vocabulary"),
        seed=SEED,
    )


def run_stage(folder: Path, name: str, *, model: str, data: str) -> None:
    """One of the two stages, by its YAML file."""
    stage = Stage.from_yaml(
        STAGES / f"tiny_{name}.yaml",
        model=str(WORK / model),
        output=str(folder),
        blend=str(WORK / "data" / data / "blend.yaml"),
    )
    train(stage)


PHASES: dict[str, Callable[[Path], object]] = {
    "vocabulary": build_vocabulary,
    "encoder": lambda folder: pretrain_encoder(folder, steps=STEPS["encoder"], seed=SEED),
    "decoder": lambda folder: pretrain_decoder(
        folder, AutoTokenizer.from_pretrained(WORK / "vocabulary"), steps=STEPS["decoder"], seed=SEED
    ),
    "data": write_data,
    "start": put_together,
    "pretrain": lambda folder: run_stage(folder, "pretrain", model="start", data="captions"),
    "sft": lambda folder: run_stage(folder, "sft", model="pretrain", data="conversations"),
    "answers": lambda folder: run_stage(folder, "answers", model="sft", data="questions"),
}


def run_phase(name: str) -> None:
    """Run a phase unless its result is there; what a phase that was cut off left behind is removed."""
    folder = WORK / name
    done = WORK / "seconds" / f"{name}.json"
    if done.exists():
        print(f"{name}: there already")
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"{name}: begins", flush=True)
    start = time.perf_counter()
    PHASES[name](folder)
    seconds = round(time.perf_counter() - start, 1)
    done.parent.mkdir(exist_ok=True)
    done.write_text(json.dumps({"seconds": seconds}) + "\n")
    print(f"{name}: {seconds} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tiny.build", description=__doc__)
    parser.add_argument("--until", choices=list(PHASES), help="stop after this phase, and write no checkpoint")
    parser.add_argument("--clean", action="store_true", help="begin from nothing")
    options = parser.parse_args(arguments)
    torch.manual_seed(SEED)
    if options.clean:
        shutil.rmtree(WORK, ignore_errors=True)
    for name in PHASES:
        run_phase(name)
        if name == options.until:
            return
    publish(WORK / "answers", CHECKPOINT)
    write_card(CHECKPOINT, work=WORK, phases=PHASES)


if __name__ == "__main__":
    main()
