"""The data of a stage: item i is the i-th sample of the run, encoded; bad ones are counted and replaced."""

from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from nvlm.configuration_nvlm_d import NVLM_D_Config
from nvlm.preprocessing import tile_grid

from .blend import Blend, Draw, read_sources
from .encoding import Example, SampleEncoder
from .ordering import LengthGroups
from .samples import BadSampleError, Picture, parse_sample
from .stage import Stage

MOST_TRIES = 1000


@dataclass(frozen=True)
class Item:
    """What the collator gets of a sample.

    Args:
        example: the encoded sample.
        source: the name of the source it is of.
        skipped: the reasons for which samples before it were left out, in order.
    """

    example: Example
    source: str
    skipped: list[str] = field(default_factory=list)


class StageData(Dataset[Item]):
    """The samples of a whole run, in order: item i is a function of the stage's settings and i alone.

    A bad sample is replaced by the next line of its file.

    Args:
        stage: what to train.
        config: the model's, with the stage's tile tags.
        tokenizer: the checkpoint's.

    Raises:
        FileNotFoundError, ValueError: the blend or one of its files is missing or wrong.
    """

    def __init__(self, stage: Stage, config: NVLM_D_Config, tokenizer: PreTrainedTokenizerBase) -> None:
        self.blend = Blend(read_sources(stage.blend), seed=stage.seed)
        self._stage = stage
        self._config = config
        self._encoder = SampleEncoder(tokenizer, config, format=stage.format, max_tiles=stage.max_tiles)
        self._order = None
        if stage.group_by_length:
            self._order = LengthGroups(self.length, micro_batch_size=stage.micro_batch_size, seed=stage.seed)

    def __len__(self) -> int:
        return self._stage.steps * self._stage.batch_size

    def __getitem__(self, index: int) -> Item:
        """The sample at a place.

        Raises:
            BadSampleError: with `strict`, for the first bad one; the message has file and line.
            ValueError: none of `MOST_TRIES` samples one after the other is any good.
        """
        draw = self.blend.draw(index if self._order is None else self._order(index))
        file, source = self.blend.files[draw.source], self.blend.sources[draw.source]
        skipped: list[str] = []
        for tries in range(MOST_TRIES):
            line = (draw.line + tries) % len(file)
            try:
                return Item(self.example(Draw(draw.source, line)), source.name, skipped)
            except BadSampleError as error:
                if self._stage.strict:
                    raise BadSampleError(error.reason, f"{file.place(line)}: {error}.") from error
                skipped.append(error.reason)
                last = error
        raise ValueError(
            f"{MOST_TRIES} samples one after the other are bad, expected at least one good one; the last is "
            f"{file.place(line)}: {last}. Mend the data, or find more with strict=true."
        )

    def example(self, draw: Draw) -> Example:
        """One line of one file, encoded.

        Raises:
            BadSampleError: it cannot be trained on.
        """
        file = self.blend.files[draw.source]
        example = self._encoder.encode(parse_sample(file[draw.line], folder=file.path.parent))
        length, most = len(example.input_ids), self._stage.sequence_length
        if length > most:
            raise BadSampleError("too_long", f"{length} tokens, expected at most sequence_length={most}")
        return example

    def length(self, index: int) -> float:
        """About how many tokens draw `index` has: of its text's size and its pictures' headers; 0 of a bad one."""
        draw = self.blend.draw(index)
        file = self.blend.files[draw.source]
        try:
            turns = parse_sample(file[draw.line], folder=file.path.parent)
            text = sum(len(turn.text) for turn in turns) / 4
            pictures = [part for turn in turns for part in turn.parts if isinstance(part, Picture)]
            return text + sum(self._num_tiles(picture) for picture in pictures) * (self._config.num_image_token + 5)
        except (BadSampleError, OSError, ValueError):
            return 0

    def _num_tiles(self, picture: Picture) -> int:
        config: Any = self._config
        with Image.open(picture.path) as image:
            most = self._stage.max_tiles or config.max_dynamic_patch
            columns, rows = tile_grid(*image.size, max_num=most, image_size=config.tile_size)
        return columns * rows + int(config.use_thumbnail and columns * rows > 1)
