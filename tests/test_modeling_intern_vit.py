"""The encoder by itself: dummy heads, position embeddings, backends, training switches."""

import copy

import pytest
import torch

from nvlm import InternVisionConfig, InternVisionModel, modeling_intern_vit
from nvlm.modeling_intern_vit import InternRMSNorm, resize_position_embedding

TINY = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "image_size": 56,
    "initializer_factor": 0.5,
}


def tiny_encoder(**changes):
    torch.manual_seed(0)
    model = InternVisionModel(InternVisionConfig(**{**TINY, "initializer_range": 0.3, **changes})).eval()
    return model


def silence_dummy_heads(model, *, part):
    """Zero the dummy heads of every layer, either in the values or in the projection."""
    real = model.config.hidden_size
    with torch.no_grad():
        for layer in model.encoder.layers:
            if part == "proj":
                layer.attn.proj.weight[:, real:] = 0
            else:
                layer.attn.qkv.weight.chunk(3)[2][real:] = 0
                if layer.attn.qkv.bias is not None:
                    layer.attn.qkv.bias.chunk(3)[2][real:] = 0


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("part", ["proj", "values"])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_dropping_silent_dummy_heads_changes_nothing(pixels, part, qkv_bias):
    model = tiny_encoder(qkv_bias=qkv_bias)
    silence_dummy_heads(model, part=part)
    with torch.no_grad():
        before = model(pixels).last_hidden_state
        weights = sum(p.numel() for p in model.parameters())
        assert model.drop_dummy_heads() == 7
        after = model(pixels).last_hidden_state
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) < weights
    assert model.config.num_dummy_heads == 0
    assert model.drop_dummy_heads() == 0


def test_released_sizes_save_what_the_specification_says():
    """516,176,640 parameters less at the released sizes (SPEC 2)."""
    with torch.device("meta"):
        kept = InternVisionModel(InternVisionConfig())
        dropped = InternVisionModel(InternVisionConfig(num_dummy_heads=0))
    saved = sum(p.numel() for p in kept.parameters()) - sum(p.numel() for p in dropped.parameters())
    assert saved == 516_176_640


def test_contributing_dummy_heads_are_kept_and_said_so(monkeypatch):
    said = []
    monkeypatch.setattr(modeling_intern_vit.logger, "warning_once", said.append)
    model = tiny_encoder()
    before = copy.deepcopy(model.state_dict())
    assert model.drop_dummy_heads() == 0
    assert model.config.num_dummy_heads == 7
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert said == ["The 7 dummy attention heads of this encoder are not zero: they contribute and are kept."]


def test_saved_after_dropping_reloads_equal(pixels, tmp_path):
    model = tiny_encoder()
    silence_dummy_heads(model, part="proj")
    model.drop_dummy_heads()
    model.save_pretrained(tmp_path)
    again = InternVisionModel.from_pretrained(tmp_path)
    assert again.config.num_dummy_heads == 0
    with torch.no_grad():
        assert torch.equal(again(pixels).last_hidden_state, model(pixels).last_hidden_state)


def test_rms_counts_real_channels_only():
    norm = InternRMSNorm(6, eps=0.0, num_real=4)
    x = torch.tensor([[2.0, 2.0, 2.0, 2.0, 100.0, 0.0]])
    assert norm(x).tolist() == [[1.0, 1.0, 1.0, 1.0, 50.0, 0.0]]


def test_rms_is_computed_in_float32():
    norm = InternRMSNorm(4, eps=0.0).to(torch.float16)
    x = torch.full((1, 4), 30000.0, dtype=torch.float16)  # its square overflows float16
    assert norm(x).tolist() == [[1.0, 1.0, 1.0, 1.0]]
    assert norm(x).dtype == torch.float16


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_backends_agree_with_eager(pixels, attention):
    model = tiny_encoder(hidden_size=64, num_attention_heads=4)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(pixels).last_hidden_state
        model.set_attn_implementation(attention)
        assert model.config._attn_implementation == attention
        torch.testing.assert_close(model(pixels).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_hidden_states_and_attentions():
    model = tiny_encoder()
    model.set_attn_implementation("eager")
    output = model(torch.randn(1, 3, 56, 56), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert [a.shape for a in output.attentions] == [(1, 11, 17, 17)] * 2
    assert torch.equal(
        model(torch.zeros(1, 3, 56, 56), return_dict=False)[1], model(torch.zeros(1, 3, 56, 56)).pooler_output
    )


def test_select_layer_runs_no_later_layer(pixels):
    model = tiny_encoder()
    expected = model(pixels, output_hidden_states=True).hidden_states[-2]
    model.encoder.layers[-1].forward = None  # would fail if it were called
    assert torch.equal(model(pixels, select_layer=-2).last_hidden_state, expected)


def test_layer_norm_and_no_qk_normalisation(pixels):
    model = tiny_encoder(norm_type="layer_norm", qk_normalization=False)
    assert model(pixels).last_hidden_state.isfinite().all()
    assert not any("q_norm" in name for name in model.state_dict())


def test_gradient_checkpointing_gives_the_same_gradients(pixels):
    model = tiny_encoder().train()
    model(pixels).last_hidden_state.square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.encoder.layers)
    model(pixels).last_hidden_state.square().mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_drop_path_acts_in_training_only(pixels):
    model = tiny_encoder(drop_path_rate=0.9, num_hidden_layers=4)
    rates = [getattr(layer.drop_path1, "drop_prob", 0.0) for layer in model.encoder.layers]
    assert rates == pytest.approx([0, 0.3, 0.6, 0.9])
    assert torch.equal(model(pixels).last_hidden_state, model(pixels).last_hidden_state)
    model.train()
    assert not torch.equal(model(pixels).last_hidden_state, model(pixels).last_hidden_state)


def test_position_embeddings_resize():
    positions = torch.randn(1, 17, 8)
    assert resize_position_embedding(positions, 4) is positions
    larger = resize_position_embedding(positions, 6)
    assert larger.shape == (1, 37, 8)
    assert torch.equal(larger[:, :1], positions[:, :1])
    flat = torch.ones(1, 17, 8, dtype=torch.bfloat16)
    assert torch.equal(resize_position_embedding(flat, 7), torch.ones(1, 50, 8, dtype=torch.bfloat16))
    grid = positions[:, 1:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    assert torch.equal(larger[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 36, 8))


def test_encoder_resized_to_another_tile(tmp_path):
    model = tiny_encoder()
    pixels = torch.randn(1, 3, 84, 84)
    on_the_fly = model(pixels).last_hidden_state
    model.resize_pos_embeddings(84)
    assert model.config.image_size == 84
    assert torch.equal(model(pixels).last_hidden_state, on_the_fly)
    model.save_pretrained(tmp_path)
    assert torch.equal(InternVisionModel.from_pretrained(tmp_path)(pixels).last_hidden_state, on_the_fly)
    with pytest.raises(ValueError, match="image_size is 57, expected a multiple of the patch size 14"):
        model.resize_pos_embeddings(57)
