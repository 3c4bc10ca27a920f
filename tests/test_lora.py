"""LoRA through PEFT as users know it: which layers, merged, saved and loaded, and what a gradient reaches."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from nvlm import NVLM_D_Model
from nvlm.loading import bitsandbytes_4bit
from nvlm.training import LoRA, Stage
from nvlm.training.lora import add_adapters

# As in docs/lora.md.
TARGETS = r"language_model\.model\.layers\..*_proj|mlp1\.[13]"
CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)


@pytest.fixture
def inputs(golden_vision):
    ids = torch.tensor([[5, *[151654] * 4, 6, *[151654] * 4, 7], [8, 9, *[151654] * 4, 10, 11, 12, 13, 14]])
    return {"input_ids": ids, "pixel_values": golden_vision["base.pixel_values"]}


@pytest.fixture
def adapted(load_model):
    """The golden base model with random adapters."""
    model = get_peft_model(load_model("base"), CONFIG)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def adapted_layers(model):
    names = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    return {name.removeprefix("base_model.model.") for name in names}


def labels_of(inputs):
    return inputs["input_ids"].masked_fill(inputs["input_ids"] == 151654, -100)


def test_the_documents_layers_are_those_that_training_adapts(repository, load_model, adapted):
    assert TARGETS in (repository / "docs" / "lora.md").read_text()
    trained = load_model("base")
    stage = Stage(model="model", output="output", blend="blend.yaml", steps=1, lora=LoRA(rank=4, projector=True))
    add_adapters(trained, stage)
    assert adapted_layers(adapted) == adapted_layers(trained)
    assert len(adapted_layers(adapted)) == 3 * 7 + 2


def test_new_adapters_change_nothing(load_model, base_model, inputs):
    assert torch.equal(logits(get_peft_model(load_model("base"), CONFIG), inputs), logits(base_model, inputs))


def test_merged_adapters_compute_the_same_and_save_plainly(adapted, base_model, inputs, tmp_path):
    expected = logits(adapted, inputs)
    assert (expected - logits(base_model, inputs)).abs().max() > 0.1
    merged = adapted.merge_and_unload()
    assert type(merged) is NVLM_D_Model
    assert set(merged.state_dict()) == set(base_model.state_dict())
    torch.testing.assert_close(logits(merged, inputs), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(NVLM_D_Model.from_pretrained(tmp_path), inputs), logits(merged, inputs))


def test_adapters_are_saved_alone_and_loaded_onto_the_plain_model(adapted, load_model, inputs, tmp_path):
    adapted.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == 2 * (3 * 7 + 2)
    assert all("lora_" in name for name in stored)
    again = PeftModel.from_pretrained(load_model("base"), tmp_path).eval()
    assert torch.equal(logits(again, inputs), logits(adapted, inputs))
    native = load_model("base")
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits(native, inputs), logits(adapted, inputs))


@pytest.mark.parametrize("options", [{}, {"quantization_config": bitsandbytes_4bit(compute_dtype=torch.float32)}])
def test_gradients_reach_the_adapters_alone(options, load_model, inputs):
    model = get_peft_model(load_model("base", **options), CONFIG).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(**inputs, labels=labels_of(inputs)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert (parameter.grad is not None) == ("lora_" in name), name
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name


def test_gradient_checkpointing_reaches_the_same_gradients(load_model, inputs):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(load_model("base"), CONFIG).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(**inputs, labels=labels_of(inputs)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(gradient.abs().max() > 0 for name, gradient in gradients[0].items() if "mlp1" in name)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6)


def test_an_adapted_model_chats(adapted, tokenizer, golden_vision):
    pixels = golden_vision["base.pixel_values"][:1]
    greedy = {"max_new_tokens": 6, "do_sample": False}
    answer = adapted.chat(tokenizer, pixels, "What is it?", greedy)
    with adapted.disable_adapter():
        plain = adapted.chat(tokenizer, pixels, "What is it?", greedy)
    assert answer != plain
    assert adapted.merge_and_unload().chat(tokenizer, pixels, "What is it?", greedy) == answer
