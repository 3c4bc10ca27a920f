"""The released code's numbers (transformers 4.39.3, float32, CPU), for every golden case.

`golden/chat.json` and `golden/vision.safetensors` were written by the released NVLM-D-72B code; see golden/README.md.
`test_transformers_versions.py` runs this file on the other transformers versions.
"""

from itertools import product

import pytest
import torch
from PIL import Image

from nvlm import load_image

CASES = ["base", "dummy_nonzero", "ps_v1", "select_layer_-2"]
CHATS = [("base", name) for name in ("text", "one_image", "second_turn", "single_tile", "two_images", "no_chat_prompt")]
CHATS += [(case, name) for case in CASES[1:] for name in ("text", "one_image")]
VARIANTS = list(product(["eager", "sdpa"], [True, False]))


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: f"{v[0]}-{'dropped' if v[1] else 'kept'}")
def models(request, load_model):
    """case -> model, with one attention backend and the dummy heads dropped or kept."""
    attention, drop = request.param
    loaded = {}

    def model(case):
        if case not in loaded:
            loaded[case] = load_model(case, attn_implementation=attention, drop_dummy_heads=drop)
            keeps_heads = not drop or case == "dummy_nonzero"
            assert loaded[case].config.vision_config.num_dummy_heads == (7 if keeps_heads else 0)
            assert loaded[case].vision_model.config._attn_implementation == attention
        return loaded[case]

    return model


def pictures(recipe, golden):
    """The golden case's tiles of all pictures, or None."""
    if not golden.get("pictures"):
        return None
    tiles = [
        load_image(Image.fromarray(recipe.picture(*args)), input_size=56, max_num=6) for args in golden["pictures"]
    ]
    assert [len(t) for t in tiles] == golden["num_patches_list"]
    return torch.cat(tiles)


class Recorded:
    """A model whose `generate` notes the prompt, the new ids and the first step's logits."""

    def __init__(self, model, monkeypatch):
        original = model.generate

        def generate(**inputs):
            output = original(**inputs, return_dict_in_generate=True, output_logits=True)
            self.prompt = inputs["input_ids"][0].tolist()
            self.new = output.sequences[0, len(self.prompt) :].tolist()
            self.first_logits = output.logits[0][0]
            return output

        monkeypatch.setattr(model, "generate", generate)


def test_every_case_of_the_file_is_run(golden_chat):
    cases = golden_chat["cases"]
    assert sorted(CHATS) == sorted((case, name) for case in cases for name in cases[case])


@pytest.mark.parametrize(("case", "name"), CHATS)
def test_chat(models, recipe, tokenizer, golden_chat, monkeypatch, case, name):
    golden = golden_chat["cases"][case][name]
    model = models(case)
    recorded = Recorded(model, monkeypatch)
    chat = getattr(model, golden["method"])
    history = [tuple(turn) for turn in golden["history"][:-1]] if golden["history"] else None
    response, new_history = chat(
        tokenizer,
        pictures(recipe, golden),
        golden["question"],
        {"max_new_tokens": len(golden["new_ids"]), "do_sample": False},
        history=history,
        return_history=True,
        num_patches_list=golden["num_patches_list"] or None,
    )
    assert recorded.prompt == golden["input_ids"]
    assert recorded.new == golden["new_ids"]
    assert response == golden["response"]
    if golden["history"]:
        assert new_history == [tuple(turn) for turn in golden["history"]]
    expected = golden["next_token"]
    assert recorded.first_logits.topk(20).indices.tolist() == expected["ids"]
    torch.testing.assert_close(
        recorded.first_logits[expected["ids"]], torch.tensor(expected["values"]), rtol=0, atol=2e-4
    )
    assert recorded.first_logits.logsumexp(-1).item() == pytest.approx(expected["logsumexp"], abs=2e-4)


@pytest.mark.parametrize("case", CASES)
def test_vision(models, golden_vision, case):
    model = models(case)
    pixel_values = golden_vision[f"{case}.pixel_values"]
    with torch.no_grad():
        encoded = model.vision_model(pixel_values).last_hidden_state
        features = model.extract_feature(pixel_values)
    for value, name in ((encoded, "vision_last_hidden_state"), (features, "image_features")):
        expected = golden_vision[f"{case}.{name}"]
        assert (value - expected).abs().max() <= 1e-4 * expected.abs().max()
