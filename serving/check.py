"""`make serve-check`: the same conversations to vLLM's server and to this package; prompt ids, tokens and logprobs.

The server runs twice, with this package's plugin and without any. With the plugin everything must agree; without it
what differs is reported.
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from nvlm.serving.cases import Case, all_cases
from nvlm.serving.reference import Generated, Reference
from nvlm.serving.server import Answer, Server

TOLERANCE = 1e-3  # of a logprob, natural logarithm, float32
TOP = 5
TILES = 16  # as many as the largest request has, roughly: the server's length is made for it


@dataclass(frozen=True)
class Comparison:
    """One conversation, as vLLM answered it and as this package did.

    Args:
        case, plugin: which.
        status, error: HTTP status of the request, and the server's message where it was refused.
        failing: HTTP status of each request before it that vLLM alone refuses.
        retry: HTTP status of the same request once more, where it was refused.
        same_prompt: whether the prompt's ids are those of `chat()`.
        prompt_lengths: tokens of the prompt (vLLM, this package).
        same_tokens: whether all greedy tokens are those of `chat()`.
        steps: greedy tokens of this package.
        difference: largest difference of a logprob, up to where the tokens part; None where no step can be compared.
        difference_same_ids: the same where this package is given vLLM's ids; None where the tiles differ.
        same_tokens_same_ids: whether all tokens are equal then.
    """

    case: str
    plugin: bool
    status: int
    error: str
    failing: list[int]
    retry: int | None
    same_prompt: bool
    prompt_lengths: tuple[int, int]
    same_tokens: bool
    steps: int
    difference: float | None
    difference_same_ids: float | None
    same_tokens_same_ids: bool

    @property
    def agrees(self) -> bool:
        """Whether vLLM gave this package's answer."""
        is_close = self.difference is not None and self.difference <= TOLERANCE
        return self.status == 200 and self.same_prompt and self.same_tokens and is_close


def largest_difference(answer: Answer, generated: Generated) -> float | None:
    """The largest difference of a logprob over the steps before which all tokens are equal; None without a step."""
    differences: list[float] = []
    for step, (likeliest, own) in enumerate(zip(answer.logprobs, generated.logprobs, strict=False)):
        if answer.token_ids[:step] != generated.token_ids[:step]:
            break
        differences += [abs(logprob - own[token_id].item()) for token_id, logprob in likeliest.items()]
    return max(differences, default=None)


def compare(
    case: Case, server: Server, reference: Reference, own: Generated, *, plugin: bool, steps: int
) -> Comparison:
    """Ask the server, the requests that are to fail before the one that is to be answered."""
    failing = [server.ask(body, max_tokens=steps, top=TOP).status for body in case.failing]
    body = {"messages": case.messages}
    first = server.ask(body, max_tokens=steps, top=TOP)
    answer = first if first.status == 200 else server.ask(body, max_tokens=steps, top=TOP)
    same_ids: Generated | None = None
    if first.status == 200:
        same_ids = reference.follow(first.prompt_ids, case.pictures, max_tokens=steps)
    same_prompt = first.prompt_ids == own.prompt_ids
    return Comparison(
        case=case.name,
        plugin=plugin,
        status=first.status,
        error=first.error,
        failing=failing,
        retry=None if first.status == 200 else answer.status,
        same_prompt=same_prompt,
        prompt_lengths=(len(first.prompt_ids), len(own.prompt_ids)),
        same_tokens=first.token_ids == own.token_ids,
        steps=len(own.token_ids),
        difference=largest_difference(first, own) if same_prompt else None,
        difference_same_ids=None if same_ids is None else largest_difference(first, same_ids),
        same_tokens_same_ids=same_ids is not None and first.token_ids == same_ids.token_ids,
    )


