"""The benchmarks compute what they say: fits, tables, peers of the same size and work, peaks, bytes of a step."""

import copy
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as entry
from benchmarks import batch, choices, soak, turns
from benchmarks.decode import bytes_a_step
from benchmarks.encoder_layer import bare_products
from benchmarks.fits import fit
from benchmarks.models import Bench, mid_config, prompt_ids, random_model, random_tiles, tiny_bench
from benchmarks.peaks import LiveTensors, peak_growth
from benchmarks.peers import decoder_of, internvl_config, internvl_of
from benchmarks.report import Figure, Section, table, write
from benchmarks.session_memory import kept_bytes
from benchmarks.settings import Settings
from benchmarks.timing import median_ratio, take_turns
from nvlm import NVLM_D_Config, NVLM_D_Model
from nvlm.modeling_intern_vit import InternVisionEncoderLayer

PAD = 495


@pytest.fixture(scope="module")
def small() -> Bench:
    """Two encoder layers, three of the decoder, 112-pixel tiles of 16 tokens, float32."""
    config = NVLM_D_Config(
        force_image_size=112,
        image_token_id=PAD,
        vision_config={
            "hidden_size": 160,
            "num_attention_heads": 5,
            "num_dummy_heads": 0,
            "intermediate_size": 640,
            "num_hidden_layers": 2,
            "image_size": 112,
        },
        llm_config={
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "tie_word_embeddings": False,
        },
    )
    return Bench("tiny", random_model(config, dtype=torch.float32), range(490))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained() -> Bench:
    """The tiny checkpoint."""
    return tiny_bench()


