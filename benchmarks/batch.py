"""Sixteen questions about one picture: `batch_chat`, which reads the picture once, against sixteen calls of `chat`."""

import statistics
import time
from functools import partial
from typing import Any

from benchmarks.models import Bench, random_tiles
from benchmarks.report import Figure, Section
from benchmarks.settings import Settings
from benchmarks.timing import seconds_of

COUNT = 16
ANSWER = 8  # tokens
TILES = {"tiny": 7, "mid": 1}
PLACES = ("upper left", "upper right", "lower left", "lower right")
THINGS = ("word", "shape", "digit", "colour")


def questions() -> list[str]:
    """Sixteen questions, no two alike."""
    return [f"Which {thing} is in the {place} corner?" for place in PLACES for thing in THINGS]


def measure(bench: Bench) -> dict[str, Any]:
    """Seconds of batches and of single calls, and how many answers are the same.

    The batch runs before, between and after the single calls, so that both see the same machine.
    """
    tiles, model = TILES[bench.name], bench.model
    pixels = random_tiles(bench, tiles)
    options = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False}
    repeated, counts = pixels.repeat(COUNT, 1, 1, 1), [tiles] * COUNT
    together = partial(model.batch_chat, bench.tokenizer, repeated, questions(), options, num_patches_list=counts)
    answers = together()
    batches, singles, equal = [], [], 0
    for number, question in enumerate(questions()):
        if number % (COUNT // 4) == 0:
            batches.append(seconds_of(together))
        start = time.perf_counter()
        answer = model.chat(bench.tokenizer, pixels, question, options)
        singles.append(time.perf_counter() - start)
        equal += answer == answers[number]
    batches.append(seconds_of(together))
    return {"batch_seconds": batches, "chat_seconds": singles, "equal_answers": equal}


def run(settings: Settings) -> Section:
    figures, data = [], dict[str, Any]()
    for bench in settings.benches():
        found = measure(bench)
        batch = statistics.median(found["batch_seconds"])
        data[bench.name] = found
        figures += [
            Figure(f"{bench.name}: batch_chat", COUNT / batch, "answers a second"),
            Figure(
                f"{bench.name}: its throughput / that of {COUNT} chat() calls",
                sum(found["chat_seconds"]) / batch,
                at_least=6.0 if bench.name == "mid" else None,
            ),
            Figure(f"{bench.name}: equal answers of {COUNT}", found["equal_answers"]),
        ]
    sizes = ", ".join(f"{TILES[name]} tiles on {name}" for name in settings.models)
    title = f"{COUNT} questions about one picture ({sizes}), {ANSWER} new tokens each"
    return Section("batch", title, figures, data)
