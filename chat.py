"""The chat calls of a model: questions, histories and pictures in, answers out (SPEC 6 and 7)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .answering import Answerer, Generation, check_batch_tokens, check_prompt, decode_answer
from .chat_arguments import (
    History,
    check_grids,
    check_history,
    check_placeholders,
    check_system_message,
    count_placeholders,
    read_pictures,
)
from .chat_samples import read_samples
from .conversation import ConversationTemplate, Segment, get_conv_template
from .feature_cache import DEFAULT_BYTES, FeatureCache
from .pictures import Picture
from .prefix import Prompt
from .prompt import (
    IMAGE_PLACEHOLDER,
    as_text,
    config_picture,
    encode_prompt,
    place_in_turns,
    place_pictures,
    render_turns,
)
from .session import ChatSession


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
        session: ChatSession | None = None,
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
            session: whose features and KV cache are used and added to, as far as this prompt begins like its last one;
                its history stays as it is.

        Raises:
            ValueError: what is passed does not fit together; the message says what was expected and what came.
        """
        system = self.system_message if system_message is None else check_system_message(system_message)
        return self._converse(
            tokenizer,
            read_pictures(self.config, pixel_values, visual_features, num_patches_list),
            question,
            generation_config,
            history,
            return_history=return_history,
            markers=(IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN),
            verbose=verbose,
            system=system,
            tile_grids=tile_grids,
            session=session,
        )

    def start_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        generation_config: dict[str, Any] | GenerationConfig | None = None,
        on_overflow: str = "error",
        feature_cache: FeatureCache | None = None,
    ) -> ChatSession:
        """A conversation that does not start over: see `ChatSession`, whose arguments these are.

        Args:
            feature_cache: None for the one that all sessions of this model share.
        """
        return ChatSession(
            self,
            tokenizer,
            system=self.system_message if system is None else check_system_message(system),
            generation_config=generation_config,
            on_overflow=on_overflow,
            feature_cache=self.feature_cache if feature_cache is None else feature_cache,
        )

    @property
    def feature_cache(self) -> FeatureCache:
        """Features of pictures, shared by all sessions that have no cache of their own; assign to change its budget."""
        return self.__dict__.setdefault("_feature_cache", FeatureCache())

    @feature_cache.setter
    def feature_cache(self, cache: FeatureCache) -> None:
        self.__dict__["_feature_cache"] = cache

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
            read_pictures(self.config, pixel_values, visual_features, num_patches_list),
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
        pictures = read_pictures(self.config, pixel_values, visual_features, num_patches_list)
        count = count_placeholders(question, [])
        if pictures and count == 0:
            question, count = f"{IMAGE_PLACEHOLDER}\n{question}", 1
        markers = (IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN)
        segments: list[Segment] = [question]
        if pictures:
            check_placeholders(count, pictures)
            segments = place_pictures(question, self._place(pictures, markers, tile_grids))
        answer = self._answer(tokenizer, segments, pictures, generation_config, verbose=verbose)
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
        max_batch_tokens: int | None = None,
        errors: str = "raise",
        on_answer: Callable[[int, str | Exception], None] | None = None,
    ) -> Any:
        """Answer several questions; greedy answers are those of `chat` one by one.

        A picture that several questions are about is encoded once, and what their prompts begin with is read once.

        Args:
            pixel_values: tiles of all pictures of all samples, in the samples' order.
            questions: one a sample. The `<image>` of a sample (history included) say how many pictures it takes;
                where there are fewer `<image>` than pictures, every first question without one gets one in front.
            num_patches_list: number of tiles of each picture, flat over the samples. None: one tile each where that
                fits the `<image>`, else a single picture.
            history: one history (or None) a sample.
            return_history: also return one history a sample.
            max_batch_tokens: most tokens that are generated from at once, padding and answers included: prompts of like
                length go together, however many calls of `generate` that takes. None: no limit.
            errors: "raise", or "return" to get the exception of a sample that fails in its place, and in its history no
                new turn.
            on_answer: called with a sample's index and its answer (or exception) as soon as its batch is finished.

        The other arguments are those of `chat`.

        Raises:
            ValueError: as in `chat`; also no questions, or another number of histories than of questions. With
                `errors="return"` only what concerns the whole call: which pictures are whose must be clear.
        """
        if errors not in ("raise", "return"):
            raise ValueError(f"errors is {errors!r}, expected 'raise' or 'return'.")
        check_batch_tokens(max_batch_tokens)
        samples = read_samples(
            questions, history, pixel_values, visual_features, num_patches_list, config=self.config, errors=errors
        )
        system = self.system_message if system_message is None else check_system_message(system_message)
        placed = self._place(
            [picture for sample in samples for picture in sample.pictures],
            (IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN),
            tile_grids,
        )
        generation = Generation.from_config(tokenizer, generation_config, sep=self.conv_template.sep)
        results: list[Any] = [sample.error for sample in samples]
        prompts: dict[int, Prompt] = {}
        texts: dict[int, str] = {}
        for i, sample in enumerate(samples):
            own, placed = placed[: len(sample.pictures)], placed[len(sample.pictures) :]
            if sample.error is not None:
                continue
            segments = self._render(sample.question, sample.history, own, system=system)
            prompt = Prompt(encode_prompt(tokenizer, segments), sample.pictures)
            try:
                check_prompt(prompt, config=self.config, tokenizer=tokenizer)
            except ValueError as error:
                if errors == "raise":
                    raise
                results[i] = error
            else:
                prompts[i] = prompt
                texts[i] = as_text(segments) if verbose else ""
        answerer = Answerer(self, generation, features=FeatureCache(max_bytes=DEFAULT_BYTES if len(prompts) > 1 else 0))
        rows = list(prompts)
        finished = answerer.answer_all(
            list(prompts.values()), max_batch_tokens=max_batch_tokens, retry=errors == "return"
        )
        for i in sorted(set(range(len(samples))) - set(rows)):
            if on_answer is not None:
                on_answer(i, results[i])
        for number, new in finished:
            i = rows[number]
            results[i] = new if isinstance(new, Exception) else decode_answer(tokenizer, generation, new)
            if verbose:
                print(texts[i], results[i], sep="")
            if on_answer is not None:
                on_answer(i, results[i])
        if not return_history:
            return results
        return results, [
            sample.history if isinstance(result, Exception) else [*sample.history, (sample.question, result)]
            for sample, result in zip(samples, results, strict=True)
        ]

    def _converse(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pictures: list[Picture],
        question: str,
        generation_config: dict[str, Any] | GenerationConfig | None,
        history: History | None,
        *,
        return_history: bool,
        markers: tuple[str, str, str],
        verbose: bool,
        system: str | None,
        tile_grids: Sequence[tuple[int, int]] | None,
        session: ChatSession | None = None,
    ) -> str | tuple[str, list[tuple[str, str]]]:
        turns = check_history(history)
        count = count_placeholders(question, turns)
        if pictures and not turns and count == 0:
            question, count = f"{IMAGE_PLACEHOLDER}\n{question}", 1
        if pictures:
            check_placeholders(count, pictures)
        placed = self._place(pictures, markers, tile_grids)
        segments = self._render(question, turns, placed, system=system)
        answer = self._answer(tokenizer, segments, pictures, generation_config, verbose=verbose, session=session)
        return (answer, [*turns, (question, answer)]) if return_history else answer

    def _render(
        self, question: str, history: History, placed: Sequence[Sequence[Segment]], *, system: str | None
    ) -> list[Segment]:
        questions = place_in_turns([*(asked for asked, _ in history), question], placed)
        answers = [*(answer for _, answer in history), None]
        return render_turns(self.conv_template, list(zip(questions, answers, strict=True)), system=system)

    def _place(
        self,
        pictures: Sequence[Picture],
        markers: tuple[str, str, str],
        tile_grids: Sequence[tuple[int, int]] | None,
    ) -> list[list[Segment]]:
        """What stands in the prompt for each picture."""
        start, end, image_token = markers
        grids = check_grids(tile_grids, count=len(pictures))
        return [
            config_picture(self.config, len(picture.tiles), image_token=image_token, grid=grid, start=start, end=end)
            for picture, grid in zip(pictures, grids, strict=True)
        ]

    def _answer(
        self,
        tokenizer: PreTrainedTokenizerBase,
        segments: Sequence[Segment],
        pictures: list[Picture],
        generation_config: dict[str, Any] | GenerationConfig | None,
        *,
        verbose: bool,
        session: ChatSession | None = None,
    ) -> str:
        """Generate after one prompt and decode what is new, up to the template's `sep`."""
        generation = Generation.from_config(tokenizer, generation_config, sep=self.conv_template.sep)
        prompt = Prompt(encode_prompt(tokenizer, segments), pictures)
        check_prompt(prompt, config=self.config, tokenizer=tokenizer)
        if session is None:
            [new] = Answerer(self, generation, features=FeatureCache(max_bytes=0)).answer([prompt])
        else:
            new = session.generate_after(prompt, generation)
        answer = decode_answer(tokenizer, generation, new)
        if verbose:
            print(as_text(segments), answer, sep="")
        return answer
