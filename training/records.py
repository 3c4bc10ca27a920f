"""The logs of a run: `log.jsonl`, `loss.png` and TensorBoard, beside what the terminal shows."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .plot import plot_loss

_TOTAL = "total/"


class RecordLog(TrainerCallback):
    """Writes a line of `log.jsonl` and redraws `loss.png` whenever the Trainer logs.

    Args:
        folder: where the files are.
        meter: is started when training begins.
    """

    def __init__(self, folder: Path, meter: "Meter") -> None:
        self._meter = meter
        self._file = folder / "log.jsonl"
        self._plot = folder / "loss.png"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the lines up to the step that is resumed at; those after it come again."""
        self._meter.start(state.log_history)
        if state.is_world_process_zero:
            lines = [entry for entry in state.log_history if "loss" in entry]
            self._file.write_text("".join(json.dumps(entry) + "\n" for entry in lines))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log before each checkpoint and at the end: a resumed run cannot go on with half an average."""
        if control.should_save or control.should_training_stop:
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        entry = state.log_history[-1]
        if state.is_world_process_zero and "loss" in entry:
            with self._file.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            plot_loss(self._plot, state.log_history)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            plot_loss(self._plot, state.log_history)


class Meter:
    """What a run has read, and how fast: totals that go on where a resumed run's log ends."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self._since: Counter[str] = Counter()
        self._clock = time.perf_counter()

    def start(self, log: list[dict[str, Any]]) -> None:
        """Begin to measure, and go on from the totals of a log's last entry."""
        for entry in [entry for entry in log if "loss" in entry][-1:]:
            self.totals = Counter({k.removeprefix(_TOTAL): n for k, n in entry.items() if k.startswith(_TOTAL)})
        self._clock = time.perf_counter()

    def add(self, counts: dict[str, int]) -> None:
        """Count what a batch of this process is made of."""
        self._since.update(counts)

    def take(self) -> Counter[str]:
        """The counts since the last call."""
        taken, self._since = self._since, Counter()
        return taken

    def entry(self, counts: Counter[str]) -> dict[str, float]:
        """What the log says of the counts, over all processes, since the last entry."""
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self.totals.update(counts)
        places = max(1, counts["places"])
        return {
            "samples_per_second": counts["samples"] / seconds,
            "tokens_per_second": counts["tokens"] / seconds,
            "padding": 1 - min(1.0, counts["tokens"] / places),
            **{_TOTAL + name: count for name, count in sorted(self.totals.items())},
        }
