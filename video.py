"""Where a video becomes frames (SPEC 7): frames spread evenly over it, each one a picture of its own.

PyAV reads the videos; it is an optional requirement, imported by the first call that needs it.
"""

from __future__ import annotations

import io
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from os import PathLike
from types import ModuleType
from typing import Any, BinaryIO

import torch
from PIL import Image

from .preprocessing import MAX_PIXELS, check_int, check_tiling, describe, load_image, open_binary

Video = str | PathLike[str] | bytes | bytearray | memoryview | BinaryIO

_UPRIGHT = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


def load_video(
    video: Video,
    bound: Sequence[float] | None = None,
    num_segments: int = 32,
    input_size: int = 448,
    max_num: int = 1,
    *,
    min_num: int = 1,
    use_thumbnail: bool = True,
) -> tuple[torch.Tensor, list[int]]:
    """Read `num_segments` frames of a video, the middle one of each of as many equal parts (SPEC 7).

    `video` is a path, the bytes of a video file or a binary file object (read from its start, left open); its first
    video stream is read, turned upright as its rotation metadata says. `bound` is (start, end) in seconds, taken at the
    average frame rate; None is the whole video. A video of fewer frames repeats some. Each frame is cut as `load_image`
    cuts a picture; the other arguments are those of `load_image`.

    Returns (pixel_values, num_patches_list): float32 (all tiles, 3, input_size, input_size) in order of time, and each
    frame's number of tiles. `video_prefix(len(num_patches_list))` is the prompt that goes before the question.

    Raises ImportError without PyAV, FileNotFoundError for a missing file, TypeError for an object of another type, and
    ValueError for anything else: no video stream, no frames, damaged or cut off, `bound` outside the video, numbers out
    of range.
    """
    av = _import_av()
    check_int("num_segments", num_segments, 1, 100_000)
    check_tiling(min_num, max_num, input_size)
    label = describe(video, "video")
    cut = partial(load_image, input_size=input_size, max_num=max_num, min_num=min_num, use_thumbnail=use_thumbnail)
    with open_binary(video, label) as file:
        try:
            frames = _read_frames(av, file, label, bound, num_segments, lambda frame: cut(_upright(frame)))
        except av.error.FFmpegError as error:
            raise ValueError(
                f"{label} is damaged, cut off or no video that PyAV can read ({error}); download or convert it again"
            ) from error
    return torch.cat(frames), [len(tiles) for tiles in frames]


def video_prefix(num_frames: int) -> str:
    """The lines that stand for a video's frames in the prompt: `Frame1: <image>`, `Frame2: <image>` and so on (SPEC 7).

    Raises ValueError for a negative number.
    """
    check_int("num_frames", num_frames, 0, 100_000)
    return "".join(f"Frame{number}: <image>\n" for number in range(1, num_frames + 1))


def frame_indices(
    bound: Sequence[float] | None, fps: float, max_frame: int, first_idx: int = 0, num_segments: int = 32
) -> list[int]:
    """The middle frame of each of `num_segments` equal parts of a video (SPEC 7), in order.

    `bound` is (start, end) in seconds, None the whole video; `fps` frames per second; `first_idx` and `max_frame` are
    the video's first and last frame index, to which the bound is clipped.

    Raises ValueError for a bound that is not two ascending numbers or lies outside the video, or numbers out of range.
    """
    check_int("num_segments", num_segments, 1, 100_000)
    if max_frame < first_idx:
        raise ValueError(f"max_frame must be at least first_idx={first_idx}, got {max_frame}")
    first, last = first_idx, max_frame
    if bound is not None:
        start, end = _check_bound(bound)
        if not (0 < fps < math.inf):
            raise ValueError(f"fps must be a positive number where there is a bound, got {fps!r}")
        # Compared before rounding, so that an infinite bound is the video's own.
        first = first_idx if start * fps <= first_idx else round(min(start * fps, max_frame + 1))
        last = max_frame if end * fps >= max_frame else round(max(end * fps, first_idx - 1))
        if first > last:
            span = f"{first_idx / fps:g} to {max_frame / fps:g} seconds"
            raise ValueError(f"bound ({start:g}, {end:g}) holds no frame of the video, which has frames from {span}")
    length = (last - first) / num_segments
    return [int(first + length / 2 + round(length * segment)) for segment in range(num_segments)]


def _check_bound(bound: Sequence[float]) -> tuple[float, float]:
    try:
        start, end = (float(second) for second in bound)
    except (TypeError, ValueError) as error:
        raise ValueError(f"bound must be (start, end) in seconds or None, got {bound!r}") from error
    if not start <= end:
        raise ValueError(f"bound must be (start, end) in seconds with start <= end, got ({start:g}, {end:g})")
    return start, end


