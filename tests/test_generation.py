"""Standard `generate`: every way to decode, with each sample's own pictures, cached or not."""

import pytest
import torch

PAD = 151643
TILE = [151654] * 4


@pytest.fixture
def samples(golden_vision):
    """(ids, tiles) of a text, a one-tile and a two-tile sample."""
    tiles = golden_vision["base.pixel_values"]
    return [
        ([9707, 11, 879, 525], None),
        ([5, 6, *TILE, 7], tiles[:1]),
        ([8, *TILE, 9, *TILE, 10, 11], tiles[1:]),
    ]


def batch_of(samples):
    """The samples, padded on the left."""
    longest = max(len(ids) for ids, _ in samples)
    tiles = [pixels for _, pixels in samples if pixels is not None]
    return {
        "input_ids": torch.tensor([[PAD] * (longest - len(ids)) + ids for ids, _ in samples]),
        "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in samples]),
        **({"pixel_values": torch.cat(tiles)} if tiles else {}),
    }


def new_ids(model, batch, *, steps=8, **options):
    """What is generated after each row; `min_new_tokens` keeps the rows of a batch equally long."""
    options = {"do_sample": False, "pad_token_id": PAD, "min_new_tokens": steps, "max_new_tokens": steps, **options}
    output = model.generate(**batch, **options)
    prompt = batch["input_ids"]
    repeats = len(output) // len(prompt)
    assert torch.equal(output[:, : prompt.shape[1]], prompt.repeat_interleave(repeats, 0)), "prompt + continuation"
    return output[:, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 1, 2)])
def test_batch_composition_changes_nothing(base_model, samples, order):
    alone = [new_ids(base_model, batch_of([samples[i]]))[0] for i in order]
    assert new_ids(base_model, batch_of([samples[i] for i in order])) == alone
    assert len({tuple(row) for row in alone}) == len(set(order))


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}]
)
def test_decoding_variant_changes_nothing(base_model, samples, options):
    for sample in samples:
        batch = batch_of([sample])
        assert new_ids(base_model, batch, **options) == new_ids(base_model, batch)


def test_no_cache_over_a_mixed_batch(base_model, samples):
    batch = batch_of(samples)
    assert new_ids(base_model, batch, use_cache=False) == new_ids(base_model, batch)


def test_placeholders_that_the_model_wrote_itself_are_tokens(base_model, samples):
    """Without a cache every step reads them again, and must not look for a picture there."""
    batch = batch_of(samples[1:])
    forced = {"bad_words_ids": None, "sequence_bias": {(151654,): 1e4}}
    written = new_ids(base_model, batch, **forced)
    assert written == [[151654] * 8] * 2
    assert new_ids(base_model, batch, use_cache=False, **forced) == written


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_each_beam_has_its_samples_own_tiles(base_model, samples, options):
    alone = [row for sample in samples for row in new_ids(base_model, batch_of([sample]), **options)]
    assert new_ids(base_model, batch_of(samples), **options) == alone


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_counts_that_disagree_are_an_error_with_both_numbers(base_model, samples, options):
    batch = batch_of(samples)
    with pytest.raises(ValueError, match=r"12 placeholders .* for 8 features"):
        new_ids(base_model, {**batch, "pixel_values": batch["pixel_values"][:2]}, **options)
    with pytest.raises(ValueError, match="pictures but no prompt"):
        base_model.generate(pixel_values=batch["pixel_values"], **options)


def test_sampled_sequences_have_their_samples_own_tiles(base_model, samples):
    """At a vanishing temperature sampling is greedy, for every returned sequence."""
    options = {"do_sample": True, "temperature": 1e-4, "num_return_sequences": 2}
    greedy = [row for row in new_ids(base_model, batch_of(samples)) for _ in range(2)]
    assert new_ids(base_model, batch_of(samples), **options) == greedy


def test_sampling_follows_the_seed(base_model, samples):
    def draw(seed):
        torch.manual_seed(seed)
        return new_ids(base_model, batch_of(samples), do_sample=True, temperature=2.0)

    assert draw(1) == draw(1) != draw(2)


def test_goes_on_from_a_cache(base_model, samples):
    """A second turn that reads only its own tokens gives what reading everything gives, new picture included."""
    (first, tiles), (second, more_tiles) = samples[1], samples[2]
    opened = base_model.generate(
        **batch_of([(first, tiles)]), max_new_tokens=3, do_sample=False, pad_token_id=PAD, return_dict_in_generate=True
    )
    everything = opened.sequences[0].tolist() + second
    whole = new_ids(base_model, batch_of([(everything, torch.cat([tiles, more_tiles]))]))
    rest = {**batch_of([(everything, more_tiles)]), "past_key_values": opened.past_key_values}
    assert new_ids(base_model, rest) == whole


def test_scores_and_dict_output(base_model, samples):
    output = base_model.generate(
        **batch_of(samples),
        max_new_tokens=2,
        do_sample=False,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
        output_hidden_states=True,
    )
    assert [score.shape for score in output.scores] == [(3, 152064)] * 2
    assert len(output.hidden_states) == 2
