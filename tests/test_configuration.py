"""Configurations: the published file, round trips, and wrong values that are named."""

import copy
import json

import pytest
from transformers import LlamaConfig, Qwen2Config

from nvlm import InternVisionConfig, NVLM_D_Config


@pytest.fixture
def published(repository):
    """This repository's config.json, which has the published values."""
    return json.loads((repository / "config.json").read_text())


def test_published_file_loads_unchanged(repository, published):
    before = copy.deepcopy(published)
    config = NVLM_D_Config(**published)
    assert published == before
    assert isinstance(config.llm_config, Qwen2Config)
    assert published["llm_config"]["model_type"] == "llama"
    assert (config.llm_config.hidden_size, config.llm_config.num_hidden_layers) == (8192, 80)
    assert (config.vision_config.hidden_size, config.vision_config.num_dummy_heads) == (3200, 7)
    assert (config.tile_size, config.num_image_token, config.shuffled_width) == (448, 256, 12800)
    assert NVLM_D_Config.from_pretrained(repository).to_dict() == config.to_dict()


def test_released_defaults_of_our_own_fields():
    config = NVLM_D_Config()
    assert config.tile_tag == "1d"
    assert config.thumbnail_tag == "<tile_global_thumbnail>"
    assert config.projector_bias is False
    assert config.image_token_id == 151654
    assert InternVisionConfig().num_dummy_heads == 7


@pytest.mark.parametrize("missing", ["llm_config", "vision_config"])
def test_without_a_part(recipe, missing):
    values = recipe.config_dict("base")
    del values[missing]
    config = NVLM_D_Config(**values)
    assert config.get_text_config() is config.llm_config is config.text_config
    assert config.vision_config.model_type == "intern_vit_6b"


def test_config_classes_need_no_arguments():
    assert NVLM_D_Config().get_text_config(decoder=True).model_type == "qwen2"
    assert InternVisionConfig().head_dim == 128


def test_text_config_is_another_name_of_llm_config(recipe):
    values = recipe.config_dict("base")
    values["text_config"] = values.pop("llm_config")
    assert NVLM_D_Config(**values).llm_config.hidden_size == 64


def test_llama_decoder_by_architecture(recipe):
    values = recipe.config_dict("base")
    values["llm_config"]["architectures"] = ["LlamaForCausalLM"]
    assert isinstance(NVLM_D_Config(**values).llm_config, LlamaConfig)


def test_save_and_load_gives_the_same(recipe, tmp_path):
    values = recipe.config_dict("base") | {
        "tile_tag": "2d_grid",
        "thumbnail_tag": "<tile_global>",
        "projector_bias": True,
        "ps_version": "v1",
        "select_layer": -2,
    }
    values["vision_config"]["num_dummy_heads"] = 0
    config = NVLM_D_Config(**values)
    config.save_pretrained(tmp_path)
    again = NVLM_D_Config.from_pretrained(tmp_path)
    expected, got = config.to_dict(), again.to_dict()
    for side in (expected, got):
        side.pop("transformers_version", None)
    assert got == expected
    assert json.loads((tmp_path / "config.json").read_text())["llm_config"]["architectures"] == ["Qwen2ForCausalLM"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ps_version", "v3"),
        ("template", "alpaca"),
        ("tile_tag", "3d"),
        ("downsample_ratio", 0.3),
        ("downsample_ratio", 0.0),
        ("downsample_ratio", 1 / 3),
        ("select_layer", 0),
        ("select_layer", -4),
        ("select_layer", 1.5),
        ("min_dynamic_patch", 0),
        ("min_dynamic_patch", 7),
        ("max_dynamic_patch", "six"),
        ("tile_batch_size", 0),
        ("force_image_size", 57),
    ],
)
def test_wrong_value_is_named(recipe, field, value):
    with pytest.raises(ValueError, match=rf"`{field}` is {value!r}"):
        NVLM_D_Config(**(recipe.config_dict("base") | {field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 81),
        ("num_attention_heads", 0),
        ("num_attention_heads", 3),
        ("image_size", 57),
        ("norm_type", "batch_norm"),
        ("num_dummy_heads", -1),
        ("drop_path_rate", 1.0),
        ("attention_dropout", -0.1),
        ("patch_size", True),
    ],
)
def test_wrong_vision_value_is_named(recipe, field, value):
    values = recipe.config_dict("base")
    values["vision_config"][field] = value
    blamed = "hidden_size" if (field, value) == ("num_attention_heads", 3) else field
    with pytest.raises(ValueError, match=f"`{blamed}` is"):
        NVLM_D_Config(**values)


def test_unknown_decoder_is_named(recipe):
    values = recipe.config_dict("base")
    values["llm_config"]["architectures"] = ["MambaForCausalLM"]
    with pytest.raises(ValueError, match=r"llm_config.architectures.*MambaForCausalLM"):
        NVLM_D_Config(**values)


def test_folder_of_another_model_is_refused(tmp_path):
    Qwen2Config(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`model_type` is 'qwen2', expected 'NVLM_D'"):
        NVLM_D_Config.from_pretrained(tmp_path)
