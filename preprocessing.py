"""Where a picture becomes tiles (SPEC 5).

A picture comes in as a path, bytes, a file object, a PIL image or a NumPy array, and leaves as a float32 tensor of
square, ImageNet-normalised tiles: the picture scaled to the closest grid, cut row by row, with a thumbnail of the
whole picture last where there is more than one tile.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from numbers import Integral
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Pillow only warns about pictures above this size, and what a warning does depends on process-wide filters.
# Refusing at the same size makes the outcome the same everywhere.
MAX_PIXELS = 89_478_485
# Pillow's resize tables take 32 bytes per pixel of a side, however thin the picture.
MAX_SIDE = 1_000_000
MAX_TILES = 1024

Picture = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | np.ndarray

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures to tensors
# ---------------------------------------------------------------------------------------------------------------------


def load_image(
    image_file: Picture, input_size: int = 448, max_num: int = 6, *, min_num: int = 1, use_thumbnail: bool = True
) -> torch.Tensor:
    """Read one picture and cut it into normalised tiles (SPEC 5).

    `image_file` is a path, the bytes of a picture file, a binary file object (read from its start, left open), a PIL
    image (its current frame) or an array: uint8, or floats from 0 to 1, of shape (H, W), (H, W, 1), (H, W, 3) or
    (H, W, 4), RGB order. EXIF orientation is applied; other modes become RGB as Pillow's `convert("RGB")` makes them,
    so transparency is dropped. The caller's object is left as it was.

    `input_size` is a tile's side in pixels; between `min_num` and `max_num` tiles are cut, the thumbnail not counted.

    Returns float32 (tiles, 3, input_size, input_size) on the CPU.

    Raises FileNotFoundError for a missing file, TypeError for an object of another type, and ValueError for anything
    else that keeps the picture from being read: empty, damaged, not a picture, more than MAX_PIXELS pixels (told from
    the header, before decoding), wrong array shape or values, arguments out of range.
    """
    check_tiling(min_num, max_num, input_size)
    picture = open_picture(image_file, describe(image_file, "picture"))
    scaled = _scale(picture, min_num, max_num, input_size, use_thumbnail)
    pixels = np.empty((_count_tiles(scaled, input_size), 3, input_size, input_size), np.float32)
    _normalise(scaled, pixels)
    return torch.from_numpy(pixels)


def load_images(
    images: Iterable[Picture],
    input_size: int = 448,
    max_num: int = 6,
    *,
    min_num: int = 1,
    use_thumbnail: bool = True,
    num_workers: int | None = None,
) -> tuple[torch.Tensor, list[int]]:
    """Read many pictures in parallel threads (SPEC 5); the other arguments are those of `load_image`.

    `num_workers` is the number of threads, by default as many as torch uses.

    Returns (pixel_values, num_patches_list): float32 (all tiles, 3, input_size, input_size) in the order of `images`,
    and each picture's number of tiles; zero tiles and an empty list where there are no pictures.

    Raises what `load_image` raises, for the first picture that fails, naming it by index and path.
    """
    if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image) or hasattr(images, "read"):
        raise TypeError(f"load_images takes a list of pictures, got one {type(images).__name__}; use load_image for it")
    check_tiling(min_num, max_num, input_size)
    workers = torch.get_num_threads() if num_workers is None else check_int("num_workers", num_workers, 1, 1024)
    sources = list(images)

    def scale(index: int) -> list[Image.Image]:
        picture = open_picture(sources[index], describe(sources[index], f"images[{index}]"))
        return _scale(picture, min_num, max_num, input_size, use_thumbnail)

    with ThreadPoolExecutor(workers) as pool:
        run = pool.map if workers > 1 else map
        scaled = list(run(scale, range(len(sources))))
        counts = [_count_tiles(pictures, input_size) for pictures in scaled]
        # Every thread writes its tiles where they belong: no second copy, as torch.cat would make.
        pixels = np.empty((sum(counts), 3, input_size, input_size), np.float32)
        ends = np.cumsum(counts, dtype=int)
        list(run(_normalise, scaled, [pixels[end - count : end] for end, count in zip(ends, counts, strict=True)]))
    return torch.from_numpy(pixels), counts


def build_transform(input_size: int = 448) -> Callable[[Image.Image], torch.Tensor]:
    """The transform of one tile (SPEC 5): RGB, bicubic resize, 0 to 1, ImageNet mean and std.

    Returns a picklable callable that takes a PIL image of any size and mode and returns float32
    (3, input_size, input_size). EXIF orientation is not applied.

    Raises ValueError for an `input_size` out of range; the callable raises TypeError for anything but a PIL image and
    ValueError for a damaged or empty one.
    """
    check_tiling(1, 1, input_size)
    return partial(_transform, input_size=input_size)


def _transform(image: Image.Image, input_size: int) -> torch.Tensor:
    tile = _to_rgb(image, "picture").resize((input_size, input_size), Image.Resampling.BICUBIC)
    pixels = np.empty((1, 3, input_size, input_size), np.float32)
    _normalise([tile], pixels)
    return torch.from_numpy(pixels[0])


# ---------------------------------------------------------------------------------------------------------------------
# The grid
# ---------------------------------------------------------------------------------------------------------------------


def tile_grid(width: int, height: int, *, min_num: int = 1, max_num: int = 6, image_size: int = 448) -> tuple[int, int]:
    """The grid (columns, rows) that a picture of `width` x `height` pixels is cut into (SPEC 5).

    `min_num <= columns * rows <= max_num`; `image_size` is a tile's side in pixels. The thumbnail is not counted.

    Raises ValueError for sizes and numbers out of range.
    """
    check_int("width", width, 1, MAX_SIDE)
    check_int("height", height, 1, MAX_SIDE)
    check_tiling(min_num, max_num, image_size)
    return find_closest_aspect_ratio(width / height, _grids(min_num, max_num), width, height, image_size)


def find_closest_aspect_ratio(
    aspect_ratio: float, target_ratios: Iterable[tuple[int, int]], width: int, height: int, image_size: int
) -> tuple[int, int]:
    """The grid (columns, rows) of `target_ratios` whose aspect ratio is closest (SPEC 5).

    Of several equally close grids the first is taken, unless a later one has less than twice the picture's
    `width` x `height` pixels: then the last such grid. (1, 1) where there are no grids to choose from.
    """
    grids = list(target_ratios)
    if not grids:
        return (1, 1)
    distances = [abs(aspect_ratio - columns / rows) for columns, rows in grids]
    closest = min(distances)
    first, *later = [grid for grid, distance in zip(grids, distances, strict=True) if distance == closest]
    filled = [grid for grid in later if width * height > 0.5 * image_size * image_size * grid[0] * grid[1]]
    return filled[-1] if filled else first


def dynamic_preprocess(
    image: Image.Image, min_num: int = 1, max_num: int = 6, image_size: int = 448, use_thumbnail: bool = True
) -> list[Image.Image]:
    """Cut a PIL image into its tiles (SPEC 5).

    Returns new RGB images of `image_size` x `image_size` pixels: the grid's tiles row by row, and the thumbnail last
    where `use_thumbnail` and there is more than one tile. EXIF orientation is not applied.

    Raises TypeError for anything but a PIL image, ValueError for a damaged or empty one and for numbers out of range.
    """
    check_tiling(min_num, max_num, image_size)
    whole, *thumbnail = _scale(_to_rgb(image, "picture"), min_num, max_num, image_size, use_thumbnail)
    corners = [(x, y) for y in range(0, whole.height, image_size) for x in range(0, whole.width, image_size)]
    return [whole.crop((x, y, x + image_size, y + image_size)) for x, y in corners] + thumbnail


@lru_cache(maxsize=64)
def _grids(min_num: int, max_num: int) -> tuple[tuple[int, int], ...]:
    """Every grid of `min_num` to `max_num` tiles, by number of tiles."""
    grids = [
        (columns, rows)
        for columns in range(1, max_num + 1)
        for rows in range(-(-min_num // columns), max_num // columns + 1)
    ]
    # Grids of equal area keep the order in which a set of them iterates when filled by growing side, as in the released
    # code: it decides exact ties between them, which only exist where min_num > 1.
    grids.sort(key=lambda grid: (max(*grid, min_num), grid))
    return tuple(sorted(set(grids), key=lambda grid: grid[0] * grid[1]))


# ---------------------------------------------------------------------------------------------------------------------
# Scaling and normalising
# ---------------------------------------------------------------------------------------------------------------------


def _scale(picture: Image.Image, min_num: int, max_num: int, size: int, use_thumbnail: bool) -> list[Image.Image]:
    """The RGB picture scaled to its grid and, where wanted, to its thumbnail."""
    columns, rows = tile_grid(*picture.size, min_num=min_num, max_num=max_num, image_size=size)
    scaled = [picture.resize((columns * size, rows * size), Image.Resampling.BICUBIC)]
    if use_thumbnail and columns * rows > 1:
        scaled.append(picture.resize((size, size), Image.Resampling.BICUBIC))
    return scaled


def _count_tiles(scaled: Sequence[Image.Image], size: int) -> int:
    return sum((picture.width // size) * (picture.height // size) for picture in scaled)


def _normalise(scaled: Sequence[Image.Image], out: np.ndarray) -> None:
    """Cut scaled RGB pictures into tiles and write them normalised into `out`, float32 (tiles, 3, size, size).

    The three float32 steps round as torchvision's ToTensor and Normalize do; a fused multiply-add would not. NumPy
    rather than torch, because it leaves the interpreter free for other threads and starts none of its own.
    """
    size, start = out.shape[-1], 0
    for picture in scaled:
        columns, rows = picture.width // size, picture.height // size
        stop = start + columns * rows
        tiles = out[start:stop].reshape(rows, columns, 3, size, size)  # [rows, columns, 3, S, S]
        for channel, band in enumerate("RGB"):
            # A packed band at a time: Pillow picks it out of its pixels far faster than a strided NumPy copy would.
            plane = np.frombuffer(picture.tobytes("raw", band), np.uint8)
            plane = plane.reshape(rows, size, columns, size).transpose(0, 2, 1, 3)  # [rows, columns, S, S]
            values = tiles[:, :, channel]  # [rows, columns, S, S]
            values[...] = plane
            values /= np.float32(255)
            values -= np.float32(IMAGENET_MEAN[channel])
            values /= np.float32(IMAGENET_STD[channel])
        start = stop


# ---------------------------------------------------------------------------------------------------------------------
# Reading pictures
# ---------------------------------------------------------------------------------------------------------------------


def describe(source: Any, name: str) -> str:
    """How error messages call a source: by its path where it has one, else by its type."""
    path = source if isinstance(source, str | os.PathLike) else getattr(source, "name", None)
    kind = repr(os.fspath(path)) if isinstance(path, str | os.PathLike) else type(source).__name__
    if len(kind) > 200:
        kind = kind[:200] + "..."
    return f"{name} ({kind})"


def open_picture(source: Any, label: str) -> Image.Image:
    """Any picture that `load_image` takes, as an upright RGB image; `label` names it in the messages.

    Raises what `load_image` raises of a picture.
    """
    if isinstance(source, Image.Image):
        return _upright(source, label)
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source, label), label)
    with open_binary(source, label) as stream:
        try:
            image = Image.open(stream)
        except UnidentifiedImageError as error:
            raise ValueError(
                f"{label} is empty: expected the content of a picture file; check how it was written"
                if _is_empty(stream)
                else f"{label} is no picture that Pillow can read (unknown or damaged header); save it as PNG or JPEG"
            ) from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(f"{label} is too large to decode safely ({error}); {_SHRINK}") from error
        except Exception as error:
            raise _damaged(label, error) from error
        return _upright(image, label)


@contextmanager
def open_binary(source: Any, label: str) -> Iterator[BinaryIO]:
    """A binary stream over a path, bytes or a file object; only what was opened here is closed.

    Raises FileNotFoundError for a missing file, PermissionError for an unreadable one, ValueError for another path
    that cannot be opened, TypeError for an object of another type; `label` names the source in the messages.
    """
    if isinstance(source, str | os.PathLike):
        try:
            stream = open(source, "rb")  # noqa: SIM115 (closed below)
        except FileNotFoundError as error:
            hint = f"{label}: no such file; expected a local path, so download URLs first"
            raise FileNotFoundError(errno.ENOENT, hint, os.fspath(source)) from error
        except PermissionError:
            raise
        except (OSError, ValueError) as error:
            raise ValueError(f"{label} cannot be opened: expected the path of a file ({error})") from error
        with stream:
            yield stream
    elif isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(bytes(source))
    elif isinstance(source, io.TextIOBase):
        raise TypeError(f"{label} is a text file object, expected a binary one; open it with mode 'rb'")
    elif hasattr(source, "read"):
        yield source
    else:
        raise TypeError(
            f"{label}: expected a path, bytes or a binary file object, or for pictures a PIL image or NumPy array, "
            f"got {type(source).__module__}.{type(source).__qualname__}"
        )


def _is_empty(stream: BinaryIO) -> bool:
    try:
        stream.seek(0)
        return not stream.read(1)
    except Exception:  # not seekable: whatever it held has been read
        return False


def _from_array(array: np.ndarray, label: str) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        turn = "; channels go last, so transpose(1, 2, 0)" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise ValueError(
            f"{label}: expected an array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {array.shape}{turn}"
        )
    _check_size(array.shape[1], array.shape[0], label)
    if array.dtype.kind == "f":
        if not ((array >= 0) & (array <= 1)).all():
            found = "NaN" if np.isnan(array).any() else f"values from {array.min():g} to {array.max():g}"
            raise ValueError(f"{label}: expected floats from 0 to 1, got {found}; scale them or pass uint8")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(
            f"{label}: expected an array of uint8, or of floats from 0 to 1, got {array.dtype}; scale it to 0..255 "
            "and use astype('uint8')"
        )
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.shape[2:] == (1,) else array))


def _upright(image: Image.Image, label: str) -> Image.Image:
    """The image in RGB, turned as its EXIF orientation says."""
    rgb = _to_rgb(image, label)
    try:
        # Only now that the pixels are read: PNG keeps EXIF behind them, and TIFF turns them itself and clears the tag.
        turn = _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF says nothing against the pixels
        turn = None
    return rgb if turn is None else rgb.transpose(turn)


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    """The image in RGB: itself where it is so already, else a new one."""
    if not isinstance(image, Image.Image):
        raise TypeError(f"{label}: expected a PIL image, got {type(image).__module__}.{type(image).__qualname__}")
    _check_size(image.width, image.height, label)
    if isinstance(image, ImageFile.ImageFile):
        _check_header(image, label)
    try:
        image.load()
        if image.mode == "RGB":
            return image
        if "transparency" in image.info:
            # It has no say in RGB, but Pillow warns about it and trips over damaged values.
            image = image.copy()
            del image.info["transparency"]
        return image.convert("RGB")
    except Exception as error:
        raise _damaged(label, error) from error


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------

_SHRINK = "shrink the file, or decode it yourself and pass a smaller PIL image or array"


def check_int(name: str, value: Any, low: int, high: int) -> int:
    """`value` where it is a whole number from `low` to `high`, both included; ValueError naming it where not."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    return int(value)


