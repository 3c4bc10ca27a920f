"""What quantised decoder weights save, and what they cost, on the tiny trained NVLM-D.

`python -m examples.quantised [FOLDER] [--samples N]` prints each kind's bytes of weights and its score on pages with
rows of digits and on sums, beside those of float32. The encoder, the projector and the head stay as they are.
"""

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from nvlm.loading import bitsandbytes_4bit, bitsandbytes_8bit, torchao_int4, torchao_int8
from tiny.evaluate import CHECKPOINT, held_out, score

KINDS: dict[str, Callable[[], Any]] = {
    "float32": lambda: None,
    "bitsandbytes_8bit()": bitsandbytes_8bit,
    "bitsandbytes_4bit()": bitsandbytes_4bit,
    "torchao_int8()": torchao_int8,
    "torchao_int4()": torchao_int4,
}
SKILLS = ("digit strings", "arithmetic")


def stored_bytes(tensor: torch.Tensor) -> int:
    """The bytes that a tensor keeps; torchao's are made of several, one inside the other."""
    if hasattr(tensor, "__tensor_flatten__"):
        parts, _ = tensor.__tensor_flatten__()
        return sum(stored_bytes(getattr(tensor, part)) for part in parts)
    return tensor.nbytes


def layer_bytes(model: nn.Module) -> int:
    """The bytes of the weights of a decoder's layers, without the scales that bitsandbytes keeps beside them."""
    layers = model.get_submodule("language_model.model.layers")
    return sum(stored_bytes(parameter.data) for parameter in layers.parameters())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.quantised", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=CHECKPOINT, help="the checkpoint, by default the tiny")
    parser.add_argument("--samples", type=int, default=200, help="held-out samples of each skill")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="by default all of them")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every layer that float32 becomes float16
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    samples = {skill: held_out(skill, options.samples) for skill in SKILLS}
    print(f"| decoder's layers | MB | {' | '.join(f'{skill}, %' for skill in SKILLS)} |")
    print("| --- | ---: " + "| ---: " * len(SKILLS) + "|")
    for kind in options.kinds:
        config = KINDS[kind]()
        model = AutoModel.from_pretrained(options.folder, dtype=torch.float32, quantization_config=config).eval()
        scores = [f"{score(model, tokenizer, samples[skill]):.1f}" for skill in SKILLS]
        print(f"| {kind} | {layer_bytes(model) / 1e6:.2f} | {' | '.join(scores)} |", flush=True)


if __name__ == "__main__":
    main()
