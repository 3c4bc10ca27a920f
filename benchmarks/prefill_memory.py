"""Peak memory of the prefill of a 3000-token prompt at the released vocabulary, against the full logits' size.

    python -m benchmarks.prefill_memory [--tokens 3000] [--json FILE]

`generate` computes the last position's logits only; the same prompt through `forward` with all logits stands beside it.
"""

import argparse
import json
import multiprocessing
from pathlib import Path

import torch

from benchmarks.memory import peak_growth
from nvlm import NVLM_D_Model
from tiny.untrained import tiny_config

VOCABULARY = 152064


def measure(tokens: int, last_only: bool) -> int:
    """Bytes that the peak of one prefill lies above the loaded model."""
    torch.manual_seed(0)
    model = NVLM_D_Model(tiny_config()).eval()
    ids = torch.randint(0, 1000, (1, tokens))
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        model(input_ids=ids[:, :8])  # libraries and buffers that any first call needs
        if last_only:
            options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
            return peak_growth(lambda: model.generate(input_ids=ids, attention_mask=mask, **options))[0]
        return peak_growth(lambda: model(input_ids=ids, attention_mask=mask))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    full_logits = args.tokens * VOCABULARY * 4
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:  # a fresh process each
        generated = pool.apply(measure, (args.tokens, True))
        every = pool.apply(measure, (args.tokens, False))
    print(f"full logits, float32            {full_logits / 1e6:8.0f} MB")
    print(
        f"peak of generate's prefill      {generated / 1e6:8.0f} MB = {generated / full_logits:.3f} of the full logits"
    )
    print(f"peak of forward, all logits     {every / 1e6:8.0f} MB = {every / full_logits:.3f} of the full logits")
    if args.json:
        result = {"full_logits": full_logits, "generate_peak": generated, "forward_peak": every}
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
