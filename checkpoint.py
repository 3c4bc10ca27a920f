"""What tensors a checkpoint must hold, by its config.json alone: torch is not needed (SPEC 2)."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The encoder's sizes where a config leaves them out: InternViT-6B-448px-V1-5 (SPEC 1).
VISION_DEFAULTS = {
    "num_channels": 3,
    "patch_size": 14,
    "image_size": 448,
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
}
DECODER_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
DECODER_MODEL_TYPES = {"Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama"}

# Tensors that the released checkpoint keeps in float32; the others are bfloat16 (SPEC 2).
FLOAT32_ENDINGS = (
    *(f"self_attn.{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")),
    *(f".attn.{part}.weight" for part in ("qkv", "proj", "q_norm", "k_norm")),
)

# A file from the internet may lie about its sizes.
MAX_JSON_BYTES = 50_000_000
MAX_LAYERS = 1024

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """What a family of checkpoints does its own way, where config.json does not say.

    Args:
        num_dummy_heads: zero heads stored after the encoder's real ones (SPEC 2).
        projector_bias: whether the projector's two Linears have biases.
        projector_width: the decoder's size that is the projector's inner width.
        mixed_float32: whether attention weights are float32 among bfloat16.
    """

    num_dummy_heads: int
    projector_bias: bool
    projector_width: str
    mixed_float32: bool


LAYOUTS = {
    "NVLM_D": Layout(num_dummy_heads=7, projector_bias=False, projector_width="intermediate_size", mixed_float32=True),
    "internvl_chat": Layout(num_dummy_heads=0, projector_bias=True, projector_width="hidden_size", mixed_float32=False),
}


def config_value(config: Any, name: str, default: Any = None) -> Any:
    """A field of a config object or of a config.json's dict; `default` where it is absent or null."""
    value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return default if value is None else value


def config_layout(config: Any) -> Layout:
    """The layout of a config's family.

    Raises:
        ValueError: its `model_type` is of neither family.
    """
    model_type = config_value(config, "model_type", "NVLM_D")
    if model_type not in LAYOUTS:
        raise ValueError(f"config field `model_type` is {model_type!r}, expected one of {sorted(LAYOUTS)}.")
    return LAYOUTS[model_type]


def size_field(config: Any, name: str, *, default: Any = None, at_least: int = 1) -> int:
    """A field that must be an integer; the message of the ValueError names the field and its value."""
    value = config_value(config, name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"config field `{name}` is {value!r}, expected an integer >= {at_least}.")
    if name == "num_hidden_layers" and value > MAX_LAYERS:
        raise ValueError(f"config field `{name}` is {value}, expected at most {MAX_LAYERS} layers.")
    return value


def head_dim(width: int, heads: int) -> int:
    if width % heads:
        raise ValueError(f"config field `hidden_size` is {width}, expected a multiple of {heads} attention heads.")
    return width // heads


def decoder_config(config: Any) -> Any:
    """The decoder's part of a config, with every size in it.

    What a config.json leaves out is transformers' default, as it is when the model is loaded.

    Raises:
        ValueError: its architecture is neither Qwen2ForCausalLM nor LlamaForCausalLM.
    """
    decoder = config_value(config, "llm_config") or config_value(config, "text_config") or {}
    model_type = DECODER_MODEL_TYPES[_architecture(decoder)]
    # A Llama without this field has as many as attention heads, a Qwen2 the default of its class.
    needed = DECODER_SIZES if model_type == "llama" else (*DECODER_SIZES, "num_key_value_heads")
    if not isinstance(decoder, Mapping) or all(name in decoder for name in needed):
        return decoder
    from transformers import AutoConfig

    defaults = AutoConfig.for_model(model_type)
    return {name: getattr(defaults, name) for name in needed} | dict(decoder)


def _architecture(decoder: Any) -> str:
    """The decoder's class name. `architectures` decides: the published file says `model_type: "llama"` of a Qwen2."""
    named = config_value(decoder, "architectures") or []
    if not named:
        model_type = config_value(decoder, "model_type", "qwen2")
        named = [name for name, its_type in DECODER_MODEL_TYPES.items() if its_type == model_type] or [model_type]
    if named[0] not in DECODER_MODEL_TYPES:
        known = sorted(DECODER_MODEL_TYPES)
        raise ValueError(f"config field `llm_config.architectures` is {named!r}, expected one of {known}.")
    return named[0]


def expected_tensors(config: Any, *, num_dummy_heads: int | None = None) -> dict[str, Shape]:
    """Name and shape of every tensor of a checkpoint, in the layout of the released one (SPEC 2).

    Args:
        config: a config.json as a dict, or a config object with `vision_config` and `llm_config`.
        num_dummy_heads: the encoder's dummy heads, if other than the config says.

    Returns:
        {tensor name: shape}: 1556 of them for the published 72B. A tied `lm_head` is left out.

    Raises:
        ValueError: the config describes no such model; the message names the field and its value.
    """
    return (
        _encoder_tensors(config, num_dummy_heads=num_dummy_heads)
        | _projector_tensors(config)
        | _decoder_tensors(decoder_config(config))
    )


