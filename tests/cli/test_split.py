"""`nvlm split`: the table, the JSON, and how sizes are named."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from nvlm import device_map as device_map_module
from nvlm.cli.main import main
from nvlm.cli.split import describe_parts, parse_gpu_memory
from nvlm.device_map import LAYERS, split_model


@pytest.fixture(autouse=True)
def _no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_map_module, "_count_gpus", lambda: 0)


def test_table_of_eight_cards(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split", "--gpus", "8", "--memory", "24GB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[1].split() == [
        *("0", "19.35", "GB", "81%"),
        *("vision_model,", "mlp1,", "embed_tokens,", "rotary_emb,", "layers", "0-1"),
    ]
    assert lines[8].endswith("layers 70-79, norm, lm_head")
    assert lines[9].split() == ["total", "158.76", "GB"]


def test_documents_policy_shows_where_it_overflows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split", "--gpus", "2", "--memory", "80GB", "--policy", "documents"]) == 0
    text = capsys.readouterr().out
    assert "91.28 GB        114%  layers 27-78" in text
    assert "layers 0-26, layer 79" in text
    assert text.splitlines()[-1] == "Less than 10% of the memory is left free on: 1."


def test_uneven_cards_and_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split", "--memory", "24GB,48GB", "--cpu", "200GB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["device", "0", "1", "cpu", "total"]


def test_json_is_the_map(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split", "--gpus", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == split_model(world_size=4)


def test_without_options_it_is_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out).values()) == {"cpu"}


def test_another_checkpoint(tmp_path: Path, recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(recipe.config_dict("base")))
    assert main(["split", "--gpus", "2", "--checkpoint", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == split_model(tmp_path, world_size=2)
    assert main(["split", "--gpus", "2", "--checkpoint", "InternVL-Chat-V1-2", "--dtype", "int8"]) == 0
    assert "layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--memory", "24GB"], "does not fit"),
        (["--gpus", "3", "--memory", "24GB,48GB"], "--memory gives 2 sizes for 3 GPUs"),
        (["--memory", "24GB,"], "'' not understood"),
        (["--checkpoint", "absent"], "Unknown model 'absent'"),
    ],
)
def test_errors(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split", *argv]) == 2
    assert message in capsys.readouterr().err


def test_sizes_of_cards() -> None:
    assert parse_gpu_memory(["1GB"], num_gpus=3) == dict.fromkeys(range(3), 10**9)
    assert parse_gpu_memory(["1GB,2GB", "3GB"], num_gpus=None) == {0: 10**9, 1: 2 * 10**9, 2: 3 * 10**9}
    assert parse_gpu_memory([], num_gpus=5) == {}


def test_names_of_parts() -> None:
    parts = ["mlp1", *(f"{LAYERS}.{i}" for i in (0, 1, 2, 7, 9, 10)), "language_model.lm_head"]
    assert describe_parts(parts) == "mlp1, layers 0-2, layer 7, layers 9-10, lm_head"
