"""From turns to what the model is trained on: token ids, labels and tiles (SPEC 5 and 6).

In the format "chat" the ids are those of `NVLM_D_Processor.apply_chat_template`, and the labels are its
`assistant_masks`. Segments are built here without Jinja, which alone would take longer than all the rest.

In the format "pretrain" turns follow one another without roles: `<Image>...</Image>`, prompt, answer, `<|im_end|>`.
A prompt is tokenised apart from its answer, as it will be when the model is asked. A system message has no place in
this format and is left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unicodedata import normalize

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from nvlm.configuration_nvlm_d import NVLM_D_Config
from nvlm.conversation import IMAGE_TOKEN, Control, Segment, get_conv_template
from nvlm.preprocessing import describe, load_image, open_picture, tile_grid
from nvlm.prompt import config_picture

from .samples import BadSampleError, Picture, Turn
from .text import TextEncoder

IGNORED = -100  # the label of a token that has no loss
BOUNDARY = Control("", 0)  # no token at all: tokens of the texts around it cannot merge

Marked = tuple[Segment, bool]  # a segment, and whether its tokens have loss


@dataclass(frozen=True)
class Example:
    """What a sample gives.

    Args:
        input_ids: int64 (L,).
        labels: int64 (L,), the ids at tokens with loss and `IGNORED` elsewhere.
        tiles: float32 (tiles, 3, S, S) of all pictures in order; None without pictures.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    tiles: torch.Tensor | None


class Row:
    """Token ids and their loss marks, growing segment by segment; neighbouring texts are tokenised in one go."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._ids: list[int] = []
        self._labels: list[int] = []
        self._plain = ""  # the pending text: first what has no loss,
        self._marked = ""  # then what has

    def add(self, segment: Segment, *, marked: bool) -> None:
        """Put a segment at the end."""
        if isinstance(segment, Control):
            self._cut()
            ids = [self._encoder.control(segment.token)] * segment.count if segment.count else []
            self._ids += ids
            self._labels += ids if marked else [IGNORED] * len(ids)
        elif marked:
            self._marked += segment
        else:
            if self._marked:
                self._cut()
            self._plain += segment

    def _cut(self) -> None:
        """Tokenise the pending text. A token of which a part is marked is marked."""
        text = self._plain + self._marked
        if not text:
            return
        ids, sizes = self._encoder.encode(text)
        self._ids += ids
        if not self._marked:
            self._labels += [IGNORED] * len(ids)
        elif not self._plain:
            self._labels += ids
        else:
            start = len(normalize("NFC", self._plain).encode())
            ends = np.cumsum(sizes)
            self._labels += [i if end > start else IGNORED for i, end in zip(ids, ends, strict=True)]
        self._plain = self._marked = ""

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels, each int64 (L,)."""
        self._cut()
        return torch.tensor(self._ids), torch.tensor(self._labels)


class SampleEncoder:
    """Turns to examples.

    Args:
        tokenizer: the checkpoint's.
        config: the model's: tiles, tags, tokens of a tile and the conversation template.
        format: "chat" or "pretrain".
        max_tiles: most tiles of a picture, the thumbnail not counted; None for the config's.

    Raises:
        ValueError: the tokenizer is not the checkpoint's.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: NVLM_D_Config,
        *,
        format: str = "chat",
        max_tiles: int | None = None,
    ) -> None:
        self._text = TextEncoder(tokenizer)
        self._config = config
        self._format = format
        self._template = get_conv_template(config.template)
        self._most = max_tiles or config.max_dynamic_patch
        if not config.dynamic_image_size:
            self._most = 1
        self._fewest = min(config.min_dynamic_patch, self._most)

    def encode(self, turns: Sequence[Turn]) -> Example:
        """The example that a sample's turns give.

        Raises:
            BadSampleError: a picture is missing or broken.
        """
        tiles: list[torch.Tensor] = []
        row = Row(self._text)
        for segment, marked in self._chat(turns, tiles) if self._format == "chat" else self._pretrain(turns, tiles):
            row.add(segment, marked=marked)
        input_ids, labels = row.tensors()
        pixels = tiles[0] if len(tiles) == 1 else torch.cat(tiles) if tiles else None
        return Example(input_ids, labels, pixels)

    def _chat(self, turns: Sequence[Turn], tiles: list[torch.Tensor]) -> Iterator[Marked]:
        template = self._template
        if turns[0].role != "system":
            turns = [Turn("system", [template.system_message]), *turns]
        for turn in turns:
            answers = turn.role == "assistant"
            yield Control(template.turn_start), False
            yield f"{turn.role}\n", False
            for segment in self._content(turn, tiles, newline=True):
                yield segment, answers
            yield Control(template.sep), answers
            yield template.turn_end, False

    def _pretrain(self, turns: Sequence[Turn], tiles: list[torch.Tensor]) -> Iterator[Marked]:
        for turn in turns:
            if turn.role == "user":
                for segment in self._content(turn, tiles, newline=False):
                    yield segment, False
            elif turn.role == "assistant":
                yield BOUNDARY, False
                yield turn.text, True
                yield Control(self._template.sep), True

    def _content(self, turn: Turn, tiles: list[torch.Tensor], *, newline: bool) -> Iterator[Segment]:
        """A turn's text and pictures; with `newline`, one after pictures where the chat template puts it."""
        has_text = False
        for i, part in enumerate(turn.parts):
            if isinstance(part, str):
                has_text = has_text or part != ""
                yield part
                continue
            values, grid = self._read(part)
            tiles.append(values)
            yield from self._picture(len(values), grid)
            following = turn.parts[i + 1] if i + 1 < len(turn.parts) else ""
            spaced = isinstance(following, str) and following[:1] in (" ", "\n") and following != ""
            if newline and not has_text and not spaced:
                yield "\n"

    def _read(self, picture: Picture) -> tuple[torch.Tensor, tuple[int, int] | None]:
        """A picture's tiles (tiles, 3, S, S), and for 2-D tags its grid (columns, rows)."""
        config, grid = self._config, None
        bounds = {"min_num": self._fewest, "max_num": self._most}
        try:
            source: object = picture.path
            if config.tile_tag.startswith("2d"):
                image = open_picture(picture.path, describe(picture.path, "picture"))
                grid = tile_grid(*image.size, image_size=config.tile_size, **bounds)
                source = np.asarray(image)  # turned upright already, and read once
            values = load_image(source, config.tile_size, use_thumbnail=config.use_thumbnail, **bounds)
        except FileNotFoundError as error:
            raise BadSampleError("picture_missing", f"{picture.path}: no such picture") from error
        except (OSError, ValueError, TypeError) as error:
            raise BadSampleError("picture_broken", str(error)) from error
        return values, grid

    def _picture(self, num_tiles: int, grid: tuple[int, int] | None) -> list[Segment]:
        return config_picture(self._config, num_tiles, image_token=IMAGE_TOKEN, grid=grid)
