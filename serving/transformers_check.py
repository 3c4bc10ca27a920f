"""The same conversations to `transformers serve` and to this package: `python -m nvlm.serving.transformers_check`.

That server tells neither ids nor logprobs, so compared are how many tokens the prompt and the answer have and the
answer's text, asked for at once and streamed. With `nvlm.serving.transformers_serve` all must agree. What the command
alone says of the checkpoint is reported.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nvlm.serving.cases import Case, all_cases
from nvlm.serving.process import ServerProcess, free_port
from nvlm.serving.reference import Generated, Reference

# `transformers serve` itself, whose script may not be installed.
ALONE = ("-c", "from transformers.cli.transformers import app; app()", "serve", "--trust-remote-code")
WITH_PACKAGE = ("-m", "nvlm.serving.transformers_serve")


class TransformersServer(ServerProcess):
    """`transformers serve` on the CPU in float32.

    Args:
        start: what Python runs: `ALONE` or `WITH_PACKAGE`.
        checkpoint: the folder to serve.
        packages: folder with fastapi, uvicorn and openai, None where they are installed.
        log: file for what the server prints.
    """

    def __init__(self, start: Sequence[str], checkpoint: Path, *, packages: Path | None, log: Path) -> None:
        port = free_port()
        self._model = str(checkpoint.resolve())
        options = ["--device=cpu", "--dtype=float32", "--host=127.0.0.1", f"--port={port}"]
        paths = [os.environ.get("PYTHONPATH", ""), "" if packages is None else str(packages.resolve())]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        super().__init__(
            "transformers serve", [sys.executable, *start, self._model, *options], environment, port=port, log=log
        )

    def ask(self, messages: list[dict[str, Any]], *, max_tokens: int, stream: bool) -> tuple[int, str]:
        """Send a greedy chat request: the HTTP status, and what came back or the error's message."""
        body = {"model": self._model, "messages": messages, "temperature": 0.0, "max_tokens": max_tokens}
        return self.chat({**body, "stream": stream})


@dataclass(frozen=True)
class TextComparison:
    """One conversation, as `transformers serve` answered it and as this package did.

    Args:
        case: which.
        status, error: HTTP status of the request, and the server's message where it was refused.
        prompt_lengths, new_lengths: tokens of the prompt and of the answer (server, this package).
        texts: the answer without special tokens (server, this package).
        streamed: the server's answer when it was streamed.
    """

    case: str
    status: int
    error: str
    prompt_lengths: tuple[int, int]
    new_lengths: tuple[int, int]
    texts: tuple[str, str]
    streamed: str

    @property
    def same_stream(self) -> bool:
        """Whether streaming gave the same text; a character whose last bytes did not come is left out there."""
        return self.streamed.rstrip("\ufffd") == self.texts[0].rstrip("\ufffd")

    @property
    def agrees(self) -> bool:
        """Whether the server gave this package's answer, both ways."""
        pairs = (self.prompt_lengths, self.new_lengths, self.texts)
        return self.status == 200 and all(server == own for server, own in pairs) and self.same_stream


def streamed_text(events: str) -> str:
    """The text of a streamed answer, or the error that ended it.

    Args:
        events: the answer's body, lines of `data: ` and JSON.
    """
    text = ""
    for line in events.splitlines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            text += event.get("error", "")
            text += "".join(choice["delta"].get("content") or "" for choice in event.get("choices", []))
    return text


def compare(case: Case, server: TransformersServer, own: Generated, text: str, *, steps: int) -> TextComparison:
    """Ask the server, at once and streamed.

    Args:
        own, text: this package's answer, and its text.
        steps: most new tokens.
    """
    status, content = server.ask(case.messages, max_tokens=steps, stream=False)
    is_answered = status == 200
    answer = json.loads(content) if is_answered else {}
    usage = answer.get("usage", {})
    return TextComparison(
        case=case.name,
        status=status,
        error="" if is_answered else content,
        prompt_lengths=(usage.get("prompt_tokens", 0), len(own.prompt_ids)),
        new_lengths=(usage.get("completion_tokens", 0), len(own.token_ids)),
        texts=(answer["choices"][0]["message"].get("content") or "" if is_answered else "", text),
        streamed=streamed_text(server.ask(case.messages, max_tokens=steps, stream=True)[1]) if is_answered else "",
    )


