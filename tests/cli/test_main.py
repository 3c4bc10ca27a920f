"""The command `nvlm` itself: help, exit codes, errors of one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from nvlm.cli import main as main_module
from nvlm.cli import split
from nvlm.cli.main import main, parse


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"    {command} " in text for command in ("chat", "split", "inspect", "overlay"))


@pytest.mark.parametrize("command", ["chat", "split", "inspect", "overlay"])
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: nvlm {command}" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["fly"], ["chat"], ["split", "--gpus", "many"]])
def test_wrong_usage_exits_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: nvlm" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["inspect", "absent"], ["overlay", "absent"], ["split", "--memory", "lots"], ["chat", "absent", "Hi"]]
)
def test_errors_are_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("nvlm: error: ")
    assert captured.err.count("\n") == 1


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "absent", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_errors_without_text_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: object) -> int:
        raise MemoryError

    monkeypatch.setattr(split, "run", fail)
    assert main(["split"]) == 2
    assert "MemoryError" in capsys.readouterr().err


def test_ctrl_c_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(split, "run", interrupt)
    assert main(["split"]) == 130


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "nvlm.cli.main", "split", "--gpus", "500", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parent)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert b"Traceback" not in process.stderr.read()


def test_every_command_module_is_complete() -> None:
    assert all(callable(command.add_parser) and callable(command.run) for command in main_module.COMMANDS)


@pytest.mark.parametrize(
    "argv",
    [
        ["chat", "model", "--image", "a.png", "--image", "b.png", "What?"],
        ["chat", "model", "What?", "--image", "a.png", "--image", "b.png"],
        ["chat", "--image", "a.png", "model", "--image", "b.png", "What?"],
    ],
)
def test_question_may_follow_the_pictures(argv: list[str]) -> None:
    args = parse(argv)
    assert (args.checkpoint, args.image, args.question) == ("model", ["a.png", "b.png"], "What?")


@pytest.mark.parametrize(
    "argv",
    [
        ["chat", "model", "What?", "--image", "a.png", "And?"],
        ["chat", "model", "--imagine"],
        ["inspect", "model", "What?"],
    ],
)
def test_words_left_over_are_an_error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(argv)
    assert "unrecognized arguments" in capsys.readouterr().err
