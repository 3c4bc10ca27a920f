"""All benchmarks, one after the other: `make bench`, or `python -m benchmarks [--only NAME ...]`.

Writes results.json, results.md with the table, and plots. Run it on a machine that does nothing else.
"""

import argparse
import logging
import os
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from benchmarks.models import REPOSITORY
from benchmarks.report import Section, environment, table, write
from benchmarks.settings import MODELS, Settings

# Name and module: what measures a process's memory comes first, while this one holds no model.
BENCHMARKS = {
    "machine": "machine",
    "loading": "loading",
    "memory": "memory",
    "prefill_memory": "prefill_memory",
    "preprocessing": "preprocessing",
    "encoder_layer": "encoder_layer",
    "soak": "soak",
    "encoder": "encoder",
    "prefill": "prefill",
    "decode": "decode",
    "choices": "choices",
    "turns": "turns",
    "batch": "batch",
    "tiles": "tiles",
    "session_memory": "session_memory",
    "vllm": "vllm_cpu",
}


def run_one(name: str, settings: Settings) -> Section:
    """A benchmark's findings; one that fails says so in its place and does not stop the others."""
    run: Callable[[Settings], Section] = import_module(f"benchmarks.{BENCHMARKS[name]}").run
    try:
        return run(settings)
    except Exception as error:
        traceback.print_exc()
        return Section(name, "", note=f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--rounds", type=int, metavar="N", help="timed runs of each contender (default: by benchmark)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the mid-size model")
    parser.add_argument("--output", type=Path, default=REPOSITORY / ".cache" / "bench", metavar="FOLDER")
    args = parser.parse_args()
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, expected at least 1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    settings = Settings(args.output, args.rounds, getattr(torch, args.dtype), tuple(args.models))
    machine = environment()
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    sections, seconds = [], {}
    for name in args.only or BENCHMARKS:
        start = time.perf_counter()
        section = run_one(name, settings)
        seconds[name] = time.perf_counter() - start
        sections.append(section)
        print(f"\n{name}: {section.title} ({seconds[name]:.0f} s)\n{table([section])}", flush=True)
        write(settings.output, sections, machine=machine, seconds=seconds)
    print(f"\n{sum(seconds.values()) / 60:.1f} minutes; {settings.output / 'results.md'}")


if __name__ == "__main__":
    main()
