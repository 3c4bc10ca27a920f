"""What users pass to the chat calls, checked: messages say what was expected and what came (SPEC 7)."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .pictures import Picture, split_pictures
from .prompt import IMAGE_PLACEHOLDER

History = Sequence[tuple[str, str]]


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


def check_tiles(
    tiles: torch.Tensor, *, name: str, expected: tuple[int, ...], meaning: str, check_finite: bool = True
) -> None:
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
    if check_finite and not torch.isfinite(tiles).all():
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


def read_pictures(
    config: Any,
    pixel_values: torch.Tensor | None,
    visual_features: torch.Tensor | None,
    num_patches_list: Sequence[int] | None,
    *,
    check_finite: bool = True,
) -> list[Picture]:
    """The pictures of a call; features stand for pixels where both are given.

    Args:
        config: the model's.
        pixel_values: (tiles, C, S, S) of all pictures.
        visual_features: (tiles, tokens, D) of all pictures, pixel-shuffled.
        num_patches_list: number of tiles of each picture; None for a single picture.
        check_finite: whether NaN and infinite values are errors.

    Raises:
        ValueError: wrong shapes or values, or numbers of tiles that do not add up.
    """
    if pixel_values is not None:
        shape = (config.vision_config.num_channels, config.tile_size, config.tile_size)
        check_tiles(
            pixel_values,
            name="pixel_values",
            expected=shape,
            meaning="channels and the sides of a tile",
            check_finite=check_finite,
        )
    if visual_features is not None:
        tokens = (config.num_image_token, config.shuffled_width)
        check_tiles(
            visual_features,
            name="visual_features",
            expected=tokens,
            meaning="tokens and width of a tile",
            check_finite=check_finite,
        )
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
    return split_pictures(tiles, num_tiles, is_encoded=visual_features is not None)


def check_placeholders(num_placeholders: int, pictures: Sequence[Picture]) -> None:
    """Check that the questions have a place for each picture.

    Raises:
        ValueError: they have more or fewer; the message has both numbers.
    """
    if num_placeholders != len(pictures):
        raise ValueError(
            f"The questions hold {num_placeholders} {IMAGE_PLACEHOLDER!r}, but {len(pictures)} pictures were "
            f"passed (tiles: {[len(picture.tiles) for picture in pictures]}). Write one {IMAGE_PLACEHOLDER!r} a "
            "picture, earlier turns' included, and give num_patches_list the number of tiles of each."
        )


def check_grids(tile_grids: Sequence[tuple[int, int]] | None, *, count: int) -> list[tuple[int, int] | None]:
    """(columns, rows) of each picture, or None for each.

    Raises:
        ValueError: there are more or fewer than pictures.
    """
    if tile_grids is None:
        return [None] * count
    meaning = f"hold one (columns, rows) a picture, {count}"
    grids = check_list(tile_grids, name="tile_grids", meaning=meaning)
    if len(grids) != count:
        raise ValueError(f"tile_grids must {meaning}, got {len(grids)}.")
    return grids
