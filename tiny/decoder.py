"""Pre-training of the tiny decoder on text: sums, and questions about pages that notes describe in words."""

from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from nvlm import NVLM_D_Config
from nvlm.prompt import control_token_id
from nvlm.training.encoding import IGNORED, Example, SampleEncoder
from nvlm.training.samples import Turn
from tiny.backbone import Run, fit
from tiny.page import Sample, Skill
from tiny.skills import SKILLS, Arithmetic


def tiny_decoder_config(tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    """Qwen2 with 6 heads of 32 and 5 layers; the head size is one that vLLM takes."""
    return Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.05,  # about 192 ** -0.5; from 0.02 so narrow a decoder is slow to begin
        bos_token_id=control_token_id(tokenizer, "<|endoftext|>"),
        eos_token_id=control_token_id(tokenizer, "<|im_end|>"),
        tie_word_embeddings=False,
    )


class TextStream:
    """Batches of text, one after the other from seeded generators; half of it is arithmetic."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, seed: int, split: str) -> None:
        self._encoder = SampleEncoder(tokenizer, NVLM_D_Config())
        self._pad = control_token_id(tokenizer, "<|endoftext|>")
        self._arithmetic = Arithmetic(seed=seed, split=split)
        self._others: list[Skill] = [skill(seed=seed, split=split) for skill in SKILLS if skill is not Arithmetic]
        self._rng = np.random.default_rng([seed, len(split), 1])
        self._index = 0

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels, both int64 (size, T), padded on the right."""
        rows = [self._encode(self._draw()) for _ in range(size)]
        ids = pad_sequence([row.input_ids for row in rows], batch_first=True, padding_value=self._pad)
        labels = pad_sequence([row.labels for row in rows], batch_first=True, padding_value=IGNORED)
        return ids, labels  # [B, T], [B, T]

    def _draw(self) -> Sample:
        """The next sample."""
        other = self._others[self._rng.integers(len(self._others))]
        skill = self._arithmetic if self._rng.random() < 0.5 else other
        self._index += 1
        return skill.sample(self._index)

    def _encode(self, sample: Sample) -> Example:
        """A sample whose pages are described in words; the assistant's tokens are learned."""
        return self._encoder.encode(
            [Turn(message["role"], [message["content"][0]["text"]]) for message in sample.messages()]
        )


@torch.no_grad()
def accuracy(decoder: Qwen2ForCausalLM, stream: TextStream, *, batches: int, size: int) -> float:
    """Share of answers' tokens that are the likeliest ones, on held-out text."""
    decoder.eval()
    right = total = 0
    for _ in range(batches):
        ids, labels = stream.batch(size)
        guesses = decoder(ids).logits[:, :-1].argmax(-1)
        learned = labels[:, 1:] != IGNORED
        right += int((guesses == labels[:, 1:])[learned].sum())
        total += int(learned.sum())
    decoder.train()
    return right / total


def pretrain_decoder(folder: Path, tokenizer: PreTrainedTokenizerBase, *, steps: int, seed: int) -> None:
    """Train a decoder from nothing, and save it to `folder` with its log."""
    torch.manual_seed(seed)
    decoder = Qwen2ForCausalLM(tiny_decoder_config(tokenizer))
    stream = TextStream(tokenizer, seed=seed, split="train")
    held_out = TextStream(tokenizer, seed=seed + 1, split="test")
    run = Run(steps=steps, learning_rate=2e-3, weight_decay=0.1)

    def losses() -> dict[str, torch.Tensor]:
        ids, labels = stream.batch(run.batch_size)
        return {"loss": decoder(ids, labels=labels).loss}

    fit(
        folder,
        decoder,
        run,
        outside=[decoder.get_input_embeddings(), decoder.get_output_embeddings()],
        losses=losses,
        measure=lambda: {"accuracy": accuracy(decoder, held_out, batches=16, size=32)},
        measure_every=500,
    )
    decoder.save_pretrained(folder)
