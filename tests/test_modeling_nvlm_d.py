"""The model: forward, loss, splice, loading, saving, devices."""

import gc
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nvlm import NVLM_D_Config, NVLM_D_Model
from nvlm.loading import UNQUANTISED_MODULES, translate_arguments


@pytest.fixture
def batch(golden_vision):
    """Two rows: a picture of two tiles, and one of one tile; 4 tokens a tile."""
    pad = [151654] * 4
    ids = torch.tensor([[5, *pad, 6, *pad, 7], [8, 9, *pad, 10, 11, 12, 13, 14]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": golden_vision["base.pixel_values"],
    }


def test_every_picture_reaches_its_own_row(base_model, batch):
    with torch.no_grad():
        both = base_model(**batch).logits
        first = base_model(input_ids=batch["input_ids"][:1], pixel_values=batch["pixel_values"][:2]).logits
        second = base_model(input_ids=batch["input_ids"][1:], pixel_values=batch["pixel_values"][2:]).logits
        swapped = base_model(input_ids=batch["input_ids"][:1], pixel_values=batch["pixel_values"][:2].flip(0)).logits
    torch.testing.assert_close(both, torch.cat([first, second]), rtol=1e-4, atol=1e-4)
    assert (swapped - first).abs().max() > 0.1


def test_counts_that_disagree_are_an_error_with_both_numbers(base_model, batch):
    with pytest.raises(ValueError, match=r"12 placeholders .* for 8 features \(2 tiles of 4 tokens\)"):
        base_model(**{**batch, "pixel_values": batch["pixel_values"][:2]})
    with pytest.raises(ValueError, match=r"exactly one of input_ids and inputs_embeds"):
        base_model(pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match=r"\(tiles, 3, 56, 56\), got \(3, 3, 28, 28\)"):
        base_model(**{**batch, "pixel_values": batch["pixel_values"][..., :28, :28]})


def test_embeddings_in_the_place_of_ids(base_model, batch):
    embeddings = base_model.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad():
        expected = base_model(**batch).logits
        got = base_model(inputs_embeds=embeddings, pixel_values=batch["pixel_values"]).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_shuffled_features_in_the_place_of_pixels(base_model, batch):
    with torch.no_grad():
        expected = base_model(**batch)
        shuffled = base_model.shuffle_patches(base_model.run_encoder(batch["pixel_values"]).last_hidden_state)
        got = base_model(**{**batch, "pixel_values": None}, visual_features=shuffled)
        full = base_model.get_image_features(batch["pixel_values"])
    assert shuffled.shape == (3, 4, 320)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(full.pooler_output, expected.image_hidden_states, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="Pass pictures once"):
        base_model(**batch, mm_encoder_outputs={"image": full})


def test_image_flags_leave_filler_tiles_out(base_model, batch):
    filler = torch.cat([batch["pixel_values"][:1] * 9, batch["pixel_values"]])
    with torch.no_grad():
        expected = base_model(**batch).logits
        for flags in (torch.tensor([0, 1, 1, 1]), torch.tensor([[0], [1], [1], [1]])):
            got = base_model(**{**batch, "pixel_values": filler}, image_flags=flags).logits
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_batch_of_filler_tiles_alone_is_text(base_model, batch):
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == 151654, 5)
    with torch.no_grad():
        expected = base_model(input_ids=ids).logits
        got = base_model(input_ids=ids, pixel_values=batch["pixel_values"], image_flags=torch.zeros(3)).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_logits_to_keep(base_model, batch):
    with torch.no_grad():
        every = base_model(**batch).logits
        assert torch.allclose(base_model(**batch, logits_to_keep=2).logits, every[:, -2:], atol=1e-4)
        some = torch.tensor([0, 3])
        assert torch.allclose(base_model(**batch, logits_to_keep=some).logits, every[:, some], atol=1e-4)


