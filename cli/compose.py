"""`nvlm compose`: one checkpoint of an encoder, a projector and a decoder, as `nvlm extract` makes them (SPEC 1, 2)."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import config_value, expected_tensors, head_dim, printable, read_json, size_field
from ..device_map import parse_memory
from .checkpoint_source import StoredTensor, fingerprint, list_tensors, small_files
from .checkpoint_writer import Plan, check_apart, write_checkpoint
from .extract import DECODER_FILES, PREFIXES
from .overlay import PACKAGE
from .repack import MAX_SHARD_SIZE
from .shards import plan_shards, whole_piece


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "compose",
        help="put encoder, projector and decoder together to a checkpoint",
        description="Write a checkpoint of the parts that `nvlm extract` makes, the tokenizer being the decoder's. If "
        "it is stopped, the same command goes on where it was.",
    )
    parser.add_argument("target", metavar="DST", help="folder to write: new, empty, or begun by the same command")
    for part in PREFIXES:
        parser.add_argument(f"--{part}", required=True, metavar="DIR", help=f"folder of the {part}")
    parser.add_argument(
        "--config", metavar="FILE", help="the whole checkpoint's config.json (default: the 72B's with the parts' sizes)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out `nvlm compose`."""
    target = Path(args.target)
    written = compose(
        target,
        encoder=Path(args.encoder),
        projector=Path(args.projector),
        decoder=Path(args.decoder),
        config=Path(args.config) if args.config else None,
    )
    if written:
        print(f"wrote {target}; `nvlm overlay` adds the code for trust_remote_code=True")
    else:
        print(f"{target} was finished before: nothing to do")
    return 0


def compose(target: Path, *, encoder: Path, projector: Path, decoder: Path, config: Path | None = None) -> bool:
    """Write a checkpoint of three parts; every tensor is as it was.

    Args:
        target: the folder to write: new, empty, or begun by such a call.
        encoder: folder of the encoder, names as in `InternVisionModel`.
        projector: folder of the projector, names as in the whole checkpoint.
        decoder: folder of the decoder, names as in `Qwen2ForCausalLM`; the tokenizer is taken from it, too.
        config: the config.json to give it; None for the published one with the parts' sizes in it.

    Returns:
        Whether there was anything left to do.

    Raises:
        ValueError: a part is broken, the parts do not fit each other or the config, or the target is in use for
            something else.
        OSError: there is too little space, or a file cannot be read or written.
    """
    folders = {"encoder": encoder, "projector": projector, "decoder": decoder}
    check_apart(target, folders.values())
    stored = {part: list_tensors(folder) for part, folder in folders.items()}
    whole = read_json(config) if config else composed_config(folders, stored["encoder"])
    pieces = {
        piece.name: piece
        for part, tensors in stored.items()
        for name, tensor in tensors.items()
        for piece in [whole_piece(tensor, name=PREFIXES[part] + name)]
    }
    _check_fit(whole, {name: piece.shape for name, piece in pieces.items()})
    asked = {
        "command": "compose",
        "config": whole,
        "sources": [fingerprint(folder, stored[part].values()) for part, folder in folders.items()],
    }
    shards = plan_shards(pieces.values(), max_bytes=parse_memory(MAX_SHARD_SIZE))
    return write_checkpoint(target, Plan(asked, shards, config=whole, copies=small_files(decoder, DECODER_FILES)))


def composed_config(folders: Mapping[str, Path], encoder: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The published config.json with what the parts' own say.

    Args:
        folders: {part: its folder}.
        encoder: the encoder's tensors; they tell the dummy heads where its config.json does not.

    Raises:
        ValueError: a part's config.json is no use.
        OSError: it cannot be read.
    """
    own = {part: read_json(folder / "config.json") for part, folder in folders.items()}
    vision = {name: value for name, value in own["encoder"].items() if name != "auto_map"}
    proj = encoder.get("encoder.layers.0.attn.proj.weight")
    if "num_dummy_heads" not in vision and proj is not None and len(proj.info.shape) == 2:
        width = size_field(vision, "hidden_size")
        vision["num_dummy_heads"] = (
            proj.info.shape[1] // head_dim(width, size_field(vision, "num_attention_heads"))
            - (vision["num_attention_heads"])
        )
    decoder = {name: value for name, value in own["decoder"].items() if name != "auto_map"}
    projector = {
        name: own["projector"][name] for name in ("projector_bias", "downsample_ratio") if name in own["projector"]
    }
    dtype = config_value(decoder, "dtype") or config_value(decoder, "torch_dtype", "bfloat16")
    return {
        **read_json(PACKAGE / "config.json"),
        **projector,
        "torch_dtype": dtype,
        "force_image_size": size_field(vision, "image_size"),
        "vision_config": vision,
        "llm_config": decoder,
    }


def _check_fit(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the parts' tensors with what the composed config.json asks for.

    Raises:
        ValueError: one is missing, unknown or of another shape; the message names the first.
    """
    expected = expected_tensors(config)
    for name, wanted in expected.items():
        if name not in shapes:
            raise ValueError(f"No part holds tensor {name} {wanted}, which the composed config.json asks for.")
        if shapes[name] != wanted:
            raise ValueError(
                f"The parts do not fit: tensor {name} is {shapes[name]}, the composed config.json asks for {wanted}. "
                "If they do belong together, give the whole checkpoint's config.json with --config."
            )
    # A tied head may be stored all the same.
    unknown = [name for name in shapes if name not in expected and name != "language_model.lm_head.weight"]
    if unknown:
        raise ValueError(f"Tensor {printable(unknown[0])} of a part is unknown to the composed config.json.")
