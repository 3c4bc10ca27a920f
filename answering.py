"""Prompts become answers: what is known already is not read again, the rest is generated after it."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from .batching import Group, group_prompts, split_group
from .feature_cache import FeatureCache
from .prefix import Prefix, Prompt, Slots, can_go_on, stack
from .prompt import control_token_id

KINDS_THAT_GO_ON = (None, "dynamic", "offloaded", "quantized")


@dataclass(frozen=True)
class Generation:
    """How answers are generated and where they end.

    Args:
        options: keyword arguments of `generate`, the caller's own untouched.
        pad_token_id: of the padding.
        sep_id: of the token that ends an answer.
    """

    options: dict[str, Any]
    pad_token_id: int
    sep_id: int

    @classmethod
    def from_config(
        cls, tokenizer: PreTrainedTokenizerBase, config: dict[str, Any] | GenerationConfig | None, *, sep: str
    ) -> "Generation":
        """From what a user passes as `generation_config`; what that leaves out comes from the tokenizer.

        Raises:
            ValueError: neither a dict nor a `GenerationConfig`.
        """
        sep_id = control_token_id(tokenizer, sep)
        defaults = {
            "eos_token_id": sep_id,
            "pad_token_id": sep_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        }
        if config is None or isinstance(config, dict):
            options = dict(config or {})
            options |= {name: value for name, value in defaults.items() if options.get(name) is None}
            return cls(options, options["pad_token_id"], sep_id)
        if isinstance(config, GenerationConfig):
            own = copy.deepcopy(config)
            for name, value in defaults.items():
                if getattr(own, name) is None:
                    setattr(own, name, value)
            return cls({"generation_config": own}, own.pad_token_id, sep_id)
        raise ValueError(f"generation_config must be a dict or a GenerationConfig, got {type(config).__name__}.")

    def option(self, name: str, model: Any) -> Any:
        """What `generate` will take for an option: the call's value, else the model's own."""
        if name in self.options:
            return self.options[name]
        return getattr(self.options.get("generation_config", model.generation_config), name, None)

    def can_go_on(self, model: Any) -> bool:
        """Whether a KV cache can be handed in and taken out: one row a prompt, in a cache that grows.

        Assisted decoding of transformers 5 reads the whole prompt again behind a cache that it is handed.
        """
        return (
            self.option("use_cache", model) is not False
            and (self.option("num_beams", model) or 1) == 1
            and (self.option("num_return_sequences", model) or 1) == 1
            and not self.option("prompt_lookup_num_tokens", model)
            and self.option("assistant_model", model) is None
            and self.option("cache_implementation", model) in KINDS_THAT_GO_ON
        )

    def can_share(self, model: Any) -> bool:
        """Whether rows can begin with what was read once for all of them: only into a plain cache."""
        return self.can_go_on(model) and self.option("cache_implementation", model) in (None, "dynamic")

    def with_cache(self, cache: Any) -> dict[str, Any]:
        """The options of a call that goes on from a cache; that decides itself of what kind it is."""
        options = {
            name: value for name, value in self.options.items() if name not in ("cache_implementation", "cache_config")
        }
        if "generation_config" in options:
            options["generation_config"] = copy.deepcopy(options["generation_config"])
            options["generation_config"].cache_implementation = None
            options["generation_config"].cache_config = None
        return {**options, "past_key_values": cache}

    def cut_answer(self, ids: list[int]) -> list[int]:
        """New ids up to the separator."""
        return ids[: ids.index(self.sep_id)] if self.sep_id in ids else ids


def slots_of(config: Any) -> Slots:
    """How tiles lie in the prompts of a model with that config."""
    return Slots(config.image_token_id, config.num_image_token)


def check_prompt(prompt: Prompt, *, config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the decoder can read a prompt, and that there is one place for each feature.

    Raises:
        ValueError: an empty or too long prompt, or a tokenizer that is not the checkpoint's.
    """
    if not prompt.ids:
        raise ValueError("The prompt is empty: expected at least one character of text, or a picture.")
    length, limit = len(prompt.ids), config.position_limit
    if length >= limit:
        raise ValueError(
            f"The prompt is {length} tokens long, but the decoder has {limit} positions, the answer included: "
            "shorten the history, or pass fewer pictures or fewer tiles (max_num)."
        )
    largest, vocabulary = max(prompt.ids), config.llm_config.vocab_size
    if largest >= vocabulary:
        raise ValueError(
            f"The prompt holds token id {largest}, but the decoder knows {vocabulary} tokens: the tokenizer "
            f"({len(tokenizer)} tokens) is not the checkpoint's, or the embeddings were not resized for it."
        )
    slots = prompt.ids.count(config.image_token_id)
    expected = sum(len(picture.tiles) for picture in prompt.pictures) * config.num_image_token
    if slots != expected:
        raise ValueError(
            f"The prompt holds {slots} tokens of id {config.image_token_id} (the config's image_token_id) for "
            f"{expected} features of pictures: the tokenizer or IMG_CONTEXT_TOKEN is not the checkpoint's."
        )


