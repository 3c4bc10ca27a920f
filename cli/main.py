"""The entry point `nvlm`: picks the subcommand and turns its errors into one line."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from . import chat, compose, extract, inspect, memory, overlay, repack, split

COMMANDS = (chat, split, memory, inspect, overlay, repack, extract, compose)


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands; each sets `run`, the function that carries it out."""
    parser = argparse.ArgumentParser(prog="nvlm", description="NVLM 1.0: chat, and what is done with checkpoints.")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    for subparser in subparsers.choices.values():
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a command.

    argparse takes an optional positional for absent as soon as an option follows: `chat CHECKPOINT --image FILE
    QUESTION` leaves the question over.
    """
    parser = build_parser()
    args, left = parser.parse_known_args(argv)
    if len(left) == 1 and not left[0].startswith("-") and getattr(args, "question", "") is None:
        args.question = left.pop()
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run `nvlm`.

    Returns:
        The exit code: 0 done, 1 the checkpoint has problems, 2 an error (one line on stderr), 130 interrupted.
    """
    args = parse(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has left, as in `nvlm split | head`: stdout must not be flushed again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        else:
            message = " ".join(str(error).split()) or type(error).__name__
            print(f"nvlm: error: {message} (--debug shows where)", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
