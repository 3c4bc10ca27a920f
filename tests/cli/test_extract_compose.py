"""`nvlm extract` and `nvlm compose`: parts that load by themselves, and one checkpoint of them again (SPEC 1, 2)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

import nvlm
from nvlm.cli.checkpoint_report import inspect_checkpoint
from nvlm.cli.compose import compose
from nvlm.cli.extract import PREFIXES, extract
from nvlm.cli.main import main

RandomWeights = Callable[[dict[str, Any]], dict[str, torch.Tensor]]


def read(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def config(small_config: dict[str, Any]) -> dict[str, Any]:
    return small_config


@pytest.fixture
def make(tmp_path: Path, random_weights: RandomWeights) -> Callable[[dict[str, Any]], Path]:
    """config -> folder of a checkpoint of random weights, with other files."""

    def make_checkpoint(config: dict[str, Any]) -> Path:
        folder = tmp_path / "source"
        folder.mkdir()
        save_file(random_weights(config), folder / "model.safetensors", {"format": "pt"})
        write_config(folder, config)
        for name in ("tokenizer_config.json", "merges.txt", "LICENSE", "README.md", "modeling_nvlm_d.py"):
            (folder / name).write_text("{}")
        return folder

    return make_checkpoint


@pytest.fixture
def source(make: Callable[[dict[str, Any]], Path], config: dict[str, Any]) -> Path:
    return make(config)


@pytest.fixture
def take_apart(tmp_path: Path) -> Callable[[Path], dict[str, Path]]:
    """A checkpoint's folder -> {part: folder it was extracted to}."""

    def extract_all(source: Path) -> dict[str, Path]:
        folders = {part: tmp_path / part for part in PREFIXES}
        for part, folder in folders.items():
            assert extract(source, folder, part=part)
        return folders

    return extract_all


def test_parts_of_the_golden_model_load_and_compute_the_same(
    checkpoint: Callable[[str], Path],
    load_model: Callable[..., nvlm.NVLM_D_Model],
    take_apart: Callable[[Path], dict[str, Path]],
    tmp_path: Path,
) -> None:
    folders = take_apart(checkpoint("base"))
    whole = load_model("base", drop_dummy_heads=False, dtype=torch.float32)
    torch.manual_seed(0)
    pixels, ids = torch.randn(2, 3, 56, 56), torch.tensor([[151644, 872, 198, 40, 151645]])
    features = torch.randn(2, 4, 320)
    with torch.no_grad():
        encoder = nvlm.InternVisionModel.from_pretrained(folders["encoder"])
        assert torch.equal(encoder(pixels).last_hidden_state, whole.vision_model(pixels).last_hidden_state)
        assert encoder.config.num_dummy_heads == 7
        assert isinstance(AutoModel.from_pretrained(folders["encoder"]), nvlm.InternVisionModel)
        decoder = Qwen2ForCausalLM.from_pretrained(folders["decoder"])
        assert torch.equal(decoder(ids).logits, whole.language_model(ids).logits)
        assert isinstance(AutoModelForCausalLM.from_pretrained(folders["decoder"]), Qwen2ForCausalLM)
        assert AutoTokenizer.from_pretrained(folders["decoder"]).convert_tokens_to_ids("<|im_end|>") == 151645
        projector = nvlm.NVLM_D_Model(whole.config).mlp1
        weights = read(folders["projector"])
        projector.load_state_dict({name.removeprefix("mlp1."): weight for name, weight in weights.items()})
        assert torch.equal(projector(features), whole.mlp1(features))
    del encoder, decoder

    target = tmp_path / "composed"
    arguments = [f"--{part}={folder}" for part, folder in folders.items()]
    assert main(["compose", str(target), *arguments]) == 0
    loaded = AutoModel.from_pretrained(target, drop_dummy_heads=False)
    assert loaded.dtype == torch.float32
    inputs = {"input_ids": torch.tensor([[151644, 872, *[151654] * 8, 198, 40, 151645]]), "pixel_values": pixels}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, whole(**inputs).logits)
    assert AutoTokenizer.from_pretrained(target).convert_tokens_to_ids("<|im_end|>") == 151645


def test_parts_hold_what_is_theirs(source: Path, take_apart: Callable[[Path], dict[str, Path]]) -> None:
    folders = take_apart(source)
    weights = read(source)
    for part, prefix in {"encoder": "vision_model.", "projector": "mlp1.", "decoder": "language_model."}.items():
        kept = prefix if part == "projector" else ""
        wanted = {kept + name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}
        got = read(folders[part])
        assert got.keys() == wanted.keys()
        assert all(got[name].dtype == wanted[name].dtype and torch.equal(got[name], wanted[name]) for name in got)
        index = json.loads((folders[part] / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in wanted.values())
    assert {path.name for path in folders["encoder"].glob("*.py")} == {
        "configuration_intern_vit.py",
        "modeling_intern_vit.py",
    }
    assert (folders["decoder"] / "merges.txt").is_file()
    assert not (folders["encoder"] / "merges.txt").exists()
    assert all((folder / "LICENSE").is_file() and not (folder / "README.md").exists() for folder in folders.values())
    assert read_config(folders["decoder"])["model_type"] == "qwen2"
    assert read_config(folders["projector"]) == {
        "model_type": "nvlm_projector",
        "in_features": 320,
        "inner_features": 96,
        "out_features": 64,
        "projector_bias": False,
        "downsample_ratio": 0.5,
        "torch_dtype": "float32",
    }


CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "published": ({}, False),
    "dummies dropped": ({"vision_config": {"num_dummy_heads": 0}}, False),
    "tied head": ({"llm_config": {"tie_word_embeddings": True}}, False),
    "Llama with biased projector": (
        {"llm_config": {"architectures": ["LlamaForCausalLM"]}, "projector_bias": True},
        False,
    ),
    "InternVL": ({"model_type": "internvl_chat", "llm_config": {"architectures": ["LlamaForCausalLM"]}}, True),
}


