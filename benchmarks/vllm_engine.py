"""vLLM's side of the comparison, run by the Python of its own environment: a line in, a line out.

    .cache/vllm-venv/bin/python -P benchmarks/vllm_engine.py CHECKPOINT

A request is JSON: {"tokens": [ids], "new": n} for text, {"side": pixels, "text": "<image>...", "seed": s, "new": n} for
a picture of noise. The answer is `SECONDS s`, after `READY` once the engine stands.
"""

import json
import sys
import time
from typing import Any

import numpy as np
from PIL import Image
from vllm import LLM, SamplingParams


def main(checkpoint: str) -> None:
    engine = LLM(
        model=checkpoint,
        trust_remote_code=True,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=1,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        limit_mm_per_prompt={"image": 1},
        skip_mm_profiling=True,
    )
    print("READY", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        prompt: dict[str, Any]
        if "tokens" in request:
            prompt = {"prompt_token_ids": request["tokens"]}
        else:
            drawn = np.random.default_rng(request["seed"]).integers(0, 256, (request["side"], request["side"], 3))
            picture = Image.fromarray(drawn.astype(np.uint8))
            prompt = {"prompt": request["text"], "multi_modal_data": {"image": picture}}
        sampling = SamplingParams(temperature=0.0, max_tokens=request["new"], ignore_eos=True)
        start = time.perf_counter()
        engine.generate(prompt, sampling, use_tqdm=False)
        print(f"SECONDS {time.perf_counter() - start}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