def table(comparisons: Sequence[Comparison]) -> str:
    """A Markdown table, one line a conversation and server."""
    lines = [
        "| conversation | plugin | status | prompt ids | tokens | logprobs | the same ids in both: tokens, logprobs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in comparisons:
        status = str(row.status) if row.retry is None else f"{row.status}, again {row.retry}"
        status += f" (after {', '.join(map(str, row.failing))})" if row.failing else ""
        cells = [row.case.replace("|", r"\|"), "yes" if row.plugin else "no", status]
        if row.status != 200:
            cells += ["", "", "", ""]
        else:
            vllm, own = row.prompt_lengths
            cells.append("equal" if row.same_prompt else f"differ ({vllm} for {own})")
            cells.append("equal" if row.same_tokens else "differ")
            cells.append("" if row.difference is None else f"{row.difference:.1e}")
            same = "equal" if row.same_tokens_same_ids else "differ"
            has_same = row.difference_same_ids is not None
            cells.append(f"{same}, {row.difference_same_ids:.1e}" if has_same else "other tiles")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_report(out: Path, checkpoint: Path, comparisons: Sequence[Comparison], *, max_length: int) -> None:
    """Write all that was measured as JSON."""
    report = {
        "checkpoint": str(checkpoint),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "max_model_len": max_length,
        "tolerance": TOLERANCE,
        "comparisons": [{**asdict(row), "agrees": row.agrees} for row in comparisons],
    }
    out.write_text(json.dumps(report, indent=2) + "\n")


def run(checkpoint: Path, venv: Path, out: Path, *, steps: int, plugins: Sequence[bool]) -> list[Comparison]:
    """Compare on all conversations and write `out`, a JSON file; the servers' logs stand beside it.

    Raises:
        FileNotFoundError: vLLM is not installed in `venv`.
        RuntimeError: the server does not start.
    """
    if not (venv / "bin" / "python").exists():
        raise FileNotFoundError(f"{venv} has no bin/python: run serving/install_vllm.sh {venv} first.")
    reference = Reference(checkpoint)
    config = reference.model.config
    max_length = min(config.position_limit, 512 + TILES * (config.num_image_token + 8))
    cases = all_cases(config.tile_size, max_length=max_length)
    own = [reference.answer(case, max_tokens=steps) for case in cases]
    comparisons: list[Comparison] = []
    for plugin in plugins:
        name = "with" if plugin else "without"
        log = out.with_name(f"{out.stem}-{name}-plugin.log")
        most = max(len(case.pictures) for case in cases)
        with Server(venv, checkpoint, plugin=plugin, max_length=max_length, max_images=most, log=log) as server:
            for case, generated in zip(cases, own, strict=True):
                comparisons.append(compare(case, server, reference, generated, plugin=plugin, steps=steps))
                print(f"{name} plugin: {case.name}: {comparisons[-1].status}", file=sys.stderr, flush=True)
        write_report(out, checkpoint, comparisons, max_length=max_length)
    return comparisons


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m nvlm.serving.check`; 1 where an answer with the plugin is not this package's own."""
    parser = argparse.ArgumentParser(prog="nvlm.serving.check", description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="folder to serve; a random one is made by default")
    parser.add_argument("--venv", type=Path, default=Path(".cache/vllm-venv"), help="where vLLM is installed")
    parser.add_argument("--out", type=Path, default=Path(".cache/serve-check/report.json"), help="JSON file to write")
    parser.add_argument("--steps", type=int, default=8, help="new tokens an answer")
    parser.add_argument("--plugin-only", action="store_true", help="leave out the server without the plugin")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server is ended, too
    checkpoint = options.checkpoint
    if checkpoint is None:
        from nvlm.serving.random_checkpoint import build_random_checkpoint

        checkpoint = build_random_checkpoint(Path(".cache/serve-checkpoint"))
    plugins = [True] if options.plugin_only else [True, False]
    comparisons = run(checkpoint, options.venv, options.out, steps=options.steps, plugins=plugins)
    print(table(comparisons))
    served = [row for row in comparisons if row.plugin]
    wrong = [row for row in served if not row.agrees]
    print(
        f"\nwith the plugin {len(served) - len(wrong)} of {len(served)} answers are this package's own; {options.out}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
