"""Videos to frames: the documents' frame numbers, the right frames out of every container, every way to fail."""

import builtins
import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import nvlm.video
from nvlm.preprocessing import IMAGENET_MEAN, IMAGENET_STD, MAX_PIXELS, load_image
from nvlm.video import frame_indices, load_video, video_prefix

WIDTH, HEIGHT, BITS = 96, 64, 8
FRAMES, RATE = 120, 25


def numbered_frame(number: int) -> np.ndarray:
    """A picture that spells its number in bright and dark bars, the lowest bit left; its top is a bright band."""
    picture = np.full((HEIGHT, WIDTH, 3), 20, np.uint8)
    for bit in range(BITS):
        if number >> bit & 1:
            picture[:, bit * 12 : bit * 12 + 12] = 230
    picture[: HEIGHT // 4] = 230
    return picture


def read_number(tile: torch.Tensor) -> int:
    """The number on a normalised tile (3, S, S)."""
    bright = (tile * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)).mean(0) > 0.5
    size = tile.shape[-1]
    row = bright[size * 3 // 4]
    return sum(int(row[int((bit + 0.5) * size / BITS)]) << bit for bit in range(BITS))


def make_video(
    folder: Path,
    container: str = "mp4",
    codec: str = "libx264",
    frames: int = FRAMES,
    *,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    milliseconds: Sequence[int] | None = None,
) -> bytes:
    """Numbered frames with a keyframe every ten; `milliseconds` are the frames' times, else there are RATE a second."""
    path = folder / f"video.{container}"
    with av.open(path, "w", format=container, options=container_options or {}) as output:
        stream: Any = output.add_stream(codec, rate=RATE, options={"g": "10", **(options or {})})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        if milliseconds is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), "rgb24")
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[number], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path.read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def mp4(folder: Path) -> bytes:
    return make_video(folder)


def numbers(video: Any, *args: Any, **kwargs: Any) -> list[int]:
    pixels, counts = load_video(video, *args, input_size=56, **kwargs)
    assert counts == [1] * len(pixels)
    return [read_number(tile) for tile in pixels]


# ---------------------------------------------------------------------------------------------------------------------
# Which frames
# ---------------------------------------------------------------------------------------------------------------------


def reference_index(bound: Any, fps: float, max_frame: int, first_idx: int, num_segments: int) -> list[int]:
    start, end = bound if bound else (-100_000, 100_000)
    first, last = max(first_idx, round(start * fps)), min(round(end * fps), max_frame)
    step = float(last - first) / num_segments
    return [int(first + step / 2 + np.round(step * segment)) for segment in range(num_segments)]


seconds = st.one_of(st.integers(-5, 300), st.floats(-5, 300))


@settings(max_examples=300)
@given(
    bound=st.one_of(st.none(), st.tuples(seconds, seconds).map(sorted)),
    fps=st.one_of(st.sampled_from([10, 23.976, 25, 30000 / 1001, 30, 60]), st.floats(1, 120)),
    max_frame=st.integers(10, 5000),
    first_idx=st.integers(0, 10),
    num_segments=st.integers(1, 64),
)
@example(bound=[0.5, 0.5], fps=25, max_frame=100, first_idx=0, num_segments=4)
@example(bound=[4.02, 9], fps=25, max_frame=100, first_idx=0, num_segments=4)
def test_frame_indices(bound: Any, fps: float, max_frame: int, first_idx: int, num_segments: int) -> None:
    if bound is not None:
        outside = round(bound[0] * fps) > max_frame or round(bound[1] * fps) < first_idx
        if outside:
            with pytest.raises(ValueError, match="holds no frame of the video"):
                frame_indices(bound, fps, max_frame, first_idx, num_segments)
            return
    found = frame_indices(bound, fps, max_frame, first_idx, num_segments)
    assert found == reference_index(bound, fps, max_frame, first_idx, num_segments)
    assert found == sorted(found)
    assert first_idx <= found[0]
    assert found[-1] <= max_frame


def test_frame_indices_of_short_videos_repeat() -> None:
    assert frame_indices(None, 25, 0, num_segments=4) == [0, 0, 0, 0]
    assert frame_indices(None, 25, 2, num_segments=4) == reference_index(None, 25, 2, 0, 4)


def test_frame_indices_of_open_bounds() -> None:
    assert frame_indices((2, float("inf")), 10, 99, num_segments=8) == frame_indices((2, 100), 10, 99, num_segments=8)
    assert frame_indices((float("-inf"), 3), 10, 99, num_segments=8) == frame_indices((0, 3), 10, 99, num_segments=8)


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        ((3, 1), r"start <= end, got \(3, 1\)"),
        ((float("nan"), 1), "start <= end, got"),
        ((1,), r"\(start, end\) in seconds or None, got \(1,\)"),
        ((), "or None"),
        ((1, 2, 3), "or None"),
        (5, "or None, got 5"),
        ("ab", "or None, got 'ab'"),
        ((None, 3), "or None"),
        ((50, 60), r"bound \(50, 60\) holds no frame of the video, which has frames from 0 to 4\.76 seconds"),
        ((-9, -3), "holds no frame"),
    ],
)
def test_bad_bounds(bound: Any, message: str, mp4: bytes) -> None:
    with pytest.raises(ValueError, match=message):
        frame_indices(bound, RATE, FRAMES - 1)
    with pytest.raises(ValueError, match=message):
        load_video(mp4, bound, input_size=14)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_bad_rates(fps: float) -> None:
    with pytest.raises(ValueError, match="fps must be a positive number where there is a bound"):
        frame_indices((0, 1), fps, 10)
    assert len(frame_indices(None, fps, 10)) == 32


