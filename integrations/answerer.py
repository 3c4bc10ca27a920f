"""Answers to conversations in batches, and how likely given answers are: all that evaluation harnesses ask."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import StoppingCriteriaList

from nvlm import NVLM_D_Model, NVLM_D_Processor
from nvlm.prompt import control_token_id, encode_text
from nvlm.token_rows import pad

from .task_options import StopAt, TaskOptions, cut

Conversation = Sequence[Mapping[str, Any]]


class Answerer:
    """A model and its processor.

    Args:
        model: the model.
        processor: its processor.
        system_message: of conversations that have none; None for the chat template's own.
        **options: of the processor, such as `max_patches` and `num_frames`.
    """

    def __init__(
        self, model: NVLM_D_Model, processor: NVLM_D_Processor, *, system_message: str | None = None, **options: Any
    ) -> None:
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._system_message = system_message
        self._options = options
        self._stop_id = control_token_id(self.tokenizer, model.conv_template.sep)
        self._pad_id = self._stop_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def generate(self, conversations: Sequence[Conversation], options: TaskOptions) -> list[str]:
        """The answer to each conversation, as a batch; greedy answers are those of `chat()` one by one.

        Args:
            conversations: messages as the processor's `apply_chat_template` takes them, the last one a user's.
            options: how to answer.

        Raises:
            ValueError: a conversation is longer than the decoder can read, and what reading pictures raises.
        """
        inputs = self._prompts(conversations, padding=True)
        prompt_length = len(inputs["input_ids"][0])
        criteria = StoppingCriteriaList()
        if options.stop:
            criteria.append(StopAt(self.tokenizer, options.stop, prompt_length=prompt_length))
        fixed = {
            "eos_token_id": self._stop_id,
            "pad_token_id": self._pad_id,
            "num_return_sequences": 1,
            "return_dict_in_generate": False,
            "stopping_criteria": criteria,
        }
        output = self.model.generate(**self._tensors(inputs), **{**options.arguments, **fixed})
        rows = output[:, prompt_length:].tolist()
        rows = [row[: row.index(self._stop_id)] if self._stop_id in row else row for row in rows]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [cut(text, options.stop).strip() for text in texts]

    @torch.no_grad()
    def log_likelihoods(
        self, conversations: Sequence[Conversation], answers: Sequence[str]
    ) -> list[tuple[float, bool]]:
        """How likely the assistant begins its turn with an answer.

        White space before an answer is left out: it keeps a context and its continuation apart in bare text, and here a
        turn begins between the two.

        Args:
            conversations: as in `generate`.
            answers: one a conversation.

        Returns:
            For each the natural logarithm of the probability of the answer's tokens, one after the other, and whether
            each of them is the likeliest at its place. What follows the answer is not asked.

        Raises:
            ValueError: as `generate`.
        """
        inputs = self._prompts(conversations, padding=False)
        ends = [encode_text(self.tokenizer, answer.lstrip()) for answer in answers]
        rows = [[*prompt, *end] for prompt, end in zip(inputs["input_ids"], ends, strict=True)]
        self._check_length(rows)
        inputs["input_ids"] = pad(rows, value=self._pad_id, padding=True, side="left")
        inputs["attention_mask"] = pad([[1] * len(row) for row in rows], value=0, padding=True, side="left")
        longest = max(map(len, ends))
        tensors = self._tensors(inputs)
        positions = (tensors["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        output = self.model(**tensors, position_ids=positions, logits_to_keep=longest + 1, use_cache=False)
        logits = output.logits[:, :-1].float()  # [B, longest, V]: of what follows each token but the last
        wanted = tensors["input_ids"][:, tensors["input_ids"].shape[1] - longest :].to(logits.device)  # [B, longest]
        chosen = logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0]  # [B, longest]
        likeliest = logits.argmax(-1) == wanted
        starts = [longest - len(end) for end in ends]
        return [(float(chosen[i, start:].sum()), bool(likeliest[i, start:].all())) for i, start in enumerate(starts)]

    def _prompts(self, conversations: Sequence[Conversation], *, padding: bool) -> dict[str, Any]:
        """The model's inputs with rows of ids as lists; padded on the left, or each as long as it is."""
        opened = [self._opened(conversation) for conversation in conversations]
        inputs = self.processor.apply_chat_template(
            opened,
            tokenize=True,
            return_dict=True,
            return_tensors=None,
            add_generation_prompt=True,
            padding=padding,
            **self._options,
        )
        self._check_length(inputs["input_ids"])
        return dict(inputs)

    def _opened(self, conversation: Conversation) -> list[Mapping[str, Any]]:
        if self._system_message is None or conversation[0]["role"] == "system":
            return list(conversation)
        return [{"role": "system", "content": self._system_message}, *conversation]

    def _check_length(self, rows: Sequence[Sequence[int]]) -> None:
        longest, limit = max(map(len, rows)), self.model.config.position_limit
        if longest >= limit:
            raise ValueError(
                f"A conversation is {longest} tokens long, but the decoder has {limit} positions, the answer included: "
                "fewer tiles (max_patches) or frames (num_frames) make it shorter."
            )

    def _tensors(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {name: torch.as_tensor(value).to(self.model.input_device) for name, value in inputs.items()}
