"""Whole runs of stages on the tiny checkpoint: frozen parts, resuming, LoRA, several processes, and stage files."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor
from transformers.trainer_callback import TrainerCallback

import nvlm
from nvlm.training import LoRA, Stage, train
from nvlm.training.lora import add_adapters, merge_adapters
from nvlm.training.optimizer import muon_of
from nvlm.training.parts import freeze
from nvlm.training.plot import smooth
from nvlm.training.run import parse_settings
from nvlm.training.trainer import StageTrainer, last_checkpoint, training_arguments

STAGES = Path(nvlm.__file__).parent / "training" / "stages"


@pytest.fixture(scope="session")
def blend(tmp_path_factory: Any) -> Path:
    """A blend of 8 questions about small pictures and 4 without any, one of them bad."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    lines = []
    for i in range(8):
        shape = (60, 60 + 50 * (i % 2), 3)
        Image.fromarray(random.integers(0, 255, shape, np.uint8)).save(folder / f"{i}.png")
        content = [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": f"Which picture is number {i}?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"Number {i}, " * (i + 1)}]
        lines.append({"messages": messages})
    texts = [{"messages": [{"role": "user", "content": f"Say {i}"}]} for i in range(4)]
    for text in texts[1:]:
        text["messages"].append({"role": "assistant", "content": "Done."})
    for name, samples in {"pictures": lines, "text": texts}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    file = folder / "blend.yaml"
    file.write_text("sources:\n- {path: pictures.jsonl, weight: 2}\n- {path: text.jsonl, weight: 1}\n")
    return file


@pytest.fixture
def stage(checkpoint: Callable[[str], Path], blend: Path, tmp_path: Path) -> Stage:
    return Stage(
        model=str(checkpoint("base")),
        output=str(tmp_path / "run"),
        blend=str(blend),
        steps=4,
        learning_rate=1e-3,
        min_learning_rate=1e-4,
        warmup_steps=1,
        batch_size=4,
        micro_batch_size=2,
        sequence_length=400,
        precision="float32",
        save_every=2,
        log_every=1,
    )


def weights_of(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def test_a_run_trains_its_parts_and_writes_a_whole_checkpoint(stage: Stage) -> None:
    result = train(dataclasses.replace(stage, trained=("projector",), format="pretrain", output=stage.output))
    before, after = weights_of(stage.model), weights_of(result.output)
    assert set(after) == set(before)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"mlp1"}
    assert result.sizes["encoder"].trainable == result.sizes["decoder"].trainable == 0
    assert result.sizes["projector"].trainable == result.sizes["projector"].total > 0
    assert result.steps == 4
    assert result.totals["samples"] == 16
    assert result.totals["source/pictures"] + result.totals["source/text"] == 16
    assert result.skipped == {"no_answer": result.totals["skipped/no_answer"]}
    model = AutoModel.from_pretrained(result.output)
    assert torch.equal(model.mlp1[1].weight, after["mlp1.1.weight"])
    processor = AutoProcessor.from_pretrained(result.output)
    inputs = processor.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=True, return_dict=True)
    assert model(**inputs).logits.isfinite().all()
    lines = [json.loads(line) for line in (result.output / "log.jsonl").read_text().splitlines()]
    assert lines == result.log
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["samples_per_second"] > 0 and line["tokens_per_second"] > 0 for line in lines)
    assert lines[-1]["learning_rate"] == pytest.approx(1e-4 + 9e-4 * 0.25, rel=1e-6)
    assert (result.output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((result.output / "tensorboard").iterdir())
    checkpoints = weights_of(last_checkpoint(result.output) or "")
    assert {name.split(".")[0] for name in checkpoints} == {"mlp1"}


def test_training_both_parts_lowers_the_loss_and_leaves_the_encoder(stage: Stage) -> None:
    result = train(dataclasses.replace(stage, steps=10, save_every=10, learning_rate=3e-3))
    before, after = weights_of(stage.model), weights_of(result.output)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"mlp1", "language_model"}
    assert np.mean(result.losses[-3:]) < result.losses[0] - 1


CHANGES = [{}, {"workers": 1}, {"packing": True}, {"group_by_length": True, "log_every": 3}, {"optimizer": "muon"}]


