"""Quantised weights: which layers, how close, saved and loaded, and what they cost the trained model."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from nvlm import NVLM_D_Config, NVLM_D_Model
from nvlm.loading import bitsandbytes_4bit, bitsandbytes_8bit, torchao_int4, torchao_int8
from tiny.evaluate import CHECKPOINT, held_out, score

# Each kind with the largest distance, relative to the logits' size, that its rounding may put between the two models.
KINDS = {
    "bitsandbytes_8bit": (bitsandbytes_8bit, 0.05),
    "bitsandbytes_4bit": (lambda **options: bitsandbytes_4bit(compute_dtype=torch.float32, **options), 0.4),
    "torchao_int8": (torchao_int8, 0.05),
    "torchao_int4": (lambda **options: torchao_int4(group_size=32, **options), 0.4),
}
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(recipe, tmp_path_factory):
    """A random checkpoint like the golden base, but with widths that blocks of 64 divide: bitsandbytes wants them."""
    values = recipe.config_dict("base")
    values["llm_config"]["intermediate_size"] = 128
    torch.manual_seed(0)
    model = NVLM_D_Model(NVLM_D_Config(**values))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    model.drop_dummy_heads()
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def plain(folder):
    """The model as it is; shared, so not to be changed."""
    return NVLM_D_Model.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def quantised(kind, folder):
    """The model with its decoder's layers quantised; shared, so not to be changed."""
    config = KINDS[kind][0]()
    return NVLM_D_Model.from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()


@pytest.fixture
def inputs(golden_vision):
    ids = torch.tensor([[5, *[151654] * 4, 6, *[151654] * 4, 7]])
    return {"input_ids": ids, "pixel_values": golden_vision["base.pixel_values"][:2]}


def quantised_layers(model):
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {
        name
        for name, module in linears.items()
        if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter
    }


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_only_the_decoders_layers_are_quantised(quantised, plain):
    layers = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    layers = {name for name in layers if name.startswith("language_model.model.layers.")}
    assert len(layers) == 3 * 7
    assert quantised_layers(quantised) == layers
    found = quantised.state_dict()
    for name, tensor in plain.state_dict().items():
        if name.startswith(("vision_model.", "mlp1.", "language_model.lm_head.")):
            assert torch.equal(found[name], tensor), name


def test_close_to_the_full_model_and_not_it(kind, quantised, plain, inputs):
    expected = logits(plain, inputs)
    distance = (logits(quantised, inputs) - expected).norm() / expected.norm()
    assert 1e-4 < distance < KINDS[kind][1]


def test_chats_with_pictures_and_without(quantised, tokenizer, golden_vision):
    pixels = golden_vision["base.pixel_values"]
    assert quantised.chat(tokenizer, None, "Hello", GREEDY)
    answer, history = quantised.chat(tokenizer, pixels[:2], "What is it?", GREEDY, return_history=True)
    assert history == [("<image>\nWhat is it?", answer)]
    answers = quantised.batch_chat(tokenizer, pixels, ["<image>\nA?", "<image>\nB?"], GREEDY, num_patches_list=[2, 1])
    assert len(answers) == 2


def test_saved_and_loaded_equal(quantised, inputs, tmp_path):
    """4.57 does not write torchao's weights, and loads bitsandbytes' in float16 unless told otherwise."""
    quantised.save_pretrained(tmp_path)
    again = NVLM_D_Model.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert quantised_layers(again) == quantised_layers(quantised)
    torch.testing.assert_close(logits(again, inputs), logits(quantised, inputs), rtol=1e-5, atol=1e-5)


def test_other_parts_can_be_left_alone(kind, folder):
    config = KINDS[kind][0](unquantised=["vision_model", "lm_head", "down_proj"])
    names = quantised_layers(NVLM_D_Model.from_pretrained(folder, quantization_config=config))
    parts = {name.rsplit(".", 1)[-1] if name.startswith("language_model.") else name for name in names}
    assert parts == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "mlp1.1", "mlp1.3"}


def test_int4_packs_on_a_gpu_and_not_elsewhere(monkeypatch):
    assert type(torchao_int4().quant_type).__name__ == "IntxWeightOnlyConfig"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    packed = torchao_int4(group_size=128).quant_type
    assert (packed.group_size, packed.int4_packing_format) == (128, "tile_packed_to_4d")
    with pytest.raises(ValueError, match="group_size is 48, expected 32, 64, 128 or 256"):
        torchao_int4(group_size=48)


def test_a_missing_torchao_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    for helper in (torchao_int8, torchao_int4):
        with pytest.raises(ImportError, match="pip install torchao"):
            helper()


# Without the package `nvlm`: the folder's own code is all there is, as for the Hub's users.
REMOTE = """
import sys
sys.modules["nvlm"] = None
from transformers import AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
path = sys.argv[1]
helper = get_class_from_dynamic_module("loading.bitsandbytes_4bit", path)
model = AutoModel.from_pretrained(path, trust_remote_code=True, quantization_config=helper())
print(type(model.language_model.model.layers[0].mlp.up_proj).__name__, type(model.mlp1[1]).__name__)
"""


def test_remote_codes_users_have_the_same_helpers(checkpoint, repository, tmp_path):
    folder = shutil.copytree(checkpoint("base"), tmp_path / "model")
    for module in repository.glob("*.py"):
        if module.name != "__init__.py":
            shutil.copy(module, folder)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(
        [sys.executable, "-c", REMOTE, folder], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["Linear4bit", "Linear"]


@pytest.fixture(scope="module")
def tiny_scores():
    """Per cent of held-out rows of digits and of sums that a model, loaded with some config, answers exactly."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    samples = [held_out(skill, 50) for skill in ("digit strings", "arithmetic")]

    def measure(config):
        model = AutoModel.from_pretrained(CHECKPOINT, dtype=torch.float32, quantization_config=config).eval()
        layers = 0 if config is None else 7 * model.config.llm_config.num_hidden_layers
        assert len(quantised_layers(model)) == layers
        return [score(model, tokenizer, questions) for questions in samples]

    return measure


@pytest.fixture(scope="module")
def full_scores(tiny_scores):
    return tiny_scores(None)


@pytest.mark.parametrize("helper", [bitsandbytes_8bit, torchao_int8])
def test_8_bits_cost_the_trained_model_at_most_2_points(helper, tiny_scores, full_scores):
    assert min(full_scores) > 80
    for eight, full in zip(tiny_scores(helper()), full_scores, strict=True):
        assert abs(eight - full) <= 2
