"""`nvlm split`: which part of the model goes on which GPU, before any weight is loaded (SPEC 10)."""

import argparse
import json
import re
from collections.abc import Mapping
from typing import Any

from ..device_map import (
    HEADROOM,
    LAYERS,
    Device,
    memory_per_device,
    named_config,
    parse_memory,
    published_config,
    split_model,
)


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "split",
        help="plan the spread over GPUs",
        description="Show which part of the model goes on which GPU, for the GPUs of this machine or those you name.",
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="number of GPUs (default: those of this machine)")
    parser.add_argument(
        "--memory",
        action="append",
        default=[],
        metavar="SIZE[,SIZE...]",
        help="memory of every GPU (24GB), or of each (24GB,48GB); may be repeated",
    )
    parser.add_argument("--cpu", metavar="SIZE", help="host memory for what the GPUs have no room for")
    parser.add_argument("--policy", choices=("balanced", "documents"), default="balanced")
    parser.add_argument("--checkpoint", metavar="DIR", help="split this checkpoint's model (default: the 72B)")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the loaded weights, int8 and int4 included")
    parser.add_argument("--json", action="store_true", help="print the device map as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out `nvlm split`."""
    config = named_config(args.checkpoint) if args.checkpoint else published_config()
    max_memory = parse_gpu_memory(args.memory, num_gpus=args.gpus)
    memory: dict[Device, int | str] = {**max_memory, **({"cpu": args.cpu} if args.cpu else {})}
    device_map = split_model(
        world_size=args.gpus, max_memory=memory or None, config=config, policy=args.policy, dtype=args.dtype
    )
    if args.json:
        print(json.dumps(device_map, indent=2))
        return 0
    used = memory_per_device(device_map, config, args.dtype)
    print(format_table(device_map, used, max_memory))
    return 0


def parse_gpu_memory(options: list[str], *, num_gpus: int | None) -> dict[Device, int]:
    """{GPU's index: bytes} of the --memory options; a single size holds for each of --gpus.

    Raises:
        ValueError: a size is none, or there is another number of sizes than of GPUs.
    """
    sizes = [parse_memory(size) for option in options for size in option.split(",")]
    if len(sizes) == 1:
        sizes *= 1 if num_gpus is None else num_gpus
    if sizes and num_gpus not in (None, len(sizes)):
        raise ValueError(f"--memory gives {len(sizes)} sizes for {num_gpus} GPUs: expected one, or one for each.")
    return dict(enumerate(sizes))


def format_table(device_map: Mapping[str, Device], used: Mapping[Device, int], memory: Mapping[Device, int]) -> str:
    """One line a device: its weights in GB, the share of its memory where that is known, its parts."""
    order = sorted(used, key=lambda device: (isinstance(device, str), device))
    lines = [f"{'device':<8}{'weights':>10}  {'of memory':>10}  parts"]
    for device in order:
        share = f"{used[device] / memory[device]:.0%}" if memory.get(device) else "-"
        parts = describe_parts([part for part, its_device in device_map.items() if its_device == device])
        lines.append(f"{device!s:<8}{used[device] / 1e9:>7.2f} GB  {share:>10}  {parts}")
    lines.append(f"{'total':<8}{sum(used.values()) / 1e9:>7.2f} GB")
    crowded = [str(gpu) for gpu in order if memory.get(gpu) and used[gpu] > (1 - HEADROOM) * memory[gpu]]
    if crowded:
        lines.append(f"Less than {HEADROOM:.0%} of the memory is left free on: {', '.join(crowded)}.")
    return "\n".join(lines)


def describe_parts(parts: list[str]) -> str:
    """Modules' names in short, runs of layers as ranges: "vision_model, layers 0-2, lm_head"."""
    described: list[str] = []
    first = last = -2
    for part in parts:
        match = re.fullmatch(rf"{re.escape(LAYERS)}\.(\d+)", part)
        if match is None:
            described.append(part.rpartition(".")[2])
            continue
        layer = int(match[1])
        if layer == last + 1:
            last = layer
            described[-1] = f"layers {first}-{last}"
        else:
            first = last = layer
            described.append(f"layer {layer}")
    return ", ".join(described)