@pytest.mark.parametrize("case", CASES)
def test_compose_gives_back_what_extract_took_apart(
    make: Callable[[dict[str, Any]], Path],
    config: dict[str, Any],
    take_apart: Callable[[Path], dict[str, Path]],
    tmp_path: Path,
    case: str,
) -> None:
    changes, needs_config = CASES[case]
    for name, change in changes.items():
        config[name] = config[name] | change if isinstance(change, dict) else change
    source = make(config)
    folders = take_apart(source)
    target = tmp_path / "composed"
    if needs_config:
        with pytest.raises(ValueError, match=r"do not fit: tensor mlp1\.1\.weight .* --config"):
            compose(target, **folders)
    assert compose(target, **folders, config=source / "config.json" if needs_config else None)
    before, after = read(source), read(target)
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    report = inspect_checkpoint(target)
    assert report.ok, report.problems
    new = read_config(target)
    assert new["force_image_size"] == new["vision_config"]["image_size"] == 56
    assert "auto_map" not in new["vision_config"]
    if needs_config:
        assert new == config
    assert not compose(target, **folders, config=source / "config.json" if needs_config else None)


def test_an_encoder_from_elsewhere_tells_its_dummy_heads_by_its_tensors(
    source: Path, take_apart: Callable[[Path], dict[str, Path]], tmp_path: Path
) -> None:
    folders = take_apart(source)
    config = read_config(folders["encoder"])
    del config["num_dummy_heads"]
    write_config(folders["encoder"], config)
    compose(tmp_path / "composed", **folders)
    assert read_config(tmp_path / "composed")["vision_config"]["num_dummy_heads"] == 7


def test_parts_that_do_not_fit(source: Path, take_apart: Callable[[Path], dict[str, Path]], tmp_path: Path) -> None:
    folders = take_apart(source)
    target = tmp_path / "composed"
    with pytest.raises(ValueError, match=r"No part holds tensor vision_model\.embeddings"):
        compose(target, **{**folders, "encoder": folders["projector"]}, config=source / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \*\.safetensors files"):
        compose(target, **{**folders, "encoder": tmp_path / "empty"})
    config = read_config(folders["decoder"])
    write_config(folders["decoder"], config | {"vocab_size": 65})
    with pytest.raises(ValueError, match=r"language_model\.model\.embed_tokens\.weight is \(64, 64\), .* \(65, 64\)"):
        compose(target, **folders)
    write_config(folders["decoder"], config)
    save_file({"mlp1.9.weight": torch.zeros(2)}, folders["projector"] / "extra.safetensors")
    (folders["projector"] / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"mlp1\.9\.weight of a part is unknown"):
        compose(target, **folders)
    shutil.copy(folders["projector"] / "extra.safetensors", folders["projector"] / "more.safetensors")
    with pytest.raises(ValueError, match=r"more\.safetensors repeats tensor mlp1\.9\.weight of extra\.safetensors"):
        compose(target, **folders)
    assert not target.exists()


@pytest.mark.parametrize("weight_map", [{"a": "../secret.safetensors"}, {"a": "/etc/passwd"}, {"a": 3}, {}, []])
def test_an_index_must_not_lead_out_of_its_folder(
    source: Path, take_apart: Callable[[Path], dict[str, Path]], tmp_path: Path, weight_map: Any
) -> None:
    folders = take_apart(source)
    (folders["encoder"] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"expected a file of its folder|no \*\.safetensors files"):
        compose(tmp_path / "composed", **folders)


def test_refusals(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="part is 'head'"):
        extract(source, tmp_path / "head", part="head")
    with pytest.raises(ValueError, match="lies in the source"):
        extract(source, source / "encoder", part="encoder")
    assert main(["extract", str(source), str(tmp_path / "encoder"), "--part", "encoder"]) == 0
    assert main(["extract", str(source), str(tmp_path / "encoder"), "--part", "encoder"]) == 0
    assert "finished before" in capsys.readouterr().out
    assert main(["extract", str(source), str(tmp_path / "encoder"), "--part", "decoder"]) == 2
    assert "begun with part 'encoder', now 'decoder'" in capsys.readouterr().err
    (source / "config.json").unlink()
    assert main(["extract", str(source), str(tmp_path / "decoder"), "--part", "decoder"]) == 2
    assert "no sound checkpoint" in capsys.readouterr().err
