"""The peak memory of a `chat` call on each device, from the config alone: neither torch nor weights are needed.

A call goes through moments, and a device needs as much as its largest moment takes:

    encode    a batch of tiles is in the encoder, the features of the batches before it wait
    project   the batch is in the projector
    join      the batches' features become one tensor
    prefill   the prompt, or its last chunk, is in the last of the device's decoder layers
    decode    the last new token is generated

What is counted are the tensors that are alive at once, as the modules' `forward` methods make them without gradients
and with SDPA's flash kernels: no scores (tokens, tokens) are kept. Not counted: the program and its libraries, their
workspaces, and what an allocator loses between tensors; nor what a session keeps (its `nbytes`, and the feature
cache's).

Symbols of the docstrings: n tiles of a batch, T positions of a tile (1025 as released), D the encoder's width (3200),
I the width inside its attention (dummy heads included), M its MLP's width (12800), P tokens of a tile (256), F = 4 D
the width of a shuffled token, J the projector's inner width, B prompts of L tokens, H the decoder's width (8192), Q
its queries' width (8192), K its keys' width (1024), W its MLP's width (29568), V its vocabulary.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from ..checkpoint import VISION_DEFAULTS, config_layout, config_value, decoder_config, head_dim, size_field
from ..device_map import LAYERS, Device, memory_per_device, module_sizes, split_model

ACTIVATION_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 2, "int4": 2}  # by dtype of the weights

# Transformers' caches: a plain one, one whose layers wait on the host, and quantised ones with the backends "fp8" (a
# scale a tensor) and "hqq" with 8 bits (a scale and a zero a group of 64, the newest tokens left as they are).
KV_CACHES = ("dynamic", "offloaded", "fp8", "int8")
GROUP = 64
NEWEST = 128
# Bytes a number that hqq 0.2.8 needs while it quantises a layer's keys, which it does anew every 128 tokens: measured.
HQQ_WORKING = 44


@dataclass(frozen=True)
class Call:
    """What is asked of the model.

    Args:
        tiles: of each prompt, thumbnails included.
        tokens: of each prompt, its pictures' included.
        new_tokens: of each answer.
        batch: prompts that are answered at once, padded to one length where there are several.
        kv_cache: one of `KV_CACHES`.
        prefill_chunk: most tokens that the decoder reads at once; None for all.
    """

    tiles: int
    tokens: int
    new_tokens: int
    batch: int = 1
    kv_cache: str = "dynamic"
    prefill_chunk: int | None = None

    @property
    def all_tiles(self) -> int:
        """Tiles of all prompts."""
        return self.tiles * self.batch

    @property
    def chunk(self) -> int:
        """Tokens of a prompt that are in a decoder layer at once."""
        return min(self.tokens, self.prefill_chunk or self.tokens)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a config that memory depends on; see the module's docstring for the letters."""

    pixels: int  # numbers of a tile
    positions: int  # T
    width: int  # D
    inner: int  # I
    mlp: int  # M
    normalises_queries: bool
    tile_batch: int
    tile_tokens: int  # P
    shuffled: int  # F
    projector: int  # J
    hidden: int  # H
    queries: int  # Q
    keys: int  # K
    head: int  # width of a decoder's head
    wide: int  # W
    vocabulary: int  # V
    positions_limit: int

    @classmethod
    def of(cls, config: Any) -> "Sizes":
        """The sizes in a config.json's dict or a config object.

        Raises:
            ValueError: the config describes no such model; the message names the field and its value.
        """
        layout = config_layout(config)
        vision, decoder = config_value(config, "vision_config") or {}, decoder_config(config)
        encoder = {name: size_field(vision, name, default=default) for name, default in VISION_DEFAULTS.items()}
        width, heads = encoder["hidden_size"], encoder["num_attention_heads"]
        dummies = size_field(vision, "num_dummy_heads", default=layout.num_dummy_heads, at_least=0)
        side = size_field(config, "force_image_size", default=encoder["image_size"])
        grid, block = side // encoder["patch_size"], round(1 / config_value(config, "downsample_ratio", 0.5))
        hidden, attention_heads = size_field(decoder, "hidden_size"), size_field(decoder, "num_attention_heads")
        head = config_value(decoder, "head_dim") or head_dim(hidden, attention_heads)
        return cls(
            pixels=encoder["num_channels"] * side * side,
            positions=1 + grid * grid,
            width=width,
            inner=head_dim(width, heads) * (heads + dummies),
            mlp=encoder["intermediate_size"],
            normalises_queries=config_value(vision, "qk_normalization", True),
            tile_batch=size_field(config, "tile_batch_size", default=16),
            tile_tokens=(grid // block) ** 2,
            shuffled=width * block**2,
            projector=size_field(decoder, layout.projector_width),
            hidden=hidden,
            queries=attention_heads * head,
            keys=size_field(decoder, "num_key_value_heads", default=attention_heads) * head,
            head=head,
            wide=size_field(decoder, "intermediate_size"),
            vocabulary=size_field(decoder, "vocab_size"),
            positions_limit=size_field(decoder, "max_position_embeddings", default=32768),
        )


@dataclass(frozen=True)
class Moment:
    """What a device holds at a moment, in bytes.

    Args:
        name: of the moment.
        weights: of the modules on the device.
        pictures: pixels and projected features.
        kv_cache: keys and values of the device's layers.
        activations: what the modules at work hold besides.
        logits: of the last position, and their float32 copy.
    """

    name: str
    weights: int
    pictures: int
    kv_cache: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.pictures + self.kv_cache + self.activations + self.logits


def norm_bytes(width: int, size: int) -> int:
    """Bytes a position of an RMS norm that computes in float32, its result included.

    In float32 the normalised values (width) and the weighted ones. Below, a float32 copy, the normalised values in
    float32 and those cast back: 4 + 4 + 2 bytes.
    """
    return 8 * width if size == 4 else (8 + size) * width


def encoder_bytes(sizes: Sizes, tiles: int, size: int) -> int:
    """The most that n tiles need in an encoder layer (`InternVisionEncoderLayer`), whatever the number of layers.

    All of it is (n, T, width). Two streams (D) are held by the callers: the embeddings and the layer's input.

    - attention: the normed input (D), queries, keys and values in one (3 I), where they are normalised the new queries
      (I) and keys (I), then the output (I) and its projection (D);
    - the keys' norm: the same before there is an output, with the norm's own float32 copies;
    - MLP: the attention's output (D), the stream with it added (D), its norm (D), fc1's output (M), the GELU's (M).

    Args:
        size: bytes of an activation.
    """
    width, inner = sizes.width * size, sizes.inner * size
    normed = 2 * inner if sizes.normalises_queries else 0
    attention = 2 * width + width + 3 * inner + normed + inner + width
    keys_norm = 2 * width + width + 3 * inner + inner + norm_bytes(sizes.inner, size)
    mlp_norm = 4 * width + norm_bytes(sizes.width, size)
    mlp = 5 * width + 2 * sizes.mlp * size
    most = max(attention, keys_norm if sizes.normalises_queries else 0, mlp_norm, mlp)
    return tiles * sizes.positions * most


def projector_bytes(sizes: Sizes, tiles: int, size: int) -> int:
    """The most that the projector (`mlp1`) needs for n tiles besides its input, its output included: (n, P, width).

    LayerNorm's output (F) and the first Linear's (J), or the latter and the GELU's (2 J), or that and the result (H).
    """
    most = max(sizes.shuffled + sizes.projector, 2 * sizes.projector, sizes.projector + sizes.hidden)
    return tiles * sizes.tile_tokens * most * size


def decoder_bytes(sizes: Sizes, call: Call, size: int) -> int:
    """The most that a prompt's last chunk needs in a decoder layer, whatever the number of layers: (B, L, width).

    Held by the callers: the whole prompt's embeddings (H); of the chunk the layer's input (H), cosines and sines (2 a
    head's width).

    - MLP: the stream with the attention's output added (H), its norm (H), gate (W), its activation times up (2 W);
    - attention: the normed input (H), queries (Q), keys and values (2 K), and three products of the rotation (3 Q);
      later the rotated queries (Q), the output (Q) and its projection (H);
    - where a mask is needed (several prompts are padded, a chunk has others before it): (B, 1, L, positions) bools, and
      in the attention as many numbers, and SDPA gets keys and values a query head (2 Q each position read so far).
    """
    embeddings = call.batch * call.tokens * sizes.hidden
    held = sizes.hidden + 2 * sizes.head
    mlp = 2 * sizes.hidden + 3 * sizes.wide
    rotation = sizes.hidden + 4 * sizes.queries + 2 * sizes.keys
    attention = 2 * sizes.hidden + 2 * sizes.queries
    mask = mask_numbers = repeated = 0
    if call.batch > 1 or call.chunk < call.tokens:
        mask = mask_numbers = call.batch * call.chunk * call.tokens
        repeated = 2 * sizes.queries * call.tokens * call.batch if sizes.keys < sizes.queries else 0
    rows = call.batch * call.chunk
    most = max(rows * mlp, rows * rotation, rows * attention + mask_numbers + repeated)
    return (embeddings + rows * held + most) * size + mask


def kv_bytes(sizes: Sizes, call: Call, tokens: int, size: int) -> int:
    """Keys and values of one layer for B sequences, (B, 2 K, tokens), in the cache's own numbers."""
    numbers = 2 * sizes.keys * tokens * call.batch
    if call.kv_cache == "fp8":
        return numbers
    if call.kv_cache == "int8":
        newest = min(tokens, NEWEST) * 2 * sizes.keys * call.batch
        old = numbers - newest
        return old + old // GROUP * 2 * size + newest * size
    return numbers * size


def kv_working_bytes(sizes: Sizes, call: Call, tokens: int, size: int) -> int:
    """What appending a token to a layer's cache needs besides it, of (B, K, tokens) keys or values.

    A plain cache makes the longer keys while the old ones are there, then the values. "fp8" holds both old ones (2) and
    the keys in the activations' dtype while it makes the values, in float32 twice (8).
    """
    a_number = {"fp8": 2 + size + 8, "int8": HQQ_WORKING}.get(call.kv_cache, size)
    return sizes.keys * tokens * call.batch * a_number


def without_dummy_heads(config: Any) -> Any:
    """A copy of a config without dummy heads, as `from_pretrained` leaves a model that is on one device."""
    bare = deepcopy(config)
    if isinstance(bare, dict):
        bare["vision_config"] = {**(bare.get("vision_config") or {}), "num_dummy_heads": 0}
    else:
        bare.vision_config.num_dummy_heads = 0
    return bare


def estimate(config: Any, call: Call, *, dtype: str = "bfloat16", gpus: int = 1) -> dict[Device, list[Moment]]:
    """What each of several equal devices holds at each moment of a `chat` call, the balanced map of weights given.

    On one device the encoder's dummy heads are dropped, as in `from_pretrained`.

    Args:
        config: a config.json's dict or a config object.
        dtype: of the weights: "float32", "bfloat16", "float16", or "int8" or "int4" for the decoder's layers.
        gpus: how many.

    Returns:
        {device: its moments}; the largest `total` is its peak.

    Raises:
        ValueError: a dtype, a cache or sizes that don't exist, tokens that don't hold the tiles or exceed the decoder's
            positions.
    """
    if dtype not in ACTIVATION_BYTES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {sorted(ACTIVATION_BYTES)}.")
    if gpus < 1:
        raise ValueError(f"gpus is {gpus}, expected at least 1.")
    if gpus == 1:
        config = without_dummy_heads(config)
    enough = sum(module_sizes(config, dtype).values())  # also checks the config
    sizes, size = Sizes.of(config), ACTIVATION_BYTES[dtype]
    check_call(call, sizes)
    device_map = split_model(max_memory=dict.fromkeys(range(gpus), enough), config=config, dtype=dtype, headroom=0)
    weights = memory_per_device(device_map, config, dtype)
    return {
        device: device_moments(
            sizes,
            call,
            weights=weights[device],
            size=size,
            num_layers=sum(name.startswith(LAYERS) and at == device for name, at in device_map.items()),
            has_encoder=device_map["vision_model"] == device,
            has_head=device_map["language_model.lm_head"] == device,
        )
        for device in sorted(weights)
    }


def check_call(call: Call, sizes: Sizes) -> None:
    """Check that a call can be made.

    Raises:
        ValueError: as in `estimate`.
    """
    if call.kv_cache not in KV_CACHES:
        raise ValueError(f"kv_cache is {call.kv_cache!r}, expected one of {list(KV_CACHES)}.")
    smallest = {"tiles": 0, "tokens": 1, "new_tokens": 1, "batch": 1}
    for name, least in smallest.items():
        if getattr(call, name) < least:
            raise ValueError(f"{name} is {getattr(call, name)}, expected at least {least}.")
    if call.prefill_chunk is not None and call.prefill_chunk < 1:
        raise ValueError(f"prefill_chunk is {call.prefill_chunk}, expected at least 1.")
    needed = call.tiles * sizes.tile_tokens
    if call.tokens <= needed:
        raise ValueError(
            f"{call.tiles} tiles are {needed} tokens, but the prompt has {call.tokens}: tokens counts both the "
            "pictures' and the text's."
        )
    if call.tokens + call.new_tokens > sizes.positions_limit:
        raise ValueError(
            f"{call.tokens} tokens and {call.new_tokens} new ones are more than the decoder's {sizes.positions_limit} "
            "positions."
        )


def device_moments(
    sizes: Sizes, call: Call, *, weights: int, size: int, num_layers: int, has_encoder: bool, has_head: bool
) -> list[Moment]:
    """The moments of one device; those of pictures only where the encoder is, if there are pictures."""
    moments = []
    tiles = call.all_tiles
    pictures = 0
    if tiles and has_encoder:
        pixels, features = tiles * sizes.pixels * size, tiles * sizes.tile_tokens * sizes.hidden * size
        full, rest = divmod(tiles, sizes.tile_batch)
        batch = sizes.tile_batch if full else rest
        # The last full batch has the most features before it.
        before = features // tiles * max(0, full - 1) * sizes.tile_batch
        shuffled = batch * sizes.tile_tokens * sizes.shuffled * size
        moments += [
            Moment("encode", weights, pixels + before, 0, encoder_bytes(sizes, batch, size), 0),
            Moment("project", weights, pixels + before, 0, shuffled + projector_bytes(sizes, batch, size), 0),
            Moment("join", weights, pixels + 2 * features, 0, 0, 0),
        ]
        pictures = pixels + features
    held_layers = min(num_layers, 2) if call.kv_cache == "offloaded" else num_layers
    kept = held_layers * kv_bytes(sizes, call, call.tokens, size)
    at_end = call.tokens + call.new_tokens
    logits = call.batch * sizes.vocabulary * (size + 4) if has_head else 0
    working = kv_working_bytes(sizes, call, at_end, size)
    return [
        *moments,
        Moment("prefill", weights, pictures, kept, decoder_bytes(sizes, call, size), 0),
        Moment("decode", weights, pictures, held_layers * kv_bytes(sizes, call, at_end, size), working, logits),
    ]


def peaks(moments: Mapping[Device, list[Moment]]) -> dict[Device, Moment]:
    """The largest moment of each device."""
    return {device: max(its, key=lambda moment: moment.total) for device, its in moments.items()}
