"""Peak memory of the prefill of a 3000-token prompt at the released vocabulary, against the full logits' size.

`generate` computes the last position's logits only; the same prompt through `forward` with all logits stands beside it.
"""

import multiprocessing

import torch

from benchmarks.peaks import peak_growth
from benchmarks.report import Figure, Section
from benchmarks.settings import Settings
from nvlm import NVLM_D_Model
from tiny.untrained import tiny_config

VOCABULARY = 152064
TOKENS = 3000


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


def run(settings: Settings) -> Section:
    full_logits = TOKENS * VOCABULARY * 4
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:  # a fresh process each
        generated = pool.apply(measure, (TOKENS, True))
        every = pool.apply(measure, (TOKENS, False))
    return Section(
        "prefill_memory",
        f"peak of a prefill of {TOKENS} tokens, / the float32 logits of every position at vocabulary {VOCABULARY}",
        [
            Figure("generate()", generated / full_logits, at_most=0.1),
            Figure("forward() with all logits", every / full_logits),
        ],
        {"full_logits_bytes": full_logits, "generate_bytes": generated, "forward_bytes": every},
    )
