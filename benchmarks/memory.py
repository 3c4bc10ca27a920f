"""Peak memory as `nvlm memory` predicts it against the peak of a process, on the mid-size model.

Each call is made twice: with glibc's allocator as it is, which keeps some of what tensors give back, and set to hand it
back at once. The prediction is one of tensors, so the latter is what it is held to.
"""

import ctypes
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


CASES = (  # of pictures with no more tiles than a CPU takes at once
    Case("encoder", Call(tiles=2, tokens=700, new_tokens=2), "bfloat16"),
    Case("encoder", Call(tiles=1, tokens=400, new_tokens=2), "float32"),
    Case("prefill", Call(tiles=0, tokens=4096, new_tokens=2), "bfloat16"),
    Case("prefill in chunks", Call(tiles=0, tokens=4096, new_tokens=2, prefill_chunk=512), "bfloat16"),
    Case("batch", Call(tiles=0, tokens=512, new_tokens=2, batch=4), "float32"),
)
M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 65536  # of glibc's malloc.h; what is larger is mapped, and unmapped when freed


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


def hand_back_at_once() -> bool:
    """Let glibc's allocator return memory to the system as soon as a tensor is freed; False without glibc."""
    libc = ctypes.CDLL(None)
    return hasattr(libc, "malloc_trim") and bool(libc.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES) and libc.malloc_trim(0))


@dataclass(frozen=True)
class Measured:
    """By how many bytes the process has grown at a call's peak, since before the model was made.

    Args:
        weights: bytes of the model's weights.
        default: with the allocator as it is.
        exact: with one that hands memory back at once; None where it can't be set to.
    """

    weights: int
    default: int
    exact: int | None


def measure(call: Call, dtype_name: str) -> Measured:
    """Make the call in this process."""
    dtype = getattr(torch, dtype_name)
    process = psutil.Process()
    small = random_model(tiny_config(), dtype=dtype)
    call_model(small, Call(tiles=1, tokens=200, new_tokens=2))  # libraries and buffers that any first call needs
    del small
    gc.collect()
    before = process.memory_info().rss
    model = random_model(mid_config(), dtype=dtype)

    def peak() -> int:
        start = process.memory_info().rss - before
        return start + peak_growth(partial(call_model, model, call))[0]

    default = peak()
    exact = peak() if hand_back_at_once() else None
    return Measured(sum(parameter.nbytes for parameter in model.parameters()), default, exact)


def run(settings: Settings) -> Section:
    figures, data = [], []
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:  # a fresh process each
        for case in CASES:
            [predicted] = peaks(estimate(mid_config(), case.call, dtype=case.dtype)).values()
            measured: Measured = pool.apply(measure, (case.call, case.dtype))
            data.append(asdict(case) | {"predicted": asdict(predicted), "measured": asdict(measured)})
            name = f"{case.name}, {case.dtype}"
            if measured.exact is not None:
                over_weights = (predicted.total - predicted.weights) / (measured.exact - measured.weights)
                figures += [
                    Figure(
                        f"{name}, {measured.exact / 1e9:.2f} GB: predicted / measured",
                        predicted.total / measured.exact,
                        at_least=0.9,
                        at_most=1.1,
                    ),
                    Figure(f"{name}: the same without the weights", over_weights),
                ]
            figures.append(Figure(f"{name}: with glibc's default allocator", predicted.total / measured.default))
    return Section("memory", "peak memory of a call on the mid-size model", figures, {"cases": data})
