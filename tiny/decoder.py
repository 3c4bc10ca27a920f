"""Pre-training of the tiny decoder on text: sums, and questions about pages that notes describe in words."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from nvlm import NVLM_D_Config
from nvlm.prompt import control_token_id
from nvlm.training.encoding import IGNORED, Example, SampleEncoder
from nvlm.training.samples import Turn
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


@dataclass(frozen=True)
class DecoderRun:
    """How the decoder is trained."""

    steps: int
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    seed: int = 0


def pretrain_decoder(folder: Path, tokenizer: PreTrainedTokenizerBase, run: DecoderRun) -> Qwen2ForCausalLM:
    """Train a decoder from nothing, save it to `folder` with its log, and return it."""
    torch.manual_seed(run.seed)
    decoder = Qwen2ForCausalLM(tiny_decoder_config(tokenizer))
    stream = TextStream(tokenizer, seed=run.seed, split="train")
    held_out = TextStream(tokenizer, seed=run.seed + 1, split="test")
    optimizer = torch.optim.AdamW(
        decoder.parameters(), lr=run.learning_rate, betas=(0.9, 0.98), weight_decay=run.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, run.learning_rate, total_steps=run.steps, pct_start=min(0.5, run.warmup_steps / run.steps)
    )
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with (folder / "log.jsonl").open("w") as log:
        for step in tqdm(range(1, run.steps + 1), desc="decoder", mininterval=5):
            ids, labels = stream.batch(run.batch_size)
            loss = decoder(ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 0 or step == run.steps:
                line = {"step": step, "seconds": round(time.perf_counter() - start, 1), "loss": round(loss.item(), 4)}
                if step % 500 == 0 or step == run.steps:
                    line["accuracy"] = round(accuracy(decoder, held_out, batches=16, size=32), 4)
                log.write(json.dumps(line) + "\n")
                log.flush()
    decoder.save_pretrained(folder)
    return decoder
