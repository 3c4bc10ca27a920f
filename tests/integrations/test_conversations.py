"""Texts and pictures of a harness's tasks as messages."""

from pathlib import Path

import pytest
from PIL import Image

from nvlm.integrations.conversations import chat_turns, user_turn, visual_part

PAGE, PHOTO = Image.new("RGB", (8, 8)), Image.new("L", (9, 9))
P, Q = {"type": "image", "image": PAGE}, {"type": "image", "image": PHOTO}


def text(words):
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    ("question", "visuals", "content"),
    [
        ("Why?", None, [text("Why?")]),
        ("Why?", [], [text("Why?")]),
        ("Why?", PAGE, [P, text("Why?")]),
        ("Why?", [PAGE, PHOTO], [P, Q, text("Why?")]),
        ("Why?", [[PAGE, PHOTO]], [P, Q, text("Why?")]),
        ("<image> and <image>?", [PAGE, PHOTO], [P, text(" and "), Q, text("?")]),
        ("Is <image> like <image>", [PAGE, PHOTO], [text("Is "), P, text(" like "), Q]),
        ("Is <image> like <image>", [PAGE], [P, text("Is <image> like <image>")]),
        ("<image>", None, [text("<image>")]),
        ("Why?", "clip.mp4", [{"type": "video", "video": "clip.mp4"}, text("Why?")]),
    ],
)
def test_a_question_and_its_visuals(question, visuals, content):
    assert user_turn(question, visuals) == [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("visual", "part"),
    [
        ("page.PNG", {"type": "image", "image": "page.PNG"}),
        (Path("a/clip.mkv"), {"type": "video", "video": Path("a/clip.mkv")}),
        (b"GIF", {"type": "image", "image": b"GIF"}),
        ({"type": "image", "url": PAGE}, P),
        ({"type": "image", "image": PAGE, "url": None}, P),
        ({"type": "video", "url": {"url": "clip.mp4"}}, {"type": "video", "video": "clip.mp4"}),
        ({"path": "clip.mp4", "video_end": None}, {"type": "video", "video": "clip.mp4"}),
    ],
)
def test_a_visual_as_a_part_of_a_message(visual, part):
    assert visual_part(visual) == part


def test_messages_of_lmms_eval():
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "image", "url": PAGE}, text("Why?")]},
    ]
    assert chat_turns(messages) == [messages[0], {"role": "user", "content": [P, text("Why?")]}]


@pytest.mark.parametrize(
    ("visual", "message"),
    [
        ("song.mp3", "audio is not supported"),
        ({"type": "audio", "url": "song.mp3"}, "audio is not supported"),
        ({"type": "video", "url": {"url": "a.mp4", "video_start": 2.0}}, r"whole videos.*'video_start': 2.0"),
        ({"type": "video", "url": "a.mp4", "end_time": 3}, r"whole videos.*'end_time': 3"),
        ({"type": "image"}, "Expected a picture or video"),
    ],
)
def test_what_the_model_does_not_read_is_named(visual, message):
    with pytest.raises(ValueError, match=message):
        visual_part(visual)
