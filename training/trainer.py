"""Transformers' Trainer for a stage: frozen parts, the data in the stage's own order, small checkpoints, its logs."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainingArguments

from .collator import Collator
from .data import Item
from .optimizer import muon_of
from .parts import check_encoder_frozen, is_spread, part_of
from .records import Meter, RecordLog
from .stage import Stage

TRAINED_WEIGHTS = "model.safetensors"
SUFFICIENT = "trainer_state.json"  # the Trainer writes it last


def training_arguments(stage: Stage, *, world_size: int) -> TrainingArguments:
    """The Trainer's arguments of a stage.

    Raises:
        ValueError: the global batch is not made of whole micro-batches on all devices.
    """
    per_pass = stage.micro_batch_size * world_size
    if stage.batch_size % per_pass:
        raise ValueError(
            f"batch_size is {stage.batch_size}, expected a multiple of {per_pass}: micro_batch_size "
            f"{stage.micro_batch_size} on {world_size} devices."
        )
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in known)
    checkpointing: dict[str, Any] = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    if not stage.gradient_checkpointing:
        checkpointing = {}
    return TrainingArguments(
        output_dir=stage.output,
        max_steps=stage.steps,
        per_device_train_batch_size=stage.micro_batch_size,
        gradient_accumulation_steps=stage.batch_size // per_pass,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": stage.min_learning_rate},
        warmup_steps=stage.warmup_steps,
        weight_decay=stage.weight_decay,
        adam_beta1=stage.beta1,
        adam_beta2=stage.beta2,
        max_grad_norm=stage.clip,
        use_cpu=PartialState().device.type == "cpu",
        bf16=stage.precision == "bfloat16",
        **checkpointing,
        dataloader_num_workers=stage.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # every batch has pictures: see collator.py
        average_tokens_across_devices=True,
        logging_steps=stage.log_every,
        logging_nan_inf_filter=False,
        save_steps=stage.save_every,
        save_total_limit=stage.keep,
        seed=stage.seed,
        report_to=[],
    )


def last_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint of a run, None without any."""
    found = [folder for folder in output.glob("checkpoint-*") if (folder / SUFFICIENT).exists()]
    return max(found, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


class StageTrainer(Trainer):
    """The Trainer of a stage.

    Args:
        stage: the settings.
        model: with its frozen parts frozen (`parts.freeze`).
        args: `training_arguments(stage)`.
        data: the samples of the whole run.
        collator: makes batches of them.
    """

    def __init__(
        self, *, stage: Stage, model: PreTrainedModel, args: TrainingArguments, data: Dataset[Item], collator: Collator
    ) -> None:
        check_encoder_frozen(model)
        self._stage = stage
        self._trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.meter = Meter()
        super().__init__(model=model, args=args, train_dataset=data, data_collator=collator)
        self.add_callback(RecordLog(Path(stage.output), self.meter))
        self._encoder = part_of(self.accelerator.unwrap_model(model), "encoder")

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of a step and the number of tokens with loss in all of them; their counts are taken out."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self.meter.add(batch.pop("counts"))
        return batches, num_items

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a micro-batch. The encoder runs as in inference, though the Trainer has called `train()`.

        Without a KV cache, because transformers looks for packed samples only then.
        """
        self._encoder.eval()
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """The stage's optimizer.

        Raises:
            RuntimeError: Muon where accelerate spreads the matrices: it needs them whole.
        """
        if self._stage.optimizer == "muon" and self.optimizer is None:
            whole: Any = self.model
            if is_spread(whole) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise RuntimeError("optimizer is 'muon', expected 'adamw': FSDP and DeepSpeed spread the matrices.")
            self.optimizer = muon_of(
                whole,
                outside=[whole.get_input_embeddings(), whole.get_output_embeddings()],
                decayed=self.get_decay_parameter_names(whole),
                learning_rate=self._stage.learning_rate,
                weight_decay=self._stage.weight_decay,
                betas=(self._stage.beta1, self._stage.beta2),
            )
        return super().create_optimizer(*args)  # transformers 5 hands over the model

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate's cosine, over the stage's own number of steps."""
        return super().create_scheduler(self._stage.decay_steps or num_training_steps, optimizer)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None: the Trainer's estimate counts all parameters anew for each batch, and knows nothing of tiles."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with throughput and totals over all processes."""
        if "loss" in logs:
            taken = self.meter.take()
            everywhere = gather_object([dict(taken)]) if self.args.world_size > 1 else [dict(taken)]
            logs = {**logs, **self.meter.entry(sum(map(Counter, everywhere), Counter()))}
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        """The data is in its order already."""
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(data)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the trained weights alone: the others are where the stage started from."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self._stage.output)
        folder.mkdir(parents=True, exist_ok=True)
        model: Any = self.model
        weights = model.state_dict() if state_dict is None else state_dict
        trained = {name: weights[name].detach().cpu().contiguous() for name in sorted(self._trained)}
        save_file(trained, folder / TRAINED_WEIGHTS, metadata={"format": "pt"})
        (folder / "stage.json").write_text(json.dumps(self._stage.to_dict(), indent=2) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Read the trained weights back.

        Raises:
            ValueError: the checkpoint holds others than the stage trains.
        """
        file = Path(resume_from_checkpoint) / TRAINED_WEIGHTS
        if self.is_fsdp_enabled and not file.exists():  # sharded: in accelerate's own files
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        weights = load_file(file)
        if set(weights) != self._trained:
            differing = sorted(set(weights) ^ self._trained)
            raise ValueError(
                f"{file} does not hold what the stage trains: {len(differing)} names differ, such as {differing[:3]}. "
                "Resume with the stage that wrote it."
            )
        model = self.model if model is None else model
        model.load_state_dict(weights, strict=False)
