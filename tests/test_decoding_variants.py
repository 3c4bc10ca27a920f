"""Caches, chunks, checkpoints, attention backends and compilers: each must give what plain eager decoding gives.

What `test_generation.py` has (batches, beams, sampling, prompt lookup, no cache) is not repeated here.
"""

import contextlib
from collections import Counter

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import CompileConfig, DynamicCache, GenerationConfig, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer

PAD, PICTURE = 151643, 151654
TILE = [PICTURE] * 4
STEPS = 6


@pytest.fixture(scope="module")
def samples(golden_vision):
    """(ids, tiles) of a text, of a picture of one tile, and of two pictures of two tiles and one."""
    tiles = golden_vision["base.pixel_values"]
    return [
        ([9707, 11, 879, 525], tiles[:0]),
        ([5, 6, *TILE, 7], tiles[:1]),
        ([8, *TILE, *TILE, 9, *TILE, 10, 11], tiles),
    ]


def batch_of(samples, *, pad=PAD):
    """The samples, padded on the left."""
    longest = max(len(ids) for ids, _ in samples)
    tiles = torch.cat([pixels for _, pixels in samples])
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(ids)) + ids for ids, _ in samples]),
        "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in samples]),
        "pixel_values": tiles if len(tiles) else None,
    }


@pytest.fixture(scope="module")
def batch(samples):
    return batch_of(samples)


def decode(model, batch, *, steps=STEPS, **options):
    """(sequences, logits of every step), greedy."""
    options = {"do_sample": False, "pad_token_id": PAD, "min_new_tokens": steps, "max_new_tokens": steps, **options}
    output = model.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)
    return output.sequences, torch.stack(output.logits)


def assert_same(got, expected, *, rtol=1e-4, atol=1e-4):
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def plain(base_model, batch):
    """What the batch gives by default; its rows differ, so that a mix-up would show."""
    sequences, logits = decode(base_model, batch)
    assert len({tuple(row) for row in sequences[:, -STEPS:].tolist()}) == 3
    return sequences, logits


# ------------------------------------------------------------------------------------------------------------- caches

CACHES = {
    "dynamic, given": lambda model: {"past_key_values": DynamicCache(config=model.config.get_text_config())},
    "dynamic, given without a config": lambda model: {"past_key_values": DynamicCache()},
    "static": lambda model: {"cache_implementation": "static"},
    "static, given": lambda model: {"past_key_values": StaticCache(config=model.config, max_cache_len=40)},
    "offloaded": lambda model: {"cache_implementation": "offloaded"},
    "offloaded static": lambda model: {"cache_implementation": "offloaded_static"},
}


@pytest.fixture(params=CACHES)
def cache(request, base_model):
    """A function that gives `generate`'s options for a kind of cache, a fresh one each time."""
    return lambda: CACHES[request.param](base_model)


def test_every_cache_gives_the_same(base_model, batch, plain, cache):
    assert_same(decode(base_model, batch, **cache()), plain)


def test_beams_have_their_own_tiles_in_every_cache(base_model, samples, cache):
    beams = {"num_beams": 3, "num_return_sequences": 2, "min_new_tokens": STEPS, "max_new_tokens": STEPS}
    options = {"do_sample": False, "pad_token_id": PAD, **beams}
    alone = [base_model.generate(**batch_of([sample]), **options)[:, -STEPS:] for sample in samples]
    assert torch.equal(base_model.generate(**batch_of(samples), **options, **cache())[:, -STEPS:], torch.cat(alone))


def test_returned_sequences_have_their_own_tiles_in_every_cache(base_model, batch, plain, cache):
    """At a vanishing temperature sampling is greedy, for every returned sequence."""
    options = {"do_sample": True, "temperature": 1e-4, "num_return_sequences": 2, **cache()}
    sequences, _ = decode(base_model, batch, **options)
    assert torch.equal(sequences, plain[0].repeat_interleave(2, 0))


