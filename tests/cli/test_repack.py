"""`nvlm repack`: equal outputs, resumption at any point, bounded memory, refusals (SPEC 2)."""

import json
import math
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel

import nvlm
from nvlm.checkpoint import expected_tensors, published_dtypes
from nvlm.cli import checkpoint_writer, shards
from nvlm.cli.checkpoint_report import DTYPE_BITS, inspect_checkpoint
from nvlm.cli.main import main
from nvlm.cli.repack import plan_repack, repack

RandomWeights = Callable[[dict[str, Any]], dict[str, torch.Tensor]]

QKV = "vision_model.encoder.layers.1.attn.qkv.weight"
PROJ = "vision_model.encoder.layers.1.attn.proj.weight"
QUERY = "language_model.model.layers.1.self_attn.q_proj.weight"
REAL, INNER = 80, 192
SHARD = 150_000


def read(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but those in the work folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def config(small_config: dict[str, Any]) -> dict[str, Any]:
    return small_config


@pytest.fixture
def weights(config: dict[str, Any], random_weights: RandomWeights) -> dict[str, torch.Tensor]:
    """Random weights in the released dtypes, the dummy heads silent."""
    made = random_weights(config)
    for i in range(3):
        made[f"vision_model.encoder.layers.{i}.attn.proj.weight"][:, REAL:] = 0
    return made


@pytest.fixture
def source(tmp_path: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    return write_source(tmp_path / "source", config, weights)


def write_source(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    """A checkpoint of three shards with an index and other files."""
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for i in range(3):
        shard = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({name: weights[name] for name in list(weights)[i::3]}, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(list(weights)[i::3], shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "modeling_nvlm_d.py", "LICENSE", "pytorch_model.bin", ".hidden"):
        (folder / name).write_text(name)
    (folder / "assets").mkdir()
    (folder / "assets" / "a.txt").write_text("a")
    return folder


def test_copies_in_other_shards(source: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    target = tmp_path / "target"
    outcome = repack(source, target, max_shard_size=SHARD)
    assert outcome.written
    assert (outcome.old_bytes, outcome.old_shards) == (outcome.new_bytes, 3)
    assert same(read(target), weights)
    written = sorted(target.glob("*.safetensors"))
    assert len(written) == outcome.new_shards > 5
    largest = max(tensor.nbytes for tensor in weights.values())
    assert all(path.stat().st_size < max(SHARD, largest) + 10_000 for path in written)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    assert index["weight_map"].keys() == weights.keys()
    assert json.loads((target / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    for name in ("tokenizer.json", "modeling_nvlm_d.py", "LICENSE", "assets/a.txt"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert not (target / "pytorch_model.bin").exists()
    assert not (target / ".hidden").exists()
    assert inspect_checkpoint(target).ok


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_other_dtypes(
    source: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], tmp_path: Path, dtype: str
) -> None:
    repack(source, tmp_path / "target", dtype=dtype)
    wanted = getattr(torch, dtype)
    assert same(read(tmp_path / "target"), {name: tensor.to(wanted) for name, tensor in weights.items()})
    assert json.loads((tmp_path / "target" / "config.json").read_text()) == config | {"torch_dtype": dtype}


def test_every_dtype_field_follows(tmp_path: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    del config["torch_dtype"]
    config["dtype"] = config["vision_config"]["torch_dtype"] = config["llm_config"]["dtype"] = "float32"
    source = write_source(tmp_path / "source", config, weights)
    repack(source, tmp_path / "target", dtype="bfloat16")
    new = json.loads((tmp_path / "target" / "config.json").read_text())
    assert "torch_dtype" not in new
    assert new["dtype"] == new["vision_config"]["torch_dtype"] == new["llm_config"]["dtype"] == "bfloat16"


def test_values_that_float16_cannot_hold_are_refused(
    tmp_path: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]
) -> None:
    weights[QUERY][0, 0] = 1e5
    weights[QUERY][1, 1] = math.inf
    source = write_source(tmp_path / "source", config, weights)
    with pytest.raises(ValueError, match=rf"{QUERY} has values .* float16"):
        repack(source, tmp_path / "target", dtype="float16")


def test_dropping_dummy_heads(source: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    target = tmp_path / "target"
    outcome = repack(source, target, drop_dummy_heads=True, max_shard_size="1MB")
    assert outcome.new_bytes < outcome.old_bytes
    new = read(target)
    thirds = weights[QKV].chunk(3)
    assert torch.equal(new[QKV], torch.cat([third[:REAL] for third in thirds]))
    assert torch.equal(new[PROJ], weights[PROJ][:, :REAL])
    norm = QKV.replace("qkv", "k_norm")
    assert torch.equal(new[norm], weights[norm][:REAL])
    assert torch.equal(new[QUERY], weights[QUERY])
    assert json.loads((target / "config.json").read_text())["vision_config"]["num_dummy_heads"] == 0
    report = inspect_checkpoint(target)
    assert report.ok
    assert report.dummy_heads_stored == 0
    # There is nothing left to drop, which is no error.
    assert repack(target, tmp_path / "again", drop_dummy_heads=True).new_bytes == outcome.new_bytes


@pytest.mark.parametrize("bias", [False, True])
def test_which_dummy_heads_contribute(
    tmp_path: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], bias: bool
) -> None:
    config["vision_config"]["qkv_bias"] = bias
    for i in range(3 if bias else 0):
        weights[f"vision_model.encoder.layers.{i}.attn.qkv.bias"] = torch.ones(3 * INNER)
    weights[PROJ][3, REAL] = 1e-30
    source = write_source(tmp_path / "source", config, weights)
    with pytest.raises(ValueError, match=f"contribute in {QKV}"):
        repack(source, tmp_path / "target", drop_dummy_heads=True)
    assert not (tmp_path / "target").exists()
    # Where v's rows are zero, the columns do not matter, unless a bias brings values.
    weights[QKV][2 * INNER + REAL :] = 0
    shutil.rmtree(source)
    write_source(source, config, weights)
    if bias:
        with pytest.raises(ValueError, match=f"contribute in {QKV}"):
            repack(source, tmp_path / "target", drop_dummy_heads=True)
        weights[QKV.replace("weight", "bias")][2 * INNER + REAL :] = 0
        shutil.rmtree(source)
        write_source(source, config, weights)
    assert repack(source, tmp_path / "target", drop_dummy_heads=True).written


def test_the_golden_models_outputs_are_unchanged(
    checkpoint: Callable[[str], Path], load_model: Callable[..., nvlm.NVLM_D_Model], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    inputs = {
        "input_ids": torch.tensor([[151644, 872, *[151654] * 8, 198, 40, 151645]]),
        "pixel_values": torch.randn(2, 3, 56, 56),
    }
    with torch.no_grad():
        before = load_model("base", drop_dummy_heads=False, dtype=torch.float32)(**inputs).logits
        repack(checkpoint("base"), tmp_path / "plain", max_shard_size="20MB")
        model = AutoModel.from_pretrained(tmp_path / "plain", drop_dummy_heads=False, dtype=torch.float32)
        assert model.config.vision_config.num_dummy_heads == 7
        assert torch.equal(model(**inputs).logits, before)
        repack(checkpoint("base"), tmp_path / "dropped", drop_dummy_heads=True)
        model = AutoModel.from_pretrained(tmp_path / "dropped", dtype=torch.float32)
        assert model.config.vision_config.num_dummy_heads == 0
        assert (model(**inputs).logits - before).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"contribute in vision_model\.encoder\.layers\.0\.attn\.qkv\.weight"):
        repack(checkpoint("dummy_nonzero"), tmp_path / "refused", drop_dummy_heads=True)


class Kill(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_resumes_after_a_kill_at_any_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Every file ends in a rename; the kill comes just before or just after it."""
    options: dict[str, Any] = {"dtype": "bfloat16", "drop_dummy_heads": True, "max_shard_size": SHARD}
    replace = os.replace
    renames: list[str] = []
    kill_at = 0

    def rename(old: Any, new: Any) -> None:
        renames.append(Path(new).name)
        if late or len(renames) != kill_at:
            replace(old, new)
        if len(renames) == kill_at:
            raise Kill

    monkeypatch.setattr(os, "replace", rename)
    repack(source, tmp_path / "whole", **options)
    wanted = files(tmp_path / "whole")
    order = list(renames)
    assert sum(name.endswith(".safetensors") for name in order) >= 4
    assert order[-2:] == ["config.json", "manifest.json"]
    for step in range(1, len(order) + 1):
        target = tmp_path / f"killed-{step}"
        renames.clear()
        kill_at = step
        with pytest.raises(Kill):
            repack(source, target, **options)
        present = files(target)
        assert present.items() <= wanted.items()
        renames.clear()
        kill_at = 0
        repack(source, target, **options)
        assert files(target) == wanted
        # Shards that were there are not written again.
        assert not {name for name in renames if name.endswith(".safetensors")} & present.keys()
        assert not repack(source, target, **options).written


def test_a_kill_within_a_file_leaves_none(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    plan, _ = plan_repack(source, max_shard_size=400_000)
    first, second, *_ = plan.shards.values()
    read_blocks = shards.read_blocks
    read_names: list[str] = []

    def killed(piece: shards.Piece, handle: Any) -> Any:
        yield from read_blocks(piece, handle)
        if piece.name == sorted(second, key=lambda piece: piece.dtype != "F32")[1].name:
            raise Kill

    def recorded(piece: shards.Piece, handle: Any) -> Any:
        read_names.append(piece.name)
        return read_blocks(piece, handle)

    monkeypatch.setattr(shards, "read_blocks", killed)
    with pytest.raises(Kill):
        repack(source, target, max_shard_size=400_000)
    assert [path.name for path in target.glob("*.safetensors")] == [next(iter(plan.shards))]
    assert not (target / "config.json").exists()
    assert (target / ".nvlm-repack" / "new").stat().st_size > 0
    monkeypatch.setattr(shards, "read_blocks", recorded)
    assert repack(source, target, max_shard_size=400_000).written
    assert not set(read_names) & {piece.name for piece in first}
    assert {piece.name for piece in second} < set(read_names)
    assert same(read(target), read(source))
    assert not (target / ".nvlm-repack" / "new").exists()


def test_a_resume_redoes_what_is_damaged(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    repack(source, target, max_shard_size=SHARD)
    shard = sorted(target.glob("*.safetensors"))[2]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    assert repack(source, target, max_shard_size=SHARD).written
    assert shard.read_bytes() == whole


def test_a_finished_target_is_left_alone(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    assert main(["repack", str(source), str(target)]) == 0
    assert "wrote" in capsys.readouterr().out
    (target / "LICENSE").write_text("edited")
    assert main(["repack", str(source), str(target)]) == 0
    assert "finished before" in capsys.readouterr().out
    assert (target / "LICENSE").read_text() == "edited"


def test_other_options_and_other_sources_do_not_mix(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    repack(source, target, max_shard_size=SHARD)
    with pytest.raises(ValueError, match=r"begun with dtype None, now 'bfloat16', max_shard_size 150000, now 9"):
        repack(source, target, dtype="bfloat16", max_shard_size=9)
    os.utime(sorted(source.glob("*.safetensors"))[0], (1, 1))
    with pytest.raises(ValueError, match="begun from other files"):
        repack(source, target, max_shard_size=SHARD)
    (target / ".nvlm-repack" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="broken"):
        repack(source, target, max_shard_size=SHARD)


class Alive(TorchDispatchMode):
    """Bytes of the storages of all tensors alive, mapped files included, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            storage = out.untyped_storage()
            entry = self._storages.setdefault(storage.data_ptr(), [0, 0])
            entry[0], entry[1] = storage.nbytes(), entry[1] + 1
            weakref.finalize(out, self._forget, storage.data_ptr())
            self.peak = max(self.peak, sum(size for size, count in self._storages.values() if count))
        return out

    def _forget(self, pointer: int) -> None:
        self._storages[pointer][1] -= 1


def test_memory_stays_below_two_shards(tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config["llm_config"]["num_hidden_layers"] = 30
    source = write_source(
        tmp_path / "source", config, {name: torch.zeros(shape) for name, shape in expected_tensors(config).items()}
    )
    options: dict[str, Any] = {"dtype": "bfloat16", "drop_dummy_heads": True, "max_shard_size": 200_000}
    with Alive() as alive:
        outcome = repack(source, tmp_path / "target", **options)
    assert outcome.new_shards >= 10
    assert 100_000 < alive.peak < 2 * 200_000 < outcome.new_bytes / 4
    # A tensor far larger than a block is not copied whole either: beyond the mapped source only blocks are alive.
    monkeypatch.setattr(shards, "BLOCK_BYTES", 4096)
    largest = max(math.prod(shape) * 4 for shape in expected_tensors(config).values())
    with Alive() as alive:
        repack(source, tmp_path / "blocks", **options)
    assert alive.peak < largest + 4 * 4096
    assert files(tmp_path / "blocks") == files(tmp_path / "target")


def test_what_the_disk_gives_back_is_checked(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def damage(descriptor: int) -> None:
        fsync(descriptor)
        scratch = tmp_path / "target" / ".nvlm-repack" / "new"
        if scratch.stat().st_size > 100_000:
            with scratch.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_END)
                file.write(bytes([byte ^ 1]))

    monkeypatch.setattr(os, "fsync", damage)
    with pytest.raises(OSError, match="holds other values of"):
        repack(source, tmp_path / "target")
    assert not list((tmp_path / "target").glob("*.safetensors"))


def test_a_dry_run_of_the_published_checkpoint(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((repository / "config.json").read_text())
    shutil.copy(repository / "config.json", tmp_path)
    dtypes, shapes = published_dtypes(config), expected_tensors(config)
    names = list(shapes)
    for i in range(46):  # as many files as published, of headers and nothing else
        header: dict[str, Any] = {}
        end = 0
        for name in names[i::46]:
            start, end = end, end + math.prod(shapes[name]) * DTYPE_BITS[dtypes[name]] // 8
            header[name] = {"dtype": dtypes[name], "shape": shapes[name], "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        path = tmp_path / f"model-{i + 1:05}-of-00046.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, 8 + len(text) + end)
    target = tmp_path.with_name("never")
    command = ["repack", str(tmp_path), str(target), "--dtype", "bfloat16", "--dry-run"]
    assert main([*command, "--drop-dummy-heads"]) == 0
    text_out = capsys.readouterr().out
    assert text_out.startswith("176.9 GB -> 157.7 GB (176901927168 -> 157726833408 bytes, 46 -> ")
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("176.9 GB -> 158.8 GB")
    assert not target.exists()


def test_targets_that_are_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="both source and target"):
        repack(source, source / ".." / "source")
    (tmp_path / "z-link").symlink_to(source)
    with pytest.raises(ValueError, match="both source and target"):
        repack(source, tmp_path / "z-link")
    with pytest.raises(ValueError, match="lies in the source"):
        repack(source, source / "new")
    with pytest.raises(ValueError, match=r"not empty \(it holds 'source'\)"):
        repack(source, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not a folder"):
        repack(source, tmp_path / "file")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoint_writer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"needs 0\.0 GB, but .* make room"):
        repack(source, tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8', expected one of"),
        ({"max_shard_size": "5 apples"}, "'5 apples' not understood"),
        ({"max_shard_size": "0GB"}, "expected at least 1"),
    ],
)
def test_options_that_are_refused(source: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        repack(source, tmp_path / "target", **options)
    assert not (tmp_path / "target").exists()


def test_sources_that_are_refused(source: Path, config: dict[str, Any], tmp_path: Path) -> None:
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="quantization_config"):
        repack(source, tmp_path / "target")
    (source / "config.json").write_text(json.dumps(config))
    shard = sorted(source.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"no sound checkpoint: Shard .* is cut off"):
        repack(source, tmp_path / "target")
    with pytest.raises(ValueError, match="is not a folder"):
        repack(tmp_path / "absent", tmp_path / "target")
    assert not (tmp_path / "target").exists()
