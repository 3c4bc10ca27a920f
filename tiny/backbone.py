"""How both backbones are pre-trained: Muon with AdamW, one cycle of the learning rate, and a log."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from nvlm.training.optimizer import muon_of


@dataclass(frozen=True)
class Run:
    """How a backbone is trained."""

    steps: int
    learning_rate: float
    weight_decay: float
    batch_size: int = 32
    warmup_steps: int = 200


def fit(
    folder: Path,
    model: nn.Module,
    run: Run,
    *,
    outside: list[nn.Module],
    losses: Callable[[], dict[str, torch.Tensor]],
    measure: Callable[[], dict[str, float]],
    measure_every: int,
) -> None:
    """Train a model and write `log.jsonl`.

    Args:
        folder: where the log goes; made if it is not there.
        model: all its parameters are trained.
        run: for how long, how fast.
        outside: the layers whose matrices AdamW trains, the embeddings and the output layers.
        losses: the losses of the next batch, by name; their sum is minimised.
        measure: scores on held-out data, by name, for the log.
        measure_every: steps between two measurements.
    """
    optimizer = muon_of(
        model,
        outside=outside,
        decayed=[name for name, value in model.named_parameters() if value.ndim > 1],
        learning_rate=run.learning_rate,
        weight_decay=run.weight_decay,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        run.learning_rate,
        total_steps=run.steps,
        pct_start=min(0.5, run.warmup_steps / run.steps),
        cycle_momentum=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with (folder / "log.jsonl").open("w") as log:
        for step in tqdm(range(1, run.steps + 1), desc=folder.name, mininterval=5):
            parts = losses()
            optimizer.zero_grad()
            torch.stack(list(parts.values())).sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 0 or step == run.steps:
                line: dict[str, float] = {"step": step, "seconds": round(time.perf_counter() - start, 1)}
                line |= {name: round(loss.item(), 4) for name, loss in parts.items()}
                if step % measure_every == 0 or step == run.steps:
                    line |= {name: round(share, 4) for name, share in measure().items()}
                log.write(json.dumps(line) + "\n")
                log.flush()
