"""Many questions over several processes, each with the whole model and its own part of them; answers in order.

`python -m examples.data_parallel QUESTIONS.jsonl` runs in one process, and
`torchrun --nproc-per-node 8 -m examples.data_parallel QUESTIONS.jsonl` in 8, on 8 GPUs or on a CPU.
A line of the file is `{"image": "page.png", "question": "Read the number."}`: the picture beside the file, or null.
The answers are written as such lines too, to --output or to the terminal.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from nvlm import NVLM_D_Model, load_images
from tiny.evaluate import CHECKPOINT

EXPECTED = 'expected an object like {"image": "page.png", "question": "What is this?"}, the image a path or null'


@dataclass(frozen=True)
class Task:
    """A question, and the path of the picture that it is about, or None."""

    image: str | None
    question: str


def parse_task(line: str, where: str) -> Task:
    """The task of a line.

    Raises:
        ValueError: it is none; the message says where it stands.
    """
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {error}, {EXPECTED}.") from error
    if not isinstance(value, dict) or set(value) != {"image", "question"}:
        raise ValueError(f"{where}: {line:.80}, {EXPECTED}.")
    if not isinstance(value["image"], str | None) or not isinstance(value["question"], str):
        raise ValueError(f"{where}: {line:.80}, {EXPECTED}.")
    return Task(**value)


def read_tasks(path: Path) -> list[Task]:
    """The tasks of a JSON-lines file; blank lines are none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no task; the message names file and line.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    return [parse_task(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def answer(
    model: NVLM_D_Model, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], *, folder: Path, max_new_tokens: int
) -> list[str]:
    """The greedy answers to a batch of tasks.

    Args:
        folder: where relative paths of pictures begin.
        max_new_tokens: longest answer, in tokens.
    """
    config = model.config
    pictures = [folder / task.image for task in tasks if task.image is not None]
    most = config.max_dynamic_patch if config.dynamic_image_size else 1
    tiles, counts = load_images(
        pictures, config.tile_size, most, use_thumbnail=config.use_thumbnail
    )  # [tiles, 3, S, S]
    answers = model.batch_chat(
        tokenizer,
        tiles.to(model.dtype) if counts else None,
        [task.question if task.image is None else f"<image>\n{task.question}" for task in tasks],
        {"max_new_tokens": max_new_tokens, "do_sample": False},
        num_patches_list=counts or None,
    )
    return [str(text) for text in answers]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.data_parallel", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("questions", type=Path, metavar="QUESTIONS.jsonl", help="one picture and question a line")
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="the checkpoint, by default the tiny one")
    parser.add_argument("--output", type=Path, help="where the answers are written, by default the terminal")
    parser.add_argument("--batch-size", type=int, default=8, help="questions that a process answers at once (8)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer, in tokens (64)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    options = parser.parse_args(arguments)
    if options.batch_size < 1 or options.max_new_tokens < 1:
        parser.error("--batch-size and --max-new-tokens must be at least 1.")
    disable_progress_bar()
    state = PartialState(cpu=not torch.accelerator.is_available())
    tasks = read_tasks(options.questions)
    model = AutoModel.from_pretrained(options.model, dtype=options.dtype).to(state.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    own_answers: list[str] = []
    with state.split_between_processes(tasks) as own, torch.inference_mode():
        for start in range(0, len(own), options.batch_size):
            batch = own[start : start + options.batch_size]
            own_answers += answer(
                model, tokenizer, batch, folder=options.questions.parent, max_new_tokens=options.max_new_tokens
            )
    print(f"Process {state.process_index} of {state.num_processes}: {len(own_answers)} answers.", file=sys.stderr)
    answers = gather_object(own_answers)
    if state.is_main_process:
        lines = [
            json.dumps({**asdict(task), "answer": text}, ensure_ascii=False)
            for task, text in zip(tasks, answers, strict=True)
        ]
        if options.output:
            options.output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        else:
            print(*lines, sep="\n")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
