"""From what a task of a harness hands over to messages for the processor: text and pictures in their places."""

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from nvlm.prompt import IMAGE_PLACEHOLDER

PICTURE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
AUDIO_SUFFIXES = frozenset((".wav", ".mp3", ".m4a", ".aac", ".flac", ".ogg", ".opus"))
SPANS = ("video_start", "video_end", "start_time", "end_time")


def user_turn(text: str, visuals: Any) -> list[dict[str, Any]]:
    """One question as messages.

    Args:
        text: the question. As many `<image>` in it as there are pictures and videos are their places; in any other
            number they are plain text, and the pictures stand before it.
        visuals: pictures as `load_image` takes them, paths of videos, dicts as `visual_part` takes them; one, or lists
            of them, or None.

    Raises:
        ValueError: as `visual_part`.
    """
    parts = [visual_part(visual) for visual in _flatten(visuals)]
    runs = text.split(IMAGE_PLACEHOLDER)
    content = [*parts, _text_part(text)]
    if parts and len(runs) == len(parts) + 1:
        content = [_text_part(runs[0])] if runs[0] else []
        for part, run in zip(parts, runs[1:], strict=True):
            content += [part, _text_part(run)] if run else [part]
    return [{"role": "user", "content": content}]


def chat_turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as lmms-eval's tasks write them, with pictures and videos under `url`.

    Raises:
        ValueError: as `visual_part`.
    """
    return [{**message, "content": _chat_content(message["content"])} for message in messages]


def _chat_content(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [part if part["type"] == "text" else visual_part(part) for part in content]


def visual_part(visual: Any) -> dict[str, Any]:
    """A picture or a video as a part of a message.

    Args:
        visual: a picture as `load_image` takes it; a path, which is a picture's or a video's by its ending; or a dict
            with one of these under `url`, `path` or its own `type`, "image" or "video" (by default a video).

    Raises:
        ValueError: sound, a span of a video, or a dict without any of these.
    """
    kind = "image"
    if isinstance(visual, Mapping):
        kind = str(visual.get("type", "video"))
        source = next((visual[key] for key in ("url", "path", kind) if visual.get(key) is not None), None)
        if isinstance(source, Mapping):
            return visual_part({"type": kind, **source})
        asked = {key: visual[key] for key in SPANS if visual.get(key) is not None}
        if asked:
            raise ValueError(f"NVLM-D reads whole videos here, got the span {asked} of {source!r:.80}: cut it first.")
        if source is None:
            raise ValueError(f"Expected a picture or video under 'url', 'path' or {kind!r}, got {visual!r:.80}.")
    else:
        source = visual
        if isinstance(visual, (str, os.PathLike)):
            suffix = PurePath(visual).suffix.lower()
            kind = "image" if suffix in PICTURE_SUFFIXES else "audio" if suffix in AUDIO_SUFFIXES else "video"
    if kind not in ("image", "video"):
        raise ValueError(f"NVLM-D reads text, pictures and videos; {kind} is not supported: got {source!r:.80}.")
    return {"type": kind, kind: source}


def _flatten(visuals: Any) -> list[Any]:
    if visuals is None:
        return []
    if isinstance(visuals, (list, tuple)):
        return [visual for group in visuals for visual in _flatten(group)]
    return [visuals]


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