def test_loss_is_the_shifted_cross_entropy(base_model, batch):
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == 151654, -100)
    with torch.no_grad():
        output = base_model(**batch, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(output.loss, expected)
    assert isinstance(base_model(**batch, labels=labels, return_dict=False), tuple)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(base_model, batch, side):
    row, pixels = batch["input_ids"][:1], batch["pixel_values"][:2]
    filler = torch.full((1, 5), 151643)
    real, zero = torch.ones_like(row), torch.zeros_like(filler)
    ids = torch.cat([filler, row] if side == "left" else [row, filler], 1)
    mask = torch.cat([zero, real] if side == "left" else [real, zero], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = base_model(input_ids=row, pixel_values=pixels).logits
        got = base_model(input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values=pixels).logits
    got = got[:, 5:] if side == "left" else got[:, :-5]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_tile_batches_change_nothing(load_model, batch):
    model = load_model("base")
    with torch.no_grad():
        model.config.tile_batch_size = 16
        expected = model.extract_feature(batch["pixel_values"])
        for size in (1, 2):
            model.config.tile_batch_size = size
            torch.testing.assert_close(model.extract_feature(batch["pixel_values"]), expected, rtol=1e-5, atol=1e-5)


def test_linear_layers_are_called_as_modules(load_model, batch):
    """Quantised, LoRA and hooked layers depend on it: every Linear must run its own forward."""
    model = load_model("base")
    called = set()
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for name in linears:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    model(**batch)
    assert called == set(linears)


def test_one_training_step_with_gradient_checkpointing(load_model, batch):
    model = load_model("base").train()
    model.gradient_checkpointing_enable()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == 151654, -100)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    assert model.mlp1[1].weight.grad.abs().sum() > 0
    assert model.vision_model.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    optimizer.step()
    assert model(**batch, labels=labels).loss < loss


def test_resized_to_another_tile(load_model):
    model = load_model("base")
    model.resize_pos_embeddings(84)
    assert (model.num_image_token, model.config.tile_size) == (9, 84)
    assert model.extract_feature(torch.zeros(1, 3, 84, 84)).shape == (1, 9, 64)
    with pytest.raises(ValueError, match="image_size is 70, expected a multiple of 28"):
        model.resize_pos_embeddings(70)


def test_saved_and_loaded_equal(load_model, batch, tmp_path):
    model = load_model("base")
    assert model.config.vision_config.num_dummy_heads == 0
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vision_config"]["num_dummy_heads"] == 0
    again, info = NVLM_D_Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_kept_dummy_heads_are_saved_under_the_published_names(load_model, recipe, tmp_path):
    load_model("base", drop_dummy_heads=False).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert saved == recipe.shapes(recipe.config_dict("base"))


def test_llama_decoder_and_biased_projector(recipe, batch):
    values = recipe.config_dict("base") | {"projector_bias": True}
    values["llm_config"] |= {"architectures": ["LlamaForCausalLM"], "vocab_size": 200000}
    model = NVLM_D_Model(NVLM_D_Config(**values)).eval()
    assert type(model.language_model).__name__ == "LlamaForCausalLM"
    assert "mlp1.1.bias" in model.state_dict()
    assert model(**batch).logits.shape == (2, 11, 200000)


# ------------------------------------------------------------------------------------------------ 72B, meta device

META = """
import json, re, sys, time
from pathlib import Path
start = time.time()
import torch
from nvlm import NVLM_D_Config, NVLM_D_Model
config = NVLM_D_Config.from_pretrained(sys.argv[1])
with torch.device("meta"):
    model = NVLM_D_Model(config)
# Not getrusage's ru_maxrss: Linux begins that with the size of the process that started this one.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(json.dumps({
    "tensors": {name: list(tensor.shape) for name, tensor in model.state_dict().items()},
    "seconds": time.time() - start,
    "peak_bytes": int(peak[1]) * 1024,
}))
"""


def test_72b_has_the_published_tensors_and_bytes(repository, recipe):
    """1556 names and shapes; 176,901,927,168 bytes with SPEC 2's dtypes; under 2 GB of memory and 60 s."""
    result = subprocess.run([sys.executable, "-c", META, str(repository)], capture_output=True, text=True, check=True)
    report = json.loads(result.stdout.splitlines()[-1])
    tensors = {name: tuple(shape) for name, shape in report["tensors"].items()}
    published = json.loads((repository / "config.json").read_text())
    heads = recipe.shapes(published)
    assert len(tensors) == 1556
    assert tensors == heads
    float32 = ("q_proj.", "k_proj.", "v_proj.", "attn.qkv.weight", "attn.proj.weight", "attn.q_norm.", "attn.k_norm.")
    total = sum(
        torch.Size(shape).numel() * (4 if any(part in name for part in float32) else 2)
        for name, shape in tensors.items()
    )
    assert total == 176_901_927_168
    assert sum(torch.Size(shape).numel() * 2 for shape in tensors.values()) == pytest.approx(158.76e9, rel=1e-4)
    assert report["peak_bytes"] < 2e9
    assert report["seconds"] < 60


# --------------------------------------------------------------------------------------------- loading and devices


def greedy(model, batch, **options):
    with torch.no_grad():
        return model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=151643, **options)