@pytest.mark.parametrize("change", CHANGES)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    change: dict[str, Any], stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = dataclasses.replace(stage, steps=5, lora=LoRA(rank=2, dropout=0.1, projector=True), **change)
    whole = train(dataclasses.replace(stage, output=str(tmp_path / "whole")))
    step = StageTrainer.training_step

    def fail(self: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", fail)
        with pytest.raises(KeyboardInterrupt):
            train(stage)
    (Path(stage.output) / "checkpoint-3").mkdir()  # killed while it was written
    resumed = train(stage, resume=True)
    assert resumed.losses == whole.losses
    assert [entry["step"] for entry in resumed.log] == [entry["step"] for entry in whole.log]
    assert resumed.totals == whole.totals
    expected, found = weights_of(whole.output), weights_of(resumed.output)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_muon_takes_the_matrices_inside_the_network(stage: Stage, load_model: Any) -> None:
    model = load_model("base")
    freeze(model, stage)
    decayed = [name for name, value in model.named_parameters() if value.ndim == 2]
    optimizer = muon_of(
        model,
        outside=[model.get_input_embeddings(), model.get_output_embeddings()],
        decayed=decayed,
        learning_rate=1e-3,
        weight_decay=0.1,
        betas=(0.9, 0.95),
    )
    names = {id(value): name for name, value in model.named_parameters()}
    groups = [({names[id(value)] for value in group["params"]}, group) for group in optimizer.param_groups]
    (matrices, muon), (vocabulary, adamw), (rest, plain) = groups
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in matrices
    assert "mlp1.1.weight" in matrices
    assert vocabulary == {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}
    assert all("norm" in name or "bias" in name or name.startswith("mlp1.0") for name in rest)
    assert (muon["weight_decay"], adamw["weight_decay"], plain["weight_decay"]) == (0.1, 0.1, 0)
    assert set().union(*(members for members, _ in groups)) == {
        name for name, value in model.named_parameters() if value.requires_grad
    }


def test_muons_learning_rate_is_the_schedules(stage: Stage) -> None:
    result = train(dataclasses.replace(stage, optimizer="muon", warmup_steps=2, steps=4, log_every=1))
    before, after = weights_of(stage.model), weights_of(result.output)
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == {
        "mlp1", "language_model",
    }  # fmt: skip
    rates = [entry["learning_rate"] for entry in result.log]
    assert rates[0] < rates[1] < rates[2] > rates[3]


def test_the_cosine_may_end_after_the_stage(stage: Stage, tmp_path: Path) -> None:
    short = dataclasses.replace(stage, steps=3, decay_steps=6, log_every=1, output=str(tmp_path / "short"))
    whole = dataclasses.replace(stage, steps=6, log_every=1, output=str(tmp_path / "whole"))
    assert train(short).losses == train(whole).losses[:3]
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "short" / "log.jsonl").read_text().splitlines()]
    assert rates[-1] > stage.min_learning_rate


