"""Peak memory and time of loading a synthetic checkpoint of about 2 GB, as a ratio to its size.

The checkpoint (bfloat16, five shards, three encoder layers of the released size, dummy heads of zeros) is made first,
in a process of its own, and removed afterwards.
"""

import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.peaks import peak_growth
from benchmarks.report import Figure, Section
from benchmarks.settings import Settings
from nvlm import NVLM_D_Config, NVLM_D_Model


def make_checkpoint(folder: Path) -> None:
    """Random weights at sizes that add up to about 2 GB."""
    config = NVLM_D_Config(
        vision_config={"num_hidden_layers": 3},
        llm_config={
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
        },
        torch_dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    model = NVLM_D_Model(config)
    with torch.no_grad():
        for layer in model.vision_model.encoder.layers:
            layer.attn.proj.weight[:, 3200:] = 0
            layer.attn.qkv.weight.view(3, 4096, 3200)[:, 3200:] = 0
    model.save_pretrained(folder, max_shard_size="450MB")


def load_and_read(folder: Path) -> NVLM_D_Model:
    """Load, and read every weight once: until then, its pages may still be on the disk only."""
    model = NVLM_D_Model.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.sum()
    return model


def measure(folder: Path) -> dict[str, float]:
    """Load it in this process."""
    size = sum(shard.stat().st_size for shard in folder.glob("*.safetensors"))
    start = time.perf_counter()
    peak, model = peak_growth(lambda: load_and_read(folder))
    return {
        "checkpoint_bytes": size,
        "peak_bytes": peak,
        "ratio": peak / size,
        "seconds": time.perf_counter() - start,
        "dummy_heads_left": model.config.vision_config.num_dummy_heads,
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def run(settings: Settings) -> Section:
    context = multiprocessing.get_context("spawn")  # a fresh process each: nothing of the making is left in memory
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        maker = context.Process(target=make_checkpoint, args=(folder,))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise RuntimeError(f"Making the checkpoint ended with status {maker.exitcode}.")
        with context.Pool(1, maxtasksperchild=1) as pool:
            runs = [pool.apply(measure, (folder,)) for _ in range(settings.rounds_or(3))]
    seconds = statistics.median(one["seconds"] for one in runs)
    size = runs[0]["checkpoint_bytes"]
    return Section(
        "loading",
        f"from_pretrained of a checkpoint of {size / 1e9:.2f} GB in five shards, every weight read once",
        [
            Figure("peak memory / the checkpoint's size", max(one["ratio"] for one in runs), at_most=1.15),
            Figure("load time", seconds, "s"),
            Figure("dummy heads left", runs[0]["dummy_heads_left"], at_most=0),
        ],
        {"runs": runs},
    )