@pytest.mark.parametrize("spilled", ["vision_model", "language_model.model.layers.1", "language_model.lm_head", "mlp1"])
def test_cpu_and_disk_offload_change_nothing(load_model, base_model, batch, tmp_path, spilled):
    parts = ["vision_model", "mlp1", "language_model.model.embed_tokens", "language_model.model.norm"]
    parts += ["language_model.model.rotary_emb", "language_model.lm_head"]
    parts += [f"language_model.model.layers.{i}" for i in range(3)]
    device_map = dict.fromkeys(parts, "cpu") | {spilled: "disk"}
    model = load_model("base", device_map=device_map, offload_folder=tmp_path)
    assert any(p.device.type == "meta" for p in model.parameters())
    assert model.config.vision_config.num_dummy_heads == 7  # kept: weights are not all in one place
    assert torch.equal(greedy(model, batch), greedy(base_model, batch))


def test_automatic_device_map_with_little_memory(load_model, base_model, batch, tmp_path):
    model = load_model("base", device_map="auto", max_memory={"cpu": "60MB"}, offload_folder=tmp_path)
    assert "disk" in model.hf_device_map.values()
    assert torch.equal(greedy(model, batch), greedy(base_model, batch))


def test_names_of_no_layer_in_a_device_map_do_no_harm(load_model, base_model, batch):
    """The documents' maps name `tok_embeddings` and `output`, which do not exist."""
    parts = ["vision_model", "mlp1", "language_model.model", "language_model.lm_head"]
    device_map = dict.fromkeys([*parts, "language_model.output", "language_model.model.tok_embeddings"], "cpu")
    model = load_model("base", device_map=device_map)
    assert torch.equal(greedy(model, batch), greedy(base_model, batch))


def test_tied_and_half_precision_loading(load_model, batch):
    model = load_model("base", torch_dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(**batch).logits.dtype == torch.bfloat16


def test_weights_are_read_once_into_place(checkpoint, monkeypatch):
    """No tensor is initialised before it is read: nothing draws random numbers while a full checkpoint loads."""
    state = torch.get_rng_state()
    NVLM_D_Model.from_pretrained(checkpoint("base"))
    assert torch.equal(torch.get_rng_state(), state)


def broken_checkpoint(source, target, change):
    """A copy of a checkpoint folder in two shards, with one thing changed."""
    weights = load_file(source / "model.safetensors")
    names = sorted(weights)
    index = {"metadata": {}, "weight_map": {}}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        shard = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, target / shard, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, shard)
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    (target / "config.json").write_text((source / "config.json").read_text())
    change(target)
    return target


def truncate(folder):
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])


