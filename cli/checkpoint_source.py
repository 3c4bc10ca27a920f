"""A checkpoint's folder to copy from: its tensors and where they lie, its config, its small files (SPEC 2)."""

import fnmatch
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import printable, read_json
from .checkpoint_report import CheckpointReport, TensorInfo, inspect_checkpoint, read_header

INDEX = "model.safetensors.index.json"
WEIGHT_ENDINGS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz"),
    ".index.json",
)
# No tokenizer, code or licence is larger; what is may be weights in a format of its own.
MAX_SMALL_BYTES = 200_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint: its name, the shard that holds it, what the shard's header says of it."""

    name: str
    shard: Path
    info: TensorInfo


def read_sound_checkpoint(folder: Path) -> tuple[dict[str, Any], CheckpointReport]:
    """The config.json of a checkpoint that `nvlm inspect` finds sound, and what that found; only headers are read.

    Raises:
        ValueError: it is not sound, or its weights are quantised.
    """
    report = inspect_checkpoint(folder)
    if report.problems:
        more = f" (and {len(report.problems) - 1} more: see `nvlm inspect`)" if len(report.problems) > 1 else ""
        raise ValueError(f"{folder} is no sound checkpoint: {report.problems[0]}{more}")
    config = read_json(folder / "config.json")
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"{folder} has a `quantization_config`: expected a checkpoint in float32, float16 or bfloat16."
        )
    return config, report


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor that loads from a folder: of the shards that its index names, or else of all.

    Raises:
        ValueError: there are no shards, or one is cut off, malformed, repeats another's tensor or, by the index, lies
            elsewhere.
        OSError: a file cannot be read.
    """
    tensors: dict[str, StoredTensor] = {}
    for shard in _shards(folder):
        header = read_header(shard)
        if header.missing_bytes:
            raise ValueError(f"{shard} is cut off: {header.missing_bytes} bytes are missing. Download it again.")
        for name, info in header.tensors.items():
            if name in tensors:
                raise ValueError(f"{shard} repeats tensor {printable(name)} of {tensors[name].shard.name}.")
            tensors[name] = StoredTensor(name, shard, info)
    return tensors


def _shards(folder: Path) -> list[Path]:
    if not (folder / INDEX).exists():
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    else:
        placed = read_json(folder / INDEX).get("weight_map")
        files = list(placed.values()) if isinstance(placed, dict) else []
        # A file name only: an index must not lead out of its folder.
        wrong = [file for file in files if not isinstance(file, str) or file != os.path.basename(file)]
        if wrong:
            raise ValueError(f"{folder / INDEX} names {printable(repr(wrong[0]))}, expected a file of its folder.")
        names = sorted(set(files))
    if not names:
        raise ValueError(f"{folder} holds no *.safetensors files: give the folder of a checkpoint.")
    return [folder / name for name in names]


def small_files(folder: Path, patterns: Iterable[str] = ("*",)) -> dict[str, Path]:
    """Tokenizer, code, settings, licence: {path in the folder: file} of all but weights, config.json and hidden files.

    Only files that one of the patterns matches, as in a shell, are among them.
    Linked files count (the Hub's cache is made of them), linked folders do not: they may go round in a circle.
    """
    found: dict[str, Path] = {}
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(files):
            path = Path(place) / name
            relative = path.relative_to(folder).as_posix()
            hidden = name.startswith(".") or name.endswith(WEIGHT_ENDINGS) or relative == "config.json"
            matches = any(fnmatch.fnmatchcase(relative, pattern) for pattern in patterns)
            if matches and not hidden and path.is_file() and path.stat().st_size <= MAX_SMALL_BYTES:
                found[relative] = path
    return found


def fingerprint(folder: Path, tensors: Iterable[StoredTensor]) -> str:
    """What a source is, short of reading its weights: a resumed copy must not mix two of them."""
    shards = sorted({tensor.shard for tensor in tensors})
    stats = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
    config = (folder / "config.json").read_bytes()
    return "sha256:" + hashlib.sha256(repr(stats).encode() + config).hexdigest()
