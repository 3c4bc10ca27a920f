"""One encoder layer at the released size: its distance to bare matrix products, and to a plain eager layer.

Width 3200, MLP 12800, 1025 tokens, float32. The three run in turn; each ratio is the median of the rounds' ratios.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.report import Figure, Section
from benchmarks.settings import Settings
from benchmarks.timing import median_ratio, take_turns
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


def bare_products(config: InternVisionConfig, dtype: torch.dtype) -> Callable[[], None]:
    """A layer's matrix products for one tile and nothing else, into tensors that are there already."""
    width, mlp, heads, dim = config.hidden_size, config.intermediate_size, config.num_attention_heads, config.head_dim
    tokens = 1 + (config.image_size // config.patch_size) ** 2

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    def room(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    x, weights = drawn(tokens, width), [drawn(width, n) for n in (3 * width, width, mlp)] + [drawn(mlp, width)]
    outputs = [room(tokens, n) for n in (3 * width, width, mlp, width)]
    q, k, v = (drawn(heads, tokens, dim) for _ in range(3))
    scores, attended = room(heads, tokens, tokens), room(heads, tokens, dim)

    def products() -> None:
        torch.mm(x, weights[0], out=outputs[0])
        torch.bmm(q, k.transpose(1, 2), out=scores)
        torch.bmm(scores, v, out=attended)
        torch.mm(x, weights[1], out=outputs[1])
        torch.mm(x, weights[2], out=outputs[2])
        torch.mm(outputs[2], weights[3], out=outputs[3])

    return products


def run(settings: Settings) -> Section:
    torch.manual_seed(0)
    config = InternVisionConfig(num_dummy_heads=0)
    config._attn_implementation = "sdpa"
    layer = InternVisionEncoderLayer(config, drop_path_rate=0.0).eval()
    x = torch.randn(1, TOKENS, config.hidden_size)
    contenders: dict[str, Callable[[], Any]] = {
        "layer": lambda: layer(x),
        "products": bare_products(config, torch.float32),
        "plain": partial(plain_layer(InternVisionConfig(num_dummy_heads=7)), x),
    }
    with torch.inference_mode():
        seconds = take_turns(contenders, rounds=settings.rounds_or(7))
    return Section(
        "encoder_layer",
        "one encoder layer of the released size on one tile, float32",
        [
            Figure(
                "layer / its bare matrix products", median_ratio(seconds["layer"], seconds["products"]), at_most=1.05
            ),
            Figure(
                "plain eager layer, 32 heads / layer", median_ratio(seconds["plain"], seconds["layer"]), at_least=1.25
            ),
        ],
        {"seconds": seconds},
    )