class NoStream(contextlib.nullcontext):
    """A CUDA stream on a machine without CUDA: nothing to wait for."""

    def wait_stream(self, other):
        pass


def test_layers_are_really_offloaded(base_model, batch, plain, monkeypatch):
    """The code that a GPU would run, with streams that do nothing."""
    moves = []
    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: NoStream())
    offload = DynamicLayer.offload
    monkeypatch.setattr(DynamicLayer, "offload", lambda layer: (moves.append(layer), offload(layer)))
    cache = DynamicCache(config=base_model.config.get_text_config(), offloading=True)
    assert_same(decode(base_model, batch, past_key_values=cache), plain)
    assert len(moves) == STEPS * base_model.config.llm_config.num_hidden_layers


# A backend's module, its settings, and how far its rounding may put keys and values, relative to their size.
QUANTISED = {
    "fp8": ("torch", {}, 0.05),
    "hqq": ("hqq", {"nbits": 8, "axis_key": 1, "axis_value": 1, "q_group_size": 16, "residual_length": 1}, 0.01),
    "quanto": ("optimum.quanto", {"nbits": 4, "q_group_size": 16, "residual_length": 1}, 0.1),
}


# quanto compiles C++ when it is first used, which takes minutes.
@pytest.fixture(params=["fp8", "hqq", pytest.param("quanto", marks=pytest.mark.long)])
def quantised(request):
    """(backend, settings, tolerance) of each kind of quantised cache that is installed."""
    module, settings, tolerance = QUANTISED[request.param]
    if request.param not in QuantizedCache.__doc__:
        pytest.skip(f"this transformers has no quantised cache in {request.param}")
    pytest.importorskip(module, reason=f"`pip install {module.replace('.', '-')}` was not done")
    return request.param, settings, tolerance


def test_a_quantised_cache_holds_the_decoders_keys_and_values(base_model, batch, quantised):
    """Its layers are those of the decoder, which it finds through the composite config."""
    backend, settings, tolerance = quantised
    full = DynamicCache()
    rounded = QuantizedCache(backend=backend, config=base_model.config, **settings)
    assert len(rounded.layers) == 3
    with torch.no_grad():
        for cache in (full, rounded):
            base_model(**batch, past_key_values=cache, use_cache=True)
    nothing = torch.zeros(3, 2, 1, 16)
    for expected, layer in zip(full.layers, rounded.layers, strict=True):
        held = layer.update(nothing, nothing)
        for part, whole in zip(held, (expected.keys, expected.values), strict=True):
            distance = (part[:, :, :-1] - whole).norm() / whole.norm()
            assert 0 < distance < tolerance


def test_generates_with_a_quantised_cache(base_model, batch, plain, quantised):
    backend, settings, _ = quantised
    options = {"cache_implementation": "quantized", "cache_config": {"backend": backend, **settings}}
    _, logits = decode(base_model, batch, **options)
    torch.testing.assert_close(logits[0], plain[1][0], rtol=1e-4, atol=1e-4)  # the prompt is read unrounded
    assert not torch.equal(logits[1], plain[1][1])
    assert logits.isfinite().all()


# ---------------------------------------------------------------------------------------------- going on from a cache


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("second_turns", [[0, 1, 2], [1, 1, 1], [2, 0, 0]])
def test_a_padded_batch_goes_on_from_its_cache(base_model, samples, batch, second_turns, chunk):
    """A second turn that reads only its own tokens gives what reading everything gives, new pictures included."""
    opened = base_model.generate(
        **batch, max_new_tokens=3, do_sample=False, pad_token_id=PAD, return_dict_in_generate=True
    )
    added = [samples[i] for i in second_turns]
    turn = batch_of(added)
    new_tokens = torch.ones_like(opened.sequences[:, -3:])
    everything = {
        "input_ids": torch.cat([opened.sequences, turn["input_ids"]], dim=1),
        "attention_mask": torch.cat([batch["attention_mask"], new_tokens, turn["attention_mask"]], dim=1),
    }
    both = [torch.cat([old, new]) for (_, old), (_, new) in zip(samples, added, strict=True)]
    whole = decode(base_model, {**everything, "pixel_values": torch.cat(both)})
    rest = {**everything, "pixel_values": turn["pixel_values"], "past_key_values": opened.past_key_values}
    assert_same(decode(base_model, rest, prefill_chunk_size=chunk), whole)


