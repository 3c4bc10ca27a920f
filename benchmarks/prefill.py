"""Reading a prompt: text alone against the bare decoder, pictures and text against InternVL with the same weights.

Every contender generates one token, so that the time is the time to the first token.
"""

import statistics
from functools import partial
from typing import Any

import torch

from benchmarks.models import Bench, prompt_ids, random_tiles
from benchmarks.peers import decoder_of, internvl_of
from benchmarks.report import Figure, Section
from benchmarks.settings import Settings
from benchmarks.timing import median_ratio, take_turns

TEXT_TOKENS = 1024
TILES = 7  # a large picture, and its thumbnail
ROUNDS = {"tiny": 15, "mid": 3}
PICTURE_TEXT = 128  # tokens beside the picture's


def one_token(ids: torch.Tensor, **more: Any) -> dict[str, Any]:
    """Arguments of `generate` for one greedy token."""
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 1, "do_sample": False, "pad_token_id": 0} | more


def picture_prompt(bench: Bench) -> dict[str, Any]:
    """A prompt with a picture, as arguments of `generate`."""
    tokens = TILES * bench.model.config.num_image_token + PICTURE_TEXT
    return one_token(prompt_ids(bench, TILES, tokens), pixel_values=random_tiles(bench, TILES))


def run(settings: Settings) -> Section:
    figures, data = [], dict[str, Any]()
    for bench in settings.benches():
        model, peer = bench.model, internvl_of(bench.model)
        text, picture = one_token(prompt_ids(bench, 0, TEXT_TOKENS)), picture_prompt(bench)
        if bench.dtype == torch.float32 and not torch.equal(model.generate(**picture), peer.generate(**picture)):
            raise RuntimeError("InternVL with our weights gives another token: the times would compare different work.")
        rounds = settings.rounds_or(ROUNDS[bench.name])
        reading = take_turns(
            {"ours": partial(model.generate, **text), "Qwen2": partial(decoder_of(model).generate, **text)},
            rounds=rounds,
        )
        whole = take_turns(
            {"ours": partial(model.generate, **picture), "InternVL": partial(peer.generate, **picture)}, rounds=rounds
        )
        data[bench.name] = {"text": reading, "picture": whole}
        figures += [
            Figure(f"{bench.name}: {TEXT_TOKENS} tokens of text", statistics.median(reading["ours"]) * 1e3, "ms"),
            Figure(f"{bench.name}: the same, Qwen2ForCausalLM / ours", median_ratio(reading["Qwen2"], reading["ours"])),
            Figure(
                f"{bench.name}: {TILES} tiles and {PICTURE_TEXT} tokens of text, encode and prefill",
                statistics.median(whole["ours"]) * 1e3,
                "ms",
            ),
            Figure(
                f"{bench.name}: the same, InternVLForConditionalGeneration / ours",
                median_ratio(whole["InternVL"], whole["ours"]),
                at_least=1.0,
            ),
        ]
    return Section("prefill", "time to the first token of a prompt, by generate()", figures, data)
