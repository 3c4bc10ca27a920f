"""What a session keeps against the number of its turns, each with a picture of its own: it must grow linearly.

Counted are all tensors that a turn made and that are still alive after it: KV cache, tiles, features.
"""

from typing import Any

import torch

from benchmarks.fits import fit
from benchmarks.models import Bench, random_tiles
from benchmarks.peaks import LiveTensors
from benchmarks.plots import plot_lines
from benchmarks.report import Figure, Section
from benchmarks.settings import Settings

TURNS = {"tiny": 24, "mid": 8}
ANSWER = 4  # tokens


def kept_bytes(bench: Bench, *, turns: int) -> list[int]:
    """Bytes alive after each turn."""
    bench.model.feature_cache.clear()
    session = bench.model.start_chat(bench.tokenizer)
    options = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False}
    kept = []
    with torch.no_grad(), LiveTensors() as live:
        for turn in range(turns):
            pixels = random_tiles(bench, 1, seed=turn)
            session.ask("<image>\nWhat is this?", pixel_values=pixels, generation_config=options)
            del pixels
            kept.append(live.nbytes)
    bench.model.feature_cache.clear()
    return kept


def run(settings: Settings) -> Section:
    figures, data, plots = [], dict[str, Any](), []
    for bench in settings.benches():
        turns = list(range(1, TURNS[bench.name] + 1))
        kept = kept_bytes(bench, turns=len(turns))
        found = fit(turns, kept)
        data[bench.name] = {"turns": turns, "kept_bytes": kept, "fit": vars(found)}
        figures += [
            Figure(f"{bench.name}: exponent of a session's memory over turns", found.exponent),
            Figure(f"{bench.name}: memory a turn with a picture of one tile", found.slope / 1e6, "MB"),
        ]
        megabytes = [value / 1e6 for value in kept]
        plots.append(
            plot_lines(
                settings.output / f"session-memory-{bench.name}.png",
                {"kept": (turns, megabytes)},
                title=f"What a session keeps, {bench.name} model, one tile a turn",
                x_label="turns",
                y_label="MB",
                fits={"kept": fit(turns, megabytes)},
            )
        )
    return Section("session_memory", "tensors that a session keeps, a new picture each turn", figures, data, plots)
