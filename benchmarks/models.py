"""The two models that everything is measured on, and the tokenizer of the larger one."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from nvlm import NVLM_D_Config, NVLM_D_Model
from tiny.untrained import write_vocabulary

REPOSITORY = Path(__file__).resolve().parent.parent
TOKENIZER = REPOSITORY / ".cache" / "bench" / "tokenizer"
TINY = REPOSITORY / "tiny" / "checkpoint"
NOISE = 1_000_003  # numbers drawn; a prime, so that no two rows of a matrix are alike


@dataclass(frozen=True)
class Bench:
    """A model to measure.

    Args:
        name: "tiny" or "mid".
        model: on the CPU, in evaluation mode.
        tokenizer: its own.
    """

    name: str
    model: NVLM_D_Model
    tokenizer: PreTrainedTokenizerBase

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype


def mid_config(**decoder: Any) -> NVLM_D_Config:
    """Four encoder layers of the released size, a decoder of 0.51 billion parameters with Qwen2-0.5B's widths.

    Args:
        decoder: other values for the decoder's config.
    """
    return NVLM_D_Config(
        vision_config={"num_hidden_layers": 4, "num_dummy_heads": 0},
        llm_config={
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 16,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 152064,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
        }
        | decoder,
    )


def random_model(config: NVLM_D_Config, *, dtype: torch.dtype) -> NVLM_D_Model:
    """A model with random weights, made fast: every matrix is filled with the same numbers, scaled by its width."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            model = NVLM_D_Model(config)
    finally:
        torch.set_default_dtype(default)
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            flat = parameter.view(-1)
            whole = len(flat) // NOISE * NOISE
            flat[:whole].view(-1, NOISE).copy_(noise.expand(whole // NOISE, NOISE))
            flat[whole:].copy_(noise[: len(flat) - whole])
            fan_in = parameter[0].numel() if "embed" not in name else 1
            parameter.mul_(fan_in**-0.5)
        for layer in model.vision_model.encoder.layers:
            layer.ls1.fill_(0.1)
            layer.ls2.fill_(0.1)
    # Without initialisation these buffers of the decoder are still computed: they are no weights.
    return model.eval()


def mid_tokenizer() -> PreTrainedTokenizerBase:
    """Qwen2's tokenizer with the released settings; its files are written once, which takes some seconds."""
    if not (TOKENIZER / "merges.txt").exists():
        TOKENIZER.mkdir(parents=True, exist_ok=True)
        write_vocabulary(TOKENIZER)
    shutil.copy(REPOSITORY / "tokenizer_config.json", TOKENIZER)
    return AutoTokenizer.from_pretrained(TOKENIZER)


def mid_bench(dtype: torch.dtype) -> Bench:
    """The mid-size model."""
    return Bench("mid", random_model(mid_config(), dtype=dtype), mid_tokenizer())


def tiny_bench() -> Bench:
    """The trained tiny model in float32."""
    model = NVLM_D_Model.from_pretrained(TINY, dtype=torch.float32).eval()
    return Bench("tiny", model, AutoTokenizer.from_pretrained(TINY))


def random_tiles(bench: Bench, tiles: int, *, seed: int = 0) -> torch.Tensor:
    """Pixels (tiles, 3, S, S) that are as good as any picture's for measuring."""
    side = bench.model.config.tile_size
    return torch.randn(tiles, 3, side, side, generator=torch.Generator().manual_seed(seed)).to(bench.dtype)


def prompt_ids(bench: Bench, tiles: int, tokens: int, *, seed: int = 0) -> torch.Tensor:
    """Ids (1, tokens) of a prompt: random text with a picture of `tiles` tiles near its beginning.

    Raises:
        ValueError: the tiles need more tokens.
    """
    config = bench.model.config
    features = tiles * config.num_image_token
    start = 8
    if tokens < features + start + 1:
        raise ValueError(f"{tiles} tiles are {features} tokens: a prompt needs {features + start + 1}, got {tokens}.")
    text = min(config.llm_config.vocab_size, len(bench.tokenizer)) // 2  # far from the special tokens
    ids = torch.randint(0, text, (1, tokens), generator=torch.Generator().manual_seed(seed))
    ids[:, start : start + features] = config.image_token_id
    return ids
