"""The parts of a model: which are trained, how large they are, and whether a frozen one stayed as it was."""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .stage import Stage

PARTS = {"encoder": "vision_model", "projector": "mlp1", "decoder": "language_model"}


@dataclass(frozen=True)
class PartSize:
    """How many parameters a part has, and how many of them are trained."""

    trainable: int
    total: int


def part_of(model: nn.Module, part: str) -> nn.Module:
    """The module of a part, by its name in `PARTS`."""
    return model.get_submodule(PARTS[part])


def freeze(model: nn.Module, stage: Stage) -> None:
    """Leave gradients to the stage's trained parts alone; with "bfloat16" the other parts are stored as such."""
    model.requires_grad_(False)
    for part in PARTS:
        if part in stage.trained:
            part_of(model, part).requires_grad_(True)
        elif stage.precision == "bfloat16":
            part_of(model, part).to(torch.bfloat16)


def sizes(model: nn.Module) -> dict[str, PartSize]:
    """Each part's parameters."""
    return {part: _size(part_of(model, part).parameters()) for part in PARTS}


def _size(parameters: Iterable[nn.Parameter]) -> PartSize:
    # DeepSpeed leaves empty tensors where it has spread a parameter, and says in `ds_numel` what it was.
    counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in parameters]
    return PartSize(trainable=sum(n for n, trained in counts if trained), total=sum(n for n, _ in counts))


def check_encoder_frozen(model: nn.Module) -> None:
    """Check that no parameter of the encoder is trained.

    Raises:
        RuntimeError: some are; the message names the first.
    """
    for name, parameter in part_of(model, "encoder").named_parameters():
        if parameter.requires_grad:
            raise RuntimeError(f"The encoder's {name} has requires_grad=True, expected a frozen encoder.")


def is_spread(model: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 spread the weights over the processes while loading, so that none has them all."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def checksum(tensors: Mapping[str, torch.Tensor], *, part: str, dtype: torch.dtype) -> int:
    """A checksum of all bits of a part's tensors in a state dict, in `dtype`."""
    value = 0
    for name in sorted(tensors):
        if name.startswith(PARTS[part] + "."):
            tensor = tensors[name].detach().to("cpu", dtype).contiguous().reshape(-1)  # [n]
            value = zlib.crc32(tensor.view(torch.uint8).numpy().data, value)
    return value
