"""`nvlm repack`: a checkpoint in another dtype, without dummy heads, in shards of another size (SPEC 2)."""

import argparse
import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..checkpoint import VISION_DEFAULTS, Shape, config_value, expected_tensors
from ..device_map import parse_memory
from .checkpoint_report import CheckpointReport
from .checkpoint_source import StoredTensor, fingerprint, list_tensors, read_sound_checkpoint, small_files
from .checkpoint_writer import Plan, check_apart, write_checkpoint
from .shards import Piece, plan_shards, whole_piece

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
MAX_SHARD_SIZE = "5GB"


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "repack",
        help="copy a checkpoint in another dtype or shard size, or without dummy heads",
        description="Copy a checkpoint shard by shard, and its other files up to 200 MB. If it is stopped, the same "
        "command goes on where it was.",
    )
    parser.add_argument("source", metavar="SRC", help="folder of the checkpoint")
    parser.add_argument("target", metavar="DST", help="folder to write: new, empty, or begun by the same command")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="dtype of all tensors (default: as they are)")
    parser.add_argument(
        "--drop-dummy-heads",
        action="store_true",
        help="leave out the encoder's zero heads: the same outputs from less; vLLM's own NVLM_D needs them",
    )
    parser.add_argument(
        "--max-shard-size", default=MAX_SHARD_SIZE, metavar="SIZE", help=f"largest file, as {MAX_SHARD_SIZE} (default)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be written, by headers alone")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out `nvlm repack`."""
    outcome = repack(
        Path(args.source),
        Path(args.target),
        dtype=args.dtype,
        drop_dummy_heads=args.drop_dummy_heads,
        max_shard_size=args.max_shard_size,
        dry_run=args.dry_run,
    )
    print(
        f"{outcome.old_bytes / 1e9:.1f} GB -> {outcome.new_bytes / 1e9:.1f} GB ({outcome.old_bytes} -> "
        f"{outcome.new_bytes} bytes, {outcome.old_shards} -> {outcome.new_shards} shards)"
    )
    if args.dry_run and args.drop_dummy_heads:
        print("that the dummy heads contribute nothing is only checked when it is done")
    elif not args.dry_run:
        print(f"wrote {args.target}" if outcome.written else f"{args.target} was finished before: nothing to do")
    return 0


@dataclass(frozen=True)
class Outcome:
    """What `repack` did, or would do: bytes of all tensors and number of shards, before and after.

    Args:
        written: whether anything was written; False of a dry run, and where an earlier call had finished.
    """

    old_bytes: int
    new_bytes: int
    old_shards: int
    new_shards: int
    written: bool


def repack(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    drop_dummy_heads: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    dry_run: bool = False,
) -> Outcome:
    """Copy a checkpoint, changed as asked; if an earlier call with the same arguments was stopped, go on where it was.

    Args:
        source: the checkpoint's folder.
        target: the folder to write: new, empty, or begun by such a call.
        dtype: "bfloat16", "float16" or "float32" for all tensors; None keeps each in its own.
        drop_dummy_heads: leave out the encoder's dummy heads.
        max_shard_size: bytes of the largest file, or text such as "5GB". A larger tensor has a file of its own.
        dry_run: only tell what would be written, by the headers alone.

    Raises:
        ValueError: the source is no sound checkpoint, a dummy head of it contributes, an argument is out of range,
            or the target is in use for something else.
        OSError: there is too little space, or a file cannot be read or written.
    """
    check_apart(target, [source])
    plan, report = plan_repack(source, dtype=dtype, drop_dummy_heads=drop_dummy_heads, max_shard_size=max_shard_size)
    written = False
    if not dry_run:
        if drop_dummy_heads and report.dummy_heads_stored:
            check_dummy_heads_are_silent(list_tensors(source), _real_width(plan.config))
        written = write_checkpoint(target, plan)
    return Outcome(report.total_bytes, plan.num_bytes, report.num_shards, len(plan.shards), written)


def plan_repack(
    source: Path,
    *,
    dtype: str | None = None,
    drop_dummy_heads: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> tuple[Plan, CheckpointReport]:
    """What `repack` would write, and what is there now; headers alone are read.

    Raises:
        ValueError: as `repack`, dummy heads and target aside.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {sorted(DTYPES)}, or None to keep each tensor's own.")
    max_bytes = parse_memory(max_shard_size)
    config, report = read_sound_checkpoint(source)
    tensors = list_tensors(source)
    new_config = repacked_config(config, dtype=dtype, drop_dummy_heads=drop_dummy_heads)
    expected = expected_tensors(new_config, num_dummy_heads=0 if drop_dummy_heads else report.dummy_heads_stored)
    # The order of the model rather than of the files; a tied head that is stored all the same comes last.
    names = [*expected, *(name for name in tensors if name not in expected)]
    pieces = [whole_piece(tensors[name], dtype=DTYPES[dtype] if dtype else None) for name in names]
    if drop_dummy_heads and report.dummy_heads_stored:
        pieces = [without_dummy_heads(piece, _real_width(config)) for piece in pieces]
    _check_shapes(pieces, expected)
    asked = {
        "command": "repack",
        "dtype": dtype,
        "drop_dummy_heads": drop_dummy_heads,
        "max_shard_size": max_bytes,
        "sources": [fingerprint(source, tensors.values())],
    }
    shards = plan_shards(pieces, max_bytes=max_bytes)
    return Plan(asked=asked, shards=shards, config=new_config, copies=small_files(source)), report