def check_tiling(min_num: int, max_num: int, size: int) -> None:
    """ValueError where no picture can be cut into `min_num` to `max_num` tiles of `size` pixels a side."""
    check_int("max_num (most tiles of a picture)", max_num, 1, MAX_TILES)
    check_int("min_num (fewest tiles of a picture, at most max_num)", min_num, 1, max_num)
    check_int("input_size or image_size (side of a tile in pixels)", size, 1, MAX_SIDE)
    if max_num * size * size > MAX_PIXELS:
        raise ValueError(
            f"max_num={max_num} tiles of {size}x{size} pixels exceed {MAX_PIXELS} pixels; lower max_num or input_size"
        )


def _check_size(width: int, height: int, label: str) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"{label} has no pixels ({width}x{height}): expected at least 1x1; check how it was made")
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"{label} is {width}x{height} pixels, more than {MAX_SIDE} on a side; cut or {_SHRINK}")


def _check_header(image: ImageFile.ImageFile, label: str) -> None:
    """Refuse, before anything is decoded, what would take too much memory or run a program to decode."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{label} is {image.width}x{image.height}, more than {MAX_PIXELS} pixels; {_SHRINK}")
    if image.format == "EPS":
        raise ValueError(f"{label} is PostScript, a program that Ghostscript would run; convert it to PNG or JPEG")


def _damaged(label: str, error: Exception) -> ValueError:
    reason = f"{type(error).__name__}: {error}"[:200]
    return ValueError(f"{label} is damaged, truncated or of an unsupported kind ({reason}); save or download it again")
