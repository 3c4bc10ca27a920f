"""`nvlm chat`: one question, or a conversation with pictures, answers streamed (SPEC 7)."""

import argparse
import sys
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..session import ChatSession

HELP = """\
/image FILE   add a picture to the next message
/undo         forget the last question and its answer
/reset        forget the whole conversation
/exit         leave (as does Ctrl-D); Ctrl-C stops an answer, twice leaves"""


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "chat",
        help="ask a model, with pictures",
        description="Answer QUESTION, or hold a conversation if there is none.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of the checkpoint")
    parser.add_argument("question", metavar="QUESTION", nargs="?", help="answer this and leave")
    parser.add_argument("--image", metavar="FILE", action="append", default=[], help="a picture; may be repeated")
    parser.add_argument("--max-tiles", type=int, default=6, metavar="N", help="most tiles a picture is cut into (6)")
    parser.add_argument("--system", metavar="TEXT", help="system message (default: the model's)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=1024, metavar="N", help="longest answer, in tokens (1024)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    parser.add_argument(
        "--device-map",
        default="auto",
        metavar="MAP",
        help="auto (balanced over the GPUs, or the CPU), cpu, cuda:0, ...",
    )
    parser.add_argument("--dtype", default="auto", help="auto (the config's), bfloat16, float16 or float32")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out `nvlm chat`."""
    if args.max_new_tokens < 1 or args.max_tiles < 1:
        raise ValueError("--max-new-tokens and --max-tiles must be at least 1.")
    if args.temperature < 0:
        raise ValueError(f"--temperature is {args.temperature}, expected 0 (greedy) or more.")
    talk = open_session(args)
    for path in args.image:
        talk.add_image(path)
    if args.question is None:
        converse(talk)
        return 0
    return 0 if print_answer(talk, args.question) else 130


def open_session(args: argparse.Namespace) -> "Talk":
    """Load the model and the tokenizer of a checkpoint."""
    from transformers import AutoTokenizer

    from ..device_map import split_model
    from ..modeling_nvlm_d import NVLM_D_Model
    from ..preprocessing import load_image

    device_map = args.device_map
    if device_map == "auto":
        device_map = split_model(args.checkpoint, dtype=args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = NVLM_D_Model.from_pretrained(args.checkpoint, dtype=args.dtype, device_map=device_map).eval()
    generation_config: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0}
    if args.temperature > 0:
        generation_config["temperature"] = args.temperature

    def read_image(path: str) -> "torch.Tensor":
        config = model.config
        max_num = args.max_tiles if config.dynamic_image_size else 1
        return load_image(path, config.tile_size, max_num, use_thumbnail=config.use_thumbnail)

    session = model.start_chat(tokenizer, system=args.system, generation_config=generation_config)
    return Talk(session, read_image=read_image)


class Talk:
    """A conversation at a terminal: its session, and the pictures for the next message.

    Args:
        session: what `model.start_chat` gave.
        read_image: file name -> (tiles, 3, side, side) tiles of the picture.
    """

    def __init__(self, session: "ChatSession", *, read_image: Callable[[str], "torch.Tensor"]) -> None:
        self.session = session
        self.read_image = read_image
        self.new_pictures: list[torch.Tensor] = []

    def reset(self) -> None:
        """Forget the conversation."""
        self.new_pictures = []
        while self.session.undo():
            pass

    def add_image(self, path: str) -> None:
        """Put a picture into the next message.

        Raises:
            ValueError, OSError: the file is no picture, or cannot be read.
        """
        self.new_pictures.append(self.read_image(path))

    def ask(self, question: str) -> Generator[str, None, None]:
        """Answer, piece by piece. Closing the iterator early stops the answer; what was said stays in the history.

        Each new picture stands before the question, unless the question says `<image>` where.

        Raises:
            ValueError: the question has more `<image>` than there are new pictures.
            Exception: whatever the session raised; the conversation is then as before, the new pictures still new.
        """
        import torch

        pictures = self.new_pictures
        missing = len(pictures) - question.count("<image>")
        if missing < 0:
            raise ValueError(
                f"The message says <image> {question.count('<image>')} times for {len(pictures)} new pictures."
            )
        pieces = self.session.stream(
            "<image>\n" * missing + question,
            pixel_values=torch.cat(pictures) if pictures else None,
            num_patches_list=[len(picture) for picture in pictures] if pictures else None,
        )
        turns = len(self.session.history)
        try:
            yield from pieces
        finally:
            pieces.close()
            if len(self.session.history) > turns:
                self.new_pictures = []


def print_answer(talk: Talk, question: str) -> bool:
    """Stream an answer to stdout; False if Ctrl-C stopped it.

    Raises:
        SystemExit: on Ctrl-C again, before the model has stopped: a second answer must not start beside a running one.
    """
    pieces = talk.ask(question)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if talk.session.is_answering:
            raise SystemExit(130) from None
        return False
    finally:
        pieces.close()
        print(flush=True)
    return True


def converse(talk: Talk) -> None:
    """Read messages and commands from stdin until it ends."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(HELP)
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D leaves")
            continue
        command, _, argument = line.partition(" ")
        try:
            if line == "/exit":
                return
            elif line == "/reset":
                talk.reset()
            elif line == "/undo":
                print("forgotten" if talk.session.undo() else "there is nothing to forget")
            elif command == "/image":
                talk.add_image(argument.strip())
            elif command.startswith("/"):
                print(HELP)
            elif line:
                print_answer(talk, line)
        except Exception as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