def test_bad_numbers(mp4: bytes) -> None:
    for num_segments in (0, -1, 2.5, None):
        with pytest.raises(ValueError, match="num_segments must be a whole number from 1"):
            frame_indices(None, 25, 10, num_segments=num_segments)
        with pytest.raises(ValueError, match="num_segments"):
            load_video(mp4, num_segments=num_segments)
    with pytest.raises(ValueError, match="max_frame must be at least first_idx=0, got -1"):
        frame_indices(None, 25, -1)
    with pytest.raises(ValueError, match="max_num"):
        load_video(mp4, max_num=0)
    with pytest.raises(ValueError, match="input_size"):
        load_video(mp4, input_size=0)


def test_video_prefix() -> None:
    assert video_prefix(3) == "Frame1: <image>\nFrame2: <image>\nFrame3: <image>\n"
    assert video_prefix(0) == ""
    with pytest.raises(ValueError, match="num_frames"):
        video_prefix(-1)


# ---------------------------------------------------------------------------------------------------------------------
# The right frames
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [
        ("mp4", "libx264", {}),
        ("mp4", "libx264", {"x264-params": "open-gop=1:bframes=3"}),
        ("mp4", "libx264", {"x264-params": "keyint=2:bframes=2"}),
        ("mp4", "mpeg4", {}),
        ("matroska", "libx264", {}),  # no frame count in the header
        ("webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "4"}),  # hidden frames
        ("webm", "libvpx-vp9", {"lag-in-frames": "16", "cpu-used": "5"}),
        ("mpegts", "libx264", {}),  # seeks land late
        ("avi", "mpeg4", {"bf": "2"}),
        ("mpeg", "mpeg2video", {"bf": "2"}),  # packets without times
        ("h264", "libx264", {}),  # a raw stream: no times, no count
    ],
)
def test_every_container(folder: Path, container: str, codec: str, options: dict[str, str]) -> None:
    try:
        video = make_video(folder, container, codec, options=options)
    except (av.error.FFmpegError, ValueError) as error:
        pytest.skip(f"this PyAV cannot write {codec} in {container}: {error}")
    assert numbers(video, num_segments=8) == frame_indices(None, RATE, FRAMES - 1, num_segments=8)
    assert numbers(video, num_segments=FRAMES) == frame_indices(None, RATE, FRAMES - 1, num_segments=FRAMES)
    assert numbers(video, (2, 3), 5) == frame_indices((2, 3), RATE, FRAMES - 1, num_segments=5)
    assert numbers(video, (4.5, 1000), 3) == frame_indices((4.5, 1000), RATE, FRAMES - 1, num_segments=3)


def test_variable_frame_rate(folder: Path) -> None:
    times = np.cumsum([7 if number % 3 else 150 for number in range(FRAMES)]).tolist()
    video = make_video(folder, "matroska", milliseconds=times)
    assert numbers(video, num_segments=12) == frame_indices(None, 1, FRAMES - 1, num_segments=12)


