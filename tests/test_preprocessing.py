"""Pictures to tiles: the golden numbers, torchvision as the reference, every kind of input, every way to fail."""

import ast
import hashlib
import io
import json
import pickle
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode

import nvlm.preprocessing
from nvlm.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_PIXELS,
    MAX_SIDE,
    MAX_TILES,
    build_transform,
    dynamic_preprocess,
    find_closest_aspect_ratio,
    load_image,
    load_images,
    tile_grid,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "preprocessing.json").read_text())["rows"]

sizes = st.integers(1, 400)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(picture: Image.Image, kind: str = "PNG", **kwargs: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **kwargs)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims any size and holds hardly any pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def reference_transform(size: int) -> Callable[[Image.Image], torch.Tensor]:
    return transforms.Compose(
        [
            transforms.Lambda(lambda picture: picture.convert("RGB")),
            transforms.Resize((size, size), interpolation=InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def reference_grid(width: int, height: int, min_num: int, max_num: int, size: int) -> tuple[int, int]:
    grids = sorted(
        {
            (columns, rows)
            for side in range(min_num, max_num + 1)
            for columns in range(1, side + 1)
            for rows in range(1, side + 1)
            if min_num <= columns * rows <= max_num
        },
        key=lambda grid: grid[0] * grid[1],
    )
    best, distance = (1, 1), float("inf")
    for columns, rows in grids:
        found = abs(width / height - columns / rows)
        roomy = width * height > 0.5 * size * size * columns * rows
        if found < distance or (found == distance and roomy):
            best, distance = (columns, rows), found
    return best


def reference_tiles(picture: Image.Image, grid: tuple[int, int], size: int, thumbnail: bool) -> list[Image.Image]:
    columns, rows = grid
    whole = picture.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
    tiles = [
        whole.crop((column * size, row * size, (column + 1) * size, (row + 1) * size))
        for row in range(rows)
        for column in range(columns)
    ]
    if thumbnail and len(tiles) > 1:
        tiles.append(picture.resize((size, size), Image.Resampling.BICUBIC))
    return tiles


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers
# ---------------------------------------------------------------------------------------------------------------------


def golden_picture(recipe: ModuleType, row: dict[str, Any]) -> Image.Image:
    picture = Image.fromarray(recipe.picture(row["width"], row["height"], row["seed"]))
    if row["mode"] == "I;16":
        return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 200)
    return picture.convert(row["mode"])


def golden_id(row: dict[str, Any]) -> str:
    return f"{row['mode']}-{row['width']}x{row['height']}-max{row['max_num']}-{row['image_size']}"


@pytest.mark.parametrize("row", GOLDEN, ids=golden_id)
def test_golden(recipe: ModuleType, row: dict[str, Any]) -> None:
    picture = golden_picture(recipe, row)
    tiles = dynamic_preprocess(picture, max_num=row["max_num"], image_size=row["image_size"], use_thumbnail=True)
    pixels = load_image(picture, input_size=row["image_size"], max_num=row["max_num"])
    transform = reference_transform(row["image_size"])
    assert torch.equal(pixels, torch.stack([transform(tile) for tile in tiles]))
    if int(PIL.__version__.split(".")[0]) < 13 and row["height"] > row["width"]:
        pytest.skip("Pillow before 13 scales tall pictures sideways first, which rounds otherwise")
    bytes_of_tiles = b"".join(tile.tobytes() for tile in tiles)
    assert hashlib.sha256(bytes_of_tiles).hexdigest() == row["uint8_sha256"]

    assert pixels.dtype == torch.float32
    assert pixels.shape == (row["tiles"], 3, row["image_size"], row["image_size"])
    torch.testing.assert_close(pixels.mean((1, 2, 3)), torch.tensor(row["pixel_mean"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(pixels.std((1, 2, 3)), torch.tensor(row["pixel_std"]), rtol=0, atol=1e-5)
    corner = torch.stack([pixels[0, :, 0, 0], pixels[-1, :, -1, -1]]).flatten()
    torch.testing.assert_close(corner, torch.tensor(row["corner"]), rtol=0, atol=1e-6)


def test_golden_covers_sixty_cases() -> None:
    assert len(GOLDEN) == 60


def test_every_byte_normalises_like_torchvision() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    picture = Image.fromarray(ramp)
    assert torch.equal(build_transform(16)(picture), reference_transform(16)(picture))


@settings(max_examples=60, deadline=None)
@given(
    width=sizes,
    height=sizes,
    span=st.tuples(st.integers(1, 9), st.integers(0, 9)),
    size=st.sampled_from([1, 14, 28, 56]),
    thumbnail=st.booleans(),
)
def test_equals_reference(width: int, height: int, span: tuple[int, int], size: int, thumbnail: bool) -> None:
    min_num, max_num = span[0], span[0] + span[1]
    picture = noise(width, height)
    grid = reference_grid(width, height, min_num, max_num, size)
    tiles = reference_tiles(picture, grid, size, thumbnail)
    transform = reference_transform(size)
    expected = torch.stack([transform(tile) for tile in tiles])

    assert tile_grid(width, height, min_num=min_num, max_num=max_num, image_size=size) == grid
    ours = dynamic_preprocess(picture, min_num, max_num, size, thumbnail)
    assert [tile.tobytes() for tile in ours] == [tile.tobytes() for tile in tiles]
    pixels = load_image(picture, size, max_num, min_num=min_num, use_thumbnail=thumbnail)
    assert torch.equal(pixels, expected)


@settings(max_examples=40, deadline=None)
@given(width=sizes, height=sizes, size=st.integers(1, 100), mode=st.sampled_from(["RGB", "L", "P", "RGBA", "CMYK"]))
def test_transform_equals_torchvision(width: int, height: int, size: int, mode: str) -> None:
    picture = noise(width, height).convert(mode)
    assert torch.equal(build_transform(size)(picture), reference_transform(size)(picture))


def test_transform_is_picklable() -> None:
    transform = pickle.loads(pickle.dumps(build_transform(28)))
    assert torch.equal(transform(noise(30, 20)), build_transform(28)(noise(30, 20)))


def test_defaults_are_the_published_ones() -> None:
    picture = noise(640, 480)
    assert load_image(picture).shape == (7, 3, 448, 448)
    assert len(dynamic_preprocess(picture)) == 7
    assert build_transform()(picture).shape == (3, 448, 448)


# ---------------------------------------------------------------------------------------------------------------------
# The grid
# ---------------------------------------------------------------------------------------------------------------------


@given(
    width=st.integers(1, MAX_SIDE),
    height=st.integers(1, MAX_SIDE),
    span=st.tuples(st.integers(1, 30), st.integers(0, 30)),
)
def test_grid_is_in_bounds_and_closest(width: int, height: int, span: tuple[int, int]) -> None:
    min_num, max_num = span[0], span[0] + span[1]
    columns, rows = tile_grid(width, height, min_num=min_num, max_num=max_num)
    assert min_num <= columns * rows <= max_num
    distance = abs(width / height - columns / rows)
    for c in range(1, max_num + 1):
        for r in range(1, max_num // c + 1):
            assert c * r < min_num or abs(width / height - c / r) >= distance


@pytest.mark.parametrize("max_num", range(1, 17))
def test_grid_breaks_exact_ties_like_the_released_code(max_num: int) -> None:
    """Pictures exactly as far from one grid as from another, small and large."""
    for min_num in range(1, max_num + 1):
        for a in range(1, max_num + 1):
            for b in range(1, 4):
                for scale in (1, 50):
                    width, height = scale * (a + b), scale * 2 * b
                    expected = reference_grid(width, height, min_num, max_num, 56)
                    assert tile_grid(width, height, min_num=min_num, max_num=max_num, image_size=56) == expected


@pytest.mark.parametrize(
    ("size", "grid"),
    [((448, 448), (1, 1)), ((1000, 999), (2, 2)), ((1920, 1080), (2, 1)), ((300, 2000), (1, 6)), ((100, 100), (1, 1))],
)
def test_grid_of_known_pictures(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert tile_grid(*size) == grid


def test_later_tie_wins_only_where_the_picture_is_large_enough() -> None:
    grids = [(1, 1), (2, 2), (3, 3)]
    assert find_closest_aspect_ratio(1.0, grids, 100, 100, 100) == (1, 1)
    assert find_closest_aspect_ratio(1.0, grids, 142, 142, 100) == (2, 2)
    assert find_closest_aspect_ratio(1.0, grids, 213, 213, 100) == (3, 3)
    assert find_closest_aspect_ratio(1.0, [], 100, 100, 100) == (1, 1)


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1), (1, 1), (MAX_SIDE, 1)])
def test_extreme_shapes(size: tuple[int, int]) -> None:
    pixels = load_image(Image.new("RGB", size, (10, 20, 30)), 28)
    assert len(pixels) == (1 if size == (1, 1) else 7)
    assert pixels.isfinite().all()
    assert (pixels - pixels[0, :, :1, :1]).abs().max() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Every kind of input
# ---------------------------------------------------------------------------------------------------------------------


class Unseekable(io.RawIOBase):
    """A stream as a network connection gives it."""

    def __init__(self, data: bytes) -> None:
        self.data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self.data.readinto(buffer)


def inputs(picture: Image.Image, folder: Path) -> dict[str, Any]:
    data, array = encode(picture), np.asarray(picture)
    path = folder / "picture.png"
    path.write_bytes(data)
    at_the_end = io.BytesIO(data)
    at_the_end.seek(0, io.SEEK_END)
    return {
        "str": str(path),
        "Path": path,
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "strided memoryview": memoryview(np.frombuffer(data, np.uint8).repeat(2).tobytes())[::2],
        "file": open(path, "rb"),
        "BytesIO at its end": at_the_end,
        "unseekable": Unseekable(data),
        "PIL": picture,
        "unread PIL": Image.open(path),
        "array": array,
        "flipped view": np.ascontiguousarray(array[:, :, ::-1])[:, :, ::-1],
        "read-only array": np.frombuffer(array.tobytes(), np.uint8).reshape(array.shape),
        "float32 array": (array / 255).astype(np.float32),
        "float64 array": array / 255,
        "RGBA array": np.dstack([array, np.arange(array[..., 0].size, dtype=np.uint8).reshape(array.shape[:2])]),
    }


def test_every_input_gives_the_same_tiles(tmp_path: Path) -> None:
    picture = noise(90, 50)
    expected = load_image(picture, 28)
    for name, source in inputs(picture, tmp_path).items():
        assert torch.equal(load_image(source, 28), expected), name
        if hasattr(source, "closed"):
            assert not source.closed, name
            source.close()


def test_grey_arrays_are_grey_pictures() -> None:
    grey = np.asarray(noise(60, 40).convert("L"))
    expected = load_image(Image.fromarray(grey), 28)
    assert torch.equal(load_image(grey, 28), expected)
    assert torch.equal(load_image(grey[:, :, None], 28), expected)
    assert torch.equal(load_image(grey.astype(np.float16) / 255, 28), expected)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "P", {}),
        ("PNG", "P", {"transparency": 3}),
        ("PNG", "P", {"transparency": bytes(range(256))}),
        ("PNG", "RGB", {"transparency": (1, 2, 3)}),
        ("PNG", "L", {"transparency": 7}),
        ("PNG", "RGBA", {}),
        ("PNG", "LA", {}),
        ("PNG", "1", {}),
        ("PNG", "I;16", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "L", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "CMYK", {}),
        ("TIFF", "F", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
        ("PPM", "RGB", {}),
    ],
)
def test_every_mode_is_converted_as_pillow_does(kind: str, mode: str, options: dict[str, Any]) -> None:
    picture = noise(60, 40)
    data = encode(picture.convert("L").convert(mode) if mode == "I;16" else picture.convert(mode), kind, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, about palettes with transparency
        expected = Image.open(io.BytesIO(data)).convert("RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = load_image(data, 28)
    assert torch.equal(pixels, load_image(expected, 28))


def test_animations_give_their_first_frame_and_open_images_their_current_one() -> None:
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "green", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)
    assert torch.equal(load_image(data, 28), load_image(frames[0], 28))
    opened = Image.open(io.BytesIO(data))
    opened.seek(2)
    assert torch.equal(load_image(opened, 28), load_image(frames[2], 28))
    assert opened.tell() == 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(noise(90, 40), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert torch.equal(load_image(data, 28), load_image(np.asarray(upright), 28))
    # Unread images, and those whose pixels have been read, are turned once and left unturned.
    opened = Image.open(io.BytesIO(data))
    for _ in range(2):
        assert torch.equal(load_image(opened, 28), load_image(np.asarray(upright), 28))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\x00\x00nonsense", b"Exif\x00\x00MM\x00\x2a\x00\x00\x00\x08\x00\xff", b""])
def test_damaged_exif_does_not_matter(exif: bytes) -> None:
    picture = noise(60, 40)
    assert torch.equal(load_image(encode(picture, exif=exif), 28), load_image(picture, 28))


def test_orientation_that_is_no_orientation() -> None:
    picture = noise(60, 40)
    for value in (0, 9, 60000):
        exif = Image.Exif()
        exif[0x0112] = value
        assert torch.equal(load_image(encode(picture, exif=exif), 28), load_image(picture, 28))


def test_callers_objects_are_left_as_they_were() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = noise(60, 40).convert("P")
    picture.info["transparency"] = bytes(range(256))
    picture.getexif()[0x0112] = 6
    before = picture.copy()
    load_image(picture, 28)
    dynamic_preprocess(picture, image_size=28)
    build_transform(28)(picture)
    assert (picture.mode, picture.size, picture.info) == (before.mode, before.size, before.info)
    assert picture.tobytes() == before.tobytes()
    assert picture.getexif()[0x0112] == 6

    array = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    copy = array.copy()
    load_image(array, 28).zero_()
    assert np.array_equal(array, copy)

    data = bytearray(encode(noise(60, 40)))
    copy_of_data = bytes(data)
    load_image(data, 28)
    assert data == copy_of_data

    file = io.BytesIO(encode(noise(60, 40), exif=exif))
    load_image(file, 28)
    assert not file.closed
    opened = Image.open(file)
    load_image(opened, 28)
    assert opened.size == (60, 40)
    opened.getpixel((0, 0))


def test_tiles_do_not_share_the_picture() -> None:
    picture = noise(28, 28)
    before = picture.tobytes()
    for tile in dynamic_preprocess(picture, image_size=28, max_num=1):
        tile.paste((0, 0, 0), (0, 0, 28, 28))
    assert picture.tobytes() == before


def test_torch_settings_do_not_matter() -> None:
    expected = load_image(noise(60, 40), 28)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            pixels = load_image(noise(60, 40), 28)
            many, _ = load_images([noise(60, 40)], 28)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(pixels, expected)
    assert torch.equal(many, expected)
    assert not pixels.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Many pictures
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [None, 1, 2, 5])
def test_load_images_keeps_order(num_workers: int | None) -> None:
    shapes = [(30, 90), (28, 28), (100, 50), (64, 64), (400, 60)]
    pictures = [noise(width, height, seed) for seed, (width, height) in enumerate(shapes)]
    sources = [encode(picture) if index % 2 else picture for index, picture in enumerate(pictures)]
    pixels, counts = load_images(sources, 28, 4, min_num=2, use_thumbnail=False, num_workers=num_workers)
    expected = [load_image(picture, 28, 4, min_num=2, use_thumbnail=False) for picture in pictures]
    assert counts == [len(tiles) for tiles in expected]
    assert torch.equal(pixels, torch.cat(expected))


def test_load_images_takes_any_iterable_even_an_empty_one() -> None:
    pixels, counts = load_images((noise(30, 30, seed) for seed in range(2)), 28, 1)
    assert pixels.shape == (2, 3, 28, 28)
    assert counts == [1, 1]
    pixels, counts = load_images([], 28)
    assert pixels.shape == (0, 3, 28, 28)
    assert pixels.dtype == torch.float32
    assert counts == []
    batch = np.zeros((2, 20, 20, 3), np.uint8)
    assert load_images(batch, 28, 1)[1] == [1, 1]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_load_images_names_the_picture_that_fails(num_workers: int, tmp_path: Path) -> None:
    good = noise(20, 20)
    path = tmp_path / "broken.jpg"
    path.write_bytes(encode(noise(200, 200), "JPEG")[:2000])
    with pytest.raises(ValueError, match=r"images\[2\] .*broken\.jpg.*truncated"):
        load_images([good, good, path, good], 28, num_workers=num_workers)
    with pytest.raises(FileNotFoundError, match=r"images\[1\] .*nowhere\.png") as caught:
        load_images([good, tmp_path / "nowhere.png"], 28, num_workers=num_workers)
    assert str(caught.value.filename).endswith("nowhere.png")
    with pytest.raises(TypeError, match=r"images\[0\].*dict"):
        load_images([{}], 28, num_workers=num_workers)


@pytest.mark.parametrize("one", ["picture.jpg", b"...", noise(4, 4), io.BytesIO(), Path("picture.jpg")])
def test_load_images_refuses_one_picture(one: Any) -> None:
    with pytest.raises(TypeError, match=rf"list of pictures, got one {type(one).__name__}; use load_image"):
        load_images(one)


def test_many_threads_may_load_at_once() -> None:
    data = [encode(noise(100 + seed, 60, seed), "JPEG") for seed in range(8)]
    expected = [load_image(one, 28) for one in data]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(5):
            if not torch.equal(load_image(data[index], 28), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---------------------------------------------------------------------------------------------------------------------
# Every way to fail
# ---------------------------------------------------------------------------------------------------------------------

PNG, JPEG = encode(noise(64, 48)), encode(noise(64, 48), "JPEG")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", r"\(bytes\) is empty: expected the content of a picture file"),
        (io.BytesIO(), r"\(BytesIO\) is empty"),
        (b"hello world" * 100, r"no picture that Pillow can read.*save it as PNG or JPEG"),
        (PNG[:20], r"no picture that Pillow can read|damaged, truncated"),
        (PNG[:500], r"damaged, truncated or of an unsupported kind \(\w+: .*download it again"),
        (JPEG[:500], r"damaged, truncated or of an unsupported kind \(\w+: .*download it again"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", r"PostScript.*convert it to PNG or JPEG"),
        (np.zeros((5, 5, 2), np.uint8), r"\(H, W, 3\).*got \(5, 5, 2\)$"),
        (np.zeros((3, 40, 40), np.uint8), r"got \(3, 40, 40\); channels go last, so transpose\(1, 2, 0\)"),
        (np.zeros(4, np.uint8), r"got \(4,\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"got \(1, 4, 4, 3\)"),
        (np.zeros((4, 4), np.int64), r"expected an array of uint8, or of floats from 0 to 1, got int64.*uint8"),
        (np.zeros((4, 4), np.uint16), r"got uint16"),
        (np.zeros((4, 4), bool), r"got bool"),
        (np.zeros((4, 4), complex), r"got complex128"),
        (np.zeros((4, 4), object), r"got object"),
        (np.full((4, 4, 3), 200.0), r"floats from 0 to 1, got values from 200 to 200; scale them"),
        (np.full((4, 4, 3), -0.1), r"got values from -0\.1 to -0\.1"),
        (np.array([[0, np.nan]]), r"got NaN"),
        (np.array([[0, np.inf]]), r"got values from 0 to inf"),
        (np.zeros((0, 4, 3), np.uint8), r"no pixels \(4x0\): expected at least 1x1"),
        (np.zeros((1, MAX_SIDE + 1), np.uint8), rf"{MAX_SIDE + 1}x1 pixels, more than {MAX_SIDE} on a side"),
        (Image.new("RGB", (0, 5)), r"no pixels \(0x5\)"),
    ],
)
def test_bad_pictures(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_image(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "NoneType"),
        (42, "int"),
        ([1, 2], "list"),
        (torch.zeros(3, 4, 4), "torch.Tensor"),
        (io.StringIO("text"), "text file object, expected a binary one"),
    ],
)
def test_unsupported_types(source: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        load_image(source)


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png'?\): no such file; expected a local path"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(FileNotFoundError, match="download URLs first"):
        load_image("https://example.com/picture.jpg")
    with pytest.raises(ValueError, match=r"cannot be opened: expected the path of a file"):
        load_image(tmp_path)
    with pytest.raises(ValueError, match="cannot be opened"):
        load_image("x" * 5000)
    with pytest.raises(ValueError, match="cannot be opened"):
        load_image("nul\0byte")
    empty = tmp_path / "empty.png"
    empty.touch()
    with pytest.raises(ValueError, match=r"empty\.png'\) is empty"):
        load_image(empty)


def test_closed_objects(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(PNG)
    with open(path, "rb") as file:
        pass
    with pytest.raises(ValueError, match=r"picture\.png"):
        load_image(file)
    picture = Image.open(path)
    picture.close()
    with pytest.raises(ValueError, match="picture"):
        load_image(picture)


@pytest.mark.parametrize("action", ["ignore", "default", "error"])
@pytest.mark.parametrize("size", [(10_000, 9_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1), (MAX_SIDE + 1, 1)])
def test_bombs_are_refused_from_the_header(action: Any, size: tuple[int, int], monkeypatch: Any) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(record=action == "default"):
        warnings.simplefilter(action)
        for source in (png_header(*size), io.BytesIO(png_header(*size))):
            with pytest.raises(ValueError, match=r"too large|more than \d+ (pixels|on a side).*shrink the file"):
                load_image(source)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_bombs_are_refused_where_pillow_has_no_limit(monkeypatch: Any) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    bomb = png_header(50_000, 50_000)
    for source in (bomb, Image.open(io.BytesIO(bomb))):
        with pytest.raises(ValueError, match=f"50000x50000, more than {MAX_PIXELS} pixels"):
            load_image(source)
    with pytest.raises(ValueError, match="more than"):
        dynamic_preprocess(Image.open(io.BytesIO(bomb)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_num": 0}, r"max_num .*whole number from 1 to 1024, got 0"),
        ({"max_num": -1}, "max_num .*got -1"),
        ({"max_num": 6.0}, r"max_num .*got 6\.0"),
        ({"max_num": True}, "max_num .*got True"),
        ({"max_num": "6"}, "max_num .*got '6'"),
        ({"max_num": MAX_TILES + 1}, "max_num .*got 1025"),
        ({"min_num": 0}, "min_num .*from 1 to 6, got 0"),
        ({"min_num": 7}, "min_num .*at most max_num.*from 1 to 6, got 7"),
        ({"input_size": 0}, "input_size .*got 0"),
        ({"input_size": None}, "input_size .*got None"),
        ({"input_size": 448.0}, r"input_size .*got 448\.0"),
        ({"input_size": 100_000}, r"6 tiles of 100000x100000 pixels exceed .*lower max_num or input_size"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    picture = noise(8, 8)
    with pytest.raises(ValueError, match=message):
        load_image(picture, **arguments)
    with pytest.raises(ValueError, match=message):
        load_images([picture], **arguments)
    as_released = {"image_size" if name == "input_size" else name: value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        dynamic_preprocess(picture, **as_released)
    with pytest.raises(ValueError, match=message):
        tile_grid(8, 8, **as_released)


def test_more_bad_arguments() -> None:
    with pytest.raises(ValueError, match="input_size"):
        build_transform(0)
    for num_workers in (0, -1, 1.5, "2"):
        with pytest.raises(ValueError, match="num_workers must be a whole number from 1"):
            load_images([], num_workers=num_workers)
    for width, height in ((0, 5), (5, 0), (-1, 5), (1.5, 5)):
        with pytest.raises(ValueError, match=r"width|height"):
            tile_grid(width, height)
    for not_a_picture in (np.zeros((4, 4, 3), np.uint8), "picture.jpg"):
        with pytest.raises(TypeError, match=r"expected a PIL image, got (numpy\.ndarray|builtins\.str)"):
            dynamic_preprocess(not_a_picture)
        with pytest.raises(TypeError, match="expected a PIL image"):
            build_transform()(not_a_picture)
    with pytest.raises(ValueError, match="damaged"):
        build_transform()(Image.open(io.BytesIO(JPEG[:800])))


def test_numpy_integers_are_whole_numbers() -> None:
    picture = noise(60, 40)
    assert torch.equal(load_image(picture, np.int64(28), np.int32(6)), load_image(picture, 28, 6))


SEEDS = [
    encode(noise(24, 16), kind, **options)
    for kind, options in [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("GIF", {}),
        ("WEBP", {}),
        ("TIFF", {}),
        ("BMP", {}),
    ]
] + [encode(noise(24, 16).convert("P"), transparency=bytes(range(256)))]


@settings(max_examples=400, deadline=None)
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
    cut=st.one_of(st.none(), st.integers(0, 10_000)),
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused(seed: bytes, changes: list[tuple[int, int]], cut: int | None) -> None:
    data = bytearray(seed)
    for position, value in changes:
        data[position % len(data)] = value
    if cut is not None:
        data = data[: cut % len(data)]
    try:
        pixels = load_image(data, 14)
    except ValueError as error:
        assert str(error).startswith("picture (bytearray)")  # noqa: PT017
    else:
        assert pixels.shape[1:] == (3, 14, 14)
        assert pixels.isfinite().all()


def test_module_needs_only_torch_numpy_and_pillow() -> None:
    source = Path(nvlm.preprocessing.__file__).read_text()
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
    packages = {str(module).split(".")[0] for module in modules}
    assert packages - sys.stdlib_module_names == {"PIL", "numpy", "torch"}