def table(comparisons: Sequence[TextComparison]) -> str:
    """A Markdown table, one line a conversation."""
    lines = ["| conversation | status | prompt's tokens | new tokens | text | streamed |", "| --- " * 6 + "|"]
    for row in comparisons:
        cells = [row.case.replace("|", r"\|"), str(row.status)]
        for server, own in (row.prompt_lengths, row.new_lengths):
            cells.append(str(own) if server == own else f"{server} for {own}")
        cells.append("equal" if row.texts[0] == row.texts[1] else "differ")
        cells.append("equal" if row.same_stream else "differ")
        lines.append("| " + " | ".join(cells if row.status == 200 else [*cells[:2], "", "", "", ""]) + " |")
    return "\n".join(lines)


def alone(checkpoint: Path, packages: Path | None, log: Path) -> str:
    """What `transformers serve --trust-remote-code` alone does with the checkpoint: the last line that it prints."""
    try:
        with TransformersServer(ALONE, checkpoint, packages=packages, log=log):
            return "it starts"
    except RuntimeError:
        return (log.read_text(errors="replace").strip() or "nothing").splitlines()[-1].strip()


def run(checkpoint: Path, packages: Path | None, out: Path, *, steps: int) -> list[TextComparison]:
    """Compare on all conversations and write `out`, a JSON file; the server's log stands beside it.

    Raises:
        RuntimeError: the server does not start.
    """
    reference = Reference(checkpoint)
    comparisons: list[TextComparison] = []
    cases = all_cases(reference.model.config.tile_size, max_length=1)  # its requests that are to fail are not sent
    with TransformersServer(WITH_PACKAGE, checkpoint, packages=packages, log=out.with_suffix(".log")) as server:
        for case in cases:
            own = reference.answer(case, max_tokens=steps)
            text = str(reference.tokenizer.decode(own.token_ids, skip_special_tokens=True))
            comparisons.append(compare(case, server, own, text, steps=steps))
            print(f"{case.name}: {comparisons[-1].status}", file=sys.stderr, flush=True)
    report = {
        "checkpoint": str(checkpoint),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "alone": alone(checkpoint, packages, out.with_name(f"{out.stem}-alone.log")),
        "comparisons": [{**asdict(row), "agrees": row.agrees} for row in comparisons],
    }
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"transformers serve --trust-remote-code alone: {report['alone']}\n")
    return comparisons


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m nvlm.serving.transformers_check`; 1 where an answer is not this package's own."""
    parser = argparse.ArgumentParser(prog="nvlm.serving.transformers_check", description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="folder to serve; a random one is made by default")
    parser.add_argument("--packages", type=Path, help="folder with fastapi, uvicorn and openai, if not installed")
    parser.add_argument("--out", type=Path, default=Path(".cache/serve-check/transformers.json"), help="JSON file")
    parser.add_argument("--steps", type=int, default=8, help="new tokens an answer")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server is ended, too
    checkpoint = options.checkpoint
    if checkpoint is None:
        from nvlm.serving.random_checkpoint import build_random_checkpoint

        checkpoint = build_random_checkpoint(Path(".cache/serve-checkpoint"))
    comparisons = run(checkpoint, options.packages, options.out, steps=options.steps)
    print(table(comparisons))
    right = sum(row.agrees for row in comparisons)
    print(f"\n{right} of {len(comparisons)} answers are this package's own; {options.out}")
    return 0 if right == len(comparisons) else 1


if __name__ == "__main__":
    sys.exit(main())
