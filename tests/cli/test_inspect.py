"""`nvlm inspect`: report, JSON and exit code."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nvlm.cli.main import main


def test_a_sound_checkpoint(checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint("base"))]) == 0
    text = capsys.readouterr().out
    assert "dummy heads   7 stored, 7 in config.json" in text
    assert "note: " in text
    assert text.splitlines()[-1] == "sound"


def test_problems_exit_1(checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(checkpoint("base") / "config.json", tmp_path)
    assert main(["inspect", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "problem: There are no *.safetensors files." in text
    assert text.splitlines()[-1] == "2 problems"


def test_json(checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint("base")), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["num_shards"] == 1
    assert report["missing"] == []