def repacked_config(config: Mapping[str, Any], *, dtype: str | None, drop_dummy_heads: bool) -> dict[str, Any]:
    """A config.json with the dtype and the dummy heads changed wherever it speaks of them, all else kept."""
    new = copy.deepcopy(dict(config))
    if drop_dummy_heads:
        new["vision_config"] = {**(new.get("vision_config") or {}), "num_dummy_heads": 0}
    if dtype is not None:
        if "dtype" not in new:
            new["torch_dtype"] = dtype
        for part in (new, *(new.get(name) for name in ("vision_config", "llm_config", "text_config"))):
            for key in ("torch_dtype", "dtype"):
                if part and key in part:
                    part[key] = dtype
    return new


def _real_width(config: Mapping[str, Any]) -> int:
    """The width of the encoder's real heads together."""
    vision = config_value(config, "vision_config", {})
    return config_value(vision, "hidden_size", VISION_DEFAULTS["hidden_size"])


def without_dummy_heads(piece: Piece, real: int) -> Piece:
    """A whole tensor of a checkpoint, the dummy heads cut out if it is one of the encoder's that hold them."""
    if not piece.name.startswith("vision_model.encoder.layers."):
        return piece
    kind = piece.name.split(".", 4)[4]
    rows, columns = piece.rows, piece.columns
    if kind in ("attn.qkv.weight", "attn.qkv.bias"):
        inner = piece.source.info.shape[0] // 3
        rows = tuple((part * inner, part * inner + real) for part in range(3))
    elif kind in ("attn.q_norm.weight", "attn.k_norm.weight"):
        rows = ((0, real),)
    elif kind == "attn.proj.weight":
        columns = real
    return Piece(piece.name, piece.source, piece.dtype, rows=rows, columns=columns)


def check_dummy_heads_are_silent(tensors: Mapping[str, StoredTensor], real: int) -> None:
    """Refuse to drop dummy heads that contribute: in a layer, neither their values nor their columns are all zero.

    Only the slices that decide are read, a layer at a time.

    Raises:
        ValueError: a dummy head contributes; the message names the first tensors.
    """
    for i in itertools.count():
        attention = f"vision_model.encoder.layers.{i}.attn"
        proj = tensors.get(f"{attention}.proj.weight")
        if proj is None:
            return
        values = [tensors.get(f"{attention}.qkv.{kind}") for kind in ("weight", "bias")]
        if any(_any_value(value, real) for value in values if value) and _any_column(proj, real):
            raise ValueError(
                f"The dummy heads contribute in {attention}.qkv.weight: neither their rows of v there nor their "
                f"columns of {attention}.proj.weight are all zero. Leave out --drop-dummy-heads."
            )


def _any_value(tensor: StoredTensor, real: int) -> bool:
    """Whether the dummy heads' rows of v hold anything but zero."""
    inner = tensor.info.shape[0] // 3
    with safe_open(tensor.shard, framework="pt") as file:
        return bool(file.get_slice(tensor.name)[2 * inner + real : 3 * inner].any())


def _any_column(tensor: StoredTensor, real: int) -> bool:
    with safe_open(tensor.shard, framework="pt") as file:
        return bool(file.get_slice(tensor.name)[:, real:].any())


def _check_shapes(pieces: list[Piece], expected: Mapping[str, Shape]) -> None:
    """Compare what would be written with what the new config.json asks for."""
    for piece in pieces:
        wanted = expected.get(piece.name, piece.shape)
        if piece.shape != wanted:
            raise ValueError(f"Tensor {piece.name} would be {piece.shape}, but the new config.json asks for {wanted}.")