def _import_av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ImportError("reading videos needs PyAV, which is not installed; run: pip install av") from error
    return av


# ---------------------------------------------------------------------------------------------------------------------
# Finding frames. PyAV's objects are Any here: without PyAV there are no types to name.
# ---------------------------------------------------------------------------------------------------------------------


def _read_frames(
    av: ModuleType,
    file: BinaryIO,
    label: str,
    bound: Sequence[float] | None,
    num_segments: int,
    cut: Callable[[Any], torch.Tensor],
) -> list[torch.Tensor]:
    """The wanted frames, each cut into tiles as soon as it is decoded, so that only tiles are kept."""
    if not _is_seekable(file):
        file = io.BytesIO(file.read())

    def reopen() -> AbstractContextManager[Any]:
        file.seek(0)
        # A playlist may name other files and addresses, none of which is for it to read. Titles need not be UTF-8.
        return av.open(file, container_options={"protocol_whitelist": "none"}, metadata_errors="replace")

    with reopen() as container:
        stream = _video_stream(container, label)
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        timestamps, keyframes = _scan_packets(container, stream, label)
    count = len(timestamps)

    if count and None not in timestamps and len(set(timestamps)) == count:
        timestamps.sort()
        indices = frame_indices(bound, fps, count - 1, 0, num_segments)
        with reopen() as container:
            moments = sorted({timestamps[index] for index in indices})
            found = _seek_frames(container, _video_stream(container, label), moments, sorted(keyframes), cut)
        if found is not None:
            return [found[timestamps[index]] for index in indices]

    # Packets do not tell the frames (raw streams, hidden frames, formats that seek badly): decoding does.
    with reopen() as container:
        count = sum(1 for _ in container.decode(_video_stream(container, label)))
    if count == 0:
        raise ValueError(f"{label} holds no frames; download or convert it again")
    indices = frame_indices(bound, fps, count - 1, 0, num_segments)
    wanted = set(indices)
    with reopen() as container:
        decoded = zip(range(indices[-1] + 1), container.decode(_video_stream(container, label)), strict=False)
        found = {index: cut(frame) for index, frame in decoded if index in wanted}
    return [found[index] for index in indices]


def _is_seekable(file: BinaryIO) -> bool:
    try:
        file.seek(0)
    except (AttributeError, OSError):  # io.UnsupportedOperation is an OSError
        return False
    return True


def _video_stream(container: Any, label: str) -> Any:
    if not container.streams.video:
        raise ValueError(f"{label} has no video stream; expected a video file with one")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise ValueError(f"{label} is of a kind that this PyAV cannot decode; convert it to H.264 in an mp4 file")
    if stream.width * stream.height > MAX_PIXELS:
        raise ValueError(f"{label} has frames of {stream.width}x{stream.height}, more than {MAX_PIXELS} pixels")
    stream.thread_type = "AUTO"
    return stream


def _scan_packets(container: Any, stream: Any, label: str) -> tuple[list[Any], list[int]]:
    """The timestamps of all frames and of the keyframes, as stored: nothing is decoded."""
    packets = [
        (packet.pts, packet.is_keyframe, packet.is_corrupt)
        for packet in container.demux(stream)
        if packet.size and not packet.is_discard
    ]
    if packets and packets[-1][2]:
        raise ValueError(f"{label} is cut off inside a frame; download or convert it again")
    timestamps = [pts for pts, _, _ in packets]
    return timestamps, [pts for pts, is_keyframe, _ in packets if is_keyframe and pts is not None]


def _seek_frames(
    container: Any, stream: Any, wanted: Iterable[int], keyframes: Sequence[int], cut: Callable[[Any], torch.Tensor]
) -> dict[int, torch.Tensor] | None:
    """Timestamp -> tiles of the frames at the ascending `wanted` timestamps, skipping what no frame needs.

    None where a frame does not turn up at its timestamp.
    """
    frames = container.decode(stream)
    position = keyframes[0] if keyframes else math.inf
    found = {}
    for timestamp in wanted:
        keyframe = keyframes[max(bisect_right(keyframes, timestamp) - 1, 0)] if keyframes else -math.inf
        if keyframe > position:
            container.seek(keyframe, stream=stream)
            frames = container.decode(stream)
        frame = next((frame for frame in frames if frame.pts is None or frame.pts >= timestamp), None)
        if frame is None or frame.pts != timestamp:
            return None
        found[timestamp] = cut(frame)
        position = timestamp
    return found


def _upright(frame: Any) -> Image.Image:
    picture = frame.to_image()
    # In degrees counterclockwise; older PyAV does not tell it.
    turn = _UPRIGHT.get(getattr(frame, "rotation", 0) % 360)
    return picture if turn is None else picture.transpose(turn)
