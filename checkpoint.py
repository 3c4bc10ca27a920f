"""What tensors a checkpoint must hold, and whether a folder holds them (SPEC 2).

Names and shapes follow from config.json and safetensors headers tell what is there, so no weight is ever read and
torch is not needed.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

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

# Bits of each of safetensors' dtypes.
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
WEIGHT_DTYPES = ("F32", "F16", "BF16")

# A file from the internet may lie about its sizes. safetensors itself stops at this header length.
MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 50_000_000
MAX_LAYERS = 1024
MAX_DIMENSIONS = 64

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


def _size(config: Any, name: str, *, default: Any = None, at_least: int = 1) -> int:
    """A field that must be an integer; the message of the ValueError names the field and its value."""
    value = config_value(config, name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"config field `{name}` is {value!r}, expected an integer >= {at_least}.")
    if name == "num_hidden_layers" and value > MAX_LAYERS:
        raise ValueError(f"config field `{name}` is {value}, expected at most {MAX_LAYERS} layers.")
    return value


def _head_dim(width: int, heads: int) -> int:
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
    sizes = {name: _size(vision, name, default=default) for name, default in VISION_DEFAULTS.items()}
    width, wide, patch = sizes["hidden_size"], sizes["intermediate_size"], sizes["patch_size"]
    if num_dummy_heads is None:
        default = config_layout(config).num_dummy_heads
        num_dummy_heads = _size(vision, "num_dummy_heads", default=default, at_least=0)
    heads = sizes["num_attention_heads"]
    inner = _head_dim(width, heads) * (heads + num_dummy_heads)
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
    folded = _size(vision, "hidden_size", default=VISION_DEFAULTS["hidden_size"]) * round(1 / ratio) ** 2
    inner, width = _size(decoder, layout.projector_width), _size(decoder, "hidden_size")
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
    width, wide, vocab = (_size(decoder, name) for name in ("hidden_size", "intermediate_size", "vocab_size"))
    heads = _size(decoder, "num_attention_heads")
    key_heads = _size(decoder, "num_key_value_heads", default=heads)
    head_dim = config_value(decoder, "head_dim") or _head_dim(width, heads)
    queries, keys = heads * head_dim, key_heads * head_dim
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
    for i in range(_size(decoder, "num_hidden_layers")):
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


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a safetensors header describes it: dtype by safetensors' name, shape, size in bytes."""

    dtype: str
    shape: Shape
    num_bytes: int


@dataclass(frozen=True)
class ShardHeader:
    """A safetensors file's header.

    Args:
        tensors: {name: what the header says of it}.
        missing_bytes: bytes by which the file is shorter than its header promises; 0 for a whole file.
    """

    tensors: dict[str, TensorInfo]
    missing_bytes: int


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        ValueError: the file is too large to be one of a checkpoint's, no JSON, or JSON of something else.
        OSError: it cannot be read.
    """
    _check_regular(path)
    num_bytes = path.stat().st_size
    if num_bytes > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has {num_bytes} bytes, expected at most {MAX_JSON_BYTES}.")
    return _parse_object(path.read_bytes(), source=path.name)


def read_header(path: str | os.PathLike[str]) -> ShardHeader:
    """Read a safetensors file's header (8 bytes of length, then JSON) and nothing of its weights.

    Raises:
        ValueError: the file is not a sound safetensors file; the message says what is wrong. A file that merely ends
            too early is sound as far as it goes: see `ShardHeader.missing_bytes`.
        OSError: it cannot be read.
    """
    path = Path(path)
    _check_regular(path)
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise ValueError(
                f"{path.name} is no safetensors file, or cut off: of its {file_bytes} bytes the header would take "
                f"{length} (at most {MAX_HEADER_BYTES} are read). Download it again."
            )
        raw = _parse_object(file.read(length), source=f"the header of {path.name}")
    raw.pop("__metadata__", None)
    spans, tensors = [], {}
    for name, entry in raw.items():
        tensors[name], span = _tensor_info(entry, what=f"{path.name}: tensor {printable(name)}")
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"{path.name}: tensors overlap or leave a gap at byte {end} of the data.")
        end = stop
    surplus = file_bytes - 8 - length - end
    if surplus > 0:
        raise ValueError(f"{path.name} has {surplus} bytes more than its header describes. Download it again.")
    return ShardHeader(tensors=tensors, missing_bytes=-surplus)


def _check_regular(path: Path) -> None:
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


def _parse_object(text: bytes, *, source: str) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source} holds a JSON {type(value).__name__}, expected an object.")
    return value


def _tensor_info(entry: Any, *, what: str) -> tuple[TensorInfo, tuple[int, int]]:
    """A header's entry, checked, and the span of bytes it claims."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if (
        not isinstance(dtype, str)
        or dtype not in DTYPE_BITS
        or not _naturals(shape)
        or not _naturals(span)
        or len(span) != 2
    ):
        raise ValueError(f"{what} has a malformed header entry: {printable(str(entry))}.")
    start, stop = span
    num_bits = math.prod(shape) * DTYPE_BITS[dtype]
    if (stop - start) * 8 != num_bits:
        raise ValueError(
            f"{what} is {dtype} {tuple(shape)}, {num_bits // 8} bytes, but claims bytes {start} to {stop}."
        )
    return TensorInfo(dtype, tuple(shape), stop - start), (start, stop)


