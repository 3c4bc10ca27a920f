"""One stage of training as a file of settings: what is trained, on which data, how long and how fast (SPEC 8)."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvlm.tile_tags import TAG_KINDS

from .checks import check_keys, is_number, is_whole, read_yaml, require

TRAINABLE = ("projector", "decoder")
FORMATS = ("pretrain", "chat")
OPTIMIZERS = ("adamw", "muon")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters in the place of full training.

    Args:
        rank: inner width of the adapters.
        alpha: their outputs are scaled by alpha / rank.
        dropout: of the adapters' inputs, 0 to below 1.
        projector: whether the projector gets adapters too; else it is trained in full where `trained` has it.

    Raises:
        ValueError: a value is out of range; the message names the field and the value.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    projector: bool = False

    def __post_init__(self) -> None:
        require(is_whole(self.rank, low=1), "lora.rank", self.rank, "a whole number of at least 1")
        require(is_number(self.alpha) and self.alpha > 0, "lora.alpha", self.alpha, "a number above 0")
        in_range = is_number(self.dropout) and 0 <= self.dropout < 1
        require(in_range, "lora.dropout", self.dropout, "a number from 0 to below 1")
        require(isinstance(self.projector, bool), "lora.projector", self.projector, "true or false")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The settings of one stage; paths are relative to the folder that the command runs in.

    Args:
        model: folder of the checkpoint to start from.
        output: folder that the trained checkpoint, its logs and `checkpoint-STEP` folders are written to.
        blend: YAML file of the data (see `blend.Blend`).
        trained: parts that are trained, out of `TRAINABLE`; the encoder is always frozen.
        format: "chat" (ChatML, loss on assistant turns) or "pretrain" (no roles, loss on the answer) (SPEC 6).
        learning_rate: the highest one, after the warmup.
        min_learning_rate: the last one, at the end of the cosine.
        decay_steps: steps, warmup counted, after which the cosine is at its end; None for `steps`. More than `steps`
            leaves the end of the decline to a later stage.
        warmup_steps: steps of linear warmup from 0.
        optimizer: "adamw", or "muon" for Muon on the matrices inside the network and AdamW on everything else; with
            the same learning rates.
        weight_decay: the optimizer's, on everything but biases and norms.
        clip: largest norm of all gradients together; 0 for no limit.
        beta1, beta2: AdamW's.
        batch_size: samples of an optimizer step, over all devices.
        micro_batch_size: samples of a forward pass on a device; accumulation follows from it and the device count.
        steps: optimizer steps.
        sequence_length: most tokens of a sample, and with `packing` of a row.
        max_tiles: most tiles of a picture, the thumbnail not counted; None for the config's `max_dynamic_patch`.
        tile_tag: kind of tile tags, written into the output's config too; None for the config's.
        precision: "float32", or "bfloat16" for bfloat16 arithmetic on float32 weights (frozen parts in bfloat16).
        group_by_length: put samples of similar length into a micro-batch.
        packing: put the samples of a micro-batch behind one another into as few rows as they fit in, unpadded.
        strict: stop at the first bad sample, naming file and line; else it is counted and the next one is taken.
        seed: of the order of the data, and of dropout.
        save_every: steps between checkpoints to resume from.
        keep: how many of these are kept.
        lora: adapters for the decoder, merged into the weights in the end; None for full training.
        gradient_checkpointing: compute the decoder's activations a second time instead of keeping them.
        workers: processes that read data on each device; 0 reads in the training process.
        log_every: steps between lines of the log.

    Raises:
        ValueError: a value is out of range; the message names the field, the value and what was expected.
    """

    model: str
    output: str
    blend: str
    steps: int
    trained: tuple[str, ...] = TRAINABLE
    format: str = "chat"
    optimizer: str = "adamw"
    learning_rate: float = 2e-6
    min_learning_rate: float = 0.0
    decay_steps: int | None = None
    warmup_steps: int = 0
    weight_decay: float = 0.1
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    batch_size: int = 128
    micro_batch_size: int = 1
    sequence_length: int = 3200
    max_tiles: int | None = None
    tile_tag: str | None = None
    precision: str = "bfloat16"
    group_by_length: bool = False
    packing: bool = False
    strict: bool = False
    seed: int = 0
    save_every: int = 1000
    keep: int = 2
    lora: LoRA | None = None
    gradient_checkpointing: bool = False
    workers: int = 0
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("model", "output", "blend"):
            value = getattr(self, name)
            object.__setattr__(self, name, str(value) if isinstance(value, Path) else value)
            require(isinstance(value, (str, Path)) and str(value) != "", name, value, "a path")
        if isinstance(self.trained, list):
            object.__setattr__(self, "trained", tuple(self.trained))
        if isinstance(self.lora, dict):
            fields = [field.name for field in dataclasses.fields(LoRA)]
            object.__setattr__(self, "lora", LoRA(**check_keys(self.lora, where="lora", known=fields)))
        self._check_names()
        self._check_numbers()

    def _check_names(self) -> None:
        parts = f"at least one of {list(TRAINABLE)} (the encoder is always frozen), each once"
        require(isinstance(self.trained, tuple) and len(self.trained) > 0, "trained", self.trained, parts)
        fits = all(part in TRAINABLE for part in self.trained) and len(set(self.trained)) == len(self.trained)
        require(fits, "trained", self.trained, parts)
        require(self.format in FORMATS, "format", self.format, f"one of {list(FORMATS)}")
        require(self.optimizer in OPTIMIZERS, "optimizer", self.optimizer, f"one of {list(OPTIMIZERS)}")
        require(self.precision in PRECISIONS, "precision", self.precision, f"one of {list(PRECISIONS)}")
        kinds = f"one of {list(TAG_KINDS)}, or null for the config's"
        require(self.tile_tag is None or self.tile_tag in TAG_KINDS, "tile_tag", self.tile_tag, kinds)
        for name in ("group_by_length", "packing", "strict", "gradient_checkpointing"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        adapters = "null, or a mapping with rank, alpha, dropout and projector"
        require(self.lora is None or isinstance(self.lora, LoRA), "lora", self.lora, adapters)
        if self.lora is not None:
            require("decoder" in self.trained, "trained", self.trained, "'decoder' in it, as lora puts adapters there")
            needs = self.lora.projector <= ("projector" in self.trained)
            require(needs, "trained", self.trained, "'projector' in it, as lora.projector is true")

    def _check_numbers(self) -> None:
        lows = {"steps": 1, "warmup_steps": 0, "batch_size": 1, "micro_batch_size": 1, "sequence_length": 2}
        lows |= {"seed": 0, "save_every": 1, "keep": 1, "workers": 0, "log_every": 1}
        for name, low in lows.items():
            value = getattr(self, name)
            require(is_whole(value, low=low), name, value, f"a whole number of at least {low}")
        for name in ("learning_rate", "min_learning_rate", "weight_decay", "clip", "beta1", "beta2"):
            value = getattr(self, name)
            require(is_number(value) and value >= 0, name, value, "a number of at least 0")
        for name in ("beta1", "beta2"):
            require(getattr(self, name) < 1, name, getattr(self, name), "a number from 0 to below 1")
        peak = self.learning_rate
        require(peak > 0, "learning_rate", peak, "a number above 0")
        require(self.min_learning_rate <= peak, "min_learning_rate", self.min_learning_rate, f"at most {peak}")
        require(self.warmup_steps <= self.steps, "warmup_steps", self.warmup_steps, f"at most steps ({self.steps})")
        fits = self.decay_steps is None or is_whole(self.decay_steps, low=max(self.warmup_steps, 1))
        expected = f"a whole number of at least warmup_steps ({self.warmup_steps}) and 1, or null for steps"
        require(fits, "decay_steps", self.decay_steps, expected)
        tiles = "a whole number of at least 1, or null for the config's"
        require(self.max_tiles is None or is_whole(self.max_tiles, low=1), "max_tiles", self.max_tiles, tiles)
        divides = self.batch_size % self.micro_batch_size == 0
        expected = f"a multiple of micro_batch_size ({self.micro_batch_size})"
        require(divides, "batch_size", self.batch_size, expected)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "Stage":
        """The stage that a YAML file describes, with some fields given anew.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: no YAML, unknown or missing fields, or a value out of range; the message names the file.
        """
        fields = dataclasses.fields(cls)
        needed = [field.name for field in fields if field.default is dataclasses.MISSING]
        content = read_yaml(path)
        values = check_keys({} if content is None else content, where=str(path), known=[field.name for field in fields])
        merged = _numbers({**values, **overrides})
        check_keys(merged, where=str(path), known=[field.name for field in fields], needed=needed)
        try:
            return cls(**merged)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """All fields as YAML can write them."""
        return {**dataclasses.asdict(self), "trained": list(self.trained)}


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    """Values with YAML's `1e-4` as the number that people mean: YAML 1.1 reads it as text."""
    floats = {field.name for field in dataclasses.fields(Stage) if field.type is float}
    return {name: _number(value) if name in floats else value for name, value in values.items()}


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
