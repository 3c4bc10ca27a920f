"""lmms-eval's models `nvlm_d`: its requests become conversations, answered in batches.

Written for lmms-eval 0.7.3. `ChatNVLM_D` is what `--model nvlm_d` gives; `--force_simple` gives `SimpleNVLM_D`, for
tasks of multiple choice: lmms-eval asks no chat model for likelihoods.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api import instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from nvlm import NVLM_D_Config, NVLM_D_Model, NVLM_D_Processor, split_model

from .answerer import Answerer, Conversation
from .conversations import chat_turns, user_turn
from .task_options import MAX_NEW_TOKENS, TaskOptions, read_options


class SimpleNVLM_D(lmms):
    """NVLM-D for tasks that hand over a text and its pictures.

    Args:
        pretrained: folder of the checkpoint, with the processor's files (`nvlm overlay` writes them).
        device: where the model goes; by default this process's GPU, or the CPU. Several processes
            (`accelerate launch`) have a model each, on their own GPUs.
        device_map: in its place, as in `from_pretrained`; "split_model" spreads the model evenly over this process's
            GPUs.
        dtype: of the weights.
        attn_implementation: as in `from_pretrained`.
        batch_size: requests that are answered at once.
        system_prompt: in the place of the chat template's own.
        max_patches: most tiles of a picture; by default the checkpoint's.
        num_frames: frames of a video.
        max_new_tokens, stop_at_blank_lines: see `read_options`.
        likelihoods_as_losses: whether `loglikelihood` gives minus the logarithms.

    Raises:
        ValueError: a batch size that is no number above 0; and what `from_pretrained` raises.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        batch_size: int | str = 1,
        system_prompt: str | None = None,
        max_patches: int | None = None,
        num_frames: int = 32,
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop_at_blank_lines: bool = False,
        likelihoods_as_losses: bool = True,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}, expected a number of at least 1.")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        own = device if self._world_size == 1 else None
        self.device = self.accelerator.device if own is None else torch.device(own)
        places: Any = device_map or {"": self.device}
        if device_map == "split_model":
            places = split_model(config=NVLM_D_Config.from_pretrained(pretrained), dtype=dtype)
        model = NVLM_D_Model.from_pretrained(
            pretrained, dtype=dtype, device_map=places, attn_implementation=attn_implementation
        ).eval()
        processor = NVLM_D_Processor.from_pretrained(pretrained)
        options = {"num_frames": num_frames} | ({} if max_patches is None else {"max_patches": max_patches})
        self.answerer = Answerer(model, processor, system_message=system_prompt, **options)
        self._max_new_tokens = max_new_tokens
        self._stop_at_blank_lines = stop_at_blank_lines
        self._sign = -1 if likelihoods_as_losses else 1

    def clean(self) -> None:
        """Give the model's memory back; lmms-eval calls it after the last request."""
        del self.answerer
        super().clean()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers to requests, in their order."""
        asked = [request.args for request in requests]
        return self._answer([self._generation_kwargs(*args) for args in asked], lambda i: self._conversation(*asked[i]))

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of all rounds of each request, whose task makes the next question of the answers so far."""
        return [self._answer_rounds(*request.args) for request in self._progress(requests, "rounds")]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """For each request how unlikely its continuation is, and whether that is the greedy answer.

        lmms-eval asks for a log-likelihood and then takes the choice with the smallest value for the model's (0.6.0 to
        0.7.3; its own models return losses), so minus the sum of the tokens' log probabilities is what it gets. Since
        0.7.0 its evaluator makes a text of any pair that is not wrapped as here.
        """
        scores: list[tuple[float, bool]] = []
        for start in self._progress(range(0, len(requests), self.batch_size), "likelihoods"):
            pairs = [self._continuation(*request.args) for request in requests[start : start + self.batch_size]]
            conversations, answers = zip(*pairs, strict=True)
            scores += self.answerer.log_likelihoods(conversations, answers)
        wrap = getattr(instance, "GenerationResult", tuple)
        return [wrap((self._sign * score, is_greedy)) for score, is_greedy in scores]

    def generate_visual_cot(self, requests: Sequence[Any]) -> list[str]:
        """Refused: such tasks have the model draw pictures.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("NVLM-D writes text and draws no pictures: visual_cot tasks are not supported.")

    def _answer(self, kwargs: Sequence[Any], conversation: Callable[[int], Conversation]) -> list[str]:
        """The answers to `conversation(i)` with `kwargs[i]`, in batches of equal options."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, asked in enumerate(kwargs):
            groups[repr(sorted((asked or {}).items()))].append(i)
        batches = [
            indices[start : start + self.batch_size]
            for indices in groups.values()
            for start in range(0, len(indices), self.batch_size)
        ]
        answers = dict[int, str]()
        for batch in self._progress(batches, "answers"):
            options = self._options(kwargs[batch[0]])
            texts = self.answerer.generate([conversation(i) for i in batch], options)
            answers |= zip(batch, texts, strict=True)
        return [answers[i] for i in range(len(kwargs))]

    def _options(self, kwargs: Any) -> TaskOptions:
        return read_options(kwargs, max_new_tokens=self._max_new_tokens, stop_at_blank_lines=self._stop_at_blank_lines)

    def _progress(self, work: Sequence[Any], name: str) -> Any:
        return tqdm(work, desc=f"nvlm_d {name}", disable=self.rank != 0)

    def _document(self, task: str, split: str, doc_id: Any) -> Any:
        return self.task_dict[task][split][doc_id]

    # What lmms-eval puts into a request's `args`, in its order.

    def _generation_kwargs(self, context: str, kwargs: Any, *rest: Any) -> Any:
        return kwargs

    def _conversation(
        self, context: str, kwargs: Any, doc_to_visual: Callable[[Any], Any], doc_id: Any, task: str, split: str
    ) -> Conversation:
        return user_turn(context, doc_to_visual(self._document(task, split, doc_id)))

    def _continuation(
        self,
        context: str,
        continuation: str | Callable[[Any], str],
        doc_to_visual: Callable[[Any], Any] | None = None,
        doc_id: Any = None,
        task: str = "",
        split: str = "",
    ) -> tuple[Conversation, str]:
        """A text alone has no document: lmms-eval asks so how likely a choice is without its question."""
        document = None if doc_to_visual is None else self._document(task, split, doc_id)
        visuals = None if doc_to_visual is None else doc_to_visual(document)
        answer = continuation if isinstance(continuation, str) else continuation(document)
        return user_turn(context, visuals), answer

    def _answer_rounds(
        self,
        context: str,
        kwargs: Any,
        doc_to_visual: Callable[[Any], Any],
        doc_to_text: Callable[..., Any],
        doc_id: Any,
        task: str,
        split: str,
    ) -> list[str]:
        document = self._document(task, split, doc_id)
        visuals, info = doc_to_visual(document), None
        answers: list[str] = []
        number = 0
        while True:
            answers = [*answers, *self.answerer.generate([user_turn(context, visuals)], self._options(kwargs))]
            number += 1
            visuals, context, is_over, answers, info = doc_to_text(
                document, previous_output=list(answers), round_idx=number, previous_round_info=info
            )
            if is_over:
                return list(answers)


class ChatNVLM_D(SimpleNVLM_D):
    """NVLM-D for tasks that hand over messages; the arguments are those of `SimpleNVLM_D`."""

    is_simple = False

    def _generation_kwargs(self, context: str, doc_to_messages: Any, kwargs: Any, *rest: Any) -> Any:  # type: ignore[override]
        return kwargs

    def _conversation(  # type: ignore[override]
        self, context: str, doc_to_messages: Callable[[Any], Any], kwargs: Any, doc_id: Any, task: str, split: str
    ) -> Conversation:
        return chat_turns(doc_to_messages(self._document(task, split, doc_id)))

    def _answer_rounds(  # type: ignore[override]
        self, context: str, doc_to_messages: Callable[..., Any], kwargs: Any, doc_id: Any, task: str, split: str
    ) -> list[str]:
        document = self._document(task, split, doc_id)
        messages, info = doc_to_messages(document), None
        answers: list[str] = []
        number = 0
        while True:
            answers = [*answers, *self.answerer.generate([chat_turns(messages)], self._options(kwargs))]
            number += 1
            messages, is_over, answers, info = doc_to_messages(
                document, round_idx=number, previous_output=list(answers), previous_round_info=info
            )
            if is_over:
                return list(answers)