def _encoder_tensors(config: Any, *, num_dummy_heads: int | None) -> dict[str, Shape]:
    vision = config_value(config, "vision_config") or {}
    sizes = {name: size_field(vision, name, default=default) for name, default in VISION_DEFAULTS.items()}
    width, wide, patch = sizes["hidden_size"], sizes["intermediate_size"], sizes["patch_size"]
    if num_dummy_heads is None:
        default = config_layout(config).num_dummy_heads
        num_dummy_heads = size_field(vision, "num_dummy_heads", default=default, at_least=0)
    heads = sizes["num_attention_heads"]
    inner = head_dim(width, heads) * (heads + num_dummy_heads)
    positions = (sizes["image_size"] // patch) ** 2 + 1  # the class token's is the first
    tensors: dict[str, Shape] = {
        "vision_model.embeddings.class_embedding": (1, 1, width),
        "vision_model.embeddings.patch_embedding.weight": (width, sizes["num_channels"], patch, patch),
        "vision_model.embeddings.patch_embedding.bias": (width,),
        "vision_model.embeddings.position_embedding": (1, positions, width),
    }
    layer: dict[str, Shape] = {
        "attn.qkv.weight": (3 * inner, width),
        "attn.proj.weight": (width, inner),
        "attn.proj.bias": (width,),
        "mlp.fc1.weight": (wide, width),
        "mlp.fc1.bias": (wide,),
        "mlp.fc2.weight": (width, wide),
        "mlp.fc2.bias": (width,),
        "norm1.weight": (width,),
        "norm2.weight": (width,),
        "ls1": (width,),
        "ls2": (width,),
    }
    if config_value(vision, "qkv_bias", False):
        layer["attn.qkv.bias"] = (3 * inner,)
    if config_value(vision, "qk_normalization", True):
        layer |= {"attn.q_norm.weight": (inner,), "attn.k_norm.weight": (inner,)}
    if config_value(vision, "norm_type", "rms_norm") == "layer_norm":
        layer |= {"norm1.bias": (width,), "norm2.bias": (width,)}
    for i in range(sizes["num_hidden_layers"]):
        tensors |= {f"vision_model.encoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    return tensors


def _projector_tensors(config: Any) -> dict[str, Shape]:
    layout = config_layout(config)
    vision, decoder = config_value(config, "vision_config") or {}, decoder_config(config)
    ratio = config_value(config, "downsample_ratio", 0.5)
    if not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise ValueError(f"config field `downsample_ratio` is {ratio!r}, expected above 0 and at most 1.")
    folded = size_field(vision, "hidden_size", default=VISION_DEFAULTS["hidden_size"]) * round(1 / ratio) ** 2
    inner, width = size_field(decoder, layout.projector_width), size_field(decoder, "hidden_size")
    tensors: dict[str, Shape] = {
        "mlp1.0.weight": (folded,),
        "mlp1.0.bias": (folded,),
        "mlp1.1.weight": (inner, folded),
        "mlp1.3.weight": (width, inner),
    }
    if config_value(config, "projector_bias", layout.projector_bias):
        tensors |= {"mlp1.1.bias": (inner,), "mlp1.3.bias": (width,)}
    return tensors


def _decoder_tensors(decoder: Any) -> dict[str, Shape]:
    width, wide, vocab = (size_field(decoder, name) for name in ("hidden_size", "intermediate_size", "vocab_size"))
    heads = size_field(decoder, "num_attention_heads")
    key_heads = size_field(decoder, "num_key_value_heads", default=heads)
    dim = config_value(decoder, "head_dim") or head_dim(width, heads)
    queries, keys = heads * dim, key_heads * dim
    layer: dict[str, Shape] = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (queries, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (width, queries),
        "mlp.gate_proj.weight": (wide, width),
        "mlp.up_proj.weight": (wide, width),
        "mlp.down_proj.weight": (width, wide),
    }
    layer |= {name.replace("weight", "bias"): layer[name][:1] for name in _biased(decoder)}
    tensors: dict[str, Shape] = {"language_model.model.embed_tokens.weight": (vocab, width)}
    for i in range(size_field(decoder, "num_hidden_layers")):
        tensors |= {f"language_model.model.layers.{i}.{name}": shape for name, shape in layer.items()}
    tensors["language_model.model.norm.weight"] = (width,)
    if not config_value(decoder, "tie_word_embeddings", False):
        tensors["language_model.lm_head.weight"] = (vocab, width)
    return tensors


def _biased(decoder: Any) -> list[str]:
    """Weights of a decoder layer that have a bias beside them: q, k and v in every Qwen2, by switch in a Llama."""
    attention = [f"self_attn.{part}_proj.weight" for part in "qkvo"]
    if _architecture(decoder) == "Qwen2ForCausalLM":
        return attention[:3]
    mlp = [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    named = attention if config_value(decoder, "attention_bias", False) else []
    return named + (mlp if config_value(decoder, "mlp_bias", False) else [])


def published_dtypes(config: Any) -> dict[str, str]:
    """Each tensor's dtype, "F32" or "BF16", as the released checkpoint of this family stores it (SPEC 2).

    Raises:
        ValueError: as `expected_tensors`.
    """
    mixed = config_layout(config).mixed_float32
    return {name: "F32" if mixed and name.endswith(FLOAT32_ENDINGS) else "BF16" for name in expected_tensors(config)}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        ValueError: the file is too large to be one of a checkpoint's, no JSON, or JSON of something else.
        OSError: it cannot be read.
    """
    check_regular(path)
    num_bytes = path.stat().st_size
    if num_bytes > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has {num_bytes} bytes, expected at most {MAX_JSON_BYTES}.")
    return parse_object(path.read_bytes(), source=path.name)


def check_regular(path: Path) -> None:
    """Refuse what is no file: reading a pipe would wait for ever."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if not path.is_file():
        raise ValueError(f"{path} is not a file.")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = Counter(key for key, _ in pairs)
    twice = [key for key, count in keys.items() if count > 1]
    if twice:
        raise ValueError(f"key {printable(twice[0])} stands in it twice")
    return dict(pairs)


def parse_object(text: bytes, *, source: str) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source} holds a JSON {type(value).__name__}, expected an object.")
    return value


def printable(text: str, *, limit: int = 120) -> str:
    """A name out of a file, safe to print: no control characters, no endless text."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= limit else text[:limit] + "..."
