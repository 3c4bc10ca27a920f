"""A conversation that does not start over: pictures are encoded once, and every token is read once."""

import json
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from .answering import Answerer, Generation, check_prompt, decode_answer
from .chat_arguments import check_grids, check_placeholders, check_system_message, count_placeholders, read_pictures
from .conversation import CONTROL_TOKENS, IMAGE_TOKEN, Content, Tokens, get_conv_template
from .feature_cache import FeatureCache
from .pictures import Picture
from .prefix import Prefix, Prompt
from .preprocessing import load_image, open_picture, tile_grid
from .prompt import IMAGE_PLACEHOLDER, config_picture, control_token_id, encode_prompt, place_in_turns, render_turns

ON_OVERFLOW = ("error", "drop_oldest_turn")
FORMAT = "nvlm chat session 1"


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    Args:
        question: the user's text, with `<image>` where its pictures stand.
        pictures: the question's own.
        grids: (columns, rows) of each picture's tiles, None where it is not known.
        answer: what the model wrote; None while it is to come.
    """

    question: str
    pictures: list[Picture]
    grids: list[tuple[int, int] | None]
    answer: Tokens | None = None


class ChatSession:
    """A conversation of a model: `model.start_chat(tokenizer)`.

    Greedy answers are those of the stateless `chat()` with the same history, wherever an answer's text comes back from
    the tokenizer as the ids that the model wrote. Where it does not, the session goes on from the ids.

    A failed call leaves the conversation as it was. One call at a time: a session belongs to one user.

    Args:
        model: an `NVLM_D_Model`.
        tokenizer: the checkpoint's.
        system: the system message.
        generation_config: for all answers, as `chat()` takes it; `ask` may give another.
        on_overflow: what happens where a question does not fit into the decoder's positions: "error", before any work,
            or "drop_oldest_turn", as many of them as it takes, so that the answer's `max_new_tokens` fit too.
        feature_cache: of pictures' features; sessions may share one.

    Raises:
        ValueError: an argument that is none of these.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str,
        feature_cache: FeatureCache,
        generation_config: dict[str, Any] | GenerationConfig | None = None,
        on_overflow: str = "error",
    ) -> None:
        if on_overflow not in ON_OVERFLOW:
            raise ValueError(f"on_overflow is {on_overflow!r}, expected one of {list(ON_OVERFLOW)}.")
        self.model = model
        self.tokenizer = tokenizer
        self.system = check_system_message(system)
        self.feature_cache = feature_cache
        self.generation_config = generation_config
        self.on_overflow = on_overflow
        self._turns: list[Turn] = []
        self._prefix: Prefix | None = None
        self._in_use = threading.Lock()

    @property
    def history(self) -> list[tuple[str, str]]:
        """(question, answer) pairs, as `chat(history=...)` takes them; a new list."""
        return [(turn.question, str(turn.answer)) for turn in self._turns]

    @property
    def nbytes(self) -> int:
        """Bytes of the KV cache and of the pictures' tiles; features are counted by the feature cache."""
        tiles = sum(picture.tiles.nbytes for turn in self._turns for picture in turn.pictures)
        return tiles + (self._prefix.nbytes if self._prefix else 0)

    def ask(
        self,
        question: str,
        images: Sequence[Any] | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        num_patches_list: Sequence[int] | None = None,
        visual_features: torch.Tensor | None = None,
        tile_grids: Sequence[tuple[int, int]] | None = None,
        generation_config: dict[str, Any] | GenerationConfig | None = None,
    ) -> str:
        """Ask the next question and get its answer.

        Args:
            question: the user's text; each `<image>` stands for one of its new pictures. Without any, the pictures
                stand in front of it.
            images: the new pictures, whatever `load_image` reads; or give their tiles yourself:
            pixel_values, num_patches_list, visual_features, tile_grids: of the new pictures, as in `chat()`.
            generation_config: for this answer, in the place of the session's.

        Raises:
            ValueError: what is passed does not fit together, or into the decoder's positions.
            RuntimeError: another call of this session is not finished.
        """
        with self._alone():
            turn = self._new_turn(question, images, pixel_values, num_patches_list, visual_features, tile_grids)
            return self._answer(*self._prepare(turn, generation_config))

    def stream(
        self,
        question: str,
        images: Sequence[Any] | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        num_patches_list: Sequence[int] | None = None,
        visual_features: torch.Tensor | None = None,
        tile_grids: Sequence[tuple[int, int]] | None = None,
        generation_config: dict[str, Any] | GenerationConfig | None = None,
    ) -> Generator[str, None, None]:
        """`ask`, piece by piece. What is wrong with the question is raised here, before the first piece is asked for.

        Closing the iterator early stops the answer; what the model wrote until then stays in the history.
        """
        with self._alone():
            turn = self._new_turn(question, images, pixel_values, num_patches_list, visual_features, tile_grids)
            prepared = self._prepare(turn, generation_config)
        return self._stream(*prepared)

    def undo(self) -> bool:
        """Forget the last turn; False if there is none."""
        with self._alone():
            if not self._turns:
                return False
            self._turns = self._turns[:-1]
            return True

    def fork(self) -> "ChatSession":
        """A second session that goes its own way from here; what was read so far is shared, not copied."""
        with self._alone():
            forked = ChatSession(
                self.model,
                self.tokenizer,
                system=self.system,
                feature_cache=self.feature_cache,
                generation_config=self.generation_config,
                on_overflow=self.on_overflow,
            )
            forked._turns = list(self._turns)
            forked._prefix = self._prefix.fork() if self._prefix else None
            return forked

    def save(self, path: str | Path) -> None:
        """Write the conversation with its pictures' tiles to one safetensors file; the KV cache is read anew later."""
        with self._alone():
            tiles = {
                f"{i}.{j}": picture.tiles.detach().cpu().contiguous()
                for i, turn in enumerate(self._turns)
                for j, picture in enumerate(turn.pictures)
            }
            turns = [
                {
                    "question": turn.question,
                    "answer": str(turn.answer),
                    "answer_ids": list(turn.answer.ids) if turn.answer else [],
                    "is_encoded": [picture.is_encoded for picture in turn.pictures],
                    "grids": turn.grids,
                }
                for turn in self._turns
            ]
            said = json.dumps({"system": self.system, "turns": turns})
            save_file(tiles, path, metadata={"format": FORMAT, "session": said})

    def load(self, path: str | Path) -> None:
        """Go on with a conversation that `save` wrote, in the place of this one.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, no session, or one of another kind of model.
        """
        with self._alone():
            system, turns = self._read(path)
            self.system, self._turns, self._prefix = system, turns, None

    def generate_after(self, prompt: Prompt, generation: Generation) -> list[int]:
        """New ids after a prompt, with this session's features and KV cache; `chat(session=...)` calls it."""
        with self._alone():
            return self._generate(Prompt(prompt.ids, [self._own(picture) for picture in prompt.pictures]), generation)

    @property
    def is_answering(self) -> bool:
        """Whether a call is not finished yet."""
        return self._in_use.locked()

    def _take(self) -> None:
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError(
                "This session is answering: wait for it, close its stream, or fork() the session before."
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._take()
        try:
            yield
        finally:
            self._in_use.release()

    def _new_turn(
        self,
        question: str,
        images: Sequence[Any] | None,
        pixel_values: torch.Tensor | None,
        num_patches_list: Sequence[int] | None,
        visual_features: torch.Tensor | None,
        tile_grids: Sequence[tuple[int, int]] | None,
    ) -> Turn:
        count = count_placeholders(question, [])
        if images is not None:
            if not (pixel_values is None and visual_features is None):
                raise ValueError("Pass pictures once: as images, or as pixel_values or visual_features.")
            pictures, grids = self._load(images)
        else:
            pictures = read_pictures(self.model.config, pixel_values, visual_features, num_patches_list)
            grids = check_grids(tile_grids, count=len(pictures))
        if pictures and count == 0:
            question, count = f"{IMAGE_PLACEHOLDER}\n" * len(pictures) + question, len(pictures)
        if pictures or any(turn.pictures for turn in self._turns):
            check_placeholders(count, pictures)
        return Turn(question, [self._own(picture) for picture in pictures], grids)

    def _load(self, images: Sequence[Any]) -> tuple[list[Picture], list[tuple[int, int] | None]]:
        config = self.model.config
        least, most = (config.min_dynamic_patch, config.max_dynamic_patch) if config.dynamic_image_size else (1, 1)
        bounds = {"min_num": least, "max_num": most}
        pictures: list[Picture] = []
        grids: list[tuple[int, int] | None] = []
        for i, image in enumerate(images):
            picture = open_picture(image, f"images[{i}]")
            tiles = load_image(picture, config.tile_size, use_thumbnail=config.use_thumbnail, **bounds)
            pictures.append(Picture(tiles, is_encoded=False))
            grids.append(tile_grid(*picture.size, image_size=config.tile_size, **bounds))
        return pictures, grids

    def _own(self, picture: Picture) -> Picture:
        """A picture that stays as it is whatever the caller does to its tensor, in the dtype that the encoder takes."""
        dtype = picture.tiles.dtype if picture.is_encoded else self.model.vision_model.dtype
        return Picture(picture.tiles.detach().to("cpu", dtype, copy=True), picture.is_encoded)

    def _prepare(
        self, turn: Turn, generation_config: dict[str, Any] | GenerationConfig | None
    ) -> tuple[list[Turn], Prompt, Generation]:
        """The turns that are kept, with the new one; their prompt; and how to answer it."""
        config = self.generation_config if generation_config is None else generation_config
        sep = get_conv_template(self.model.config.template).sep
        generation = Generation.from_config(self.tokenizer, config, sep=sep)
        turns = [*self._turns, turn]
        prompt = self._prompt(turns)
        if self.on_overflow == "drop_oldest_turn":
            room = self.model.config.position_limit - (generation.option("max_new_tokens", self.model) or 1)
            while len(prompt.ids) > room and len(turns) > 1:
                turns = turns[1:]
                prompt = self._prompt(turns)
        check_prompt(prompt, config=self.model.config, tokenizer=self.tokenizer)
        return turns, prompt, generation

    def _prompt(self, turns: Sequence[Turn]) -> Prompt:
        config = self.model.config
        template = get_conv_template(config.template)
        said: list[tuple[Content, Tokens | None]] = []
        for turn in turns:
            placed = [
                config_picture(config, len(picture.tiles), image_token=IMAGE_TOKEN, grid=grid)
                for picture, grid in zip(turn.pictures, turn.grids, strict=True)
            ]
            [question] = place_in_turns([turn.question], placed)
            said.append((question, turn.answer))
        segments = render_turns(template, said, system=self.system)
        return Prompt(encode_prompt(self.tokenizer, segments), [picture for turn in turns for picture in turn.pictures])

    def _answer(self, turns: list[Turn], prompt: Prompt, generation: Generation) -> str:
        new = self._generate(prompt, generation)
        text = decode_answer(self.tokenizer, generation, new)
        # When a prompt is read anew, such a token would open a turn or stand for a picture, whoever wrote it.
        ids = tuple(token_id for token_id in generation.cut_answer(new) if token_id not in self._control_ids)
        last = turns[-1]
        self._turns = [*turns[:-1], Turn(last.question, last.pictures, last.grids, Tokens(ids, text))]
        return text

    @property
    def _control_ids(self) -> set[int]:
        return {control_token_id(self.tokenizer, token) for token in CONTROL_TOKENS}

    def _generate(self, prompt: Prompt, generation: Generation) -> list[int]:
        answerer = Answerer(self.model, generation, features=self.feature_cache)
        prefix, self._prefix = self._prefix, None  # a call that fails may leave half a step in the cache
        new, self._prefix = answerer.go_on(prompt, prefix)
        return new

    def _stream(self, turns: list[Turn], prompt: Prompt, generation: Generation) -> Generator[str, None, None]:
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop = _Stop()
        options = dict(generation.options)
        options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or []), stop])
        streaming = Generation({**options, "streamer": streamer}, generation.pad_token_id, generation.sep_id)
        failures: list[BaseException] = []

        def answer() -> None:
            try:
                self._answer(turns, prompt, streaming)
            except BaseException as error:
                failures.append(error)
            finally:
                self._in_use.release()  # here and not by the reader, who may be interrupted while this goes on
                # Straight into the queue: the streamer's own end() decodes first, which may fail as well.
                streamer.text_queue.put(streamer.stop_signal)

        self._take()
        thread = threading.Thread(target=answer, daemon=True)
        try:
            thread.start()
        except BaseException:
            self._in_use.release()
            raise
        try:
            yield from streamer
        finally:
            stop.asked = True
            thread.join()
        if failures:
            raise failures[0]

    def _read(self, path: str | Path) -> tuple[str, list[Turn]]:
        damaged = f"{path} is no chat session that save() wrote"
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"{damaged}: its format is {metadata.get('format')!r}, expected {FORMAT!r}.")
                said = json.loads(metadata["session"])
                turns = [
                    self._read_turn(entry, [file.get_tensor(f"{i}.{j}") for j in range(len(entry["is_encoded"]))])
                    for i, entry in enumerate(said["turns"])
                ]
                return check_system_message(said["system"]), turns
        except (SafetensorError, LookupError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{damaged}: {error}") from error

    def _read_turn(self, entry: dict[str, Any], tiles: Sequence[torch.Tensor]) -> Turn:
        """One turn of a file; its pictures must be ones that this model could have been asked about.

        Raises:
            ValueError: they are not, or ids that no answer of this model holds.
        """
        config = self.model.config
        pictures: list[Picture] = []
        for part, is_encoded in zip(tiles, entry["is_encoded"], strict=True):
            pixels, features = (None, part) if is_encoded else (part, None)
            pictures += read_pictures(config, pixels, features, None)
        count = count_placeholders(entry["question"], [])
        if pictures:
            check_placeholders(count, pictures)
        ids = entry["answer_ids"]
        vocabulary = config.llm_config.vocab_size
        control = self._control_ids
        if not all(
            type(token_id) is int and 0 <= token_id < vocabulary and token_id not in control for token_id in ids
        ):
            raise ValueError("An answer of the session holds ids that are no text of this model's vocabulary.")
        grids = [None if grid is None else (int(grid[0]), int(grid[1])) for grid in entry["grids"]]
        return Turn(
            entry["question"],
            pictures,
            check_grids(grids, count=len(pictures)),
            Tokens(tuple(ids), str(entry["answer"])),
        )


class _Stop(StoppingCriteria):
    """Ends generation when it is asked to."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked, device=input_ids.device)