def _naturals(value: Any) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        return False
    return all(type(item) is int and 0 <= item < 2**63 for item in value)


def printable(text: str, *, limit: int = 120) -> str:
    """A name out of a file, safe to print: no control characters, no endless text."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= limit else text[:limit] + "..."


def _listed(names: Iterable[str], *, limit: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(printable(name) for name in names[:limit]) + more


@dataclass
class CheckpointReport:
    """What `inspect_checkpoint` found.

    Args:
        folder: the checkpoint's folder.
        problems: what keeps the checkpoint from loading, or from loading right; one line each.
        notes: what differs from the released checkpoint and is fine.
        num_shards: safetensors files read.
        num_tensors: tensors in them.
        total_bytes: bytes of those tensors.
        dtype_bytes: {safetensors dtype: bytes}.
        missing: names that the config asks for and no shard holds.
        unexpected: names that a shard holds and the config does not know.
        wrong_shapes: {name: (shape there, shape expected)}.
        dummy_heads_config: the encoder's dummy heads by config.json; None if it cannot tell.
        dummy_heads_stored: by the tensors; None if they cannot tell or the layers disagree.
    """

    folder: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_shards: int = 0
    num_tensors: int = 0
    total_bytes: int = 0
    dtype_bytes: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shapes: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    dummy_heads_config: int | None = None
    dummy_heads_stored: int | None = None

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values, `ok` included."""
        return {"ok": self.ok, **asdict(self)}


def inspect_checkpoint(folder: str | os.PathLike[str]) -> CheckpointReport:
    """Compare a folder's safetensors files with what its config.json asks for, reading headers only (SPEC 2).

    What is wrong with a file ends up in the report, so that one look tells everything.

    Raises:
        ValueError: `folder` is not a folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the folder that holds config.json and *.safetensors.")
    report = CheckpointReport(folder=str(folder))
    config = _inspect_config(folder, report)
    found = _inspect_shards(folder, report)
    report.num_tensors = len(found)
    report.total_bytes = sum(info.num_bytes for info in found.values())
    for info in found.values():
        report.dtype_bytes[info.dtype] = report.dtype_bytes.get(info.dtype, 0) + info.num_bytes
    if config is not None:
        try:
            _compare(config, found, report)
        except ValueError as error:
            report.problems.append(f"config.json: {error}")
    return report


def _inspect_config(folder: Path, report: CheckpointReport) -> dict[str, Any] | None:
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        report.problems.append(f"config.json cannot be used: {error}")
        return None
    for part in ("vision_config", "llm_config"):
        if not isinstance(config_value(config, part, {}), dict):
            report.problems.append(f"config.json: `{part}` is no JSON object.")
            return None
    vision, decoder = config_value(config, "vision_config", {}), config_value(config, "llm_config")
    if decoder is None and config_value(config, "text_config") is None:
        report.notes.append("config.json has no `llm_config`: the decoder has the sizes of transformers' defaults.")
    tile, stored = config_value(config, "force_image_size"), config_value(vision, "image_size")
    if None not in (tile, stored) and tile != stored:
        report.notes.append(
            f"`force_image_size` is {tile} and `vision_config.image_size` {stored}: position embeddings are resized "
            "here, but vLLM reads only the latter."
        )
    _inspect_auto_map(folder, config, report)
    return config


def _inspect_auto_map(folder: Path, config: dict[str, Any], report: CheckpointReport) -> None:
    auto_map = config_value(config, "auto_map", {})
    if not isinstance(auto_map, dict) or not auto_map:
        report.notes.append("config.json has no `auto_map`, which trust_remote_code needs: `nvlm overlay` adds it.")
        return
    local = {str(target).split(".")[0] + ".py" for target in auto_map.values() if "--" not in str(target)}
    absent = sorted(name for name in local if not (folder / name).is_file())
    if absent:
        report.notes.append(f"`auto_map` names {_listed(absent)}, not in the folder: `nvlm overlay` puts them there.")


def _inspect_shards(folder: Path, report: CheckpointReport) -> dict[str, TensorInfo]:
    """Read every shard's header; returns {tensor name: what its header says} of all that could be read."""
    index_path = folder / "model.safetensors.index.json"
    placed: dict[str, str] | None = None
    if index_path.exists():
        placed = _read_index(index_path, report)
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    names = sorted(set(placed.values())) if placed is not None else present
    if not names:
        other = " Only .bin files are there: convert them with safetensors." if any(folder.glob("*.bin")) else ""
        report.problems.append(f"There are no *.safetensors files.{other}")
    if placed is not None and set(present) - set(names):
        report.notes.append(f"Not in the index, so never loaded: {_listed(sorted(set(present) - set(names)))}.")
    found: dict[str, TensorInfo] = {}
    held: dict[str, set[str]] = {}
    for name in names:
        try:
            header = read_header(folder / name)
        except (OSError, ValueError) as error:
            report.problems.append(f"Shard {printable(name)}: {error}")
            continue
        if header.missing_bytes:
            report.problems.append(
                f"Shard {name} is cut off: {header.missing_bytes} bytes are missing. Download it again."
            )
        twice = found.keys() & header.tensors.keys()
        if twice:
            report.problems.append(f"Shard {name} repeats tensors of another: {_listed(sorted(twice))}.")
        found |= header.tensors
        held[name] = set(header.tensors)
    report.num_shards = len(held)
    if placed is not None:
        _compare_index(placed, held, report)
    return found


