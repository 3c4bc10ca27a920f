"""Which part of the model goes on which GPU: `split_model()` of the documents, balanced (SPEC 10).

Sizes follow from the config by way of the checkpoint's tensors, so any model of the family is split by the same code.
torch is imported only to ask for the GPUs of this machine.
"""

import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint import config_value, decoder_config, expected_tensors, read_json

Device = int | str
DeviceMap = dict[str, Device]

# Share of a GPU that stays free of weights: activations of a prompt with seven tiles and the KV cache of some thousand
# tokens (0.33 MB a token over all GPUs of the 72B) need about 1 GB of each. More would not leave room for 21.1 GB of
# weights on a 24 GB card.
HEADROOM = 0.1

LAYERS = "language_model.model.layers"
# In the order in which they claim room. The rotary embedding is computed where the token embeddings are.
FIRST_PARTS = ("vision_model", "mlp1", "language_model.model.embed_tokens", "language_model.model.rotary_emb")
LAST_PARTS = ("language_model.lm_head", "language_model.model.norm")

# Bytes of a weight in a matrix of the decoder's layers, and of any other: bitsandbytes quantises only the former
# (see loading.py), in 4 bits with a float32 scale for each 64 weights.
WEIGHT_BYTES = {
    "float32": (4, 4),
    "bfloat16": (2, 2),
    "float16": (2, 2),
    "int8": (1, 2),
    "int4": (0.5 + 4 / 64, 2),
}

MEMORY_UNITS = {prefix + "b": 1000**n for n, prefix in enumerate(("", "k", "m", "g", "t"))} | {
    prefix + "ib": 1024**n for n, prefix in enumerate(("k", "m", "g", "t"), start=1)
}

_NVLM_D_72B = {
    "model_type": "NVLM_D",
    "llm_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
}
_INTERNVL_34B = {
    "model_type": "internvl_chat",
    "llm_config": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 7168,
        "intermediate_size": 20480,
        "num_hidden_layers": 60,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "vocab_size": 64007,
    },
}
# Names that the documents call `split_model` with, or load.
KNOWN_MODELS = {
    "NVLM-D-72B": _NVLM_D_72B,
    "InternVL-Chat-V1-2": _INTERNVL_34B,
    "InternVL-Chat-V1-2-Plus": _INTERNVL_34B,
}


def split_model(
    model_name: str | os.PathLike[str] | None = None,
    *,
    world_size: int | None = None,
    max_memory: Mapping[Device, int | str] | None = None,
    config: Any = None,
    policy: str = "balanced",
    dtype: Any = "bfloat16",
    headroom: float = HEADROOM,
) -> DeviceMap:
    """A `device_map` for `from_pretrained` that spreads the model over GPUs (SPEC 7 and 10).

    The balanced policy puts encoder, projector and embeddings on the first GPU, norm and head on the last, and the
    layers between, contiguous and in order, such that the fullest GPU is as empty as can be, relative to its memory.
    Where a GPU is too small for its ends, they move on to the next. What no GPU has room for goes to the host's memory
    ("cpu"), then to "disk" (which `from_pretrained` wants an `offload_folder` for).

    Args:
        model_name: a checkpoint's folder, or one of the documents' names, such as "InternVL-Chat-V1-2". By default the
            model is that of the config.json beside this file, or else the published 72B.
        world_size: number of GPUs; by default those of `max_memory`, or else those of this machine. With 0 all goes
            to the host.
        max_memory: {GPU's index, "cpu" or "disk": its memory, as bytes or like "24GB" or "24GiB"}. By default what is
            free now, and the host's memory where the GPUs do not suffice. GPUs that this machine does not have count
            as equal.
        config: the model's config as an object or a dict, instead of `model_name`.
        policy: "balanced", or "documents" for the map of the model card's listing, whatever the GPUs' memory.
        dtype: of the loaded weights: a torch dtype, or "float32", "bfloat16", "float16", "int8" or "int4" (the latter
            two as bitsandbytes stores them), or "auto" for the config's own.
        headroom: share of every GPU's memory to keep free of weights.

    Returns:
        {module's name: GPU's index, "cpu" or "disk"} for every module of the model, and for none that it lacks.

    Raises:
        ValueError: the model does not fit, with the figures; or an argument is none of the above.
    """
    if policy not in ("balanced", "documents"):
        raise ValueError(f"policy is {policy!r}, expected 'balanced' or 'documents'.")
    if not 0 <= headroom < 1:
        raise ValueError(f"headroom is {headroom!r}, expected a share of at least 0 and below 1.")
    if model_name is not None and config is not None:
        raise ValueError("Both a model name and a config were given, expected one of them.")
    if config is None:
        config = published_config() if model_name is None else named_config(model_name)
    sizes = module_sizes(config, dtype)
    gpus, spill, is_measured = _find_memory(world_size, max_memory)
    if policy == "documents":
        return _documents_map(sizes, list(gpus))
    # GPUs of unknown memory count as equal, each large enough.
    room = {gpu: sum(sizes.values()) if size is None else (1 - headroom) * size for gpu, size in gpus.items()}
    device_map = _balanced_map(sizes, room, spill)
    if device_map is None:
        raise ValueError(_does_not_fit(sizes, room, spill, dtype=_dtype_name(dtype, config), headroom=headroom))
    spilled = [part for part, device in device_map.items() if device in spill]
    if is_measured and gpus and spilled:
        warnings.warn(
            f"The GPUs' free memory does not suffice: {len(spilled)} modules "
            f"({_gigabytes(sum(sizes[part] for part in spilled))}) stay in the host's memory, which is slow. "
            "Free GPU memory, load in 8 or 4 bits, or use more GPUs.",
            stacklevel=2,
        )
    return device_map


