"""`nvlm memory`: the arithmetic against the tensors that are really alive, the table, the cards, the errors."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.peaks import LiveTensors
from nvlm import NVLM_D_Config, NVLM_D_Model
from nvlm.cli.main import main
from nvlm.cli.memory import format_cards, format_table
from nvlm.cli.memory_estimate import Call, Moment, Sizes, estimate, peaks
from nvlm.device_map import published_config

PAD = 495


def small_config(*, vision: dict[str, Any] | None = None, decoder: dict[str, Any] | None = None, **top: Any) -> Any:
    """112-pixel tiles of 16 tokens, three layers each."""
    encoder = {
        "hidden_size": 160,
        "num_attention_heads": 5,
        "num_dummy_heads": 0,
        "intermediate_size": 640,
        "num_hidden_layers": 3,
        "image_size": 112,
    }
    language = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": False,
    }
    return NVLM_D_Config(
        force_image_size=112,
        image_token_id=PAD,
        vision_config=encoder | (vision or {}),
        llm_config=language | (decoder or {}),
        **top,
    )


@torch.no_grad()
def alive_bytes(config: NVLM_D_Config, call: Call, dtype: torch.dtype) -> int:
    """Bytes of pixels and of everything made on the way at the peak of what `chat` does; weights not counted."""
    torch.manual_seed(0)
    model = NVLM_D_Model(config).eval().to(dtype)
    ids = torch.randint(0, 400, (call.batch, call.tokens))  # the picture's places follow
    ids[:, 10 : 10 + call.tiles * config.num_image_token] = PAD
    mask = torch.ones_like(ids)
    if call.batch > 1:
        mask[0, :3] = 0
    options: dict[str, Any] = {
        "max_new_tokens": call.new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "prefill_chunk_size": call.prefill_chunk,
    }
    if call.kv_cache == "fp8":
        options |= {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    pixels = torch.randn(call.all_tiles, 3, 112, 112).to(dtype)
    with LiveTensors() as live:
        model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels if call.tiles else None, **options)
    return pixels.nbytes + live.peak


ENCODE, PREFILL, DECODE, PROJECT = "encode", "prefill", "decode", "project"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("moment", "call", "config"),
    [
        (ENCODE, Call(tiles=7, tokens=140, new_tokens=4), {}),
        (ENCODE, Call(tiles=7, tokens=140, new_tokens=4), {"tile_batch_size": 5}),
        (ENCODE, Call(tiles=7, tokens=140, new_tokens=4), {"vision": {"intermediate_size": 160}}),
        (ENCODE, Call(tiles=7, tokens=140, new_tokens=4), {"vision": {"qk_normalization": False}}),
        (
            PROJECT,
            Call(tiles=7, tokens=140, new_tokens=4, prefill_chunk=20),
            {"decoder": {"intermediate_size": 8000}},
        ),
        (PREFILL, Call(tiles=3, tokens=1500, new_tokens=4), {}),
        (PREFILL, Call(tiles=1, tokens=600, new_tokens=4, batch=4), {}),
        (PREFILL, Call(tiles=1, tokens=1500, new_tokens=4, prefill_chunk=100), {}),
        (PREFILL, Call(tiles=0, tokens=500, new_tokens=4, batch=3, prefill_chunk=100), {}),
        (DECODE, Call(tiles=0, tokens=20, new_tokens=120), {"decoder": {"intermediate_size": 64}}),
        (DECODE, Call(tiles=0, tokens=20, new_tokens=120, batch=3), {"decoder": {"intermediate_size": 64}}),
        (DECODE, Call(tiles=0, tokens=20, new_tokens=120, kv_cache="fp8"), {"decoder": {"intermediate_size": 64}}),
    ],
)
def test_every_moment_is_what_is_alive(moment: str, call: Call, config: dict[str, Any], dtype: torch.dtype) -> None:
    built = small_config(**config)
    [peak] = peaks(estimate(built, call, dtype=str(dtype).removeprefix("torch."))).values()
    assert peak.name == moment
    assert peak.total - peak.weights == pytest.approx(alive_bytes(built, call, dtype), rel=0.03)


def test_weights_are_those_of_the_model() -> None:
    config = small_config()
    [peak] = peaks(estimate(config, Call(tiles=1, tokens=100, new_tokens=1), dtype="float32")).values()
    assert peak.weights == sum(parameter.nbytes for parameter in NVLM_D_Model(config).parameters())


def test_kept_dummy_heads_need_more() -> None:
    """On several devices they stay: the estimate then has them, as the model does."""
    config = small_config(vision={"num_dummy_heads": 7})
    call = Call(tiles=7, tokens=140, new_tokens=4)
    first = estimate(config, call, dtype="float32", gpus=2)[0]
    [encode] = [one for one in first if one.name == ENCODE]
    torch.manual_seed(0)
    model = NVLM_D_Model(config).eval()
    with torch.no_grad(), LiveTensors() as live:
        model.run_encoder(torch.randn(7, 3, 112, 112))
    pixels = 7 * 3 * 112 * 112 * 4
    assert encode.activations == pytest.approx(live.peak - pixels, rel=0.01)
    dropped = next(one for one in estimate(config, call, dtype="float32")[0] if one.name == ENCODE)
    assert dropped.activations < encode.activations
    assert dropped.weights < model.num_parameters() * 4


def test_more_of_anything_needs_more() -> None:
    config, call = small_config(), Call(tiles=2, tokens=500, new_tokens=20, batch=2)
    for more in ({"tokens": 900}, {"new_tokens": 900}, {"batch": 3}, {"tiles": 9}):
        before, after = estimate(config, call)[0], estimate(config, replace(call, **more))[0]
        assert sum(one.total for one in after) > sum(one.total for one in before)


def test_quantised_caches_hold_less() -> None:
    call = Call(tiles=0, tokens=4096, new_tokens=64)
    held = {
        kind: estimate(published_config(), replace(call, kv_cache=kind))[0][-1].kv_cache
        for kind in ("dynamic", "int8", "fp8", "offloaded")
    }
    assert held["dynamic"] == 2 * held["fp8"] == 40 * held["offloaded"]
    assert held["dynamic"] / 2 < held["int8"] < 0.6 * held["dynamic"]


def test_published_sizes() -> None:
    sizes = Sizes.of(published_config())
    assert (sizes.positions, sizes.width, sizes.inner, sizes.mlp) == (1025, 3200, 4096, 12800)
    assert (sizes.tile_tokens, sizes.shuffled, sizes.projector) == (256, 12800, 29568)
    assert (sizes.hidden, sizes.queries, sizes.keys, sizes.wide, sizes.vocabulary) == (8192, 8192, 1024, 29568, 152064)
    a_token = estimate(published_config(), Call(tiles=0, tokens=1, new_tokens=1))[0][-1].kv_cache // 2
    assert a_token == 80 * 2 * 1024 * 2  # 0.33 MB, as docs/serving.md says


def test_eight_cards(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--tiles", "7", "--tokens", "4096", "--gpus", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[0].split() == ["device", "weights", "pictures", "kv_cache", "activations", "logits", "total", "at"]
    weights = [float(line.split()[1]) for line in lines[1:9]]
    assert sum(weights) == pytest.approx(158.76e9 / 2**30, abs=0.05)
    for line in lines[1:9]:
        *parts, total = map(float, line.split()[1:7])
        assert total == pytest.approx(sum(parts), abs=0.03)
    assert all(line.split()[-1] == "prefill" for line in lines[1:9])
    assert lines[9].endswith("too small: 16; large enough: 24, 32, 40, 48, 80, 96, 141, 192.")


def test_json_holds_every_moment(capsys: pytest.CaptureFixture[str], tmp_path: Path, recipe: ModuleType) -> None:
    (tmp_path / "config.json").write_text(json.dumps(recipe.config_dict("base")))
    assert main(["memory", str(tmp_path), "--tiles", "2", "--tokens", "600", "--gpus", "2", "--json"]) == 0
    moments = json.loads(capsys.readouterr().out)
    assert list(moments) == ["0", "1"]
    assert [one["name"] for one in moments["0"]] == ["encode", "project", "join", "prefill", "decode"]
    assert [one["name"] for one in moments["1"]] == ["prefill", "decode"]


def test_other_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "InternVL-Chat-V1-2", "--tiles", "1", "--tokens", "512"]) == 0
    assert "large enough: 96, 141, 192" in capsys.readouterr().out


def test_cards_and_table() -> None:
    assert format_cards(23 * 10**9) == "Cards by GB: too small: 16; large enough: 24, 32, 40, 48, 80, 96, 141, 192."
    assert "--dtype int8" in format_cards(500 * 10**9)
    text = format_table({0: Moment("decode", 2**30, 0, 2**29, 0, 0)})
    assert text.splitlines()[1].split() == ["0", "1.00", "0.00", "0.50", "0.00", "0.00", "1.50", "decode"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tiles", "7", "--tokens", "1792"], "7 tiles are 1792 tokens, but the prompt has 1792"),
        (["--tokens", "32700"], "more than the decoder's 32768 positions"),
        (["--tiles", "-1"], "tiles is -1, expected at least 0"),
        (["--batch", "0"], "batch is 0, expected at least 1"),
        (["--gpus", "0"], "gpus is 0, expected at least 1"),
        (["--prefill-chunk", "0"], "prefill_chunk is 0, expected at least 1"),
        (["absent"], "Unknown model 'absent'"),
    ],
)
def test_errors(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", *argv]) == 2
    assert message in capsys.readouterr().err
