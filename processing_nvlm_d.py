"""Text, pictures and videos to what `generate` takes: the processor of NVLM-D (SPEC 5 and 6).

Two ways lead to the prompts that `chat()` makes:

- `apply_chat_template(messages, tokenize=True, ...)` knows what users wrote: it never becomes a control token and never
  stands for a picture (SPEC 9).
- `processor(text=..., images=...)` gets strings, and so takes every special token and `<image>` in them for what it
  says. It is for prompts that were rendered from text that is trusted.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.utils.chat_template_utils import get_json_schema, render_jinja_template

from .configuration_nvlm_d import NVLM_D_Config
from .conversation import Segment
from .image_processing_nvlm_d import NVLM_D_ImageProcessor, NVLM_D_ImagesKwargs, flatten_pictures, tile_side
from .messages import Shield, split_batch, take_visuals
from .placeholders import Piece, Visual, Visuals, replacement_offsets
from .preprocessing import load_images  # noqa: F401 (transformers 4.57 copies only what this file itself imports)
from .prompt import IMAGE_PLACEHOLDER, as_text, control_token_id, encode_prompt, picture_segments, place_pictures
from .tile_tags import TAG_KINDS, tile_tags
from .token_rows import pad, shorten, token_marks
from .video import frame_indices, load_video, video_prefix

FLAGS = ("return_mm_token_type_ids", "return_text_replacement_offsets")
VIDEO_OPTIONS = ("num_frames", "do_sample_frames")
# Options of text that a row of segments can have; all others need the tokenizer's own call on one string.
ROW_OPTIONS = (
    "add_special_tokens",  # the template writes them all
    "padding",
    "padding_side",
    "max_length",
    "pad_to_multiple_of",
    "truncation",
    "return_attention_mask",
    "verbose",
)


class NVLM_D_ProcessorKwargs(ProcessingKwargs, total=False):
    """What `NVLM_D_Processor` takes: transformers' options, and those of `NVLM_D_ImageProcessor`."""

    images_kwargs: NVLM_D_ImagesKwargs
    _defaults = {}  # type: ignore[misc]  # noqa: RUF012 (transformers 4 reads it)


@dataclass(frozen=True)
class Options:
    """The options of a call, by what they are for."""

    text: dict[str, Any]
    images: dict[str, Any]
    videos: dict[str, Any]
    flags: dict[str, bool]
    return_tensors: str | None


