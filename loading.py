"""What users' scripts pass to `from_pretrained`, in the words of today's transformers (SPEC 7)."""

import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.utils import is_flash_attn_2_available, logging

logger = logging.get_logger(__name__)

# 4-bit weights in the encoder give nonsense (the InternVL documents say so), and the head decides every token.
UNQUANTISED_MODULES = ["vision_model", "mlp1", "lm_head"]


def bitsandbytes_8bit(*, unquantised: Sequence[str] = UNQUANTISED_MODULES) -> BitsAndBytesConfig:
    """A `quantization_config` for `from_pretrained`: the decoder's layers in bitsandbytes' 8 bits.

    Args:
        unquantised: modules that are left alone, by their whole names or the ends of these.
    """
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(unquantised))


def bitsandbytes_4bit(
    *, compute_dtype: torch.dtype = torch.bfloat16, unquantised: Sequence[str] = UNQUANTISED_MODULES
) -> BitsAndBytesConfig:
    """A `quantization_config` for `from_pretrained`: the decoder's layers in bitsandbytes' 4 bits (NF4, blocks of 64).

    Args:
        compute_dtype: what the layers multiply in.
        unquantised: as in `bitsandbytes_8bit`.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(unquantised),
    )


def torchao_int8(*, unquantised: Sequence[str] = UNQUANTISED_MODULES) -> TorchAoConfig:
    """A `quantization_config` for `from_pretrained`: the decoder's layers as torchao's int8, a scale a row.

    Args:
        unquantised: as in `bitsandbytes_8bit`.

    Raises:
        ImportError: torchao is missing.
    """
    return _torchao_config(_torchao().Int8WeightOnlyConfig(set_inductor_config=False), unquantised)


def torchao_int4(*, group_size: int = 64, unquantised: Sequence[str] = UNQUANTISED_MODULES) -> TorchAoConfig:
    """A `quantization_config` for `from_pretrained`: the decoder's layers as torchao's int4, a scale a group.

    With an NVIDIA GPU two weights share a byte, and the model must be loaded in bfloat16; elsewhere each weight takes a
    byte of its own, so that answers are those of 4 bits and memory is that of 8.

    Args:
        group_size: neighbouring weights of a row that share a scale: 32, 64, 128 or 256, a divisor of the decoder's
            `hidden_size` and `intermediate_size`.
        unquantised: as in `bitsandbytes_8bit`.

    Raises:
        ImportError: torchao is missing.
        ValueError: no such group size.
    """
    if group_size not in (32, 64, 128, 256):
        raise ValueError(f"group_size is {group_size!r}, expected 32, 64, 128 or 256.")
    torchao = _torchao()
    if torch.cuda.is_available():
        kind = torchao.Int4WeightOnlyConfig(
            group_size=group_size, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    else:
        kind = torchao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]  # not in torch's stubs
            granularity=torchao.PerGroup(group_size),
        )
    return _torchao_config(kind, unquantised)


def _torchao() -> ModuleType:
    """`torchao.quantization`. A `try` keeps transformers from asking every user of remote code to install torchao."""
    try:
        import torchao.quantization
    except ImportError as error:
        raise ImportError("torchao_int8 and torchao_int4 need torchao: pip install torchao") from error
    return torchao.quantization


def _torchao_config(kind: Any, unquantised: Sequence[str]) -> TorchAoConfig:
    # transformers 4 looks for the names anywhere in "language_model.lm_head.weight"; 5 matches patterns at its start.
    patterns = [rf"(.*\.)?{re.escape(name)}" for name in unquantised]
    return TorchAoConfig(kind, modules_to_not_convert=[*unquantised, *patterns])


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
        logger.warning_once("load_in_8bit and load_in_4bit are old: pass quantization_config=bitsandbytes_8bit().")
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