def test_a_second_stage_keeps_its_own_records(stage: Stage, tmp_path: Path) -> None:
    first = dataclasses.replace(stage, steps=2, log_every=1, output=str(tmp_path / "first"))
    second = dataclasses.replace(first, steps=3, model=first.output, output=str(tmp_path / "second"))
    train(first)
    log = train(second).log
    lines = [json.loads(line) for line in (tmp_path / "second" / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [entry["loss"] for entry in log]


def test_an_earlier_run_is_not_overwritten(stage: Stage) -> None:
    stage = dataclasses.replace(stage, steps=1)
    train(stage, resume=True)  # nothing to resume: it begins
    with pytest.raises(FileExistsError, match="holds an earlier run: pass --resume"):
        train(stage)


def test_resuming_another_stage_is_an_error(stage: Stage) -> None:
    train(dataclasses.replace(stage, steps=2))
    with pytest.raises(ValueError, match=r"names differ, such as .* Resume with the stage that wrote it"):
        train(dataclasses.replace(stage, trained=("projector",)), resume=True)


def test_micro_batches_make_no_difference(stage: Stage, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{"micro_batch_size": 4}, {"micro_batch_size": 1}]
    changes += [{"micro_batch_size": 4, "packing": True}]
    losses = []
    for i, change in enumerate(changes):
        losses.append(train(dataclasses.replace(stage, output=str(tmp_path / str(i)), **change)).losses)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-4)


def test_bfloat16_with_checkpointing_is_close_to_float32(stage: Stage, tmp_path: Path) -> None:
    exact = train(stage)
    rough = train(
        dataclasses.replace(stage, precision="bfloat16", gradient_checkpointing=True, output=str(tmp_path / "bfloat16"))
    )
    np.testing.assert_allclose(rough.losses, exact.losses, rtol=0.02)
    assert {weight.dtype for weight in weights_of(rough.output).values()} == {torch.bfloat16}


@pytest.mark.parametrize("projector", [False, True])
def test_merged_adapters_compute_the_same(projector: bool, stage: Stage, load_model: Any) -> None:
    lora = LoRA(rank=2, alpha=6.0, projector=projector)
    stage = dataclasses.replace(stage, lora=lora)
    model, plain = load_model("base"), load_model("base")
    freeze(model, stage)
    add_adapters(model, stage)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(name.startswith("mlp1.") and "lora_" not in name for name in trained) == (not projector)
    assert all("lora_" in name for name in trained if name.startswith("language_model."))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    names = set(plain.state_dict())
    merged = merge_adapters(model.state_dict(), lora)
    assert set(merged) == names
    inputs = {"input_ids": torch.tensor([[1, *[151654] * 4, 5, 6]]), "pixel_values": torch.randn(1, 3, 56, 56)}
    with torch.no_grad():
        before, adapted = plain(**inputs).logits, model(**inputs).logits
        plain.load_state_dict(merged)
        torch.testing.assert_close(plain(**inputs).logits, adapted, atol=1e-4, rtol=1e-4)
    assert (adapted - before).abs().max() > 0.1


def test_a_run_with_adapters_writes_a_plain_checkpoint(stage: Stage) -> None:
    result = train(dataclasses.replace(stage, lora=LoRA(rank=2)))
    before, after = weights_of(stage.model), weights_of(result.output)
    assert set(after) == set(before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "language_model.model.layers.0.mlp.up_proj.weight" in changed
    assert "mlp1.1.weight" in changed
    assert not any("norm" in name or "embed" in name or "vision" in name or "lm_head" in name for name in changed)
    adapters = weights_of(last_checkpoint(result.output) or "")
    assert all("lora_" in name or name.startswith("mlp1.") for name in adapters)


def test_two_processes_train_as_one(stage: Stage, tmp_path: Path) -> None:
    stage = dataclasses.replace(stage, steps=3)
    one = train(stage)
    (tmp_path / "stage.yaml").write_text(json.dumps({**stage.to_dict(), "output": str(tmp_path / "two")}))
    # Not `accelerate launch`: on CPUs alone it starts one process, whatever its configuration says (accelerate 1.15).
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "nvlm.training", str(tmp_path / "stage.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([line["loss"] for line in lines], one.losses, rtol=1e-5)
    totals = {name: value for name, value in lines[-1].items() if name.startswith("total/")}
    assert totals == {f"total/{name}": value for name, value in one.totals.items()} | {
        "total/places": totals["total/places"]
    }
    expected, found = weights_of(one.output), weights_of(tmp_path / "two")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-3)


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"trained": ["encoder"]},
        r"trained is \('encoder',\), expected at least one of .* \(the encoder is always frozen",
    ),
    ({"trained": []}, r"trained is \(\), expected at least one"),
    ({"format": "sft"}, r"format is 'sft', expected one of \['pretrain', 'chat'\]"),
    ({"optimizer": "sgd"}, r"optimizer is 'sgd', expected one of \['adamw', 'muon'\]"),
    ({"learning_rate": 0}, "learning_rate is 0, expected a number above 0"),
    ({"learning_rate": "fast"}, "learning_rate is 'fast', expected a number"),
    ({"min_learning_rate": 1}, "min_learning_rate is 1, expected at most 2e-06"),
    (
        {"warmup_steps": 5, "decay_steps": 4},
        r"decay_steps is 4, expected a whole number of at least warmup_steps \(5\)",
    ),
    ({"steps": 1.5}, "steps is 1.5, expected a whole number of at least 1"),
    ({"steps": True}, "steps is True, expected a whole number"),
    ({"warmup_steps": 11}, r"warmup_steps is 11, expected at most steps \(10\)"),
    ({"batch_size": 6, "micro_batch_size": 4}, r"batch_size is 6, expected a multiple of micro_batch_size \(4\)"),
    ({"precision": "fp8"}, "precision is 'fp8', expected one of"),
    ({"tile_tag": "3d"}, "tile_tag is '3d', expected one of"),
    ({"beta2": 1}, "beta2 is 1, expected a number from 0 to below 1"),
    ({"packing": "yes"}, "packing is 'yes', expected true or false"),
    ({"lora": {"rnak": 4}}, r"lora has unknown keys \['rnak'\]: known are \['rank'"),
    ({"lora": {"rank": 0}}, "lora.rank is 0, expected a whole number of at least 1"),
    ({"lora": {}, "trained": ["projector"]}, "expected 'decoder' in it"),
    ({"lora": {"projector": True}, "trained": ["decoder"]}, "expected 'projector' in it"),
    ({"max_tiles": 0}, "max_tiles is 0, expected a whole number of at least 1, or null"),
    ({"lr": 1}, r"unknown keys \['lr'\]: known are \['model', 'output'"),
    ({"model": None}, "model is None, expected a path"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_wrong_stages_are_named(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "stage.yaml"
    file.write_text(json.dumps({"model": "m", "output": "o", "blend": "b", "steps": 10, **values}))
    with pytest.raises(ValueError, match=message):
        Stage.from_yaml(file)


def test_stages_without_what_they_need_are_named(tmp_path: Path) -> None:
    (tmp_path / "stage.yaml").write_text("model: m\n")
    with pytest.raises(ValueError, match=r"lacks \['output', 'blend', 'steps'\]"):
        Stage.from_yaml(tmp_path / "stage.yaml")
    with pytest.raises(FileNotFoundError, match="expected a YAML file"):
        Stage.from_yaml(tmp_path / "none.yaml")


def test_settings_of_the_command_line_come_first(tmp_path: Path) -> None:
    file = tmp_path / "stage.yaml"
    file.write_text("model: m\noutput: o\nblend: b\nsteps: 10\n")
    stage = Stage.from_yaml(
        file, **parse_settings(["steps=20", "learning_rate=1e-4", "lora={rank: 8}", "trained=[decoder]"])
    )
    assert (stage.steps, stage.learning_rate, stage.trained) == (20, 1e-4, ("decoder",))
    assert stage.lora == LoRA(rank=8)
    file.write_text(json.dumps(stage.to_dict()))
    assert Stage.from_yaml(file) == stage
    with pytest.raises(ValueError, match="expected key=value"):
        parse_settings(["steps"])


# Of SPEC 8's table: the learning rates, warmup, decay, clip, beta2, batch, steps, sequence and tiles.
PAPER = {
    "pretrain": (1e-4, 2.5e-5, 500, 0.1, 10, 0.95, 2048, 20_000, 512, 1),
    "sft": (2e-6, 2.5e-7, 1000, 0.1, 10, 0.98, 128, 40_000, 3200, 6),
}


@pytest.mark.parametrize("size", ["34b", "72b"])
@pytest.mark.parametrize("kind", PAPER)
def test_the_papers_stages(size: str, kind: str) -> None:
    s = Stage.from_yaml(STAGES / f"nvlm_d_{size}_{kind}.yaml")
    rates = (s.learning_rate, s.min_learning_rate, s.warmup_steps, s.weight_decay, s.clip, s.beta2)
    assert (*rates, s.batch_size, s.steps, s.sequence_length, s.max_tiles) == PAPER[kind]
    assert s.trained == (("projector",) if kind == "pretrain" else ("projector", "decoder"))


def test_accumulation_follows_from_the_devices(stage: Stage) -> None:
    stage = dataclasses.replace(stage, batch_size=128, micro_batch_size=2)
    assert training_arguments(stage, world_size=1).gradient_accumulation_steps == 64
    assert training_arguments(stage, world_size=64).gradient_accumulation_steps == 1
    with pytest.raises(ValueError, match="batch_size is 128, expected a multiple of 256: micro_batch_size 2 on 128"):
        training_arguments(stage, world_size=128)


def test_smoothing_is_unbiased() -> None:
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0] * 3)
    assert smooth([1.0, 2.0])[-1] == pytest.approx((0.9 * 1 + 2) / 1.9)


class EncoderMode(TrainerCallback):
    """Notes whether encoder and decoder are in training mode after each step."""

    def __init__(self) -> None:
        self.modes: list[tuple[bool, bool]] = []

    def on_step_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.modes.append((model.vision_model.training, model.language_model.training))


def test_the_encoder_runs_in_evaluation_mode(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = EncoderMode()
    begin = StageTrainer.train

    def watched(self: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(watch)
        return begin(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "train", watched)
    train(dataclasses.replace(stage, steps=2))
    assert watch.modes == [(False, True)] * 2


def test_an_encoder_with_gradients_is_refused(stage: Stage, load_model: Any) -> None:
    model = load_model("base")
    args = training_arguments(stage, world_size=1)
    with pytest.raises(RuntimeError, match="expected a frozen encoder"):
        StageTrainer(stage=stage, model=model, args=args, data=[], collator=None)  # type: ignore[arg-type]