def rows_of_ids(
    rows: Sequence[Sequence[int]], *, pad_token_id: int, prefix_lengths: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids (B, L) and their attention mask (B, L), padded on the left of the prefix and of what follows it.

    pad pad  a   b   c  | pad  d   e
     f   g   h   i   j  |  k   l   m
    """
    lengths = prefix_lengths or [0] * len(rows)
    most, longest = max(lengths), max(len(row) - length for row, length in zip(rows, lengths, strict=True))
    ids, mask = [], []
    for row, length in zip(rows, lengths, strict=True):
        gaps = [pad_token_id] * (most - length), [pad_token_id] * (longest - len(row) + length)
        ids.append([*gaps[0], *row[:length], *gaps[1], *row[length:]])
        mask.append([0] * len(gaps[0]) + [1] * length + [0] * len(gaps[1]) + [1] * (len(row) - length))
    return torch.tensor(ids), torch.tensor(mask)  # [B, L], [B, L]


def new_ids(output: Any, *, rows: int, length: int) -> list[list[int]]:
    """The generated ids of each row; of several sequences a row, the first."""
    sequences = getattr(output, "sequences", output)  # [B * sequences, length + new]
    return sequences[:: len(sequences) // rows, length:].tolist()


def decode_answer(tokenizer: PreTrainedTokenizerBase, generation: Generation, ids: Sequence[int]) -> str:
    """The text of new ids up to the separator.

    The decoder has more rows than the tokenizer has tokens (padding); such an id has no text.
    """
    known = [token_id for token_id in generation.cut_answer(list(ids)) if token_id < len(tokenizer)]
    return str(tokenizer.decode(known, skip_special_tokens=True)).strip()


def check_batch_tokens(max_batch_tokens: Any) -> None:
    """Check a budget of tokens.

    Raises:
        ValueError: neither None nor a positive int.
    """
    if max_batch_tokens is not None and (type(max_batch_tokens) is not int or max_batch_tokens < 1):
        raise ValueError(f"max_batch_tokens must be a positive int or None, got {max_batch_tokens!r}.")


def join(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Tiles of several pictures in one tensor; None where there are none."""
    tiles = [part for part in parts if part is not None]
    if len(tiles) <= 1:
        return tiles[0] if tiles else None
    return torch.cat(tiles)


class Answerer:
    """Answers prompts of one call or one session, with what was encoded and read before.

    Args:
        model: an `NVLM_D_Model`.
        generation: how.
        features: of pictures seen before.
    """

    def __init__(self, model: Any, generation: Generation, *, features: FeatureCache) -> None:
        self.model = model
        self.generation = generation
        self.features = features
        self.slots = slots_of(model.config)

    def visual_features(self, prompt: Prompt, *, after: int, before: int | None = None) -> torch.Tensor | None:
        """The features (tiles, tokens, D) of a prompt's tiles number `after` to `before`; None if there are none."""
        ends = torch.tensor([len(picture.tiles) for picture in prompt.pictures]).cumsum(0).tolist()
        stop = (ends[-1] if ends else 0) if before is None else before
        starts = [end - len(picture.tiles) for end, picture in zip(ends, prompt.pictures, strict=True)]
        wanted = [i for i in range(len(ends)) if starts[i] < stop and ends[i] > after]
        if not wanted:
            return None
        pictures = [prompt.pictures[i] for i in wanted]
        found = self.features.features(
            pictures, encode=self.model.get_visual_features, version=self.model.encoder_version
        )
        return join(
            [features[max(0, after - starts[i]) : stop - starts[i]] for i, features in zip(wanted, found, strict=True)]
        )

    @torch.no_grad()
    def answer(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Generate after each of some prompts, all at once."""
        return self._answer_batch(prompts, None)

    @torch.no_grad()
    def go_on(self, prompt: Prompt, prefix: Prefix | None) -> tuple[list[int], Prefix | None]:
        """Generate after one prompt.

        Args:
            prefix: what was read before; it is used up, also where the call fails.

        Returns:
            The new ids, and what has been read now where a later call can go on from it.
        """
        if not self.generation.can_go_on(self.model):
            prefix = None
        known = prefix.reusable(prompt, slots=self.slots) if prefix else 0
        if prefix and known:
            prefix.cut(known, slots=self.slots)
            options = self.generation.with_cache(prefix.cache)
        else:
            prefix, options = None, self.generation.options
        ids, mask = rows_of_ids([prompt.ids], pad_token_id=self.generation.pad_token_id)
        features = self.visual_features(prompt, after=len(prefix.tile_keys) if prefix else 0)
        output = self._generate(ids, mask, features, {**options, "return_dict_in_generate": True})
        [answer] = new_ids(output, rows=1, length=len(prompt.ids))
        cache: Any = getattr(output, "past_key_values", None)
        if not (self.generation.can_go_on(self.model) and can_go_on(cache)):
            return answer, None
        # What the model wrote at the place of a feature is no picture's: nothing can be read on from there.
        written = [-1 if token_id == self.slots.token_id else token_id for token_id in answer]
        read = [*prompt.ids, *written][: cache.get_seq_length()]
        return answer, Prefix(read, prompt.tile_keys, cache)

    def answer_all(
        self, prompts: Sequence[Prompt], *, max_batch_tokens: int | None, retry: bool
    ) -> Iterator[tuple[int, list[int] | Exception]]:
        """Generate after many prompts: (index, new ids) as batches are finished.

        Args:
            max_batch_tokens: see `split_group`.
            retry: whether a batch that fails is tried again row by row; (index, exception) stands for rows that fail
                then. Else its exception is raised.
        """
        if not prompts:
            return
        can_share = len(prompts) > 1 and self.generation.can_share(self.model)
        groups = group_prompts(prompts, slots=self.slots) if can_share else [Group(list(range(len(prompts))), 0)]
        lengths = [len(prompt.ids) for prompt in prompts]
        new_tokens = self.generation.option("max_new_tokens", self.model) or 0
        for group in groups:
            prefix = None
            for batch in split_group(group, lengths, max_batch_tokens=max_batch_tokens, new_tokens=new_tokens):
                try:
                    with torch.no_grad():
                        if batch.shared and prefix is None:
                            prefix = self.read(prompts[batch.rows[0]], batch.shared)
                        answers = self._answer_batch([prompts[row] for row in batch.rows], prefix)
                except Exception as error:
                    if not retry:
                        raise
                    yield from self._one_by_one(prompts, batch.rows, error)
                else:
                    yield from zip(batch.rows, answers, strict=True)

    def read(self, prompt: Prompt, length: int) -> Prefix:
        """Read the first `length` tokens of a prompt into a KV cache."""
        tile_keys = prompt.tile_keys[: self.slots.whole_tiles(prompt.ids[:length])]
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        self.model(
            input_ids=torch.tensor([prompt.ids[:length]], device=self.model.input_device),  # [1, length]
            visual_features=self.visual_features(prompt, after=0, before=len(tile_keys)),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            prefill_chunk_size=self.generation.option("prefill_chunk_size", self.model),
        )
        return Prefix(prompt.ids[:length], tile_keys, cache)

    def _answer_batch(self, prompts: Sequence[Prompt], prefix: Prefix | None) -> list[list[int]]:
        options, lengths, known_tiles = self.generation.options, None, 0
        if prefix is not None:
            options = self.generation.with_cache(stack([prefix] * len(prompts)))
            lengths, known_tiles = [len(prefix.ids)] * len(prompts), len(prefix.tile_keys)
        rows = [prompt.ids for prompt in prompts]
        ids, mask = rows_of_ids(rows, pad_token_id=self.generation.pad_token_id, prefix_lengths=lengths)
        pictures = [picture for prompt in prompts for picture in prompt.pictures]
        pixels = None
        if pictures and prefix is None and self.features.max_bytes == 0 and not pictures[0].is_encoded:
            pixels, parts = join([picture.tiles for picture in pictures]), []
        else:
            parts = [self.visual_features(prompt, after=known_tiles) for prompt in prompts]
        output = self._generate(ids, mask, join(parts), options, pixels=pixels)
        return new_ids(output, rows=len(prompts), length=ids.shape[1])

    def _one_by_one(
        self, prompts: Sequence[Prompt], rows: Sequence[int], error: Exception
    ) -> Iterator[tuple[int, list[int] | Exception]]:
        for row in rows:
            try:
                if len(rows) == 1:
                    raise error
                [answer] = self.answer([prompts[row]])
            except Exception as own_error:
                yield row, own_error
            else:
                yield row, answer

    def _generate(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        features: torch.Tensor | None,
        options: dict[str, Any],
        *,
        pixels: torch.Tensor | None = None,
    ) -> Any:
        device = self.model.input_device
        named = {"visual_features": features, "pixel_values": pixels}
        pictures = {name: tiles for name, tiles in named.items() if tiles is not None}
        return self.model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), **pictures, **options)
