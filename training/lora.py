"""LoRA through PEFT: adapters inside the model's own modules, and merged into plain weights on saving."""

import re

import torch
from torch import nn

from .parts import PARTS
from .stage import LoRA, Stage

_ADAPTER = "default"  # PEFT's name for an only adapter
_WEIGHT = ".base_layer.weight"


def add_adapters(model: nn.Module, stage: Stage) -> None:
    """Put the stage's adapters beside the decoder's linear layers (the head left out), and freeze what they adapt.

    Raises:
        ValueError: the stage has none.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if stage.lora is None:
        raise ValueError("The stage has lora=None, expected adapters to add.")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapted = [PARTS["decoder"], *([PARTS["projector"]] if stage.lora.projector else [])]
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[0] in adapted and not name.endswith("lm_head")
    ]
    config = LoraConfig(
        r=stage.lora.rank,
        lora_alpha=stage.lora.alpha,  # type: ignore[arg-type]  # PEFT calls it an int and takes floats
        lora_dropout=stage.lora.dropout,
        target_modules="|".join(map(re.escape, linear)),
    )
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        is_kept = name in trained and name.split(".")[0] not in adapted
        parameter.requires_grad_(is_kept or "lora_" in name)


def merge_adapters(weights: dict[str, torch.Tensor], lora: LoRA) -> dict[str, torch.Tensor]:
    """A state dict with adapters as one without: W + alpha / rank * B A, in float32 and back to W's dtype."""
    merged = {}
    for name, weight in weights.items():
        if "lora_" in name:
            continue
        if name.endswith(_WEIGHT):
            layer = name.removesuffix(_WEIGHT)
            a, b = (weights[f"{layer}.lora_{side}.{_ADAPTER}.weight"].float() for side in "AB")
            weight = (weight.float() + lora.alpha / lora.rank * (b @ a)).to(weight.dtype)
        merged[name.replace(".base_layer.", ".")] = weight
    return merged
