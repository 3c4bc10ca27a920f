"""Tiny checkpoints of the golden recipe, with the real tokenizer, made once and kept in `.cache/`."""

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import nvlm
from nvlm.checkpoint import expected_tensors, published_dtypes

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = REPOSITORY / ".cache" / "tests"
GOLDEN = Path(__file__).parent / "golden"

torch.set_num_threads(1)  # the models are tiny: on busy cores a second thread makes them many times slower


def _load(path: Path) -> ModuleType:
    """A module that belongs to no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def recipe() -> ModuleType:
    """The golden files' own recipe of tiny checkpoints (`tests/recipe.py`)."""
    return _load(Path(__file__).parent / "recipe.py")


@pytest.fixture
def small_config(recipe: ModuleType) -> dict[str, Any]:
    """The golden base config with a vocabulary of 64, to write it in no time."""
    config = recipe.config_dict("base")
    config["llm_config"]["vocab_size"] = 64
    return config


@pytest.fixture(scope="session")
def random_weights() -> Callable[[dict[str, Any]], dict[str, torch.Tensor]]:
    """config -> random weights of every tensor, in the released dtypes."""

    def draw(config: dict[str, Any]) -> dict[str, torch.Tensor]:
        dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
        stored = published_dtypes(config)
        torch.manual_seed(0)
        return {name: torch.randn(shape).to(dtypes[stored[name]]) for name, shape in expected_tensors(config).items()}

    return draw


def _make(folder: Path, fill: Callable[[Path], None]) -> Path:
    """`folder`, filled once: made beside and renamed, so that an interrupted run leaves nothing half done."""
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=CACHE))
        fill(work)
        try:
            work.rename(folder)
        except OSError:
            shutil.rmtree(work)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder() -> Path:
    """A folder with vocab.json, merges.txt and this repository's tokenizer_config.json."""
    folder = _make(CACHE / "qwen2-tokenizer", _load(REPOSITORY / "tiny" / "untrained.py").write_vocabulary)
    shutil.copy(REPOSITORY / "tokenizer_config.json", folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_folder, use_fast=False)


@pytest.fixture(scope="session")
def checkpoint(recipe: ModuleType, tokenizer_folder: Path, tmp_path_factory: Any) -> Callable[[str], Path]:
    """case -> folder of the golden checkpoint of that name: config, weights, tokenizer; no code."""
    folders: dict[str, Path] = {}

    def make(case: str = "base") -> Path:
        if case not in folders:
            folder = tmp_path_factory.mktemp(f"checkpoint-{case}")
            (folder / "config.json").write_text(json.dumps(recipe.config_dict(case)))
            weights = {name: torch.from_numpy(value) for name, value in recipe.state_dict(case).items()}
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            for file in tokenizer_folder.iterdir():
                shutil.copy(file, folder)
            shutil.copy(REPOSITORY / "generation_config.json", folder)
            folders[case] = folder
        return folders[case]

    return make


@pytest.fixture(scope="session")
def load_model(checkpoint: Callable[[str], Path]) -> Callable[..., nvlm.NVLM_D_Model]:
    """(case, **from_pretrained arguments) -> a model of its own."""

    def load(case: str = "base", **kwargs: Any) -> nvlm.NVLM_D_Model:
        return nvlm.NVLM_D_Model.from_pretrained(checkpoint(case), **kwargs)

    return load


@pytest.fixture(scope="session")
def base_model(load_model: Callable[..., nvlm.NVLM_D_Model]) -> nvlm.NVLM_D_Model:
    """The golden base model; shared, so not to be changed."""
    return load_model("base")


@pytest.fixture(scope="session")
def golden_chat() -> dict[str, Any]:
    """`golden/chat.json`: prompts, ids and logits of the released code."""
    return json.loads((GOLDEN / "chat.json").read_text())


@pytest.fixture(scope="session")
def golden_vision() -> Iterator[dict[str, torch.Tensor]]:
    """`golden/vision.safetensors`: features of the released code."""
    with safe_open(GOLDEN / "vision.safetensors", "pt") as file:
        yield {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
