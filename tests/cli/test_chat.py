"""`nvlm chat`: streaming, history, pictures, commands, Ctrl-C and errors, on a model that answers from a script."""

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
from nvlm.cli.chat import ChatSession, converse, print_answer
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


class StubTokenizer:
    """A token is a character."""

    def decode(self, ids: list[int], **kwargs: Any) -> str:
        return "".join(map(chr, ids))


class StubModel:
    """Streams `answer`, one character a step, as `generate` would; asks the stopping criteria after each."""

    def __init__(self, answer: str = "fine weather", *, fail_at: int | None = None) -> None:
        self.answer = answer
        self.fail_at = fail_at
        self.calls: list[dict[str, Any]] = []
        self.after_step: Callable[[int], None] = lambda step: None

    def chat(
        self, tokenizer: Any, pixel_values: Any, question: str, generation_config: dict[str, Any], **kwargs: Any
    ) -> Any:
        self.calls.append({"pixel_values": pixel_values, "question": question, "config": generation_config, **kwargs})
        streamer, criteria = generation_config["streamer"], generation_config["stopping_criteria"]
        streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt, to be skipped
        said = ""
        for step, character in enumerate(self.answer):
            if step == self.fail_at:
                raise RuntimeError("out of memory")
            said += character
            streamer.put(torch.tensor([ord(character)]))
            self.after_step(step)
            if criteria(torch.zeros(1, step, dtype=torch.long), None).all():
                break
        streamer.end()
        return said, [*kwargs["history"], (question, said)]


def make_session(model: StubModel, **kwargs: Any) -> ChatSession:
    """A session whose pictures have as many tiles as the file's name says, all of that value."""

    def read_image(path: str) -> torch.Tensor:
        if not path.isdigit():
            raise FileNotFoundError(f"no picture {path}")
        return torch.full((int(path), 3, 2, 2), float(path))

    return ChatSession(model, StubTokenizer(), {"max_new_tokens": 7}, read_image=read_image, **kwargs)


def test_an_answer_is_streamed_and_remembered() -> None:
    session = make_session(StubModel("two words and more"))
    pieces = list(session.ask("Hi"))
    assert "".join(pieces) == "two words and more"
    assert len([piece for piece in pieces if piece]) > 1
    assert session.history == [("Hi", "two words and more")]


def test_later_turns_carry_history_and_options() -> None:
    model = StubModel()
    session = make_session(model, system_message="Be brief.")
    for question in ("one", "two"):
        list(session.ask(question))
    first, second = model.calls
    assert (first["history"], second["history"]) == ([], [("one", "fine weather")])
    assert second["system_message"] == "Be brief."
    assert second["config"]["max_new_tokens"] == 7
    assert second["return_history"] is True
    assert session.generation_config == {"max_new_tokens": 7}


def test_without_a_system_message_the_models_own_holds() -> None:
    model = StubModel()
    list(make_session(model).ask("Hi"))
    assert "system_message" not in model.calls[0]
    assert model.calls[0]["pixel_values"] is None
    assert model.calls[0]["num_patches_list"] is None


def test_pictures_of_all_turns_are_passed_in_order() -> None:
    model = StubModel()
    session = make_session(model)
    session.add_image("2")
    session.add_image("3")
    list(session.ask("Compare."))
    list(session.ask("Sure?"))
    session.add_image("1")
    list(session.ask("And this?"))
    assert [call["question"] for call in model.calls] == ["<image>\n<image>\nCompare.", "Sure?", "<image>\nAnd this?"]
    assert [call["num_patches_list"] for call in model.calls] == [[2, 3], [2, 3], [2, 3, 1]]
    assert model.calls[2]["pixel_values"][:, 0, 0, 0].tolist() == [2, 2, 3, 3, 3, 1]


def test_the_message_may_say_where_its_pictures_stand() -> None:
    model = StubModel()
    session = make_session(model)
    session.add_image("1")
    session.add_image("1")
    list(session.ask("First <image>, then?"))
    assert model.calls[0]["question"] == "<image>\nFirst <image>, then?"
    with pytest.raises(ValueError, match="says <image> 1 times for 0 new pictures"):
        list(session.ask("<image>"))
    assert len(session.history) == 1


def test_undo_and_reset_forget_pictures_too() -> None:
    model = StubModel()
    session = make_session(model)
    assert not session.undo()
    for size in ("1", "2"):
        session.add_image(size)
        list(session.ask("?"))
    assert session.undo()
    list(session.ask("again"))
    assert model.calls[-1]["num_patches_list"] == [1]
    session.reset()
    list(session.ask("anew"))
    assert (model.calls[-1]["num_patches_list"], model.calls[-1]["history"]) == (None, [])


