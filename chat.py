"""The chat calls of a model: questions, histories and pictures in, answers out (SPEC 6 and 7)."""

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .conversation import ConversationTemplate, Message, Segment, get_conv_template
from .prompt import (
    IMAGE_PLACEHOLDER,
    as_text,
    control_token_id,
    encode_prompt,
    picture_segments,
    place_pictures,
)
from .tile_tags import tile_tags

History = Sequence[tuple[str, str]]
ONE_HISTORY = "hold one history (or None) a question"


@dataclass(frozen=True)
class Pictures:
    """The tiles of all pictures of a call, one after the other, and how many tiles each picture has."""

    pixel_values: torch.Tensor | None  # [tiles, C, S, S]
    visual_features: torch.Tensor | None  # [tiles, tokens, D]
    num_tiles: list[int]


def check_history(history: History | None) -> list[tuple[str, str]]:
    """A copy of a history.

    Raises:
        ValueError: it is not a sequence of (question, answer) pairs of text.
    """
    if history is None:
        return []
    expected = "history must be None or a list of (question, answer) pairs of str, as chat(return_history=True) gives"
    if isinstance(history, (str, bytes, dict)) or not isinstance(history, Iterable):
        raise ValueError(f"{expected}; got {type(history).__name__}.")
    turns = list(history)
    for i, turn in enumerate(turns):
        is_pair = isinstance(turn, (tuple, list)) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        if not is_pair:
            raise ValueError(f"{expected}; entry {i} is {turn!r:.80}.")
    return [(question, answer) for question, answer in turns]


def check_tiles(tiles: torch.Tensor, *, name: str, expected: tuple[int, ...], meaning: str) -> None:
    """Check the tensor that a picture came as.

    Raises:
        ValueError: it is not a finite float tensor of shape (tiles, *expected) with at least one tile.
    """
    if not isinstance(tiles, torch.Tensor):
        raise ValueError(
            f"{name} must be a float tensor or None, got {type(tiles).__name__}: load_image() makes such pixel_values."
        )
    if tiles.ndim != len(expected) + 1 or tuple(tiles.shape[1:]) != expected:
        sizes = ", ".join(map(str, expected))
        raise ValueError(f"{name} must have the shape (tiles, {sizes}), {meaning}, got {tuple(tiles.shape)}.")
    if tiles.shape[0] == 0:
        raise ValueError(f"{name} has no tiles: an empty picture. Pass None for a question without pictures.")
    if not tiles.is_floating_point():
        raise ValueError(f"{name} must be normalised float values, got {tiles.dtype}: load_image() makes them.")
    if not torch.isfinite(tiles).all():
        raise ValueError(f"{name} holds NaN or infinite values: expected finite ones, as load_image() makes them.")


def count_placeholders(question: str, history: History) -> int:
    """How many `<image>` the user's turns hold; answers and the system message are never read for them.

    Raises:
        ValueError: the question is not text.
    """
    if not isinstance(question, str):
        raise ValueError(f"A question must be a str, got {type(question).__name__}.")
    return sum(text.count(IMAGE_PLACEHOLDER) for text in [question, *(turn[0] for turn in history)])


def check_list(value: Any, *, name: str, meaning: str) -> list[Any]:
    """A list of what a sequence holds.

    Raises:
        ValueError: it is no sequence, or it is text or a dict.
    """
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must {meaning}, got {value!r:.80}.")
    return list(value)


def check_system_message(text: Any) -> str:
    """The system message itself.

    Raises:
        ValueError: it is not text.
    """
    if not isinstance(text, str):
        raise ValueError(f"system_message must be a str, got {type(text).__name__}.")
    return text


