"""`nvlm memory`: how much memory a call will take at its peak on each device, before any weight is loaded."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..device_map import Device, named_config, published_config
from .memory_estimate import ACTIVATION_BYTES, KV_CACHES, Call, Moment, estimate, peaks

GIB = 2**30

# Names of common cards' sizes, in GB of 10^9 bytes. Their real memory is about 7 % more (24 GB cards have 24 GiB): that
# is left to the driver, to libraries' workspaces and to the allocator.
CARDS = (16, 24, 32, 40, 48, 80, 96, 141, 192)


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "memory",
        help="predict a call's peak memory",
        description="Predict how much memory a chat call takes at its peak on each device, from config.json alone.",
    )
    parser.add_argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT", help="a checkpoint's folder or name (default: the 72B)"
    )
    parser.add_argument("--tiles", type=int, default=7, metavar="N", help="tiles of a prompt (default 7)")
    parser.add_argument(
        "--tokens",
        type=int,
        default=4096,
        metavar="N",
        help="tokens of a prompt, its pictures' included (default 4096)",
    )
    parser.add_argument("--new-tokens", type=int, default=256, metavar="N", help="tokens of an answer (default 256)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="prompts at once (default 1)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="devices of a balanced split (default 1)")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(ACTIVATION_BYTES), help="of the loaded weights")
    parser.add_argument("--kv-cache", default="dynamic", choices=KV_CACHES, help="what the KV cache is kept in")
    parser.add_argument("--prefill-chunk", type=int, metavar="N", help="most tokens that the decoder reads at once")
    parser.add_argument("--json", action="store_true", help="print all moments of all devices as JSON, in bytes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out `nvlm memory`."""
    config = named_config(args.checkpoint) if args.checkpoint else published_config()
    call = Call(
        tiles=args.tiles,
        tokens=args.tokens,
        new_tokens=args.new_tokens,
        batch=args.batch,
        kv_cache=args.kv_cache,
        prefill_chunk=args.prefill_chunk,
    )
    moments = estimate(config, call, dtype=args.dtype, gpus=args.gpus)
    if args.json:
        print(json.dumps({str(device): [asdict(one) for one in its] for device, its in moments.items()}, indent=2))
        return 0
    print(format_table(peaks(moments)))
    return 0


def format_table(at_peak: Mapping[Device, Moment]) -> str:
    """One line a device, in GiB: what it holds at its peak, and when that is; then which cards are large enough."""
    parts = ("weights", "pictures", "kv_cache", "activations", "logits", "total")
    lines = ["device" + "".join(f"{name:>13}" for name in parts) + "  at"]
    for device, moment in at_peak.items():
        figures = "".join(f"{getattr(moment, name) / GIB:>13.2f}" for name in parts)
        lines.append(f"{device!s:<6}{figures}  {moment.name}")
    most = max(moment.total for moment in at_peak.values())
    lines.append(f"GiB. The fullest device needs {most / GIB:.2f} GiB ({most / 1e9:.1f} GB). {format_cards(most)}")
    return "\n".join(lines)


def format_cards(most: int) -> str:
    """Which sizes of cards hold so many bytes."""
    fitting = [card for card in CARDS if most <= card * 1e9]
    if not fitting:
        return f"No card of up to {CARDS[-1]} GB is large enough: use more of them, or --dtype int8 or int4."
    too_small = [card for card in CARDS if card not in fitting]
    refused = f"too small: {', '.join(map(str, too_small))}; " if too_small else ""
    return f"Cards by GB: {refused}large enough: {', '.join(map(str, fitting))}."
