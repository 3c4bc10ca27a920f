"""Training a stage from beginning to end: `train(stage)`, and the command `python -m nvlm.training`."""

import argparse
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModel, AutoTokenizer, set_seed
from transformers.integrations import TensorBoardCallback

import nvlm  # noqa: F401 (registers the model's classes)

from .collator import Collator
from .data import StageData
from .lora import add_adapters, merge_adapters
from .output import write_checkpoint
from .parts import PartSize, checksum, freeze, is_spread, sizes
from .stage import Stage
from .trainer import StageTrainer, last_checkpoint, training_arguments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a run did.

    Args:
        output: folder of the trained checkpoint.
        steps: optimizer steps, those before a resume counted.
        log: the entries of `log.jsonl`: step, loss, learning_rate, grad_norm, samples_per_second and so on.
        totals: samples, tokens, answer_tokens, tiles, `source/NAME` samples of each source, `skipped/REASON`.
        sizes: of each part, the parameters trained and all.
        seconds: wall time since the start or the resume.
    """

    output: Path
    steps: int
    log: list[dict[str, Any]]
    totals: dict[str, int]
    sizes: dict[str, PartSize]
    seconds: float

    @property
    def losses(self) -> list[float]:
        """The logged losses, nats a token."""
        return [entry["loss"] for entry in self.log]

    @property
    def skipped(self) -> dict[str, int]:
        """How many samples were left out, by reason."""
        prefix = "skipped/"
        return {name.removeprefix(prefix): n for name, n in self.totals.items() if name.startswith(prefix)}


def train(stage: Stage, resume: bool = False) -> Result:
    """Train a stage, and write its checkpoint and logs into `stage.output`.

    Runs on one device, or in every process that `accelerate launch` starts.

    Args:
        stage: the settings.
        resume: go on from the newest checkpoint in `stage.output`, or begin where there is none.

    Raises:
        FileExistsError: without `resume`, there is an earlier run in `stage.output`.
        FileNotFoundError, ValueError: the model, the data or the settings do not fit; the message says how.
        RuntimeError: several GPUs but one process; or the encoder changed.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())  # else it finds one process where there are several
    output = Path(stage.output)
    checkpoint = last_checkpoint(output) if resume else None
    if not resume and (output / "log.jsonl").exists():
        raise FileExistsError(f"{output} holds an earlier run: pass --resume (resume=True) or choose another output.")
    state.wait_for_everyone()  # before anybody writes there
    # The arguments come before the model: they tell transformers to load it in shards, where accelerate asks for it.
    args = training_arguments(stage, world_size=state.num_processes)
    if args.world_size != state.num_processes:
        raise RuntimeError(f"The Trainer sees {args.world_size} processes, accelerate {state.num_processes}.")
    if args.n_gpu > 1:
        raise RuntimeError(f"One process sees {args.n_gpu} GPUs, expected one each: start with `accelerate launch`.")
    start = Path(stage.model)
    if not (start / "config.json").exists():
        raise FileNotFoundError(f"model is {stage.model!r}, expected a folder with config.json, weights and tokenizer.")
    tokenizer = AutoTokenizer.from_pretrained(start)
    # The dummy heads stay: the output has the layout of what it began with.
    model = AutoModel.from_pretrained(start, dtype=torch.float32, drop_dummy_heads=False)
    if stage.tile_tag is not None:
        model.config.tile_tag = stage.tile_tag
    freeze(model, stage)
    dtype = getattr(torch, stage.precision)
    before = None
    if state.is_main_process and not is_spread(model):
        before = checksum(model.state_dict(), part="encoder", dtype=dtype)
    set_seed(stage.seed)  # adapters begin with random weights
    if stage.lora is not None:
        add_adapters(model, stage)
    counts = sizes(model)
    trainer = StageTrainer(
        stage=stage,
        model=model,
        args=args,
        data=StageData(stage, model.config, tokenizer),
        collator=Collator(
            pad_token_id=tokenizer.pad_token_id,
            image_token_id=model.config.image_token_id,
            num_image_token=model.config.num_image_token,
            tile_size=model.config.tile_size,
            row_length=stage.sequence_length if stage.packing else None,
        ),
    )
    if state.is_main_process:
        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(output / "tensorboard"))))
        output.mkdir(parents=True, exist_ok=True)
        (output / "stage.yaml").write_text(yaml.safe_dump(stage.to_dict(), sort_keys=False))
        for part, size in counts.items():
            logger.info("%s: %s of %s parameters trained", part, f"{size.trainable:,}", f"{size.total:,}")
    metrics = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint)).metrics
    _finish(trainer, stage, start=start, tokenizer=tokenizer, encoder=before)
    return Result(
        output=output,
        steps=trainer.state.global_step,
        log=[entry for entry in trainer.state.log_history if "loss" in entry],
        totals=dict(trainer.meter.totals),
        sizes=counts,
        seconds=metrics["train_runtime"],
    )


def _finish(trainer: StageTrainer, stage: Stage, *, start: Path, tokenizer: Any, encoder: int | None) -> None:
    """Gather the weights, merge adapters, check that the encoder is what it was, and write the checkpoint.

    Raises:
        RuntimeError: the encoder's checksum is not `encoder`; None is not compared.
    """
    accelerator = trainer.accelerator
    weights = accelerator.get_state_dict(trainer.model_wrapped)
    if accelerator.is_main_process:
        if stage.lora is not None:
            weights = merge_adapters(weights, stage.lora)
        dtype = getattr(torch, stage.precision)
        weights = {name: weight.detach().to("cpu", dtype) for name, weight in weights.items()}
        after = checksum(weights, part="encoder", dtype=dtype)
        if encoder not in (None, after):
            raise RuntimeError(f"The encoder's weights changed: checksum {after:08x}, before {encoder:08x}.")
        model = accelerator.unwrap_model(trainer.model)
        write_checkpoint(Path(stage.output), start=start, model=model, weights=weights, tokenizer=tokenizer)
    accelerator.wait_for_everyone()


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """`key=value` texts as fields of a stage, values read as YAML (`lora={rank: 8}`).

    Raises:
        ValueError: a text without `=`.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise ValueError(f"--set got {setting!r}, expected key=value such as steps=100.")
        values[key] = yaml.safe_load(value)
    return values


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m nvlm.training", description="Train one stage of NVLM.")
    parser.add_argument("stage", help="YAML file of the stage")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings in its place"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the output folder")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if int(os.environ.get("RANK", "0")) > 0:
        logging.disable(logging.INFO)
    try:
        stage = Stage.from_yaml(options.stage, **parse_settings(options.set))
        result = train(stage, resume=options.resume)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        parser.exit(2, f"{error}\n")
    logger.info("%d steps, loss %.4f, skipped %s: %s", result.steps, result.losses[-1], result.skipped, result.output)
