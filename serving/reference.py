"""What this package answers to the same conversations: prompt ids, greedy tokens and all logprobs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LogitsProcessor, PreTrainedTokenizerBase

from nvlm import NVLM_D_Model, NVLM_D_Processor
from nvlm.serving.cases import Case, Picture


@dataclass(frozen=True)
class Generated:
    """A greedy answer.

    Args:
        prompt_ids: the prompt's ids.
        token_ids: the new ones, the stop token included.
        logprobs: (steps, vocabulary), float32.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: torch.Tensor


class Recorder(LogitsProcessor):
    """Keeps what `generate` shows it: the prompt, and the logits of each step; changes nothing."""

    def __init__(self) -> None:
        self.prompt_ids: list[int] = []
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.steps:
            self.prompt_ids = input_ids[0].tolist()
        self.steps.append(scores[0].float().log_softmax(-1).cpu())
        return scores

    def generated(self) -> Generated:
        """What was recorded, of greedy decoding."""
        logprobs = torch.stack(self.steps)
        return Generated(self.prompt_ids, logprobs.argmax(-1).tolist(), logprobs)


class Reference:
    """This package's model of a checkpoint, on the CPU in float32."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = NVLM_D_Model.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint)
        self._processor = NVLM_D_Processor.from_model_config(
            self.model.config, self.tokenizer, chat_template=(checkpoint / "chat_template.jinja").read_text()
        )

    def answer(self, case: Case, *, max_tokens: int) -> Generated:
        """By `chat()`, or where that cannot say it (`<image>` as text beside a picture) by the processor."""
        recorder = Recorder()
        options = {"max_new_tokens": max_tokens, "do_sample": False, "logits_processor": [recorder]}
        if case.fits_chat:
            pixel_values, num_patches = self._tiles(case.pictures)
            *past, question = case.texts
            history = list(zip(past[::2], past[1::2], strict=True))
            self.model.chat(
                self.tokenizer,
                pixel_values,
                question,
                options,
                history=history,
                num_patches_list=num_patches,
                system_message=case.system,
            )
        else:
            inputs = self._processor.apply_chat_template(
                case.messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
            self.model.generate(**inputs, **options, **self._ends())
        return recorder.generated()

    def follow(self, prompt_ids: Sequence[int], pictures: Sequence[Picture], *, max_tokens: int) -> Generated | None:
        """The greedy answer to someone else's prompt ids; None where its slots are not the pictures'."""
        pixel_values, num_patches = self._tiles(pictures)
        slots = list(prompt_ids).count(self.model.config.image_token_id)
        if slots != sum(num_patches or []) * self.model.config.num_image_token:
            return None
        recorder = Recorder()
        inputs: dict[str, Any] = {"input_ids": torch.tensor([prompt_ids])}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if pixel_values is not None:
            inputs["pixel_values"] = pixel_values
        self.model.generate(
            **inputs, max_new_tokens=max_tokens, do_sample=False, logits_processor=[recorder], **self._ends()
        )
        return recorder.generated()

    def _tiles(self, pictures: Sequence[Picture]) -> tuple[torch.Tensor | None, list[int] | None]:
        if not pictures:
            return None, None
        features = self._processor.image_processor([picture.data for picture in pictures])
        return features["pixel_values"], features["num_patches"]

    def _ends(self) -> dict[str, Any]:
        return {"eos_token_id": self.tokenizer.eos_token_id, "pad_token_id": self.tokenizer.pad_token_id}