def published_config() -> Any:
    """The config.json beside this file, or else the published 72B's sizes."""
    beside = Path(__file__).with_name("config.json")
    return read_json(beside) if beside.is_file() else _NVLM_D_72B


def named_config(model_name: str | os.PathLike[str]) -> Any:
    """The config of a checkpoint's folder, or of a model that the documents name.

    Raises:
        ValueError: there is no such folder and no such name, or its config.json is broken.
    """
    folder = Path(model_name)
    if (folder / "config.json").is_file():
        return read_json(folder / "config.json")
    if folder.name not in KNOWN_MODELS:
        raise ValueError(
            f"Unknown model {os.fspath(model_name)!r}: expected a folder with a config.json, or one of "
            f"{sorted(KNOWN_MODELS)}. For another model pass `config=`."
        )
    return KNOWN_MODELS[folder.name]


def module_sizes(config: Any = None, dtype: Any = "bfloat16") -> dict[str, int]:
    """Bytes of the weights of every module that a device map places, as stored in the checkpoint.

    Args:
        config: the model's config as an object or a dict; None for that of `published_config`.
        dtype: as for `split_model`.

    Returns:
        {module's name: bytes}; 0 for what has no weights of its own (the rotary embedding, a tied head).

    Raises:
        ValueError: an unknown dtype, or a config that describes no such model.
    """
    if config is None:
        config = published_config()
    in_matrix, elsewhere = WEIGHT_BYTES[_dtype_name(dtype, config)]
    tensors = expected_tensors(config)
    num_layers = config_value(decoder_config(config), "num_hidden_layers")
    sizes = dict.fromkeys((*FIRST_PARTS, *(f"{LAYERS}.{i}" for i in range(num_layers)), *reversed(LAST_PARTS)), 0.0)
    for name, shape in tensors.items():
        part = _covering(name, sizes)
        is_layer_matrix = len(shape) == 2 and part.startswith(LAYERS)
        sizes[part] += math.prod(shape) * (in_matrix if is_layer_matrix else elsewhere)
    return {part: math.ceil(size) for part, size in sizes.items()}


def memory_per_device(
    device_map: Mapping[str, Device], config: Any = None, dtype: Any = "bfloat16"
) -> dict[Device, int]:
    """Bytes of weights that a device map puts on each device, in the map's order of devices.

    Raises:
        ValueError: as `module_sizes`, or the map leaves a module out.
    """
    used: dict[Device, int] = dict.fromkeys(device_map.values(), 0)
    for part, size in module_sizes(config, dtype).items():
        used[device_map[_covering(part, device_map)]] += size
    return used


