"""What a checkpoint must hold, and what `inspect_checkpoint` makes of whole, damaged and hostile ones (SPEC 2)."""

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import nvlm
from nvlm.checkpoint import VISION_DEFAULTS, expected_tensors, published_dtypes
from nvlm.cli.checkpoint_report import DTYPE_BITS, inspect_checkpoint, read_header

PUBLISHED = json.loads((Path(__file__).resolve().parent.parent / "config.json").read_text())
PROJECTION = "vision_model.encoder.layers.0.attn.proj.weight"
QUERY = "language_model.model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def weights(small_config: dict[str, Any]) -> dict[str, torch.Tensor]:
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
    stored = published_dtypes(small_config)
    return {
        name: torch.zeros(shape, dtype=dtypes[stored[name]]) for name, shape in expected_tensors(small_config).items()
    }


@pytest.fixture
def write(tmp_path: Path, small_config: dict[str, Any]) -> Callable[..., Path]:
    """(weights, number of shards, config) -> a checkpoint's folder with an index."""

    def write_checkpoint(
        weights: dict[str, torch.Tensor], *, num_shards: int = 3, config: dict[str, Any] | None = None
    ) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config or small_config))
        weight_map: dict[str, str] = {}
        names = list(weights)
        for i in range(num_shards):
            shard = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
            save_file({name: weights[name] for name in names[i::num_shards]}, tmp_path / shard, {"format": "pt"})
            weight_map |= dict.fromkeys(names[i::num_shards], shard)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        for module in ("configuration_nvlm_d.py", "modeling_nvlm_d.py"):
            (tmp_path / module).touch()
        return tmp_path

    return write_checkpoint


def test_the_72b_has_the_published_tensors(recipe: ModuleType) -> None:
    tensors = expected_tensors(PUBLISHED)
    assert len(tensors) == 1556
    assert tensors == recipe.shapes(PUBLISHED)


def test_the_72b_has_the_published_size() -> None:
    dtypes = published_dtypes(PUBLISHED)
    bits = sum(math.prod(shape) * DTYPE_BITS[dtypes[name]] for name, shape in expected_tensors(PUBLISHED).items())
    assert bits // 8 == 176_901_927_168


def test_float32_tensors_are_those_of_the_specification() -> None:
    float32 = {name for name, dtype in published_dtypes(PUBLISHED).items() if dtype == "F32"}
    layer = "language_model.model.layers.7.self_attn."
    encoder = "vision_model.encoder.layers.7.attn."
    assert {f"{layer}{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")} < float32
    assert {f"{encoder}{part}.weight" for part in ("qkv", "proj", "q_norm", "k_norm")} < float32
    assert len(float32) == 80 * 6 + 45 * 4


@pytest.mark.parametrize("case", ["base", "dummy_nonzero", "ps_v1", "select_layer_-2"])
def test_golden_checkpoints_have_the_tensors_expected(recipe: ModuleType, case: str) -> None:
    assert expected_tensors(recipe.config_dict(case)) == recipe.shapes(recipe.config_dict(case))


def test_defaults_are_those_of_the_config_class() -> None:
    assert {name: getattr(nvlm.InternVisionConfig(), name) for name in VISION_DEFAULTS} == VISION_DEFAULTS


