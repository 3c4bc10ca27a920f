"""Peak memory as `nvlm memory` predicts it against the peak of a process, on the mid-size model."""

import gc
import multiprocessing
from dataclasses import asdict, dataclass
from functools import partial

import psutil
import torch

from benchmarks.models import Bench, mid_config, prompt_ids, random_model, random_tiles
from benchmarks.peaks import peak_growth
from benchmarks.prefill import one_token
from benchmarks.report import Figure, Section
from benchmarks.settings import Settings
from nvlm.cli.memory_estimate import Call, estimate, peaks
from tiny.untrained import tiny_config


@dataclass(frozen=True)
class Case:
    """A call to predict and to make."""

    name: str
    call: Call
    dtype: str


CASES = (
    Case("encoder", Call(tiles=5, tokens=1500, new_tokens=2), "bfloat16"),
    Case("encoder", Call(tiles=2, tokens=640, new_tokens=2), "float32"),
    Case("prefill", Call(tiles=0, tokens=8192, new_tokens=2), "bfloat16"),
    Case("prefill in chunks", Call(tiles=0, tokens=8192, new_tokens=2, prefill_chunk=1024), "bfloat16"),
    Case("batch", Call(tiles=0, tokens=1024, new_tokens=2, batch=8), "float32"),
)


class TextOnly:
    """In the place of a tokenizer, of which `prompt_ids` needs the number of tokens."""

    def __len__(self) -> int:
        return 151_000


def call_model(model: torch.nn.Module, call: Call) -> None:
    """Make the call."""
    bench = Bench("mid", model, TextOnly())  # type: ignore[arg-type]
    ids = torch.cat([prompt_ids(bench, call.tiles, call.tokens, seed=row) for row in range(call.batch)])
    options = one_token(ids) | {"max_new_tokens": call.new_tokens, "eos_token_id": None}
    if call.batch > 1:
        options["attention_mask"][0, :3] = 0
    if call.tiles:
        options["pixel_values"] = random_tiles(bench, call.all_tiles)
    model.generate(**options, prefill_chunk_size=call.prefill_chunk)  # type: ignore[operator]


def measure(call: Call, dtype_name: str) -> tuple[int, int]:
    """(bytes of the model, by how much the process has grown at the call's peak since before the model was made)."""
    dtype = getattr(torch, dtype_name)
    small = random_model(tiny_config(), dtype=dtype)
    call_model(small, Call(tiles=1, tokens=200, new_tokens=2))  # libraries and buffers that any first call needs
    del small
    gc.collect()
    before = psutil.Process().memory_info().rss
    model = random_model(mid_config(), dtype=dtype)
    built = psutil.Process().memory_info().rss - before
    grown, _ = peak_growth(partial(call_model, model, call))
    return sum(parameter.nbytes for parameter in model.parameters()), built + grown


def run(settings: Settings) -> Section:
    figures, data = [], []
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:  # a fresh process each
        for case in CASES:
            [predicted] = peaks(estimate(mid_config(), case.call, dtype=case.dtype)).values()
            weights, measured = pool.apply(measure, (case.call, case.dtype))
            data.append(
                asdict(case) | {"predicted": asdict(predicted), "weights_bytes": weights, "measured_bytes": measured}
            )
            name = f"{case.name}, {case.dtype}, {measured / 1e9:.2f} GB"
            figures += [
                Figure(f"{name}: predicted / measured", predicted.total / measured, at_least=0.9, at_most=1.1),
                Figure(
                    f"{name}: the same without the weights",
                    (predicted.total - predicted.weights) / (measured - weights),
                ),
            ]
    return Section("memory", "peak memory of a call on the mid-size model", figures, {"cases": data})
