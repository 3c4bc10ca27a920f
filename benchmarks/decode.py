"""New tokens after a prompt: against transformers' bare decoder with the same weights, and against reading memory.

A step must read every weight of the decoder but the embeddings, and the KV cache: that is the limit.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.machine import read_rate
from benchmarks.models import Bench, prompt_ids
from benchmarks.peers import decoder_of
from benchmarks.prefill import one_token
from benchmarks.report import Figure, Section
from benchmarks.settings import Settings
from benchmarks.timing import median_ratio, seconds_of

PROMPT, NEW = 256, 33


def step_seconds(generate: Callable[..., Any], ids: torch.Tensor, *, new_tokens: int) -> float:
    """Seconds of one step: of a call with many new tokens, less one with a single one."""
    options = one_token(ids, eos_token_id=None)
    many = seconds_of(partial(generate, **options | {"max_new_tokens": new_tokens}))
    return (many - seconds_of(partial(generate, **options))) / (new_tokens - 1)


def bytes_a_step(bench: Bench, tokens: int) -> int:
    """What a step reads: the decoder's weights without the embeddings, and the keys and values of `tokens`."""
    decoder, config = decoder_of(bench.model), bench.model.config.llm_config
    weights = sum(weight.nbytes for weight in decoder.parameters()) - decoder.model.embed_tokens.weight.nbytes
    head = config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * head * tokens
    return weights + cached * bench.dtype.itemsize


def run(settings: Settings) -> Section:
    figures, data = [], dict[str, Any]()
    rounds = settings.rounds_or(5)
    with torch.inference_mode():
        bandwidth = read_rate(rounds=3)
    for bench in settings.benches():
        ids = prompt_ids(bench, 0, PROMPT)
        generators = {"ours": bench.model.generate, "Qwen2": decoder_of(bench.model).generate}
        steps: dict[str, list[float]] = {name: [] for name in generators}
        for number in range(-1, rounds):
            for name in generators if number % 2 else reversed(generators):
                taken = step_seconds(generators[name], ids, new_tokens=NEW)
                if number >= 0:
                    steps[name].append(taken)
        limit = bytes_a_step(bench, PROMPT + NEW // 2) / bandwidth
        median = statistics.median(steps["ours"])
        data[bench.name] = {"step_seconds": steps, "limit_seconds": limit}
        figures += [
            Figure(f"{bench.name}: new tokens", 1 / median, "a second"),
            Figure(
                f"{bench.name}: speed of Qwen2ForCausalLM.generate",
                median_ratio(steps["Qwen2"], steps["ours"]),
                at_least=0.97,
            ),
            Figure(f"{bench.name}: share of the memory's bandwidth", limit / median),
        ]
    title = (
        f"greedy steps after {PROMPT} tokens, {NEW - 1} of them; ratio of ours to transformers' own, above 1 is faster"
    )
    return Section("decode", title, figures, {"read_bytes_per_second": bandwidth, **data})
