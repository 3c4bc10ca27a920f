"""The encoder keeps to a budget in bytes: as many tiles at once as fit, and never more."""

import sys

import pytest
import torch

from benchmarks.peaks import LiveTensors
from nvlm import InternVisionConfig, InternVisionModel


def wide_encoder():
    """Proportions of the released encoder: an MLP four times as wide as the model."""
    config = InternVisionConfig(
        hidden_size=160,
        num_attention_heads=5,
        num_dummy_heads=0,
        intermediate_size=640,
        num_hidden_layers=3,
        image_size=112,
    )
    config._attn_implementation = "sdpa"
    return InternVisionModel(config).eval()


@pytest.mark.parametrize("tiles", [1, 6])
def test_the_activations_of_a_tile_are_what_is_measured(tiles):
    encoder = wide_encoder()
    pixels = torch.randn(tiles, 3, 112, 112)
    with torch.no_grad(), LiveTensors() as live:
        encoder(pixels)
    assert 0.9 * live.peak <= tiles * encoder.activation_bytes <= 1.1 * live.peak


def test_a_budget_becomes_the_number_of_tiles_at_once(load_model, golden_vision):
    model = load_model()
    expected = model.extract_feature(golden_vision["base.pixel_values"])
    per_tile = model.vision_model.activation_bytes
    sizes = []
    model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(args[0])), with_kwargs=True
    )
    for budget, most in ((1, 1), (2 * per_tile, 2), (3 * per_tile - 1, 2), (100 * per_tile, 100)):
        assert model.limit_encoder_memory(budget) == model.config.tile_batch_size == most
        sizes.clear()
        torch.testing.assert_close(model.extract_feature(golden_vision["base.pixel_values"]), expected)
        assert max(sizes) <= most
    with pytest.raises(ValueError, match="max_bytes is 0"):
        model.limit_encoder_memory(0)


def test_a_cpu_takes_large_tiles_few_at_once(load_model, monkeypatch):
    model = load_model()
    per_tile = model.vision_model.activation_bytes
    assert model.tiles_at_once == model.config.tile_batch_size == 16
    for budget, most in ((1, 1), (3 * per_tile, 3), (17 * per_tile, 16)):
        monkeypatch.setattr(sys.modules[type(model).__module__], "CPU_ENCODER_BYTES", budget)
        assert model.tiles_at_once == most


def test_the_released_tile_takes_85_megabytes():
    with torch.device("meta"):
        encoder = InternVisionModel(InternVisionConfig(num_hidden_layers=1)).to(torch.bfloat16)
    assert encoder.activation_bytes == 1025 * (5 * 3200 + 2 * 12800) * 2
