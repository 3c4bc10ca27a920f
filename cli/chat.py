"""`nvlm chat`: one question, or a conversation with pictures, answers streamed (SPEC 7)."""

import argparse
import functools
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

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
    session = open_session(args)
    for path in args.image:
        session.add_image(path)
    if args.question is None:
        converse(session)
        return 0
    return 0 if print_answer(session, args.question) else 130


def open_session(args: argparse.Namespace) -> "ChatSession":
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

    return ChatSession(model, tokenizer, generation_config, read_image=read_image, system_message=args.system)


class ChatSession:
    """A conversation: its turns, the tiles of its pictures, and the pictures for the next message.

    Args:
        model: has `chat` (SPEC 7), with `system_message`.
        tokenizer: the checkpoint's.
        generation_config: what `chat` takes, without a streamer.
        read_image: file name -> (tiles, 3, side, side) tiles of the picture.
        system_message: None for the model's own.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        generation_config: dict[str, Any],
        *,
        read_image: Callable[[str], "torch.Tensor"],
        system_message: str | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.generation_config = generation_config
        self.read_image = read_image
        self.options: dict[str, Any] = {} if system_message is None else {"system_message": system_message}
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self.history: list[tuple[str, str]] = []
        self.turn_pictures: list[list[torch.Tensor]] = []  # of each turn of the history
        self.new_pictures: list[torch.Tensor] = []

    def undo(self) -> bool:
        """Forget the last turn and its pictures; False if there is none."""
        if not self.history:
            return False
        self.history, self.turn_pictures = self.history[:-1], self.turn_pictures[:-1]
        return True

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
            Exception: whatever `chat` raised; the conversation is then as before, the new pictures still new.
        """
        missing = len(self.new_pictures) - question.count("<image>")
        if missing < 0:
            raise ValueError(
                f"The message says <image> {question.count('<image>')} times for {len(self.new_pictures)} new pictures."
            )
        question = "<image>\n" * missing + question
        turn_pictures = [*self.turn_pictures, self.new_pictures]
        answering = _Answering(self, question, [picture for turn in turn_pictures for picture in turn])
        try:
            yield from answering.pieces()
        finally:
            history = answering.finish()
            if history is not None:
                self.history, self.turn_pictures, self.new_pictures = history, turn_pictures, []


class _Answering:
    """One call of `chat` in a thread of its own, read through a stream and stoppable."""

    def __init__(self, session: ChatSession, question: str, pictures: list["torch.Tensor"]) -> None:
        import torch
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        self.streamer = TextIteratorStreamer(session.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stopped = threading.Event()
        self.finished = threading.Event()
        self.history: list[tuple[str, str]] | None = None
        self.error: BaseException | None = None

        def is_stopped(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), self.stopped.is_set(), device=input_ids.device)

        options = {"streamer": self.streamer, "stopping_criteria": StoppingCriteriaList([is_stopped])}
        self.call = functools.partial(
            session.model.chat,
            session.tokenizer,
            torch.cat(pictures) if pictures else None,
            question,
            session.generation_config | options,
            history=session.history,
            return_history=True,
            num_patches_list=[len(picture) for picture in pictures] if pictures else None,
            **session.options,
        )
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            _, self.history = self.call()
        except BaseException as error:
            self.error = error
        finally:
            # Straight into the queue: the streamer's own end() decodes first, which may fail as well.
            self.streamer.text_queue.put(self.streamer.stop_signal)
            self.finished.set()

    def pieces(self) -> Iterator[str]:
        """Start the call; the answer as it comes."""
        self.thread.start()
        yield from self.streamer

    def finish(self) -> list[tuple[str, str]] | None:
        """Wait for the call, stopped after its present token.

        Returns:
            The history that it gave, None if Ctrl-C came before it began.

        Raises:
            SystemExit: on Ctrl-C while waiting. A second answer must not start beside a running one.
            Exception: what the call raised.
        """
        self.stopped.set()
        try:
            if self.thread.ident is not None:
                self.finished.wait()
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        if self.error is not None:
            raise self.error
        return self.history


def print_answer(session: ChatSession, question: str) -> bool:
    """Stream an answer to stdout; False if Ctrl-C stopped it."""
    pieces = session.ask(question)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        return False
    finally:
        pieces.close()
        print(flush=True)
    return True


def converse(session: ChatSession) -> None:
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
                session.reset()
            elif line == "/undo":
                print("forgotten" if session.undo() else "there is nothing to forget")
            elif command == "/image":
                session.add_image(argument.strip())
            elif command.startswith("/"):
                print(HELP)
            elif line:
                print_answer(session, line)
        except Exception as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
