"""Two hundred turns with random pictures, forks and undos: memory within the budgets, answers as stateless.

    python -m benchmarks --only soak

Several sessions of the tiny model share one feature cache with a small budget. Each step is drawn: a question about a
new picture, one about those seen, a fork in the place of another session, an undo. Every tenth answer is compared with
`chat()` on the same history. Where a session's conversation gets too long, a new one takes its place.
"""

import gc
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from PIL import Image

from benchmarks.models import Bench
from benchmarks.plots import plot_lines
from benchmarks.report import Figure, Section
from benchmarks.settings import Settings
from nvlm import load_images
from nvlm.feature_cache import FeatureCache

TURNS = 200
SESSIONS = 4
LONGEST = 12  # turns of a conversation
CHECK_EVERY = 10
ANSWER = 12  # tokens
SETTLED = 50  # turns after which memory must not grow any more
QUESTIONS = ("What is written here?", "How many shapes are there?", "Which colour do you see?", "What is 12 + 30?")
OPTIONS = {"max_new_tokens": ANSWER, "do_sample": False}


@dataclass
class Conversation:
    """A session, and its pictures as `chat()` takes them.

    Args:
        session: the session.
        pictures: all of them, in order.
        counts: how many each turn brought.
    """

    session: Any
    pictures: list[Image.Image] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def fork(self) -> "Conversation":
        return Conversation(self.session.fork(), list(self.pictures), list(self.counts))

    def undo(self) -> None:
        self.session.undo()
        del self.pictures[len(self.pictures) - self.counts.pop() :]

    def ask(self, question: str, pictures: Sequence[Image.Image]) -> str:
        self.pictures += pictures
        self.counts.append(len(pictures))
        return self.session.ask(question, images=list(pictures) or None, generation_config=OPTIONS)


def draw_picture(chance: random.Random) -> Image.Image:
    """Noise in blocks, of a random shape."""
    width, height = chance.choice([(112, 112), (224, 112), (112, 336), (224, 224)])
    blocks = torch.randint(0, 256, (height // 28, width // 28, 3), generator=_generator(chance), dtype=torch.uint8)
    return Image.fromarray(blocks.numpy()).resize((width, height), Image.Resampling.NEAREST)


def _generator(chance: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(chance.getrandbits(32))


def stateless_answer(bench: Bench, conversation: Conversation, question: str, pictures: Sequence[Image.Image]) -> str:
    """What `chat()` answers to the question that comes next in a conversation."""
    history = conversation.session.history
    everything = [*conversation.pictures, *pictures]
    if not everything:
        return bench.model.chat(bench.tokenizer, None, question, OPTIONS, history=history)
    config = bench.model.config
    pixels, counts = load_images(everything, config.tile_size, config.max_dynamic_patch, use_thumbnail=True)
    return bench.model.chat(
        bench.tokenizer, pixels.to(bench.dtype), question, OPTIONS, history=history, num_patches_list=counts
    )


def soak(bench: Bench, *, turns: int, seed: int = 0) -> dict[str, Any]:
    """Run it: memory after every turn, what was done, and how many of the compared answers were the same."""
    chance = random.Random(seed)
    budget = 20 * bench.model.config.num_image_token * bench.model.config.shuffled_width * bench.dtype.itemsize
    cache = FeatureCache(max_bytes=budget)

    def start() -> Conversation:
        return Conversation(bench.model.start_chat(bench.tokenizer, feature_cache=cache))

    conversations = [start() for _ in range(SESSIONS)]
    process = psutil.Process()
    done = dict.fromkeys(("pictures", "text", "forks", "undos", "restarts"), 0)
    resident, session_bytes, cache_bytes = [], [], []
    compared = same = 0
    for turn in range(turns):
        place = chance.randrange(SESSIONS)
        conversation = conversations[place]
        if len(conversation.counts) >= LONGEST:
            conversation = conversations[place] = start()
            done["restarts"] += 1
        elif conversation.counts and chance.random() < 0.2:
            conversation.undo()
            done["undos"] += 1
        elif chance.random() < 0.2:
            conversations[chance.randrange(SESSIONS)] = conversation.fork()
            done["forks"] += 1
        pictures = [draw_picture(chance)] if chance.random() < 0.5 else []
        question = ("<image>\n" if pictures else "") + chance.choice(QUESTIONS)
        done["pictures" if pictures else "text"] += 1
        expected = stateless_answer(bench, conversation, question, pictures) if turn % CHECK_EVERY == 0 else None
        answer = conversation.ask(question, pictures)
        if expected is not None:
            compared += 1
            same += answer == expected
        gc.collect()
        resident.append(process.memory_info().rss)
        session_bytes.append(sum(one.session.nbytes for one in conversations))
        cache_bytes.append(cache.nbytes)
    return {
        "done": done,
        "resident_bytes": resident,
        "session_bytes": session_bytes,
        "cache_bytes": cache_bytes,
        "budget_bytes": budget,
        "compared": compared,
        "same": same,
    }


def run(settings: Settings) -> Section:
    bench = settings.bench("tiny")
    found = soak(bench, turns=TURNS)
    settled = found["resident_bytes"][SETTLED:]
    plot = plot_lines(
        settings.output / "soak.png",
        {
            name: (range(TURNS), [value / 1e6 for value in found[key]])
            for name, key in (("sessions", "session_bytes"), ("feature cache", "cache_bytes"))
        }
        | {
            "process, since the start": (
                range(TURNS),
                [max(0.0, (value - found["resident_bytes"][0]) / 1e6) for value in found["resident_bytes"]],
            )
        },
        title=f"{TURNS} turns of {SESSIONS} sessions, tiny model",
        x_label="turn",
        y_label="MB",
    )
    done = ", ".join(f"{count} {name}" for name, count in found["done"].items())
    return Section(
        "soak",
        f"{TURNS} turns of {SESSIONS} sessions with random pictures, forks and undos: {done}",
        [
            Figure("answers equal to stateless chat()", found["same"] / found["compared"], at_least=1.0),
            Figure(
                "feature cache at most / its budget", max(found["cache_bytes"]) / found["budget_bytes"], at_most=1.0
            ),
            Figure(
                f"process: growth after turn {SETTLED}, of its size there", max(settled) / settled[0] - 1, at_most=0.05
            ),
        ],
        found,
        [plot],
    )