@pytest.mark.parametrize("fail_at", [0, 5])
def test_an_error_in_the_thread_comes_out_and_changes_nothing(fail_at: int) -> None:
    model = StubModel()
    session = make_session(model)
    list(session.ask("one"))
    session.add_image("2")
    model.fail_at = fail_at
    with pytest.raises(RuntimeError, match="out of memory"):
        list(session.ask("two"))
    assert session.history == [("one", "fine weather")]
    model.fail_at = None
    list(session.ask("two again"))
    assert model.calls[-1]["num_patches_list"] == [2]
    assert model.calls[-1]["question"] == "<image>\ntwo again"


def test_a_call_that_never_streams_does_not_hang() -> None:
    class Refusing(StubModel):
        def chat(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("The questions hold 1 '<image>', but 2 pictures were passed")

    with pytest.raises(ValueError, match="2 pictures were passed"):
        list(make_session(Refusing()).ask("Hi"))


def test_leaving_the_stream_early_stops_the_model() -> None:
    model = StubModel("word " * 1000)
    model.after_step = lambda step: time.sleep(0.002)
    session = make_session(model)
    pieces = session.ask("Hi")
    next(pieces)
    pieces.close()
    [(question, answer)] = session.history
    assert question == "Hi"
    assert 0 < len(answer) < 5000


def test_ctrl_c_stops_the_answer_and_keeps_the_session(capsys: pytest.CaptureFixture[str]) -> None:
    model = StubModel("word " * 1000)

    def press_ctrl_c_at_the_20th(step: int) -> None:
        time.sleep(0.002)
        if step == 20:
            press_ctrl_c()

    model.after_step = press_ctrl_c_at_the_20th
    session = make_session(model)
    assert print_answer(session, "Hi") is False
    assert capsys.readouterr().out.startswith("word word")
    assert 20 < len(session.history[0][1]) < 5000
    model.answer, model.after_step = "Bye.", lambda step: None
    assert print_answer(session, "Still there?") is True
    assert len(session.history) == 2


def test_ctrl_c_before_the_model_starts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_session(StubModel())
    session.add_image("1")

    def interrupt(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupt)
    assert print_answer(session, "Hi") is False
    assert (session.history, len(session.new_pictures)) == ([], 1)


def test_ctrl_c_again_leaves() -> None:
    model = StubModel("word")
    release = threading.Event()

    def press_ctrl_c_and_hang(step: int) -> None:
        for _ in range(2):
            time.sleep(0.2)
            press_ctrl_c()
        release.wait(30)

    model.after_step = press_ctrl_c_and_hang
    with pytest.raises(SystemExit) as stop:
        print_answer(make_session(model), "Hi")
    release.set()
    assert stop.value.code == 130


def converse_with(
    lines: list[str | type[BaseException]], session: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = iter([*lines, EOFError])

    def read_line(prompt: str = "") -> str:
        line = next(script)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read_line)
    converse(session)


def test_a_conversation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = StubModel("Yes.")
    session = make_session(model)
    lines: list[str | type[BaseException]] = [
        *("/image 2", "What is it?", "", "/undo", "/undo", "/nonsense", "/image missing.jpg", KeyboardInterrupt),
        *("Hello", "/reset", "/exit", "never read"),
    ]
    converse_with(lines, session, monkeypatch)
    captured = capsys.readouterr()
    assert [call["question"] for call in model.calls] == ["<image>\nWhat is it?", "Hello"]
    assert session.history == []
    assert captured.out.splitlines()[:3] == ["Yes.", "forgotten", "there is nothing to forget"]
    assert chat_module.HELP in captured.out
    assert captured.err == "error: no picture missing.jpg\n"


def test_a_conversation_outlives_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = StubModel("Yes.", fail_at=1)
    session = make_session(model)
    converse_with(["Hi"], session, monkeypatch)
    assert capsys.readouterr().err == "error: out of memory\n"


def test_one_question_on_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = StubModel("Yes.")
    monkeypatch.setattr(chat_module, "open_session", lambda args: make_session(model))
    assert main(["chat", "folder", "Is it?", "--image", "1", "--image", "2"]) == 0
    assert capsys.readouterr().out == "Yes.\n"
    assert model.calls[0]["num_patches_list"] == [1, 2]
    model.fail_at = 0
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
