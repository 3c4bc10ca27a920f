"""`nvlm chat`: streaming, history, pictures, commands, Ctrl-C and errors, on a small model."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nvlm.cli import chat as chat_module
from nvlm.cli.chat import Talk, converse, print_answer
from nvlm.cli.main import main


@pytest.fixture(autouse=True)
def heard_ctrl_c() -> Iterator[None]:
    """Python's own handler of Ctrl-C: a shell that starts the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_ctrl_c() -> None:
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    signal.pthread_kill(main_thread, signal.SIGINT)


class Step:
    """Called after every step of an answer; a logits processor that lets the scores as they are."""

    def __init__(self, then: Callable[[int], None] = lambda step: None) -> None:
        self.then = then
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.step += 1
        self.then(self.step)
        return scores


@pytest.fixture
def make_talk(base_model: Any, tokenizer: Any) -> Callable[..., Talk]:
    """(after_step, **generation options) -> a talk whose pictures have as many tiles as the file's name says."""

    def read_image(path: str) -> torch.Tensor:
        if not path.isdigit():
            raise FileNotFoundError(f"no picture {path}")
        return torch.full((int(path), 3, 56, 56), float(path))

    def make(after_step: Callable[[int], None] = lambda step: None, **options: Any) -> Talk:
        options = {"max_new_tokens": 5, "do_sample": False, "logits_processor": [Step(after_step)], **options}
        return Talk(base_model.start_chat(tokenizer, generation_config=options), read_image=read_image)

    return make


def sizes(talk: Talk) -> list[list[int]]:
    """The number of tiles of each picture, turn by turn."""
    return [[len(picture.tiles) for picture in turn.pictures] for turn in talk.session._turns]


def test_an_answer_is_streamed_and_remembered(make_talk: Any, base_model: Any, tokenizer: Any) -> None:
    talk = make_talk()
    pieces = list(talk.ask("Hi"))
    answer = base_model.chat(tokenizer, None, "Hi", {"max_new_tokens": 5, "do_sample": False})
    assert "".join(pieces).strip() == answer
    assert len([piece for piece in pieces if piece]) > 1
    assert talk.session.history == [("Hi", answer)]


def test_pictures_stand_before_their_question_or_where_it_says(make_talk: Any) -> None:
    talk = make_talk()
    talk.add_image("2")
    talk.add_image("3")
    for question in ("Compare.", "Sure?"):
        list(talk.ask(question))
    talk.add_image("1")
    talk.add_image("1")
    list(talk.ask("First <image>, then?"))
    asked = [question for question, _ in talk.session.history]
    assert asked == ["<image>\n<image>\nCompare.", "Sure?", "<image>\nFirst <image>, then?"]
    assert sizes(talk) == [[2, 3], [], [1, 1]]
    with pytest.raises(ValueError, match="says <image> 1 times for 0 new pictures"):
        list(talk.ask("<image>"))
    assert len(talk.session.history) == 3


def test_undo_and_reset_forget_pictures_too(make_talk: Any) -> None:
    talk = make_talk()
    assert not talk.session.undo()
    for size in ("1", "2"):
        talk.add_image(size)
        list(talk.ask("?"))
    assert talk.session.undo()
    assert sizes(talk) == [[1]]
    talk.add_image("3")
    talk.reset()
    list(talk.ask("anew"))
    assert sizes(talk) == [[]]


@pytest.mark.parametrize("fail_at", [1, 3])
def test_an_error_in_the_thread_comes_out_and_changes_nothing(make_talk: Any, fail_at: int) -> None:
    def fail(step: int) -> None:
        if step == fail_at:
            raise RuntimeError("out of memory")

    talk = make_talk(fail)
    talk.add_image("2")
    with pytest.raises(RuntimeError, match="out of memory"):
        list(talk.ask("one"))
    assert talk.session.history == []
    list(talk.ask("one again"))
    assert sizes(talk) == [[2]]
    assert talk.new_pictures == []


def test_leaving_the_stream_early_stops_the_model(make_talk: Any) -> None:
    talk = make_talk(max_new_tokens=400, min_new_tokens=400)
    pieces = talk.ask("Hi")
    next(pieces)
    pieces.close()
    assert len(talk.session.history) == 1
    assert len(talk.session._turns[0].answer.ids) < 400