# ------------------------------------------------------------------------------------------------------ prompt lookup


def test_prompt_lookup_with_pictures_saves_steps(load_model, samples):
    """Two tokens that follow each other for ever: what is looked up is right, so several a step are accepted."""
    model = load_model("base")
    first, second = 6, 7
    options = {"sequence_bias": {(first,): 500.0, (first, second): 1000.0}, "steps": 20}
    ids, tiles = samples[1]
    passes = []
    model.language_model.register_forward_pre_hook(lambda *_: passes.append(1))
    one = batch_of([(ids, tiles)])
    expected = decode(model, one, **options)
    assert len(passes) == 20
    passes.clear()
    assert torch.equal(decode(model, one, prompt_lookup_num_tokens=4, **options)[0], expected[0])
    assert len(passes) < 15


# -------------------------------------------------------------------------------------------------- prefill in chunks


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 16, 17, 100])
@pytest.mark.parametrize("kind", ["dynamic, given", "static", "static, given"])
def test_prefill_in_chunks_gives_the_same(base_model, samples, batch, plain, chunk, kind):
    """Most of these cut a picture in the middle, and leave first chunks that are nothing but padding."""
    assert batch["input_ids"].shape[1] == 16
    assert_same(decode(base_model, batch, prefill_chunk_size=chunk, **CACHES[kind](base_model)), plain)
    alone = batch_of(samples[2:])  # without padding there is no mask
    expected = decode(base_model, alone)
    assert_same(decode(base_model, alone, prefill_chunk_size=chunk, **CACHES[kind](base_model)), expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_other_ways_to_decode_after_chunks(base_model, samples, options):
    options |= {"do_sample": False, "pad_token_id": PAD, "max_new_tokens": STEPS}
    batch = batch_of(samples if "num_beams" in options else samples[2:])
    expected = base_model.generate(**batch, **options)
    assert torch.equal(base_model.generate(**batch, **options, prefill_chunk_size=3), expected)


def test_the_decoder_never_reads_more_than_a_chunk(load_model, batch, plain):
    model = load_model("base")
    lengths = []
    layer = model.language_model.model.layers[0]
    layer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    config = GenerationConfig(prefill_chunk_size=6, max_new_tokens=STEPS, do_sample=False, pad_token_id=PAD)
    sequences = model.generate(**batch, generation_config=config)
    assert torch.equal(sequences, plain[0])
    assert lengths == [6, 6, 4] + [1] * (STEPS - 1)
    assert config.prefill_chunk_size == 6


def test_chunks_where_padding_is_the_placeholder_itself(base_model, samples, plain):
    """Some pad with the very token that stands for pictures."""
    sequences, logits = decode(base_model, batch_of(samples, pad=PICTURE), prefill_chunk_size=3)
    torch.testing.assert_close(logits, plain[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(sequences[:, -STEPS:], plain[0][:, -STEPS:])


def test_chunks_of_embeddings(base_model, batch, plain):
    embedded = {**batch, "inputs_embeds": base_model.get_input_embeddings()(batch["input_ids"])}
    del embedded["input_ids"]
    sequences, logits = decode(base_model, embedded, prefill_chunk_size=5)
    torch.testing.assert_close(logits, plain[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(sequences[:, -STEPS:], plain[0][:, -STEPS:])


def test_chunks_in_chat(base_model, tokenizer, golden_chat, golden_vision):
    golden = golden_chat["cases"]["base"]["one_image"]
    pixel_values = golden_vision["base.pixel_values"]
    greedy = {"max_new_tokens": len(golden["new_ids"]), "do_sample": False}
    answers = [
        base_model.chat(tokenizer, pixel_values, golden["question"], {**greedy, **chunks})
        for chunks in ({}, {"prefill_chunk_size": 10})
    ]
    assert answers[0] == answers[1] != ""


def test_chunks_in_forward(base_model, batch):
    """Straight through `forward`, with and without a cache of the caller's: the last chunk's logits."""
    with torch.no_grad():
        expected = base_model(**batch).logits
        for cache in (None, DynamicCache()):
            output = base_model(**batch, prefill_chunk_size=6, past_key_values=cache)
            torch.testing.assert_close(output.logits, expected[:, -4:], rtol=1e-4, atol=1e-4)
            assert output.past_key_values.get_seq_length() == 16


def test_what_chunks_can_not_do_is_said(base_model, batch):
    with pytest.raises(ValueError, match="needs the KV cache"):
        decode(base_model, batch, prefill_chunk_size=4, use_cache=False)
    with pytest.raises(ValueError, match="computes no logits for labels"):
        base_model(**batch, prefill_chunk_size=4, labels=batch["input_ids"])
    with pytest.raises(ValueError, match="prefill_chunk_size is 0, expected a number of tokens, at least 1"):
        base_model(**batch, prefill_chunk_size=0)


# ------------------------------------------------------------------------------------------------- attention backends


@pytest.fixture
def plain_flex(monkeypatch):
    """Flex attention as torch itself defines it, not compiled: for a CPU, compilers know some shapes only."""
    wrapper = "transformers.integrations.flex_attention.WrappedFlexAttention.__call__"
    monkeypatch.setattr(wrapper, lambda self: flex_attention)


def attending(load_model, attention):
    """A model whose parts all have this attention."""
    model = load_model("base", attn_implementation=attention)
    parts = (model.config, model.vision_model.config, model.language_model.config)
    assert [part._attn_implementation for part in parts] == [attention] * 3
    return model


@pytest.mark.usefixtures("plain_flex")
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_backends_agree(load_model, batch, plain, attention, chunk):
    assert_same(decode(attending(load_model, attention), batch, prefill_chunk_size=chunk), plain)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_backends_agree_in_a_static_cache(load_model, batch, plain, attention):
    assert_same(decode(attending(load_model, attention), batch, cache_implementation="static"), plain)


def test_flex_attention_refuses_a_static_cache(load_model, batch):
    """It would give wrong logits on transformers 5.16, and an error that says nothing on 5.23."""
    model = attending(load_model, "flex_attention")
    for kind in ("static", "static, given"):
        with pytest.raises(ValueError, match="Flex attention can't read a static cache"):
            decode(model, batch, **CACHES[kind](model))
    with pytest.raises(ValueError, match="Flex attention can't read a static cache"):
        model(**batch, past_key_values=StaticCache(config=model.config, max_cache_len=40))


@pytest.mark.long
def test_compiled_flex_attention_agrees(load_model, base_model, batch):
    """One shape: torch 2.14 writes wrong C++ for shapes that change, as those of a growing cache do."""
    torch._dynamo.reset()
    with torch.no_grad():
        expected = base_model(**batch).logits
        got = attending(load_model, "flex_attention")(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-4)


def test_sdpa_reaches_the_gradients_of_eager_attention(load_model, batch):
    """Flex attention has no gradients on a CPU."""
    gradients = []
    for attention in ("eager", "sdpa"):
        model = load_model("base", attn_implementation=attention).train()
        model(**batch, labels=labels_of(batch)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() < 1e-3 * expected.norm(), name


# ----------------------------------------------------------------------------------------------------------- training


def labels_of(batch):
    """Loss on everything but pictures, padding and what follows padding: nothing is there to predict it from."""
    ids = batch["input_ids"]
    return ids.masked_fill((ids == PICTURE) | (batch["attention_mask"].cumsum(-1) < 2), -100)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(load_model, batch, use_reentrant):
    """In encoder and decoder; every layer really runs a second time for them."""
    losses, gradients, runs = [], [], []
    for checkpointing in (False, True):
        model = load_model("base").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        layers = [*model.vision_model.encoder.layers, *model.language_model.model.layers]
        count = Counter()
        for layer in layers:
            layer.mlp.register_forward_pre_hook(lambda mlp, _, count=count: count.update([mlp]))
        loss = model(**batch, labels=labels_of(batch)).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        runs.append([count[layer.mlp] for layer in layers])
    assert runs == [[1] * 6, [2] * 6]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for name, expected in gradients[0].items():
        assert expected.abs().max() > 0, name
        assert (gradients[1][name] - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("trained", ["mlp1.", ("mlp1.", "language_model.")], ids=["stage 1", "stage 2"])
def test_one_step_lowers_the_loss_and_moves_what_is_trained(load_model, batch, trained):
    model = load_model("base").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss = model(**batch, labels=labels_of(batch)).loss
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert model(**batch, labels=labels_of(batch)).loss < loss
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith(trained), name


# ------------------------------------------------------------------------------------------------- compiled, exported


class Graphs:
    """A backend of torch.compile that counts graphs and runs them as they are."""

    def __init__(self):
        torch._dynamo.reset()
        self.count = 0

    def compile(self, graph, example_inputs):
        self.count += 1
        return graph.forward


def compiled_generation(**options):
    """What makes `generate` compile on a CPU too, without graph breaks."""
    config = CompileConfig(fullgraph=True, mode=None, **options)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def test_the_decode_step_is_one_graph(load_model, batch, plain):
    """No graph break, and no recompilation from step to step, from call to call of the same size."""
    model = load_model("base")
    graphs = Graphs()
    options = compiled_generation(backend=lambda *args: graphs.compile(*args))
    assert_same(decode(model, batch, **options), plain)
    assert graphs.count == 1
    assert_same(decode(model, batch, **options), plain)
    assert graphs.count == 1


@pytest.mark.long
def test_the_decode_step_in_inductor(load_model, batch, plain):
    torch._dynamo.reset()
    assert_same(decode(load_model("base"), batch, **compiled_generation(backend="inductor")), plain)


@pytest.mark.parametrize("backend", ["graphs", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_encoder(load_model, batch, backend):
    """The second number of tiles makes the graph one of any number; a single tile has its own."""
    model = load_model("base")
    graphs = Graphs()
    counts = []
    with torch.no_grad():
        tiles = [batch["pixel_values"][:number] for number in (4, 2, 3, 1)]
        expected = [model.extract_feature(pixels) for pixels in tiles]
        model.vision_model.compile(fullgraph=True, backend=graphs.compile if backend == "graphs" else backend)
        for pixels, features in zip(tiles, expected, strict=True):
            torch.testing.assert_close(model.extract_feature(pixels), features, rtol=1e-4, atol=1e-4)
            counts.append(graphs.count)
    assert counts == ([1, 2, 2, 3] if backend == "graphs" else [0, 0, 0, 0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_exported_encoder(load_model, batch, attention, tmp_path):
    """Saved and loaded, the program takes any number of tiles."""
    encoder = load_model("base", attn_implementation=attention).vision_model
    pixels = batch["pixel_values"]
    tiles = torch.export.Dim("tiles", max=64)
    with torch.no_grad():
        program = torch.export.export(encoder, (pixels[:2],), dynamic_shapes={"pixel_values": {0: tiles}}, strict=False)
        torch.export.save(program, tmp_path / "encoder.pt2")
        exported = torch.export.load(tmp_path / "encoder.pt2").module()
        for count in (1, 2, 3, 4, 13):
            some = pixels.repeat(4, 1, 1, 1)[:count]
            expected = encoder(some)
            output = exported(some)
            torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-4)
            assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
