"""The encoder of both models on one tile: against InternVL's with the same weights, and bare matrix products."""

import statistics
from typing import Any

import torch

from benchmarks.encoder_layer import bare_products
from benchmarks.models import random_tiles
from benchmarks.peers import internvl_of
from benchmarks.report import Figure, Section
from benchmarks.settings import Settings
from benchmarks.timing import median_ratio, take_turns

ROUNDS = {"tiny": 15, "mid": 4}


def run(settings: Settings) -> Section:
    figures, data = [], dict[str, Any]()
    for bench in settings.benches():
        model, tile = bench.model, random_tiles(bench, 1)
        peer = internvl_of(model)
        products = bare_products(model.config.vision_config, bench.dtype)
        layers = range(model.config.vision_config.num_hidden_layers)
        contenders = {
            "ours": lambda model=model, tile=tile: model.vision_model(tile),
            "InternVL": lambda peer=peer, tile=tile: peer.model.vision_tower(tile),
            "products": lambda products=products, layers=layers: [products() for _ in layers],
        }
        with torch.inference_mode():
            seconds = take_turns(contenders, rounds=settings.rounds_or(ROUNDS[bench.name]))
        data[bench.name] = seconds
        figures += [
            Figure(f"{bench.name}: one tile", statistics.median(seconds["ours"]) * 1e3, "ms"),
            Figure(f"{bench.name}: InternVL's encoder / ours", median_ratio(seconds["InternVL"], seconds["ours"])),
            Figure(
                f"{bench.name}: ours / its bare matrix products", median_ratio(seconds["ours"], seconds["products"])
            ),
        ]
    return Section("encoder", "the whole encoder on one tile, each model in its dtype", figures, data)