def vary(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A config with changes, whose keys may begin with vision__ or llm__; None removes a field."""
    config = copy.deepcopy(config)
    for key, value in changes.items():
        part, _, name = key.rpartition("__")
        target = config[f"{part}_config"] if part else config
        target[name] = value
        if value is None:
            del target[name]
    return config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vision__num_dummy_heads": 0},
        {"vision__num_dummy_heads": 3, "vision__qkv_bias": True},
        {"vision__qk_normalization": False},
        {"vision__norm_type": "layer_norm"},
        {"vision__image_size": 112, "force_image_size": 112},
        {"downsample_ratio": 0.25},
        {"projector_bias": True},
        {"llm__tie_word_embeddings": True},
        {"llm__head_dim": 32},
        {"llm__architectures": ["LlamaForCausalLM"], "llm__attention_bias": False},
        {"llm__architectures": ["LlamaForCausalLM"], "llm__attention_bias": True, "llm__mlp_bias": True},
        {"llm__architectures": None, "llm__model_type": "qwen2"},
        {"llm__architectures": None},
        {"llm__num_key_value_heads": None, "llm__num_attention_heads": 32, "llm__hidden_size": 256},
        {"llm__architectures": ["LlamaForCausalLM"], "llm__num_key_value_heads": None},
        {"llm__vocab_size": None, "llm__num_hidden_layers": None},
    ],
    ids=lambda changes: ",".join(changes) or "as it is",
)
def test_tensors_are_those_that_the_model_makes(small_config: dict[str, Any], changes: dict[str, Any]) -> None:
    values = vary(small_config, **changes)
    config = nvlm.NVLM_D_Config(**copy.deepcopy(values))
    with torch.device("meta"):
        model = nvlm.NVLM_D_Model(config)
    made = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.llm_config.tie_word_embeddings:
        del made["language_model.lm_head.weight"]
    assert expected_tensors(values) == made
    assert expected_tensors(config) == made
    assert expected_tensors(config.to_dict()) == made


def test_a_config_without_decoder_has_the_defaults() -> None:
    assert expected_tensors({"model_type": "NVLM_D"}) == expected_tensors(nvlm.NVLM_D_Config())


def test_internvl_has_its_own_layout() -> None:
    decoder = {**PUBLISHED["llm_config"], "architectures": ["LlamaForCausalLM"], "attention_bias": False}
    config = {"model_type": "internvl_chat", "llm_config": decoder}
    tensors = expected_tensors(config)
    assert tensors["vision_model.encoder.layers.0.attn.proj.weight"] == (3200, 3200)
    assert tensors["mlp1.1.weight"] == (8192, 12800)
    assert tensors["mlp1.3.bias"] == (8192,)
    assert set(published_dtypes(config).values()) == {"BF16"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava"}, "`model_type` is 'llava'"),
        ({"vision__hidden_size": 81}, "multiple of 5 attention heads"),
        ({"vision__num_hidden_layers": 0}, "`num_hidden_layers` is 0"),
        ({"vision__num_dummy_heads": -1}, "`num_dummy_heads` is -1"),
        ({"llm__num_hidden_layers": 10**9}, "at most 1024 layers"),
        ({"llm__vocab_size": "many"}, "`vocab_size` is 'many'"),
        ({"llm__architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"downsample_ratio": 0}, "`downsample_ratio` is 0"),
    ],
)
def test_configs_of_no_such_model_are_errors(
    small_config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        expected_tensors(vary(small_config, **changes))


def test_a_whole_checkpoint_is_sound(write: Callable[..., Path], weights: dict[str, torch.Tensor]) -> None:
    report = inspect_checkpoint(write(weights))
    assert report.ok, report.problems
    assert report.notes == []
    assert (report.num_shards, report.num_tensors) == (3, len(weights))
    assert report.total_bytes == sum(tensor.nbytes for tensor in weights.values()) == sum(report.dtype_bytes.values())
    assert (report.dummy_heads_config, report.dummy_heads_stored) == (7, 7)
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_golden_checkpoint_and_one_saved_by_the_model_are_sound(
    checkpoint: Callable[[str], Path], base_model: nvlm.NVLM_D_Model, tmp_path: Path
) -> None:
    report = inspect_checkpoint(checkpoint("base"))
    assert report.ok, report.problems
    assert any("F32 where the released checkpoint has BF16" in note for note in report.notes)
    base_model.save_pretrained(tmp_path)  # by now without dummy heads
    saved = inspect_checkpoint(tmp_path)
    assert saved.ok, saved.problems
    assert (saved.dummy_heads_config, saved.dummy_heads_stored) == (0, 0)


def test_other_float_dtypes_are_fine(write: Callable[..., Path], weights: dict[str, torch.Tensor]) -> None:
    report = inspect_checkpoint(write({name: tensor.half() for name, tensor in weights.items()}))
    assert report.ok
    assert any("F16 where the released checkpoint has BF16" in note for note in report.notes)


def test_other_dtypes_are_a_problem(write: Callable[..., Path], weights: dict[str, torch.Tensor]) -> None:
    weights[QUERY] = weights[QUERY].to(torch.int8)
    assert any("1 tensors are I8" in problem for problem in inspect_checkpoint(write(weights)).problems)


def test_missing_and_unknown_tensors(write: Callable[..., Path], weights: dict[str, torch.Tensor]) -> None:
    weights["language_model.output.weight"] = weights.pop(QUERY)
    report = inspect_checkpoint(write(weights))
    assert (report.missing, report.unexpected) == ([QUERY], ["language_model.output.weight"])
    assert len(report.problems) == 2


def test_wrong_shapes(write: Callable[..., Path], weights: dict[str, torch.Tensor]) -> None:
    weights[QUERY] = torch.zeros(5, 5)
    report = inspect_checkpoint(write(weights))
    assert report.wrong_shapes == {QUERY: ((5, 5), (64, 64))}
    assert f"{QUERY} (5, 5), expected (64, 64)" in report.problems[0]


def test_dummy_heads_that_the_config_denies(
    write: Callable[..., Path], weights: dict[str, torch.Tensor], small_config: dict[str, Any]
) -> None:
    folder = write(weights, config=vary(small_config, vision__num_dummy_heads=0))
    report = inspect_checkpoint(folder)
    assert (report.dummy_heads_config, report.dummy_heads_stored) == (0, 7)
    [problem] = report.problems  # one, not one for each tensor
    assert "hold 7 dummy heads, config.json says 0" in problem


def test_layers_that_disagree_about_dummy_heads(write: Callable[..., Path], weights: dict[str, torch.Tensor]) -> None:
    weights[PROJECTION] = weights[PROJECTION][:, :80].clone()
    report = inspect_checkpoint(write(weights))
    assert report.dummy_heads_stored is None
    assert list(report.wrong_shapes) == [PROJECTION]


def test_a_tied_head_may_be_stored(
    write: Callable[..., Path], weights: dict[str, torch.Tensor], small_config: dict[str, Any]
) -> None:
    config = vary(small_config, llm__tie_word_embeddings=True)
    assert inspect_checkpoint(write(weights, config=config)).ok
    del weights["language_model.lm_head.weight"]
    assert inspect_checkpoint(write(weights, config=config)).ok


def test_quantised_checkpoints_are_checked_by_name(
    write: Callable[..., Path], weights: dict[str, torch.Tensor], small_config: dict[str, Any]
) -> None:
    weights[QUERY] = torch.zeros(2048, 1, dtype=torch.uint8)
    weights[f"{QUERY}.absmax"] = torch.zeros(64)
    config = vary(small_config, quantization_config={"quant_method": "bitsandbytes"})
    report = inspect_checkpoint(write(weights, config=config))
    assert report.ok, report.problems
    assert any("not compared" in note for note in report.notes)


def test_missing_and_truncated_shards(write: Callable[..., Path], weights: dict[str, torch.Tensor]) -> None:
    folder = write(weights)
    first, second, third = sorted(folder.glob("*.safetensors"))
    first.unlink()
    os.truncate(second, second.stat().st_size - 10)
    os.truncate(third, 100)
    problems = inspect_checkpoint(folder).problems
    assert f"Shard {first.name}: {first} does not exist." in problems
    assert f"Shard {second.name} is cut off: 10 bytes are missing. Download it again." in problems
    assert any(third.name in problem and "cut off" in problem for problem in problems)


def test_an_index_that_disagrees_with_the_shards(write: Callable[..., Path], weights: dict[str, torch.Tensor]) -> None:
    folder = write(weights)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    there = index["weight_map"].pop(QUERY)
    index["weight_map"]["made.up"] = there
    path.write_text(json.dumps(index))
    problems = inspect_checkpoint(folder).problems
    assert any(f"Shard {there} holds {QUERY}: not in the index" in problem for problem in problems)
    assert any(f"The index places made.up in {there}" in problem for problem in problems)


def test_shards_that_repeat_or_are_left_out(write: Callable[..., Path], weights: dict[str, torch.Tensor]) -> None:
    folder = write(weights)
    save_file({QUERY: weights[QUERY]}, folder / "extra.safetensors")
    report = inspect_checkpoint(folder)
    assert report.ok
    assert any("never loaded: extra.safetensors" in note for note in report.notes)
    (folder / "model.safetensors.index.json").unlink()
    assert any(f"repeats tensors of another: {QUERY}" in problem for problem in inspect_checkpoint(folder).problems)


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../secret.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}',
    ],
)
def test_a_useless_index_is_a_problem(write: Callable[..., Path], weights: dict[str, torch.Tensor], index: str) -> None:
    folder = write(weights)
    (folder / "model.safetensors.index.json").write_text(index)
    assert any("The index cannot be used" in problem for problem in inspect_checkpoint(folder).problems)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 2}', "\udcff", "[" * 100_000, '{"llm_config": 3}'])
def test_a_useless_config_is_a_problem(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    report = inspect_checkpoint(tmp_path)
    assert "config.json" in report.problems[0]
    assert "no *.safetensors" in report.problems[1]


def test_configs_worth_a_note(
    write: Callable[..., Path], weights: dict[str, torch.Tensor], small_config: dict[str, Any]
) -> None:
    folder = write(weights, config=vary(small_config, force_image_size=112, auto_map=None))
    notes = "\n".join(inspect_checkpoint(folder).notes)
    assert "`force_image_size` is 112" in notes
    assert "no `auto_map`" in notes
    write(weights)
    (folder / "modeling_nvlm_d.py").unlink()
    assert any("names modeling_nvlm_d.py, not in the folder" in note for note in inspect_checkpoint(folder).notes)


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        inspect_checkpoint(tmp_path / "absent")


def test_old_checkpoint_formats_are_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    assert any("convert them" in problem for problem in inspect_checkpoint(tmp_path).problems)


def file_of(header: Any, *, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), data_offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no safetensors file"),
        (b"\x01\x02", "no safetensors file"),
        (file_of({}, length=2**63), "no safetensors file"),
        (file_of({}, length=200_000_000), "no safetensors file"),
        (file_of(b"{nonsense"), "not valid JSON"),
        (file_of(b"\xff\xfe"), "not valid JSON"),
        (file_of(b"[" * 100_000), "not valid JSON"),
        (file_of([1]), "expected an object"),
        (file_of(b'{"a": {}, "a": {}}'), "stands in it twice"),
        (file_of({"a": 3}), "malformed"),
        (file_of({"a": entry(dtype="F31")}), "malformed"),
        (file_of({"a": entry(dtype=["F32"])}), "malformed"),
        (file_of({"a": entry(shape=[-2])}), "malformed"),
        (file_of({"a": entry(shape=[2.0])}), "malformed"),
        (file_of({"a": entry(shape=[True])}), "malformed"),
        (file_of({"a": entry(shape="2")}), "malformed"),
        (file_of({"a": entry(data_offsets=[0])}), "malformed"),
        (file_of({"a": entry(data_offsets=[0, 9])}), "claims bytes 0 to 9"),
        (file_of({"a": entry(data_offsets=[8, 0])}), "claims bytes 8 to 0"),
        (file_of({"a": entry(shape=[10**30])}), "malformed"),
        (file_of({"a": entry(shape=[1] * 65)}), "malformed"),
        (file_of({"a": entry(shape=[10**18] * 64)}), "claims bytes"),
        (file_of({"a": entry(), "b": entry()}, data=bytes(8)), "overlap"),
        (file_of({"a": entry(data_offsets=[8, 16])}, data=bytes(16)), "gap"),
        (file_of({"a": entry()}, data=bytes(9)), "1 bytes more"),
        (file_of({"\x1b[2J" * 99: 3}), r"\\x1b"),
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_header(path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 3000
    assert not inspect_checkpoint(tmp_path).ok


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is not a file"):
        read_header(tmp_path / "model.safetensors")


def test_headers_of_real_files(tmp_path: Path) -> None:
    tensors = {"b": torch.zeros(2, 3), "a": torch.zeros(4, dtype=torch.bfloat16), "empty": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.missing_bytes == 0
    read = {name: (info.dtype, info.shape, info.num_bytes) for name, info in header.tensors.items()}
    assert read == {"b": ("F32", (2, 3), 24), "a": ("BF16", (4,), 8), "empty": ("F32", (0, 3), 0)}