def parse_memory(size: int | float | str) -> int:
    """Bytes of a size such as 24000000000, "24GB", "24 GiB" or "512MB".

    Raises:
        ValueError: it is none, or negative.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]+)", size.strip().lower()) if isinstance(size, str) else None
    if match and match[2] in MEMORY_UNITS:
        return int(float(match[1]) * MEMORY_UNITS[match[2]])
    if isinstance(size, (str, bool)) or not 0 <= size < math.inf:
        raise ValueError(f"Memory size {size!r} not understood: expected a number of bytes, or like '24GB' or '24GiB'.")
    return int(size)


def _covering(name: str, modules: Mapping[str, Any]) -> str:
    """The innermost of `modules` that a dotted name lies in; "" stands for the whole model."""
    module = name
    while module not in modules:
        if not module:
            raise ValueError(f"The device map leaves out {name!r}.")
        module = module.rpartition(".")[0]
    return module


def _dtype_name(dtype: Any, config: Any) -> str:
    if dtype == "auto":
        dtype = config_value(config, "dtype") or config_value(config, "torch_dtype") or "bfloat16"
    name = str(dtype).removeprefix("torch.")
    if name not in WEIGHT_BYTES:
        raise ValueError(f"dtype is {dtype!r}, expected 'auto', a torch dtype or one of {sorted(WEIGHT_BYTES)}.")
    return name


def _find_memory(
    world_size: int | None, max_memory: Mapping[Device, int | str] | None
) -> tuple[dict[Device, int | None], dict[Device, float], bool]:
    """The memory to fill.

    Returns:
        {GPU's index: bytes, None if unknown}, {"cpu" and "disk": bytes} where these may be used, and whether the
        latter is our own doing rather than the caller's.
    """
    if world_size is not None and (not isinstance(world_size, int) or world_size < 0):
        raise ValueError(f"world_size is {world_size!r}, expected a number of GPUs >= 0.")
    given = {device: parse_memory(size) for device, size in (max_memory or {}).items()}
    for device in given:
        if device not in ("cpu", "disk") and (not isinstance(device, int) or device < 0):
            raise ValueError(f"max_memory has key {device!r}, expected a GPU's index, 'cpu' or 'disk'.")
    spill: dict[Device, float] = {name: given[name] for name in ("cpu", "disk") if name in given}
    gpus: dict[Device, int | None] = {gpu: given[gpu] for gpu in sorted(key for key in given if isinstance(key, int))}
    if gpus:
        if world_size not in (None, len(gpus)):
            raise ValueError(f"world_size is {world_size}, but max_memory lists {len(gpus)} GPUs: {sorted(gpus)}.")
        return gpus, spill, False
    num_visible = _count_gpus()
    count = num_visible if world_size is None else world_size
    if count > num_visible:
        return dict.fromkeys(range(count), None), spill, False
    gpus = {gpu: _free_gpu_memory(gpu) for gpu in range(count)}
    if spill:
        return gpus, spill, False
    return gpus, {"cpu": _free_host_memory() if gpus else math.inf}, True


def _count_gpus() -> int:
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _free_gpu_memory(gpu: int) -> int | None:
    """Bytes free on a GPU of this machine; None where its kind cannot tell."""
    import torch

    backend: Any = torch.get_device_module()
    if hasattr(backend, "mem_get_info"):
        return backend.mem_get_info(gpu)[0]
    if hasattr(backend, "recommended_max_memory"):  # Apple's GPU shares the host's memory
        return backend.recommended_max_memory()
    return None


def _free_host_memory() -> float:
    """Bytes of the host's memory for weights, some left for the rest of the program."""
    import psutil  # accelerate needs it too

    return (1 - HEADROOM) * psutil.virtual_memory().available


def _documents_map(sizes: dict[str, int], gpus: list[Device]) -> DeviceMap:
    """The model card's map: the first GPU counts as half a one, and gets the last layer and all that is no layer."""
    layers = [part for part in sizes if part.startswith(LAYERS)]
    if not gpus:
        return dict.fromkeys(sizes, "cpu")
    share = math.ceil(len(layers) / (len(gpus) - 0.5))
    order = gpus[:1] * math.ceil(share / 2) + [gpu for gpu in gpus[1:] for _ in range(share)]
    return dict.fromkeys(sizes, gpus[0]) | dict(zip(layers[:-1], order, strict=False))


def _balanced_map(sizes: dict[str, int], room: dict[Device, float], spill: dict[Device, float]) -> DeviceMap | None:
    """The balanced map, or None if the model does not fit.

    Offloaded weights are brought to the first GPU, tensor by tensor, whenever they are used: it keeps room for the
    largest offloaded module. The encoder needs none, made as it is of many small tensors.
    """
    reserve = 0
    while True:
        first = {gpu: size - reserve for gpu, size in list(room.items())[:1]}
        placed = _place(sizes, room | first, spill)
        if placed is None:
            return None
        spilled = [part for part, device in placed.items() if device in spill and part != "vision_model"]
        largest = max((sizes[part] for part in spilled), default=0)
        if not room or largest <= reserve:
            return {part: placed[part] for part in sizes}
        reserve = largest


def _place(sizes: dict[str, int], room: dict[Device, float], spill: dict[Device, float]) -> DeviceMap | None:
    """Place the ends, then the layers; None if something fits nowhere."""
    left: dict[Device, float] = {**room, **spill}
    placed: DeviceMap = {}
    tied = sizes["language_model.lm_head"] == 0
    first, last = (FIRST_PARTS + LAST_PARTS[:1], LAST_PARTS[1:]) if tied else (FIRST_PARTS, LAST_PARTS)
    for parts, order in ((first, list(room)), (last, list(room)[::-1])):
        for part in parts:
            device = next((device for device in (*order, *spill) if sizes[part] <= left[device]), None)
            if device is None:
                return None
            left[device] -= sizes[part]
            placed[part] = device
    layers = [part for part in sizes if part.startswith(LAYERS)]
    counts = _count_layers(len(layers), sizes[layers[0]], room, left)
    if sum(counts.values()) < len(layers):
        return None
    order_of_layers = [device for device in left for _ in range(counts[device])]
    return placed | dict(zip(layers, order_of_layers, strict=True))


def _count_layers(
    num_layers: int, size: int, room: dict[Device, float], left: dict[Device, float]
) -> dict[Device, int]:
    """How many layers each device takes.

    Layers are all of one size, so handing each to the GPU that it leaves the least full, relative to its room, makes
    the fullest GPU as empty as can be.
    """
    counts = dict.fromkeys(left, 0)

    def fullness(gpu: Device) -> float:
        return (room[gpu] - left[gpu] + (counts[gpu] + 1) * size) / room[gpu]

    for _ in range(num_layers):
        fitting = [device for device in left if (counts[device] + 1) * size <= left[device]]
        gpus = [device for device in fitting if isinstance(device, int)]
        if not fitting:
            break
        counts[min(gpus, key=fullness) if gpus else fitting[0]] += 1
    return counts


def _does_not_fit(
    sizes: dict[str, int], room: dict[Device, float], spill: dict[Device, float], *, dtype: str, headroom: float
) -> str:
    free = ", ".join(f"GPU {gpu} {_gigabytes(size)}" for gpu, size in room.items())
    more = ", ".join(f"{name} {_gigabytes(size)}" for name, size in spill.items())
    largest = max(sizes, key=lambda part: sizes[part])
    return (
        f"The model does not fit: it takes {_gigabytes(sum(sizes.values()))} in {dtype} (the largest part, {largest}, "
        f"{_gigabytes(sizes[largest])}, a layer {_gigabytes(sizes[f'{LAYERS}.0'])}), and there is room for "
        f"{'; '.join(text for text in (free, more) if text) or 'nothing'} ({headroom:.0%} of every GPU stays free). "
        "Use more or larger GPUs, add a 'cpu' entry to max_memory, or load in 8 or 4 bits."
    )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
