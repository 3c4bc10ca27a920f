"""`nvlm inspect`: whether a downloaded checkpoint is whole, from its headers alone (SPEC 2)."""

import argparse
import json
from typing import Any

from .checkpoint_report import CheckpointReport, inspect_checkpoint


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "inspect",
        help="check a checkpoint without loading it",
        description="Compare a checkpoint's tensors with its config.json. Exit code 0: sound, 1: problems.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder with config.json and *.safetensors")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out `nvlm inspect`."""
    report = inspect_checkpoint(args.checkpoint)
    print(json.dumps(report.to_dict(), indent=2) if args.json else format_report(report))
    return 0 if report.ok else 1


def format_report(report: CheckpointReport) -> str:
    """The report for people: what is there, then problems and notes, then the verdict."""
    dtypes = ", ".join(f"{dtype} {num_bytes / 1e9:.2f} GB" for dtype, num_bytes in sorted(report.dtype_bytes.items()))
    stored = report.dummy_heads_stored
    lines = [
        report.folder,
        f"  shards        {report.num_shards}",
        f"  tensors       {report.num_tensors}",
        f"  bytes         {report.total_bytes} ({dtypes or 'none'})",
        f"  dummy heads   {'unclear' if stored is None else stored} stored, {report.dummy_heads_config} in config.json",
        *(f"  problem: {problem}" for problem in report.problems),
        *(f"  note: {note}" for note in report.notes),
        f"{len(report.problems)} problems" if report.problems else "sound",
    ]
    return "\n".join(lines)
