"""Ten turns about one picture: time to the first token of a session, of stateless `chat()`, and of the least there is.

The least is the bare decoder reading the new question's tokens with as long a KV cache behind them: its own forward
pass, with random keys and values. A session's turn is asked in a fork, with one new token; then the turn is asked
with a whole answer, and the conversation goes on.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from benchmarks.models import Bench, random_tiles
from benchmarks.peers import decoder_of
from benchmarks.plots import plot_lines
from benchmarks.report import Figure, Section
from benchmarks.settings import Settings
from benchmarks.timing import seconds_of

TURNS = 10
STATELESS = {"tiny": range(1, TURNS + 1), "mid": (1, 5, 10)}  # turns at which chat() is asked too: it takes long
TILES = 3
ANSWER = 16  # tokens
QUESTIONS = [
    "What is written in the upper left corner of the page?",
    "Which of the shapes on the right is the largest one?",
    "How many words does the second line of the text have?",
    "Is there anything below the picture in the middle of it?",
    "What would change if the two columns were exchanged?",
]


@dataclass(frozen=True)
class FirstStep:
    """What the decoder does at the first step of a call.

    Args:
        seconds: that the call took.
        read: tokens that it reads.
        known: tokens in the KV cache before them.
    """

    seconds: float
    read: int
    known: int


def first_step(bench: Bench, ask: Callable[[], Any]) -> FirstStep:
    """Time a call that makes one token, and watch its first step."""
    steps: list[tuple[int, int]] = []

    def watch(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        past = kwargs.get("past_key_values")
        steps.append((kwargs["inputs_embeds"].shape[1], 0 if past is None else int(past.get_seq_length())))

    handle = decoder_of(bench.model).model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        seconds = seconds_of(ask)
    finally:
        handle.remove()
    return FirstStep(seconds, *steps[0])


def least_seconds(bench: Bench, *, tokens: int, known: int) -> float:
    """Seconds in which the bare decoder reads some tokens after others, to the logits of the last one."""
    decoder, config = decoder_of(bench.model), bench.model.config.llm_config
    head = config.hidden_size // config.num_attention_heads
    cache = DynamicCache()
    for layer in range(config.num_hidden_layers):
        keys, values = torch.randn(2, 1, config.num_key_value_heads, known, head).to(bench.dtype)
        cache.update(keys, values, layer)
    ids = torch.randint(0, config.vocab_size // 4, (1, tokens))
    with torch.no_grad():
        return seconds_of(partial(decoder, input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1))


def converse(bench: Bench, *, rounds: int) -> list[dict[str, Any]]:
    """All turns: seconds of each contender in each round, and what was read."""
    session = bench.model.start_chat(bench.tokenizer)
    pixels = random_tiles(bench, TILES)
    one, whole = {"max_new_tokens": 1, "do_sample": False}, {"max_new_tokens": ANSWER, "do_sample": False}
    turns = []
    for turn in range(1, TURNS + 1):
        question = QUESTIONS[turn % len(QUESTIONS)]
        given = {"pixel_values": pixels} if turn == 1 else {}  # the picture comes with the first question
        found: dict[str, Any] = {"turn": turn, "session": [], "least": [], "stateless": []}
        for _ in range(rounds if turn > 1 else 1):
            if turn == 1:
                bench.model.feature_cache.clear()
            step = first_step(bench, partial(session.fork().ask, question, generation_config=one, **given))
            found["session"].append(step.seconds)
            found["least"].append(least_seconds(bench, tokens=step.read, known=step.known))
            found |= {"read": step.read, "known": step.known}
        if turn in STATELESS[bench.name]:
            chat = partial(bench.model.chat, bench.tokenizer, pixels, question, one, history=session.history)
            step = first_step(bench, chat)
            found["stateless"].append(step.seconds)
            found["stateless_read"] = step.read
        session.ask(question, generation_config=whole, **given)
        turns.append(found)
    return turns


def run(settings: Settings) -> Section:
    figures, data, plots = [], dict[str, Any](), []
    for bench in settings.benches():
        if bench.name == "tiny":
            converse(bench, rounds=1)  # libraries and buffers that any first call needs
        turns = converse(bench, rounds=settings.rounds_or(5))
        data[bench.name] = turns
        medians = {
            name: {one["turn"]: statistics.median(one[name]) for one in turns if one[name]}
            for name in ("session", "least", "stateless")
        }
        last = {name: of_turns[TURNS] for name, of_turns in medians.items()}
        figures += [
            Figure(f"{bench.name}: turn {TURNS}, session", last["session"] * 1e3, "ms"),
            Figure(
                f"{bench.name}: turn {TURNS}, session / only reading the question",
                last["session"] / last["least"],
                at_most=1.3,
            ),
            Figure(f"{bench.name}: turn {TURNS}, stateless chat() / session", last["stateless"] / last["session"]),
        ]
        labels = {"session": "session", "least": "reading only the question", "stateless": "stateless chat()"}
        plots.append(
            plot_lines(
                settings.output / f"turns-{bench.name}.png",
                {
                    labels[name]: (list(line), [value * 1e3 for value in line.values()])
                    for name, line in medians.items()
                },
                title=f"Time to the first token, {bench.name} model, a picture of {TILES} tiles",
                x_label="turn",
                y_label="ms",
                log_y=True,
            )
        )
    title = f"time to the first token in each of {TURNS} turns about a picture of {TILES} tiles"
    return Section("turns", title, figures, data, plots)