class NVLM_D_Processor(ProcessorMixin):
    """The tokenizer and the image processor as one, after the manner of transformers' own processors.

    Args:
        image_processor: cuts pictures into tiles.
        tokenizer: the checkpoint's tokenizer.
        image_seq_length: decoder tokens of a tile (the config's `num_image_token`).
        tile_tag, thumbnail_tag: the text before each tile (the config's fields of these names).
        chat_template: a Jinja template of conversations.

    Attributes:
        image_token, image_token_id: `<|vision_pad|>`, at which features stand. In `text` one of them stands for a
            picture, as `<image>` does.
        video_token: what stands for a video in `text`.

    Raises:
        ValueError: an unknown kind of tile tags, or a tokenizer without the image token.
    """

    valid_processor_kwargs = NVLM_D_ProcessorKwargs
    if not hasattr(ProcessorMixin, "get_attributes"):  # transformers 4 does not read them in the signature of __init__
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    # Not keyword-only: transformers only finds names of positional ones in a processor_config.json.
    def __init__(
        self,
        image_processor: Any,
        tokenizer: PreTrainedTokenizerBase,
        image_seq_length: int = 256,
        tile_tag: str = "1d",
        thumbnail_tag: str = "<tile_global_thumbnail>",
        chat_template: str | dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        if tile_tag not in TAG_KINDS:
            raise ValueError(f"tile_tag is {tile_tag!r}, expected one of {list(TAG_KINDS)}.")
        self.image_seq_length = image_seq_length
        self.tile_tag = tile_tag
        self.thumbnail_tag = thumbnail_tag
        self.image_token = "<|vision_pad|>"
        self.image_token_id = control_token_id(tokenizer, self.image_token)
        self.video_token = "<video>"

    @classmethod
    def from_model_config(
        cls, config: NVLM_D_Config, tokenizer: PreTrainedTokenizerBase, *, chat_template: str
    ) -> "NVLM_D_Processor":
        """The processor of a model, where its checkpoint has no processor's files.

        Args:
            config: the model's.
            tokenizer: the checkpoint's.
            chat_template: as for the class.
        """
        return cls(
            NVLM_D_ImageProcessor.from_model_config(config),
            tokenizer,
            image_seq_length=config.num_image_token,
            tile_tag=config.tile_tag,
            thumbnail_tag=config.thumbnail_tag,
            chat_template=chat_template,
        )

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        **kwargs: Unpack[NVLM_D_ProcessorKwargs],
    ) -> BatchFeature:
        """Make the model's inputs of rendered prompts.

        Special tokens in `text` are special tokens, whoever wrote them: see the module's docstring.

        Args:
            images: pictures as `NVLM_D_ImageProcessor` takes them, one for each `<image>` (or `<|vision_pad|>`) in
                order; given as one list a prompt, each prompt's own are counted. Without any, `<image>` is plain text.
            text: one prompt or several.
            videos: for each `<video>` in order a path, bytes or a file object, or a list or an array of frames.
            **kwargs: transformers' options. Several prompts are padded on the left, by default where tensors are
                asked for. `num_frames` is how many frames are taken of a video.

        Returns:
            `input_ids` and `attention_mask` (B, L), int64 as tensors; `pixel_values` float32 (tiles, 3, S, S) where
            there are pictures, in the order of the prompts. On demand `mm_token_type_ids` (B, L), 1 at the place of a
            feature, and `text_replacement_offsets`, one list a prompt.

        Raises:
            ValueError: nothing to do, placeholders that do not match the pictures, an option that does not exist, or
                places of features that were truncated; and what reading the pictures raises.
        """
        options = self._options(dict(kwargs))
        visuals = self._visuals(_per_prompt(images), [] if videos is None else [_videos(videos)], options)
        if text is None:
            if not visuals.tiles:
                raise ValueError(f"{type(self).__name__} needs text, images or videos: got none of them.")
            return BatchFeature({"pixel_values": torch.cat(visuals.tiles)}, tensor_type=options.return_tensors)
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(prompt, str) for prompt in texts):
            raise ValueError(f"text must be a str or a list of at least one str, got {text!r:.80}.")
        placeholders = [self.image_token]  # a special token: not plain text even where there are no pictures
        placeholders += [IMAGE_PLACEHOLDER] if any(visuals.images) else []
        placeholders += [self.video_token] if any(visuals.videos) else []
        shield = Shield(placeholders)
        prompts = [[self._piece(*part) for part in shield.split(prompt)] for prompt in texts]
        filled, pixel_values = visuals.fill(prompts)
        expanded = [as_text([segment for piece in prompt for segment in piece]) for prompt in filled]
        inputs = self._finish(dict(self.tokenizer(expanded, **options.text)), pixel_values, options)
        if options.flags["return_text_replacement_offsets"]:
            pairs = zip(prompts, filled, strict=True)
            inputs["text_replacement_offsets"] = [list(replacement_offsets(*pair)) for pair in pairs]
        return inputs

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = "auto",
        return_dict: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render conversations and, with `tokenize`, make the model's inputs of them.

        What the messages say is text: a special token or `<image>` in it is none.

        Args:
            conversation: a list of messages, or a list of such lists. A message's content is text or a list of parts;
                `messages.take_visuals` lists those of pictures and videos.
            chat_template: a template, or the name of one of the processor's, in the place of the default one.
            tools: functions that may be called, as JSON schemas or as Python functions with docstrings.
            documents: passed to the template.
            add_generation_prompt: end with the beginning of the assistant's turn.
            continue_final_message: leave the last message open, to be continued.
            return_assistant_tokens_mask: also return `assistant_masks`, 1 at each token of the assistant.
            tokenize: return ids, not the rendered string, which does not tell any more what users wrote.
            return_tensors: "pt", "np", or None for lists; by default "pt" with `return_dict` and lists without.
            return_dict: return all inputs of the model, not `input_ids` alone.
            processor_kwargs: options as in `processor(...)`.
            **kwargs: more such options, and variables of the template: text like the messages, but for those whose
                names end in `_token`, which name special tokens.

        Returns:
            A str, or of several conversations a list of them; with `tokenize` the ids (B, L); with `return_dict` as
            well, what `processor(...)` returns.

        Raises:
            jinja2.TemplateError: the template refuses the messages, such as one of an unknown role.
            ValueError: messages and options do not fit together; and what `processor(...)` raises.
        """
        kwargs.pop("sanitize_control_tokens", None)  # transformers' switch for what is always so here
        given = {name: value for name, value in kwargs.items() if name in self._option_names()}
        variables = {name: value for name, value in kwargs.items() if name not in given}
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            raise ValueError(
                "continue_final_message leaves the last turn open: it cannot go with add_generation_prompt or "
                "return_assistant_tokens_mask."
            )
        conversations, is_batch = split_batch(conversation)
        stripped, images, videos = zip(*map(take_visuals, conversations), strict=True)
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        shield = Shield({*special, self.image_token, IMAGE_PLACEHOLDER, self.video_token})
        schemas = [tool if isinstance(tool, dict) else get_json_schema(tool) for tool in tools or []]
        result: Any = render_jinja_template(
            conversations=shield.hide(stripped),
            tools=shield.hide(schemas) or None,
            documents=shield.hide(documents),
            chat_template=self._template(chat_template),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            **{
                **self.tokenizer.special_tokens_map,
                **{name: value if name.endswith("_token") else shield.hide(value) for name, value in variables.items()},
            },
        )
        rendered, spans = result
        if not tokenize:
            texts = [shield.reveal(prompt) for prompt in rendered]
            return texts if is_batch else texts[0]

        if return_tensors != "auto":
            given["return_tensors"] = return_tensors
        elif return_dict:
            given["return_tensors"] = "pt"
        options = self._options({**given, **(processor_kwargs or {})})
        visuals = self._visuals(list(images), list(videos), options)
        prompts = [
            [self._piece(*part, generated=generated) for text, generated in chunks for part in shield.split(text)]
            for chunks in (_cut(prompt, spans[i] if spans else []) for i, prompt in enumerate(rendered))
        ]
        inputs = self._encode(prompts, visuals, options, with_masks=return_assistant_tokens_mask)
        return inputs if return_dict else inputs["input_ids"]

    def _encode(
        self, prompts: Sequence[Sequence[Piece]], visuals: Visuals, options: Options, *, with_masks: bool
    ) -> BatchFeature:
        """The model's inputs of prompts whose text can hold no control token."""
        text = options.text
        unknown = sorted(name for name, value in text.items() if value and name not in ROW_OPTIONS)
        if unknown:
            raise ValueError(
                f"Messages do not take {unknown}: expected {list(ROW_OPTIONS)}, or use processor(text=...)."
            )
        filled, pixel_values = visuals.fill(prompts)
        rows = [[segment for piece in prompt for segment in piece] for prompt in filled]
        columns = {"input_ids": [encode_prompt(self.tokenizer, row) for row in rows]}
        columns["attention_mask"] = [[1] * len(row) for row in columns["input_ids"]]
        if with_masks:
            columns["assistant_masks"] = [
                token_marks(self.tokenizer, row, [piece.generated for piece, part in pairs for _ in part])
                for row, pairs in zip(rows, map(zip, prompts, filled), strict=True)
            ]
        if text.get("return_attention_mask") is False:
            del columns["attention_mask"]
        max_length, side = text.get("max_length"), self.tokenizer.truncation_side
        for name, column in columns.items():
            cut = [shorten(row, max_length=max_length, truncation=text.get("truncation"), side=side) for row in column]
            columns[name] = pad(
                cut,
                value=self.tokenizer.pad_token_id if name == "input_ids" else 0,
                padding=text.get("padding"),
                side=text["padding_side"],
                max_length=max_length,
                multiple=text.get("pad_to_multiple_of"),
            )
        return self._finish(columns, pixel_values, options)

    def _finish(self, columns: dict[str, Any], pixel_values: torch.Tensor | None, options: Options) -> BatchFeature:
        """The model's inputs, once no place of a feature has been lost.

        Raises:
            ValueError: there are more features than places for them.
        """
        slots = sum(list(row).count(self.image_token_id) for row in columns["input_ids"])
        expected = 0 if pixel_values is None else len(pixel_values) * self.image_seq_length
        if slots != expected:
            raise ValueError(
                f"The prompts hold {slots} {self.image_token} for {expected} features of pictures: truncation has cut "
                "some off. Raise max_length, or pass fewer pictures or fewer tiles (max_patches)."
            )
        if options.flags["return_mm_token_type_ids"]:
            columns["mm_token_type_ids"] = [
                [int(token_id == self.image_token_id) for token_id in row] for row in columns["input_ids"]
            ]
        if pixel_values is not None:
            columns["pixel_values"] = pixel_values
        return BatchFeature(columns, tensor_type=options.return_tensors)

    def _piece(self, text: str, is_token: bool, *, generated: bool = False) -> Piece:
        kinds = {IMAGE_PLACEHOLDER: "image", self.image_token: "image", self.video_token: "video"}
        return Piece(kinds.get(text, "control") if is_token else "text", text, generated)

    def _template(self, chat_template: str | None) -> str:
        """The text of a template: one of the processor's by its name, or the text that was passed.

        Raises:
            ValueError: the processor has no default template.
        """
        own = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        template = own.get(chat_template or "default") or chat_template
        if template is None:
            raise ValueError(f"This processor has no default chat template, only {sorted(own)}: pass chat_template.")
        return template

    @classmethod
    def _option_names(cls) -> set[str]:
        modalities = ("text_kwargs", "images_kwargs", "videos_kwargs")
        typed = [cls.valid_processor_kwargs.__annotations__[name].__annotations__ for name in modalities]
        return {*modalities, "common_kwargs", "return_tensors", *FLAGS, *(name for names in typed for name in names)}

    def _options(self, kwargs: dict[str, Any]) -> Options:
        """The options of a call, merged as transformers merges them, with left padding as the default.

        Raises:
            ValueError: an option that does not exist, or is given twice.
        """
        unknown = sorted(
            name for name, value in kwargs.items() if value is not None and name not in self._option_names()
        )
        if unknown:
            raise ValueError(f"{type(self).__name__} does not take {unknown}: leave them out or check their spelling.")
        given = copy.deepcopy({name: value for name, value in kwargs.items() if name in self._option_names()})
        places = [given, given.get("text_kwargs", {}), given.get("common_kwargs", {})]
        popped = {name: [place.pop(name, None) for place in places] for name in (*FLAGS, "return_tensors")}
        flags = {name: any(popped[name]) for name in FLAGS}
        return_tensors = next(filter(None, popped["return_tensors"]), None)
        merged = self._merge_kwargs(
            self.valid_processor_kwargs,  # type: ignore[arg-type]
            tokenizer_init_kwargs=self.tokenizer.init_kwargs,
            **given,
        )
        text, images, videos = merged["text_kwargs"], merged["images_kwargs"], merged["videos_kwargs"]
        for name in ("sanitize_control_tokens", *FLAGS):
            text.pop(name, None)
        text.setdefault("padding_side", "left")
        if return_tensors is not None:
            text.setdefault("padding", True)
        unknown = sorted(
            name
            for name, value in videos.items()
            if value is not None and name not in VIDEO_OPTIONS and (name not in images or images[name] != value)
        )
        if unknown:
            raise ValueError(
                f"Videos do not take {unknown}: expected {list(VIDEO_OPTIONS)}; their frames are cut by images_kwargs."
            )
        return Options(text, images, videos, flags, return_tensors)

    def _visuals(self, images: list[Any], videos: list[Any], options: Options) -> Visuals:
        """Read all pictures and videos, given as one list for each prompt or one for all prompts."""
        pictures = iter(self._pictures([image for group in images for image in group], options.images))
        return Visuals(
            images=[[next(pictures) for _ in group] for group in images],
            videos=[[self._video(video, options) for video in group] for group in videos],
        )

    def _pictures(self, images: list[Any], options: dict[str, Any]) -> list[Visual]:
        if not images:
            return []
        features = self.image_processor(images, **options)
        grids: Sequence[tuple[int, int] | None] = [None] * len(images)
        if self.tile_tag.startswith("2d"):
            grids = self.image_processor.tile_grids(images, **options)
        resolved = self.image_processor.options(options)
        return [
            Visual(self._segments(len(tiles), resolved, grid), tiles)
            for tiles, grid in zip(features["pixel_values"].split(features["num_patches"]), grids, strict=True)
        ]

    def _video(self, video: Any, options: Options) -> Visual:
        """A video's frames, one tile each, in the lines that SPEC 7 has for them."""
        num_frames, sample = options.videos.get("num_frames"), options.videos.get("do_sample_frames")
        resolved = self.image_processor.options(options.images)
        if isinstance(video, (list, tuple)) or hasattr(video, "ndim"):
            frames = flatten_pictures(video)
            if num_frames is not None and sample is not False:
                indices = frame_indices(None, fps=1.0, max_frame=len(frames) - 1, num_segments=num_frames)
                frames = [frames[index] for index in indices]
            tiles = self.image_processor(frames, **{**options.images, "crop_to_patches": False})["pixel_values"]
        else:
            if sample is False:
                raise ValueError("do_sample_frames=False needs a video's frames: pass a list of them, not a file.")
            wanted = {} if num_frames is None else {"num_segments": num_frames}
            values, _ = load_video(video, input_size=tile_side(resolved["size"]), max_num=1, **wanted)
            tiles = self.image_processor.scale_values(values, resolved)
        pictures = [self._segments(1, resolved)] * len(tiles)
        return Visual(place_pictures(video_prefix(len(tiles)), pictures), tiles)

    def _segments(self, num_tiles: int, options: dict[str, Any], grid: tuple[int, int] | None = None) -> list[Segment]:
        """What stands for a picture of `num_tiles` tiles in the prompt, as in `chat()`."""
        tags = tile_tags(
            num_tiles,
            kind=self.tile_tag,
            thumbnail_tag=self.thumbnail_tag,
            has_thumbnail=options["use_thumbnail"],
            grid=grid,
            tile_size=tile_side(options["size"]),
        )
        return picture_segments(tags, num_image_token=self.image_seq_length, image_token=self.image_token)

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """How many tiles and features pictures of these (height, width) have; vLLM asks for it."""
        if image_sizes is None:
            return MultiModalData()
        options = self._options(kwargs).images
        patches = [self.image_processor.get_number_of_image_patches(*size, options) for size in image_sizes]
        tokens = [self.image_seq_length * count for count in patches]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=patches)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The text that a picture's placeholder is replaced by, under transformers' name for it.

        Args:
            image_inputs: what the image processor returned.
            **kwargs: the options that it was called with.

        Raises:
            ValueError: tile tags of a 2-D kind, which need more than the number of tiles.
        """
        num_tiles = int(image_inputs["num_patches"][image_idx])
        return as_text(self._segments(num_tiles, self.image_processor.options(kwargs)))


def _per_prompt(images: Any) -> list[list[Any]]:
    """Pictures as one list a prompt where they came so, else as one list of all."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)) and images and all(isinstance(group, (list, tuple)) for group in images):
        return [flatten_pictures(group) for group in images]
    return [flatten_pictures(images)]


def _videos(videos: Any) -> list[Any]:
    """Videos in one list; a list of frames and an array (frames, H, W, C) are one video."""
    if hasattr(videos, "ndim"):
        return list(videos) if videos.ndim == 5 else [videos]
    if not isinstance(videos, (list, tuple)):
        return [videos]
    are_frames = [isinstance(frame, Image.Image) or getattr(frame, "ndim", 0) == 3 for frame in videos]
    return [videos] if videos and all(are_frames) else list(videos)


def _cut(prompt: str, spans: Sequence[tuple[int, int]]) -> list[tuple[str, bool]]:
    """A prompt as (text, whether the assistant wrote it): `spans` are the assistant's."""
    chunks, end = [], 0
    for start, stop in spans:
        chunks += [(prompt[end:start], False), (prompt[start:stop], True)]
        end = stop
    return [*chunks, (prompt[end:], False)]