def test_frames_cut_away_by_an_edit_list_are_not_counted(mp4: bytes) -> None:
    entry = mp4.index(b"elst") + 4 + 4 + 4
    duration, media_time = struct.unpack(">Ii", mp4[entry : entry + 8])
    timescale = 12_800  # ticks a second of the mp4 writer at 25 frames a second
    cut = bytearray(mp4)
    cut[entry : entry + 8] = struct.pack(">Ii", duration - 200, media_time + 5 * timescale // RATE)
    with av.open(io.BytesIO(cut), "r") as container:
        shown = [read_number(load_image(frame.to_image(), 56, 1)[0]) for frame in container.decode(video=0)]
    assert shown == list(range(5, FRAMES))
    indices = frame_indices(None, RATE, len(shown) - 1, num_segments=40)
    assert numbers(bytes(cut), num_segments=40) == [shown[index] for index in indices]


def test_short_videos_repeat_frames(folder: Path) -> None:
    assert numbers(make_video(folder, frames=1), num_segments=3) == [0, 0, 0]
    assert numbers(make_video(folder, frames=3), num_segments=5) == frame_indices(None, 1, 2, num_segments=5)


def test_only_the_wanted_frames_become_pictures(mp4: bytes, monkeypatch: Any) -> None:
    converted = []
    upright = nvlm.video._upright

    def spy(frame: Any) -> Any:
        converted.append(frame.pts)
        return upright(frame)

    monkeypatch.setattr(nvlm.video, "_upright", spy)
    load_video(mp4, num_segments=4, input_size=14)
    assert len(converted) == 4


def test_every_input_gives_the_same_frames(mp4: bytes, folder: Path) -> None:
    class Unseekable(io.RawIOBase):
        def __init__(self) -> None:
            self.data = io.BytesIO(mp4)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            return self.data.readinto(buffer)

    path = folder / "same.mp4"
    path.write_bytes(mp4)
    expected, counts = load_video(mp4, num_segments=3, input_size=28, max_num=4)
    assert expected.dtype == torch.float32
    assert expected.shape == (sum(counts), 3, 28, 28)
    assert counts == [5, 5, 5]
    at_the_end = io.BytesIO(mp4)
    at_the_end.seek(0, io.SEEK_END)
    with open(path, "rb") as file:
        for source in (path, str(path), bytearray(mp4), memoryview(mp4), file, at_the_end, Unseekable()):
            pixels, numbers_of_tiles = load_video(source, num_segments=3, input_size=28, max_num=4)
            assert torch.equal(pixels, expected)
            assert numbers_of_tiles == counts
        assert not file.closed
        assert not at_the_end.closed


@pytest.mark.skipif(not hasattr(av.VideoFrame, "rotation"), reason="this PyAV does not tell a frame's rotation")
@pytest.mark.parametrize(
    ("matrix", "turns"),
    [((1, 0, 0, 1), 0), ((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)],
    ids=["upright", "clockwise", "upside down", "counterclockwise"],
)
def test_rotation_metadata(mp4: bytes, matrix: tuple[int, int, int, int], turns: int) -> None:
    a, b, c, d = (65536 * value for value in matrix)
    turned = bytearray(mp4)
    start = mp4.index(b"tkhd") + 44
    turned[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    plain, _ = load_video(mp4, num_segments=2, input_size=32)
    pixels, _ = load_video(bytes(turned), num_segments=2, input_size=32)
    expected = torch.rot90(plain, turns, (2, 3))
    assert (pixels - expected).abs().mean() < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Every way to fail
# ---------------------------------------------------------------------------------------------------------------------


def test_files_that_are_no_video(folder: Path) -> None:
    for junk in (b"", b"hello world" * 100, bytes(5000)):
        with pytest.raises(ValueError, match=r"video \(bytes\) is damaged, cut off or no video that PyAV can read"):
            load_video(junk)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_video(folder / "nowhere.mp4")
    with pytest.raises(ValueError, match="cannot be opened"):
        load_video(folder)
    with pytest.raises(TypeError, match="builtins"):
        load_video(42)
    with pytest.raises(TypeError, match="binary"):
        load_video(io.StringIO("text"))


def test_sound_without_pictures(folder: Path) -> None:
    path = folder / "sound.wav"
    with av.open(path, "w") as output:
        stream: Any = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
    with pytest.raises(ValueError, match=r"sound\.wav'\) has no video stream"):
        load_video(path)


def test_cut_off_files(folder: Path, mp4: bytes) -> None:
    with pytest.raises(ValueError, match="cut off"):
        load_video(mp4[: len(mp4) // 2])
    index_first = make_video(folder, container_options={"movflags": "faststart"})
    for part in (0.5, 0.8, 0.99):
        with pytest.raises(ValueError, match=r"cut off|no frames"):
            load_video(index_first[: int(len(index_first) * part)], num_segments=4, input_size=14)


def test_no_frames(folder: Path) -> None:
    matroska = make_video(folder, "matroska")
    with pytest.raises(ValueError, match=r"no frames|cut off"):
        load_video(matroska[:600], input_size=14)


def test_frames_too_large(mp4: bytes, monkeypatch: Any) -> None:
    monkeypatch.setattr(nvlm.video, "MAX_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.raises(ValueError, match=f"frames of {WIDTH}x{HEIGHT}, more than {WIDTH * HEIGHT - 1} pixels"):
        load_video(mp4)
    assert MAX_PIXELS > 8192 * 4320


def test_playlists_read_no_other_file(folder: Path, mp4: bytes, monkeypatch: Any) -> None:
    monkeypatch.chdir(folder)
    (folder / "secret.mp4").write_bytes(mp4)
    playlists = [
        b"ffconcat version 1.0\nfile secret.mp4\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:4.0,\nsecret.mp4\n#EXT-X-ENDLIST\n",
    ]
    for playlist in playlists:
        with pytest.raises(ValueError, match="no video that PyAV can read"):
            load_video(playlist)


def test_without_pyav(monkeypatch: Any, mp4: bytes) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "av":
            raise ImportError("No module named 'av'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install av"):
        load_video(mp4)


@settings(max_examples=150, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.one_of(st.none(), st.integers(0, 100_000)),
)
def test_damaged_files_are_read_or_refused(mp4: bytes, changes: list[tuple[int, int]], cut: int | None) -> None:
    data = bytearray(mp4)
    for position, value in changes:
        data[-1 - position % len(data)] = value
    if cut is not None:
        data = data[: cut % len(data)]
    try:
        pixels, counts = load_video(data, num_segments=2, input_size=14)
    except ValueError as error:
        assert str(error).startswith("video (bytearray)")  # noqa: PT017
    else:
        assert pixels.shape == (2, 3, 14, 14)
        assert counts == [1, 1]
