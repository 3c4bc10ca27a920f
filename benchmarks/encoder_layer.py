"""One encoder layer at the released size: its distance to bare matrix products, and to a plain eager layer.

    python -m benchmarks.encoder_layer [--rounds 15] [--json FILE]

Width 3200, MLP 12800, 1025 tokens, float32. The three run in turn; each ratio is the median of the rounds' ratios.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from nvlm import InternVisionConfig
from nvlm.modeling_intern_vit import InternVisionEncoderLayer

TOKENS = 1025


def plain_layer(config: InternVisionConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """A layer as one writes it first: eager attention over all 32 heads, every step a new tensor."""
    width, inner = config.hidden_size, config.attention_width
    qkv, proj = nn.Linear(width, 3 * inner, bias=False), nn.Linear(inner, width)
    fc1, fc2 = nn.Linear(width, config.intermediate_size), nn.Linear(config.intermediate_size, width)
    norms = [torch.ones(width), torch.ones(width), torch.ones(inner), torch.ones(inner)]
    scales = [torch.full((width,), 0.1), torch.full((width,), 0.1)]

    def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x32 = x.to(torch.float32)
        mean_square = x32[..., :width].pow(2).sum(-1, keepdim=True) / width
        return weight * (x32 * torch.rsqrt(mean_square + config.layer_norm_eps)).to(x.dtype)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(1, TOKENS, -1, config.head_dim).transpose(1, 2)  # [1, h, t, d]

    def layer(x: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv(rms(x, norms[0])).chunk(3, dim=-1)
        q, k, v = heads(rms(q, norms[2])), heads(rms(k, norms[3])), heads(v)
        attention = torch.softmax((q * config.head_dim**-0.5) @ k.transpose(-2, -1), dim=-1)
        attended = (attention @ v).transpose(1, 2).reshape(1, TOKENS, -1)
        x = x + proj(attended) * scales[0]
        return x + fc2(nn.functional.gelu(fc1(rms(x, norms[1])))) * scales[1]

    return layer


def bare_products(config: InternVisionConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer's matrix products without dummy heads and nothing else, into tensors that are there already."""
    width, mlp, heads, dim = config.hidden_size, config.intermediate_size, config.num_attention_heads, config.head_dim
    weights = [torch.randn(width, n) for n in (3 * width, width, mlp)] + [torch.randn(mlp, width)]
    outputs = [torch.empty(TOKENS, n) for n in (3 * width, width, mlp, width)]
    q, k, v = (torch.randn(heads, TOKENS, dim) for _ in range(3))
    scores, attended = torch.empty(heads, TOKENS, TOKENS), torch.empty(heads, TOKENS, dim)

    def products(x: torch.Tensor) -> torch.Tensor:
        row = x[0]
        torch.mm(row, weights[0], out=outputs[0])
        torch.bmm(q, k.transpose(1, 2), out=scores)
        torch.bmm(scores, v, out=attended)
        torch.mm(row, weights[1], out=outputs[1])
        torch.mm(row, weights[2], out=outputs[2])
        torch.mm(outputs[2], weights[3], out=outputs[3])
        return outputs[3]

    return products


def rounds_of(
    contenders: dict[str, Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each in every round, all of them run in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run(x)
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = InternVisionConfig(num_dummy_heads=0)
    config._attn_implementation = "sdpa"
    layer = InternVisionEncoderLayer(config, drop_path_rate=0.0).eval()
    contenders = {
        "this layer": lambda x: layer(x)[0],
        "bare matrix products": bare_products(config),
        "plain eager layer, 32 heads": plain_layer(InternVisionConfig(num_dummy_heads=7)),
    }
    with torch.inference_mode():
        seconds = rounds_of(contenders, torch.randn(1, TOKENS, config.hidden_size), args.rounds)

    def ratio(above: str, below: str) -> float:
        """The median over the rounds: what slows the machine for a while slows both."""
        return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))

    ratios = {
        "layer / bare matrix products": ratio("this layer", "bare matrix products"),
        "plain eager layer / layer": ratio("plain eager layer, 32 heads", "this layer"),
    }
    for name, values in seconds.items():
        print(f"{name:30} {statistics.median(values) * 1000:8.0f} ms")
    print(f"layer / bare matrix products   {ratios['layer / bare matrix products']:8.3f}   (at most 1.05 wanted)")
    print(f"plain eager layer / layer      {ratios['plain eager layer / layer']:8.3f}   (at least 1.25 wanted)")
    if args.json:
        args.json.write_text(json.dumps({"seconds": seconds, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