def ends_stream(method: Callable[..., Any]) -> Callable[..., Any]:
    """A chat call that ends its `streamer` when it fails: who reads it in another thread must not wait for ever."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except BaseException:
            for argument in (*args, *kwargs.values()):
                if isinstance(argument, dict) and argument.get("streamer") is not None:
                    argument["streamer"].end()
            raise

    return call


class ChatMixin:
    """`chat` and its kin for a model with `config`, `generate`, `get_image_features` and `project`."""

    config: Any

    @property
    def conv_template(self) -> ConversationTemplate:
        """The conversation template of the config; streaming scripts read its `sep`."""
        return get_conv_template(self.config.template)

    @property
    def system_message(self) -> str:
        """The system message of calls that give none; assign to change it."""
        return getattr(self, "_system_message", self.conv_template.system_message)

    @system_message.setter
    def system_message(self, text: str) -> None:
        self._system_message = check_system_message(text)

    @ends_stream
    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pixel_values: torch.Tensor | None,
        question: str,
        generation_config: dict[str, Any] | GenerationConfig | None = None,
        history: History | None = None,
        return_history: bool = False,
        num_patches_list: Sequence[int] | None = None,
        IMG_START_TOKEN: str = "<Image>",
        IMG_END_TOKEN: str = "</Image>",
        IMG_CONTEXT_TOKEN: str = "<|vision_pad|>",
        verbose: bool = False,
        visual_features: torch.Tensor | None = None,
        *,
        system_message: str | None = None,
        tile_grids: Sequence[tuple[int, int]] | None = None,
    ) -> str | tuple[str, list[tuple[str, str]]]:
        """Answer one question, with its conversation before it.

        Args:
            tokenizer: the checkpoint's tokenizer.
            pixel_values: (tiles, 3, 448, 448) of all pictures of the conversation in order, from `load_image`; or None.
            question: the user's text; each `<image>` stands for a picture. A first question without one gets
                `<image>` and a newline put in front.
            generation_config: what `generate` takes, as a dict or a `GenerationConfig`; may hold a `streamer`.
            history: (question, answer) pairs of the turns before.
            return_history: also return the history with this turn appended, as a new list.
            num_patches_list: number of tiles of each picture; None for a single picture.
            IMG_START_TOKEN, IMG_END_TOKEN: text around a picture.
            IMG_CONTEXT_TOKEN: the special token at which features stand.
            verbose: print the prompt and the answer.
            visual_features: (tiles, 256, 12800) pixel-shuffled features, to use in the place of the pixels.
            system_message: in the place of the model's `system_message`.
            tile_grids: (columns, rows) of each picture, for the 2-D tile tags.

        Raises:
            ValueError: what is passed does not fit together; the message says what was expected and what came.
        """
        system = self.system_message if system_message is None else check_system_message(system_message)
        return self._converse(
            tokenizer,
            self._pictures(pixel_values, visual_features, num_patches_list),
            question,
            generation_config,
            history,
            return_history=return_history,
            markers=(IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN),
            verbose=verbose,
            system=system,
            tile_grids=tile_grids,
        )

    @ends_stream
    def chat_without_sys_prompt(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pixel_values: torch.Tensor | None,
        question: str,
        generation_config: dict[str, Any] | GenerationConfig | None = None,
        history: History | None = None,
        return_history: bool = False,
        num_patches_list: Sequence[int] | None = None,
        IMG_START_TOKEN: str = "<Image>",
        IMG_END_TOKEN: str = "</Image>",
        IMG_CONTEXT_TOKEN: str = "<|vision_pad|>",
        verbose: bool = False,
        visual_features: torch.Tensor | None = None,
        *,
        tile_grids: Sequence[tuple[int, int]] | None = None,
    ) -> str | tuple[str, list[tuple[str, str]]]:
        """`chat` with a prompt that starts at the user's turn (the released code left half a system turn; SPEC 9)."""
        return self._converse(
            tokenizer,
            self._pictures(pixel_values, visual_features, num_patches_list),
            question,
            generation_config,
            history,
            return_history=return_history,
            markers=(IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN),
            verbose=verbose,
            system=None,
            tile_grids=tile_grids,
        )

    @ends_stream
    def chat_without_chat_prompt(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pixel_values: torch.Tensor | None,
        question: str,
        generation_config: dict[str, Any] | GenerationConfig | None = None,
        history: History | None = None,
        return_history: bool = False,
        num_patches_list: Sequence[int] | None = None,
        IMG_START_TOKEN: str = "<Image>",
        IMG_END_TOKEN: str = "</Image>",
        IMG_CONTEXT_TOKEN: str = "<|vision_pad|>",
        verbose: bool = False,
        visual_features: torch.Tensor | None = None,
        *,
        tile_grids: Sequence[tuple[int, int]] | None = None,
    ) -> str | tuple[str, list[tuple[str, str]]]:
        """Continue `question` as bare text: no system message, no turns, so no history before it.

        Raises:
            ValueError: as in `chat`, or a history is passed.
        """
        if check_history(history):
            raise ValueError(
                "chat_without_chat_prompt has no turns and so takes no history: use chat for conversations."
            )
        pictures = self._pictures(pixel_values, visual_features, num_patches_list)
        count = count_placeholders(question, [])
        if pictures.num_tiles and count == 0:
            question, count = f"{IMAGE_PLACEHOLDER}\n{question}", 1
        markers = (IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN)
        segments: list[Segment] = [question]
        if pictures.num_tiles:
            self._check_placeholders(count, pictures.num_tiles)
            segments = place_pictures(question, self._picture_segments(pictures.num_tiles, markers, tile_grids))
        [answer] = self._answer(tokenizer, [segments], pictures, generation_config, verbose=verbose)
        return (answer, [(question, answer)]) if return_history else answer

    @ends_stream
    def batch_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pixel_values: torch.Tensor | None,
        questions: Sequence[str],
        generation_config: dict[str, Any] | GenerationConfig | None = None,
        num_patches_list: Sequence[int] | None = None,
        history: Sequence[History | None] | None = None,
        return_history: bool = False,
        IMG_START_TOKEN: str = "<Image>",
        IMG_END_TOKEN: str = "</Image>",
        IMG_CONTEXT_TOKEN: str = "<|vision_pad|>",
        verbose: bool = False,
        visual_features: torch.Tensor | None = None,
        *,
        system_message: str | None = None,
        tile_grids: Sequence[tuple[int, int]] | None = None,
    ) -> list[str] | tuple[list[str], list[list[tuple[str, str]]]]:
        """Answer several questions at once; greedy answers are those of `chat` one by one.

        Args:
            pixel_values: tiles of all pictures of all samples, in the samples' order.
            questions: one a sample. The `<image>` of a sample (history included) say how many pictures it takes;
                where there are fewer `<image>` than pictures, every first question without one gets one in front.
            num_patches_list: number of tiles of each picture, flat over the samples. None: one tile each where that
                fits the `<image>`, else a single picture.
            history: one history (or None) a sample.
            return_history: also return one history a sample.

        The other arguments are those of `chat`.

        Raises:
            ValueError: as in `chat`; also no questions, or another number of histories than of questions.
        """
        questions = check_list(questions, name="questions", meaning="be a list of at least one question")
        if not questions:
            raise ValueError("questions must be a list of at least one question, got [].")
        given = [None] * len(questions) if history is None else check_list(history, name="history", meaning=ONE_HISTORY)
        if len(given) != len(questions):
            raise ValueError(f"history must {ONE_HISTORY}: {len(questions)} expected, got {len(given)}.")
        histories = [check_history(turns) for turns in given]
        counts = [count_placeholders(question, turns) for question, turns in zip(questions, histories, strict=True)]
        tiles = visual_features if pixel_values is None else pixel_values
        if (
            num_patches_list is None
            and isinstance(tiles, torch.Tensor)
            and len(tiles) == (sum(counts) or len(questions))
        ):
            num_patches_list = [1] * len(tiles)
        pictures = self._pictures(pixel_values, visual_features, num_patches_list)
        if sum(counts) < len(pictures.num_tiles):
            bare = [not (count or turns) for count, turns in zip(counts, histories, strict=True)]
            questions = [
                f"{IMAGE_PLACEHOLDER}\n{question}" if is_bare else question
                for question, is_bare in zip(questions, bare, strict=True)
            ]
            counts = [count + is_bare for count, is_bare in zip(counts, bare, strict=True)]
        if pictures.num_tiles:
            self._check_placeholders(sum(counts), pictures.num_tiles)
        system = self.system_message if system_message is None else check_system_message(system_message)
        markers = (IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN)
        placed = self._picture_segments(pictures.num_tiles, markers, tile_grids)
        prompts = []
        for question, turns, count in zip(questions, histories, counts, strict=True):
            own, placed = placed[:count], placed[count:]
            prompts.append(self._render(question, turns, own, system=system))
        answers = self._answer(tokenizer, prompts, pictures, generation_config, verbose=verbose)
        if not return_history:
            return answers
        return answers, [
            [*turns, (question, answer)] for turns, question, answer in zip(histories, questions, answers, strict=True)
        ]

    def _converse(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pictures: Pictures,
        question: str,
        generation_config: dict[str, Any] | GenerationConfig | None,
        history: History | None,
        *,
        return_history: bool,
        markers: tuple[str, str, str],
        verbose: bool,
        system: str | None,
        tile_grids: Sequence[tuple[int, int]] | None,
    ) -> str | tuple[str, list[tuple[str, str]]]:
        turns = check_history(history)
        count = count_placeholders(question, turns)
        if pictures.num_tiles and not turns and count == 0:
            question, count = f"{IMAGE_PLACEHOLDER}\n{question}", 1
        if pictures.num_tiles:
            self._check_placeholders(count, pictures.num_tiles)
        placed = self._picture_segments(pictures.num_tiles, markers, tile_grids)
        segments = self._render(question, turns, placed, system=system)
        [answer] = self._answer(tokenizer, [segments], pictures, generation_config, verbose=verbose)
        return (answer, [*turns, (question, answer)]) if return_history else answer

    def _pictures(
        self,
        pixel_values: torch.Tensor | None,
        visual_features: torch.Tensor | None,
        num_patches_list: Sequence[int] | None,
    ) -> Pictures:
        config = self.config
        if pixel_values is not None:
            shape = (config.vision_config.num_channels, config.tile_size, config.tile_size)
            check_tiles(pixel_values, name="pixel_values", expected=shape, meaning="channels and the sides of a tile")
        if visual_features is not None:
            tokens = (config.num_image_token, config.shuffled_width)
            check_tiles(visual_features, name="visual_features", expected=tokens, meaning="tokens and width of a tile")
            if pixel_values is not None and len(pixel_values) != len(visual_features):
                raise ValueError(
                    f"visual_features are of {len(visual_features)} tiles, but pixel_values of {len(pixel_values)}."
                )
        tiles = pixel_values if visual_features is None else visual_features
        total = 0 if tiles is None else len(tiles)
        meaning = f"give each picture's number of tiles, {total} together"
        if num_patches_list is None:
            num_tiles = [total] if total else []
        else:
            num_tiles = check_list(num_patches_list, name="num_patches_list", meaning=meaning)
        if not all(type(n) is int and n >= 1 for n in num_tiles) or sum(num_tiles) != total:
            without = "" if total else " without pixel_values"
            raise ValueError(f"num_patches_list must {meaning}, got {num_tiles}{without}.")
        return Pictures(pixel_values, visual_features, num_tiles)

    def _check_placeholders(self, num_placeholders: int, num_tiles: Sequence[int]) -> None:
        if num_placeholders != len(num_tiles):
            raise ValueError(
                f"The questions hold {num_placeholders} {IMAGE_PLACEHOLDER!r}, but {len(num_tiles)} pictures were "
                f"passed (tiles: {list(num_tiles)}). Write one {IMAGE_PLACEHOLDER!r} a picture, earlier turns' "
                "included, and give num_patches_list the number of tiles of each."
            )

    def _picture_segments(
        self,
        num_tiles: Sequence[int],
        markers: tuple[str, str, str],
        tile_grids: Sequence[tuple[int, int]] | None,
    ) -> list[list[Segment]]:
        meaning = f"hold one (columns, rows) a picture, {len(num_tiles)}"
        grids = (
            [None] * len(num_tiles)
            if tile_grids is None
            else check_list(tile_grids, name="tile_grids", meaning=meaning)
        )
        if len(grids) != len(num_tiles):
            raise ValueError(f"tile_grids must {meaning}, got {len(grids)}.")
        start, end, image_token = markers
        config = self.config
        return [
            picture_segments(
                tile_tags(
                    n,
                    kind=config.tile_tag,
                    thumbnail_tag=config.thumbnail_tag,
                    has_thumbnail=config.use_thumbnail,
                    grid=grid,
                    tile_size=config.tile_size,
                ),
                num_image_token=config.num_image_token,
                image_token=image_token,
                start=start,
                end=end,
            )
            for n, grid in zip(num_tiles, grids, strict=True)
        ]

    def _render(
        self, question: str, turns: History, placed: Sequence[Sequence[Segment]], *, system: str | None
    ) -> list[Segment]:
        messages = [] if system is None else [Message("system", system)]
        remaining = list(placed)
        for user, answer in [*turns, (question, None)]:
            content: list[Segment] = [user]
            if placed:
                count = user.count(IMAGE_PLACEHOLDER)
                content, remaining = place_pictures(user, remaining[:count]), remaining[count:]
            messages.append(Message("user", content))
            if answer is not None:
                messages.append(Message("assistant", answer))
        return self.conv_template.render(messages)

    @torch.no_grad()
    def _answer(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[Segment]],
        pictures: Pictures,
        generation_config: dict[str, Any] | GenerationConfig | None,
        *,
        verbose: bool,
    ) -> list[str]:
        """Generate after each prompt and decode what is new, up to the template's `sep`."""
        options, pad_token_id = self._generation_options(tokenizer, generation_config)
        sequences = [encode_prompt(tokenizer, segments) for segments in prompts]
        self._check_sequences(tokenizer, sequences, pictures)
        inputs = self._left_padded(sequences, pad_token_id=pad_token_id)
        if pictures.visual_features is not None:
            inputs["visual_features"] = pictures.visual_features
        elif pictures.pixel_values is not None:
            inputs["pixel_values"] = pictures.pixel_values
        output = self.generate(**inputs, **options)  # type: ignore[attr-defined]
        output = getattr(output, "sequences", output)
        output = output[:: len(output) // len(prompts), inputs["input_ids"].shape[1] :]
        sep = control_token_id(tokenizer, self.conv_template.sep)
        rows = [row[: row.index(sep)] if sep in row else row for row in output.tolist()]
        answers = [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
        if verbose:
            for segments, answer in zip(prompts, answers, strict=True):
                print(as_text(segments), answer, sep="")
        return answers

    def _generation_options(
        self, tokenizer: PreTrainedTokenizerBase, generation_config: dict[str, Any] | GenerationConfig | None
    ) -> tuple[dict[str, Any], int]:
        """Keyword arguments of `generate` as a new dict (the caller's is never changed), and the padding's id."""
        sep = control_token_id(tokenizer, self.conv_template.sep)
        defaults = {
            "eos_token_id": sep,
            "pad_token_id": sep if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        }
        if generation_config is None or isinstance(generation_config, dict):
            options = dict(generation_config or {})
            options |= {name: value for name, value in defaults.items() if options.get(name) is None}
            return options, options["pad_token_id"]
        if isinstance(generation_config, GenerationConfig):
            own = copy.deepcopy(generation_config)
            for name, value in defaults.items():
                if getattr(own, name) is None:
                    setattr(own, name, value)
            return {"generation_config": own}, own.pad_token_id
        raise ValueError(
            f"generation_config must be a dict or a GenerationConfig, got {type(generation_config).__name__}."
        )

    def _check_sequences(
        self, tokenizer: PreTrainedTokenizerBase, sequences: Sequence[Sequence[int]], pictures: Pictures
    ) -> None:
        """Check that the decoder can read the prompts, and that there is one place for each feature.

        Raises:
            ValueError: an empty or too long prompt, or a tokenizer that is not the checkpoint's.
        """
        if not all(sequences):
            raise ValueError("The prompt is empty: expected at least one character of text, or a picture.")
        longest, limit = max(map(len, sequences)), self.config.position_limit
        if longest >= limit:
            raise ValueError(
                f"The prompt is {longest} tokens long, but the decoder has {limit} positions, the answer included: "
                "shorten the history, or pass fewer pictures or fewer tiles (max_num)."
            )
        largest, vocabulary = max(map(max, sequences)), self.config.llm_config.vocab_size
        if largest >= vocabulary:
            raise ValueError(
                f"The prompt holds token id {largest}, but the decoder knows {vocabulary} tokens: the tokenizer "
                f"({len(tokenizer)} tokens) is not the checkpoint's, or the embeddings were not resized for it."
            )
        slots = sum(sequence.count(self.config.image_token_id) for sequence in sequences)
        expected = sum(pictures.num_tiles) * self.config.num_image_token
        if slots != expected:
            raise ValueError(
                f"The prompt holds {slots} tokens of id {self.config.image_token_id} (the config's image_token_id) for "
                f"{expected} features of pictures: the tokenizer or IMG_CONTEXT_TOKEN is not the checkpoint's."
            )

    def _left_padded(self, sequences: Sequence[Sequence[int]], *, pad_token_id: int) -> dict[str, torch.Tensor]:
        longest = max(map(len, sequences))
        ids = [[pad_token_id] * (longest - len(sequence)) + list(sequence) for sequence in sequences]
        mask = [[0] * (longest - len(sequence)) + [1] * len(sequence) for sequence in sequences]
        device = self.input_device  # type: ignore[attr-defined]
        return {
            "input_ids": torch.tensor(ids, device=device),  # [B, L]
            "attention_mask": torch.tensor(mask, device=device),  # [B, L]
        }
