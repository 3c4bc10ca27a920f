"""From the encoder's patches to the decoder's tokens: pixel shuffle, then a two-layer MLP (SPEC 1 and 4)."""

import torch
from einops import rearrange
from torch import nn


def pixel_shuffle(x: torch.Tensor, scale_factor: float = 0.5, *, version: str = "v2") -> torch.Tensor:
    """Fold each block of neighbouring patches into one wider token.

    Args:
        x: (n, rows, columns, D) patch features.
        scale_factor: one over the block's side: 0.5 folds 2 x 2 patches.
        version: "v2" keeps rows and columns in place, "v1" leaves them transposed.

    Returns:
        (n, rows * scale_factor, columns * scale_factor, D / scale_factor ** 2), with "v1" the middle two swapped.

    Raises:
        ValueError: an unknown version, or a block that does not divide the grid.
    """
    block = round(1 / scale_factor)
    if version not in ("v1", "v2"):
        raise ValueError(f"Unknown pixel shuffle version {version!r}: expected 'v1' or 'v2'.")
    if x.shape[1] % block or x.shape[2] % block:
        raise ValueError(
            f"Pixel shuffle folds {block} x {block} patches, which does not divide the grid {x.shape[1:3]}."
        )
    order = "r c" if version == "v2" else "c r"
    return rearrange(x, f"n (r i) (c j) d -> n {order} (i j d)", i=block, j=block)


def build_projector(*, in_features: int, inner_features: int, out_features: int, bias: bool) -> nn.Sequential:
    """The MLP `mlp1` of the checkpoint: LayerNorm, Linear, exact GELU, Linear.

    Args:
        in_features: width of a shuffled token (12800 as released).
        inner_features: the decoder's MLP width (29568).
        out_features: the decoder's width (8192).
        bias: whether the Linears have biases (the LayerNorm always has one).
    """
    return nn.Sequential(
        nn.LayerNorm(in_features),
        nn.Linear(in_features, inner_features, bias=bias),
        nn.GELU(),
        nn.Linear(inner_features, out_features, bias=bias),
    )