def _read_index(path: Path, report: CheckpointReport) -> dict[str, str] | None:
    """{tensor name: shard's file name}, or None, and a problem in the report, if the index is of no use."""
    try:
        placed = read_json(path).get("weight_map")
        if not isinstance(placed, dict) or not placed:
            raise ValueError(f"{path.name} has no `weight_map`.")
        for shard in placed.values():
            # A file name only: an index must not lead out of its folder.
            if not isinstance(shard, str) or not shard.endswith(".safetensors") or shard != os.path.basename(shard):
                raise ValueError(f"{path.name} names {printable(repr(shard))}, expected a *.safetensors of its folder.")
    except (OSError, ValueError) as error:
        report.problems.append(f"The index cannot be used: {error}")
        return None
    return placed


def _compare_index(placed: dict[str, str], held: dict[str, set[str]], report: CheckpointReport) -> None:
    for shard, tensors in held.items():
        by_index = {name for name, its_shard in placed.items() if its_shard == shard}
        if by_index - tensors:
            report.problems.append(f"The index places {_listed(sorted(by_index - tensors))} in {shard}: not there.")
        if tensors - by_index:
            report.problems.append(f"Shard {shard} holds {_listed(sorted(tensors - by_index))}: not in the index.")


def _compare(config: dict[str, Any], found: dict[str, TensorInfo], report: CheckpointReport) -> None:
    """Put into the report where tensors and config disagree."""
    layout = config_layout(config)
    vision = config_value(config, "vision_config", {})
    in_config = _size(vision, "num_dummy_heads", default=layout.num_dummy_heads, at_least=0)
    report.dummy_heads_config = in_config
    report.dummy_heads_stored = stored = _stored_dummy_heads(vision, found)
    if stored is not None and stored != in_config:
        report.problems.append(
            f"The encoder's tensors hold {stored} dummy heads, config.json says {in_config}: set "
            f"`vision_config.num_dummy_heads` to {stored}."
        )
    expected = expected_tensors(config, num_dummy_heads=stored)
    quantised = config_value(config, "quantization_config") is not None
    modules = {name.rpartition(".")[0] for name in expected}
    report.missing = [name for name in expected if name not in found]
    report.unexpected = [
        name
        for name in found
        if name not in expected
        and name != "language_model.lm_head.weight"  # a tied head may be stored all the same
        and not (quantised and _parents(name) & modules)  # scales and the like, beside the weights
    ]
    if report.missing:
        report.problems.append(f"{len(report.missing)} tensors are missing: {_listed(report.missing)}.")
    if report.unexpected:
        report.problems.append(f"{len(report.unexpected)} tensors are unknown: {_listed(report.unexpected)}.")
    if quantised:
        report.notes.append("config.json has a `quantization_config`: shapes and dtypes were not compared.")
        return
    report.wrong_shapes = {
        name: (found[name].shape, shape)
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    }
    if report.wrong_shapes:
        shown = [f"{name} {there}, expected {wanted}" for name, (there, wanted) in report.wrong_shapes.items()]
        report.problems.append(f"{len(shown)} tensors have another shape: {_listed(shown, limit=2)}.")
    _compare_dtypes(published_dtypes(config), found, report)


def _parents(name: str) -> set[str]:
    """The modules that a dotted name lies in: a.b.c -> {a, a.b}."""
    parts = name.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))}


def _stored_dummy_heads(vision: dict[str, Any], found: dict[str, TensorInfo]) -> int | None:
    """The dummy heads by the width inside the attention, if all layers agree on it."""
    width, heads = (
        _size(vision, name, default=VISION_DEFAULTS[name]) for name in ("hidden_size", "num_attention_heads")
    )
    projections = [info.shape for name, info in found.items() if name.endswith(".attn.proj.weight")]
    inner = {shape[1] if len(shape) == 2 else 0 for shape in projections}
    if len(inner) != 1:
        return None
    extra, rest = divmod(inner.pop() - width, _head_dim(width, heads))
    return None if rest or extra < 0 else extra


def _compare_dtypes(published: dict[str, str], found: dict[str, TensorInfo], report: CheckpointReport) -> None:
    others = Counter((found[name].dtype, dtype) for name, dtype in published.items() if name in found)
    for (there, dtype), count in sorted(others.items()):
        if there not in WEIGHT_DTYPES:
            report.problems.append(f"{count} tensors are {there}, expected one of {', '.join(WEIGHT_DTYPES)}.")
        elif there != dtype:
            report.notes.append(f"{count} tensors are {there} where the released checkpoint has {dtype}: fine.")
