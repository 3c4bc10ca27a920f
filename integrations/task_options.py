"""What a task of a harness asks of generation, in the words of `generate`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria
from transformers.utils import logging

logger = logging.get_logger(__name__)

BLANK_LINE = "\n\n"
MAX_NEW_TOKENS = 1024


@dataclass(frozen=True)
class TaskOptions:
    """How to answer.

    Args:
        arguments: keyword arguments of `generate`.
        stop: texts before which an answer ends.
    """

    arguments: dict[str, Any]
    stop: tuple[str, ...] = ()


def read_options(
    asked: Mapping[str, Any] | None, *, max_new_tokens: int = MAX_NEW_TOKENS, stop_at_blank_lines: bool = False
) -> TaskOptions:
    """The options of a task's `generation_kwargs`.

    Args:
        asked: arguments of `generate` and `until`, a text or several before which an answer ends. A temperature of 0 is
            greedy, a higher one samples, unless `do_sample` says otherwise; with neither, decoding is greedy. What
            `generate` does not know is for other models and left out, with a warning.
        max_new_tokens: longest answer, in tokens, where the task does not say it.
        stop_at_blank_lines: take `until=["\\n\\n"]` at its word. lmms-eval writes that into every task that has no
            `until`, and it would end an answer after its first paragraph. Beside other texts it always counts.

    Raises:
        ValueError: `until` is no text.
    """
    given = {name: value for name, value in (asked or {}).items() if value is not None}
    stop = _read_until(given.pop("until", ()))
    if stop == (BLANK_LINE,) and not stop_at_blank_lines:
        stop = ()
    known = vars(GenerationConfig())
    unknown = sorted(set(given) - set(known))
    if unknown:
        logger.warning_once(f"generation_kwargs {unknown} mean nothing to NVLM-D and are left out.")
    arguments = {"max_new_tokens": max_new_tokens, **{name: given[name] for name in given if name in known}}
    temperature = arguments.get("temperature")
    arguments["do_sample"] = bool(arguments.get("do_sample", temperature is not None)) and temperature != 0
    if not arguments["do_sample"]:
        for name in ("temperature", "top_p", "top_k"):
            arguments.pop(name, None)
    return TaskOptions(arguments, stop)


def _read_until(until: Any) -> tuple[str, ...]:
    texts = [until] if isinstance(until, str) else until
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"until must be a text or a list of texts, got {until!r:.80}.")
    return tuple(text for text in texts if text)


def cut(answer: str, stop: Sequence[str]) -> str:
    """An answer up to the first of the texts that end it."""
    return answer[: min((answer.index(text) for text in stop if text in answer), default=len(answer))]


class StopAt(StoppingCriteria):
    """Ends each sequence whose new part holds one of some texts.

    Args:
        tokenizer: of the sequences.
        stop: the texts, at least one.
        prompt_length: where the new part begins, in tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], *, prompt_length: int) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._prompt_length = prompt_length
        self._window = max(len(text.encode()) for text in stop)  # a token is a byte at least

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(B, L) ids -> (B,) bool: whether a text ends in the last token."""
        start = max(self._prompt_length, input_ids.shape[1] - self._window)
        texts = self._tokenizer.batch_decode(input_ids[:, start:], skip_special_tokens=True)
        found = [any(text in end for text in self._stop) for end in texts]
        return torch.tensor(found, device=input_ids.device)
