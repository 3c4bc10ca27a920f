"""What users' scripts pass to `from_pretrained`, in the words of today's transformers (SPEC 7)."""

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available, logging

logger = logging.get_logger(__name__)

# 4-bit weights in the encoder give nonsense (the InternVL documents say so), and the head decides every token.
UNQUANTISED_MODULES = ["vision_model", "mlp1", "lm_head"]


def translate_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """A copy of `from_pretrained`'s keyword arguments with the old ones translated.

    `use_flash_attn=True` asks for flash-attention 2 where it is installed and a GPU is there; `use_flash_attn=False`
    leaves the choice to transformers (SDPA). `load_in_8bit` and `load_in_4bit` become a `quantization_config` that
    leaves the encoder, the projector and the head alone.
    """
    translated = dict(arguments)
    if translated.pop("use_flash_attn", False) and "attn_implementation" not in translated:
        if is_flash_attn_2_available() and torch.cuda.is_available():
            translated["attn_implementation"] = "flash_attention_2"
        else:
            logger.warning_once("use_flash_attn=True, but flash-attention 2 or a GPU for it is missing: using SDPA.")
    bits = {name: translated.pop(name, False) for name in ("load_in_8bit", "load_in_4bit")}
    if any(bits.values()):
        if translated.get("quantization_config") is not None:
            raise ValueError(f"Pass either quantization_config or {[name for name in bits if bits[name]]}, not both.")
        logger.warning_once("load_in_8bit and load_in_4bit are old: pass quantization_config=BitsAndBytesConfig(...).")
        translated["quantization_config"] = BitsAndBytesConfig(**bits, llm_int8_skip_modules=UNQUANTISED_MODULES)
    return translated


def on_single_device(model: nn.Module) -> bool:
    """Whether all weights are at one place, none of them offloaded."""
    device_map = getattr(model, "hf_device_map", None) or {}
    return len(set(device_map.values())) <= 1 and all(p.device.type != "meta" for p in model.parameters())


def execution_device(module: nn.Module) -> torch.device:
    """The device a module computes on, also where accelerate keeps its weights elsewhere until they are needed."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))
