"""`nvlm extract`: the encoder, the projector or the decoder of a checkpoint as a checkpoint of its own (SPEC 1, 2)."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import config_layout, config_value, decoder_config
from ..device_map import parse_memory
from .checkpoint_report import CheckpointReport
from .checkpoint_source import StoredTensor, fingerprint, list_tensors, read_sound_checkpoint, small_files
from .checkpoint_writer import Plan, check_apart, write_checkpoint
from .overlay import PACKAGE
from .repack import MAX_SHARD_SIZE
from .shards import plan_shards, whole_piece

# {part: what its tensors' names begin with in a whole checkpoint, and no more in one of its own}.
PREFIXES = {"encoder": "vision_model.", "projector": "", "decoder": "language_model."}
PROJECTOR = "mlp1."
ENCODER_CODE = ("configuration_intern_vit.py", "modeling_intern_vit.py")
LICENCES = ("LICENSE*", "NOTICE*")
# What belongs to the decoder's text: the other files are about pictures or about the whole.
DECODER_FILES = (
    *LICENCES,
    *("tokenizer*", "vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "*.tiktoken"),
    *("generation_config.json", "chat_template*"),
)


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "extract",
        help="take encoder, projector or decoder out of a checkpoint",
        description="Write one part of a checkpoint as a checkpoint of its own: InternVisionModel loads the encoder, "
        "transformers' Qwen2ForCausalLM the decoder. If it is stopped, the same command goes on where it was.",
    )
    parser.add_argument("source", metavar="SRC", help="folder of the whole checkpoint")
    parser.add_argument("target", metavar="DST", help="folder to write: new, empty, or begun by the same command")
    parser.add_argument("--part", required=True, choices=tuple(PREFIXES))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out `nvlm extract`."""
    target = Path(args.target)
    written = extract(Path(args.source), target, part=args.part)
    print(f"wrote {target}" if written else f"{target} was finished before: nothing to do")
    return 0


def extract(source: Path, target: Path, *, part: str) -> bool:
    """Write one part of a checkpoint as a checkpoint of its own; `compose` puts the parts together again.

    Args:
        source: the whole checkpoint's folder.
        target: the folder to write: new, empty, or begun by such a call.
        part: "encoder", "projector" or "decoder".

    Returns:
        Whether there was anything left to do.

    Raises:
        ValueError: an unknown part, the source is no sound checkpoint, or the target is in use for something else.
        OSError: there is too little space, or a file cannot be read or written.
    """
    if part not in PREFIXES:
        raise ValueError(f"part is {part!r}, expected one of {list(PREFIXES)}.")
    check_apart(target, [source])
    config, report = read_sound_checkpoint(source)
    tensors = list_tensors(source)
    prefix = PREFIXES[part]
    wanted = [tensor for name, tensor in tensors.items() if name.startswith(prefix or PROJECTOR)]
    pieces = [whole_piece(tensor, name=tensor.name.removeprefix(prefix)) for tensor in wanted]
    if part == "encoder":
        part_config = encoder_part_config(config, report)
    elif part == "decoder":
        part_config = decoder_part_config(config)
    else:
        part_config = projector_part_config(config, tensors)
    copies = small_files(source, DECODER_FILES if part == "decoder" else LICENCES)
    if part == "encoder":
        copies |= {name: PACKAGE / name for name in ENCODER_CODE}
    plan = Plan(
        asked={"command": "extract", "part": part, "sources": [fingerprint(source, tensors.values())]},
        shards=plan_shards(pieces, max_bytes=parse_memory(MAX_SHARD_SIZE)),
        config=part_config,
        copies=copies,
    )
    return write_checkpoint(target, plan)


def encoder_part_config(config: Mapping[str, Any], report: CheckpointReport) -> dict[str, Any]:
    """The encoder's own config.json: its values, and what `InternVisionModel` and AutoModel need to know of it."""
    return {
        "torch_dtype": _torch_dtype(config),
        **config_value(config, "vision_config", {}),
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        # The families have different defaults, so it is always said.
        "num_dummy_heads": report.dummy_heads_stored,
        "auto_map": {
            "AutoConfig": "configuration_intern_vit.InternVisionConfig",
            "AutoModel": "modeling_intern_vit.InternVisionModel",
        },
    }


def decoder_part_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's own config.json: its values, with the `model_type` of its architecture.

    The published file says "llama" of a Qwen2; nested, nothing reads that, but AutoModel would.
    """
    from ..configuration_nvlm_d import decoder_config as resolve

    values = dict(decoder_config(config))
    resolved = resolve(values)
    return {
        "torch_dtype": _torch_dtype(config),
        **values,
        "architectures": resolved.architectures,
        "model_type": resolved.model_type,
    }


def projector_part_config(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The projector's own config.json: what `build_projector` and pixel shuffle need to know."""
    inner, folded = tensors["mlp1.1.weight"].info.shape
    return {
        "model_type": "nvlm_projector",
        "in_features": folded,
        "inner_features": inner,
        "out_features": tensors["mlp1.3.weight"].info.shape[0],
        "projector_bias": config_value(config, "projector_bias", config_layout(config).projector_bias),
        "downsample_ratio": config_value(config, "downsample_ratio", 0.5),
        "torch_dtype": _torch_dtype(config),
    }


def _torch_dtype(config: Mapping[str, Any]) -> str:
    return config_value(config, "dtype") or config_value(config, "torch_dtype", "bfloat16")