def remove_shard(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()


def reshape(folder):
    shard = folder / "model-00002-of-00002.safetensors"
    weights = load_file(shard)
    weights["mlp1.3.weight"] = torch.zeros(3, 5)
    save_file(weights, shard, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, "incomplete|InvalidHeader|truncated|not fully covered|Error while deserializing"),
        (remove_shard, "model-00002-of-00002.safetensors"),
        (reshape, "mlp1.3.weight|size mismatch|mismatch"),
    ],
)
def test_broken_checkpoint_is_a_clear_error(checkpoint, tmp_path, change, message):
    folder = broken_checkpoint(checkpoint("base"), tmp_path, change)
    with pytest.raises(Exception, match=message) as caught:
        NVLM_D_Model.from_pretrained(folder)
    assert not isinstance(caught.value, (AssertionError, AttributeError, KeyError, TypeError))


def test_intact_shards_load(checkpoint, base_model, batch, tmp_path):
    folder = broken_checkpoint(checkpoint("base"), tmp_path, lambda folder: None)
    assert torch.equal(greedy(NVLM_D_Model.from_pretrained(folder), batch), greedy(base_model, batch))


def test_old_arguments_are_translated(monkeypatch):
    arguments = {"use_flash_attn": False, "torch_dtype": torch.bfloat16}
    assert translate_arguments(arguments) == {"torch_dtype": torch.bfloat16}
    assert arguments["use_flash_attn"] is False
    assert "attn_implementation" not in translate_arguments({"use_flash_attn": True})  # no GPU here
    monkeypatch.setattr("nvlm.loading.is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert translate_arguments({"use_flash_attn": True}) == {"attn_implementation": "flash_attention_2"}
    chosen = {"use_flash_attn": True, "attn_implementation": "eager"}
    assert translate_arguments(chosen) == {"attn_implementation": "eager"}


def test_8bit_leaves_encoder_projector_and_head_alone():
    config = translate_arguments({"load_in_8bit": True})["quantization_config"]
    assert config.load_in_8bit
    assert config.llm_int8_skip_modules == UNQUANTISED_MODULES == ["vision_model", "mlp1", "lm_head"]
    with pytest.raises(ValueError, match="either quantization_config or"):
        translate_arguments({"load_in_4bit": True, "quantization_config": config})


def test_8bit_model_answers(load_model, batch):
    model = load_model("base", load_in_8bit=True)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["language_model.model.layers.0.mlp.up_proj"] == "Linear8bitLt"
    assert kinds["mlp1.1"] == kinds["vision_model.encoder.layers.0.attn.qkv"] == "Linear"
    assert greedy(model, batch).shape == (2, 19)


def test_no_logits_of_the_whole_prompt_while_generating(load_model, batch):
    model = load_model("base")
    shapes = []
    model.language_model.lm_head.register_forward_hook(lambda _, inputs, output: shapes.append(output.shape[1]))
    greedy(model, batch)
    assert shapes == [1] * 8


def test_nothing_is_left_of_a_call(load_model, batch):
    """No picture, feature or cache of one caller stays in the model for the next."""

    def tensors():
        gc.collect()
        return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]

    model = load_model("base")
    greedy(model, batch)
    before = {id(x) for x in tensors()}
    greedy(model, batch)
    assert not [x.shape for x in tensors() if id(x) not in before and x.numel() > 64]


def test_published_rope_scaling_is_kept_in_the_config_and_not_applied(load_model, recipe):
    """The released code ran where it is ignored, and asking for it each step would wait for the device."""
    model = load_model("base")
    rotary = model.language_model.model.rotary_emb
    assert recipe.config_dict("base")["llm_config"]["rope_scaling"]["type"] == "dynamic"
    assert rotary.rope_type == "default"
    frequencies = rotary.inv_freq.clone()
    rotary(torch.zeros(1, 1, 64), torch.tensor([[100_000]]))  # far beyond 32768: dynamic scaling would rewrite them
    assert torch.equal(rotary.inv_freq, frequencies)
    expected = 1.0 / 1e6 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(frequencies, expected)
