"""Peak memory of loading a synthetic checkpoint of about 2 GB, as a ratio to its size.

    python -m benchmarks.loading [--folder DIR] [--json FILE]

The checkpoint (bfloat16, five shards, three encoder layers of the released size, dummy heads of zeros) is made first,
in a process of its own, and removed afterwards.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.memory import peak_growth
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="use the checkpoint in this folder; made and kept there if missing")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")  # a fresh process each: nothing of the making is left in memory
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        if not list(folder.glob("*.safetensors")):
            maker = context.Process(target=make_checkpoint, args=(folder,))
            maker.start()
            maker.join()
        with context.Pool(1) as pool:
            result = pool.apply(measure, (folder,))
    print(f"checkpoint                {result['checkpoint_bytes'] / 1e9:8.3f} GB")
    print(f"model in memory           {result['model_bytes'] / 1e9:8.3f} GB, {result['dummy_heads_left']} dummy heads")
    print(f"peak while loading        {result['peak_bytes'] / 1e9:8.3f} GB, {result['seconds']:.1f} s")
    print(f"peak / checkpoint         {result['ratio']:8.3f}   (at most 1.15 wanted)")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
