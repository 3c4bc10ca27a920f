"""Whether a folder holds the checkpoint that its config.json describes (SPEC 2).

Safetensors headers tell what is there, so no weight is ever read and torch is not needed.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from ..checkpoint import (
    VISION_DEFAULTS,
    Shape,
    check_regular,
    config_layout,
    config_value,
    expected_tensors,
    head_dim,
    parse_object,
    printable,
    published_dtypes,
    read_json,
    size_field,
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
MAX_DIMENSIONS = 64


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


def read_header(path: str | os.PathLike[str]) -> ShardHeader:
    """Read a safetensors file's header (8 bytes of length, then JSON) and nothing of its weights.

    Raises:
        ValueError: the file is not a sound safetensors file; the message says what is wrong. A file that merely ends
            too early is sound as far as it goes: see `ShardHeader.missing_bytes`.
        OSError: it cannot be read.
    """
    path = Path(path)
    check_regular(path)
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise ValueError(
                f"{path.name} is no safetensors file, or cut off: of its {file_bytes} bytes the header would take "
                f"{length} (at most {MAX_HEADER_BYTES} are read). Download it again."
            )
        raw = parse_object(file.read(length), source=f"the header of {path.name}")
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
    in_config = size_field(vision, "num_dummy_heads", default=layout.num_dummy_heads, at_least=0)
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
        size_field(vision, name, default=VISION_DEFAULTS[name]) for name in ("hidden_size", "num_attention_heads")
    )
    projections = [info.shape for name, info in found.items() if name.endswith(".attn.proj.weight")]
    inner = {shape[1] if len(shape) == 2 else 0 for shape in projections}
    if len(inner) != 1:
        return None
    extra, rest = divmod(inner.pop() - width, head_dim(width, heads))
    return None if rest or extra < 0 else extra


def _compare_dtypes(published: dict[str, str], found: dict[str, TensorInfo], report: CheckpointReport) -> None:
    others = Counter((found[name].dtype, dtype) for name, dtype in published.items() if name in found)
    for (there, dtype), count in sorted(others.items()):
        if there not in WEIGHT_DTYPES:
            report.problems.append(f"{count} tensors are {there}, expected one of {', '.join(WEIGHT_DTYPES)}.")
        elif there != dtype:
            report.notes.append(f"{count} tensors are {there} where the released checkpoint has {dtype}: fine.")