def flops(work: Any) -> int:
    """Floating-point operations of matrix products, convolutions and attention."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize(("power", "constant"), [(1.0, 0.0), (1.0, 50.0), (2.0, 30.0), (0.5, 1.0)])
def test_fit_finds_the_exponent(power: float, constant: float) -> None:
    x = np.arange(1, 14)
    noise = 1 + 0.002 * np.random.default_rng(0).standard_normal(13)
    found = fit(x, (constant + 7 * x**power) * noise)
    assert found.exponent == pytest.approx(power, abs=0.05)
    if power == 1:
        assert found.slope == pytest.approx(7, rel=0.05)
        assert found.constant == pytest.approx(constant, abs=0.5)
        assert found.worst < 0.02
    else:
        assert found.worst > 0.02
    if constant == 0:
        assert found.plain_exponent == pytest.approx(power, abs=0.02)


def test_constant_flattens_the_plain_exponent() -> None:
    x = range(1, 14)
    found = fit(x, [100 + n for n in x])
    assert found.plain_exponent < 0.1
    assert found.exponent == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("x", "y"), [([1, 2, 3], [1, 2, 3]), ([0, 1, 2, 3], [1, 2, 3, 4]), ([1, 2, 3, 4], [1, 2, 3])])
def test_fit_refuses(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="at least four points"):
        fit(x, y)


def test_contenders_take_turns() -> None:
    order: list[str] = []
    found = take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"
    assert [len(taken) for taken in found.values()] == [3, 3]
    assert median_ratio([2, 9, 30], [1, 3, 10]) == 3


def test_table_says_what_is_met(tmp_path: Path) -> None:
    figures = [
        Figure("speed", 1.2, at_least=1.0),
        Figure("peak", 1.2, "GB", at_most=1.1),
        Figure("both", 1.0, at_least=0.9, at_most=1.1),
        Figure("time", 12.3456, "ms"),
    ]
    assert [figure.is_met for figure in figures] == [True, False, True, None]
    section = Section("one", "what was done", figures, {"raw": [1]}, [tmp_path / "line.png"], note="a note")
    lines = table([section]).splitlines()
    assert lines[2] == "| one | speed | 1.2 | at least 1 | yes |"
    assert lines[3] == "| one | peak | 1.2 GB | at most 1.1 | **no** |"
    assert lines[4] == "| one | both | 1 | at least 0.9 and at most 1.1 | yes |"
    assert lines[5] == "| one | time | 12.35 ms |  |  |"
    assert lines[6] == "| one | a note | | | |"
    write(tmp_path, [section], machine={"threads": 2}, seconds={"one": 3.0})
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["sections"]["one"]["figures"][1]["met"] is False
    assert results["sections"]["one"]["data"] == {"raw": [1]}
    text = (tmp_path / "results.md").read_text()
    assert "**one**: what was done" in text
    assert "![line](line.png)" in text


def test_live_tensors_counts_bytes() -> None:
    with torch.no_grad(), LiveTensors() as live:
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.ones(5000).add_(1).view(50, 100)
        assert live.nbytes == kept.nbytes
        assert live.peak == 24_000
        del kept
        assert live.nbytes == 0


def test_peak_growth_sees_what_is_freed_again() -> None:
    size = 300_000_000

    def hold() -> str:
        held = bytearray(b"x") * size
        time.sleep(0.5)  # as long operators do, this lets the watcher look
        del held
        return "done"

    grown, result = peak_growth(hold)
    assert result == "done"
    assert 0.9 * size < grown < 1.2 * size


def test_mid_size_model_is_what_it_says() -> None:
    config = mid_config()
    with torch.device("meta"):
        model = NVLM_D_Model(config)
    decoder = sum(parameter.numel() for parameter in model.language_model.parameters())
    assert decoder == pytest.approx(0.51e9, rel=0.01)
    vision = config.vision_config
    released = (3200, 12800, 25, 448, 14)
    assert len(model.vision_model.encoder.layers) == 4
    assert (
        vision.hidden_size,
        vision.intermediate_size,
        vision.num_attention_heads,
        vision.image_size,
        vision.patch_size,
    ) == released


def test_random_model_is_the_same_each_time_and_finite(small: Bench) -> None:
    again = random_model(small.model.config, dtype=torch.float32)
    for (name, one), other in zip(small.model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
    logits = small.model(input_ids=prompt_ids(small, 2, 60), pixel_values=random_tiles(small, 2)).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.1


def test_internvl_has_our_parameters_part_by_part(small: Bench) -> None:
    model, peer = small.model, internvl_of(small.model)

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(peer.model.vision_tower) == count(model.vision_model)
    assert count(peer.model.multi_modal_projector) == count(model.mlp1)
    assert count(peer.model.language_model) + count(peer.lm_head) == count(model.language_model)
    assert not any(parameter.is_meta for parameter in peer.parameters())


def test_internvl_does_our_work(small: Bench) -> None:
    model, peer = small.model, internvl_of(small.model)
    ids, pixels = prompt_ids(small, 3, 80), random_tiles(small, 3)
    with torch.no_grad():
        ours = model(input_ids=ids, pixel_values=pixels, logits_to_keep=1).logits
        theirs = peer(input_ids=ids, pixel_values=pixels, logits_to_keep=1).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for own, other in (
        (lambda: model.vision_model(pixels), lambda: peer.model.vision_tower(pixels)),
        (
            lambda: model(input_ids=ids, pixel_values=pixels, logits_to_keep=1),
            lambda: peer(input_ids=ids, pixel_values=pixels, logits_to_keep=1),
        ),
    ):
        assert flops(own) == flops(other) > 0


def test_internvl_refuses_what_it_cannot_be(small: Bench) -> None:
    config = NVLM_D_Config(vision_config={"num_dummy_heads": 7})
    with pytest.raises(ValueError, match="no dummy heads"):
        internvl_config(config)
    llama = NVLM_D_Config(llm_config=small.model.config.llm_config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    with torch.device("meta"):
        model = NVLM_D_Model(llama)
    with pytest.raises(ValueError, match="expected a Qwen2ForCausalLM"):
        decoder_of(model)


def test_bare_products_are_those_of_a_layer(small: Bench) -> None:
    config = copy.deepcopy(small.model.config.vision_config)
    config._attn_implementation = "eager"  # whose products are all counted
    layer = InternVisionEncoderLayer(config, drop_path_rate=0.0)
    x = torch.randn(1, 65, 160)
    assert flops(bare_products(config, torch.float32)) == flops(lambda: layer(x)) > 0


def test_a_step_reads_the_weights_and_the_cache(small: Bench) -> None:
    decoder = decoder_of(small.model)
    weights = sum(p.numel() for name, p in decoder.named_parameters() if "embed_tokens" not in name)
    cached = 3 * 2 * (2 * 32) * 100  # layers, keys and values, two heads of 32, tokens
    assert bytes_a_step(small, 100) == 4 * (weights + cached)


def test_prompts_hold_the_tiles(small: Bench) -> None:
    ids = prompt_ids(small, 2, 60)
    assert ids.shape == (1, 60)
    assert int((ids == PAD).sum()) == 32
    with pytest.raises(ValueError, match="2 tiles are 32 tokens"):
        prompt_ids(small, 2, 32)


def test_sixteen_questions() -> None:
    assert len(set(batch.questions())) == batch.COUNT == 16


def test_turns_read_only_what_is_new(trained: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TURNS", 3)
    monkeypatch.setattr(turns, "ANSWER", 4)
    found = turns.converse(trained, rounds=2)
    assert [one["turn"] for one in found] == [1, 2, 3]
    assert found[0]["known"] == 0
    assert found[0]["read"] == found[0]["stateless_read"] > turns.TILES * trained.model.config.num_image_token
    for before, one in pairwise(found):
        assert one["known"] >= before["known"] + before["read"]
        assert one["known"] + one["read"] == one["stateless_read"]
        assert one["read"] < 60
        assert len(one["session"]) == len(one["least"]) == 2
        assert min(*one["session"], *one["least"], *one["stateless"]) > 0


def test_every_way_to_decode_gives_the_same(small: Bench, tmp_path: Path) -> None:
    calls = choices.ways_to_decode(small)
    expected = calls["default"]()
    for name, call in calls.items():
        assert torch.equal(call(), expected) == ("sampled" not in name), name
    settings = Settings(tmp_path, rounds=1, models=("tiny",))
    settings._built["tiny"] = small
    section = choices.run(settings)
    assert small.model.config._attn_implementation == "sdpa"
    assert len(section.figures) == 8
    assert all(figure.value > 0 for figure in section.figures)


def test_session_memory_counts_tiles_features_and_keys(trained: Bench) -> None:
    config = trained.model.config
    kept = kept_bytes(trained, turns=4)
    decoder = config.llm_config
    head = decoder.hidden_size // decoder.num_attention_heads
    a_token = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * head * 4
    a_picture = 4 * (3 * config.tile_size**2 + config.num_image_token * config.shuffled_width)
    grown = np.diff(kept)
    assert (grown > a_picture + config.num_image_token * a_token).all()
    assert (grown < a_picture + 100 * a_token).all()


def test_soak_in_small(trained: Bench) -> None:
    found = soak.soak(trained, turns=25, seed=3)
    assert found["same"] == found["compared"] == 3
    assert max(found["cache_bytes"]) <= found["budget_bytes"]
    assert len(found["resident_bytes"]) == 25
    assert min(found["done"][name] for name in ("pictures", "text", "forks", "undos")) > 0
    assert found["done"]["pictures"] + found["done"]["text"] == 25


def test_entry_writes_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    argv = ["--only", "prefill_memory", "vllm", "--models", "tiny", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["benchmarks", *argv])
    monkeypatch.setattr("benchmarks.prefill_memory.TOKENS", 400)
    entry.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["sections"]) == ["prefill_memory", "vllm"]
    assert "skipped" in results["sections"]["vllm"]["note"]
    [generated, every] = results["sections"]["prefill_memory"]["figures"]
    assert 0 < generated["value"] < every["value"]
    assert "prefill_memory" in capsys.readouterr().out


def test_failing_benchmark_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(settings: Settings) -> Section:
        raise RuntimeError("no such\nluck")

    monkeypatch.setattr("benchmarks.machine.run", fail)
    section = entry.run_one("machine", Settings(tmp_path))
    assert section.note == "failed: RuntimeError: no such luck"
