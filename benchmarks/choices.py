"""What could be switched on for speed, against what is: caches, compilation, prompt lookup, attention backends.

The defaults are those that win here; docs/conversations.md says which.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import CompileConfig

from benchmarks.decode import NEW, PROMPT
from benchmarks.models import Bench, prompt_ids, random_tiles
from benchmarks.prefill import TEXT_TOKENS, one_token
from benchmarks.report import Figure, Section
from benchmarks.settings import Settings
from benchmarks.timing import median_ratio, seconds_of, take_turns

LOOKUP = {"prompt_lookup_num_tokens": 10}
SAMPLED = {"do_sample": True, "top_k": 0}  # of random weights: text in which nothing comes a second time


def compiled() -> dict[str, Any]:
    """A static cache, and the decode step compiled on a CPU too, where transformers does not do so by itself."""
    config: Any = CompileConfig(mode="default")
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def with_attention(bench: Bench, backend: str, work: Callable[[], Any]) -> None:
    """Do some work with an attention backend of encoder and decoder."""
    before = bench.model.config._attn_implementation
    bench.model.set_attn_implementation(backend)
    try:
        work()
    finally:
        bench.model.set_attn_implementation(before)


def ways_to_decode(bench: Bench) -> dict[str, Callable[[], torch.Tensor]]:
    """Calls that make the same new tokens, but for the sampled ones."""
    options = one_token(prompt_ids(bench, 0, PROMPT), eos_token_id=None) | {"max_new_tokens": NEW}
    generate = partial(bench.model.generate, **options)
    return {
        "default": generate,
        "static cache": partial(generate, cache_implementation="static"),
        "static cache, compiled": partial(generate, **compiled()),
        "prompt lookup, repeating text": partial(generate, **LOOKUP),
        "sampled": partial(generate, **SAMPLED),
        "prompt lookup, sampled text": partial(generate, **SAMPLED, **LOOKUP),
    }


def reading(bench: Bench, *, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of a prefill of text and of encoding a tile, with either attention backend."""
    text = partial(bench.model.generate, **one_token(prompt_ids(bench, 0, TEXT_TOKENS)))
    encode = partial(bench.model.get_visual_features, random_tiles(bench, 1))
    with torch.no_grad():
        return {
            what: take_turns(
                {backend: partial(with_attention, bench, backend, work) for backend in ("sdpa", "eager")}, rounds=rounds
            )
            for what, work in (("prefill", text), ("encoder", encode))
        }


def run(settings: Settings) -> Section:
    figures, data = [], dict[str, Any]()
    for bench in settings.benches():
        rounds = settings.rounds_or(5)
        calls = ways_to_decode(bench)
        compiling = seconds_of(calls["static cache, compiled"])
        ways = take_turns(calls, rounds=rounds)
        backends = reading(bench, rounds=rounds)
        data[bench.name] = {"decoding": ways, "compiling": compiling, "attention": backends}
        plain, sampled = ways["default"], ways["sampled"]
        for name in ("static cache", "static cache, compiled", "prompt lookup, repeating text"):
            figures.append(Figure(f"{bench.name}: speed with {name} / default", median_ratio(plain, ways[name])))
        lookup = median_ratio(sampled, ways["prompt lookup, sampled text"])
        figures += [
            Figure(f"{bench.name}: speed with prompt lookup, text without repetition / default", lookup),
            Figure(f"{bench.name}: the first compiled call", compiling, "s"),
            Figure(f"{bench.name}: the default", statistics.median(plain), "s"),
        ]
        for what, seconds in backends.items():
            ratio = median_ratio(seconds["eager"], seconds["sdpa"])
            figures.append(Figure(f"{bench.name}: {what}, eager attention / SDPA (the default)", ratio))
    title = f"{NEW} tokens after {PROMPT} in other ways than the default, above 1 is faster; attention backends"
    return Section("choices", title, figures, data)