def test_ctrl_c_stops_the_answer_and_keeps_the_session(make_talk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def press_ctrl_c_at_the_20th(step: int) -> None:
        time.sleep(0.002)
        if step == 20:
            press_ctrl_c()

    talk = make_talk(press_ctrl_c_at_the_20th, max_new_tokens=400, min_new_tokens=400)
    assert print_answer(talk, "Hi") is False
    assert capsys.readouterr().out.strip()
    assert 20 <= len(talk.session._turns[0].answer.ids) < 400
    talk.session.generation_config["max_new_tokens"] = talk.session.generation_config["min_new_tokens"] = 3
    assert print_answer(talk, "Still there?") is True
    assert len(talk.session.history) == 2


def test_ctrl_c_before_the_model_starts_changes_nothing(make_talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = make_talk()
    talk.add_image("1")

    def interrupt(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupt)
    assert print_answer(talk, "Hi") is False
    assert (talk.session.history, len(talk.new_pictures)) == ([], 1)


def test_ctrl_c_again_leaves(make_talk: Any) -> None:
    release = threading.Event()

    def press_ctrl_c_and_hang(step: int) -> None:
        if step == 1:
            for _ in range(2):
                time.sleep(0.2)
                press_ctrl_c()
            release.wait(30)

    talk = make_talk(press_ctrl_c_and_hang)
    with pytest.raises(SystemExit) as stop:
        print_answer(talk, "Hi")
    release.set()
    assert stop.value.code == 130


def converse_with(lines: list[str | type[BaseException]], talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    script = iter([*lines, EOFError])

    def read_line(prompt: str = "") -> str:
        line = next(script)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read_line)
    converse(talk)


def test_a_conversation(make_talk: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    talk = make_talk()
    lines: list[str | type[BaseException]] = [
        *("/image 2", "What is it?", "", "/undo", "/undo", "/nonsense", "/image missing.jpg", KeyboardInterrupt),
        *("Hello", "/reset", "/exit", "never read"),
    ]
    converse_with(lines, talk, monkeypatch)
    captured = capsys.readouterr()
    assert talk.session.history == []
    assert [line for line in captured.out.splitlines() if "forget" in line or "forgotten" in line][:2] == [
        "forgotten",
        "there is nothing to forget",
    ]
    assert chat_module.HELP in captured.out
    assert captured.err == "error: no picture missing.jpg\n"


def fail(step: int) -> None:
    raise RuntimeError("out of memory")


def test_a_conversation_outlives_an_error(
    make_talk: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    converse_with(["Hi"], make_talk(fail), monkeypatch)
    assert capsys.readouterr().err == "error: out of memory\n"


def test_one_question_on_the_command_line(
    make_talk: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = make_talk()
    monkeypatch.setattr(chat_module, "open_session", lambda args: talk)
    assert main(["chat", "folder", "Is it?", "--image", "1", "--image", "2"]) == 0
    assert capsys.readouterr().out.strip() == talk.session.history[0][1]
    assert sizes(talk) == [[1, 2]]
    monkeypatch.setattr(chat_module, "open_session", lambda args: make_talk(fail))
    assert main(["chat", "folder", "Is it?"]) == 2
    assert "out of memory" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--max-new-tokens=0", "--max-tiles=0", "--temperature=-1"])
def test_options_out_of_range(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "folder", "Hi", option]) == 2
    assert option.split("=")[0] in capsys.readouterr().err


def test_a_real_model_streams_what_chat_answers(
    checkpoint: Callable[[str], Path],
    base_model: Any,
    tokenizer: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (56, 112, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    options = ["--image", str(tmp_path / "picture.png"), "--max-tiles", "2", "--max-new-tokens", "6"]
    assert main(["chat", str(checkpoint("base")), "Describe it.", *options, "--device-map", "cpu"]) == 0
    printed = capsys.readouterr().out
    from nvlm.preprocessing import load_image

    tiles = load_image(tmp_path / "picture.png", 56, 2)
    assert len(tiles) == 3
    answer = base_model.chat(tokenizer, tiles, "<image>\nDescribe it.", {"max_new_tokens": 6, "do_sample": False})
    assert printed.strip() == answer
